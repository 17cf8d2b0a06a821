//! What the filter says of itself: one look at the kernel, for status and metrics alike.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::SystemTime;

use filter_ebpf::verdict::Counted;

use super::tally::{Flood, Tally};
use super::{FilterRole, FilterState};
use crate::config::SynCookies;
use crate::config::{FilterSettings, Mode};
use crate::control::protocol::{
    DropStatus, FilterStatus, FramesStatus, InterfaceStatus, SourceStatus, SynFloodStatus,
};
use crate::host::netlink;
use crate::observe::{Attachment, FilterSample, Finding, FrameLabels};
use crate::report::chain;
use crate::roles::findings::{monitor, no_interface};
use crate::roles::role_report::RoleReport;
use crate::sync::lock;
use crate::xdp::{
    AttachMode, Coverage, Detached, Filter, InterfaceState, LeftToKernel, SteerState,
};

impl FilterRole {
    /// Looks at the filter in the kernel, and at what it was seen to do.
    pub(in crate::roles) fn report(&self) -> RoleReport {
        let (mut state, tally) = (self.state(), lock(&self.tally));
        let steering = state.filter.steer_state();
        let filter = &state.filter;
        let settings = filter.settings();
        let mut findings = findings(&state);
        let (interfaces, are_filtered) = interfaces(filter, &mut findings);
        findings.extend(
            steering
                .iter()
                .flat_map(|steering| unsteered(steering, settings)),
        );
        let counted = filter.frames().unwrap_or_else(|error| {
            let text = format!("counters not readable: {}", chain(&error));
            findings.push(Finding::warning("counters-unreadable", text));
            BTreeMap::new()
        });
        let is_led = steering.as_ref().is_none_or(SteerState::leads_to_gate);
        let is_enforcing = settings.mode == Mode::Enforce;
        let sample = FilterSample {
            is_enforcing,
            attached: attachments(&interfaces),
            steered: steering.iter().flat_map(steered).collect(),
            frames: counters(&counted),
        };
        let frames = frames(&counted, &tally);
        let flood = tally.flood();
        findings.extend(flood.map(flooded));
        let details = interfaces.iter().filter(|(status, _)| status.filtered);
        let mut details: Vec<_> = details.map(|(status, _)| attached(status)).collect();
        for (interface, cause) in filter.left_to_kernel() {
            let text = format!("SYNs on `{interface}` are left to the kernel in a flood: {cause}");
            if settings.syn_cookies == SynCookies::On {
                findings.push(Finding::warning("syn-cookies-missing", text));
            } else if cause != LeftToKernel::Off {
                details.push(("SYN cookies".to_owned(), text));
            }
        }
        details.extend(ports(settings));
        details.extend(
            steering.map(|_| ("steered ports".to_owned(), numbers(&settings.steered_ports))),
        );
        let status = FilterStatus {
            mode: match settings.mode {
                Mode::Enforce => "enforce".to_owned(),
                Mode::Monitor => "monitor".to_owned(),
            },
            on_trial: filter.is_on_trial(),
            interfaces: interfaces.into_iter().map(|(status, _)| status).collect(),
            frames,
            syn_flood: flood.map(|flood| SynFloodStatus {
                seconds: seconds_since(flood.since),
                answered_per_second: flood.answered_per_second,
            }),
            drops: drops(&tally),
            top_sources: sources(&tally),
        };
        RoleReport {
            findings,
            details,
            is_enforcing: is_enforcing && are_filtered && is_led,
            filter: Some((status, sample)),
            ..RoleReport::default()
        }
    }
}

