//! What passes through the sockets of a role: its status, and what it can be instructed to do.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter, Write as _};
use std::net::IpAddr;

use hyper::StatusCode;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::observe::Finding;
use crate::report::span;
use crate::role::Role;

/// What a role can be instructed to do. It answers when that is done.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Instruction {
    /// `/approve`: take in the lists that are held and have these IDs, a JSON array.
    Approve(Vec<String>),
    /// `/confirm`: let the filter stay that is on trial.
    Confirm,
    /// `/refresh`: ask every source of ranges now.
    Refresh,
    /// `/reload`: read the configuration again.
    Reload,
    /// `/stop`: end, as by SIGTERM. The end of the connection is the answer.
    Stop,
}

impl Instruction {
    /// The path that it is posted to.
    #[must_use]
    pub fn path(&self) -> &'static str {
        match self {
            Self::Approve(_) => "/approve",
            Self::Confirm => "/confirm",
            Self::Refresh => "/refresh",
            Self::Reload => "/reload",
            Self::Stop => "/stop",
        }
    }

    /// The body that is posted.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        match self {
            // An array of strings has nothing in it that could fail.
            Self::Approve(ids) => serde_json::to_vec(ids).unwrap_or_default(),
            Self::Confirm | Self::Refresh | Self::Reload | Self::Stop => Vec::new(),
        }
    }

    /// The instruction that was posted; none, if there is none by that path.
    ///
    /// # Errors
    ///
    /// Returns what is wrong with the body.
    pub fn parse(path: &str, body: &[u8]) -> Result<Option<Self>, serde_json::Error> {
        Ok(Some(match path {
            "/approve" => Self::Approve(serde_json::from_slice(body)?),
            "/confirm" => Self::Confirm,
            "/refresh" => Self::Refresh,
            "/reload" => Self::Reload,
            "/stop" => Self::Stop,
            _ => return Ok(None),
        }))
    }
}

/// Why a role does not do what it is instructed to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Declined {
    /// 404: another role does that.
    NotMine,
    /// 409: there is nothing to do it to.
    Nothing(String),
    /// 422: what it should work with cannot be used; all goes on as before, or as the text says.
    Unusable(String),
    /// 500: it was tried.
    Failed(String),
}

impl Declined {
    /// How HTTP says it.
    #[must_use]
    pub fn into_parts(self) -> (StatusCode, String) {
        match self {
            Self::NotMine => (StatusCode::NOT_FOUND, "another role does that".to_owned()),
            Self::Nothing(text) => (StatusCode::CONFLICT, text),
            Self::Unusable(text) => (StatusCode::UNPROCESSABLE_ENTITY, text),
            Self::Failed(text) => (StatusCode::INTERNAL_SERVER_ERROR, text),
        }
    }

    /// What a status of HTTP other than success says.
    #[must_use]
    pub fn from_parts(status: StatusCode, text: String) -> Self {
        match status {
            StatusCode::NOT_FOUND => Self::NotMine,
            StatusCode::CONFLICT => Self::Nothing(text),
            StatusCode::UNPROCESSABLE_ENTITY => Self::Unusable(text),
            _ => Self::Failed(text),
        }
    }
}

/// What a running role says of itself.
#[derive(Debug, Deserialize, Serialize)]
pub struct Status {
    /// Which one.
    pub role: Role,
    /// Version of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// The roles that its configuration describes.
    #[serde(default)]
    pub described: Vec<Role>,
    /// Whether it refuses whom it is there to refuse; not so in monitor mode.
    pub enforcing: bool,
    /// Which clients it admits, if the role is the gate.
    #[serde(default)]
    pub admits: Option<Admits>,
    /// What is not right.
    pub findings: Vec<Finding>,
    /// The active ranges.
    pub ranges: RangesStatus,
    /// What is particular to the role, line by line.
    pub details: Vec<(String, String)>,
    /// What became of reloads of the configuration.
    #[serde(default)]
    pub reload: ReloadStatus,
    /// What the filter does, if the role is the filter.
    #[serde(default)]
    pub filter: Option<FilterStatus>,
    /// What became of each source, if the role is the one that asks them.
    #[serde(default)]
    pub refresh: Vec<RefreshStatus>,
    /// What was seen of vanished ranges, if the role is the gate.
    #[serde(default)]
    pub range_usage: Vec<RangeUseStatus>,
    /// All metrics of the process, by name and labels.
    pub metrics: BTreeMap<String, f64>,
}

