//! The gate as a role: its listeners and worker threads, how its files are followed, and how it
//! comes to an end.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZero;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::{error, info, warn};

use super::StartError;
use super::tasks::Tasks;
use crate::config::{self, Config, ConfigError};
use crate::gate::{self, Broken, Gate, Loaded};
use crate::host::file::{self, FileId, Watch};
use crate::host::systemd::{self, Inherited};
use crate::observe::{Finding, Metrics};
use crate::report::chain;
use crate::sync::lock;

/// The running gate; clones are the same one.
#[derive(Clone)]
pub(super) struct GateRole {
    pub(super) gate: Arc<Gate>,
    pub(super) addresses: String,
    /// Where connections wait in vain: in a socket unit's sockets that `gate.listen` does not name.
    pub(super) unanswered: Vec<SocketAddr>,
    /// IPv6 addresses of `gate.listen` on a kernel that has no IPv6.
    pub(super) without_ipv6: Vec<SocketAddr>,
    /// How many connections the limit of open files allows, if that is fewer than configured.
    pub(super) affordable: Option<usize>,
    /// What it was started with.
    started: Arc<(Vec<SocketAddr>, usize)>,
    metrics: Metrics,
    connections: TaskTracker,
    /// Why what is on disk is not what is in force, if that is so.
    trouble: watch::Sender<Option<String>>,
    /// What the files were like when they were last read.
    read: Arc<Mutex<Vec<Option<FileId>>>>,
    /// What could be better, as the log has it.
    known: Arc<Mutex<Vec<Finding>>>,
    /// Each thread's runtime.
    workers: Arc<Vec<Handle>>,
    /// Held from reading files until what was read is in force, so that the last reading counts.
    turn: Arc<Mutex<()>>,
}

/// Sockets that connections wait in.
#[derive(Default)]
pub(super) struct Bound {
    sockets: Vec<TcpListener>,
    unanswered: Vec<SocketAddr>,
    without_ipv6: Vec<SocketAddr>,
}

impl GateRole {
    /// Takes the listening sockets that were inherited, and binds those that were not;
    /// connections wait in them until [`Self::start`].
    pub(super) fn bind(
        config: &config::Gate,
        mut inherited: Vec<Inherited>,
    ) -> Result<Bound, StartError> {
        let mut sockets = Vec::new();
        let mut without_ipv6 = Vec::new();
        let mut bound = Vec::new();
        for address in &config.listen {
            let found = inherited.iter().position(|it| it.address == *address);
            if let Some(index) = found {
                info!(id = "socket-inherited", %address, "the listening socket was handed over");
                sockets.push(inherited.swap_remove(index).socket);
                continue;
            }
            let socket = match gate::bind(*address) {
                Ok(socket) => socket,
                Err(source) if is_without_ipv6(address, &source) => {
                    warn!(
                        id = "ipv6-missing",
                        %address,
                        "this kernel has no IPv6, so nothing can come in there"
                    );
                    without_ipv6.push(*address);
                    continue;
                }
                Err(source) => {
                    let address = *address;
                    return Err(StartError::Bind { address, source });
                }
            };
            bound.push(socket.try_clone().map_err(|source| StartError::Bind {
                address: *address,
                source,
            })?);
            sockets.push(socket);
        }
        if let (true, Some(address)) = (sockets.is_empty(), without_ipv6.first()) {
            return Err(StartError::NoIpv6 { address: *address });
        }
        inherited.retain(|it| !config.listen.contains(&it.address));
        let unanswered = inherited.iter().filter_map(leave).collect();
        systemd::store(&bound);
        Ok(Bound {
            sockets,
            unanswered,
            without_ipv6,
        })
    }

