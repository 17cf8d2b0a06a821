//! What of this host is in the way of a configuration: what a role does not see, or cannot report while it does
//! not run.

use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::config::{Config, FilterSettings, GateSettings, HostSettings, Interfaces, Target};
use crate::control::client::status_if_permitted;
use crate::host::netlink::{self, Interface, InterfaceKind};
use crate::host::process::{holder_of, outgoing_ports};
use crate::observe::Finding;
use crate::role::Role;

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
    let ports = outgoing_ports(filter.ports.iter().chain(&filter.udp_ports).copied());
    let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
    let ports = (!ports.is_empty()).then(|| ports.join(","))?;
    let text = format!(
        "this host's own outgoing connections may use protected ports ({ports}), which are in \
         `net.ipv4.ip_local_port_range`: the answers to these are dropped"
    );
    Some(Finding::warning("outgoing-ports-protected", text).remedy(format!(
        "`sysctl -w net.ipv4.ip_local_reserved_ports={ports}`, and the same line in /etc/sysctl.d/"
    )))
}

/// Ports of the gate that another process has.
fn taken_ports(config: &Config) -> Vec<Finding> {
    let gate = status_if_permitted(&config.boot.paths, Role::Gate);
    if matches!(gate, Ok(Ok(_))) {
        return Vec::new();
    }
    // A kernel that does not answer is no reason to warn.
    let listening = netlink::listening_sockets().unwrap_or_default();
    let findings = config.boot.listen.iter().filter_map(|wanted| {
        let mut taken = listening.iter();
        let taken = taken.find(|socket| is_in_the_way(socket.local, *wanted))?;
        let holder = holder_of(taken.inode);
        // systemd holds the sockets of its units.
        if matches!(holder, Some((1, _))) {
            return None;
        }
        let holder = holder.map_or_else(
            || "another process".to_owned(),
            |(pid, name)| format!("`{name}` (pid {pid})"),
        );
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

fn is_in_the_way(taken: SocketAddr, wanted: SocketAddr) -> bool {
    let is_family = taken.is_ipv4() == wanted.is_ipv4();
    let is_any = taken.ip().is_unspecified() || wanted.ip().is_unspecified();
    taken.port() == wanted.port() && is_family && (is_any || taken.ip() == wanted.ip())
}

/// Upstreams at which no server answers.
fn silent_upstreams(gate: &GateSettings) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    for host in &gate.hosts {
        let finding = host.upstream.value.fixed().and_then(|it| silent(host, it));
        if let Some(finding) = finding
            && !findings.iter().any(|known| known.text == finding.text)
        {
            findings.push(finding);
        }
    }
    findings
}

fn silent(host: &HostSettings, upstream: &Target) -> Option<Finding> {
    let error = match upstream {
        Target::Tcp(address) => TcpStream::connect_timeout(address, PATIENCE).err()?,
        Target::Unix(path) => UnixStream::connect(path).err()?,
    };
    let text = format!("no web server answers on {upstream} ({error}), to which the gate relays");
    let finding = Finding::warning("upstream-silent", text).at(&host.upstream.place);
    Some(finding.remedy("start it, or let it listen there"))
}

/// How long a server on another host may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);
