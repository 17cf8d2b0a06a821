//! Verifies what becomes of a source's ranges, list by list: by examples, and against a model that
//! counts single addresses and looks at all of history each time.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;
use crate::ranges::{Families, Format, baseline};

#[test]
fn additions_apply_at_once() {
    let known = known(FOUR);

    let merged = merge(&known, &format!("{FOUR}\n192.0.9.0/24"), 0).unwrap();

    assert!(merged.set().contains("192.0.9.1".parse().unwrap()));
}

#[test]
fn a_list_that_adds_more_than_a_quarter_of_the_addresses_is_refused() {
    let quarter = format!("{FOUR}\n192.0.9.0/24");
    for more in ["192.0.9.0/24\n192.0.10.0/32", "8.0.0.0/9", "2a00:1::/32"] {
        let rejection = merge(&known(FOUR), &format!("{FOUR}\n{more}"), 0).unwrap_err();
        assert!(matches!(rejection, Rejection::Grows { .. }), "{rejection}");
    }
    assert!(merge(&known(FOUR), &quarter, 0).is_ok());
}

#[test]
fn a_list_that_goes_back_to_what_was_before_an_agreed_growth_needs_neither_grace_nor_approval() {
    let much = format!("{FOUR}\n8.0.0.0/9");
    let approved = MergePolicy {
        large_change: LargeChange::Agreed,
        ..policy(Duration::ZERO, &LIMITS)
    };
    let grown = known(FOUR).merge(&check(&much), &approved).unwrap();
    let confirmed = merge(&grown, &much, 3600).unwrap();
    let added = "8.1.2.3".parse().unwrap();
    assert!(confirmed.set().contains(added));
    assert_eq!(confirmed.before_growth(), Some(&check(FOUR)));

    // At once, with an addition, and although one range of before has vanished since.
    let back = merge(&confirmed, FOUR, 0).unwrap();
    assert_eq!((back.set(), back.vanished()), (&check(FOUR), [].as_slice()));
    assert_eq!(back.before_growth(), None);
    let and_more = merge(&confirmed, &format!("{FOUR}\n192.0.9.0/24"), 0).unwrap();
    assert!(!and_more.set().contains(added));
    // What was there before the growth goes as ever.
    let rejection = merge(&confirmed, "192.0.4.0/24\n2a00::/32", 0).unwrap_err();
    assert!(
        matches!(rejection, Rejection::Shrinks { .. }),
        "{rejection}"
    );
}

#[test]
fn what_has_gone_since_an_agreed_growth_does_not_come_back_with_what_was_before_it() {
    let approved = MergePolicy {
        large_change: LargeChange::Agreed,
        ..policy(Duration::ZERO, &LIMITS)
    };
    let grown = "192.0.4.0/24\n192.0.5.0/24\n8.0.0.0/9\n2a00::/32";
    let after = known(FOUR).merge(&check(grown), &approved).unwrap();
    let gone = merge(&after, grown, GRACE.as_secs()).unwrap();
    assert_eq!(gone.set(), &check(grown));
    assert_eq!(gone.before_growth(), Some(&check(FOUR)));

    let rejection = merge(&gone, FOUR, 0).unwrap_err();
    assert!(matches!(rejection, Rejection::Grows { .. }), "{rejection}");
}

#[test]
fn a_vanished_range_stays_for_its_grace_and_then_goes() {
    let soon = merge(&known(FOUR), THREE, 7).unwrap();
    let still = merge(&soon, THREE, GRACE.as_secs() - 1).unwrap();
    let gone = merge(&still, THREE, 1).unwrap();

    assert!(soon.set().has(&fourth()));
    assert!(still.set().has(&fourth()));
    assert!(!gone.set().has(&fourth()));
}

#[test]
fn a_range_that_returns_begins_its_grace_anew() {
    let gone = merge(&known(FOUR), THREE, 0).unwrap();
    let back = merge(&gone, FOUR, GRACE.as_secs() - 1).unwrap();
    let gone_again = merge(&back, THREE, 10).unwrap();
    let still = merge(&gone_again, THREE, GRACE.as_secs() - 1).unwrap();

    assert_eq!(back.vanishing(&fourth()), None);
    assert!(still.set().has(&fourth()));
}

#[test]
fn a_range_that_is_only_split_or_joined_is_not_kept() {
    let split = "192.0.4.0/25\n192.0.4.128/25\n192.0.5.0/24\n192.0.6.0/23\n2a00::/33\n\
        2a00:0:8000::/33";

    let merged = merge(&known(FOUR), split, 0).unwrap();
    let joined = merge(&merged, FOUR, 0).unwrap();

    assert_eq!(merged.set(), &check(split));
    assert_eq!(joined.set(), &check(FOUR));
    assert_eq!(joined.vanished(), []);
}

