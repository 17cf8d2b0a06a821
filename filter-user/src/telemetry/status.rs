//! The status of a role, and how `pullgate status` shows the three of them together.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter, Write as _};

use serde::{Deserialize, Serialize};

/// What a running role says of itself.
#[derive(Debug, Deserialize, Serialize)]
pub struct Status {
    /// `filter`, `ranges` or `gate`.
    pub role: String,
    /// Version of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Whether it refuses whom it is there to refuse; not so in monitor mode.
    pub enforcing: bool,
    /// Where protection is weaker than it could be, in sentences.
    pub warnings: Vec<String>,
    /// The ranges in force.
    pub ranges: RangesStatus,
    /// What is particular to the role, line by line.
    pub details: Vec<(String, String)>,
    /// All metrics of the process, by name and labels.
    pub metrics: BTreeMap<String, f64>,
}

/// The ranges that a role works with.
#[derive(Debug, Deserialize, Serialize)]
pub struct RangesStatus {
    /// Where they came from: a feed's name, or `baseline`.
    pub source: String,
    /// Seconds since they were fetched; none for the baseline.
    pub age_seconds: Option<u64>,
    /// IPv4 ranges.
    pub v4: usize,
    /// IPv6 ranges.
    pub v6: usize,
    /// Ranges that vanished from the feed and are kept for their grace.
    pub kept: usize,
}

/// The status of the host: of each role, or why it has none.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Whether every role that the configuration describes runs and enforces.
    pub protected: bool,
    /// What is missing or weaker than asked, in sentences.
    pub warnings: Vec<String>,
    /// The roles that answered.
    pub roles: Vec<Status>,
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.protected, self.warnings.is_empty()) {
            (true, true) => "PROTECTED\n",
            (true, false) => "PROTECTED, but:\n",
            (false, _) => "NOT PROTECTED:\n",
        })?;
        for warning in &self.warnings {
            writeln!(f, "  ! {warning}")?;
        }
        for role in &self.roles {
            writeln!(
                f,
                "\n{} (pid {}, pullgate {})",
                role.role, role.pid, role.version
            )?;
            writeln!(f, "  {:<12} {}", "ranges", role.ranges)?;
            for (name, value) in &role.details {
                writeln!(f, "  {name:<12} {value}")?;
            }
            for (name, value) in shown(role) {
                writeln!(f, "  {value:>12} {name}")?;
            }
        }
        Ok(())
    }
}

/// The counters of a role that say something at a glance.
fn shown(role: &Status) -> impl Iterator<Item = (&str, f64)> {
    let family = match role.role.as_str() {
        "filter" => "pullgate_filter_frames_total",
        "gate" => "pullgate_gate_connections_total",
        _ => "pullgate_ranges_refresh_total",
    };
    let counters = role.metrics.iter();
    let counters = counters.filter(move |(name, value)| **value != 0.0 && name.starts_with(family));
    counters.map(|(name, value)| (name.as_str(), *value))
}

impl Display for RangesStatus {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut text = format!("{} IPv4 and {} IPv6, {}", self.v4, self.v6, self.source);
        if let Some(age) = self.age_seconds {
            write!(text, ", {} old", age_text(age))?;
        }
        if self.kept != 0 {
            write!(text, ", {} vanished and kept", self.kept)?;
        }
        f.write_str(&text)
    }
}

fn age_text(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}
