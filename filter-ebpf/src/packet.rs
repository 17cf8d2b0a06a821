//! Parsing: the bytes of a frame in, [`Headers`] out. No policy, no maps.
//!
//! A frame whose IP header is followed by its transport is read by [`plain`], as fast as can be;
//! every other one by [`nested::innermost`](crate::nested::innermost), which reads the plain ones
//! alike.
//!
//! All bounds are named below. What the kernel's own stack was seen to answer on 6.18 decides
//! how far this goes: it strips any number of VLAN tags, walks any number of extension headers,
//! reassembles fragments and, where there is a device for it, unpacks packets that are inside of
//! others; so a parser that gives up says so instead of guessing.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Random access to the bytes of one Ethernet frame.
pub trait Frame {
    /// The `N` bytes from `at` on, counted from the start of the frame; `None` if any of them
    /// lies past the end.
    ///
    /// Whole headers are asked for at once: one bounds check each, and the compiler makes wide
    /// loads of `from_be_bytes` on parts of an array.
    fn bytes<const N: usize>(&self, at: usize) -> Option<&[u8; N]>;

    /// The same number, of which the kernel's verifier knows nothing any more.
    ///
    /// It walks every path of a loop; where several meet that differ in nothing, it goes on with
    /// one of them.
    #[must_use]
    #[inline(always)]
    fn forgotten(&self, number: usize) -> usize {
        number
    }
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

/// An IP packet whose fixed header is followed by its transport, with the ports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Plain<'a> {
    /// What a decision depends on.
    pub headers: Headers<'a>,
    /// Of TCP the flags (RFC 9293 §3.1), of any other transport the byte in their place.
    pub flags: u8,
}

/// An address where it stands in the frame: loaded only if it is needed.
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
    /// The packet, or its first fragment, ends inside an extension header: whatever is behind that.
    ChainCut,
    /// More than [`EXTENSIONS_MAX`] extension headers, or more than
    /// [`TUNNELS_MAX`](crate::nested::TUNNELS_MAX) packets inside of each other: whatever is behind those.
    ChainTooLong,
    /// TCP that ends before its ports.
    TooShort,
}

/// Why a frame has no [`Headers`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ParseError {
    /// Neither IPv4 nor IPv6, nor a PPPoE session that holds one of them.
    NotIp,
    /// More than [`TAGS_MAX`] VLAN tags.
    TooManyTags,
    /// Ends inside an Ethernet or fixed IP header, or the header contradicts itself.
    Malformed,
}

/// Parses a frame whose fixed IP header is followed by its transport, with the ports, and as much as TCP has up to its
/// flags; `None` for any other.
///
/// # Errors
///
/// Returns why there is no IP packet to judge, see [`ParseError`].
#[inline(always)]
pub fn plain<F: Frame + ?Sized>(frame: &F) -> Option<Result<Plain<'_>, ParseError>> {
    for at in (ETHERTYPE..).step_by(TAG).take(1 + TAGS_MAX) {
        let Some(ethertype) = frame.bytes(at) else {
            return Some(Err(ParseError::Malformed));
        };
        match u16::from_be_bytes(*ethertype) {
            ETHERTYPE_IPV4 => return plain_v4(frame, at + 2),
            ETHERTYPE_IPV6 => return plain_v6(frame, at + 2),
            TAG_8021Q | TAG_8021AD | TAG_9100 => {}
            ETHERTYPE_PPPOE_SESSION => return None,
            _ => return Some(Err(ParseError::NotIp)),
        }
    }
    Some(Err(ParseError::TooManyTags))
}