#[test]
fn a_range_that_somebody_comes_from_stays_beyond_its_grace() {
    let known = merge(&known(FOUR), THREE, 0).unwrap();
    let fourth = [fourth()];
    let after = |idle| {
        let policy = MergePolicy {
            idle,
            ..policy(GRACE, &LIMITS)
        };
        assert!(known.has_due(&policy));
        known.merge(&check(THREE), &policy).unwrap()
    };

    assert!(after(Unused::Only(&[])).set().has(&fourth[0]));
    assert!(!after(Unused::Only(&fourth)).set().has(&fourth[0]));
    assert!(!after(Unused::All).set().has(&fourth[0]));
}

#[test]
fn the_oldest_vanished_range_decides_whether_somebody_has_to_be_asked() {
    let two = "192.0.4.0/24\n192.0.5.0/24\n192.0.6.0/24\n192.0.7.0/26\n2a00::/32";
    let older = merge(&known(FOUR), THREE, 0).unwrap();
    let both = merge(&older, two, GRACE.as_secs() - 1).unwrap();

    assert_eq!(both.vanished().len(), 2);
    assert!(!both.has_due(&policy(Duration::ZERO, &LIMITS)));
    assert!(both.has_due(&policy(Duration::from_secs(1), &LIMITS)));
}

#[test]
fn a_list_that_removes_more_than_a_quarter_of_the_addresses_is_refused() {
    let half = "192.0.4.0/23\n2a00::/32";
    let quarter = "192.0.4.0/24\n192.0.5.0/24\n192.0.6.0/24\n2a00::/32";
    let quarter_and_one = "192.0.4.0/24\n192.0.5.0/24\n192.0.6.0/25\n192.0.6.128/26\n\
        192.0.6.192/27\n192.0.6.224/28\n192.0.6.240/29\n192.0.6.248/30\n192.0.6.252/31\n\
        192.0.6.254/32\n2a00::/32";

    assert!(merge(&known(FOUR), quarter, 0).is_ok());
    for list in [half, quarter_and_one] {
        let rejection = merge(&known(FOUR), list, 0).unwrap_err();
        assert!(
            matches!(rejection, Rejection::Shrinks { .. }),
            "{rejection}"
        );
    }
}

#[test]
fn a_list_that_shrinks_step_by_step_is_refused_as_well() {
    let five = "192.0.4.0/24\n192.0.5.0/24\n192.0.6.0/24\n192.0.7.0/24\n192.0.8.0/24\n2a00::/32";
    let three = "192.0.4.0/24\n192.0.5.0/24\n192.0.6.0/24\n2a00::/32";

    let four_left = merge(&known(five), FOUR, 0).unwrap();
    let rejection = merge(&four_left, three, 1).unwrap_err();

    assert!(matches!(rejection, Rejection::Shrinks { percent: 40, .. }));
}

#[test]
fn a_shrinking_that_was_agreed_to_still_waits_and_is_not_refused_again() {
    let half = "192.0.4.0/23\n2a00::/32";
    let approved = MergePolicy {
        large_change: LargeChange::Agreed,
        ..policy(Duration::ZERO, &LIMITS)
    };

    let merged = known(FOUR).merge(&check(half), &approved).unwrap();
    let still = merge(&merged, half, GRACE.as_secs() - 1).unwrap();
    let gone = merge(&still, half, 1).unwrap();
    let further = merge(&still, "192.0.4.0/24\n2a00::/32", 0).unwrap_err();

    assert!(still.set().has(&fourth()));
    assert_eq!(gone.set(), &check(half));
    assert!(matches!(further, Rejection::Shrinks { .. }));
}

#[test]
fn the_change_of_april_2021_goes_through_by_itself() {
    let current: Vec<_> = baseline()
        .unwrap()
        .ranges()
        .iter()
        .map(ToString::to_string)
        .collect();
    let current = current.join("\n");
    let before = current.replace("104.16.0.0/13\n104.24.0.0/14", "104.16.0.0/12");

    let merged = merge(&known(&before), &current, 0).unwrap();
    let later = merge(&merged, &current, GRACE.as_secs()).unwrap();

    assert!(merged.set().contains("104.28.0.1".parse().unwrap()));
    assert!(!later.set().contains("104.28.0.1".parse().unwrap()));
    assert_eq!(later.set(), &check(&current));
}

