//! The commands' side of the status sockets: what running roles say of themselves, and what a filter
//! on trial is told.

use std::io::{self, BufReader, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::net::sockopt::socket_peercred;
use rustix::process::{Signal, kill_process};

use super::error::{LoadError, StartError};
use super::{described, socket};
use crate::cli::Role;
use crate::config::{Config, Paths};
use crate::refresh::IdleRanges;
use crate::report::chain;
use crate::telemetry::status::{RefreshStatus, Report, Status};
use crate::xdp::{self, Stay};

/// Asks every role that the configuration describes for its status.
#[must_use]
pub fn status(config: &Config) -> Report {
    let mut report = Report {
        protected: true,
        warnings: Vec::new(),
        roles: Vec::new(),
    };
    ask_all(&mut report, &config.paths, described(config));
    report
}

/// Asks the roles that run, where the configuration cannot tell which should.
#[must_use]
pub fn status_without(paths: &Paths, error: &LoadError) -> Report {
    let mut report = Report {
        protected: false,
        warnings: vec![format!("what should run cannot be told: {}", chain(error))],
        roles: Vec::new(),
    };
    ask_all(&mut report, paths, Role::ALL);
    report
}

fn ask_all(report: &mut Report, paths: &Paths, roles: impl IntoIterator<Item = Role>) {
    for role in roles {
        match ask(&socket(paths, role)) {
            Ok(status) => report.add(status),
            Err(error) => {
                report.protected = false;
                report.warnings.push(absent(paths, role, &error));
            }
        }
    }
}

/// Why a role has no status, and what that means.
fn absent(paths: &Paths, role: Role, error: &io::Error) -> String {
    let label = role.label();
    if error.kind() == ErrorKind::PermissionDenied {
        return format!("{label}: its socket may not be opened by this user; try as root");
    }
    let mut text = format!("{label}: not running ({error})");
    if role == Role::Filter && xdp::is_loaded(&paths.bpf) {
        text.push_str(
            "; its pinned program goes on, by the settings and ranges of its last moment",
        );
    }
    text
}

/// Confirms a filter that is on trial, and returns when it is.
///
/// # Errors
///
/// Returns why there is none, or why it is not confirmed.
pub fn confirm(paths: &Paths) -> Result<(), StartError> {
    let path = socket(paths, Role::Filter);
    if !is_on_trial(&path)? {
        return Err(StartError::NothingOnTrial);
    }
    signal(&path, Signal::USR1)?;
    for _ in 0..LOOKS {
        match ask(&path) {
            Ok(status) if on_trial(&status) => thread::sleep(LOOK),
            Ok(_) => return Ok(()),
            // The role was faster: the time was over.
            Err(_) => break,
        }
    }
    Err(StartError::NotConfirmed)
}

/// Ends a trial as if its time were over, and the role with it; returns whether there was one.
///
/// # Errors
///
/// Returns why the role cannot be told, or that it does not end.
pub fn end_trial(paths: &Paths) -> Result<bool, StartError> {
    let path = socket(paths, Role::Filter);
    if !is_on_trial(&path)? {
        return Ok(false);
    }
    signal(&path, Signal::TERM)?;
    for _ in 0..LOOKS {
        if !is_on_trial(&path)? {
            return Ok(true);
        }
        thread::sleep(LOOK);
    }
    Err(StartError::TrialGoesOn)
}

/// Who is asked from which vanished ranges no authenticated connection comes: the gate, if the host
/// has one.
pub(super) fn idle_ranges(config: &Config) -> IdleRanges {
    let gate = config
        .gate
        .as_ref()
        .map(|_| socket(&config.paths, Role::Gate));
    Arc::new(move |grace| {
        let status = ask(gate.as_deref()?);
        // One that does not answer may just be restarting, and has forgotten what it saw.
        let sightings = status.map_or_else(|_| Vec::new(), |status| status.sightings);
        let watched_enough = grace.min(WATCH_MIN);
        let idle = sightings.into_iter().filter(|sighting| {
            let seen_ago = sighting.seen_ms_ago.map(Duration::from_millis);
            Duration::from_millis(sighting.watched_ms) >= watched_enough
                && seen_ago.is_none_or(|ago| ago >= grace)
        });
        Some(idle.map(|sighting| sighting.range).collect())
    })
}

/// Lets the ranges role ask all sources now, and returns what became of that.
///
/// # Errors
///
/// Returns why it cannot be told, or that it does not come to an end.
pub fn refresh(paths: &Paths) -> Result<Vec<RefreshStatus>, StartError> {
    let before = ranges_role(paths)?;
    signal(&socket(paths, Role::Ranges), Signal::ALARM)?;
    attempted_since(paths, &before)
}

/// The sources with a list that is held.
///
/// # Errors
///
/// Returns that there is none, or why the ranges role cannot be asked.
pub fn held(paths: &Paths) -> Result<Vec<RefreshStatus>, StartError> {
    let mut held = ranges_role(paths)?;
    held.retain(|refresh| refresh.held.is_some());
    match held.is_empty() {
        true => Err(StartError::NothingHeld),
        false => Ok(held),
    }
}

/// Lets the ranges role take in what is held, and returns when it has.
///
/// # Errors
///
/// Returns why the role cannot be told, or why it has not.
pub fn approve(paths: &Paths) -> Result<(), StartError> {
    let before = held(paths)?;
    signal(&socket(paths, Role::Ranges), Signal::USR2)?;
    let after = attempted_since(paths, &before)?;
    match after.into_iter().find(|refresh| refresh.held.is_some()) {
        Some(refresh) => Err(StartError::StillHeld {
            name: refresh.source,
            error: refresh.error.unwrap_or_default(),
        }),
        None => Ok(()),
    }
}

/// What became of each source, as the ranges role says.
fn ranges_role(paths: &Paths) -> Result<Vec<RefreshStatus>, StartError> {
    let path = socket(paths, Role::Ranges);
    match ask(&path) {
        Ok(status) => Ok(status.refresh),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Err(StartError::SocketForbidden { path })
        }
        Err(source) => Err(StartError::NoRangesRole { source }),
    }
}

