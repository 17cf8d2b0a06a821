//! `pullgate explain`: what the loaded filter does with a packet, and by which rule.
//!
//! The loaded program itself judges the packet, and its twin gives the reason; the rule that the
//! verdict rests on is looked up on disk. What the host's own `decide` makes of it must be the same; if
//! it is not, disk and kernel disagree, and that is reported.

use std::fmt::{self, Display, Formatter};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::SystemTime;

use filter_ebpf::decide;
use filter_ebpf::steering::Connection;
use filter_ebpf::verdict::{Counted, Reason};
use serde::Serialize;

use crate::cli::Explain;
use crate::commands::listing::Rule;
use crate::config::{Config, Mode};
use crate::ranges::{ActiveRanges, Table, TableFull};
use crate::report::{EX_CONFIG, EX_SOFTWARE, ExitStatus};
use crate::snapshot::{self, SnapshotError};
use crate::xdp::{self, Probe, SteeredTo, XdpError};

/// What becomes of a packet, and why.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// The source address.
    pub source: IpAddr,
    /// The destination address.
    pub destination: IpAddr,
    /// The destination port.
    pub port: u16,
    /// What else it is: `UDP`, `later fragment`, `VLAN 7` …
    pub packet: Vec<String>,
    /// The interface that it comes in by.
    pub interface: String,
    /// `pass`, `drop` or, in monitor mode, `would_drop`.
    pub verdict: &'static str,
    /// Why.
    pub reason: &'static str,
    /// Whether that depends on who sent it.
    pub by_source: bool,
    /// The range or rule that says so.
    pub rule: Option<Rule>,
    /// Where the connection goes that such a packet begins, if anything is steered.
    pub steered: Option<SteeredTo>,
    /// Where the published ranges come from.
    pub ranges: String,
    /// Seconds since they were fetched; none for the baseline.
    pub ranges_age_seconds: Option<u64>,
    /// Set if the loaded program does not judge by what is on disk.
    pub disagreement: Option<String>,
}

/// Asks the loaded filter: the one that is pinned, or the one that is on trial.
///
/// # Errors
///
/// Returns why it cannot be asked.
pub fn explain(config: &Config, packet: &Explain) -> Result<Explanation, ExplainError> {
    let settings = config.live.filter.as_ref().ok_or(ExplainError::NoFilter)?;
    let interface = xdp::loaded_interface(&config.boot.paths.bpf, packet.iface.as_deref())?;
    let destination = packet.to.unwrap_or_else(|| {
        let family = |address: &&IpAddr| address.is_ipv4() == packet.source.is_ipv4();
        let protected = settings.destinations.iter().find(family).copied();
        protected.unwrap_or(match packet.source {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
        })
    });
    let frame = xdp::frame(&Probe {
        source: packet.source,
        destination,
        port: packet.port,
        vlans: &packet.vlan,
        is_fragment: packet.fragment,
        is_udp: packet.udp,
    })?;

    let active = snapshot::load(&config.boot.paths.snapshot(), &config.live.ranges)
        .or_else(|_| snapshot::baseline(&config.live.ranges))?;
    let table = Table::compile(&config.live.ranges.rules(active.set()))?;
    let expected = decide(frame.as_slice(), settings, &table);
    let slot = match settings.mode {
        Mode::Enforce => expected.slot(),
        Mode::Monitor => expected.slot().monitored(),
    };
    let probed = xdp::probe(&config.boot.paths.bpf, &interface, &frame)?;
    let counted = probed.counted;
    let disagreement = match Counted::at(slot.0).filter(|by_disk| *by_disk != counted) {
        _ if !probed.is_consistent() => Some(format!(
            "the loaded program {} the packet, and its twin counts it as {} ({}); restart the filter role",
            if probed.is_dropped { "drops" } else { "passes" },
            counted.verdict,
            counted.reason.label()
        )),
        Some(by_disk) => Some(format!(
            "by configuration and ranges on disk it would be: {} ({}); does the filter role run, and \
             was it reloaded?",
            by_disk.verdict,
            by_disk.reason.label()
        )),
        None => None,
    };

    Ok(Explanation {
        source: packet.source,
        destination,
        port: packet.port,
        packet: words(packet),
        interface,
        verdict: counted.verdict,
        reason: counted.reason.label(),
        by_source: is_by_source(counted.reason),
        rule: rule(config, &active, packet.source, counted.reason),
        steered: steered(&config.boot.paths.bpf, packet, destination)
            .filter(|_| !probed.is_dropped),
        ranges: active.names(),
        ranges_age_seconds: active.age_seconds(SystemTime::now()),
        disagreement,
    })
}

