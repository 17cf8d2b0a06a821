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

/// Lets roles read their configuration again, which should be this file.
pub(super) fn reload(
    named: &Path,
    paths: &Paths,
    only: Option<Role>,
    format: OutputFormat,
) -> Result<ExitCode, Failure> {
    let named = std::path::absolute(named)?;
    instruct(paths, only, format, |role| {
        let client::Reloaded {
            file,
            waiting: mut findings,
        } = client::reload(paths, role)?;
        let done = match file {
            Some(file) => {
                if file != named {
                    let text = format!(
                        "this role was started with another file than {}",
                        named.display()
                    );
                    findings.push(Finding::warning("other-file-reloaded", text).of(role));
                }
                format!("has reloaded {}", file.display())
            }
            None => "has reloaded its configuration".to_owned(),
        };
        Ok(Instructed {
            done: Some(done),
            findings,
            ..Instructed::of(role)
        })
    })
}

/// Lets roles log more or less.
pub(super) fn set_log_level(
    paths: &Paths,
    only: Option<Role>,
    level: LogLevel,
    format: OutputFormat,
) -> Result<ExitCode, Failure> {
    instruct(paths, only, format, |role| {
        client::set_log_level(paths, role, level)?;
        Ok(Instructed {
            done: Some(format!("logs at the level `{}`", level.label())),
            ..Instructed::of(role)
        })
    })
}

/// What came of one role's instruction.
#[derive(Debug, Serialize)]
struct Instructed {
    role: Role,
    /// What was done.
    done: Option<String>,
    /// Why it was not done.
    error: Option<String>,
    findings: Vec<Finding>,
}

impl Instructed {
    /// Nothing came of it yet.
    fn of(role: Role) -> Self {
        Self {
            role,
            done: None,
            error: None,
            findings: Vec::new(),
        }
    }
}

/// Instructs a role, or all that run; one that fails does not hold up the others.
fn instruct(
    paths: &Paths,
    only: Option<Role>,
    format: OutputFormat,
    mut ask: impl FnMut(Role) -> Result<Instructed, ControlError>,
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
        return Err(usage("no role runs, so there is none to instruct"));
    }
    let (mut instructed, mut code) = (Vec::new(), ExitCode::SUCCESS);
    for role in roles {
        instructed.push(ask(role).unwrap_or_else(|error| {
            let Failure { text, status } = Failure::from(error);
            code = ExitCode::from(status);
            Instructed {
                error: Some(text),
                ..Instructed::of(role)
            }
        }));
    }
    match format {
        OutputFormat::Json => show_json(&instructed)?,
        OutputFormat::Text => {
            for it in instructed {
                for finding in it.findings {
                    complain(&format!("warning: {finding}"));
                }
                if let Some(done) = it.done {
                    say(&format!("{}: {done}", it.role.label()))?;
                }
                if let Some(error) = it.error {
                    complain(&format!("pullgate: {error}"));
                }
            }
        }
    }
    Ok(code)
}
