//! The decision: a frame, the settings and the ranges in, a [`Verdict`] out.
//!
//! This is the only place that says drop or pass. The rule: a stranger's packet that cannot be
//! proven not to reach a protected port is dropped; for everybody else, giving up means pass.

use core::net::IpAddr;

use crate::packet::{Frame, Headers, ParseError, Transport};
use crate::table::{Class, Ranges};

/// What the operator protects.
pub trait Settings {
    /// Whether this TCP port is protected.
    fn protects_tcp(&self, port: u16) -> bool;
    /// Whether this UDP port is protected.
    fn protects_udp(&self, port: u16) -> bool;
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
) -> Verdict {
    let headers = match Headers::parse(frame) {
        Ok(headers) => headers,
        Err(ParseError::NotIp) => return Verdict::Pass(Reason::NotIp),
        Err(ParseError::TooManyTags) => return Verdict::Drop(Reason::TooManyTags),
        Err(ParseError::Malformed) => return Verdict::Drop(Reason::Malformed),
    };

    // What of this packet is proven, and the reason if nothing is.
    let unproven = match headers.transport {
        Transport::Tcp(port) if settings.protects_tcp(port) => None,
        Transport::Tcp(_) => return Verdict::Pass(Reason::OtherPort),
        Transport::Udp(port) if settings.protects_udp(port) => None,
        Transport::Udp(_) | Transport::Other => return Verdict::Pass(Reason::NotTcp),
        Transport::LaterFragment if settings.fragments_pass() => {
            return Verdict::Pass(Reason::Fragment);
        }
        Transport::LaterFragment => Some(Reason::Fragment),
        Transport::ChainTooLong => Some(Reason::ChainTooLong),
        Transport::TooShort => Some(Reason::Malformed),
    };
    if let Some(destination) = headers.destination
        && !settings.protects_destination(destination)
    {
        return Verdict::Pass(Reason::OtherDestination);
    }

    let class = ranges.class(headers.source);
    match (unproven, class) {
        (Some(reason), class) if class.may_enter() => Verdict::Pass(reason),
        (Some(reason), _) => Verdict::Drop(reason),
        (None, Class::Absent) => Verdict::Drop(Reason::NotListed),
        (None, Class::Denied) => Verdict::Drop(Reason::Denied),
        (None, Class::Allowed) => Verdict::Pass(Reason::Allowed),
        (None, Class::Listed) => Verdict::Pass(Reason::Listed),
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

    /// The slot of the counter map that counts this verdict: three per reason.
    ///
    /// In monitor mode a drop is counted apart, as a would-be drop.
    #[must_use]
    #[inline(always)]
    pub fn counter_index(self, monitor: bool) -> u32 {
        let column = match self {
            Self::Pass(_) => 0,
            Self::Drop(_) if monitor => 2,
            Self::Drop(_) => 1,
        };
        self.reason() as u32 * COLUMNS + column
    }
}

/// Why a verdict was reached. The label in metrics is [`Reason::label`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum Reason {
    /// The source is in the operator's `allow`.
    Allowed = 0,
    /// More extension headers than are walked.
    ChainTooLong = 1,
    /// The source is in the operator's `deny`.
    Denied = 2,
    /// A later fragment of TCP.
    Fragment = 3,
    /// The source is in the published ranges.
    Listed = 4,
    /// The frame ends inside a header, or a header contradicts itself.
    Malformed = 5,
    /// Neither IPv4 nor IPv6: ARP, LLDP, PPPoE …
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

/// The words for the columns of the counter map, in order: see [`Verdict::counter_index`].
pub const COLUMN_LABELS: [&str; COLUMNS as usize] = ["pass", "drop", "would_drop"];
/// Counters per reason.
const COLUMNS: u32 = 3;
/// Length of the counter map.
pub const COUNTERS: usize = Reason::ALL.len() * COLUMNS as usize;
