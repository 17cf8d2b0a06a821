//! pullgate: arguments → configuration → command → exit code.
#![forbid(unsafe_code)]

use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context as _;
use clap::Parser as _;
use clap::error::ErrorKind;
use pullgate::cli::{Cli, Command, LogFormat, Pairing, RangesCommand};
use pullgate::config::{Config, ConfigError, Paths};
use pullgate::daemon::{self, LoadError, OwnConnection, Power, StartError, load};
use pullgate::explain::{self, ExplainError};
use pullgate::ranges::export::export;
use pullgate::report::{EX_CONFIG, EX_SOFTWARE, EX_USAGE, chain};
use pullgate::snapshot::{self, SnapshotError};
use pullgate::snippet::snippet;
use pullgate::telemetry::journal::Journal;
use pullgate::xdp::{self, XdpError};
use pullgate::{file, gate, listing, refresh};
use serde::Serialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return explain_usage(&error),
    };
    start_logging(cli.log_format);
    match execute(&cli) {
        Ok(code) => code,
        Err(error) => {
            complain(&format!("pullgate: {error:#}"));
            ExitCode::from(exit_code(&error))
        }
    }
}

fn execute(cli: &Cli) -> anyhow::Result<ExitCode> {
    match &cli.command {
        Command::Run {
            only,
            confirm,
            yes,
            listen_fd,
            unconfined,
            child_of,
        } => {
            let options = daemon::Options {
                only: *only,
                trial: *confirm,
                own_connection: if *yes {
                    OwnConnection::Cut
                } else {
                    OwnConnection::Refuse
                },
                listen_fds: listen_fd.clone(),
                power: if *unconfined {
                    Power::AsGiven
                } else {
                    Power::AsNeeded
                },
                child_of: *child_of,
                log_format: cli.log_format,
            };
            daemon::run(&cli.config, &options)?;
        }
        Command::Confirm => {
            daemon::confirm(&paths(&cli.config))?;
            say("confirmed: the filter stays in force")?;
        }
        Command::Explain(packet) => {
            let config = load(&cli.config)?;
            let stay = daemon::stay(&config.paths);
            let explanation = explain::explain(&config, packet, stay)?;
            show(&explanation, packet.json)?;
        }
        Command::Check { only } => {
            let checked = daemon::check(&load(&cli.config)?, *only)?;
            for warning in checked.warnings {
                complain(&format!("warning: {warning}"));
            }
            for content in checked.contents {
                say(&content.to_string())?;
            }
            if !checked.failures.is_empty() {
                for failure in checked.failures {
                    complain(&format!("pullgate: {failure}"));
                }
                return Ok(ExitCode::FAILURE);
            }
            say(&format!("{}: OK", cli.config.display()))?;
        }
        Command::Reload { only } => {
            daemon::reload(&paths(&cli.config), *only)?;
            say(&format!("{}: in force", cli.config.display()))?;
        }
        Command::Status { json } => {
            let report = match load(&cli.config) {
                Ok(config) => daemon::status(&config)?,
                Err(error) => {
                    let paths = daemon::salvage_paths(&cli.config);
                    daemon::status_without(&paths, &error)?
                }
            };
            show(&report, *json)?;
            if !report.protected {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Ranges { command, json } => {
            let command = command.as_ref().unwrap_or(&RangesCommand::List);
            return ranges(&load(&cli.config)?, command, *json);
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
        Command::Unload => unload(&paths(&cli.config))?,
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
            daemon::salvage_paths(file)
        }
    }
}

fn ranges(config: &Config, command: &RangesCommand, json: bool) -> anyhow::Result<ExitCode> {
    let in_force = || match snapshot::load(&config.paths.snapshot(), &config.ranges) {
        Ok(in_force) => Ok(in_force),
        // As a role does that starts now.
        Err(error @ SnapshotError::Corrupt { .. }) => {
            let text = chain(&error);
            complain(&format!("pullgate: {text}; going by the embedded baseline"));
            snapshot::baseline(&config.ranges)
        }
        Err(error) => Err(error),
    };
    match command {
        RangesCommand::List => show_all(&listing::list(&in_force()?), json)?,
        RangesCommand::Show { address } => {
            let shown = listing::show(&config.ranges, &in_force()?, *address);
            show(&shown, json)?;
            if !shown.enters {
                return Ok(ExitCode::FAILURE);
            }
        }
        RangesCommand::Diff => {
            let runtime = tokio::runtime::Runtime::new().context("threads")?;
            let now = SystemTime::now();
            let previews = runtime.block_on(refresh::preview(&config.ranges, &in_force()?, now));
            runtime.shutdown_background();
            show_all(&previews, json)?;
            let works = |source: &str| {
                let mut ways = previews.iter().filter(|preview| preview.source == source);
                ways.any(|way| way.error.is_none())
            };
            if !previews.iter().all(|preview| works(&preview.source)) {
                return Ok(ExitCode::FAILURE);
            }
        }
        RangesCommand::Refresh => {
            let refreshed = daemon::refresh(&config.paths)?;
            if refreshed.is_empty() && !json {
                say("there is no source to ask: `ranges.static` alone is in force")?;
            }
            show_all(&refreshed, json)?;
            if refreshed.iter().any(|refresh| refresh.error.is_some()) {
                return Ok(ExitCode::FAILURE);
            }
        }
        RangesCommand::Approve { id, dry_run } => {
            let held = daemon::held(&config.paths, id)?;
            show_all(&held, json)?;
            if !dry_run {
                daemon::approve(&config.paths, &held)?;
                if !json {
                    say(
                        "taken in: what is added is in force, what is removed goes after its grace",
                    )?;
                }
            }
        }
        RangesCommand::Export { language } => {
            let text = export(in_force()?.set(), *language);
            print(&text)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(value: &(impl Display + Serialize), json: bool) -> anyhow::Result<()> {
    match json {
        true => say(&serde_json::to_string_pretty(value)?),
        false => say(value.to_string().trim_end()),
    }
}

fn show_all(values: &[impl Display + Serialize], json: bool) -> anyhow::Result<()> {
    if json {
        return say(&serde_json::to_string_pretty(values)?);
    }
    values.iter().try_for_each(|value| say(&value.to_string()))
}

fn unload(paths: &Paths) -> anyhow::Result<()> {
    if daemon::end_trial(paths)? {
        say("the filter that was on trial is gone, and its role has ended")?;
    }
    let removed = xdp::unload(&paths.bpf)?;
    match removed.is_empty() {
        true => say("nothing was loaded")?,
        false => {
            for pin in removed {
                say(&format!("removed {}", pin.display()))?;
            }
            say("the filter is detached: strangers' packets reach this host again")?;
        }
    }
    // Else the next boot would filter what may lead elsewhere by then.
    let path = paths.uplinks();
    file::remove(&path).with_context(|| {
        format!(
            "the remembered uplinks are not forgotten; remove {} by hand",
            path.display()
        )
    })
}

fn exit_code(error: &anyhow::Error) -> u8 {
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
    if let Some(error) = error.downcast_ref::<SnapshotError>() {
        return error.exit_code();
    }
    let start = error.downcast_ref::<StartError>();
    start.map_or(EX_SOFTWARE, StartError::exit_code)
}

fn explain_usage(error: &clap::Error) -> ExitCode {
    // Nothing can be done if standard output or error is closed.
    let printed = error.print().is_ok();
    let asked_for = matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    );
    if asked_for && printed {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EX_USAGE)
    }
}

fn start_logging(format: Option<LogFormat>) {
    let wanted = std::env::var("PULLGATE_LOG").unwrap_or_default();
    let wanted = match wanted.trim() {
        "" => "info".to_owned(),
        _ => wanted,
    };
    let (filter, refused) = match EnvFilter::try_new(&wanted) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let builder = tracing_subscriber::fmt()
        .with_target(false)
        .log_internal_errors(false)
        .with_writer(|| Undisturbed(io::stderr()));
    match format.unwrap_or_else(log_format) {
        LogFormat::Text => builder.with_env_filter(filter).with_ansi(false).init(),
        LogFormat::Json => {
            let json = builder.with_env_filter(filter).json();
            json.flatten_event(true).init();
        }
        LogFormat::Journald => match Journal::open() {
            Ok(journal) => tracing_subscriber::registry()
                .with(filter)
                .with(journal)
                .init(),
            Err(error) => {
                builder.with_env_filter(filter).with_ansi(false).init();
                tracing::warn!(id = "journal-missing", %error, "the journal is not there, so this is text");
            }
        },
    }
    if let Some(error) = refused {
        tracing::warn!(
            id = "log-level-invalid",
            %error,
            wanted,
            "PULLGATE_LOG is not understood, so the level is `info`"
        );
    }
}

/// What standard error leads to: systemd.exec(5), `$JOURNAL_STREAM`.
fn log_format() -> LogFormat {
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let is_journal = rustix::fs::fstat(io::stderr())
        .is_ok_and(|stderr| stream == format!("{}:{}", stderr.st_dev, stderr.st_ino));
    match is_journal {
        true => LogFormat::Journald,
        false => LogFormat::Text,
    }
}

/// A log that nobody reads any more, because the terminal is gone, must not end what it tells of.
struct Undisturbed(io::Stderr);

impl Write for Undisturbed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write_all(bytes).ok();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().ok();
        Ok(())
    }
}

fn say(text: &str) -> anyhow::Result<()> {
    print(&format!("{text}\n"))
}

/// Who has read enough closes the pipe; what was to be done is done all the same.
fn print(text: &str) -> anyhow::Result<()> {
    // A role that was taken over must not steer the terminal of who asks it.
    let is_odd = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    let text = text.replace(is_odd, "\u{fffd}");
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome.context("standard output"),
    }
}

fn complain(text: &str) {
    // Nobody is left to tell if this fails.
    writeln!(io::stderr(), "{text}").ok();
}
