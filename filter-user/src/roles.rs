//! The composition root: configuration in, running roles out. Nobody imports it but `main`.
//!
//! Start-up has two halves. The first looks and touches nothing: interfaces, capabilities,
//! certificates, snapshot. Only when all of that is in order is the process confined, are sockets
//! bound and packets dropped, the filter first; where roles have processes of their own, see
//! `children`.

pub mod access;
mod children;
mod error;
mod filter;
pub(crate) mod findings;
mod gate;
mod health;
pub(crate) mod plan;
mod preflight;
mod rules;
mod tasks;
mod view;

use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{self, SigSet};
use nix::unistd::{Gid, getgroups, setgroups};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal as listen_for};
use tokio::sync::{Notify, mpsc, watch};
use tracing::{error, info, warn};

pub use self::error::StartError;
use self::filter::FilterRole;
use self::gate::GateRole;
use self::health::Pulse;
use self::plan::Plan;
use self::preflight::Ancestors;
pub use self::preflight::OwnConnection;
use self::tasks::Tasks;
pub(crate) use self::view::exposures;
use crate::config::{Config, LoadError, Paths, load};
use crate::control::client;
use crate::control::protocol::ReloadStatus;
use crate::gate::Loaded;
use crate::host::accounts::Account;
use crate::host::file::{self, FileId};
use crate::host::sandbox::{self, Confined};
use crate::host::systemd;
use crate::observe::log::LogFormat;
use crate::refresh::Progress;
use crate::report::chain;
use crate::role::Role;
use crate::xdp;

/// How to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// One role only.
    pub only: Option<Role>,
    /// How long the filter waits to be confirmed, if it does.
    pub trial: Option<Duration>,
    /// What to do if the operator's own connection would be cut.
    pub own_connection: OwnConnection,
    /// Listening sockets that were handed over, by their numbers.
    pub listen_fds: Vec<RawFd>,
    /// What becomes of the power that it was given.
    pub power: Power,
    /// The process that runs several roles, of which this one is to run one.
    pub child_of: Option<u32>,
    /// How logs are written, if it was asked for.
    pub log_format: Option<LogFormat>,
}

/// What becomes of the power that a process was given.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Power {
    /// What the roles do not need is given up.
    AsNeeded,
    /// It stays as it is.
    AsGiven,
}

/// Runs roles until SIGTERM or SIGINT, then lets connections drain.
///
/// # Errors
///
/// Returns what kept a role from starting, before anything on the host but the directories for
/// state, sockets and pins has changed; or that a role has failed while it ran.
pub fn run(file: &Path, options: &Options) -> Result<(), StartError> {
    // One that comes early shall wait, not kill.
    let early = SigSet::from_iter([
        signal::SIGTERM,
        signal::SIGINT,
        signal::SIGHUP,
        signal::SIGUSR1,
        signal::SIGUSR2,
        signal::SIGALRM,
    ]);
    early.thread_block().map_err(no_signals)?;
    let config = load(file)?;
    let file = std::path::absolute(file).map_err(|source| LoadError::Read {
        path: file.to_owned(),
        source,
    })?;
    let roles = named(&config, options.only)?;
    if roles.contains(&Role::Filter) {
        xdp::raise_memory_limit();
    }
    // Others' processes cannot be looked at any more once we are confined.
    let family = Ancestors::look();
    if options.power == Power::AsNeeded {
        let users: Vec<_> = roles
            .iter()
            .map(|role| sandbox::user_of(*role, &config.paths.home(*role)))
            .collect();
        match (&roles[..], &users[..]) {
            ([role], [Some(user)]) => become_user(*role, user, &config.paths)?,
            // One process has one user.
            (_, users) if users.iter().any(Option::is_some) => {
                return children::run(&file, &config, &roles, options, early);
            }
            (_, _) => join_groups(&shared_groups(&config.paths)),
        }
        // First of all, so that the start can read no more than a reload will.
        sandbox::drop_privileges(&roles)?;
        load(&file)?;
    }
    if options
        .child_of
        .is_some_and(|parent| !children::end_with(parent))
    {
        return Ok(());
    }
    let mut plan = Plan::new(config, roles, options)?;
    plan.create_directories()?;
    if options.power == Power::AsNeeded {
        // Threads inherit it, so there must not be any yet.
        plan.confine(&file)?;
    }
    let runtime = Runtime::new().map_err(|source| StartError::Workers { source })?;
    let outcome = runtime.block_on(async {
        let signals = Signals::new().map_err(|source| StartError::Signals { source })?;
        early.thread_unblock().map_err(no_signals)?;
        serve(&file, plan, signals, options, &family).await
    });
    // A name that is being looked up keeps nobody waiting.
    runtime.shutdown_background();
    outcome
}

