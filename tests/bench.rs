//! The benchmarks: everything in one run, interleaved, as ratios.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "the table is what it is for")]
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the benchmark")]

#[path = "bench/busy.rs"]
mod busy;
#[path = "bench/cpu.rs"]
mod cpu;
#[path = "bench/filter.rs"]
mod filter;
#[path = "bench/floor.rs"]
mod floor;
#[path = "bench/forged.rs"]
mod forged;
#[path = "bench/gate.rs"]
mod gate;
#[path = "bench/load.rs"]
mod load;
#[path = "bench/pairings.rs"]
mod pairings;
#[path = "bench/report.rs"]
mod report;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Benchmarks, each of which prints a table and writes JSON.
#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Subcommand)]
enum Subject {
    /// The packet filter.
    Filter {
        /// Where to write the numbers, besides `target/bench/filter.json`.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Gate and web server together, in each pairing.
    Pairings {
        /// Where to write the numbers, besides `target/bench/pairings.json`.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// The gate.
    Gate {
        /// Where to write the numbers, besides `target/bench/gate.json`.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Only servers whose name contains this.
        #[arg(long, default_value = "")]
        only: String,
        /// Rounds of each measurement.
        #[arg(long, default_value_t = 5)]
        rounds: u32,
        /// Only this measurement.
        #[arg(long, value_enum, default_value_t = gate::Part::All)]
        part: gate::Part,
    },
}

fn main() {
    match Options::parse().subject {
        Subject::Filter { json } => filter::run(json.as_deref()),
        Subject::Pairings { json } => pairings::run(json.as_deref()),
        Subject::Gate {
            json,
            only,
            rounds,
            part,
        } => gate::run(&gate::Options {
            json,
            only,
            rounds,
            part,
        }),
    }
}
