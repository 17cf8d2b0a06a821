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

use self::explain::ExplainError;
use self::output::{complain, print, say, show};
use self::snippet::snippet;
use crate::cli::{Cli, Command, Pairing, RangesCommand};
use crate::config::{ConfigError, LoadError, Paths, load, salvage_paths};
use crate::control::client;
use crate::control::error::ControlError;
use crate::gate;
use crate::report::{EX_CONFIG, EX_SOFTWARE, chain};
use crate::roles::{self, OwnConnection, Power, StartError};
use crate::snapshot::SnapshotError;
use crate::xdp::XdpError;

/// Does what the command line asks for.
///
/// # Errors
///
/// Returns why it cannot be done, see [`exit_code`].
pub fn execute(cli: &Cli) -> anyhow::Result<ExitCode> {
    match &cli.command {
        Command::Run {
            only,
            confirm,
            yes,
            listen_fd,
            unconfined,
            child_of,
        } => {
            let own_connection = match yes {
                true => OwnConnection::Cut,
                false => OwnConnection::Refuse,
            };
            let power = match unconfined {
                true => Power::AsGiven,
                false => Power::AsNeeded,
            };
            let options = roles::Options {
                only: *only,
                trial: *confirm,
                own_connection,
                listen_fds: listen_fd.clone(),
                power,
                child_of: *child_of,
                log_format: cli.log_format,
            };
            roles::run(&cli.config, &options)?;
        }
        Command::Confirm => {
            client::confirm(&paths(&cli.config))?;
            say("confirmed: the filter stays in force")?;
        }
        Command::Explain(packet) => {
            let config = load(&cli.config)?;
            let stay = client::stay(&config.paths);
            let explanation = explain::explain(&config, packet, stay)?;
            show(&explanation, packet.json)?;
        }
        Command::Check { only } => return check::execute(&cli.config, *only),
        Command::Reload { only } => {
            client::reload(&paths(&cli.config), *only)?;
            say(&format!("{}: in force", cli.config.display()))?;
        }
        Command::Status { json } => return status::execute(&cli.config, *json),
        Command::Ranges { command, json } => {
            let command = command.as_ref().unwrap_or(&RangesCommand::List);
            return ranges::execute(&load(&cli.config)?, command, *json);
        }
        Command::Pin { certificate } => say(&gate::pin(certificate)?)?,
        Command::Snippet {
            server, own_mtls, ..
        } => {
            let pairing = match own_mtls {
                true => Pairing::OwnMtls,
                false => Pairing::BehindGate,
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
        Ok(config) => config.paths,
        Err(error) => {
            complain(&format!(
                "pullgate: {}; its [paths] are used, unless others may write them",
                chain(&error)
            ));
            salvage_paths(file)
        }
    }
}

/// The exit code of an error: sysexits.h.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<ConfigError>() {
        return EX_CONFIG;
    }
    if let Some(error) = error.downcast_ref::<LoadError>() {
        return error.exit_code();
    }
    if let Some(error) = error.downcast_ref::<ExplainError>() {
        return error.exit_code();
    }
    if let Some(error) = error.downcast_ref::<XdpError>() {
        return error.exit_code();
    }
    if let Some(error) = error.downcast_ref::<ControlError>() {
        return error.exit_code();
    }
    if let Some(error) = error.downcast_ref::<SnapshotError>() {
        return error.exit_code();
    }
    let start = error.downcast_ref::<StartError>();
    start.map_or(EX_SOFTWARE, StartError::exit_code)
}
