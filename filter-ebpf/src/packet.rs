//! Parsing: the bytes of a frame in, [`Headers`] out. No policy, no maps.
//!
//! All bounds are named below. What the kernel's own stack was seen to answer on 6.18 decides
//! how far this goes: it strips any number of VLAN tags, walks any number of extension headers,
//! reassembles fragments and, where there is a device for it, unpacks packets that are inside of
//! others; so a parser that gives up says so instead of guessing.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Random access to the bytes of one Ethernet frame, or of what is behind its first ones.
pub trait Frame: Copy {
    /// The `N` bytes from `at` on, counted from the start; `None` if any of them lies past the end.
    ///
    /// Whole headers are asked for at once: one bounds check each, and the compiler makes wide
    /// loads of `from_be_bytes` on parts of an array.
    fn bytes<const N: usize>(&self, at: usize) -> Option<&[u8; N]>;

    /// What is behind the first `at` bytes, if there can be that many.
    fn behind(self, at: usize) -> Option<Self>;

    /// The same number, of which the kernel's verifier knows nothing: it walks every path, and
    /// where many meet that differ in nothing else, it goes on with one of them.
    #[must_use]
    #[inline(always)]
    fn forgotten(self, number: usize) -> usize {
        number
    }
}

impl Frame for &[u8] {
    fn bytes<const N: usize>(&self, at: usize) -> Option<&[u8; N]> {
        self.get(at..)?.first_chunk()
    }

    fn behind(self, at: usize) -> Option<Self> {
        // As in the kernel, where the frame need not be that long.
        (at <= BEHIND_MAX).then(|| self.get(at..).unwrap_or_default())
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
    /// Something that may hold another packet, which the host may unpack and take for one that came
    /// by itself.
    Tunnel(Tunnel),
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
    /// Whether the first header says all that there is to judge by: neither extension headers nor
    /// a packet are behind it. True of one that is cut off before it says so.
    #[inline(always)]
    pub fn is_plain<F: Frame>(self, frame: &F) -> bool {
        match self {
            Self::V4(at) => frame
                .bytes(at)
                .is_none_or(|header: &[u8; V4_HEADER]| !is_tunnel(header[V4_PROTOCOL])),
            Self::V6(at) => frame.bytes(at).is_none_or(|header: &[u8; V6_HEADER]| {
                let next = header[V6_NEXT_HEADER];
                !is_tunnel(next) && !is_extension(next)
            }),
        }
    }

    /// The packet as if it were held by its frame.
    #[inline(always)]
    pub fn held(self) -> Tunnel {
        let (encapsulation, at) = match self {
            Self::V4(at) => (Encapsulation::Ipv4, at),
            Self::V6(at) => (Encapsulation::Ipv6, at),
        };
        Tunnel {
            encapsulation,
            at,
            end: usize::MAX,
        }
    }
}

/// What may hold a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tunnel {
    /// How it does.
    pub encapsulation: Encapsulation,
    /// The offset of what it holds, in bytes.
    pub at: usize,
    /// The offset behind that: what the frame holds from there on is not its own.
    pub end: usize,
}

/// How a packet is held.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Encapsulation {
    /// An IPv4 packet as it is (protocol 4: RFC 2003, RFC 2473).
    Ipv4,
    /// An IPv6 packet as it is (protocol 41: RFC 4213 §3.5, RFC 2473).
    Ipv6,
    /// Generic Routing Encapsulation (RFC 2784, RFC 2890).
    Gre,
    /// A PPPoE session (RFC 2516).
    Session,
}

/// What a frame carries.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Carried {
    /// A packet.
    Packet(Packet),
    /// What may hold one.
    Tunnel(Tunnel),
}

impl Carried {
    /// Finds the packet in a frame that starts with its Ethernet header, behind any VLAN tags.
    ///
    /// # Errors
    ///
    /// Returns why there is no IP packet to judge, see [`ParseError`].
    #[inline(always)]
    pub fn find<F: Frame>(frame: &F) -> Result<Self, ParseError> {
        for at in (ETHERTYPE..).step_by(TAG).take(1 + TAGS_MAX) {
            let ethertype = frame.bytes(at).ok_or(ParseError::Malformed)?;
            match u16::from_be_bytes(*ethertype) {
                ETHERTYPE_IPV4 => return Ok(Self::Packet(Packet::V4(at + 2))),
                ETHERTYPE_IPV6 => return Ok(Self::Packet(Packet::V6(at + 2))),
                TAG_8021Q | TAG_8021AD | TAG_9100 => {}
                ETHERTYPE_PPPOE_SESSION => {
                    return Ok(Self::Tunnel(Tunnel {
                        encapsulation: Encapsulation::Session,
                        at: at + 2,
                        end: usize::MAX,
                    }));
                }
                _ => return Err(ParseError::NotIp),
            }
        }
        Err(ParseError::TooManyTags)
    }
}

