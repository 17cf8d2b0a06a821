//! The answer to a SYN, in its place: a client's frame and a cookie of the kernel's in, the SYN-ACK out (RFC 4987 §3.6).
//!
//! No policy, no maps: who may be answered is the verdict's, whether to answer is the kernel's. The answer offers the client no option but the maximum segment size (RFC 9293 §3.7.1): a cookie has no room for more.

use crate::packet::{
    ETHERTYPE, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Frame, TAG, TAG_8021AD, TAG_8021Q, TCP,
};

/// Where the headers of a TCP segment are in its frame. Offsets are those of the frame, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Segment {
    /// Behind an IPv4 header without options.
    V4 {
        /// Where the IP header begins.
        ip: usize,
    },
    /// Directly behind a fixed IPv6 header.
    V6 {
        /// Where the IP header begins.
        ip: usize,
    },
}

impl Segment {
    /// The segment of a frame, if it is one that is looked at here: whole, in a plain packet behind [`TAGS_MAX`] VLAN
    /// tags at most. Any other is the kernel's alone.
    #[inline(always)]
    pub fn find<F: Frame + ?Sized>(frame: &F) -> Option<Self> {
        for at in (ETHERTYPE..).step_by(TAG).take(1 + TAGS_MAX) {
            match u16::from_be_bytes(*frame.bytes(at)?) {
                ETHERTYPE_IPV4 => return Self::v4(frame, at + 2),
                ETHERTYPE_IPV6 => return Self::v6(frame, at + 2),
                TAG_8021Q | TAG_8021AD => {}
                _ => return None,
            }
        }
        None
    }

    #[inline(always)]
    fn v4<F: Frame + ?Sized>(frame: &F, ip: usize) -> Option<Self> {
        let &[version_ihl, _, _, _, _, _, f0, f1, _, protocol] = frame.bytes(ip)?;
        let is_whole = u16::from_be_bytes([f0, f1]) & V4_MORE_OR_OFFSET == 0;
        let is_it = version_ihl == V4_WITHOUT_OPTIONS && protocol == TCP && is_whole;
        is_it.then_some(Self::V4 { ip })
    }

    #[inline(always)]
    fn v6<F: Frame + ?Sized>(frame: &F, ip: usize) -> Option<Self> {
        let &[version, _, _, _, _, _, next] = frame.bytes(ip)?;
        (version >> 4 == 6 && next == TCP).then_some(Self::V6 { ip })
    }

    /// Where the TCP header begins.
    #[must_use]
    #[inline(always)]
    pub fn tcp(self) -> usize {
        match self {
            Self::V4 { ip } => ip + V4_HEADER,
            Self::V6 { ip } => ip + V6_HEADER,
        }
    }

    /// The port that it is for.
    #[inline(always)]
    pub fn port<F: Frame + ?Sized>(self, frame: &F) -> Option<u16> {
        frame.bytes(self.tcp() + 2).copied().map(u16::from_be_bytes)
    }

