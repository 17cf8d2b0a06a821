//! The decision: a frame, the settings and the ranges in, a [`Verdict`] out.
//!
//! This is the only place that says drop or pass. The rule: a stranger's packet that cannot be
//! proven not to reach a protected port is dropped; for everybody else, giving up means pass.

use core::net::IpAddr;

use crate::packet::{
    Address, Apart, Carried, Encapsulation, Frame, Headers, Packet, ParseError, TUNNELS_MAX,
    Transport, Tunnel,
};
use crate::table::{Class, Ranges};

/// What the operator protects.
pub trait Settings {
    /// Whether this TCP port is protected.
    fn protects_tcp(&self, port: u16) -> bool;
    /// Whether this UDP port is protected.
    fn protects_udp(&self, port: u16) -> bool;
    /// Whether any UDP port is protected.
    fn protects_some_udp(&self) -> bool;
    /// Whether this address is protected; true for all unless `destinations` is configured.
    fn protects_destination(&self, address: IpAddr) -> bool;
    /// Whether later fragments of strangers pass (`fragments = "pass"`).
    fn fragments_pass(&self) -> bool;
}

/// Decides the fate of one frame that starts with its Ethernet header.
///
/// `ranges` is asked at most once, and only for packets that may reach a protected port.
#[inline(always)]
pub fn decide<F: Frame>(frame: F, settings: &impl Settings, ranges: &impl Ranges) -> Judgement {
    let packet = match Carried::find(&frame) {
        Ok(Carried::Packet(packet)) if packet.is_plain(&frame) => packet,
        Ok(Carried::Packet(packet)) => {
            return decide_tunnel(packet.held().apart(frame), settings, ranges);
        }
        Ok(Carried::Tunnel(tunnel)) => {
            return decide_tunnel(tunnel.apart(frame), settings, ranges);
        }
        Err(error) => return Judgement::without_packet(error, Family::None),
    };
    // One arm per family, so that the compiler makes a program of each.
    let (family, question) = match packet {
        Packet::V4(_) => (
            Family::V4,
            question(Headers::parse_plain(&frame, packet), settings),
        ),
        Packet::V6(_) => (
            Family::V6,
            question(Headers::parse_plain(&frame, packet), settings),
        ),
    };
    let verdict = match question {
        Question::Settled(verdict) => verdict,
        Question::Open { source, unproven } => answer(ranges.class(source.ip()), unproven),
        // A plain packet holds none.
        Question::Inside { .. } => Verdict::Drop(Reason::Malformed),
    };
    Judgement { verdict, family }
}

#[inline(always)]
fn decide_tunnel<F: Frame>(
    apart: Option<Apart<F>>,
    settings: &impl Settings,
    ranges: &impl Ranges,
) -> Judgement {
    match apart {
        Some(Apart {
            frame,
            encapsulation,
            end,
        }) => decide_nested(frame, encapsulation, end, settings, ranges),
        None => Judgement::without_packet(ParseError::Malformed, Family::None),
    }
}

/// Decides the fate of a frame by the packet in it that holds no other, behind whatever extension
/// headers.
///
/// Out of the way of all the packets that are plain, and a function of its own, so that the
/// verifier walks its loops once and not once for each number of VLAN tags.
// Cold, hence in the section of the program's other functions: aya finds callees in one only.
#[cold]
#[inline(never)]
fn decide_nested<F: Frame>(
    frame: F,
    encapsulation: Encapsulation,
    end: usize,
    settings: &impl Settings,
    ranges: &impl Ranges,
) -> Judgement {
    let mut apart = Apart {
        frame,
        encapsulation,
        end,
    };
    let mut family = Family::None;
    let mut left = TUNNELS_MAX;
    loop {
        let (packet, end) = match apart.packet() {
            Ok(found) => found,
            Err(error) => return Judgement::without_packet(error, family),
        };
        family = match packet {
            Packet::V4(_) => Family::V4,
            Packet::V6(_) => Family::V6,
        };
        let headers = Headers::parse(&apart.frame, packet, end);
        let verdict = match question(headers, settings) {
            Question::Inside { source, .. } if left == 0 => {
                answer(ranges.class(source.ip()), Some(Reason::ChainTooLong))
            }
            Question::Inside { tunnel, .. } => {
                let Some(next) = tunnel.apart(apart.frame) else {
                    return Judgement::without_packet(ParseError::Malformed, family);
                };
                apart = next;
                left -= 1;
                continue;
            }
            Question::Settled(verdict) => verdict,
            Question::Open { source, unproven } => answer(ranges.class(source.ip()), unproven),
        };
        return Judgement { verdict, family };
    }
}