/// A tunnel by itself: what is in front of it is cut away.
#[derive(Clone, Copy, Debug)]
pub struct Apart<F> {
    /// The bytes from the tunnel on.
    pub frame: F,
    /// How it holds its packet.
    pub encapsulation: Encapsulation,
    /// The offset behind its last byte.
    pub end: usize,
}

impl Tunnel {
    /// Cuts away what is in front; `None` if that is more than any header takes.
    #[inline(always)]
    pub fn apart<F: Frame>(self, frame: F) -> Option<Apart<F>> {
        let (at, end) = (frame.forgotten(self.at), frame.forgotten(self.end));
        Some(Apart {
            frame: frame.behind(at)?,
            encapsulation: self.encapsulation,
            end: frame.forgotten(end.saturating_sub(at)),
        })
    }
}

impl<F: Frame> Apart<F> {
    /// Finds the packet, and where it ends.
    ///
    /// # Errors
    ///
    /// Returns [`ParseError::NotIp`] if it holds something else, and [`ParseError::Malformed`].
    #[inline(always)]
    pub fn packet(&self) -> Result<(Packet, usize), ParseError> {
        match self.encapsulation {
            Encapsulation::Ipv4 => Ok((Packet::V4(0), self.end)),
            Encapsulation::Ipv6 => Ok((Packet::V6(0), self.end)),
            Encapsulation::Gre => Ok((find_in_gre(&self.frame, self.end)?, self.end)),
            Encapsulation::Session => find_in_session(&self.frame),
        }
    }
}

/// RFC 2516 §4.
#[inline(always)]
fn find_in_session<F: Frame>(frame: &F) -> Result<(Packet, usize), ParseError> {
    let &[_, _, _, _, l0, l1, p0, p1] = frame.bytes(0).ok_or(ParseError::Malformed)?;
    let end = PPPOE_HEADER + usize::from(u16::from_be_bytes([l0, l1]));
    // A protocol of one byte is odd, the first of two is even (RFC 1661 §2); Linux takes both.
    let (protocol, at) = match p0 & 1 {
        1 => (u16::from(p0), PPPOE_HEADER + 1),
        _ => (u16::from_be_bytes([p0, p1]), PPPOE_HEADER + 2),
    };
    let packet = match protocol {
        PPP_IPV4 => Packet::V4(at),
        PPP_IPV6 => Packet::V6(at),
        _ => return Err(ParseError::NotIp),
    };
    Ok((packet, end))
}

/// RFC 2784 §2, RFC 2890 §2: what of GRE carries an IP packet without an Ethernet header.
#[inline(always)]
fn find_in_gre<F: Frame>(frame: &F, end: usize) -> Result<Packet, ParseError> {
    let &[flags, version, p0, p1] = frame.bytes(0).ok_or(ParseError::Malformed)?;
    if GRE_HEADER > end {
        return Err(ParseError::Malformed);
    }
    // Linux takes no routing (RFC 1701), and version 1 is another protocol (RFC 2637).
    if flags & GRE_ROUTING != 0 || version & GRE_VERSION != 0 {
        return Err(ParseError::NotIp);
    }
    let fields = [GRE_CHECKSUM, GRE_KEY, GRE_SEQUENCE];
    let fields = fields.iter().filter(|field| flags & **field != 0).count();
    let at = GRE_HEADER + fields * 4;
    match u16::from_be_bytes([p0, p1]) {
        ETHERTYPE_IPV4 => Ok(Packet::V4(at)),
        ETHERTYPE_IPV6 => Ok(Packet::V6(at)),
        // Linux takes it for IPv4, behind a redirect header of four bytes unless one begins here
        // (net/ipv4/gre_demux.c).
        ETHERTYPE_WCCP => {
            let &[first, ..] = frame
                .bytes::<WCCP_REDIRECT>(at)
                .ok_or(ParseError::Malformed)?;
            match first & 0xf0 {
                0x40 => Ok(Packet::V4(at)),
                _ => Ok(Packet::V4(at + WCCP_REDIRECT)),
            }
        }
        _ => Err(ParseError::NotIp),
    }
}

