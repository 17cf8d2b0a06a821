//! A role's status: what the running parts say, put into words.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use filter_ebpf::verdict::Counted;
use tokio::sync::watch;
use tokio::time::Instant;

use super::filter::{FilterRole, Tally};
use super::findings::{monitor, no_interface, weaknesses};
use super::gate::GateRole;
use super::health::Pulse;
use crate::config::{self, Config, Mode};
use crate::control::protocol::{
    Admits, DropStatus, FilterStatus, FramesStatus, HeldStatus, InterfaceStatus, ListStatus,
    RangesStatus, RefreshStatus, ReloadStatus, SightingStatus, SourceStatus, Status,
};
use crate::gate;
use crate::host::netlink;
use crate::host::sandbox::{Confined, NETWORK_ABI};
use crate::observe::http::MetricsSource;
use crate::observe::{Finding, FrameLabels, Metrics, Severity};
use crate::ranges::{ActiveRanges, BASELINE_DATE, Freshness, List, Origin, RangeSet};
use crate::refresh::{Held, Progress};
use crate::report::chain;
use crate::role::Role;
use crate::snapshot::Follower;
use crate::sync::lock;
use crate::xdp::{AttachMode, Coverage, Filter, State};

/// What a role's status is made from.
pub(super) struct View {
    role: Role,
    /// What it was started with.
    started: Arc<Config>,
    config: watch::Receiver<Arc<Config>>,
    metrics: Metrics,
    in_force: watch::Receiver<Arc<ActiveRanges>>,
    trouble: watch::Receiver<Option<String>>,
    pub(super) filter: Option<FilterRole>,
    pub(super) progress: Option<watch::Receiver<Vec<Progress>>>,
    pub(super) gate: Option<GateRole>,
    pub(super) confined: Option<Confined>,
    pub(super) reloads: Option<watch::Receiver<ReloadStatus>>,
    /// Why the metrics are told nowhere, if they should be.
    pub(super) untold: Option<Finding>,
    /// The metrics of a moment ago: to collect them takes a look at the host.
    collected: Mutex<Option<(Instant, String)>>,
}

impl View {
    pub(super) fn new(
        role: Role,
        config: watch::Receiver<Arc<Config>>,
        metrics: &Metrics,
        follower: &Follower,
    ) -> Self {
        let started = Arc::clone(&config.borrow());
        Self {
            role,
            started,
            config,
            metrics: metrics.clone(),
            in_force: follower.subscribe(),
            trouble: follower.trouble(),
            filter: None,
            progress: None,
            gate: None,
            confined: None,
            reloads: None,
            untold: None,
            collected: Mutex::default(),
        }
    }

    pub(super) fn status(&self) -> Status {
        let ranges = self.ranges();
        self.metrics
            .ranges(ranges.v4, ranges.v6, ranges.age_seconds);
        let mut findings = Vec::new();
        let mut details = Vec::new();
        if let Some(error) = &*self.trouble.borrow() {
            let text = format!("the snapshot is not used: {error}");
            findings.push(Finding::warning("snapshot-refused", text));
        }
        // The gate tells of its files too.
        let reloads = self.reloads.as_ref();
        let reload = reloads.map(|reloads| reloads.borrow().clone());
        let reload = reload.unwrap_or_default();
        if let (Role::Filter | Role::Ranges, Some(error)) = (self.role, &reload.error) {
            let text = format!("the configuration was not reloaded: {error}");
            findings.push(Finding::warning("configuration-not-reloaded", text));
        }
        self.describe_lists(&mut findings);
        findings.extend(self.untold.clone());
        let config = Arc::clone(&self.config.borrow());
        for what in waits_for_a_start(&config, &self.started) {
            findings.push(restart_needed(what));
        }
        findings.extend(weaknesses(&config, self.role));
        let filter = self.describe_filter(&mut findings);
        let enforcing = filter.as_ref().is_none_or(|(_, enforcing)| *enforcing);
        let filter = filter.map(|(status, _)| status);
        for interface in filter.iter().flat_map(|filter| &filter.interfaces) {
            if interface.filtered {
                let how = match &interface.covered_by {
                    Some(lower) => format!("covered by {lower}"),
                    None => interface.mode.clone(),
                };
                let text = format!("{} ({how})", interface.name);
                details.push(("attached".to_owned(), text));
            }
        }
        self.describe_settings(&mut details);
        match &self.confined {
            Some(confined) => {
                details.push(("confined".to_owned(), confined.to_string()));
                findings.extend(confinement(confined));
            }
            None => findings.push(Finding::warning(
                "unconfined",
                "unconfined: this process keeps all its privileges",
            )),
        }
        let refresh = self.refresh(&mut findings);
        let enforcing = self.describe_gate(&config, &mut findings, &mut details) && enforcing;
        Status {
            role: self.role,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            described: config.roles(),
            enforcing,
            admits: self.admits(),
            findings,
            ranges,
            details,
            reload,
            filter,
            refresh,
            sightings: self.sightings(),
            metrics: self.metrics.values(self.role),
        }
    }

