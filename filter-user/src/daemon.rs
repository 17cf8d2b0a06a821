//! The composition root: configuration in, running roles out. Nobody imports it but `main`.
//!
//! Start-up has two halves. The first looks and touches nothing: interfaces, capabilities,
//! certificates, snapshot. Only when all of that is in order are sockets bound and packets
//! dropped, the filter first.

mod error;
mod gate;
mod view;

use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use rustix::thread::CapabilitySet;
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

pub use self::error::StartError;
use self::gate::GateRole;
use self::view::View;
use crate::cli::Role;
use crate::config::Config;
use crate::gate::{Gate, Policies};
use crate::ranges::Table;
use crate::ranges::guard::Documentation;
use crate::refresh::Refresher;
use crate::snapshot::{Follower, InForce, chain};
use crate::telemetry::status::{Report, Status};
use crate::telemetry::{Metrics, admin};
use crate::xdp::{self, Filter, XdpError};

/// Checks a configuration as `run` would, and changes nothing.
///
/// # Errors
///
/// Returns the first thing that would keep a role from starting.
pub fn check(config: &Config) -> Result<(), StartError> {
    if let Some(filter) = &config.filter {
        xdp::check_interfaces(filter)?;
    }
    if let Some(gate) = &config.gate {
        crate::gate::load(gate, &clock(), &Metrics::default())?;
    }
    let in_force = load_or_baseline(config)?;
    compile(config, &in_force)?;
    Ok(())
}

/// Runs roles until SIGTERM or SIGINT, then lets connections drain.
///
/// # Errors
///
/// Returns what kept a role from starting; nothing on the host has changed then, except that an
/// error of the filter's attachment itself may leave pins for the next start to adopt.
pub async fn run(config: Config, only: Option<Role>) -> Result<(), StartError> {
    let plan = Plan::new(config, only)?;
    // Before anybody is told that we are ready, who may then send one at once.
    let signals = Signals::new().map_err(|source| StartError::Signals { source })?;
    let stop = CancellationToken::new();
    let roles = TaskTracker::new();
    let running = plan.start(&stop, &roles)?;

    notify_ready(&running);
    signals.wait_for_stop(&running.wake).await;
    info!("stopping");
    stop.cancel();
    roles.close();
    if let Some(gate) = &running.gate {
        gate.drain().await;
    }
    roles.wait().await;
    for socket in &running.sockets {
        if let Err(error) = std::fs::remove_file(socket) {
            warn!(socket = %socket.display(), %error, "socket not removed");
        }
    }
    Ok(())
}

/// Asks every role that the configuration describes for its status.
#[must_use]
pub fn status(config: &Config) -> Report {
    let mut report = Report {
        protected: true,
        warnings: Vec::new(),
        roles: Vec::new(),
    };
    for role in Role::ALL
        .into_iter()
        .filter(|role| describes(config, *role))
    {
        match ask(&socket(config, role)) {
            Ok(status) => {
                let prefix = role.label();
                let warnings = status.warnings.iter();
                report
                    .warnings
                    .extend(warnings.map(|warning| format!("{prefix}: {warning}")));
                report.protected &= status.enforcing;
                report.roles.push(status);
            }
            Err(error) => {
                report.protected = false;
                let label = role.label();
                report
                    .warnings
                    .push(format!("{label}: not running ({error})"));
            }
        }
    }
    report
}

fn ask(socket: &Path) -> io::Result<Status> {
    let stream = std::os::unix::net::UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(std::time::Duration::from_secs(5)))?;
    Ok(serde_json::from_reader(io::BufReader::new(stream))?)
}

fn describes(config: &Config, role: Role) -> bool {
    match role {
        Role::Filter => config.filter.is_some(),
        Role::Ranges => true,
        Role::Gate => config.gate.is_some(),
    }
}

/// Everything that can be known before the host is touched.
struct Plan {
    config: Arc<Config>,
    roles: Vec<Role>,
    metrics: Metrics,
    policies: Option<Policies>,
}

