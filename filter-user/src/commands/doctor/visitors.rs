//! Why visitors who come by Cloudflare see an error: clients that were refused, ranges that are not admitted, and
//! ports on which no program answers.

use std::error::Error;

use ipnet::IpNet;

use super::host::unread;
use crate::commands::listing;
use crate::config::{Config, Fallback, RangesSettings};
use crate::control::protocol::{HostStatus, RefusalStatus};
use crate::gate::Refusal;
use crate::host::netlink;
use crate::observe::Finding;
use crate::ranges::baseline;
use crate::report::{chain, span};
use crate::snapshot;

pub(super) fn findings(config: &Config, report: &HostStatus) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(refused(report));
    findings.extend(not_admitted(config));
    findings.extend(silent_ports(config));
    findings
}

/// Clients from admitted addresses that the gate has refused lately.
fn refused(report: &HostStatus) -> Vec<Finding> {
    let refusals = report.roles.iter().flat_map(|role| &role.refusals);
    let lately = refusals.filter(|it| !it.admitted && it.seconds_ago < LATELY);
    let mut lately: Vec<_> = lately.collect();
    lately.sort_by_key(|it| it.seconds_ago);
    lately.into_iter().filter_map(refusal).collect()
}

fn refusal(last: &RefusalStatus) -> Option<Finding> {
    let reason = Refusal::all()
        .into_iter()
        .find(|it| it.label() == last.reason)?;
    let error = reason.visitor_sees()?;
    let name = last
        .server_name
        .as_deref()
        .map_or_else(String::new, |name| format!(" for {name}"));
    let certificate = match (&last.subject, &last.issuer) {
        (Some(subject), Some(issuer)) => format!(" with the certificate `{subject}` of `{issuer}`"),
        (_, _) => String::new(),
    };
    let text = format!(
        "{} ago {}{certificate} was refused{name} as `{}`: {}. If Cloudflare sent it, the visitor saw error {error}",
        span(last.seconds_ago),
        last.client,
        last.reason,
        last.meaning
    );
    // Any other customer can bring that about: it is worth a look, and no more.
    Some(Finding::warning("clients-refused", text).remedy(reason.advice()))
}

/// Whether Cloudflare's published ranges ought to be admitted: by its own list, or by those of the operator's.
pub(super) fn expects_cloudflare(ranges: &RangesSettings) -> bool {
    let mut sources = ranges.sources.iter();
    let are_own = !ranges.sources.is_empty() && sources.all(|source| source.value.is_own);
    are_own || names_cloudflare(ranges)
}

fn names_cloudflare(ranges: &RangesSettings) -> bool {
    let mut sources = ranges.sources.iter();
    sources.any(|source| source.value.fallback == Fallback::Baseline)
}

/// Cloudflare's published ranges, as they were known when this was built, that are not admitted.
fn not_admitted(config: &Config) -> Vec<Finding> {
    let ranges = &config.live.ranges;
    if !expects_cloudflare(ranges) {
        return Vec::new();
    }
    let snapshot = snapshot::load(&config.boot.paths.snapshot(), ranges);
    let (active, published) = match (snapshot, baseline()) {
        (Ok(active), Ok(published)) => (active, published),
        (Err(error), _) => return vec![ranges_unread(&error)],
        (_, Err(error)) => return vec![ranges_unread(&error)],
    };
    let not_admitted = published.ranges().iter().filter_map(|range| {
        // Its ends, and where a rule begins that is within it.
        let within = ranges.deny.iter().map(IpNet::network);
        let within = within.filter(|address| range.contains(address));
        let ends = [range.network(), range.broadcast()].into_iter();
        let mut shown = ends
            .chain(within)
            .map(|address| listing::show(ranges, &active, address));
        shown
            .find(|shown| !shown.enters)
            .map(|shown| (range, shown))
    });
    let (mut findings, mut unlisted) = (Vec::new(), Vec::new());
    for (range, refused) in not_admitted {
        let (cause, remedy) = match refused.rule {
            Some(rule) => (
                format!("it is in `ranges.{}` ({})", rule.list, rule.range),
                "take it out there",
            ),
            None if names_cloudflare(ranges) => (
                "no active list has it".to_owned(),
                "refresh the lists (`pullgate ranges refresh`)",
            ),
            None => {
                unlisted.push(range);
                continue;
            }
        };
        let text = format!(
            "{} of Cloudflare's {range} is refused, as {cause}: visitors who come by it see error 522",
            refused.address
        );
        findings.push(Finding::error("cloudflare-refused", text).remedy(remedy));
    }
    if let Some(first) = unlisted.first() {
        let text = format!(
            "{} of Cloudflare's {} published ranges are in no active list ({first} …): visitors who come by them see \
             error 522",
            unlisted.len(),
            published.ranges().len()
        );
        // An account with egress addresses of its own lists these alone.
        let remedy = "add \"cloudflare\" to `ranges.sources`; with dedicated egress addresses this is as it should be";
        findings.push(Finding::warning("cloudflare-unlisted", text).remedy(remedy));
    }
    findings
}

fn ranges_unread(error: &dyn Error) -> Finding {
    let text = format!(
        "the active ranges cannot be read ({}): whether Cloudflare's are among them is not known",
        chain(error)
    );
    Finding::warning("ranges-unread", text)
}

/// Protected ports on which no program answers, where there is no gate.
fn silent_ports(config: &Config) -> Vec<Finding> {
    let (Some(filter), None) = (&config.live.filter, &config.live.gate) else {
        return Vec::new();
    };
    let listening = match netlink::listeners() {
        Ok(listening) => listening,
        Err(error) => return Vec::from([Finding::warning("listening-unread", unread(&error))]),
    };
    let is_public = |port: &u16| {
        let mut here = listening.iter().filter(|address| address.port() == *port);
        here.any(|address| !address.ip().to_canonical().is_loopback())
    };
    let silent = filter.ports.iter().filter(|port| !is_public(port));
    let findings = silent.map(|port| {
        let text = format!(
            "no program answers on port {port}, which is protected: visitors see error 521"
        );
        Finding::error("port-silent", text)
            .remedy("start the web server, or take the port out of `filter.ports`")
    });
    findings.collect()
}

/// Seconds for which a refusal is news.
const LATELY: u64 = 3600;