/// One bounds check for header, ports and flags; what is rare is left to the thorough reading: options, later fragments, what is
/// too short to have ports.
#[inline(always)]
fn plain_v4<F: Frame + ?Sized>(frame: &F, at: usize) -> Option<Result<Plain<'_>, ParseError>> {
    let header: &[u8; V4_HEADER + FLAGS + 1] = frame.bytes(at)?;
    let &[version_ihl, _, l0, l1, _, _, f0, f1, _, protocol, ..] = header;
    let length = u16::from_be_bytes([l0, l1]);
    let is_later_fragment = u16::from_be_bytes([f0, f1]) & V4_FRAGMENT_OFFSET != 0;
    let has_ports = usize::from(length) >= V4_HEADER + PORTS && !is_later_fragment;
    if version_ihl != V4_WITHOUT_OPTIONS || !has_ports || is_tunnel(protocol) {
        return None;
    }
    let headers = Headers {
        source: Address::V4(part(header, 12)),
        destination: Some(Address::V4(part(header, 16))),
        transport: plain_transport(protocol, part(header, V4_HEADER)),
    };
    let &[flags] = part(header, V4_HEADER + FLAGS);
    Some(Ok(Plain { headers, flags }))
}

/// As [`plain_v4`].
#[inline(always)]
fn plain_v6<F: Frame + ?Sized>(frame: &F, at: usize) -> Option<Result<Plain<'_>, ParseError>> {
    let header: &[u8; V6_HEADER + FLAGS + 1] = frame.bytes(at)?;
    let &[version_class, _, _, _, l0, l1, next, ..] = header;
    let length = u16::from_be_bytes([l0, l1]);
    let has_ports = version_class >> 4 == 6 && usize::from(length) >= PORTS;
    if !has_ports || is_tunnel(next) || is_extension(next) {
        return None;
    }
    let headers = Headers {
        source: Address::V6(part(header, 8)),
        destination: Some(Address::V6(part(header, 24))),
        transport: plain_transport(next, part(header, V6_HEADER)),
    };
    let &[flags] = part(header, V6_HEADER + FLAGS);
    Some(Ok(Plain { headers, flags }))
}

/// The transport whose header begins with these bytes.
#[inline(always)]
fn plain_transport(protocol: u8, &[_, _, high, low]: &[u8; PORTS]) -> Transport {
    let port = u16::from_be_bytes([high, low]);
    match protocol {
        TCP => Transport::Tcp(port),
        UDP => Transport::Udp(port),
        _ => Transport::Other,
    }
}

/// An IPv4 header (RFC 791 §3.1). Offsets are those of the frame, in bytes.
pub(crate) struct V4<'a> {
    pub(crate) source: &'a [u8; 4],
    /// `None` where there are options: a source route (types 131 and 137) changes the destination.
    pub(crate) destination: Option<&'a [u8; 4]>,
    pub(crate) is_later_fragment: bool,
    pub(crate) protocol: u8,
    /// Where the payload begins.
    pub(crate) payload: usize,
    /// Where the packet ends, by its own length.
    pub(crate) end: usize,
}

impl<'a> V4<'a> {
    /// Parses the header at `at`.
    #[inline(always)]
    pub(crate) fn parse<F: Frame + ?Sized>(frame: &'a F, at: usize) -> Result<Self, ParseError> {
        let header: &[u8; V4_HEADER] = frame.bytes(at).ok_or(ParseError::Malformed)?;
        let (source, destination) = (part(header, 12), part(header, 16));
        let &[version_ihl, _, l0, l1, _, _, f0, f1, _, protocol, ..] = header;

        // The version nibble and an IHL of at least five 32-bit words, 0x45 to 0x4f.
        if !(0x45..=0x4f).contains(&version_ihl) {
            return Err(ParseError::Malformed);
        }
        let payload = at + usize::from(version_ihl & 0x0f) * 4;
        let has_options = version_ihl != V4_WITHOUT_OPTIONS;
        if has_options && frame.bytes::<1>(payload - 1).is_none() {
            return Err(ParseError::Malformed);
        }
        Ok(Self {
            source,
            destination: (!has_options).then_some(destination),
            is_later_fragment: u16::from_be_bytes([f0, f1]) & V4_FRAGMENT_OFFSET != 0,
            protocol,
            payload,
            end: at + usize::from(u16::from_be_bytes([l0, l1])),
        })
    }
}

