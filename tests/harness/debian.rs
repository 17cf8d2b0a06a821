//! A clean Debian to install the package in, and a stand-in for its systemd.
//!
//! systemd is not process 1 on test machines, so the stand-in reads the installed units and does what
//! they say of users, capabilities, sockets and signals.

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::net::{Host, Network};
use crate::pki::{Pki, SHOP};
use crate::{PATIENCE, eventually};

/// A clean Debian in a directory, with the origin's network.
pub struct Debian<'a> {
    network: &'a Network,
    root: PathBuf,
    /// Holds the mounts; they go with it.
    holder: Child,
}

impl<'a> Debian<'a> {
    /// Makes one, with the mounts that it needs; they are seen by what runs in it alone.
    #[must_use]
    pub fn new(network: &'a Network) -> Self {
        let root = network.path("debian");
        let base = target().join("debian");
        assert!(
            base.exists(),
            "run `cargo xtask test`, which makes a Debian to install in"
        );
        let copied = Command::new("cp")
            .arg("--archive")
            .args([&base, &root])
            .status();
        assert!(copied.unwrap().success());
        let script = "mount --types proc proc $0/proc && mount --types sysfs sysfs $0/sys \
                      && mount --types bpf bpf $0/sys/fs/bpf && mount --rbind /dev $0/dev \
                      && touch $0/mounted && exec sleep infinity";
        let mut holder = network.command(Host::Origin, "unshare");
        holder.args(["--mount", "--propagation", "private", "sh", "-c", script]);
        let holder = holder.arg(&root).stdin(Stdio::null()).spawn().unwrap();
        let debian = Self {
            network,
            root,
            holder,
        };
        eventually("Debian is mounted", || {
            debian.path("mounted").exists().then_some(())
        });
        debian
    }

    /// The path of a file in it.
    #[must_use]
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// The content of a file.
    #[must_use]
    pub fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    /// Keeps owner and mode, as an editor does.
    pub fn write(&self, path: &str, content: &str) {
        fs::write(self.path(path), content).unwrap();
    }

    /// A command in it.
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args([
            "--mount",
            "--net",
            "--target",
            &self.holder.id().to_string(),
        ]);
        command.arg("chroot").arg(&self.root).args(words);
        command
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// Runs a command to its end.
    #[must_use]
    pub fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Whether a filter is pinned.
    #[must_use]
    pub fn has_pins(&self) -> bool {
        text(&self.run(&["ls", "/sys/fs/bpf"]).stdout).contains("pullgate")
    }

