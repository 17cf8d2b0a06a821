//! Parsing: the bytes of a frame in, [`Headers`] out. No policy, no maps.
//!
//! All bounds are named below. What the kernel's own stack was seen to answer on 6.18 decides
//! how far this goes: it strips any number of VLAN tags, walks any number of extension headers
//! and reassembles fragments, so a parser that gives up says so instead of guessing.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Random access to the bytes of one Ethernet frame.
///
/// `at` counts bytes from the start of the frame. Every method returns `None` if any of the
/// bytes lies past the end. Loads are whole words and may be unaligned.
pub trait Frame {
    /// The byte at `at`.
    fn u8(&self, at: usize) -> Option<u8>;
    /// The two bytes at `at`, network order.
    fn u16(&self, at: usize) -> Option<u16>;
    /// The four bytes at `at`, network order.
    fn u32(&self, at: usize) -> Option<u32>;
}

impl Frame for [u8] {
    fn u8(&self, at: usize) -> Option<u8> {
        self.get(at).copied()
    }

    fn u16(&self, at: usize) -> Option<u16> {
        self.get(at..)?
            .first_chunk()
            .copied()
            .map(u16::from_be_bytes)
    }

    fn u32(&self, at: usize) -> Option<u32> {
        self.get(at..)?
            .first_chunk()
            .copied()
            .map(u32::from_be_bytes)
    }
}

/// The fields of an IP packet that a decision depends on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Headers {
    /// Source address, never unmapped: `::ffff:192.0.2.1` stays IPv6.
    pub source: IpAddr,
    /// Destination address; `None` where a routing header or IPv4 options may yet change it.
    pub destination: Option<IpAddr>,
    /// What the packet carries, as far as its bytes prove it.
    pub transport: Transport,
}

/// The transport of a packet, as far as its bytes prove it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Transport {
    /// TCP to this destination port.
    Tcp(u16),
    /// UDP to this destination port.
    Udp(u16),
    /// Provably neither TCP nor UDP, or a later fragment that provably is not TCP.
    Other,
    /// A fragment other than the first, of TCP or of something hidden behind an extension header.
    LaterFragment,
    /// More than [`EXTENSIONS_MAX`] extension headers, the transport not among them.
    ChainTooLong,
    /// The packet, or its first fragment, ends before the transport's ports.
    TooShort,
}

/// Why a frame has no [`Headers`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ParseError {
    /// Neither IPv4 nor IPv6.
    NotIp,
    /// More than [`TAGS_MAX`] VLAN tags.
    TooManyTags,
    /// Ends inside an Ethernet or fixed IP header, or the header contradicts itself.
    Malformed,
}

impl Headers {
    /// Parses a frame that starts with its Ethernet header.
    ///
    /// # Errors
    ///
    /// Returns why there is no IP packet to judge, see [`ParseError`].
    #[inline(always)]
    pub fn parse<F: Frame + ?Sized>(frame: &F) -> Result<Self, ParseError> {
        let mut at = ETHERTYPE;
        let mut ethertype = frame.u16(at).ok_or(ParseError::Malformed)?;
        let mut tags = 0;
        while is_tag(ethertype) {
            if tags == TAGS_MAX {
                return Err(ParseError::TooManyTags);
            }
            tags += 1;
            at += TAG;
            ethertype = frame.u16(at).ok_or(ParseError::Malformed)?;
        }

        match ethertype {
            ETHERTYPE_IPV4 => parse_v4(frame, at + 2),
            ETHERTYPE_IPV6 => parse_v6(frame, at + 2),
            _ => Err(ParseError::NotIp),
        }
    }
}

#[inline(always)]
fn is_tag(ethertype: u16) -> bool {
    matches!(ethertype, TAG_8021Q | TAG_8021AD | TAG_9100)
}

