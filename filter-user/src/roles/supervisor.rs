//! The supervisor: holds the running roles of a process, reloads them, and brings them to their end.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::{join_all, select_all};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::access;
use super::children;
use super::error::{ReloadError, StartError};
use super::running::{Running, Staged};
use super::signals::{ProcessSignal, Signals};
use super::tasks::Tasks;
use super::{FAREWELL, Options};
use crate::config::{Config, load};
use crate::control::instruction::{Declined, Instruction};
use crate::control::protocol::{RefreshStatus, ReloadStatus};
use crate::host::file::{self, FileId};
use crate::host::sandbox::Confined;
use crate::host::systemd;
use crate::observe::{Finding, Metrics, log};
use crate::ranges::Compiled;
use crate::report::{ExitStatus as _, chain};
use crate::role::Role;
use crate::snapshot;
use crate::sync::lock;

/// The roles of a process, and what they have in common.
pub(super) struct Supervisor {
    parts: Parts,
    reloads: watch::Sender<ReloadStatus>,
    /// The file when it was read last.
    read: Mutex<Option<FileId>>,
    /// Settings of the file that wait for a restart.
    restart_needed: Mutex<Vec<&'static str>>,
    /// Who waits for a reload.
    requests: mpsc::Sender<Answer>,
    stop: CancellationToken,
    /// Whether READY was sent to the service manager.
    is_ready: AtomicBool,
}

/// Where what became of a reload is sent.
type Answer = oneshot::Sender<Result<(), Declined>>;

/// What a supervisor is made from.
pub(super) struct Parts {
    pub(super) file: PathBuf,
    pub(super) config: watch::Sender<Arc<Config>>,
    pub(super) active: watch::Receiver<Arc<Compiled>>,
    /// What is wrong with the snapshot.
    pub(super) snapshot_refused: watch::Receiver<Option<String>>,
    /// The configuration that is in `active`, as far as it can be.
    pub(super) followed: watch::Receiver<Arc<Config>>,
    pub(super) roles: Vec<Running>,
    pub(super) confined: Option<Confined>,
    pub(super) metrics: Metrics,
}

impl Supervisor {
    /// Takes the roles over, and serves requests to reload.
    pub(super) fn start(parts: Parts, tasks: &Tasks) -> Arc<Self> {
        let (requests, waiting) = mpsc::channel(REQUESTS_MAX);
        let supervisor = Arc::new(Self {
            read: Mutex::new(file::file_id(&parts.file)),
            parts,
            reloads: watch::Sender::default(),
            restart_needed: Mutex::default(),
            requests,
            stop: CancellationToken::new(),
            is_ready: AtomicBool::new(false),
        });
        tasks.spawn(Arc::clone(&supervisor).serve_reloads(waiting));
        supervisor
    }

    /// Serves until a signal or an instruction to stop, or until a part fails; then lets connections
    /// drain.
    pub(super) async fn run(
        self: &Arc<Self>,
        mut signals: Signals,
        options: &Options,
        tasks: &Tasks,
    ) -> Result<(), StartError> {
        if let Some(interval) = systemd::watchdog() {
            tasks.spawn(Arc::clone(self).feed_watchdog(interval));
        }
        let failures = self
            .parts
            .roles
            .iter()
            .cloned()
            .map(Running::wait_for_failure);
        let failures = select_all(failures.map(Box::pin));
        let outcome = tokio::select! {
            () = self.report_ready(options) => Ok(()),
            () = self.follow_signals(&mut signals) => Ok(()),
            () = self.stop.cancelled() => Ok(()),
            () = tasks.failed() => Err(StartError::TaskEnded),
            (failure, ..) = failures => Err(failure),
        };
        let drain_timeout = self.drain_timeout();
        systemd::stopping(drain_timeout + FAREWELL);
        // First of all: a client that is locked out waits for it.
        let was_on_trial = self.on_each(Running::end).await.contains(&true);
        info!(id = "stopping", "stopping");
        tasks.stop();
        self.on_each(Running::make_way).await;
        let draining = self
            .parts
            .roles
            .iter()
            .map(|role| role.drain(drain_timeout));
        join_all(draining).await;
        tasks.wait().await;
        match (outcome, was_on_trial) {
            (Ok(()), true) => Err(StartError::StoppedOnTrial),
            (outcome, _) => outcome,
        }
    }

