//! The commands: a parsed command line in, an exit code out. One file for each that does more than call
//! another part.

mod check;
pub mod explain;
pub mod listing;
pub mod output;
mod ranges;
pub mod snippet;
mod status;
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
use crate::xdp::Lifetime;

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
        Command::Confirm => {
            client::confirm(&paths(&cli.config))?;
            say("confirmed: the filter stays")?;
        }
        Command::Explain(packet) => {
            let config = load(&cli.config)?;
            let lifetime = if client::shows_trial(&config.boot.paths) {
                Lifetime::OnTrial
            } else {
                Lifetime::Pinned
            };
            let explanation = explain::explain(&config, packet, lifetime)?;
            show(&explanation, packet.json)?;
        }
        Command::Check { only } => return check::execute(&cli.config, *only),
        Command::Reload { only } => {
            client::reload(&paths(&cli.config), *only)?;
            say(&format!("{}: applied", cli.config.display()))?;
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
            // Without one, it is told in placeholders.
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
            complain(&format!(
                "pullgate: {}; its [paths] are used, unless others may write them",
                chain(&error)
            ));
            salvage_paths(file)
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
