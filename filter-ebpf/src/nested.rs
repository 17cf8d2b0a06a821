//! Packets inside of packets: the bytes of a frame in, the [`Headers`] of the innermost packet out.
//!
//! Behind VLAN tags, a PPPoE session, IPv6 extension headers, IPv4 and IPv6 in either (RFC 2003,
//! RFC 4213, RFC 2473; so behind an SRv6 header, RFC 8754) and GRE (RFC 2784, RFC 2890).
//!
//! One loop, one header each time round. Whatever is known of the frame is a number that the
//! kernel's verifier forgets before the loop begins again: so it walks one round for each header, and
//! not each order that headers can come in. That is also why nothing here is an enum with a payload:
//! the compiler leaves unused payloads unwritten, and old verifiers refuse to see them copied.

use core::ops::ControlFlow;

use crate::packet::{
    self, Address, ETHERTYPE, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_PPPOE_SESSION,
    EXTENSIONS_MAX, Frame, Headers, ParseError, TAG_8021AD, TAG_8021Q, TAG_9100, TAGS_MAX,
    Transport, V4, V6,
};

/// Parses the headers that a frame is judged by: those of the innermost packet that is looked at.
///
/// # Errors
///
/// Returns why there is no IP packet to judge, see [`ParseError`].
#[inline(always)]
pub fn innermost<F: Frame + ?Sized>(frame: &F) -> Result<Headers<'_>, ParseError> {
    let mut cursor = Cursor::new();
    let mut end = End::ChainTooLong;
    for _ in 0..HEADERS_MAX {
        match cursor.step(frame) {
            ControlFlow::Continue(()) => cursor.forget(frame),
            ControlFlow::Break(found) => {
                end = found;
                break;
            }
        }
    }
    cursor.headers(frame, end)
}

/// Where in a frame the next header begins, and what is known of those in front of it.
struct Cursor {
    /// Offset of the next header, in bytes.
    at: usize,
    /// Offset behind the packet that it belongs to: what the frame holds from there on is not its.
    end: usize,
    /// What the next header is: an IP protocol, or [`LINK`] or [`SESSION`].
    next: usize,
    /// Offset of the last IP header.
    packet: usize,
    /// Whether that is of IPv6.
    is_v6: usize,
    /// Whether a routing header with segments left is behind it (RFC 8200 §4.4).
    is_rerouted: usize,
    /// IP headers so far.
    packets: usize,
    /// VLAN tags, or extension headers behind the last IP header.
    run: usize,
    /// The destination port, if the transport was found to have one.
    port: u16,
}

/// What ends the search: [`Transport`] and [`ParseError`] in one, without the port.
#[derive(Clone, Copy)]
enum End {
    ChainCut,
    ChainTooLong,
    LaterFragment,
    Malformed,
    NotIp,
    Other,
    Tcp,
    TooManyTags,
    TooShort,
    Udp,
    UdpTooShort,
}

type Step = ControlFlow<End>;

impl Cursor {
    #[inline(always)]
    fn new() -> Self {
        Self {
            at: ETHERTYPE,
            end: usize::MAX,
            next: LINK,
            packet: 0,
            is_v6: 0,
            is_rerouted: 0,
            packets: 0,
            run: 0,
            port: 0,
        }
    }

    #[inline(always)]
    fn forget<F: Frame + ?Sized>(&mut self, frame: &F) {
        for number in [
            &mut self.at,
            &mut self.end,
            &mut self.next,
            &mut self.packet,
            &mut self.is_v6,
            &mut self.is_rerouted,
            &mut self.packets,
            &mut self.run,
        ] {
            *number = frame.forgotten(*number);
        }
    }

    /// Goes behind the next header.
    #[inline(always)]
    fn step<F: Frame + ?Sized>(&mut self, frame: &F) -> Step {
        if self.at > OFFSET_MAX {
            return Step::Break(End::ChainCut);
        }
        match self.next {
            LINK => self.link(frame),
            SESSION => self.session(frame),
            IPV4 => self.v4(frame),
            IPV6 => self.v6(frame),
            GRE => self.gre(frame),
            TCP | UDP => self.transport(frame),
            HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION => self.extension(frame),
            _ => Step::Break(End::Other),
        }
    }

