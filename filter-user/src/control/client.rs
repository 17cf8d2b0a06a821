//! The commands' side of the status sockets: what running roles say of themselves, and what a filter
//! on trial is told.

use std::fs::{OpenOptions, Permissions};
use std::io::{self, BufReader, ErrorKind, Read, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Signal, geteuid, kill_process};
use socket2::{Domain, SockAddr, Socket, Type};

use super::error::ControlError;
use super::protocol::{RefreshStatus, ReloadStatus, SightingStatus, Status};
use crate::config::{Config, Paths};
use crate::host::file;
use crate::role::Role;
use crate::xdp::Lifetime;

/// Confirms a filter that is on trial, and returns when it is.
///
/// # Errors
///
/// Returns why there is none, or why it is not confirmed.
pub fn confirm(paths: &Paths) -> Result<(), ControlError> {
    if !is_on_trial(paths)? {
        return Err(ControlError::NothingOnTrial);
    }
    signal(paths, Role::Filter, Signal::USR1)?;
    let stays = look(LOOKS, || {
        Ok(match ask(paths, Role::Filter) {
            Ok(status) if on_trial(&status) => None,
            Ok(_) => Some(true),
            // The role was faster: the time was over.
            Err(_) => Some(false),
        })
    })?;
    match stays {
        Some(true) => Ok(()),
        Some(false) | None => Err(ControlError::NotConfirmed),
    }
}

/// Lets a running role read its configuration again, and returns when that is in force.
///
/// # Errors
///
/// Returns why the role cannot be told, why it goes on as before, or that it does not come to an end.
pub fn reload(paths: &Paths, role: Role) -> Result<(), ControlError> {
    let ask = || {
        let asked = ask_if_permitted(paths, role)?;
        asked.map_err(|source| ControlError::Socket {
            path: paths.socket(role),
            source,
        })
    };
    let before = ask()?.reload;
    // One that is under way may have read the file before it was as it is.
    let before = before.count + u64::from(before.under_way);
    signal(paths, role, Signal::HUP)?;
    let deadline = Instant::now() + RELOAD_LOOKS * LOOK;
    let reloaded = look(RELOAD_LOOKS, || match ask() {
        Ok(Status { reload, .. }) => Ok((reload.count > before).then_some(reload)),
        // A role that loads many programs has no time for an answer.
        Err(ControlError::Socket { source, .. }) if source.kind() == ErrorKind::WouldBlock => {
            match Instant::now() < deadline {
                true => Ok(None),
                false => Err(ControlError::ReloadGoesOn { role }),
            }
        }
        Err(error) => Err(error),
    })?;
    match reloaded {
        Some(ReloadStatus { error: None, .. }) => Ok(()),
        Some(ReloadStatus {
            error: Some(error), ..
        }) => Err(ControlError::NotReloaded { role, error }),
        None => Err(ControlError::ReloadGoesOn { role }),
    }
}

/// Ends a trial as if its time were over, and the role with it; returns whether there was one.
///
/// # Errors
///
/// Returns why the role cannot be told, or that it does not end.
pub fn end_trial(paths: &Paths) -> Result<bool, ControlError> {
    if !is_on_trial(paths)? {
        return Ok(false);
    }
    signal(paths, Role::Filter, Signal::TERM)?;
    // It answers for a moment longer than its trial lasts, and looks after its links as long.
    let ended = look(LOOKS, || {
        Ok(connect(paths, Role::Filter).is_err().then_some(true))
    })?;
    ended.ok_or(ControlError::TrialGoesOn)
}

/// Asks the gate, if the host has one, from which vanished ranges no authenticated connection comes.
pub(crate) fn idle_ranges(config: &Config, grace: Duration) -> Option<io::Result<Vec<IpNet>>> {
    config.gate.as_ref()?;
    let status = ask(&config.paths, Role::Gate);
    Some(status.map(|status| {
        let idle = status.sightings.into_iter();
        let idle = idle.filter(|sighting| is_idle(sighting, grace));
        idle.map(|sighting| sighting.range).collect()
    }))
}

