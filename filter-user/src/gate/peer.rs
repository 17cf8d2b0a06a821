//! The client's certificate: whether it may enter, at the handshake and at every resumption.

use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ServerConnection, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error as TlsError, HandshakeKind,
    RootCertStore, SignatureScheme,
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::credentials::{Authority, Validity};
use super::refusal::Refusal;

/// A client whose certificate was verified, by the clock of now.
///
/// The policy's verifier is the only one to make it, and the upstream is dialled only with one of
/// these in hand.
#[derive(Clone, Debug)]
pub struct VerifiedPeer {
    subject: String,
    trust: String,
    resumed: bool,
}

impl VerifiedPeer {
    /// The leaf's subject, escaped.
    #[must_use]
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// The CA that signed the leaf, as the configuration names it.
    #[must_use]
    pub fn trust(&self) -> &str {
        &self.trust
    }

    /// Whether the session was resumed, and the certificate verified anew.
    #[must_use]
    pub fn resumed(&self) -> bool {
        self.resumed
    }
}

/// Verifies client certificates for one policy.
#[derive(Debug)]
pub(super) struct PeerVerifier {
    anchors: Vec<Anchor>,
    /// For the signature checks, which depend on no anchor.
    schemes: Arc<dyn ClientCertVerifier>,
}

/// A CA, and webpki's verifier for that CA alone.
#[derive(Debug)]
struct Anchor {
    label: String,
    subject: Vec<u8>,
    validity: Validity,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl PeerVerifier {
    /// A verifier that accepts what any of these CAs has signed; there must be at least one.
    pub(super) fn new(
        authorities: Vec<Authority>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, TlsError> {
        let anchors = authorities
            .into_iter()
            .map(|authority| Anchor::new(authority, provider))
            .collect::<Result<Vec<_>, _>>()?;
        let schemes = match anchors.first() {
            Some(anchor) => Arc::clone(&anchor.verifier),
            None => return Err(TlsError::General("no trust anchor".to_owned())),
        };
        Ok(Self { anchors, schemes })
    }

    /// Takes the peer of a finished handshake as verified, or refuses it.
    ///
    /// rustls resumes a session without asking whether the certificate still holds, so a resumed
    /// one is verified here, against the clock and the anchors of now.
    pub(super) fn verified_peer(
        &self,
        connection: &ServerConnection,
        now: UnixTime,
    ) -> Result<VerifiedPeer, Refusal> {
        // What a client sends behind its chain is not verified: only element 0 is the identity.
        let certificates = connection.peer_certificates();
        let Some((leaf, intermediates)) = certificates.and_then(<[_]>::split_first) else {
            return Err(Refusal::NoCertificate);
        };
        let resumed = match connection.handshake_kind() {
            Some(HandshakeKind::Full | HandshakeKind::FullWithHelloRetryRequest) => false,
            Some(HandshakeKind::Resumed) | None => {
                self.verify(leaf, intermediates, now)
                    .map_err(|error| Refusal::from_tls(&error))?;
                true
            }
        };

        let parsed = X509Certificate::from_der(leaf);
        let (_, parsed) = parsed.map_err(|_unparsed| Refusal::BadCertificate)?;
        let subject = parsed.subject().to_string();
        let issuer = parsed.issuer().as_raw();
        let signer = self.anchors.iter().find(|anchor| anchor.subject == issuer);
        Ok(VerifiedPeer {
            subject: subject.escape_debug().to_string(),
            trust: signer
                .map_or("an intermediate", |anchor| &anchor.label)
                .to_owned(),
            resumed,
        })
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), TlsError> {
        // Origin pulls need one intermediate at most; webpki itself would try six.
        let intermediates = &intermediates[..intermediates.len().min(INTERMEDIATES_MAX)];
        let mut verdict = Err(CertificateError::UnknownIssuer.into());
        for anchor in self
            .anchors
            .iter()
            .filter(|anchor| anchor.validity.holds(now))
        {
            match anchor.verifier.verify_client_cert(leaf, intermediates, now) {
                Ok(_) => return Ok(()),
                // Another anchor may know the issuer; what is said of a known one tells more.
                Err(TlsError::InvalidCertificate(CertificateError::UnknownIssuer)) => {}
                Err(error) => verdict = Err(error),
            }
        }
        verdict
    }
}

impl Anchor {
    fn new(authority: Authority, provider: &Arc<CryptoProvider>) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        roots.add(authority.certificate)?;
        let builder =
            WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(provider));
        let verifier = builder
            .clear_root_hint_subjects()
            .build()
            .map_err(|error| TlsError::General(error.to_string()))?;
        Ok(Self {
            label: authority.label,
            subject: authority.subject,
            validity: authority.validity,
            verifier,
        })
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A stranger need not learn whom this host trusts; Cloudflare does not ask.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        self.verify(end_entity, intermediates, now)
            .map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.schemes.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.schemes.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes.supported_verify_schemes()
    }
}

/// Cloudflare's CA allows two (pathlen:2).
const INTERMEDIATES_MAX: usize = 2;
