//! `status`: what the roles of this host report, together.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::process::ExitCode;

use rustix::process::geteuid;

use super::output::{show_json, show_report};
use super::surroundings;
use crate::cli::OutputFormat;
use crate::config::{Config, LoadError, Paths, load, salvage_paths};
use crate::control::client::{ANSWER_TIMEOUT, is_absent, status_if_permitted};
use crate::control::error::ControlError;
use crate::control::protocol::{HostStatus, Status};
use crate::gate::Loaded;
use crate::observe::{Finding, Severity};
use crate::report::{Failure, chain};
use crate::role::Role;
use crate::roles::{self, findings};
use crate::xdp;

/// How much of a status people are shown.
#[derive(Clone, Copy, Debug)]
pub(super) enum Detail {
    Brief,
    Full,
}

/// Prints the status of this host.
pub(super) fn execute(
    file: &Path,
    detail: Detail,
    format: OutputFormat,
) -> Result<ExitCode, Failure> {
    let report = report(file, &load(file))?;
    match (format, detail) {
        (OutputFormat::Json, _) => show_json(&report)?,
        (OutputFormat::Text, Detail::Brief) => show_report(&report.to_string())?,
        (OutputFormat::Text, Detail::Full) => show_report(&format!("{report:#}"))?,
    }
    // Clients that should be served and are not are no all-clear either.
    let mut findings = report.findings.iter();
    let is_well = report.protected && !findings.any(|it| it.severity == Severity::Error);
    Ok(if is_well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What this host reports, by the configuration in a file or without it.
///
/// # Errors
///
/// Returns that this user may not ask.
pub(super) fn report(
    file: &Path,
    loaded: &Result<Config, LoadError>,
) -> Result<HostStatus, ControlError> {
    match loaded {
        Ok(config) => status(config),
        Err(error) => status_without(&salvage_paths(file), error),
    }
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
    let (needed, idle): (Vec<_>, Vec<_>) = config
        .roles()
        .into_iter()
        .partition(|role| *role != Role::Ranges || !config.live.ranges.sources.is_empty());
    let missing = ask_all(&mut report, &config.boot.paths, needed)?;
    report.protected &= missing.is_empty();
    // With `ranges.only` no source is asked: the role has nothing to do, and may run all the same.
    for role in idle {
        if let Ok(status) = status_if_permitted(&config.boot.paths, role)? {
            report.add(status);
        }
    }
    if let (Some(filter), None) = (&config.live.filter, &config.live.gate) {
        let (admits, findings) = findings::of_web_servers(filter);
        report.admits = Some(admits);
        report.findings.extend(findings);
    }
    report.findings.extend(surroundings::findings(config));
    report.findings.extend(unusable_files(config));
    if let Some(gate) = &config.live.gate {
        report
            .findings
            .extend(findings::of_steered_web_server(gate));
    }
    Ok(report)
}

/// What on disk keeps the gate from its next reload and start, whether it has been asked to read it or not.
fn unusable_files(config: &Config) -> Option<Finding> {
    // Another user may not read all of them.
    if config.live.gate.is_none() || !geteuid().is_root() {
        return None;
    }
    let loaded = roles::examine(config, &[Role::Gate]);
    let error = loaded
        .and_then(|it| Ok(it.map(Loaded::whole).transpose()?))
        .err()?;
    let text = format!(
        "on disk, what the gate would read now cannot be used: {}",
        chain(&error)
    );
    Some(Finding::warning("files-on-disk-unusable", text))
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
        // What is active goes on, whatever is on disk.
        findings: Vec::from([Finding::warning(
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
    let is_gone = is_absent(error);
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
