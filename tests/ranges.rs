//! Verifies what becomes of the ranges: a new one opens the way, a bad list changes nothing.

use tests::{Lab, Plan, assert_matched, scenarios};

#[test]
fn a_range_that_the_feed_gains_and_loses_opens_and_closes_the_way() {
    let lab = Lab::start(&Plan::default());

    assert_matched(&scenarios::a_new_range_opens_the_way(&lab));
}

#[test]
fn a_bad_list_changes_nothing_and_is_counted() {
    let lab = Lab::start(&Plan::default());

    assert_matched(&scenarios::bad_lists_change_nothing(&lab));
}
