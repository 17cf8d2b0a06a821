//! A clean Debian to install the package in, whose systemd is process 1 of a PID namespace.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::eventually;
use crate::gate::PLENTY;
use crate::net::{Host, INTERFACE, Network};
use crate::pki::{Pki, SHOP};

/// A clean Debian in a directory, with the origin's network.
pub struct Debian<'a> {
    network: &'a Network,
    root: PathBuf,
    /// Waits for its process 1, with which everything in it ends.
    holder: Child,
}

impl<'a> Debian<'a> {
    /// Makes one, and returns when it has booted.
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
        let holder = boot(network, &root);
        let debian = Self {
            network,
            root,
            holder,
        };
        debian.has_booted();
        debian
    }

    /// Boots it again; what was pinned is gone, and its interface is not.
    pub fn reboot(&mut self) {
        self.turn_off();
        self.holder = boot(self.network, &self.root);
        self.has_booted();
    }

    fn has_booted(&self) {
        eventually("Debian has booted", || {
            let state = self.run(&["systemctl", "is-system-running"]);
            (text(&state.stdout).trim() == "running").then_some(())
        });
    }

    fn turn_off(&mut self) {
        if let Some(init) = self.init() {
            match kill(Pid::from_raw(init), Signal::SIGKILL) {
                Ok(_) | Err(_) => {}
            }
        }
        drop(self.holder.wait());
    }

    /// Its process 1, by the number that it has outside.
    fn init(&self) -> Option<i32> {
        let holder = self.holder.id();
        let children = fs::read_to_string(format!("/proc/{holder}/task/{holder}/children"));
        children.ok()?.trim().parse().ok()
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

    /// Runs a command to its end.
    #[must_use]
    pub fn run(&self, words: &[&str]) -> Output {
        let target = self.init().unwrap_or_default().to_string();
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup"]);
        command.args(["--target", &target]).args(words);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command.output().unwrap()
    }

    /// What a command prints, which must succeed.
    #[must_use]
    pub fn says(&self, words: &[&str]) -> String {
        let output = self.run(words);
        let (said, error) = (text(&output.stdout), text(&output.stderr));
        assert!(
            output.status.success(),
            "{}: {said}{error}",
            words.join(" ")
        );
        said
    }

    /// Runs what an operator types, all of which must succeed.
    pub fn follow(&self, commands: &[&str]) {
        for command in commands {
            drop(self.says(&["sh", "-c", command]));
        }
    }

    /// Tells its systemd something, which must succeed.
    pub fn systemctl(&self, words: &[&str]) {
        let mut command = vec!["systemctl"];
        command.extend(words);
        assert_eq!(self.says(&command), "");
    }

    /// What its systemd knows of a unit.
    #[must_use]
    pub fn property(&self, unit: &str, name: &str) -> String {
        let words = ["systemctl", "show", "--value", "--property", name, unit];
        self.says(&words).trim().to_owned()
    }

    /// What a role has said, in the journal's own fields.
    #[must_use]
    pub fn journal(&self, role: &str) -> String {
        let unit = format!("--unit=pullgate-{role}");
        self.says(&["journalctl", "--output=json", &unit])
    }

    /// Whether a filter is pinned.
    #[must_use]
    pub fn has_pins(&self) -> bool {
        let pins = "find /sys/fs/bpf -path '*pullgate*' ! -type d";
        !self.says(&["sh", "-c", pins]).is_empty()
    }

    /// Looks whether a role runs, has what its unit grants, and no more.
    pub fn runs_as_its_unit_says(&self, role: &str) {
        let unit = format!("pullgate-{role}.service");
        assert_eq!(self.property(&unit, "ActiveState"), "active", "{role}");
        let process = self.property(&unit, "MainPID");
        let held = match role {
            "filter" => "000000c000001000",
            _ => "0000000000000000",
        };
        self.runs_as_user(role, &process, held);
    }

    /// Looks whether a process of a role has the role's user, these capabilities, and no more.
    pub fn runs_as_user(&self, role: &str, process: &str, capabilities: &str) {
        let status = self.says(&["cat", &format!("/proc/{process}/status")]);
        let line = |name: &str| {
            let found = status.lines().find_map(|line| line.strip_prefix(name));
            found.unwrap().trim().to_owned()
        };
        let user = format!("pullgate-{role}");
        let user = self.says(&["id", "--user", &user]).trim().to_owned();
        assert_eq!(line("Uid:"), vec![user; 4].join("\t"), "{role}");
        let group = self.says(&["id", "--group", "pullgate-gate"]);
        let is_in_gates_group = line("Groups:").split(' ').any(|it| it == group.trim());
        assert_eq!(is_in_gates_group, role == "gate", "{role}");
        for sets in ["CapEff:", "CapPrm:"] {
            assert_eq!(line(sets), capabilities, "{role}: {sets}");
        }
        // Not even root, in its place, would reach the service manager or a bus.
        for command in [["systemctl", "--no-pager"], ["busctl", "list"]] {
            let mut words = vec!["nsenter", "--mount", "--target", process];
            words.extend(command);
            assert!(!self.run(&words).status.success(), "{role}: {command:?}");
        }
        // Our own, and those of a unit.
        let filters: u32 = line("Seccomp_filters:").parse().unwrap();
        assert!(filters > 1, "{role}");
        let resident = line("VmRSS:");
        let kib: u64 = resident.trim_end_matches(" kB").parse().unwrap();
        assert!(kib < 128 << 10, "{role}: {kib} KiB");
    }

    /// The processes that the main one of a unit has started.
    #[must_use]
    pub fn children(&self, unit: &str) -> Vec<String> {
        let main = self.property(unit, "MainPID");
        let children = self.says(&["cat", &format!("/proc/{main}/task/{main}/children")]);
        children.split_whitespace().map(str::to_owned).collect()
    }

    /// Copies the package of this number there; the second is the first with a higher version.
    pub fn receive(&self, number: u32, as_name: &str) {
        self.take(&format!("pullgate_0.0.{number}_amd64.deb"), as_name);
    }

    /// Copies the tarball there, by the name that it has anyway.
    pub fn receive_tarball(&self, as_name: &str) {
        self.take(as_name.rsplit('/').next().unwrap(), as_name);
    }

    fn take(&self, built: &str, as_name: &str) {
        let path = self.path(as_name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::copy(target().join("dist/test").join(built), path).unwrap();
    }

    /// Writes what an operator adds: a host, and its files.
    pub fn configure(&self, pki: &Pki) {
        for name in ["shop.example.pem", "shop.example.key", "ours-ca.pem"] {
            let file = format!("/etc/pullgate/{name}");
            fs::copy(pki.path(name), self.path(&file[1..])).unwrap();
            assert_eq!(self.says(&["chmod", "644", &file]), "");
        }
        let path = "etc/pullgate/pullgate.toml";
        let host = format!(
            "\n[gate]\nlisten = [\"0.0.0.0:443\", \"[::]:443\"]\n{PLENTY}\n[[gate.host]]\nnames = [\"{SHOP}\"]\n\
             certificate = \"shop.example.pem\"\nkey = \"shop.example.key\"\ntrust = [\"ours-ca.pem\"]\n\
             upstream = \"127.0.0.1:8080\"\n"
        );
        self.write(path, &(self.read(path) + &host));
    }

    /// Lets systemd itself judge the installed units: their words, and what they leave exposed.
    pub fn judge_units(&self) {
        // What is allowed, in tenths; the best that was found elsewhere is 2.1.
        for (unit, exposure) in [
            ("pullgate-filter.service", "18"),
            ("pullgate-ranges.service", "15"),
            ("pullgate-gate.service", "15"),
            ("pullgate-directories.service", "18"),
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
            if unit != "pullgate-directories.service" {
                self.lets_call(unit);
            }
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
                if is_denied {
                    allowed.remove(&call)
                } else {
                    allowed.insert(call)
                };
            }
        }
        let source = include_str!("../../filter-user/src/host/sandbox/seccomp.rs");
        let made = source.split("libc::SYS_").skip(1).map(|rest| {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            &rest[..end.unwrap_or(rest.len())]
        });
        let on_the_way = [
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
}

impl Drop for Debian<'_> {
    #[expect(clippy::print_stderr, reason = "a test's report")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Of a test that fails once in a hundred runs, this is all there is.
            let words = [
                "journalctl",
                "--no-pager",
                "--unit=pullgate*",
                "--unit=hand",
            ];
            let said = self.run(&words);
            eprintln!("{}", text(&said.stdout));
        }
        self.turn_off();
    }
}

