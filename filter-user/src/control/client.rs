//! The commands' side of the sockets: what running roles say of themselves, and what they are instructed
//! to do.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use ipnet::IpNet;
use rustix::fs::{FileType, Mode, OFlags};
use tokio::net::UnixStream;
use tokio::runtime::Builder;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::error::ControlError;
use super::instruction::{Declined, EXIT_STATUS, Instruction};
use super::peer::is_user_of;
use super::protocol::{RangeUseStatus, RefreshStatus, Status};
use crate::config::{Config, Paths};
use crate::observe::Finding;
use crate::observe::log::LogLevel;
use crate::report::EX_SOFTWARE;
use crate::role::Role;

/// Confirms a filter that is on trial, and returns when it is.
///
/// # Errors
///
/// Returns why there is none, or why it is not confirmed.
pub fn confirm(paths: &Paths) -> Result<(), ControlError> {
    match instruct(paths, Role::Filter, &Instruction::Confirm, CONFIRM_TIMEOUT) {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(Declined::Nothing(_) | Declined::NotMine)) => Err(ControlError::NothingOnTrial),
        Ok(Err(Declined::Unusable { text, .. } | Declined::Failed(text))) => {
            Err(ControlError::NotConfirmed { error: text })
        }
        Err(Unanswered::Absent(_)) => Err(ControlError::NothingOnTrial),
        // The role was faster: the time was over.
        Err(Unanswered::Interrupted(source)) => {
            let error = source.to_string();
            Err(ControlError::NotConfirmed { error })
        }
        Err(Unanswered::Late) => Err(ControlError::NotDone { role: Role::Filter }),
        Err(unanswered) => Err(unanswered.into_error(paths, Role::Filter)),
    }
}

/// Lets a running role read its configuration again, which is to be the file that is named, and returns when that
/// is done: with what waits for a restart.
///
/// # Errors
///
/// Returns why the role cannot be reached, that it reads another file, what of the configuration is not used, or
/// that it does not come to an end.
pub fn reload(paths: &Paths, role: Role, named: &Path) -> Result<Vec<Finding>, ControlError> {
    // One that does not answer is found out below.
    if let Ok(status) = status_if_permitted(paths, role)?
        && !is_same_file(named, &status.config)
    {
        return Err(ControlError::OtherFile {
            role,
            reads: status.config,
            named: named.to_owned(),
        });
    }
    match instruct(paths, role, &Instruction::Reload, RELOAD_TIMEOUT) {
        Ok(Ok(_)) => {
            let status = status_if_permitted(paths, role)?;
            let mut findings = status.map(|status| status.findings).unwrap_or_default();
            findings.retain(|finding| finding.id == "restart-needed");
            Ok(findings)
        }
        Ok(Err(declined)) => {
            let (_, error, status) = declined.into_parts();
            Err(ControlError::NotReloaded {
                role,
                error,
                status: status.unwrap_or(EX_SOFTWARE),
            })
        }
        Err(unanswered) => Err(unanswered.into_error(paths, role)),
    }
}

/// Whether both are one file. An earlier version does not report what it reads.
fn is_same_file(named: &Path, reads: &str) -> bool {
    let real = |path: &Path| path.canonicalize().or_else(|_| std::path::absolute(path));
    reads.is_empty()
        || real(named).is_ok_and(|named| real(Path::new(reads)).is_ok_and(|reads| named == reads))
}

/// Lets a running role log more or less.
///
/// # Errors
///
/// Returns why the role cannot be reached, or does not do it.
pub fn set_log_level(paths: &Paths, role: Role, level: LogLevel) -> Result<(), ControlError> {
    match instruct(paths, role, &Instruction::LogLevel(level), ANSWER_TIMEOUT) {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(declined)) => {
            let (_, error, _) = declined.into_parts();
            Err(ControlError::LevelKept { role, error })
        }
        Err(unanswered) => Err(unanswered.into_error(paths, role)),
    }
}

/// Ends a trial as if its time were over, and the role with it; returns whether there was one.
///
/// # Errors
///
/// Returns why the role cannot be instructed, or that it does not end.
pub fn end_trial(paths: &Paths) -> Result<bool, ControlError> {
    match instruct(paths, Role::Filter, &Instruction::EndTrial, STOP_TIMEOUT) {
        // The role ends its connections when it looks after its links no more.
        Ok(Ok(_)) | Err(Unanswered::Interrupted(_)) => Ok(true),
        Ok(Err(Declined::Nothing(_) | Declined::NotMine)) => Ok(false),
        // No role of ours stands between an operator and the way back.
        Err(Unanswered::Absent(_) | Unanswered::Broken(_)) => Ok(false),
        Ok(Err(_)) | Err(Unanswered::Late) => Err(ControlError::TrialGoesOn),
        Err(unanswered @ Unanswered::Forbidden) => Err(unanswered.into_error(paths, Role::Filter)),
    }
}

