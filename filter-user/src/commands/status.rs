//! `status`: what the roles of this host report, together.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::process::ExitCode;

use super::output::show;
use crate::config::{Config, LoadError, Paths, load, salvage_paths};
use crate::control::client::{ANSWER_TIMEOUT, status_if_permitted};
use crate::control::error::ControlError;
use crate::control::protocol::{HostStatus, Status};
use crate::observe::Finding;
use crate::report::{Failure, chain};
use crate::role::Role;
use crate::roles::findings;
use crate::xdp;

/// Prints the status of this host.
pub(super) fn execute(file: &Path, json: bool) -> Result<ExitCode, Failure> {
    let report = match load(file) {
        Ok(config) => status(&config)?,
        Err(error) => status_without(&salvage_paths(file), &error)?,
    };
    show(&report, json)?;
    Ok(if report.protected {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Asks every role that the configuration describes for its status.
///
/// # Errors
///
/// Returns that this user may not ask.
fn status(config: &Config) -> Result<HostStatus, ControlError> {
    let mut report = HostStatus {
        protected: true,
        admits: None,
        findings: Vec::new(),
        roles: Vec::new(),
    };
    if config.live.filter.is_none() && config.live.gate.is_none() {
        report.protected = false;
        report.findings.push(Finding::error(
            "nothing-protected",
            "neither [filter] nor [gate] is configured: ranges are kept for other tools only",
        ));
    }
    let missing = ask_all(&mut report, &config.boot.paths, config.roles())?;
    report.protected &= missing.is_empty();
    if let (Some(filter), None) = (&config.live.filter, &config.live.gate) {
        let (admits, findings) = findings::of_web_servers(filter);
        report.admits = Some(admits);
        report.findings.extend(findings);
    }
    if let Some(gate) = &config.live.gate {
        report
            .findings
            .extend(findings::of_steered_web_server(gate));
    }
    Ok(report)
}

/// Asks the roles that run, where the configuration cannot tell which should: what is active
/// is not undone by what is on disk.
///
/// # Errors
///
/// Returns that this user may not ask.
fn status_without(paths: &Paths, error: &LoadError) -> Result<HostStatus, ControlError> {
    let mut report = HostStatus {
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
    report: &mut HostStatus,
    paths: &Paths,
    roles: impl IntoIterator<Item = Role>,
) -> Result<Vec<Role>, ControlError> {
    let mut missing = Vec::new();
    for role in roles {
        match status_if_permitted(paths, role)? {
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
        // A socket whose queue is full returns EAGAIN.
        false if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            format!("does not answer within {} s", ANSWER_TIMEOUT.as_secs())
        }
        false => format!("does not answer: {error}"),
    };
    if role == Role::Filter && xdp::is_loaded(&paths.bpf) {
        text.push_str(
            "; its pinned program goes on, by the settings and ranges of its last moment",
        );
    }
    let finding = if is_gone {
        Finding::error("role-not-running", text)
    } else {
        Finding::error("role-not-answering", text)
    };
    finding.of(role)
}
