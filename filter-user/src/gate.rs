//! The gate: a TLS listener that relays only for clients whose certificate it has verified.
//!
//! ```text
//! TcpStream ─permit▶ ─source check▶ ─ClientHello▶ Policy ─limits▶ ─handshake▶ VerifiedPeer
//!                                                    ─dial▶ upstream ─relay▶ closed(Outcome)
//! ```
//! Each arrow is a step of `connection`, and each step takes the proof of the one before.

mod client_hello;
mod connection;
mod endpoint;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod limits;
mod lint;
mod listener;
mod nonblocking;
mod printable;
mod proxy;
mod range_usage;
mod refusal;
mod refused;
mod relay;
mod session;
mod shutdown;
mod threads;
mod tls;
mod upstream;

use std::collections::HashSet;
use std::fmt::{self, Display, Formatter};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Instant;

use ipnet::IpNet;
use rustls::crypto::aws_lc_rs;
use rustls::time_provider::TimeProvider;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use self::limits::{Allowed, Limits, RateLimiter};
pub use self::lint::{listeners, unreadable_files};
pub use self::listener::{Worker, bind, serve};
use self::proxy::HeaderKind;
pub use self::range_usage::{ActiveClient, RangeUsage, UsedRange};
pub use self::refusal::{Defect, Limit, Outcome, Phase, Quantity, Refusal, UpstreamFault};
use self::refused::LastRefusals;
pub use self::refused::{Presented, Refused};
use self::shutdown::{Order, Signal};
pub use self::threads::{Thread, Threads, Working};
pub use self::tls::credentials::{
    GATE_GROUP, KEY_GROUP, is_shared_authority, service_groups, spki,
};
pub use self::tls::facts::FileContent;
pub use self::tls::peer::VerifiedPeer;
use self::tls::policy::TlsContext;
pub use self::tls::policy::{Policies, Policy};
pub use self::tls::trust::Identity;
use crate::config::{self, ConfigError, HostSettings, OnTrustChange};
use crate::observe::log::Budget;
use crate::observe::{Finding, Metrics};
use crate::ranges::Compiled;
use crate::report::chain;
use crate::sync::{joined, lock};

/// What all connections share.
pub struct Gate {
    in_use: watch::Sender<Arc<ActiveSettings>>,
    active: watch::Receiver<Arc<Compiled>>,
    range_usage: RangeUsage,
    limits: Limits,
    metrics: Metrics,
    connections: Arc<Semaphore>,
    refusals: Budget,
    last_refusals: LastRefusals,
    sampling: RateLimiter,
    ids: Ids,
    /// Signals live connections to end, those of a replaced trust among them.
    endings: Mutex<Vec<Weak<Signal>>>,
}

/// What a reload replaces: the policies, and how long and how many.
struct ActiveSettings {
    settings: config::GateSettings,
    clock: Arc<dyn TimeProvider>,
    policies: Policies,
    allowed: Allowed,
}

impl ActiveSettings {
    fn new(settings: &config::GateSettings, loaded: Loaded) -> Self {
        Self {
            settings: settings.clone(),
            clock: loaded.clock,
            policies: loaded.policies,
            allowed: Allowed {
                handshakes: settings.max_handshakes,
                source: settings.per_source,
                network: settings.per_network,
            },
        }
    }
}

/// Policies whose files were read and found in order.
pub struct Loaded {
    policies: Policies,
    clock: Arc<dyn TimeProvider>,
    /// The hosts of which something cannot be used.
    broken: Vec<UnusableHost>,
}

/// A host of which a file cannot be used.
#[derive(Debug)]
pub struct UnusableHost {
    /// Its first name.
    host: String,
    /// The file, with its place in the configuration.
    error: ConfigError,
    /// Whether it is served as before; else its clients are refused ([`Refusal::HostUnavailable`]).
    is_served: bool,
}

impl Display for UnusableHost {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self {
            host,
            error,
            is_served,
        } = self;
        let error = chain(error);
        if *is_served {
            write!(
                f,
                "`{host}` is served as before, what is new cannot be used: {error}"
            )
        } else {
            write!(f, "`{host}` is NOT SERVED: {error}")
        }
    }
}

