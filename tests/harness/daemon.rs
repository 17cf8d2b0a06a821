//! pullgate as a process: started, watched by its log events, signalled, killed.

use std::io::{self, BufRead as _, BufReader, IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;
use serde_json::Value;

use crate::PATIENCE;
use crate::net::{Host, Network};

/// A running role; killed when dropped.
pub struct Pullgate {
    child: Child,
    events: Arc<Events>,
    socket: PathBuf,
    /// What the service manager received since the start.
    received: Arc<Mutex<Vec<String>>>,
}

/// Descriptors that were handed over, by their numbers here; processes that are started inherit
/// them. Closed when dropped.
#[derive(Default)]
pub struct Stored(pub Vec<RawFd>);

impl Drop for Stored {
    fn drop(&mut self) {
        for descriptor in self.0.drain(..) {
            match nix::unistd::close(descriptor) {
                Ok(_) | Err(_) => {}
            }
        }
    }
}

impl Pullgate {
    /// Starts a role in the origin, and returns when it says that it is ready.
    #[must_use]
    pub fn start(network: &Network, config: &Path, role: &str) -> Self {
        Self::start_with(network, config, role, &["--only", role])
    }

    /// Starts all roles in one process.
    #[must_use]
    pub fn start_all(network: &Network, config: &Path) -> Self {
        Self::start_with(network, config, "filter", &[])
    }

    /// Starts roles with these arguments of `run`; `role` is one of them, whose status counts.
    #[must_use]
    pub fn start_with(network: &Network, config: &Path, role: &str, arguments: &[&str]) -> Self {
        let command = command(network, config);
        Self::start_and(network, command, role, arguments, None)
    }

    /// Starts a role whose service manager wants to hear from it within `interval`.
    #[must_use]
    pub fn start_watched(network: &Network, config: &Path, role: &str, interval: Duration) -> Self {
        let mut command = command(network, config);
        command.env("WATCHDOG_USEC", interval.as_micros().to_string());
        Self::start_and(network, command, role, &["--only", role], None)
    }

    /// As [`Self::start_with`], and keeps what it hands over for safekeeping, beyond its end too.
    #[must_use]
    pub fn start_keeping(
        network: &Network,
        config: &Path,
        role: &str,
        arguments: &[&str],
    ) -> (Self, Stored) {
        let mut stored = Stored::default();
        let kept = Some(&mut stored);
        let command = command(network, config);
        let pullgate = Self::start_and(network, command, role, arguments, kept);
        (pullgate, stored)
    }

    fn start_and(
        network: &Network,
        mut command: Command,
        role: &str,
        arguments: &[&str],
        stored: Option<&mut Stored>,
    ) -> Self {
        let notify = network.path(format!("{role}.notify"));
        if notify.exists() {
            std::fs::remove_file(&notify).unwrap();
        }
        let ready = UnixDatagram::bind(&notify).unwrap();
        ready.set_read_timeout(Some(PATIENCE / 100)).unwrap();

        let mut child = command
            .args(["--log-format", "json", "run"])
            .args(arguments)
            .env("NOTIFY_SOCKET", &notify)
            .env("PULLGATE_LOG", "info,pullgate=debug")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let events = Arc::new(Events::default());
        let (log, seen) = (child.stderr.take().unwrap(), Arc::clone(&events));
        std::thread::spawn(move || {
            for line in BufReader::new(log).lines() {
                seen.push(&line.unwrap());
            }
        });

        let is_ready = is_ready(&ready, &mut child, stored);
        assert!(is_ready, "{role} is not ready: {:?}", events.all());
        let received = Arc::new(Mutex::new(Vec::new()));
        let listening = Arc::downgrade(&received);
        std::thread::spawn(move || listen(&ready, &listening));
        let socket = network.path(format!("run/{role}/status.sock"));
        Self {
            child,
            events,
            socket,
            received,
        }
    }

    /// Waits until the service manager has received this so many times.
    pub fn tells(&self, word: &str, times: usize) {
        crate::eventually(word, || {
            let received = self.received.lock().unwrap();
            let count = received
                .iter()
                .filter(|message| message.starts_with(word))
                .count();
            (count >= times).then_some(())
        });
    }

    /// A mark in the log, to wait for what comes behind it.
    #[must_use]
    pub fn mark(&self) -> usize {
        self.events.all().len()
    }

    /// Waits for the first event behind `mark` that `wanted` says yes to.
    pub fn event(&self, mark: usize, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        self.events.wait(mark, what, wanted)
    }

    /// All events so far.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        self.events.all()
    }

    /// Asks the role's status socket.
    #[must_use]
    pub fn status(&self) -> Value {
        self.get("/status")
    }

    /// What the role serves at a path of its status socket.
    #[must_use]
    pub fn get(&self, path: &str) -> Value {
        http(&self.socket, "GET", path, "").unwrap()
    }

    /// Instructs the role, and returns its answer when it is done.
    pub fn post(&self, path: &str) -> Value {
        let socket = self.socket.with_file_name("control.sock");
        http(&socket, "POST", path, "").unwrap()
    }

    /// How many reloads have come to an end.
    #[must_use]
    pub fn reloads(&self) -> u64 {
        self.status()["reload"]["count"].as_u64().unwrap()
    }

    /// Waits until status knows of another reload: the log is a moment ahead of it.
    pub fn wait_for_reload(&self, before: u64) {
        crate::eventually("status knows of the reload", || {
            (self.reloads() > before).then_some(())
        });
    }

    /// Whether the role still answers at its status socket.
    #[must_use]
    pub fn is_answering(&self) -> bool {
        UnixStream::connect(&self.socket).is_ok()
    }

    /// One metric, 0 if it has no value yet.
    #[must_use]
    pub fn metric(&self, name: &str) -> u64 {
        total(&self.status(), |metric| metric == name)
    }

    /// The sum of the gate's connections with this outcome, over all hosts.
    #[must_use]
    pub fn outcomes(&self, outcome: &str) -> u64 {
        let label = format!("outcome=\"{outcome}\"");
        total(&self.status(), |metric| {
            metric.starts_with("pullgate_gate_connections_total") && metric.contains(&label)
        })
    }

    /// Memory that it has, in KiB.
    #[must_use]
    pub fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let value = line.and_then(|line| line.split_whitespace().nth(1));
        value.unwrap().parse().unwrap()
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the process still runs.
    #[must_use]
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(pid, signal).unwrap();
    }

    /// Asks it to stop, and waits for its end; `None` if a signal ended it.
    #[must_use]
    pub fn stop(mut self) -> Option<i32> {
        self.signal(Signal::SIGTERM);
        self.child.wait().unwrap().code()
    }

    /// Kills it as nothing else does, and waits for its end.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Pullgate {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill().and_then(|()| self.child.wait()));
    }
}