/// Which clients get in.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Admits {
    /// Those with a certificate that only the operator's account has.
    Account,
    /// The same, as far as the web server's default site shows.
    DefaultSite,
    /// Every Cloudflare customer's.
    Cloudflare,
    /// Cloudflare's; whether all of its customers' is not known.
    Unknown,
}

impl Display for Admits {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Account => "only your Cloudflare account",
            Self::DefaultSite => {
                "only your Cloudflare account, by the web server's default site; its other sites \
                 were not asked"
            }
            Self::Cloudflare => "Cloudflare, for any of its customers",
            Self::Unknown => "Cloudflare; whether for any of its customers is not known",
        })
    }
}

/// What became of reloads of the configuration.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct ReloadStatus {
    /// How many came to an end since the start of the process.
    pub count: u64,
    /// Why the last was refused, if it was.
    pub error: Option<String>,
}

/// What the filter does.
#[derive(Debug, Deserialize, Serialize)]
pub struct FilterStatus {
    /// `enforce` or `monitor`.
    pub mode: String,
    /// Whether it still waits for `pullgate confirm`.
    pub on_trial: bool,
    /// Where it is attached.
    pub interfaces: Vec<InterfaceStatus>,
    /// What it counts; nothing that is zero.
    pub frames: Vec<FramesStatus>,
    /// The last drops of a sample, newest last.
    pub drops: Vec<DropStatus>,
    /// The sources of most drops since the role's start, most first.
    pub top_sources: Vec<SourceStatus>,
}

/// An interface that is or should be filtered.
#[derive(Debug, Deserialize, Serialize)]
pub struct InterfaceStatus {
    /// Its name.
    pub name: String,
    /// The rung: `native`, `generic` or `tcx`; `covered` by another's program, or `none`.
    pub mode: String,
    /// Whether it is filtered at this moment.
    pub filtered: bool,
    /// The interface whose program sees its frames, if that is another one.
    #[serde(default)]
    pub covered_by: Option<String>,
}

/// Frames of one kind.
#[derive(Debug, Deserialize, Serialize)]
pub struct FramesStatus {
    /// The interface.
    pub iface: String,
    /// `ipv4`, `ipv6` or `none`.
    pub family: String,
    /// `pass`, `drop` or `would_drop`.
    pub verdict: String,
    /// Why.
    pub reason: String,
    /// Since the counters began.
    pub total: u64,
    /// Over the last ten seconds.
    pub per_second: u64,
}

/// One drop.
#[derive(Debug, Deserialize, Serialize)]
pub struct DropStatus {
    /// Seconds ago.
    pub seconds_ago: u64,
    /// The interface.
    pub iface: String,
    /// Who sent it, if that can be read.
    pub source: Option<IpAddr>,
    /// To which port, if the packet shows one.
    pub port: Option<u16>,
    /// `drop` or `would_drop`.
    pub verdict: String,
    /// Why.
    pub reason: String,
}

/// A source of drops.
#[derive(Debug, Deserialize, Serialize)]
pub struct SourceStatus {
    /// Its address; of IPv6, the /64.
    pub source: IpAddr,
    /// About how many of its packets were dropped.
    pub about: u64,
}