/// What a packet leaves to be asked.
enum Question<'a> {
    /// Nothing: whoever sent it, it ends like this.
    Settled(Verdict),
    /// Who sent it.
    Open {
        source: Address<'a>,
        /// The reason, if nothing is proven of this packet.
        unproven: Option<Reason>,
    },
    /// What is inside.
    Inside { source: Address<'a>, tunnel: Tunnel },
}

#[inline(always)]
fn question<'a>(
    headers: Result<Headers<'a>, ParseError>,
    settings: &impl Settings,
) -> Question<'a> {
    let Ok(headers) = headers else {
        return Question::Settled(Verdict::Drop(Reason::Malformed));
    };
    let pass = |reason| Question::Settled(Verdict::Pass(reason));
    let unproven = match headers.transport {
        Transport::Tcp(port) if settings.protects_tcp(port) => None,
        Transport::Tcp(_) => return pass(Reason::OtherPort),
        Transport::Udp(port) if settings.protects_udp(port) => None,
        Transport::UdpTooShort if settings.protects_some_udp() => Some(Reason::Malformed),
        Transport::Udp(_) | Transport::UdpTooShort | Transport::Other => {
            return pass(Reason::NotTcp);
        }
        Transport::Tunnel(tunnel) => {
            let source = headers.source;
            return Question::Inside { source, tunnel };
        }
        Transport::LaterFragment if settings.fragments_pass() => return pass(Reason::Fragment),
        Transport::LaterFragment => Some(Reason::Fragment),
        Transport::ChainTooLong => Some(Reason::ChainTooLong),
        Transport::TooShort => Some(Reason::Malformed),
    };
    if let Some(destination) = headers.destination
        && !settings.protects_destination(destination.ip())
    {
        return pass(Reason::OtherDestination);
    }
    let source = headers.source;
    Question::Open { source, unproven }
}

#[inline(always)]
fn answer(class: Class, unproven: Option<Reason>) -> Verdict {
    match (unproven, class) {
        (Some(reason), class) if class.may_enter() => Verdict::Pass(reason),
        (Some(reason), _) => Verdict::Drop(reason),
        (None, Class::Absent) => Verdict::Drop(Reason::NotListed),
        (None, Class::Denied) => Verdict::Drop(Reason::Denied),
        (None, Class::Allowed) => Verdict::Pass(Reason::Allowed),
        (None, Class::Listed) => Verdict::Pass(Reason::Listed),
    }
}

/// The verdict on a frame, and the family that it is counted under.
#[must_use = "a discarded verdict is a filter that passes everything"]
// Aligned, for the verifier refuses what the compiler makes of two halves on the stack: one store.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(align(8))]
pub struct Judgement {
    /// What happens to the frame, and why.
    pub verdict: Verdict,
    /// What the frame carries.
    pub family: Family,
}

impl Judgement {
    /// What becomes of a frame in which there is no packet to judge.
    #[inline(always)]
    fn without_packet(error: ParseError, family: Family) -> Self {
        let verdict = match (error, family) {
            (ParseError::NotIp, Family::None) => Verdict::Pass(Reason::NotIp),
            // In a packet there is something else, so neither TCP nor UDP.
            (ParseError::NotIp, Family::V4 | Family::V6) => Verdict::Pass(Reason::NotTcp),
            (ParseError::TooManyTags, _) => Verdict::Drop(Reason::TooManyTags),
            (ParseError::Malformed, _) => Verdict::Drop(Reason::Malformed),
        };
        Self { verdict, family }
    }

    /// The slot of the counter map that counts this judgement, below [`COUNTERS`].
    ///
    /// In `monitor` mode, which only a drop asks for, it is counted apart as a would-be drop.
    #[must_use]
    #[inline(always)]
    pub fn counter_index(self, monitor: impl FnOnce() -> bool) -> u32 {
        let column = match self.verdict {
            Verdict::Pass(_) => 0,
            Verdict::Drop(_) if monitor() => 2,
            Verdict::Drop(_) => 1,
        };
        (self.verdict.reason() as u32) << REASON_SHIFT
            | (self.family as u32) << FAMILY_SHIFT
            | column
    }
}

/// The address family of a frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum Family {
    /// Not IP, or not to be parsed.
    None = 0,
    /// IPv4.
    V4 = 1,
    /// IPv6.
    V6 = 2,
}

impl Family {
    /// Every family, in the order of its counters.
    pub const ALL: [Self; 3] = [Self::None, Self::V4, Self::V6];

    /// The word in metrics, logs and documentation.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }
}

/// What happens to a frame, and why.
#[must_use = "a discarded verdict is a filter that passes everything"]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// Discard the frame (`XDP_DROP`).
    Drop(Reason),
    /// Hand the frame to the network stack (`XDP_PASS`).
    Pass(Reason),
}

