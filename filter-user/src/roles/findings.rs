//! What is in order and could be better, of a configuration on this host; for one role or another.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::config::{
    Config, FilterSettings, GateSettings, Interfaces, Mode, RangesSettings, UpstreamTarget,
};
use crate::control::protocol::Admits;
use crate::host::netlink::{self, Interface, Uplinks, Wrapping};
use crate::observe::Finding;
use crate::ranges::GuardLimits;
use crate::ranges::guard::Documentation;
use crate::role::Role;
use crate::sync::joined;
use crate::web::visit::Issuers;
use crate::web::{self, Demand};

/// What could be better about the configuration for any of the roles, each thing once, before it runs.
pub(crate) fn of_roles(config: &Config, roles: &[Role]) -> Vec<Finding> {
    let filter = config
        .live
        .filter
        .iter()
        .filter(|_| roles.contains(&Role::Filter));
    let mut all: Vec<_> = filter.flat_map(of_start).collect();
    for finding in roles.iter().flat_map(|role| of_role(config, *role)) {
        if !all.contains(&finding) {
            all.push(finding);
        }
    }
    all
}

/// What could be better about the configuration for a role.
pub(crate) fn of_role(config: &Config, role: Role) -> Vec<Finding> {
    let mut of_role = Vec::new();
    if config.live.ranges.limits.documentation == Documentation::Accept {
        of_role.push(Finding::warning(
            "documentation-ranges",
            "`unsafe_documentation_ranges` is on (test setups only)",
        ));
    }
    of_role.extend(wide_rules(&config.live.ranges));
    if let (Role::Filter | Role::Gate, Some(filter)) = (role, &config.live.filter) {
        of_role.extend(unprotected_ports(config, filter));
        of_role.extend(beside_gate(config, filter));
    }
    if let (Role::Filter, Some(filter), true) = (role, &config.live.filter, config.boot.steer) {
        of_role.extend(unsteered_ports(filter));
    }
    if let (Role::Filter, Some(filter)) = (role, &config.live.filter) {
        of_role.extend(strange_destinations(filter));
        of_role.extend(open_udp_ports(filter));
        of_role.extend(open_tcp_ports(config, filter));
        of_role.extend(unseen_packets(filter));
    }
    of_role
}

/// Rules that admit more of the Internet than a list of the operator's own may: no monitoring host is that large.
pub(crate) fn wide_rules(ranges: &RangesSettings) -> Option<Finding> {
    let (mut addresses_v4, mut networks_v6) = (0_u64, 0_u64);
    for rule in IpNet::aggregate(&ranges.allow) {
        match rule {
            // No stranger comes from these.
            IpNet::V4(rule) if PRIVATE_V4.iter().any(|private| private.contains(&rule)) => {}
            IpNet::V4(rule) => addresses_v4 += 1 << (32 - rule.prefix_len()),
            IpNet::V6(rule) if GLOBAL_V6.contains(&rule) || rule.contains(&GLOBAL_V6) => {
                networks_v6 += 1 << (64 - rule.prefix_len().min(64));
            }
            IpNet::V6(_) => {}
        }
    }
    let limits = GuardLimits::default();
    let is_wide = addresses_v4 > limits.addresses_v4 || networks_v6 >> 32 > limits.networks_v6;
    is_wide.then(|| {
        let text = format!(
            "`ranges.allow` admits {addresses_v4} IPv4 addresses and {networks_v6} IPv6 networks of /64: strangers \
             among them reach the protected ports"
        );
        Finding::warning("allow-wide", text).remedy("name the ranges that you mean")
    })
}

/// Ports of the gate that the filter lets everybody reach.
fn unprotected_ports(config: &Config, filter: &FilterSettings) -> Vec<Finding> {
    // What is steered comes to the ports that the filter names.
    let is_clients = |address: &&SocketAddr| !(config.boot.steer && address.ip().is_loopback());
    let listen = config.boot.listen.iter().filter(is_clients);
    let mut ports: BTreeSet<_> = listen.map(SocketAddr::port).collect();
    ports.retain(|port| !filter.ports.contains(port));
    let tell = |port| {
        let text = format!(
            "the gate listens on port {port}, which is not in `filter.ports`: a client that finds it \
             reaches the gate"
        );
        Finding::warning("gate-port-unprotected", text).remedy("add it")
    };
    ports.into_iter().map(tell).collect()
}

