//! The policies: a server name in, the [`Policy`] of that host out.
//!
//! Each policy has its own rustls configuration, so its own session store and ticket key: what a
//! client was granted by one host can not be offered to another (CVE-2025-23419, CVE-2025-23048).

use std::collections::HashMap;
use std::sync::Arc;

use rustls::crypto::aws_lc_rs::{self, Ticketer};
use rustls::server::{NoServerSessionStorage, ServerConfig, ServerConnection, WantsServerCert};
use rustls::time_provider::TimeProvider;
use rustls::{ConfigBuilder, Error as TlsError};

use super::credentials;
use super::peer::{PeerVerifier, VerifiedPeer};
use super::refusal::Refusal;
use crate::config::{ConfigError, Host, ProxyProtocol, Resumption, Upstream};
use crate::telemetry::Metrics;

/// All policies, by server name.
pub struct Policies {
    by_name: HashMap<String, Arc<Policy>>,
}

impl Policies {
    pub(super) fn new(policies: Vec<Policy>) -> Self {
        let mut by_name = HashMap::new();
        for policy in policies {
            let policy = Arc::new(policy);
            for name in &policy.names {
                by_name.insert(name.clone(), Arc::clone(&policy));
            }
        }
        Self { by_name }
    }

    /// The policy for the name in a ClientHello. There is no default: a name that is not served
    /// is shown no certificate.
    ///
    /// # Errors
    ///
    /// Returns [`Refusal::NoServerName`] or [`Refusal::UnknownServerName`].
    pub fn find(&self, server_name: Option<&str>) -> Result<&Arc<Policy>, Refusal> {
        let name = server_name.ok_or(Refusal::NoServerName)?;
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        self.by_name.get(&name).ok_or(Refusal::UnknownServerName)
    }
}

/// What one host, or several under one `[[gate.host]]`, demands and where it leads.
pub struct Policy {
    names: Vec<String>,
    tls: Arc<ServerConfig>,
    verifier: Arc<PeerVerifier>,
    clock: Arc<dyn TimeProvider>,
    upstream: Upstream,
    proxy_protocol: ProxyProtocol,
}

impl Policy {
    /// Reads the host's files and builds its TLS configuration.
    pub(super) fn load(
        host: &Host,
        clock: &Arc<dyn TimeProvider>,
        metrics: &Metrics,
    ) -> Result<Self, ConfigError> {
        let blame = |problem: TlsError| host.certificate.place.error(problem);
        let now = clock
            .current_time()
            .ok_or_else(|| blame(TlsError::FailedToGetCurrentTime))?;
        let chain = credentials::chain(&host.certificate, now)?;
        let key = credentials::key(&host.key)?;
        let mut authorities = Vec::new();
        for trust in &host.trust {
            authorities.extend(credentials::authorities(trust, now)?);
        }

        let names: Vec<_> = host.names.iter().map(|name| name.value.clone()).collect();
        let label = names.first().map_or("", String::as_str);
        metrics.expires(label, "certificate", chain.not_after);
        let earliest = authorities.iter().map(|ca| ca.validity.not_after).min();
        metrics.expires(label, "authority", earliest.unwrap_or(0));

        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = Arc::new(PeerVerifier::new(authorities, &provider).map_err(blame)?);
        let builder = ServerConfig::builder_with_details(provider, Arc::clone(clock))
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(blame)?
            .with_client_cert_verifier(Arc::clone(&verifier) as _);
        let mut tls = with_certificate(builder, host, chain, key)?;
        tls.alpn_protocols = host.alpn.iter().map(|name| name.clone().into()).collect();
        match host.resumption {
            Resumption::Verified => tls.ticketer = Ticketer::new().map_err(blame)?,
            Resumption::Off => {
                tls.session_storage = Arc::new(NoServerSessionStorage {});
                tls.send_tls13_tickets = 0;
            }
        }

        Ok(Self {
            names,
            tls: Arc::new(tls),
            verifier,
            clock: Arc::clone(clock),
            upstream: host.upstream.value.clone(),
            proxy_protocol: host.proxy_protocol,
        })
    }

    /// The host's first name, which stands for the policy in metrics and logs.
    #[must_use]
    pub fn label(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// Where accepted connections are relayed to.
    #[must_use]
    pub fn upstream(&self) -> &Upstream {
        &self.upstream
    }

    /// The header that the upstream is sent first.
    #[must_use]
    pub fn proxy_protocol(&self) -> ProxyProtocol {
        self.proxy_protocol
    }

    pub(super) fn tls(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.tls)
    }

    /// Takes the peer of a finished handshake as verified, or refuses it.
    pub(super) fn verified_peer(
        &self,
        connection: &ServerConnection,
    ) -> Result<VerifiedPeer, Refusal> {
        // Without a clock nothing can be said of any certificate.
        let now = self.clock.current_time().ok_or(Refusal::BadCertificate)?;
        self.verifier.verified_peer(connection, now)
    }
}

fn with_certificate(
    builder: ConfigBuilder<ServerConfig, WantsServerCert>,
    host: &Host,
    chain: credentials::Chain,
    key: rustls::pki_types::PrivateKeyDer<'static>,
) -> Result<ServerConfig, ConfigError> {
    let (certificate, key_file) = (&host.certificate, &host.key);
    let built = builder.with_single_cert(chain.certificates, key);
    built.map_err(|error| {
        if matches!(error, TlsError::InconsistentKeys(_)) {
            return key_file.place.error(format_args!(
                "the key {} does not belong to the certificate {}; name the key it was made with",
                key_file.value.display(),
                certificate.value.display()
            ));
        }
        certificate.place.error(format_args!(
            "{} cannot be used: {error}",
            certificate.value.display()
        ))
    })
}