/// What one fetch of the source came to, in the properties below.
#[derive(Clone, Debug)]
struct Step {
    /// Seconds since the one before.
    after: u64,
    /// The body.
    body: String,
    /// Which of the blocks clients came from.
    in_use: BTreeSet<u8>,
    approved: bool,
}

/// All of history, and a set of addresses: slow, and nothing but the rule.
#[derive(Default)]
struct Naive {
    /// The lists that were taken in: when, and which blocks they held.
    taken: Vec<(u64, BTreeSet<u8>)>,
    active: BTreeSet<u8>,
    /// Blocks that went with an agreed shrinking and did not come back.
    approved: BTreeSet<u8>,
    /// Blocks that were there before an agreed growth.
    before_growth: Option<BTreeSet<u8>>,
}

impl Naive {
    fn take(&mut self, now: u64, list: &BTreeSet<u8>, answer: &Step) -> bool {
        let (mut active, mut before) = (self.active.clone(), self.before_growth.clone());
        if let Some(growth_of) = before.clone().filter(|blocks| blocks.is_subset(list)) {
            let added: BTreeSet<_> = active.difference(&growth_of).copied().collect();
            if added.is_disjoint(list) {
                // What has gone since is a growth if it comes back.
                active.retain(|block| growth_of.contains(block));
                before = None;
            }
        }
        let expected: BTreeSet<_> = active.difference(&self.approved).copied().collect();
        let lost = expected.difference(list).count();
        let grows = list.difference(&active).count() * 4 > active.len();
        if !answer.approved && (lost * 4 > expected.len() || grows) {
            return false;
        }
        self.before_growth = if grows { Some(active.clone()) } else { before };
        self.active = active;
        let missing: BTreeSet<_> = self.active.difference(list).copied().collect();
        self.taken.push((now, list.clone()));
        for block in &missing {
            let last = self
                .taken
                .iter()
                .rposition(|(_, taken)| taken.contains(block));
            let first_without = self.taken[last.map_or(0, |last| last + 1)].0;
            let is_over = now - first_without >= GRACE.as_secs();
            if is_over && !answer.in_use.contains(block) {
                self.active.remove(block);
            }
        }
        if answer.approved {
            self.approved.extend(&missing);
        }
        self.active.extend(list);
        self.approved
            .retain(|block| !list.contains(block) && self.active.contains(block));
        true
    }
}

proptest! {
    #[test]
    fn ranges_come_and_go_as_in_the_model(answers in answers()) {
        let first: BTreeSet<u8> = (0..BLOCKS).collect();
        let mut known = known(&text(&first));
        let mut model = Naive { active: first.clone(), ..Naive::default() };
        model.taken.push((0, first));
        let (mut now, mut last) = (0, 0);
        let mut listed_at = vec![0; usize::from(BLOCKS)];

        for answer in answers {
            now += answer.after;
            let before = known.clone();
            let idle = (0..BLOCKS).filter(|block| !answer.in_use.contains(block));
            let idle: Vec<_> = idle.map(range).collect();
            let policy = MergePolicy {
                passed: Duration::from_secs(now - last),
                idle: Unused::Only(&idle),
                large_change: if answer.approved { LargeChange::Agreed } else { LargeChange::Refuse },
                ..policy(Duration::ZERO, &LIMITS)
            };
            let list = Feed::parse(answer.body.as_bytes(), &Format::Cloudflare).ok();
            let list = list.and_then(|feed| RangeSet::check(feed, Families::Both, &LIMITS).ok());
            if let Some(list) = &list {
                let blocks = blocks(list);
                match known.merge(list, &policy) {
                    Ok(merged) => {
                        prop_assert!(model.take(now, &blocks, &answer), "taken, but not by the model");
                        known = merged;
                        last = now;
                        for block in blocks {
                            listed_at[usize::from(block)] = now;
                        }
                    }
                    Err(rejection) => prop_assert!(!model.take(now, &blocks, &answer), "{}", rejection),
                }
            }

            // What the rule says, in three ways.
            prop_assert_eq!(blocks(known.set()), model.active.clone());
            for block in blocks(before.set()).difference(&blocks(known.set())) {
                let unlisted = now - listed_at[usize::from(*block)];
                // What a growth has added goes as it came.
                if before.before_growth().is_some_and(|set| !set.has(&range(*block))) {
                    continue;
                }
                prop_assert!(unlisted >= GRACE.as_secs(), "{} went after {} s", block, unlisted);
            }
            for net in known.set().iter() {
                prop_assert!(is_global(net), "{} was let in", net);
            }
        }
    }
}

