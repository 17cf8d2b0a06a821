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
use crate::report::{Failure, chain};
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
        Command::Check { only } => return check::execute(&cli.config, *only),
        Command::Reload { only } => {
            let waiting = client::reload(&paths(&cli.config), *only)?;
            for finding in waiting {
                complain(&format!("warning: {finding}"));
            }
            say(&format!("{}: reloaded", only.label()))?;
        }
        Command::Status { json } => return status::execute(&cli.config, *json),
        Command::Ranges { command, json } => {
            let command = command.as_ref().unwrap_or(&RangesCommand::List);
            return ranges::execute(&load(&cli.config)?, command, *json);
        }
        Command::Spki { certificate } => say(&gate::spki(certificate)?)?,
        Command::Snippet {
            server, own_mtls, ..
        } => {
            let pairing = if *own_mtls {
                Pairing::OwnMtls
            } else {
                Pairing::BehindGate
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
