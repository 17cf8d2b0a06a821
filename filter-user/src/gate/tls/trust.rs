//! Whom a policy trusts: a client's certificates and the time in, an [`Identity`] or a [`Refusal`]
//! out. Pure: it reads no file and no clock.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt::{self, Debug, Formatter};
use std::sync::{Arc, Mutex};

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, Der, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, Error as WebpkiError, KeyUsage, VerifiedPath};
use x509_parser::asn1_rs::Any;
use x509_parser::extensions::KeyUsage as KeyUsageExtension;
use x509_parser::prelude::{FromDer as _, X509Certificate, X509Name};

use super::canonical_name::CanonicalName;
use super::credentials::Authority;
use super::revocation::Revocation;
use super::validity::Validity;
use crate::digest::{sha256_bytes, sha256_of_parts};
use crate::gate::printable::printable;
use crate::gate::refusal::{Defect, Refusal};
use crate::gate::refused::Presented;
use crate::sync::lock;

/// What a verified client certificate says of its owner.
#[derive(Debug, Eq, PartialEq)]
pub struct Identity {
    /// The leaf's subject, escaped.
    pub subject: String,
    /// The leaf's common name, if it has one.
    pub common_name: Option<String>,
    /// What made it trusted: the CA as the configuration names it, or the pin.
    pub trust: String,
    /// SHA-256 of the leaf, DER.
    pub digest: [u8; 32],
}

/// All that decides whether a client certificate is trusted.
pub(in crate::gate) struct Trusted {
    pub(in crate::gate) anchors: Vec<Anchor>,
    /// SHA-256 digests of the SubjectPublicKeyInfo of leaves that are trusted whichever CA signed them.
    pub(in crate::gate) pins: Vec<[u8; 32]>,
    pub(in crate::gate) revocation: Revocation,
    /// Intermediates between a leaf and its CA.
    pub(in crate::gate) max_depth: usize,
    /// Whether a leaf must say that it is a client's, or need only not deny it.
    pub(in crate::gate) require_eku: bool,
    /// Cloudflare's shared CA: one that is *not* trusted is worth a word of its own.
    pub(in crate::gate) shared: Anchor,
    pub(in crate::gate) algorithms: WebPkiSupportedAlgorithms,
    pub(in crate::gate) seen: VerifiedChains,
}

/// A CA.
pub(in crate::gate) struct Anchor {
    label: String,
    validity: Validity,
    anchor: TrustAnchor<'static>,
    certificate: CertificateDer<'static>,
    subject: CanonicalName,
    /// Whether it is on a list of its own issuer.
    is_revoked: bool,
}

impl Anchor {
    pub(in crate::gate) fn new(
        authority: &Authority,
        is_revoked: bool,
    ) -> Result<Self, WebpkiError> {
        let anchor = webpki::anchor_from_trusted_cert(&authority.certificate)?.to_owned();
        Ok(Self {
            label: authority.label.clone(),
            validity: authority.validity,
            anchor,
            certificate: authority.certificate.clone(),
            subject: authority.subject.clone(),
            is_revoked,
        })
    }

    /// The CA under its own name, and under each other way in which these certificates write it:
    /// webpki compares names byte by byte, and RFC 5280 §7.1 does not.
    fn under_names_in(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
    ) -> Vec<TrustAnchor<'static>> {
        let mut anchors = vec![self.anchor.clone()];
        for certificate in std::iter::once(leaf).chain(rest) {
            let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
                continue;
            };
            let written = name_content(certificate.issuer());
            let is_known = anchors
                .iter()
                .any(|known| known.subject.as_ref() == written);
            if !is_known && CanonicalName::of(certificate.issuer()) == self.subject {
                anchors.push(TrustAnchor {
                    subject: Der::from(written.to_vec()),
                    ..self.anchor.clone()
                });
            }
        }
        anchors
    }
}

/// A name without the tag and the length of its DER, as webpki keeps it.
fn name_content<'a>(name: &X509Name<'a>) -> &'a [u8] {
    Any::from_der(name.as_raw()).map_or(name.as_raw(), |(_, name)| name.data)
}

/// Certificates that were verified, by digest, and until when that holds: Cloudflare's servers
/// all present the same few, and an RSA signature of 4,096 bits takes longer than the rest of a
/// resumed handshake. What was refused is not remembered: it is different each time.
#[derive(Default)]
pub(in crate::gate) struct VerifiedChains(Mutex<HashMap<[u8; 32], Verdict>>);

/// Who it is, and while that can be said without looking again.
type Verdict = (Validity, Arc<Identity>);