fn no_signals(errno: Errno) -> StartError {
    StartError::Signals {
        source: errno.into(),
    }
}

/// Root becomes the user of a role, as the package's unit would have started it.
fn become_user(role: Role, user: &Account, paths: &Paths) -> Result<(), StartError> {
    sandbox::hide_service_managers()?;
    // Without a BPF file system the start ends, and says so.
    if role == Role::Filter && xdp::check_bpffs(&paths.bpf).is_ok() {
        sandbox::show_pins_alone(&paths.bpf, user)?;
    }
    Ok(sandbox::become_user(user)?)
}

/// The groups of the directories that the roles share.
pub(crate) fn shared_groups(paths: &Paths) -> Vec<u32> {
    let homes = Role::ALL.map(|role| paths.home(role));
    let shared = homes.iter().chain([&paths.state]).map(std::fs::metadata);
    shared.flatten().map(|found| found.gid()).collect()
}

/// Lets root read what these groups may: confined, it reads no more than others may.
pub(crate) fn join_groups(more: &[u32]) {
    let mut groups: Vec<Gid> = getgroups().unwrap_or_default();
    groups.extend(more.iter().copied().map(Gid::from_raw));
    match setgroups(&groups) {
        // Who is not root is in the groups that he is in.
        Ok(()) | Err(Errno::EPERM) => {}
        Err(error) => warn!(
            id = "groups-not-joined",
            %error,
            "the groups of the directories cannot be joined"
        ),
    }
}

/// Runs what is planned until the end.
async fn serve(
    file: &Path,
    plan: Plan,
    signals: Signals,
    options: &Options,
    family: &Ancestors,
) -> Result<(), StartError> {
    let tasks = Tasks::default();
    let running = plan.start(options, family, &tasks)?;

    if let Some(interval) = systemd::watchdog() {
        tasks.spawn(running.pulse().feed_watchdog(interval));
    }
    let ready = async {
        if let Some(filter) = &running.filter {
            filter.wait_for_interfaces().await;
        }
        info!(id = "ready", roles = running.roles.len(), "ready");
        systemd::ready();
        if options.child_of.is_some() {
            children::tell_ready();
        }
        std::future::pending::<()>().await;
    };
    let mut outcome = tokio::select! {
        () = ready => Ok(()),
        () = signals.wait_for_stop(file, &running) => Ok(()),
        () = tasks.failed() => Err(StartError::TaskEnded),
        () = running.trial_is_over(options.trial) => Err(StartError::NotConfirmed),
    };
    // First of all: whoever is locked out waits for it.
    let was_on_trial = running.filter.as_ref().is_some_and(FilterRole::end_trial);
    if was_on_trial && outcome.is_ok() {
        outcome = Err(StartError::StoppedOnTrial);
    }
    info!(id = "stopping", "stopping");
    tasks.stop();
    if let Some(filter) = &running.filter {
        filter.release_lock();
    }
    // A successor may start.
    let drain_timeout = running.drain_timeout();
    systemd::stopping(drain_timeout + FAREWELL);
    if let Some(gate) = &running.gate {
        gate.drain(drain_timeout).await;
    }
    tasks.wait().await;
    outcome
}

