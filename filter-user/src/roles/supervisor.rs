//! The supervisor: holds the running roles of a process, reloads them, and brings them to their end.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::{join_all, select_all};
use tokio::sync::{Mutex as Turn, watch};
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
use crate::control::protocol::{Declined, Instruction, RefreshStatus, ReloadStatus};
use crate::host::sandbox::Confined;
use crate::host::systemd;
use crate::observe::{Finding, Metrics};
use crate::ranges::Compiled;
use crate::report::chain;
use crate::role::Role;
use crate::snapshot;
use crate::sync::lock;

/// The roles of a process, and what they have in common.
pub(super) struct Supervisor {
    parts: Parts,
    reloads: watch::Sender<ReloadStatus>,
    /// Settings of the file that wait for a restart.
    restart_needed: Mutex<Vec<&'static str>>,
    /// Reloads come one after the other.
    turn: Turn<()>,
    stop: CancellationToken,
}

/// What a supervisor is made from.
pub(super) struct Parts {
    pub(super) file: PathBuf,
    pub(super) config: watch::Sender<Arc<Config>>,
    pub(super) active: watch::Receiver<Arc<Compiled>>,
    /// What is wrong with the snapshot.
    pub(super) snapshot_refused: watch::Receiver<Option<String>>,
    pub(super) roles: Vec<Running>,
    pub(super) confined: Option<Confined>,
    pub(super) metrics: Metrics,
}

impl Supervisor {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            parts,
            reloads: watch::Sender::default(),
            restart_needed: Mutex::default(),
            turn: Turn::new(()),
            stop: CancellationToken::new(),
        }
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
            () = self.follow_signals(&mut signals, tasks) => Ok(()),
            () = self.stop.cancelled() => Ok(()),
            () = tasks.failed() => Err(StartError::TaskEnded),
            (failure, ..) = failures => Err(failure),
        };
        // First of all: whoever is locked out waits for it.
        let roles = self.parts.roles.clone();
        let ended = spawn_blocking(move || roles.iter().filter(|role| role.end()).count() > 0);
        let was_on_trial = ended.await.unwrap_or(false);
        info!(id = "stopping", "stopping");
        tasks.stop();
        self.parts.roles.iter().for_each(Running::make_way);
        let drain_timeout = self.drain_timeout();
        systemd::stopping(drain_timeout + FAREWELL);
        join_all(
            self.parts
                .roles
                .iter()
                .map(|role| role.drain(drain_timeout)),
        )
        .await;
        tasks.wait().await;
        match (outcome, was_on_trial) {
            (Ok(()), true) => Err(StartError::StoppedOnTrial),
            (outcome, _) => outcome,
        }
    }

    async fn report_ready(&self, options: &Options) {
        join_all(self.parts.roles.iter().map(Running::wait_until_ready)).await;
        info!(id = "ready", roles = self.parts.roles.len(), "ready");
        systemd::ready();
        if options.child_of.is_some() {
            children::tell_ready();
        }
        std::future::pending().await
    }

    /// Returns at SIGTERM or SIGINT; SIGHUP reloads, beside this loop.
    async fn follow_signals(self: &Arc<Self>, signals: &mut Signals, tasks: &Tasks) {
        while signals.next().await == ProcessSignal::Reload {
            let this = Arc::clone(self);
            tasks.spawn_short(async move {
                // The log and status have what became of it.
                drop(this.reload().await);
            });
        }
    }

    /// Does what a role is instructed to do, and returns when that is done.
    pub(super) async fn follow(
        self: &Arc<Self>,
        role: &Running,
        instruction: Instruction,
    ) -> Result<Vec<RefreshStatus>, Declined> {
        match instruction {
            Instruction::Reload => {
                self.reload().await.map_err(Declined::Unusable)?;
                Ok(Vec::new())
            }
            Instruction::Stop => {
                self.stop.cancel();
                // The end of the connection is the answer.
                std::future::pending().await
            }
            instruction @ (Instruction::Approve(_)
            | Instruction::Confirm
            | Instruction::Refresh) => role.follow(instruction).await,
        }
    }

    /// Reads the configuration again and applies it; one that cannot be used changes nothing. Returns
    /// when connections and packets are judged by it, or what of it cannot be used.
    async fn reload(self: &Arc<Self>) -> Result<(), String> {
        let _turn = self.turn.lock().await;
        systemd::reloading();
        let this = Arc::clone(self);
        let reloading = spawn_blocking(move || this.try_reload());
        let (outcome, is_refused) = match reloading.await {
            Ok(Ok(())) => (Ok(()), false),
            // The gate reports its hosts itself.
            Ok(Err(error @ ReloadError::HostsKept { .. })) => (Err(chain(&error)), false),
            Ok(Err(error)) => (Err(chain(&error)), true),
            Err(panic) => (Err(panic.to_string()), true),
        };
        match &outcome {
            Ok(()) => {
                self.wait_until_applied().await;
                info!(id = "configuration-reloaded", "configuration reloaded");
            }
            Err(error) => error!(
                id = "configuration-not-reloaded",
                error, "configuration not reloaded, or not all of it"
            ),
        }
        self.reloads.send_modify(|reloads| {
            reloads.count += 1;
            reloads.error = outcome.clone().err().filter(|_| is_refused);
        });
        systemd::ready();
        outcome
    }

    fn try_reload(&self) -> Result<(), ReloadError> {
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
        let restart_needed = new.boot.differences(&old.boot);
        for setting in &restart_needed {
            warn!(
                id = "restart-needed",
                "`{setting}` has changed, which takes effect at the next start"
            );
        }
        *lock(&self.restart_needed) = restart_needed;
        let config = Arc::new(Config {
            boot: Arc::clone(&old.boot),
            live: new.live,
        });
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
    async fn wait_until_applied(&self) {
        let config = Arc::clone(&self.parts.config.borrow());
        let ranges = &config.live.ranges;
        let mut active = self.parts.active.clone();
        let has_rules = |now: &Arc<Compiled>| now.has_rules(&ranges.allow, &ranges.deny);
        // What the follower refuses it reports itself.
        drop(timeout(APPLIED_TIMEOUT, active.wait_for(has_rules)).await);
        join_all(self.parts.roles.iter().map(Running::finish_reload)).await;
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
