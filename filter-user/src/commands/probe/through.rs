//! The site as a visitor sees it, by its name and so through Cloudflare: whether it comes through, and gets what the
//! origin answers.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::net::NetError;

use super::dns::is_cloudflares;
use super::target::ProbeTarget;
use super::visitors::Visitors;
use crate::commands::examination::Check;
use crate::observe::Finding;
use crate::report::chain;
use crate::web::visit::Visit;

/// Visits the first of the name's addresses that is Cloudflare's.
pub(super) fn examine(
    addresses: Result<Vec<IpAddr>, NetError>,
    target: &ProbeTarget,
    visitors: &Visitors,
) -> Check {
    let check = |answered, seen: String, findings| Check {
        id: "through",
        about: "visitors reach the site through Cloudflare",
        answered,
        seen,
        findings,
    };
    let addresses = match addresses {
        Ok(addresses) => addresses,
        Err(error) => return check(false, chain(&error), Vec::new()),
    };
    let edge = addresses.iter().find(|address| is_cloudflares(**address));
    let Some(edge) = edge else {
        let seen = "the name leads to no address of Cloudflare's".to_owned();
        return check(false, seen, Vec::new());
    };
    let visit = |address, identity| Visit {
        server_name: Some(&target.name),
        path: &target.path,
        identity,
        patience: PATIENCE,
        ..Visit::new(address, &target.name)
    };
    let ending = visit(SocketAddr::new(*edge, target.port), None)
        .connect()
        .ending;
    let seen = format!("{edge}: {ending}");
    let Some(answer) = ending.answer() else {
        return check(false, seen, Vec::new());
    };
    let (ray, status) = (answer.header("cf-ray"), answer.status);
    let mut findings = Vec::new();
    findings.extend(ray.is_none().then(|| {
        let text = format!("the answer from {edge} has no `cf-ray`, which Cloudflare adds to each");
        Finding::error("not-through-cloudflare", text)
    }));
    let error = status.filter(|status| ORIGIN_ERRORS.contains(status));
    findings.extend(error.map(|error| {
        let kind = answer
            .header("cf-error-type")
            .map_or_else(String::new, |kind| format!(", `cf-error-type: {kind}`"));
        let text =
            format!("visitors see error {error}{kind}: Cloudflare gets no page from the origin");
        Finding::error("error-through-cloudflare", text)
            .remedy("on the origin: `pullgate doctor`, which asks for the causes of most of these")
    }));
    // Where Cloudflare itself answers, with an error or a challenge, there is nothing to compare.
    let is_cloudflares_own = error.is_some() || answer.header("cf-mitigated").is_some();
    let own = visitors.own.clone().filter(|_| !is_cloudflares_own);
    let at_origin = own.and_then(|own| visit(target.address, Some(own)).connect().ending.answer());
    let compared = if at_origin.is_some() {
        ""
    } else {
        ", not compared with the origin's answer"
    };
    findings.extend(at_origin.filter(|it| it.status != status).map(|at_origin| {
        let text = format!(
            "Cloudflare answers {}, and the origin at {} answers {} to Cloudflare's certificate: is it the origin \
             that Cloudflare has?",
            in_words(status),
            target.address,
            in_words(at_origin.status)
        );
        Finding::warning("answers-differ", text)
    }));
    let ray = ray.map_or_else(String::new, |ray| format!(", cf-ray {ray}"));
    check(
        true,
        format!("{edge}: {}{ray}{compared}", in_words(status)),
        findings,
    )
}

fn in_words(status: Option<u16>) -> String {
    status.map_or_else(|| "no HTTP".to_owned(), |status| status.to_string())
}

/// What Cloudflare answers if it gets no page from the origin.
const ORIGIN_ERRORS: std::ops::RangeInclusive<u16> = 520..=530;
/// Cloudflare waits for the origin: 19 seconds for a connection.
const PATIENCE: Duration = Duration::from_secs(30);
