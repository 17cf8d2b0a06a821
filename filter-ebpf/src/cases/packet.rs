//! Building frames: the fields that matter in, the bytes on the wire out.

use core::net::IpAddr;
use std::vec;
use std::vec::Vec;

/// A frame to build: a SYN to a port, from which everything else is varied.
#[derive(Clone, Debug)]
pub struct Packet {
    source: IpAddr,
    destination: IpAddr,
    macs: [u8; 12],
    tags: Vec<(u16, u16)>,
    version_ihl: Option<u8>,
    options: Vec<u8>,
    extensions: Vec<(u8, Vec<u8>)>,
    fragment: Option<(u16, bool)>,
    protocol: u8,
    payload: Vec<u8>,
    /// Whether the payload is a TCP segment whose checksum is to be filled in.
    is_segment: bool,
    id: u16,
    patches: Vec<(usize, u8)>,
    trailer: Vec<u8>,
}

impl Packet {
    /// A TCP SYN.
    #[must_use]
    pub fn tcp(source: IpAddr, destination: IpAddr, port: u16) -> Self {
        let mut segment = vec![0; 20];
        segment[..2].copy_from_slice(&SOURCE_PORT.to_be_bytes());
        segment[2..4].copy_from_slice(&port.to_be_bytes());
        // Sequence number, data offset of five words, SYN, window.
        segment[4..8].copy_from_slice(&[0, 0, 0, 1]);
        segment[12] = 5 << 4;
        segment[13] = 2;
        segment[14] = 0x20;
        Self {
            is_segment: true,
            ..Self::carrying(source, destination, 6, segment)
        }
    }

    /// A UDP datagram.
    #[must_use]
    pub fn udp(source: IpAddr, destination: IpAddr, port: u16) -> Self {
        let [high, low] = port.to_be_bytes();
        Self::carrying(
            source,
            destination,
            17,
            vec![0x30, 0x39, high, low, 0, 8, 0, 0],
        )
    }

    /// Any payload of any protocol.
    #[must_use]
    pub fn carrying(source: IpAddr, destination: IpAddr, protocol: u8, payload: Vec<u8>) -> Self {
        Self {
            source,
            destination,
            macs: [0; 12],
            tags: Vec::new(),
            version_ihl: None,
            options: Vec::new(),
            extensions: Vec::new(),
            fragment: None,
            protocol,
            payload,
            is_segment: false,
            id: 0x1234,
            patches: Vec::new(),
            trailer: Vec::new(),
        }
    }

    /// From another TCP or UDP port, which is also the identification of the packet.
    #[must_use]
    pub fn from_port(mut self, port: u16) -> Self {
        if let Some(source) = self.payload.first_chunk_mut() {
            *source = port.to_be_bytes();
        }
        self.id = port;
        self
    }

    /// With another byte in the transport's header.
    #[must_use]
    pub fn segment_byte(mut self, at: usize, byte: u8) -> Self {
        if let Some(place) = self.payload.get_mut(at) {
            *place = byte;
        }
        self
    }

    /// With TCP options, whole words of four bytes.
    #[must_use]
    pub fn tcp_options(mut self, options: &[u8]) -> Self {
        self.payload.extend(options);
        let words = u8::try_from(self.payload.len() / 4).unwrap_or(15);
        self.segment_byte(12, words << 4)
    }

    /// With another byte in the IP header; checksums are those of the changed header.
    #[must_use]
    pub fn header_byte(mut self, at: usize, byte: u8) -> Self {
        self.patches.push((at, byte));
        self
    }

    /// The packet in fragments, which begin at these offsets in units of eight bytes of what stands
    /// behind the IP header (and, in IPv6, behind its extension headers).
    #[must_use]
    pub fn fragments(&self, starts: &[u16]) -> Vec<Self> {
        let payload = self.checked_payload();
        let at = |unit: u16| (usize::from(unit) * 8).min(payload.len());
        let ends = starts.iter().skip(1).map(|start| at(*start));
        let ends = ends.chain([payload.len()]);
        let ranges = starts.iter().zip(ends);
        ranges
            .map(|(start, end)| {
                let mut fragment = self.clone();
                fragment.payload = payload[at(*start)..end].to_vec();
                fragment.is_segment = false;
                fragment.fragment(*start, end != payload.len())
            })
            .collect()
    }

    /// With another payload of another protocol, all headers as they are.
    #[must_use]
    pub fn holding(mut self, protocol: u8, payload: Vec<u8>) -> Self {
        self.is_segment = false;
        self.payload = payload;
        self.protocol(protocol)
    }

    /// The same bytes under another protocol number.
    #[must_use]
    pub fn protocol(mut self, protocol: u8) -> Self {
        self.protocol = protocol;
        self
    }

    /// With destination and source hardware address.
    #[must_use]
    pub fn between(mut self, destination: [u8; 6], source: [u8; 6]) -> Self {
        self.macs[..6].copy_from_slice(&destination);
        self.macs[6..].copy_from_slice(&source);
        self
    }

    /// With a VLAN tag inside those that are there: its type, and priority and VLAN number.
    #[must_use]
    pub fn tagged(mut self, tpid: u16, tci: u16) -> Self {
        self.tags.push((tpid, tci));
        self
    }

    /// With IPv4 options, whole words of four bytes.
    #[must_use]
    pub fn options(mut self, options: &[u8]) -> Self {
        self.options = options.to_vec();
        self
    }

    /// With another first byte of the IP header.
    #[must_use]
    pub fn version_ihl(mut self, byte: u8) -> Self {
        self.version_ihl = Some(byte);
        self
    }