impl Loaded {
    /// Everything, or nothing.
    ///
    /// # Errors
    ///
    /// Returns the first file that cannot be used, with its place in the configuration.
    pub fn whole(mut self) -> Result<Self, ConfigError> {
        if self.broken.is_empty() {
            Ok(self)
        } else {
            Err(self.broken.remove(0).error)
        }
    }

    /// The hosts of which a file cannot be used.
    #[must_use]
    pub fn broken(&self) -> &[UnusableHost] {
        &self.broken
    }

    /// What could be better about it now.
    #[must_use]
    pub fn lints(&self, settings: &config::GateSettings) -> Vec<Finding> {
        lints(settings, &self.clock, &self.policies)
    }

    /// Asks the upstreams whose clients would be offered HTTP/2 whether they speak it, all at once.
    /// Blocks until each has answered, or has had its time.
    pub fn ask_upstreams(&self) {
        thread::scope(|scope| {
            for policy in self
                .policies
                .iter()
                .filter(|policy| policy.would_offer_h2())
            {
                scope.spawn(|| policy.ask_h2());
            }
        });
    }

    /// Upstreams whose certificate is not taken. Blocks as [`Self::ask_upstreams`] does.
    #[must_use]
    pub fn distrusted_upstreams(&self, settings: &config::GateSettings) -> Vec<Finding> {
        let hosts = settings.hosts.iter();
        let hosts = hosts.filter_map(|host| Some((host, self.policies.labelled(&host.label())?)));
        thread::scope(|scope| {
            let asking = hosts.map(|(host, policy)| {
                let asked = scope.spawn(|| policy.dialer().distrusts());
                (host, asked)
            });
            let asking: Vec<_> = asking.collect();
            let findings = asking
                .into_iter()
                .filter_map(|(host, answer)| Some(lint::distrusted(host, &joined(answer)?)));
            findings.collect()
        })
    }

    /// Upstreams that expect another PROXY header than they get. Blocks as [`Self::ask_upstreams`] does.
    #[must_use]
    pub fn header_mismatches(&self, settings: &config::GateSettings) -> Vec<Finding> {
        let mut asked: Vec<(&HostSettings, &Policy)> = Vec::new();
        for host in &settings.hosts {
            let is_known = asked.iter().any(|(known, _)| {
                (&known.upstream.value, HeaderKind::of(known))
                    == (&host.upstream.value, HeaderKind::of(host))
            });
            if let (Some(policy), false) = (self.policies.labelled(&host.label()), is_known) {
                asked.push((host, policy));
            }
        }
        thread::scope(|scope| {
            let asking = asked.into_iter().map(|(host, policy)| {
                (
                    host,
                    scope.spawn(|| {
                        policy
                            .dialer()
                            .expected_header(&host.label().replacen('*', "any", 1))
                    }),
                )
            });
            let asking: Vec<_> = asking.collect();
            let findings = asking
                .into_iter()
                .filter_map(|(host, answer)| Some(lint::header_mismatch(host, joined(answer)?)));
            findings.collect()
        })
    }

    /// What was read from which file, each once, by path.
    #[must_use]
    pub fn contents(&self) -> Vec<FileContent> {
        let policies = self.policies.iter();
        let mut contents: Vec<_> = policies
            .flat_map(|policy| policy.facts.contents.iter().cloned())
            .collect();
        contents.sort();
        contents.dedup();
        contents
    }
}

impl Gate {
    /// A gate with these policies, that checks its peers' addresses by what is `active`, and serves so
    /// many connections at once.
    #[must_use]
    pub fn new(
        settings: &config::GateSettings,
        loaded: Loaded,
        active: watch::Receiver<Arc<Compiled>>,
        max_connections: usize,
        metrics: Metrics,
    ) -> Self {
        let in_use = ActiveSettings::new(settings, loaded);
        tell_expiry(&in_use.policies, &metrics);
        let gate = Self {
            in_use: watch::Sender::new(Arc::new(in_use)),
            range_usage: RangeUsage::new(active.clone()),
            active,
            limits: Limits::new(),
            metrics,
            connections: Arc::new(Semaphore::new(max_connections)),
            refusals: Budget::new(REFUSALS_PER_SECOND),
            last_refusals: LastRefusals::default(),
            sampling: RateLimiter::new(),
            ids: Ids::default(),
            endings: Mutex::default(),
        };
        gate.with_policies(|policies| gate.remember_endings(policies));
        gate
    }

