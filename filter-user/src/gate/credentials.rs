//! Reading certificates, keys and CAs from disk. Whatever is not right is blamed on the place in
//! the configuration that names the file.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::config::{ConfigError, Located, Place, Trust};

/// A certificate chain, leaf first.
pub(super) struct Chain {
    pub(super) certificates: Vec<CertificateDer<'static>>,
    /// When the leaf expires, seconds since the UNIX epoch.
    pub(super) not_after: i64,
}

/// A CA that client certificates may come from.
pub(super) struct Authority {
    pub(super) certificate: CertificateDer<'static>,
    /// The file, or `cloudflare`.
    pub(super) label: String,
    /// Its distinguished name, DER.
    pub(super) subject: Vec<u8>,
    pub(super) validity: Validity,
}

/// Seconds since the UNIX epoch, both included.
#[derive(Clone, Copy, Debug)]
pub(super) struct Validity {
    pub(super) not_before: i64,
    pub(super) not_after: i64,
}

impl Validity {
    pub(super) fn holds(self, now: UnixTime) -> bool {
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        (self.not_before..=self.not_after).contains(&now)
    }
}

/// Reads a server's certificate chain.
pub(super) fn chain(path: &Located<impl AsRef<Path>>, now: UnixTime) -> Result<Chain, ConfigError> {
    let Located { value: path, place } = path;
    let path = path.as_ref();
    let certificates = certificates(place, path)?;
    let leaf = parse(place, path, &certificates[0])?;
    let validity = validity(&leaf);
    if !validity.holds(now) {
        return Err(place.error(format_args!(
            "the certificate in {} is valid from {} to {}, not now; renew it, or set the clock",
            path.display(),
            leaf.validity().not_before,
            leaf.validity().not_after
        )));
    }
    Ok(Chain {
        not_after: validity.not_after,
        certificates,
    })
}

/// Reads a private key, which nobody else on the host may be able to read.
pub(super) fn key(path: &Located<impl AsRef<Path>>) -> Result<PrivateKeyDer<'static>, ConfigError> {
    let Located { value: path, place } = path;
    let path = path.as_ref();
    let pem = read(place, path)?;
    let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| {
        place.error(format_args!(
            "{} holds no private key ({}); it must be PEM, PKCS#8, PKCS#1 or SEC1, without a \
             passphrase",
            path.display(),
            describe(&error)
        ))
    })?;
    let mode = fs::metadata(path).map_or(0, |metadata| metadata.permissions().mode());
    if mode & 0o007 != 0 {
        return Err(place.error(format_args!(
            "the key {} is open to every user of this host; `chmod 600` it",
            path.display()
        )));
    }
    Ok(key)
}

/// Reads the CAs that a `trust` entry names.
pub(super) fn authorities(
    trust: &Located<Trust>,
    now: UnixTime,
) -> Result<Vec<Authority>, ConfigError> {
    let Located { value, place } = trust;
    let (path, pem) = match value {
        Trust::Cloudflare => (Path::new("cloudflare"), CLOUDFLARE_CA.to_vec()),
        Trust::CaFile(path) => (path.as_path(), read(place, path)?),
    };
    let certificates = pem_certificates(place, path, &pem)?;
    certificates
        .into_iter()
        .map(|certificate| authority(place, path, certificate, now))
        .collect()
}

fn authority(
    place: &Place,
    path: &Path,
    certificate: CertificateDer<'static>,
    now: UnixTime,
) -> Result<Authority, ConfigError> {
    let parsed = parse(place, path, &certificate)?;
    let subject = parsed.subject().to_string();
    let constraints = parsed.basic_constraints().ok().flatten();
    if !constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err(place.error(format_args!(
            "`{}` in {} is not a CA certificate; name the CA that signed the client certificate, \
             not the certificate itself",
            subject.escape_debug(),
            path.display()
        )));
    }
    // webpki does not look at a root's own validity.
    let validity = validity(&parsed);
    if !validity.holds(now) {
        return Err(place.error(format_args!(
            "the CA `{}` in {} is valid from {} to {}, not now; replace it",
            subject.escape_debug(),
            path.display(),
            parsed.validity().not_before,
            parsed.validity().not_after
        )));
    }
    Ok(Authority {
        label: path.display().to_string(),
        subject: parsed.subject().as_raw().to_vec(),
        validity,
        certificate,
    })
}

