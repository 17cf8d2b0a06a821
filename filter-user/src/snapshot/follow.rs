//! Following the snapshot: every change is judged anew, and published if it is good.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{debug, error, info};

use super::{Problem, SnapshotError, baseline, compose, load, read};
use crate::config::Config;
use crate::host::file::{self, Watch};
use crate::ranges::guard::grows;
use crate::ranges::{ActiveRanges, List, Origin};
use crate::report::chain;

/// Follows the snapshot: every change is judged anew, and published if it is good.
pub struct Follower {
    path: PathBuf,
    config: watch::Receiver<Arc<Config>>,
    watch: Watch,
    in_force: watch::Sender<Arc<ActiveRanges>>,
    /// What is wrong with the snapshot. Said once: a file that stays as it is is read every minute.
    trouble: watch::Sender<Option<String>>,
}

impl Follower {
    /// Starts to watch the snapshot at `path`; its directory must exist.
    ///
    /// A snapshot that cannot be used is reported, and the baseline is in force.
    ///
    /// # Errors
    ///
    /// Returns why the directory cannot be watched.
    pub fn new(path: PathBuf, config: watch::Receiver<Arc<Config>>) -> Result<Self, SnapshotError> {
        let watch =
            Watch::new(std::slice::from_ref(&path)).map_err(|source| SnapshotError::Watch {
                path: file::directory(&path).to_owned(),
                source,
            })?;
        // Read only after the watch began, so that no change falls between.
        let now = Arc::clone(&config.borrow());
        let ranges = &now.ranges;
        let (in_force, trouble) = match load(&path, ranges) {
            Ok(in_force) => (in_force, None),
            Err(error) => {
                let error = chain(&error);
                error!(
                    id = "snapshot-refused",
                    error, "snapshot refused, the embedded baseline protects"
                );
                (baseline(ranges)?, Some(error))
            }
        };
        Ok(Self {
            path,
            config,
            watch,
            in_force: watch::Sender::new(Arc::new(in_force)),
            trouble: watch::Sender::new(trouble),
        })
    }

    /// The ranges in force, now and from now on.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<ActiveRanges>> {
        self.in_force.subscribe()
    }

    /// What is wrong with the snapshot, now and from now on.
    #[must_use]
    pub fn trouble(&self) -> watch::Receiver<Option<String>> {
        self.trouble.subscribe()
    }

    /// Publishes every good change, until nobody listens any more.
    pub async fn run(mut self) {
        loop {
            tokio::select! {
                () = self.watch.changed() => {}
                // A watch dies with its directory, and nobody says so.
                () = tokio::time::sleep(POLL) => {}
                // Other sources, other rules.
                Ok(()) = self.config.changed() => {}
                () = self.in_force.closed() => return,
            }
            let config = Arc::clone(&self.config.borrow_and_update());
            let ranges = &config.ranges;
            let current = || self.in_force.borrow().lists().to_vec();
            let read = read(&self.path, &ranges.limits).and_then(|lists| {
                self.check_growth(lists.as_deref().unwrap_or_default())?;
                Ok(lists)
            });
            let (lists, refused) = match read {
                Ok(Some(lists)) => (lists, None),
                // Removed by hand, or about to be renamed into place: what is in force stays.
                Ok(None) => (current(), None),
                Err(error) => (current(), Some(error)),
            };
            let refused = match compose(ranges, lists) {
                Ok(in_force) => {
                    self.publish(in_force);
                    refused
                }
                Err(error) => Some(error),
            };
            let refused = refused.map(|error| chain(&error));
            self.trouble.send_if_modified(|trouble| {
                let is_new = *trouble != refused;
                if let Some(error) = refused.as_ref().filter(|_| is_new) {
                    error!(
                        id = "snapshot-refused",
                        error, "snapshot refused, the ranges in force stay"
                    );
                }
                *trouble = refused;
                is_new
            });
        }
    }

    /// Judges what the lists would add by the guard's rule: much only if the snapshot says that a
    /// second source or the operator has agreed to it.
    fn check_growth(&self, lists: &[List]) -> Result<(), SnapshotError> {
        let in_force = self.in_force.borrow();
        for list in lists {
            let Some(current) = in_force.list(&list.source) else {
                continue;
            };
            let (current, origin) = (current.known.set(), &current.origin);
            // A start takes it unseen, and so it is taken after a start without one.
            if *origin == Origin::Baseline {
                continue;
            }
            // Agreed to be a growth of what there is here, or of a little more.
            let is_agreed = list.known.before_growth().is_some_and(|before| {
                current.iter().all(|range| before.has(&range)) && grows(current, before).is_ok()
            });
            if is_agreed {
                continue;
            }
            grows(current, list.known.set()).map_err(|rejection| SnapshotError::Corrupt {
                path: self.path.clone(),
                problem: Problem::Rejected(rejection),
            })?;
        }
        Ok(())
    }

    fn publish(&self, in_force: ActiveRanges) {
        self.in_force.send_if_modified(|current| {
            let changed = **current != in_force;
            if changed {
                let (added, removed) = in_force.set().diff(current.set());
                if !added.is_empty() || !removed.is_empty() {
                    info!(
                        id = "snapshot-applied",
                        ?added,
                        ?removed,
                        "ranges taken over from the snapshot"
                    );
                } else {
                    debug!(
                        id = "snapshot-unchanged",
                        "ranges confirmed by the snapshot"
                    );
                }
                *current = Arc::new(in_force);
            }
            changed
        });
    }
}

