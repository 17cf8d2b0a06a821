//! What of this host is in the way of a configuration: what a role does not see, or cannot report while it does
//! not run.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::process::geteuid;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::config::{Config, FilterSettings, GateSettings, HostSettings, Interfaces, Mode, Target};
use crate::control::client;
use crate::host::netlink::{self, Connection, Interface, InterfaceKind};
use crate::host::process::{OutgoingPorts, holder_of};
use crate::observe::Finding;
use crate::role::Role;
use crate::sync::joined;

/// All that is in the way.
pub(super) fn findings(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(filter) = &config.live.filter {
        findings.extend(guests(filter));
        findings.extend(own_connections(filter));
    }
    if let Some(gate) = &config.live.gate {
        findings.extend(taken_ports(config));
        findings.extend(silent_upstreams(gate));
    }
    findings
}

/// Ports of bridges, whose guests are filtered as this host is.
fn guests(filter: &FilterSettings) -> Vec<Finding> {
    let Interfaces::Named(names) = &filter.interfaces else {
        return Vec::new();
    };
    if !filter.destinations.is_empty() {
        return Vec::new();
    }
    // A kernel that does not answer is no reason to warn.
    let interfaces = netlink::interfaces().unwrap_or_default();
    let bridge_of = |port: &Interface| {
        let controller = port.controller?;
        let mut bridges = interfaces.iter();
        bridges.find(|it| it.index == controller && it.kind == InterfaceKind::Bridge)
    };
    let named = interfaces
        .iter()
        .filter(|interface| names.iter().any(|name| name.value == interface.name));
    let findings = named.filter_map(|port| {
        let (bridge, port) = (&bridge_of(port)?.name, &port.name);
        let text = format!(
            "`{port}` is a port of the bridge `{bridge}`: packets to the protected ports of guests behind it are \
             dropped too"
        );
        Some(Finding::warning("guests-filtered", text).remedy(format!(
            "write this host's addresses into `filter.destinations`, or name `{bridge}` instead"
        )))
    });
    findings.collect()
}

/// Protected ports that this host's own connections may be given: the answers come from strangers.
fn own_connections(filter: &FilterSettings) -> Option<Finding> {
    let outgoing = OutgoingPorts::read()?;
    let protected: BTreeSet<_> = filter.ports.iter().chain(&filter.udp_ports).collect();
    let ports = protected.into_iter().filter(|port| outgoing.has(**port));
    let ports: Vec<_> = ports.map(u16::to_string).collect();
    let ports = (!ports.is_empty()).then(|| ports.join(","))?;
    let dropped = match filter.mode {
        Mode::Enforce => "are dropped",
        Mode::Monitor => "would be dropped",
    };
    let text = format!(
        "this host's own outgoing connections may use protected ports ({ports}), which are in \
         `net.ipv4.ip_local_port_range`: the answers to these {dropped}"
    );
    // What is reserved already stays so.
    let reserved = outgoing.reserved_with(&ports);
    Some(Finding::warning("outgoing-ports-protected", text).remedy(format!(
        "`sysctl -w net.ipv4.ip_local_reserved_ports={reserved}`, and the same line in /etc/sysctl.d/"
    )))
}

/// Ports of the gate that another process has.
fn taken_ports(config: &Config) -> Vec<Finding> {
    // One that runs is not in its own way, whether it answers or not.
    if !matches!(client::runs(&config.boot.paths, Role::Gate), Ok(false)) {
        return Vec::new();
    }
    // A kernel that does not answer is no reason to warn.
    let listening = netlink::listening_sockets().unwrap_or_default();
    let findings = config.boot.listen.iter().filter_map(|wanted| {
        let mut taken = listening.iter();
        let taken = taken.find(|socket| is_in_the_way(socket, *wanted))?;
        let holder = match holder_of(taken.inode) {
            // systemd holds the sockets of its units.
            Some((1, name)) if name == "systemd" => return None,
            Some((pid, name)) => format!("`{name}` (pid {pid})"),
            // Another user does not see whether it is systemd.
            None if !geteuid().is_root() => return None,
            None => "another process".to_owned(),
        };
        let text = format!(
            "{holder} listens on {}, where the gate is to listen ({wanted})",
            taken.local
        );
        Some(Finding::warning("gate-port-taken", text).remedy(
            "move it to another port or to loopback, or let it keep the port: `gate.steer`",
        ))
    });
    findings.collect()
}

fn is_in_the_way(taken: &Connection, wanted: SocketAddr) -> bool {
    let local = taken.local;
    let takes_all = local.ip().is_unspecified() && taken.is_dual_stack;
    let is_family = local.is_ipv4() == wanted.is_ipv4() || takes_all;
    let is_any = local.ip().is_unspecified() || wanted.ip().is_unspecified();
    local.port() == wanted.port() && is_family && (is_any || local.ip() == wanted.ip())
}

/// Upstreams at which no server answers: each is looked at once, all at the same time.
fn silent_upstreams(gate: &GateSettings) -> Vec<Finding> {
    // A kernel that does not answer is no reason to warn.
    let Ok(listening) = netlink::listeners() else {
        return Vec::new();
    };
    let mut upstreams: Vec<(&HostSettings, &Target)> = Vec::new();
    for host in &gate.hosts {
        if let Some(target) = host.upstream.value.fixed()
            && !upstreams.iter().any(|(_, known)| *known == target)
        {
            upstreams.push((host, target));
        }
    }
    thread::scope(|scope| {
        let looks = upstreams.into_iter().map(|(host, target)| {
            let listening = &listening;
            (
                host,
                target,
                scope.spawn(move || silence(target, listening)),
            )
        });
        let looks: Vec<_> = looks.collect();
        let findings = looks.into_iter().filter_map(|(host, target, look)| {
            let error = joined(look)?;
            let text =
                format!("no web server answers on {target} ({error}), to which the gate relays");
            let finding = Finding::warning("upstream-silent", text).at(&host.upstream.place);
            Some(finding.remedy("start it, or let it listen there"))
        });
        findings.collect()
    })
}

/// Why no server answers, if none does. One on loopback is not connected to: it would log that.
fn silence(upstream: &Target, listening: &[SocketAddr]) -> Option<io::Error> {
    let error = match upstream {
        Target::Tcp(address) if address.ip().to_canonical().is_loopback() => {
            let listens = |it: &SocketAddr| {
                let is_any = it.ip().is_unspecified() && (it.is_ipv6() || address.is_ipv4());
                it.port() == address.port() && (is_any || it.ip() == address.ip().to_canonical())
            };
            let is_there = listening.iter().any(listens);
            (!is_there).then(|| ErrorKind::ConnectionRefused.into())?
        }
        Target::Tcp(address) => TcpStream::connect_timeout(address, PATIENCE).err()?,
        Target::Unix(path) => connect_unix(path).err()?,
    };
    // A queue that is full is that of a busy server; and another user may not ask.
    let is_busy = error.kind() == ErrorKind::WouldBlock;
    let is_forbidden = error.kind() == ErrorKind::PermissionDenied && !geteuid().is_root();
    (!is_busy && !is_forbidden).then_some(error)
}

/// Connects without waiting for room in the server's queue.
fn connect_unix(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)
}

/// How long a server on another host may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);
