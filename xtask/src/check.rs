//! `cargo xtask check`: what CI runs, in one command. With the kernels in virtual machines it takes
//! half an hour at most.

use std::process::Command;

use crate::build::{bpf_cargo, with_object};
use crate::exec::{cargo, exec, root, say};
use crate::{run, setup, test};

pub(crate) fn run() -> anyhow::Result<()> {
    setup::run()?;
    exec(&mut cargo(&["fmt", "--all", "--check"]))?;
    let deny = ["--", "--deny", "warnings"];
    let clippy = ["clippy", "--workspace", "--all-targets"];
    exec(with_object(&clippy)?.args(deny))?;
    exec(bpf_cargo(&["clippy", "--bins"])?.args(deny))?;
    exec(
        with_object(&[
            "doc",
            "--workspace",
            "--no-deps",
            "--document-private-items",
        ])?
        .env("RUSTDOCFLAGS", "--deny warnings"),
    )?;
    dependencies()?;
    test::run(&test::Options::default())?;
    test::run(&test::Options::short_vm())?;
    run::check()
}

/// Licences, sources and bans; advisories where their database can be reached.
fn dependencies() -> anyhow::Result<()> {
    setup::cargo_deny()?;
    let cargo_deny = |arguments: &[&str]| {
        let mut command = Command::new(root().join("target/tools/bin/cargo-deny"));
        command.current_dir(root()).args(arguments);
        command
    };
    exec(&mut cargo_deny(&["check", "bans", "licenses", "sources"]))?;
    if exec(&mut cargo_deny(&["fetch", "db"])).is_err() {
        say("SKIPPED advisories: their database cannot be reached");
        return Ok(());
    }
    exec(&mut cargo_deny(&["check", "advisories"]))
}