impl Trusted {
    /// Judges what a client has presented, leaf first.
    ///
    /// # Errors
    ///
    /// Returns the [`Refusal`] that tells most: what a CA that knows the issuer says comes before
    /// what one says that does not.
    pub(in crate::gate) fn judge(
        &self,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Arc<Identity>, Refusal> {
        let Some((leaf, rest)) = chain.split_first() else {
            return Err(Refusal::NoCertificate);
        };
        let rest = &rest[..rest.len().min(PRESENTED_MAX)];
        let presented = std::iter::once(leaf).chain(rest);
        let key = sha256_of_parts(presented);
        if let Some((validity, identity)) = lock(&self.seen.0).get(&key)
            && validity.holds(now)
        {
            return Ok(Arc::clone(identity));
        }

        let (_, parsed) = X509Certificate::from_der(leaf)
            .map_err(|_unparsed| Refusal::BadCertificate(Defect::Unreadable))?;
        let (by, validity) = self.find_trust(leaf, &parsed, rest, now)?;
        // As OpenSSL has it; keyAgreement is for keys that RFC 8422 §5.5 has with a fixed share.
        let may_sign = allows(&parsed, |usage| {
            usage.digital_signature() || usage.key_agreement()
        });
        if !may_sign || self.require_eku && !names_client_use(&parsed) {
            return Err(Refusal::WrongUsage);
        }
        let identity = Arc::new(Identity::new(leaf, &parsed, by));
        if let Some(validity) = validity {
            let seen = &mut lock(&self.seen.0);
            if seen.len() >= SEEN_MAX {
                seen.clear();
            }
            seen.insert(key, (validity, Arc::clone(&identity)));
        }
        Ok(identity)
    }

    /// What a chain says of itself, for people.
    pub(in crate::gate) fn describe(&self, chain: &[CertificateDer<'_>]) -> Option<Presented> {
        let (_, leaf) = X509Certificate::from_der(chain.first()?).ok()?;
        let behind = chain.iter().take(PRESENTED_MAX + 1).skip(1);
        let behind = behind.filter_map(|it| Some(X509Certificate::from_der(it).ok()?.1));
        let issuers = std::iter::once(leaf.clone()).chain(behind);
        let issuers: Vec<_> = issuers.map(|it| CanonicalName::of(it.issuer())).collect();
        let mut anchors = self.anchors.iter();
        let anchor = anchors.find(|anchor| issuers.contains(&anchor.subject));
        Some(Presented {
            subject: printable(&leaf.subject().to_string()),
            issuer: printable(&leaf.issuer().to_string()),
            anchor: anchor.map(|anchor| anchor.label.clone()),
        })
    }

    /// What makes the leaf trusted, and for how long that is so, if that can be said.
    fn find_trust(
        &self,
        leaf: &CertificateDer<'_>,
        parsed: &X509Certificate<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(String, Option<Validity>), Refusal> {
        let mut refusal = match (self.pins.is_empty(), self.anchors.is_empty()) {
            (false, true) => Refusal::PinMismatch,
            (_, _) => Refusal::UnknownIssuer,
        };
        if self.pins.contains(&sha256_bytes(parsed.public_key().raw)) {
            let validity = Validity::of(parsed);
            let refused = validity.refuse(now);
            match refused.map_or_else(|| self.revocation.judge_pinned(parsed, now), Err) {
                Ok(()) => {
                    return Ok((
                        "a pin".to_owned(),
                        Some(self.until_next_list(validity, now)),
                    ));
                }
                Err(Refusal::Revoked) => return Err(Refusal::Revoked),
                Err(refused) => refusal = telling_more(refusal, refused),
            }
        }
        // An anchor that has expired is none.
        let anchors = self.anchors.iter();
        for anchor in anchors.filter(|anchor| anchor.validity.holds(now)) {
            match self.verify(anchor, leaf, rest, now) {
                Ok(()) => {
                    let validity = validity_of_all(anchor, parsed, rest);
                    let validity = validity.map(|validity| self.until_next_list(validity, now));
                    return Ok((anchor.label.clone(), validity));
                }
                // Another CA that would accept it does not make it unrevoked.
                Err(Refusal::Revoked) => return Err(Refusal::Revoked),
                Err(refused) => refusal = telling_more(refusal, refused),
            }
        }
        let is_strange = matches!(refusal, Refusal::UnknownIssuer | Refusal::PinMismatch);
        if is_strange && self.verify(&self.shared, leaf, rest, now).is_ok() {
            refusal = Refusal::SharedCertificate;
        }
        Err(refusal)
    }

    fn verify(
        &self,
        anchor: &Anchor,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Refusal> {
        let usage = if self.require_eku {
            KeyUsage::required(EKU_CLIENT_AUTH)
        } else {
            KeyUsage::client_auth()
        };
        // webpki tries another path when one is refused, and keeps to itself why.
        let beyond_webpki = Cell::new(None);
        let is_good = |path: &VerifiedPath<'_>| {
            if path.intermediate_certificates().count() > self.max_depth {
                return Err(WebpkiError::MaximumPathDepthExceeded);
            }
            self.judge_path(anchor, path, now).map_err(|refusal| {
                let before: Option<Refusal> = beyond_webpki.get();
                beyond_webpki.set(
                    before
                        .filter(|before| *before == Refusal::Revoked)
                        .or(Some(refusal)),
                );
                WebpkiError::UnknownRevocationStatus
            })
        };
        let anchors = anchor.under_names_in(leaf, rest);
        let leaf = EndEntityCert::try_from(leaf).map_err(|error| Refusal::from_webpki(&error))?;
        let path = leaf.verify_for_usage(
            self.algorithms.all,
            &anchors,
            rest,
            now,
            usage,
            None,
            Some(&is_good),
        );
        match (path, beyond_webpki.get()) {
            (_, Some(Refusal::Revoked)) => Err(Refusal::Revoked),
            (Ok(_), _) => Ok(()),
            (Err(WebpkiError::UnknownRevocationStatus), Some(refusal)) => Err(refusal),
            (Err(error), _) => Err(Refusal::from_webpki(&error)),
        }
    }

    /// What webpki does not look at: key usages and revocation.
    fn judge_path(
        &self,
        anchor: &Anchor,
        path: &VerifiedPath<'_>,
        now: UnixTime,
    ) -> Result<(), Refusal> {
        if anchor.is_revoked {
            return Err(Refusal::Revoked);
        }
        let between = path
            .intermediate_certificates()
            .map(|certificate| certificate.der());
        let all: Vec<CertificateDer<'_>> = std::iter::once(path.end_entity().der())
            .chain(between)
            .chain([anchor.certificate.clone()])
            .collect();
        let parsed = all
            .iter()
            .map(|certificate| X509Certificate::from_der(certificate));
        let parsed = parsed.collect::<Result<Vec<_>, _>>();
        let parsed = parsed.map_err(|_unparsed| Refusal::BadCertificate(Defect::Unreadable))?;
        let chain: Vec<_> = parsed.iter().map(|(_, parsed)| parsed).collect();
        let mut issuers = chain.iter().skip(1);
        if !issuers.all(|issuer| allows(issuer, KeyUsageExtension::key_cert_sign)) {
            return Err(Refusal::BadCertificate(Defect::IssuerNotCa));
        }
        self.revocation.judge(&chain, now)
    }

    /// The time within `validity` in which no list expires.
    fn until_next_list(&self, mut validity: Validity, now: UnixTime) -> Validity {
        validity.not_after = validity.not_after.min(self.revocation.next_update(now));
        validity
    }
}

impl Debug for Trusted {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let labels = self.anchors.iter().map(|anchor| &anchor.label);
        f.debug_list().entries(labels).finish()
    }
}

impl Identity {
    fn new(leaf: &CertificateDer<'_>, parsed: &X509Certificate<'_>, trust: String) -> Self {
        let common_name = parsed.subject().iter_common_name().next();
        let common_name = common_name.and_then(|name| name.as_str().ok());
        Self {
            subject: printable(&parsed.subject().to_string()),
            common_name: common_name.map(str::to_owned),
            trust,
            digest: sha256_bytes(leaf),
        }
    }
}

/// The refusal that tells more. A CA of the same name as the issuer's finds the signature bad, and
/// one of another name knows nothing.
fn telling_more(first: Refusal, second: Refusal) -> Refusal {
    let vague = [
        Refusal::UnknownIssuer,
        Refusal::PinMismatch,
        Refusal::BadSignature,
    ];
    let weight = |refusal: Refusal| {
        let rank = vague.iter().position(|vague| *vague == refusal);
        rank.unwrap_or(vague.len())
    };
    if weight(second) > weight(first) {
        second
    } else {
        first
    }
}

/// Whether the key usage, if there is one, allows this (RFC 5280 §4.2.1.3; of clients, RFC 5246 §7.4.6).
fn allows(certificate: &X509Certificate<'_>, wanted: impl Fn(&KeyUsageExtension) -> bool) -> bool {
    let usage = certificate.key_usage();
    usage.is_ok_and(|usage| usage.is_none_or(|usage| wanted(usage.value)))
}

/// Whether the extended key usage is there and names client authentication (RFC 5280 §4.2.1.12).
fn names_client_use(leaf: &X509Certificate<'_>) -> bool {
    let usage = leaf.extended_key_usage().ok().flatten();
    usage.is_some_and(|usage| usage.value.client_auth)
}

/// The time in which nothing that a verdict was based on begins or ends to be valid.
fn validity_of_all(
    anchor: &Anchor,
    leaf: &X509Certificate<'_>,
    rest: &[CertificateDer<'_>],
) -> Option<Validity> {
    let mut validity = Validity::of(leaf).and(anchor.validity);
    for certificate in rest {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        validity = validity.and(Validity::of(&parsed));
    }
    Some(validity)
}

/// Certificates behind the leaf that are looked at; the rest of what a client sends is ignored.
const PRESENTED_MAX: usize = 8;
/// Verified chains that are remembered.
const SEEN_MAX: usize = 256;
/// id-kp-clientAuth, 1.3.6.1.5.5.7.3.2 (RFC 5280 §4.2.1.12), DER without tag and length.
const EKU_CLIENT_AUTH: &[u8] = &[40 + 3, 6, 1, 5, 5, 7, 3, 2];
