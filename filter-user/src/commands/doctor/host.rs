//! What of this host is no role's: its kernel's settings, its interfaces' queues, and its service manager.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use crate::commands::served::{redirections, run, tool};
use crate::config::{Config, FilterSettings, SynCookies};
use crate::control::protocol::HostStatus;
use crate::host::{kernel, netlink};
use crate::observe::Finding;
use crate::report::chain;
use crate::role::Role;
use crate::roles::findings::PROXIED_PORTS;

pub(super) fn findings(config: &Config, report: &HostStatus) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(flood(config));
    findings.extend(clock(kernel::is_clock_kept()));
    findings.extend(queues(report));
    findings.extend(units(config));
    if let Some(filter) = &config.live.filter {
        findings.extend(led_elsewhere(filter));
        findings.extend(routed_loopback(filter));
        findings.extend(missing_destinations(filter));
    }
    findings
}

/// tcp(7), and Documentation/networking/ip-sysctl.rst. What the kernel does not show is no reason to warn.
fn flood(config: &Config) -> Vec<Finding> {
    let setting = |name: &str| {
        let text = fs::read_to_string(Path::new("/proc/sys/net").join(name)).ok()?;
        text.trim().parse::<u32>().ok()
    };
    let mut findings = Vec::new();
    if setting("ipv4/tcp_syncookies") == Some(0) {
        findings.push(
            Finding::warning(
                "syncookies-off",
                "`net.ipv4.tcp_syncookies` is 0: under a flood of forged SYNs, Cloudflare's are lost too",
            )
            .remedy(SYNCOOKIES_ON),
        );
        let filter = config.live.filter.as_ref();
        if filter.is_some_and(|filter| filter.syn_cookies == SynCookies::On) {
            let text = "SYNs are left to the kernel in a flood: it makes no cookies, as `net.ipv4.tcp_syncookies` is 0";
            findings.push(Finding::warning("syn-cookies-missing", text).remedy(SYNCOOKIES_ON));
        }
    }
    if setting("ipv4/tcp_syncookies") == Some(2) {
        let text = "`net.ipv4.tcp_syncookies` is 2, by which every SYN is answered with a cookie: visitors' are reported as a \
                    flood, and their connections have no window scaling";
        findings.push(Finding::warning("syncookies-always", text).remedy(SYNCOOKIES_ON));
    }
    let longest = setting("core/somaxconn").filter(|longest| *longest < BACKLOG);
    if let (Some(longest), Some(_)) = (longest, &config.live.gate) {
        let text = format!(
            "`net.core.somaxconn` is {longest}: that many connections wait for the gate, instead of {BACKLOG}"
        );
        findings.push(Finding::warning("backlog-short", text).remedy(format!(
            "`sysctl -w net.core.somaxconn={BACKLOG}`, and the same line in /etc/sysctl.d/"
        )));
    }
    if setting("ipv4/tcp_timestamps") == Some(0) {
        findings.push(
            Finding::warning(
                "timestamps-off",
                "`net.ipv4.tcp_timestamps` is 0: connections that the kernel's own SYN cookies make have no window scaling \
                 and no selective acknowledgements",
            )
            .remedy("`sysctl -w net.ipv4.tcp_timestamps=1`, and the same line in /etc/sysctl.d/"),
        );
    }
    if let Some(filter) = &config.live.filter {
        findings.extend(short_queues(filter));
    }
    findings
}

/// Listeners on protected ports whose queue a flood fills at once. The gate's own is long; steered ports are the gate's.
fn short_queues(filter: &FilterSettings) -> Vec<Finding> {
    let listening = netlink::listening_sockets().unwrap_or_default();
    let is_reached = |local: SocketAddr| {
        let port = local.port();
        let is_steered = filter.steered_ports.contains(&port);
        filter.ports.contains(&port) && !is_steered && !local.ip().is_loopback()
    };
    let short = listening
        .iter()
        .filter(|it| it.queue < QUEUE_MIN && is_reached(it.local));
    let short: BTreeMap<_, _> = short.map(|it| (it.local, it.queue)).collect();
    let findings = short.into_iter().map(|(local, queue)| {
        let text = format!(
            "the program on {local} lets {queue} connections wait for it: a flood of SYNs fills the queue at once"
        );
        Finding::warning("listener-queue-short", text).remedy(format!(
            "let it ask for {BACKLOG}, as nginx does by `listen 443 ssl backlog={BACKLOG}`, Apache by `ListenBacklog`, \
             HAProxy by `backlog`; `net.core.somaxconn` has to be as long"
        ))
    });
    findings.collect()
}

