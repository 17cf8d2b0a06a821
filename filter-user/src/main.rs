//! pullgate: arguments → command → exit code.
#![forbid(unsafe_code)]

use std::io;
use std::process::ExitCode;

use clap::Parser as _;
use clap::error::ErrorKind;
use pullgate::cli::Cli;
use pullgate::commands::{self, output};
use pullgate::observe::log;
use pullgate::report::EX_USAGE;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return explain_usage(&error),
    };
    log::start(cli.log_format);
    match commands::execute(&cli) {
        Ok(code) => code,
        Err(failure) => {
            output::complain(&format!("pullgate: {}", failure.text));
            ExitCode::from(failure.status)
        }
    }
}

fn explain_usage(error: &clap::Error) -> ExitCode {
    let printed = error.print();
    let asked_for = matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    );
    if !asked_for {
        // Nothing can be done if standard error is closed.
        return ExitCode::from(EX_USAGE);
    }
    match printed {
        // Who has read enough closes the pipe.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => ExitCode::FAILURE,
        Ok(()) | Err(_) => ExitCode::SUCCESS,
    }
}
