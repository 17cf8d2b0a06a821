//! Where logs go and how they look there, and the budget that keeps strangers from filling the disk.

use std::io::{self, Write};
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use super::journal::Journal;
use crate::sync::lock;

/// How logs are written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
    /// For systemd's journal, with a field of its own for each of an event's.
    Journald,
}

impl LogFormat {
    /// The word on the command line.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
            Self::Journald => "journald",
        }
    }
}

/// Starts logging: `PULLGATE_LOG` sets the level.
pub fn start(format: Option<LogFormat>) {
    let wanted = std::env::var("PULLGATE_LOG").unwrap_or_default();
    let wanted = match wanted.trim() {
        "" => "info".to_owned(),
        _ => wanted,
    };
    let (filter, refused) = match EnvFilter::try_new(&wanted) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let builder = tracing_subscriber::fmt()
        .with_target(false)
        .log_internal_errors(false)
        .with_writer(|| Undisturbed(io::stderr()));
    match format.unwrap_or_else(log_format) {
        LogFormat::Text => builder.with_env_filter(filter).with_ansi(false).init(),
        LogFormat::Json => {
            let json = builder.with_env_filter(filter).json();
            json.flatten_event(true).init();
        }
        LogFormat::Journald => match Journal::open() {
            Ok(journal) => tracing_subscriber::registry()
                .with(filter)
                .with(journal)
                .init(),
            Err(error) => {
                builder.with_env_filter(filter).with_ansi(false).init();
                tracing::warn!(id = "journal-missing", %error, "the journal is not there, so this is text");
            }
        },
    }
    if let Some(error) = refused {
        tracing::warn!(
            id = "log-level-invalid",
            %error,
            wanted,
            "PULLGATE_LOG is not understood, so the level is `info`"
        );
    }
}

/// What standard error leads to: systemd.exec(5), `$JOURNAL_STREAM`.
fn log_format() -> LogFormat {
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let is_journal = rustix::fs::fstat(io::stderr())
        .is_ok_and(|stderr| stream == format!("{}:{}", stderr.st_dev, stderr.st_ino));
    if is_journal {
        LogFormat::Journald
    } else {
        LogFormat::Text
    }
}

/// A log without a reader, because the terminal is gone, must not end the process.
struct Undisturbed(io::Stderr);

impl Write for Undisturbed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        drop(self.0.write_all(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        drop(self.0.flush());
        Ok(())
    }
}

/// A budget of log lines per second; what exceeds it is counted and reported with the next line.
#[derive(Debug)]
pub struct Budget {
    per_second: u32,
    state: Mutex<BudgetState>,
}

#[derive(Debug)]
struct BudgetState {
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
            state: Mutex::new(BudgetState {
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

    /// Notes a line that is not worth its room for another reason, to be reported with the next.
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