    /// Says how the gate fares, and whether every host refuses those whom it does not trust.
    fn describe_gate(
        &self,
        config: &Config,
        findings: &mut Vec<Finding>,
        details: &mut Vec<(String, String)>,
    ) -> bool {
        let Some(role) = &self.gate else { return true };
        details.push(("listen".to_owned(), role.addresses.clone()));
        if let Some(error) = role.trouble() {
            findings.push(Finding::error("files-unusable", error));
        }
        for what in config
            .gate
            .iter()
            .flat_map(|gate| role.waits_for_a_start(gate))
        {
            findings.push(restart_needed(what));
        }
        findings.extend(role.unanswered.iter().map(|address| {
            let text = format!(
                "a client that connects to {address} hangs: `pullgate-gate.socket` listens there, and \
                 `gate.listen` does not name it"
            );
            Finding::warning("socket-unanswered", text).remedy("let both name the same")
        }));
        if let Some(affordable) = role.affordable {
            let text = format!(
                "the limit of open files allows {affordable} connections, fewer than \
                 `gate.max_connections`: the others wait in the kernel"
            );
            findings.push(Finding::warning("file-limit-low", text).remedy("raise LimitNOFILE"));
        }
        findings.extend(role.without_ipv6.iter().map(|address| {
            let text = format!(
                "`gate.listen`: {address} is not served, because this kernel has no IPv6 \
                 (`ipv6.disable=1`)"
            );
            Finding::warning("ipv6-missing", text)
        }));
        let mut lints = role.gate.lints();
        lints.extend(config.gate.iter().flat_map(exposures));
        findings.append(&mut lints);
        role.gate.with_policies(|policies| {
            let hosts: Vec<_> = policies.iter().map(|policy| policy.label()).collect();
            details.push(("hosts".to_owned(), hosts.join(" ")));
            policies.iter().all(|policy| policy.enforces())
        })
    }

    /// Which clients the gate admits.
    fn admits(&self) -> Option<Admits> {
        let role = self.gate.as_ref()?;
        let is_own = role
            .gate
            .with_policies(|policies| policies.iter().all(|policy| policy.proves_account()));
        Some(match is_own {
            true => Admits::Account,
            false => Admits::Cloudflare,
        })
    }

    fn ranges(&self) -> RangesStatus {
        let in_force = self.in_force.borrow();
        let now = SystemTime::now();
        let lists = in_force.lists().iter().map(|list| ListStatus {
            source: list.source.clone(),
            way: list.origin.way().to_owned(),
            age_seconds: list.origin.age_seconds(now),
            ranges: list.known.set().len(),
            kept: list.known.vanished().len(),
        });
        RangesStatus {
            source: in_force.names(),
            age_seconds: in_force.age_seconds(now),
            v4: in_force.set().v4().len(),
            v6: in_force.set().v6().len(),
            kept: in_force.vanished().len(),
            lists: lists.collect(),
        }
    }

