//! A second opinion: the verdict table, written again on etherparse and a linear scan of ranges.
//!
//! It shares no code with the filter but the names of verdicts and reasons.

use std::net::IpAddr;

use etherparse::{
    Ethernet2HeaderSlice, Ipv4HeaderSlice, Ipv6FragmentHeaderSlice, Ipv6HeaderSlice,
    Ipv6RawExtHeaderSlice, SingleVlanHeaderSlice,
};
use filter_ebpf::Class;
use filter_ebpf::cases::{ALLOW, DENY};
use filter_ebpf::verdict::Reason;
use filter_ebpf::verdict::Verdict::{self, Drop, Pass};
use ipnet::IpNet;

use crate::feed::{IPS_V4, IPS_V6};

/// The rules that an oracle judges by.
pub struct Oracle {
    listed: Vec<IpNet>,
    allow: Vec<IpNet>,
    deny: Vec<IpNet>,
}

impl Oracle {
    /// The embedded baseline, and the rules of the verdict table's cases.
    #[must_use]
    pub fn new() -> Self {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let baseline: Vec<_> = IPS_V4.lines().chain(IPS_V6.lines()).collect();
        Self {
            listed: nets(&baseline),
            allow: nets(&ALLOW),
            deny: nets(&DENY),
        }
    }

    /// The verdict on a frame, with the settings of [`filter_ebpf::cases::Table::Default`].
    pub fn judge(&self, frame: &[u8]) -> Verdict {
        let (mut ether_type, mut bytes) = match unframed(frame) {
            Ok(found) => found,
            Err(verdict) => return verdict,
        };
        let mut depth = 0;
        let (packet, unproven) = loop {
            let packet = match ip_packet(ether_type, bytes) {
                Ok(packet) => packet,
                Err(verdict) => return verdict,
            };
            match packet.carries {
                Carries::Tcp(443) => break (packet, None),
                Carries::Tcp(_) => return Pass(Reason::OtherPort),
                Carries::SomethingElse => return Pass(Reason::NotTcp),
                Carries::Unknown(reason) => break (packet, Some(reason)),
                Carries::Hidden(reason) => return Drop(reason),
                Carries::Inside(..) if depth == 2 => return Drop(Reason::ChainTooLong),
                Carries::Inside(inner, rest) => (ether_type, bytes) = (inner, rest),
                Carries::Gre(payload) => {
                    let inner = if depth == 2 { Ok(None) } else { gre(payload) };
                    match inner {
                        Ok(None) if depth == 2 => return Drop(Reason::ChainTooLong),
                        Ok(None) => return Pass(Reason::NotTcp),
                        Ok(Some(inner)) => (ether_type, bytes) = inner,
                        Err(verdict) => return verdict,
                    }
                }
            }
            depth += 1;
        };
        match (unproven, self.class(packet.source)) {
            (None, Class::Denied) => Drop(Reason::Denied),
            (None, Class::Listed) => Pass(Reason::Listed),
            (None, Class::Allowed) => Pass(Reason::Allowed),
            (None, Class::Absent) => Drop(Reason::NotListed),
            (Some(reason), Class::Listed | Class::Allowed) => Pass(reason),
            (Some(reason), Class::Denied | Class::Absent) => Drop(reason),
        }
    }

    /// What the rules say of an address, by a scan of all of them.
    #[must_use]
    pub fn class(&self, source: IpAddr) -> Class {
        let holds = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&source));
        if holds(&self.deny) {
            Class::Denied
        } else if holds(&self.listed) {
            Class::Listed
        } else if holds(&self.allow) {
            Class::Allowed
        } else {
            Class::Absent
        }
    }
}

impl Default for Oracle {
    fn default() -> Self {
        Self::new()
    }
}

struct Packet<'a> {
    source: IpAddr,
    carries: Carries<'a>,
}

