//! What a role answers at its sockets: one look at it, for status, metrics and readiness alike.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::findings::of_role;
use super::role_report::RoleReport;
use super::running::Running;
use super::supervisor::Supervisor;
use crate::config::Config;
use crate::control::instruction::{Declined, Instruction};
use crate::control::protocol::{
    CONFINED, ListStatus, RangeUseStatus, RangesStatus, RefreshStatus, Status,
};
use crate::control::server::Answers;
use crate::host::sandbox::{Confined, NETWORK_ABI};
use crate::observe::{Finding, RangesSample, Sample, Severity, log};
use crate::ranges::{ActiveRanges, BASELINE_DATE, Freshness, List, Origin};
use crate::role::Role;
use crate::sync::lock;

/// Answers for one role.
pub(super) struct Reporter {
    role: Running,
    supervisor: Arc<Supervisor>,
    /// Why metrics are not served, if they should be.
    metrics_disabled: Option<Finding>,
    /// The metrics of a moment ago: to collect them takes a look at the host.
    collected: Mutex<Option<(Instant, String)>>,
}

impl Reporter {
    pub(super) fn new(
        role: Running,
        supervisor: Arc<Supervisor>,
        metrics_disabled: Option<Finding>,
    ) -> Self {
        Self {
            role,
            supervisor,
            metrics_disabled,
            collected: Mutex::default(),
        }
    }

    /// Looks at the role, and returns its status with the sample for its metrics.
    fn look(&self) -> (Status, Sample) {
        let (role, supervisor) = (self.role.role(), &*self.supervisor);
        let config = supervisor.config();
        let active = supervisor.active();
        let RoleReport {
            findings: own,
            mut details,
            is_enforcing,
            admits,
            filter,
            refresh,
            range_usage,
            refusals,
        } = self.role.report(&config);
        let mut findings = self.common_findings(&config, active.ranges());
        findings.extend(own);
        if let Some(confined) = supervisor.confined() {
            details.push((CONFINED.to_owned(), confined.to_string()));
        }
        details.extend(log::changed_level().map(|level| ("log".to_owned(), level)));
        let (filter, filter_sample) = filter.unzip();
        let ranges = ranges(active.ranges());
        let sample = Sample {
            ranges: RangesSample {
                v4: ranges.v4,
                v6: ranges.v6,
                age_seconds: ranges.age_seconds,
            },
            filter: filter_sample,
        };
        let status = Status {
            role,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            config: supervisor.file().display().to_string(),
            described: config.roles(),
            enforcing: is_enforcing,
            admits,
            findings,
            ranges,
            details,
            reload: supervisor.reloads(),
            filter,
            refresh,
            range_usage,
            refusals,
            metrics: supervisor.metrics().values(role, sample.clone()),
        };
        (status, sample)
    }

    /// What is not right, and no one role's.
    fn common_findings(&self, config: &Config, active: &ActiveRanges) -> Vec<Finding> {
        let supervisor = &*self.supervisor;
        let mut findings = Vec::new();
        if let Some(error) = supervisor.snapshot_refused() {
            let text = format!("the snapshot is not used: {error}");
            findings.push(Finding::warning("snapshot-refused", text));
        }
        let reload = supervisor.reloads();
        // A host whose files cannot be used is reported by the gate.
        if let Some(error) = reload.error.filter(|_| reload.refused) {
            let text = format!("the configuration was not reloaded: {error}");
            findings.push(Finding::warning("configuration-not-reloaded", text));
        }
        if supervisor.is_file_newer() {
            let file = supervisor.file().display();
            let text = format!("{file} has changed since it was read");
            findings.push(
                Finding::warning("configuration-not-read", text)
                    .remedy("`pullgate check`, then `pullgate reload`"),
            );
        }
        findings.extend(lists(config, active));
        findings.extend(self.metrics_disabled.clone());
        findings.extend(supervisor.restart_needed().into_iter().map(|setting| {
            let text = format!("`{setting}` has changed, and the old is used until a restart");
            Finding::warning("restart-needed", text).remedy("restart this role")
        }));
        findings.extend(of_role(config, self.role.role()));
        findings.extend(confinement(supervisor.confined()));
        findings
    }
}

impl Answers for Reporter {
    fn role(&self) -> Role {
        self.role.role()
    }

    fn status(&self) -> Status {
        self.look().0
    }

