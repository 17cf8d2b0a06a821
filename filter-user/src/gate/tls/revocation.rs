//! What is revoked: all lists of a host and a path of certificates in, a [`Refusal`] or none out.
//! Pure: it reads no file and no clock.
//!
//! One decision over all lists. Every list that speaks for an issuer counts, wherever the path
//! ends: what is on one is refused, whichever CA would have accepted it. Of several
//! lists of one issuer and scope the newest counts (RFC 5280 §5.2.3, §6.3.3).

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use rustls::pki_types::{CertificateRevocationListDer, UnixTime};
use webpki::BorrowedCertRevocationList;
use x509_parser::extensions::DistributionPointName;
use x509_parser::prelude::{
    CertificateRevocationList, FromDer as _, GeneralName, ParsedExtension, X509Certificate,
    X509Extension,
};

use super::canonical_name::CanonicalName;
use super::signature::is_signed_by;
use super::validity::seconds;
use crate::config::CrlExpired;
use crate::digest::sha256_bytes;
use crate::gate::refusal::Refusal;
use crate::sync::lock;

/// A list of revoked certificates.
pub(in crate::gate) struct Crl {
    pub(in crate::gate) der: CertificateRevocationListDer<'static>,
    issuer: CanonicalName,
    /// The key identifier of the issuer's key, if the list has it (RFC 5280 §5.2.1).
    authority_key: Option<Vec<u8>>,
    scope: CrlScope,
    /// The list's number, big-endian without leading zeros; a CA need not count (RFC 5280 §5.2.3).
    number: Option<Vec<u8>>,
    /// When it was made, seconds since the UNIX epoch.
    pub(in crate::gate) this_update: i64,
    /// When it expires, seconds since the UNIX epoch.
    pub(in crate::gate) next_update: i64,
    /// Serial numbers, big-endian without leading zeros.
    revoked: HashSet<Vec<u8>>,
    /// Whether a key has signed it, by the digest of the key: a list may be megabytes long.
    signers: Mutex<HashMap<[u8; 32], bool>>,
}

/// The part of an issuer's certificates that a list is for (RFC 5280 §5.2.5).
#[derive(Debug, Default, Eq, PartialEq)]
struct CrlScope {
    only_leaves: bool,
    only_authorities: bool,
    /// The distribution point's URIs: a shard; none, if the list is for all.
    uris: Option<Vec<String>>,
}

impl Crl {
    /// Parses a list.
    ///
    /// # Errors
    ///
    /// Returns what is wrong with it: indirect lists, delta lists and those for some reasons only
    /// are not taken, nor is one that does not say when it expires.
    pub(in crate::gate) fn from_der(der: &[u8]) -> Result<Self, String> {
        BorrowedCertRevocationList::from_der(der).map_err(|error| error.to_string())?;
        let (_, parsed) =
            CertificateRevocationList::from_der(der).map_err(|error| error.to_string())?;
        let next_update = parsed.next_update().map(|time| time.timestamp());
        let next_update = next_update.ok_or("it has no nextUpdate, so its end is not known")?;
        let serials = parsed.iter_revoked_certificates();
        let number = parsed
            .crl_number()
            .map(|number| trimmed(&number.to_bytes_be()));
        Ok(Self {
            issuer: CanonicalName::of(parsed.issuer()),
            authority_key: key_identifier(parsed.extensions()),
            scope: CrlScope::of(parsed.extensions()),
            number,
            this_update: parsed.last_update().timestamp(),
            next_update,
            revoked: serials.map(|entry| trimmed(entry.raw_serial())).collect(),
            signers: Mutex::default(),
            der: der.to_vec().into(),
        })
    }

    /// Whether it bears this name; another CA may have the same.
    pub(in crate::gate) fn bears(&self, name: &CanonicalName) -> bool {
        self.issuer == *name
    }

    /// Whether it is this CA's: by name, and by its signature.
    pub(in crate::gate) fn is_of(&self, authority: &X509Certificate<'_>) -> bool {
        if !self.bears(&CanonicalName::of(authority.subject())) {
            return false;
        }
        let key = authority.public_key();
        let digest = sha256_bytes(key.raw);
        if let Some(known) = lock(&self.signers).get(&digest) {
            return *known;
        }
        let is_signer = is_signed_by(&self.der, key.raw);
        let signers = &mut lock(&self.signers);
        if signers.len() >= SIGNERS_MAX {
            signers.clear();
        }
        signers.insert(digest, is_signer);
        is_signer
    }

    fn revokes(&self, certificate: &X509Certificate<'_>) -> bool {
        self.revoked.contains(&trimmed(certificate.raw_serial()))
    }

