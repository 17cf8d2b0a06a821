//! A virtual machine that is the origin: one of Debian's kernels, with real systemd, in software
//! emulation. Its cards are ports of the lab's bridge, so that edge and stranger are the lab's own.

use std::cell::Cell;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use tests::net::{Host, Network};

/// A card of the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Card {
    /// Its name, which udev gives it when the root is mounted; the kernel's is another one.
    pub(crate) name: &'static str,
    /// qemu's device.
    device: &'static str,
    mac: [u8; 6],
}

impl Card {
    /// Its hardware address.
    #[must_use]
    pub(crate) fn mac(self) -> [u8; 6] {
        self.mac
    }
}

/// What most hosts in clouds have.
pub(crate) const VIRTIO: Card = Card {
    name: "wan0",
    device: "virtio-net-pci",
    mac: [2, 0, 0, 0, 0, 1],
};
/// The same, of a hypervisor that does not let the guest switch its offloads off.
pub(crate) const VIRTIO_FIXED: Card = Card {
    name: "wan1",
    device: "virtio-net-pci,ctrl_guest_offloads=off",
    mac: [2, 0, 0, 0, 0, 0x11],
};
/// Its driver has no native XDP.
pub(crate) const E1000E: Card = Card {
    name: "wan2",
    device: "e1000e",
    mac: [2, 0, 0, 0, 0, 0x12],
};
/// Its driver has native XDP from Linux 6.6 on.
pub(crate) const VMXNET3: Card = Card {
    name: "wan3",
    device: "vmxnet3",
    mac: [2, 0, 0, 0, 0, 0x13],
};
/// All cards of a machine.
pub(crate) const CARDS: [Card; 4] = [VIRTIO, VIRTIO_FIXED, E1000E, VMXNET3];

/// A running machine; it is switched off when dropped.
pub(crate) struct Machine<'a> {
    network: &'a Network,
    arguments: Vec<String>,
    running: Running,
    /// Numbers the scripts.
    next: Cell<u32>,
}

/// From one boot to the next.
struct Running {
    qemu: Child,
    agent: UnixStream,
    lines: Receiver<String>,
}

impl<'a> Machine<'a> {
    /// Boots what `cargo xtask` has prepared in `directory`, with the files of `seed` added to its root,
    /// and returns when its agent answers.
    pub(crate) fn boot(
        network: &'a Network,
        directory: &Path,
        seed: &Path,
        memory: &str,
    ) -> anyhow::Result<Self> {
        let disk = network.path("root.img");
        let mut copy = Command::new("cp");
        copy.arg("--sparse=always")
            .arg(directory.join("root.img"))
            .arg(&disk);
        ensure!(copy.status()?.success(), "no room for a disk");
        let archive = network.path("seed.tar");
        let mut tar = Command::new("tar");
        tar.args(["--create", "--owner=root", "--group=root", "--file"])
            .arg(&archive)
            .arg("--directory")
            .arg(seed);
        for name in fs::read_dir(seed)?.flatten() {
            tar.arg(name.file_name());
        }
        ensure!(tar.status()?.success(), "no room for an archive");
        for number in 0..CARDS.len() {
            network.tap(&tap(number));
        }
        let arguments = arguments(network, directory, memory);
        let running = Running::start(network, &arguments)?;
        Ok(Self {
            network,
            arguments,
            running,
            next: Cell::new(0),
        })
    }

