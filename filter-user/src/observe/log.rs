//! Where logs go and how they look there, and the budget that keeps strangers from filling the disk.

use std::io::{self, Write};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tracing::info;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

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

/// How much is logged.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What `PULLGATE_LOG` said at the start.
    Default,
    /// Errors alone.
    Error,
    /// Warnings too.
    Warn,
    /// What has happened.
    Info,
    /// Each step of each connection; of the libraries, what has happened.
    Debug,
}

impl LogLevel {
    /// The word on the command line.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
        }
    }

    /// The directives of [`EnvFilter`]: a library that speaks of each packet helps no operator.
    fn directives(self, at_start: &str) -> &str {
        match self {
            Self::Default => at_start,
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "info,pullgate=debug",
        }
    }
}

/// The level of this process, which has one log.
struct Level {
    at_start: String,
    filter: reload::Handle<EnvFilter, Registry>,
}

static LEVEL: OnceLock<Level> = OnceLock::new();

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
    let at_start = filter.to_string();
    let (filter, handle) = reload::Layer::new(filter);
    let registry = tracing_subscriber::registry().with(filter);
    let lines = fmt::layer()
        .with_target(false)
        .log_internal_errors(false)
        .with_ansi(false)
        .with_writer(|| Undisturbed(io::stderr()));
    match format.unwrap_or_else(log_format) {
        LogFormat::Text => registry.with(lines).init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).init(),
        LogFormat::Journald => match Journal::open() {
            Ok(journal) => registry.with(journal).init(),
            Err(error) => {
                registry.with(lines).init();
                tracing::warn!(id = "journal-missing", %error, "the journal is not there, so this is text");
            }
        },
    }
    let level = Level {
        at_start,
        filter: handle,
    };
    // A subscriber is set once, and `init` panics before this could be.
    drop(LEVEL.set(level));
    if let Some(error) = refused {
        tracing::warn!(
            id = "log-level-invalid",
            %error,
            wanted,
            "PULLGATE_LOG is not understood, so the level is `info`"
        );
    }
}

/// Changes the level of this process until it ends.
///
/// # Errors
///
/// Returns that a thread has panicked while it logged.
pub fn set_level(level: LogLevel) -> Result<(), reload::Error> {
    let Some(current) = LEVEL.get() else {
        return Ok(());
    };
    let directives = level.directives(&current.at_start);
    // By the level that lets it through, before or after.
    let is_logged = tracing::enabled!(tracing::Level::INFO);
    let announce = || {
        info!(
            id = "log-level-changed",
            level = directives,
            "the level of the log changes"
        )
    };
    if is_logged {
        announce();
    }
    current.filter.reload(EnvFilter::new(directives))?;
    if !is_logged {
        announce();
    }
    Ok(())
}

/// The directives of the level, if it is not that of the start.
#[must_use]
pub fn changed_level() -> Option<String> {
    let level = LEVEL.get()?;
    let directives = level.filter.with_current(ToString::to_string).ok()?;
    (directives != level.at_start).then_some(directives)
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