    /// Says which lists are not what they could be.
    fn describe_lists(&self, findings: &mut Vec<Finding>) {
        let in_force = self.in_force.borrow();
        let now = SystemTime::now();
        for List { source, origin, .. } in in_force.lists() {
            let days = origin.age_seconds(now).unwrap_or_default() / 86_400;
            match (origin, origin.freshness(now)) {
                (Origin::Baseline, _) => findings.push(Finding::warning(
                    "baseline-active",
                    format!(
                        "the embedded baseline of {BASELINE_DATE} protects, the list of `{source}` \
                         was never fetched"
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
        let is_absent = |name: &&String| in_force.list(name).is_none();
        let config = self.config.borrow();
        let names = config
            .ranges
            .sources
            .iter()
            .map(|source| &source.value.name);
        for source in names.filter(is_absent) {
            let text = format!(
                "the list of `{source}` was never fetched, and none is built in: it admits no client"
            );
            findings.push(Finding::error("list-missing", text));
        }
    }

    /// Returns what the filter does, and whether it refuses whom it is there to refuse.
    fn describe_filter(&self, findings: &mut Vec<Finding>) -> Option<(FilterStatus, bool)> {
        let role = self.filter.as_ref()?;
        let (state, account) = (role.state(), role.account());
        let filter = &state.filter;
        let mode = filter.settings().mode;
        self.metrics.enforcing(mode == Mode::Enforce);
        if mode == Mode::Monitor {
            findings.push(monitor());
        }
        if let Some(tampered) = &state.tampered {
            let text = tampered.to_string();
            findings.push(Finding::error("kernel-ranges-tampered", text));
        }
        findings.extend(state.unpinned.iter().map(|pin| {
            let text = format!(
                "another process removed {}: the filter goes on, and `explain` does not find it",
                pin.display()
            );
            Finding::error("pin-removed", text).remedy("restart the filter role")
        }));
        if filter.is_on_trial() {
            findings.push(
                Finding::warning("on-trial", "the filter is on trial")
                    .remedy("`pullgate confirm` lets it stay"),
            );
        }

        let (interfaces, all_filtered) = self.interfaces(filter, findings);
        if let Some(error) = &state.amnesia {
            let text = format!("uplinks are not remembered across boots: {error}");
            findings.push(Finding::warning("uplinks-not-remembered", text));
        }
        let status = FilterStatus {
            mode: match mode {
                Mode::Enforce => "enforce".to_owned(),
                Mode::Monitor => "monitor".to_owned(),
            },
            on_trial: filter.is_on_trial(),
            interfaces,
            frames: self.frames(filter, &account, findings),
            drops: drops(&account),
            top_sources: sources(&account),
        };
        Some((status, mode == Mode::Enforce && all_filtered))
    }

    /// Returns how each interface fares, and whether all strangers' frames are judged.
    fn interfaces(
        &self,
        filter: &Filter,
        findings: &mut Vec<Finding>,
    ) -> (Vec<InterfaceStatus>, bool) {
        // What was attached by another rung is not any more.
        self.metrics.forget_attached();
        let coverage = match filter.coverage() {
            Ok(coverage) => coverage,
            Err(error) => {
                let text = format!("interfaces not readable: {}", chain(&error));
                findings.push(Finding::error("interfaces-unreadable", text));
                return (Vec::new(), false);
            }
        };
        if coverage.is_empty() {
            findings.push(no_interface());
            self.metrics.attached("none", "none", false);
        }
        let all_covered = coverage.iter().all(|it| it.state.is_covered());
        let is_protected = all_covered && !coverage.is_empty();
        let mut interfaces = Vec::new();
        for Coverage { interface, state } in coverage {
            let (mode, filtered) = (state.label(), state.is_covered());
            self.metrics.attached(&interface, mode, filtered);
            findings.extend(shortfall(&interface, &state));
            interfaces.push(InterfaceStatus {
                name: interface,
                mode: mode.to_owned(),
                filtered,
                covered_by: state.covered_by().map(str::to_owned),
            });
        }
        for (upper, lower) in filter.bystanders() {
            let text = format!(
                "`{upper}` shares `{lower}` with an uplink, so its clients are filtered as well"
            );
            findings.push(Finding::warning("neighbours-filtered", text).remedy(
                "to spare them, list them in `ranges.allow`, or the uplink's addresses in \
                 `filter.destinations`",
            ));
        }
        (interfaces, is_protected)
    }

    /// Returns what the filter has counted; the metrics are told all of it.
    fn frames(
        &self,
        filter: &Filter,
        account: &Tally,
        findings: &mut Vec<Finding>,
    ) -> Vec<FramesStatus> {
        let frames = filter.frames().unwrap_or_else(|error| {
            let text = format!("counters not readable: {}", chain(&error));
            findings.push(Finding::warning("counters-unreadable", text));
            BTreeMap::new()
        });
        let mut shown = Vec::new();
        for (iface, frames) in &frames {
            for &(counted, total) in frames {
                self.metrics.frames(&labels(iface, counted), total);
                if total != 0 {
                    shown.push(FramesStatus {
                        iface: iface.clone(),
                        family: counted.family.label().to_owned(),
                        verdict: counted.verdict.to_owned(),
                        reason: counted.reason.label().to_owned(),
                        total,
                        per_second: account.rate(iface, counted),
                    });
                }
            }
        }
        shown
    }

    fn describe_settings(&self, details: &mut Vec<(String, String)>) {
        let Some(role) = &self.filter else {
            return;
        };
        let state = role.state();
        let numbers = |ports: &[u16]| {
            ports
                .iter()
                .map(u16::to_string)
                .collect::<Vec<_>>()
                .join(" ")
        };
        let settings = state.filter.settings();
        details.push(("TCP ports".to_owned(), numbers(&settings.ports)));
        if !settings.udp_ports.is_empty() {
            details.push(("UDP ports".to_owned(), numbers(&settings.udp_ports)));
        }
    }

    fn refresh(&self, findings: &mut Vec<Finding>) -> Vec<RefreshStatus> {
        let Some(progress) = &self.progress else {
            return Vec::new();
        };
        let in_force = self.in_force.borrow();
        let progress = progress.borrow();
        let statuses = progress.iter().map(|progress| {
            let Progress { source, last, .. } = progress;
            let error = last.as_ref().and_then(|last| last.error.as_ref());
            if let Some(error) = error.filter(|_| progress.held.is_none()) {
                let text = format!("`{source}` not refreshed: {error}");
                findings.push(Finding::warning("refresh-failed", text));
            }
            let known = in_force.list(source).map(|list| list.known.set());
            if let Some(error) = &progress.unanswered {
                let text = format!(
                    "vanished ranges of `{source}` stay, because the gate does not report which are \
                     in use: {error}"
                );
                findings.push(Finding::warning("range-usage-unknown", text));
            }
            let held = progress.held.as_ref().map(|held| {
                let Held {
                    id,
                    fetched,
                    reason,
                } = held;
                let text = format!("a list of `{source}` is held: {reason}");
                findings.push(
                    Finding::warning("list-held", text).remedy("see `pullgate ranges approve`"),
                );
                let nothing = RangeSet::default();
                let (added, removed) = fetched.list.diff(known.unwrap_or(&nothing));
                HeldStatus {
                    id: id.clone(),
                    way: fetched.way.name.clone(),
                    reason: reason.to_string(),
                    added,
                    removed,
                }
            });
            RefreshStatus {
                source: source.clone(),
                attempts: progress.attempts,
                under_way: progress.under_way,
                outcome: last.as_ref().map(|last| last.outcome.to_owned()),
                seconds_ago: last.as_ref().map(|last| last.at.elapsed().as_secs()),
                error: last.as_ref().and_then(|last| last.error.clone()),
                next_in_seconds: progress
                    .next
                    .saturating_duration_since(Instant::now())
                    .as_secs(),
                held,
                unanswered: progress.unanswered.clone(),
            }
        });
        statuses.collect()
    }

    fn sightings(&self) -> Vec<SightingStatus> {
        let sightings = self
            .gate
            .iter()
            .flat_map(|role| role.gate.range_usage().report());
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let statuses = sightings.map(|sighting| SightingStatus {
            range: sighting.range,
            watched_ms: ms(sighting.watched),
            seen_ms_ago: sighting.seen_ago.map(ms),
        });
        statuses.collect()
    }
}

impl MetricsSource for View {
    fn metrics(&self) -> String {
        let collected = &mut *lock(&self.collected);
        if let Some((at, text)) = collected
            && at.elapsed() < COLLECTED_FOR
        {
            return text.clone();
        }
        // Looking at the host is what brings most of them up to date.
        self.status();
        let text = self.metrics.text(self.role).unwrap_or_default();
        *collected = Some((Instant::now(), text.clone()));
        text
    }

    async fn ailments(&self) -> Vec<Finding> {
        let (filter, gate) = (self.filter.as_ref(), self.gate.as_ref());
        Pulse::new(filter, gate, self.progress.as_ref())
            .ailments()
            .await
    }

    fn reservations(&self) -> Vec<Finding> {
        let mut reservations = Vec::new();
        if self.role == Role::Ranges {
            self.describe_lists(&mut reservations);
        }
        let status = self.status();
        if !status.enforcing {
            reservations.extend(status.findings);
        }
        let lints = self.gate.iter().flat_map(|role| role.gate.lints());
        reservations.extend(lints.filter(|lint| lint.severity == Severity::Error));
        reservations
    }
}

fn restart_needed(what: &str) -> Finding {
    let text = format!("`{what}` has changed, and the old is used until a restart");
    Finding::warning("restart-needed", text).remedy("restart this role")
}

/// What is weaker than it could be.
fn confinement(confined: &Confined) -> Vec<Finding> {
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

/// What is wrong with how an interface is filtered.
fn shortfall(interface: &str, state: &State) -> Option<Finding> {
    let why = match state {
        State::Attached(AttachMode::Native) | State::Covered(_) => return None,
        State::Attached(rung) => {
            let text = format!("`{interface}` is filtered by {} only", rung.name());
            return Some(Finding::warning("attach-mode-weaker", text));
        }
        State::Detached => "no program of ours is attached to it".to_owned(),
        State::Missing => "it does not exist, or is a bond without ports".to_owned(),
        State::NotEthernet => {
            "a route to the internet leads there, and its frames are not Ethernet frames".to_owned()
        }
        State::NotNamed => "a route to the internet leads there, so strangers can come in, and \
                            `filter.interfaces` does not name it; add it"
            .to_owned(),
        State::Overtaken(program) => {
            let text = format!(
                "`{interface}` is not surely filtered: another TCX program ({program}) judges before \
                 ours, and may let pass what ours would drop"
            );
            return Some(
                Finding::error("tcx-program-before", text).remedy("attach it behind ours"),
            );
        }
        State::Refused(reason) => reason.clone(),
    };
    let text = format!("`{interface}` is not filtered: {why}");
    Some(Finding::error("interface-not-filtered", text))
}

/// What differs and takes effect at the next start only; of the gate's own,
/// [`GateRole::waits_for_a_start`] tells.
pub(super) fn waits_for_a_start(new: &Config, old: &Config) -> impl Iterator<Item = &'static str> {
    let differs = [
        ("paths", new.paths != old.paths),
        ("metrics", new.metrics != old.metrics),
    ];
    let differing = differs.into_iter().filter(|(_, differs)| *differs);
    differing.map(|(what, _)| what)
}

fn drops(account: &Tally) -> Vec<DropStatus> {
    let interfaces = netlink::interfaces().unwrap_or_default();
    let name_of = |index| {
        let found = interfaces.iter().find(|interface| interface.index == index);
        found.map_or_else(|| format!("#{index}"), |found| found.name.clone())
    };
    let drops = account.drops.iter().map(|(at, drop)| DropStatus {
        seconds_ago: seconds_since(*at),
        iface: name_of(drop.interface),
        source: drop.source,
        port: drop.port,
        verdict: drop.counted.verdict.to_owned(),
        reason: drop.counted.reason.label().to_owned(),
    });
    drops.collect()
}

fn sources(account: &Tally) -> Vec<SourceStatus> {
    let sources = account.sources.top(TOP_SHOWN).into_iter();
    sources
        .map(|(source, about)| SourceStatus { source, about })
        .collect()
}

/// Zero for a time in the future: the clock was set back.
fn seconds_since(time: SystemTime) -> u64 {
    let ago = SystemTime::now().duration_since(time);
    ago.unwrap_or_default().as_secs()
}

fn labels(iface: &str, counted: Counted) -> FrameLabels {
    FrameLabels {
        iface: iface.to_owned(),
        family: counted.family.label(),
        verdict: counted.verdict,
        reason: counted.reason.label(),
    }
}

/// How long metrics are as good as new ones.
const COLLECTED_FOR: Duration = Duration::from_secs(1);
/// Sources of drops that are shown.
const TOP_SHOWN: usize = 10;

/// Upstreams that can be reached around the gate.
pub(crate) fn exposures(config: &config::Gate) -> Vec<Finding> {
    // A kernel that does not tell is no reason to warn.
    let listening = netlink::listeners().unwrap_or_default();
    gate::listeners(config, &listening)
}