/// RFC 791 §3.1; `at` is the offset of the IPv4 header.
#[inline(always)]
fn parse_v4<F: Frame + ?Sized>(frame: &F, at: usize) -> Result<Headers, ParseError> {
    let destination = frame.u32(at + 16).ok_or(ParseError::Malformed)?;
    let source = frame.u32(at + 12).ok_or(ParseError::Malformed)?;
    let total_length = frame.u16(at + 2).ok_or(ParseError::Malformed)?;
    let protocol = frame.u8(at + 9).ok_or(ParseError::Malformed)?;
    let fragment = frame.u16(at + 6).ok_or(ParseError::Malformed)?;
    let version_ihl = frame.u8(at).ok_or(ParseError::Malformed)?;

    // The version nibble and an IHL of at least five 32-bit words, 0x45 to 0x4f.
    if !(0x45..=0x4f).contains(&version_ihl) {
        return Err(ParseError::Malformed);
    }
    let payload = at + usize::from(version_ihl & 0x0f) * 4;
    let has_options = version_ihl != 0x45;
    if has_options && frame.u8(payload - 1).is_none() {
        return Err(ParseError::Malformed);
    }

    let transport = if fragment & V4_FRAGMENT_OFFSET != 0 {
        // IPv4 reassembles by protocol, so a fragment that lies about it joins nothing.
        match protocol {
            TCP => Transport::LaterFragment,
            _ => Transport::Other,
        }
    } else {
        parse_transport(frame, payload, at + usize::from(total_length), protocol)
    };

    Ok(Headers {
        source: IpAddr::V4(Ipv4Addr::from_bits(source)),
        // A source-route option (RFC 791 §3.1, types 131 and 137) changes the destination.
        destination: (!has_options).then(|| IpAddr::V4(Ipv4Addr::from_bits(destination))),
        transport,
    })
}

/// RFC 8200 §3; `at` is the offset of the IPv6 header.
#[inline(always)]
fn parse_v6<F: Frame + ?Sized>(frame: &F, at: usize) -> Result<Headers, ParseError> {
    let destination = address_v6(frame, at + 24).ok_or(ParseError::Malformed)?;
    let source = address_v6(frame, at + 8).ok_or(ParseError::Malformed)?;
    let next = frame.u8(at + 6).ok_or(ParseError::Malformed)?;
    let payload_length = frame.u16(at + 4).ok_or(ParseError::Malformed)?;
    let version_class = frame.u8(at).ok_or(ParseError::Malformed)?;
    if version_class >> 4 != 6 {
        return Err(ParseError::Malformed);
    }

    let payload = at + V6_HEADER;
    let chain = Chain::walk(frame, payload, payload + usize::from(payload_length), next);
    Ok(Headers {
        source: IpAddr::V6(source),
        destination: (!chain.rerouted).then_some(IpAddr::V6(destination)),
        transport: chain.transport,
    })
}

#[inline(always)]
fn address_v6<F: Frame + ?Sized>(frame: &F, at: usize) -> Option<Ipv6Addr> {
    // The last word first: the checks of the others are then implied.
    let d = u128::from(frame.u32(at + 12)?);
    let c = u128::from(frame.u32(at + 8)?);
    let b = u128::from(frame.u32(at + 4)?);
    let a = u128::from(frame.u32(at)?);
    Some(Ipv6Addr::from_bits(a << 96 | b << 64 | c << 32 | d))
}

/// What an IPv6 extension header chain leads to.
struct Chain {
    transport: Transport,
    /// A routing header has segments left (RFC 8200 §4.4).
    rerouted: bool,
}

