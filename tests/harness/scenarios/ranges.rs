//! Scenario 7: what the feed says, and what becomes of it.

use super::gate::pairs;
use super::{Attempt, Row};
use crate::client::{Client, Reply};
use crate::feed::{Answer, api_answer};
use crate::net::Host;
use crate::pki::SHOP;
use crate::{Lab, eventually};

/// 7a. The feed gains a range that covers the stranger: within one refresh he connects, and is
///    refused for want of a certificate. When the range goes, so does he.
#[must_use]
pub fn a_new_range_opens_the_way(lab: &Lab) -> Vec<Row> {
    let more = api_answer(&["198.51.100.0/24"], &["2001:db8::/48"]);
    lab.refresh(Answer::Body(more));
    let client = Client::new(&lab.pki, None);
    let mut rows = Vec::new();
    for [stranger, origin] in pairs(Host::Stranger) {
        let attempt = Attempt {
            scenario: 7,
            who: &format!("stranger {stranger}"),
            what: "the feed has gained his range",
            expected: "alert CertificateRequired",
        };
        rows.push(attempt.outcome(lab, "NoCertificate", || {
            // The refresh is over, but each role learns of the snapshot by itself.
            eventually("the new range is active", || {
                let (reply, _) = client.get(&lab.network, Host::Stranger, origin, SHOP);
                matches!(reply, Reply::Alert(_)).then(|| reply.to_string())
            })
        }));
    }

    let mark = lab.filter().mark();
    eventually("the range is gone after its grace", || {
        let event = lab.refresh(Answer::Body(api_answer(&[], &[])));
        (event["kept"] == 0).then_some(())
    });
    // A connection begun before the flip would only time out.
    lab.filter()
        .event(mark, "the old ranges are published", |event| {
            event["id"] == "ranges-published" && event["ranges"] == 15 + 7
        });
    for [stranger, origin] in pairs(Host::Stranger) {
        let attempt = Attempt {
            scenario: 7,
            who: &format!("stranger {stranger}"),
            what: "the feed has lost it again",
            expected: "silence",
        };
        let verdict = filter_ebpf::Verdict::Drop(filter_ebpf::Reason::NotListed);
        rows.push(attempt.frames(lab, verdict, 1..=1, || {
            client
                .get(&lab.network, Host::Stranger, origin, SHOP)
                .0
                .to_string()
        }));
    }
    rows
}

/// 7b. The feed says nothing useful: the ranges stay, the reason is logged and counted.
#[must_use]
pub fn bad_lists_change_nothing(lab: &Lab) -> Vec<Row> {
    let good = api_answer(&[], &[]);
    let hostile = api_answer(&["0.0.0.0/0"], &[]);
    let cases = [
        ("an empty body", Answer::Body(String::new()), "Rejected"),
        (
            "a web page",
            Answer::Body("<!DOCTYPE html><html>".to_owned()),
            "BadList",
        ),
        (
            "0.0.0.0/0 among the rest",
            Answer::Body(hostile),
            "Rejected",
        ),
        ("half a body", Answer::Truncated(good.clone()), "NoAnswer"),
        (
            "half a list",
            Answer::Body(good[..good.len() / 2].to_owned()),
            "BadList",
        ),
        ("status 500", Answer::Status(500, ""), "BadStatus"),
        ("nothing", Answer::Nothing, "NoAnswer"),
    ];
    let mut rows = Vec::new();
    for (what, answer, outcome) in cases {
        let attempt = Attempt {
            scenario: 7,
            who: "feed",
            what: &format!("answers {what}"),
            expected: &format!("logged {outcome}, 15 + 7 ranges, edge sees 200"),
        };
        let metric = format!("pullgate_ranges_refresh_total{{outcome=\"{outcome}\"}}");
        let decided = format!("ranges: {outcome}");
        rows.push(attempt.counted(
            &decided,
            1..=1,
            || lab.ranges().metric(&metric),
            || {
                let event = lab.refresh(answer);
                let status = lab.filter().status();
                let ranges = &status["ranges"];
                let [_, origin] = pairs(Host::Edge)[0];
                let served = lab
                    .edge()
                    .get(&lab.network, Host::Edge, origin, SHOP)
                    .0
                    .brief();
                let logged = event["outcome"].as_str().unwrap_or("nothing");
                format!(
                    "logged {logged}, {} + {} ranges, edge sees {served}",
                    ranges["v4"], ranges["v6"]
                )
            },
        ));
    }
    lab.refresh(Answer::Body(good));
    rows
}
