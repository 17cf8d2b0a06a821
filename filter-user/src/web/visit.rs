//! One visit to a web server, by a client that verifies nothing: who it says it is in, what it was shown and
//! answered out. Bounded in time and bytes, whatever the server sends.

use std::collections::VecDeque;
use std::fmt::{self, Display, Formatter};
use std::io::{self, ErrorKind, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    ClientSessionStore, ResolvesClientCert, Resumption, Tls12ClientSessionValue,
    Tls13ClientSessionValue,
};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, DigitallySignedStruct, Error as TlsError,
    HandshakeKind, NamedGroup, SignatureScheme, StreamOwned, SupportedProtocolVersion,
};

use crate::gate;
use crate::host::deadline::{DeadlineStream, is_late};
use crate::sync::lock;

mod answer;
mod http2;

pub use self::answer::Answer;

/// Who comes, by which name, and what for.
#[derive(Clone, Debug)]
pub struct Visit<'a> {
    /// Where the server is.
    pub address: SocketAddr,
    /// The server name in the ClientHello; none, if none is sent.
    pub server_name: Option<&'a str>,
    /// The request's `Host`.
    pub host: &'a str,
    /// What is asked for.
    pub path: &'a str,
    /// The versions of TLS that are offered.
    pub versions: &'a [&'static SupportedProtocolVersion],
    /// The client certificate, if one is presented.
    pub identity: Option<Arc<CertifiedKey>>,
    /// What is sent before the ClientHello.
    pub before: &'a [u8],
    /// Further lines of the request's head, each with its end.
    pub headers: &'a str,
    /// What is kept of earlier visits, and of this one.
    pub memory: Option<&'a ClientMemory>,
    /// How long the server may take for all that follows its first packet.
    pub patience: Duration,
}

/// Sessions that a client keeps, whatever the name they were made for: a server has to tell them apart.
#[derive(Clone, Debug)]
pub struct ClientMemory {
    sessions: Arc<NamelessSessions>,
    // A session belongs to the client that made it.
    identity: Arc<ClientIdentity>,
    verifier: Arc<AcceptAnyCertificate>,
}

/// What came of a visit.
#[derive(Debug)]
pub struct Visited {
    /// The server's own certificate, if it was shown.
    pub shown: Option<CertificateDer<'static>>,
    /// Which CAs' certificates it requested, if it requested one.
    pub requested: Option<Issuers>,
    /// Whether it went on with an earlier session.
    pub is_resumed: bool,
    /// How it ended.
    pub ending: Ending,
}

/// How a visit ended.
#[derive(Debug)]
pub enum Ending {
    /// Nothing came back to the first packet.
    Silence,
    /// No program listens there, or a firewall says so.
    NotListening(io::Error),
    /// It was not asked, as this host cannot.
    NotAsked(io::Error),
    /// It took the connection, and then too much time.
    Late,
    /// What came back is no TLS.
    NoTls,
    /// The handshake was refused, by an alert or by hanging up.
    Refused(io::Error),
    /// A request was answered.
    Answered(Answer),
}

impl Ending {
    /// Whether nothing came back that says anything of what was asked.
    #[must_use]
    pub fn is_unanswered(&self) -> bool {
        matches!(
            self,
            Self::Silence | Self::Late | Self::NotListening(_) | Self::NotAsked(_)
        )
    }

    /// The answer, if there is one.
    #[must_use]
    pub fn answer(self) -> Option<Answer> {
        match self {
            Self::Answered(answer) => Some(answer),
            Self::Silence
            | Self::NotListening(_)
            | Self::NotAsked(_)
            | Self::Late
            | Self::NoTls
            | Self::Refused(_) => None,
        }
    }
}

impl Display for Ending {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silence => f.write_str("silence"),
            Self::NotListening(error) => write!(f, "no program answers ({error})"),
            Self::NotAsked(error) => write!(f, "this host cannot ask ({error})"),
            Self::Late => f.write_str("no answer in time"),
            Self::NoTls => f.write_str("an answer that is no TLS"),
            Self::Refused(error) => write!(f, "the handshake was refused ({error})"),
            Self::Answered(_) => f.write_str("an answer"),
        }
    }
}

/// Which CAs a certificate may be from, as far as the server says (RFC 8446 §4.2.4).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Issuers {
    /// Cloudflare's shared one among them.
    Shared,
    /// Others only.
    Others,
    /// It does not say.
    Unsaid,
}

