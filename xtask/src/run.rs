//! `cargo xtask run`: the lab, or the development build of pullgate itself.

use std::path::PathBuf;
use std::process::Command;

use clap::Args;

use crate::build::with_object;
use crate::exec::{as_root, exec, root};
use crate::setup;

/// What to run.
#[derive(Args)]
pub(crate) struct Options {
    /// Play the scenarios and exit: 0 only if every row is as expected.
    #[arg(long)]
    once: bool,
    /// With a web server that keeps port 443, and a gate that connections are steered to.
    #[arg(long)]
    steer: bool,
    /// Run `pullgate` with these arguments instead of the lab.
    #[arg(last = true)]
    arguments: Vec<String>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    setup::run()?;
    exec(&mut with_object(&["build", "--workspace"])?)?;
    if !options.arguments.is_empty() {
        return exec(as_root(Command::new(binary("pullgate"))).args(&options.arguments));
    }
    let mut lab = as_root(Command::new(binary("lab")));
    if options.once {
        lab.arg("--once");
    }
    if options.steer {
        lab.arg("--steer");
    }
    exec(&mut lab)
}

/// The lab in both pairings, once each, as the tests have built it.
pub(crate) fn check() -> anyhow::Result<()> {
    for pairing in [&["--once"][..], &["--once", "--steer"]] {
        exec(as_root(Command::new(binary("lab"))).args(pairing))?;
    }
    Ok(())
}

fn binary(name: &str) -> PathBuf {
    root().join("target/debug").join(name)
}
