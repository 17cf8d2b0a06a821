//! The filter as a role: looked at, started, kept as the network and the ranges change, and ended.

mod handover;
mod report;
mod return_path;
mod tally;
mod upkeep;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::{JoinError, spawn_blocking};
use tokio::time::{Instant, timeout};
use tracing::{error, info, warn};

use self::return_path::ReturnPathKeeper;
use self::tally::Tally;
use super::HEALTH_TIMEOUT;
use super::error::{ReloadError, StartError};
use super::preflight::{self, Ancestors, OwnConnection};
use super::tasks::Tasks;
use crate::config::{Boot, Config, FilterSettings};
use crate::control::handover::HandoverListener;
use crate::control::instruction::Declined;
use crate::host::netlink;
use crate::host::systemd;
use crate::host::uplinks::{self, Memory};
use crate::observe::{Finding, Metrics};
use crate::ranges::Compiled;
use crate::report::chain;
use crate::role::Role;
use crate::sync::lock;
use crate::xdp::{self, Filter, Lifetime, XdpError};

/// Looks at what a configuration says of the filter, and changes nothing.
pub(super) fn examine(config: &Config) -> Result<&FilterSettings, StartError> {
    let settings = settings(config).ok_or(NOT_DESCRIBED)?;
    xdp::check_kinds(settings)?;
    xdp::check_bpffs(&config.boot.paths.bpf)?;
    Ok(settings)
}

/// A filter that can be started, as far as that can be known before.
pub(super) struct PreparedFilter {
    trial: Option<Duration>,
}

/// A filter that the gate can hand its sockets to.
pub(super) struct BoundFilter {
    trial: Option<Duration>,
    handover: HandoverListener,
}

impl PreparedFilter {
    pub(super) fn new(config: &Config, trial: Option<Duration>) -> Result<Self, StartError> {
        examine(config)?;
        xdp::check_capabilities()?;
        Ok(Self { trial })
    }

    /// Binds the socket at which the gate's are taken: the gate waits there until [`BoundFilter::start`].
    pub(super) fn bind(self, boot: &Boot) -> Result<BoundFilter, StartError> {
        let path = boot.paths.handover_socket();
        let handover = HandoverListener::bind(&path);
        Ok(BoundFilter {
            trial: self.trial,
            handover: handover.map_err(|error| StartError::socket(&path, error))?,
        })
    }
}

impl BoundFilter {
    /// Loads and attaches, and goes on looking after it.
    pub(super) fn start(
        self,
        config: &Arc<Config>,
        mut active: watch::Receiver<Arc<Compiled>>,
        own: (OwnConnection, &Ancestors),
        metrics: &Metrics,
        tasks: &Tasks,
    ) -> Result<FilterRole, StartError> {
        let settings = settings(config).ok_or(NOT_DESCRIBED)?;
        let paths = &config.boot.paths;
        let now = active.borrow_and_update().clone();
        preflight::check(settings, now.table(), own)?;
        let watch = netlink::NetworkWatch::new().map_err(XdpError::Netlink)?;
        let mut return_path = ReturnPathKeeper::start(config.boot.return_path)
            .map_err(|source| StartError::ReturnPath { source })?;
        let (memory, amnesia) = match uplinks::load(&paths.uplinks()) {
            Ok(memory) => (memory, None),
            Err(error) => {
                let error = chain(&error);
                warn!(
                    id = "uplinks-unreadable",
                    error, "the remembered uplinks are not used"
                );
                (Memory::default(), Some(error))
            }
        };
        let started = Filter::start(xdp::FilterStart {
            settings,
            base: &paths.bpf,
            rules: &now.rules(),
            table: now.table(),
            lifetime: match self.trial {
                Some(_) => Lifetime::OnTrial,
                None => Lifetime::Pinned,
            },
            memory: memory.clone(),
        });
        let filter = started.inspect_err(|_| return_path.revert())?;
        if self.trial.is_none() {
            return_path.settle();
        }
        let role = FilterRole {
            state: Arc::new(Mutex::new(FilterState {
                filter,
                config: Arc::clone(config),
                published: now,
                unpublished: None,
                saved: memory,
                amnesia,
                tampered: None,
                unpinned: Vec::new(),
                return_path,
                has_ended: false,
            })),
            tally: Arc::new(Mutex::new(Tally::default())),
            metrics: metrics.clone(),
            reconciled: Arc::default(),
            trial: self.trial,
            checks: Arc::new(Semaphore::new(1)),
            steering: watch::Sender::default(),
            refused: Arc::default(),
        };
        role.remember_uplinks();
        tasks.spawn(role.clone().look_after(active, watch));
        tasks.spawn(role.clone().take_sockets(self.handover, paths.clone()));
        Ok(role)
    }
}

