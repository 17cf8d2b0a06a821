//! The policies: a server name in, the [`Policy`] of that host out.
//!
//! Each policy has its own rustls configuration, so its own session store and ticket key: what a
//! client was granted by one host can not be offered to another (CVE-2025-23419, CVE-2025-23048).
//! Both are made again whenever the host's [`TrustEpoch`] change: older sessions are then worth nothing.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{ClientHello, ResolvesServerCert, ServerConfig};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, CommonState, Error as TlsError, SupportedProtocolVersion};
use x509_parser::prelude::X509Certificate;

use super::credentials::{self, Authority, Certified};
use super::epoch::{TrustEpoch, has_pins};
use super::facts::{CertFacts, contents};
use super::peer::{PeerVerifier, VerifiedPeer};
use super::revocation::{Crl, Revocation, may_sign_lists};
use super::sessions::Unexpired;
use super::shown::ShownCertificates;
use super::trust::{Anchor, Trusted, VerifiedChains};
use super::upstream_cas::UpstreamCas;
use crate::config::{
    ClientAddress, ClientAuth, ConfigError, HostSettings, Located, MinTls, Name, OnTrustChange,
    Trust, UpstreamName, UpstreamTrust,
};
use crate::gate::proxy::HeaderKind;
use crate::gate::refusal::Refusal;
use crate::gate::refused::Presented;
use crate::gate::shutdown::Signal;
use crate::gate::upstream::{Dialer, Encryption};
use crate::sync::lock;

/// All policies, by server name.
#[derive(Default)]
pub struct Policies {
    all: Vec<Arc<Policy>>,
    by_name: HashMap<Name, usize>,
    default: Option<usize>,
    /// Names of hosts that have none, for a file of theirs cannot be used.
    broken: HashSet<Name>,
}

impl Policies {
    /// These policies, for the names that the configuration of now gives to their hosts: a host whose
    /// new files cannot be used keeps its policy, but no name or default that is another's by now.
    pub(in crate::gate) fn new(
        policies: Vec<(&HostSettings, Arc<Policy>)>,
        broken: HashSet<Name>,
    ) -> Self {
        let mut by_name = HashMap::new();
        for (index, (host, policy)) in policies.iter().enumerate() {
            let names = host.names.iter().map(|name| &name.value);
            for name in names.filter(|name| policy.names.contains(name)) {
                by_name.insert(name.clone(), index);
            }
        }
        Self {
            by_name,
            default: policies.iter().position(|(host, _)| host.is_default),
            all: policies.into_iter().map(|(_, policy)| policy).collect(),
            broken,
        }
    }

    /// The policy for the name in a ClientHello: the exact name's, else the wildcard's that covers
    /// it, else that of the host which was named the default. Else there is none: a name that is
    /// not served is shown no certificate.
    ///
    /// # Errors
    ///
    /// Returns [`Refusal::NoServerName`], [`Refusal::UnknownServerName`] or
    /// [`Refusal::HostUnavailable`].
    pub fn find(&self, server_name: Option<&str>) -> Result<&Arc<Policy>, Refusal> {
        let names = server_name.map(|name| {
            let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
            let parent = name.split_once('.').map(|(_, parent)| parent.to_owned());
            let wildcard = parent.map(Name::Wildcard);
            [Some(Name::Exact(name)), wildcard].into_iter().flatten()
        });
        let mut found = None;
        for name in names.into_iter().flatten() {
            // The closest name decides, also that of a host which cannot be served.
            if self.broken.contains(&name) {
                return Err(Refusal::HostUnavailable);
            }
            found = found.or_else(|| self.by_name.get(&name).copied());
            if found.is_some() {
                break;
            }
        }
        let found = found.or(self.default);
        let refusal = match server_name {
            Some(_) => Refusal::UnknownServerName,
            None => Refusal::NoServerName,
        };
        found.and_then(|index| self.all.get(index)).ok_or(refusal)
    }

    /// Every policy, in the configuration's order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.all.iter()
    }

    /// The policy of the host that stands under this word in the metrics.
    pub(in crate::gate) fn labelled(&self, label: &str) -> Option<&Arc<Policy>> {
        self.all.iter().find(|policy| policy.label == label)
    }
}

