//! What answers beside the port of the site: the ports that Cloudflare proxies, and QUIC.

use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use crate::roles::findings::PROXIED_PORTS;

/// The other ports that Cloudflare proxies and that take connections, all asked at once.
pub(super) fn open_beside(address: SocketAddr) -> Vec<u16> {
    let others = PROXIED_PORTS.into_iter();
    let others = others.filter(|port| *port != address.port());
    thread::scope(|scope| {
        let asking = others.map(|port| {
            let there = SocketAddr::new(address.ip(), port);
            let connects = move || TcpStream::connect_timeout(&there, TIMEOUT).is_ok();
            (port, scope.spawn(connects))
        });
        let asking: Vec<_> = asking.collect();
        let open = asking
            .into_iter()
            .filter_map(|(port, answer)| answer.join().is_ok_and(|it| it).then_some(port));
        open.collect()
    })
}

/// Whether QUIC is spoken: a version that does not exist is answered by those that there are (RFC 9000 §6, §17.2.1).
pub(super) fn speaks_quic(address: SocketAddr) -> bool {
    let ask = || -> io::Result<bool> {
        let any: SocketAddr = if address.is_ipv4() {
            ([0, 0, 0, 0], 0).into()
        } else {
            ([0_u16; 8], 0).into()
        };
        let socket = UdpSocket::bind(any)?;
        socket.connect(address)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        let mut packet = vec![0; INITIAL_MIN];
        packet[..HEADER.len()].copy_from_slice(&HEADER);
        // One may get lost.
        for _ in 0..DATAGRAMS {
            socket.send(&packet)?;
        }
        let mut answer = [0; 64];
        let length = socket.recv(&mut answer)?;
        let answer = answer.get(..length).unwrap_or_default();
        // A long header, with version 0.
        Ok(answer.len() > 5 && answer[0] & 0x80 != 0 && answer[1..5] == [0; 4])
    };
    ask().unwrap_or(false)
}

/// A long header with a version that is reserved for such questions (§15), and IDs of eight bytes.
const HEADER: [u8; 23] = *b"\xc0\x1a\x2a\x3a\x4a\x08pullgate\x08probing!";
/// §14.1.
const INITIAL_MIN: usize = 1200;
const DATAGRAMS: usize = 3;
/// How long an answer may take: a first SYN that is lost is sent again after one second, and after two more.
const TIMEOUT: Duration = Duration::from_millis(3500);
