//! The client's certificate as rustls asks about it, and as it is judged when a handshake is over,
//! be it a full one or a resumption.

use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, CommonState, DigitallySignedStruct, DistinguishedName, Error as TlsError,
    HandshakeKind, PeerIncompatible, SignatureScheme,
};
use webpki::{Error as WebpkiError, RawPublicKeyEntity};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::trust::{Identity, Trusted};
use crate::config::ClientAuth;
use crate::gate::refusal::Refusal;
use crate::gate::refused::{Presented, note};

/// A client that its host's policy lets in.
///
/// The policy's verifier is the only one to make it, by the clock of now, and the upstream is
/// dialled only with one of these in hand.
#[derive(Clone, Debug)]
pub struct VerifiedPeer {
    identity: Option<Arc<Identity>>,
    tolerated: Option<(Refusal, Option<Presented>)>,
    resumed: bool,
}

impl VerifiedPeer {
    /// Who it is; none, if the policy does not enforce that.
    #[must_use]
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_deref()
    }

    /// What it would have been refused for, had the policy enforced its trust.
    #[must_use]
    pub fn tolerated(&self) -> Option<(Refusal, Option<&Presented>)> {
        let (refusal, presented) = self.tolerated.as_ref()?;
        Some((*refusal, presented.as_ref()))
    }

    /// Whether the session was resumed, and the certificate verified again.
    #[must_use]
    pub fn resumed(&self) -> bool {
        self.resumed
    }
}

/// Verifies client certificates for one policy.
#[derive(Debug)]
pub(in crate::gate) struct PeerVerifier {
    trusted: Trusted,
    client_auth: ClientAuth,
}

impl PeerVerifier {
    pub(in crate::gate) fn new(trusted: Trusted, client_auth: ClientAuth) -> Self {
        Self {
            trusted,
            client_auth,
        }
    }

    /// Takes the peer of a finished handshake as verified, or refuses it.
    ///
    /// rustls resumes a session without asking whether the certificate still holds, so whatever
    /// the handshake was, the certificate is judged here, by the trust and the clock of now.
    pub(in crate::gate) fn verified_peer(
        &self,
        connection: &CommonState,
        now: UnixTime,
    ) -> Result<VerifiedPeer, (Refusal, Option<Presented>)> {
        let resumed = match connection.handshake_kind() {
            Some(HandshakeKind::Full | HandshakeKind::FullWithHelloRetryRequest) => false,
            Some(HandshakeKind::Resumed) | None => true,
        };
        let admitted = |identity, tolerated| VerifiedPeer {
            identity,
            tolerated,
            resumed,
        };
        if self.client_auth == ClientAuth::Off {
            return Ok(admitted(None, None));
        }
        // What a client sends behind its chain is not verified: only element 0 is the identity.
        let chain = connection.peer_certificates().unwrap_or_default();
        match (self.trusted.judge(chain, now), self.client_auth) {
            (Ok(identity), _) => Ok(admitted(Some(identity), None)),
            (Err(refusal), ClientAuth::Log) => {
                let presented = self.trusted.describe(chain);
                Ok(admitted(None, Some((refusal, presented))))
            }
            (Err(refusal), ClientAuth::Enforce | ClientAuth::Off) => {
                Err((refusal, self.trusted.describe(chain)))
            }
        }
    }

    fn algorithms(&self) -> &WebPkiSupportedAlgorithms {
        &self.trusted.algorithms
    }

    /// Notes whose key a client does not have.
    fn note_signature(
        &self,
        certificate: &CertificateDer<'_>,
        verified: Result<HandshakeSignatureValid, TlsError>,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verified.inspect_err(|error| {
            let chain = [CertificateDer::from(certificate.as_ref())];
            if let Some(presented) = self.trusted.describe(&chain) {
                note(Refusal::from_tls(error), presented);
            }
        })
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn offer_client_auth(&self) -> bool {
        self.client_auth != ClientAuth::Off
    }

    fn client_auth_mandatory(&self) -> bool {
        self.client_auth == ClientAuth::Enforce
    }

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
        // What is only logged is judged when the handshake is over.
        if self.client_auth == ClientAuth::Enforce {
            let borrowed = |certificate| CertificateDer::from(AsRef::<[u8]>::as_ref(certificate));
            let chain = std::iter::once(end_entity).chain(intermediates);
            let chain: Vec<CertificateDer<'_>> = chain.map(borrowed).collect();
            self.trusted.judge(&chain, now).map_err(|refusal| {
                if let Some(presented) = self.trusted.describe(&chain) {
                    note(refusal, presented);
                }
                refusal.into_tls()
            })?;
        }
        Ok(ClientCertVerified::assertion())
    }

    // rustls' own functions take no certificate of X.509 version 1, which a pin may name.

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let spki = public_key(cert)?;
        let key = RawPublicKeyEntity::try_from(&spki).map_err(|_bad| BAD_ENCODING)?;
        let mut mapping = self.algorithms().mapping.iter();
        let (_, algorithms) = mapping
            .find(|(scheme, _)| *scheme == dss.scheme)
            .ok_or(PeerIncompatible::NoSignatureSchemesInCommon)?;
        for algorithm in *algorithms {
            match key.verify_signature(*algorithm, message, dss.signature()) {
                Ok(()) => return Ok(HandshakeSignatureValid::assertion()),
                // TLS 1.2 leaves the curve open: another algorithm may be meant.
                Err(WebpkiError::UnsupportedSignatureAlgorithmForPublicKeyContext(_)) => {}
                Err(_) => break,
            }
        }
        self.note_signature(cert, Err(CertificateError::BadSignature.into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let key = public_key(cert)?;
        let verified = verify_tls13_signature_with_raw_key(message, &key, dss, self.algorithms());
        self.note_signature(cert, verified)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms().supported_schemes()
    }
}

/// The SubjectPublicKeyInfo of a certificate of any version.
fn public_key<'a>(
    certificate: &'a CertificateDer<'_>,
) -> Result<SubjectPublicKeyInfoDer<'a>, TlsError> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_bad| BAD_ENCODING)?;
    Ok(SubjectPublicKeyInfoDer::from(
        parsed.tbs_certificate.subject_pki.raw,
    ))
}

const BAD_ENCODING: TlsError = TlsError::InvalidCertificate(CertificateError::BadEncoding);
