//! Development commands: `cargo xtask <command>`, one file each.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod arm64;
mod bench;
mod build;
mod check;
mod dist;
mod exec;
mod fuzz;
mod ranges_baseline;
mod run;
mod setup;
mod test;
mod vm;

/// What there is to do with this workspace.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing: toolchain components, bpf-linker, Debian packages.
    Setup,
    /// Measure the filter or the gate against what others use.
    Bench(bench::Options),
    /// Build `pullgate` with its XDP program inside.
    Build(build::Options),
    /// Package `pullgate`: a Debian package, and a static tarball.
    Dist(dist::Options),
    /// Let a fuzzer look for an input that a target fails on.
    Fuzz(fuzz::Options),
    /// Rewrite the ranges that are embedded, from a file or URL, and show what changes.
    RangesBaseline(ranges_baseline::Options),
    /// Start the lab: a protected origin, an edge and a stranger in network namespaces.
    Run(run::Options),
    /// Run every test: on the host, in the kernel, and in network namespaces.
    Test(test::Options),
    /// What CI runs: formatting, lints, documentation, tests, and the lab once.
    Check,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Setup => setup::run(),
        Command::Bench(options) => bench::run(&options),
        Command::Build(options) => build::run(&options),
        Command::Dist(options) => dist::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::RangesBaseline(options) => ranges_baseline::run(&options),
        Command::Run(options) => run::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Check => check::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            exec::say(&format!("xtask: {error:#}"));
            let code = error.downcast_ref::<exec::Exit>();
            code.map_or(ExitCode::FAILURE, |exit| ExitCode::from(exit.0))
        }
    }
}