    /// Applies other policies and limits to connections to come; live ones go on, unless their host's
    /// trust has changed and it is set to close them.
    pub fn apply(&self, settings: &config::GateSettings, loaded: Loaded) {
        let new = Arc::new(ActiveSettings::new(settings, loaded));
        tell_expiry(&new.policies, &self.metrics);
        self.remember_endings(&new.policies);
        let replaced = self.in_use.send_replace(Arc::clone(&new));
        for old in replaced.policies.iter() {
            let successor = new.policies.labelled(old.label());
            let is_same = successor.is_some_and(|policy| policy.has_epoch_of(old));
            let closes = |policy: &Policy| policy.on_trust_change == OnTrustChange::Close;
            if !is_same && (closes(old) || successor.is_some_and(|policy| closes(policy))) {
                old.shutdown().send(Order::TrustChanged);
            }
        }
    }

    /// Calls `f` with the active policies.
    pub fn with_policies<T>(&self, f: impl FnOnce(&Policies) -> T) -> T {
        f(&self.in_use().policies)
    }

    /// What could be better about the active configuration now: time changes it.
    #[must_use]
    pub fn lints(&self) -> Vec<Finding> {
        let in_use = self.in_use();
        lints(&in_use.settings, &in_use.clock, &in_use.policies)
    }

    /// Asks the upstreams whose clients would be offered HTTP/2 whether they speak it, all at once: of
    /// every host, or of those that are not answered yet. Until an upstream has answered, its clients
    /// are not offered it.
    pub async fn ask_upstreams(&self, whom: Upstreams) {
        let in_use = self.in_use();
        let is_meant = |policy: &&Arc<Policy>| match whom {
            Upstreams::All => policy.would_offer_h2(),
            Upstreams::Unanswered => policy.would_offer_h2() && !policy.has_answered_h2(),
        };
        let mut asking = JoinSet::new();
        for policy in in_use.policies.iter().filter(is_meant) {
            let policy = Arc::clone(policy);
            asking.spawn_blocking(move || policy.ask_h2());
        }
        asking.join_all().await;
    }

    fn in_use(&self) -> Arc<ActiveSettings> {
        Arc::clone(&self.in_use.borrow())
    }

    /// The last refusal for each reason, with the time when it was.
    #[must_use]
    pub fn last_refusals(&self) -> Vec<(Instant, Refused)> {
        self.last_refusals.all()
    }

    /// What is seen of ranges that have vanished.
    #[must_use]
    pub fn range_usage(&self) -> &RangeUsage {
        &self.range_usage
    }

    /// Each once, or time would pass twice for its connections.
    fn remember_endings(&self, policies: &Policies) {
        let endings = &mut lock(&self.endings);
        endings.retain(|shutdown| shutdown.strong_count() > 0);
        for policy in policies.iter() {
            let shutdown = Arc::downgrade(policy.shutdown());
            if !endings.iter().any(|known| known.ptr_eq(&shutdown)) {
                endings.push(shutdown);
            }
        }
    }

    fn tell_all(&self, tell: impl Fn(&Signal)) {
        for shutdown in lock(&self.endings).iter().filter_map(Weak::upgrade) {
            tell(&shutdown);
        }
    }

    /// Ends connections that are silent, over and over.
    pub async fn watch_silence(&self) {
        let mut in_use = self.in_use.subscribe();
        let mut last = Instant::now();
        loop {
            let idle_timeout = in_use.borrow_and_update().settings.idle_timeout;
            tokio::select! {
                () = tokio::time::sleep_until((last + idle_timeout).into()) => {
                    last = Instant::now();
                    self.tick();
                }
                // Another setting counts at once. There are some as long as there is a gate.
                _ = in_use.changed() => {}
            }
        }
    }

    /// Tells live connections that time has passed: one that was silent since the last time ends,
    /// or, while they drain, one that waits for no answer.
    pub fn tick(&self) {
        self.tell_all(Signal::tick);
    }