/// What is judged by the clock: certificates, revocation lists, and the age of lists.
fn clock(is_kept: Option<bool>) -> Option<Finding> {
    let text = match is_kept {
        Some(true) => return None,
        Some(false) => {
            "the kernel says that no program keeps this host's clock in time: a clock that is wrong refuses certificates \
             that are valid (visitors see error 520 or 525), or admits those that have expired"
        }
        None => "the kernel does not say whether a program keeps this host's clock in time",
    };
    Some(Finding::warning("clock-not-kept", text).remedy(
        "`timedatectl set-ntp true`, or chrony with `rtcsync` (without it, it keeps the clock and the kernel does not know)",
    ))
}

/// That the kernel does not say it, and why.
pub(super) fn unread(error: &(dyn std::error::Error + 'static)) -> String {
    format!(
        "the kernel does not say which addresses and sockets this host has: {}",
        chain(error)
    )
}

/// Interfaces whose packets one processor receives, where that costs most: with generic XDP.
fn queues(report: &HostStatus) -> Vec<Finding> {
    let filters = report.roles.iter().filter_map(|role| role.filter.as_ref());
    let interfaces = filters.flat_map(|filter| &filter.interfaces);
    let generic = interfaces.filter(|interface| interface.mode == "generic");
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let findings = generic.filter_map(|interface| {
        let name = &interface.name;
        let queues = format!("/sys/class/net/{name}/queues");
        let queues = fs::read_dir(queues).ok()?.flatten();
        let receiving: Vec<_> = queues
            .filter(|queue| queue.file_name().as_encoded_bytes().starts_with(b"rx-"))
            .collect();
        let is_spread = receiving.iter().any(|queue| {
            let mask = fs::read_to_string(queue.path().join("rps_cpus")).unwrap_or_default();
            mask.contains(|c: char| c.is_ascii_hexdigit() && c != '0')
        });
        if receiving.len() != 1 || is_spread || processors == 1 {
            return None;
        }
        let text = format!(
            "`{name}` has one receive queue, and its packets are not spread over the {processors} processors: \
             generic XDP judges all of them on one"
        );
        Some(Finding::warning("one-processor-receives", text).remedy(format!(
            "`echo ffffffff >/sys/class/net/{name}/queues/rx-0/rps_cpus` (Receive Packet Steering)"
        )))
    });
    findings.collect()
}

/// Interfaces by which a neighbour on the wire reaches 127.0.0.1, from where no connection is steered: ip-sysctl.rst.
fn routed_loopback(filter: &FilterSettings) -> Option<Finding> {
    if filter.steered_ports.is_empty() {
        return None;
    }
    let interfaces = fs::read_dir(CONF).ok()?.flatten();
    let own = ["default", "lo"];
    let others = interfaces.filter(|entry| own.iter().all(|own| entry.file_name() != *own));
    let routed = others.filter(|entry| {
        let text = fs::read_to_string(entry.path().join("route_localnet"));
        text.is_ok_and(|text| text.trim() == "1")
    });
    let routed: BTreeSet<_> = routed
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let first = routed.first()?;
    let text = format!(
        "`net.ipv4.conf.{first}.route_localnet` is 1: a host or guest on its network can reach the web server at 127.0.0.1, \
         around the gate"
    );
    Some(Finding::warning("loopback-routed", text).remedy(format!(
        "`sysctl -w net.ipv4.conf.{first}.route_localnet=0`"
    )))
}

/// Roles that systemd does not start at the next boot.
fn units(config: &Config) -> Vec<Finding> {
    let Some(program) = tool("systemctl") else {
        return Vec::from([Finding::warning(
            "units-unknown",
            "there is no systemctl: who starts the roles at the next boot?",
        )]);
    };
    let mut findings = Vec::new();
    for role in config.roles() {
        if role == Role::Ranges && config.live.ranges.sources.is_empty() {
            continue;
        }
        let unit = format!("pullgate-{}.service", role.label());
        let property = ["show", "--value", "--property", "UnitFileState", &unit];
        match run(&program, &property).as_deref().map(str::trim) {
            Ok("enabled" | "enabled-runtime" | "static" | "generated") => {}
            Ok("") => findings.push(Finding::warning(
                "units-unknown",
                format!("systemd has no {unit}: who starts the role at the next boot?"),
            )),
            Ok(state) => findings.push(
                Finding::warning(
                    "unit-not-enabled",
                    format!("{unit} is {state}: the role does not come back at the next boot"),
                )
                .remedy(format!("`systemctl enable {unit}`")),
            ),
            Err(error) => findings.push(Finding::warning(
                "units-unknown",
                format!("systemd cannot be asked for {unit} ({error})"),
            )),
        }
    }
    findings
}

/// Ports that a firewall leads elsewhere: the filter does not judge them, or the gate never has their connections.
fn led_elsewhere(filter: &FilterSettings) -> Vec<Finding> {
    let is_steered = |port: &u16| filter.steered_ports.contains(port);
    let ports: BTreeSet<_> = PROXIED_PORTS
        .into_iter()
        .chain(filter.ports.iter().copied())
        .collect();
    let found = redirections(&ports);
    let answers = filter.syn_cookies != SynCookies::Off;
    let wrong = found.led.into_iter().filter(|(_, port)| {
        let is_judged = filter.ports.contains(port) && !is_steered(port);
        answers || !is_judged
    });
    let led = wrong.map(|(name, port)| {
        if is_steered(&port) {
            let text = format!(
                "a rule of {name} redirects TCP port {port} (as Docker's published ports are), before connections are \
                 steered: the gate has none that match it, and any Cloudflare customer reaches what is behind it"
            );
            return Finding::error("port-redirected", text)
                .remedy("remove the rule (`docker run` without `--publish`), and let the web server listen on the host");
        }
        if filter.ports.contains(&port) {
            let text = format!(
                "a rule of {name} redirects TCP port {port}: in a flood of SYNs at a listener of this host on that port, \
                 redirected connections are lost"
            );
            return Finding::warning("port-redirected", text)
                .remedy("remove the rule, or set `filter.syn_cookies = \"off\"`");
        }
        let text = format!(
            "a rule of {name} redirects TCP port {port} (as Docker's published ports are), which Cloudflare \
             proxies and `filter.ports` does not name: strangers reach what is behind it"
        );
        Finding::warning("port-redirected", text).remedy("add it to `filter.ports`")
    });
    let unread = found.unread.first().map(|first| {
        let count = found.unread.len();
        let text = format!(
            "which ports the firewall redirects is not known of {count} of its rules: {first}"
        );
        Finding::warning("redirection-unread", text)
            .remedy("look at what they lead elsewhere: it has to be in `filter.ports`")
    });
    led.chain(unread).collect()
}

/// Addresses of this host at which packets to the protected ports are not judged.
fn missing_destinations(filter: &FilterSettings) -> Vec<Finding> {
    if filter.destinations.is_empty() {
        return Vec::new();
    }
    let (addresses, listening) = match (netlink::addresses(), netlink::listening_sockets()) {
        (Ok(addresses), Ok(listening)) => (addresses, listening),
        (Err(error), _) | (_, Err(error)) => {
            return Vec::from([Finding::warning("destinations-unread", unread(&error))]);
        }
    };
    let missing = addresses.into_iter().filter(|address| {
        let is_local = match address {
            std::net::IpAddr::V4(address) => address.is_loopback() || address.is_link_local(),
            std::net::IpAddr::V6(address) => {
                address.is_loopback() || address.is_unicast_link_local()
            }
        };
        !is_local && !filter.destinations.contains(address)
    });
    let findings = missing.filter_map(|address| {
        let mut answering = listening.iter().filter(|socket| {
            let local = socket.local;
            let is_family = local.is_ipv4() == address.is_ipv4() || socket.is_dual_stack;
            filter.ports.contains(&local.port())
                && (local.ip() == address || local.ip().is_unspecified() && is_family)
        });
        let port = answering.next()?.local.port();
        let text = format!(
            "{address} is an address of this host and not in `filter.destinations`, and a program answers on its \
             port {port}: a client that finds it gets around Cloudflare"
        );
        Some(Finding::error("destination-missing", text).remedy("add it"))
    });
    findings.collect()
}

/// What the gate and its socket units ask for.
const BACKLOG: u32 = 4096;
/// What the kernel does with packets, by interface.
const CONF: &str = "/proc/sys/net/ipv4/conf";
/// A queue that is shorter is full in a millisecond of what one sender can forge.
const QUEUE_MIN: u32 = 1024;
/// What is right for all hosts: cookies while a queue is full.
const SYNCOOKIES_ON: &str =
    "`sysctl -w net.ipv4.tcp_syncookies=1`, and the same line in /etc/sysctl.d/";
