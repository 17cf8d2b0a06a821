//! The decision: a frame, the settings and the ranges in, a [`Verdict`] out.
//!
//! This is the only place that says drop or pass. The rule: a stranger's packet that cannot be
//! proven not to reach a protected port is dropped, and so is one that may hold a stranger's; for
//! everybody else, giving up means pass.

use core::net::IpAddr;

use crate::nested;
use crate::packet::{self, Address, Frame, Headers, ParseError, Transport};
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
pub fn decide<F: Frame + ?Sized>(
    frame: &F,
    settings: &impl Settings,
    ranges: &impl Ranges,
) -> Judgement {
    decide_plain(frame, settings, ranges).map_or_else(
        || decide_nested(frame, settings, ranges),
        |(plain, _flags)| plain,
    )
}

/// Decides the fate of a frame whose IP header is followed by its transport; `None` for any other. And its
/// [flags](packet::Plain::flags), 0 if it is not IP.
#[inline(always)]
pub fn decide_plain<F: Frame + ?Sized>(
    frame: &F,
    settings: &impl Settings,
    ranges: &impl Ranges,
) -> Option<(Judgement, u8)> {
    let plain = packet::plain(frame)?;
    let flags = plain.map_or(0, |plain| plain.flags);
    let headers = plain.map(|plain| plain.headers);
    Some((judge(headers, settings, ranges), flags))
}

/// Decides the fate of any frame, by the innermost packet in it.
///
/// The program has it as a function of its own, out of the way of the packets that need it not.
#[inline(always)]
pub fn decide_nested<F: Frame + ?Sized>(
    frame: &F,
    settings: &impl Settings,
    ranges: &impl Ranges,
) -> Judgement {
    judge(nested::innermost(frame), settings, ranges)
}

#[inline(always)]
fn judge(
    headers: Result<Headers<'_>, ParseError>,
    settings: &impl Settings,
    ranges: &impl Ranges,
) -> Judgement {
    let without_packet = |verdict| Judgement {
        verdict,
        family: Family::None,
    };
    match headers {
        // One arm per family, so that the compiler makes a program of each.
        Ok(headers) => match headers.source {
            Address::V4(_) => Judgement {
                verdict: verdict(headers, settings, ranges),
                family: Family::V4,
            },
            Address::V6(_) => Judgement {
                verdict: verdict(headers, settings, ranges),
                family: Family::V6,
            },
        },
        Err(ParseError::NotIp) => without_packet(Verdict::Pass(Reason::NotIp)),
        Err(ParseError::TooManyTags) => without_packet(Verdict::Drop(Reason::TooManyTags)),
        Err(ParseError::Malformed) => without_packet(Verdict::Drop(Reason::Malformed)),
    }
}

#[inline(always)]
fn verdict(headers: Headers<'_>, settings: &impl Settings, ranges: &impl Ranges) -> Verdict {
    // What of this packet is proven, and the reason if nothing is.
    let unproven = match headers.transport {
        Transport::Tcp(port) if settings.protects_tcp(port) => None,
        Transport::Tcp(_) => return Verdict::Pass(Reason::OtherPort),
        Transport::Udp(port) if settings.protects_udp(port) => None,
        Transport::UdpTooShort if settings.protects_some_udp() => Some(Reason::Malformed),
        Transport::Udp(_) | Transport::UdpTooShort | Transport::Other => {
            return Verdict::Pass(Reason::NotTcp);
        }
        Transport::LaterFragment if settings.fragments_pass() => {
            return Verdict::Pass(Reason::Fragment);
        }
        Transport::LaterFragment => Some(Reason::Fragment),
        // What is not seen may be a packet of another source: who sent this one says nothing of it.
        Transport::ChainCut => return Verdict::Drop(Reason::Malformed),
        Transport::ChainTooLong => return Verdict::Drop(Reason::ChainTooLong),
        Transport::TooShort => Some(Reason::Malformed),
    };
    if let Some(destination) = headers.destination
        && !settings.protects_destination(destination.ip())
    {
        return Verdict::Pass(Reason::OtherDestination);
    }

    let class = ranges.class(headers.source.ip());
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
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Judgement {
    /// What happens to the frame, and why.
    pub verdict: Verdict,
    /// What the frame carries.
    pub family: Family,
}

impl Judgement {
    /// The slot of the counter map that counts this judgement.
    #[inline(always)]
    pub fn slot(self) -> Slot {
        let column = match self.verdict {
            Verdict::Pass(_) => PASS,
            Verdict::Drop(_) => DROP,
        };
        Slot(
            (self.verdict.reason() as u32) << REASON_SHIFT
                | (self.family as u32) << FAMILY_SHIFT
                | column,
        )
    }
}

/// A slot of the counter map, below [`COUNTERS`]: a judgement as a number.
#[must_use = "a discarded verdict is a filter that passes everything"]
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Slot(pub u32);

impl Slot {
    /// Whether the frame is dropped.
    #[must_use]
    #[inline(always)]
    pub fn is_drop(self) -> bool {
        self.0 & COLUMN == DROP
    }

    /// Whether the frame is dropped, or would be.
    #[must_use]
    #[inline(always)]
    pub fn is_refused(self) -> bool {
        matches!(self.0 & COLUMN, DROP | WOULD_DROP)
    }

    /// Whether the frame reaches a protected port, as its source may.
    #[must_use]
    #[inline(always)]
    pub fn is_admitted(self) -> bool {
        let reason = self.0 >> REASON_SHIFT;
        let admits = reason == Reason::Allowed as u32 || reason == Reason::Listed as u32;
        admits && self.0 & COLUMN == PASS
    }

    /// The slot of an admitted frame that is answered, and not passed.
    #[inline(always)]
    pub fn answered(self) -> Self {
        Self(self.0 & !COLUMN | ANSWER)
    }

    /// The slot of an admitted frame that is dropped, as there is no connection for it.
    #[inline(always)]
    pub fn unconnected(self) -> Self {
        self.for_reason(Reason::NoConnection, DROP)
    }

    /// The slot of an admitted frame that acknowledges a SYN cookie.
    #[inline(always)]
    pub fn acknowledging(self) -> Self {
        self.for_reason(Reason::SynCookie, PASS)
    }

    #[inline(always)]
    fn for_reason(self, reason: Reason, column: u32) -> Self {
        let family = self.0 & FAMILY;
        Self((reason as u32) << REASON_SHIFT | family | column)
    }

    /// The slot in monitor mode: a drop is only counted as what would be one.
    #[inline(always)]
    pub fn monitored(self) -> Self {
        if self.is_drop() {
            Self(self.0 & !COLUMN | WOULD_DROP)
        } else {
            self
        }
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
    /// In a flood, a segment of no connection and with no SYN cookie: the kernel would reset it.
    NoConnection = 12,
    /// In a flood, the acknowledgement of a SYN cookie: the connection begins.
    SynCookie = 13,
}

impl Reason {
    /// Every reason, in the order of its counters.
    pub const ALL: [Self; 14] = [
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
        Self::NoConnection,
        Self::SynCookie,
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
            Self::NoConnection => "NoConnection",
            Self::SynCookie => "SynCookie",
        }
    }
}

/// What a counter counts: its labels.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Counted {
    /// `pass`, `drop` or, in monitor mode, `would_drop`; `answer` for a SYN that got a cookie.
    pub verdict: &'static str,
    /// Why.
    pub reason: Reason,
    /// What the frame carried.
    pub family: Family,
}

