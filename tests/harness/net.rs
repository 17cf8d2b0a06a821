//! Network namespaces: an origin, an edge and a stranger on one bridge.

use std::fs::File;
use std::net::IpAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use aya::programs::XdpMode;
use filter_ebpf::abi;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};
use tempfile::TempDir;

use crate::janitor::Janitor;
use crate::traffic::Objects;

/// A host of the lab.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Host {
    /// The protected web server's host.
    Origin,
    /// A Cloudflare server.
    Edge,
    /// A client that found the origin's address.
    Stranger,
}

impl Host {
    /// Every host.
    pub const ALL: [Self; 3] = [Self::Origin, Self::Edge, Self::Stranger];

    /// The word for it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Origin => "origin",
            Self::Edge => "edge",
            Self::Stranger => "stranger",
        }
    }

    /// Its IPv4 and IPv6 address. They exist only on the bridge inside the namespaces.
    #[must_use]
    pub fn addresses(self) -> [IpAddr; 2] {
        let [v4, v6] = match self {
            Self::Origin => ["203.0.113.10", "2001:db8:10::10"],
            Self::Edge => ["173.245.48.5", "2400:cb00::5"],
            Self::Stranger => ["198.51.100.7", "2001:db8::7"],
        };
        [v4.parse().unwrap(), v6.parse().unwrap()]
    }

    /// The hardware address of its interface.
    #[must_use]
    pub fn mac(self) -> [u8; 6] {
        [2, 0, 0, 0, 0, self as u8 + 1]
    }
}

/// The namespaces, gone when dropped.
pub struct Network {
    id: String,
    directory: TempDir,
    /// Dropped last: it kills what still runs in the namespaces.
    _janitor: Janitor,
}

impl Network {
    /// Makes the namespaces, and a directory with a bpffs of their own.
    #[must_use]
    pub fn new() -> Self {
        let network = Self::without_origin();
        network.connect(Host::Origin);
        network
    }

    /// Lets the bridge take at once what a program of the origin's sends, for as long as the value lives: the other end
    /// of a veth pair needs a program of its own for that (`veth_xdp_flush`, drivers/net/veth.c).
    #[must_use]
    pub fn taking_what_is_sent(&self) -> Objects {
        Self::attached(self.hub(), "to-origin", "bare_pass")
    }

    /// Drops all that comes in by an interface of a host, for as long as the value lives.
    #[must_use]
    pub fn dropping_all(&self, host: Host, interface: &'static str) -> Objects {
        Self::attached(self.namespace(host), interface, "bare_drop")
    }

    fn attached(namespace: String, interface: &'static str, program: &'static str) -> Objects {
        let attaching = std::thread::spawn(move || {
            Self::enter(&namespace);
            let mut objects = Objects::load();
            let program = objects.program(program);
            program.attach(interface, XdpMode::Driver).unwrap();
            objects
        });
        attaching.join().unwrap()
    }

    /// The same, where the origin is a virtual machine's to be: see [`Self::tap`].
    #[must_use]
    pub fn without_origin() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let id = format!("pg{}-{number}", std::process::id());
        let directory = TempDir::with_prefix("pullgate-lab-").unwrap();
        let names = Host::ALL.map(|host| format!("{id}-{}", host.label()));
        let hub = format!("{id}-hub");
        let all: Vec<_> = names.iter().chain([&hub]).map(String::as_str).collect();
        let network = Self {
            _janitor: Janitor::new(&all, directory.path()),
            id: id.clone(),
            directory,
        };

        let bpf = network.path("bpf");
        std::fs::create_dir(&bpf).unwrap();
        mount(
            Some("bpf"),
            &bpf,
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        for name in all {
            ip(&["netns", "add", name]);
        }
        ip(&[
            "-n",
            &hub,
            "link",
            "add",
            "hub",
            "type",
            "bridge",
            "mcast_snooping",
            "0",
        ]);
        ip(&["-n", &hub, "link", "set", "hub", "up"]);
        for host in [Host::Edge, Host::Stranger] {
            network.connect(host);
        }
        network
    }

