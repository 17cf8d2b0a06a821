//! `status`: what the roles of this host report, together.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::process::ExitCode;

use super::output::show;
use crate::config::{Config, LoadError, Paths, load, salvage_paths};
use crate::control::client::{ANSWER_TIMEOUT, ask_if_permitted};
use crate::control::error::ControlError;
use crate::control::protocol::{Report, Status};
use crate::observe::Finding;
use crate::report::chain;
use crate::role::Role;
use crate::roles::findings;
use crate::xdp;

/// Prints the status of this host.
pub(super) fn execute(file: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let report = match load(file) {
        Ok(config) => status(&config)?,
        Err(error) => status_without(&salvage_paths(file), &error)?,
    };
    show(&report, json)?;
    Ok(match report.protected {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Asks every role that the configuration describes for its status.
///
/// # Errors
///
/// Returns that this user may not ask.
fn status(config: &Config) -> Result<Report, ControlError> {
    let mut report = Report {
        protected: true,
        admits: None,
        findings: Vec::new(),
        roles: Vec::new(),
    };
    if config.filter.is_none() && config.gate.is_none() {
        report.protected = false;
        report.findings.push(Finding::error(
            "nothing-protected",
            "neither [filter] nor [gate] is configured: ranges are kept for other tools only",
        ));
    }
    let missing = ask_all(&mut report, &config.paths, config.roles())?;
    report.protected &= missing.is_empty();
    if let (Some(filter), None) = (&config.filter, &config.gate) {
        let (admits, findings) = findings::of_web_servers(filter);
        report.admits = Some(admits);
        report.findings.extend(findings);
    }
    Ok(report)
}

/// Asks the roles that run, where the configuration cannot tell which should: what they have in force
/// is not undone by what is on disk.
///
/// # Errors
///
/// Returns that this user may not ask.
fn status_without(paths: &Paths, error: &LoadError) -> Result<Report, ControlError> {
    let mut report = Report {
        protected: true,
        admits: None,
        findings: Vec::from([Finding::error(
            "configuration-unusable",
            format!("which roles should run is unknown: {}", chain(error)),
        )]),
        roles: Vec::new(),
    };
    let missing = ask_all(&mut report, paths, Role::ALL)?;
    let should_run = |role: &Role| {
        let mut described = report.roles.iter().flat_map(|status| &status.described);
        described.any(|described| described == role)
    };
    let protects = |status: &Status| status.role != Role::Ranges;
    let lacks = missing.iter().any(should_run);
    report.protected &= report.roles.iter().any(protects) && !lacks;
    Ok(report)
}

/// Adds what these roles say, and returns those that say nothing.
fn ask_all(
    report: &mut Report,
    paths: &Paths,
    roles: impl IntoIterator<Item = Role>,
) -> Result<Vec<Role>, ControlError> {
    let mut missing = Vec::new();
    for role in roles {
        match ask_if_permitted(paths, role)? {
            Ok(status) => report.add(status),
            Err(error) => {
                missing.push(role);
                report.findings.push(absent(paths, role, &error));
            }
        }
    }
    Ok(missing)
}

/// Why a role has no status, and what that means.
fn absent(paths: &Paths, role: Role, error: &io::Error) -> Finding {
    let is_gone = matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::ConnectionRefused
    );
    let mut text = match is_gone {
        true => "not running".to_owned(),
        // Of a socket with a time limit, EAGAIN.
        false if error.kind() == ErrorKind::WouldBlock => {
            format!("does not answer within {} s", ANSWER_TIMEOUT.as_secs())
        }
        false => format!("does not answer: {error}"),
    };
    if role == Role::Filter && xdp::is_loaded(&paths.bpf) {
        text.push_str(
            "; its pinned program goes on, by the settings and ranges of its last moment",
        );
    }
    let finding = match is_gone {
        true => Finding::error("role-not-running", text),
        false => Finding::error("role-not-answering", text),
    };
    finding.of(role)
}
