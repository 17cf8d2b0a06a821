//! How a program is attached, and for how long: words that loading, pinning and attaching share.

use crate::config::{self, Attach, Coexist};

/// a mode of the attach ladder, highest first.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AttachMode {
    /// XDP in the driver, before an skb exists.
    Native,
    /// XDP in the stack, after the skb was allocated: same verdicts, many times the cost.
    Generic,
    /// A classifier at TCX ingress, behind whatever holds the XDP hook.
    Tcx,
}

impl AttachMode {
    /// Every mode, highest first.
    pub const ALL: [Self; 3] = [Self::Native, Self::Generic, Self::Tcx];

    /// The word in metrics, status and pin names.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Tcx => "tcx",
        }
    }

    /// The word in sentences.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native XDP",
            Self::Generic => "generic XDP",
            Self::Tcx => "TCX",
        }
    }

    pub(super) fn is_allowed(self, settings: &config::FilterSettings) -> bool {
        match self {
            Self::Native => settings.attach != Attach::Generic,
            Self::Generic => settings.attach != Attach::Native,
            Self::Tcx => settings.coexist == Coexist::Tcx,
        }
    }
}

/// Whether an attachment shall outlive this process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Lifetime {
    /// Until `pullgate unload`.
    Pinned,
    /// Until it is confirmed, or this process ends.
    OnTrial,
}