enum Carries<'a> {
    Tcp(u16),
    SomethingElse,
    Unknown(Reason),
    /// What may be anybody's.
    Hidden(Reason),
    /// A packet: its EtherType, and its bytes.
    Inside(u16, &'a [u8]),
    Gre(&'a [u8]),
}

/// The EtherType of what is behind VLAN tags and a PPPoE session's header, and its bytes.
fn unframed(frame: &[u8]) -> Result<(u16, &[u8]), Verdict> {
    let malformed = Drop(Reason::Malformed);
    let ethernet = Ethernet2HeaderSlice::from_slice(frame).map_err(|_short| malformed)?;
    let mut ether_type = ethernet.ether_type().0;
    let mut rest = &frame[14..];
    for tags in 0.. {
        if ![0x8100, 0x88a8, 0x9100].contains(&ether_type) {
            break;
        }
        if tags == 8 {
            return Err(Drop(Reason::TooManyTags));
        }
        let tag = SingleVlanHeaderSlice::from_slice(rest).map_err(|_short| malformed)?;
        ether_type = tag.ether_type().0;
        rest = &rest[4..];
    }
    if ether_type != 0x8864 {
        return Ok((ether_type, rest));
    }
    let [_, _, _, _, high, low, session @ ..] = rest else {
        return Err(malformed);
    };
    let length = usize::from(u16::from_be_bytes([*high, *low]));
    let (protocol, header) = match session {
        [_] | [] => return Err(malformed),
        [odd, ..] if odd % 2 == 1 => (u16::from(*odd), 1),
        [high, low, ..] => (u16::from_be_bytes([*high, *low]), 2),
    };
    let packet = session.get(header..length.min(session.len()));
    let packet = packet.unwrap_or_default();
    match protocol {
        0x21 => Ok((0x0800, packet)),
        0x57 => Ok((0x86dd, packet)),
        _ => Err(Pass(Reason::NotIp)),
    }
}

/// What GRE holds, if that is a packet.
fn gre(payload: &[u8]) -> Result<Option<(u16, &[u8])>, Verdict> {
    let malformed = Drop(Reason::Malformed);
    let [flags, version, high, low, ..] = payload else {
        return Err(malformed);
    };
    if flags & 0x40 != 0 || version & 7 != 0 {
        return Ok(None);
    }
    let mut length = 4;
    for field in [0x80, 0x20, 0x10] {
        length += if flags & field != 0 { 4 } else { 0 };
    }
    let inner = payload.get(length..).unwrap_or_default();
    match u16::from_be_bytes([*high, *low]) {
        0x0800 => Ok(Some((0x0800, inner))),
        0x86dd => Ok(Some((0x86dd, inner))),
        0x883e => match inner {
            [first, ..] if first >> 4 == 4 => Ok(Some((0x0800, inner))),
            [_, _, _, _, rest @ ..] => Ok(Some((0x0800, rest))),
            _ => Err(malformed),
        },
        _ => Ok(None),
    }
}

fn ip_packet(ether_type: u16, rest: &[u8]) -> Result<Packet<'_>, Verdict> {
    let malformed = Drop(Reason::Malformed);
    match ether_type {
        0x0800 => {
            let header = Ipv4HeaderSlice::from_slice(rest).map_err(|_bad| malformed)?;
            let start = header.slice().len();
            let end = usize::from(header.total_len()).min(rest.len()).max(start);
            let carries = match header.fragments_offset().value() {
                0 => transport(header.protocol().0, &rest[start..end]),
                _ if header.protocol().0 == 6 => Carries::Unknown(Reason::Fragment),
                _ => Carries::SomethingElse,
            };
            Ok(Packet {
                source: header.source_addr().into(),
                carries,
            })
        }
        0x86dd => {
            let header = Ipv6HeaderSlice::from_slice(rest).map_err(|_bad| malformed)?;
            let end = 40 + usize::from(header.payload_length());
            let payload = &rest[40..end.min(rest.len())];
            Ok(Packet {
                source: header.source_addr().into(),
                carries: chain(header.next_header().0, payload),
            })
        }
        _ => Err(Pass(Reason::NotIp)),
    }
}

fn chain(mut next: u8, mut payload: &[u8]) -> Carries<'_> {
    let short = Carries::Hidden(Reason::Malformed);
    for _ in 0..8 {
        let length = match next {
            0 | 43 | 60 => match Ipv6RawExtHeaderSlice::from_slice(payload) {
                Ok(header) => header.slice().len(),
                Err(_) => return short,
            },
            44 => match Ipv6FragmentHeaderSlice::from_slice(payload) {
                Ok(header) if header.fragment_offset().value() != 0 => {
                    return match header.next_header().0 {
                        6 | 0 | 43 | 44 | 51 | 60 => Carries::Unknown(Reason::Fragment),
                        _ => Carries::SomethingElse,
                    };
                }
                Ok(_) => 8,
                Err(_) => return short,
            },
            // etherparse refuses a length of zero, which RFC 4302 does not forbid a receiver.
            51 => match payload.get(1) {
                Some(words) if payload.len() >= 8 => (usize::from(*words) + 2) * 4,
                Some(_) | None => return short,
            },
            protocol => return transport(protocol, payload),
        };
        let Some(behind) = payload.get(length..) else {
            return short;
        };
        next = payload[0];
        payload = behind;
    }
    match next {
        0 | 43 | 44 | 51 | 60 => Carries::Hidden(Reason::ChainTooLong),
        protocol => transport(protocol, payload),
    }
}

fn transport(protocol: u8, payload: &[u8]) -> Carries<'_> {
    match (protocol, payload) {
        (6, [_, _, high, low, ..]) => Carries::Tcp(u16::from_be_bytes([*high, *low])),
        (6, _) => Carries::Unknown(Reason::Malformed),
        (4, packet) => Carries::Inside(0x0800, packet),
        (41, packet) => Carries::Inside(0x86dd, packet),
        (47, payload) => Carries::Gre(payload),
        _ => Carries::SomethingElse,
    }
}
