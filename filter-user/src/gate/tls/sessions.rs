//! Sessions to resume: those whose certificate has expired are not found, so that the client is asked
//! for its new one, instead of being let in and shown out.
//!
//! What else may have changed since (trust, lists) ends all sessions of a host, see `policy`, and every
//! resumed peer is judged again in full; this here only spares one that has renewed its certificate.

use std::fmt::{self, Debug, Formatter};
use std::sync::Arc;

use rustls::server::{ProducesTickets, StoresServerSessions};
use rustls::time_provider::TimeProvider;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Tickets or stored sessions, without those whose certificate has expired.
pub(in crate::gate) struct Unexpired<S: ?Sized> {
    inner: Arc<S>,
    clock: Arc<dyn TimeProvider>,
}

impl<S: ?Sized> Unexpired<S> {
    pub(in crate::gate) fn new(inner: &Arc<S>, clock: &Arc<dyn TimeProvider>) -> Arc<Self> {
        Arc::new(Self {
            inner: Arc::clone(inner),
            clock: Arc::clone(clock),
        })
    }

    /// A session, if it can be resumed: one that cannot be read is no loss.
    fn current(&self, session: Vec<u8>) -> Option<Vec<u8>> {
        let now = self.clock.current_time()?.as_secs();
        let now = i64::try_from(now).ok()?;
        let is_valid = |certificate: &[u8]| {
            let parsed = X509Certificate::from_der(certificate);
            parsed.is_ok_and(|(_, parsed)| now <= parsed.validity().not_after.timestamp())
        };
        // What a client sends besides its own certificate decides nothing.
        let is_current = certificates(&session)?.into_iter().take(1).all(is_valid);
        is_current.then_some(session)
    }
}

impl ProducesTickets for Unexpired<dyn ProducesTickets> {
    fn enabled(&self) -> bool {
        self.inner.enabled()
    }

    fn lifetime(&self) -> u32 {
        self.inner.lifetime()
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.inner.encrypt(plain)
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        self.current(self.inner.decrypt(cipher)?)
    }
}

impl StoresServerSessions for Unexpired<dyn StoresServerSessions> {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        self.inner.put(key, value)
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.current(self.inner.get(key)?)
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.current(self.inner.take(key)?)
    }

    fn can_cache(&self) -> bool {
        self.inner.can_cache()
    }
}

impl<S: ?Sized> Debug for Unexpired<S> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unexpired").finish_non_exhaustive()
    }
}

/// The client's certificates in a session as rustls writes it, leaf first; `None` if it is written
/// otherwise. The format is rustls' own (src/msgs/persist.rs, `ServerSessionValue`), and a test of the
/// running gate fails if another version has another.
fn certificates(session: &[u8]) -> Option<Vec<&[u8]>> {
    let mut rest = session;
    if flag(&mut rest)? {
        vector(&mut rest, 1)?;
    }
    // Version and cipher suite; the secret; whether it is an extended one.
    take(&mut rest, 4)?;
    vector(&mut rest, 1)?;
    flag(&mut rest)?;
    let mut certificates = Vec::new();
    if flag(&mut rest)? {
        let mut chain = vector(&mut rest, 3)?;
        while !chain.is_empty() {
            certificates.push(vector(&mut chain, 3)?);
        }
    }
    Some(certificates)
}

fn flag(rest: &mut &[u8]) -> Option<bool> {
    match take(rest, 1)? {
        [0] => Some(false),
        [1] => Some(true),
        _ => None,
    }
}

/// Bytes behind their length, which itself takes so many (RFC 8446 §3.4).
fn vector<'a>(rest: &mut &'a [u8], width: usize) -> Option<&'a [u8]> {
    let length = take(rest, width)?.iter();
    let length = length.fold(0, |length, byte| length << 8 | usize::from(*byte));
    take(rest, length)
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(count)?;
    *rest = left;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_found_and_what_is_cut_off_is_no_session() {
        let session = [
            &[1, 3][..],
            b"a.b",
            &[3, 4, 0x13, 1, 2, 9, 9, 1, 1],
            &[0, 0, 9, 0, 0, 2, 7, 7, 0, 0, 1, 8],
            b"whatever follows",
        ]
        .concat();
        let found = certificates(&session).unwrap();
        assert_eq!(found, [&[7, 7][..], &[8]]);

        let without = [0, 3, 4, 0x13, 1, 0, 1, 0];
        assert_eq!(certificates(&without).unwrap(), Vec::<&[u8]>::new());
        for length in 0..without.len() {
            assert_eq!(certificates(&without[..length]), None);
        }
        assert_eq!(certificates(&[2]), None);
    }
}