/// What one host, or several under one `[[gate.host]]`, demands and where it leads.
pub struct Policy {
    label: String,
    names: Vec<Name>,
    tls: Arc<ServerConfig>,
    /// What is offered while the upstream is not known to speak HTTP/2; none where that is not
    /// configured.
    tls_without_h2: Option<Arc<ServerConfig>>,
    upstream_h2: Mutex<UpstreamH2>,
    verifier: Arc<PeerVerifier>,
    clock: Arc<dyn TimeProvider>,
    dialer: Dialer,
    shown: ShownCertificates,
    epoch: TrustEpoch,
    pub(in crate::gate) max_connections: u64,
    /// How many there are, those from before a reload among them.
    pub(in crate::gate) connections: Arc<AtomicU64>,
    pub(in crate::gate) on_trust_change: OnTrustChange,
    pub(in crate::gate) client_auth: ClientAuth,
    pub(in crate::gate) facts: CertFacts,
}

/// Whether an upstream speaks HTTP/2, as far as it was asked.
#[derive(Clone, Debug, Default)]
pub(in crate::gate) enum UpstreamH2 {
    /// It was not asked yet.
    #[default]
    Unasked,
    /// It does.
    Spoken,
    /// It does not.
    NotSpoken,
    /// It cannot be asked, for this reason.
    Unknown(String),
}

/// What policies are built with.
pub(in crate::gate) struct TlsContext {
    pub(in crate::gate) provider: Arc<CryptoProvider>,
    pub(in crate::gate) clock: Arc<dyn TimeProvider>,
    /// Cloudflare's CA.
    pub(in crate::gate) shared: Authority,
    /// The ports whose connections are steered to the gate.
    pub(in crate::gate) steered_ports: Vec<u16>,
    /// Which address the web server sees.
    pub(in crate::gate) client_address: ClientAddress,
}

impl Policy {
    /// Reads the host's files and builds its TLS configuration; `before` is what holds of the same
    /// host until then.
    pub(in crate::gate) fn load(
        host: &HostSettings,
        context: &TlsContext,
        before: Option<&Self>,
    ) -> Result<Self, ConfigError> {
        let blame = |problem: TlsError| host.place().error(problem);
        let certified = host.certificates.iter();
        let certified = certified
            .map(|pair| credentials::certified(pair, &context.provider))
            .collect::<Result<Vec<_>, _>>()?;
        let mut authorities = Vec::new();
        for trust in &host.trust {
            authorities.extend(credentials::authorities(trust, &context.shared)?);
        }
        let parsed = authorities.iter().map(Authority::parsed);
        let parsed = parsed.collect::<Result<Vec<_>, _>>()?;
        let lists = load_crls(host, &authorities, &parsed)?;
        let upstream_cas = upstream_cas(host)?;
        let contents = contents(host, &certified, &authorities, &lists, &upstream_cas);
        let crls: Vec<_> = lists.into_iter().flatten().collect();

        let epoch = TrustEpoch::new(host, &authorities, &crls, before.map(|it| &it.epoch))
            .map_err(blame)?;
        let facts = CertFacts::new(
            host,
            &certified,
            &authorities,
            &crls,
            contents,
            &context.shared,
        );
        let trusted = trusted(host, context, (&authorities, &parsed), &crls)?;
        let verifier = Arc::new(PeerVerifier::new(trusted, host.client_auth));
        let shown = ShownCertificates::new(&certified, before.map(|before| &before.shown));
        let tls = server_config(host, context, &verifier, certified, &epoch).map_err(blame)?;
        let tls_without_h2 = tls.alpn_protocols.iter().any(|name| name == H2).then(|| {
            let mut tls = tls.clone();
            tls.alpn_protocols.retain(|name| name != H2);
            Arc::new(tls)
        });
        let dialer = dialer(host, context, &shown, upstream_cas)?;
        // What is known of an upstream holds until it is asked again.
        let same = before.filter(|before| before.dialer.upstream == dialer.upstream);
        let known = same.map_or_else(UpstreamH2::default, Self::upstream_h2);

        Ok(Self {
            label: host.label(),
            names: host.names.iter().map(|name| name.value.clone()).collect(),
            tls: Arc::new(tls),
            tls_without_h2,
            upstream_h2: Mutex::new(known),
            verifier,
            clock: Arc::clone(&context.clock),
            dialer,
            shown,
            epoch,
            max_connections: host.max_connections.map_or(u64::MAX, |max| max as u64),
            connections: before.map_or_else(Arc::default, |old| Arc::clone(&old.connections)),
            on_trust_change: host.on_trust_change,
            client_auth: host.client_auth,
            facts,
        })
    }

