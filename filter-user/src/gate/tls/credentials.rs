//! Reading certificates, keys, CAs and revocation lists from disk. Whatever is not right is blamed
//! on the place in the configuration that names the file.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::{Gid, getegid, geteuid, getgroups};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs1KeyDer, PrivatePkcs8KeyDer, PrivateSec1KeyDer,
};
use rustls::sign::{CertifiedKey, SigningKey};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate, X509Name};

use super::canonical_name::CanonicalName;
use super::pem::{self, PemKind, Section};
use super::revocation::Crl;
use super::validity::Validity;
use crate::config::{ConfigError, KeyPair, Located, Place, Trust};
use crate::gate::printable::printable;
use crate::host::accounts;
use crate::host::file::{self, ReadError, TrustedOwner};

/// A server's certificate with its key, ready to be shown.
pub(in crate::gate) struct Certified {
    pub(in crate::gate) key: Arc<CertifiedKey>,
    /// When the leaf expires, seconds since the UNIX epoch.
    pub(in crate::gate) not_after: i64,
    /// The DNS names that the leaf is for, lower case; the first label may be `*`.
    pub(in crate::gate) names: Vec<String>,
    /// The name of the leaf's issuer, if a client needs its certificate and the file does not have it.
    pub(in crate::gate) missing_issuer: Option<String>,
}

/// A CA that client certificates may come from.
pub(in crate::gate) struct Authority {
    pub(in crate::gate) certificate: CertificateDer<'static>,
    /// The file, or `cloudflare`.
    pub(in crate::gate) label: String,
    pub(in crate::gate) subject: CanonicalName,
    pub(in crate::gate) validity: Validity,
}

impl Authority {
    pub(in crate::gate) fn parsed(&self) -> Result<X509Certificate<'_>, ConfigError> {
        parse(&Place::nowhere(), Path::new(&self.label), &self.certificate)
    }
}

/// Reads a server's certificate chain and its key.
pub(in crate::gate) fn certified(
    pair: &KeyPair,
    provider: &CryptoProvider,
) -> Result<Certified, ConfigError> {
    let Located { value: path, place } = &pair.certificate;
    let (pem, _) = read_trusted(place, path, TrustedOwner::Owner)?;
    let certificates = pem_certificates(place, path, &pem)?;
    let parsed = certificates
        .iter()
        .map(|certificate| parse(place, path, certificate));
    let parsed = parsed.collect::<Result<Vec<_>, _>>()?;
    let signer = signer(&pair.key, provider)?;
    if let Some(public_key) = signer.public_key() {
        check_key(&pair.key, path, public_key.as_ref(), &parsed)?;
    }
    let leaf = &parsed[0];
    Ok(Certified {
        not_after: Validity::of(leaf).not_after,
        names: dns_names(leaf),
        missing_issuer: missing_issuer(leaf, &parsed[1..]),
        key: Arc::new(CertifiedKey::new(certificates, signer)),
    })
}

fn signer(
    file: &Located<PathBuf>,
    provider: &CryptoProvider,
) -> Result<Arc<dyn SigningKey>, ConfigError> {
    let Located { value: path, place } = file;
    let signer = provider.key_provider.load_private_key(key(place, path)?);
    signer.map_err(|error| {
        place.error(format_args!(
            "the key {} cannot be used ({error}); it must be RSA of at least 2,048 bits, ECDSA \
             P-256, P-384 or P-521, or Ed25519",
            path.display()
        ))
    })
}