    /// Lets every connection end as soon as no answer is being waited for.
    pub fn drain(&self) {
        self.tell_all(|shutdown| shutdown.send(Order::Drain));
    }

    /// Closes every live connection.
    pub fn abort(&self) {
        self.tell_all(|shutdown| shutdown.send(Order::Stop));
    }
}

/// Whom [`Gate::ask_upstreams`] asks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Upstreams {
    /// Every upstream.
    All,
    /// Those that have not answered.
    Unanswered,
}

/// Reads certificates, keys, CAs and revocation lists, and builds the policies of all hosts.
///
/// `before` are the active ones: what has not changed of them is kept, and so is the policy of a host of
/// which a file cannot be used, see [`Loaded::broken`].
///
/// # Errors
///
/// Returns the first file that cannot be used, with its place in the configuration, if no host is left.
pub fn load(
    config: &config::GateSettings,
    clock: &Arc<dyn TimeProvider>,
    before: Option<&Policies>,
) -> Result<Loaded, ConfigError> {
    let shared = tls::credentials::shared_authority(config.cloudflare_ca.as_ref())?;
    let now = clock.current_time();
    now.ok_or_else(|| shared_place(config).error("this host's clock cannot be read"))?;
    let context = TlsContext {
        provider: Arc::new(aws_lc_rs::default_provider()),
        clock: Arc::clone(clock),
        shared,
        steered_ports: config.steered_ports.clone(),
        client_address: config.client_address,
    };
    let mut policies = Vec::new();
    let (mut broken, mut unavailable) = (Vec::new(), HashSet::new());
    for host in &config.hosts {
        let known = before.and_then(|before| before.labelled(&host.label()));
        let policy = match Policy::load(host, &context, known.map(AsRef::as_ref)) {
            Ok(policy) => policy,
            Err(error) => {
                broken.push(UnusableHost {
                    host: host.label(),
                    error,
                    is_served: known.is_some(),
                });
                match known {
                    Some(known) => policies.push((host, Arc::clone(known))),
                    None => unavailable.extend(host.names.iter().map(|name| name.value.clone())),
                }
                continue;
            }
        };
        policies.push((host, Arc::new(policy)));
    }
    if policies.is_empty() && !broken.is_empty() {
        return Err(broken.remove(0).error);
    }
    Ok(Loaded {
        policies: Policies::new(policies, unavailable),
        broken,
        clock: Arc::clone(clock),
    })
}

fn lints(
    config: &config::GateSettings,
    clock: &Arc<dyn TimeProvider>,
    policies: &Policies,
) -> Vec<Finding> {
    // Without a clock no client gets in, which each connection reports.
    let now = clock.current_time();
    now.map_or_else(Vec::new, |now| lint::judge(config, policies, now))
}

fn shared_place(config: &config::GateSettings) -> config::Place {
    let first = config.hosts.first();
    first.map_or_else(config::Place::nowhere, |host| host.place().clone())
}

fn tell_expiry(policies: &Policies, metrics: &Metrics) {
    for policy in policies.iter() {
        let facts = &policy.facts;
        for (kind, expires) in [
            ("certificate", Some(facts.certificate_expires)),
            ("authority", facts.authority_expires),
            ("crl", facts.crl_valid.map(|(_, expires)| expires)),
        ] {
            metrics.expires(policy.label(), kind, expires);
        }
    }
}

/// Names for connections, which logs and upstreams know them by: unique among all that have one.
struct Ids {
    process: u64,
    next: AtomicU64,
}

impl Default for Ids {
    fn default() -> Self {
        Self {
            process: fastrand::u64(..),
            next: AtomicU64::new(0),
        }
    }
}

impl Ids {
    fn next(&self) -> String {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        format!("{:016x}-{number:x}", self.process)
    }
}

/// Whether the address is one of a load balancer's.
fn is_one_of(nets: &[IpNet], address: SocketAddr) -> bool {
    let address = address.ip().to_canonical();
    nets.iter().any(|net| net.contains(&address))
}

/// Log lines about refusals; the metrics count them all.
const REFUSALS_PER_SECOND: u32 = 20;
