//! The last known good ranges on disk, and the ranges in force that follow from it.
//!
//! The file is the only thing that passes between the roles: `ranges` writes it atomically,
//! `filter` and `gate` watch it and judge it anew, with the same guard that the feed met.

mod follow;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

pub use self::follow::Follower;
use crate::ranges::{self, Feed, Known, Limits, ListError, RangeSet, Rejection};

/// Ranges that may be used, and where they came from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct InForce {
    /// The ranges.
    pub known: Known,
    /// Where they came from.
    pub origin: Origin,
}

/// Where the ranges in force came from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Origin {
    /// The list embedded at build time: the network was never reached.
    Baseline,
    /// A fetched list.
    Fetched {
        /// The feed's name.
        source: String,
        /// When it was fetched.
        at: SystemTime,
    },
}

impl Origin {
    /// Seconds since the list was fetched; none for the baseline.
    ///
    /// A time in the future is a clock that was set back: as fresh as can be.
    #[must_use]
    pub fn age_seconds(&self, now: SystemTime) -> Option<u64> {
        match self {
            Self::Baseline => None,
            Self::Fetched { at, .. } => Some(now.duration_since(*at).unwrap_or_default().as_secs()),
        }
    }
}

impl InForce {
    /// The ranges embedded at build time.
    ///
    /// # Errors
    ///
    /// Only if the embedded lists were broken.
    pub fn baseline(limits: &Limits) -> Result<Self, SnapshotError> {
        let feed = ranges::baseline().map_err(SnapshotError::Baseline)?;
        let set = RangeSet::check(feed, limits).map_err(|rejection| SnapshotError::Rejected {
            path: PathBuf::from("the embedded baseline"),
            rejection,
        })?;
        Ok(Self {
            known: Known::new(set),
            origin: Origin::Baseline,
        })
    }

    /// The snapshot at `path`, or the baseline if there is none.
    ///
    /// # Errors
    ///
    /// Returns why the snapshot cannot be used.
    pub fn load(path: &Path, limits: &Limits) -> Result<Self, SnapshotError> {
        match read(path, limits)? {
            Some(in_force) => Ok(in_force),
            None => Self::baseline(limits),
        }
    }
}

/// Reads the snapshot at `path`, `None` if there is none, and judges it by the guard.
fn read(path: &Path, limits: &Limits) -> Result<Option<InForce>, SnapshotError> {
    let blame = |source| SnapshotError::Io {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    // Whoever may write the directory may put a pipe there, which must not hold us up.
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path);
    match opened {
        Ok(file) if !file.metadata().is_ok_and(|metadata| metadata.is_file()) => Err(
            io::Error::new(ErrorKind::InvalidInput, "not a regular file"),
        ),
        Ok(file) => file.take(SIZE_MAX + 1).read_to_string(&mut text),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => Err(error),
    }
    .map_err(blame)?;
    if text.len() as u64 > SIZE_MAX {
        return Err(blame(io::Error::new(
            ErrorKind::FileTooLarge,
            "larger than 1 MiB",
        )));
    }

    let content: Content = serde_json::from_str(&text).map_err(|source| SnapshotError::Syntax {
        path: path.to_owned(),
        source,
    })?;
    if content.version != VERSION {
        return Err(SnapshotError::Version {
            path: path.to_owned(),
            version: content.version,
        });
    }
    let ranges = content.ranges.iter().map(|entry| entry.range);
    let set = RangeSet::check(Feed::new(ranges), limits).map_err(|rejection| {
        SnapshotError::Rejected {
            path: path.to_owned(),
            rejection,
        }
    })?;
    let vanished = content.ranges.iter().filter_map(|entry| {
        let since = entry.vanished_since?;
        Some((entry.range, at_seconds(since)))
    });
    Ok(Some(InForce {
        known: Known::with_vanished(set, vanished.collect()),
        origin: Origin::Fetched {
            source: content.source,
            at: at_seconds(content.fetched_at),
        },
    }))
}

