//! A role, from what is known of it before it runs to its end: one enum for each of its states.
//!
//! ```text
//! Prepared ─bind▶ Bound ─start▶ Running { report, health, stage ─▶ Staged ─apply▶, follow, drain }
//! ```

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::spawn_blocking;

use super::error::{ReloadError, StartError};
use super::filter::{BoundFilter, FilterRole, PreparedFilter, StagedFilter};
use super::gate::{BoundGate, GateRole, PreparedGate, StagedGate};
use super::preflight::{Ancestors, OwnConnection};
use super::ranges::RangesRole;
use super::role_report::RoleReport;
use super::tasks::Tasks;
use crate::config::{Boot, Config};
use crate::control::instruction::{Declined, Instruction};
use crate::control::protocol::{RangeUseStatus, RefreshStatus};
use crate::observe::{Finding, Metrics};
use crate::ranges::Compiled;
use crate::role::Role;

/// A role that was looked at, and that has changed nothing.
pub(super) enum Prepared {
    /// See [`PreparedFilter`].
    Filter(PreparedFilter),
    /// Needs nothing to start.
    Ranges,
    /// See [`PreparedGate`].
    Gate(Box<PreparedGate>),
}

impl Prepared {
    /// Looks at everything that the role needs.
    pub(super) fn new(
        role: Role,
        config: &Config,
        trial: Option<Duration>,
        listen_fds: &[RawFd],
    ) -> Result<Self, StartError> {
        Ok(match role {
            Role::Filter => Self::Filter(PreparedFilter::new(config, trial)?),
            Role::Ranges => Self::Ranges,
            Role::Gate => Self::Gate(Box::new(PreparedGate::new(config, listen_fds)?)),
        })
    }

    /// Which role it is.
    pub(super) fn role(&self) -> Role {
        match self {
            Self::Filter(_) => Role::Filter,
            Self::Ranges => Role::Ranges,
            Self::Gate(_) => Role::Gate,
        }
    }

    /// Binds its listening sockets: a port that is taken must be known before anything is attached.
    pub(super) fn bind(self, boot: &Boot) -> Result<Bound, StartError> {
        Ok(match self {
            Self::Filter(filter) => Bound::Filter(filter.bind(boot)?),
            Self::Ranges => Bound::Ranges,
            Self::Gate(gate) => Bound::Gate(Box::new(gate.bind(boot)?)),
        })
    }
}

/// A role whose clients, if it has any, wait for it.
pub(super) enum Bound {
    /// See [`BoundFilter`].
    Filter(BoundFilter),
    /// Has none.
    Ranges,
    /// See [`BoundGate`].
    Gate(Box<BoundGate>),
}

/// What roles are started with.
pub(super) struct StartContext<'a> {
    pub(super) config: watch::Receiver<Arc<Config>>,
    pub(super) active: watch::Receiver<Arc<Compiled>>,
    pub(super) own: (OwnConnection, &'a Ancestors),
    pub(super) metrics: &'a Metrics,
    pub(super) tasks: &'a Tasks,
}

impl Bound {
    /// Starts the role.
    pub(super) fn start(self, with: &StartContext<'_>) -> Result<Running, StartError> {
        let StartContext {
            config,
            active,
            own,
            metrics,
            tasks,
        } = with;
        let (config, active) = (config.clone(), active.clone());
        Ok(match self {
            Self::Filter(filter) => {
                let now = Arc::clone(&config.borrow());
                Running::Filter(filter.start(&now, active, *own, metrics, tasks)?)
            }
            Self::Ranges => Running::Ranges(RangesRole::start(config, active, metrics, tasks)),
            Self::Gate(gate) => Running::Gate(gate.start(config, active, metrics, tasks)?),
        })
    }
}

/// A role that runs; clones are the same one.
#[derive(Clone)]
pub(super) enum Running {
    /// Drops strangers' packets.
    Filter(FilterRole),
    /// Keeps the ranges fresh.
    Ranges(RangesRole),
    /// Demands the client certificate.
    Gate(GateRole),
}

impl Running {
    /// Which role it is.
    pub(super) fn role(&self) -> Role {
        match self {
            Self::Filter(_) => Role::Filter,
            Self::Ranges(_) => Role::Ranges,
            Self::Gate(_) => Role::Gate,
        }
    }

    /// Returns when it protects as far as it will at once.
    ///
    /// The parent of a child starts the filter behind the gate, which does not wait for that.
    pub(super) async fn wait_until_ready(&self, is_child: bool) {
        match self {
            Self::Filter(filter) => filter.wait_until_ready().await,
            Self::Ranges(_) => {}
            Self::Gate(gate) if is_child => gate.wait_for_upstreams().await,
            Self::Gate(gate) => gate.wait_until_ready().await,
        }
    }

    /// Returns when what a reload has begun in the background is done, or has had its time.
    pub(super) async fn finish_reload(&self) {
        match self {
            Self::Gate(gate) => gate.wait_until_ready().await,
            Self::Filter(_) | Self::Ranges(_) => {}
        }
    }

