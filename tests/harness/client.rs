//! A TLS client that reports what it saw: a response, an alert, a close, or nothing at all.

use std::fmt::{self, Display, Formatter};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::client::Tls13ClientSessionValue;
use rustls::client::{ClientSessionStore, ResolvesClientCert, Resumption, Tls12ClientSessionValue};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::ServerName;
use rustls::sign::CertifiedKey;
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, Error as TlsError, HandshakeKind, NamedGroup,
    RootCertStore, SignatureScheme, StreamOwned, SupportedProtocolVersion,
};

use crate::net::{Host, Network};
use crate::pki::{Identity, Pki};

/// What a client saw.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Reply {
    /// An HTTP response: status and body.
    Response(u16, String),
    /// A TLS alert.
    Alert(AlertDescription),
    /// The end of the connection, without an alert.
    Closed,
    /// No answer to the SYN.
    Silence,
    /// A reset instead of a connection.
    Refused,
}

impl Display for Reply {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Response(status, body) => write!(f, "{status} {}", body.trim_end()),
            Self::Alert(alert) => write!(f, "alert {alert:?}"),
            Self::Closed => f.write_str("closed"),
            Self::Silence => f.write_str("silence"),
            Self::Refused => f.write_str("connection refused"),
        }
    }
}

impl Reply {
    /// The status of a response, or what was seen instead: without the body.
    #[must_use]
    pub fn brief(&self) -> String {
        if let Self::Response(status, _) = self {
            return status.to_string();
        }
        self.to_string()
    }
}

/// An open connection.
pub type Session = StreamOwned<ClientConnection, TcpStream>;

/// A client with its certificate and its sessions.
#[derive(Clone)]
pub struct Client {
    config: Arc<ClientConfig>,
    shown: Arc<CertResolver>,
}

impl Client {
    /// A client that trusts the servers, with a certificate or without.
    #[must_use]
    pub fn new(pki: &Pki, identity: Option<&Identity>) -> Self {
        Self::speaking(
            pki,
            identity,
            &[&rustls::version::TLS13, &rustls::version::TLS12],
        )
    }

    /// The same, of certain TLS versions only.
    #[must_use]
    pub fn speaking(
        pki: &Pki,
        identity: Option<&Identity>,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(pki.web.der.clone()).unwrap();
        let builder = ClientConfig::builder_with_protocol_versions(versions);
        let builder = builder.with_root_certificates(roots);
        let shown = Arc::new(CertResolver(Mutex::new(identity.map(certified))));
        let mut config = builder.with_client_cert_resolver(Arc::clone(&shown) as _);
        // An attacker does not care for which host he was given a session.
        config.resumption = Resumption::store(Arc::new(AnyName::default()));
        Self {
            config: Arc::new(config),
            shown,
        }
    }

    /// Presents another certificate from now on; the sessions are those of before.
    pub fn renew(&self, identity: &Identity) {
        *self.shown.0.lock().unwrap() = Some(certified(identity));
    }

    /// The same client, naming no host in its ClientHello.
    #[must_use]
    pub fn without_server_name(&self) -> Self {
        let mut config = ClientConfig::clone(&self.config);
        config.enable_sni = false;
        Self {
            config: Arc::new(config),
            shown: Arc::clone(&self.shown),
        }
    }

    /// The same client, offering these protocols by ALPN.
    #[must_use]
    pub fn offering(&self, protocols: &[&str]) -> Self {
        let mut config = ClientConfig::clone(&self.config);
        let protocols = protocols.iter().map(|name| name.as_bytes().to_vec());
        config.alpn_protocols = protocols.collect();
        Self {
            config: Arc::new(config),
            shown: Arc::clone(&self.shown),
        }
    }

    /// The same client, whose connections give away their keys: to send what no library would.
    #[must_use]
    pub fn giving_away_keys(&self) -> Self {
        let mut config = ClientConfig::clone(&self.config);
        config.enable_secret_extraction = true;
        Self {
            config: Arc::new(config),
            shown: Arc::clone(&self.shown),
        }
    }

    /// Shakes hands with `to` for host `name`, and leaves the connection to the caller.
    ///
    /// # Errors
    ///
    /// Returns what was seen instead of a connection.
    pub fn connect(
        &self,
        network: &Network,
        from: Host,
        to: IpAddr,
        name: &str,
    ) -> Result<Session, Reply> {
        let mut stream = self.over(connect(network, from, to)?, name);
        let handshake = stream.conn.complete_io(&mut stream.sock);
        handshake.map_err(|error| read_error(&error))?;
        Ok(stream)
    }

    /// Asks for `/` of host `name` over a connection that is open.
    #[must_use]
    pub fn get_over(&self, stream: TcpStream, name: &str) -> Reply {
        let reply = exchange(&mut self.over(stream, name), name);
        reply.unwrap_or_else(|error| read_error(&error))
    }

    /// TLS for host `name` over a connection that is open: the handshake comes with the first byte.
    #[must_use]
    pub fn over(&self, stream: TcpStream, name: &str) -> Session {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let connection = ClientConnection::new(Arc::clone(&self.config), name).unwrap();
        StreamOwned::new(connection, stream)
    }

