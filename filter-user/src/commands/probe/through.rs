//! The site as a visitor sees it, by its name and so through Cloudflare: whether it comes through, and gets what the
//! origin answers.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::net::NetError;
use rustls::sign::CertifiedKey;

use super::dns::is_cloudflares;
use super::reception::in_words;
use super::target::ProbeTarget;
use super::visitors::Visitors;
use crate::commands::examination::Check;
use crate::observe::Finding;
use crate::report::chain;
use crate::web::visit::{Answer, Ending, Visit};

/// Visits the first of the name's addresses that is Cloudflare's.
pub(super) fn examine(
    addresses: Result<Vec<IpAddr>, NetError>,
    targets: &[ProbeTarget],
    visitors: &Visitors,
) -> Check {
    let unanswered = |seen| check(false, seen, Vec::new());
    let addresses = match addresses {
        Ok(addresses) => addresses,
        Err(error) => return unanswered(chain(&error)),
    };
    let edge = addresses.iter().find(|address| is_cloudflares(**address));
    let (Some(edge), Some(first)) = (edge, targets.first()) else {
        return unanswered("the name leads to no address of Cloudflare's".to_owned());
    };
    let ending = visit(first, SocketAddr::new(*edge, first.port), None);
    let without_answer = format!("{edge}: {ending}");
    let Some(answer) = ending.answer() else {
        return unanswered(without_answer);
    };
    let ray = answer.header("cf-ray");
    let mut findings = Vec::new();
    findings.extend(ray.is_none().then(|| {
        let text = format!("the answer from {edge} has no `cf-ray`, which Cloudflare adds to each");
        Finding::error("not-through-cloudflare", text)
    }));
    let error = origin_error(&answer);
    // Where Cloudflare itself answers, with an error or a challenge, there is nothing to compare.
    let is_cloudflares_own = error.is_some() || answer.header("cf-mitigated").is_some();
    findings.extend(error);
    let own = visitors.own.as_ref().filter(|_| !is_cloudflares_own);
    let at_origins = own.map_or_else(Vec::new, |own| answers_at(targets, own));
    findings.extend(difference(&answer, &at_origins));
    let compared = if at_origins.is_empty() {
        ", not compared with the origin's answer"
    } else {
        ""
    };
    let ray = ray.map_or_else(String::new, |ray| format!(", cf-ray {}", short(ray)));
    let seen = format!("{edge}: {}{ray}{compared}", in_words(answer.status));
    check(true, seen, findings)
}

fn check(answered: bool, seen: String, findings: Vec<Finding>) -> Check {
    Check {
        id: "through",
        about: "visitors reach the site through Cloudflare",
        answered,
        seen,
        findings,
    }
}

/// For the site, at Cloudflare or at an origin.
fn visit(target: &ProbeTarget, address: SocketAddr, identity: Option<Arc<CertifiedKey>>) -> Ending {
    let visit = Visit {
        server_name: Some(&target.name),
        path: &target.path,
        identity,
        patience: PATIENCE,
        ..Visit::new(address, &target.name)
    };
    visit.connect().ending
}

/// What Cloudflare says it did not get.
fn origin_error(answer: &Answer) -> Option<Finding> {
    let error = answer
        .status
        .filter(|status| ORIGIN_ERRORS.contains(status))?;
    let words = ["cf-error-type", "cf-error-origin"].into_iter();
    let words =
        words.filter_map(|name| Some(format!(", `{name}: {}`", short(answer.header(name)?))));
    let text = format!(
        "visitors see error {error}{}: no page comes from the origin",
        words.collect::<String>()
    );
    let finding = Finding::error("error-through-cloudflare", text);
    Some(
        finding
            .remedy("on the origin: `pullgate doctor`, which asks for the causes of most of these"),
    )
}

/// The statuses of the origins that answer Cloudflare's certificate.
fn answers_at(targets: &[ProbeTarget], own: &Arc<CertifiedKey>) -> Vec<(SocketAddr, Option<u16>)> {
    let answers = targets.iter().filter_map(|target| {
        let answer = visit(target, target.address, Some(Arc::clone(own))).answer()?;
        Some((target.address, answer.status))
    });
    answers.collect()
}

/// Which of several origins has answered, Cloudflare does not say: it has to be one of them.
fn difference(answer: &Answer, at_origins: &[(SocketAddr, Option<u16>)]) -> Option<Finding> {
    let is_one_of_them = at_origins
        .iter()
        .any(|(_, status)| *status == answer.status);
    if at_origins.is_empty() || is_one_of_them {
        return None;
    }
    let answers = at_origins.iter();
    let answers = answers.map(|(address, status)| format!("{} at {address}", in_words(*status)));
    let text = format!(
        "Cloudflare answers {}, and the origin answers Cloudflare's certificate {}: is it the origin that Cloudflare has?",
        in_words(answer.status),
        answers.collect::<Vec<_>>().join(", ")
    );
    Some(Finding::warning("answers-differ", text))
}

fn short(value: &str) -> String {
    value.chars().take(SHOWN_MAX).collect()
}

/// What Cloudflare answers if it gets no page from the origin; the first two may be the origin's own as well.
const ORIGIN_ERRORS: [u16; 13] = [
    502, 504, 520, 521, 522, 523, 524, 525, 526, 527, 528, 529, 530,
];
/// Characters of a header that are shown.
const SHOWN_MAX: usize = 64;
/// Cloudflare waits for the origin: 19 seconds for a connection.
const PATIENCE: Duration = Duration::from_secs(30);