    /// Returns when it cannot go on.
    pub(super) async fn wait_for_failure(self) -> StartError {
        match self {
            Self::Filter(filter) => filter.wait_for_failure().await,
            Self::Ranges(_) | Self::Gate(_) => std::future::pending().await,
        }
    }

    /// Looks at what the role does. Blocks: it looks at the host.
    pub(super) fn report(&self, config: &Config) -> RoleReport {
        match self {
            Self::Filter(filter) => filter.report(),
            Self::Ranges(ranges) => ranges.report(),
            Self::Gate(gate) => gate.report(config),
        }
    }

    /// What is not as asked although the role enforces.
    pub(super) fn shortcomings(&self) -> Vec<Finding> {
        match self {
            Self::Gate(gate) => gate.shortcomings(),
            Self::Filter(_) | Self::Ranges(_) => Vec::new(),
        }
    }

    /// What was seen of ranges that have vanished.
    pub(super) fn range_usage(&self) -> Vec<RangeUseStatus> {
        match self {
            Self::Gate(gate) => gate.range_usage(),
            Self::Filter(_) | Self::Ranges(_) => Vec::new(),
        }
    }

    /// What of it does not answer in time. That we can ask is a proof of our own threads and timers.
    pub(super) async fn health(&self) -> Vec<Finding> {
        match self {
            Self::Filter(filter) => filter.health().await.into_iter().collect(),
            Self::Ranges(ranges) => ranges.health(),
            Self::Gate(gate) => gate.health().await,
        }
    }

    /// Reads all that a changed configuration needs, and changes nothing. Blocks.
    pub(super) fn stage(
        &self,
        config: &Arc<Config>,
        compiled: &Arc<Compiled>,
    ) -> Result<Staged<'_>, ReloadError> {
        Ok(match self {
            Self::Filter(filter) => Staged::Filter(filter.stage(config, compiled)?),
            Self::Ranges(_) => Staged::Ranges,
            Self::Gate(gate) => Staged::Gate(Box::new(gate.stage(config)?)),
        })
    }

    /// Counts that a reload was refused.
    pub(super) fn note_refusal(&self) {
        match self {
            Self::Filter(filter) => filter.note_refusal(),
            // A refresh makes the best of it.
            Self::Ranges(ranges) => ranges.wake(),
            Self::Gate(gate) => gate.note_refusal(),
        }
    }

    /// Does what it is instructed to, and returns when that is done.
    pub(super) async fn follow(
        &self,
        instruction: Instruction,
    ) -> Result<Vec<RefreshStatus>, Declined> {
        match instruction {
            Instruction::Confirm => {
                let Self::Filter(filter) = self else {
                    return Err(Declined::NotMine);
                };
                let filter = filter.clone();
                let confirmed = spawn_blocking(move || filter.confirm()).await;
                confirmed.map_err(|error| Declined::Failed(error.to_string()))??;
                Ok(Vec::new())
            }
            Instruction::Refresh => match self {
                Self::Ranges(ranges) => ranges.refresh().await,
                Self::Filter(_) | Self::Gate(_) => Err(Declined::NotMine),
            },
            Instruction::Approve(ids) => match self {
                Self::Ranges(ranges) => ranges.approve(ids).await.map(|()| Vec::new()),
                Self::Filter(_) | Self::Gate(_) => Err(Declined::NotMine),
            },
            // What concerns all roles of a process is the supervisor's.
            Instruction::EndTrial
            | Instruction::LogLevel(_)
            | Instruction::Reload
            | Instruction::Stop => Err(Declined::NotMine),
        }
    }

    /// Whether it waits to be confirmed.
    pub(super) async fn is_on_trial(&self) -> bool {
        match self {
            Self::Filter(filter) => filter.is_on_trial().await,
            Self::Ranges(_) | Self::Gate(_) => false,
        }
    }

    /// Lets go of the host; returns whether what was on trial has been undone.
    pub(super) fn end(&self) -> bool {
        match self {
            Self::Filter(filter) => filter.end(),
            Self::Ranges(_) | Self::Gate(_) => false,
        }
    }

    /// Lets a successor start.
    pub(super) fn make_way(&self) {
        if let Self::Filter(filter) = self {
            filter.release_lock();
        }
    }

    /// Waits for live connections, and closes those that take longer than `limit`.
    pub(super) async fn drain(&self, limit: Duration) {
        match self {
            Self::Gate(gate) => gate.drain(limit).await,
            Self::Filter(_) | Self::Ranges(_) => {}
        }
    }
}

/// A changed configuration that a role can apply.
#[must_use]
pub(super) enum Staged<'a> {
    /// See [`StagedFilter`].
    Filter(StagedFilter<'a>),
    /// It follows the configuration by itself.
    Ranges,
    /// See [`StagedGate`].
    Gate(Box<StagedGate<'a>>),
}

impl Staged<'_> {
    /// Applies it; returns what of it cannot be used.
    pub(super) fn apply(self) -> Result<Option<String>, ReloadError> {
        match self {
            Self::Filter(filter) => filter.apply().map(|()| None),
            Self::Ranges => Ok(None),
            Self::Gate(gate) => Ok(gate.apply()),
        }
    }
}