/// Whether nobody has come from a range for its grace, as far as the gate can know: one that was
/// restarted has forgotten what it saw, and must have looked for a while.
fn is_idle(sighting: &SightingStatus, grace: Duration) -> bool {
    let seen_ago = sighting.seen_ms_ago.map(Duration::from_millis);
    Duration::from_millis(sighting.watched_ms) >= grace.min(WATCH_MIN)
        && seen_ago.is_none_or(|ago| ago >= grace)
}

/// Lets the ranges role ask all sources now, and returns what became of that.
///
/// # Errors
///
/// Returns why it cannot be told, or that it does not come to an end.
pub fn refresh(paths: &Paths) -> Result<Vec<RefreshStatus>, ControlError> {
    let mut before = ranges_role(paths)?;
    for refresh in &mut before {
        // What is under way may have begun before whatever made somebody ask.
        refresh.attempts += u64::from(refresh.under_way);
    }
    signal(paths, Role::Ranges, Signal::ALARM)?;
    attempted_since(paths, &before)
}

/// The sources with a list that is held: those that `ids` name, or all of them.
///
/// # Errors
///
/// Returns that there is none or not the one that is named, or why the ranges role cannot be asked.
pub fn held(paths: &Paths, ids: &[String]) -> Result<Vec<RefreshStatus>, ControlError> {
    let mut held = ranges_role(paths)?;
    held.retain(|refresh| refresh.held.is_some());
    if held.is_empty() {
        return Err(ControlError::NothingHeld);
    }
    let found: Vec<_> = ids_of(&held).collect();
    if !found.iter().all(|id| is_id(id)) {
        let source = io::Error::new(ErrorKind::InvalidData, "an ID of a list is none");
        return Err(ControlError::NoRangesRole { source });
    }
    if !ids.iter().all(|id| found.contains(&id.as_str())) {
        return Err(ControlError::OtherHeld {
            ids: found.join(" "),
        });
    }
    if !ids.is_empty() {
        held.retain(|refresh| {
            let held = refresh.held.as_ref();
            held.is_some_and(|held| ids.contains(&held.id))
        });
    }
    Ok(held)
}

fn is_id(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn ids_of(held: &[RefreshStatus]) -> impl Iterator<Item = &str> {
    let held = held.iter().filter_map(|refresh| refresh.held.as_ref());
    held.map(|held| held.id.as_str())
}

/// Lets the ranges role take in what is held, and returns when it has.
///
/// # Errors
///
/// Returns why the role cannot be told, or why it has not.
pub fn approve(paths: &Paths, held: &[RefreshStatus]) -> Result<(), ControlError> {
    // A signal says nothing more than that somebody approves; the file says what.
    let path = approved(paths);
    let ids: Vec<_> = ids_of(held).collect();
    let blame = |source| ControlError::Approval {
        path: path.clone(),
        source,
    };
    write_anew(&path, &ids.join("\n")).map_err(blame)?;
    let told = signal(paths, Role::Ranges, Signal::USR2);
    let after = told.and_then(|()| attempted_since(paths, held));
    std::fs::remove_file(&path).map_err(blame)?;
    // If it is another list by now, nobody has approved that.
    let still = after?.into_iter().find(|refresh| refresh.held.is_some());
    match still {
        Some(refresh) => Err(ControlError::StillHeld {
            name: refresh.source,
            error: refresh.error.unwrap_or_default(),
        }),
        None => Ok(()),
    }
}

/// Writes a file that a role may read. Others may put names into its directory, which must not lead
/// root anywhere.
fn write_anew(path: &Path, content: &str) -> io::Result<()> {
    file::remove(path)?;
    // O_EXCL follows no link.
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.set_permissions(Permissions::from_mode(0o644))?;
    file.write_all(content.as_bytes())
}

/// Reads what was approved: the IDs of lists.
pub(crate) fn read_approved(paths: &Paths) -> io::Result<Vec<String>> {
    let ids = file::read(&approved(paths), APPROVED_MAX)?;
    let ids = String::from_utf8_lossy(&ids).into_owned();
    Ok(ids.lines().map(str::to_owned).collect())
}

fn approved(paths: &Paths) -> PathBuf {
    paths.home(Role::Ranges).join("approved")
}

/// What became of each source, as the ranges role says.
fn ranges_role(paths: &Paths) -> Result<Vec<RefreshStatus>, ControlError> {
    let status = ask_if_permitted(paths, Role::Ranges)?;
    let status = status.map_err(|source| ControlError::NoRangesRole { source })?;
    Ok(status.refresh)
}

/// Looks until each of these sources was tried once more, and returns what became of them.
fn attempted_since(
    paths: &Paths,
    before: &[RefreshStatus],
) -> Result<Vec<RefreshStatus>, ControlError> {
    let after = look(REFRESH_LOOKS, || {
        let mut now = ranges_role(paths)?;
        now.retain(|now| {
            let mut before = before.iter();
            before.any(|old| old.source == now.source && old.attempts < now.attempts)
        });
        Ok((now.len() == before.len()).then_some(now))
    })?;
    after.ok_or(ControlError::RefreshGoesOn)
}

/// Looks until there is something to see: a socket tells what is, and closes; it announces nothing.
fn look<T>(
    times: u32,
    mut see: impl FnMut() -> Result<Option<T>, ControlError>,
) -> Result<Option<T>, ControlError> {
    for _ in 0..times {
        let seen = see()?;
        if seen.is_some() {
            return Ok(seen);
        }
        thread::sleep(LOOK);
    }
    Ok(None)
}

/// Whether what is in force is on trial, as far as this user may know.
#[must_use]
pub fn stay(paths: &Paths) -> Lifetime {
    match is_on_trial(paths) {
        Ok(true) => Lifetime::OnTrial,
        Ok(false) | Err(_) => Lifetime::Pinned,
    }
}

fn is_on_trial(paths: &Paths) -> Result<bool, ControlError> {
    let status = ask_if_permitted(paths, Role::Filter)?;
    // Otherwise the role does not run, or just ends.
    Ok(status.is_ok_and(|status| on_trial(&status)))
}

/// What a role says, or why it does not; that this user may not ask is another matter.
pub(crate) fn ask_if_permitted(
    paths: &Paths,
    role: Role,
) -> Result<io::Result<Status>, ControlError> {
    match ask(paths, role) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Err(ControlError::SocketForbidden {
                path: paths.socket(role),
            })
        }
        asked => Ok(asked),
    }
}