impl Plan {
    fn new(config: Config, only: Option<Role>) -> Result<Self, StartError> {
        let roles: Vec<_> = match only {
            Some(role) if !describes(&config, role) => {
                return Err(StartError::NotDescribed { role });
            }
            Some(role) => vec![role],
            None => Role::ALL
                .into_iter()
                .filter(|role| describes(&config, *role))
                .collect(),
        };
        let metrics = Metrics::default();
        let mut policies = None;
        for role in &roles {
            match (role, &config.filter, &config.gate) {
                (Role::Filter, Some(filter), _) => {
                    xdp::check_interfaces(filter)?;
                    xdp::check_capabilities()?;
                }
                (Role::Gate, _, Some(gate)) => {
                    policies = Some(crate::gate::load(gate, &clock(), &metrics)?);
                    check_bind_capability(&gate.listen)?;
                }
                (Role::Filter | Role::Ranges | Role::Gate, _, _) => {}
            }
        }
        // A table that does not fit must be known before anything is attached or bound.
        compile(&config, &load_or_baseline(&config)?)?;
        if config.ranges.limits.documentation == Documentation::Accept {
            warn!("documentation ranges are accepted: this is a test bed, not a host to protect");
        }
        Ok(Self {
            config: Arc::new(config),
            roles,
            metrics,
            policies,
        })
    }

    fn start(self, stop: &CancellationToken, tasks: &TaskTracker) -> Result<Running, StartError> {
        let config = &self.config;
        for directory in [&config.paths.state, &config.paths.run] {
            std::fs::create_dir_all(directory).map_err(|source| StartError::Directory {
                path: directory.clone(),
                source,
            })?;
        }
        let mut running = Running {
            sockets: Vec::new(),
            wake: Arc::new(Notify::new()),
            gate: None,
        };
        // The sockets first: a second instance must not get any further.
        let mut listeners = Vec::new();
        for role in &self.roles {
            let path = socket(config, *role);
            let listener = admin::bind(&path).map_err(|source| StartError::Socket {
                path: path.clone(),
                source,
            })?;
            listeners.push((*role, listener));
            running.sockets.push(path);
        }

        // A port that is taken must be known before anything is attached.
        let bound = match (&config.gate, &self.policies) {
            (Some(gate), Some(_)) => GateRole::bind(gate)?,
            (_, _) => Vec::new(),
        };

        let follower = Follower::new(config.paths.snapshot(), config.ranges.limits.clone())?;
        let in_force = follower.subscribe();
        spawn(tasks, stop, follower.run());

        let mut policies = self.policies.map(|policies| (policies, bound));
        for (role, listener) in listeners {
            let mut view = View::new(role, config, &self.metrics, &in_force);
            match role {
                Role::Filter => {
                    view.filter = start_filter(config, &in_force, stop, tasks)?;
                }
                Role::Ranges => {
                    let (last, attempts) = watch::channel(None);
                    view.attempts = Some(attempts);
                    let refresher = Refresher {
                        ranges: config.ranges.clone(),
                        snapshot: config.paths.snapshot(),
                        metrics: self.metrics.clone(),
                        now: SystemTime::now,
                        last,
                    };
                    let (known, wake) = (in_force.borrow().clone(), Arc::clone(&running.wake));
                    let known = InForce::clone(&known);
                    spawn(
                        tasks,
                        stop,
                        async move { refresher.run(known, &wake).await },
                    );
                }
                Role::Gate => {
                    let (Some(gate), Some((policies, bound))) = (&config.gate, policies.take())
                    else {
                        continue;
                    };
                    let table = compiled(config, &in_force, stop, tasks)?;
                    let shared = Gate::new(gate, policies, table, self.metrics.clone());
                    let gate_role = GateRole::start(gate, shared, bound, stop, tasks);
                    view.listen = gate_role.addresses.clone();
                    running.gate = Some(gate_role);
                }
            }
            spawn(tasks, stop, admin::serve(listener, move || view.status()));
        }
        Ok(running)
    }
}

/// What `run` holds on to.
struct Running {
    sockets: Vec<PathBuf>,
    /// Notified to refresh the ranges at once.
    wake: Arc<Notify>,
    gate: Option<GateRole>,
}

/// Spawns a task that lives until `stop`.
fn spawn(
    tasks: &TaskTracker,
    stop: &CancellationToken,
    task: impl Future<Output = ()> + Send + 'static,
) {
    let stop = stop.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = task => {}
            () = stop.cancelled() => {}
        }
    });
}

