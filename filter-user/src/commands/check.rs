//! `check`: a configuration and every file that it names, looked at as the roles would.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;
use serde_json::json;

use super::output::{complain, say, show_json};
use super::surroundings;
use crate::cli::OutputFormat;
use crate::config::{Config, load};
use crate::gate::{FileContent, Loaded, service_groups, unreadable_files};
use crate::host::sandbox;
use crate::observe::{Finding, Severity};
use crate::report::Failure;
use crate::role::Role;
use crate::roles::{self, StartError, access, findings};
use crate::xdp;

/// Checks the configuration in `file`, and prints what was found.
pub(super) fn execute(
    file: &Path,
    only: Option<Role>,
    format: OutputFormat,
) -> Result<ExitCode, Failure> {
    let checked = load(file).map_err(Failure::from);
    let checked = checked.and_then(|config| Ok(check(&config, only)?));
    if format == OutputFormat::Json {
        return as_json(file, checked);
    }
    let checked = checked?;
    for finding in &checked.findings {
        let severity = match finding.severity {
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        complain(&format!("{severity}: {finding}"));
    }
    for content in &checked.files {
        say(&content.to_string())?;
    }
    for failure in &checked.failures {
        complain(&format!("pullgate: {failure}"));
    }
    if checked.failures.is_empty() {
        say(&format!("{}: {}", file.display(), checked.conclusion()))?;
    }
    Ok(checked.exit_code())
}

/// The same for programs: an error is a field, and the exit code is the same.
fn as_json(file: &Path, checked: Result<Checked, Failure>) -> Result<ExitCode, Failure> {
    let (report, code) = match &checked {
        Ok(checked) => (serde_json::to_value(checked), checked.exit_code()),
        Err(failure) => (
            Ok(json!({ "error": failure.text, "findings": [], "failures": [], "files": [] })),
            ExitCode::from(failure.status),
        ),
    };
    let mut report = report.map_err(io::Error::from)?;
    report["file"] = json!(file);
    report["ok"] = json!(checked.is_ok_and(|checked| checked.failures.is_empty()));
    show_json(&report)?;
    Ok(code)
}

/// What a check has found.
#[derive(Debug, Serialize)]
pub(super) struct Checked {
    /// What works and could be better.
    pub(super) findings: Vec<Finding>,
    /// What works for the user who checks, and not for the roles as the package runs them.
    pub(super) failures: Vec<Finding>,
    /// What was read from which of the gate's files.
    files: Vec<FileContent>,
}

impl Checked {
    /// Of a configuration that the roles can start with.
    fn conclusion(&self) -> String {
        let all = self.findings.iter();
        match all.filter(|it| it.severity == Severity::Error).count() {
            0 => "OK".to_owned(),
            1 => "OK, but for the error above".to_owned(),
            errors => format!("OK, but for the {errors} errors above"),
        }
    }

    fn exit_code(&self) -> ExitCode {
        if self.failures.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// Checks a configuration and every file that it names, as `run` would, and changes nothing on this
/// host.
///
/// This process gives up what the roles give up: what they could not read is not in order.
///
/// # Errors
///
/// Returns the first thing that would keep a role from starting.
pub(super) fn check(config: &Config, only: Option<Role>) -> Result<Checked, StartError> {
    let roles = roles::named(config, only)?;
    // Others' sockets cannot be looked at without root's power. A unit that reloads waits for no web server.
    let surroundings = match only {
        None => surroundings::findings(config),
        Some(_) => Vec::new(),
    };
    // Root asks for those who are in the package's groups.
    let mut groups = roles::shared_groups(&config.boot.paths);
    groups.extend(service_groups().first());
    roles::join_groups(&groups);
    sandbox::drop_privileges(&roles, access::is_transparent(config))?;
    let loaded = roles::examine(config, &roles)?;
    // A role with a broken host serves the others, so that `--only` reports the host as a warning.
    let loaded = if only.is_some() {
        loaded
    } else {
        loaded.map(Loaded::whole).transpose()?
    };
    // A role waits for an interface that does not exist; to an operator it is a typo.
    let mut found = surroundings;
    if let (Some(filter), true) = (&config.live.filter, roles.contains(&Role::Filter)) {
        found.extend(xdp::check_interfaces(filter)?);
        found.extend(findings::of_check(filter));
        // A unit that reloads does not wait for a web server.
        if config.live.gate.is_none() && only.is_none() {
            found.extend(findings::of_web_servers(filter).1);
        }
    }
    if let (Some(gate), true, None) = (&config.live.gate, config.boot.steer, only) {
        found.extend(findings::of_steered_web_server(gate));
    }
    found.extend(findings::of_roles(config, &roles));
    // A role starts without them, and `--only` asks whether it would.
    if roles.contains(&Role::Ranges) {
        match (roles::examine_sources(&config.live.ranges), only) {
            (Err(error), None) => return Err(error.into()),
            (Err(error), Some(_)) => {
                found.push(Finding::warning("list-unreadable", error.to_string()));
            }
            (Ok(()), _) => {}
        }
    }
    let files = loaded.as_ref().map(Loaded::contents).unwrap_or_default();
    let mut failures = Vec::new();
    if let (Some(gate), Some(loaded)) = (&config.live.gate, &loaded) {
        loaded.ask_upstreams();
        // A unit that reloads waits for no web server.
        if only.is_none() {
            found.extend(loaded.header_mismatches(gate));
            found.extend(loaded.distrusted_upstreams(gate));
        }
        let broken = loaded.broken().iter().map(ToString::to_string);
        found.extend(broken.map(|text| Finding::error("files-unusable", text)));
        found.extend(loaded.lints(gate));
        found.extend(roles::exposures(gate));
        failures.extend(unreadable_files(gate));
    }
    Ok(Checked {
        findings: found,
        failures,
        files,
    })
}
