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
    /// Whether there is a way back to that.
    is_settled: bool,
    /// When another process was last seen to have removed a part.
    removed: Option<Instant>,
    /// What cannot be done.
    failure: Option<Finding>,
}

impl ReturnPathKeeper {
    /// Adds what is wanted. What is left of other settings stays until [`Self::settle`].
    pub(super) fn start(wanted: Option<ReturnPath>) -> io::Result<Self> {
        let keeper = Self {
            wanted,
            before: return_paths()?,
            is_settled: false,
            removed: None,
            failure: None,
        };
        if let Some(path) = wanted
            && path.restore().inspect_err(|_| keeper.revert())?
        {
            let ReturnPath { table, priority } = path;
            info!(
                id = "return-path-added",
                table, priority, "what the web server answers to clients is led to the gate"
            );
        }
        Ok(keeper)
    }

    /// Removes what is left of other settings: from here on there is no way back to them.
    pub(super) fn settle(&mut self) {
        self.is_settled = true;
        self.look();
    }

    /// Puts back what another process has removed, and removes what could not be before.
    pub(super) fn look(&mut self) {
        let leftover = self.remove_others();
        match self.wanted.map_or(Ok(false), ReturnPath::restore) {
            Ok(false) => {
                self.removed.take_if(|at| at.elapsed() > REMEMBERED);
                self.note(leftover.err().map(|error| leftover_finding(&error)));
            }
            // A table that both had goes with the others.
            Ok(true) if leftover.is_ok_and(|removed| removed) => self.note(None),
            Ok(true) => {
                error!(
                    id = "return-path-removed",
                    "another process removed the rules or routes of `client_address`: added again"
                );
                self.removed = Some(Instant::now());
                self.note(None);
            }
            Err(error) => self.note(Some(missing_finding(&error))),
        }
    }

    /// Returns whether there were any.
    fn remove_others(&mut self) -> io::Result<bool> {
        if !self.is_settled || self.before.is_empty() {
            return Ok(false);
        }
        let others = self.before.iter().copied();
        let others: Vec<_> = others.filter(|path| Some(*path) != self.wanted).collect();
        others.iter().try_for_each(|path| path.remove())?;
        self.before.clear();
        Ok(!others.is_empty())
    }

    fn note(&mut self, failure: Option<Finding>) {
        if self.failure != failure
            && let Some(failure) = &failure
        {
            failure.log();
        }
        self.failure = failure;
    }

    /// What is not right about it.
    pub(super) fn finding(&self) -> Option<Finding> {
        if self.failure.is_some() {
            return self.failure.clone();
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

    /// Takes away what was put back while `unload` removed it.
    pub(super) fn withdraw(&self) {
        if let Some(Err(error)) = self.wanted.map(ReturnPath::remove) {
            warn!(
                id = "return-path-left", %error,
                "the rules and routes of `client_address` are left"
            );
        }
    }
}

fn missing_finding(error: &io::Error) -> Finding {
    let text = format!(
        "the rules or routes of `client_address = \"transparent\"` cannot be added ({error}): the gate does \
         not reach the web server"
    );
    Finding::error("return-path-missing", text)
}

fn leftover_finding(error: &io::Error) -> Finding {
    let text =
        format!("rules or routes of an earlier `client_address` cannot be removed ({error})");
    Finding::warning("return-path-left", text)
        .remedy("`ip rule show` and `ip route show table all` list them with `proto 171`")
}

/// How long it is remembered that another process has meddled.
const REMEMBERED: Duration = Duration::from_secs(3600);