    /// Starts to serve what comes in.
    pub(super) fn start(
        config: watch::Receiver<Arc<Config>>,
        (gate, broken): (Gate, Option<String>),
        read: Vec<Option<FileId>>,
        bound: Bound,
        metrics: &Metrics,
        tasks: &Tasks,
    ) -> Result<Self, StartError> {
        let Bound {
            sockets,
            unanswered,
            without_ipv6,
        } = bound;
        let in_force = Arc::clone(&config.borrow());
        let Some(settings) = &in_force.gate else {
            return Err(StartError::NotDescribed {
                role: crate::role::Role::Gate,
            });
        };
        let affordable = raise_descriptor_limit(settings.max_connections);
        if let Some(affordable) = affordable {
            gate.keep_below(settings.max_connections, affordable);
        }
        let listen = settings.listen.iter();
        let served = listen.filter(|address| !without_ipv6.contains(address));
        let addresses: Vec<_> = served.map(SocketAddr::to_string).collect();
        // The plan has logged them.
        let known = gate.lints();
        let mut role = Self {
            gate: Arc::new(gate),
            addresses: addresses.join(" "),
            unanswered,
            without_ipv6,
            affordable,
            started: Arc::new((settings.listen.clone(), settings.max_connections)),
            metrics: metrics.clone(),
            connections: TaskTracker::new(),
            trouble: watch::Sender::new(broken),
            read: Arc::new(Mutex::new(read)),
            known: Arc::new(Mutex::new(known)),
            turn: Arc::default(),
            workers: Arc::default(),
        };
        let looking = Arc::clone(&role.gate);
        tasks.spawn(async move { looking.range_usage().follow().await });
        let watching = Arc::clone(&role.gate);
        tasks.spawn(async move { watching.watch_silence().await });
        let following = role.clone();
        tasks.spawn(async move { following.follow_files(config).await });
        let workers = role.start_workers(&sockets, tasks);
        role.workers = Arc::new(workers.map_err(|source| StartError::Workers { source })?);
        // The workers have them, and close them when they stop.
        drop(sockets);
        info!(
            id = "gate-listening",
            listen = role.addresses,
            "gate is listening"
        );
        Ok(role)
    }

    /// One thread per core, each with connections of its own, which never move: what is relayed
    /// stays in one core's cache, and no lock is taken for it.
    fn start_workers(
        &self,
        sockets: &[TcpListener],
        tasks: &Tasks,
    ) -> std::io::Result<Vec<Handle>> {
        let mut workers = Vec::new();
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        for number in 0..cores {
            let runtime = Builder::new_current_thread()
                .enable_all()
                // Before it sleeps, it lets those run who are ready to: what they send is then
                // taken without being woken for it.
                .on_thread_park(std::thread::yield_now)
                .build()?;
            workers.push(runtime.handle().clone());
            let sockets = sockets.iter().map(TcpListener::try_clone);
            let sockets = sockets.collect::<std::io::Result<Vec<_>>>()?;
            let gate = Arc::clone(&self.gate);
            // As long as there may be one more, the connections are not at their end.
            let accepting = self.connections.token();
            let stop = tasks.stopped();
            // Dropped with the thread however it ends.
            let (alive, ended) = oneshot::channel::<Infallible>();
            std::thread::Builder::new()
                .name(format!("gate-{number}"))
                .spawn(move || {
                    work(&runtime, gate, sockets, accepting, stop);
                    drop(alive);
                })?;
            tasks.spawn_until(async move {
                // An error is all that can come.
                ended.await.ok();
            });
        }
        Ok(workers)
    }

    /// The runtime of each thread.
    pub(super) fn workers(&self) -> &[Handle] {
        &self.workers
    }

