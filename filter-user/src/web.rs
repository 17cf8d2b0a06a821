//! The web server on this host, asked as a client without a certificate would ask: an address in,
//! what it demands out.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error as TlsError, SignatureScheme,
    StreamOwned,
};

/// What a web server demands of a client.
#[derive(Debug)]
pub enum Demand {
    /// A certificate: it refused the handshake, or the request.
    Certificate,
    /// Nothing: it answered the request, with this status if it was HTTP.
    Nothing(Option<u16>),
    /// It speaks no TLS.
    NoTls,
    /// It refused, and that may have been for the name.
    Unknown(io::Error),
}

/// Asks the server that listens at `listener` for a page, over loopback if it is there too.
///
/// It is asked by no name: which names it serves is not known here. Each step takes
/// [`TIMEOUT`] at most.
#[must_use]
pub fn demand(listener: SocketAddr) -> Demand {
    let loopback = match listener.ip() {
        IpAddr::V4(address) if address.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(address) if address.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V4(_) | IpAddr::V6(_) => listener.ip(),
    };
    let address = SocketAddr::new(loopback, listener.port());
    let asked = Arc::new(Asked::default());
    ask(address, &asked).unwrap_or_else(|error| classify(error, asked.0.load(Ordering::Relaxed)))
}

fn ask(address: SocketAddr, asked: &Arc<Asked>) -> io::Result<Demand> {
    let stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
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
    while answer.len() < ANSWER_MAX {
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
    Ok(read_answer(&String::from_utf8_lossy(&answer)))
}

/// nginx refuses the request and not the handshake, with a page that names the certificate.
fn read_answer(answer: &str) -> Demand {
    let status = answer
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.get(2..5))
        .and_then(|status| status.parse().ok());
    let is_refused = matches!(status, Some(400 | 403 | 495 | 496));
    if is_refused && answer.to_ascii_lowercase().contains("certificate") {
        return Demand::Certificate;
    }
    Demand::Nothing(status)
}

/// TLS 1.2 has no alert of its own for the certificate that was asked for and is not there.
fn classify(error: io::Error, was_asked: bool) -> Demand {
    let source = error.get_ref();
    let tls = source.and_then(|source| source.downcast_ref::<TlsError>());
    match tls {
        Some(TlsError::AlertReceived(_)) if was_asked => Demand::Certificate,
        Some(TlsError::InvalidMessage(_)) => Demand::NoTls,
        Some(_) | None => Demand::Unknown(error),
    }
}

/// Has no certificate, and remembers whether one was asked for.
#[derive(Debug, Default)]
struct Asked(AtomicBool);

impl ResolvesClientCert for Asked {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.store(true, Ordering::Relaxed);
        None
    }

    fn has_certs(&self) -> bool {
        // Else it would not be called.
        true
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

/// How long each step may take.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of an answer that are read.
const ANSWER_MAX: usize = 16 << 10;
