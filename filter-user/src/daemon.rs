//! The composition root: configuration in, running roles out. Nobody imports it but `main`.
//!
//! Start-up has two halves. The first looks and touches nothing: interfaces, capabilities,
//! certificates, snapshot. Only when all of that is in order are sockets bound and packets
//! dropped, the filter first.

mod error;
mod gate;
mod plan;
mod tasks;
mod view;

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tracing::{info, warn};

pub use self::error::StartError;
use self::gate::GateRole;
use self::plan::Plan;
use self::tasks::Tasks;
use crate::cli::Role;
use crate::config::Config;
use crate::telemetry::Metrics;
use crate::telemetry::status::{Report, Status};
use crate::xdp::{self, Filter};

/// Checks a configuration and every file that it names, as `run` would, and changes nothing.
///
/// # Errors
///
/// Returns the first thing that would keep a role from starting.
pub fn check(config: &Config) -> Result<(), StartError> {
    plan::examine(config, &described(config), &Metrics::default())?;
    Ok(())
}

/// Runs roles until SIGTERM or SIGINT, then lets connections drain.
///
/// # Errors
///
/// Returns what kept a role from starting, before anything on the host but the directories for
/// state and sockets has changed; or that a role has failed while it ran.
pub async fn run(config: Config, only: Option<Role>) -> Result<(), StartError> {
    let plan = Plan::new(config, only)?;
    // Before anybody is told that we are ready, who may then send one at once.
    let signals = Signals::new().map_err(|source| StartError::Signals { source })?;
    let tasks = Tasks::default();
    let running = plan.start(&tasks)?;

    notify_ready(&running);
    let outcome = tokio::select! {
        () = signals.wait_for_stop(&running.wake) => Ok(()),
        () = tasks.failed() => Err(StartError::TaskEnded),
    };
    info!("stopping");
    tasks.stop();
    if let Some(gate) = &running.gate {
        gate.drain().await;
    }
    tasks.wait().await;
    outcome
}

/// Asks every role that the configuration describes for its status.
#[must_use]
pub fn status(config: &Config) -> Report {
    let mut report = Report {
        protected: true,
        warnings: Vec::new(),
        roles: Vec::new(),
    };
    for role in described(config) {
        match ask(&socket(config, role)) {
            Ok(status) => {
                let prefix = role.label();
                let warnings = status.warnings.iter();
                report
                    .warnings
                    .extend(warnings.map(|warning| format!("{prefix}: {warning}")));
                report.protected &= status.enforcing;
                report.roles.push(status);
            }
            Err(error) => {
                report.protected = false;
                report.warnings.push(absent(config, role, &error));
            }
        }
    }
    report
}

/// Why a role has no status, and what that means.
fn absent(config: &Config, role: Role, error: &io::Error) -> String {
    let label = role.label();
    if error.kind() == io::ErrorKind::PermissionDenied {
        return format!("{label}: its socket may not be opened by this user; try as root");
    }
    let mut text = format!("{label}: not running ({error})");
    if role == Role::Filter && xdp::is_loaded(&config.paths.bpf) {
        text.push_str("; its pinned program goes on dropping by the ranges of its last moment");
    }
    text
}

fn ask(socket: &Path) -> io::Result<Status> {
    let stream = std::os::unix::net::UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(std::time::Duration::from_secs(5)))?;
    Ok(serde_json::from_reader(io::BufReader::new(stream))?)
}

/// The roles that the configuration describes.
fn described(config: &Config) -> Vec<Role> {
    let is_described = |role: &Role| match role {
        Role::Filter => config.filter.is_some(),
        Role::Ranges => true,
        Role::Gate => config.gate.is_some(),
    };
    Role::ALL.into_iter().filter(is_described).collect()
}

/// What `run` holds on to.
struct Running {
    sockets: Sockets,
    /// Notified to refresh the ranges at once.
    wake: Arc<Notify>,
    gate: Option<GateRole>,
}

/// The status sockets' paths, removed when dropped.
#[derive(Default)]
struct Sockets(Vec<PathBuf>);

impl Drop for Sockets {
    fn drop(&mut self) {
        for socket in &self.0 {
            if let Err(error) = std::fs::remove_file(socket) {
                warn!(socket = %socket.display(), %error, "socket not removed");
            }
        }
    }
}

fn socket(config: &Config, role: Role) -> PathBuf {
    config.paths.run.join(format!("{}.sock", role.label()))
}

fn lock(filter: &Mutex<Filter>) -> MutexGuard<'_, Filter> {
    // A panic while publishing leaves the old generation in use, which is still right.
    filter
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The signals that mean something to us.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Returns at SIGTERM or SIGINT; SIGHUP asks for a refresh of the ranges.
    async fn wait_for_stop(mut self, wake: &Notify) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.hang_up.recv() => wake.notify_one(),
            }
        }
    }
}

/// sd_notify(3): tells whoever started us that all roles are up.
fn notify_ready(running: &Running) {
    info!(roles = running.sockets.0.len(), "ready");
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let sent =
        UnixDatagram::unbound().and_then(|socket| socket.send_to(b"READY=1", Path::new(&path)));
    if let Err(error) = sent {
        warn!(%error, "the service manager was not told that we are ready");
    }
}
