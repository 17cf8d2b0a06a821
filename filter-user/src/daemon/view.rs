//! A role's status: what the running parts say, put into words.

use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use tokio::sync::watch;

use super::lock;
use crate::cli::Role;
use crate::config::{Config, Mode};
use crate::ranges::guard::Documentation;
use crate::refresh::Attempt;
use crate::report::chain;
use crate::snapshot::{InForce, Origin};
use crate::telemetry::Metrics;
use crate::telemetry::status::{RangesStatus, Status};
use crate::xdp::{Filter, Rung};

/// What a role's status is made from.
pub(super) struct View {
    role: Role,
    config: Arc<Config>,
    metrics: Metrics,
    in_force: watch::Receiver<Arc<InForce>>,
    pub(super) filter: Option<Arc<Mutex<Filter>>>,
    pub(super) attempts: Option<watch::Receiver<Option<Attempt>>>,
    pub(super) listen: String,
}

impl View {
    pub(super) fn new(
        role: Role,
        config: &Arc<Config>,
        metrics: &Metrics,
        in_force: &watch::Receiver<Arc<InForce>>,
    ) -> Self {
        Self {
            role,
            config: Arc::clone(config),
            metrics: metrics.clone(),
            in_force: in_force.clone(),
            filter: None,
            attempts: None,
            listen: String::new(),
        }
    }

    pub(super) fn status(&self) -> Status {
        let ranges = self.ranges();
        self.metrics
            .ranges(ranges.v4, ranges.v6, ranges.age_seconds);
        let mut warnings = Vec::new();
        let mut details = Vec::new();
        if ranges.age_seconds.is_none() {
            warnings.push("the embedded baseline protects, no list was ever fetched".to_owned());
        }
        if self.config.ranges.limits.documentation == Documentation::Accept {
            warnings.push("documentation ranges are accepted (a test bed)".to_owned());
        }
        let enforcing = self.describe_filter(&mut warnings, &mut details);
        self.describe_refresh(&mut warnings, &mut details);
        if self.role == Role::Gate {
            details.push(("listen".to_owned(), self.listen.clone()));
        }
        Status {
            role: self.role.label().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            enforcing,
            warnings,
            ranges,
            details,
            metrics: self.metrics.values(),
        }
    }

    fn ranges(&self) -> RangesStatus {
        let in_force = self.in_force.borrow();
        let (source, age_seconds) = match &in_force.origin {
            Origin::Baseline => ("baseline".to_owned(), None),
            // A time in the future is a clock that was set back: as fresh as can be.
            Origin::Fetched { source, at } => {
                let age = SystemTime::now().duration_since(*at).unwrap_or_default();
                (source.clone(), Some(age.as_secs()))
            }
        };
        RangesStatus {
            source,
            age_seconds,
            v4: in_force.known.set().v4().len(),
            v6: in_force.known.set().v6().len(),
            kept: in_force.known.vanished().len(),
        }
    }

    /// Returns whether the role refuses whom it is there to refuse.
    fn describe_filter(
        &self,
        warnings: &mut Vec<String>,
        details: &mut Vec<(String, String)>,
    ) -> bool {
        let (Some(settings), Some(filter)) = (&self.config.filter, &self.filter) else {
            return true;
        };
        let mut enforcing = settings.mode == Mode::Enforce;
        if settings.mode == Mode::Monitor {
            warnings.push("monitor mode: strangers' packets are counted, and pass".to_owned());
        }
        let filter = lock(filter);
        for attached in filter.attached() {
            let (interface, mode) = (&attached.interface, attached.rung.label());
            let is_filtered = attached.is_filtered();
            self.metrics.attached(interface, mode, is_filtered);
            if !is_filtered {
                enforcing = false;
                warnings.push(format!(
                    "`{interface}` is not filtered: it was detached or is gone"
                ));
                continue;
            }
            details.push(("attached".to_owned(), format!("{interface} ({mode} XDP)")));
            if attached.rung != Rung::Native {
                warnings.push(format!("`{interface}` is filtered by {mode} XDP only"));
            }
        }
        let ports: Vec<_> = settings.ports.iter().map(u16::to_string).collect();
        details.push(("TCP ports".to_owned(), ports.join(" ")));
        match filter.frames() {
            Ok(frames) => {
                for (verdict, reason, total) in frames {
                    self.metrics.frames(verdict, reason, total);
                }
            }
            Err(error) => warnings.push(format!("counters not readable: {}", chain(&error))),
        }
        enforcing
    }

    fn describe_refresh(&self, warnings: &mut Vec<String>, details: &mut Vec<(String, String)>) {
        let Some(attempts) = &self.attempts else {
            return;
        };
        match &*attempts.borrow() {
            None => details.push(("refresh".to_owned(), "the first is under way".to_owned())),
            Some(Attempt { at, outcome, error }) => {
                let ago = SystemTime::now().duration_since(*at).unwrap_or_default();
                let text = format!("{outcome}, {} s ago", ago.as_secs());
                details.push(("refresh".to_owned(), text));
                if let Some(error) = error {
                    warnings.push(format!("ranges not refreshed: {error}"));
                }
            }
        }
    }
}