/// Programs that answer on protected ports beside a gate that has a port of its own: they are not behind it.
fn beside_gate(config: &Config, filter: &FilterSettings) -> Vec<Finding> {
    if config.boot.steer || config.live.gate.is_none() {
        return Vec::new();
    }
    let mut others: BTreeSet<_> = reachable(filter).into_iter().collect();
    others.retain(|other| {
        filter.ports.contains(&other.port()) && !config.boot.listen.contains(other)
    });
    let sentence = |other: SocketAddr| {
        let text = format!(
            "a program answers at {other}, on a protected port, and is not behind the gate: any Cloudflare customer who \
             points a name at this host reaches it"
        );
        Finding::warning("port-beside-gate", text).remedy(
            "let it listen on loopback alone, redirect to HTTPS and no more, or demand your account's certificate itself",
        )
    };
    others.into_iter().map(sentence).collect()
}

/// Protected ports that are not steered, and on which a program answers: it is not behind the gate.
fn unsteered_ports(filter: &FilterSettings) -> Vec<Finding> {
    let mut ports: BTreeSet<_> = reachable(filter).iter().map(SocketAddr::port).collect();
    ports.retain(|port| filter.ports.contains(port) && !filter.steered_ports.contains(port));
    let sentence = |port| {
        let text = format!(
            "connections to port {port} are not steered to the gate, as Cloudflare speaks HTTP without TLS \
             there: any Cloudflare customer reaches the program that answers"
        );
        Finding::warning("port-not-steered", text).remedy("let it redirect to HTTPS, and no more")
    };
    ports.into_iter().map(sentence).collect()
}

/// What a filter that runs reports more precisely.
fn of_start(filter: &FilterSettings) -> Option<Finding> {
    (filter.mode == Mode::Monitor).then(monitor)
}

/// What a check finds that a start would not know: a filter that remembers uplinks needs no route.
pub(crate) fn of_check(filter: &FilterSettings) -> Option<Finding> {
    let is_auto = matches!(filter.interfaces, Interfaces::Auto);
    let has_none = || netlink::uplinks().is_ok_and(|uplinks| uplinks == Uplinks::default());
    (is_auto && has_none()).then(no_interface)
}

/// Destinations that packets to this host do not have: nothing is dropped by them.
fn strange_destinations(filter: &FilterSettings) -> Vec<Finding> {
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
        let text = format!(
            "{destination} in `filter.destinations` is no address of this host's interfaces: does \
             traffic come for it?"
        );
        Finding::warning("destination-foreign", text)
    };
    strange.map(tell).collect()
}

/// Protected ports at which a program answers UDP, so strangers too: HTTP/3.
fn open_udp_ports(filter: &FilterSettings) -> Vec<Finding> {
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
        let text = format!(
            "a program answers UDP on port {port} (HTTP/3?), which is not in `filter.udp_ports`: \
             a client that finds it reaches that"
        );
        Finding::warning("udp-port-open", text)
            .remedy("Cloudflare comes by TCP: switch it off, or add the port")
    };
    ports.into_iter().map(tell).collect()
}

/// Ports that Cloudflare proxies, at which a program answers strangers: they are as good a way
/// around Cloudflare as the protected ones.
fn open_tcp_ports(config: &Config, filter: &FilterSettings) -> Vec<Finding> {
    let of_gate = config.boot.listen.iter();
    let of_gate: BTreeSet<_> = of_gate.map(SocketAddr::port).collect();
    let open = reachable(filter).into_iter().filter(|address| {
        let port = address.port();
        let is_known = filter.ports.contains(&port) || of_gate.contains(&port);
        PROXIED_PORTS.contains(&port) && !is_known
    });
    let ports: BTreeSet<_> = open.map(|address| address.port()).collect();
    let sentence = |port| {
        let text = format!(
            "a program answers strangers on port {port}, which Cloudflare proxies and \
             `filter.ports` does not name: if it is the web server, they get around Cloudflare there"
        );
        Finding::warning("tcp-port-open", text).remedy("add it, or let it listen on loopback only")
    };
    ports.into_iter().map(sentence).collect()
}

