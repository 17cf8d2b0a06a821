//! What is in order and could be better, of a configuration on this host; for one role or another.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use crate::cli::Role;
use crate::config::{Config, Filter, Interfaces, Mode};
use crate::netlink::{self, Interface, Uplinks, Wrapping};
use crate::ranges::guard::Documentation;

/// What any of the roles has to say, each thing once, before it runs.
pub(super) fn all_weaknesses(config: &Config, roles: &[Role]) -> Vec<String> {
    let filter = config
        .filter
        .iter()
        .filter(|_| roles.contains(&Role::Filter));
    let mut all: Vec<_> = filter.flat_map(of_start).collect();
    for weakness in roles.iter().flat_map(|role| weaknesses(config, *role)) {
        if !all.contains(&weakness) {
            all.push(weakness);
        }
    }
    all
}

/// What a role has to say.
pub(super) fn weaknesses(config: &Config, role: Role) -> Vec<String> {
    let mut weaknesses = Vec::new();
    if config.ranges.limits.documentation == Documentation::Accept {
        weaknesses.push("documentation ranges are accepted (a test bed)".to_owned());
    }
    if let (Role::Filter | Role::Gate, Some(filter)) = (role, &config.filter) {
        weaknesses.extend(unprotected_ports(config, filter));
    }
    if let (Role::Filter, Some(filter)) = (role, &config.filter) {
        weaknesses.extend(strange_destinations(filter));
        weaknesses.extend(open_udp_ports(filter));
        weaknesses.extend(unseen_packets(filter));
    }
    weaknesses
}

/// Ports of the gate that the filter lets everybody reach.
fn unprotected_ports(config: &Config, filter: &Filter) -> Vec<String> {
    let listen = config.gate.iter().flat_map(|gate| &gate.listen);
    let mut ports: BTreeSet<_> = listen.map(SocketAddr::port).collect();
    ports.retain(|port| !filter.ports.contains(port));
    let tell = |port| {
        format!(
            "the gate listens on port {port}, which is not in `filter.ports`: whoever finds it \
             reaches the gate; add it"
        )
    };
    ports.into_iter().map(tell).collect()
}

/// What a filter that runs reports more precisely.
fn of_start(filter: &Filter) -> Option<String> {
    (filter.mode == Mode::Monitor).then(|| MONITOR.to_owned())
}

/// What a check finds that a start would not know: a filter that remembers uplinks needs no route.
pub(super) fn of_check(filter: &Filter) -> Option<String> {
    let is_auto = matches!(filter.interfaces, Interfaces::Auto);
    let has_none = || netlink::uplinks().is_ok_and(|uplinks| uplinks == Uplinks::default());
    (is_auto && has_none()).then(|| NO_INTERFACE.to_owned())
}

/// Destinations that packets to this host do not have: nothing is dropped by them.
fn strange_destinations(filter: &Filter) -> Vec<String> {
    if filter.destinations.is_empty() {
        return Vec::new();
    }
    // A kernel that does not tell is no reason to warn.
    let Ok(addresses) = netlink::addresses() else {
        return Vec::new();
    };
    let destinations = filter.destinations.iter();
    let strange = destinations.filter(|destination| !addresses.contains(destination));
    let tell = |destination| {
        format!(
            "{destination} in `filter.destinations` is no address of this host's interfaces: does \
             traffic come for it?"
        )
    };
    strange.map(tell).collect()
}

/// Protected ports at which somebody answers UDP, so strangers too: HTTP/3.
fn open_udp_ports(filter: &Filter) -> Vec<String> {
    // A kernel that does not tell is no reason to warn.
    let listening = netlink::udp_listeners().unwrap_or_default();
    let reachable = listening.iter().filter(|address| {
        let address = address.ip().to_canonical();
        let destinations = &filter.destinations;
        let is_protected = destinations.is_empty() || destinations.contains(&address);
        !address.is_loopback() && (address.is_unspecified() || is_protected)
    });
    let mut ports: BTreeSet<_> = reachable.map(SocketAddr::port).collect();
    ports.retain(|port| filter.ports.contains(port) && !filter.udp_ports.contains(port));
    let tell = |port| {
        format!(
            "a program answers UDP on port {port} (HTTP/3?), which is not in `filter.udp_ports`: \
             whoever finds it reaches that; Cloudflare comes by TCP: switch it off, or add the port"
        )
    };
    ports.into_iter().map(tell).collect()
}

/// Interfaces that unwrap what the filter cannot look into, and are not filtered themselves.
fn unseen_packets(filter: &Filter) -> Vec<String> {
    // A kernel that does not answer is no reason to warn.
    let interfaces = netlink::interfaces().unwrap_or_default();
    let is_named = |name: &String| match &filter.interfaces {
        Interfaces::Auto => false,
        Interfaces::Named(names) => names.iter().any(|named| named.value == *name),
    };
    let unwrapping = interfaces.iter().filter_map(|interface| {
        let wrapping = interface.unwraps?;
        let is_protected = wrapping
            .udp_port
            .is_some_and(|port| filter.udp_ports.contains(&port));
        (!is_named(&interface.name) && !is_protected).then_some((interface, wrapping))
    });
    let sentence = |(interface, wrapping): (&Interface, Wrapping)| {
        let name = &interface.name;
        let port = match wrapping.udp_port {
            Some(port) => format!("`filter.udp_ports = [{port}]`"),
            None => "`filter.udp_ports`, if it comes by UDP".to_owned(),
        };
        let naming = match interface.is_ethernet {
            true => format!(", or name `{name}` in `filter.interfaces` as well"),
            false => String::new(),
        };
        format!(
            "`{name}` ({}) unwraps packets that the filter cannot look into: a client that can send \
             into it reaches the protected ports; protect its port with {port}, and allow its peers in \
             `ranges.allow`{naming}",
            wrapping.name
        )
    };
    unwrapping.map(sentence).collect()
}

/// The automatic choice has nothing to choose from.
pub(super) const NO_INTERFACE: &str = "no interface has a default route, so none is filtered; name \
    them in `filter.interfaces`, or give one a default route";
/// Nothing is dropped.
pub(super) const MONITOR: &str = "monitor mode: strangers' packets are counted, and pass";
