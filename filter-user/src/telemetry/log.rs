//! Logging set-up, and the budget that keeps strangers from filling the disk.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use crate::sync::lock;

/// A budget of log lines per second; what exceeds it is counted and told with the next line.
#[derive(Debug)]
pub struct Budget {
    per_second: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    second: Instant,
    spent: u32,
    suppressed: u64,
}

impl Budget {
    /// A budget of `per_second` lines.
    #[must_use]
    pub fn new(per_second: u32) -> Self {
        Self {
            per_second,
            state: Mutex::new(State {
                second: Instant::now(),
                spent: 0,
                suppressed: 0,
            }),
        }
    }

    /// Asks for one line: `Some` with the number of lines suppressed before, `None` if over budget.
    pub fn take(&self) -> Option<u64> {
        let mut state = lock(&self.state);
        if state.second.elapsed() >= Duration::from_secs(1) {
            state.second = Instant::now();
            state.spent = 0;
        }
        if state.spent == self.per_second {
            state.suppressed += 1;
            return None;
        }
        state.spent += 1;
        Some(std::mem::take(&mut state.suppressed))
    }

    /// Notes a line that is not worth its room for another reason, to be told with the next.
    pub fn skip(&self) {
        lock(&self.state).suppressed += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn lines_over_budget_are_counted_and_told_later() {
        let budget = Budget::new(2);

        assert_eq!(budget.take(), Some(0));
        assert_eq!(budget.take(), Some(0));
        assert_eq!(budget.take(), None);
        tokio::time::advance(Duration::from_secs(1)).await;

        assert_eq!(budget.take(), Some(1));
        assert_eq!(budget.take(), Some(0));
    }
}