    /// With an IPv6 extension header behind those that are there: its type, and all of its bytes
    /// but the first, which names the next header.
    #[must_use]
    pub fn extension(mut self, kind: u8, rest: &[u8]) -> Self {
        self.extensions.push((kind, rest.to_vec()));
        self
    }

    /// As a fragment: offset in units of eight bytes, and whether more follow.
    ///
    /// In IPv6 the fragment header is the last extension header.
    #[must_use]
    pub fn fragment(mut self, offset: u16, more: bool) -> Self {
        self.fragment = Some((offset, more));
        self
    }

    /// With only the first bytes of the payload.
    #[must_use]
    pub fn cut(mut self, length: usize) -> Self {
        self.payload.truncate(length);
        self
    }

    /// With bytes behind the packet, which its length does not count.
    #[must_use]
    pub fn trailer(mut self, trailer: &[u8]) -> Self {
        self.trailer = trailer.to_vec();
        self
    }

    /// The frame, with the checksums that the stack asks for.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        let mut frame = self.macs.to_vec();
        for (tpid, tci) in &self.tags {
            frame.extend(tpid.to_be_bytes());
            frame.extend(tci.to_be_bytes());
        }
        let payload = self.checked_payload();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend([0x08, 0x00]);
                let words = (20 + self.options.len()) / 4;
                let ihl = u8::try_from(words).unwrap_or(15);
                let (offset, more) = self.fragment.unwrap_or((0, false));
                let flags = offset | if more { 0x2000 } else { 0 };
                let mut header = vec![self.version_ihl.unwrap_or(0x40 | ihl), 0];
                header.extend(length(words * 4 + payload.len()));
                header.extend(self.id.to_be_bytes());
                header.extend(flags.to_be_bytes());
                header.extend([64, self.protocol, 0, 0]);
                header.extend(source.octets());
                header.extend(destination.octets());
                header.extend(&self.options);
                for (at, byte) in &self.patches {
                    header[*at] = *byte;
                }
                let sum = checksum(&header);
                header[10..12].copy_from_slice(&sum);
                frame.extend(header);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend([0x86, 0xdd]);
                let chain = self.chain();
                let begin = frame.len();
                frame.extend([self.version_ihl.unwrap_or(0x60), 0, 0, 0]);
                frame.extend(length(chain.len() + payload.len()));
                let kinds = self.extensions.first().map(|(kind, _)| *kind);
                let first = kinds
                    .or_else(|| self.fragment.map(|_| 44))
                    .unwrap_or(self.protocol);
                frame.extend([first, 64]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
                for (at, byte) in &self.patches {
                    frame[begin + at] = *byte;
                }
                frame.extend(chain);
            }
            // A packet of two families is none; the frame then ends behind the tags.
            _ => return frame,
        }
        frame.extend(payload);
        frame.extend(&self.trailer);
        frame
    }

    /// The packet without its Ethernet header, to be put into another.
    #[must_use]
    pub fn bare(&self) -> Vec<u8> {
        let bare = Self {
            tags: Vec::new(),
            ..self.clone()
        };
        bare.build().split_off(14)
    }

    /// All extension headers, each naming the next.
    fn chain(&self) -> Vec<u8> {
        let mut headers = self.extensions.clone();
        if let Some((offset, more)) = self.fragment {
            let [high, low] = (offset << 3 | u16::from(more)).to_be_bytes();
            let [id_high, id_low] = self.id.to_be_bytes();
            headers.push((44, vec![0, high, low, 0, 0, id_high, id_low]));
        }
        let kinds = headers.iter().map(|(kind, _)| *kind);
        let nexts: Vec<_> = kinds.skip(1).chain([self.protocol]).collect();
        let mut chain = Vec::new();
        for ((_, rest), next) in headers.iter().zip(nexts) {
            chain.push(next);
            chain.extend(rest);
        }
        chain
    }

    /// The payload, with the checksum if it is a whole TCP segment.
    fn checked_payload(&self) -> Vec<u8> {
        let mut payload = self.payload.clone();
        if !self.is_segment || self.protocol != 6 || payload.len() < 20 {
            return payload;
        }
        let mut pseudo = Vec::new();
        for address in [self.source, self.destination] {
            match address {
                IpAddr::V4(address) => pseudo.extend(address.octets()),
                IpAddr::V6(address) => pseudo.extend(address.octets()),
            }
        }
        pseudo.extend([0, self.protocol]);
        pseudo.extend(length(payload.len()));
        pseudo.extend(&payload);
        payload[16..18].copy_from_slice(&checksum(&pseudo));
        payload
    }
}

fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes()
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks(2).map(|pair| {
        let [high, low] = [pair[0], pair.get(1).copied().unwrap_or(0)];
        u64::from(u16::from_be_bytes([high, low]))
    });
    let mut sum: u64 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [.., high, low] = (!sum).to_be_bytes();
    [high, low]
}

/// A PPPoE session frame (RFC 2516 §4) of this PPP protocol, one byte or two.
#[must_use]
pub fn session(protocol: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x11, 0, 0, 1];
    frame.extend(length(protocol.len() + payload.len()));
    frame.extend(protocol);
    frame.extend(payload);
    ethernet(0x8864, &frame)
}

/// GRE of this EtherType: its flags and version, and as many zeros as those ask for.
#[must_use]
pub fn gre(flags: u16, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let fields = (flags & 0xb000).count_ones() as usize;
    let mut header = flags.to_be_bytes().to_vec();
    header.extend(ethertype.to_be_bytes());
    header.extend(vec![0; 4 * fields]);
    header.extend(payload);
    header
}

/// A frame of any EtherType.
#[must_use]
pub fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Source port of every segment.
const SOURCE_PORT: u16 = 40_000;
