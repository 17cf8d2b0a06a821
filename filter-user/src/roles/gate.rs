//! The gate as a role: looked at, bound, started with a thread per core, reloaded and drained.

mod files;
mod handover;
mod listen;
mod report;

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZero;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::{error, info, warn};

use self::files::file_ids;
use self::handover::Steered;
use self::listen::{
    Listening, check_bind_capability, check_transparent_capability, raise_descriptor_limit,
};
pub(crate) use self::report::exposures;
use super::HEALTH_TIMEOUT;
use super::error::{ReloadError, StartError};
use super::tasks::Tasks;
use crate::config::{Boot, Config, ConfigError, GateSettings};
use crate::gate::{self, Gate, Loaded, Threads, UnusableHost, Upstreams};
use crate::host::file::FileId;
use crate::host::systemd::{self, Inherited};
use crate::observe::{Finding, Metrics};
use crate::ranges::Compiled;
use crate::role::Role;
use crate::sync::lock;

/// Reads all that a configuration names for the gate, and changes nothing.
pub(super) fn examine(config: &Config) -> Result<Loaded, StartError> {
    let settings = settings(config).ok_or(NOT_DESCRIBED)?;
    Ok(load(settings, None)?)
}

/// A gate that can be started, as far as that can be known before.
pub(super) struct PreparedGate {
    loaded: Loaded,
    /// What the files were like when they were read.
    read: Vec<Option<FileId>>,
    inherited: Vec<Inherited>,
}

impl PreparedGate {
    pub(super) fn new(config: &Config, listen_fds: &[i32]) -> Result<Self, StartError> {
        let settings = settings(config).ok_or(NOT_DESCRIBED)?;
        // What changes while it is read is read again.
        let read = file_ids(settings);
        let loaded = examine(config)?;
        // A host that cannot be served keeps no other down.
        if let Some(error) = sentence(&loaded) {
            error!(
                id = "hosts-not-served",
                error, "some hosts are not served until their files can be used"
            );
        }
        loaded.lints(settings).iter().for_each(Finding::log);
        let inherited = systemd::inherited(listen_fds)
            .map_err(|(descriptor, source)| StartError::ListenFd { descriptor, source })?;
        check_bind_capability(&config.boot.listen, &inherited)?;
        check_transparent_capability(settings)?;
        Ok(Self {
            loaded,
            read,
            inherited,
        })
    }

    /// Takes the listening sockets that were inherited, and binds those that were not; connections
    /// wait in them until [`BoundGate::start`].
    pub(super) fn bind(self, boot: &Boot) -> Result<BoundGate, StartError> {
        let Self {
            loaded,
            read,
            inherited,
        } = self;
        Ok(BoundGate {
            loaded,
            read,
            listening: listen::bind(&boot.listen, inherited)?,
        })
    }
}

/// A gate whose clients wait for it.
pub(super) struct BoundGate {
    loaded: Loaded,
    read: Vec<Option<FileId>>,
    listening: Listening,
}