/// Asks the gate, if the host has one, from which vanished ranges no authenticated connection comes.
pub async fn idle_ranges(config: &Config, grace: Duration) -> Option<io::Result<Vec<IpNet>>> {
    config.live.gate.as_ref()?;
    let usage = get(&config.boot.paths, Role::Gate, "/range-usage").await;
    Some(usage.map(|usage: Vec<RangeUseStatus>| {
        let idle = usage.into_iter().filter(|range| is_idle(range, grace));
        idle.map(|range| range.range).collect()
    }))
}

/// Whether no client has come from a range for its grace, as far as the gate can know: one that was
/// restarted has forgotten what it saw, and must have looked for a while.
fn is_idle(usage: &RangeUseStatus, grace: Duration) -> bool {
    let seen_ago = usage.seen_ms_ago.map(Duration::from_millis);
    Duration::from_millis(usage.watched_ms) >= grace.min(WATCH_MIN)
        && seen_ago.is_none_or(|ago| ago >= grace)
}

/// Lets the ranges role ask all sources now, and returns what became of that.
///
/// # Errors
///
/// Returns why it cannot be instructed, or that it does not come to an end.
pub fn refresh(paths: &Paths) -> Result<Vec<RefreshStatus>, ControlError> {
    match instruct(paths, Role::Ranges, &Instruction::Refresh, REFRESH_TIMEOUT) {
        Ok(Ok(refreshed)) => Ok(refreshed),
        Ok(Err(declined)) => Err(no_ranges_role(declined.into_parts().1)),
        Err(unanswered) => Err(unanswered.of_ranges_role(paths)),
    }
}

/// The sources with a list that is held: those that `ids` name, or all of them.
///
/// # Errors
///
/// Returns that there is none or not the one that is named, or why the ranges role cannot be asked.
pub fn held(paths: &Paths, ids: &[String]) -> Result<Vec<RefreshStatus>, ControlError> {
    let status = status_if_permitted(paths, Role::Ranges)?;
    let status = status.map_err(|source| ControlError::NoRangesRole { source })?;
    let mut held = status.refresh;
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
            let list = refresh.held.as_ref();
            list.is_some_and(|list| ids.contains(&list.id))
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
/// Returns why the role cannot be instructed, or why it has failed.
pub fn approve(paths: &Paths, held: &[RefreshStatus]) -> Result<(), ControlError> {
    let ids = ids_of(held).map(str::to_owned).collect();
    let instruction = Instruction::Approve(ids);
    match instruct(paths, Role::Ranges, &instruction, REFRESH_TIMEOUT) {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(Declined::Nothing(found))) => Err(ControlError::OtherHeld { ids: found }),
        Ok(Err(declined)) => Err(ControlError::StillHeld {
            error: declined.into_parts().1,
        }),
        Err(unanswered) => Err(unanswered.of_ranges_role(paths)),
    }
}

/// What a role says, or why it does not; that this user may not ask is another matter.
///
/// # Errors
///
/// Returns that this user may not ask.
pub fn status_if_permitted(paths: &Paths, role: Role) -> Result<io::Result<Status>, ControlError> {
    if_permitted(paths, role, block_on(get(paths, role, "/status")))
}

/// Whether a role runs, whether it answers or not: it is connected to, and not waited for.
///
/// # Errors
///
/// Returns that this user may not ask.
pub fn runs(paths: &Paths, role: Role) -> Result<bool, ControlError> {
    let socket = paths.socket(role);
    let connected = block_on(async { connect(paths, role, &socket).await.map(drop) });
    let connected = if_permitted(paths, role, connected)?;
    Ok(!connected.is_err_and(|error| is_absent(&error)))
}

/// What came of asking a role, unless this user may not.
fn if_permitted<T>(
    paths: &Paths,
    role: Role,
    asked: io::Result<T>,
) -> Result<io::Result<T>, ControlError> {
    match asked {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            Err(ControlError::SocketForbidden {
                path: paths.socket(role),
            })
        }
        asked => Ok(asked),
    }
}

/// Whether no process listens at a role's socket.
#[must_use]
pub fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::ConnectionRefused
    )
}

