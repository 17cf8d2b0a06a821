//! The parts of pullgate that can run as processes of their own.

use serde::{Deserialize, Serialize};

/// A part of pullgate that can run as a process of its own.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Drops strangers' packets in the kernel.
    Filter,
    /// Keeps the ranges fresh.
    Ranges,
    /// Demands the client certificate.
    Gate,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 3] = [Self::Filter, Self::Ranges, Self::Gate];

    /// The word in sockets, status and logs.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Ranges => "ranges",
            Self::Gate => "gate",
        }
    }

    /// The user that the package makes for the role.
    #[must_use]
    pub fn account(self) -> &'static str {
        match self {
            Self::Filter => "pullgate-filter",
            Self::Ranges => "pullgate-ranges",
            Self::Gate => "pullgate-gate",
        }
    }
}
