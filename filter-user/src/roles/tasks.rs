//! Long-lived tasks: they end together, and none ends unnoticed.

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The tasks of this process that live as long as it does.
#[derive(Clone, Default)]
pub(super) struct Tasks {
    tracker: TaskTracker,
    stop: CancellationToken,
    failed: CancellationToken,
}

impl Tasks {
    /// Spawns a task that lives until [`Self::stop`], when it is dropped wherever it is.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.spawn_until(async move {
            tokio::select! {
                () = task => {}
                () = stop.cancelled() => {}
            }
        });
    }

    /// Spawns a task that itself ends soon after [`Self::stop`].
    pub(super) fn spawn_until(&self, task: impl Future<Output = ()> + Send + 'static) {
        let alarm = Alarm {
            stop: self.stop.clone(),
            failed: self.failed.clone(),
        };
        self.tracker.spawn(async move {
            // Dropped with the task however it ends: by returning, or by a panic.
            let _alarm = alarm;
            task.await;
        });
    }

    /// The token that [`Self::stop`] cancels.
    pub(super) fn stopped(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Returns when a task has ended that should not have.
    pub(super) async fn failed(&self) {
        self.failed.cancelled().await;
    }

    /// Asks every task to end.
    pub(super) fn stop(&self) {
        self.stop.cancel();
        self.tracker.close();
    }

    /// Waits for the end of all tasks.
    pub(super) async fn wait(&self) {
        self.tracker.wait().await;
    }
}

/// Goes off if it is dropped before the stop.
struct Alarm {
    stop: CancellationToken,
    failed: CancellationToken,
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if !self.stop.is_cancelled() {
            self.failed.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_noticed() {
        let tasks = Tasks::default();

        tasks.spawn(async { panic!("on purpose") });

        tasks.failed().await;
    }

    #[tokio::test]
    async fn tasks_that_end_with_the_stop_are_no_failure() {
        let tasks = Tasks::default();
        tasks.spawn(std::future::pending());

        tasks.stop();
        tasks.wait().await;

        assert!(!tasks.failed.is_cancelled());
    }
}