    /// The host's first name, which stands for the policy in metrics and logs.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Whether it refuses those whom it does not trust.
    #[must_use]
    pub fn enforces(&self) -> bool {
        self.client_auth == ClientAuth::Enforce
    }

    /// Whether who gets in has a certificate that only the operator's account presents.
    #[must_use]
    pub fn proves_account(&self) -> bool {
        self.enforces() && !self.facts.trusts_shared
    }

    pub(in crate::gate) fn dialer(&self) -> &Dialer {
        &self.dialer
    }

    /// What clients are offered: HTTP/2 only if the upstream is known to speak it.
    pub(in crate::gate) fn tls(&self) -> Arc<ServerConfig> {
        match &self.tls_without_h2 {
            Some(without) if !self.offers_h2() => Arc::clone(without),
            Some(_) | None => Arc::clone(&self.tls),
        }
    }

    /// Whether the client can speak what the host speaks (RFC 7301 §3.2); without ALPN, that is HTTP/1.1.
    pub(in crate::gate) fn shares_protocol(&self, hello: &ClientHello<'_>) -> bool {
        let spoken = &self.tls().alpn_protocols;
        let is_spoken = |name: &[u8]| spoken.iter().any(|spoken| spoken == name);
        match hello.alpn() {
            _ if spoken.is_empty() => true,
            Some(mut offered) => offered.any(is_spoken),
            None => is_spoken(HTTP_1_1),
        }
    }

    /// Whether HTTP/2 is configured.
    pub(in crate::gate) fn would_offer_h2(&self) -> bool {
        self.tls_without_h2.is_some()
    }

    /// Whether HTTP/2 is configured, and the upstream speaks it.
    pub(in crate::gate) fn offers_h2(&self) -> bool {
        self.would_offer_h2() && matches!(*lock(&self.upstream_h2), UpstreamH2::Spoken)
    }

    /// Whether the upstream has answered what it speaks.
    pub(in crate::gate) fn has_answered_h2(&self) -> bool {
        match *lock(&self.upstream_h2) {
            UpstreamH2::Spoken | UpstreamH2::NotSpoken => true,
            UpstreamH2::Unasked | UpstreamH2::Unknown(_) => false,
        }
    }

    /// Whether the upstream speaks HTTP/2, as far as it was asked.
    pub(in crate::gate) fn upstream_h2(&self) -> UpstreamH2 {
        lock(&self.upstream_h2).clone()
    }

    /// Asks the upstream whether it speaks HTTP/2. Blocks, see [`Dialer::speaks_h2`].
    pub(in crate::gate) fn ask_h2(&self) {
        let answer = match self.dialer.speaks_h2() {
            Ok(true) => UpstreamH2::Spoken,
            Ok(false) => UpstreamH2::NotSpoken,
            Err(error) => UpstreamH2::Unknown(error.to_string()),
        };
        *lock(&self.upstream_h2) = answer;
    }

    /// Whether sessions and connections of one are worth as much at the other.
    pub(in crate::gate) fn has_epoch_of(&self, other: &Self) -> bool {
        self.epoch.digest == other.epoch.digest
    }

    /// The signal to all its live connections.
    pub(in crate::gate) fn shutdown(&self) -> &Arc<Signal> {
        &self.epoch.shutdown
    }

