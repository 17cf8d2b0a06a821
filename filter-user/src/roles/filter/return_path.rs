//! The way back for connections that the gate opens in its clients' names: put where it should be, and put
//! back if another process removes it.

use std::collections::BTreeSet;
use std::time::Duration;
use std::{io, iter};

use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::host::netlink::{ReturnPath, return_paths};
use crate::observe::Finding;

/// Keeps rules and routes of the kernel as they are configured.
pub(super) struct ReturnPathKeeper {
    wanted: Option<ReturnPath>,
    /// What was there before.
    before: BTreeSet<ReturnPath>,
    /// When another process was last seen to have removed a part.
    removed: Option<Instant>,
    /// Why it cannot be put back.
    failure: Option<String>,
}

impl ReturnPathKeeper {
    /// Adds what is wanted. What is left of other settings stays until [`Self::settle`].
    pub(super) fn start(wanted: Option<ReturnPath>) -> io::Result<Self> {
        let before = return_paths()?;
        if let Some(path) = wanted
            && path.restore()?
        {
            let ReturnPath { table, priority } = path;
            info!(
                id = "return-path-added",
                table, priority, "what the web server answers to clients is led to the gate"
            );
        }
        Ok(Self {
            wanted,
            before,
            removed: None,
            failure: None,
        })
    }

    /// Removes what is left of other settings: from here on there is no way back to them.
    pub(super) fn settle(&mut self) {
        let before = std::mem::take(&mut self.before);
        let others = before.into_iter().filter(|path| Some(*path) != self.wanted);
        let removed = others.map(ReturnPath::remove).fold(Ok(()), Result::and);
        // A table that they had as well is put right.
        let restored = self.wanted.map_or(Ok(false), ReturnPath::restore);
        for error in [removed.err(), restored.err()].into_iter().flatten() {
            self.fail(&error);
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

    /// What was there before is there again, and nothing else.
    pub(super) fn revert(&self) {
        let added = self.wanted.filter(|path| !self.before.contains(path));
        let removed = added.map_or(Ok(()), ReturnPath::remove);
        // A table that they had as well is put right.
        let restored = self.before.iter().map(|path| path.restore());
        for error in iter::once(removed.err())
            .chain(restored.map(Result::err))
            .flatten()
        {
            warn!(
                id = "return-path-left", %error,
                "the rules and routes of `client_address` are not as they were before"
            );
        }
    }
}

/// How long it is remembered that another process has meddled.
const REMEMBERED: Duration = Duration::from_secs(3600);