/// The ranges that a role works with.
#[derive(Debug, Deserialize, Serialize)]
pub struct RangesStatus {
    /// The names of the sources whose lists they are.
    pub source: String,
    /// Seconds since the list that was fetched longest ago; none if none was.
    pub age_seconds: Option<u64>,
    /// IPv4 ranges.
    pub v4: usize,
    /// IPv6 ranges.
    pub v6: usize,
    /// Ranges that no source lists any more, and that are kept for their grace.
    pub kept: usize,
    /// What each source has told.
    pub lists: Vec<ListStatus>,
}

/// What one source has told.
#[derive(Debug, Deserialize, Serialize)]
pub struct ListStatus {
    /// Its name.
    pub source: String,
    /// By which way the list came: a way's name, `baseline` or `configuration`.
    pub way: String,
    /// Seconds since it was fetched, if it was.
    pub age_seconds: Option<u64>,
    /// Ranges, the kept ones as well.
    pub ranges: usize,
    /// Ranges that the source lists no more, and that are kept for their grace.
    pub kept: usize,
}

/// What became of asking one source.
#[derive(Debug, Deserialize, Serialize)]
pub struct RefreshStatus {
    /// Its name.
    pub source: String,
    /// How often it was asked.
    pub attempts: u64,
    /// Whether it is being asked.
    pub under_way: bool,
    /// What the last attempt came to; none while the first is under way.
    pub outcome: Option<String>,
    /// Seconds since the last attempt.
    pub seconds_ago: Option<u64>,
    /// Why nothing came of it.
    pub error: Option<String>,
    /// Seconds until the next.
    pub next_in_seconds: u64,
    /// A list that waits for approval.
    pub held: Option<HeldStatus>,
    /// Why vanished ranges of it stay although their grace is over, if the gate cannot say who
    /// still comes from them.
    pub unanswered: Option<String>,
}

/// A list that waits for approval.
#[derive(Debug, Deserialize, Serialize)]
pub struct HeldStatus {
    /// What it is known again by.
    pub id: String,
    /// By which way it came.
    pub way: String,
    /// Why it waits.
    pub reason: String,
    /// What it would add.
    pub added: Vec<IpNet>,
    /// What it would remove.
    pub removed: Vec<IpNet>,
}

/// What was seen of a range that has vanished.
#[derive(Debug, Deserialize, Serialize)]
pub struct RangeUseStatus {
    /// The range.
    pub range: IpNet,
    /// Milliseconds since it is looked out for.
    pub watched_ms: u64,
    /// Milliseconds since the last authenticated connection from it, if there was one.
    pub seen_ms_ago: Option<u64>,
}

/// The status of the host: of each role, or why it has none.
#[derive(Debug, Serialize)]
pub struct HostStatus {
    /// Whether every role that the configuration describes runs and enforces.
    pub protected: bool,
    /// Which clients get in, if strangers do not.
    pub admits: Option<Admits>,
    /// What is not right, of all roles.
    pub findings: Vec<Finding>,
    /// The roles that answered.
    pub roles: Vec<Status>,
}

impl HostStatus {
    /// Adds what a role says of itself.
    pub fn add(&mut self, status: Status) {
        let findings = status.findings.iter().cloned();
        self.findings
            .extend(findings.map(|finding| finding.of(status.role)));
        self.protected &= status.enforcing;
        self.admits = self.admits.or(status.admits);
        self.roles.push(status);
    }
}

impl Display for HostStatus {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.protected, self.findings.is_empty()) {
            (true, true) => "PROTECTED\n",
            (true, false) => "PROTECTED, but:\n",
            (false, _) => "NOT PROTECTED:\n",
        })?;
        if let (true, Some(admits)) = (self.protected, self.admits) {
            writeln!(f, "  admits {admits}")?;
        }
        for finding in &self.findings {
            writeln!(f, "  ! {finding}")?;
        }
        for role in &self.roles {
            writeln!(
                f,
                "\n{} (pid {}, pullgate {})",
                role.role.label(),
                role.pid,
                role.version
            )?;
            writeln!(f, "  {:<12} {}", "ranges", role.ranges)?;
            for (name, value) in &role.details {
                writeln!(f, "  {name:<12} {value}")?;
            }
            for refresh in &role.refresh {
                writeln!(f, "  {:<12} {refresh}", "refresh")?;
            }
            if let Some(filter) = &role.filter {
                write!(f, "{filter}")?;
            }
            for (name, value) in shown(role) {
                writeln!(f, "  {value:>12} {name}")?;
            }
        }
        Ok(())
    }
}

