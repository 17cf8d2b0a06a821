//! Frames on the wire: sent raw from a host, and seen as they leave the origin.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::RcvBufForce;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt,
    socket,
};

use crate::net::{Host, INTERFACE, Network};

/// Sends frames from a host's interface, as they are.
pub struct Sender {
    socket: OwnedFd,
    link: LinkAddr,
}

impl Sender {
    /// Opens the interface of a host.
    #[must_use]
    pub fn open(network: &Network, host: Host) -> Self {
        let (socket, link) = network.on(host, || (open(), link()));
        Self { socket, link }
    }

    /// Sends one frame.
    pub fn send(&self, frame: &[u8]) {
        let flags = MsgFlags::empty();
        sendto(self.socket.as_raw_fd(), frame, &self.link, flags).unwrap();
    }
}

/// Sees every frame that arrives at a host from when it was opened.
pub struct Tap {
    socket: OwnedFd,
}

impl Tap {
    /// Begins to listen at a host.
    #[must_use]
    pub fn open(network: &Network, host: Host) -> Self {
        let socket = network.on(host, open);
        // What the host sends is seen, too: with less room, what comes later is lost.
        setsockopt(&socket, RcvBufForce, &RECEIVED).unwrap();
        Self { socket }
    }

    /// The next frame that `wanted` says yes to, or `None` if none came in that time.
    pub fn next(&self, within: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left.as_millis()).unwrap();
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, timeout).unwrap() == 0 {
                return None;
            }
            let mut frame = vec![0; 65_536];
            let length = recv(self.socket.as_raw_fd(), &mut frame, MsgFlags::empty()).unwrap();
            frame.truncate(length);
            if wanted(&frame) {
                return Some(frame);
            }
        }
    }
}

/// Whether a frame is a TCP SYN-ACK.
#[must_use]
pub fn is_syn_ack(frame: &[u8]) -> bool {
    tcp_flags(frame).is_some_and(|flags| flags & 0x12 == 0x12)
}

/// Whether a frame is a TCP reset.
#[must_use]
pub fn is_reset(frame: &[u8]) -> bool {
    tcp_flags(frame).is_some_and(|flags| flags & 0x04 != 0)
}

/// The destination port of a TCP segment in a frame without options or extension headers.
#[must_use]
pub fn destination_port(frame: &[u8]) -> Option<u16> {
    let port = segment(frame)?.get(2..)?.first_chunk()?;
    Some(u16::from_be_bytes(*port))
}

/// The flags of a TCP segment in a frame without options or extension headers.
fn tcp_flags(frame: &[u8]) -> Option<u8> {
    segment(frame)?.get(13).copied()
}

/// The TCP segment in a frame without options or extension headers, behind its VLAN tags.
fn segment(frame: &[u8]) -> Option<&[u8]> {
    let mut rest = frame.get(12..)?;
    while let [0x81, 0x00, _, _, inner @ ..] | [0x88, 0xa8, _, _, inner @ ..] = rest {
        rest = inner;
    }
    let (packet, protocol, header) = match rest {
        [0x08, 0x00, packet @ ..] => (packet, 9, 20),
        [0x86, 0xdd, packet @ ..] => (packet, 6, 40),
        _ => return None,
    };
    (packet.get(protocol) == Some(&6)).then(|| packet.get(header..))?
}

fn open() -> OwnedFd {
    let protocol = SockProtocol::EthAll;
    socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        protocol,
    )
    .unwrap()
}

/// The address that names the interface to the kernel.
fn link() -> LinkAddr {
    let found = getifaddrs().unwrap().find_map(|interface| {
        let is_ours = interface.interface_name == INTERFACE;
        let address = interface.address?;
        is_ours.then(|| address.as_link_addr().copied())?
    });
    found
        .ok_or_else(|| io::Error::other("no interface"))
        .unwrap()
}

/// Bytes of frames that wait to be read, with what the kernel adds to each.
const RECEIVED: usize = 8 << 20;