impl<'a> Headers<'a> {
    /// Parses the headers of a packet that ends before `end`, or with its frame
    /// ([`usize::MAX`]).
    ///
    /// # Errors
    ///
    /// Returns [`ParseError::Malformed`].
    #[inline(always)]
    pub fn parse<F: Frame>(frame: &'a F, packet: Packet, end: usize) -> Result<Self, ParseError> {
        match packet {
            Packet::V4(at) => parse_v4(frame, at, end, Depth::Full),
            Packet::V6(at) => parse_v6(frame, at, end, Depth::Full),
        }
    }

    /// The same for a packet that [is plain](Packet::is_plain).
    ///
    /// # Errors
    ///
    /// As [`Self::parse`].
    #[inline(always)]
    pub fn parse_plain<F: Frame>(frame: &'a F, packet: Packet) -> Result<Self, ParseError> {
        match packet {
            Packet::V4(at) => parse_v4(frame, at, usize::MAX, Depth::Plain),
            Packet::V6(at) => parse_v6(frame, at, usize::MAX, Depth::Plain),
        }
    }
}

/// How far a packet is parsed: a constant wherever the compiler makes a program of it.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Depth {
    /// TCP and UDP, right behind the IP header.
    Plain,
    /// Whatever there is.
    Full,
}

/// The headers that a frame is judged by, those of the innermost packet that is looked at: its
/// source, and its transport. `None` if there are none.
#[must_use]
pub fn innermost(frame: &[u8]) -> Option<(IpAddr, Transport)> {
    let tunnel = match Carried::find(&frame).ok()? {
        Carried::Packet(packet) => packet.held(),
        Carried::Tunnel(tunnel) => tunnel,
    };
    let mut left = TUNNELS_MAX;
    let mut apart = tunnel.apart(frame)?;
    loop {
        let (packet, end) = apart.packet().ok()?;
        let headers = Headers::parse(&apart.frame, packet, end).ok()?;
        let (source, transport) = (headers.source.ip(), headers.transport);
        let Transport::Tunnel(tunnel) = transport else {
            return Some((source, transport));
        };
        if left == 0 {
            return Some((source, transport));
        }
        apart = tunnel.apart(apart.frame)?;
        left -= 1;
    }
}

/// RFC 791 §3.1; `at` is the offset of the IPv4 header.
#[inline(always)]
fn parse_v4<F: Frame>(
    frame: &F,
    at: usize,
    end: usize,
    depth: Depth,
) -> Result<Headers<'_>, ParseError> {
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
    if has_options && frame.bytes::<1>(payload - 1).is_none() || payload > end {
        return Err(ParseError::Malformed);
    }
    let end = end.min(at + usize::from(total_length));

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
            parse_transport(frame, payload, end, protocol, depth)
        },
    })
}

