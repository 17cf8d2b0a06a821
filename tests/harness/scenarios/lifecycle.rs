//! Scenario 8: roles are killed, started again, and the filter is unloaded, under a stranger's
//! unceasing SYNs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use filter_ebpf::cases::Packet;

use super::gate::pairs;
use super::{Attempt, NOT_LISTED, Row};
use crate::client::VISITOR;
use crate::lab::Counters;
use crate::net::{Host, Network};
use crate::pairing::Pairing;
use crate::pki::SHOP;
use crate::wire::{self, Sender, Tap};
use crate::{Lab, eventually};

/// 8a. `kill -9` of each role in turn, and its restart: no packet of the stranger passes, and the
///    edge is served as long as the gate lives.
#[must_use]
pub fn killed_roles_leave_the_host_protected(lab: &mut Lab) -> Vec<Row> {
    let mut rows = Vec::new();
    for role in ["filter", "ranges", "gate"] {
        let network = std::sync::Arc::clone(&lab.network);
        let before = lab.frames(NOT_LISTED);
        let tap = Tap::open(&network, Host::Stranger);
        let counters = lab.counters();
        let flood = Flood::default();
        let seen = std::thread::scope(|scope| {
            let sending = scope.spawn(|| flood.run(&network, &counters));
            kill(lab, role);
            let dead = edge_sees(lab);
            flood.wait_for_more();
            start(lab, role);
            let alive = edge_sees(lab);
            flood.stop();
            sending.join().unwrap();
            format!("edge sees {dead}, then {alive}")
        });
        let sent = flood.sent.load(Ordering::Relaxed);
        let after = lab.frames(NOT_LISTED);
        let answer = tap.next(Duration::from_millis(300), |frame| {
            wire::is_syn_ack(frame) || wire::is_reset(frame)
        });
        let answered = if answer.is_none() {
            "none answered"
        } else {
            "ANSWERED"
        };
        let dead = if role == "gate" {
            "connection refused"
        } else {
            "200"
        };
        rows.push(Row {
            scenario: 8,
            who: format!("stranger, {sent} SYNs"),
            what: format!("while the {role} is killed and restarted"),
            expected: format!("edge sees {dead}, then 200; none answered"),
            seen: format!("{seen}; {answered}"),
            decided: "filter: NotListed".to_owned(),
            counter: (before, after),
            steps: sent..=sent,
        });
    }
    rows
}

/// 8b. `pullgate unload` removes everything; the stranger then meets the gate's own source check, or
///    the web server that has kept the port. The filter comes back when its role is started again.
#[must_use]
pub fn unload_leaves_the_gate(lab: &mut Lab) -> Vec<Row> {
    let mut rows = Vec::new();
    kill(lab, "filter");
    let unloaded = lab.pullgate(&["unload"]);
    let nothing_left = !lab.network.path("bpf/pullgate").exists();
    let unloaded = if unloaded.status.success() {
        "unloaded"
    } else {
        "NOT UNLOADED"
    };
    let pins = if nothing_left {
        "no pin left"
    } else {
        "PINS LEFT"
    };
    for [stranger, origin] in pairs(Host::Stranger) {
        let reply = match lab.pairing() {
            Pairing::Relayed => "closed".to_owned(),
            Pairing::Steered => {
                format!("200 nginx saw client={stranger} cf={VISITOR} host={SHOP}")
            }
        };
        let attempt = Attempt {
            scenario: 8,
            who: &format!("stranger {stranger}"),
            what: "after `pullgate unload`",
            expected: &format!("unloaded, no pin left, {reply}"),
        };
        let ask = || {
            let (reply, _) = lab.edge().get(&lab.network, Host::Stranger, origin, SHOP);
            format!("{unloaded}, {pins}, {reply}")
        };
        rows.push(match lab.pairing() {
            Pairing::Relayed => attempt.outcome(lab, "NotListed", ask),
            // The port is the web server's again.
            Pairing::Steered => {
                let accepted = || lab.web.accepted(&lab.network);
                attempt.counted("web server", 1..=1, accepted, ask)
            }
        });
    }

    start(lab, "filter");
    for [stranger, origin] in pairs(Host::Stranger) {
        let attempt = Attempt {
            scenario: 8,
            who: &format!("stranger {stranger}"),
            what: "after the filter was started again",
            expected: "silence",
        };
        rows.push(attempt.frames(lab, NOT_LISTED, 1..=1, || {
            lab.edge()
                .get(&lab.network, Host::Stranger, origin, SHOP)
                .0
                .to_string()
        }));
    }
    rows
}

fn kill(lab: &mut Lab, role: &str) {
    let slot = match role {
        "filter" => &mut lab.filter,
        "ranges" => &mut lab.ranges,
        _ => &mut lab.gate,
    };
    slot.take().unwrap().kill();
}

fn start(lab: &mut Lab, role: &str) {
    match role {
        "filter" => lab.start_filter(),
        "ranges" => lab.start_ranges(),
        _ => lab.start_gate(),
    }
}

fn edge_sees(lab: &Lab) -> String {
    let [_, origin] = pairs(Host::Edge)[0];
    lab.edge()
        .get(&lab.network, Host::Edge, origin, SHOP)
        .0
        .brief()
}

/// A stranger who sends SYNs of both families until he is stopped, each burst as soon as the one
/// before is counted: so none is lost on the way, and one that passed would hold him up.
#[derive(Default)]
struct Flood {
    stopped: AtomicBool,
    sent: AtomicU64,
}

impl Flood {
    fn run(&self, network: &Network, counters: &Counters) {
        let frames = pairs(Host::Stranger).map(|[stranger, origin]| {
            let packet = Packet::tcp(stranger, origin, 443);
            packet
                .between(Host::Origin.mac(), Host::Stranger.mac())
                .build()
        });
        let sender = Sender::open(network, Host::Stranger);
        let before = counters.count(NOT_LISTED);
        for _ in 0..BURSTS_MAX {
            for frame in frames.iter().cycle().take(BURST) {
                sender.send(frame);
            }
            let sent = self.sent.fetch_add(BURST as u64, Ordering::Relaxed) + BURST as u64;
            eventually("every SYN is counted", || {
                (counters.count(NOT_LISTED) >= before + sent).then_some(())
            });
            if self.stopped.load(Ordering::Relaxed) {
                return;
            }
        }
    }

    /// Returns when some more have been sent than so far.
    fn wait_for_more(&self) {
        let so_far = self.sent.load(Ordering::Relaxed);
        eventually("the stranger goes on", || {
            (self.sent.load(Ordering::Relaxed) > so_far + 10 * BURST as u64).then_some(())
        });
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

/// Frames that are sent without a look at the counter; a veth queues 256.
const BURST: usize = 64;
/// Bounds the flood, should it not be stopped.
const BURSTS_MAX: usize = 100_000;
