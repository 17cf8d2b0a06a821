//! `unload`: the way back, after which strangers' packets pass again.

use std::fmt::{self, Display, Formatter};
use std::io;
use std::path::PathBuf;

use serde::Serialize;

use super::output::show;
use crate::cli::OutputFormat;
use crate::config::Paths;
use crate::control::client;
use crate::host::file;
use crate::host::netlink::return_paths;
use crate::report::{EX_CONFIG, EX_SOFTWARE, ExitStatus, Failure};
use crate::xdp;

/// What was undone.
#[derive(Debug, Serialize)]
struct Unloaded {
    /// Whether a filter was on trial: its role has ended.
    trial_ended: bool,
    /// Whether there were rules and routes of `client_address`: connections in clients' names end.
    return_paths_removed: bool,
    /// The pins that were there.
    removed: Vec<PathBuf>,
    /// Interfaces with a program of ours that no pin holds.
    still_filtered: Vec<String>,
}

/// Detaches the filter and removes its pins.
pub(super) fn execute(paths: &Paths, format: OutputFormat) -> Result<(), Failure> {
    let trial_ended = client::end_trial(paths)?;
    let removed = xdp::unload(&paths.bpf)?;
    let still_filtered = if removed.is_empty() {
        xdp::interfaces_with_our_program()
    } else {
        Vec::new()
    };
    let unloaded = Unloaded {
        trial_ended,
        return_paths_removed: remove_return_paths().map_err(|source| ReturnPathKept { source })?,
        removed,
        still_filtered,
    };
    show(&unloaded, format)?;
    if !unloaded.still_filtered.is_empty() {
        let (bpf, interfaces) = (paths.bpf.clone(), unloaded.still_filtered.join(", "));
        return Err(StillAttached { bpf, interfaces }.into());
    }
    if unloaded.removed.is_empty() {
        return Ok(());
    }
    // Else the next boot would filter what may lead elsewhere by then.
    let path = paths.uplinks();
    file::remove(&path).map_err(|source| UplinksKept { path, source })?;
    Ok(())
}

impl Display for Unloaded {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.trial_ended {
            writeln!(
                f,
                "the filter that was on trial is gone, and its role has ended"
            )?;
        }
        if self.return_paths_removed {
            writeln!(
                f,
                "the rules and routes of `client_address` are removed: connections in clients' names end"
            )?;
        }
        for pin in &self.removed {
            writeln!(f, "removed {}", pin.display())?;
        }
        f.write_str(
            match (self.removed.is_empty(), self.still_filtered.is_empty()) {
                (true, true) => "nothing was loaded",
                (true, false) => "no pin was found",
                (false, _) => "the filter is detached: strangers' packets reach this host again",
            },
        )
    }
}

/// Whether there were any.
fn remove_return_paths() -> io::Result<bool> {
    let paths = return_paths()?;
    paths.iter().try_for_each(|path| path.remove())?;
    Ok(!paths.is_empty())
}

/// A program of ours is attached that no pin below this directory holds.
#[derive(Debug, thiserror::Error)]
#[error(
    "a filter is still attached to {interfaces}, and no pin of it is below {}: name the configuration \
     that it was started with (`--config`), or stop the role that has it on trial",
    bpf.display()
)]
struct StillAttached {
    bpf: PathBuf,
    interfaces: String,
}

impl ExitStatus for StillAttached {
    fn exit_status(&self) -> u8 {
        EX_CONFIG
    }
}

/// Rules and routes of ours are left.
#[derive(Debug, thiserror::Error)]
#[error(
    "the filter is detached, and the rules and routes of `client_address` are left: `ip rule show` and \
     `ip route show table all` list them with `proto 171`"
)]
struct ReturnPathKept {
    source: io::Error,
}

impl ExitStatus for ReturnPathKept {
    fn exit_status(&self) -> u8 {
        EX_SOFTWARE
    }
}

/// Uplinks are remembered although nothing is loaded any more.
#[derive(Debug, thiserror::Error)]
#[error("the remembered uplinks are not forgotten; remove {} by hand", path.display())]
struct UplinksKept {
    path: PathBuf,
    source: io::Error,
}

impl ExitStatus for UplinksKept {
    fn exit_status(&self) -> u8 {
        EX_SOFTWARE
    }
}
