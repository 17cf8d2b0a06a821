//! What roles need to reach, by their configuration. Pure but for links, which are followed.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crate::config::{
    ClientAddress, Config, GateSettings, Location, Proxy, RangesSettings, Target, UpstreamTarget,
};
use crate::host::file;
use crate::host::sandbox::{Access, Ports};
use crate::role::Role;

/// What these roles need, with the configuration in `file`.
#[must_use]
pub fn reach(file: &Path, config: &Config, roles: &[Role]) -> Access {
    let mut reach = Access {
        roles: roles.to_vec(),
        read: SYSTEM.iter().map(PathBuf::from).collect(),
        write: BTreeSet::new(),
        bind: BTreeSet::new(),
        connect: Ports::These(BTreeSet::new()),
        abstract_sockets: false,
        transparent: roles.contains(&Role::Gate) && is_transparent(config),
    };
    reads(&mut reach, file);
    reads(&mut reach, &config.boot.paths.snapshot());
    for role in roles {
        writes(&mut reach, &config.boot.paths.home(*role));
        match config.boot.metrics.get(role).map(|target| &target.value) {
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
        match (role, &config.live.gate) {
            (Role::Filter, _) => {
                writes(&mut reach, &config.boot.paths.bpf);
                // Not where it would be, if it could not be made.
                reach.write.extend(config.boot.paths.filter.canonicalize());
            }
            (Role::Ranges, _) => fetches(&mut reach, config, &config.live.ranges),
            (Role::Gate, Some(gate)) => relays(&mut reach, &config.boot.listen, gate),
            (Role::Gate, None) => {}
        }
    }
    reach
}

/// Whether the gate opens connections in its clients' names.
pub(crate) fn is_transparent(config: &Config) -> bool {
    let gate = config.live.gate.as_ref();
    gate.is_some_and(|gate| gate.client_address == ClientAddress::Transparent)
}

fn fetches(reach: &mut Access, config: &Config, ranges: &RangesSettings) {
    writes(reach, &config.boot.paths.state);
    reach.read.extend(RESOLVER.iter().map(PathBuf::from));
    // Its like are replaced whenever the network changes, so their directories count.
    reads(reach, Path::new("/etc/resolv.conf"));
    let mut ports = BTreeSet::from([DNS, HTTPS]);
    for way in ranges.sources.iter().flat_map(|source| &source.value.ways) {
        match &way.place {
            Location::File(path) => reads(reach, path),
            Location::Web { urls, ca_file } => {
                ports.extend(urls.iter().filter_map(url::Url::port_or_known_default));
                if let Some(path) = ca_file {
                    reads(reach, path);
                }
            }
        }
    }
    match &ranges.proxy {
        Proxy::None => {}
        Proxy::Environment => reach.connect = Ports::Any,
        Proxy::Url(url) => ports.extend(url.port_or_known_default()),
    }
    connects(reach, ports);
}

fn relays(reach: &mut Access, listen: &[SocketAddr], gate: &GateSettings) {
    for path in gate.files() {
        reads(reach, &path);
    }
    reach.bind.extend(listen.iter().map(SocketAddr::port));
    if gate.client_address == ClientAddress::Transparent {
        // A client's address, and whichever port the kernel picks.
        reach.bind.insert(0);
    }
    for host in &gate.hosts {
        match &host.upstream.value.target {
            UpstreamTarget::SamePort => connects(reach, gate.steered_ports.iter().copied()),
            UpstreamTarget::Fixed(Target::Tcp(address)) => connects(reach, [address.port()]),
            UpstreamTarget::Fixed(Target::Unix(_)) => {}
        }
    }
}

/// A file, whatever is put in its place: its directory, and where links lead by now.
fn reads(reach: &mut Access, path: &Path) {
    for name in file::names(path) {
        reach.read.extend(file::directory(&name).canonicalize());
    }
}

/// A directory of ours, or where it will be.
fn writes(reach: &mut Access, directory: &Path) {
    let existing = directory.ancestors().find(|path| path.exists());
    reach
        .write
        .extend(existing.and_then(|path| path.canonicalize().ok()));
}

fn connects(reach: &mut Access, more: impl IntoIterator<Item = u16>) {
    if let Ports::These(ports) = &mut reach.connect {
        ports.extend(more);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_alone_opens_connections_in_its_clients_names() {
        let text = "[filter]\ninterfaces = \"auto\"\n[gate]\nsteer = true\nclient_address = \"transparent\"\n\
            [[gate.host]]\nnames = [\"a.example\"]\ncertificate = \"a.pem\"\nkey = \"a.key\"\n\
            trust = [\"cloudflare\"]\n";
        let file = Path::new("/pullgate.toml");
        let config = Config::parse(file, text).unwrap();

        let who = [Role::Filter, Role::Ranges, Role::Gate];
        let needing = who.map(|role| reach(file, &config, &[role]).transparent);

        assert_eq!(needing, [false, false, true]);
    }
}
