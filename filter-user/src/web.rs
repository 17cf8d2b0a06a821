//! The web server on this host, asked as a client without a certificate would ask: an address in,
//! what it demands out.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error as TlsError, SignatureScheme,
    StreamOwned,
};

use crate::gate;
use crate::sync::lock;

/// What a web server demands of a client.
#[derive(Debug)]
pub enum Demand {
    /// A certificate: it refused the handshake, or the request.
    Certificate(Issuers),
    /// Nothing: it answered the request, with this status if it was HTTP.
    Nothing(Option<u16>),
    /// It speaks no TLS.
    NoTls,
    /// It refused, and that may have been for the name.
    Unknown(io::Error),
}

/// Which CAs the certificate may be from, as far as the server says (RFC 8446 §4.2.4).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Issuers {
    /// Cloudflare's shared one among them.
    Shared,
    /// Others only.
    Others,
    /// It does not say.
    Unsaid,
}

/// Asks the server at an address of this host for a page, for two seconds to connect and as
/// long for the rest.
///
/// It is asked by no name, so by its default site: which names it serves is not known here.
#[must_use]
pub fn demand(address: SocketAddr) -> Demand {
    let asked = Arc::new(Asked::default());
    match ask(address, &asked) {
        Ok(answer) => read_answer(&answer, asked.issuers()),
        Err(error) => classify(error, asked.issuers()),
    }
}

fn ask(address: SocketAddr, asked: &Arc<Asked>) -> io::Result<String> {
    let stream = TimedStream {
        deadline: Instant::now() + TIMEOUT,
        stream: TcpStream::connect_timeout(&address, TIMEOUT)?,
    };
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Indifferent(provider)))
        .with_client_cert_resolver(Arc::clone(asked) as _);
    let session = ClientConnection::new(Arc::new(config), ServerName::from(address.ip()));
    let mut stream = StreamOwned::new(session.map_err(io::Error::other)?, stream);
    write!(
        stream,
        "GET / HTTP/1.1\r\nHost: {address}\r\nUser-Agent: pullgate\r\nConnection: close\r\n\r\n"
    )?;
    stream.flush()?;

    let mut answer = Vec::new();
    let mut part = [0; 1024];
    // An answer's head, and the words of a page that refuses.
    for _ in 0..READS_MAX {
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(read) => answer.extend_from_slice(&part[..read]),
            // Part of an answer says enough; before it, there is the alert of TLS 1.3.
            Err(_) if !answer.is_empty() => break,
            Err(error) => return Err(error),
        }
    }
    if answer.is_empty() {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// nginx refuses the request and not the handshake, with a page that names the certificate.
fn read_answer(answer: &str, issuers: Option<Issuers>) -> Demand {
    let status = answer
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.get(2..5))
        .and_then(|status| status.parse().ok());
    let is_refused = matches!(status, Some(400 | 403 | 495 | 496));
    if is_refused && answer.to_ascii_lowercase().contains("certificate") {
        return Demand::Certificate(issuers.unwrap_or(Issuers::Unsaid));
    }
    Demand::Nothing(status)
}

/// TLS 1.2 has no alert of its own for the certificate that was asked for and is not there.
fn classify(error: io::Error, issuers: Option<Issuers>) -> Demand {
    let source = error.get_ref();
    let tls = source.and_then(|source| source.downcast_ref::<TlsError>());
    match (tls, issuers) {
        (Some(TlsError::AlertReceived(_)), Some(issuers)) => Demand::Certificate(issuers),
        (Some(TlsError::InvalidMessage(_)), _) => Demand::NoTls,
        (_, _) => Demand::Unknown(error),
    }
}

/// Has no certificate, and remembers what was asked for.
#[derive(Debug, Default)]
struct Asked(Mutex<Option<Issuers>>);

impl Asked {
    fn issuers(&self) -> Option<Issuers> {
        *lock(&self.0)
    }
}

impl ResolvesClientCert for Asked {
    fn resolve(&self, issuers: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let is_shared = |issuer: &&[u8]| gate::is_shared_authority(issuer);
        *lock(&self.0) = Some(match issuers {
            [] => Issuers::Unsaid,
            issuers if issuers.iter().any(is_shared) => Issuers::Shared,
            _ => Issuers::Others,
        });
        None
    }

    fn has_certs(&self) -> bool {
        // Else it would not be called.
        true
    }
}

/// A stream that ends at a deadline, however slowly it goes.
struct TimedStream {
    stream: TcpStream,
    deadline: Instant,
}

impl TimedStream {
    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            Err(ErrorKind::TimedOut.into())
        } else {
            Ok(left)
        }
    }
}

impl Read for TimedStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(into)
    }
}

impl Write for TimedStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// Takes any certificate: it is not for us to trust the server.
#[derive(Debug)]
struct Indifferent(Arc<CryptoProvider>);

impl ServerCertVerifier for Indifferent {
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

/// How long a server may take.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Reads of 1 KiB at most that an answer is worth.
const READS_MAX: usize = 8;
