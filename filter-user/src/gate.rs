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
mod proxy;
mod range_usage;
mod refusal;
mod relay;
mod shutdown;
mod tls;
mod upstream;

use std::collections::HashSet;
use std::fmt::{self, Display, Formatter};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use ipnet::IpNet;
use rustls::crypto::aws_lc_rs;
use rustls::time_provider::TimeProvider;
use tokio::sync::{Semaphore, watch};

use self::limits::{Allowed, Limits, RateLimiter};
pub use self::lint::{listeners, unreadable_files};
pub use self::listener::{bind, serve};
pub use self::range_usage::{ActiveClient, RangeUsage, UsedRange};
pub use self::refusal::{Limit, Outcome, Phase, Quantity, Refusal, UpstreamFault};
use self::shutdown::{Order, Signal};
pub use self::tls::credentials::{is_shared_authority, pin, service_group};
pub use self::tls::peer::VerifiedPeer;
use self::tls::policy::TlsContext;
pub use self::tls::policy::{FileContent, Policies, Policy};
pub use self::tls::trust::Identity;
use crate::config::{self, ConfigError, OnTrustChange};
use crate::observe::log::Budget;
use crate::observe::{Finding, Metrics};
use crate::ranges::{ActiveRanges, Table};
use crate::report::chain;
use crate::sync::lock;

/// What all connections share.
pub struct Gate {
    in_use: watch::Sender<Arc<InUse>>,
    table: watch::Receiver<Arc<Table>>,
    range_usage: RangeUsage,
    limits: Limits,
    metrics: Metrics,
    connections: Arc<Semaphore>,
    refusals: Budget,
    sampling: RateLimiter,
    ids: Ids,
    /// Where live connections are told to end, those of terms that hold no more among them.
    endings: Mutex<Vec<Weak<Signal>>>,
}

/// What a reload replaces: the policies, and how long and how many.
struct InUse {
    config: config::Gate,
    clock: Arc<dyn TimeProvider>,
    policies: Policies,
    /// What the upstreams have shown when they were asked.
    of_upstreams: Vec<Finding>,
    unanswered: Vec<String>,
    proxy_from: Vec<IpNet>,
    handshake: Duration,
    connect: Duration,
    idle: Duration,
    allowed: Allowed,
}

impl InUse {
    fn new(config: &config::Gate, loaded: Loaded) -> Self {
        Self {
            config: config.clone(),
            clock: loaded.clock,
            policies: loaded.policies,
            of_upstreams: loaded.of_upstreams,
            unanswered: loaded.unanswered,
            proxy_from: config.proxy_from.clone(),
            handshake: config.handshake_timeout,
            connect: config.connect_timeout,
            idle: config.idle_timeout,
            allowed: Allowed {
                handshakes: config.max_handshakes,
                source: config.per_source,
                network: config.per_network,
            },
        }
    }
}

/// Policies whose files were read and found in order.
pub struct Loaded {
    policies: Policies,
    clock: Arc<dyn TimeProvider>,
    of_upstreams: Vec<Finding>,
    /// The hosts whose upstream could not be asked what it speaks.
    unanswered: Vec<String>,
    /// The hosts of which something cannot be used.
    broken: Vec<Broken>,
}

/// A host of which a file cannot be used.
#[derive(Debug)]
pub struct Broken {
    /// Its first name.
    host: String,
    /// The file, with its place in the configuration.
    error: ConfigError,
    /// Whether it is served as before; else its clients are refused ([`Refusal::HostUnavailable`]).
    is_served: bool,
}

impl Display for Broken {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self {
            host,
            error,
            is_served,
        } = self;
        let error = chain(error);
        match is_served {
            true => write!(
                f,
                "`{host}` is served as before, what is new cannot be used: {error}"
            ),
            false => write!(f, "`{host}` is NOT SERVED: {error}"),
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
        match self.broken.is_empty() {
            true => Ok(self),
            false => Err(self.broken.remove(0).error),
        }
    }

    /// The hosts of which a file cannot be used.
    #[must_use]
    pub fn broken(&self) -> &[Broken] {
        &self.broken
    }

