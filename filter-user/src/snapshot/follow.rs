//! Following the snapshot: every change is judged again, compiled once, and handed to all who judge by
//! it.

use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tracing::{debug, error, info};

use super::{Problem, SnapshotError, baseline, compile, compose, load, read};
use crate::config::Config;
use crate::host::file::{self, FileWatch};
use crate::ranges::guard::grows;
use crate::ranges::{Compiled, List, Origin};
use crate::report::chain;

/// Follows the snapshot: every change is judged again, and passed on compiled if it is good.
pub struct Follower {
    path: PathBuf,
    config: watch::Receiver<Arc<Config>>,
    watch: FileWatch,
    active: watch::Sender<Arc<Compiled>>,
    /// The configuration that `active` was last compiled by, as far as it can be.
    followed: watch::Sender<Arc<Config>>,
    /// What is wrong with the snapshot. Logged once: a file that stays as it is is read every minute.
    refused: watch::Sender<Option<String>>,
}

impl Follower {
    /// Starts to watch the snapshot at `path`; its directory must exist.
    ///
    /// A snapshot that cannot be used is reported, and the baseline is active.
    ///
    /// # Errors
    ///
    /// Returns why the directory cannot be watched, or that not even the baseline can be used.
    pub fn new(path: PathBuf, config: watch::Receiver<Arc<Config>>) -> Result<Self, SnapshotError> {
        let watch =
            FileWatch::new(std::slice::from_ref(&path)).map_err(|source| SnapshotError::Watch {
                path: file::directory(&path).to_owned(),
                source,
            })?;
        // Read only after the watch began, so that no change falls between.
        let now = Arc::clone(&config.borrow());
        let ranges = &now.live.ranges;
        let loaded = load(&path, ranges).and_then(|active| compile(ranges, active));
        let (active, refused) = match loaded {
            Ok(active) => (active, None),
            Err(error) => {
                let error = chain(&error);
                error!(
                    id = "snapshot-refused",
                    error, "snapshot refused, the embedded baseline protects"
                );
                (compile(ranges, baseline(ranges)?)?, Some(error))
            }
        };
        Ok(Self {
            path,
            config,
            watch,
            active: watch::Sender::new(Arc::new(active)),
            followed: watch::Sender::new(now),
            refused: watch::Sender::new(refused),
        })
    }

