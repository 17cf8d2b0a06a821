//! The last known good ranges on disk, and the ranges in force that follow from it.
//!
//! The file is the only thing that passes between the roles: `ranges` writes it atomically,
//! `filter` and `gate` watch it and judge it anew, with the same guard that the feed met.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use notify::{RecursiveMode, Watcher as _};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tracing::{error, info};

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
    match File::open(path) {
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

/// Follows the snapshot: every change is judged anew, and published if it is good.
pub struct Follower {
    path: PathBuf,
    limits: Limits,
    events: mpsc::Receiver<()>,
    /// Dropping it ends the watch.
    _watcher: notify::RecommendedWatcher,
    in_force: watch::Sender<Arc<InForce>>,
}

impl Follower {
    /// Starts to watch the snapshot at `path`; its directory must exist.
    ///
    /// A snapshot that cannot be used is reported, and the baseline is in force.
    ///
    /// # Errors
    ///
    /// Returns why the directory cannot be watched.
    pub fn new(path: PathBuf, limits: Limits) -> Result<Self, SnapshotError> {
        let (sender, events) = mpsc::channel(1);
        let directory = path.parent().unwrap_or_else(|| Path::new("."));
        let watch = |source| SnapshotError::Watch {
            path: directory.to_owned(),
            source,
        };
        let name = path.clone();
        let mut watcher =
            notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                // Reading the file is an event too; only what may have changed it counts.
                let concerns = match &event {
                    Ok(event) => !event.kind.is_access() && event.paths.contains(&name),
                    Err(_) => true,
                };
                if concerns && let Err(mpsc::error::TrySendError::Closed(())) = sender.try_send(())
                {
                    // The follower is gone, and the watcher with it in a moment.
                }
            })
            .map_err(watch)?;
        watcher
            .watch(directory, RecursiveMode::NonRecursive)
            .map_err(watch)?;

        // Read only after the watch began, so that no change falls between.
        let in_force = match InForce::load(&path, &limits) {
            Ok(in_force) => in_force,
            Err(error) => {
                error!(error = %chain(&error), "snapshot refused, the embedded baseline protects");
                InForce::baseline(&limits)?
            }
        };
        Ok(Self {
            path,
            limits,
            events,
            _watcher: watcher,
            in_force: watch::Sender::new(Arc::new(in_force)),
        })
    }

    /// The ranges in force, now and from now on.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<InForce>> {
        self.in_force.subscribe()
    }

    /// Publishes every good change, until nobody listens any more.
    pub async fn run(mut self) {
        loop {
            let event = tokio::select! {
                event = self.events.recv() => event,
                () = self.in_force.closed() => None,
            };
            if event.is_none() {
                return;
            }
            match read(&self.path, &self.limits) {
                Ok(Some(in_force)) => self.publish(in_force),
                // Removed by hand, or about to be renamed into place: what is in force stays.
                Ok(None) => {}
                Err(error) => {
                    error!(error = %chain(&error), "snapshot refused, the ranges in force stay");
                }
            }
        }
    }

    fn publish(&self, in_force: InForce) {
        self.in_force.send_if_modified(|current| {
            let changed = **current != in_force;
            if changed {
                let (added, removed) = in_force.known.diff(&current.known);
                info!(?added, ?removed, "ranges taken over from the snapshot");
                *current = Arc::new(in_force);
            }
            changed
        });
    }
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

/// An error and its sources in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
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

    #[tokio::test]
    async fn a_follower_takes_over_a_good_change_and_keeps_its_ranges_on_a_bad_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ranges.json");
        let follower = Follower::new(path.clone(), Limits::default()).unwrap();
        let mut in_force = follower.subscribe();
        let running = tokio::spawn(follower.run());
        assert_eq!(in_force.borrow_and_update().origin, Origin::Baseline);

        fs::write(&path, "{").unwrap();
        save(&path, &fetched()).unwrap();
        in_force.changed().await.unwrap();

        assert_eq!(**in_force.borrow_and_update(), fetched());
        drop(in_force);
        running.await.unwrap();
    }

    fn fetched() -> InForce {
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