/// The key belongs to the first certificate, whatever else that certificate says.
fn check_key(
    key: &Located<PathBuf>,
    certificate: &Path,
    public_key: &[u8],
    chain: &[X509Certificate<'_>],
) -> Result<(), ConfigError> {
    let mut chain = chain.iter();
    match chain.position(|it| it.public_key().raw == public_key) {
        Some(0) => Ok(()),
        Some(index) => Err(key.place.error(format_args!(
            "{} is in the wrong order: the key {} is that of its certificate no. {}; put that one first, and \
             behind each its issuer",
            certificate.display(),
            key.value.display(),
            index + 1
        ))),
        None => Err(key.place.error(format_args!(
            "the key {} does not belong to the certificate {}; name the key it was made with",
            key.value.display(),
            certificate.display()
        ))),
    }
}

/// Clients that verify need the certificates between the leaf and a root that they know. Cloudflare knows the
/// issuer of its own Origin CA's certificates.
fn missing_issuer(leaf: &X509Certificate<'_>, rest: &[X509Certificate<'_>]) -> Option<String> {
    let issuer = CanonicalName::of(leaf.issuer());
    let is_self_signed = issuer == CanonicalName::of(leaf.subject());
    let mut rest = rest.iter();
    let is_there = rest.any(|it| CanonicalName::of(it.subject()) == issuer);
    let name = leaf.issuer().to_string();
    let is_origin_ca = name.to_ascii_lowercase().contains(ORIGIN_CA);
    (!is_self_signed && !is_there && !is_origin_ca).then(|| printable(&name))
}

fn dns_names(leaf: &X509Certificate<'_>) -> Vec<String> {
    let names = leaf.subject_alternative_name().ok().flatten();
    let names = names.iter().flat_map(|names| &names.value.general_names);
    let dns = names.filter_map(|name| {
        if let GeneralName::DNSName(name) = name {
            Some(name.to_ascii_lowercase())
        } else {
            None
        }
    });
    dns.collect()
}

/// Reads a private key, which no other user of the host may be able to read.
fn key(place: &Place, path: &Path) -> Result<PrivateKeyDer<'static>, ConfigError> {
    let (pem, metadata) = read_trusted(place, path, TrustedOwner::Owner)?;
    let besides = [PemKind::Certificate, PemKind::Companion];
    let keys = sections(place, path, &pem, PemKind::Key, &besides)?;
    let key = match keys.as_slice() {
        [key] => key,
        [] => {
            return Err(place.error(format_args!(
                "{} holds no private key; it must be PEM, PKCS#8, PKCS#1 or SEC1, without a \
                 passphrase",
                path.display()
            )));
        }
        several => {
            return Err(place.error(format_args!(
                "{} holds {} private keys; name a file that holds the certificate's alone",
                path.display(),
                several.len()
            )));
        }
    };
    let content = key.content.clone();
    let key = match key.label.as_str() {
        _ if content.is_empty() => None,
        "PRIVATE KEY" => Some(PrivatePkcs8KeyDer::from(content).into()),
        "RSA PRIVATE KEY" => Some(PrivatePkcs1KeyDer::from(content).into()),
        "EC PRIVATE KEY" => Some(PrivateSec1KeyDer::from(content).into()),
        _ => None,
    };
    let key: PrivateKeyDer<'static> = key.ok_or_else(|| {
        place.error(format_args!(
            "the key {} has a passphrase, or is of a kind that cannot be used; it must be PKCS#8, \
             PKCS#1 or SEC1, without a passphrase",
            path.display()
        ))
    })?;
    let mode = metadata.mode();
    if mode & 0o007 != 0 {
        return Err(place.error(format_args!(
            "the key {} is open to every user of this host; `chmod 640` it, and `chgrp` it to the \
             group that the gate runs as (the package's: {GATE_GROUP})",
            path.display()
        )));
    }
    // systemd lets a service read its credentials by the group's bits, whichever group that is.
    if mode & 0o070 != 0 && !is_our_group(metadata.gid()) && !is_credential(path) {
        let group = match metadata.gid() {
            NO_GROUP => "a group that this service cannot see".to_owned(),
            group => accounts::group_name(group).map_or_else(
                || format!("the group {group}"),
                |name| format!("the group {name}"),
            ),
        };
        return Err(place.error(format_args!(
            "the key {} is open to {group}, which is not the gate's own; `chgrp` it to the group that \
             the gate runs as (the package's: {GATE_GROUP}), or `chmod 600` it, if the gate owns it",
            path.display()
        )));
    }
    Ok(key)
}