/// Asks a role for what it serves at `path`.
async fn get<T: serde::de::DeserializeOwned>(
    paths: &Paths,
    role: Role,
    path: &str,
) -> io::Result<T> {
    let socket = paths.socket(role);
    let asking = async {
        let stream = connect(paths, role, &socket).await?;
        exchange(stream, Method::GET, path, Vec::new()).await
    };
    let (status, _, body) = timeout(ANSWER_TIMEOUT, asking).await??;
    if status != StatusCode::OK {
        let text = String::from_utf8_lossy(&body).trim_end().to_owned();
        return Err(io::Error::other(text));
    }
    Ok(serde_json::from_slice(&body)?)
}

/// Instructs a role, and waits until it is done.
fn instruct(
    paths: &Paths,
    role: Role,
    instruction: &Instruction,
    patience: Duration,
) -> Result<Result<Vec<RefreshStatus>, Declined>, Unanswered> {
    let socket = paths.control_socket(role);
    let asking = async {
        // A role that hangs would be waited for as long as one that works.
        let answering = get::<Vec<RangeUseStatus>>(paths, role, "/range-usage").await;
        if answering.is_err_and(|error| error.kind() == ErrorKind::TimedOut) {
            return Err(Unanswered::Late);
        }
        let connecting = timeout(ANSWER_TIMEOUT, connect(paths, role, &socket));
        let stream = connecting.await.map_err(|_elapsed| Unanswered::Late)?;
        let stream = stream.map_err(Unanswered::of_connect)?;
        let (path, body) = (instruction.path(), instruction.body());
        let exchange = timeout(patience, exchange(stream, Method::POST, path, body));
        let answer = exchange.await.map_err(|_elapsed| Unanswered::Late)?;
        answer.map_err(Unanswered::Interrupted)
    };
    let answer = block_on(async { Ok(asking.await) }).map_err(Unanswered::Broken)?;
    let (status, exit_status, body) = answer?;
    if status == StatusCode::OK {
        let refreshed = serde_json::from_slice(&body);
        return Ok(Ok(
            refreshed.map_err(|error| Unanswered::Broken(error.into()))?
        ));
    }
    let text = String::from_utf8_lossy(&body).trim_end().to_owned();
    Ok(Err(Declined::from_parts(status, text, exit_status)))
}

/// Why there is no answer to an instruction.
#[derive(Debug)]
enum Unanswered {
    /// No process listens.
    Absent(io::Error),
    /// This user may not instruct the role.
    Forbidden,
    /// The role ended the connection, or ended itself.
    Interrupted(io::Error),
    /// It is not done in time.
    Late,
    /// What listens there is no role of ours.
    Broken(io::Error),
}

impl Unanswered {
    fn of_connect(error: io::Error) -> Self {
        let is = |kinds: &[ErrorKind]| kinds.contains(&error.kind());
        if is(&[ErrorKind::NotFound, ErrorKind::ConnectionRefused]) {
            return Self::Absent(error);
        }
        if is(&[ErrorKind::PermissionDenied]) {
            return Self::Forbidden;
        }
        Self::Broken(error)
    }

    fn into_error(self, paths: &Paths, role: Role) -> ControlError {
        let path = paths.control_socket(role);
        match self {
            Self::Absent(source) | Self::Interrupted(source) | Self::Broken(source) => {
                ControlError::Socket { path, source }
            }
            Self::Forbidden => ControlError::SocketForbidden { path },
            Self::Late => ControlError::NotDone { role },
        }
    }

    fn of_ranges_role(self, paths: &Paths) -> ControlError {
        match self {
            Self::Absent(source) | Self::Interrupted(source) | Self::Broken(source) => {
                ControlError::NoRangesRole { source }
            }
            Self::Forbidden | Self::Late => self.into_error(paths, Role::Ranges),
        }
    }
}

fn no_ranges_role(text: String) -> ControlError {
    ControlError::NoRangesRole {
        source: io::Error::other(text),
    }
}

async fn connect(paths: &Paths, role: Role, socket: &Path) -> io::Result<UnixStream> {
    let place = socket.to_owned();
    let opened = spawn_blocking(move || open_socket(&place));
    let opened = opened.await.map_err(io::Error::other)??;
    // By its descriptor: nothing else can be put in its place meanwhile.
    let stream = UnixStream::connect(format!("/proc/self/fd/{}", opened.as_raw_fd())).await?;
    let peer = stream.peer_cred()?.uid();
    let paths = paths.clone();
    let checked = spawn_blocking(move || check_peer(&paths, role, peer));
    checked.await.map_err(io::Error::other)??;
    Ok(stream)
}

