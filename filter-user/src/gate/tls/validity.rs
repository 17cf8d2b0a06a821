//! From when until when a certificate holds.

use rustls::pki_types::UnixTime;
use x509_parser::prelude::X509Certificate;

use crate::gate::refusal::Refusal;

/// Seconds since the UNIX epoch, both included.
#[derive(Clone, Copy, Debug)]
pub(in crate::gate) struct Validity {
    pub(in crate::gate) not_before: i64,
    pub(in crate::gate) not_after: i64,
}

impl Validity {
    pub(in crate::gate) fn of(certificate: &X509Certificate<'_>) -> Self {
        Self {
            not_before: certificate.validity().not_before.timestamp(),
            not_after: certificate.validity().not_after.timestamp(),
        }
    }

    pub(in crate::gate) fn holds(self, now: UnixTime) -> bool {
        self.refuse(now).is_none()
    }

    /// Why the time of now is not within.
    pub(in crate::gate) fn refuse(self, now: UnixTime) -> Option<Refusal> {
        let now = seconds(now);
        if now < self.not_before {
            return Some(Refusal::NotYetValid);
        }
        (now > self.not_after).then_some(Refusal::Expired)
    }

    /// The time in which both hold.
    pub(in crate::gate) fn and(self, other: Self) -> Self {
        Self {
            not_before: self.not_before.max(other.not_before),
            not_after: self.not_after.min(other.not_after),
        }
    }
}

/// Seconds since the UNIX epoch.
pub(in crate::gate) fn seconds(time: UnixTime) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}