    /// Whether the other is a newer list of the same issuer and scope.
    fn is_superseded_by(&self, other: &Self) -> bool {
        let is_same = self.issuer == other.issuer
            && self.authority_key == other.authority_key
            && self.scope == other.scope;
        // By clock and by count, where the CA counts. Where they disagree (a CA that was moved began
        // to count again), both lists count: none is newer, and there is no circle.
        let numbers = self.number.as_ref().zip(other.number.as_ref());
        let by_number = numbers.map_or(Ordering::Equal, |(one, two)| {
            one.len().cmp(&two.len()).then_with(|| one.cmp(two))
        });
        let by_time = self.this_update.cmp(&other.this_update);
        let is_older = by_time.is_le() && by_number.is_le() && by_time.then(by_number).is_lt();
        is_same && is_older
    }
}

impl CrlScope {
    fn of(extensions: &[X509Extension<'_>]) -> Self {
        let mut parsed = extensions.iter().map(X509Extension::parsed_extension);
        let point = parsed.find_map(|extension| {
            if let ParsedExtension::IssuingDistributionPoint(point) = extension {
                Some(point)
            } else {
                None
            }
        });
        point.map_or_else(Self::default, |point| Self {
            only_leaves: point.only_contains_user_certs,
            only_authorities: point.only_contains_ca_certs,
            uris: point.distribution_point.as_ref().map(uris),
        })
    }

    /// Whether a certificate that is not on the list is known not to be revoked: it is within.
    fn covers(&self, certificate: &X509Certificate<'_>, is_leaf: bool) -> bool {
        if self.only_leaves && !is_leaf || self.only_authorities && is_leaf {
            return false;
        }
        let Some(shard) = &self.uris else {
            return true;
        };
        let extensions = certificate.extensions().iter();
        let mut parsed = extensions.map(X509Extension::parsed_extension);
        let points = parsed.find_map(|extension| {
            if let ParsedExtension::CRLDistributionPoints(points) = extension {
                Some(points)
            } else {
                None
            }
        });
        // A certificate that names no list is in every one of its issuer's.
        points.is_none_or(|points| {
            let whole = points.iter().filter(|point| {
                let is_part = point.reasons.is_some() || point.crl_issuer.is_some();
                !is_part
            });
            let names = whole.filter_map(|point| point.distribution_point.as_ref());
            names.flat_map(uris).any(|uri| shard.contains(&uri))
        })
    }
}

/// All lists of a host, and what one that has expired is worth.
pub(in crate::gate) struct Revocation {
    lists: Vec<Arc<Crl>>,
    expired: CrlExpired,
}

impl Revocation {
    pub(in crate::gate) fn new(lists: Vec<Arc<Crl>>, expired: CrlExpired) -> Self {
        Self { lists, expired }
    }

