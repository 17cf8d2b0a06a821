//! Why a running role cannot be asked, or does not do what it is asked for, and the exit code for it.

use std::io;
use std::path::PathBuf;

use crate::report::{EX_NOPERM, EX_SOFTWARE, EX_TEMPFAIL, EX_USAGE, ExitStatus};
use crate::role::Role;

/// Why a running role cannot be asked, or does not do what it is asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// A status socket cannot be used.
    #[error("the socket {} cannot be used; does the role run?", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The filter was on trial, and is not confirmed: most often its time was over.
    #[error("the filter is not confirmed ({error}); `pullgate status` shows what is active")]
    NotConfirmed {
        /// Why not.
        error: String,
    },
    /// A status socket may not be opened by this user.
    #[error(
        "socket {} is another user's; run as root, or as the user of that role",
        path.display()
    )]
    SocketForbidden {
        /// The socket.
        path: PathBuf,
    },
    /// The role on trial does not end.
    #[error(
        "the role that has a filter on trial does not end; `kill -9` it: its filter goes with it"
    )]
    TrialGoesOn,
    /// There is nothing to confirm.
    #[error("no filter is on trial; `pullgate run --confirm 60s` puts one on trial")]
    NothingOnTrial,
    /// There is nothing to approve.
    #[error("no list is held, so there is nothing to approve")]
    NothingHeld,
    /// Another list is held than the operator has named.
    #[error("what is held is {ids}; look at it with `pullgate ranges approve --dry-run`")]
    OtherHeld {
        /// The lists that are held.
        ids: String,
    },
    /// What was approved cannot be taken in.
    #[error("approved, but still held: {error}")]
    StillHeld {
        /// Why, in the words of the ranges role.
        error: String,
    },
    /// The role that fetches ranges cannot be asked.
    #[error("the ranges role does not answer; does it run? `pullgate run --only ranges` starts it")]
    NoRangesRole {
        /// Why not.
        source: io::Error,
    },
    /// What a role was instructed to do does not come to an end.
    #[error("timed out waiting for the {} role; `pullgate status` shows what it does", role.label())]
    NotDone {
        /// The role.
        role: Role,
    },
    /// A role was started with another configuration than the one that is named.
    #[error(
        "the {} reads {reads} and not {}; name that one: `--config {reads}`", role.label(), named.display()
    )]
    OtherFile {
        /// The role.
        role: Role,
        /// The file that it reads.
        reads: String,
        /// The file that is named.
        named: PathBuf,
    },
    /// A role logs as before.
    #[error("log level of the {}: {error}", role.label())]
    LevelKept {
        /// The role.
        role: Role,
        /// Why.
        error: String,
    },
    /// A reload was refused, as a whole or in parts.
    #[error("reload of the process that runs the {}: {error}", role.label())]
    NotReloaded {
        /// The role.
        role: Role,
        /// Why.
        error: String,
        /// The exit code for that.
        status: u8,
    },
}

impl ExitStatus for ControlError {
    fn exit_status(&self) -> u8 {
        match self {
            Self::NotReloaded { status, .. } => *status,
            Self::SocketForbidden { .. } => EX_NOPERM,
            Self::NotConfirmed { .. } | Self::NotDone { .. } => EX_TEMPFAIL,
            Self::NothingHeld
            | Self::OtherFile { .. }
            | Self::OtherHeld { .. }
            | Self::NothingOnTrial => EX_USAGE,
            Self::Socket { .. }
            | Self::LevelKept { .. }
            | Self::NoRangesRole { .. }
            | Self::StillHeld { .. }
            | Self::TrialGoesOn => EX_SOFTWARE,
        }
    }
}
