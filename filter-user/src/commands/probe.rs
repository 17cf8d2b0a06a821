//! `probe`: an origin looked at from outside. It plays a stranger, another Cloudflare customer, and with its
//! certificate Cloudflare; on whose addresses it runs decides which of the first two it is.
//!
//! For each address and both versions of TLS it makes some forty short connections, one after the other, and asks
//! for one page in each: no request has a body.

mod ports;
mod reception;
mod target;
mod visitors;
mod visits;

use std::process::ExitCode;
use std::thread;

use self::target::ProbeError;
use self::visitors::Visitors;
use super::examination::Examination;
use super::output::{show_json, show_report};
use crate::cli::{OutputFormat, ProbeArgs};
use crate::report::Failure;

/// Looks at each address, and prints what was found.
pub(super) fn execute(arguments: &ProbeArgs, format: OutputFormat) -> Result<ExitCode, Failure> {
    let targets = target::targets(arguments)?;
    let visitors = Visitors::new(arguments)?;
    let examined = thread::scope(|scope| {
        let looks = targets.iter().map(|target| {
            let visitors = &visitors;
            scope.spawn(move || Examination {
                subject: format!("{} at {}", target.name, target.address),
                checks: visits::examine(target, visitors),
            })
        });
        let looks: Vec<_> = looks.collect();
        let examined = looks.into_iter().map(thread::ScopedJoinHandle::join);
        examined.collect::<Result<Vec<_>, _>>()
    });
    let examined = examined.map_err(|_panic| ProbeError::Ended)?;
    match format {
        OutputFormat::Json => show_json(&examined)?,
        OutputFormat::Text => {
            let texts: Vec<_> = examined.iter().map(ToString::to_string).collect();
            show_report(&texts.join("\n"))?;
        }
    }
    let mut codes = examined.iter().map(Examination::exit_code);
    let failed = codes.find(|code| *code != ExitCode::SUCCESS);
    Ok(failed.unwrap_or(ExitCode::SUCCESS))
}