impl Verdict {
    /// Why.
    #[must_use]
    #[inline(always)]
    pub fn reason(self) -> Reason {
        match self {
            Self::Drop(reason) | Self::Pass(reason) => reason,
        }
    }
}

/// Why a verdict was reached. The label in metrics is [`Reason::label`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum Reason {
    /// The source is in the operator's `allow`.
    Allowed = 0,
    /// More extension headers than are walked, or more packets inside of packets than are judged.
    ChainTooLong = 1,
    /// The source is in the operator's `deny`.
    Denied = 2,
    /// A later fragment of TCP.
    Fragment = 3,
    /// The source is in the published ranges.
    Listed = 4,
    /// The frame ends inside a header, or a header contradicts itself.
    Malformed = 5,
    /// Neither IPv4 nor IPv6: ARP, LLDP, PPPoE discovery …
    NotIp = 6,
    /// The source is in no range and no rule.
    NotListed = 7,
    /// Not TCP, nor UDP to a protected port.
    NotTcp = 8,
    /// The destination address is not protected.
    OtherDestination = 9,
    /// The destination port is not protected.
    OtherPort = 10,
    /// More VLAN tags than are stripped.
    TooManyTags = 11,
}

impl Reason {
    /// Every reason, in the order of its counters.
    pub const ALL: [Self; 12] = [
        Self::Allowed,
        Self::ChainTooLong,
        Self::Denied,
        Self::Fragment,
        Self::Listed,
        Self::Malformed,
        Self::NotIp,
        Self::NotListed,
        Self::NotTcp,
        Self::OtherDestination,
        Self::OtherPort,
        Self::TooManyTags,
    ];

    /// The word for this reason in metrics, logs and documentation.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Allowed => "Allowed",
            Self::ChainTooLong => "ChainTooLong",
            Self::Denied => "Denied",
            Self::Fragment => "Fragment",
            Self::Listed => "Listed",
            Self::Malformed => "Malformed",
            Self::NotIp => "NotIp",
            Self::NotListed => "NotListed",
            Self::NotTcp => "NotTcp",
            Self::OtherDestination => "OtherDestination",
            Self::OtherPort => "OtherPort",
            Self::TooManyTags => "TooManyTags",
        }
    }
}

/// What a counter counts: its labels.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Counted {
    /// `pass`, `drop` or, in monitor mode, `would_drop`.
    pub verdict: &'static str,
    /// Why.
    pub reason: Reason,
    /// What the frame carried.
    pub family: Family,
}

impl Counted {
    /// What the counter at `index` counts; the inverse of [`Judgement::counter_index`].
    ///
    /// `None` for the slots that count nothing.
    #[must_use]
    pub fn at(index: u32) -> Option<Self> {
        let part = |shift: u32, bits: u32| (index >> shift & ((1 << bits) - 1)) as usize;
        Some(Self {
            verdict: COLUMN_LABELS.get(part(0, FAMILY_SHIFT)).copied()?,
            family: *Family::ALL.get(part(FAMILY_SHIFT, REASON_SHIFT - FAMILY_SHIFT))?,
            reason: *Reason::ALL.get((index >> REASON_SHIFT) as usize)?,
        })
    }

    /// All counters: their index, and what they count.
    pub fn all() -> impl Iterator<Item = (u32, Self)> {
        let indices = (0_u32..).take(COUNTERS);
        indices.filter_map(|index| Some((index, Self::at(index)?)))
    }
}

/// The words for the columns of the counter map, in order.
const COLUMN_LABELS: [&str; 3] = ["pass", "drop", "would_drop"];
/// Where the family stands in a counter's index; the column stands below it.
const FAMILY_SHIFT: u32 = 2;
/// Where the reason stands in a counter's index.
const REASON_SHIFT: u32 = 4;
/// Length of the counter map.
pub const COUNTERS: usize = Reason::ALL.len() << REASON_SHIFT;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_judgement_has_a_counter_of_its_own() {
        let verdicts = Reason::ALL.map(|reason| [Verdict::Drop(reason), Verdict::Pass(reason)]);
        let mut seen = std::collections::BTreeSet::new();
        for verdict in verdicts.into_iter().flatten() {
            for family in Family::ALL {
                let index = Judgement { verdict, family }.counter_index(|| false);
                let counted = Counted::at(index).unwrap();

                assert!(seen.insert(index));
                assert_eq!(counted.reason, verdict.reason());
                assert_eq!(counted.family, family);
                let is_drop = matches!(verdict, Verdict::Drop(_));
                assert_eq!(counted.verdict, if is_drop { "drop" } else { "pass" });
            }
        }
        assert_eq!(Counted::all().count(), Reason::ALL.len() * 9);
    }
}
