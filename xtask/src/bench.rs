//! `cargo xtask bench`: what the filter and the gate cost, as ratios of one run.

use std::path::PathBuf;
use std::process::Command;

use clap::{Args, Subcommand};

use crate::build::with_object;
use crate::exec::{as_root, exec, root};
use crate::setup;

/// What to measure.
#[derive(Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Subcommand)]
enum Subject {
    /// The packet filter: time per packet, packets per second, time to publish.
    Filter {
        /// Write the numbers here as well as to `target/bench/filter.json`.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// The pairings: CPU time of gate and web server together, steered, relayed, and without a gate.
    Pairings {
        /// Write the numbers here as well as to `target/bench/pairings.json`.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// The gate: CPU time per handshake, request and megabyte, how long requests take, memory per idle connection.
    Gate {
        /// Write the numbers here as well as to `target/bench/gate.json`.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    setup::run()?;
    if matches!(options.subject, Subject::Gate { .. }) {
        setup::newer_debian()?;
    }
    exec(&mut with_object(&["build", "--workspace", "--release"])?)?;
    let mut bench = as_root(Command::new(root().join("target/release/bench")));
    let (subject, json) = match &options.subject {
        Subject::Filter { json } => ("filter", json),
        Subject::Pairings { json } => ("pairings", json),
        Subject::Gate { json } => ("gate", json),
    };
    bench.arg(subject);
    if let Some(json) = json {
        bench.arg("--json").arg(json);
    }
    exec(&mut bench)
}