impl Chain {
    /// Walks the chain that starts at `at` with a header of type `next`, within the packet's `end`.
    ///
    /// The stack cuts off whatever a frame holds behind the packet; read here, it would let a
    /// sender show a harmless header where a later fragment brings the real one.
    ///
    /// Only the five types that the kernel itself walks are walked. Treating another protocol's
    /// bytes as an extension header would let a sender forge the ports.
    #[inline(always)]
    fn walk<F: Frame + ?Sized>(frame: &F, mut at: usize, end: usize, mut next: u8) -> Self {
        let mut rerouted = false;
        let mut extensions = 0;
        let transport = loop {
            if !matches!(
                next,
                HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION
            ) {
                break parse_transport(frame, at, end, next);
            }
            if extensions == EXTENSIONS_MAX {
                break Transport::ChainTooLong;
            }
            extensions += 1;

            // No extension header is shorter than eight bytes (RFC 8200 §4.2).
            if at + EXTENSION_MIN > end || frame.u8(at + EXTENSION_MIN - 1).is_none() {
                break Transport::TooShort;
            }
            // Type of the header behind this one, and this one's length in units of its own.
            let Some(word) = frame.u16(at) else {
                break Transport::TooShort;
            };
            let [behind, length] = word.to_be_bytes();
            let length = match next {
                FRAGMENT => {
                    let Some(fragment) = frame.u16(at + 2) else {
                        break Transport::TooShort;
                    };
                    if fragment & V6_FRAGMENT_OFFSET != 0 {
                        // Reassembly takes the type from the first fragment alone, so this one
                        // may lie; but the first is judged by its own bytes.
                        break match behind {
                            TCP | HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION
                            | DESTINATION => Transport::LaterFragment,
                            _ => Transport::Other,
                        };
                    }
                    FRAGMENT_HEADER
                }
                AUTHENTICATION => (usize::from(length) + 2) * 4,
                ROUTING => {
                    let Some(segments_left) = frame.u8(at + 3) else {
                        break Transport::TooShort;
                    };
                    rerouted |= segments_left != 0;
                    (usize::from(length) + 1) * 8
                }
                _ => (usize::from(length) + 1) * 8,
            };
            if at + length > end || frame.u8(at + length - 1).is_none() {
                break Transport::TooShort;
            }
            at += length;
            next = behind;
        };
        Self {
            transport,
            rerouted,
        }
    }
}

/// RFC 9293 §3.1, RFC 768: both begin with the source port, then the destination port.
#[inline(always)]
fn parse_transport<F: Frame + ?Sized>(frame: &F, at: usize, end: usize, protocol: u8) -> Transport {
    let port = || (at + PORTS <= end).then(|| frame.u16(at + 2)).flatten();
    match protocol {
        TCP => port().map_or(Transport::TooShort, Transport::Tcp),
        // Cut off before its port it can reach no socket, protected or not.
        UDP => port().map_or(Transport::Other, Transport::Udp),
        _ => Transport::Other,
    }
}

/// VLAN tags that are stripped; the kernel strips any number of priority tags (VLAN 0), but no
/// network in use stacks more than a few.
pub const TAGS_MAX: u32 = 8;
/// IPv6 extension headers that are walked. RFC 8200 §4.1 recommends at most seven.
pub const EXTENSIONS_MAX: u32 = 8;

/// Offset of the EtherType in an untagged Ethernet II frame, in bytes.
const ETHERTYPE: usize = 12;
/// Length of a VLAN tag, in bytes (IEEE 802.1Q).
const TAG: usize = 4;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const TAG_8021Q: u16 = 0x8100;
const TAG_8021AD: u16 = 0x88a8;
/// Double tagging before 802.1ad; still found on old switches.
const TAG_9100: u16 = 0x9100;

/// Length of both ports together, in bytes.
const PORTS: usize = 4;
/// Length of the shortest extension header, in bytes.
const EXTENSION_MIN: usize = 8;
/// Length of the fixed IPv6 header, in bytes.
const V6_HEADER: usize = 40;
/// Length of the IPv6 fragment header, in bytes (RFC 8200 §4.5).
const FRAGMENT_HEADER: usize = 8;
/// The 13 bits of the IPv4 fragment offset.
const V4_FRAGMENT_OFFSET: u16 = 0x1fff;
/// The 13 bits of the IPv6 fragment offset.
const V6_FRAGMENT_OFFSET: u16 = 0xfff8;

const HOP_BY_HOP: u8 = 0;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
