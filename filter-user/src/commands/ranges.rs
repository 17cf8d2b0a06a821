//! `ranges`: the active ranges, and what becomes of them.

use std::process::ExitCode;
use std::time::SystemTime;

use serde_json::json;

use super::listing;
use super::output::{complain, say, show, show_all, show_either};
use crate::cli::{OutputFormat, RangesCommand};
use crate::config::Config;
use crate::control::client;
use crate::ranges::export::export;
use crate::refresh;
use crate::report::{Failure, chain};
use crate::snapshot::{self, SnapshotError};

/// Does what is asked of the ranges.
pub(super) fn execute(
    config: &Config,
    command: &RangesCommand,
    format: OutputFormat,
) -> Result<ExitCode, Failure> {
    let active = || match snapshot::load(&config.boot.paths.snapshot(), &config.live.ranges) {
        Ok(active) => Ok(active),
        // As a role does that starts now.
        Err(error @ SnapshotError::Corrupt { .. }) => {
            let text = chain(&error);
            complain(&format!("pullgate: {text}; using the embedded baseline"));
            snapshot::baseline(&config.live.ranges)
        }
        Err(error) => Err(error),
    };
    match command {
        RangesCommand::List => show_all(&listing::list(&active()?), format)?,
        RangesCommand::Show { address } => {
            let shown = listing::show(&config.live.ranges, &active()?, *address);
            show(&shown, format)?;
            if !shown.enters {
                return Ok(ExitCode::FAILURE);
            }
        }
        RangesCommand::Diff => {
            if config.live.ranges.sources.is_empty() && format == OutputFormat::Text {
                say(NO_SOURCE)?;
            }
            let runtime = tokio::runtime::Runtime::new()?;
            let now = SystemTime::now();
            let previews = runtime.block_on(refresh::preview(&config.live.ranges, &active()?, now));
            runtime.shutdown_background();
            show_all(&previews, format)?;
            let works = |source: &str| {
                let mut ways = previews.iter().filter(|preview| preview.source == source);
                ways.any(|way| way.error.is_none())
            };
            if !previews.iter().all(|preview| works(&preview.source)) {
                return Ok(ExitCode::FAILURE);
            }
        }
        RangesCommand::Refresh => {
            let refreshed = client::refresh(&config.boot.paths)?;
            if refreshed.is_empty() && format == OutputFormat::Text {
                say(NO_SOURCE)?;
            }
            show_all(&refreshed, format)?;
            if refreshed.iter().any(|refresh| refresh.error.is_some()) {
                return Ok(ExitCode::FAILURE);
            }
        }
        RangesCommand::Approve { id, dry_run } => {
            let held = client::held(&config.boot.paths, id)?;
            show_all(&held, format)?;
            if !dry_run {
                client::approve(&config.boot.paths, &held)?;
                if format == OutputFormat::Text {
                    say("taken in: what is added is active, what is removed goes after its grace")?;
                }
            }
        }
        RangesCommand::Export { language } => {
            let text = export(active()?.set(), *language);
            show_either((&text, json!({ "export": text })), format)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// With `ranges.only`.
const NO_SOURCE: &str = "there is no source to ask: `ranges.static` alone is active";