/// Looks until each of these sources was tried once more, and returns what became of them.
fn attempted_since(
    paths: &Paths,
    before: &[RefreshStatus],
) -> Result<Vec<RefreshStatus>, StartError> {
    for _ in 0..REFRESH_LOOKS {
        let mut now = ranges_role(paths)?;
        now.retain(|now| {
            let mut before = before.iter();
            before.any(|old| old.source == now.source && old.attempts < now.attempts)
        });
        if now.len() == before.len() {
            return Ok(now);
        }
        thread::sleep(LOOK);
    }
    Err(StartError::RefreshGoesOn)
}

/// Whether what is in force is on trial, as far as this user may know.
#[must_use]
pub fn stay(paths: &Paths) -> Stay {
    match is_on_trial(&socket(paths, Role::Filter)) {
        Ok(true) => Stay::OnTrial,
        Ok(false) | Err(_) => Stay::Pinned,
    }
}

fn is_on_trial(socket: &Path) -> Result<bool, StartError> {
    match ask(socket) {
        Ok(status) => Ok(on_trial(&status)),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Err(StartError::SocketForbidden {
                path: socket.to_owned(),
            })
        }
        // The role does not run, or just ends.
        Err(_) => Ok(false),
    }
}

fn on_trial(status: &Status) -> bool {
    status.filter.as_ref().is_some_and(|filter| filter.on_trial)
}

fn ask(socket: &Path) -> io::Result<Status> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    Ok(serde_json::from_reader(BufReader::new(stream))?)
}

/// Signals the process behind a status socket; the kernel knows whose it is.
fn signal(socket: &Path, signal: Signal) -> Result<(), StartError> {
    let blame = |source| StartError::Socket {
        path: socket.to_owned(),
        source,
    };
    let stream = UnixStream::connect(socket).map_err(blame)?;
    let peer = socket_peercred(&stream).map_err(|errno| blame(errno.into()))?;
    kill_process(peer.pid, signal).map_err(|errno| blame(errno.into()))
}

/// A role that does not answer in this time is taken not to run.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often we look whether a role has done what it was told: the socket tells what is, and closes;
/// it announces nothing.
const LOOKS: u32 = 200;
/// A source may have several ways, each of which may take its time.
const REFRESH_LOOKS: u32 = 3000;
/// Cloudflare comes back within a quarter of an hour where it has business, so that an hour tells
/// enough; a gate that is restarted every day shall not keep a range for ever.
const WATCH_MIN: Duration = Duration::from_secs(3600);
const LOOK: Duration = Duration::from_millis(50);
