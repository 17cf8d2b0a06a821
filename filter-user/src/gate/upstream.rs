//! The upstream: dialled only for a [`VerifiedPeer`], with the client's address in a PROXY header,
//! spoken to in TLS if the policy says so.
//!
//! Sessions of TLS are resumed: all configurations that [`Encryption::offering`] makes share one store.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream as StdTcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{IpBindAddressNoPort, IpTransparent};
use rustls::pki_types::ServerName;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Error as TlsError,
    PeerMisbehaved, StreamOwned,
};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio_util::either::Either;
use tracing::debug;

use super::endpoint::Endpoint;
use super::proxy::{self, ConnectionAddrs, HeaderKind, ProxyInfo};
use super::refusal::{Refusal, UpstreamFault};
use super::session::Session;
use super::tls::peer::VerifiedPeer;
use crate::config::{ClientAddress, Target, Upstream, UpstreamTarget};
use crate::host::deadline::{DeadlineStream, is_late};

/// A connection to the upstream.
pub(super) type Stream = Either<TcpStream, UnixStream>;

/// An upstream, ready to be dialled.
pub(super) struct Dialer {
    pub(super) upstream: Upstream,
    pub(super) header: HeaderKind,
    pub(super) encryption: Option<Encryption>,
    /// The ports that an upstream on the same port has: the first is asked what it speaks.
    pub(super) steered_ports: Vec<u16>,
    /// Which address such an upstream sees.
    pub(super) client_address: ClientAddress,
}

/// How an upstream is spoken to in TLS.
pub(super) struct Encryption {
    /// The server name, unless it is that which the client names.
    pub(super) name: Option<ServerName<'static>>,
    /// Names that clients may say, to ask what the upstream speaks for them.
    pub(super) asked_names: Vec<ServerName<'static>>,
    /// Offers no protocol by ALPN; what the client agreed on is offered instead.
    pub(super) config: ClientConfig,
}

impl Encryption {
    /// The configuration that offers this protocol and no other.
    fn offering(&self, alpn: Option<&[u8]>) -> Arc<ClientConfig> {
        let mut config = self.config.clone();
        config.alpn_protocols = alpn.map(<[u8]>::to_vec).into_iter().collect();
        Arc::new(config)
    }

    /// The server name to send for a client that has said `named`. Of an address, none is sent (RFC 6066
    /// §3): a client that named no host is passed on as such.
    fn name_for(&self, named: Option<&str>) -> ServerName<'static> {
        let clients = || named.and_then(|name| ServerName::try_from(name.to_owned()).ok());
        let name = self.name.clone().or_else(clients);
        name.unwrap_or_else(|| ServerName::IpAddress(Ipv4Addr::LOCALHOST.into()))
    }
}

impl Dialer {
    /// Dials, and tells the upstream who the client is.
    pub(super) async fn dial(
        &self,
        _: &VerifiedPeer,
        info: &ProxyInfo<'_>,
    ) -> Result<Endpoint<Stream>, Refusal> {
        let failed = |fault: UpstreamFault| {
            move |error: io::Error| {
                debug!(
                    id = "upstream-refused",
                    upstream = %self.upstream,
                    %error,
                    "upstream does not take the connection"
                );
                Refusal::Upstream(fault)
            }
        };
        let unreachable = failed(UpstreamFault::Unreachable);
        let mut stream = match self.target(info.addresses) {
            Target::Tcp(address) => {
                let stream = match (&self.upstream.target, self.client_address) {
                    (UpstreamTarget::SamePort, ClientAddress::Transparent) => {
                        connect_as(info.addresses.client, address).await
                    }
                    (_, _) => TcpStream::connect(address).await,
                };
                let stream = stream.map_err(unreachable)?;
                stream.set_nodelay(true).map_err(unreachable)?;
                Either::Left(stream)
            }
            Target::Unix(path) => {
                Either::Right(UnixStream::connect(path).await.map_err(unreachable)?)
            }
        };
        let broken = failed(UpstreamFault::Broken);
        let header = match self.header {
            HeaderKind::None => Vec::new(),
            HeaderKind::V1 => proxy::v1(info.addresses).map_err(broken)?,
            HeaderKind::V2 => proxy::v2(info).map_err(broken)?,
            HeaderKind::BareV2 => proxy::v2_bare(info.addresses).map_err(broken)?,
        };
        if !header.is_empty() {
            stream.write_all(&header).await.map_err(broken)?;
        }
        let Some(encryption) = &self.encryption else {
            return Ok(Endpoint::clear(stream));
        };
        let config = encryption.offering(info.alpn);
        let name = encryption.name_for(info.authority);
        let session = Session::client(config, name).map_err(failed(UpstreamFault::Tls))?;
        let session = session.handshake(&mut stream).await;
        let session = session.map_err(failed(UpstreamFault::Tls))?;
        // A client that has agreed on HTTP/2 would be answered in another protocol.
        if info.alpn == Some(H2) && session.alpn_protocol() != Some(H2) {
            let text = "it no longer speaks HTTP/2 for this name";
            return Err(failed(UpstreamFault::Tls)(io::Error::other(text)));
        }
        Ok(Endpoint::encrypted(stream, session).until_its_end())
    }

