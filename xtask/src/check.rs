//! `cargo xtask check`: what CI runs, in one command. With the kernels in virtual machines it takes
//! half an hour at most.

use crate::build::{bpf_cargo, with_object};
use crate::exec::{cargo, exec};
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
    test::run(&test::Options::default())?;
    test::run(&test::Options::short_vm())?;
    run::run(&run::Options::once())
}
