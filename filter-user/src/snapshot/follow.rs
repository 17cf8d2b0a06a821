//! Following the snapshot: every change is judged anew, and published if it is good.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecursiveMode, Watcher as _};
use tokio::sync::{mpsc, watch};
use tracing::{debug, error, info};

use super::{InForce, SnapshotError, read};
use crate::ranges::Limits;
use crate::report::chain;

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
        let name = path.file_name().map(ToOwned::to_owned);
        let mut watcher =
            notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                // Reading the file is an event too; only what may have changed it counts.
                let concerns = match &event {
                    Ok(event) => {
                        let mut names = event.paths.iter().map(|path| path.file_name());
                        !event.kind.is_access() && names.any(|found| found == name.as_deref())
                    }
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
            tokio::select! {
                event = self.events.recv() => if event.is_none() {
                    return;
                },
                // A watch dies with its directory, and nobody says so.
                () = tokio::time::sleep(POLL) => {}
                () = self.in_force.closed() => return,
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
                if !added.is_empty() || !removed.is_empty() {
                    info!(?added, ?removed, "ranges taken over from the snapshot");
                } else {
                    debug!("ranges confirmed by the snapshot");
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
    use super::super::tests::fetched;
    use super::*;
    use crate::snapshot::Origin;

    #[tokio::test(start_paused = true)]
    async fn a_follower_whose_directory_was_replaced_still_learns_of_changes() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        fs::create_dir(&state).unwrap();
        let path = state.join("ranges.json");
        let follower = Follower::new(path.clone(), Limits::default()).unwrap();
        let mut in_force = follower.subscribe();
        let running = tokio::spawn(follower.run());

        fs::remove_dir(&state).unwrap();
        fs::create_dir(&state).unwrap();
        save(&path, &fetched()).unwrap();
        in_force.changed().await.unwrap();

        assert_eq!(**in_force.borrow_and_update(), fetched());
        drop(in_force);
        running.await.unwrap();
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
}
