//! Child processes: each is printed before it starts, and blamed by name if it fails.

use std::ffi::OsString;
use std::fmt::{self, Display, Formatter};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

/// Ends the process with this exit code.
#[derive(Debug)]
pub(crate) struct Exit(pub(crate) u8);

impl Display for Exit {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "exit code {}", self.0)
    }
}

impl std::error::Error for Exit {}

/// Something that is needed is not there, and cannot be made here: sysexits.h.
pub(crate) const EX_UNAVAILABLE: u8 = 69;

/// Runs a command to its end.
pub(crate) fn exec(command: &mut Command) -> anyhow::Result<()> {
    say(&format!("+ {}", shown(command)));
    let status = command
        .status()
        .with_context(|| format!("cannot start {}", shown(command)))?;
    if status.success() {
        return Ok(());
    }
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(code) => Err(Exit(code)).context(shown(command)),
        None => bail!("{}: {status}", shown(command)),
    }
}

/// A command without its environment, as one would type it.
pub(crate) fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let program = program.file_name().unwrap_or(program.as_os_str());
    let words = std::iter::once(program).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}

/// Tells the developer something, on standard error.
pub(crate) fn say(text: &str) {
    // If this fails, there is no process to stop.
    drop(writeln!(io::stderr(), "{text}"));
}

/// `cargo`, the one that runs us, in the workspace's directory.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args(arguments);
    command
}

/// The same command, which finds the tools under `target/tools` first.
pub(crate) fn with_tools(command: &mut Command) -> anyhow::Result<&mut Command> {
    let mut path = OsString::from(root().join("target/tools/bin"));
    path.push(":");
    path.push(std::env::var_os("PATH").context("PATH")?);
    Ok(command.env("PATH", path))
}

/// The workspace's directory.
pub(crate) fn root() -> PathBuf {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().map(PathBuf::from).unwrap_or(manifest)
}

/// Whether this process may do what only root may.
pub(crate) fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|id| id.stdout.starts_with(b"0\n"))
}

/// The same command, through sudo if we are not root.
pub(crate) fn as_root(command: Command) -> Command {
    if is_root() {
        return command;
    }
    let mut sudo = Command::new("sudo");
    sudo.arg(command.get_program());
    sudo
}
