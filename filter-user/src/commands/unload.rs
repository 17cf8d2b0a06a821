//! `unload`: the way back, after which strangers' packets pass again.

use anyhow::Context as _;

use super::output::say;
use crate::config::Paths;
use crate::control::client;
use crate::host::file;
use crate::xdp;

/// Detaches the filter and removes its pins.
pub(super) fn execute(paths: &Paths) -> anyhow::Result<()> {
    if client::end_trial(paths)? {
        say("the filter that was on trial is gone, and its role has ended")?;
    }
    let removed = xdp::unload(&paths.bpf)?;
    match removed.is_empty() {
        true => say("nothing was loaded")?,
        false => {
            for pin in removed {
                say(&format!("removed {}", pin.display()))?;
            }
            say("the filter is detached: strangers' packets reach this host again")?;
        }
    }
    // Else the next boot would filter what may lead elsewhere by then.
    let path = paths.uplinks();
    file::remove(&path).with_context(|| {
        format!(
            "the remembered uplinks are not forgotten; remove {} by hand",
            path.display()
        )
    })
}