    /// Installs the package of this number; the second is the first with a higher version.
    pub fn install(&self, number: u32) {
        let package = format!("pullgate_0.0.{number}_amd64.deb");
        fs::copy(
            target().join("dist/test").join(&package),
            self.path(&package),
        )
        .unwrap();
        let output = self.run(&["dpkg", "--install", &package]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        fs::remove_file(self.path(&package)).unwrap();
    }

    /// Writes what an operator adds: his interface, and a host.
    pub fn configure(&self, pki: &Pki) {
        for (name, group) in [
            ("shop.example.pem", None),
            ("shop.example.key", Some("pullgate-gate")),
            ("ours-ca.pem", None),
        ] {
            let path = format!("etc/pullgate/{name}");
            fs::copy(pki.path(name), self.path(&path)).unwrap();
            let mode = if group.is_some() { "640" } else { "644" };
            let file = format!("/{path}");
            assert!(
                self.run(&["chown", &format!("root:{}", group.unwrap_or("root")), &file])
                    .status
                    .success()
            );
            assert!(self.run(&["chmod", mode, &file]).status.success());
        }
        let shipped = self
            .read("etc/pullgate/pullgate.toml")
            .replace("\"auto\"", "[\"wan0\"]");
        let host = format!(
            "\n[gate]\nlisten = [\"0.0.0.0:443\", \"[::]:443\"]\n[[gate.host]]\nnames = [\"{SHOP}\"]\n\
             certificate = \"shop.example.pem\"\nkey = \"shop.example.key\"\ntrust = [\"ours-ca.pem\"]\n\
             upstream = \"127.0.0.1:8080\"\n"
        );
        self.write("etc/pullgate/pullgate.toml", &(shipped + &host));
    }

    /// Lets systemd itself judge the installed units: their words, and what they leave exposed.
    pub fn judge_units(&self) {
        // What is allowed, in tenths; the best that was found elsewhere is 2.1.
        for (unit, exposure) in [
            ("pullgate-filter.service", "18"),
            ("pullgate-ranges.service", "15"),
            ("pullgate-gate.service", "15"),
        ] {
            let threshold = format!("--threshold={exposure}");
            let path = format!("/usr/lib/systemd/system/{unit}");
            let words = [
                "systemd-analyze",
                "security",
                "--offline=true",
                &threshold,
                &path,
            ];
            let judged = self.run(&words);
            assert!(judged.status.success(), "{unit}: {}", text(&judged.stdout));
            let verified = self.run(&["systemd-analyze", "verify", "--man=no", &path]);
            assert!(verified.status.success(), "{unit}");
            assert_eq!(text(&verified.stderr), "", "{unit}");
            self.lets_call(unit);
        }
    }

    /// Compares the calls that a unit lets through with those that the role confines itself to: the
    /// unit must not be the narrower one.
    fn lets_call(&self, unit: &str) {
        let groups = text(
            &self
                .run(&["systemd-analyze", "syscall-filter", "--no-pager"])
                .stdout,
        );
        let mut allowed = BTreeSet::new();
        let words = values(
            &self.read(&format!("usr/lib/systemd/system/{unit}")),
            "SystemCallFilter",
        );
        for line in &words {
            let (is_denied, names) = match line.strip_prefix('~') {
                Some(names) => (true, names),
                None => (false, line.as_str()),
            };
            for call in names
                .split_whitespace()
                .flat_map(|name| calls(&groups, name))
            {
                match is_denied {
                    true => allowed.remove(&call),
                    false => allowed.insert(call),
                };
            }
        }
        let source = include_str!("../../filter-user/src/confine/calls.rs");
        let made = source.split("libc::SYS_").skip(1).map(|rest| {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            &rest[..end.unwrap_or(rest.len())]
        });
        let on_the_way = [
            "seccomp",
            "landlock_create_ruleset",
            "landlock_add_rule",
            "landlock_restrict_self",
        ];
        for call in made.chain(on_the_way) {
            let is_of_another = match call {
                "bpf" => unit != "pullgate-filter.service",
                "pidfd_getfd" => unit != "pullgate-gate.service",
                // The unit sets the limit; and this is the older name of another call.
                "setrlimit" => true,
                _ => false,
            };
            assert!(
                is_of_another || allowed.contains(call),
                "{unit} does not let {call} through"
            );
        }
    }

    /// Where journald would listen.
    #[must_use]
    pub fn journal(&self) -> Arc<Mutex<String>> {
        fs::create_dir_all(self.path("run/systemd/journal")).unwrap();
        let socket = self.path("run/systemd/journal/socket");
        let journal = UnixDatagram::bind(&socket).unwrap();
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
        journal.set_read_timeout(Some(PATIENCE / 100)).unwrap();
        let entries = Arc::new(Mutex::new(String::new()));
        let kept = Arc::downgrade(&entries);
        std::thread::spawn(move || {
            let mut entry = [0; 4096];
            while let Some(entries) = kept.upgrade() {
                // It ends by its time limit as well.
                if let Ok(length) = journal.recv(&mut entry) {
                    entries.lock().unwrap().push_str(&text(&entry[..length]));
                }
            }
        });
        entries
    }

    /// What `pullgate-gate.socket` binds.
    #[must_use]
    pub fn listen(&self) -> Vec<TcpListener> {
        let unit = self.read("usr/lib/systemd/system/pullgate-gate.socket");
        let addresses = values(&unit, "ListenStream");
        let addresses: Vec<SocketAddr> =
            addresses.iter().map(|text| text.parse().unwrap()).collect();
        let sockets = self.network.on(Host::Origin, || {
            let sockets = addresses
                .iter()
                .map(|address| pullgate::gate::bind(*address).unwrap());
            sockets.collect::<Vec<_>>()
        });
        for socket in &sockets {
            // Processes that are started inherit them.
            fcntl(socket, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        }
        sockets
    }

    /// Starts a role as its unit says, and returns when it says that it is ready.
    #[must_use]
    pub fn start(&self, name: &'static str, sockets: &[TcpListener]) -> Service {
        let unit = self.read(&format!("usr/lib/systemd/system/pullgate-{name}.service"));
        let path = format!("run/{name}.notify");
        let notify = self.path(&path);
        fs::remove_file(&notify).ok();
        let manager = UnixDatagram::bind(&notify).unwrap();
        fs::set_permissions(&notify, fs::Permissions::from_mode(0o666)).unwrap();
        manager.set_read_timeout(Some(PATIENCE)).unwrap();
        let value = |name: &str, default: &str| {
            let found = values(&unit, name).pop();
            found.unwrap_or_else(|| default.to_owned())
        };
        let group = value("Group", "root");
        let groups = match value("SupplementaryGroups", "") {
            more if more.is_empty() => "--clear-groups".to_owned(),
            more => format!("--groups={}", self.number_of_group(&more)),
        };
        let bounds = value("CapabilityBoundingSet", "");
        let bounds = bounds
            .split_whitespace()
            .map(|it| it.trim_start_matches("CAP_").to_lowercase());
        let bounds: String = bounds.map(|it| format!(",+{it}")).collect();
        let mut words = vec![
            "setpriv".to_owned(),
            format!("--reuid={}", value("User", "root")),
            format!("--regid={group}"),
            groups,
            format!("--bounding-set=-all{bounds}"),
            "--inh-caps=-all".to_owned(),
            "--no-new-privs".to_owned(),
        ];
        words.extend(value("ExecStart", "").split_whitespace().map(str::to_owned));
        // Sockets are numbered from 3 on; the rest of the announcement is the process's own number.
        let sockets: Vec<RawFd> = match name {
            "gate" => sockets.iter().map(|socket| socket.as_raw_fd()).collect(),
            _ => Vec::new(),
        };
        let moves = sockets
            .iter()
            .enumerate()
            .map(|(n, it)| format!("exec {}<&{it};", 3 + n));
        let script = format!(
            "{} umask {}; {} LISTEN_PID=$BASHPID exec {}",
            moves.collect::<String>(),
            value("UMask", "0022"),
            if sockets.is_empty() {
                String::new()
            } else {
                format!("LISTEN_FDS={}", sockets.len())
            },
            words.join(" ")
        );
        let mut command = self.command(&["bash", "-c", &script]);
        command
            .env("NOTIFY_SOCKET", format!("/{path}"))
            .stdin(Stdio::null());
        // What systemd calls the journal; who is told so speaks the journal's own protocol.
        let log = fs::File::create(self.path(&format!("{name}.log"))).unwrap();
        let journal = log.metadata().unwrap();
        command.env(
            "JOURNAL_STREAM",
            format!("{}:{}", journal.dev(), journal.ino()),
        );
        command.stderr(log);
        let process = command.spawn().unwrap();
        let service = Service {
            name,
            user: value("User", "root"),
            process,
            manager,
        };
        assert!(
            service.is_told("READY=1"),
            "{name}: {}",
            self.read(&format!("{name}.log"))
        );
        service
    }

    fn number_of_group(&self, name: &str) -> String {
        let groups = self.read("etc/group");
        let line = groups
            .lines()
            .find(|line| line.starts_with(&format!("{name}:")));
        line.unwrap().split(':').nth(2).unwrap().to_owned()
    }
}

impl Drop for Debian<'_> {
    fn drop(&mut self) {
        self.holder.kill().and_then(|()| self.holder.wait()).ok();
    }
}

/// A role that was started as its unit says.
pub struct Service {
    /// The role.
    pub name: &'static str,
    user: String,
    process: Child,
    manager: UnixDatagram,
}

impl Service {
    fn is_told(&self, word: &str) -> bool {
        let mut message = [0; 128];
        loop {
            match self.manager.recv(&mut message) {
                Ok(length) if message[..length].starts_with(word.as_bytes()) => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill(
            Pid::from_raw(i32::try_from(self.process.id()).unwrap()),
            signal,
        )
        .unwrap();
    }

    /// Lets it read its configuration again, and waits until it has.
    pub fn reload(&self) {
        self.signal(Signal::SIGHUP);
        assert!(self.is_told("RELOADING=1") && self.is_told("READY=1"));
    }

    /// Stops it.
    pub fn stop(&mut self) {
        self.signal(Signal::SIGTERM);
        assert_eq!(
            self.process.wait().unwrap().code(),
            Some(0),
            "{}",
            self.name
        );
    }

    /// Looks whether it has what its unit grants, and no more.
    pub fn is_as_its_unit_says(&self) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = |name: &str| {
            let found = status.lines().find_map(|line| line.strip_prefix(name));
            found.unwrap().trim().to_owned()
        };
        assert_eq!(
            line("Uid:").starts_with("0\t"),
            self.user == "root",
            "{}",
            self.name
        );
        let held = line("CapEff:");
        let expected = if self.name == "filter" {
            "000000c000001000"
        } else {
            "0000000000000000"
        };
        assert_eq!(held, expected, "{}", self.name);
        let kib: u64 = line("VmRSS:")
            .trim_end_matches(" kB")
            .trim()
            .parse()
            .unwrap();
        assert!(kib < 128 << 10, "{}: {kib} KiB", self.name);
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.process.kill().and_then(|()| self.process.wait()).ok();
    }
}

/// The calls of a group, and of the groups in it; a call is its own.
fn calls(groups: &str, name: &str) -> Vec<String> {
    if !name.starts_with('@') {
        return vec![name.to_owned()];
    }
    let mut lines = groups.lines().skip_while(|line| *line != name).skip(1);
    let members = lines.by_ref().take_while(|line| line.starts_with(' '));
    let members = members
        .map(str::trim)
        .filter(|member| !member.starts_with('#'));
    members.flat_map(|member| calls(groups, member)).collect()
}

/// What a unit says, each time that it says it.
fn values(unit: &str, name: &str) -> Vec<String> {
    let lines = unit.lines().filter_map(|line| line.split_once('='));
    let named = lines.filter(|(key, _)| *key == name);
    named.map(|(_, value)| value.to_owned()).collect()
}

/// Where what was built is.
fn target() -> PathBuf {
    let binary = crate::daemon::binary();
    binary.ancestors().nth(2).unwrap().to_owned()
}

/// What a command has written.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
