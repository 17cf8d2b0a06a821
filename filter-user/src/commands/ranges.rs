//! `ranges`: the active ranges, and what becomes of them.

use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context as _;

use super::listing;
use super::output::{complain, print, say, show, show_all};
use crate::cli::RangesCommand;
use crate::config::Config;
use crate::control::client;
use crate::ranges::export::export;
use crate::refresh;
use crate::report::chain;
use crate::snapshot::{self, SnapshotError};

/// Does what is asked of the ranges.
pub(super) fn execute(
    config: &Config,
    command: &RangesCommand,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let in_force = || match snapshot::load(&config.paths.snapshot(), &config.ranges) {
        Ok(in_force) => Ok(in_force),
        // As a role does that starts now.
        Err(error @ SnapshotError::Corrupt { .. }) => {
            let text = chain(&error);
            complain(&format!("pullgate: {text}; going by the embedded baseline"));
            snapshot::baseline(&config.ranges)
        }
        Err(error) => Err(error),
    };
    match command {
        RangesCommand::List => show_all(&listing::list(&in_force()?), json)?,
        RangesCommand::Show { address } => {
            let shown = listing::show(&config.ranges, &in_force()?, *address);
            show(&shown, json)?;
            if !shown.enters {
                return Ok(ExitCode::FAILURE);
            }
        }
        RangesCommand::Diff => {
            let runtime = tokio::runtime::Runtime::new().context("threads")?;
            let now = SystemTime::now();
            let previews = runtime.block_on(refresh::preview(&config.ranges, &in_force()?, now));
            runtime.shutdown_background();
            show_all(&previews, json)?;
            let works = |source: &str| {
                let mut ways = previews.iter().filter(|preview| preview.source == source);
                ways.any(|way| way.error.is_none())
            };
            if !previews.iter().all(|preview| works(&preview.source)) {
                return Ok(ExitCode::FAILURE);
            }
        }
        RangesCommand::Refresh => {
            let refreshed = client::refresh(&config.paths)?;
            if refreshed.is_empty() && !json {
                say("there is no source to ask: `ranges.static` alone is in force")?;
            }
            show_all(&refreshed, json)?;
            if refreshed.iter().any(|refresh| refresh.error.is_some()) {
                return Ok(ExitCode::FAILURE);
            }
        }
        RangesCommand::Approve { id, dry_run } => {
            let held = client::held(&config.paths, id)?;
            show_all(&held, json)?;
            if !dry_run {
                client::approve(&config.paths, &held)?;
                if !json {
                    say(
                        "taken in: what is added is in force, what is removed goes after its grace",
                    )?;
                }
            }
        }
        RangesCommand::Export { language } => {
            let text = export(in_force()?.set(), *language);
            print(&text)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