/// The running filter; clones are the same one.
#[derive(Clone)]
pub(super) struct FilterRole {
    state: Arc<Mutex<FilterState>>,
    tally: Arc<Mutex<Tally>>,
    metrics: Metrics,
    /// Notified after each reconciliation.
    reconciled: Arc<Notify>,
    trial: Option<Duration>,
    /// Checks of the health that are under way.
    checks: Arc<Semaphore>,
    /// Changes when connections are steered by other settings, or no longer.
    steering: watch::Sender<()>,
    /// Why the gate's sockets were not taken the last time, if they were not.
    refused: Arc<Mutex<Option<String>>>,
}

/// The filter, and what it was made from.
struct FilterState {
    filter: Filter,
    config: Arc<Config>,
    /// What packets are judged by.
    published: Arc<Compiled>,
    /// Why that is not what is active.
    unpublished: Option<String>,
    /// What is on disk.
    saved: Memory,
    /// Why the next boot knows nothing of uplinks, or why this one did not.
    amnesia: Option<String>,
    /// When another process was last seen to have changed the ranges in the kernel.
    tampered: Option<Instant>,
    /// Pins that are gone.
    unpinned: Vec<PathBuf>,
    return_path: ReturnPathKeeper,
    /// Whether the role has let go of the filter: nothing changes it any more.
    has_ended: bool,
}

impl FilterRole {
    /// Returns when all interfaces that are named or remembered are there and filtered, or after
    /// `filter.interface_timeout`: at boot, drivers load while we start, and the service manager holds
    /// the network back for as long.
    pub(super) async fn wait_until_ready(&self) {
        let awaiting = |state: &mut FilterState| {
            let filter = &state.filter;
            (filter.awaited(), filter.settings().interface_timeout)
        };
        let (awaited, patience) = match self.on_state(awaiting).await {
            Ok((awaited, patience)) if !awaited.is_empty() => (awaited, patience),
            Ok(_) | Err(_) => return,
        };
        let interfaces = awaited.join(", ");
        warn!(
            id = "interfaces-awaited",
            interfaces,
            ?patience,
            "waiting for interfaces that do not exist yet"
        );
        systemd::extend(patience + MARGIN);
        let arrival = async {
            loop {
                let reconciled = self.reconciled.notified();
                match self.on_state(|state| state.filter.awaited()).await {
                    Ok(left) if !left.is_empty() => reconciled.await,
                    Ok(_) | Err(_) => return,
                }
            }
        };
        if timeout(patience, arrival).await.is_err() {
            let left = self.on_state(|state| state.filter.awaited()).await;
            let missing = left.unwrap_or_default().join(", ");
            error!(
                id = "interfaces-missing",
                interfaces = missing,
                "ready without interfaces that still do not exist; they are filtered when they come \
                 (`pullgate unload` forgets those that \"auto\" remembers)"
            );
        }
    }

    /// Returns when the time to confirm is over, the filter was not confirmed, and what was before is
    /// active again.
    pub(super) async fn wait_for_failure(&self) -> StartError {
        let Some(trial) = self.trial else {
            return std::future::pending().await;
        };
        warn!(
            id = "trial-started",
            seconds = trial.as_secs(),
            "on trial: `pullgate confirm` lets the filter stay, else what was before comes back"
        );
        tokio::time::sleep(trial).await;
        let is_over = self.on_state(FilterState::revert_trial).await;
        if is_over.unwrap_or(false) {
            StartError::NotConfirmed
        } else {
            std::future::pending().await
        }
    }

    /// Whether the filter waits to be confirmed.
    pub(super) async fn is_on_trial(&self) -> bool {
        let is_on_trial = self.on_state(|state| state.filter.is_on_trial()).await;
        is_on_trial.unwrap_or(false)
    }