    /// A number for its connection: of addresses and ports. Others may have the same.
    #[inline(always)]
    pub fn flow<F: Frame + ?Sized>(self, frame: &F) -> Option<u64> {
        let double = |at| frame.bytes(at).copied().map(u64::from_ne_bytes);
        let addresses = match self {
            Self::V4 { ip } => double(ip + 12)?,
            Self::V6 { ip } => {
                let source = double(ip + 8)?.rotate_left(17) ^ double(ip + 16)?;
                source ^ double(ip + 24)?.rotate_left(29) ^ double(ip + 32)?.rotate_left(43)
            }
        };
        let ports = u32::from_ne_bytes(*frame.bytes(self.tcp())?);
        Some((addresses ^ u64::from(ports).rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// The length of the TCP header and what follows it, as the packet says it.
    #[inline(always)]
    fn length<F: Frame + ?Sized>(self, frame: &F) -> Option<usize> {
        let length = |at| frame.bytes(at).copied().map(u16::from_be_bytes);
        match self {
            Self::V4 { ip } => usize::from(length(ip + 2)?).checked_sub(V4_HEADER),
            Self::V6 { ip } => length(ip + 4).map(usize::from),
        }
    }

    /// Its SYN, if it is one that is answered here: with the maximum segment size as its first option, or no option at
    /// all.
    #[inline(always)]
    pub fn syn<F: Frame + ?Sized>(self, frame: &F) -> Option<Syn> {
        let tcp = self.tcp();
        let &[offset, flags] = frame.bytes(tcp + DATA_OFFSET)?;
        let words = offset >> 4;
        if !is_syn(flags) || words < WORDS_WITHOUT_OPTIONS {
            return None;
        }
        if words == WORDS_WITHOUT_OPTIONS {
            frame.bytes::<TCP_HEADER>(tcp)?;
        } else {
            let &[kind, length, _, _] = frame.bytes(tcp + TCP_HEADER)?;
            if [kind, length] != [MSS, MSS_LENGTH] {
                return None;
            }
        }
        let is_there = (usize::from(words) * 4..=LENGTH_MAX).contains(&self.length(frame)?);
        is_there.then_some(Syn(self))
    }
}

/// Whether a TCP header with these flags asks for a connection, as every client's first does, and for nothing else.
#[must_use]
#[inline(always)]
pub fn is_syn(flags: u8) -> bool {
    flags & (FIN | SYN | RST | ACK) == SYN
}

/// A SYN that can be answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Syn(pub Segment);

impl Syn {
    /// Its TCP header with the maximum segment size as its only option, which is all that a cookie depends on: 536 where
    /// the client says none (RFC 9293 §3.7.1). Words of four bytes, as they stand in the frame.
    #[inline(always)]
    pub fn header<F: Frame + ?Sized>(self, frame: &F) -> Option<[u32; ANSWER_HEADER / 4]> {
        let tcp = self.0.tcp();
        let fixed: &[u8; TCP_HEADER] = frame.bytes(tcp)?;
        let &[.., offset, flags, w0, w1, _, _, _, _] = fixed;
        let word = |at: usize| {
            let word = fixed.get(at..).and_then(|rest| rest.first_chunk());
            word.copied().map(u32::from_ne_bytes)
        };
        let [m0, m1] = if offset >> 4 == WORDS_WITHOUT_OPTIONS {
            MSS_DEFAULT.to_be_bytes()
        } else {
            *frame.bytes(tcp + TCP_HEADER + 2)?
        };
        Some([
            word(0)?,
            word(4)?,
            word(8)?,
            u32::from_ne_bytes([OFFSET, flags, w0, w1]),
            word(16)?,
            u32::from_ne_bytes([MSS, MSS_LENGTH, m0, m1]),
        ])
    }

    /// The length of the frame that answers it.
    #[must_use]
    #[inline(always)]
    pub fn answer_length(self) -> usize {
        self.0.tcp() + ANSWER_HEADER
    }
}

/// What an answer says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Answer {
    /// The cookie: the sequence number.
    pub cookie: u32,
    /// The maximum segment size that is offered to the client, in bytes.
    pub mss: u16,
}

/// Turns the addresses of an Ethernet header around; VLAN tags stay behind them.
#[inline(always)]
pub fn turn_ethernet(addresses: &mut [u8; 12]) {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = *addresses;
    *addresses = [g, h, i, j, k, l, a, b, c, d, e, f];
}

/// Makes the answer of a SYN's IPv4 packet, of which its first [`V4_ANSWER`] bytes are given: those behind a shorter one
/// do not matter.
#[inline(always)]
pub fn answer_v4(packet: &mut [u8; V4_ANSWER], answer: Answer) {
    let (ip, tcp) = packet.split_at_mut(V4_HEADER);
    let (Some(ip), Some(tcp)) = (ip.first_chunk_mut(), tcp.first_chunk_mut()) else {
        return;
    };
    let ip: &mut [u8; V4_HEADER] = ip;
    let &mut [.., s0, s1, s2, s3, d0, d1, d2, d3] = ip;
    let [l0, l1] = (V4_LENGTH + HEADER_LENGTH).to_be_bytes();
    let [f0, f1] = V4_DO_NOT_FRAGMENT.to_be_bytes();
    *ip = [
        V4_WITHOUT_OPTIONS,
        0,
        l0,
        l1,
        0,
        0,
        f0,
        f1,
        TTL,
        TCP,
        0,
        0,
        d0,
        d1,
        d2,
        d3,
        s0,
        s1,
        s2,
        s3,
    ];
    let [c0, c1] = folded(sum(ip)).to_be_bytes();
    ip[10] = c0;
    ip[11] = c1;
    // The pseudo-header (RFC 9293 §3.1): addresses, protocol and length.
    let addresses: u32 = sum(&[d0, d1, d2, d3, s0, s1, s2, s3]);
    answer_tcp(tcp, answer, addresses);
}

/// As [`answer_v4`], of an IPv6 packet.
#[inline(always)]
pub fn answer_v6(packet: &mut [u8; V6_ANSWER], answer: Answer) {
    let (ip, tcp) = packet.split_at_mut(V6_HEADER);
    let (Some(ip), Some(tcp)) = (ip.first_chunk_mut(), tcp.first_chunk_mut()) else {
        return;
    };
    let ip: &mut [u8; V6_HEADER] = ip;
    let [l0, l1] = HEADER_LENGTH.to_be_bytes();
    // No class, and no flow label: it is the sender's own.
    let first = [0x60, 0, 0, 0, l0, l1, TCP, TTL];
    let mut source = [0; 16];
    let mut destination = [0; 16];
    source.copy_from_slice(&ip[8..24]);
    destination.copy_from_slice(&ip[24..]);
    ip[..8].copy_from_slice(&first);
    ip[8..24].copy_from_slice(&destination);
    ip[24..].copy_from_slice(&source);
    answer_tcp(tcp, answer, sum(&source) + sum(&destination));
}

/// A TCP header of [`ANSWER_HEADER`] bytes, of which the first [`TCP_HEADER`] are the SYN's.
#[inline(always)]
fn answer_tcp(tcp: &mut [u8; ANSWER_HEADER], answer: Answer, addresses: u32) {
    let &mut [s0, s1, d0, d1, q0, q1, q2, q3, ..] = tcp;
    let [k0, k1, k2, k3] = answer.cookie.to_be_bytes();
    let acknowledged = u32::from_be_bytes([q0, q1, q2, q3]).wrapping_add(1);
    let [a0, a1, a2, a3] = acknowledged.to_be_bytes();
    let [w0, w1] = WINDOW.to_be_bytes();
    let [m0, m1] = answer.mss.to_be_bytes();
    *tcp = [
        d0,
        d1,
        s0,
        s1,
        k0,
        k1,
        k2,
        k3,
        a0,
        a1,
        a2,
        a3,
        OFFSET,
        SYN | ACK,
        w0,
        w1,
        0,
        0,
        0,
        0,
        MSS,
        MSS_LENGTH,
        m0,
        m1,
    ];
    let pseudo = addresses + u32::from(TCP) + u32::from(HEADER_LENGTH);
    let [c0, c1] = folded(sum(tcp) + pseudo).to_be_bytes();
    tcp[16] = c0;
    tcp[17] = c1;
}

/// The sum of 16-bit words (RFC 1071), for at most some hundred of them.
#[inline(always)]
fn sum<const N: usize>(bytes: &[u8; N]) -> u32 {
    let (words, _) = bytes.as_chunks();
    words
        .iter()
        .map(|word| u32::from(u16::from_be_bytes(*word)))
        .sum()
}

#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "nothing is left above the low half"
)]
fn folded(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    !(once + (once >> 16)) as u16
}

