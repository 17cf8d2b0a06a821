//! The commands: a parsed command line in, an exit code out. One file for each that does more than call
//! another part.

mod check;
pub mod explain;
mod init;
pub mod listing;
pub mod output;
mod ranges;
pub mod snippet;
mod status;
mod surroundings;
mod unload;

use std::path::Path;
use std::process::ExitCode;

use self::output::{complain, print, say, show};
use self::snippet::snippet;
use crate::cli::{Cli, Command, Pairing, RangesCommand, RunArgs};
use crate::config::{Paths, load, salvage_paths};
use crate::control::client;
use crate::gate;
use crate::observe::log::LogFormat;
use crate::report::{EX_USAGE, Failure, chain};
use crate::role::Role;
use crate::roles::{self, OwnConnection, Power};

/// Does what the command line asks for.
///
/// # Errors
///
/// Returns why it cannot be done.
pub fn execute(cli: &Cli) -> Result<ExitCode, Failure> {
    match &cli.command {
        Command::Run(arguments) => {
            roles::run(&cli.config, &options(arguments, cli.log_format))?;
        }
        Command::Init { write } => init::execute(&cli.config, *write)?,
        Command::Confirm => {
            client::confirm(&paths(&cli.config))?;
            say("confirmed: the filter stays")?;
        }
        Command::Explain(packet) => {
            let config = load(&cli.config)?;
            let explanation = explain::explain(&config, packet)?;
            show(&explanation, packet.json)?;
        }
        Command::Check { file, only, json } => {
            let file = file.as_ref().unwrap_or(&cli.config);
            return check::execute(file, *only, *json);
        }
        Command::Reload { only } => return reload(&paths(&cli.config), *only),
        Command::Status { json } => return status::execute(&cli.config, *json),
        Command::Ranges { command, json } => {
            let command = command.as_ref().unwrap_or(&RangesCommand::List);
            return ranges::execute(&load(&cli.config)?, command, *json);
        }
        Command::Spki { certificate } => say(&gate::spki(certificate)?)?,
        Command::Snippet {
            server,
            own_mtls,
            behind_gate,
        } => {
            let pairing = match (behind_gate, own_mtls) {
                (true, _) => Pairing::BehindGate,
                (false, true) => Pairing::OwnMtls,
                (false, false) => {
                    return Err(Failure {
                        text: PAIRINGS.to_owned(),
                        status: EX_USAGE,
                    });
                }
            };
            // Without one, placeholders stand for it.
            let config = match cli.config.try_exists() {
                Ok(false) => None,
                Ok(true) | Err(_) => Some(load(&cli.config)?),
            };
            print(&snippet(*server, pairing, config.as_ref())?)?;
        }
        Command::Unload => unload::execute(&paths(&cli.config))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Reloads a role, or all that run; one that fails does not hold up the others.
fn reload(paths: &Paths, only: Option<Role>) -> Result<ExitCode, Failure> {
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
        return Err(Failure {
            text: "no role runs, so there is nothing to reload".to_owned(),
            status: EX_USAGE,
        });
    }
    let mut failed = None;
    for role in roles {
        match client::reload(paths, role) {
            Ok(waiting) => {
                for finding in waiting {
                    complain(&format!("warning: {finding}"));
                }
                say(&format!("{}: reloaded", role.label()))?;
            }
            Err(error) => {
                if let Some(Failure { text, .. }) = failed.replace(Failure::from(error)) {
                    complain(&format!("pullgate: {text}"));
                }
            }
        }
    }
    failed.map_or(Ok(ExitCode::SUCCESS), Err)
}

/// What `snippet` needs to know.
const PAIRINGS: &str = "write `--behind-gate` for a web server to which the gate relays, or `--own-mtls` for one that \
                        demands Cloudflare's certificate itself, behind the filter alone";

/// Where things live, even if the rest of the file is wrong: the way back in must not depend on it.
fn paths(file: &Path) -> Paths {
    match load(file) {
        Ok(config) => config.boot.paths.clone(),
        Err(error) => {
            let paths = salvage_paths(file);
            complain(&format!(
                "pullgate: {}; looking in {} and {}",
                chain(&error),
                paths.bpf.display(),
                paths.run.display()
            ));
            paths
        }
    }
}

fn options(arguments: &RunArgs, log_format: Option<LogFormat>) -> roles::Options {
    roles::Options {
        only: arguments.only,
        trial: arguments.confirm,
        own_connection: if arguments.yes {
            OwnConnection::Drop
        } else {
            OwnConnection::Refuse
        },
        listen_fds: arguments.listen_fd.clone(),
        power: if arguments.unconfined {
            Power::AsGiven
        } else {
            Power::AsNeeded
        },
        child_of: arguments.child_of,
        log_format,
    }
}