    /// Makes a port of the bridge that a virtual machine's card is connected to.
    pub fn tap(&self, name: &str) {
        let hub = &self.hub();
        ip(&["-n", hub, "tuntap", "add", name, "mode", "tap", "vnet_hdr"]);
        ip(&["-n", hub, "link", "set", name, "master", "hub", "up"]);
    }

    /// The name of the bridge's namespace.
    #[must_use]
    pub fn hub(&self) -> String {
        format!("{}-hub", self.id)
    }

    /// Connects a host to the bridge by a new interface.
    pub fn connect(&self, host: Host) {
        let hub = &self.hub();
        let name = self.namespace(host);
        let port = format!("to-{}", host.label());
        let mac = host.mac().map(|byte| format!("{byte:02x}")).join(":");
        ip(&[
            "-n", &name, "link", "add", INTERFACE, "address", &mac, "type", "veth", "peer", "name",
            &port, "netns", hub,
        ]);
        ip(&["-n", hub, "link", "set", &port, "master", "hub", "up"]);
        ip(&["-n", &name, "link", "set", "lo", "up"]);
        ip(&["-n", &name, "link", "set", INTERFACE, "up"]);
        for address in host.addresses() {
            let host_only = format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 });
            ip(&[
                "-n", &name, "addr", "add", &host_only, "dev", INTERFACE, "nodad",
            ]);
        }
        for other in Host::ALL.into_iter().filter(|other| *other != host) {
            for address in other.addresses() {
                ip(&[
                    "-n",
                    &name,
                    "route",
                    "add",
                    &address.to_string(),
                    "dev",
                    INTERFACE,
                ]);
            }
        }
    }

    /// Gives the edge further addresses: these networks' first ones, so many of each /24.
    pub fn add_edges(&self, networks: &[[u8; 3]], each: u8) -> Vec<IpAddr> {
        let [edge, origin] = [Host::Edge, Host::Origin].map(|host| self.namespace(host));
        let mut all = Vec::new();
        for [a, b, c] in networks {
            let network = format!("{a}.{b}.{c}.0/24");
            ip(&["-n", &origin, "route", "add", &network, "dev", INTERFACE]);
            for d in 1..=each {
                let address = IpAddr::from([*a, *b, *c, d]);
                let host_only = format!("{address}/32");
                ip(&["-n", &edge, "addr", "add", &host_only, "dev", INTERFACE]);
                all.push(address);
            }
        }
        all
    }

    /// Connects the stranger to the origin by a pair of interfaces of their own, [`DIRECT`] at both
    /// ends, past the bridge: as fast as the kernel can be.
    pub fn connect_directly(&self) {
        let [origin, stranger] = [Host::Origin, Host::Stranger].map(|host| self.namespace(host));
        let mac = Self::direct_mac()
            .map(|byte| format!("{byte:02x}"))
            .join(":");
        ip(&[
            "-n", &origin, "link", "add", DIRECT, "address", &mac, "type", "veth", "peer", "name",
            DIRECT, "netns", &stranger,
        ]);
        for host in [Host::Origin, Host::Stranger] {
            ip(&["-n", &self.namespace(host), "link", "set", DIRECT, "up"]);
            // Without it a veth has no queues that XDP frames could be sent from or to.
            let words = ["ethtool", "-K", DIRECT, "gro", "on"];
            assert!(self.output(host, &words).status.success());
        }
    }

    /// Puts a file system of [`SMALL_DISK`] bytes where a directory of the lab is to be.
    pub fn mount_small_disk(&self, name: &str) {
        let path = self.path(name);
        std::fs::create_dir(&path).unwrap();
        let (disk, size) = (Some("tmpfs"), format!("size={SMALL_DISK}"));
        mount(disk, &path, disk, MsFlags::empty(), Some(size.as_str())).unwrap();
    }

    /// A control group of its own, for a host that has a manager of services.
    #[must_use]
    pub fn cgroup(&self) -> PathBuf {
        let path = self.path("cgroup");
        if !path.exists() {
            std::fs::create_dir(&path).unwrap();
            let kind = Some("cgroup2");
            mount(kind, &path, kind, MsFlags::empty(), None::<&str>).unwrap();
        }
        let group = path.join(self.directory.path().file_name().unwrap());
        std::fs::create_dir_all(&group).unwrap();
        group
    }

    /// The hardware address of the origin's [`DIRECT`] interface.
    #[must_use]
    pub fn direct_mac() -> [u8; 6] {
        [2, 0, 0, 0, 0, 9]
    }

    /// Moves this thread into a host's namespace.
    pub fn enter(namespace: &str) {
        let namespace = File::open(Path::new("/run/netns").join(namespace)).unwrap();
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
    }

    /// The name of a host's namespace.
    #[must_use]
    pub fn namespace(&self, host: Host) -> String {
        format!("{}-{}", self.id, host.label())
    }

    /// A counter of a host's TCP: a name of `TcpExt` (netstat(8), `SNMP_MIB_ITEM` in net/ipv4/proc.c).
    #[must_use]
    pub fn tcp_counter(&self, host: Host, name: &str) -> u64 {
        let output = self.output(host, &["cat", "/proc/self/net/netstat"]);
        let text = String::from_utf8(output.stdout).unwrap();
        let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
        let [names, values] = [lines.next().unwrap(), lines.next().unwrap()];
        let index = names.split(' ').position(|it| it == name);
        values
            .split(' ')
            .nth(index.unwrap())
            .unwrap()
            .parse()
            .unwrap()
    }

    /// Frames that an interface of a host has received, those that its XDP program drops as well.
    #[must_use]
    pub fn received(&self, host: Host, interface: &str) -> u64 {
        let output = self.output(host, &["ip", "-json", "-s", "link", "show", interface]);
        let links: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        links[0]["stats64"]["rx"]["packets"].as_u64().unwrap()
    }

    /// A path in the lab's directory.
    #[must_use]
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A pin of the filter.
    #[must_use]
    pub fn pin(&self, name: &str) -> PathBuf {
        self.path(format!("bpf/pullgate/v{}/{name}", abi::VERSION))
    }

    /// A command that runs in a host's namespace, and in our mount namespace.
    #[must_use]
    pub fn command(&self, host: Host, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        // Ctrl-C is for us, who then take everything down in order.
        command.process_group(0);
        command.arg(format!("--net=/run/netns/{}", self.namespace(host)));
        command.arg("--").arg(program.as_ref());
        command
    }

    /// Runs a command in a host's namespace to its end.
    #[must_use]
    pub fn output(&self, host: Host, words: &[&str]) -> Output {
        let mut command = self.command(host, words[0]);
        command.args(&words[1..]).output().unwrap()
    }

    /// Calls `f` on a thread in a host's namespace; sockets that it opens stay there.
    pub fn on<T: Send>(&self, host: Host, f: impl FnOnce() -> T + Send) -> T {
        let namespace = self.namespace(host);
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                Self::enter(&namespace);
                f()
            });
            inside.join().unwrap()
        })
    }
}

impl Default for Network {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs `ip`, which must succeed.
pub fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "ip {}: {error}",
        arguments.join(" ")
    );
}

/// Room for some snapshots of Cloudflare's ranges.
pub const SMALL_DISK: u64 = 64 << 10;

/// The interface of every host.
pub const INTERFACE: &str = "wan0";

/// The interface of stranger and origin, if they are connected directly.
pub const DIRECT: &str = "wan1";

static NEXT: AtomicU32 = AtomicU32::new(0);
