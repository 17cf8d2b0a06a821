//! Whom a policy trusts: a client's certificates and the time in, an [`Identity`] or a [`Refusal`]
//! out. Pure: it reads no file and no clock.

use std::collections::HashMap;
use std::fmt::{self, Debug, Formatter};
use std::sync::{Arc, Mutex};

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, Error as WebpkiError, ExpirationPolicy, KeyUsage,
    RevocationOptionsBuilder, VerifiedPath,
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::credentials::{Authority, Crl, Validity};
use super::refusal::Refusal;
use crate::config::CrlExpired;
use crate::digest::{sha256_bytes, sha256_of_parts};
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
pub(super) struct Trusted {
    pub(super) anchors: Vec<Anchor>,
    /// SHA-256 digests of the SubjectPublicKeyInfo of leaves that are trusted whoever signed them.
    pub(super) pins: Vec<[u8; 32]>,
    /// What an expired list of revoked certificates is worth.
    pub(super) crl_expired: CrlExpired,
    /// Intermediates between a leaf and its CA.
    pub(super) max_depth: usize,
    /// Whether a leaf must say that it is a client's, or need only not deny it.
    pub(super) require_eku: bool,
    /// Cloudflare's shared CA: one that is *not* trusted is worth a word of its own.
    pub(super) shared: Anchor,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
    pub(super) seen: Seen,
}

/// A CA, and the lists of what it has revoked.
pub(super) struct Anchor {
    label: String,
    validity: Validity,
    anchor: TrustAnchor<'static>,
    /// Its own lists and those of intermediates; if there are any, each certificate needs one.
    crls: Vec<Arc<Crl>>,
}

impl Anchor {
    pub(super) fn new(authority: &Authority, crls: Vec<Arc<Crl>>) -> Result<Self, WebpkiError> {
        let anchor = webpki::anchor_from_trusted_cert(&authority.certificate)?.to_owned();
        Ok(Self {
            label: authority.label.clone(),
            validity: authority.validity,
            anchor,
            crls,
        })
    }
}

/// Certificates that were verified, by digest, and until when that holds: Cloudflare's servers
/// all present the same few, and an RSA signature of 4,096 bits takes longer than the rest of a
/// resumed handshake. What was refused is not remembered: it is different each time.
#[derive(Default)]
pub(super) struct Seen(Mutex<HashMap<[u8; 32], Verdict>>);

/// Who it is, and while that can be said without looking again.
type Verdict = (Validity, Arc<Identity>);

impl Trusted {
    /// Judges what a client has presented, leaf first.
    ///
    /// # Errors
    ///
    /// Returns the [`Refusal`] that tells most: what a CA that knows the issuer says comes before
    /// what one says that does not.
    pub(super) fn judge(
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

        let (_, parsed) =
            X509Certificate::from_der(leaf).map_err(|_unparsed| Refusal::BadCertificate)?;
        let (by, validity) = self.find_trust(leaf, &parsed, rest, now)?;
        if self.require_eku && !names_client_use(&parsed) {
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
            match validity.refuse(now) {
                None => return Ok(("a pin".to_owned(), Some(validity))),
                Some(refused) => refusal = telling_more(refusal, refused),
            }
        }
        // An anchor that has expired is none.
        let anchors = self.anchors.iter();
        for anchor in anchors.filter(|anchor| anchor.validity.holds(now)) {
            match self.verify(anchor, leaf, rest, now) {
                Ok(()) => {
                    let validity = validity_of_all(anchor, parsed, rest, self.crl_expired);
                    return Ok((anchor.label.clone(), validity));
                }
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
        let usage = match self.require_eku {
            true => KeyUsage::required(EKU_CLIENT_AUTH),
            false => KeyUsage::client_auth(),
        };
        let expiration = match self.crl_expired {
            CrlExpired::Refuse => ExpirationPolicy::Enforce,
            CrlExpired::Accept => ExpirationPolicy::Ignore,
        };
        let crls: Vec<&CertRevocationList<'_>> =
            anchor.crls.iter().map(|crl| &crl.parsed).collect();
        // Without a list there is nothing to look a certificate up in.
        let revocation = RevocationOptionsBuilder::new(&crls)
            .map(|builder| builder.with_expiration_policy(expiration).build())
            .ok();
        let max_depth = self.max_depth;
        let is_short = |path: &VerifiedPath<'_>| {
            let depth = path.intermediate_certificates().count();
            (depth <= max_depth)
                .then_some(())
                .ok_or(WebpkiError::MaximumPathDepthExceeded)
        };
        let leaf = EndEntityCert::try_from(leaf).map_err(|error| Refusal::from_webpki(&error))?;
        let path = leaf.verify_for_usage(
            self.algorithms.all,
            std::slice::from_ref(&anchor.anchor),
            rest,
            now,
            usage,
            revocation,
            Some(&is_short),
        );
        match path {
            Ok(_) => Ok(()),
            Err(error) => Err(Refusal::from_webpki(&error)),
        }
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
            subject: parsed.subject().to_string().escape_debug().to_string(),
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
    crl_expired: CrlExpired,
) -> Option<Validity> {
    let mut validity = Validity::of(leaf).and(anchor.validity);
    for certificate in rest {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        validity = validity.and(Validity::of(&parsed));
    }
    if crl_expired == CrlExpired::Refuse {
        for crl in &anchor.crls {
            validity.not_after = validity.not_after.min(crl.next_update);
        }
    }
    Some(validity)
}

/// Certificates behind the leaf that are looked at; the rest of what a client sends is ignored.
const PRESENTED_MAX: usize = 8;
/// Verified chains that are remembered.
const SEEN_MAX: usize = 256;
/// id-kp-clientAuth, 1.3.6.1.5.5.7.3.2 (RFC 5280 §4.2.1.12), DER without tag and length.
const EKU_CLIENT_AUTH: &[u8] = &[40 + 3, 6, 1, 5, 5, 7, 3, 2];
