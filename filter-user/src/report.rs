//! How errors reach the operator: as one line, and as an exit code.

use std::error::Error;

/// An error and its sources in one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// An error that ends a command with an exit code of its own: the numbers are those of sysexits.h.
pub trait ExitStatus: Error {
    /// The exit code.
    fn exit_status(&self) -> u8;
}

impl ExitStatus for std::io::Error {
    fn exit_status(&self) -> u8 {
        EX_SOFTWARE
    }
}

/// Why a command has failed, as the operator and the shell see it.
#[derive(Debug)]
pub struct Failure {
    /// The error and its sources in one line.
    pub text: String,
    /// The exit code.
    pub status: u8,
}

impl<E: ExitStatus> From<E> for Failure {
    fn from(error: E) -> Self {
        Self {
            text: chain(&error),
            status: error.exit_status(),
        }
    }
}

/// Every exit code with what it means, for the manual; the numbers are those of sysexits.h.
pub const EXIT_CODES: [(u8, &str); 7] = [
    (0, "all is well"),
    (
        EX_FAILURE,
        "`status`: the host is not protected, or a finding is an error; `check`: the package's gate cannot read a \
         file; `doctor`, `probe`: something is wrong, or not known; `ranges show`: a stranger; `ranges diff`, `ranges refresh`: a source failed",
    ),
    (
        EX_USAGE,
        "the command line is wrong, or there is nothing to `confirm`, `approve` or `reload`",
    ),
    (EX_SOFTWARE, "something failed that should not"),
    (
        EX_TEMPFAIL,
        "`run --confirm`: not confirmed, and what was before is active again; `confirm`: too late",
    ),
    (
        EX_NOPERM,
        "a capability or permission is missing; the message names it",
    ),
    (
        EX_CONFIG,
        "the configuration, or a file that it names, cannot be used; the message names file, line, field and \
         remedy",
    ),
];
/// The answer is no.
pub const EX_FAILURE: u8 = 1;
/// The command line is wrong.
pub const EX_USAGE: u8 = 64;
/// Something failed that should not.
pub const EX_SOFTWARE: u8 = 70;
/// A later attempt may succeed.
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
