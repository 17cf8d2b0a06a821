//! Whether the parts of a process go on: what the service manager's watchdog is fed by, and what
//! `/healthz` tells.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};
use tracing::error;

use super::filter::FilterRole;
use super::gate::GateRole;
use crate::host::systemd;
use crate::observe::Finding;
use crate::refresh::Progress;

/// The parts that can get stuck without an end.
pub(super) struct Pulse {
    filter: Option<FilterRole>,
    gate: Option<GateRole>,
    refresh: Option<watch::Receiver<Vec<Progress>>>,
}

impl Pulse {
    pub(super) fn new(
        filter: Option<&FilterRole>,
        gate: Option<&GateRole>,
        refresh: Option<&watch::Receiver<Vec<Progress>>>,
    ) -> Self {
        Self {
            filter: filter.cloned(),
            gate: gate.cloned(),
            refresh: refresh.cloned(),
        }
    }

    /// What does not answer in time. That we can ask is a proof of our own threads and timers.
    pub(super) async fn ailments(&self) -> Vec<Finding> {
        let mut ailments = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        // All are asked before any is waited for.
        let workers = self.gate.iter().flat_map(GateRole::workers);
        let asked: Vec<_> = workers.map(|worker| worker.spawn(async {})).collect();
        if let Some(filter) = self.filter.clone() {
            // Whoever publishes, reloads or counts holds the state, and must let go of it again.
            let free = spawn_blocking(move || drop(filter.state()));
            if !matches!(timeout_at(deadline, free).await, Ok(Ok(()))) {
                ailments.push(Finding::error(
                    "filter-hangs",
                    "the filter's state is held by something that hangs",
                ));
            }
        }
        for (number, answer) in asked.into_iter().enumerate() {
            if !matches!(timeout_at(deadline, answer).await, Ok(Ok(()))) {
                let text = format!("the gate's thread {number} does nothing");
                ailments.push(Finding::error("gate-thread-hangs", text));
            }
        }
        if let Some(refresh) = &self.refresh {
            let now = Instant::now();
            let progress = refresh.borrow();
            let overdue = progress.iter().filter(|source| source.is_overdue(now));
            ailments.extend(overdue.map(|it| {
                let text = format!("the refresh of `{}` is overdue", it.source);
                Finding::error("refresh-overdue", text)
            }));
        }
        ailments
    }

    /// Feeds the service manager's watchdog for as long as nothing ails.
    pub(super) async fn feed_watchdog(self, interval: Duration) {
        loop {
            tokio::time::sleep(interval).await;
            match self.ailments().await.as_slice() {
                [] => systemd::alive(),
                ailments => {
                    ailments.iter().for_each(Finding::log);
                    error!(id = "watchdog-not-fed", "the watchdog is not fed");
                }
            }
        }
    }
}

/// For a part that is busy; whoever asks by HTTP waits for longer.
const PATIENCE: Duration = Duration::from_secs(2);
