//! What answers beside the port of the site: the ports that Cloudflare proxies, and QUIC.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use crate::roles::findings::PROXIED_PORTS;

/// The other ports that Cloudflare proxies and that take connections, all asked at once.
///
/// # Errors
///
/// Returns why this host cannot ask for one of them.
pub(super) fn open_beside(address: SocketAddr) -> io::Result<Vec<u16>> {
    let others = PROXIED_PORTS.into_iter();
    let others = others.filter(|port| *port != address.port());
    let answers: Vec<_> = thread::scope(|scope| {
        let asking = others.map(|port| {
            let there = SocketAddr::new(address.ip(), port);
            (port, scope.spawn(move || connects(there)))
        });
        let asking: Vec<_> = asking.collect();
        let ended = asking
            .into_iter()
            .map(|(port, answer)| (port, answer.join()));
        ended.collect()
    });
    let mut open = Vec::new();
    for (port, answer) in answers {
        let is_open = answer.map_err(|_panic| io::Error::other("a question has ended early"))??;
        open.extend(is_open.then_some(port));
    }
    Ok(open)
}

fn connects(there: SocketAddr) -> io::Result<bool> {
    match TcpStream::connect_timeout(&there, TIMEOUT) {
        Ok(_) => Ok(true),
        Err(error) if is_closed(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether that is how a port looks on which no program answers, or of which a firewall drops the packets.
fn is_closed(error: &io::Error) -> bool {
    let closed = [
        ErrorKind::ConnectionRefused,
        ErrorKind::ConnectionReset,
        ErrorKind::HostUnreachable,
        ErrorKind::PermissionDenied,
        ErrorKind::TimedOut,
        ErrorKind::WouldBlock,
    ];
    closed.contains(&error.kind())
}

/// Whether QUIC is spoken: a version that does not exist is answered by those that there are (RFC 9000 §6, §17.2.1).
///
/// # Errors
///
/// Returns why this host cannot ask.
pub(super) fn speaks_quic(address: SocketAddr) -> io::Result<bool> {
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
    let mut answer = [0; 64];
    // One may get lost; what came back to it may end the next.
    let sent = (0..DATAGRAMS).try_for_each(|_| socket.send(&packet).map(drop));
    let length = match sent.and_then(|()| socket.recv(&mut answer)) {
        Ok(length) => length,
        Err(error) if is_closed(&error) => return Ok(false),
        Err(error) => return Err(error),
    };
    let answer = answer.get(..length).unwrap_or_default();
    // A long header, with version 0.
    Ok(answer.len() > 5 && answer[0] & 0x80 != 0 && answer[1..5] == [0; 4])
}

/// A long header with a version that is reserved for such questions (§15), and IDs of eight bytes.
const HEADER: [u8; 23] = *b"\xc0\x1a\x2a\x3a\x4a\x08pullgate\x08probing!";
/// §14.1.
const INITIAL_MIN: usize = 1200;
const DATAGRAMS: usize = 3;
/// How long an answer may take: a first SYN that is lost is sent again after one second, and after two more.
const TIMEOUT: Duration = Duration::from_millis(3500);