/// Starts systemd as process 1 of what it alone sees, in the origin's network.
fn boot(network: &Network, root: &Path) -> Child {
    // By which `interfaces = "auto"` finds the one that faces the internet; here it leads nowhere.
    let route = ["ip", "route", "replace", "default", "dev", INTERFACE];
    assert!(network.output(Host::Origin, &route).status.success());
    let mut command = network.command(Host::Origin, "sh");
    command.args(["-c", BOOT]).arg(root).arg(network.cgroup());
    // What it says is in its journal.
    let (nothing, discarded) = (Stdio::null(), Stdio::null());
    command.stdin(nothing).stdout(discarded).spawn().unwrap()
}

/// As a container's manager prepares it (systemd.io/CONTAINER_INTERFACE): nothing of the kernel's
/// that others see too can be written.
const BOOT: &str = r#"
echo $$ > "$1/cgroup.procs"
# It complains when its child is killed; what the child complains of is to be seen.
exec 3>&2 2>/dev/null
exec unshare --mount --propagation private --pid --fork --kill-child --uts --ipc --cgroup sh -ec '
    exec 2>&3 3>&-
    mount --bind "$0" "$0"
    cd "$0"
    mount --types proc proc proc
    mount --bind proc/sys proc/sys
    mount --options remount,bind,ro proc/sys
    mount --types sysfs --options ro sysfs sys
    mount --types cgroup2 cgroup2 sys/fs/cgroup
    mount --types bpf bpf sys/fs/bpf
    mount --types tmpfs --options mode=755 tmpfs run
    mount --types tmpfs --options mode=755 tmpfs dev
    for device in null zero full random urandom tty; do
        touch dev/$device
        mount --bind /dev/$device dev/$device
    done
    ln -s pts/ptmx dev/ptmx
    mkdir -p mnt/outside
    pivot_root . mnt/outside
    umount --lazy /mnt/outside
    exec env --ignore-environment container=test PATH=/usr/sbin:/usr/bin /lib/systemd/systemd
' "$0"
"#;

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
pub(crate) fn target() -> PathBuf {
    let binary = crate::daemon::binary();
    binary.ancestors().nth(2).unwrap().to_owned()
}

/// What a command has written.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
