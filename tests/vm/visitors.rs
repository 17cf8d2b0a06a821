//! Who comes to the machine: SYNs of edge and stranger, now and then, or all the time.

use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use filter_ebpf::cases::Packet;
use tests::net::{Host, Network};
use tests::wire::{self, Sender, Tap};

/// What became of SYNs to port 443.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Answered {
    /// The stranger's, of either family.
    pub(crate) stranger: bool,
}

/// Sends SYNs of the stranger, and then of the edge until they are answered; over IPv4 and IPv6, by a
/// SYN-ACK or a reset. What the stranger is answered would have come before.
pub(crate) fn knock(
    network: &Network,
    mac: [u8; 6],
    vlan: Option<u16>,
) -> anyhow::Result<Answered> {
    let [stranger, edge] =
        [Host::Stranger, Host::Edge].map(|host| Visitor::new(network, host, mac, vlan));
    for _ in 0..3 {
        stranger.send();
    }
    let mut missing = Host::Origin.addresses().to_vec();
    let deadline = Instant::now() + PATIENCE;
    while !missing.is_empty() {
        ensure!(
            Instant::now() < deadline,
            "the edge is not answered: {missing:?}"
        );
        edge.send();
        while let Some(by) = edge.answer(Duration::from_millis(300)) {
            missing.retain(|address| *address != by);
            if missing.is_empty() {
                break;
            }
        }
    }
    let answer = stranger.answer(Duration::from_millis(300));
    Ok(Answered {
        stranger: answer.is_some(),
    })
}

/// One host's end of the wire.
struct Visitor {
    sender: Sender,
    tap: Tap,
    frames: Vec<Vec<u8>>,
    vlan: Option<u16>,
}

impl Visitor {
    fn new(network: &Network, host: Host, mac: [u8; 6], vlan: Option<u16>) -> Self {
        let pairs = host.addresses().into_iter().zip(Host::Origin.addresses());
        let frames = pairs.map(|(source, origin)| {
            let packet = Packet::tcp(source, origin, 443).between(mac, host.mac());
            match vlan {
                Some(vlan) => packet.tagged(0x8100, vlan).build(),
                None => packet.build(),
            }
        });
        Self {
            sender: Sender::open(network, host),
            tap: Tap::open(network, host),
            frames: frames.collect(),
            vlan,
        }
    }

    fn send(&self) {
        for frame in &self.frames {
            self.sender.send(frame);
        }
    }

    /// The address of the origin that answers, if it does so in time.
    fn answer(&self, within: Duration) -> Option<IpAddr> {
        let frame = self.tap.next(within, |frame| {
            let frame = untagged(frame, self.vlan);
            let is_answer = wire::is_syn_ack(&frame) || wire::is_reset(&frame);
            is_answer && origin(&frame).is_some()
        })?;
        origin(&untagged(&frame, self.vlan))
    }
}

/// A frame of that VLAN without its tag, as the packet socket shows it.
fn untagged(frame: &[u8], vlan: Option<u16>) -> Vec<u8> {
    match (vlan, frame.get(12..14)) {
        (Some(_), Some([0x81, 0x00])) => [&frame[..12], &frame[16..]].concat(),
        _ => frame.to_vec(),
    }
}

/// The origin's address, if the frame is from there.
pub(crate) fn origin(frame: &[u8]) -> Option<IpAddr> {
    let source = match frame.get(12..14)? {
        [0x08, 0x00] => IpAddr::from(*frame.get(26..)?.first_chunk::<4>()?),
        [0x86, 0xdd] => IpAddr::from(*frame.get(22..)?.first_chunk::<16>()?),
        _ => return None,
    };
    Host::Origin.addresses().contains(&source).then_some(source)
}

/// SYNs of both that come all the time, whatever the machine does.
#[derive(Default)]
pub(crate) struct Flood {
    over: AtomicBool,
    sent: AtomicU64,
    answers: Mutex<Answers>,
}

/// How many were answered, and when.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Answers {
    /// SYNs of the stranger.
    pub(crate) sent: u64,
    /// How many of them were answered, the first and the last when.
    pub(crate) stranger: u64,
    first: Option<Instant>,
    pub(crate) last: Option<Instant>,
    /// How many of the edge's were answered.
    pub(crate) edge: u64,
}

impl Answers {
    /// From the stranger's first answer to the last.
    #[must_use]
    pub(crate) fn gap(&self) -> Duration {
        match (self.first, self.last) {
            (Some(first), Some(last)) => last.duration_since(first),
            _ => Duration::ZERO,
        }
    }
}

impl Flood {
    /// Sends during `work`, and until the edge was answered after it.
    pub(crate) fn during(
        network: &Network,
        mac: [u8; 6],
        work: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<Answers> {
        let flood = Self::default();
        std::thread::scope(|scope| {
            for host in [Host::Stranger, Host::Edge] {
                let flood = &flood;
                scope.spawn(move || flood.listen(&Visitor::new(network, host, mac, None), host));
                scope.spawn(move || flood.send(&Visitor::new(network, host, mac, None), host));
            }
            let done = work().and_then(|()| {
                let before = flood.answers().edge;
                let deadline = Instant::now() + PATIENCE;
                // The edge is served now, so that a stranger could be.
                while flood.answers().edge < before + 20 {
                    ensure!(Instant::now() < deadline, "the edge is not answered");
                    std::thread::sleep(Duration::from_millis(20));
                }
                Ok(())
            });
            flood.over.store(true, Ordering::Relaxed);
            done
        })?;
        Ok(flood.answers())
    }

    fn answers(&self) -> Answers {
        let answers = *self
            .answers
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        Answers {
            sent: self.sent.load(Ordering::Relaxed),
            ..answers
        }
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn send(&self, visitor: &Visitor, host: Host) {
        while !self.is_over() {
            visitor.send();
            if host == Host::Stranger {
                self.sent.fetch_add(2, Ordering::Relaxed);
            }
            std::thread::sleep(EACH);
        }
    }

    fn listen(&self, visitor: &Visitor, host: Host) {
        while !self.is_over() {
            if visitor.answer(Duration::from_millis(100)).is_none() {
                continue;
            }
            let mut answers = self
                .answers
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            match host {
                Host::Stranger => {
                    answers.stranger += 1;
                    let now = Instant::now();
                    answers.first.get_or_insert(now);
                    answers.last = Some(now);
                }
                Host::Origin | Host::Edge => answers.edge += 1,
            }
        }
    }
}

/// Between two SYNs of one host.
const EACH: Duration = Duration::from_millis(4);
/// For the edge to be answered.
const PATIENCE: Duration = Duration::from_secs(90);
