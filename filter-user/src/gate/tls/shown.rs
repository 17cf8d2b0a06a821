//! The certificates that a host shows, as those by which its upstream is known: a web server on the same
//! port shows them too, from the same files.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error as TlsError, SignatureScheme};

use super::credentials::Certified;

/// The leaves that a host shows, and those of the files before they were last replaced: a web server reads
/// its files again at a reload of its own, and not when they change.
#[derive(Clone, Debug)]
pub(super) struct ShownCertificates {
    current: Vec<CertificateDer<'static>>,
    previous: Vec<CertificateDer<'static>>,
}

impl ShownCertificates {
    /// Those that were read, and what was known of the same host `before`.
    pub(super) fn new(certified: &[Certified], before: Option<&Self>) -> Self {
        let leaves = certified.iter();
        let leaves = leaves.filter_map(|shown| shown.key.cert.first().cloned());
        Self::following(leaves.collect(), before)
    }

    fn following(current: Vec<CertificateDer<'static>>, before: Option<&Self>) -> Self {
        let previous = match before {
            Some(before) if before.current == current => before.previous.clone(),
            Some(before) => before.current.clone(),
            None => Vec::new(),
        };
        Self { current, previous }
    }

    /// Accepts a server that shows one of them and has its key.
    ///
    /// Neither name nor dates are looked at: whatever a client makes of this certificate, it is the one that
    /// the gate shows the client.
    pub(super) fn verifier(&self, algorithms: WebPkiSupportedAlgorithms) -> ShownVerifier {
        ShownVerifier {
            certificates: self.clone(),
            algorithms,
        }
    }
}

/// See [`ShownCertificates::verifier`].
#[derive(Debug)]
pub(super) struct ShownVerifier {
    certificates: ShownCertificates,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for ShownVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let ShownCertificates { current, previous } = &self.certificates;
        if current
            .iter()
            .chain(previous)
            .any(|shown| shown == end_entity)
        {
            return Ok(ServerCertVerified::assertion());
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_of_before_the_last_replacement_are_known_too() {
        let leaf = |byte: u8| vec![CertificateDer::from(vec![byte])];
        let first = ShownCertificates::following(leaf(1), None);
        let second = ShownCertificates::following(leaf(2), Some(&first));
        // Files of other hosts were read again.
        let again = ShownCertificates::following(leaf(2), Some(&second));
        let third = ShownCertificates::following(leaf(3), Some(&again));

        assert_eq!((first.current, first.previous), (leaf(1), Vec::new()));
        assert_eq!((again.current, again.previous), (leaf(2), leaf(1)));
        assert_eq!((third.current, third.previous), (leaf(3), leaf(2)));
    }
}