impl BoundGate {
    /// Starts to serve what comes in.
    pub(super) fn start(
        self,
        config: watch::Receiver<Arc<Config>>,
        active: watch::Receiver<Arc<Compiled>>,
        metrics: &Metrics,
        tasks: &Tasks,
    ) -> Result<GateRole, StartError> {
        let Self {
            loaded,
            read,
            listening,
        } = self;
        let Listening {
            sockets,
            unanswered,
            without_ipv6,
        } = listening;
        let now = Arc::clone(&config.borrow());
        let settings = settings(&now).ok_or(NOT_DESCRIBED)?;
        let configured = now.boot.max_connections;
        let affordable = raise_descriptor_limit(configured);
        let broken = sentence(&loaded);
        let max_connections = affordable.unwrap_or(configured);
        let gate = Gate::new(settings, loaded, active, max_connections, metrics.clone());
        let listen = now.boot.listen.iter();
        let served = listen.filter(|address| !without_ipv6.contains(address));
        let addresses: Vec<_> = served.map(SocketAddr::to_string).collect();
        // They are logged by now.
        let known = gate.lints();
        let runtimes = runtimes().map_err(|source| StartError::Workers { source })?;
        let handles = runtimes.iter().map(|runtime| runtime.handle().clone());
        let role = GateRole {
            gate: Arc::new(gate),
            addresses: addresses.join(" "),
            unanswered,
            without_ipv6,
            affordable,
            metrics: metrics.clone(),
            connections: TaskTracker::new(),
            unusable: watch::Sender::new(broken),
            read: Arc::new(Mutex::new(read)),
            known: Arc::new(Mutex::new(known)),
            turn: Arc::default(),
            threads: Arc::new(Threads::new(handles)),
            steered: Arc::new(watch::Sender::new(Steered::NotAsked)),
        };
        let watched = Arc::clone(&role.gate);
        tasks.spawn(async move { watched.range_usage().follow().await });
        let silenced = Arc::clone(&role.gate);
        tasks.spawn(async move { silenced.watch_silence().await });
        tasks.spawn(role.clone().follow_upstreams());
        tasks.spawn(role.clone().follow_files(config));
        let started = role.start_threads(runtimes, &sockets, tasks);
        started.map_err(|source| StartError::Workers { source })?;
        // The threads have them, and close them when they stop; so has what hands them over.
        if now.boot.steer {
            role.steered.send_replace(Steered::Pending);
            tasks.spawn(role.clone().hand_over(
                now.boot.paths.clone(),
                sockets,
                now.boot.client_address(),
            ));
        } else {
            drop(sockets);
        }
        info!(
            id = "gate-listening",
            listen = role.addresses,
            "gate is listening"
        );
        Ok(role)
    }
}

/// The running gate; clones are the same one.
#[derive(Clone)]
pub(super) struct GateRole {
    gate: Arc<Gate>,
    addresses: String,
    /// Where clients hang: in a socket unit's sockets that `gate.listen` does not name.
    unanswered: Vec<SocketAddr>,
    /// IPv6 addresses of `gate.listen` on a kernel that has no IPv6.
    without_ipv6: Vec<SocketAddr>,
    /// How many connections the limit of open files allows, if that is fewer than configured.
    affordable: Option<usize>,
    metrics: Metrics,
    connections: TaskTracker,
    /// What of the files on disk is not used, and why.
    unusable: watch::Sender<Option<String>>,
    /// What the files were like when they were last read.
    read: Arc<Mutex<Vec<Option<FileId>>>>,
    /// What could be better, as the log has it.
    known: Arc<Mutex<Vec<Finding>>>,
    threads: Arc<Threads>,
    /// Whether connections are steered to it.
    steered: Arc<watch::Sender<Steered>>,
    /// Held from reading files until what was read is applied, so that the last reading counts.
    turn: Arc<Mutex<()>>,
}

impl GateRole {
    /// Starts a thread for each runtime, with connections of its own, which never move: what is relayed
    /// stays in one core's cache, and no lock is taken for it.
    fn start_threads(
        &self,
        runtimes: Vec<Runtime>,
        sockets: &[TcpListener],
        tasks: &Tasks,
    ) -> std::io::Result<()> {
        for (number, (runtime, own)) in runtimes.into_iter().zip(self.threads.iter()).enumerate() {
            let sockets = sockets.iter().map(TcpListener::try_clone);
            let sockets = sockets.collect::<std::io::Result<Vec<_>>>()?;
            let worker = gate::Worker {
                gate: Arc::clone(&self.gate),
                threads: Arc::clone(&self.threads),
                own: own.clone(),
                connections: self.connections.clone(),
            };
            // As long as there may be one more, the connections are not at their end.
            let accepting = self.connections.token();
            let stop = tasks.stopped();
            // Dropped with the thread however it ends.
            let (alive, ended) = oneshot::channel::<Infallible>();
            std::thread::Builder::new()
                .name(format!("gate-{number}"))
                .spawn(move || {
                    runtime.block_on(work(worker, sockets, accepting, stop));
                    drop(alive);
                })?;
            tasks.spawn_until(async move {
                // An error is all that can come.
                drop(ended.await);
            });
        }
        Ok(())
    }

