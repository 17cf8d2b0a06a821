//! How gate and web server are paired: the gate has the port and the web server one on loopback, or
//! the web server keeps the port and the kernel steers connections to the gate.
//!
//! Every scenario of the gate is played in both: `cargo xtask test` runs them a second time with
//! `PULLGATE_PAIRING=steered`.

use crate::net::INTERFACE;

/// A pairing of gate and web server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Pairing {
    /// The gate listens on 443, the web server on loopback behind a PROXY header.
    Relayed,
    /// The web server listens on 443; connections from outside are steered to the gate.
    Steered,
}

impl Pairing {
    /// The one that this run of the tests is about.
    #[must_use]
    pub fn of_this_run() -> Self {
        match std::env::var("PULLGATE_PAIRING").as_deref() {
            Ok("steered") => Self::Steered,
            Ok(other) => panic!("PULLGATE_PAIRING={other}: not a pairing"),
            Err(_) => Self::Relayed,
        }
    }

    /// Whether the kernel steers.
    #[must_use]
    pub fn steers(self) -> bool {
        self == Self::Steered
    }

    /// The line for `[gate]`.
    #[must_use]
    pub(crate) fn gate_line(self) -> &'static str {
        match self {
            Self::Relayed => "",
            Self::Steered => "steer = true\n",
        }
    }

    /// The section of a filter that steers and drops nothing, so that the gate judges everyone.
    #[must_use]
    pub(crate) fn filter_that_only_steers(self) -> String {
        match self {
            Self::Relayed => String::new(),
            Self::Steered => format!(
                "[filter]\ninterfaces = [\"{INTERFACE}\"]\ninterface_timeout = \"100ms\"\n\
                 mode = \"monitor\"\n"
            ),
        }
    }
}
