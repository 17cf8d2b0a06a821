//! `reload` and `log-level`: what roles that run are instructed to do, one or all of them.

use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;

use super::output::{complain, say, show_json};
use super::usage;
use crate::cli::OutputFormat;
use crate::config::Paths;
use crate::control::client;
use crate::control::error::ControlError;
use crate::observe::Finding;
use crate::observe::log::LogLevel;
use crate::report::Failure;
use crate::role::Role;

/// Lets roles read their configuration again, which is this file.
pub(super) fn reload(
    named: &Path,
    paths: &Paths,
    only: Option<Role>,
    format: OutputFormat,
) -> Result<ExitCode, Failure> {
    instruct(paths, only, format, "reloaded", |role| {
        client::reload(paths, role, named)
    })
}

/// Lets roles log more or less; those of one process have one log.
pub(super) fn set_log_level(
    paths: &Paths,
    only: Option<Role>,
    level: LogLevel,
    format: OutputFormat,
) -> Result<ExitCode, Failure> {
    let done = format!("its process logs at the level `{}`", level.label());
    instruct(paths, only, format, &done, |role| {
        client::set_log_level(paths, role, level).map(|()| Vec::new())
    })
}

/// What came of one role's instruction.
#[derive(Debug, Serialize)]
struct Instructed {
    role: Role,
    /// Why it was not done.
    error: Option<String>,
    findings: Vec<Finding>,
}

/// Instructs a role, or all that run; one that fails does not hold up the others.
fn instruct(
    paths: &Paths,
    only: Option<Role>,
    format: OutputFormat,
    done: &str,
    mut ask: impl FnMut(Role) -> Result<Vec<Finding>, ControlError>,
) -> Result<ExitCode, Failure> {
    let mut roles = Vec::from_iter(only);
    if only.is_none() {
        for role in Role::ALL {
            // One that runs and does not answer is to say so itself.
            if client::runs(paths, role)? {
                roles.push(role);
            }
        }
    }
    if roles.is_empty() {
        return Err(usage(
            "no role runs, so there is none to instruct; `pullgate status` names those that should",
        ));
    }
    let (mut instructed, mut code) = (Vec::new(), ExitCode::SUCCESS);
    for role in roles {
        let (error, findings) = match ask(role) {
            Ok(findings) => (None, findings),
            Err(error) => {
                let Failure { text, status } = Failure::from(error);
                code = ExitCode::from(status);
                (Some(text), Vec::new())
            }
        };
        instructed.push(Instructed {
            role,
            error,
            findings,
        });
    }
    match format {
        OutputFormat::Json => show_json(&instructed)?,
        OutputFormat::Text => {
            for it in instructed {
                for finding in it.findings {
                    complain(&format!("warning: {finding}"));
                }
                match it.error {
                    None => say(&format!("{}: {done}", it.role.label()))?,
                    Some(error) => complain(&format!("pullgate: {error}")),
                }
            }
        }
    }
    Ok(code)
}