    /// Whoever holds it is the only one to read files and to put them in force.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        lock(&self.turn)
    }

    /// Reads the files of a configuration as [`gate::load`] does; what is in force is kept as far
    /// as it is the same.
    pub(super) fn load(&self, config: &config::Gate) -> Result<Loaded, ConfigError> {
        *lock(&self.read) = stamps(config);
        self.gate.with_policies(|before| load(config, Some(before)))
    }

    /// Puts in force what was loaded.
    pub(super) fn put_in_force(&self, config: &config::Gate, loaded: Loaded) {
        let broken = sentence(&loaded);
        self.gate.put_in_force(config, loaded);
        self.warn_of_news();
        let outcome = match &broken {
            Some(_) => "Failed",
            None => "Reloaded",
        };
        self.trouble.send_replace(broken);
        self.metrics.gate_reloaded(outcome);
    }

    /// Logs what could be better since the last time: files that were read, or time that has passed.
    fn warn_of_news(&self) {
        let lints = self.gate.lints();
        let known = &mut *lock(&self.known);
        let is_news = |lint: &&Finding| !known.iter().any(|known| known.is_same(lint));
        lints.iter().filter(is_news).for_each(Finding::log);
        *known = lints;
    }

    /// Remembers why what is on disk is not what is in force.
    pub(super) fn note_failure(&self, error: &dyn std::error::Error) {
        self.metrics.gate_reloaded("Failed");
        let text = format!("what is on disk is not what is in force: {}", chain(error));
        self.trouble.send_replace(Some(text));
    }

    /// The settings that differ from those that it was started with, and that only a start changes.
    pub(super) fn waits_for_a_start(
        &self,
        config: &config::Gate,
    ) -> impl Iterator<Item = &'static str> {
        let (listen, max_connections) = &*self.started;
        let differs = [
            ("gate.listen", *listen != config.listen),
            (
                "gate.max_connections",
                *max_connections != config.max_connections,
            ),
        ];
        let differing = differs.into_iter().filter(|(_, differs)| *differs);
        differing.map(|(what, _)| what)
    }

    /// Why what is on disk is not what is in force.
    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.borrow().clone()
    }

    /// Reads certificates, keys, CAs and lists again when they change, and asks upstreams again
    /// that could not be asked.
    async fn follow_files(&self, mut config: watch::Receiver<Arc<Config>>) {
        loop {
            let now = Arc::clone(&config.borrow_and_update());
            let Some(settings) = &now.gate else { return };
            let mut watch = watch_files(settings);
            loop {
                tokio::select! {
                    changed = config.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return,
                    },
                    () = settled(&mut watch) => {}
                    // What no watch tells of: a directory that is replaced, a link to a link.
                    () = tokio::time::sleep(LOOK_AGAIN) => self.warn_of_news(),
                }
                let has_changed = stamps(settings) != *lock(&self.read);
                let is_answered = || tokio::task::block_in_place(|| self.gate.is_answered());
                if (has_changed || is_answered()) && self.read_again(&config) {
                    info!(
                        id = "files-reloaded",
                        "certificates, keys, CAs and revocation lists are read again"
                    );
                }
            }
        }
    }

    /// Whether what was read is in force.
    fn read_again(&self, config: &watch::Receiver<Arc<Config>>) -> bool {
        tokio::task::block_in_place(|| {
            let _turn = self.turn();
            // The one of now: a reload may have had its turn before.
            let config = Arc::clone(&config.borrow());
            let Some(settings) = &config.gate else {
                return false;
            };
            match self.load(settings) {
                Ok(loaded) => {
                    let broken = sentence(&loaded);
                    self.put_in_force(settings, loaded);
                    if let Some(error) = &broken {
                        error!(
                            id = "files-partly-reloaded",
                            error, "files of some hosts not used, the others' are read again"
                        );
                    }
                    broken.is_none()
                }
                Err(error) => {
                    self.note_failure(&error);
                    error!(
                        id = "files-not-reloaded",
                        %error,
                        "files not used, what was read before stays in force"
                    );
                    false
                }
            }
        })
    }

    /// Waits for live connections, and closes those that take longer than `limit`.
    pub(super) async fn drain(&self, limit: Duration) {
        self.connections.close();
        self.gate.drain();
        let draining = async {
            while tokio::time::timeout(QUIET, self.connections.wait())
                .await
                .is_err()
            {
                self.gate.tick();
            }
        };
        if tokio::time::timeout(limit, draining).await.is_err() {
            warn!(
                id = "drain-closing",
                left = self.connections.len(),
                "closing connections that did not end in time"
            );
            self.gate.abort();
            if tokio::time::timeout(ABORT, self.connections.wait())
                .await
                .is_err()
            {
                warn!(
                    id = "drain-aborted",
                    left = self.connections.len(),
                    "connections cut off"
                );
            }
        }
    }
}

/// Hangs up a socket that `gate.listen` does not name, and that was kept for us; returns the address of
/// any other.
fn leave(inherited: &Inherited) -> Option<SocketAddr> {
    let address = inherited.address;
    if !inherited.is_ours {
        // A socket unit would take it for a failure of its own if we hung up.
        warn!(
            id = "socket-unanswered",
            %address,
            "a socket was handed over that `gate.listen` does not name: clients that connect there \
             hang; take it out of `pullgate-gate.socket`"
        );
        return Some(address);
    }
    warn!(
        id = "socket-closed",
        %address,
        "a socket was handed over that `gate.listen` does not name, and is closed"
    );
    // As it hangs up by this, the service manager lets go of it (sd_notify(3), FDPOLL).
    if let Err(error) = shutdown(&inherited.socket, Shutdown::Both) {
        warn!(
            id = "socket-not-closed",
            %error,
            %address,
            "a listening socket cannot be closed"
        );
    }
    None
}