impl Counted {
    /// What the counter at `index` counts; the inverse of [`Judgement::slot`].
    ///
    /// `None` for the slots that count nothing.
    #[must_use]
    pub fn at(index: u32) -> Option<Self> {
        let part = |shift: u32, bits: u32| (index >> shift & ((1 << bits) - 1)) as usize;
        let counted = Self {
            verdict: COLUMN_LABELS.get(part(0, FAMILY_SHIFT)).copied()?,
            family: *Family::ALL.get(part(FAMILY_SHIFT, REASON_SHIFT - FAMILY_SHIFT))?,
            reason: *Reason::ALL.get((index >> REASON_SHIFT) as usize)?,
        };
        let is_answered = index & COLUMN == ANSWER;
        let can_be = matches!(counted.reason, Reason::Allowed | Reason::Listed)
            && counted.family != Family::None;
        (can_be || !is_answered).then_some(counted)
    }

    /// All counters: their index, and what they count.
    pub fn all() -> impl Iterator<Item = (u32, Self)> {
        let indices = (0_u32..).take(COUNTERS);
        indices.filter_map(|index| Some((index, Self::at(index)?)))
    }
}

/// The words for the columns of the counter map, in order.
const COLUMN_LABELS: [&str; 4] = ["pass", "drop", "would_drop", "answer"];
const PASS: u32 = 0;
const DROP: u32 = 1;
const WOULD_DROP: u32 = 2;
const ANSWER: u32 = 3;
/// The bits of the column.
const COLUMN: u32 = 3;
/// Where the family stands in a counter's index; the column stands below it.
const FAMILY_SHIFT: u32 = 2;
/// The bits of the family.
const FAMILY: u32 = 3 << FAMILY_SHIFT;
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
                let slot = Judgement { verdict, family }.slot();
                let counted = Counted::at(slot.0).unwrap();

                assert!(seen.insert(slot));
                assert_eq!(counted.reason, verdict.reason());
                assert_eq!(counted.family, family);
                let is_drop = matches!(verdict, Verdict::Drop(_));
                assert_eq!(counted.verdict, if is_drop { "drop" } else { "pass" });
                assert_eq!(slot.is_drop(), is_drop);
                let admits = [
                    Verdict::Pass(Reason::Allowed),
                    Verdict::Pass(Reason::Listed),
                ];
                assert_eq!(slot.is_admitted(), admits.contains(&verdict));
                if slot.is_admitted() && family != Family::None {
                    let answered = Counted::at(slot.answered().0).unwrap();
                    assert_eq!((answered.verdict, answered.family), ("answer", family));
                    assert_eq!(answered.reason, verdict.reason());
                    assert!(seen.insert(slot.answered()));
                    for (other, verdict) in [
                        (slot.unconnected(), Verdict::Drop(Reason::NoConnection)),
                        (slot.acknowledging(), Verdict::Pass(Reason::SynCookie)),
                    ] {
                        assert_eq!(other, Judgement { verdict, family }.slot());
                    }
                }
                let monitored = Counted::at(slot.monitored().0).unwrap();
                assert!(!slot.monitored().is_drop());
                assert_eq!(
                    monitored.verdict,
                    if is_drop { "would_drop" } else { "pass" }
                );
                assert_eq!(monitored.reason, counted.reason);
                assert_eq!(monitored.family, counted.family);
            }
        }
        // And answers, of two reasons in two families.
        assert_eq!(Counted::all().count(), Reason::ALL.len() * 9 + 4);
    }
}
