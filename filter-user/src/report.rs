//! How errors reach the operator: as one line, and as an exit code.

use std::error::Error;

/// An error and its sources in one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// The command line is wrong; the numbers are those of sysexits.h.
pub const EX_USAGE: u8 = 64;
/// Something failed that should not.
pub const EX_SOFTWARE: u8 = 70;
/// Nobody confirmed in time.
pub const EX_TEMPFAIL: u8 = 75;
/// A capability or permission is missing.
pub const EX_NOPERM: u8 = 77;
/// The configuration, or a file that it names, cannot be used.
pub const EX_CONFIG: u8 = 78;

/// A span of time as people say it: two of a unit at least.
#[must_use]
pub fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}