    /// Reboots, and returns when systemd has started all that it starts.
    ///
    /// The machine is switched off and on again: within one process of the emulator a second boot takes
    /// four times as long as the first.
    pub(crate) fn reboot(&mut self) -> anyhow::Result<()> {
        self.run("systemctl --no-block reboot")?;
        let deadline = Instant::now() + BOOT;
        while self.running.qemu.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "it does not go down");
            std::thread::sleep(Duration::from_millis(20));
        }
        self.running = Running::start(self.network, &self.arguments)?;
        self.settle()
    }

    /// Returns when systemd has started all that it starts, and udev has named all cards.
    pub(crate) fn settle(&self) -> anyhow::Result<()> {
        let (_, state) = self.try_run("systemctl is-system-running --wait; udevadm settle")?;
        match state.trim() {
            "running" => Ok(()),
            state => {
                let (_, failed) = self.try_run("systemctl --failed --no-legend --plain")?;
                bail!("systemd is {state}: {failed}")
            }
        }
    }

    /// Runs a script, which must succeed; returns what it prints.
    pub(crate) fn run(&self, script: &str) -> anyhow::Result<String> {
        let (status, text) = self.try_run(script)?;
        ensure!(status == 0, "{script}: status {status}: {text}");
        Ok(text)
    }

    /// Runs a script; returns its exit code and what it prints.
    pub(crate) fn try_run(&self, script: &str) -> anyhow::Result<(i32, String)> {
        let id = self.next.replace(self.next.get() + 1);
        let mut message = format!("{id} ");
        for byte in script.bytes() {
            write!(message, "{byte:02x}")?;
        }
        message.push('\n');
        (&self.running.agent).write_all(message.as_bytes())?;
        let deadline = Instant::now() + SCRIPT;
        let mut text = String::new();
        let (said, ended) = (format!("{id} | "), format!("{id} = "));
        loop {
            let line = self.line(deadline).with_context(|| script.to_owned())?;
            if let Some(line) = line.strip_prefix(&said) {
                text += line;
                text.push('\n');
            } else if let Some(status) = line.strip_prefix(&ended) {
                return Ok((status.trim().parse()?, text));
            }
        }
    }

    /// Writes a file of text.
    pub(crate) fn write(&self, path: &str, content: &str) -> anyhow::Result<()> {
        let script =
            format!("mkdir -p \"$(dirname {path})\" && cat >{path} <<'{END}'\n{content}{END}\n");
        self.run(&script).map(drop)
    }

    /// Waits until a script succeeds.
    pub(crate) fn eventually(&self, what: &str, script: &str) -> anyhow::Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (status, text) = self.try_run(script)?;
            if status == 0 {
                return Ok(text);
            }
            ensure!(Instant::now() < deadline, "not in time: {what}: {text}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// What `pullgate status` says, whatever its exit code.
    pub(crate) fn status(&self) -> anyhow::Result<Value> {
        let (_, text) = self.try_run("pullgate status --json 2>/dev/null")?;
        serde_json::from_str(&text).with_context(|| text.clone())
    }

    /// What is known if something goes wrong.
    #[must_use]
    pub(crate) fn last_words(&self) -> String {
        let words = "journalctl --boot --no-pager --lines=60 --unit='pullgate*' | cut -c1-400; ip -brief link";
        self.try_run(words)
            .map_or_else(|error| error.to_string(), |(_, text)| text)
    }

    /// The network that it is in.
    #[must_use]
    pub(crate) fn network(&self) -> &'a Network {
        self.network
    }

    fn line(&self, deadline: Instant) -> anyhow::Result<String> {
        self.running.line(deadline)
    }
}

impl Running {
    /// Boots. Now and then the emulator trips over a kernel that patches its own code while another
    /// processor runs it (an int3 where none is any more, QEMU 7.2 without KVM): that says nothing of
    /// what is tested, so it is said aloud and booted again.
    fn start(network: &Network, arguments: &[String]) -> anyhow::Result<Self> {
        for _ in 1..BOOTS {
            match Self::start_once(network, arguments) {
                Err(error) if format!("{error:#}").contains("Oops: int3") => {
                    println!("  the emulator broke the kernel's boot (int3); once more");
                }
                started => return started,
            }
        }
        Self::start_once(network, arguments)
    }

