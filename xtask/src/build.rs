//! `cargo xtask build`: the XDP object first, then the binary that carries it.

use std::path::PathBuf;
use std::process::Command;

use clap::Args;

use crate::exec::{cargo, exec, root, with_tools};
use crate::setup;

/// How to build.
#[derive(Args)]
pub(crate) struct Options {
    /// With optimisation, for a host to protect.
    #[arg(long)]
    release: bool,
    /// With a log line for every frame, to debug the XDP program; never for a host to protect.
    #[arg(long)]
    log: bool,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    setup::run()?;
    let features: &[&str] = if options.log {
        &["--features", "log"]
    } else {
        &[]
    };
    let mut build = with_object_of(features, &["build", "--package", "filter-user"])?;
    if options.release {
        build.arg("--release");
    }
    exec(&mut build)
}

/// A cargo command in whose environment the XDP object is named, which is built first.
pub(crate) fn with_object(arguments: &[&str]) -> anyhow::Result<Command> {
    with_object_of(&[], arguments)
}

fn with_object_of(features: &[&str], arguments: &[&str]) -> anyhow::Result<Command> {
    let object = object(features)?;
    let mut command = cargo(arguments);
    command.env("PULLGATE_XDP_OBJECT", object);
    Ok(command)
}

/// Compiles the XDP program and returns the object's path.
fn object(features: &[&str]) -> anyhow::Result<PathBuf> {
    exec(bpf_cargo(&["build", "--bins"])?.args(features))?;
    Ok(root()
        .join("target/bpf")
        .join(TARGET)
        .join("release/filter"))
}

/// A cargo command for the BPF target.
pub(crate) fn bpf_cargo(arguments: &[&str]) -> anyhow::Result<Command> {
    let mut command = cargo(arguments);
    command.args(["--package", "filter-ebpf", "--release", "--target", TARGET]);
    command.args(["-Z", "build-std=core", "--target-dir", "target/bpf"]);
    // `build-std` is not stable; this lets the pinned stable compiler take it, here only.
    command.env("RUSTC_BOOTSTRAP", "1");
    let flags = [
        "--cfg=bpf_target_arch=\"x86_64\"",
        "-Cdebuginfo=2",
        "-Clink-arg=--btf",
        // All that the kernel compiles BPF for here loads unaligned words in one instruction.
        "-Clink-arg=--cpu-features=+allows-misaligned-mem-access",
    ];
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    with_tools(&mut command)?;
    Ok(command)
}

const TARGET: &str = "bpfel-unknown-none";
