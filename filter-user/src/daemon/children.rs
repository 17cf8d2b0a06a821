//! Roles in processes of their own: what root starts by hand where each role has its own user.
//!
//! ```text
//! run ─▶ run --only gate | ranges | filter: becomes its user ─▶ prints a line when it is ready
//! ```
//! The filter is the last, so that a gate that cannot start leaves the host as it was. No role outlives
//! the process that has started it, which does nothing but wait and pass signals on.

use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::parent_id;
use std::path::Path;
use std::process::{ExitStatus, Stdio};

use clap::ValueEnum as _;
use nix::sys::signal::SigSet;
use rustix::process::{
    Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, set_parent_process_death_signal,
};
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::runtime::Builder;
use tokio::signal::unix::{Signal as Signals, SignalKind, signal as listen_for};
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::{Options, OwnConnection, StartError, no_signals, notify, plan};
use crate::cli::Role;
use crate::config::Config;
use crate::confine;

/// Runs each role in a process of its own, until SIGTERM or SIGINT or until one of them ends.
///
/// # Errors
///
/// Returns what kept a role from starting, or which one has failed.
pub(super) fn run(
    file: &Path,
    config: &Config,
    roles: &[Role],
    options: &Options,
    early: SigSet,
) -> Result<(), StartError> {
    let is_set = |name: &&str| std::env::var_os(name).is_some();
    if !options.listen_fds.is_empty() || OF_ONE_PROCESS.iter().any(is_set) {
        return Err(StartError::OneProcessExpected);
    }
    if options.trial.is_some() && !roles.contains(&Role::Filter) {
        return Err(StartError::TrialWithoutFilter);
    }
    // What can be refused by now is refused before any of them has changed anything.
    plan::examine(config, roles)?;
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|source| StartError::Workers { source })?;
    runtime.block_on(async {
        let signals = [
            SignalKind::terminate(),
            SignalKind::interrupt(),
            SignalKind::hangup(),
        ];
        let blame = |source| StartError::Signals { source };
        let [terminate, interrupt, hang_up] = signals.map(|kind| listen_for(kind).map_err(blame));
        early.thread_unblock().map_err(no_signals)?;
        let mut children = Children::default();
        let outcome = children
            .watch(
                (file, roles, options),
                (&mut terminate?, &mut interrupt?, &mut hang_up?),
            )
            .await;
        let end = children.end().await;
        // Who has ended first is the cause.
        outcome.and(end)
    })
}

/// Lets this process end when its parent does; returns whether that is still there.
pub(super) fn end_with(parent: u32) -> bool {
    if let Err(error) = set_parent_process_death_signal(Some(Signal::TERM)) {
        warn!(%error, "this role may outlive the process that has started it");
    }
    parent_id() == parent
}

/// Tells the parent that this role is ready.
pub(super) fn tell_ready() {
    let mut output = io::stdout();
    if let Err(error) = output.write_all(b"ready\n").and_then(|()| output.flush()) {
        warn!(%error, "the process that has started this role does not hear that it is ready");
    }
}

#[derive(Default)]
struct Children {
    /// How to signal each of them: by descriptor, for a number may become another process's.
    processes: Vec<(Role, OwnedFd)>,
    /// Those that have not ended, or have ended without having been looked at.
    running: JoinSet<(Role, io::Result<ExitStatus>)>,
}

impl Children {
    /// Starts all, and returns when they shall end, or when one has.
    async fn watch(
        &mut self,
        (file, roles, options): (&Path, &[Role], &Options),
        (terminate, interrupt, hang_up): (&mut Signals, &mut Signals, &mut Signals),
    ) -> Result<(), StartError> {
        tokio::select! {
            started = self.start(file, roles, options) => started?,
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
        info!(roles = roles.len(), "all roles are ready");
        notify::ready();
        loop {
            tokio::select! {
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                _ = hang_up.recv() => self.signal(Signal::HUP),
                ended = self.next_end() => return ended,
            }
        }
    }

    /// Starts one after the other, each when the one before it is ready, until one has ended.
    async fn start(
        &mut self,
        file: &Path,
        roles: &[Role],
        options: &Options,
    ) -> Result<(), StartError> {
        for role in ORDER.into_iter().filter(|role| roles.contains(role)) {
            let blame = |source| StartError::Child { role, source };
            let mut process = command(file, role, options).spawn().map_err(blame)?;
            let number = process.id().and_then(|id| Pid::from_raw(id.cast_signed()));
            let number = number.ok_or_else(|| blame(io::ErrorKind::NotFound.into()))?;
            let descriptor = pidfd_open(number, PidfdFlags::empty());
            let descriptor = descriptor.map_err(|errno| blame(errno.into()))?;
            let output = process.stdout.take();
            self.processes.push((role, descriptor));
            self.running
                .spawn(async move { (role, process.wait().await) });
            let is_ready = match output {
                Some(mut output) => output.read_u8().await.is_ok(),
                None => false,
            };
            if !is_ready {
                return self.next_end().await.and(Err(StartError::TaskEnded));
            }
        }
        // What is left to do needs no more power.
        Ok(confine::keep_signalling()?)
    }

    fn signal(&self, signal: Signal) {
        for (role, process) in &self.processes {
            match pidfd_send_signal(process, signal) {
                // It has ended.
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => warn!(role = role.label(), %error, "signal not passed on"),
            }
        }
    }

    /// Waits until one has ended, and returns an error if not well.
    async fn next_end(&mut self) -> Result<(), StartError> {
        match self.running.join_next().await {
            Some(Ok((_, Ok(status)))) if status.success() => Ok(()),
            Some(Ok((role, Ok(status)))) => Err(StartError::RoleEnded { role, status }),
            Some(Ok((role, Err(source)))) => Err(StartError::Child { role, source }),
            Some(Err(_)) => Err(StartError::TaskEnded),
            None => Ok(()),
        }
    }

    /// Lets all end, and returns the first failure.
    async fn end(mut self) -> Result<(), StartError> {
        self.signal(Signal::TERM);
        let mut outcome = Ok(());
        while !self.running.is_empty() {
            outcome = outcome.and(self.next_end().await);
        }
        outcome
    }
}

/// This program again, for one role.
fn command(file: &Path, role: Role, options: &Options) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("pullgate").arg("--config").arg(file);
    if let Some(format) = options.log_format.and_then(|it| it.to_possible_value()) {
        command.args(["--log-format", format.get_name()]);
    }
    command.args(["run", "--only", role.label()]);
    command.args(["--child-of", &std::process::id().to_string()]);
    if let (Role::Filter, Some(time)) = (role, options.trial) {
        command.args(["--confirm", &humantime::format_duration(time).to_string()]);
    }
    if options.own_connection == OwnConnection::Cut {
        command.arg("--yes");
    }
    // A terminal's signals come to us, and from us.
    command.process_group(0).stdin(Stdio::null());
    command.stdout(Stdio::piped()).kill_on_drop(true);
    command.env_remove("NOTIFY_SOCKET");
    command
}

const ORDER: [Role; 3] = [Role::Gate, Role::Ranges, Role::Filter];
/// What a service manager has for the one process that it starts: sd_listen_fds(3),
/// sd_watchdog_enabled(3).
const OF_ONE_PROCESS: [&str; 2] = ["LISTEN_FDS", "WATCHDOG_USEC"];