/// Reads what the gate needs, by this host's clock.
pub(super) fn load(
    config: &config::Gate,
    before: Option<&gate::Policies>,
) -> Result<Loaded, ConfigError> {
    let clock: Arc<dyn TimeProvider> = Arc::new(DefaultTimeProvider);
    gate::load(config, &clock, before)
}

/// What cannot be used of what was loaded, if there is anything.
pub(super) fn sentence(loaded: &Loaded) -> Option<String> {
    let broken: Vec<_> = loaded.broken().iter().map(Broken::to_string).collect();
    (!broken.is_empty()).then(|| broken.join("; "))
}

/// A worker: accepts until the stop, when it closes the sockets, and serves what it has accepted to
/// its end.
fn work(
    runtime: &Runtime,
    gate: Arc<Gate>,
    sockets: Vec<TcpListener>,
    accepting: TaskTrackerToken,
    stop: CancellationToken,
) {
    let connections = accepting.task_tracker().clone();
    runtime.block_on(async {
        let listeners = sockets.into_iter().map(tokio::net::TcpListener::from_std);
        let listeners: std::io::Result<Vec<_>> = listeners.collect();
        match listeners {
            Ok(listeners) => gate::serve(gate, listeners, connections.clone(), stop).await,
            Err(error) => {
                error!(id = "socket-unusable", %error, "a listening socket cannot be used");
                return;
            }
        }
        drop(accepting);
        connections.wait().await;
    });
}

/// What the files of the gate are like.
pub(super) fn stamps(config: &config::Gate) -> Vec<Option<FileId>> {
    let files = config.files();
    files.iter().map(|path| file::stamp(path)).collect()
}

fn watch_files(settings: &config::Gate) -> Option<Watch> {
    match Watch::new(&settings.files()) {
        Ok(watch) => Some(watch),
        Err(error) => {
            warn!(
                id = "files-not-watched",
                %error,
                "the gate's files are not watched: send SIGHUP when they change"
            );
            None
        }
    }
}

/// Returns when files have changed, and no other has for [`SETTLE`]: a certificate and its key are
/// two.
async fn settled(watch: &mut Option<Watch>) {
    let Some(watch) = watch else {
        return std::future::pending().await;
    };
    watch.changed().await;
    for _ in 0..SETTLE_MAX {
        if tokio::time::timeout(SETTLE, watch.changed()).await.is_err() {
            return;
        }
    }
}

/// Whether an address cannot be served because the kernel has no IPv6 (`ipv6.disable=1`).
fn is_without_ipv6(address: &SocketAddr, error: &std::io::Error) -> bool {
    address.is_ipv6() && Errno::from_io_error(error) == Some(Errno::AFNOSUPPORT)
}

/// A relayed connection takes two descriptors; most hosts grant 1,024 unless asked for more. Returns
/// how many connections there is room for, if not for all: what is accepted beyond would be dropped
/// after its handshake, for want of a descriptor for the upstream.
fn raise_descriptor_limit(connections: usize) -> Option<usize> {
    let wanted = 2 * connections as u64 + SPARE_DESCRIPTORS;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let granted = maximum.map_or(wanted, |maximum| maximum.min(wanted));
    if current.is_some_and(|current| current < granted) {
        let raised = Rlimit {
            current: Some(granted),
            maximum,
        };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            warn!(id = "file-limit-not-raised", %error, "the limit of open files cannot be raised");
        }
    }
    if granted < wanted {
        let affordable = usize::try_from(granted.saturating_sub(SPARE_DESCRIPTORS) / 2);
        let affordable = affordable.unwrap_or(connections).max(1);
        warn!(
            id = "file-limit-low",
            granted,
            wanted,
            affordable,
            "the limit of open files is too low for `max_connections`; raise LimitNOFILE"
        );
        return Some(affordable);
    }
    None
}

/// Silence after which a connection that waits for no answer is closed while the gate stops.
///
/// An answer that pauses for longer is cut off, so it must not be short; connections to come wait
/// for it, so it must not be long.
const QUIET: Duration = Duration::from_secs(3);
/// How long connections may take to end that are told to end at once.
const ABORT: Duration = Duration::from_secs(2);
/// For listeners, sockets and files besides the connections.
const SPARE_DESCRIPTORS: u64 = 64;
/// How long no file may change before all are read.
const SETTLE: Duration = Duration::from_millis(300);
/// However often files change, they are read after as many changes.
const SETTLE_MAX: u32 = 20;
/// How long until files are looked at that nobody says have changed, and upstreams are asked that
/// did not answer.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