    /// An EtherType, and the VLAN tag that it may name.
    #[inline(always)]
    fn link<F: Frame + ?Sized>(&mut self, frame: &F) -> Step {
        let Some(ethertype) = frame.bytes(self.at) else {
            return Step::Break(End::Malformed);
        };
        self.at += 2;
        match u16::from_be_bytes(*ethertype) {
            ETHERTYPE_IPV4 => self.next = IPV4,
            ETHERTYPE_IPV6 => self.next = IPV6,
            ETHERTYPE_PPPOE_SESSION => self.next = SESSION,
            TAG_8021Q | TAG_8021AD | TAG_9100 if self.run == TAGS_MAX => {
                return Step::Break(End::TooManyTags);
            }
            TAG_8021Q | TAG_8021AD | TAG_9100 => {
                self.run += 1;
                self.at += TAG_CONTROL;
            }
            _ => return Step::Break(End::NotIp),
        }
        Step::Continue(())
    }

    /// RFC 2516 §4.
    #[inline(always)]
    fn session<F: Frame + ?Sized>(&mut self, frame: &F) -> Step {
        let Some(&[_, _, _, _, l0, l1, p0, p1]) = frame.bytes(self.at) else {
            return Step::Break(End::Malformed);
        };
        let payload = self.at + PPPOE_HEADER;
        self.end = payload + usize::from(u16::from_be_bytes([l0, l1]));
        // A protocol of one byte is odd, the first of two is even (RFC 1661 §2); Linux takes both.
        let (protocol, at) = match p0 & 1 {
            1 => (u16::from(p0), payload + 1),
            _ => (u16::from_be_bytes([p0, p1]), payload + 2),
        };
        self.at = at;
        match protocol {
            PPP_IPV4 => self.next = IPV4,
            PPP_IPV6 => self.next = IPV6,
            _ => return Step::Break(End::NotIp),
        }
        Step::Continue(())
    }

    #[inline(always)]
    fn v4<F: Frame + ?Sized>(&mut self, frame: &F) -> Step {
        if self.packets > TUNNELS_MAX {
            return Step::Break(End::ChainTooLong);
        }
        let Ok(header) = V4::parse(frame, self.at) else {
            return Step::Break(End::Malformed);
        };
        if header.payload > self.end {
            return Step::Break(End::Malformed);
        }
        self.enter(0, header.payload, header.end);
        self.next = usize::from(header.protocol);
        if header.is_later_fragment {
            // The first fragment of a packet that holds another has the headers of both, or is dropped.
            return Step::Break(match self.next {
                TCP => End::LaterFragment,
                _ => End::Other,
            });
        }
        match self.next {
            // Nothing but these: an extension header of IPv6 is none behind IPv4.
            TCP | UDP | IPV4 | IPV6 | GRE => Step::Continue(()),
            _ => Step::Break(End::Other),
        }
    }

    #[inline(always)]
    fn v6<F: Frame + ?Sized>(&mut self, frame: &F) -> Step {
        if self.packets > TUNNELS_MAX {
            return Step::Break(End::ChainTooLong);
        }
        let Ok(header) = V6::parse(frame, self.at) else {
            return Step::Break(End::Malformed);
        };
        if header.payload > self.end {
            return Step::Break(End::Malformed);
        }
        self.enter(1, header.payload, header.end);
        self.next = usize::from(header.next);
        Step::Continue(())
    }

    /// Enters a packet.
    #[inline(always)]
    fn enter(&mut self, is_v6: usize, payload: usize, end: usize) {
        self.packet = self.at;
        self.at = payload;
        self.end = self.end.min(end);
        self.is_v6 = is_v6;
        self.is_rerouted = 0;
        self.packets += 1;
        self.run = 0;
    }