/// A fixed IPv6 header (RFC 8200 §3). Offsets are those of the frame, in bytes.
pub(crate) struct V6<'a> {
    pub(crate) source: &'a [u8; 16],
    pub(crate) destination: &'a [u8; 16],
    /// The type of what is behind it.
    pub(crate) next: u8,
    /// Where the payload begins.
    pub(crate) payload: usize,
    /// Where the packet ends, by its own length.
    pub(crate) end: usize,
}

impl<'a> V6<'a> {
    /// Parses the header at `at`.
    #[inline(always)]
    pub(crate) fn parse<F: Frame + ?Sized>(frame: &'a F, at: usize) -> Result<Self, ParseError> {
        let header: &[u8; V6_HEADER] = frame.bytes(at).ok_or(ParseError::Malformed)?;
        let (source, destination) = (part(header, 8), part(header, 24));
        let &[version_class, _, _, _, l0, l1, next, ..] = header;
        if version_class >> 4 != 6 {
            return Err(ParseError::Malformed);
        }
        let payload = at + V6_HEADER;
        Ok(Self {
            source,
            destination,
            next,
            payload,
            end: payload + usize::from(u16::from_be_bytes([l0, l1])),
        })
    }
}

/// `N` bytes of a header, from `at` on; both are constants, so nothing is left to check.
#[inline(always)]
fn part<const N: usize, const M: usize>(header: &[u8; M], at: usize) -> &[u8; N] {
    let part = header.get(at..).and_then(|rest| rest.first_chunk());
    part.unwrap_or(&[0; N])
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

/// The destination port of a header of TCP (RFC 9293 §3.1) or UDP (RFC 768): both begin with the source
/// port, then the destination port.
#[inline(always)]
pub(crate) fn destination_port<F: Frame + ?Sized>(frame: &F, at: usize, end: usize) -> Option<u16> {
    let &[_, _, high, low] = frame.bytes::<PORTS>(at)?;
    (at + PORTS <= end).then_some(u16::from_be_bytes([high, low]))
}

/// VLAN tags that are stripped; the kernel strips any number of priority tags (VLAN 0), but no
/// network in use stacks more than a few.
pub const TAGS_MAX: usize = 8;
/// IPv6 extension headers that are walked. RFC 8200 §4.1 recommends at most seven.
pub const EXTENSIONS_MAX: usize = 8;

/// Offset of the EtherType in an untagged Ethernet II frame, in bytes.
pub(crate) const ETHERTYPE: usize = 12;
/// Length of a VLAN tag, in bytes (IEEE 802.1Q).
pub(crate) const TAG: usize = 4;
pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;
pub(crate) const ETHERTYPE_PPPOE_SESSION: u16 = 0x8864;
pub(crate) const TAG_8021Q: u16 = 0x8100;
pub(crate) const TAG_8021AD: u16 = 0x88a8;
/// Double tagging before 802.1ad; still found on old switches.
pub(crate) const TAG_9100: u16 = 0x9100;

/// Length of both ports together, in bytes.
const PORTS: usize = 4;
/// Where the flags stand in a TCP header.
pub(crate) const FLAGS: usize = 13;
/// Length of the IPv4 header without options, in bytes.
const V4_HEADER: usize = 20;
/// Version 4, and a header of five 32-bit words.
const V4_WITHOUT_OPTIONS: u8 = 0x45;
/// Length of the fixed IPv6 header, in bytes.
const V6_HEADER: usize = 40;
/// The 13 bits of the IPv4 fragment offset.
const V4_FRAGMENT_OFFSET: u16 = 0x1fff;

pub(crate) const HOP_BY_HOP: u8 = 0;
pub(crate) const IPV4_INSIDE: u8 = 4;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const IPV6_INSIDE: u8 = 41;
pub(crate) const ROUTING: u8 = 43;
pub(crate) const FRAGMENT: u8 = 44;
pub(crate) const GRE: u8 = 47;
pub(crate) const AUTHENTICATION: u8 = 51;
pub(crate) const DESTINATION: u8 = 60;