    /// Does something with the state, which may be held for long, in a thread that may wait.
    async fn on_state<T: Send + 'static>(
        &self,
        f: impl FnOnce(&mut FilterState) -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        let role = self.clone();
        spawn_blocking(move || f(&mut role.state())).await
    }

    /// What does not answer in time.
    pub(super) async fn health(&self) -> Option<Finding> {
        let checking = async {
            // One at a time: a client that leaves ends none.
            let permit = Arc::clone(&self.checks).acquire_owned().await;
            // To publish, to reload or to count holds the state, and must let go of it again.
            self.on_state(move |_| drop(permit)).await
        };
        let is_free = matches!(timeout(HEALTH_TIMEOUT, checking).await, Ok(Ok(())));
        (!is_free).then(|| {
            Finding::error(
                "filter-hangs",
                "the filter's state is held by something that hangs",
            )
        })
    }

    /// Looks at a changed configuration, and changes nothing.
    pub(super) fn stage(
        &self,
        config: &Arc<Config>,
        compiled: &Arc<Compiled>,
    ) -> Result<StagedFilter<'_>, ReloadError> {
        let role = Role::Filter;
        let settings = settings(config).ok_or(ReloadError::NotDescribed { role })?;
        // No operator is there to ask, but the log shall name the connections that end.
        preflight::dropped(settings, compiled.table());
        Ok(StagedFilter {
            role: self,
            config: Arc::clone(config),
            compiled: Arc::clone(compiled),
        })
    }

    /// Counts that a reload was refused.
    pub(super) fn note_refusal(&self) {
        self.metrics.reloaded("Failed");
    }

    /// Lets what is on trial stay.
    pub(super) fn confirm(&self) -> Result<(), Declined> {
        let mut state = self.state();
        if state.has_ended {
            return Err(Declined::failed("its time was over"));
        }
        if !state.filter.is_on_trial() {
            return Err(Declined::Nothing("no filter is on trial".to_owned()));
        }
        match state.filter.confirm() {
            Ok(()) => {
                state.return_path.settle();
                info!(id = "trial-confirmed", "confirmed: the filter stays");
                Ok(())
            }
            Err(error) => {
                let error = chain(&error);
                error!(id = "trial-not-confirmed", error, "not confirmed");
                Err(Declined::Failed(error))
            }
        }
    }

    /// Lets go of the filter: nothing changes it from now on. Ends a trial that was not confirmed;
    /// returns whether there was one.
    pub(super) fn end(&self) -> bool {
        let mut state = self.state();
        let was_on_trial = state.revert_trial();
        state.has_ended = true;
        was_on_trial
    }

    /// Leaves the pins to a successor.
    pub(super) fn release_lock(&self) {
        self.state().filter.release_lock();
    }

    /// The filter, for a look at it.
    fn state(&self) -> MutexGuard<'_, FilterState> {
        // A panic while publishing leaves the old generation in use, which is still right.
        lock(&self.state)
    }
}

impl FilterState {
    /// Ends a trial that was not confirmed, and lets go of the filter; returns whether there was one.
    fn revert_trial(&mut self) -> bool {
        if self.has_ended || !self.filter.is_on_trial() {
            return false;
        }
        self.has_ended = true;
        self.return_path.revert();
        match self.filter.revert() {
            Ok(()) => warn!(
                id = "trial-reverted",
                "not confirmed: what was active before is so again"
            ),
            Err(error) => error!(
                id = "trial-not-reverted",
                error = %chain(&error),
                "what was before is not restored"
            ),
        }
        true
    }
}

/// A changed configuration that the filter can take.
#[must_use]
pub(super) struct StagedFilter<'a> {
    role: &'a FilterRole,
    config: Arc<Config>,
    compiled: Arc<Compiled>,
}

impl StagedFilter<'_> {
    /// Applies it; the kernel may still refuse it, and what was active before then is so again.
    pub(super) fn apply(self) -> Result<(), ReloadError> {
        let Self {
            role,
            config,
            compiled,
        } = self;
        let mut state = role.state();
        if state.has_ended {
            return Err(ReloadError::Ending);
        }
        if let Some(settings) = settings(&config) {
            let rules = compiled.rules();
            state.filter.reload(settings, &rules, compiled.table())?;
        }
        state.config = config;
        state.published = compiled;
        state.unpublished = None;
        role.steering.send_replace(());
        role.metrics.reloaded("Reloaded");
        info!(id = "filter-reloaded", "the filter is reloaded");
        Ok(())
    }
}

/// What the configuration says of the filter.
fn settings(config: &Config) -> Option<&FilterSettings> {
    config.live.filter.as_ref()
}

const NOT_DESCRIBED: StartError = StartError::NotDescribed { role: Role::Filter };
/// What the rest of a start may take.
const MARGIN: Duration = Duration::from_secs(60);