/// Where the connection goes that a packet begins, if connections are steered.
fn steered(base: &Path, packet: &Explain, destination: IpAddr) -> Option<SteeredTo> {
    let connection = Connection {
        client: packet.source,
        local: destination,
        port: packet.port,
    };
    let begins_one = !packet.udp && !packet.fragment;
    begins_one
        .then(|| xdp::steered_to(base, &connection))
        .flatten()
}

/// What a packet is besides a SYN.
fn words(packet: &Explain) -> Vec<String> {
    let tags = packet.vlan.iter().map(|vlan| format!("VLAN {vlan}"));
    let udp = packet.udp.then(|| "UDP".to_owned());
    let fragment = packet.fragment.then(|| "later fragment".to_owned());
    tags.chain(udp).chain(fragment).collect()
}

/// The range or rule that a verdict rests on.
fn rule(config: &Config, active: &ActiveRanges, source: IpAddr, reason: Reason) -> Option<Rule> {
    is_by_source(reason)
        .then(|| Rule::find(&config.live.ranges, active, source))
        .flatten()
}

/// Whether a verdict for this reason depends on who sent the packet.
fn is_by_source(reason: Reason) -> bool {
    match reason {
        Reason::Allowed
        | Reason::ChainTooLong
        | Reason::Denied
        | Reason::Fragment
        | Reason::Listed
        | Reason::Malformed
        | Reason::NotListed => true,
        Reason::NoConnection
        | Reason::NotIp
        | Reason::NotTcp
        | Reason::OtherDestination
        | Reason::OtherPort
        | Reason::SynCookie
        | Reason::TooManyTags => false,
    }
}

impl Display for Explanation {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self {
            source,
            destination,
            port,
            interface,
            verdict,
            reason,
            ..
        } = self;
        let words: String = self.packet.iter().map(|word| format!(", {word}")).collect();
        writeln!(
            f,
            "{source} to {destination}, port {port}{words}, on {interface}: {verdict} ({reason})"
        )?;
        match &self.rule {
            Some(rule) => writeln!(f, "  the source is in {rule}")?,
            None if self.by_source => {
                writeln!(
                    f,
                    "  the source is in no published range, and not in `allow`"
                )?;
            }
            None => writeln!(f, "  from any source")?,
        }
        match self.steered {
            Some(SteeredTo::Gate) => writeln!(f, "  the connection is steered to the gate")?,
            Some(SteeredTo::NoSocket) => writeln!(
                f,
                "  the connection is refused: it is steered to the gate, which has handed over no socket"
            )?,
            Some(SteeredTo::Unknown) => writeln!(
                f,
                "  whether the connection is steered to the gate cannot be asked of this kernel"
            )?,
            Some(SteeredTo::Listener) => {
                writeln!(
                    f,
                    "  the connection is not steered: the web server takes it"
                )?;
            }
            None => {}
        }
        write!(f, "  ranges: {}", self.ranges)?;
        match self.ranges_age_seconds {
            Some(age) => writeln!(f, ", {age} s old")?,
            None => writeln!(f)?,
        }
        if let Some(disagreement) = &self.disagreement {
            writeln!(f, "  ! {disagreement}")?;
        }
        Ok(())
    }
}

/// Why the filter cannot be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExplainError {
    /// The configuration describes no filter.
    #[error("the configuration has no [filter] section, so there is no filter to ask")]
    NoFilter,
    /// The ranges and rules do not fit.
    #[error(transparent)]
    Table(#[from] TableFull),
    /// Neither snapshot nor baseline can be used.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The program cannot be asked.
    #[error(transparent)]
    Xdp(#[from] XdpError),
}

impl ExitStatus for ExplainError {
    fn exit_status(&self) -> u8 {
        match self {
            Self::NoFilter | Self::Table(_) => EX_CONFIG,
            Self::Snapshot(_) => EX_SOFTWARE,
            Self::Xdp(error) => error.exit_status(),
        }
    }
}
