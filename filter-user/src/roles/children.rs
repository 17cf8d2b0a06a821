//! Roles in processes of their own: what root starts by hand where each role has its own user.
//!
//! ```text
//! run ─▶ run --only gate | ranges | filter: becomes its user ─▶ prints a line when it is ready
//! ```
//! The filter is the last, so that a gate that cannot start leaves the host as it was. No role outlives
//! the process that has started it, which does nothing but wait and pass signals on: an
//! instruction goes to the control socket of the role that it is for.

use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::{ExitStatusExt as _, parent_id};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{
    Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, set_parent_process_death_signal,
};
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::signals::{Blocked, ProcessSignal, Signals};
use super::{FAREWELL, Options, OwnConnection, StartError};
use crate::config::Config;
use crate::host::sandbox;
use crate::host::systemd;
use crate::role::Role;

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
    blocked: Blocked,
) -> Result<(), StartError> {
    // What a service manager has for one process is for one role.
    let is_for_one = systemd::announced() > 0 || systemd::watchdog().is_some();
    if is_for_one || !options.listen_fds.is_empty() {
        return Err(StartError::OneProcessExpected);
    }
    if options.trial.is_some() && !roles.contains(&Role::Filter) {
        return Err(StartError::TrialWithoutFilter);
    }
    let drain_timeout = config.live.gate.as_ref().map(|gate| gate.drain_timeout);
    let farewell = drain_timeout.unwrap_or_default() + FAREWELL;
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|source| StartError::Workers { source })?;
    runtime.block_on(async {
        let signals = blocked.handle();
        let mut signals = signals.map_err(|source| StartError::Signals { source })?;
        let mut children = Children::default();
        let outcome = children.watch((file, roles, options), &mut signals).await;
        info!(id = "stopping", "stopping");
        systemd::stopping(farewell);
        let end = children.end(farewell).await;
        // The one that has ended first is the cause.
        outcome.and(end)
    })
}

/// Lets this process end when its parent does; returns whether that is still there.
pub(super) fn end_with(parent: u32) -> bool {
    if let Err(error) = set_parent_process_death_signal(Some(Signal::TERM)) {
        warn!(
            id = "parent-death-not-signalled",
            %error,
            "this role may outlive the process that has started it"
        );
    }
    parent_id() == parent
}

/// Tells the parent that this role is ready.
pub(super) fn tell_ready() {
    let mut output = io::stdout();
    if let Err(error) = output.write_all(b"ready\n").and_then(|()| output.flush()) {
        warn!(
            id = "ready-not-reported",
            %error,
            "the process that has started this role does not hear that it is ready"
        );
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
        signals: &mut Signals,
    ) -> Result<(), StartError> {
        tokio::select! {
            started = self.start(file, roles, options) => started?,
            () = wait_for_stop(signals) => return Ok(()),
        }
        info!(
            id = "roles-ready",
            roles = roles.len(),
            "all roles are ready"
        );
        systemd::ready();
        loop {
            let heard = tokio::select! {
                heard = signals.next() => heard,
                ended = self.next_end() => return ended,
            };
            match heard {
                ProcessSignal::Stop => return Ok(()),
                ProcessSignal::Reload => self.signal(Signal::HUP),
            }
        }
    }

    /// Starts one after the other, each when the one before it is ready.
    async fn start(
        &mut self,
        file: &Path,
        roles: &[Role],
        options: &Options,
    ) -> Result<(), StartError> {
        for role in ORDER.into_iter().filter(|role| roles.contains(role)) {
            let blame = |source| StartError::Child { role, source };
            let command = command(file, role, options).map_err(blame);
            let mut process = command?.spawn().map_err(blame)?;
            let number = process.id().and_then(|id| Pid::from_raw(id.cast_signed()));
            let number = number.ok_or_else(|| blame(io::ErrorKind::NotFound.into()))?;
            let descriptor = pidfd_open(number, PidfdFlags::empty());
            let descriptor = descriptor.map_err(|errno| blame(errno.into()))?;
            let output = process.stdout.take();
            self.processes.push((role, descriptor));
            self.running
                .spawn(async move { (role, process.wait().await) });
            let readiness = async {
                match output {
                    Some(mut output) => output.read_u8().await.is_ok(),
                    None => false,
                }
            };
            // Another may end meanwhile.
            let is_ready = tokio::select! {
                is_ready = readiness => is_ready,
                ended = self.next_end() => return ended.and(Err(StartError::TaskEnded)),
            };
            if !is_ready {
                return self.next_end().await.and(Err(StartError::TaskEnded));
            }
        }
        // What is left to do needs no more power.
        Ok(sandbox::keep_signalling()?)
    }

    /// Signals all processes.
    fn signal(&self, signal: Signal) {
        for (role, process) in &self.processes {
            match pidfd_send_signal(process, signal) {
                // It has ended.
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => warn!(
                    id = "signal-not-forwarded",
                    role = role.label(),
                    %error,
                    "signal not passed on"
                ),
            }
        }
    }

    /// Waits until one has ended, and returns an error if not well.
    async fn next_end(&mut self) -> Result<(), StartError> {
        let (role, ended) = match self.running.join_next().await {
            Some(Ok(ended)) => ended,
            Some(Err(_)) => return Err(StartError::TaskEnded),
            None => return Ok(()),
        };
        match ended {
            Ok(status) if status.success() => {
                info!(id = "role-ended", role = role.label(), "role has ended");
                Ok(())
            }
            Ok(status) => Err(StartError::RoleEnded { role, status }),
            Err(source) => Err(StartError::Child { role, source }),
        }
    }

    /// Lets all end, and returns the first failure. One that takes too long is killed.
    async fn end(mut self, farewell: Duration) -> Result<(), StartError> {
        self.signal(Signal::TERM);
        let deadline = tokio::time::sleep(farewell);
        tokio::pin!(deadline);
        let mut outcome = Ok(());
        while !self.running.is_empty() {
            tokio::select! {
                ended = self.next_end() => match ended {
                    // One that had no ear for it yet.
                    Err(StartError::RoleEnded { status, .. })
                        if status.signal() == Some(Signal::TERM.as_raw()) => {}
                    ended => outcome = outcome.and(ended),
                },
                () = &mut deadline, if !deadline.is_elapsed() => {
                    warn!(id = "roles-killed", "killing the roles that have not ended");
                    self.signal(Signal::KILL);
                }
            }
        }
        outcome
    }
}

/// Returns at a signal to stop. A role that is still to start reads its configuration anyway.
async fn wait_for_stop(signals: &mut Signals) {
    while signals.next().await != ProcessSignal::Stop {}
}

/// This program again, for one role.
fn command(file: &Path, role: Role, options: &Options) -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--config").arg(file).current_dir("/");
    if let Some(format) = options.log_format {
        command.args(["--log-format", format.label()]);
    }
    command.args(["run", "--only", role.label()]);
    command.args(["--child-of", &std::process::id().to_string()]);
    if let (Role::Filter, Some(time)) = (role, options.trial) {
        command.args(["--confirm", &humantime::format_duration(time).to_string()]);
    }
    if options.own_connection == OwnConnection::Drop {
        command.arg("--yes");
    }
    // A terminal's signals come to us, and from us.
    command.process_group(0).stdin(Stdio::null());
    command.stdout(Stdio::piped()).kill_on_drop(true);
    command.env_remove("NOTIFY_SOCKET");
    Ok(command)
}

const ORDER: [Role; 3] = [Role::Gate, Role::Ranges, Role::Filter];