    /// Takes the peer of a finished handshake as verified, or refuses it.
    pub(in crate::gate) fn verified_peer(
        &self,
        connection: &CommonState,
    ) -> Result<VerifiedPeer, (Refusal, Option<Presented>)> {
        // Without a clock nothing can be said of any certificate.
        let now = self
            .clock
            .current_time()
            .ok_or((Refusal::NotYetValid, None))?;
        self.verifier.verified_peer(connection, now)
    }
}

/// The lists of each of the host's files; each has an effect.
fn load_crls(
    host: &HostSettings,
    authorities: &[Authority],
    parsed: &[X509Certificate<'_>],
) -> Result<Vec<Vec<Arc<Crl>>>, ConfigError> {
    let mut all = Vec::new();
    let mut are_useful = has_pins(host);
    for file in &host.crls {
        let lists = credentials::crls(file)?;
        for crl in &lists {
            let mut signers = parsed.iter().filter(|ca| crl.is_of(ca)).peekable();
            let is_signed = signers.peek().is_some();
            if !is_signed && authorities.iter().any(|ca| crl.bears(&ca.subject)) {
                return Err(file.place.error(format_args!(
                    "{} bears the name of a CA in `trust` and is not signed by its key: the list is a forgery, \
                     or of a CA of that name before its key was changed; fetch it again from the CA itself",
                    file.value.display()
                )));
            }
            if is_signed && !signers.any(|ca| may_sign_lists(ca)) {
                return Err(file.place.error(format_args!(
                    "{} is signed by a CA in `trust` whose key usage does not allow it to sign \
                     lists (no cRLSign), so that each of its clients would be refused; have the CA \
                     certificate issued again with cRLSign",
                    file.value.display()
                )));
            }
            are_useful |= is_signed;
        }
        all.push(lists);
    }
    if let (Some(first), false) = (host.crls.first(), are_useful) {
        return Err(first.place.error(format_args!(
            "{} is of no CA in `trust`, so it would be without effect; name the list of the CA \
             that signs your client certificates",
            first.value.display()
        )));
    }
    Ok(all)
}

fn trusted(
    host: &HostSettings,
    context: &TlsContext,
    (authorities, parsed): (&[Authority], &[X509Certificate<'_>]),
    crls: &[Arc<Crl>],
) -> Result<Trusted, ConfigError> {
    let revocation = Revocation::new(crls.to_vec(), host.crl_expired);
    let anchor = |authority: &Authority, is_revoked| {
        Anchor::new(authority, is_revoked).map_err(|error| {
            host.place().error(format_args!(
                "the CA {} cannot be used: {error}",
                authority.label
            ))
        })
    };
    let anchors = authorities
        .iter()
        .zip(parsed)
        .map(|(authority, certificate)| {
            anchor(authority, revocation.revokes_authority(certificate, parsed))
        });
    let pins = host.trust.iter().filter_map(|trust| match trust.value {
        Trust::Pin(pin) => Some(pin),
        Trust::Cloudflare | Trust::CaFile(_) => None,
    });
    Ok(Trusted {
        anchors: anchors.collect::<Result<_, _>>()?,
        pins: pins.collect(),
        max_depth: host.max_depth,
        require_eku: host.require_client_eku,
        shared: anchor(&context.shared, false)?,
        revocation,
        algorithms: context.provider.signature_verification_algorithms,
        seen: VerifiedChains::default(),
    })
}

/// What rustls does with a client of the host.
fn server_config(
    host: &HostSettings,
    context: &TlsContext,
    verifier: &Arc<PeerVerifier>,
    certified: Vec<Certified>,
    epoch: &TrustEpoch,
) -> Result<ServerConfig, TlsError> {
    let builder = ServerConfig::builder_with_details(
        Arc::clone(&context.provider),
        Arc::clone(&context.clock),
    );
    let keys = certified.into_iter().map(|certified| certified.key);
    let mut tls = builder
        .with_protocol_versions(versions(host.min_tls))?
        .with_client_cert_verifier(Arc::clone(verifier) as _)
        .with_cert_resolver(Arc::new(CertResolver(keys.collect())));
    tls.alpn_protocols = host.alpn.iter().map(|name| name.clone().into()).collect();
    tls.session_storage = Unexpired::new(&epoch.sessions, &context.clock);
    match &epoch.tickets {
        Some(tickets) => {
            tls.ticketer = Unexpired::new(tickets, &context.clock);
            tls.send_tls13_tickets = TICKETS;
        }
        None => tls.send_tls13_tickets = 0,
    }
    Ok(tls)
}

/// The certificates in the upstream's `ca_file`; none, if it has none.
fn upstream_cas(host: &HostSettings) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    match host.upstream.value.tls.as_ref().map(|tls| &tls.trust) {
        Some(UpstreamTrust::CaFile(file)) => credentials::upstream_cas(file),
        Some(UpstreamTrust::Shown) | None => Ok(Vec::new()),
    }
}

fn dialer(
    host: &HostSettings,
    context: &TlsContext,
    shown: &ShownCertificates,
    upstream_cas: Vec<CertificateDer<'static>>,
) -> Result<Dialer, ConfigError> {
    let place = &host.upstream.place;
    let upstream = host.upstream.value.clone();
    let encryption = upstream.tls.as_ref().map(|tls| {
        let place = place.of("gate.host.upstream_tls");
        let server_name = |name: String| {
            let name = ServerName::try_from(name);
            name.map_err(|error| place.error(error))
        };
        let (name, asked) = match &tls.name {
            UpstreamName::Fixed(name) => (Some(server_name(name.clone())?), vec![name.clone()]),
            UpstreamName::Clients => (None, host.names.iter().map(example_of).collect()),
        };
        let asked_names = asked.into_iter().map(server_name);
        let builder = ClientConfig::builder_with_details(
            Arc::clone(&context.provider),
            Arc::clone(&context.clock),
        );
        let builder = builder
            .with_safe_default_protocol_versions()
            .map_err(|error| place.error(error))?;
        let algorithms = context.provider.signature_verification_algorithms;
        let builder = match &tls.trust {
            UpstreamTrust::CaFile(path) => {
                let verifier = UpstreamCas::new(path, upstream_cas, &context.provider)?;
                builder
                    .dangerous()
                    .with_custom_certificate_verifier(Arc::new(verifier))
            }
            UpstreamTrust::Shown => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(shown.verifier(algorithms))),
        };
        Ok(Encryption {
            name,
            asked_names: asked_names.collect::<Result<_, ConfigError>>()?,
            config: builder.with_no_client_auth(),
        })
    });
    Ok(Dialer {
        steered_ports: context.steered_ports.clone(),
        client_address: context.client_address,
        header: HeaderKind::of(host),
        encryption: encryption.transpose()?,
        upstream,
    })
}

/// A name that is said by a client of a host: of a wildcard, one that it covers.
fn example_of(name: &Located<Name>) -> String {
    match &name.value {
        Name::Exact(name) => name.clone(),
        Name::Wildcard(parent) => format!("www.{parent}"),
    }
}

fn versions(min: MinTls) -> &'static [&'static SupportedProtocolVersion] {
    match min {
        MinTls::Tls12 => &SINCE_TLS12,
        MinTls::Tls13 => &SINCE_TLS12[..1],
    }
}

/// The certificates of a host; the first whose key can sign for the client is shown.
#[derive(Debug)]
struct CertResolver(Vec<Arc<CertifiedKey>>);

impl ResolvesServerCert for CertResolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let schemes = hello.signature_schemes();
        let suits = |key: &&Arc<CertifiedKey>| key.key.choose_scheme(schemes).is_some();
        let suitable = self.0.iter().find(suits);
        suitable.or_else(|| self.0.first()).map(Arc::clone)
    }
}

/// The protocols, as ALPN names them.
const H2: &[u8] = b"h2";
const HTTP_1_1: &[u8] = b"http/1.1";
static SINCE_TLS12: [&SupportedProtocolVersion; 2] =
    [&rustls::version::TLS13, &rustls::version::TLS12];
/// Tickets per full handshake of TLS 1.3: a client that needs more is given one at each.
const TICKETS: usize = 1;