/// What is not right about the filter itself.
fn findings(state: &FilterState) -> Vec<Finding> {
    let FilterState {
        filter,
        config: _,
        published: _,
        unpublished,
        saved: _,
        amnesia,
        tampered,
        unpinned,
        return_path,
        has_ended: _,
    } = state;
    let mut findings = Vec::new();
    if filter.settings().mode == Mode::Monitor {
        findings.push(monitor());
    }
    if let Some(at) = tampered {
        let text = format!(
            "another process changed the ranges in the kernel; they were published again {} s ago",
            at.elapsed().as_secs()
        );
        findings.push(Finding::error("kernel-ranges-tampered", text));
    }
    if let Some(error) = unpublished {
        let text = format!(
            "packets are judged by older ranges: the active ones cannot be published ({error}); trying \
             again"
        );
        findings.push(Finding::error("ranges-not-published", text));
    }
    findings.extend(unpinned.iter().map(|pin| {
        let text = format!(
            "another process removed {}: the filter goes on, and `explain` does not find it",
            pin.display()
        );
        Finding::error("pin-removed", text).remedy("restart the filter role")
    }));
    findings.extend(return_path.finding());
    if filter.is_on_trial() {
        findings.push(
            Finding::warning("on-trial", "the filter is on trial")
                .remedy("`pullgate confirm` lets it stay"),
        );
    }
    if filter.steers_until_confirmed() {
        let text = "connections are steered to the gate as before the trial; that ends when it is \
                    confirmed, and is not tried out";
        findings.push(Finding::warning("steered-until-confirmed", text));
    }
    if let Some(error) = amnesia {
        let text = format!("uplinks are not remembered across boots: {error}");
        findings.push(Finding::warning("uplinks-not-remembered", text));
    }
    findings
}

