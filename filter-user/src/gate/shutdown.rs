//! Orders to all live connections: that they are to end, and that time has passed. Each
//! looks at it whenever it is woken, so looking must cost next to nothing; and there may be many of
//! them, so none has a clock of its own.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// What was said; the word only ever becomes more.
#[derive(Debug, Default)]
pub(super) struct Signal {
    said: AtomicU8,
    ticks: AtomicU32,
    changed: Notify,
}

/// What live connections are to do.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Order {
    /// Go on.
    GoOn,
    /// End as soon as no answer is being waited for.
    Drain,
    /// End at once, because the gate stops.
    Stop,
    /// End at once, because the host's trust has changed.
    TrustChanged,
}

impl Signal {
    /// Says it to all who listen, and to all who will.
    pub(super) fn send(&self, word: Order) {
        self.said.fetch_max(word as u8, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// What was said so far.
    pub(super) fn word(&self) -> Order {
        match self.said.load(Ordering::Acquire) {
            0 => Order::GoOn,
            1 => Order::Drain,
            2 => Order::Stop,
            _ => Order::TrustChanged,
        }
    }

    /// Says that time has passed.
    pub(super) fn tick(&self) {
        self.count_tick();
        self.wake();
    }

    /// The first half of a tick.
    pub(super) fn count_tick(&self) {
        self.ticks.fetch_add(1, Ordering::Release);
    }

    /// The second half of a tick.
    pub(super) fn wake(&self) {
        self.changed.notify_waiters();
    }

    /// How often time has passed so far; it wraps around.
    pub(super) fn ticks(&self) -> u32 {
        self.ticks.load(Ordering::Acquire)
    }

    /// Ready when more is said after the first poll.
    pub(super) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }
}
