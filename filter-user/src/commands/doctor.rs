//! `doctor`: every question that can be asked on this host, what was looked at, and what to do about each answer.
//!
//! The answers are findings: those of the roles that run, those of a check, and some that only this command asks
//! for, as they take a web server's own tools. What has none is OK.

mod host;
mod questions;
mod visitors;
mod web_server;

use std::path::Path;
use std::process::ExitCode;

use rustix::process::geteuid;

use self::questions::{AnsweredBy, QUESTIONS, Question, Subject, seen};
use super::examination::{Check, Examination};
use super::output::{show_json, show_report};
use super::{check, status};
use crate::cli::OutputFormat;
use crate::config::{Config, load};
use crate::control::protocol::HostStatus;
use crate::observe::{Finding, Severity};
use crate::report::{EX_NOPERM, Failure, chain};
use crate::role::Role;
use crate::roles::findings::wide_rules;

/// What the host shows: the configuration, and what the roles report.
struct Facts {
    /// None, if it cannot be used.
    config: Option<Config>,
    report: HostStatus,
}

/// Asks all of it, and prints the answers.
pub(super) fn execute(file: &Path, format: OutputFormat) -> Result<ExitCode, Failure> {
    if !geteuid().is_root() {
        return Err(Failure {
            text: "processes, keys and the web server's configuration are root's to look at; run it as root"
                .to_owned(),
            status: EX_NOPERM,
        });
    }
    let examination = examine(file)?;
    match format {
        OutputFormat::Json => show_json(&examination)?,
        OutputFormat::Text => show_report(&examination.to_string())?,
    }
    Ok(Examination::exit_code(&[examination]))
}

fn examine(file: &Path) -> Result<Examination, Failure> {
    let loaded = load(file);
    let report = status::report(file, &loaded)?;
    let mut findings = report.findings.clone();
    if let Err(error) = &loaded {
        // What runs goes on, so that `status` only warns of it.
        findings.retain(|finding| finding.id != "configuration-unusable");
        findings.push(Finding::error("configuration-unusable", chain(error)));
    }
    let config = loaded.ok();
    if let Some(config) = &config {
        findings.extend(host::findings(config, &report));
        findings.extend(visitors::findings(config, &report));
        // Whatever a check ends by.
        findings.extend(wide_rules(&config.live.ranges));
        let of_sites = web_server::findings(config);
        if !of_sites
            .iter()
            .any(|finding| finding.id == "sites-unreadable")
        {
            // The default site was asked by no name; now each is known.
            findings.retain(|finding| finding.id != "any-customer-unknown");
        }
        findings.extend(of_sites);
        // Last of all: it gives up the power to look.
        match check::check(config, None) {
            Ok(checked) => {
                findings.extend(checked.findings);
                findings.extend(checked.failures);
            }
            Err(error) => findings.push(Finding::error("start-refused", chain(&error))),
        }
    }
    let facts = Facts { config, report };
    Ok(Examination {
        subject: String::new(),
        checks: sort_in(findings, &facts),
    })
}

/// Each finding once, under the question that it answers.
fn sort_in(findings: Vec<Finding>, facts: &Facts) -> Vec<Check> {
    let mut once: Vec<Finding> = Vec::new();
    for finding in findings {
        // A role that runs may say the same as a look from here.
        let is_known = |known: &Finding| {
            // Of a role that does not run, it is that role which matters.
            let is_of_another = known.id == "role-not-running" && known.role != finding.role;
            known.id == finding.id && known.text == finding.text && !is_of_another
        };
        if !once.iter().any(is_known) {
            let stops_visitors = STOPS_VISITORS.contains(&finding.id.as_ref());
            once.push(if stops_visitors {
                finding.with_severity(Severity::Error)
            } else {
                finding
            });
        }
    }
    let asked = QUESTIONS.iter().filter(|question| applies(question, facts));
    let mut checks: Vec<_> = asked
        .map(|question| {
            let belongs = |finding: &mut Finding| question.findings.contains(&finding.id.as_ref());
            let answered = question.answered_by.is_there(&facts.report);
            let is_idle = question.answered_by == AnsweredBy::AttachedFilter
                && AnsweredBy::Role(Role::Filter).is_there(&facts.report);
            Check {
                id: question.id,
                about: question.about,
                answered,
                seen: if !answered && is_idle {
                    "not known: the filter is attached nowhere".to_owned()
                } else {
                    seen(question.id, facts)
                },
                findings: once.extract_if(.., belongs).collect(),
            }
        })
        .collect();
    // None is lost, wherever it comes from.
    if !once.is_empty() {
        checks.push(Check {
            id: "others",
            about: "nothing else is reported",
            answered: true,
            seen: String::new(),
            findings: once,
        });
    }
    checks
}

fn applies(question: &Question, facts: &Facts) -> bool {
    let Some(config) = &facts.config else {
        return ["configuration", "roles"].contains(&question.id);
    };
    match question.subject {
        Subject::Pullgate | Subject::Host | Subject::Ranges => true,
        Subject::CloudflareRanges => visitors::expects_cloudflare(&config.live.ranges),
        Subject::Filter => config.live.filter.is_some(),
        Subject::Gate => config.live.gate.is_some(),
        Subject::Steering => config.boot.steer,
        Subject::WebServer => config.live.filter.is_some() && config.live.gate.is_none(),
    }
}

/// What a check warns of, as it may be mended until the start; here visitors see an error (of an expired certificate,
/// if Cloudflare's encryption mode is Full (strict)).
const STOPS_VISITORS: [&str; 4] = [
    "certificate-expired",
    "name-not-on-certificate",
    "upstream-silent",
    "web-server-absent",
];
