//! `status`: what the roles of this host report, together.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::process::ExitCode;

use super::output::show;
use crate::config::{Config, LoadError, Paths, load, salvage_paths};
use crate::control::client::{ANSWER_TIMEOUT, ask_if_permitted};
use crate::control::error::ControlError;
use crate::control::protocol::{Report, Status};
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
        warnings: Vec::new(),
        roles: Vec::new(),
    };
    if config.filter.is_none() && config.gate.is_none() {
        report.protected = false;
        let text =
            "neither [filter] nor [gate] is configured: ranges are kept for other tools only";
        report.warnings.push(text.to_owned());
    }
    let missing = ask_all(&mut report, &config.paths, config.roles())?;
    report.protected &= missing.is_empty();
    if let (Some(filter), None) = (&config.filter, &config.gate) {
        let (admits, warnings) = findings::of_web_servers(filter);
        report.admits = Some(admits);
        report.warnings.extend(warnings);
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
        warnings: vec![format!(
            "which roles should run cannot be told: {}",
            chain(error)
        )],
        roles: Vec::new(),
    };
    let missing = ask_all(&mut report, paths, Role::ALL)?;
    let should_run = |role: &Role| {
        let mut described = report.roles.iter().flat_map(|status| &status.described);
        described.any(|label| label == role.label())
    };
    let protects = |status: &Status| status.role != Role::Ranges.label();
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
                report.warnings.push(absent(paths, role, &error));
            }
        }
    }
    Ok(missing)
}

/// Why a role has no status, and what that means.
fn absent(paths: &Paths, role: Role, error: &io::Error) -> String {
    let label = role.label();
    let is_gone = matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::ConnectionRefused
    );
    let mut text = match is_gone {
        true => format!("{label}: not running"),
        // Of a socket with a time limit, EAGAIN.
        false if error.kind() == ErrorKind::WouldBlock => {
            format!(
                "{label}: does not answer within {} s",
                ANSWER_TIMEOUT.as_secs()
            )
        }
        false => format!("{label}: does not answer: {error}"),
    };
    if role == Role::Filter && xdp::is_loaded(&paths.bpf) {
        text.push_str(
            "; its pinned program goes on, by the settings and ranges of its last moment",
        );
    }
    text
}