/// Answers of a source that is sometimes wrong, sometimes hostile.
fn answers() -> impl Strategy<Value = Vec<Step>> {
    let list = prop::collection::btree_set(0..BLOCKS, 8..=usize::from(BLOCKS));
    let hostile = prop::sample::select(vec![
        "10.0.0.0/8",
        "0.0.0.0/0",
        "::/0",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "100.64.0.0/10",
        "224.0.0.0/4",
        "198.18.0.0/15",
        "192.0.0.0/24",
        "192.88.99.0/24",
        "240.0.0.0/8",
        "2001::/32",
        "2002::/19",
        "fe80::/10",
        "fc00::/7",
        "64.0.0.1/24",
        "64.0.0.1.2",
        "64.0.0.0/2464.0.1.0/24",
        "<html>",
    ]);
    let body = (list, prop::option::weighted(0.2, hostile)).prop_map(|(list, hostile)| {
        let mut text = text(&list);
        text.extend(hostile.map(|line| format!("\n{line}")));
        text
    });
    let body = prop_oneof![8 => body, 1 => Just(String::new()), 1 => Just("{}".to_owned())];
    let in_use = prop::collection::btree_set(0..BLOCKS, 0..3);
    let answer = (0..GRACE.as_secs(), body, in_use, prop::bool::weighted(0.2));
    let answer = answer.prop_map(|(after, answered, used, approved)| Step {
        after,
        body: answered,
        in_use: used,
        approved,
    });
    prop::collection::vec(answer, 1..40)
}

/// Block `n` is 64.0.n.0/24, so that shares of addresses are shares of blocks.
fn range(block: u8) -> IpNet {
    format!("64.0.{block}.0/24").parse().unwrap()
}

fn text(blocks: &BTreeSet<u8>) -> String {
    let blocks = blocks.iter().map(|block| range(*block).to_string());
    let lines: Vec<_> = blocks.chain(["2a00::/32".to_owned()]).collect();
    lines.join("\n")
}

fn blocks(set: &RangeSet) -> BTreeSet<u8> {
    set.v4().iter().map(|net| net.addr().octets()[2]).collect()
}

/// Address by address at its ends, by other words than the guard's.
fn is_global(net: IpNet) -> bool {
    let is_global_v4 = |address: Ipv4Addr| {
        !address.is_private()
            && !address.is_loopback()
            && !address.is_link_local()
            && !address.is_multicast()
            && !address.is_unspecified()
            && address.octets()[0] < 240
            && (address.octets()[0], address.octets()[1] & 0xc0) != (100, 64)
            && (address.octets()[0], address.octets()[1] & 0xfe) != (198, 18)
            && address.octets()[..3] != [192, 0, 0]
            && address.octets()[..3] != [192, 88, 99]
    };
    match net {
        IpNet::V4(net) => is_global_v4(net.network()) && is_global_v4(net.broadcast()),
        IpNet::V6(net) => {
            let [first, second, ..] = net.network().segments();
            first & 0xe000 == 0x2000 && first != 0x2002 && (first != 0x2001 || second >= 0x200)
        }
    }
}

fn fourth() -> IpNet {
    "192.0.7.0/24".parse().unwrap()
}

fn check(text: &str) -> RangeSet {
    RangeSet::check(Feed::from_texts([text]).unwrap(), Families::Both, &LIMITS).unwrap()
}

fn known(text: &str) -> SourceRanges {
    SourceRanges::new(check(text))
}

fn merge(known: &SourceRanges, fetched: &str, passed: u64) -> Result<SourceRanges, Rejection> {
    known.merge(
        &check(fetched),
        &policy(Duration::from_secs(passed), &LIMITS),
    )
}

fn policy(passed: Duration, limits: &GuardLimits) -> MergePolicy<'_> {
    MergePolicy {
        passed,
        grace: GRACE,
        idle: Unused::All,
        is_published: true,
        large_change: LargeChange::Refuse,
        limits,
    }
}

const FOUR: &str = "192.0.4.0/24\n192.0.5.0/24\n192.0.6.0/24\n192.0.7.0/24\n2a00::/32";
/// The same without half of the fourth: less than a quarter is lost.
const THREE: &str = "192.0.4.0/24\n192.0.5.0/24\n192.0.6.0/24\n192.0.7.0/25\n2a00::/32";
const GRACE: Duration = Duration::from_secs(86_400);
const BLOCKS: u8 = 16;
const LIMITS: GuardLimits = GuardLimits {
    entries: 4096,
    addresses_v4: 1 << 24,
    networks_v6: 1 << 12,
    documentation: guard::Documentation::Refuse,
};
