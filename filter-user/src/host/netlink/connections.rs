//! Sockets of this host: established connections and listeners.

use std::io;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::ask;

/// An established TCP connection of this host.
#[derive(Clone, Copy, Debug)]
pub struct Connection {
    /// This host's end.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
    /// Of a listener, how many connections may wait for it: `idiag_wqueue` (net/ipv4/tcp_diag.c).
    pub queue: u32,
    /// The number of the socket, as `/proc/<pid>/fd` shows it.
    pub inode: u32,
    /// Whether it is of IPv6 and takes IPv4 as well, if it listens on all addresses (ipv6(7), `IPV6_V6ONLY`).
    pub is_dual_stack: bool,
}

/// All established TCP connections of this network namespace: sock_diag(7).
///
/// # Errors
///
/// Returns the error of the request.
pub fn connections() -> io::Result<Vec<Connection>> {
    sockets(IPPROTO_TCP, &StateFlags::ESTABLISHED)
}

/// The addresses that TCP sockets of this network namespace listen on.
///
/// # Errors
///
/// Returns the error of the request.
pub fn listeners() -> io::Result<Vec<SocketAddr>> {
    let sockets = listening_sockets()?;
    Ok(sockets.iter().map(|socket| socket.local).collect())
}

/// The listening TCP sockets of this network namespace, without peers.
///
/// # Errors
///
/// Returns the error of the request.
pub fn listening_sockets() -> io::Result<Vec<Connection>> {
    sockets(IPPROTO_TCP, &StateFlags::LISTEN)
}

/// The addresses at which UDP sockets of this network namespace take datagrams of everybody.
///
/// # Errors
///
/// Returns the error of the request.
pub fn udp_listeners() -> io::Result<Vec<SocketAddr>> {
    // So the kernel calls one that is not connected: net/ipv4/udp.c.
    let sockets = sockets(IPPROTO_UDP, &StateFlags::CLOSE)?;
    Ok(sockets.iter().map(|socket| socket.local).collect())
}

fn sockets(protocol: u8, states: &StateFlags) -> io::Result<Vec<Connection>> {
    let mut connections = Vec::new();
    for (family, socket_id) in [
        (AF_INET, SocketId::new_v4()),
        (AF_INET6, SocketId::new_v6()),
    ] {
        let request = SockDiagMessage::InetRequest(InetRequest {
            family,
            protocol,
            extensions: ExtensionFlags::empty(),
            states: states.clone(),
            socket_id,
        });
        ask(NETLINK_SOCK_DIAG, request, NLM_F_DUMP, |message| {
            if let SockDiagMessage::InetResponse(response) = message {
                let id = response.header.socket_id;
                let is_dual_stack = response.nlas.contains(&Nla::SkV6Only(false));
                let end = |address: IpAddr, port| SocketAddr::new(address.to_canonical(), port);
                connections.push(Connection {
                    local: end(id.source_address, id.source_port),
                    peer: end(id.destination_address, id.destination_port),
                    queue: response.header.send_queue,
                    inode: response.header.inode,
                    is_dual_stack,
                });
            }
        })?;
    }
    Ok(connections)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_established_connection_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (local, peer) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());

        let connections = connections().unwrap();

        let is_ours = |c: &&Connection| c.local == local && c.peer == peer;
        assert!(
            connections
                .iter()
                .find(is_ours)
                .is_some_and(|c| c.inode != 0)
        );
    }
}