/// VLAN tags behind which a SYN is answered.
pub const TAGS_MAX: usize = 2;
/// The most bytes of a packet that is answered, as it says itself: of an Ethernet frame that fits into one buffer.
const LENGTH_MAX: usize = 1500;
/// Bytes of an answer's IPv4 packet.
pub const V4_ANSWER: usize = V4_HEADER + ANSWER_HEADER;
/// Bytes of an answer's IPv6 packet.
pub const V6_ANSWER: usize = V6_HEADER + ANSWER_HEADER;

/// As the packet says it.
const V4_LENGTH: u16 = 20;
/// Bytes of an IPv4 header without options.
pub const V4_HEADER: usize = V4_LENGTH as usize;
/// Bytes of the fixed IPv6 header.
pub const V6_HEADER: usize = 40;
/// Version 4, and five words of header.
const V4_WITHOUT_OPTIONS: u8 = 0x45;
/// The bit for more fragments, and the 13 bits of the offset.
const V4_MORE_OR_OFFSET: u16 = 0x3fff;
const V4_DO_NOT_FRAGMENT: u16 = 0x4000;
const TTL: u8 = 64;

/// Bytes of a TCP header without options.
pub const TCP_HEADER: usize = 20;
/// Length of the answer's: with the maximum segment size.
pub const ANSWER_HEADER: usize = HEADER_LENGTH as usize;
/// As packets say it.
const HEADER_LENGTH: u16 = 24;
/// The data offset of a header without options, in words of four bytes.
const WORDS_WITHOUT_OPTIONS: u8 = 5;
/// What a client takes that does not say it.
const MSS_DEFAULT: u16 = 536;
/// Where the data offset stands in a TCP header, and the flags behind it.
const DATA_OFFSET: usize = 12;
/// Six words of header.
const OFFSET: u8 = 6 << 4;
const FIN: u8 = 1;
const SYN: u8 = 1 << 1;
const RST: u8 = 1 << 2;
const ACK: u8 = 1 << 4;
/// Kind and length of the option (RFC 9293 §3.2).
const MSS: u8 = 2;
const MSS_LENGTH: u8 = 4;
/// What the client may send before the kernel's own acknowledgement says more: twenty segments of 1,460 bytes.
const WINDOW: u16 = 29_200;

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use etherparse::{
        NetHeaders, PacketBuilder, PacketHeaders, TcpOptionElement, TransportHeader, VlanId,
    };

    use super::*;
    use crate::packet::FLAGS;

    const CLIENT: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const ORIGIN: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const V4: ([u8; 4], [u8; 4]) = ([173, 245, 48, 5], [203, 0, 113, 10]);

    fn v6() -> ([u8; 16], [u8; 16]) {
        let address = |last| {
            let mut address = [0; 16];
            (address[0], address[1], address[15]) = (0x24, 0, last);
            address
        };
        (address(5), address(10))
    }

    fn options() -> [TcpOptionElement; 4] {
        [
            TcpOptionElement::MaximumSegmentSize(1400),
            TcpOptionElement::SelectiveAcknowledgementPermitted,
            TcpOptionElement::Timestamp(1, 0),
            TcpOptionElement::WindowScale(7),
        ]
    }

    /// SYNs of both families, untagged and tagged, with and without options and data.
    fn syns() -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        for kind in 0..16 {
            let has = |bit: u32| kind & 1 << bit != 0;
            let ethernet = PacketBuilder::ethernet2(CLIENT, ORIGIN);
            let [outer, inner] = [7, 8].map(|id| VlanId::try_new(id).unwrap());
            let (source, destination) = v6();
            let packet = match (has(0), has(1)) {
                (false, false) => ethernet.ipv4(V4.0, V4.1, 61),
                (false, true) => ethernet.ipv6(source, destination, 61),
                (true, false) => ethernet.double_vlan(outer, inner).ipv4(V4.0, V4.1, 61),
                (true, true) => ethernet
                    .double_vlan(outer, inner)
                    .ipv6(source, destination, 61),
            };
            let mut syn = packet.tcp(40_000, 443, 0xffff_ffff, 64_240).syn();
            if has(2) {
                syn = syn.options(&options()).unwrap();
            }
            let data: &[u8] = if has(3) { b"early data" } else { b"" };
            let mut frame = Vec::new();
            syn.write(&mut frame, data).unwrap();
            frames.push(frame);
        }
        frames
    }

    fn syn(frame: &[u8]) -> Option<Syn> {
        Segment::find(frame)?.syn(frame)
    }

    /// What the program does with a frame.
    fn answered(frame: &[u8], answer: Answer) -> Option<Vec<u8>> {
        let syn = syn(frame)?;
        let mut frame = frame.to_vec();
        // As bpf_xdp_adjust_tail(): what is new is whatever was there before.
        frame.resize(syn.answer_length(), 0xaa);
        turn_ethernet(frame.first_chunk_mut().unwrap());
        match syn.0 {
            Segment::V4 { ip } => answer_v4(frame[ip..].first_chunk_mut().unwrap(), answer),
            Segment::V6 { ip } => answer_v6(frame[ip..].first_chunk_mut().unwrap(), answer),
        }
        Some(frame)
    }

    #[test]
    fn the_answer_to_a_syn_is_one_that_another_parser_reads() {
        let says = Answer {
            cookie: 0xdead_beef,
            mss: 1460,
        };
        for frame in syns() {
            let answer = answered(&frame, says).unwrap();

            assert_eq!(answer[..6], CLIENT);
            assert_eq!(answer[6..12], ORIGIN);
            let asked = PacketHeaders::from_ethernet_slice(&frame).unwrap();
            let read = PacketHeaders::from_ethernet_slice(&answer).unwrap();
            assert_eq!(read.vlan(), asked.vlan());
            let Some(TransportHeader::Tcp(tcp)) = read.transport else {
                panic!("no TCP in {answer:x?}");
            };
            match read.net.unwrap() {
                NetHeaders::Ipv4(ip, _) => {
                    assert_eq!((ip.source, ip.destination), (V4.1, V4.0));
                    assert_eq!(ip.header_checksum, ip.calc_header_checksum());
                    assert!(ip.dont_fragment);
                    assert_eq!(usize::from(ip.total_len), V4_ANSWER);
                    assert_eq!(tcp.checksum, tcp.calc_checksum_ipv4(&ip, &[]).unwrap());
                }
                NetHeaders::Ipv6(ip, _) => {
                    let (source, destination) = v6();
                    assert_eq!((ip.source, ip.destination), (destination, source));
                    assert_eq!(usize::from(ip.payload_length), ANSWER_HEADER);
                    assert_eq!(tcp.checksum, tcp.calc_checksum_ipv6(&ip, &[]).unwrap());
                }
                NetHeaders::Arp(_) => panic!("no IP in {answer:x?}"),
            }
            assert!(tcp.syn && tcp.ack && !tcp.fin && !tcp.rst && !tcp.psh && !tcp.urg);
            assert_eq!((tcp.source_port, tcp.destination_port), (443, 40_000));
            assert_eq!(tcp.sequence_number, says.cookie);
            // The number of the SYN, and one: it wraps around.
            assert_eq!(tcp.acknowledgment_number, 0);
            let options: Vec<_> = tcp.options_iterator().map(Result::unwrap).collect();
            assert_eq!(options, [TcpOptionElement::MaximumSegmentSize(1460)]);
            assert_eq!(answer.len(), syn(&frame).unwrap().answer_length());
        }
    }

    #[test]
    fn what_is_no_syn_or_not_whole_is_left_to_the_kernel() {
        for frame in syns() {
            let segment = Segment::find(&frame[..]).unwrap();
            let tcp = segment.tcp();
            let has_options = frame[tcp + 12] >> 4 > 5;
            let changed = |change: &dyn Fn(&mut Vec<u8>)| {
                let mut frame = frame.clone();
                change(&mut frame);
                syn(&frame)
            };
            for flags in [0, FIN | SYN, SYN | RST, SYN | ACK, ACK, RST] {
                assert_eq!(changed(&|frame| frame[tcp + 13] = flags), None, "{flags}");
            }
            // ECN is no other kind of SYN (RFC 3168 §6.1.1).
            assert!(changed(&|frame| frame[tcp + 13] = SYN | 0xc0).is_some());
            assert_eq!(changed(&|frame| frame[tcp + 12] = 4 << 4), None);
            if has_options {
                // The first option is another one, or no longer than its kind.
                assert_eq!(changed(&|frame| frame[tcp + 20] = 1), None);
                assert_eq!(changed(&|frame| frame[tcp + 21] = 3), None);
            } else {
                assert_eq!(changed(&|frame| frame[tcp + 12] = 6 << 4), None);
            }
            let least = if has_options { 24 } else { 20 };
            for length in 0..tcp + least {
                assert_eq!(changed(&|frame| frame.truncate(length)), None, "{length}");
            }
            if let Segment::V4 { ip } = segment {
                assert_eq!(changed(&|frame| frame[ip] = 0x46), None);
                assert_eq!(changed(&|frame| frame[ip + 6] |= 0x20), None);
                assert_eq!(changed(&|frame| frame[ip + 7] = 1), None);
                assert_eq!(changed(&|frame| frame[ip + 9] = 17), None);
                assert_eq!(changed(&|frame| frame[ip + 3] = 20 + 19), None);
            }
            if let Segment::V6 { ip } = segment {
                assert_eq!(changed(&|frame| frame[ip + 6] = 0), None);
                assert_eq!(
                    changed(&|frame| (frame[ip + 4], frame[ip + 5]) = (0, 19)),
                    None
                );
            }
        }
    }

    #[test]
    fn a_segment_that_goes_on_is_found_and_is_no_syn() {
        for frame in syns() {
            let segment = Segment::find(&frame[..]).unwrap();
            assert!(is_syn(frame[segment.tcp() + FLAGS]));
            for flags in [0, ACK, ACK | FIN, RST, RST | ACK, SYN | ACK, SYN | FIN] {
                let mut frame = frame.clone();
                frame[segment.tcp() + FLAGS] = flags;
                assert_eq!(Segment::find(&frame[..]), Some(segment));
                assert_eq!(segment.syn(&frame[..]), None, "{flags:x}");
            }
        }
    }

    #[test]
    fn a_cookie_depends_on_the_segment_size_alone() {
        for frame in syns() {
            let syn = syn(&frame).unwrap();
            let header = syn.header(&frame[..]).unwrap();
            let header = header.map(u32::to_ne_bytes).concat();

            let (tcp, rest) = etherparse::TcpHeader::from_slice(&header).unwrap();
            assert_eq!(rest, []);
            let asked = PacketHeaders::from_ethernet_slice(&frame).unwrap();
            let Some(TransportHeader::Tcp(asked)) = asked.transport else {
                panic!("no TCP in {frame:x?}");
            };
            let options: Vec<_> = tcp.options_iterator().map(Result::unwrap).collect();
            let mss = if asked.options.is_empty() { 536 } else { 1400 };
            assert_eq!(options, [TcpOptionElement::MaximumSegmentSize(mss)]);
            assert_eq!(
                (tcp.sequence_number, tcp.source_port, tcp.destination_port),
                (
                    asked.sequence_number,
                    asked.source_port,
                    asked.destination_port
                )
            );
            assert!(tcp.syn && !tcp.ack);
        }
    }

    #[test]
    fn checksums_hold_whatever_the_numbers() {
        let frames = syns();
        for round in 0..10_000_u32 {
            let number = round.wrapping_mul(0x9e37_79b9);
            let frame = &frames[round as usize % frames.len()];
            let [_, _, high, low] = number.to_be_bytes();
            let answer = Answer {
                cookie: number,
                mss: u16::from_be_bytes([high, low]),
            };
            let answer = answered(frame, answer).unwrap();

            let read = PacketHeaders::from_ethernet_slice(&answer).unwrap();
            let Some(TransportHeader::Tcp(tcp)) = read.transport else {
                panic!("no TCP in {answer:x?}");
            };
            let expected = match read.net.unwrap() {
                NetHeaders::Ipv4(ip, _) => tcp.calc_checksum_ipv4(&ip, &[]),
                NetHeaders::Ipv6(ip, _) => tcp.calc_checksum_ipv6(&ip, &[]),
                NetHeaders::Arp(_) => panic!("no IP in {answer:x?}"),
            };
            assert_eq!(tcp.checksum, expected.unwrap());
        }
    }
}
