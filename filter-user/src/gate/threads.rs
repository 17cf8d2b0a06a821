//! Spreading: each connection is served by the thread that has the fewest, whichever accepted it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::runtime::Handle;

/// The threads that serve connections; one that has begun stays where it is.
///
/// Who wakes first accepts all that wait in a socket, and would keep them: of 64 that came at once, one of two threads
/// had 63.
pub struct Threads(Vec<Thread>);

/// A thread; clones are the same one.
#[derive(Clone)]
pub struct Thread {
    runtime: Handle,
    connections: Arc<AtomicUsize>,
}

impl Threads {
    /// Threads that have these runtimes.
    pub fn new(runtimes: impl IntoIterator<Item = Handle>) -> Self {
        let threads = runtimes.into_iter().map(|runtime| Thread {
            runtime,
            connections: Arc::default(),
        });
        Self(threads.collect())
    }

    /// All of them, in the order of their runtimes.
    pub fn iter(&self) -> impl Iterator<Item = &Thread> {
        self.0.iter()
    }

    /// Assigns a connection to the thread with the fewest, and to `own` if none has fewer; and another one's runtime.
    pub(super) fn assign(&self, own: &Thread) -> (Assignment, Option<&Handle>) {
        let fewest = self.iter().min_by_key(|thread| thread.count());
        match fewest.filter(|thread| thread.count() < own.count()) {
            Some(other) => (other.assigned(), Some(&other.runtime)),
            None => (own.assigned(), None),
        }
    }
}

impl Thread {
    /// Where its tasks run.
    #[must_use]
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Until the end of what is returned, it is assigned connections; then none.
    #[must_use]
    pub fn working(&self) -> Working<'_> {
        Working(self)
    }

    fn count(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    fn assigned(&self) -> Assignment {
        self.connections.fetch_add(1, Ordering::Relaxed);
        Assignment(Arc::clone(&self.connections))
    }
}

/// A connection that its thread has, as long as this is held.
pub(super) struct Assignment(Arc<AtomicUsize>);

impl Drop for Assignment {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A thread that works: one that has ended has the fewest connections, and would lose those that it were given.
pub struct Working<'a>(&'a Thread);

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.connections.fetch_add(ENDED, Ordering::Relaxed);
    }
}

/// More connections than any thread has.
const ENDED: usize = usize::MAX / 2;

#[cfg(test)]
mod tests {
    use tokio::runtime::Builder;

    use super::*;

    #[test]
    fn a_connection_goes_where_the_fewest_are_and_stays_if_no_thread_has_fewer() {
        let runtimes = [(); 3].map(|()| Builder::new_current_thread().build().unwrap());
        let threads = Threads::new(runtimes.iter().map(|runtime| runtime.handle().clone()));
        let ids: Vec<_> = runtimes.iter().map(|it| it.handle().id()).collect();
        let served_by = |own: usize| {
            let (assignment, away) = threads.assign(&threads.0[own]);
            let number = away.map_or(own, |runtime| {
                ids.iter().position(|id| *id == runtime.id()).unwrap()
            });
            (assignment, number)
        };

        let (first, at_first) = served_by(1);
        let (_second, at_second) = served_by(1);
        let (_third, at_third) = served_by(1);
        let (_fourth, at_fourth) = served_by(2);
        drop(first);
        let (_fifth, at_fifth) = served_by(2);
        drop(threads.0[0].working());
        let (_sixth, at_sixth) = served_by(0);

        assert_eq!(
            [at_first, at_second, at_third, at_fourth, at_fifth, at_sixth],
            [1, 0, 2, 2, 1, 1]
        );
    }
}
