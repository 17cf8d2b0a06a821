//! Parsing: the bytes of a frame in, [`Headers`] out. No policy, no maps.
//!
//! All bounds are named below. What the kernel's own stack was seen to answer on 6.18 decides
//! how far this goes: it strips any number of VLAN tags, walks any number of extension headers
//! and reassembles fragments, so a parser that gives up says so instead of guessing.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Random access to the bytes of one Ethernet frame.
pub trait Frame {
    /// The `N` bytes from `at` on, counted from the start of the frame; `None` if any of them
    /// lies past the end.
    ///
    /// Whole headers are asked for at once: one bounds check each, and the compiler makes wide
    /// loads of `from_be_bytes` on parts of an array.
    fn bytes<const N: usize>(&self, at: usize) -> Option<&[u8; N]>;
}

impl Frame for [u8] {
    fn bytes<const N: usize>(&self, at: usize) -> Option<&[u8; N]> {
        self.get(at..)?.first_chunk()
    }
}

/// The fields of an IP packet that a decision depends on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Headers<'a> {
    /// Source address.
    pub source: Address<'a>,
    /// Destination address; `None` where a routing header or IPv4 options may yet change it.
    pub destination: Option<Address<'a>>,
    /// What the packet carries, as far as its bytes prove it.
    pub transport: Transport,
}

/// An address where it stands in the frame: loaded only if somebody asks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Address<'a> {
    /// Four octets.
    V4(&'a [u8; 4]),
    /// Sixteen octets.
    V6(&'a [u8; 16]),
}

impl Address<'_> {
    /// The address; never unmapped: `::ffff:192.0.2.1` stays IPv6.
    #[must_use]
    #[inline(always)]
    pub fn ip(self) -> IpAddr {
        match self {
            Self::V4(octets) => IpAddr::V4(Ipv4Addr::from_bits(u32::from_be_bytes(*octets))),
            Self::V6(octets) => IpAddr::V6(Ipv6Addr::from_bits(u128::from_be_bytes(*octets))),
        }
    }
}

/// The transport of a packet, as far as its bytes prove it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Transport {
    /// TCP to this destination port.
    Tcp(u16),
    /// UDP to this destination port.
    Udp(u16),
    /// UDP that ends before its ports; the rest may come in another fragment.
    UdpTooShort,
    /// Provably neither TCP nor UDP, or a later fragment that provably is not TCP.
    Other,
    /// A fragment other than the first, of TCP or of something hidden behind an extension header.
    LaterFragment,
    /// More than [`EXTENSIONS_MAX`] extension headers, the transport not among them.
    ChainTooLong,
    /// The packet, or its first fragment, ends before TCP's ports or inside an extension header.
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

/// The IP packet in a frame: its family, and the offset of its header in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Packet {
    /// IPv4.
    V4(usize),
    /// IPv6.
    V6(usize),
}

impl Packet {
    /// Finds the packet in a frame that starts with its Ethernet header, behind any VLAN tags.
    ///
    /// # Errors
    ///
    /// Returns why there is no IP packet to judge, see [`ParseError`].
    #[inline(always)]
    pub fn find<F: Frame + ?Sized>(frame: &F) -> Result<Self, ParseError> {
        for at in (ETHERTYPE..).step_by(TAG).take(1 + TAGS_MAX) {
            let ethertype = frame.bytes(at).ok_or(ParseError::Malformed)?;
            match u16::from_be_bytes(*ethertype) {
                ETHERTYPE_IPV4 => return Ok(Self::V4(at + 2)),
                ETHERTYPE_IPV6 => return Ok(Self::V6(at + 2)),
                TAG_8021Q | TAG_8021AD | TAG_9100 => {}
                _ => return Err(ParseError::NotIp),
            }
        }
        Err(ParseError::TooManyTags)
    }
}

impl<'a> Headers<'a> {
    /// Parses the headers of the packet that [`Packet::find`] found in `frame`.
    ///
    /// # Errors
    ///
    /// Returns [`ParseError::Malformed`].
    #[inline(always)]
    pub fn parse<F: Frame + ?Sized>(frame: &'a F, packet: Packet) -> Result<Self, ParseError> {
        match packet {
            Packet::V4(at) => parse_v4(frame, at),
            Packet::V6(at) => parse_v6(frame, at),
        }
    }
}