    /// What packets and peers are judged by, now and from now on.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<Compiled>> {
        self.active.subscribe()
    }

    /// The configuration that is followed, now and from now on: by then, what it changes is passed on.
    #[must_use]
    pub fn followed(&self) -> watch::Receiver<Arc<Config>> {
        self.followed.subscribe()
    }

    /// What is wrong with the snapshot, now and from now on.
    #[must_use]
    pub fn refused(&self) -> watch::Receiver<Option<String>> {
        self.refused.subscribe()
    }

    /// Passes every good change on, as long as there is a receiver.
    pub async fn run(mut self) {
        loop {
            tokio::select! {
                () = self.watch.changed() => {}
                // A watch dies with its directory, without an event.
                () = tokio::time::sleep(POLL) => {}
                // Other sources, other rules.
                Ok(()) = self.config.changed() => {}
                () = self.active.closed() => return,
            }
            let config = Arc::clone(&self.config.borrow_and_update());
            let refused = self.follow(&config).await.err();
            self.followed.send_replace(config);
            let refused = refused.map(|error| chain(&error));
            self.refused.send_if_modified(|known| {
                let is_new = *known != refused;
                if let Some(error) = refused.as_ref().filter(|_| is_new) {
                    error!(
                        id = "snapshot-refused",
                        error, "snapshot refused, the active ranges stay"
                    );
                }
                *known = refused;
                is_new
            });
        }
    }

    /// Reads the snapshot, and passes on what is active by it; returns what is wrong with it.
    async fn follow(&self, config: &Arc<Config>) -> Result<(), SnapshotError> {
        let (path, now) = (self.path.clone(), Arc::clone(config));
        let reading = spawn_blocking(move || read(&path, &now.live.ranges.limits));
        let read = match reading.await {
            Ok(read) => read,
            Err(panic) => resume_unwind(panic.into_panic()),
        };
        let read = read.and_then(|lists| {
            self.check_growth(lists.as_deref().unwrap_or_default())?;
            Ok(lists)
        });
        let of_file = match read {
            Ok(Some(lists)) => self.compile(config, lists).await,
            // Removed by hand, or about to be renamed into place: what is active stays.
            Ok(None) => return self.keep(config).await,
            Err(error) => Err(error),
        };
        match of_file {
            Ok(active) => {
                self.pass_on(active);
                Ok(())
            }
            Err(error) => {
                // Its rules count all the same.
                self.keep(config).await?;
                Err(error)
            }
        }
    }

    /// Passes on the lists that are active, by another configuration.
    async fn keep(&self, config: &Arc<Config>) -> Result<(), SnapshotError> {
        let lists = self.active.borrow().ranges().lists().to_vec();
        self.pass_on(self.compile(config, lists).await?);
        Ok(())
    }

    async fn compile(
        &self,
        config: &Arc<Config>,
        lists: Vec<List>,
    ) -> Result<Compiled, SnapshotError> {
        let config = Arc::clone(config);
        let compiling = spawn_blocking(move || {
            let ranges = &config.live.ranges;
            compile(ranges, compose(ranges, lists)?)
        });
        match compiling.await {
            Ok(compiled) => compiled,
            Err(panic) => resume_unwind(panic.into_panic()),
        }
    }

    /// Judges what the lists would add by the guard's rule: much only if the snapshot says that a
    /// second source or the operator has agreed to it.
    fn check_growth(&self, lists: &[List]) -> Result<(), SnapshotError> {
        let active = self.active.borrow();
        for list in lists {
            let Some(current) = active.ranges().list(&list.source) else {
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

    fn pass_on(&self, active: Compiled) {
        self.active.send_if_modified(|current| {
            let changed = active.ranges() != current.ranges() || !active.judges_like(current);
            if changed {
                let (added, removed) = active.ranges().set().diff(current.ranges().set());
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
                *current = Arc::new(active);
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
    use crate::ranges::{Families, Feed, GuardLimits, RangeSet, SourceRanges};

    #[tokio::test(start_paused = true)]
    async fn a_follower_whose_directory_was_replaced_still_learns_of_changes() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        fs::create_dir(&state).unwrap();
        let path = state.join("ranges.json");
        let (_config, config) = watch::channel(Arc::new(config("")));
        let follower = Follower::new(path.clone(), config).unwrap();
        let mut active = follower.subscribe();
        let running = tokio::spawn(follower.run());

        fs::remove_dir(&state).unwrap();
        fs::create_dir(&state).unwrap();
        save(&path, &fetched(), &GuardLimits::default()).unwrap();
        active.changed().await.unwrap();

        assert_eq!(*active.borrow_and_update().ranges(), fetched());
        drop(active);
        running.await.unwrap();
    }

    #[tokio::test]
    async fn a_follower_takes_over_a_good_change_and_keeps_its_ranges_on_a_bad_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ranges.json");
        let (_config, config) = watch::channel(Arc::new(config("")));
        let follower = Follower::new(path.clone(), config.clone()).unwrap();
        let mut active = follower.subscribe();
        let running = tokio::spawn(follower.run());
        let before = baseline(&config.borrow().live.ranges).unwrap();
        assert_eq!(*active.borrow_and_update().ranges(), before);

        fs::write(&path, "{").unwrap();
        save(&path, &fetched(), &GuardLimits::default()).unwrap();
        active.changed().await.unwrap();

        assert_eq!(*active.borrow_and_update().ranges(), fetched());
        drop(active);
        running.await.unwrap();
    }

    #[tokio::test]
    async fn a_snapshot_that_adds_much_is_taken_only_if_that_was_agreed_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ranges.json");
        let limits = GuardLimits::default();
        save(&path, &fetched(), &limits).unwrap();
        let (_config, config) = watch::channel(Arc::new(config("")));
        let follower = Follower::new(path.clone(), config).unwrap();
        let (mut active, mut refused) = (follower.subscribe(), follower.refused());
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
        refused.changed().await.unwrap();
        let text = refused.borrow_and_update().clone().unwrap();
        assert!(text.contains("would add"), "{text}");
        assert_eq!(*active.borrow_and_update().ranges(), before);

        let approved = SourceRanges::new(grown).grown_from(Some(list.known.set().clone()));
        save(&path, &with(approved), &limits).unwrap();
        active.changed().await.unwrap();
        assert!(
            active
                .borrow_and_update()
                .ranges()
                .set()
                .contains("8.1.2.3".parse().unwrap())
        );
        drop(active);
        running.await.unwrap();
    }

    #[tokio::test]
    async fn other_ranges_in_the_configuration_count_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let (sender, receiver) = watch::channel(Arc::new(config("")));
        let path = directory.path().join("ranges.json");
        let follower = Follower::new(path, receiver).unwrap();
        let mut active = follower.subscribe();
        let running = tokio::spawn(follower.run());

        sender.send_replace(Arc::new(config("static = [\"64.0.0.0/24\"]")));
        active.changed().await.unwrap();

        assert_eq!(active.borrow_and_update().ranges().set().len(), 15 + 7 + 1);
        drop(active);
        running.await.unwrap();
    }
}