/// Whether a group is ours or root's; or that of the package's gate, which root checks for; or Debian's for
/// keys, if this process or the package's gate is in it.
fn is_our_group(group: u32) -> bool {
    let is_own = group == getegid().as_raw() && group != NO_GROUP;
    let service = service_groups();
    let own = getgroups().unwrap_or_default();
    let mut all = service
        .iter()
        .copied()
        .chain(own.into_iter().map(Gid::as_raw));
    let for_keys = all.find(|it| accounts::group_name(*it).as_deref() == Some(KEY_GROUP));
    // Where users are private (systemd.exec(5)), other groups than the own have no number.
    let is_for_keys = for_keys.is_some_and(|keys| [keys, NO_GROUP].contains(&group));
    group == 0 || is_own || service.first() == Some(&group) || is_for_keys
}

/// The groups of the package's gate, its own first; none, if it is not installed.
#[must_use]
pub fn service_groups() -> Vec<u32> {
    accounts::groups(GATE_GROUP)
}

/// What keeps the package's gate, which is in these groups, from a file that root can read: the file,
/// or a directory on the way to it that is root's alone or that the unit hides.
pub(in crate::gate) fn obstacle(path: &Path, groups: &[u32]) -> Option<PathBuf> {
    let real = std::fs::canonicalize(path).ok()?;
    let lets_in = |part: &Path, right: u32| {
        std::fs::metadata(part).map_or(true, |found| {
            let is_for_group = found.mode() & right << 3 != 0 && groups.contains(&found.gid());
            found.uid() != 0 || is_for_group || found.mode() & right != 0
        })
    };
    let mut directories = real.ancestors().skip(1);
    let is_closed = |directory: &&Path| {
        HIDDEN.contains(&directory.to_str().unwrap_or_default()) || !lets_in(directory, 0o001)
    };
    match directories.find(is_closed) {
        Some(directory) => Some(directory.to_owned()),
        None => (!lets_in(&real, 0o004)).then_some(real),
    }
}

/// systemd.exec(5), `LoadCredential=`: a directory that only the service can enter.
fn is_credential(path: &Path) -> bool {
    path.starts_with("/run/credentials")
}

/// Reads the CAs that a `trust` entry names: none, if it is a pin.
pub(in crate::gate) fn authorities(
    trust: &Located<Trust>,
    shared: &Authority,
) -> Result<Vec<Authority>, ConfigError> {
    let Located { value, place } = trust;
    match value {
        Trust::Pin(_) => Ok(Vec::new()),
        Trust::CaFile(path) => authorities_of(place, path, &read(place, path)?),
        Trust::Cloudflare => Ok(vec![Authority {
            certificate: shared.certificate.clone(),
            label: shared.label.clone(),
            subject: shared.subject.clone(),
            validity: shared.validity,
        }]),
    }
}

/// Cloudflare's CA: the built-in one, or the one that the configuration names. Whether it has
/// expired matters only to those who trust it.
pub(in crate::gate) fn shared_authority(
    file: Option<&Located<impl AsRef<Path>>>,
) -> Result<Authority, ConfigError> {
    let label = Path::new("cloudflare");
    let found = match file {
        None => {
            let place = Place::nowhere();
            authorities_of(&place, label, CLOUDFLARE_CA)?.pop()
        }
        Some(Located { value, place }) => {
            let path = value.as_ref();
            let mut all = authorities_of(place, path, &read(place, path)?)?;
            if all.len() > 1 {
                return Err(place.error(format_args!(
                    "{} holds {} CAs; name the file of Cloudflare's origin-pull CA alone",
                    path.display(),
                    all.len()
                )));
            }
            all.pop()
        }
    };
    match found {
        Some(authority) => Ok(Authority {
            label: label.display().to_string(),
            ..authority
        }),
        None => Err(Place::nowhere().error("there is no CA")),
    }
}

