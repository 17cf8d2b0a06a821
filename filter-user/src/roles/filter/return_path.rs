//! The way back for connections that the gate opens in its clients' names: put where it should be, and put
//! back if another process removes it.

use std::io;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::host::netlink::{ReturnPath, remove_return_paths};
use crate::observe::Finding;

/// Keeps rules and routes of the kernel as they are configured.
pub(super) struct ReturnPathKeeper {
    wanted: Option<ReturnPath>,
    /// Whether there was none before.
    is_new: bool,
    /// When another process was last seen to have removed a part.
    removed: Option<Instant>,
    /// Why it cannot be put back.
    failure: Option<String>,
}

impl ReturnPathKeeper {
    /// Adds what is wanted, and removes what is left of other settings.
    pub(super) fn start(wanted: Option<ReturnPath>) -> io::Result<Self> {
        let were_some = remove_return_paths(wanted)?;
        let is_changed = wanted.map_or(Ok(false), ReturnPath::restore)?;
        if let (Some(path), true) = (wanted, is_changed) {
            let ReturnPath { table, priority } = path;
            info!(
                id = "return-path-added",
                table, priority, "what the web server answers to clients is led to the gate"
            );
        }
        Ok(Self {
            wanted,
            is_new: is_changed && !were_some,
            removed: None,
            failure: None,
        })
    }

    /// Applies other settings.
    pub(super) fn change(&mut self, wanted: Option<ReturnPath>) {
        self.wanted = wanted;
        match Self::start(wanted) {
            Ok(changed) => *self = changed,
            Err(error) => self.fail(&error),
        }
    }

    fn fail(&mut self, error: &io::Error) {
        let text = error.to_string();
        if self.failure.as_ref() != Some(&text) {
            error!(
                id = "return-path-missing",
                %error,
                "the rules or routes of `client_address` cannot be added or removed"
            );
        }
        self.failure = Some(text);
    }

    /// Puts back what another process has removed.
    pub(super) fn look(&mut self) {
        let restored = self.wanted.map_or(Ok(false), ReturnPath::restore);
        match restored {
            Ok(false) => {
                self.failure = None;
                self.removed.take_if(|at| at.elapsed() > REMEMBERED);
            }
            Ok(true) => {
                error!(
                    id = "return-path-removed",
                    "another process removed the rules or routes of `client_address`: added again"
                );
                self.failure = None;
                self.removed = Some(Instant::now());
            }
            Err(error) => self.fail(&error),
        }
    }

    /// What is not right about it.
    pub(super) fn finding(&self) -> Option<Finding> {
        if let Some(error) = &self.failure {
            let text = format!(
                "the rules or routes of `client_address = \"transparent\"` cannot be added ({error}): the \
                 gate does not reach the web server"
            );
            return Some(Finding::error("return-path-missing", text));
        }
        let at = self.removed?;
        let text = format!(
            "another process removed the rules or routes of `client_address = \"transparent\"`; they were \
             added again {} s ago",
            at.elapsed().as_secs()
        );
        let remedy = "let whatever manages routes here keep those with `proto 171`";
        Some(Finding::warning("return-path-removed", text).remedy(remedy))
    }

    /// Removes what was not there before.
    pub(super) fn revert(&self) {
        if self.is_new
            && let Err(error) = remove_return_paths(None)
        {
            warn!(id = "return-path-left", %error, "rules and routes of `client_address` are left behind");
        }
    }
}

/// How long it is remembered that another process has meddled.
const REMEMBERED: Duration = Duration::from_secs(3600);