fn certificates(place: &Place, path: &Path) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let pem = read(place, path)?;
    pem_certificates(place, path, &pem)
}

/// The library prints the names of PEM sections as lists of numbers.
fn describe(error: &pem::Error) -> &'static str {
    match error {
        pem::Error::MissingSectionEnd { .. } => "it ends inside a section",
        pem::Error::IllegalSectionStart { .. } => "a section begins wrongly",
        pem::Error::Base64Decode(_) => "a section is not Base64",
        pem::Error::Io(_) => "it cannot be read",
        pem::Error::NoItemsFound => "it has no PEM section of that kind",
        pem::Error::SectionTooLarge | _ => "it is not PEM",
    }
}

/// At least one certificate.
fn pem_certificates(
    place: &Place,
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let certificates = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| {
            let problem = describe(&error);
            place.error(format_args!(
                "{} is damaged ({problem}); copy it again, whole",
                path.display()
            ))
        })?;
    if certificates.is_empty() {
        return Err(place.error(format_args!(
            "{} holds no certificate; it must be PEM, beginning with `-----BEGIN CERTIFICATE-----`",
            path.display()
        )));
    }
    Ok(certificates)
}

fn parse<'a>(
    place: &Place,
    path: &Path,
    certificate: &'a CertificateDer<'_>,
) -> Result<X509Certificate<'a>, ConfigError> {
    let parsed = X509Certificate::from_der(certificate);
    let (_, parsed) = parsed.map_err(|error| {
        place.error(format_args!(
            "a certificate in {} cannot be parsed: {error}",
            path.display()
        ))
    })?;
    Ok(parsed)
}

fn validity(certificate: &X509Certificate<'_>) -> Validity {
    Validity {
        not_before: certificate.validity().not_before.timestamp(),
        not_after: certificate.validity().not_after.timestamp(),
    }
}

fn read(place: &Place, path: &Path) -> Result<Vec<u8>, ConfigError> {
    let mut content = Vec::new();
    File::open(path)
        .and_then(|file| file.take(FILE_MAX + 1).read_to_end(&mut content))
        .and_then(|length| match length as u64 {
            0..=FILE_MAX => Ok(()),
            _ => Err(io::Error::new(ErrorKind::FileTooLarge, "larger than 1 MiB")),
        })
        .map_err(|error| {
            place.error(format_args!(
                "{} cannot be read: {error}; is the path right, and may this user read it?{}",
                path.display(),
                hint(path)
            ))
        })?;
    Ok(content)
}

/// A word that looks like Cloudflare's own CA is taken for a path unless it is spelt exactly.
fn hint(path: &Path) -> &'static str {
    let name = path.file_name().and_then(|name| name.to_str());
    match name {
        Some(name) if name.eq_ignore_ascii_case("cloudflare") => {
            " Cloudflare's shared CA is written \"cloudflare\"."
        }
        Some(_) | None => "",
    }
}

/// Cloudflare's origin-pull CA, valid until 2029-11-01.
///
/// <https://developers.cloudflare.com/ssl/static/authenticated_origin_pull_ca.pem>, SHA-256
/// fingerprint 9A:1A:C2:B4:BE:15:F9:F2:7E:EE:20:A7:34:CB:A4:E9:89:8F:61:00:1B:3B:D7:C8:4B:69:B5:6A:\
/// 3E:25:A2:B9.
const CLOUDFLARE_CA: &[u8] = include_bytes!("../../baseline/authenticated_origin_pull_ca.pem");
/// Bytes that are read of a PEM file.
const FILE_MAX: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_origin_pull_ca_is_the_published_one() {
        let der = CertificateDer::from_pem_slice(CLOUDFLARE_CA).unwrap();

        let digest = rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256
            .tls13()
            .unwrap()
            .common
            .hash_provider
            .hash(&der);

        let hex: String = digest
            .as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(
            hex,
            "9a1ac2b4be15f9f27eee20a734cba4e9898f61001b3bd7c84b69b56a3e25a2b9"
        );
    }
}