/// Loads and attaches the filter, and publishes every change of the ranges.
fn start_filter(
    config: &Arc<Config>,
    in_force: &watch::Receiver<Arc<InForce>>,
    stop: &CancellationToken,
    tasks: &TaskTracker,
) -> Result<Option<Arc<Mutex<Filter>>>, StartError> {
    let Some(settings) = &config.filter else {
        return Ok(None);
    };
    let mut in_force = in_force.clone();
    let now = in_force.borrow_and_update().clone();
    let table = compile(config, &now)?;
    let pins = config.paths.bpf.clone();
    let filter = Filter::start(settings, pins, now.known.set(), &table)?;
    let filter = Arc::new(Mutex::new(filter));

    let (publishing, config) = (Arc::clone(&filter), Arc::clone(config));
    spawn(tasks, stop, async move {
        let mut published_set = now.known.set().clone();
        while in_force.changed().await.is_ok() {
            let now = in_force.borrow_and_update().clone();
            if *now.known.set() == published_set {
                continue;
            }
            let published = compile(&config, &now).and_then(|table| {
                lock(&publishing).publish(now.known.set(), &table)?;
                Ok(())
            });
            match published {
                Ok(()) => {
                    published_set = now.known.set().clone();
                    info!(ranges = published_set.iter().count(), "ranges published");
                }
                Err(error) => error!(error = %chain(&error), "ranges not published, the old stay"),
            }
        }
    });
    Ok(Some(filter))
}

/// The newest compiled table; a change that cannot be compiled leaves the old one.
fn compiled(
    config: &Arc<Config>,
    in_force: &watch::Receiver<Arc<InForce>>,
    stop: &CancellationToken,
    tasks: &TaskTracker,
) -> Result<watch::Receiver<Arc<Table>>, StartError> {
    let mut in_force = in_force.clone();
    let now = in_force.borrow_and_update().clone();
    let (sender, receiver) = watch::channel(Arc::new(compile(config, &now)?));
    let config = Arc::clone(config);
    spawn(tasks, stop, async move {
        while in_force.changed().await.is_ok() {
            let now = in_force.borrow_and_update().clone();
            match compile(&config, &now) {
                Ok(table) => {
                    sender.send_replace(Arc::new(table));
                }
                Err(error) => error!(error = %chain(&error), "ranges not usable, the old stay"),
            }
        }
    });
    Ok(receiver)
}

fn compile(config: &Config, in_force: &InForce) -> Result<Table, StartError> {
    let (allow, deny) = (&config.ranges.allow, &config.ranges.deny);
    Ok(Table::compile(in_force.known.set(), allow, deny)?)
}

/// A snapshot that cannot be used must not keep the host unprotected.
fn load_or_baseline(config: &Config) -> Result<InForce, StartError> {
    match InForce::load(&config.paths.snapshot(), &config.ranges.limits) {
        Ok(in_force) => Ok(in_force),
        Err(error) => {
            warn!(error = %chain(&error), "snapshot refused, the embedded baseline protects");
            Ok(InForce::baseline(&config.ranges.limits)?)
        }
    }
}

fn check_bind_capability(listen: &[SocketAddr]) -> Result<(), StartError> {
    let privileged = listen
        .iter()
        .find(|address| (1..1024).contains(&address.port()));
    let held = rustix::thread::capabilities(None).map_err(|errno| XdpError::Capabilities {
        source: errno.into(),
    })?;
    match privileged {
        Some(address) if !held.effective.contains(CapabilitySet::NET_BIND_SERVICE) => {
            Err(StartError::BindCapability { address: *address })
        }
        Some(_) | None => Ok(()),
    }
}

fn socket(config: &Config, role: Role) -> PathBuf {
    config.paths.run.join(format!("{}.sock", role.label()))
}

fn clock() -> Arc<dyn TimeProvider> {
    Arc::new(DefaultTimeProvider)
}

fn lock(filter: &Mutex<Filter>) -> MutexGuard<'_, Filter> {
    // A panic while publishing leaves the old generation in use, which is still right.
    filter
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The signals that mean something to us.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Returns at SIGTERM or SIGINT; SIGHUP asks for a refresh of the ranges.
    async fn wait_for_stop(mut self, wake: &Notify) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.hang_up.recv() => wake.notify_one(),
            }
        }
    }
}

/// sd_notify(3): tells whoever started us that all roles are up.
fn notify_ready(running: &Running) {
    info!(sockets = running.sockets.len(), "ready");
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let sent =
        UnixDatagram::unbound().and_then(|socket| socket.send_to(b"READY=1", Path::new(&path)));
    if let Err(error) = sent {
        warn!(%error, "the service manager was not told that we are ready");
    }
}