/// Waits until the process says that it is ready, or ends without a word. What it hands over is
/// closed, unless it is kept.
fn is_ready(socket: &UnixDatagram, child: &mut Child, mut stored: Option<&mut Stored>) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let mut word = [0; 64];
        let mut space = nix::cmsg_space!([RawFd; 8]);
        let mut parts = [IoSliceMut::new(&mut word)];
        let space = stored.is_some().then_some(&mut space[..]);
        // A machine that was frozen and thawed ends waits as well, signal(7).
        let (descriptor, flags) = (socket.as_raw_fd(), MsgFlags::empty());
        if let Ok(message) = recvmsg::<()>(descriptor, &mut parts, space, flags) {
            let length = message.bytes;
            if let Some(stored) = &mut stored {
                for control in message.cmsgs().unwrap() {
                    if let ControlMessageOwned::ScmRights(descriptors) = control {
                        stored.0.extend(descriptors);
                    }
                }
            }
            if word[..length].starts_with(b"READY=1") {
                return true;
            }
        }
        if child.try_wait().unwrap().is_some() {
            return false;
        }
    }
    false
}

/// Receives for the service manager, for as long as a test may ask for it.
fn listen(socket: &UnixDatagram, received: &Weak<Mutex<Vec<String>>>) {
    let mut word = [0; 128];
    loop {
        // It ends by its time limit as well.
        let message = socket.recv(&mut word);
        let Some(received) = received.upgrade() else {
            return;
        };
        if let Ok(length) = message {
            let text = String::from_utf8_lossy(&word[..length]);
            received.lock().unwrap().push(text.into_owned());
        }
    }
}

/// The JSON that a socket answers a request with.
///
/// # Errors
///
/// Returns why there is none: no process listens, or the other answer.
pub fn http(socket: &Path, method: &str, path: &str, body: &str) -> io::Result<Value> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(format!("{head}{body}").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head.starts_with("HTTP/1.1 200 ") {
        Ok(serde_json::from_str(body)?)
    } else {
        Err(io::Error::other(answer))
    }
}

/// Runs `pullgate` in the origin to its end.
#[must_use]
pub fn output(network: &Network, config: &Path, arguments: &[&str]) -> Output {
    command(network, config).args(arguments).output().unwrap()
}

/// The built binary, next to the one that runs us.
#[must_use]
pub fn binary() -> PathBuf {
    let ours = std::env::current_exe().unwrap();
    let found = ours
        .ancestors()
        .skip(1)
        .map(|directory| directory.join("pullgate"));
    let found = found.take(2).find(|path| path.is_file());
    match found {
        Some(path) => path,
        None => panic!("there is no pullgate to test: run `cargo xtask test`"),
    }
}

fn command(network: &Network, config: &Path) -> Command {
    let mut command = network.command(Host::Origin, binary());
    command.arg("--config").arg(config);
    command
}

fn total(status: &Value, wanted: impl Fn(&str) -> bool) -> u64 {
    let metrics = status["metrics"].as_object().unwrap();
    let wanted = metrics.iter().filter(|(name, _)| wanted(name));
    let sum = wanted.fold(0.0, |sum, (_, value)| sum + value.as_f64().unwrap());
    // Counters are whole and small.
    format!("{sum:.0}").parse().unwrap()
}

/// What a process has logged, and who waits for more.
#[derive(Default)]
struct Events {
    seen: Mutex<Vec<Value>>,
    more: Condvar,
}

impl Events {
    fn push(&self, line: &str) {
        // Whatever is not an event is kept as it is: a panic, a last word.
        let event = serde_json::from_str(line).unwrap_or_else(|_| Value::from(line));
        self.seen.lock().unwrap().push(event);
        self.more.notify_all();
    }

    fn all(&self) -> Vec<Value> {
        self.seen.lock().unwrap().clone()
    }

    fn wait(&self, mark: usize, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = self.seen.lock().unwrap();
        loop {
            if let Some(event) = seen[mark..].iter().find(|event| wanted(event)) {
                return event.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "not within {PATIENCE:?}: {what}; seen: {:#?}",
                &seen[mark..]
            );
            seen = self.more.wait_timeout(seen, left).unwrap().0;
        }
    }
}
