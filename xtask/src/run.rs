//! `cargo xtask run`: the lab, or the development build of pullgate itself.

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
    /// Run `pullgate` with these arguments instead of the lab.
    #[arg(last = true)]
    arguments: Vec<String>,
}

impl Options {
    /// The lab, once.
    pub(crate) fn once() -> Self {
        Self {
            once: true,
            arguments: Vec::new(),
        }
    }
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    setup::run()?;
    exec(&mut with_object(&["build", "--workspace"])?)?;
    let binaries = root().join("target/debug");
    if !options.arguments.is_empty() {
        return exec(as_root(Command::new(binaries.join("pullgate"))).args(&options.arguments));
    }
    let mut lab = as_root(Command::new(binaries.join("lab")));
    if options.once {
        lab.arg("--once");
    }
    exec(&mut lab)
}