    /// RFC 2784 §2, RFC 2890 §2: what of GRE carries an IP packet without an Ethernet header.
    #[inline(always)]
    fn gre<F: Frame + ?Sized>(&mut self, frame: &F) -> Step {
        if self.packets > TUNNELS_MAX {
            return Step::Break(End::ChainTooLong);
        }
        let Some(&[flags, version, p0, p1]) = frame.bytes(self.at) else {
            return Step::Break(End::Malformed);
        };
        if self.at + GRE_HEADER > self.end {
            return Step::Break(End::Malformed);
        }
        // Linux takes no routing (RFC 1701), and version 1 is another protocol (RFC 2637).
        if flags & GRE_ROUTING != 0 || version & GRE_VERSION != 0 {
            return Step::Break(End::Other);
        }
        // Checksum, key and sequence number: four bytes each.
        let fields =
            usize::from(flags >> 7) + usize::from(flags >> 5 & 1) + usize::from(flags >> 4 & 1);
        self.at += GRE_HEADER + fields * 4;
        match u16::from_be_bytes([p0, p1]) {
            ETHERTYPE_IPV4 => self.next = IPV4,
            ETHERTYPE_IPV6 => self.next = IPV6,
            // Linux takes it for IPv4, behind a redirect header of four bytes unless a packet begins
            // here (net/ipv4/gre_demux.c).
            ETHERTYPE_WCCP => {
                let Some(&[first, ..]) = frame.bytes::<WCCP_REDIRECT>(self.at) else {
                    return Step::Break(End::Malformed);
                };
                if first & 0xf0 != 0x40 {
                    self.at += WCCP_REDIRECT;
                }
                self.next = IPV4;
            }
            _ => return Step::Break(End::Other),
        }
        Step::Continue(())
    }

    /// An extension header of IPv6, within the packet's end.
    ///
    /// The stack cuts off whatever a frame holds behind the packet; read here, it would let a
    /// sender show a harmless header where a later fragment brings the real one.
    ///
    /// Only the five types that the kernel itself walks are walked. Treating another protocol's
    /// bytes as an extension header would let a sender forge the ports.
    #[inline(always)]
    fn extension<F: Frame + ?Sized>(&mut self, frame: &F) -> Step {
        if self.run == EXTENSIONS_MAX {
            return Step::Break(End::ChainTooLong);
        }
        self.run += 1;
        // No extension header is shorter than eight bytes (RFC 8200 §4.2).
        let Some(&[behind, length, b2, b3, ..]) = frame.bytes::<EXTENSION_MIN>(self.at) else {
            return Step::Break(End::ChainCut);
        };
        if self.at + EXTENSION_MIN > self.end {
            return Step::Break(End::ChainCut);
        }
        let behind = usize::from(behind);
        // The header's length stands in it in units of its own.
        let length = match self.next {
            FRAGMENT => {
                if u16::from_be_bytes([b2, b3]) & V6_FRAGMENT_OFFSET != 0 {
                    // Reassembly takes the type from the first fragment alone, so this one
                    // may lie; but the first is judged by its own bytes.
                    return Step::Break(match behind {
                        TCP | HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION => {
                            End::LaterFragment
                        }
                        _ => End::Other,
                    });
                }
                FRAGMENT_HEADER
            }
            AUTHENTICATION => (usize::from(length) + 2) * 4,
            ROUTING => {
                // Byte 3 is the number of segments left.
                self.is_rerouted |= usize::from(b3);
                (usize::from(length) + 1) * 8
            }
            _ => (usize::from(length) + 1) * 8,
        };
        let payload = self.at + length;
        if payload > self.end || frame.bytes::<1>(payload - 1).is_none() {
            return Step::Break(End::ChainCut);
        }
        self.at = payload;
        self.next = behind;
        Step::Continue(())
    }

    #[inline(always)]
    fn transport<F: Frame + ?Sized>(&mut self, frame: &F) -> Step {
        let port = packet::destination_port(frame, self.at, self.end);
        self.port = port.unwrap_or_default();
        Step::Break(match (self.next, port.is_some()) {
            (TCP, true) => End::Tcp,
            (TCP, false) => End::TooShort,
            (_, true) => End::Udp,
            (_, false) => End::UdpTooShort,
        })
    }