/// Whether this distinguished name, DER, is that of Cloudflare's origin-pull CA.
#[must_use]
pub fn is_shared_authority(name: &[u8]) -> bool {
    let shared = shared_authority(None::<&Located<&Path>>);
    let name = X509Name::from_der(name).map(|(_, name)| CanonicalName::of(&name));
    shared.is_ok_and(|shared| name.is_ok_and(|name| name == shared.subject))
}

/// The CAs in a file. One that has expired is none, which is seen whenever it is gone by: a file
/// that names it among others must not keep a new one, or a revocation, out.
fn authorities_of(place: &Place, path: &Path, pem: &[u8]) -> Result<Vec<Authority>, ConfigError> {
    let certificates = pem_certificates(place, path, pem)?.into_iter();
    certificates
        .map(|certificate| authority(place, path, certificate))
        .collect()
}

fn authority(
    place: &Place,
    path: &Path,
    certificate: CertificateDer<'static>,
) -> Result<Authority, ConfigError> {
    let parsed = parse(place, path, &certificate)?;
    let subject = parsed.subject().to_string();
    let constraints = parsed.basic_constraints().ok().flatten();
    if !constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err(place.error(format_args!(
            "`{}` in {} is not a CA certificate; name the CA that signed the client certificate, \
             not the certificate itself (or pin it: `pullgate spki {}`)",
            printable(&subject),
            path.display(),
            path.display()
        )));
    }
    let usage = parsed.key_usage().ok().flatten();
    if usage.is_some_and(|usage| !usage.value.key_cert_sign()) {
        return Err(place.error(format_args!(
            "the CA `{}` in {} may sign no certificate: its key usage has no keyCertSign; have it issued again \
             with keyCertSign",
            printable(&subject),
            path.display()
        )));
    }
    Ok(Authority {
        label: path.display().to_string(),
        subject: CanonicalName::of(parsed.subject()),
        validity: Validity::of(&parsed),
        certificate,
    })
}

/// Reads the revocation lists in a file.
pub(in crate::gate) fn crls(
    file: &Located<impl AsRef<Path>>,
) -> Result<Vec<Arc<Crl>>, ConfigError> {
    let Located { value: path, place } = file;
    let path = path.as_ref();
    let pem = read(place, path)?;
    let sections = sections(
        place,
        path,
        &pem,
        PemKind::RevocationList,
        &[PemKind::Certificate],
    )?;
    if sections.is_empty() {
        return Err(place.error(format_args!(
            "{} holds no revocation list; it must be PEM, beginning with `-----BEGIN X509 CRL-----`",
            path.display()
        )));
    }
    let crls = sections.into_iter().map(|section| {
        let crl = Crl::from_der(&section.content).map_err(|problem| {
            place.error(format_args!(
                "a revocation list in {} cannot be used: {problem}; it must be of version 2, whole, \
                 and from the CA itself",
                path.display()
            ))
        });
        crl.map(Arc::new)
    });
    crls.collect()
}

/// Reads the certificates that an upstream's certificate may be or come from.
pub(in crate::gate) fn upstream_cas(
    file: &Located<PathBuf>,
) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let Located { value: path, place } = file;
    pem_certificates(place, path, &read(place, path)?)
}

/// The key pin of a certificate: SHA-256 of its leaf's SubjectPublicKeyInfo, as `trust` takes it.
///
/// # Errors
///
/// Returns what is wrong with the file.
pub fn spki(path: &Path) -> Result<String, ConfigError> {
    let place = Place::nowhere();
    // It is shown, and trusted by the operator who copies it.
    let pem = file::read(path, FILE_MAX);
    let pem = pem.map_err(|error| {
        place.unreadable(format_args!("{} cannot be read", path.display()), error)
    })?;
    let certificates = pem_certificates(&place, path, &pem)?;
    let leaf = parse(&place, path, &certificates[0])?;
    Ok(format!(
        "sha256:{}",
        crate::digest::sha256(leaf.public_key().raw)
    ))
}