/// RFC 791 §3.1; `at` is the offset of the IPv4 header.
#[inline(always)]
fn parse_v4<F: Frame + ?Sized>(frame: &F, at: usize) -> Result<Headers<'_>, ParseError> {
    let header: &[u8; V4_HEADER] = frame.bytes(at).ok_or(ParseError::Malformed)?;
    let (source, destination) = (part(header, 12), part(header, 16));
    let &[version_ihl, _, l0, l1, _, _, f0, f1, _, protocol, ..] = header;
    let total_length = u16::from_be_bytes([l0, l1]);
    let fragment = u16::from_be_bytes([f0, f1]);

    // The version nibble and an IHL of at least five 32-bit words, 0x45 to 0x4f.
    if !(0x45..=0x4f).contains(&version_ihl) {
        return Err(ParseError::Malformed);
    }
    let payload = at + usize::from(version_ihl & 0x0f) * 4;
    let has_options = version_ihl != 0x45;
    if has_options && frame.bytes::<1>(payload - 1).is_none() {
        return Err(ParseError::Malformed);
    }

    Ok(Headers {
        source: Address::V4(source),
        // A source-route option (RFC 791 §3.1, types 131 and 137) changes the destination.
        destination: (!has_options).then_some(Address::V4(destination)),
        transport: if fragment & V4_FRAGMENT_OFFSET != 0 {
            // IPv4 reassembles by protocol, so a fragment that lies about it joins nothing.
            match protocol {
                TCP => Transport::LaterFragment,
                _ => Transport::Other,
            }
        } else {
            parse_transport(frame, payload, at + usize::from(total_length), protocol)
        },
    })
}

/// RFC 8200 §3; `at` is the offset of the IPv6 header.
#[inline(always)]
fn parse_v6<F: Frame + ?Sized>(frame: &F, at: usize) -> Result<Headers<'_>, ParseError> {
    let header: &[u8; V6_HEADER] = frame.bytes(at).ok_or(ParseError::Malformed)?;
    let (source, destination) = (part(header, 8), part(header, 24));
    let &[version_class, _, _, _, l0, l1, next, ..] = header;
    if version_class >> 4 != 6 {
        return Err(ParseError::Malformed);
    }

    let payload = at + V6_HEADER;
    let payload_length = usize::from(u16::from_be_bytes([l0, l1]));
    let chain = Chain::walk(frame, payload, payload + payload_length, next);
    Ok(Headers {
        source: Address::V6(source),
        destination: (!chain.rerouted).then_some(Address::V6(destination)),
        transport: chain.transport,
    })
}

/// `N` bytes of a header, from `at` on; both are constants, so nothing is left to check.
#[inline(always)]
fn part<const N: usize, const M: usize>(header: &[u8; M], at: usize) -> &[u8; N] {
    let part = header.get(at..).and_then(|rest| rest.first_chunk());
    part.unwrap_or(&[0; N])
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
        // On its own, so that the usual packet never sees the loop.
        if matches!(next, TCP | UDP) {
            let transport = parse_transport(frame, at, end, next);
            return Self {
                transport,
                rerouted,
            };
        }
        let mut extensions = 0;
        let transport = loop {
            if !is_extension(next) {
                break parse_transport(frame, at, end, next);
            }
            if extensions == EXTENSIONS_MAX {
                break Transport::ChainTooLong;
            }
            extensions += 1;

            // No extension header is shorter than eight bytes (RFC 8200 §4.2).
            let Some(header) = frame.bytes::<EXTENSION_MIN>(at) else {
                break Transport::TooShort;
            };
            if at + EXTENSION_MIN > end {
                break Transport::TooShort;
            }
            // Type of the header behind this one, and this one's length in units of its own.
            let &[behind, length, b2, b3, ..] = header;
            let length = match next {
                FRAGMENT => {
                    if u16::from_be_bytes([b2, b3]) & V6_FRAGMENT_OFFSET != 0 {
                        // Reassembly takes the type from the first fragment alone, so this one
                        // may lie; but the first is judged by its own bytes.
                        break if behind == TCP || is_extension(behind) {
                            Transport::LaterFragment
                        } else {
                            Transport::Other
                        };
                    }
                    FRAGMENT_HEADER
                }
                AUTHENTICATION => (usize::from(length) + 2) * 4,
                ROUTING => {
                    // Byte 3 is the number of segments left.
                    rerouted |= b3 != 0;
                    (usize::from(length) + 1) * 8
                }
                _ => (usize::from(length) + 1) * 8,
            };
            if at + length > end || frame.bytes::<1>(at + length - 1).is_none() {
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

/// Whether a next-header value names an extension header that the kernel walks.
#[inline(always)]
fn is_extension(next: u8) -> bool {
    matches!(
        next,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION
    )
}

/// RFC 9293 §3.1, RFC 768: both begin with the source port, then the destination port.
#[inline(always)]
fn parse_transport<F: Frame + ?Sized>(frame: &F, at: usize, end: usize, protocol: u8) -> Transport {
    let port = || {
        let &[_, _, high, low] = frame.bytes::<PORTS>(at)?;
        (at + PORTS <= end).then_some(u16::from_be_bytes([high, low]))
    };
    match protocol {
        TCP => port().map_or(Transport::TooShort, Transport::Tcp),
        UDP => port().map_or(Transport::UdpTooShort, Transport::Udp),
        _ => Transport::Other,
    }
}

/// VLAN tags that are stripped; the kernel strips any number of priority tags (VLAN 0), but no
/// network in use stacks more than a few.
pub const TAGS_MAX: usize = 8;
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
/// Length of the IPv4 header without options, in bytes.
const V4_HEADER: usize = 20;
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