    /// Asks `to` for `/` of host `name`. The second value tells whether a session was resumed.
    #[must_use]
    pub fn get(&self, network: &Network, from: Host, to: IpAddr, name: &str) -> (Reply, bool) {
        let mut stream = match connect(network, from, to) {
            Ok(stream) => self.over(stream, name),
            Err(reply) => return (reply, false),
        };
        let reply = exchange(&mut stream, name);
        let resumed = stream.conn.handshake_kind() == Some(HandshakeKind::Resumed);
        (reply.unwrap_or_else(|error| read_error(&error)), resumed)
    }
}

/// Sends bytes that are no TLS, and reads what comes back until the end.
///
/// # Errors
///
/// Returns what was seen instead of a connection.
pub fn speak(network: &Network, from: Host, to: IpAddr, bytes: &[u8]) -> Result<Vec<u8>, Reply> {
    let mut stream = connect(network, from, to)?;
    let mut answer = Vec::new();
    // A reset in answer is an end like any other.
    match stream
        .write_all(bytes)
        .and_then(|()| stream.read_to_end(&mut answer))
    {
        Ok(_) => Ok(answer),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(answer),
        Err(error) => Err(read_error(&error)),
    }
}

/// Opens a connection to port 443.
///
/// # Errors
///
/// Returns what was seen instead of one.
pub fn connect(network: &Network, from: Host, to: IpAddr) -> Result<TcpStream, Reply> {
    let address = SocketAddr::new(to, 443);
    let connected = network.on(from, || TcpStream::connect_timeout(&address, SYN_PATIENCE));
    match connected {
        Ok(stream) => {
            stream.set_nodelay(true).unwrap();
            stream.set_read_timeout(Some(crate::PATIENCE)).unwrap();
            stream.set_write_timeout(Some(crate::PATIENCE)).unwrap();
            Ok(stream)
        }
        Err(error) if error.kind() == ErrorKind::TimedOut => Err(Reply::Silence),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Err(Reply::Refused),
        // The listener was closed while the connection waited in its queue.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Err(Reply::Closed),
        Err(error) => panic!("{error}"),
    }
}

/// Opens a connection to port 443 from an address of the edge's.
#[must_use]
pub fn connect_from(network: &Network, source: IpAddr, to: IpAddr) -> TcpStream {
    network.on(Host::Edge, || {
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(SocketAddr::new(source, 0)),
            socket2::Type::STREAM,
            None,
        )
        .unwrap();
        socket.bind(&SocketAddr::new(source, 0).into()).unwrap();
        socket.connect(&SocketAddr::new(to, 443).into()).unwrap();
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(crate::PATIENCE)).unwrap();
        stream
    })
}

fn exchange(
    stream: &mut StreamOwned<ClientConnection, TcpStream>,
    name: &str,
) -> io::Result<Reply> {
    write!(
        stream,
        "GET / HTTP/1.0\r\nHost: {name}\r\nCF-Connecting-IP: {VISITOR}\r\nConnection: close\r\n\r\n"
    )?;
    let mut response = Vec::new();
    match stream.read_to_end(&mut response) {
        Ok(_) => {}
        // A server that ends without close_notify after its answer.
        Err(error) if error.kind() == ErrorKind::UnexpectedEof && !response.is_empty() => {}
        Err(error) => return Err(error),
    }
    let text = String::from_utf8_lossy(&response);
    let status = text
        .split_whitespace()
        .nth(1)
        .and_then(|status| status.parse().ok());
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok(status.map_or(Reply::Closed, |status| {
        Reply::Response(status, body.to_owned())
    }))
}

/// What an error on a connection looks like from outside.
#[must_use]
pub fn read_error(error: &io::Error) -> Reply {
    let tls = error
        .get_ref()
        .and_then(|error| error.downcast_ref::<TlsError>());
    match tls {
        Some(TlsError::AlertReceived(alert)) => Reply::Alert(*alert),
        Some(error) => panic!("the client itself refused: {error}"),
        None => Reply::Closed,
    }
}

/// The visitor's address that the edge tells the web server.
pub const VISITOR: &str = "192.0.2.99";
/// How long a dropped SYN is waited for: the stack sends a second one after a second.
const SYN_PATIENCE: Duration = Duration::from_millis(700);

/// The certificate that a client presents, if it has one.
#[derive(Debug)]
struct CertResolver(Mutex<Option<Arc<CertifiedKey>>>);

impl ResolvesClientCert for CertResolver {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.lock().unwrap().clone()
    }

    fn has_certs(&self) -> bool {
        self.0.lock().unwrap().is_some()
    }
}

fn certified(identity: &Identity) -> Arc<CertifiedKey> {
    let mut chain = vec![identity.certificate.clone()];
    chain.extend(identity.intermediates.iter().cloned());
    let key = any_supported_type(&identity.key()).unwrap();
    Arc::new(CertifiedKey::new(chain, key))
}

/// A session store that offers the last session to whomever is asked next.
#[derive(Debug, Default)]
struct AnyName {
    tls12: Mutex<Option<Tls12ClientSessionValue>>,
    tls13: Mutex<Vec<Tls13ClientSessionValue>>,
}

impl ClientSessionStore for AnyName {
    fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }

    fn set_tls12_session(&self, _: ServerName<'static>, value: Tls12ClientSessionValue) {
        *self.tls12.lock().unwrap() = Some(value);
    }

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.tls12.lock().unwrap().clone()
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {
        *self.tls12.lock().unwrap() = None;
    }

    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: Tls13ClientSessionValue) {
        self.tls13.lock().unwrap().push(value);
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.tls13.lock().unwrap().pop()
    }
}