    /// Returns when each upstream has been asked what it speaks, or has had its time: its clients are
    /// offered no HTTP/2 until it has answered.
    pub(super) async fn wait_for_upstreams(&self) {
        let asking = self.gate.ask_upstreams(Upstreams::All);
        // One that takes longer is answered in its own time.
        drop(timeout(UPSTREAM_PATIENCE, asking).await);
    }

    /// Returns when the filter has the sockets, too, or has had its time.
    pub(super) async fn wait_until_ready(&self) {
        self.wait_for_upstreams().await;
        self.wait_until_steered().await;
        self.warn_of_news_aside().await;
    }

    /// What does not answer in time.
    pub(super) async fn health(&self) -> Vec<Finding> {
        let deadline = Instant::now() + HEALTH_TIMEOUT;
        // All are asked before any is waited for.
        let asked: Vec<_> = self
            .threads
            .iter()
            .map(|thread| thread.runtime().spawn(async {}))
            .collect();
        let mut findings = Vec::new();
        for (number, answer) in asked.into_iter().enumerate() {
            if !matches!(timeout_at(deadline, answer).await, Ok(Ok(()))) {
                let text = format!("the gate's thread {number} does nothing");
                findings.push(Finding::error("gate-thread-hangs", text));
            }
        }
        findings
    }

    /// Reads what a changed configuration names, and changes nothing.
    pub(super) fn stage(&self, config: &Config) -> Result<StagedGate<'_>, ReloadError> {
        let role = Role::Gate;
        let settings = settings(config).ok_or(ReloadError::NotDescribed { role })?;
        let turn = lock(&self.turn);
        let files = self.load(settings)?;
        Ok(StagedGate {
            role: self,
            settings: settings.clone(),
            files,
            _turn: turn,
        })
    }

    /// Counts that a reload was refused.
    pub(super) fn note_refusal(&self) {
        self.metrics.gate_reloaded("Failed");
    }

    /// Reads the files of a configuration; what is active is kept as far as it is the same.
    fn load(&self, settings: &GateSettings) -> Result<ReadFiles, ConfigError> {
        // What changes while it is read is read again.
        let ids = file_ids(settings);
        let loaded = self
            .gate
            .with_policies(|before| load(settings, Some(before)))?;
        Ok(ReadFiles { ids, loaded })
    }

    /// Applies what was loaded; returns what of it cannot be used.
    fn apply(&self, settings: &GateSettings, files: ReadFiles) -> Option<String> {
        let ReadFiles { ids, loaded } = files;
        *lock(&self.read) = ids;
        let broken = sentence(&loaded);
        self.gate.apply(settings, loaded);
        self.warn_of_news();
        let outcome = match &broken {
            Some(_) => "Failed",
            None => "Reloaded",
        };
        self.unusable.send_replace(broken.clone());
        self.metrics.gate_reloaded(outcome);
        broken
    }

    /// [`Self::warn_of_news`], which looks at files.
    async fn warn_of_news_aside(&self) {
        let role = self.clone();
        drop(spawn_blocking(move || role.warn_of_news()).await);
    }

    /// Logs what could be better since the last time: files that were read, or time that has passed.
    fn warn_of_news(&self) {
        let lints = self.gate.lints();
        let known = &mut *lock(&self.known);
        let is_news = |lint: &&Finding| !known.iter().any(|known| known.is_same(lint));
        lints.iter().filter(is_news).for_each(Finding::log);
        *known = lints;
    }

    /// Waits for live connections, and closes those that take longer than `limit`.
    pub(super) async fn drain(&self, limit: Duration) {
        self.connections.close();
        self.gate.drain();
        let draining = async {
            while timeout(QUIET, self.connections.wait()).await.is_err() {
                self.gate.tick();
            }
        };
        if timeout(limit, draining).await.is_err() {
            warn!(
                id = "drain-closing",
                left = self.connections.len(),
                "closing connections that did not end in time"
            );
            self.gate.abort();
            if timeout(ABORT, self.connections.wait()).await.is_err() {
                warn!(
                    id = "drain-aborted",
                    left = self.connections.len(),
                    "connections closed by force"
                );
            }
        }
    }
}