/// The roles that are meant.
pub(crate) fn named(config: &Config, only: Option<Role>) -> Result<Vec<Role>, StartError> {
    let described = config.roles();
    match only {
        Some(role) if !described.contains(&role) => Err(StartError::NotDescribed { role }),
        Some(role) => Ok(vec![role]),
        None => Ok(described),
    }
}

/// What `run` holds on to.
struct Running {
    sockets: Sockets,
    /// Notified to refresh the ranges at once.
    wake: Arc<Notify>,
    /// Where the IDs of approved lists go.
    approvals: mpsc::Sender<Vec<String>>,
    filter: Option<FilterRole>,
    gate: Option<GateRole>,
    /// What becomes of each source of ranges.
    refresh: Option<watch::Receiver<Vec<Progress>>>,
    /// The configuration in force.
    config: watch::Sender<Arc<Config>>,
    roles: Vec<Role>,
    confined: Option<Confined>,
    reloads: watch::Sender<ReloadStatus>,
}

impl Running {
    fn new(
        config: watch::Sender<Arc<Config>>,
        roles: Vec<Role>,
        approvals: mpsc::Sender<Vec<String>>,
    ) -> Self {
        Self {
            sockets: Sockets::default(),
            wake: Arc::new(Notify::new()),
            approvals,
            filter: None,
            gate: None,
            refresh: None,
            config,
            roles,
            confined: None,
            reloads: watch::Sender::default(),
        }
    }

    fn pulse(&self) -> Pulse {
        let (filter, gate) = (self.filter.as_ref(), self.gate.as_ref());
        Pulse::new(filter, gate, self.refresh.as_ref())
    }

    /// What connections get at the end.
    fn drain_timeout(&self) -> Duration {
        let config = self.config.borrow();
        let settings = config.gate.as_ref().filter(|_| self.gate.is_some());
        settings.map_or(Duration::ZERO, |gate| gate.drain_timeout)
    }

    /// Returns when the time to confirm is over and nobody did.
    async fn trial_is_over(&self, trial: Option<Duration>) {
        let (Some(trial), Some(filter)) = (trial, &self.filter) else {
            return std::future::pending().await;
        };
        warn!(
            id = "trial-started",
            seconds = trial.as_secs(),
            "on trial: `pullgate confirm` lets the filter stay, else what was before comes back"
        );
        tokio::time::sleep(trial).await;
        if !filter.state().filter.is_on_trial() {
            std::future::pending().await
        }
    }

    /// Passes on what somebody approves.
    fn approve(&self) {
        let paths = self.config.borrow().paths.clone();
        let ids = client::read_approved(&paths);
        let passed_on = ids.map(|ids| self.approvals.try_send(ids));
        match passed_on {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(
                id = "approval-not-delivered",
                %error,
                "approval not passed on"
            ),
            Err(error) => warn!(
                id = "approval-unreadable",
                %error,
                "an approval that does not say of what"
            ),
        }
    }

    /// Reads the configuration again, and returns whether it is in force; one that cannot be used
    /// leaves the old one so.
    fn reload(&self, file: &Path) -> bool {
        self.reloads.send_modify(|reloads| reloads.under_way = true);
        let error = self.try_reload(file).err();
        let is_in_force = error.is_none();
        self.reloads.send_modify(|reloads| {
            *reloads = ReloadStatus {
                count: reloads.count + 1,
                under_way: false,
                error,
            };
        });
        is_in_force
    }

    fn try_reload(&self, file: &Path) -> Result<(), String> {
        let config = match load(file) {
            Ok(config) => Arc::new(config),
            Err(error) => return Err(self.keep_the_old(&error)),
        };
        let before = Arc::clone(&self.config.borrow());
        for what in view::waits_for_a_start(&config, &before) {
            warn!(
                id = "restart-needed",
                "`{what}` has changed, which takes effect at the next start"
            );
        }
        let role = self.gate.clone();
        let _turn = role.as_ref().map(GateRole::turn);
        // All that can be refused is looked at before any of it is in force.
        let loaded = match self
            .check_reach(file, &config)
            .and_then(|()| self.load_gate(&config))
        {
            Ok(loaded) => loaded,
            Err(error) => return Err(self.keep_the_old(&error)),
        };
        // The filter may yet refuse it, and the gate shall go by the same rules.
        if let Some(filter) = &self.filter {
            tokio::task::block_in_place(|| filter.reload(&config))?;
        }
        if let (Some(role), Some(gate), Some(loaded)) = (&self.gate, &config.gate, loaded) {
            role.put_in_force(gate, loaded);
        }
        info!(id = "configuration-reloaded", "configuration reloaded");
        self.config.send_replace(config);
        Ok(())
    }

