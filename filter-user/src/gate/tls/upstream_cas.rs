//! The certificates in an upstream's `ca_file`: CAs, and servers' own, which openssl(1) makes as CAs too.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, DigitallySignedStruct, Error as TlsError, RootCertStore, SignatureScheme,
};
use webpki::EndEntityCert;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::validity::Validity;
use crate::config::{ConfigError, Located};
use crate::gate::refusal::Refusal;

/// Accepts a server whose certificate is in the file, or comes from one that is.
///
/// A self-signed certificate of `openssl req -x509` says that it is a CA. webpki refuses such a one as a server's;
/// curl, nginx and OpenSSL take it if it is the very one that they were given, and so is it here.
#[derive(Debug)]
pub(super) struct UpstreamCas {
    certificates: Vec<CertificateDer<'static>>,
    chains: Arc<WebPkiServerVerifier>,
}

impl UpstreamCas {
    pub(super) fn new(
        file: &Located<PathBuf>,
        certificates: Vec<CertificateDer<'static>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, ConfigError> {
        let Located { value: path, place } = file;
        let mut roots = RootCertStore::empty();
        for certificate in &certificates {
            roots.add(certificate.clone()).map_err(|error| {
                place.error(format_args!(
                    "a certificate in {} cannot be trusted: {error}",
                    path.display()
                ))
            })?;
        }
        let roots = Arc::new(roots);
        let chains =
            WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(provider)).build();
        Ok(Self {
            certificates,
            chains: chains.map_err(|error| place.error(error))?,
        })
    }
}

impl ServerCertVerifier for UpstreamCas {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        if !self.certificates.iter().any(|known| known == end_entity) {
            let chains = &self.chains;
            return chains.verify_server_cert(end_entity, intermediates, server_name, ocsp, now);
        }
        let (_, parsed) = X509Certificate::from_der(end_entity)
            .map_err(|_unparsed| CertificateError::BadEncoding)?;
        if let Some(refusal) = Validity::of(&parsed).refuse(now) {
            return Err(Refusal::into_tls(refusal));
        }
        let leaf = EndEntityCert::try_from(end_entity)
            .map_err(|_unparsed| CertificateError::BadEncoding)?;
        leaf.verify_is_valid_for_subject_name(server_name)
            .map_err(|_other_name| CertificateError::NotValidForName)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.chains
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.chains
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
}