/// The TCP listeners that packets from outside reach.
fn reachable(filter: &FilterSettings) -> Vec<SocketAddr> {
    // A kernel that does not answer is no reason to warn.
    let mut listening = netlink::listeners().unwrap_or_default();
    listening.retain(|address| {
        let address = address.ip().to_canonical();
        let destinations = &filter.destinations;
        let is_protected = destinations.is_empty() || destinations.contains(&address);
        !address.is_loopback() && (address.is_unspecified() || is_protected)
    });
    listening
}

/// What the web servers on the protected ports demand of a client, where no gate does: each is
/// asked.
pub(crate) fn of_web_servers(filter: &FilterSettings) -> (Admits, Vec<Finding>) {
    let mut listening = reachable(filter);
    listening.retain(|address| filter.ports.contains(&address.port()));
    listening.sort_unstable();
    listening.dedup();
    let mut admits = if listening.is_empty() {
        Admits::Unknown
    } else {
        Admits::DefaultSite
    };
    let mut findings = BTreeMap::new();
    for address in listening {
        let port = address.port();
        let (found, what) = match web::demand(inside(address)) {
            Demand::Certificate(Issuers::Others) => continue,
            Demand::Certificate(Issuers::Shared) => (
                Admits::Cloudflare,
                "demands a certificate of Cloudflare's shared CA, which every customer has"
                    .to_owned(),
            ),
            Demand::Certificate(Issuers::Unsaid) => (
                Admits::Unknown,
                "demands a certificate and does not name its CA".to_owned(),
            ),
            Demand::Nothing(status) => {
                let answer = status.map_or_else(String::new, |status| format!(" ({status})"));
                let text = format!("serves clients without a certificate{answer}");
                (Admits::Cloudflare, text)
            }
            Demand::NoTls => (
                Admits::Cloudflare,
                "speaks no TLS, so it demands no client certificate".to_owned(),
            ),
            Demand::Unknown(error) => {
                let text = format!("does not let itself be asked for its demands ({error})");
                (Admits::Unknown, text)
            }
        };
        admits = match (admits, found) {
            (Admits::Cloudflare, _) | (_, Admits::Cloudflare) => Admits::Cloudflare,
            (_, found) => found,
        };
        let finding = match found {
            Admits::Cloudflare => {
                let text = format!(
                    "the web server on port {port} {what}: any Cloudflare customer who points a name \
                     at this address gets in"
                );
                Finding::warning("any-customer-admitted", text).remedy(
                    "demand a certificate of your own there (`pullgate snippet nginx --own-mtls`), or \
                     configure [gate]",
                )
            }
            Admits::Account | Admits::DefaultSite | Admits::Unknown => {
                let text = format!(
                    "the web server on port {port} {what}: whether any Cloudflare customer gets in is \
                     not known"
                );
                Finding::warning("any-customer-unknown", text)
            }
        };
        findings.insert(finding.text.clone(), finding);
    }
    (admits, findings.into_values().collect())
}

/// What keeps the gate from the web server to which connections are steered back: it is asked for each of its sites,
/// some at once. Blocks until each has answered, or has had its time.
pub(crate) fn of_steered_web_server(gate: &GateSettings) -> Vec<Finding> {
    let hosts = gate.hosts.iter();
    let hosts = hosts.filter(|host| host.upstream.value.target == UpstreamTarget::SamePort);
    let names: Vec<_> = hosts
        .map(|host| host.label().replacen('*', "any", 1))
        .collect();
    let mut findings = Vec::new();
    for port in gate.steered_ports.iter().copied() {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        for some in names.chunks(ASKED_AT_ONCE) {
            let demands: Vec<_> = thread::scope(|scope| {
                let asked = some
                    .iter()
                    .map(|name| scope.spawn(move || web::demand_by(address, Some(name))));
                let asked: Vec<_> = asked.collect();
                asked.into_iter().map(joined).collect()
            });
            let of_sites = some.iter().zip(&demands);
            findings
                .extend(of_sites.filter_map(|(name, demand)| of_steered_site(port, name, demand)));
            // A server that answers for none of these is not waited for again and again.
            if demands
                .iter()
                .all(|demand| matches!(demand, Demand::Unknown(_)))
            {
                break;
            }
        }
    }
    // Some hold whatever the name is.
    findings.dedup();
    findings
}

