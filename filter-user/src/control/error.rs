//! Why a running role cannot be asked, or does not do what it is asked for, and the exit code for it.

use std::io;
use std::path::PathBuf;

use crate::report::{EX_CONFIG, EX_NOPERM, EX_SOFTWARE, EX_TEMPFAIL, EX_USAGE};
use crate::role::Role;

/// Why a running role cannot be asked, or does not do what it is asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// A status socket cannot be used.
    #[error("the status socket {} cannot be used", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file that says what is approved cannot be written.
    #[error("{} cannot be written", path.display())]
    Approval {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The filter was on trial, and its time was over before it was confirmed.
    #[error("not confirmed in time, so what was in force before is so again")]
    NotConfirmed,
    /// A status socket may not be opened by this user.
    #[error(
        "status socket {} is another user's; run as root, or as the user of that role",
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
    #[error("the list of `{name}` is approved, but still held: {error}")]
    StillHeld {
        /// The name of the source.
        name: String,
        /// Why, in the words of the ranges role.
        error: String,
    },
    /// The role that fetches ranges cannot be asked.
    #[error("the ranges role does not answer; does it run? `pullgate run --only ranges` starts it")]
    NoRangesRole {
        /// Why not.
        source: io::Error,
    },
    /// A refresh, or an approval, does not come to an end.
    #[error("the ranges role was told, but is not done; `pullgate status` shows what it says")]
    RefreshGoesOn,
    /// A reload does not come to an end.
    #[error("the {} was told, but is not done; `pullgate status` shows what it says", role.label())]
    ReloadGoesOn {
        /// Who was told.
        role: Role,
    },
    /// A reload was refused.
    #[error("the {} goes on as before: {error}", role.label())]
    NotReloaded {
        /// Who refused.
        role: Role,
        /// Why.
        error: String,
    },
}

impl ControlError {
    /// The exit code that a script can tell apart: sysexits.h.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotReloaded { .. } | Self::Approval { .. } => EX_CONFIG,
            Self::SocketForbidden { .. } => EX_NOPERM,
            Self::NotConfirmed | Self::RefreshGoesOn | Self::ReloadGoesOn { .. } => EX_TEMPFAIL,
            Self::NothingHeld | Self::OtherHeld { .. } | Self::NothingOnTrial => EX_USAGE,
            Self::Socket { .. }
            | Self::NoRangesRole { .. }
            | Self::StillHeld { .. }
            | Self::TrialGoesOn => EX_SOFTWARE,
        }
    }
}
