//! As whom the origin is visited: with no certificate, with forged ones, and with the operator's own.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;

use super::target::ProbeError;
use crate::cli::ProbeArgs;

/// Who visits.
pub(super) struct Visitors {
    /// Certificates that no origin should take, each with what it is.
    pub(super) forged: Vec<(&'static str, Arc<CertifiedKey>)>,
    /// What Cloudflare presents, if it was given.
    pub(super) own: Option<Arc<CertifiedKey>>,
    /// What the site has to refuse: expired, revoked, or another site's, if it was given.
    pub(super) other: Option<Arc<CertifiedKey>>,
    /// Other names that the origin serves.
    pub(super) other_names: Vec<String>,
}

impl Visitors {
    /// Makes the forged ones, and reads the operator's.
    pub(super) fn new(arguments: &ProbeArgs) -> Result<Self, ProbeError> {
        let pair = |cert: &Option<PathBuf>, key: &Option<PathBuf>| {
            let files = cert.as_deref().zip(key.as_deref());
            files.map(read).transpose()
        };
        Ok(Self {
            forged: forge()?,
            own: pair(&arguments.cert, &arguments.key)?,
            other: pair(&arguments.other_cert, &arguments.other_key)?,
            other_names: arguments.other_name.clone(),
        })
    }
}

fn read((cert, key): (&Path, &Path)) -> Result<Arc<CertifiedKey>, ProbeError> {
    let blame = |path: &Path, error: String| ProbeError::Identity {
        path: path.to_owned(),
        source: io::Error::other(error),
    };
    let chain = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect);
    let chain: Vec<_> = chain.map_err(|error| blame(cert, error.to_string()))?;
    let private = PrivateKeyDer::from_pem_file(key);
    let private = private.map_err(|error| blame(key, error.to_string()))?;
    let provider = aws_lc_rs::default_provider();
    let pair = CertifiedKey::from_der(chain, private, &provider);
    let pair = pair.map_err(|error| blame(cert, error.to_string()))?;
    Ok(Arc::new(pair))
}

/// A self-signed certificate, and one of a CA that has the name of Cloudflare's.
fn forge() -> Result<Vec<(&'static str, Arc<CertifiedKey>)>, ProbeError> {
    let forged = || -> Result<Vec<_>, rcgen::Error> {
        let key = KeyPair::generate()?;
        let alone = leaf().self_signed(&key)?.der().clone();
        let mut authority = CertificateParams::default();
        for (kind, value) in CLOUDFLARES {
            authority.distinguished_name.push(kind, value);
        }
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = Issuer::new(authority, KeyPair::generate()?);
        let signed_key = KeyPair::generate()?;
        let signed = leaf().signed_by(&signed_key, &issuer)?.der().clone();
        Ok(vec![
            ("a self-signed certificate", alone, key),
            (
                "the certificate of another CA, which has the name of Cloudflare's",
                signed,
                signed_key,
            ),
        ])
    };
    let forged = forged().map_err(ProbeError::Forging)?.into_iter();
    let pairs = forged.map(|(what, certificate, key)| {
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let pair = CertifiedKey::from_der(vec![certificate], key, &aws_lc_rs::default_provider());
        let pair = pair.map_err(|_unlike| ProbeError::Ended)?;
        Ok((what, Arc::new(pair)))
    });
    pairs.collect()
}

fn leaf() -> CertificateParams {
    named("pullgate probe")
}

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

/// The name of Cloudflare's origin-pull CA, as its certificate has it.
const CLOUDFLARES: [(DnType, &str); 6] = [
    (DnType::CountryName, "US"),
    (DnType::OrganizationName, "CloudFlare, Inc."),
    (DnType::OrganizationalUnitName, "Origin Pull"),
    (DnType::LocalityName, "San Francisco"),
    (DnType::StateOrProvinceName, "California"),
    (DnType::CommonName, "origin-pull.cloudflare.net"),
];