fn of_steered_site(port: u16, name: &str, demand: &Demand) -> Option<Finding> {
    match demand {
        Demand::Certificate(_) => {
            let text = format!(
                "the web server on port {port} demands a client certificate for `{name}` itself, and the gate \
                 has none to show: every client of that site is refused"
            );
            let finding = Finding::error("web-server-demands-certificate", text);
            Some(finding.remedy(
                "switch that off there (nginx: `ssl_verify_client`; Apache: `SSLVerifyClient`) once all its sites \
                 enforce: the gate demands it in its place",
            ))
        }
        Demand::NoTls => {
            let text = format!(
                "the web server on port {port} speaks no TLS, as the gate does to it: take the port out \
                 of `filter.ports`, or let the server speak TLS there"
            );
            Some(Finding::error("web-server-without-tls", text))
        }
        Demand::Nothing(_) | Demand::Unknown(_) => None,
    }
}

/// An address at which this host reaches its own listener, and not another one on loopback.
fn inside(listener: SocketAddr) -> SocketAddr {
    let ip = listener.ip();
    if !ip.is_unspecified() {
        return listener;
    }
    let loopback = match ip {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    let taken = SocketAddr::new(loopback, listener.port());
    let is_taken = netlink::listeners().is_ok_and(|all| all.contains(&taken));
    let own = netlink::addresses().unwrap_or_default();
    let mut own = own.into_iter().filter(|address| {
        let is_local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
        address.is_ipv4() == ip.is_ipv4() && !address.is_loopback() && !is_local
    });
    let address = own.next().filter(|_| is_taken).unwrap_or(loopback);
    SocketAddr::new(address, listener.port())
}

/// Interfaces that unwrap what the filter cannot look into, and are not filtered themselves.
fn unseen_packets(filter: &FilterSettings) -> Vec<Finding> {
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
        let naming = if interface.is_ethernet {
            format!(", or name `{name}` in `filter.interfaces` as well")
        } else {
            String::new()
        };
        let text = format!(
            "`{name}` ({}) unwraps packets that the filter cannot look into: a client that can send \
             into it reaches the protected ports",
            wrapping.name
        );
        Finding::warning("packets-unseen", text).remedy(format!(
            "protect its port with {port}, and allow its peers in `ranges.allow`{naming}"
        ))
    };
    unwrapping.map(sentence).collect()
}

/// The automatic choice has nothing to choose from.
pub(super) fn no_interface() -> Finding {
    Finding::error(
        "no-interface",
        "no interface has a default route, so none is filtered",
    )
    .remedy("name them in `filter.interfaces`, or give one a default route")
}

/// Nothing is dropped.
pub(super) fn monitor() -> Finding {
    Finding::error(
        "monitor-mode",
        "monitor mode: strangers' packets are counted, and pass",
    )
}

/// RFC 1918 and RFC 6598.
const PRIVATE_V4: [Ipv4Net; 4] = [
    Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10),
    Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 12),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 0, 0), 16),
];
/// RFC 4291 §2.4, and IANA's registry of IPv6 addresses: all that is allocated as global unicast.
const GLOBAL_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);
/// <https://developers.cloudflare.com/fundamentals/reference/network-ports/>
pub(crate) const PROXIED_PORTS: [u16; 13] = [
    80, 443, 2052, 2053, 2082, 2083, 2086, 2087, 2095, 2096, 8080, 8443, 8880,
];
/// Sites of a web server that are asked at the same time: a small one would leave more unanswered.
const ASKED_AT_ONCE: usize = 16;
