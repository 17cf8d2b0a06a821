//! A time in which a host's trust is the same: what was granted in it is worth nothing after it.

use std::sync::Arc;

use rustls::Error as TlsError;
use rustls::crypto::aws_lc_rs::Ticketer;
use rustls::server::{
    NoServerSessionStorage, ProducesTickets, ServerSessionMemoryCache, StoresServerSessions,
};

use super::credentials::Authority;
use super::revocation::Crl;
use crate::config::{HostSettings, Resumption, Trust};
use crate::digest::sha256_of_parts;
use crate::gate::shutdown::Signal;

/// What holds as long as a host's trust is the same, and no longer.
#[derive(Clone)]
pub(super) struct TrustEpoch {
    /// Digest of everything that decides who is let in.
    pub(super) digest: [u8; 32],
    pub(super) tickets: Option<Arc<dyn ProducesTickets>>,
    pub(super) sessions: Arc<dyn StoresServerSessions>,
    /// Signals its live connections to end.
    pub(super) shutdown: Arc<Signal>,
}

impl TrustEpoch {
    /// The epoch of before, if nothing has changed of what they depend on.
    pub(super) fn new(
        host: &HostSettings,
        authorities: &[Authority],
        crls: &[Arc<Crl>],
        before: Option<&Self>,
    ) -> Result<Self, TlsError> {
        let HostSettings {
            names: _,
            is_default: _,
            certificates: _,
            trust,
            client_auth,
            crls: _,
            crl_expired,
            min_tls,
            max_depth,
            require_client_eku,
            resumption,
            on_trust_change: _,
            alpn: _,
            has_alpn: _,
            upstream: _,
            proxy_protocol: _,
            proxy_tlvs: _,
            max_connections: _,
        } = host;
        let words = (
            client_auth,
            crl_expired,
            min_tls,
            max_depth,
            require_client_eku,
            resumption,
        );
        let words = format!("{words:?}");
        let authorities = authorities.iter().map(|ca| ca.certificate.as_ref());
        let pins = trust.iter().filter_map(|trust| match &trust.value {
            Trust::Pin(pin) => Some(pin.as_slice()),
            Trust::Cloudflare | Trust::CaFile(_) => None,
        });
        let crls = crls.iter().map(|crl| crl.der.as_ref());
        let parts = authorities.chain(pins).chain(crls);
        let digest = sha256_of_parts(parts.chain([words.as_bytes()]));

        match before {
            Some(before) if before.digest == digest => Ok(before.clone()),
            Some(_) | None => Ok(Self {
                digest,
                tickets: match resumption {
                    Resumption::Verified => Some(Ticketer::new()?),
                    Resumption::Off => None,
                },
                sessions: match resumption {
                    Resumption::Verified => ServerSessionMemoryCache::new(SESSIONS),
                    Resumption::Off => Arc::new(NoServerSessionStorage {}),
                },
                shutdown: Arc::default(),
            }),
        }
    }
}

/// Whether a host trusts certificates by their keys.
pub(super) fn has_pins(host: &HostSettings) -> bool {
    let mut trust = host.trust.iter();
    trust.any(|trust| matches!(trust.value, Trust::Pin(_)))
}

/// Sessions of TLS 1.2 that are kept for clients that take no tickets.
const SESSIONS: usize = 1024;