fn on_trial(status: &Status) -> bool {
    status.filter.as_ref().is_some_and(|filter| filter.on_trial)
}

pub(crate) fn ask(paths: &Paths, role: Role) -> io::Result<Status> {
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    let stream = connect(paths, role)?;
    let answer = Answer { stream, deadline };
    Ok(serde_json::from_reader(BufReader::new(
        answer.take(ANSWER_MAX),
    ))?)
}

/// Connects, or gives up in time: one that accepts nobody lets its queue run full.
fn connect(paths: &Paths, role: Role) -> io::Result<UnixStream> {
    let stream = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    stream.connect(&SockAddr::unix(paths.socket(role))?)?;
    check_peer(paths, role, &stream)?;
    Ok(UnixStream::from(OwnedFd::from(stream)))
}

/// Nobody answers in the place of a role while it is not there: what it is told may be to confirm or to
/// approve. It is the one whose directory the socket is in, if none but root could have made that.
fn check_peer(paths: &Paths, role: Role, stream: &Socket) -> io::Result<()> {
    let peer = socket_peercred(stream)?.uid.as_raw();
    let ourselves = geteuid().as_raw();
    if [0, ourselves].contains(&peer) {
        return Ok(());
    }
    let above = std::fs::metadata(&paths.run)?;
    let is_exclusive = [0, ourselves].contains(&above.uid()) && above.mode() & 0o022 == 0;
    let home = std::fs::symlink_metadata(paths.home(role))?;
    if is_exclusive && home.is_dir() && home.uid() == peer {
        return Ok(());
    }
    let text = format!("user {peer} answers there, who has no business to");
    Err(io::Error::other(text))
}

/// An answer that has to be there in time as a whole: who answers may have been subverted.
struct Answer {
    stream: UnixStream,
    deadline: Instant,
}

impl Read for Answer {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(buffer)
    }
}

