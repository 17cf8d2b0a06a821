//! `unload`: the way back, after which strangers' packets pass again.

use std::io;
use std::path::PathBuf;

use super::output::say;
use crate::config::Paths;
use crate::control::client;
use crate::host::file;
use crate::report::{EX_SOFTWARE, ExitStatus, Failure};
use crate::xdp;

/// Detaches the filter and removes its pins.
pub(super) fn execute(paths: &Paths) -> Result<(), Failure> {
    if client::end_trial(paths)? {
        say("the filter that was on trial is gone, and its role has ended")?;
    }
    let removed = xdp::unload(&paths.bpf)?;
    if removed.is_empty() {
        say("nothing was loaded")?
    } else {
        for pin in removed {
            say(&format!("removed {}", pin.display()))?;
        }
        say("the filter is detached: strangers' packets reach this host again")?;
    }
    // Else the next boot would filter what may lead elsewhere by then.
    let path = paths.uplinks();
    file::remove(&path).map_err(|source| UplinksKept { path, source })?;
    Ok(())
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