/// All PEM sections of one kind. Others are passed over only if they are among `besides`: what is
/// in a file and has no effect is a mistake.
fn sections(
    place: &Place,
    path: &Path,
    text: &[u8],
    wanted: PemKind,
    besides: &[PemKind],
) -> Result<Vec<Section>, ConfigError> {
    let sections = pem::sections(text).map_err(|problem| {
        place.error(format_args!(
            "{} is damaged: {problem}; copy it again, whole",
            path.display()
        ))
    })?;
    let is_strange =
        |section: &&Section| section.kind != wanted && !besides.contains(&section.kind);
    if let Some(strange) = sections.iter().find(is_strange) {
        return Err(place.error(format_args!(
            "{} has a section `{}` in line {}, which would have no effect here; take it out, and \
             name it where it belongs",
            path.display(),
            strange.label.escape_debug(),
            strange.line
        )));
    }
    let wanted = sections
        .into_iter()
        .filter(|section| section.kind == wanted);
    Ok(wanted.collect())
}

/// At least one certificate.
fn pem_certificates(
    place: &Place,
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let besides = [PemKind::Key, PemKind::Companion];
    let certificates = sections(place, path, pem, PemKind::Certificate, &besides)?;
    if certificates.is_empty() {
        return Err(place.error(format_args!(
            "{} holds no certificate; it must be PEM, beginning with `-----BEGIN CERTIFICATE-----`",
            path.display()
        )));
    }
    let certificates = certificates.into_iter();
    Ok(certificates.map(|section| section.content.into()).collect())
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

/// Reads a file that says whom to trust.
fn read(place: &Place, path: &Path) -> Result<Vec<u8>, ConfigError> {
    read_trusted(place, path, TrustedOwner::RootOrSelf).map(|(content, _)| content)
}

fn read_trusted(
    place: &Place,
    path: &Path,
    owner: TrustedOwner,
) -> Result<(Vec<u8>, Metadata), ConfigError> {
    file::read_trusted(path, FILE_MAX, owner).map_err(|error| match error {
        ReadError::Io(error) => {
            let problem = format!(
                "{} cannot be read (is the path right, and may the user {} read it?{})",
                path.display(),
                geteuid().as_raw(),
                hint(path)
            );
            place.unreadable(problem, error)
        }
        ReadError::UntrustedFile(untrusted) => place.error(untrusted),
    })
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
const CLOUDFLARE_CA: &[u8] = include_bytes!("../../../baseline/authenticated_origin_pull_ca.pem");
/// The group that the package makes for the gate alone.
pub const GATE_GROUP: &str = "pullgate-gate";
/// The group of Debian's for the keys of servers (its package ssl-cert).
pub const KEY_GROUP: &str = "ssl-cert";
/// systemd.exec(5), `ProtectHome=`.
const HIDDEN: [&str; 3] = ["/home", "/root", "/run/user"];
/// What the names of Cloudflare's Origin CAs (RSA and ECC) have in common, lower case.
const ORIGIN_CA: &str = "cloudflare origin ssl";
/// How all groups look that a user namespace does not know: user_namespaces(7), overflowgid.
const NO_GROUP: u32 = 65534;
/// Bytes that are read of a PEM file; a list of revoked certificates may be long.
const FILE_MAX: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_origin_pull_ca_is_the_published_one() {
        let der = CertificateDer::from(pem::sections(CLOUDFLARE_CA).unwrap().remove(0).content);

        assert_eq!(
            crate::digest::sha256(&der),
            "9a1ac2b4be15f9f27eee20a734cba4e9898f61001b3bd7c84b69b56a3e25a2b9"
        );
        let authority = shared_authority(None::<&Located<&Path>>).unwrap();
        assert_eq!(authority.certificate, der);
    }
}
