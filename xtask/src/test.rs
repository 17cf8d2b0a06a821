//! `cargo xtask test`: everything, and an account of what ran and what was skipped.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::build::with_object;
use crate::exec::{as_root, exec, is_root, root, say, shown};
use crate::{arm64, dist, setup, vm};

/// What to test.
#[derive(Args, Default)]
pub(crate) struct Options {
    /// Only tests whose name contains this.
    filter: Option<String>,
    /// Repeat what is a matter of chance many times: takes half an hour. With `--vm`: 100,000 idle connections, too.
    #[arg(long)]
    long: bool,
    /// Instead of the tests on this host: boot these kernels of `tests/vm/kernels` in virtual machines,
    /// or all of them, and install, enforce and reboot there.
    #[arg(long, value_name = "KERNEL", num_args = 0..)]
    vm: Option<Vec<String>>,
    /// Instead of the tests on this host: build the arm64 package, and run it on Debian's arm64 kernel
    /// in a virtual machine.
    #[arg(long, conflicts_with = "vm")]
    arm64: bool,
    /// With `--vm`: only what CI does.
    #[arg(long, requires = "vm")]
    short: bool,
}

impl Options {
    /// The command that runs all tests.
    fn all(&self, skips: &Path) -> anyhow::Result<Command> {
        let mut test = with_object(&["test", "--workspace", "--no-fail-fast"])?;
        if !is_root() {
            // Compiled as the developer, run as root.
            test.env(
                "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER",
                AS_ROOT.join(" "),
            );
        }
        self.pass_on(&mut test, skips);
        Ok(test)
    }

    /// The command that runs the tests of one binary.
    fn one(&self, binary: &Path, skips: &Path) -> Command {
        let mut test = if is_root() {
            Command::new(binary)
        } else {
            let mut sudo = Command::new(AS_ROOT[0]);
            sudo.args(&AS_ROOT[1..]).arg(binary);
            sudo
        };
        test.current_dir(root().join("tests"));
        self.pass_on(&mut test, skips);
        test
    }

    fn pass_on(&self, test: &mut Command, skips: &Path) {
        test.args(&self.filter).env("PULLGATE_SKIPS", skips);
        if self.long {
            test.env("PULLGATE_LONG", "1");
        }
    }

    /// What CI boots.
    pub(crate) fn short_vm() -> Self {
        Self {
            vm: Some(vec!["6.1".to_owned(), "6.12".to_owned()]),
            short: true,
            ..Self::default()
        }
    }
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    setup::run()?;
    if let Some(kernels) = &options.vm {
        return boot(kernels, options);
    }
    let skips = root().join("target/skipped-tests");
    if skips.exists() {
        fs::remove_file(&skips).context("target/skipped-tests")?;
    }

    if options.arm64 {
        return arm64::test();
    }

    build()?;
    let mut tally = Tally::default();
    tally.count(&mut options.all(&skips)?)?;
    say("What the gate does, with connections steered to it:");
    for binary in gate_binaries()? {
        let mut test = options.one(&binary, &skips);
        tally.count(test.env("PULLGATE_PAIRING", "steered"))?;
    }

    let skipped = fs::read_to_string(&skips).unwrap_or_default();
    for skip in skipped.lines() {
        say(&format!("SKIPPED {skip}"));
    }
    let Tally {
        passed,
        failed,
        ignored,
    } = tally;
    say(&format!(
        "{passed} passed, {failed} failed, {} skipped",
        ignored + skipped.lines().count()
    ));
    if failed != 0 {
        bail!("{failed} tests failed");
    }
    Ok(())
}

/// Builds everything, and packages it.
fn build() -> anyhow::Result<()> {
    exec(&mut with_object(&[
        "build",
        "--workspace",
        "--all-targets",
    ])?)?;
    dist::for_tests()
}

/// The tests of the gate, which hold in both pairings. Built by what builds all of them: for a part of them, cargo
/// chooses other features of what they depend on, and builds that once more.
fn gate_binaries() -> anyhow::Result<Vec<PathBuf>> {
    let mut build = with_object(&["test", "--workspace", "--no-run", "--message-format=json"])?;
    let output = build.stderr(Stdio::inherit()).output();
    let output = output.with_context(|| shown(&build))?;
    let mut binaries = Vec::new();
    for message in serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>() {
        let message = message.with_context(|| shown(&build))?;
        let name = message["target"]["name"].as_str().unwrap_or_default();
        let is_test = message["target"]["kind"] == json!(["test"]);
        if let (true, true, Some(path)) = (
            is_test,
            name.starts_with("gate"),
            message["executable"].as_str(),
        ) {
            binaries.push(PathBuf::from(path));
        }
    }
    if !output.status.success() || binaries.is_empty() {
        bail!("{} named no test of the gate", shown(&build));
    }
    Ok(binaries)
}

/// Boots kernels, and lets them judge.
fn boot(kernels: &[String], options: &Options) -> anyhow::Result<()> {
    build()?;
    let ready = vm::prepare(kernels)?;
    let mut command = as_root(Command::new(root().join("target/debug/vm")));
    command.arg("--machines").arg(root().join("target/vm"));
    if options.short {
        command.arg("--short");
    }
    if options.long {
        command.arg("--long");
    }
    if let Some(filter) = &options.filter {
        command.args(["--only", filter]);
    }
    exec(command.args(ready))
}

/// How many tests ran.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    ignored: usize,
}

impl Tally {
    /// Runs a test command, shows its output, and counts its tests.
    fn count(&mut self, command: &mut Command) -> anyhow::Result<()> {
        let before = self.failed;
        command.stdout(Stdio::piped());
        say(&format!("+ {}", shown(command)));
        let mut child = command.spawn().context("cargo test")?;
        let output = child.stdout.take().context("standard output")?;
        for line in BufReader::new(output).lines() {
            let line = line.context("standard output")?;
            say(&line);
            if line.starts_with("test ") && !line.starts_with("test result") {
                self.passed += usize::from(line.ends_with("... ok"));
                self.failed += usize::from(line.ends_with("... FAILED"));
                self.ignored += usize::from(line.contains("... ignored"));
            }
        }
        let status = child.wait().context("cargo test")?;
        if !status.success() && self.failed == before {
            bail!("{} did not run: {status}", shown(command));
        }
        Ok(())
    }
}

/// How tests become root, with what they are set by.
const AS_ROOT: [&str; 2] = [
    "sudo",
    "--preserve-env=PULLGATE_SKIPS,PULLGATE_LONG,PULLGATE_PAIRING",
];