impl Display for FilterStatus {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if !self.frames.is_empty() {
            writeln!(f, "  {:>14} {:>10}  frames", "total", "per second")?;
        }
        for frames in &self.frames {
            let FramesStatus {
                iface,
                family,
                verdict,
                reason,
                total,
                per_second,
            } = frames;
            writeln!(
                f,
                "  {total:>14} {per_second:>10}  {verdict:<10} {reason:<16} {family:<4} {iface}"
            )?;
        }
        if !self.drops.is_empty() {
            writeln!(f, "  last drops, of a sample")?;
        }
        for drop in &self.drops {
            let source = drop
                .source
                .map_or_else(|| "?".to_owned(), |ip| ip.to_string());
            let port = drop
                .port
                .map_or_else(|| "-".to_owned(), |port| port.to_string());
            let DropStatus {
                seconds_ago,
                iface,
                verdict,
                reason,
                ..
            } = drop;
            writeln!(
                f,
                "  {seconds_ago:>12} s ago  {verdict:<10} {reason:<16} {source} to port {port} on \
                 {iface}"
            )?;
        }
        if !self.top_sources.is_empty() {
            writeln!(f, "  top sources of drops, about")?;
        }
        for SourceStatus { source, about } in &self.top_sources {
            writeln!(f, "  {about:>14}  {source}")?;
        }
        Ok(())
    }
}

/// The counters of a role that say something at a glance.
fn shown(role: &Status) -> impl Iterator<Item = (&str, f64)> {
    let families: &[&str] = match role.role {
        Role::Filter => &["pullgate_filter_reattached_total"],
        Role::Gate => &[
            "pullgate_gate_connections_total",
            "pullgate_gate_would_refuse_total",
        ],
        Role::Ranges => &["pullgate_ranges_refresh_total"],
    };
    let is_shown = |name: &str| families.iter().any(|family| name.starts_with(family));
    let counters = role.metrics.iter();
    let counters = counters.filter(move |(name, value)| **value != 0.0 && is_shown(name));
    counters.map(|(name, value)| (name.as_str(), *value))
}

impl Display for RangesStatus {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut text = format!("{} IPv4 and {} IPv6, {}", self.v4, self.v6, self.source);
        if let Some(age) = self.age_seconds {
            write!(text, ", {} old", span(age))?;
        }
        if self.kept != 0 {
            write!(text, ", {} vanished and kept", self.kept)?;
        }
        f.write_str(&text)
    }
}

impl Display for RefreshStatus {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let next = span(self.next_in_seconds);
        match (&self.outcome, self.seconds_ago) {
            (Some(outcome), Some(ago)) => {
                let (source, ago) = (&self.source, span(ago));
                write!(f, "{source}: {outcome}, {ago} ago, again in {next}")
            }
            (_, _) => write!(f, "{}: the first is under way", self.source),
        }?;
        let Some(held) = &self.held else {
            return match &self.error {
                Some(error) => write!(f, "\n    {error}"),
                None => Ok(()),
            };
        };
        write!(
            f,
            "\n    held, {} by {}: {}",
            held.id, held.way, held.reason
        )?;
        for range in &held.added {
            write!(f, "\n    + {range}")?;
        }
        for range in &held.removed {
            write!(f, "\n    - {range}")?;
        }
        Ok(())
    }
}
