//! The word that live connections are to end, which each of them looks at whenever it is woken: so
//! looking must cost next to nothing.

use std::sync::atomic::{AtomicU8, Ordering};

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// What was said; it only ever becomes more.
#[derive(Debug, Default)]
pub(super) struct Ending {
    said: AtomicU8,
    changed: Notify,
}

/// What live connections are to do.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Word {
    /// Go on.
    GoOn,
    /// End as soon as no answer is being waited for.
    Drain,
    /// End at once, because the gate stops.
    Stop,
    /// End at once, because the host's trust has changed.
    TrustChanged,
}

impl Ending {
    /// Says it to all who listen, and to all who will.
    pub(super) fn say(&self, word: Word) {
        self.said.fetch_max(word as u8, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// What was said so far.
    pub(super) fn word(&self) -> Word {
        match self.said.load(Ordering::Acquire) {
            0 => Word::GoOn,
            1 => Word::Drain,
            2 => Word::Stop,
            _ => Word::TrustChanged,
        }
    }

    /// Ready when more is said after the first poll; who has polled once may look at
    /// [`Self::word`] instead when it is woken for another reason.
    pub(super) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }
}
