//! The signals that mean something to us: two to stop, one to reload. No other carries an instruction.

use std::io;

use nix::errno::Errno;
use nix::sys::signal::{SIGALRM, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SigSet};
use tokio::signal::unix::{SignalKind, signal};

/// The signals, blocked: one that comes before there is a handler is queued, and does not kill.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocked(SigSet);

impl Blocked {
    /// Blocks them, for all threads to come.
    pub(super) fn block() -> Result<Self, Errno> {
        let signals = SigSet::from_iter([SIGTERM, SIGINT, SIGHUP]);
        signals.thread_block()?;
        // What another program means by these must not end a filter on trial: blocked for good, they
        // are never delivered.
        SigSet::from_iter([SIGUSR1, SIGUSR2, SIGALRM]).thread_block()?;
        Ok(Self(signals))
    }

    /// Handles them from now on, in a runtime.
    pub(super) fn handle(self) -> io::Result<Signals> {
        let signals = Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        };
        self.0.thread_unblock()?;
        Ok(signals)
    }
}

/// The signals, handled.
pub(super) struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
}

/// What a signal says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum ProcessSignal {
    /// SIGTERM or SIGINT.
    Stop,
    /// SIGHUP.
    Reload,
}

impl Signals {
    /// The next one.
    pub(super) async fn next(&mut self) -> ProcessSignal {
        tokio::select! {
            _ = self.terminate.recv() => ProcessSignal::Stop,
            _ = self.interrupt.recv() => ProcessSignal::Stop,
            _ = self.hang_up.recv() => ProcessSignal::Reload,
        }
    }
}
