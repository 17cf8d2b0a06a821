//! SYNs of clients, as frames, and what they are answered.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use etherparse::{
    IpHeaders, NetHeaders, PacketBuilder, PacketBuilderStep, PacketHeaders, TcpOptionElement,
    TransportHeader,
};

use crate::net::{Host, Network};
use crate::wire::{self, Sender, Tap};

/// Sends SYNs from the edge's network, and sees their answers.
pub struct Exchange {
    tap: Tap,
    sender: Sender,
}

impl Exchange {
    /// Sees answers from now on.
    #[must_use]
    pub fn open(network: &Network) -> Self {
        Self {
            tap: Tap::open(network, Host::Edge),
            sender: Sender::open(network, Host::Edge),
        }
    }

    /// By client, what each is answered.
    #[must_use]
    pub fn ask(&self, syns: &[ClientSyn], by: By) -> BTreeMap<SocketAddr, SynAck> {
        for syn in syns {
            self.sender.send(&syn.frame(by));
        }
        let mut answers = BTreeMap::new();
        while answers.len() < syns.len() {
            let answer = self.tap.next(Duration::from_secs(10), wire::is_syn_ack);
            let answer = answer.unwrap_or_else(|| panic!("{} of {}", answers.len(), syns.len()));
            let (client, answer) = SynAck::read(&answer);
            answers.insert(client, answer);
        }
        answers
    }
}

/// Who is to answer.
#[derive(Clone, Copy, Debug)]
pub enum By {
    /// The filter's program.
    Program,
    /// The kernel: the program leaves a SYN to it whose first option is another than the segment size.
    Kernel,
}

/// A SYN of a client's.
#[derive(Debug)]
pub struct ClientSyn {
    /// Who sends it.
    pub client: SocketAddr,
    /// Its sequence number.
    pub sequence: u32,
    /// The segment size, if it says one, and whether it has the options of usual clients besides.
    mss: Option<u16>,
    has_options: bool,
}

impl ClientSyn {
    /// One with the usual segment size.
    #[must_use]
    pub fn plain(client: SocketAddr) -> Self {
        Self {
            client,
            sequence: 1,
            mss: Some(1460),
            has_options: false,
        }
    }

    /// The one of that number, of a client in Cloudflare's ranges.
    #[must_use]
    pub fn of(number: u32) -> Self {
        let mixed = u64::from(number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let [a, b, c, d, e, f, g, h] = (mixed ^ mixed >> 29).to_be_bytes();
        let address = if number.is_multiple_of(2) {
            IpAddr::from([173, 245, 48 + (a & 15), b.max(16)])
        } else {
            let (a, b, c) = (u16::from(a), u16::from(b), u16::from(c));
            IpAddr::from([0x2400, 0xcb00, 0, 0, 0x1_00 | a, 0, b, c])
        };
        // No two of a batch have the same port.
        let port = 1024 + u16::try_from(number % 60_000).unwrap();
        Self {
            client: SocketAddr::new(address, port),
            sequence: u32::from_be_bytes([e, f, g, h]),
            mss: (!d.is_multiple_of(8)).then(|| u16::from_be_bytes([d, c]) >> (a % 8)),
            has_options: d.is_multiple_of(2),
        }
    }

    /// The frame of it.
    #[must_use]
    pub fn frame(&self, by: By) -> Vec<u8> {
        let mut options = Vec::new();
        if matches!(by, By::Kernel) {
            options.push(TcpOptionElement::Noop);
        }
        options.extend(self.mss.map(TcpOptionElement::MaximumSegmentSize));
        if self.has_options && self.mss.is_some() {
            options.extend([
                TcpOptionElement::SelectiveAcknowledgementPermitted,
                TcpOptionElement::Timestamp(self.sequence, 0),
                TcpOptionElement::WindowScale(7),
            ]);
        }
        let packet = from(self.client);
        let tcp = packet.tcp(self.client.port(), HTTPS, self.sequence, WINDOW);
        let syn = tcp.syn().options(&options).unwrap();
        let mut frame = Vec::new();
        syn.write(&mut frame, &[]).unwrap();
        frame
    }
}

/// The frame of a segment that acknowledges, from a client.
#[must_use]
pub fn segment(client: SocketAddr, sequence: u32, acknowledged: u32, data: &[u8]) -> Vec<u8> {
    let tcp = from(client).tcp(client.port(), HTTPS, sequence, WINDOW);
    let mut frame = Vec::new();
    tcp.ack(acknowledged).write(&mut frame, data).unwrap();
    frame
}

/// A packet to the origin, from the edge's network.
fn from(client: SocketAddr) -> PacketBuilderStep<IpHeaders> {
    let ethernet = PacketBuilder::ethernet2(Host::Edge.mac(), Host::Origin.mac());
    let [IpAddr::V4(v4), IpAddr::V6(v6)] = Host::Origin.addresses() else {
        panic!("one address of each family");
    };
    match client.ip() {
        IpAddr::V4(client) => ethernet.ipv4(client.octets(), v4.octets(), HOPS),
        IpAddr::V6(client) => ethernet.ipv6(client.octets(), v6.octets(), HOPS),
    }
}

/// What an answer says that matters to the handshake.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SynAck {
    /// The sequence number.
    pub cookie: u32,
    /// The number that is acknowledged.
    pub acknowledged: u32,
    mss: u16,
}

impl SynAck {
    /// The client, and what it is answered.
    fn read(frame: &[u8]) -> (SocketAddr, Self) {
        let headers = PacketHeaders::from_ethernet_slice(frame).unwrap();
        let Some(TransportHeader::Tcp(tcp)) = headers.transport else {
            panic!("no TCP: {frame:x?}");
        };
        let client = match headers.net.unwrap() {
            NetHeaders::Ipv4(ip, _) => IpAddr::from(ip.destination),
            NetHeaders::Ipv6(ip, _) => IpAddr::from(ip.destination),
            NetHeaders::Arp(_) => panic!("no IP: {frame:x?}"),
        };
        let mut options = tcp.options_iterator().map(Result::unwrap);
        let mss = options.find_map(|option| {
            if let TcpOptionElement::MaximumSegmentSize(mss) = option {
                Some(mss)
            } else {
                None
            }
        });
        let answer = Self {
            cookie: tcp.sequence_number,
            acknowledged: tcp.acknowledgment_number,
            mss: mss.unwrap(),
        };
        (SocketAddr::new(client, tcp.destination_port), answer)
    }
}

/// The port that is protected.
const HTTPS: u16 = 443;
/// Hops that a packet has left.
const HOPS: u8 = 61;
/// Bytes that a client takes at once.
const WINDOW: u16 = 64_240;