    /// The headers of the packet that was entered last.
    #[inline(always)]
    fn headers<'a, F: Frame + ?Sized>(
        &self,
        frame: &'a F,
        end: End,
    ) -> Result<Headers<'a>, ParseError> {
        let transport = match end {
            End::Malformed => return Err(ParseError::Malformed),
            End::NotIp => return Err(ParseError::NotIp),
            End::TooManyTags => return Err(ParseError::TooManyTags),
            End::ChainCut => Transport::ChainCut,
            End::ChainTooLong => Transport::ChainTooLong,
            End::LaterFragment => Transport::LaterFragment,
            End::Other => Transport::Other,
            End::Tcp => Transport::Tcp(self.port),
            End::TooShort => Transport::TooShort,
            End::Udp => Transport::Udp(self.port),
            End::UdpTooShort => Transport::UdpTooShort,
        };
        let at = frame.forgotten(self.packet);
        if at > OFFSET_MAX {
            return Err(ParseError::Malformed);
        }
        if self.is_v6 == 0 {
            let header = V4::parse(frame, at)?;
            Ok(Headers {
                source: Address::V4(header.source),
                destination: header.destination.map(Address::V4),
                transport,
            })
        } else {
            let header = V6::parse(frame, at)?;
            let destination = (self.is_rerouted == 0).then_some(Address::V6(header.destination));
            Ok(Headers {
                source: Address::V6(header.source),
                destination,
                transport,
            })
        }
    }
}

/// Packets inside of packets that are looked at, one inside the other.
pub const TUNNELS_MAX: usize = 2;

/// Headers in the deepest nest that keeps every other bound: tags with the EtherType behind them, a
/// session, and for each packet its IP header, its extension headers and one that ends it.
const HEADERS_MAX: usize = (TAGS_MAX + 1) + 1 + (TUNNELS_MAX + 1) * (EXTENSIONS_MAX + 2);
/// The greatest offset of a header, in bytes: a frame's first buffer is a page at most, and the
/// kernel's verifier wants less than 64 KiB.
const OFFSET_MAX: usize = 0x7fff;

/// In the place of a protocol: an EtherType is next.
const LINK: usize = 0x100;
/// In the place of a protocol: the header of a PPPoE session is next.
const SESSION: usize = 0x101;
const HOP_BY_HOP: usize = packet::HOP_BY_HOP as usize;
const IPV4: usize = packet::IPV4_INSIDE as usize;
const TCP: usize = packet::TCP as usize;
const UDP: usize = packet::UDP as usize;
const IPV6: usize = packet::IPV6_INSIDE as usize;
const ROUTING: usize = packet::ROUTING as usize;
const FRAGMENT: usize = packet::FRAGMENT as usize;
const GRE: usize = packet::GRE as usize;
const AUTHENTICATION: usize = packet::AUTHENTICATION as usize;
const DESTINATION: usize = packet::DESTINATION as usize;

/// Length of a VLAN tag behind its own EtherType, in bytes.
const TAG_CONTROL: usize = 2;
/// Length of the PPPoE header, in bytes; its length field counts what is behind it.
const PPPOE_HEADER: usize = 6;
const PPP_IPV4: u16 = 0x0021;
const PPP_IPV6: u16 = 0x0057;

/// Length of the shortest GRE header, in bytes.
const GRE_HEADER: usize = 4;
const GRE_ROUTING: u8 = 0x40;
/// In the second byte.
const GRE_VERSION: u8 = 0x07;
/// Web Cache Communication Protocol.
const ETHERTYPE_WCCP: u16 = 0x883e;
/// Length of WCCP's redirect header, in bytes.
const WCCP_REDIRECT: usize = 4;

/// Length of the shortest extension header, in bytes.
const EXTENSION_MIN: usize = 8;
/// Length of the IPv6 fragment header, in bytes (RFC 8200 §4.5).
const FRAGMENT_HEADER: usize = 8;
/// The 13 bits of the IPv6 fragment offset.
const V6_FRAGMENT_OFFSET: u16 = 0xfff8;