/// How each interface fares, with the label of its state, and whether all strangers' frames are judged.
fn interfaces(
    filter: &Filter,
    findings: &mut Vec<Finding>,
) -> (Vec<(InterfaceStatus, &'static str)>, bool) {
    let coverage = match filter.coverage() {
        Ok(coverage) => coverage,
        Err(error) => {
            let text = format!("interfaces not readable: {}", chain(&error));
            findings.push(Finding::error("interfaces-unreadable", text));
            return (Vec::new(), false);
        }
    };
    if coverage.is_empty() {
        findings.push(no_interface());
    }
    let all_covered = coverage.iter().all(|it| it.state.is_covered());
    let is_protected = all_covered && !coverage.is_empty();
    let mut interfaces = Vec::new();
    for Coverage { interface, state } in coverage {
        findings.extend(shortfall(&interface, &state));
        let status = InterfaceStatus {
            name: interface,
            mode: state.label().to_owned(),
            filtered: state.is_covered(),
            covered_by: state.covered_by().map(str::to_owned),
        };
        interfaces.push((status, state.label()));
    }
    for (upper, lower) in filter.bystanders() {
        let text = format!(
            "`{upper}` shares `{lower}` with an uplink, so its clients are filtered as well"
        );
        findings.push(Finding::warning("neighbours-filtered", text).remedy(
            "to spare them, list them in `ranges.allow`, or the uplink's addresses in \
             `filter.destinations`",
        ));
    }
    (interfaces, is_protected)
}

/// The same for metrics; a filter without an interface is one too.
fn attachments(interfaces: &[(InterfaceStatus, &'static str)]) -> Vec<Attachment> {
    if interfaces.is_empty() {
        return vec![Attachment {
            iface: "none".to_owned(),
            mode: "none",
            is_filtered: false,
        }];
    }
    let attachments = interfaces.iter().map(|(status, mode)| Attachment {
        iface: status.name.clone(),
        mode,
        is_filtered: status.filtered,
    });
    attachments.collect()
}

/// What is wrong with how an interface is filtered.
fn shortfall(interface: &str, state: &InterfaceState) -> Option<Finding> {
    let why = match state {
        InterfaceState::Attached(AttachMode::Native) | InterfaceState::Covered(_) => return None,
        InterfaceState::Attached(mode) => {
            let text = format!("`{interface}` is filtered by {} only", mode.name());
            return Some(Finding::warning("attach-mode-weaker", text));
        }
        InterfaceState::Detached => "no program of ours is attached to it".to_owned(),
        InterfaceState::Missing => "it does not exist, or is a bond without ports".to_owned(),
        InterfaceState::NotEthernet => {
            "a route to the internet leads there, and its frames are not Ethernet frames".to_owned()
        }
        InterfaceState::NotNamed => {
            "a route to the internet leads there, so strangers can come in, and \
                            `filter.interfaces` does not name it; add it"
                .to_owned()
        }
        InterfaceState::Overtaken(program) => {
            let text = format!(
                "`{interface}` is not surely filtered: another TCX program ({program}) judges before \
                 ours, and may let pass what ours would drop"
            );
            return Some(
                Finding::error("tcx-program-before", text).remedy("attach it behind ours"),
            );
        }
        InterfaceState::Refused(reason) => reason.clone(),
    };
    let text = format!("`{interface}` is not filtered: {why}");
    Some(Finding::error("interface-not-filtered", text))
}

fn attached(interface: &InterfaceStatus) -> (String, String) {
    let how = match &interface.covered_by {
        Some(lower) => format!("covered by {lower}"),
        None => interface.mode.clone(),
    };
    let text = format!("{} ({how})", interface.name);
    ("attached".to_owned(), text)
}

fn ports(settings: &FilterSettings) -> impl Iterator<Item = (String, String)> {
    let tcp = ("TCP ports".to_owned(), numbers(&settings.ports));
    let udp = ("UDP ports".to_owned(), numbers(&settings.udp_ports));
    let has_udp = !settings.udp_ports.is_empty();
    [tcp].into_iter().chain(has_udp.then_some(udp))
}

fn numbers(ports: &[u16]) -> String {
    let numbers: Vec<_> = ports.iter().map(u16::to_string).collect();
    numbers.join(" ")
}

/// By family, whether connections are the gate's; not of a family that is not steered, nor where the
/// kernel cannot be asked and the link is in place.
fn steered(state: &SteerState) -> Vec<(&'static str, bool)> {
    let leads = state.leads_to_gate();
    [("ipv4", state.has_ipv4), ("ipv6", state.has_ipv6)]
        .into_iter()
        .filter(|(_, has)| has.is_some() || !leads)
        .map(|(family, has)| (family, leads && has == Some(true)))
        .collect()
}

/// That the web server listens on addresses of this host as well of which no connection is steered.
fn around_the_gate(settings: &FilterSettings) -> Option<Finding> {
    if settings.destinations.is_empty() {
        return None;
    }
    // A kernel that does not answer is no reason to warn.
    let listening = netlink::listeners().unwrap_or_default();
    let serves = |own: &IpAddr| {
        listening.iter().any(|listener| {
            let is_every = listener.ip().is_unspecified();
            // One on every address of IPv6 may have those of IPv4 as well.
            let is_it =
                listener.ip() == *own || (is_every && (listener.is_ipv6() || own.is_ipv4()));
            is_it && settings.steered_ports.contains(&listener.port())
        })
    };
    let is_elsewhere = |own: &IpAddr| {
        let is_local = matches!(own, IpAddr::V6(own) if own.is_unicast_link_local());
        !own.is_loopback() && !is_local && !settings.destinations.contains(own)
    };
    let own = netlink::addresses().unwrap_or_default().into_iter();
    let around: Vec<_> = own.filter(|own| is_elsewhere(own) && serves(own)).collect();
    let around: Vec<_> = around.iter().map(IpAddr::to_string).collect();
    (!around.is_empty()).then(|| {
        let text = format!(
            "`filter.destinations` has not all addresses of this host: at {} any client reaches the web server, \
             around the gate",
            around.join(", ")
        );
        Finding::warning("destinations-partial", text)
            .remedy("add them, leave `destinations` out, or let the web server listen on the others alone")
    })
}

/// What is not right about steering.
fn unsteered(state: &SteerState, settings: &FilterSettings) -> Vec<Finding> {
    let SteerState {
        detached,
        has_ipv4,
        has_ipv6,
        others,
    } = state;
    let ports = numbers(&settings.steered_ports);
    let mut findings = Vec::new();
    if let Some(detached) = detached {
        let cause = match detached {
            Detached::Unloaded => "the filter was unloaded".to_owned(),
            Detached::Refused(reason) => format!("the kernel does not take the program ({reason})"),
            Detached::ByAnother => "another process has detached the program".to_owned(),
        };
        let text = format!(
            "connections to the TCP ports {ports} are not steered to the gate: {cause}, and clients reach \
             the web server around the gate"
        );
        findings.push(Finding::error("steering-detached", text));
    }
    findings.extend(around_the_gate(settings));
    let missing: Vec<_> = [(has_ipv4, "IPv4"), (has_ipv6, "IPv6")]
        .into_iter()
        .filter(|(has_socket, _)| **has_socket == Some(false))
        .map(|(_, family)| family)
        .collect();
    if !missing.is_empty() {
        let text = format!(
            "connections by {} to the TCP ports {ports} are refused: the gate has handed over no socket",
            missing.join(" and ")
        );
        let remedy =
            "start the gate role; `pullgate unload` gives the ports back to the web server";
        findings.push(Finding::error("no-gate-socket", text).remedy(remedy));
    }
    if !others.is_empty() {
        let text = format!(
            "another program chooses sockets for connections too ({}), and the last that chooses one \
             decides: clients may reach another socket than the gate's",
            others.join("; ")
        );
        let remedy = "find its owner with `bpftool link show`";
        findings.push(Finding::error("other-sk-lookup", text).remedy(remedy));
    }
    findings
}

/// All that the kernel has counted.
fn counters(all: &BTreeMap<String, Vec<(Counted, u64)>>) -> Vec<(FrameLabels, u64)> {
    let mut counters = Vec::new();
    for (iface, frames) in all {
        for &(counted, total) in frames {
            let labels = FrameLabels {
                iface: iface.clone(),
                family: counted.family.label(),
                verdict: counted.verdict,
                reason: counted.reason.label(),
            };
            counters.push((labels, total));
        }
    }
    counters
}

/// The same for people: nothing that is zero, and how fast it grows.
fn frames(all: &BTreeMap<String, Vec<(Counted, u64)>>, tally: &Tally) -> Vec<FramesStatus> {
    let mut shown = Vec::new();
    for (iface, frames) in all {
        for &(counted, total) in frames.iter().filter(|(_, total)| *total != 0) {
            shown.push(FramesStatus {
                iface: iface.clone(),
                family: counted.family.label().to_owned(),
                verdict: counted.verdict.to_owned(),
                reason: counted.reason.label().to_owned(),
                total,
                per_second: tally.rate(iface, counted),
            });
        }
    }
    shown
}

/// That a listener's queue is full of SYNs from sources that may enter, which are forged then.
fn flooded(flood: Flood) -> Finding {
    let Flood {
        since,
        answered_per_second,
        is_taken_up,
    } = flood;
    let lost = if is_taken_up {
        ""
    } else {
        ". None of the answers has been taken up lately: all these SYNs are forged, or the answers are lost (on a veth pair \
         whose other end has no XDP program, they are)"
    };
    let text = format!(
        "a flood of SYNs with Cloudflare's addresses, forged perhaps, since {}: {answered_per_second} a second are answered \
         with SYN cookies, as a listener's queue is full (or `net.ipv4.tcp_syncookies` is 2). Connections made meanwhile \
         have no window scaling{lost}",
        humantime::format_rfc3339_seconds(since)
    );
    Finding::warning("syn-flood", text)
}

fn drops(tally: &Tally) -> Vec<DropStatus> {
    let interfaces = netlink::interfaces().unwrap_or_default();
    let name_of = |index| {
        let found = interfaces.iter().find(|interface| interface.index == index);
        found.map_or_else(|| format!("#{index}"), |found| found.name.clone())
    };
    let drops = tally.drops.iter().map(|(at, drop)| DropStatus {
        seconds_ago: seconds_since(*at),
        iface: name_of(drop.interface),
        source: drop.source,
        destination: drop.destination,
        port: drop.port,
        verdict: drop.counted.verdict.to_owned(),
        reason: drop.counted.reason.label().to_owned(),
    });
    drops.collect()
}

fn sources(tally: &Tally) -> Vec<SourceStatus> {
    let sources = tally.sources.top(TOP_SHOWN).into_iter();
    sources
        .map(|(source, about)| SourceStatus { source, about })
        .collect()
}

/// Zero for a time in the future: the clock was set back.
fn seconds_since(time: SystemTime) -> u64 {
    let ago = SystemTime::now().duration_since(time);
    ago.unwrap_or_default().as_secs()
}

/// Sources of drops that are shown.
const TOP_SHOWN: usize = 10;
