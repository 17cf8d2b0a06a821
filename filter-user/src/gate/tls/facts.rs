//! What is known of the files of a policy: until when they hold, and what was read from which.

use std::fmt::{self, Display, Formatter};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use serde::Serialize;

use super::credentials::{Authority, Certified};
use super::epoch::has_pins;
use super::revocation::{Crl, newest};
use crate::config::{HostSettings, Trust, UpstreamTrust};

/// What lints and metrics report of a policy's files.
pub(in crate::gate) struct CertFacts {
    /// When the first of its certificates expires, seconds since the UNIX epoch.
    pub(in crate::gate) certificate_expires: i64,
    /// When the first of its CAs expires; of none, if it uses key pins alone.
    pub(in crate::gate) authority_expires: Option<i64>,
    /// When the last of its CAs expires, if there is no pin besides: no client is admitted from then on.
    pub(in crate::gate) trust_ends: Option<i64>,
    /// When that of its revocation lists was made that expires first, and when it does.
    pub(in crate::gate) crl_valid: Option<(i64, i64)>,
    /// The issuers whose certificates are needed and in no file of its certificates.
    pub(in crate::gate) missing_issuers: Vec<String>,
    /// The names that its certificates are for.
    pub(in crate::gate) certificate_names: Vec<String>,
    /// What was read from which file.
    pub(in crate::gate) contents: Vec<FileContent>,
    /// Whether Cloudflare's shared CA is trusted, under whatever name.
    pub(in crate::gate) trusts_shared: bool,
}

/// How many of what was read from a file.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct FileContent {
    path: PathBuf,
    count: usize,
    what: &'static str,
}

impl Display for FileContent {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { path, count, what } = self;
        let plural = if *count == 1 { "" } else { "s" };
        write!(f, "{}: {count} {what}{plural}", path.display())
    }
}

impl CertFacts {
    pub(super) fn new(
        host: &HostSettings,
        certified: &[Certified],
        authorities: &[Authority],
        crls: &[Arc<Crl>],
        contents: Vec<FileContent>,
        shared: &Authority,
    ) -> Self {
        let certificates = certified.iter().map(|certified| certified.not_after);
        let names = certified
            .iter()
            .flat_map(|certified| certified.names.clone());
        Self {
            certificate_expires: certificates.min().unwrap_or(i64::MAX),
            authority_expires: authorities.iter().map(|ca| ca.validity.not_after).min(),
            trust_ends: authorities
                .iter()
                .map(|ca| ca.validity.not_after)
                .max()
                .filter(|_| !has_pins(host)),
            crl_valid: newest(crls.iter())
                .iter()
                .map(|crl| (crl.this_update, crl.next_update))
                .min_by_key(|(_, next_update)| *next_update),
            missing_issuers: certified
                .iter()
                .filter_map(|certified| certified.missing_issuer.clone())
                .collect(),
            certificate_names: names.collect(),
            contents,
            trusts_shared: authorities
                .iter()
                .any(|ca| ca.certificate == shared.certificate),
        }
    }
}

/// What was read from each of a host's files.
pub(super) fn contents(
    host: &HostSettings,
    certified: &[Certified],
    authorities: &[Authority],
    lists: &[Vec<Arc<Crl>>],
    upstream_cas: &[CertificateDer<'static>],
) -> Vec<FileContent> {
    let content = |path: &Path, count, what| FileContent {
        path: path.to_owned(),
        count,
        what,
    };
    let mut contents = Vec::new();
    for (pair, shown) in host.certificates.iter().zip(certified) {
        let chain = shown.key.cert.len();
        contents.push(content(&pair.certificate.value, chain, "certificate"));
        contents.push(content(&pair.key.value, 1, "key"));
    }
    for trust in &host.trust {
        if let Trust::CaFile(path) = &trust.value {
            let label = path.display().to_string();
            let count = authorities.iter().filter(|ca| ca.label == label).count();
            contents.push(content(path, count, "CA"));
        }
    }
    if let Some(UpstreamTrust::CaFile(path)) =
        host.upstream.value.tls.as_ref().map(|tls| &tls.trust)
    {
        contents.push(content(
            &path.value,
            upstream_cas.len(),
            "CA or self-signed certificate",
        ));
    }
    for (file, found) in host.crls.iter().zip(lists) {
        contents.push(content(&file.value, found.len(), "revocation list"));
    }
    contents
}
