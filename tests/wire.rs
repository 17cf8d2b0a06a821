//! Verifies the filter on the wire: strangers' SYNs are neither answered nor let in, natively and
//! generically; everything else works as before; monitor mode only counts.

use std::time::Duration;

use filter_ebpf::cases::Packet;
use filter_ebpf::verdict::{Reason, Verdict};
use tests::net::Host;
use tests::pki::SHOP;
use tests::wire::{self, Sender, Tap};
use tests::{Lab, Plan, assert_matched, scenarios};

#[test]
fn strangers_are_dropped_and_the_rest_works_as_before() {
    let lab = Lab::start(&Plan::default());

    assert_matched(&scenarios::strangers_are_dropped(&lab));
    assert_matched(&scenarios::the_rest_works_as_before(&lab));
    assert_eq!(attached(&lab), 1, "natively");
}

#[test]
fn generic_xdp_judges_alike_and_says_that_it_is_weaker() {
    let lab = Lab::start(&Plan {
        filter: "attach = \"generic\"",
        ..Plan::default()
    });

    assert_matched(&scenarios::strangers_are_dropped(&lab));
    assert_matched(&scenarios::the_rest_works_as_before(&lab));
    assert_matched(&scenarios::edge_is_served(&lab, "nginx"));

    assert_eq!(attached(&lab), 0, "not natively");
    let status = lab.filter().status();
    let warnings = status["findings"].to_string();
    assert!(warnings.contains("attach-mode-weaker"), "{warnings}");
    let warned =
        |event: &serde_json::Value| event["level"] == "WARN" && event["interface"] == "wan0";
    lab.filter().event(0, "the weaker rung is logged", warned);
}

#[test]
fn monitor_mode_counts_what_it_would_drop_and_says_so() {
    let lab = Lab::start(&Plan {
        filter: "mode = \"monitor\"",
        ..Plan::default()
    });
    let origin = Host::Origin.addresses()[0];
    let before = lab.frames(Verdict::Drop(Reason::NotListed));

    let (reply, _) = lab.edge().get(&lab.network, Host::Stranger, origin, SHOP);

    // He gets as far as the gate, which knows the same ranges.
    assert_eq!(reply.to_string(), "closed");
    assert!(lab.frames(Verdict::Drop(Reason::NotListed)) > before);
    let status = lab.filter().status();
    assert!(status["findings"].to_string().contains("monitor-mode"));
    let counted = &status["metrics"]["pullgate_filter_frames_total{iface=\"wan0\",family=\"ipv4\",\
        verdict=\"would_drop\",reason=\"NotListed\"}"];
    assert!(counted.as_f64().unwrap() > 0.0);
}

#[test]
fn a_chain_split_over_fragments_does_not_get_around_the_filter() {
    let lab = Lab::start(&Plan::default());
    let [stranger, origin] = [Host::Stranger.addresses()[1], Host::Origin.addresses()[1]];
    let between = |packet: Packet| {
        packet
            .between(Host::Origin.mac(), Host::Stranger.mac())
            .build()
    };
    let pad = [0, 1, 4, 0, 0, 0, 0];
    // The first fragment ends behind an options header that promises another one, and carries
    // "ICMPv6 comes next" behind its end; the second brings the SYN, and says that it is UDP.
    let options = vec![60, 0, 1, 4, 0, 0, 0, 0];
    let first = Packet::carrying(stranger, origin, 60, options).fragment(0, true);
    let first = between(first.trailer(&[58, 0, 1, 4, 0, 0, 0, 0]));
    let whole = Packet::tcp(stranger, origin, 443)
        .extension(60, &pad)
        .build();
    let behind_ipv6_header = whole[14 + 40..].to_vec();
    let second = Packet::carrying(stranger, origin, 17, behind_ipv6_header).fragment(1, false);
    let second = between(second);
    let answered = |lab: &Lab| {
        let tap = Tap::open(&lab.network, Host::Stranger);
        let sender = Sender::open(&lab.network, Host::Stranger);
        sender.send(&first);
        sender.send(&second);
        tap.next(Duration::from_millis(500), wire::is_syn_ack)
            .is_some()
    };
    let before = lab.frames(Verdict::Drop(Reason::Malformed));

    let with_filter = answered(&lab);
    let dropped = lab.frames(Verdict::Drop(Reason::Malformed)) - before;
    assert!(lab.pullgate(&["unload"]).status.success());
    let without_filter = answered(&lab);

    assert!(!with_filter);
    assert_eq!(dropped, 1);
    assert!(
        without_filter,
        "the stack does not answer this, so the test shows nothing"
    );
}

fn attached(lab: &Lab) -> u64 {
    lab.filter()
        .metric("pullgate_filter_attached{iface=\"wan0\",mode=\"native\"}")
}