    /// Asks the upstream, with no client's word, whether it speaks HTTP/2 as a client that was
    /// offered `h2` would begin it: at once (RFC 9113 §3.3), or agreed on by ALPN.
    ///
    /// An upstream in TLS has to speak it for each of the names that clients may say.
    ///
    /// Blocks for [`PROBE_TIMEOUT`] at most, however slowly it answers.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be asked; then nothing is known.
    pub(super) fn speaks_h2(&self) -> io::Result<bool> {
        let deadline = Instant::now() + PROBE_TIMEOUT;
        let Some(encryption) = &self.encryption else {
            return ask_for_settings(&mut self.open(self.header, deadline)?);
        };
        for name in &encryption.asked_names {
            let mut stream = self.open(self.header, deadline)?;
            let config = encryption.offering(Some(H2));
            let session = ClientConnection::new(config, name.clone());
            let mut session = session.map_err(io::Error::other)?;
            let speaks_it = match session.complete_io(&mut stream) {
                Ok(_) if session.alpn_protocol() == Some(H2) => {
                    ask_for_settings(&mut StreamOwned::new(session, stream))?
                }
                Ok(_) => false,
                Err(error) if lacks_h2(&error) => false,
                Err(error) => return Err(error),
            };
            if !speaks_it {
                return Ok(false);
            }
        }
        Ok(!encryption.asked_names.is_empty())
    }

    /// Why the certificate is not taken that the web server shows, if it is not. Blocks as [`Self::speaks_h2`] does.
    pub(super) fn distrusts(&self) -> Option<CertificateError> {
        let encryption = self.encryption.as_ref()?;
        let deadline = Instant::now() + PROBE_TIMEOUT;
        encryption.asked_names.iter().find_map(|name| {
            let mut stream = self.open(self.header, deadline).ok()?;
            let session = ClientConnection::new(encryption.offering(None), name.clone());
            // One that does not answer is reported elsewhere.
            let error = session.ok()?.complete_io(&mut stream).err()?;
            let Some(TlsError::InvalidCertificate(error)) = error.get_ref()?.downcast_ref() else {
                return None;
            };
            Some(error.clone())
        })
    }

    /// The PROXY header that the web server does expect, if it refuses a request behind the one that is
    /// configured, or behind none. Blocks as [`Self::speaks_h2`] does, for each try.
    pub(super) fn expected_header(&self, name: &str) -> Option<HeaderKind> {
        let serves = |header| self.serves_behind(header, name);
        // One that does not answer at all is reported elsewhere.
        if serves(self.header).unwrap_or(true) {
            return None;
        }
        let mut others = HeaderKind::ALL
            .into_iter()
            .filter(|other| *other != self.header);
        others.find(|header| serves(*header) == Some(true))
    }

    /// Whether a request is answered by anything but 400 behind such a header, or TLS is spoken; none, if nothing can
    /// be asked.
    fn serves_behind(&self, header: HeaderKind, name: &str) -> Option<bool> {
        let mut stream = self.open(header, Instant::now() + PROBE_TIMEOUT).ok()?;
        if let Some(encryption) = &self.encryption {
            let asked = encryption.asked_names.first()?.clone();
            let mut session = ClientConnection::new(encryption.offering(None), asked).ok()?;
            return match session.complete_io(&mut stream) {
                Ok(_) => Some(true),
                Err(error) if is_late(&error) => None,
                Err(error) => Some(is_in_tls(&error)),
            };
        }
        let request = format!(
            "GET / HTTP/1.1\r\nHost: {name}\r\nUser-Agent: pullgate-check\r\nConnection: close\r\n\r\n"
        );
        // RFC 9112 §4: `HTTP/1.1 400`.
        let mut status = [0; 12];
        let answered = stream
            .write_all(request.as_bytes())
            .and_then(|()| stream.read_exact(&mut status));
        // One that takes its time says nothing.
        if answered.as_ref().is_err_and(is_late) {
            return None;
        }
        Some(answered.is_ok() && status.starts_with(b"HTTP/1.") && !status.ends_with(b" 400"))
    }

