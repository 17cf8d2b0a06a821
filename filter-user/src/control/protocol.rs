//! What a role says of itself at its status socket.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::observe::Finding;
use crate::role::Role;

/// What a running role says of itself.
#[derive(Debug, Deserialize, Serialize)]
pub struct Status {
    /// Which one.
    pub role: Role,
    /// Version of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// The file that its configuration was read from, as it is printed.
    #[serde(default)]
    pub config: String,
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
    /// The last refusal for each reason, if the role is the gate.
    #[serde(default)]
    pub refusals: Vec<RefusalStatus>,
    /// All metrics of the process, by name and labels.
    pub metrics: BTreeMap<String, f64>,
}

/// The detail of a role about its confinement, which an operator needs less often.
pub const CONFINED: &str = "confined";

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

/// What became of reloads of the configuration.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct ReloadStatus {
    /// How many came to an end since the start of the process.
    pub count: u64,
    /// What of the last cannot be used, if anything.
    pub error: Option<String>,
    /// Whether nothing of it is used for that.
    #[serde(default)]
    pub refused: bool,
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
    /// The flood of SYNs that is under way.
    #[serde(default)]
    pub syn_flood: Option<SynFloodStatus>,
    /// The last drops of a sample, newest last.
    pub drops: Vec<DropStatus>,
    /// The sources of most drops since the role's start, most first.
    pub top_sources: Vec<SourceStatus>,
}

/// SYNs of sources that may enter are answered with cookies.
#[derive(Debug, Deserialize, Serialize)]
pub struct SynFloodStatus {
    /// For how long.
    pub seconds: u64,
    /// How many.
    pub answered_per_second: u64,
}

/// An interface that is or should be filtered.
#[derive(Debug, Deserialize, Serialize)]
pub struct InterfaceStatus {
    /// Its name.
    pub name: String,
    /// The mode: `native`, `generic` or `tcx`; `covered` by another's program, or `none`.
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
    /// To which address, if that can be read.
    #[serde(default)]
    pub destination: Option<IpAddr>,
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
    /// The list of each source.
    pub lists: Vec<ListStatus>,
}

/// The list of one source.
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

/// The last connection that was refused for one reason.
#[derive(Debug, Deserialize, Serialize)]
pub struct RefusalStatus {
    /// The reason.
    pub reason: String,
    /// What has happened.
    pub meaning: String,
    /// Seconds ago.
    pub seconds_ago: u64,
    /// Who it was.
    pub client: SocketAddr,
    /// The host that it was charged to; empty, if the name is not served.
    pub host: String,
    /// The name that it asked for.
    pub server_name: Option<String>,
    /// The subject of its certificate, if one was judged.
    pub subject: Option<String>,
    /// The issuer of that.
    pub issuer: Option<String>,
    /// The CA in `trust` that bears the issuer's name, or that of one behind it.
    pub anchor: Option<String>,
    /// Whether it was admitted all the same: its host does not enforce its trust.
    pub admitted: bool,
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