    /// Does something that may block with each role, one after the other.
    async fn on_each<T: Send + 'static>(&self, f: fn(&Running) -> T) -> Vec<T> {
        let roles = self.parts.roles.clone();
        let done = spawn_blocking(move || roles.iter().map(f).collect());
        done.await.unwrap_or_default()
    }

    async fn report_ready(&self, options: &Options) {
        let is_child = options.child_of.is_some();
        let roles = self.parts.roles.iter();
        join_all(roles.map(|role| role.wait_until_ready(is_child))).await;
        info!(id = "ready", roles = self.parts.roles.len(), "ready");
        self.is_ready.store(true, Ordering::Relaxed);
        systemd::ready();
        if is_child {
            children::tell_ready();
        }
        std::future::pending().await
    }

    /// Returns at SIGTERM or SIGINT; SIGHUP reloads, beside this loop.
    async fn follow_signals(&self, signals: &mut Signals) {
        while signals.next().await == ProcessSignal::Reload {
            // The log and status have what became of it; if so many wait, one more changes nothing.
            drop(self.requests.try_send(oneshot::channel().0));
        }
    }

    /// Whether the file has changed since it was read, for better or worse.
    pub(super) fn is_file_newer(&self) -> bool {
        *lock(&self.read) != file::file_id(&self.parts.file)
    }

    /// The file that the configuration is read from.
    pub(super) fn file(&self) -> &Path {
        &self.parts.file
    }

    /// Does what a role is instructed to do, and returns when that is done.
    pub(super) async fn follow(
        &self,
        role: &Running,
        instruction: Instruction,
    ) -> Result<Vec<RefreshStatus>, Declined> {
        match instruction {
            Instruction::Reload => {
                let (answer, outcome) = oneshot::channel();
                let sent = self.requests.send(answer).await;
                sent.map_err(|_stopping| Declined::failed("this role is about to end"))?;
                let outcome = outcome.await;
                outcome.map_err(|_stopping| Declined::failed("this role is about to end"))??;
                Ok(Vec::new())
            }
            Instruction::EndTrial if !role.is_on_trial().await => {
                Err(Declined::Nothing("no filter is on trial".to_owned()))
            }
            Instruction::EndTrial | Instruction::Stop => {
                self.stop.cancel();
                // The end of the connection is the answer.
                std::future::pending().await
            }
            Instruction::LogLevel(level) => match log::set_level(level) {
                Ok(()) => Ok(Vec::new()),
                Err(error) => Err(Declined::Failed(error.to_string())),
            },
            Instruction::Approve(_) | Instruction::Confirm | Instruction::Refresh => {
                role.follow(instruction).await
            }
        }
    }

    /// Reloads, one after the other, whether or not the client still waits.
    async fn serve_reloads(self: Arc<Self>, mut waiting: mpsc::Receiver<Answer>) {
        while let Some(answer) = waiting.recv().await {
            let is_ready = self.is_ready.load(Ordering::Relaxed);
            if is_ready {
                systemd::reloading();
            }
            let outcome = Arc::clone(&self).reload().await;
            if is_ready {
                systemd::ready();
            }
            drop(answer.send(outcome));
        }
    }

    /// Reads the configuration again and applies it; one that cannot be used changes nothing. Returns
    /// when connections and packets are judged by it, or what of it cannot be used.
    async fn reload(self: Arc<Self>) -> Result<(), Declined> {
        let this = Arc::clone(&self);
        let reloading = spawn_blocking(move || this.try_reload());
        let mut outcome = match reloading.await {
            Ok(outcome) => outcome,
            Err(_panic) => Err(ReloadError::Failed),
        };
        if matches!(outcome, Ok(()) | Err(ReloadError::HostsKept { .. })) {
            outcome = self.wait_until_applied().await.and(outcome);
        }
        let error = outcome.as_ref().err().map(|error| chain(error));
        match &error {
            None => info!(id = "configuration-reloaded", "configuration reloaded"),
            Some(error) => error!(
                id = "configuration-not-reloaded",
                error, "configuration not reloaded, or not all of it"
            ),
        }
        let is_partly_used = matches!(outcome, Err(ReloadError::HostsKept { .. }));
        self.reloads.send_modify(|reloads| {
            reloads.count += 1;
            reloads.refused = error.is_some() && !is_partly_used;
            reloads.error = error;
        });
        outcome.map_err(|refusal| Declined::Unusable {
            status: refusal.exit_status(),
            text: chain(&refusal),
        })
    }

    fn try_reload(&self) -> Result<(), ReloadError> {
        // Before it is read: what changes meanwhile has still to be read.
        *lock(&self.read) = file::file_id(&self.parts.file);
        let staged = self.stage();
        let (config, staged) = staged.inspect_err(|_| self.note_refusal())?;
        let mut unusable = None;
        // The kernel may yet refuse it, so the filter is the first.
        for of_role in staged {
            let kept = of_role.apply().inspect_err(|_| self.note_refusal())?;
            unusable = unusable.or(kept);
        }
        self.parts.config.send_replace(config);
        match unusable {
            None => Ok(()),
            Some(hosts) => Err(ReloadError::HostsKept { hosts }),
        }
    }

    /// Looks at all that could be refused, before any of it is applied.
    fn stage(&self) -> Result<(Arc<Config>, Vec<Staged<'_>>), ReloadError> {
        let new = load(&self.parts.file)?;
        let old = Arc::clone(&self.parts.config.borrow());
        let roles: Vec<_> = self.parts.roles.iter().map(Running::role).collect();
        let restart_needed = new.boot.differences(&old.boot, &roles);
        for setting in &restart_needed {
            warn!(
                id = "restart-needed",
                "`{setting}` has changed, which takes effect at the next start"
            );
        }
        *lock(&self.restart_needed) = restart_needed;
        let config = Arc::new(new.keeping(&old.boot, &roles));
        self.check_reach(&self.parts.file, &config)?;
        let active = Arc::clone(&self.parts.active.borrow());
        let compiled = snapshot::recompile(&config.live.ranges, active.ranges())?;
        let compiled = Arc::new(compiled);
        let staged = self
            .parts
            .roles
            .iter()
            .map(|role| role.stage(&config, &compiled));
        let staged = staged.collect::<Result<_, _>>()?;
        Ok((config, staged))
    }

    fn note_refusal(&self) {
        self.parts.roles.iter().for_each(Running::note_refusal);
    }

    /// Whether we can still reach what a new configuration wants.
    fn check_reach(&self, file: &Path, config: &Config) -> Result<(), ReloadError> {
        let Some(confined) = &self.parts.confined else {
            return Ok(());
        };
        let roles: Vec<_> = self.parts.roles.iter().map(Running::role).collect();
        let lacking = confined.lacks(&access::reach(file, config, &roles));
        if lacking.is_empty() {
            Ok(())
        } else {
            Err(ReloadError::OutOfReach {
                what: lacking.join(", "),
            })
        }
    }

    /// Returns when the gate judges its peers by the new rules, and upstreams were asked what they speak.
    async fn wait_until_applied(&self) -> Result<(), ReloadError> {
        let config = self.config();
        let mut followed = self.parts.followed.clone();
        let is_followed = followed.wait_for(|now| Arc::ptr_eq(now, &config));
        let is_followed = matches!(timeout(APPLIED_TIMEOUT, is_followed).await, Ok(Ok(_)));
        let ranges = &config.live.ranges;
        if !is_followed || !self.active().has_rules(&ranges.allow, &ranges.deny) {
            return Err(ReloadError::RangesKept);
        }
        join_all(self.parts.roles.iter().map(Running::finish_reload)).await;
        Ok(())
    }

    /// What connections get at the end.
    fn drain_timeout(&self) -> Duration {
        let config = self.parts.config.borrow();
        let runs = self
            .parts
            .roles
            .iter()
            .any(|role| role.role() == Role::Gate);
        let settings = config.live.gate.as_ref().filter(|_| runs);
        settings.map_or(Duration::ZERO, |gate| gate.drain_timeout)
    }

    /// Feeds the service manager's watchdog for as long as every role answers.
    async fn feed_watchdog(self: Arc<Self>, interval: Duration) {
        loop {
            tokio::time::sleep(interval).await;
            let health = join_all(self.parts.roles.iter().map(Running::health)).await;
            let findings: Vec<_> = health.into_iter().flatten().collect();
            match findings.as_slice() {
                [] => systemd::alive(),
                findings => {
                    findings.iter().for_each(Finding::log);
                    error!(id = "watchdog-not-fed", "the watchdog is not fed");
                }
            }
        }
    }

    pub(super) fn config(&self) -> Arc<Config> {
        Arc::clone(&self.parts.config.borrow())
    }

    pub(super) fn active(&self) -> Arc<Compiled> {
        Arc::clone(&self.parts.active.borrow())
    }

    pub(super) fn snapshot_refused(&self) -> Option<String> {
        self.parts.snapshot_refused.borrow().clone()
    }

    pub(super) fn confined(&self) -> Option<&Confined> {
        self.parts.confined.as_ref()
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.parts.metrics
    }

    pub(super) fn reloads(&self) -> ReloadStatus {
        self.reloads.borrow().clone()
    }

    pub(super) fn restart_needed(&self) -> Vec<&'static str> {
        lock(&self.restart_needed).clone()
    }
}

/// For a follower to compile what is active by other rules.
const APPLIED_TIMEOUT: Duration = Duration::from_secs(5);
/// Reloads that are asked for while one is under way.
const REQUESTS_MAX: usize = 16;