    /// Tells everybody why nothing has changed.
    fn keep_the_old(&self, error: &dyn std::error::Error) -> String {
        if let Some(filter) = &self.filter {
            filter.note_failure();
        }
        if let Some(gate) = &self.gate {
            gate.note_failure(error);
        }
        let error = chain(error);
        error!(
            id = "configuration-not-reloaded",
            error, "configuration not reloaded, the old one stays"
        );
        error
    }

    /// Whether we can still reach what a new configuration wants.
    fn check_reach(&self, file: &Path, config: &Config) -> Result<(), StartError> {
        let wanted = access::reach(file, config, &self.roles);
        let lacking = self
            .confined
            .as_ref()
            .map(|confined| confined.lacks(&wanted));
        let what = lacking.unwrap_or_default().join(", ");
        if what.is_empty() {
            return Ok(());
        }
        Err(StartError::OutOfReach { what })
    }

    /// Reads what the gate would need, if it runs here.
    fn load_gate(&self, config: &Config) -> Result<Option<Loaded>, StartError> {
        let Some(role) = &self.gate else {
            return Ok(None);
        };
        let Some(gate) = &config.gate else {
            return Err(StartError::NotDescribed { role: Role::Gate });
        };
        for what in role.waits_for_a_start(gate) {
            warn!(
                id = "restart-needed",
                "`{what}` is not what the gate was started with; it takes effect at the next start"
            );
        }
        let loaded = tokio::task::block_in_place(|| role.load(gate))?;
        Ok(Some(loaded.whole()?))
    }
}

/// The status sockets' paths, removed when dropped.
#[derive(Default)]
struct Sockets(Vec<(PathBuf, Option<FileId>)>);

impl Drop for Sockets {
    fn drop(&mut self) {
        for (socket, ours) in &self.0 {
            // A successor may have put its own there while we were draining.
            if file::stamp(socket) != *ours {
                continue;
            }
            if let Err(error) = std::fs::remove_file(socket) {
                warn!(
                    id = "socket-not-removed",
                    socket = %socket.display(),
                    %error,
                    "socket not removed"
                );
            }
        }
    }
}

/// How long it may take to end, besides what connections get.
const FAREWELL: Duration = Duration::from_secs(15);

/// The signals that mean something to us.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    user: Signal,
    approve: Signal,
    refresh: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: listen_for(SignalKind::terminate())?,
            interrupt: listen_for(SignalKind::interrupt())?,
            hang_up: listen_for(SignalKind::hangup())?,
            user: listen_for(SignalKind::user_defined1())?,
            approve: listen_for(SignalKind::user_defined2())?,
            refresh: listen_for(SignalKind::alarm())?,
        })
    }

    /// Returns at SIGTERM or SIGINT; SIGHUP reloads and asks for a refresh of the ranges, which
    /// SIGALRM does alone; SIGUSR1 confirms a trial, SIGUSR2 approves a list that is held.
    async fn wait_for_stop(mut self, file: &Path, running: &Running) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                // A new configuration makes the ranges fresh by itself.
                _ = self.hang_up.recv() => {
                    systemd::reloading();
                    if !running.reload(file) {
                        running.wake.notify_one();
                    }
                    systemd::ready();
                }
                _ = self.refresh.recv() => running.wake.notify_one(),
                _ = self.approve.recv() => running.approve(),
                _ = self.user.recv() => {
                    if let Some(filter) = &running.filter {
                        filter.confirm();
                    }
                }
            }
        }
    }
}