/// RFC 8200 §3; `at` is the offset of the IPv6 header.
#[inline(always)]
fn parse_v6<F: Frame>(
    frame: &F,
    at: usize,
    end: usize,
    depth: Depth,
) -> Result<Headers<'_>, ParseError> {
    let header: &[u8; V6_HEADER] = frame.bytes(at).ok_or(ParseError::Malformed)?;
    let (source, destination) = (part(header, 8), part(header, 24));
    let &[version_class, _, _, _, l0, l1, next, ..] = header;
    let payload = at + V6_HEADER;
    if version_class >> 4 != 6 || payload > end {
        return Err(ParseError::Malformed);
    }

    let payload_length = usize::from(u16::from_be_bytes([l0, l1]));
    let end = end.min(payload + payload_length);
    let chain = match depth {
        Depth::Plain => Chain {
            transport: parse_transport(frame, payload, end, next, depth),
            rerouted: false,
        },
        Depth::Full => Chain::walk(frame, payload, end, next),
    };
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
    fn walk<F: Frame>(frame: &F, mut at: usize, end: usize, mut next: u8) -> Self {
        let mut rerouted = false;
        let mut extensions = 0;
        let transport = loop {
            if at > CHAIN_MAX {
                break Transport::ChainTooLong;
            }
            if !is_extension(next) {
                break parse_transport(frame, at, end, next, Depth::Full);
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
            at = frame.forgotten(at + length);
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

/// Whether a protocol is one by which packets hold packets.
#[inline(always)]
fn is_tunnel(protocol: u8) -> bool {
    matches!(protocol, IPV4_INSIDE | IPV6_INSIDE | GRE)
}

/// RFC 9293 §3.1, RFC 768: both begin with the source port, then the destination port.
#[inline(always)]
fn parse_transport<F: Frame>(
    frame: &F,
    at: usize,
    end: usize,
    protocol: u8,
    depth: Depth,
) -> Transport {
    let port = || {
        let &[_, _, high, low] = frame.bytes::<PORTS>(at)?;
        (at + PORTS <= end).then_some(u16::from_be_bytes([high, low]))
    };
    let tunnel = |encapsulation| {
        Transport::Tunnel(Tunnel {
            encapsulation,
            at,
            end,
        })
    };
    match protocol {
        TCP => port().map_or(Transport::TooShort, Transport::Tcp),
        UDP => port().map_or(Transport::UdpTooShort, Transport::Udp),
        _ if depth == Depth::Plain => Transport::Other,
        IPV4_INSIDE => tunnel(Encapsulation::Ipv4),
        IPV6_INSIDE => tunnel(Encapsulation::Ipv6),
        GRE => tunnel(Encapsulation::Gre),
        _ => Transport::Other,
    }
}

/// VLAN tags that are stripped; the kernel strips any number of priority tags (VLAN 0), but no
/// network in use stacks more than a few.
pub const TAGS_MAX: usize = 8;
/// IPv6 extension headers that are walked. RFC 8200 §4.1 recommends at most seven.
pub const EXTENSIONS_MAX: u32 = 8;

/// Packets inside of packets that are looked at, one inside the other.
pub const TUNNELS_MAX: u32 = 2;
/// Bytes in front of a packet inside of another. Every offset must stay below 64 KiB for the
/// kernel's verifier; the two of these, and the longest chain of extension headers, do.
pub const BEHIND_MAX: usize = 0x2fff;

/// Offset in a packet at which a chain of extension headers is given up, in bytes: as many as are
/// walked, of the greatest length, end before it.
const CHAIN_MAX: usize = 0x4fff;

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
const ETHERTYPE_PPPOE_SESSION: u16 = 0x8864;
/// Web Cache Communication Protocol, in GRE only.
const ETHERTYPE_WCCP: u16 = 0x883e;

/// Length of the PPPoE header, in bytes; its length field counts what is behind it.
const PPPOE_HEADER: usize = 6;
const PPP_IPV4: u16 = 0x0021;
const PPP_IPV6: u16 = 0x0057;

/// Length of both ports together, in bytes.
const PORTS: usize = 4;
/// Length of the shortest extension header, in bytes.
const EXTENSION_MIN: usize = 8;
/// Length of the IPv4 header without options, in bytes.
const V4_HEADER: usize = 20;
/// Offset of the protocol in it.
const V4_PROTOCOL: usize = 9;
/// Length of the fixed IPv6 header, in bytes.
const V6_HEADER: usize = 40;
/// Offset of the type of what is behind it.
const V6_NEXT_HEADER: usize = 6;
/// Length of the IPv6 fragment header, in bytes (RFC 8200 §4.5).
const FRAGMENT_HEADER: usize = 8;
/// The 13 bits of the IPv4 fragment offset.
const V4_FRAGMENT_OFFSET: u16 = 0x1fff;
/// The 13 bits of the IPv6 fragment offset.
const V6_FRAGMENT_OFFSET: u16 = 0xfff8;

/// Length of the shortest GRE header, in bytes; checksum, key and sequence number are four each.
const GRE_HEADER: usize = 4;
const GRE_CHECKSUM: u8 = 0x80;
const GRE_ROUTING: u8 = 0x40;
const GRE_KEY: u8 = 0x20;
const GRE_SEQUENCE: u8 = 0x10;
/// In the second byte.
const GRE_VERSION: u8 = 0x07;
/// Length of WCCP's redirect header, in bytes.
const WCCP_REDIRECT: usize = 4;

const HOP_BY_HOP: u8 = 0;
const IPV4_INSIDE: u8 = 4;
const TCP: u8 = 6;
const UDP: u8 = 17;
const IPV6_INSIDE: u8 = 41;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const GRE: u8 = 47;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