    fn metrics(&self) -> String {
        let collected = &mut *lock(&self.collected);
        if let Some((at, text)) = collected
            && at.elapsed() < COLLECTED_FOR
        {
            return text.clone();
        }
        let (_, sample) = self.look();
        let metrics = self.supervisor.metrics();
        let text = metrics.text(self.role.role(), sample).unwrap_or_default();
        *collected = Some((Instant::now(), text.clone()));
        text
    }

    fn readiness(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        if self.role.role() == Role::Ranges {
            let active = self.supervisor.active();
            findings.extend(lists(&self.supervisor.config(), active.ranges()));
        }
        let status = self.status();
        if !status.enforcing {
            // What is only a warning is no reason.
            let mut reasons = status.findings;
            reasons.retain(|finding| finding.severity == Severity::Error);
            findings.extend(reasons);
        }
        findings.extend(self.role.shortcomings());
        findings
    }

    async fn health(&self) -> Vec<Finding> {
        self.role.health().await
    }

    fn range_usage(&self) -> Vec<RangeUseStatus> {
        self.role.range_usage()
    }

    async fn follow(&self, instruction: Instruction) -> Result<Vec<RefreshStatus>, Declined> {
        self.supervisor.follow(&self.role, instruction).await
    }
}

fn ranges(active: &ActiveRanges) -> RangesStatus {
    let now = SystemTime::now();
    let lists = active.lists().iter().map(|list| ListStatus {
        source: list.source.clone(),
        way: list.origin.way().to_owned(),
        age_seconds: list.origin.age_seconds(now),
        ranges: list.known.set().len(),
        kept: list.known.vanished().len(),
    });
    RangesStatus {
        source: active.names(),
        age_seconds: active.age_seconds(now),
        v4: active.set().v4().len(),
        v6: active.set().v6().len(),
        kept: active.vanished().len(),
        lists: lists.collect(),
    }
}

/// Which lists are not what they could be.
fn lists(config: &Config, active: &ActiveRanges) -> Vec<Finding> {
    let mut findings = Vec::new();
    let now = SystemTime::now();
    for List { source, origin, .. } in active.lists() {
        let days = origin.age_seconds(now).unwrap_or_default() / 86_400;
        match (origin, origin.freshness(now)) {
            (Origin::Baseline, _) => findings.push(Finding::warning(
                "baseline-active",
                format!(
                    "the embedded baseline of {BASELINE_DATE} protects, the list of `{source}` was \
                     never fetched"
                ),
            )),
            (_, Freshness::Fresh) => {}
            (_, Freshness::Alarming) if days == 0 => findings.push(Finding::error(
                "list-from-future",
                format!(
                    "the list of `{source}` is dated in the future: is this host's clock right?"
                ),
            )),
            (_, Freshness::Stale) => findings.push(Finding::warning(
                "list-stale",
                format!("the list of `{source}` was not confirmed for {days} days"),
            )),
            (_, Freshness::Alarming) => findings.push(Finding::error(
                "list-expired",
                format!("ALARM: the list of `{source}` was not confirmed for {days} days"),
            )),
        }
    }
    let sources = config.live.ranges.sources.iter();
    let names = sources.map(|source| &source.value.name);
    for source in names.filter(|name| active.list(name).is_none()) {
        let text = format!(
            "the list of `{source}` was never fetched, and none is built in: it admits no client"
        );
        findings.push(Finding::error("list-missing", text));
    }
    findings
}

/// What is weaker than it could be about the confinement of this process.
fn confinement(confined: Option<&Confined>) -> Vec<Finding> {
    let Some(confined) = confined else {
        let text = "unconfined: this process keeps all its privileges";
        return Vec::from([Finding::warning("unconfined", text)]);
    };
    let mut findings = Vec::new();
    if let Some(landlock) = confined.lacking_landlock() {
        let text = format!(
            "this kernel does not confine a process to its files and TCP ports (landlock ABI \
             {landlock}, {NETWORK_ABI} is needed)"
        );
        findings.push(Finding::warning("landlock-partial", text));
    }
    if confined.is_root() {
        let text = "runs as root, which can regain privileges through systemd and D-Bus";
        findings.push(Finding::warning("runs-as-root", text).remedy(
            "start it by the package's units, or create the package's users and directories \
             (`systemd-sysusers`, `systemd-tmpfiles --create pullgate.conf`)",
        ));
    }
    findings
}

/// How long metrics are as good as new ones.
const COLLECTED_FOR: Duration = Duration::from_secs(1);