/// Replaces the snapshot at `path`: a reader sees the old file or the new one, also after a crash.
///
/// # Errors
///
/// Returns the step that failed; the old file is then still there.
pub fn save(path: &Path, in_force: &InForce) -> Result<(), SnapshotError> {
    let blame = |source| SnapshotError::Io {
        path: path.to_owned(),
        source,
    };
    let (source, at) = match &in_force.origin {
        Origin::Baseline => ("baseline", SystemTime::UNIX_EPOCH),
        Origin::Fetched { source, at } => (source.as_str(), *at),
    };
    let content = Content {
        version: VERSION,
        fetched_at: seconds(at),
        source: source.to_owned(),
        ranges: in_force
            .known
            .set()
            .iter()
            .map(|range| Entry {
                range,
                vanished_since: in_force.known.vanished_since(&range).map(seconds),
            })
            .collect(),
    };
    let mut text = serde_json::to_vec_pretty(&content).map_err(|source| SnapshotError::Syntax {
        path: path.to_owned(),
        source,
    })?;
    text.push(b'\n');

    let directory = path.parent().unwrap_or_else(|| Path::new("."));
    let temporary = path.with_extension("json.new");
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o640)
        .open(&temporary)
        .and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&temporary, path))
        .and_then(|()| File::open(directory)?.sync_all());
    written.map_err(blame)
}

/// Why a snapshot cannot be read, used or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The embedded lists do not parse.
    #[error("the embedded baseline is broken")]
    Baseline(#[source] ListError),
    /// The file cannot be read or written.
    #[error("{}", path.display())]
    Io {
        /// The snapshot.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is not a snapshot.
    #[error("{} is not a snapshot", path.display())]
    Syntax {
        /// The snapshot.
        path: PathBuf,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// The file is of a version that this program does not know.
    #[error("{} is of version {version}, not {VERSION}", path.display())]
    Version {
        /// The snapshot.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The ranges in the file do not pass the guard.
    #[error("{}", path.display())]
    Rejected {
        /// The snapshot.
        path: PathBuf,
        /// The guard's reason.
        #[source]
        rejection: Rejection,
    },
    /// The directory cannot be watched.
    #[error("{} cannot be watched", path.display())]
    Watch {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: notify::Error,
    },
}

/// Times in the file are seconds since the UNIX epoch.
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

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Content {
    version: u32,
    fetched_at: u64,
    source: String,
    ranges: Vec<Entry>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    range: IpNet,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vanished_since: Option<u64>,
}

const VERSION: u32 = 1;
/// Bytes that are read at most; 4,096 ranges take less than half of it.
const SIZE_MAX: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_loaded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ranges.json");
        let in_force = fetched();

        save(&path, &in_force).unwrap();

        assert_eq!(InForce::load(&path, &Limits::default()).unwrap(), in_force);
    }

    #[test]
    fn without_a_snapshot_the_baseline_is_in_force() {
        let directory = tempfile::tempdir().unwrap();

        let in_force = InForce::load(&directory.path().join("ranges.json"), &Limits::default());

        assert_eq!(in_force.unwrap().origin, Origin::Baseline);
    }

    #[test]
    fn a_snapshot_that_was_tampered_with_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ranges.json");
        save(&path, &fetched()).unwrap();
        let good = fs::read_to_string(&path).unwrap();

        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(InForce::load(&path, &Limits::default()).is_err());
        fs::remove_dir(&path).unwrap();
        let mode = rustix::fs::Mode::RUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
        assert!(InForce::load(&path, &Limits::default()).is_err());
        fs::remove_file(&path).unwrap();

        for bad in [
            good.replace("173.245.48.0/20", "0.0.0.0/0"),
            good.replace("173.245.48.0/20", "10.0.0.0/8"),
            good.replace("\"version\": 1", "\"version\": 2"),
            good[..good.len() / 2].to_owned(),
            String::new(),
        ] {
            fs::write(&path, bad).unwrap();
            assert!(InForce::load(&path, &Limits::default()).is_err());
        }
    }

    pub(super) fn fetched() -> InForce {
        let baseline = InForce::baseline(&Limits::default()).unwrap();
        let range = "173.245.48.0/20".parse().unwrap();
        let since = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        InForce {
            known: Known::with_vanished(baseline.known.set().clone(), vec![(range, since)]),
            origin: Origin::Fetched {
                source: "test".to_owned(),
                at: since,
            },
        }
    }
}
