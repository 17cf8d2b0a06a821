//! The upstream: dialled only for a [`VerifiedPeer`], told who the client is by a PROXY header.

use std::io;
use std::net::SocketAddr;

use ppp::v2::{Builder, Command, Protocol, Version};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;

use super::peer::VerifiedPeer;
use super::policy::Policy;
use crate::config::{ProxyProtocol, Upstream};

/// A connection to the upstream.
pub(super) type Stream = Either<TcpStream, UnixStream>;

/// The two ends of the client's connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    /// The client's address.
    pub(super) client: SocketAddr,
    /// The address that it connected to.
    pub(super) local: SocketAddr,
}

/// Dials the policy's upstream and tells it who the client is.
pub(super) async fn dial(policy: &Policy, _: &VerifiedPeer, ends: Ends) -> io::Result<Stream> {
    let mut stream = match policy.upstream() {
        Upstream::Tcp(address) => {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            Either::Left(stream)
        }
        Upstream::Unix(path) => Either::Right(UnixStream::connect(path).await?),
    };
    match policy.proxy_protocol() {
        ProxyProtocol::None => {}
        ProxyProtocol::V2 => stream.write_all(&proxy_v2(ends)?).await?,
    }
    Ok(stream)
}

/// The PROXY protocol, version 2, section 2.2: <https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>
fn proxy_v2(ends: Ends) -> io::Result<Vec<u8>> {
    let addresses = (canonical(ends.client), canonical(ends.local));
    Builder::with_addresses(Version::Two | Command::Proxy, Protocol::Stream, addresses).build()
}

/// A dual-stack socket reports IPv4 clients as IPv4-mapped; both ends are then.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_mapped_client_is_announced_as_ipv4() {
        let header = proxy_v2(Ends {
            client: "[::ffff:192.0.2.1]:4660".parse().unwrap(),
            local: "[::ffff:192.0.2.2]:443".parse().unwrap(),
        });

        let mut expected = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
        expected.extend([192, 0, 2, 1, 192, 0, 2, 2, 0x12, 0x34, 0x01, 0xbb]);
        assert_eq!(header.unwrap(), expected);
    }

    #[test]
    fn an_ipv6_client_is_announced_with_both_ports() {
        let header = proxy_v2(Ends {
            client: "[2001:db8::1]:4660".parse().unwrap(),
            local: "[2001:db8::2]:443".parse().unwrap(),
        });

        let header = header.unwrap();
        assert_eq!(header[12..16], [0x21, 0x21, 0, 36]);
        assert_eq!(header[48..], [0x12, 0x34, 0x01, 0xbb]);
    }
}