    /// Where a connection with these addresses is relayed to.
    fn target(&self, addresses: ConnectionAddrs) -> Target {
        match &self.upstream.target {
            UpstreamTarget::Fixed(target) => target.clone(),
            UpstreamTarget::SamePort => {
                let ConnectionAddrs { client, local } = addresses;
                let loopback = match client.ip().to_canonical() {
                    IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
                    IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
                };
                // A load balancer's header may name any port.
                let mut ports = self.steered_ports.iter().copied();
                let first = self.steered_ports.first().copied().unwrap_or_default();
                let port = ports.find(|port| *port == local.port()).unwrap_or(first);
                Target::Tcp(SocketAddr::new(loopback, port))
            }
        }
    }

    /// Connects to the upstream with no client's word, behind such a header.
    fn open(&self, header: HeaderKind, deadline: Instant) -> io::Result<Box<dyn Duplex>> {
        let left = deadline.saturating_duration_since(Instant::now());
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let addresses = ConnectionAddrs {
            client: loopback,
            local: loopback,
        };
        let mut stream: Box<dyn Duplex> = match self.target(addresses) {
            Target::Tcp(address) => {
                let stream = StdTcpStream::connect_timeout(&address, left)?;
                Box::new(DeadlineStream::new(stream, deadline))
            }
            Target::Unix(path) => {
                // A listener whose queue is full holds connect(2) up.
                let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
                socket.connect_timeout(&SockAddr::unix(path)?, left)?;
                let stream = StdUnixStream::from(OwnedFd::from(socket));
                Box::new(DeadlineStream::new(stream, deadline))
            }
        };
        stream.write_all(&header.without_client()?)?;
        Ok(stream)
    }
}

/// Whether an error is one that a server which speaks TLS brings about: its certificate, or an alert.
fn is_in_tls(error: &io::Error) -> bool {
    let error = error.get_ref().and_then(|error| error.downcast_ref());
    error.is_some_and(|error| !matches!(error, TlsError::InvalidMessage(_)))
}

/// Connects in a client's name: by its address, and a port of the kernel's choice (ip(7), IP_TRANSPARENT).
///
/// The option is of IPv4 and holds for sockets of both families (`ipv6_setsockopt`, net/ipv6/ipv6_sockglue.c).
async fn connect_as(client: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    setsockopt(&socket, IpTransparent, &true)?;
    // The port is picked when both ends are known: as many as there are for each client.
    setsockopt(&socket, IpBindAddressNoPort, &true)?;
    let name = SocketAddr::new(client.ip().to_canonical(), 0);
    socket.bind(&name.into())?;
    TcpSocket::from_std_stream(socket.into()).connect(to).await
}

trait Duplex: Read + Write {}

impl<T: Read + Write> Duplex for T {}

/// Whether the answer to the connection preface begins with a SETTINGS frame, RFC 9113 §3.4. Who
/// says nothing, or hangs up, has not answered.
fn ask_for_settings(stream: &mut dyn Duplex) -> io::Result<bool> {
    stream.write_all(PREFACE)?;
    stream.flush()?;
    let mut frame = [0; 9];
    let read = stream.read(&mut frame)?;
    if read == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    if read < frame.len() {
        stream.read_exact(&mut frame[read..])?;
    }
    let [_, _, _, kind, flags, stream_id @ ..] = frame;
    Ok(kind == SETTINGS && flags == 0 && stream_id == [0; 4])
}

/// Whether a server refuses what is offered by ALPN (RFC 7301 §3.2), or takes what was not: Apache without
/// mod_http2 does that.
fn lacks_h2(error: &io::Error) -> bool {
    let source = error.get_ref();
    matches!(
        source.and_then(|source| source.downcast_ref()),
        Some(
            TlsError::AlertReceived(AlertDescription::NoApplicationProtocol)
                | TlsError::PeerMisbehaved(PeerMisbehaved::SelectedUnofferedApplicationProtocol)
        )
    )
}

/// The protocol, as ALPN names it.
const H2: &[u8] = b"h2";
/// RFC 9113 §3.4, with an empty SETTINGS frame.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// The frame type, RFC 9113 §6.5.
const SETTINGS: u8 = 4;
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
