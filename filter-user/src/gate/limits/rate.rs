//! How often: a rate for each of any number of keys, in constant memory.
//!
//! A generic cell rate algorithm per cell, and a sketch of cells instead of a map: each key has one
//! cell in each of two rows, which it may share with others. A key is within its rate if any of its
//! cells is, so it is wronged only if others crowd both; which those are cannot be known from outside.

use std::hash::{BuildHasher as _, Hash, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::time::Instant;

/// Rates by key.
pub(in crate::gate) struct RateLimiter {
    begun: Instant,
    rows: [Row; 2],
}

struct Row {
    hasher: RandomState,
    /// When each cell will be empty again, nanoseconds since the beginning.
    cells: Box<[AtomicU64]>,
}

impl Row {
    fn new() -> Self {
        Self {
            hasher: RandomState::new(),
            cells: (0..CELLS).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn cell(&self, key: &impl Hash) -> &AtomicU64 {
        let hash = self.hasher.hash_one(key);
        // In bounds by the remainder; what does not fit a usize does not matter to it.
        let index = usize::try_from(hash % CELLS as u64).unwrap_or(0);
        &self.cells[index]
    }
}

impl RateLimiter {
    /// No client has come yet.
    pub(in crate::gate) fn new() -> Self {
        Self {
            begun: Instant::now(),
            rows: [Row::new(), Row::new()],
        }
    }

    /// Counts one more for the key, unless that is more than `burst` at once or than one per
    /// `interval` (nanoseconds) in the long run.
    pub(in crate::gate) fn admits(&self, key: &impl Hash, interval: u64, burst: u64) -> bool {
        let now = u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let full = now.saturating_add(interval.saturating_mul(burst));
        let cells = self.rows.each_ref().map(|row| row.cell(key));
        let has_room = |cell: &&AtomicU64| {
            let empty_at = cell.load(Ordering::Relaxed).max(now);
            empty_at.saturating_add(interval) <= full
        };
        if !cells.iter().any(has_room) {
            return false;
        }
        for cell in cells {
            let fill = |empty_at: u64| {
                let filled = empty_at.max(now).saturating_add(interval);
                Some(filled.min(full))
            };
            // Always `Some`, so it cannot fail.
            match cell.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fill) {
                Ok(_) | Err(_) => {}
            }
        }
        true
    }
}

/// Cells per row: 64 KiB.
const CELLS: usize = 8192;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_passes_and_then_the_rate_holds() {
        let rate = RateLimiter::new();
        let admits = || rate.admits(&"a", 1_000_000_000, 3);

        assert_eq!([(); 4].map(|()| admits()), [true, true, true, false]);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!([(); 2].map(|()| admits()), [true, false]);
        tokio::time::advance(Duration::from_secs(100)).await;
        assert_eq!([(); 4].map(|()| admits()), [true, true, true, false]);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_floods_does_not_take_from_the_others() {
        let rate = RateLimiter::new();
        for _ in 0..1000 {
            rate.admits(&0, 1_000_000_000, 3);
        }

        let wronged = (1..1000).filter(|key| !rate.admits(key, 1_000_000_000, 3));

        assert_eq!(wronged.count(), 0);
    }
}