    /// Switches the machine on, and returns when its agent answers.
    fn start_once(network: &Network, arguments: &[String]) -> anyhow::Result<Self> {
        let log = fs::File::create(network.path("qemu.log"))?;
        let mut qemu = Command::new("nsenter");
        // Ctrl-C is for us.
        qemu.process_group(0)
            .arg(format!("--net=/run/netns/{}", network.hub()))
            .args(["--", "qemu-system-x86_64"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut qemu = qemu.spawn().context("qemu")?;
        let deadline = Instant::now() + BOOT;
        let agent = loop {
            // The last boot's socket refuses, until there is a new one.
            if let Ok(agent) = UnixStream::connect(network.path("agent")) {
                break agent;
            }
            if qemu.try_wait()?.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(network.path("qemu.log"))?;
                bail!("qemu does not run: {log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let (sender, lines) = channel();
        let reader = BufReader::new(agent.try_clone()?);
        std::thread::spawn(move || {
            for line in reader.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let running = Self { qemu, agent, lines };
        loop {
            let line = running.line(deadline).with_context(|| {
                let console = fs::read_to_string(network.path("console"));
                format!("no boot; the console says: {}", console.unwrap_or_default())
            })?;
            if line.starts_with("hello") {
                return Ok(running);
            }
        }
    }

    fn line(&self, deadline: Instant) -> anyhow::Result<String> {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => bail!("the machine does not answer"),
            Err(RecvTimeoutError::Disconnected) => bail!("the machine is gone"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // nsenter has become qemu.
        drop(self.qemu.kill());
        drop(self.qemu.wait());
    }
}

/// How qemu is called.
fn arguments(network: &Network, directory: &Path, memory: &str) -> Vec<String> {
    let at = |name: &str| network.path(name).display().to_string();
    let prepared = |name: &str| directory.join(name).display().to_string();
    let mut arguments = Vec::new();
    let mut option = |name: &str, value: &str| {
        arguments.push(format!("-{name}"));
        arguments.push(value.to_owned());
    };
    for (name, value) in [
        ("machine", "q35,accel=tcg"),
        ("cpu", "max"),
        ("smp", "2"),
        ("m", memory),
        ("display", "none"),
        ("monitor", "none"),
        ("append", "console=ttyS0 quiet panic=-1"),
        ("device", "virtio-rng-pci"),
        ("device", "virtio-serial-pci"),
        ("device", "virtserialport,chardev=agent,name=agent"),
    ] {
        option(name, value);
    }
    option("kernel", &prepared("vmlinuz"));
    option("initrd", &prepared("initrd"));
    option("serial", &format!("file:{}", at("console")));
    let socket = format!("socket,id=agent,path={},server=on,wait=off", at("agent"));
    option("chardev", &socket);
    for (id, name, mode) in [("root", "root.img", "off"), ("seed", "seed.tar", "on")] {
        let file = at(name);
        let drive = format!("if=none,id={id},file={file},format=raw,cache=unsafe,readonly={mode}");
        option("drive", &drive);
        option("device", &format!("virtio-blk-pci,drive={id}"));
    }
    for (number, card) in CARDS.iter().enumerate() {
        let (tap, mac) = (tap(number), colons(card.mac));
        option(
            "netdev",
            &format!("tap,id=net{number},ifname={tap},script=no,downscript=no"),
        );
        let device = card.device;
        option(
            "device",
            &format!("{device},netdev=net{number},mac={mac},romfile="),
        );
    }
    arguments.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
    arguments
}

/// The port of the bridge that a card is connected to.
fn tap(number: usize) -> String {
    format!("tap{number}")
}

/// The files that a machine gets: names and address of its cards, and what is to be installed.
pub(crate) fn seed(directory: &Path) -> anyhow::Result<PathBuf> {
    let seed = directory.join("seed");
    for card in CARDS {
        let link = format!(
            "[Match]\nPermanentMACAddress={}\n[Link]\nName={}\n",
            colons(card.mac),
            card.name
        );
        put(
            &seed,
            &format!("etc/systemd/network/10-{}.link", card.name),
            &link,
        )?;
    }
    put(
        &seed,
        "etc/systemd/network/20-uplink.network",
        uplink(VIRTIO.name),
    )?;
    Ok(seed)
}

/// The origin's addresses and default routes on an interface, as systemd-networkd reads them.
#[must_use]
pub(crate) fn uplink(interface: &str) -> String {
    let mut text = format!(
        "[Match]\nName={interface}\n[Network]\nIPv6AcceptRA=no\nLinkLocalAddressing=ipv6\n"
    );
    for address in Host::Origin.addresses() {
        let length = if address.is_ipv4() { 32 } else { 128 };
        text += &format!("[Address]\nAddress={address}/{length}\nDuplicateAddressDetection=none\n");
    }
    for everywhere in ["0.0.0.0/0", "::/0"] {
        text += &format!("[Route]\nDestination={everywhere}\nScope=link\n");
    }
    text
}

/// Writes a file of the seed.
pub(crate) fn put(seed: &Path, path: &str, content: impl AsRef<[u8]>) -> anyhow::Result<()> {
    let path = seed.join(path);
    fs::create_dir_all(path.parent().context("a file")?)?;
    fs::write(path, content).map_err(Into::into)
}

/// A hardware address as it is written.
#[must_use]
pub(crate) fn colons(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Ends a file; no line of it says so.
const END: &str = "END OF FILE";
/// Boots that the emulator may break, and one more.
const BOOTS: u32 = 3;
/// For a boot, a script, and anything to come about: the host may stall a machine for half a minute.
const BOOT: Duration = Duration::from_secs(300);
const SCRIPT: Duration = Duration::from_secs(300);
const PATIENCE: Duration = Duration::from_secs(90);
