//! `probe`: an origin looked at from outside. It plays a stranger, another Cloudflare customer, and with its
//! certificate Cloudflare; on whose addresses it runs decides which of the first two it is.
//!
//! For each address and both versions of TLS it makes some forty short connections, one after the other, and asks
//! for one page in each: no request has a body.

mod dns;
mod pages;
mod ports;
mod reception;
mod target;
mod through;
mod visitors;
mod visits;
mod watch;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::thread;

use tokio::runtime::Builder;

use self::dns::SiteNames;
use self::target::{ProbeError, ProbeTarget};
use self::visitors::Visitors;
use super::examination::{Check, Examination};
use super::output::{show_json, show_report};
use crate::cli::{OutputFormat, ProbeArgs};
use crate::report::Failure;

/// Looks once, or again and again, and prints what was found.
pub(super) fn execute(arguments: &ProbeArgs, format: OutputFormat) -> Result<ExitCode, Failure> {
    let Some(interval) = arguments.repeat else {
        return Ok(Examination::exit_code(&look(arguments, format)?));
    };
    let (again, metrics) = (arguments.clone(), arguments.metrics);
    watch::repeat(interval, metrics, move || look(&again, format))
}

/// Looks at each address, and prints what was found.
fn look(arguments: &ProbeArgs, format: OutputFormat) -> Result<Vec<Examination>, Failure> {
    let examined = examine(arguments)?;
    match format {
        OutputFormat::Json => show_json(&examined)?,
        OutputFormat::Text => {
            let texts: Vec<_> = examined.iter().map(ToString::to_string).collect();
            show_report(&texts.join("\n"))?;
        }
    }
    Ok(examined)
}

fn examine(arguments: &ProbeArgs) -> Result<Vec<Examination>, ProbeError> {
    let targets = target::targets(arguments)?;
    let visitors = Visitors::new(arguments)?;
    let looks = thread::scope(|scope| {
        let looks = targets.iter().map(|target| {
            let visitors = &visitors;
            scope.spawn(move || visits::examine(target, visitors))
        });
        let looking: Vec<_> = looks.collect();
        let ended = looking.into_iter().map(thread::ScopedJoinHandle::join);
        ended.collect::<Result<Vec<_>, _>>()
    });
    let looks = looks.map_err(|_panic| ProbeError::Ended)?;
    let names = looks.iter().flat_map(|look| look.names.iter().cloned());
    let names: BTreeSet<_> = names
        .chain(arguments.other_name.iter().cloned())
        .chain(arguments.dns_name.iter().cloned())
        .collect();
    let pairs = targets.iter().zip(looks);
    let mut examined: Vec<_> = pairs
        .map(|(target, look)| Examination {
            subject: format!("{} at {}", target.name, target.address),
            checks: look.checks,
        })
        .collect();
    if let Some(first) = targets
        .first()
        .filter(|_| arguments.dns || arguments.through)
    {
        let site = SiteNames {
            name: &first.name,
            origins: targets.iter().map(|target| target.address.ip()).collect(),
            others: names
                .into_iter()
                .filter(|name| *name != first.name)
                .collect(),
        };
        examined.push(Examination {
            subject: format!("{} by its name", first.name),
            checks: by_name(arguments, &site, &targets, &visitors)?,
        });
    }
    Ok(examined)
}

/// What DNS has, and what a visitor sees.
fn by_name(
    arguments: &ProbeArgs,
    site: &SiteNames<'_>,
    targets: &[ProbeTarget],
    visitors: &Visitors,
) -> Result<Vec<Check>, ProbeError> {
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|_without| ProbeError::Ended)?;
    let mut checks = Vec::new();
    let resolver = match runtime.block_on(async { dns::resolver() }) {
        Ok(resolver) => resolver,
        // What the visits have shown is not lost for that.
        Err(error) => {
            checks.push(dns::unanswered(&error));
            return Ok(checks);
        }
    };
    if arguments.dns {
        checks.extend(runtime.block_on(dns::examine(&resolver, site)));
    }
    if arguments.through {
        let addresses = runtime.block_on(dns::addresses(&resolver, site.name));
        checks.push(through::examine(addresses, targets, visitors));
    }
    Ok(checks)
}
