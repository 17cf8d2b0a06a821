//! The commands: a parsed command line in, an exit code out. One file for each that does more than call
//! another part.

mod check;
mod doctor;
mod examination;
pub mod explain;
mod init;
mod instruct;
pub mod listing;
pub mod output;
mod probe;
mod ranges;
mod served;
pub mod snippet;
mod status;
mod surroundings;
mod unload;

use std::path::Path;
use std::process::ExitCode;

use serde_json::json;

use self::output::{complain, show, show_either};
use self::status::Detail;
use crate::cli::{Cli, Command, OutputFormat, RangesCommand, RunArgs};
use crate::config::{Paths, load, salvage_paths};
use crate::control::client;
use crate::gate;
use crate::observe::log::LogFormat;
use crate::report::{EX_USAGE, Failure, chain};
use crate::roles::{self, OwnConnection, Power};

/// Does what the command line asks for.
///
/// # Errors
///
/// Returns why it cannot be done.
pub fn execute(cli: &Cli) -> Result<ExitCode, Failure> {
    let format = cli.format();
    match &cli.command {
        Command::Run(arguments) => {
            if format == OutputFormat::Json {
                return Err(usage(RUN_AS_JSON));
            }
            roles::run(&cli.config, &options(arguments, cli.log_format))?;
        }
        Command::Init { write } => init::execute(&cli.config, *write, format)?,
        Command::Confirm => {
            client::confirm(&paths(&cli.config))?;
            let result = (
                "confirmed: the filter stays\n",
                json!({ "confirmed": true }),
            );
            show_either(result, format)?;
        }
        Command::Explain(packet) => {
            let config = load(&cli.config)?;
            let explanation = explain::explain(&config, packet)?;
            show(&explanation, format)?;
        }
        Command::Check { file, only } => {
            let file = file.as_ref().unwrap_or(&cli.config);
            return check::execute(file, *only, format);
        }
        Command::Doctor => return doctor::execute(&cli.config, format),
        Command::Probe(arguments) => return probe::execute(arguments, format),
        Command::Reload { only } => {
            return instruct::reload(&cli.config, &paths(&cli.config), *only, format);
        }
        Command::LogLevel { level, only } => {
            return instruct::set_log_level(&paths(&cli.config), *only, *level, format);
        }
        Command::Status { verbose } => {
            let detail = if *verbose {
                Detail::Full
            } else {
                Detail::Brief
            };
            return status::execute(&cli.config, detail, format);
        }
        Command::Ranges { command } => {
            let command = command.as_ref().unwrap_or(&RangesCommand::List);
            return ranges::execute(&load(&cli.config)?, command, format);
        }
        Command::Spki { certificate } => {
            let spki = gate::spki(certificate)?;
            show_either((&format!("{spki}\n"), json!({ "spki": spki })), format)?;
        }
        Command::Snippet(arguments) => snippet::execute(&cli.config, arguments, format)?,
        Command::Unload => unload::execute(&paths(&cli.config), format)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn usage(text: &str) -> Failure {
    Failure {
        text: text.to_owned(),
        status: EX_USAGE,
    }
}

/// Why there is no JSON of `run`.
const RUN_AS_JSON: &str =
    "`run` prints no result; `--log-format json` writes its log as JSON, one object per line";
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
