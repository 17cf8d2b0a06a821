//! `unload`: the way back, after which strangers' packets pass again.

use std::io;
use std::path::PathBuf;

use super::output::say;
use crate::config::Paths;
use crate::control::client;
use crate::host::file;
use crate::host::netlink::return_paths;
use crate::report::{EX_CONFIG, EX_SOFTWARE, ExitStatus, Failure};
use crate::xdp;

/// Detaches the filter and removes its pins.
pub(super) fn execute(paths: &Paths) -> Result<(), Failure> {
    if client::end_trial(paths)? {
        say("the filter that was on trial is gone, and its role has ended")?;
    }
    let removed = xdp::unload(&paths.bpf)?;
    if remove_return_paths().map_err(|source| ReturnPathKept { source })? {
        say(
            "the rules and routes of `client_address` are removed: connections in clients' names end",
        )?;
    }
    for pin in &removed {
        say(&format!("removed {}", pin.display()))?;
    }
    if removed.is_empty() {
        let interfaces = xdp::interfaces_with_our_program();
        if !interfaces.is_empty() {
            let (bpf, interfaces) = (paths.bpf.clone(), interfaces.join(", "));
            return Err(StillAttached { bpf, interfaces }.into());
        }
        say("nothing was loaded")?;
    } else {
        say("the filter is detached: strangers' packets reach this host again")?;
    }
    // Else the next boot would filter what may lead elsewhere by then.
    let path = paths.uplinks();
    file::remove(&path).map_err(|source| UplinksKept { path, source })?;
    Ok(())
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
