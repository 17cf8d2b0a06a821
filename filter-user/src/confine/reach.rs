//! What roles need to reach, by their configuration. Pure but for links, which are followed.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use rustix::thread::CapabilitySet;

use crate::cli::Role;
use crate::config::{Config, Gate, Location, Proxy, Ranges, Target};
use crate::{file, gate};

/// What a process may reach.
#[derive(Clone, Debug)]
pub struct Reach {
    pub(super) roles: Vec<Role>,
    /// Files and directories to read.
    pub(super) read: BTreeSet<PathBuf>,
    /// Directories to write.
    pub(super) write: BTreeSet<PathBuf>,
    /// TCP ports to listen on.
    pub(super) bind: BTreeSet<u16>,
    /// TCP ports to connect to.
    pub(super) connect: Ports,
    /// Whether UNIX sockets without a file may be connected to.
    pub(super) abstract_sockets: bool,
}

/// TCP ports.
#[derive(Clone, Debug)]
pub(super) enum Ports {
    /// These.
    These(BTreeSet<u16>),
    /// The environment says which.
    Any,
}

impl Reach {
    /// The same, with UNIX sockets that have no file: a service manager may listen at one.
    #[must_use]
    pub fn with_abstract_sockets(self, abstract_sockets: bool) -> Self {
        Self {
            abstract_sockets,
            ..self
        }
    }

    /// What these roles need, with the configuration in `file`.
    #[must_use]
    pub fn of(file: &Path, config: &Config, roles: &[Role]) -> Self {
        let mut reach = Self {
            roles: roles.to_vec(),
            read: SYSTEM.iter().map(PathBuf::from).collect(),
            write: BTreeSet::new(),
            bind: BTreeSet::new(),
            connect: Ports::These(BTreeSet::new()),
            abstract_sockets: false,
        };
        reach.reads(file);
        reach.reads(&config.paths.snapshot());
        for role in roles {
            reach.writes(&config.paths.home(*role));
            match config.metrics.get(role).map(|target| &target.value) {
                Some(Target::Tcp(address)) => {
                    reach.bind.insert(address.port());
                }
                Some(Target::Unix(path)) => {
                    reach
                        .write
                        .extend(path.parent().and_then(|path| path.canonicalize().ok()));
                }
                None => {}
            }
            match (role, &config.gate) {
                (Role::Filter, _) => {
                    reach.writes(&config.paths.bpf);
                    // Not where it would be, if it could not be made.
                    reach.write.extend(config.paths.filter.canonicalize());
                }
                (Role::Ranges, _) => reach.fetches(config, &config.ranges),
                (Role::Gate, Some(gate)) => reach.relays(gate),
                (Role::Gate, None) => {}
            }
        }
        reach
    }

    pub(super) fn has(&self, role: Role) -> bool {
        self.roles.contains(&role)
    }

    /// What the other has within reach, and this one does not.
    pub(super) fn lacks(&self, wanted: &Self) -> Vec<String> {
        let is_within = |path: &PathBuf| {
            let mut all = self.read.iter().chain(&self.write);
            all.any(|known| path.starts_with(known))
        };
        let paths = wanted.read.iter().filter(|path| !is_within(path));
        let mut lacking: Vec<_> = paths.map(|path| path.display().to_string()).collect();
        match (&self.connect, &wanted.connect) {
            (Ports::These(known), Ports::These(wanted)) => {
                let ports = wanted.difference(known);
                lacking.extend(ports.map(|port| format!("TCP port {port}")));
            }
            (Ports::These(_), Ports::Any) => lacking.push("the environment's proxy".to_owned()),
            (Ports::Any, _) => {}
        }
        lacking
    }

    fn fetches(&mut self, config: &Config, ranges: &Ranges) {
        self.writes(&config.paths.state);
        self.read.extend(RESOLVER.iter().map(PathBuf::from));
        // Its like are replaced whenever the network changes, so their directories count.
        self.reads(Path::new("/etc/resolv.conf"));
        let mut ports = BTreeSet::from([DNS, HTTPS]);
        for way in ranges.sources.iter().flat_map(|source| &source.value.ways) {
            match &way.place {
                Location::File(path) => self.reads(path),
                Location::Web { urls, ca_file } => {
                    ports.extend(urls.iter().filter_map(url::Url::port_or_known_default));
                    if let Some(path) = ca_file {
                        self.reads(path);
                    }
                }
            }
        }
        match &ranges.proxy {
            Proxy::None => {}
            Proxy::Environment => self.connect = Ports::Any,
            Proxy::Url(url) => ports.extend(url.port_or_known_default()),
        }
        self.connects(ports);
    }

    fn relays(&mut self, gate: &Gate) {
        for path in gate::files(gate) {
            self.reads(&path);
        }
        self.bind.extend(gate.listen.iter().map(SocketAddr::port));
        let ports = gate
            .hosts
            .iter()
            .filter_map(|host| match &host.upstream.value.target {
                Target::Tcp(address) => Some(address.port()),
                Target::Unix(_) => None,
            });
        self.connects(ports.collect());
    }

    /// A file, whatever is put in its place: its directory, and where links lead by now.
    fn reads(&mut self, path: &Path) {
        for name in file::names(path) {
            self.read.extend(file::directory(&name).canonicalize());
        }
    }

    /// A directory of ours, or where it will be.
    fn writes(&mut self, directory: &Path) {
        let existing = directory.ancestors().find(|path| path.exists());
        self.write
            .extend(existing.and_then(|path| path.canonicalize().ok()));
    }

    fn connects(&mut self, more: BTreeSet<u16>) {
        if let Ports::These(ports) = &mut self.connect {
            ports.extend(more);
        }
    }
}

/// The capabilities that roles need.
pub(super) fn capabilities(roles: &[Role]) -> CapabilitySet {
    let needed = roles.iter().map(|role| match role {
        Role::Filter => CapabilitySet::BPF | CapabilitySet::NET_ADMIN | CapabilitySet::PERFMON,
        Role::Ranges => CapabilitySet::empty(),
        Role::Gate => CapabilitySet::NET_BIND_SERVICE,
    });
    needed.fold(CapabilitySet::empty(), CapabilitySet::union)
}

/// What every process looks at: itself, how many cores it may use, and who may read a key.
const SYSTEM: [&str; 5] = [
    "/etc/group",
    "/proc/self",
    "/proc/sys",
    "/sys/fs/cgroup",
    "/sys/devices/system/cpu",
];
/// Names and authorities, besides /etc: the libraries that nsswitch.conf(5) names, and where
/// distributions keep their roots.
const RESOLVER: [&str; 6] = [
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
];
const DNS: u16 = 53;
/// Where every list is that one does not keep oneself.
const HTTPS: u16 = 443;