/// Signals the process behind a status socket; the kernel knows whose it is.
fn signal(paths: &Paths, role: Role, signal: Signal) -> Result<(), ControlError> {
    let blame = |source| ControlError::Socket {
        path: paths.socket(role),
        source,
    };
    let stream = connect(paths, role).map_err(blame)?;
    let peer = socket_peercred(&stream).map_err(|errno| blame(errno.into()))?;
    kill_process(peer.pid, signal).map_err(|errno| match errno {
        Errno::PERM => ControlError::SocketForbidden {
            path: paths.socket(role),
        },
        errno => blame(errno.into()),
    })
}

/// A role that does not answer in this time is taken not to run.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of the file that says what is approved.
const APPROVED_MAX: usize = 64 << 10;
/// Bytes of an answer. The longest, with all that a filter counts, is a twentieth of it.
const ANSWER_MAX: u64 = 4 << 20;
/// How often we look whether a role has done what it was told.
const LOOKS: u32 = 200;
/// Each host's upstream may be asked what it speaks.
const RELOAD_LOOKS: u32 = 1000;
/// A source may have several ways, each of which may take its time.
const REFRESH_LOOKS: u32 = 3000;
/// Cloudflare comes back within a quarter of an hour where it has business, so that an hour tells
/// enough; a gate that is restarted every day shall not keep a range for ever.
const WATCH_MIN: Duration = Duration::from_secs(3600);
const LOOK: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_range_is_idle_if_nobody_came_while_somebody_looked() {
        let grace = Duration::from_secs(86_400);
        let hours = |hours: u64| hours * 3_600_000;
        let is_idle = |watched, seen: Option<u64>| {
            let sighting = SightingStatus {
                range: "64.0.0.0/24".parse().unwrap(),
                watched_ms: hours(watched),
                seen_ms_ago: seen.map(hours),
            };
            is_idle(&sighting, grace)
        };

        assert!(is_idle(1, None));
        assert!(!is_idle(0, None));
        assert!(!is_idle(30, Some(23)));
        assert!(is_idle(30, Some(24)));
    }

    fn paths_in(directory: &Path) -> Paths {
        Paths {
            state: directory.to_owned(),
            run: directory.to_owned(),
            bpf: directory.to_owned(),
            filter: directory.to_owned(),
        }
    }

    #[test]
    fn what_is_approved_is_written_through_no_link() {
        let directory = tempfile::tempdir().unwrap();
        let [planted, victim] =
            ["ranges.approved", "victim"].map(|name| directory.path().join(name));
        std::fs::write(&victim, "whole").unwrap();
        std::os::unix::fs::symlink(&victim, &planted).unwrap();

        write_anew(&planted, "0123").unwrap();

        assert_eq!(std::fs::read(&victim).unwrap(), b"whole");
        assert_eq!(std::fs::read(&planted).unwrap(), b"0123");
        assert_eq!(planted.metadata().unwrap().mode() & 0o777, 0o644);
        assert!(!is_id("root ALL=(ALL)\n"));
    }

    #[test]
    fn an_answer_that_is_too_long_is_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        let paths = paths_in(directory.path());
        let path = paths.socket(Role::Gate);
        std::fs::create_dir_all(paths.home(Role::Gate)).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        let endless = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut sent = 0_u64;
            while stream.write_all(&[b'"'; 1 << 16]).is_ok() {
                sent += 1 << 16;
            }
            sent
        });

        assert!(ask(&paths, Role::Gate).is_err());

        assert!(endless.join().unwrap() < 2 * ANSWER_MAX);
    }

    #[test]
    fn who_accepts_nobody_is_not_waited_for_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let paths = paths_in(directory.path());
        let path = paths.socket(Role::Gate);
        std::fs::create_dir_all(paths.home(Role::Gate)).unwrap();
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        listener.listen(0).unwrap();
        let _first_in_the_queue = connect(&paths, Role::Gate).unwrap();

        let error = connect(&paths, Role::Gate).unwrap_err();

        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn an_answer_that_drips_is_not_waited_for() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut answer = Answer {
            stream: theirs,
            deadline: Instant::now() + Duration::from_millis(50),
        };
        let dripping = thread::spawn(move || {
            while ours.write_all(b" ").is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });

        let error = io::copy(&mut answer, &mut io::sink()).unwrap_err();

        assert!(matches!(
            error.kind(),
            ErrorKind::TimedOut | ErrorKind::WouldBlock
        ));
        drop(answer);
        dripping.join().unwrap();
    }
}