/// How often the file is read even if no event announces a change.
const POLL: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::save;
    use super::super::tests::{config, fetched};
    use super::*;
    use crate::ranges::{Families, Feed, Limits, RangeSet, SourceRanges};

    #[tokio::test(start_paused = true)]
    async fn a_follower_whose_directory_was_replaced_still_learns_of_changes() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        fs::create_dir(&state).unwrap();
        let path = state.join("ranges.json");
        let (_config, config) = watch::channel(Arc::new(config("")));
        let follower = Follower::new(path.clone(), config).unwrap();
        let mut in_force = follower.subscribe();
        let running = tokio::spawn(follower.run());

        fs::remove_dir(&state).unwrap();
        fs::create_dir(&state).unwrap();
        save(&path, &fetched(), &Limits::default()).unwrap();
        in_force.changed().await.unwrap();

        assert_eq!(**in_force.borrow_and_update(), fetched());
        drop(in_force);
        running.await.unwrap();
    }

    #[tokio::test]
    async fn a_follower_takes_over_a_good_change_and_keeps_its_ranges_on_a_bad_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ranges.json");
        let (_config, config) = watch::channel(Arc::new(config("")));
        let follower = Follower::new(path.clone(), config.clone()).unwrap();
        let mut in_force = follower.subscribe();
        let running = tokio::spawn(follower.run());
        let before = baseline(&config.borrow().ranges).unwrap();
        assert_eq!(**in_force.borrow_and_update(), before);

        fs::write(&path, "{").unwrap();
        save(&path, &fetched(), &Limits::default()).unwrap();
        in_force.changed().await.unwrap();

        assert_eq!(**in_force.borrow_and_update(), fetched());
        drop(in_force);
        running.await.unwrap();
    }

    #[tokio::test]
    async fn a_snapshot_that_adds_much_is_taken_only_if_that_was_agreed_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ranges.json");
        let limits = Limits::default();
        save(&path, &fetched(), &limits).unwrap();
        let (_config, config) = watch::channel(Arc::new(config("")));
        let follower = Follower::new(path.clone(), config).unwrap();
        let (mut in_force, mut trouble) = (follower.subscribe(), follower.trouble());
        let running = tokio::spawn(follower.run());
        let before = fetched();
        let list = &before.lists()[0];
        let ranges = list.known.set().iter();
        let more = Feed::new(ranges.chain(["8.0.0.0/12".parse().unwrap()]));
        let grown = RangeSet::check(more, Families::Both, &limits).unwrap();
        let with = |known| {
            let list = List {
                known,
                ..list.clone()
            };
            before.with(list, &limits).unwrap()
        };

        save(&path, &with(SourceRanges::new(grown.clone())), &limits).unwrap();
        trouble.changed().await.unwrap();
        let text = trouble.borrow_and_update().clone().unwrap();
        assert!(text.contains("would add"), "{text}");
        assert_eq!(**in_force.borrow_and_update(), before);

        let approved = SourceRanges::new(grown).grown_from(Some(list.known.set().clone()));
        save(&path, &with(approved), &limits).unwrap();
        in_force.changed().await.unwrap();
        assert!(
            in_force
                .borrow_and_update()
                .set()
                .contains("8.1.2.3".parse().unwrap())
        );
        drop(in_force);
        running.await.unwrap();
    }

    #[tokio::test]
    async fn other_ranges_in_the_configuration_count_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let (sender, receiver) = watch::channel(Arc::new(config("")));
        let path = directory.path().join("ranges.json");
        let follower = Follower::new(path, receiver).unwrap();
        let mut in_force = follower.subscribe();
        let running = tokio::spawn(follower.run());

        sender.send_replace(Arc::new(config("static = [\"64.0.0.0/24\"]")));
        in_force.changed().await.unwrap();

        assert_eq!(in_force.borrow_and_update().set().len(), 15 + 7 + 1);
        drop(in_force);
        running.await.unwrap();
    }
}