    /// What could be better about it now.
    #[must_use]
    pub fn lints(&self, config: &config::Gate) -> Vec<Finding> {
        lints(config, &self.clock, &self.policies, &self.of_upstreams)
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
    /// A gate with these policies, that checks its peers' addresses by the newest `table`.
    #[must_use]
    pub fn new(
        config: &config::Gate,
        loaded: Loaded,
        table: watch::Receiver<Arc<Table>>,
        in_force: watch::Receiver<Arc<ActiveRanges>>,
        metrics: Metrics,
    ) -> Self {
        let in_use = InUse::new(config, loaded);
        tell_expiry(&in_use.policies, &metrics);
        let gate = Self {
            in_use: watch::Sender::new(Arc::new(in_use)),
            table,
            range_usage: RangeUsage::new(in_force),
            limits: Limits::new(),
            metrics,
            connections: Arc::new(Semaphore::new(config.max_connections)),
            refusals: Budget::new(REFUSALS_PER_SECOND),
            sampling: RateLimiter::new(),
            ids: Ids::default(),
            endings: Mutex::default(),
        };
        gate.with_policies(|policies| gate.remember_endings(policies));
        gate
    }

    /// Puts other policies and limits in force for connections to come; live ones go on, unless
    /// their host's terms have changed and it says that they shall not.
    pub fn put_in_force(&self, config: &config::Gate, loaded: Loaded) {
        let new = Arc::new(InUse::new(config, loaded));
        tell_expiry(&new.policies, &self.metrics);
        self.remember_endings(&new.policies);
        let old = self.in_use.send_replace(Arc::clone(&new));
        for old in old.policies.iter() {
            let successor = new.policies.labelled(old.label());
            let is_same = successor.is_some_and(|new| new.has_terms_of(old));
            let closes = |policy: &Policy| policy.on_trust_change == OnTrustChange::Close;
            if !is_same && (closes(old) || successor.is_some_and(|new| closes(new))) {
                old.shutdown().say(Order::TrustChanged);
            }
        }
    }

    /// Calls `f` with the policies in force.
    pub fn with_policies<T>(&self, f: impl FnOnce(&Policies) -> T) -> T {
        f(&self.in_use().policies)
    }

    /// What could be better about the active configuration now: time changes it.
    #[must_use]
    pub fn lints(&self) -> Vec<Finding> {
        let in_use = self.in_use();
        let (policies, of_upstreams) = (&in_use.policies, &in_use.of_upstreams);
        lints(&in_use.config, &in_use.clock, policies, of_upstreams)
    }

    /// Whether an upstream that could not be asked what it speaks can be by now.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        let in_use = self.in_use();
        let labels = in_use.unanswered.iter();
        let mut policies = labels.filter_map(|label| in_use.policies.labelled(label));
        policies.any(|policy| policy.dialer().speaks_h2().is_ok())
    }

    fn in_use(&self) -> Arc<InUse> {
        Arc::clone(&self.in_use.borrow())
    }

    /// Serves so many connections at once, of those that were configured: before it serves any.
    pub fn keep_below(&self, configured: usize, affordable: usize) {
        self.connections
            .forget_permits(configured.saturating_sub(affordable));
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
        loop {
            tokio::time::sleep(self.in_use().idle).await;
            self.tick();
        }
    }

    /// Tells live connections that time has passed: one that was silent since the last time ends,
    /// or, while they drain, one that waits for no answer.
    pub fn tick(&self) {
        self.tell_all(Signal::tick);
    }

    /// Lets every connection end as soon as no answer is being waited for.
    pub fn drain(&self) {
        self.tell_all(|shutdown| shutdown.say(Order::Drain));
    }

    /// Closes every live connection.
    pub fn abort(&self) {
        self.tell_all(|shutdown| shutdown.say(Order::Stop));
    }
}

/// Reads certificates, keys, CAs and revocation lists, asks upstreams what they speak, and builds
/// the policies of all hosts.
///
/// `before` are those in force: what has not changed of them is kept, and so is the policy of a host of
/// which a file cannot be used, see [`Loaded::broken`].
///
/// # Errors
///
/// Returns the first file that cannot be used, with its place in the configuration, if no host is left.
pub fn load(
    config: &config::Gate,
    clock: &Arc<dyn TimeProvider>,
    before: Option<&Policies>,
) -> Result<Loaded, ConfigError> {
    let shared = tls::credentials::shared_authority(config.cloudflare_ca.as_ref())?;
    let now = clock.current_time();
    now.ok_or_else(|| shared_place(config).error("this host's clock cannot be read"))?;
    let workshop = TlsContext {
        provider: Arc::new(aws_lc_rs::default_provider()),
        clock: Arc::clone(clock),
        shared,
    };
    let mut of_upstreams = Vec::new();
    let mut unanswered = Vec::new();
    let mut policies = Vec::new();
    let (mut broken, mut unavailable) = (Vec::new(), HashSet::new());
    for host in &config.hosts {
        let known = before.and_then(|before| before.labelled(&host.label()));
        let mut policy = match Policy::load(host, &workshop, known.map(AsRef::as_ref)) {
            Ok(policy) => policy,
            Err(error) => {
                broken.push(Broken {
                    host: host.label(),
                    error,
                    is_served: known.is_some(),
                });
                match known {
                    Some(known) => policies.push(Arc::clone(known)),
                    None => unavailable.extend(host.names.iter().map(|name| name.value.clone())),
                }
                continue;
            }
        };
        if policy.offers(b"h2") {
            let speaks = policy.dialer().speaks_h2();
            if let Some(lint) = lint::h2(host, &speaks) {
                policy.withhold_h2();
                of_upstreams.push(lint);
            }
            if speaks.is_err() {
                unanswered.push(host.label());
            }
        }
        policies.push(Arc::new(policy));
    }
    if policies.is_empty() && !broken.is_empty() {
        return Err(broken.remove(0).error);
    }
    Ok(Loaded {
        policies: Policies::new(policies, unavailable),
        broken,
        clock: Arc::clone(clock),
        of_upstreams,
        unanswered,
    })
}

fn lints(
    config: &config::Gate,
    clock: &Arc<dyn TimeProvider>,
    policies: &Policies,
    of_upstreams: &[Finding],
) -> Vec<Finding> {
    let mut lints = of_upstreams.to_vec();
    // Without a clock nobody gets in, which each connection says.
    if let Some(now) = clock.current_time() {
        lints.extend(lint::judge(config, policies, now));
    }
    lints
}

fn shared_place(config: &config::Gate) -> config::Place {
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
