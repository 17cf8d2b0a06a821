//! Verifies, under as many packets as this machine can send, that nothing that happens to the filter
//! lets a stranger in or keeps an edge out: not `kill -9`, restart, upgrade, reload, another instance,
//! nor the publishing of ranges.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::net::IpAddr;

use filter_ebpf::cases::Packet;
use filter_ebpf::verdict::{Family, Judgement, Reason, Verdict};
use tests::feed::{Answer, api_answer};
use tests::net::{DIRECT, Host, Network};
use tests::pki::SHOP;
use tests::traffic::Traffic;
use tests::{Lab, Plan, eventually, times};

#[test]
fn no_stranger_reaches_the_stack_whatever_happens_to_the_filter() {
    let mut lab = Lab::start(&Plan {
        direct: true,
        ..Plan::default()
    });
    watch_the_stack(&lab);
    let traffic = flood(&lab, "198.51.100.7", Network::direct_mac());
    let counters = lab.counters_of(DIRECT);
    eventually("the flood has begun", || {
        Some(()).filter(|()| counters.count(NOT_LISTED) > 0)
    });

    let steps: [(&str, Step); 5] = [
        ("kill -9", |lab| {
            lab.filter.take().unwrap().kill();
            edge_is_served(lab);
            lab.start_filter();
        }),
        ("restart", |lab| {
            assert_eq!(lab.filter.take().unwrap().stop(), Some(0));
            edge_is_served(lab);
            lab.start_filter();
        }),
        ("upgrade", |lab| {
            lab.filter.take().unwrap().kill();
            // As if another version had pinned them.
            std::fs::rename(lab.network.pin(""), lab.network.path("bpf/pullgate/v1")).unwrap();
            lab.start_filter();
        }),
        ("reload", |lab| {
            lab.configure("ports = [443, 8443]");
            assert_eq!(lab.reload()["level"], "INFO");
            lab.configure("");
            assert_eq!(lab.reload()["level"], "INFO");
        }),
        ("another instance", |lab| {
            lab.unload();
            edge_is_served(lab);
            lab.start_filter();
        }),
    ];
    for round in 0..times(2, 50) {
        for (what, step) in steps {
            let before = reached(&lab);
            step(&mut lab);
            edge_is_served(&lab);
            let after = reached(&lab);

            if what == "another instance" {
                assert!(after > before, "the flood does not reach an open host");
            } else {
                assert_eq!(
                    after, before,
                    "strangers came through: {what}, round {round}"
                );
            }
        }
    }
    assert!(traffic.stop() > 1_000_000, "this was no flood");
}

#[test]
fn publishing_neither_drops_the_listed_nor_lets_strangers_in() {
    let lab = Lab::start(&Plan {
        direct: true,
        ..Plan::default()
    });
    // Addressed to no host, so that the stack has no work with them; the filter has.
    let no_host = [2, 0, 0, 0, 0, 0x77];
    let counters = lab.counters_of(DIRECT);
    let count = |verdict, family| counters.judged(Judgement { verdict, family });
    let mut published = 0;
    for (listed, stranger, [listed_family, stranger_family]) in [
        ("104.16.7.7", "2001:db8::7", [Family::V4, Family::V6]),
        ("2606:4700::7", "198.51.100.7", [Family::V6, Family::V4]),
    ] {
        let before = [
            count(NOT_LISTED, listed_family),
            count(LISTED, stranger_family),
        ];
        let passed = count(LISTED, listed_family);
        let traffic = [listed, stranger].map(|source| flood(&lab, source, no_host));
        eventually("both floods have begun", || {
            let begun =
                count(LISTED, listed_family) > passed && count(NOT_LISTED, stranger_family) > 0;
            begun.then_some(())
        });

        for _ in 0..times(10, 500) {
            let mark = lab.filter().mark();
            let more = format!("64.{}.{}.0/24", published / 256, published % 256);
            let _refreshed = lab.refresh(Answer::Body(api_answer(&[&more], &[])));
            lab.filter()
                .event(mark, "the ranges are published", |event| {
                    event["id"] == "ranges-published"
                });
            published += 1;
        }
        let sent = traffic.map(Traffic::stop);

        let after = [
            count(NOT_LISTED, listed_family),
            count(LISTED, stranger_family),
        ];
        assert_eq!(after, before, "a packet was judged by a mix of two tables");
        assert!(
            sent.iter().all(|sent| *sent > 500_000),
            "this was no flood: {sent:?}"
        );
    }
}

/// Something that happens to the filter.
type Step = fn(&mut Lab);

fn flood(lab: &Lab, source: &str, to: [u8; 6]) -> Traffic {
    let source: IpAddr = source.parse().unwrap();
    let origin = Host::Origin.addresses()[usize::from(source.is_ipv6())];
    let packet = Packet::tcp(source, origin, 443).between(to, Host::Stranger.mac());
    Traffic::start(&lab.network, Host::Stranger, DIRECT, packet.build())
}

/// Counts what comes in by [`DIRECT`] behind the filter.
fn watch_the_stack(lab: &Lab) {
    let rules = format!(
        "table inet watch {{ chain pre {{ type filter hook prerouting priority -300; iifname {DIRECT} \
         tcp dport 443 counter; }}; }}"
    );
    let output = lab.network.output(Host::Origin, &["nft", &rules]);
    assert!(output.status.success(), "{output:?}");
}

/// How many of the strangers' packets have reached the stack.
fn reached(lab: &Lab) -> u64 {
    let shown = lab
        .network
        .output(Host::Origin, &["nft", "list", "table", "inet", "watch"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    let (_, packets) = shown.split_once("counter packets ").unwrap();
    packets.split_whitespace().next().unwrap().parse().unwrap()
}

fn edge_is_served(lab: &Lab) {
    let origin = Host::Origin.addresses()[0];
    let (reply, _) = lab.edge().get(&lab.network, Host::Edge, origin, SHOP);
    assert_eq!(reply.brief(), "200");
}

const NOT_LISTED: Verdict = Verdict::Drop(Reason::NotListed);
const LISTED: Verdict = Verdict::Pass(Reason::Listed);