impl<'a> Visit<'a> {
    /// A stranger's, who asks by the address.
    #[must_use]
    pub fn new(address: SocketAddr, host: &'a str) -> Self {
        Self {
            address,
            server_name: None,
            host,
            path: "/",
            versions: rustls::DEFAULT_VERSIONS,
            identity: None,
            before: &[],
            headers: "",
            memory: None,
            patience: ANSWER_TIMEOUT,
        }
    }

    /// Connects, asks, and leaves.
    #[must_use]
    pub fn connect(&self) -> Visited {
        let memory = self.memory.cloned().unwrap_or_default();
        memory.identity.begin(self.identity.clone());
        let mut visited = Visited {
            shown: None,
            requested: None,
            is_resumed: false,
            ending: Ending::Silence,
        };
        let stream = match TcpStream::connect_timeout(&self.address, CONNECT_TIMEOUT) {
            Ok(stream) => stream,
            Err(error) => {
                // A firewall says the last of them; so does a network where no such host is.
                let refused = [
                    ErrorKind::ConnectionRefused,
                    ErrorKind::ConnectionReset,
                    ErrorKind::HostUnreachable,
                ];
                visited.ending = if error.kind() == ErrorKind::TimedOut {
                    Ending::Silence
                } else if refused.contains(&error.kind()) {
                    Ending::NotListening(error)
                } else {
                    Ending::NotAsked(error)
                };
                return visited;
            }
        };
        let mut stream = match self.session(&memory) {
            Ok(session) => StreamOwned::new(session, within(self.patience, stream)),
            Err(error) => {
                visited.ending = Ending::NotAsked(error);
                return visited;
            }
        };
        let outcome = self.ask(&mut stream);
        let session = &stream.conn;
        let shown = session.peer_certificates().and_then(<[_]>::first);
        visited.shown = shown.map(|shown| shown.clone().into_owned());
        visited.requested = *lock(&memory.identity.requested);
        visited.is_resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
        visited.ending = match outcome {
            Ok(answer) => Ending::Answered(answer),
            Err(error) if is_no_tls(&error) => Ending::NoTls,
            Err(error) if is_late(&error) => Ending::Late,
            Err(error) => Ending::Refused(error),
        };
        visited
    }

    fn session(&self, memory: &ClientMemory) -> io::Result<ClientConnection> {
        let (config, name) = self.client(memory)?;
        ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)
    }

    /// What it offers, and to whom.
    fn client(&self, memory: &ClientMemory) -> io::Result<(ClientConfig, ServerName<'static>)> {
        let provider = Arc::clone(&memory.verifier.0);
        let verifier = Arc::clone(&memory.verifier);
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(self.versions)
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::clone(&memory.identity) as _);
        config.resumption = Resumption::store(Arc::clone(&memory.sessions) as _);
        config.enable_sni = self.server_name.is_some();
        let name = match self.server_name {
            Some(name) => ServerName::try_from(name.to_owned()).map_err(io::Error::other)?,
            None => ServerName::from(self.address.ip()),
        };
        Ok((config, name))
    }

    fn ask(
        &self,
        stream: &mut StreamOwned<ClientConnection, DeadlineStream<TcpStream>>,
    ) -> io::Result<Answer> {
        stream.sock.write_all(self.before)?;
        stream.write_all(request(self.host, self.path, self.headers).as_bytes())?;
        stream.flush()?;
        Answer::read(stream)
    }
}

/// What a server answers to a request in clear text, where TLS is expected.
///
/// # Errors
///
/// Returns why there is no answer.
pub fn ask_in_clear_text(address: SocketAddr, host: &str, path: &str) -> io::Result<Answer> {
    let stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)?;
    let mut stream = within(ANSWER_TIMEOUT, stream);
    stream.write_all(request(host, path, "").as_bytes())?;
    Answer::read(&mut stream)
}

fn request(host: &str, path: &str, headers: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {AGENT}\r\n{headers}Connection: close\r\n\r\n"
    )
}

/// What is left of a connection: the time for an answer.
fn within(patience: Duration, stream: TcpStream) -> DeadlineStream<TcpStream> {
    DeadlineStream::new(stream, Instant::now() + patience)
}