    /// Judges a path, leaf first, the CA that is trusted last; each has signed the one before.
    ///
    /// # Errors
    ///
    /// Returns [`Refusal::Revoked`] if a list of its issuer has any of them; else [`Refusal::CrlMissing`] if a CA has a list, and it or one below it has none for a
    /// certificate that it has signed; or [`Refusal::CrlExpired`] if all for it have expired.
    pub(in crate::gate) fn judge(
        &self,
        path: &[&X509Certificate<'_>],
        now: UnixTime,
    ) -> Result<(), Refusal> {
        let pairs = path.windows(2);
        let steps = pairs.map(|pair| (pair[0], self.of_issuer(pair[1]), pair[1]));
        let steps: Vec<_> = steps.collect();
        let mut all = steps.iter();
        if all.any(|(certificate, lists, _)| lists.iter().any(|list| list.revokes(certificate))) {
            return Err(Refusal::Revoked);
        }
        let mut is_needed = false;
        for (index, (certificate, lists, issuer)) in steps.iter().enumerate().rev() {
            is_needed |= !lists.is_empty();
            if !is_needed {
                continue;
            }
            let covering = lists.iter().filter(|list| {
                may_sign_lists(issuer) && list.scope.covers(certificate, index == 0)
            });
            match self.is_any_current(&covering.copied().collect::<Vec<_>>(), now) {
                None => return Err(Refusal::CrlMissing),
                Some(false) => return Err(Refusal::CrlExpired),
                Some(true) => {}
            }
        }
        Ok(())
    }

    /// Judges a leaf that is trusted for its key, whichever CA has signed it. The signature of a list
    /// cannot be verified without its CA: name and key identifier decide, for a list that the
    /// operator has named.
    ///
    /// # Errors
    ///
    /// As [`Self::judge`].
    pub(in crate::gate) fn judge_pinned(
        &self,
        leaf: &X509Certificate<'_>,
        now: UnixTime,
    ) -> Result<(), Refusal> {
        let issuer = CanonicalName::of(leaf.issuer());
        let key = key_identifier(leaf.extensions());
        let lists = self.lists.iter().filter(|list| {
            let keys = key.as_ref().zip(list.authority_key.as_ref());
            list.bears(&issuer) && keys.is_none_or(|(one, two)| one == two)
        });
        let lists = newest(lists);
        if lists.iter().any(|list| list.revokes(leaf)) {
            return Err(Refusal::Revoked);
        }
        let covering = lists.iter().filter(|list| list.scope.covers(leaf, true));
        match self.is_any_current(&covering.copied().collect::<Vec<_>>(), now) {
            Some(false) => Err(Refusal::CrlExpired),
            Some(true) | None => Ok(()),
        }
    }

    /// Whether a CA that is trusted is on a list of its own issuer, which is trusted as well.
    pub(in crate::gate) fn revokes_authority(
        &self,
        authority: &X509Certificate<'_>,
        authorities: &[X509Certificate<'_>],
    ) -> bool {
        let issuer = CanonicalName::of(authority.issuer());
        let issuers = authorities.iter().filter(|other| {
            let is_namesake = CanonicalName::of(other.subject()) == issuer;
            is_namesake && is_signed_by(authority.as_raw(), other.public_key().raw)
        });
        let mut lists = issuers.flat_map(|namesake| self.of_issuer(namesake));
        lists.any(|list| list.revokes(authority))
    }

    /// When what was judged has to be judged again: when the next list expires.
    pub(in crate::gate) fn next_update(&self, now: UnixTime) -> i64 {
        let all = self.lists.iter().map(|list| list.next_update);
        let coming = all.filter(|next| *next >= seconds(now));
        match self.expired {
            CrlExpired::Refuse => coming.min().unwrap_or(i64::MAX),
            CrlExpired::Accept => i64::MAX,
        }
    }

    /// The newest lists that an issuer has signed.
    fn of_issuer(&self, issuer: &X509Certificate<'_>) -> Vec<&Crl> {
        newest(self.lists.iter().filter(|list| list.is_of(issuer)))
    }

    /// Whether any of these has not expired; nothing, if there are none.
    fn is_any_current(&self, lists: &[&Crl], now: UnixTime) -> Option<bool> {
        let lists = lists.iter();
        let are_current = lists.map(|list| self.is_current(list, now));
        are_current.reduce(|one, other| one || other)
    }

    fn is_current(&self, list: &Crl, now: UnixTime) -> bool {
        match self.expired {
            CrlExpired::Refuse => seconds(now) < list.next_update,
            CrlExpired::Accept => true,
        }
    }
}

/// Without those that a newer list of the same issuer and scope supersedes.
pub(in crate::gate) fn newest<'a>(lists: impl Iterator<Item = &'a Arc<Crl>>) -> Vec<&'a Crl> {
    let lists: Vec<&Crl> = lists.map(Arc::as_ref).collect();
    let is_newest = |list: &&Crl| !lists.iter().any(|other| list.is_superseded_by(other));
    lists.iter().copied().filter(is_newest).collect()
}

/// Whether a CA's key usage allows it to sign lists (RFC 5280 §4.2.1.3): without one, it may.
pub(in crate::gate) fn may_sign_lists(authority: &X509Certificate<'_>) -> bool {
    let usage = authority.key_usage().ok().flatten();
    usage.is_none_or(|usage| usage.value.crl_sign())
}

fn key_identifier(extensions: &[X509Extension<'_>]) -> Option<Vec<u8>> {
    let mut parsed = extensions.iter().map(X509Extension::parsed_extension);
    parsed.find_map(|extension| {
        if let ParsedExtension::AuthorityKeyIdentifier(key) = extension {
            key.key_identifier.as_ref().map(|key| key.0.to_vec())
        } else {
            None
        }
    })
}

fn uris(point: &DistributionPointName<'_>) -> Vec<String> {
    let DistributionPointName::FullName(names) = point else {
        return Vec::new();
    };
    let uris = names.iter().filter_map(|name| {
        if let GeneralName::URI(uri) = name {
            Some((*uri).to_owned())
        } else {
            None
        }
    });
    uris.collect()
}

/// A number without its leading zeros, so that equal numbers are equal bytes.
fn trimmed(number: &[u8]) -> Vec<u8> {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    number[zeros..].to_vec()
}

/// Keys whose verdict on a list is remembered.
const SIGNERS_MAX: usize = 64;