/// What was read, and what the files were like.
struct ReadFiles {
    ids: Vec<Option<FileId>>,
    loaded: Loaded,
}

/// A changed configuration, read, that the gate can apply.
#[must_use]
pub(super) struct StagedGate<'a> {
    role: &'a GateRole,
    settings: GateSettings,
    files: ReadFiles,
    _turn: MutexGuard<'a, ()>,
}

impl StagedGate<'_> {
    /// Applies it; returns the hosts that are served as before, or not, because a file of theirs cannot
    /// be used.
    pub(super) fn apply(self) -> Option<String> {
        self.role.apply(&self.settings, self.files)
    }
}

/// Reads what the gate needs, by this host's clock.
fn load(settings: &GateSettings, before: Option<&gate::Policies>) -> Result<Loaded, ConfigError> {
    let clock: Arc<dyn TimeProvider> = Arc::new(DefaultTimeProvider);
    gate::load(settings, &clock, before)
}

/// What the configuration says of the gate.
fn settings(config: &Config) -> Option<&GateSettings> {
    config.live.gate.as_ref()
}

/// What cannot be used of what was loaded, if there is anything.
fn sentence(loaded: &Loaded) -> Option<String> {
    let broken: Vec<_> = loaded
        .broken()
        .iter()
        .map(UnusableHost::to_string)
        .collect();
    (!broken.is_empty()).then(|| broken.join("; "))
}

/// One per core. None yields before it sleeps: that gives its whole turn to a busy process beside it
/// (`yield_task_fair`, kernel/sched/fair.c).
fn runtimes() -> std::io::Result<Vec<Runtime>> {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let runtimes = (0..cores).map(|_| {
        // What another thread hands over is served in turn with what this one has: one in 31 otherwise, so that
        // they, and the question whether this thread lives, wait for seconds while there is always more to accept.
        let mut builder = Builder::new_current_thread();
        builder.enable_all().global_queue_interval(2).build()
    });
    runtimes.collect()
}

/// A thread: accepts until the stop, when it closes the sockets, and serves what it was given to its end.
async fn work(
    worker: gate::Worker,
    sockets: Vec<TcpListener>,
    accepting: TaskTrackerToken,
    stop: CancellationToken,
) {
    let _working = worker.own.working();
    let listeners = sockets.into_iter().map(tokio::net::TcpListener::from_std);
    let listeners: std::io::Result<Vec<_>> = listeners.collect();
    match listeners {
        Ok(listeners) => gate::serve(&worker, listeners, stop).await,
        Err(error) => {
            error!(id = "socket-unusable", %error, "a listening socket cannot be used");
            return;
        }
    }
    drop(accepting);
    worker.connections.wait().await;
}

const NOT_DESCRIBED: StartError = StartError::NotDescribed { role: Role::Gate };
/// How long a start or a reload waits for upstreams to be asked what they speak.
const UPSTREAM_PATIENCE: Duration = Duration::from_secs(3);
/// Silence after which a connection that waits for no answer is closed while the gate stops.
///
/// An answer that pauses for longer is dropped, so it must not be short; connections to come wait for
/// it, so it must not be long.
const QUIET: Duration = Duration::from_secs(3);
/// How long connections may take to end after a signal to end at once.
const ABORT: Duration = Duration::from_secs(2);