/// Whether an error is one of TLS, and which.
pub(super) fn tls_error(error: &io::Error) -> Option<&TlsError> {
    error.get_ref()?.downcast_ref::<TlsError>()
}

/// Whether the server says that it is the client's certificate that it refuses (RFC 8446 §6.2).
#[must_use]
pub fn is_about_certificate(error: &io::Error) -> bool {
    let Some(TlsError::AlertReceived(alert)) = tls_error(error) else {
        return false;
    };
    let about_certificates = [
        AlertDescription::AccessDenied,
        AlertDescription::BadCertificate,
        AlertDescription::CertificateExpired,
        AlertDescription::CertificateRequired,
        AlertDescription::CertificateRevoked,
        AlertDescription::CertificateUnknown,
        AlertDescription::DecryptError,
        AlertDescription::UnknownCA,
        AlertDescription::UnsupportedCertificate,
    ];
    about_certificates.contains(alert)
}

/// Whether it is the version of TLS that the server does not speak.
#[must_use]
pub fn is_about_version(error: &io::Error) -> bool {
    matches!(
        tls_error(error),
        Some(
            TlsError::AlertReceived(AlertDescription::ProtocolVersion)
                | TlsError::PeerIncompatible(_)
        )
    )
}

fn is_no_tls(error: &io::Error) -> bool {
    matches!(tls_error(error), Some(TlsError::InvalidMessage(_)))
}

impl ClientMemory {
    /// Nothing as yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            sessions: Arc::default(),
            identity: Arc::default(),
            verifier: Arc::new(AcceptAnyCertificate(
                Arc::new(aws_lc_rs::default_provider()),
            )),
        }
    }

    /// Whether there is no session to offer.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        lock(&self.sessions.tls12).is_none() && lock(&self.sessions.tls13).is_empty()
    }
}

impl Default for ClientMemory {
    fn default() -> Self {
        Self::new()
    }
}

/// The last sessions, for one name and any other.
#[derive(Debug, Default)]
struct NamelessSessions {
    tls12: Mutex<Option<Tls12ClientSessionValue>>,
    tls13: Mutex<VecDeque<Tls13ClientSessionValue>>,
    group: Mutex<Option<NamedGroup>>,
}

impl ClientSessionStore for NamelessSessions {
    fn set_kx_hint(&self, _: ServerName<'static>, group: NamedGroup) {
        *lock(&self.group) = Some(group);
    }

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        *lock(&self.group)
    }

    fn set_tls12_session(&self, _: ServerName<'static>, session: Tls12ClientSessionValue) {
        *lock(&self.tls12) = Some(session);
    }

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        lock(&self.tls12).clone()
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {
        *lock(&self.tls12) = None;
    }

    fn insert_tls13_ticket(&self, _: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        let mut tickets = lock(&self.tls13);
        tickets.truncate(TICKETS_MAX - 1);
        tickets.push_front(ticket);
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        lock(&self.tls13).pop_front()
    }
}

/// Presents what it has, and remembers what was requested.
#[derive(Debug, Default)]
struct ClientIdentity {
    presented: Mutex<Option<Arc<CertifiedKey>>>,
    requested: Mutex<Option<Issuers>>,
}

impl ClientIdentity {
    fn begin(&self, presented: Option<Arc<CertifiedKey>>) {
        *lock(&self.presented) = presented;
        *lock(&self.requested) = None;
    }
}

impl ResolvesClientCert for ClientIdentity {
    fn resolve(&self, issuers: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let is_shared = |issuer: &&[u8]| gate::is_shared_authority(issuer);
        *lock(&self.requested) = Some(match issuers {
            [] => Issuers::Unsaid,
            issuers if issuers.iter().any(is_shared) => Issuers::Shared,
            _ => Issuers::Others,
        });
        lock(&self.presented).clone()
    }

    fn has_certs(&self) -> bool {
        // Else it would not be called.
        true
    }
}

/// Takes any certificate: it is not for us to trust the server.
#[derive(Debug)]
struct AcceptAnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = self.0.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}

/// Says honestly who asks.
const AGENT: &str = concat!("pullgate/", env!("CARGO_PKG_VERSION"));
/// How long a server may take to answer the first packet.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long it may take for all that follows.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Tickets of a server that are kept.
const TICKETS_MAX: usize = 4;
