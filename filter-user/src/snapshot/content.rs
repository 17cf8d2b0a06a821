//! What a snapshot holds: a version, a checksum, and per source its ranges.

use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::digest::sha256;
use crate::ranges::{
    ActiveRanges, Families, Feed, GuardLimits, List, Origin, RangeSet, Rejection, SourceRanges,
    Vanished,
};

/// The file, as JSON.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Document {
    version: u32,
    /// SHA-256 of `sources` as compact JSON, in hexadecimal: against accidents. Who may write the
    /// file may as well write this.
    checksum: String,
    sources: Vec<SourceEntry>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct SourceEntry {
    source: String,
    way: String,
    /// Seconds since the UNIX epoch.
    fetched_at: u64,
    ranges: Vec<IpNet>,
    vanished: Vec<Gone>,
    /// What was active before a large growth that was agreed to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    before_growth: Option<Vec<IpNet>>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Gone {
    range: IpNet,
    missing_ms: u64,
    #[serde(rename = "agreed")]
    approved: bool,
}

impl Document {
    /// The active lists as they are written to disk: those that were fetched.
    pub(super) fn text(active: &ActiveRanges) -> serde_json::Result<Vec<u8>> {
        let sources = active.lists().iter().filter_map(SourceEntry::new).collect();
        let document = Self {
            version: VERSION,
            checksum: checksum(&sources)?,
            sources,
        };
        let mut text = serde_json::to_vec_pretty(&document)?;
        text.push(b'\n');
        Ok(text)
    }

    /// Reads lists back, and judges each by the guard.
    pub(super) fn parse(bytes: &[u8], limits: &GuardLimits) -> Result<Vec<List>, Problem> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } = serde_json::from_slice(bytes).map_err(Problem::Syntax)?;
        if version != VERSION {
            return Err(Problem::Version { version });
        }
        let document: Self = serde_json::from_slice(bytes).map_err(Problem::Syntax)?;
        if document.checksum != checksum(&document.sources).map_err(Problem::Syntax)? {
            return Err(Problem::Checksum);
        }
        let lists = document.sources.into_iter();
        lists.map(|entry| entry.judge(limits)).collect()
    }
}

impl SourceEntry {
    fn new(list: &List) -> Option<Self> {
        let Origin::Fetched { way, at } = &list.origin else {
            return None;
        };
        let vanished = list.known.vanished().iter().map(|vanished| Gone {
            range: vanished.range,
            missing_ms: u64::try_from(vanished.missing_for.as_millis()).unwrap_or(u64::MAX),
            approved: vanished.approved,
        });
        Some(Self {
            source: list.source.clone(),
            way: way.clone(),
            fetched_at: seconds(*at),
            ranges: list.known.set().iter().collect(),
            vanished: vanished.collect(),
            before_growth: list.known.before_growth().map(|set| set.iter().collect()),
        })
    }

    fn judge(self, limits: &GuardLimits) -> Result<List, Problem> {
        // Which families it must hold was asked when it was fetched.
        let check = |ranges: Vec<IpNet>| {
            RangeSet::check(Feed::new(ranges), Families::Either, limits).map_err(Problem::Rejected)
        };
        let set = check(self.ranges)?;
        let before_growth = self.before_growth.map(check).transpose()?;
        let vanished = self.vanished.into_iter().map(|gone| Vanished {
            range: gone.range,
            missing_for: Duration::from_millis(gone.missing_ms),
            approved: gone.approved,
        });
        Ok(List {
            source: self.source,
            known: SourceRanges::with_vanished(set, vanished.collect()).grown_from(before_growth),
            origin: Origin::Fetched {
                way: self.way,
                at: at_seconds(self.fetched_at),
            },
        })
    }
}

/// What is wrong with a snapshot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// It is not a snapshot.
    #[error("it is not a snapshot")]
    Syntax(#[source] serde_json::Error),
    /// It is of a version that this program does not know.
    #[error("it is of version {version}, not {VERSION}")]
    Version {
        /// Its version.
        version: u32,
    },
    /// It is not what was written.
    #[error("its checksum is wrong")]
    Checksum,
    /// Its ranges do not pass the guard.
    #[error(transparent)]
    Rejected(Rejection),
}

fn checksum(sources: &Vec<SourceEntry>) -> serde_json::Result<String> {
    let sources = serde_json::to_vec(sources)?;
    Ok(sha256(&sources))
}

fn seconds(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

fn at_seconds(seconds: u64) -> SystemTime {
    let offset = Duration::from_secs(seconds);
    // A time beyond what the clock can express is a broken one: as old as can be.
    let time = SystemTime::UNIX_EPOCH.checked_add(offset);
    time.unwrap_or(SystemTime::UNIX_EPOCH)
}

const VERSION: u32 = 2;