/// Opens the socket itself. A role that was taken over must not lead root to another one by a link.
fn open_socket(path: &Path) -> io::Result<OwnedFd> {
    let opened = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())?;
    let found = rustix::fs::fstat(&opened)?;
    if FileType::from_raw_mode(found.st_mode) == FileType::Socket {
        return Ok(opened);
    }
    Err(io::Error::other("there is something else than a socket"))
}

/// No other process answers in the place of a role while that is not there: it may be asked to confirm
/// or to approve.
fn check_peer(paths: &Paths, role: Role, peer: u32) -> io::Result<()> {
    if is_user_of(paths, role, peer)? {
        return Ok(());
    }
    let text = format!("user {peer} answers there, who has no business to");
    Err(io::Error::other(text))
}

/// Sends a request, and returns the whole answer, which is bounded: the role may have been taken over.
async fn exchange(
    stream: UnixStream,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> io::Result<(StatusCode, Option<u8>, Bytes)> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    let connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "pullgate")
        .body(Full::new(Bytes::from(body)))
        .map_err(io::Error::other)?;
    let answer = sender.send_request(request).await;
    let answer = answer.map_err(io::Error::other)?;
    let status = answer.status();
    let exit_status = answer.headers().get(EXIT_STATUS);
    let exit_status = exit_status.and_then(|value| value.to_str().ok()?.parse().ok());
    let content = Limited::new(answer.into_body(), ANSWER_MAX).collect().await;
    let content = content.map_err(io::Error::other)?.to_bytes();
    drop(connection);
    Ok((status, exit_status, content))
}

/// A command waits for its answer.
fn block_on<T>(asking: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(asking)
}

/// A role that does not answer in this time is taken not to run.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of an answer. The longest, with all that a filter counts, is a twentieth of it.
const ANSWER_MAX: usize = 4 << 20;
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// A filter may have many programs to load.
const RELOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// A source may have several ways, each of which may take its time.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(150);
/// Cloudflare comes back within a quarter of an hour where it has business, so that an hour tells
/// enough; a gate that is restarted every day shall not keep a range for ever.
const WATCH_MIN: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixListener;
    use std::thread;

    use socket2::{Domain, SockAddr, Socket, Type};

    use super::*;

    #[test]
    fn a_range_is_idle_if_no_client_came_while_the_gate_watched() {
        let grace = Duration::from_secs(86_400);
        let hours = |hours: u64| hours * 3_600_000;
        let is_idle = |watched, seen: Option<u64>| {
            let usage = RangeUseStatus {
                range: "64.0.0.0/24".parse().unwrap(),
                watched_ms: hours(watched),
                seen_ms_ago: seen.map(hours),
            };
            is_idle(&usage, grace)
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

    fn answered_by(
        answer: impl FnOnce(&mut std::os::unix::net::UnixStream) + Send + 'static,
    ) -> io::Error {
        let directory = tempfile::tempdir().unwrap();
        let paths = paths_in(directory.path());
        std::fs::create_dir_all(paths.home(Role::Gate)).unwrap();
        let listener = UnixListener::bind(paths.socket(Role::Gate)).unwrap();
        let answering = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            assert_ne!(stream.read(&mut request).unwrap(), 0);
            answer(&mut stream);
        });

        let error = block_on(get::<Status>(&paths, Role::Gate, "/status")).unwrap_err();

        answering.join().unwrap();
        error
    }

    #[test]
    fn an_answer_that_is_too_long_is_dropped() {
        let error = answered_by(|stream| {
            let mut sent = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
            let mut bytes = 0;
            while sent.is_ok() {
                sent = stream.write_all(&[b'"'; 1 << 16]);
                bytes += 1 << 16;
            }
            assert!(bytes < 2 * ANSWER_MAX);
        });

        assert!(error.to_string().contains("length limit"), "{error}");
    }

    #[test]
    fn an_answer_that_drips_is_not_waited_for() {
        let error = answered_by(|stream| {
            let mut sent = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
            while sent.is_ok() {
                thread::sleep(Duration::from_millis(50));
                sent = stream.write_all(b" ");
            }
        });

        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn a_role_whose_queue_is_full_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let paths = paths_in(directory.path());
        std::fs::create_dir_all(paths.home(Role::Gate)).unwrap();
        let path = paths.socket(Role::Gate);
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        listener.listen(0).unwrap();
        let _first_in_the_queue = std::os::unix::net::UnixStream::connect(&path).unwrap();

        let error = block_on(connect(&paths, Role::Gate, &path)).unwrap_err();

        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }
}
