//! The kernel side of the filter: load, attach, pin, publish, count. The only user of aya.

mod attach;
mod pins;
mod publish;

use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use aya::maps::{MapError, PerCpuArray};
use aya::programs::{ProgramError, Xdp};
use aya::{Ebpf, EbpfError, EbpfLoader};
use filter_ebpf::abi;
use filter_ebpf::verdict::{COLUMN_LABELS, Reason};
use rustix::thread::CapabilitySet;
use tracing::debug;

pub use self::attach::{Attached, Rung};
use self::pins::Pins;
pub use self::pins::{check_bpffs, is_loaded, unload};
use self::publish::Publisher;
use crate::config::{self, Fragments, Located, Mode};
use crate::ranges::{Rules, Table};
use crate::report::{EX_CONFIG, EX_NOPERM, EX_SOFTWARE};

/// The filter in the kernel: attached, pinned and published.
///
/// Holding one keeps maps open, but no link: the pins alone keep the program attached, so neither
/// the end of this process nor anything it may be talked into detaches it.
pub struct Filter {
    publisher: Publisher,
    counters: PerCpuArray<aya::maps::MapData, u64>,
    attached: Vec<Attached>,
    /// Holds the loaded program, to attach it anew.
    ebpf: Ebpf,
    settings: config::Filter,
    pins: Pins,
}

impl Filter {
    /// Loads the program with `settings`, publishes `table`, and only then attaches.
    ///
    /// Pins that are already there are adopted: the maps keep their counters, and the program is
    /// replaced through its link in one step, so that no packet passes in between.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. What was attached before still is.
    pub fn start(
        settings: &config::Filter,
        pins: &Path,
        rules: &Rules<'_>,
        table: &Table,
    ) -> Result<Self, XdpError> {
        if OBJECT.is_empty() {
            return Err(XdpError::NoProgram);
        }
        let pins = Pins::open(pins)?;
        let mut ebpf = load(settings, &pins)?;
        let mut publisher = Publisher::new(&mut ebpf)?;
        let counters = PerCpuArray::try_from(take_map(&mut ebpf, abi::COUNTERS)?)
            .map_err(map_error(abi::COUNTERS))?;
        publisher.publish(rules, table)?;

        let program = program(&mut ebpf)?;
        program.load().map_err(refused)?;
        let attached = attach::attach(program, settings, &pins)?;
        pins.replace_program(program)?;

        Ok(Self {
            publisher,
            counters,
            attached,
            ebpf,
            settings: settings.clone(),
            pins,
        })
    }

    /// Attaches anew wherever the filter is not in force any more, unless it was unloaded.
    ///
    /// # Errors
    ///
    /// Returns the step that failed.
    pub fn tend(&mut self) -> Result<Tended, XdpError> {
        if self.attached.iter().all(Attached::is_filtered) {
            return Ok(Tended::InForce);
        }
        if !self.pins.exist() {
            return Ok(Tended::Unloaded);
        }
        let program = program(&mut self.ebpf)?;
        self.attached = attach::attach(program, &self.settings, &self.pins)?;
        Ok(Tended::AttachedAnew)
    }

    /// Publishes another table; packets are judged by the old one or the new one, never a mix.
    ///
    /// # Errors
    ///
    /// Returns the step that failed; the old table is then still the one in use.
    pub fn publish(&mut self, rules: &Rules<'_>, table: &Table) -> Result<(), XdpError> {
        self.publisher.publish(rules, table)
    }

    /// Where the program is attached, and how.
    #[must_use]
    pub fn attached(&self) -> &[Attached] {
        &self.attached
    }

    /// How many frames were judged so far: verdict, reason, total over all CPUs.
    ///
    /// # Errors
    ///
    /// Returns the error of the read that failed.
    pub fn frames(&self) -> Result<Vec<(&'static str, &'static str, u64)>, XdpError> {
        let slots = Reason::ALL
            .into_iter()
            .flat_map(|reason| COLUMN_LABELS.map(|column| (column, reason.label())));
        slots
            .zip(0_u32..)
            .map(|((column, reason), slot)| {
                let per_cpu = self.counters.get(&slot, 0);
                let per_cpu = per_cpu.map_err(map_error(abi::COUNTERS))?;
                Ok((column, reason, per_cpu.iter().sum()))
            })
            .collect()
    }
}

/// What [`Filter::tend`] found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Tended {
    /// The filter was not in force somewhere, and is again.
    AttachedAnew,
    /// The filter is in force everywhere.
    InForce,
    /// Somebody has unloaded the filter; only a restart brings it back.
    Unloaded,
}

/// Finds the first capability that this process lacks for the filter.
///
/// # Errors
///
/// Returns [`XdpError::Capability`] with its name.
pub fn check_capabilities() -> Result<(), XdpError> {
    let held = rustix::thread::capabilities(None).map_err(|errno| XdpError::Capabilities {
        source: errno.into(),
    })?;
    for (name, capability) in [
        ("CAP_BPF", CapabilitySet::BPF),
        ("CAP_NET_ADMIN", CapabilitySet::NET_ADMIN),
    ] {
        if !held.effective.contains(capability) {
            return Err(XdpError::Capability { name });
        }
    }
    Ok(())
}

/// Finds the first interface that does not exist.
///
/// # Errors
///
/// Returns the interface, with its place in the configuration.
pub fn check_interfaces(settings: &config::Filter) -> Result<(), config::ConfigError> {
    for Located { value: name, place } in &settings.interfaces {
        attach::interface_index(name).map_err(|error| {
            place.error(format_args!(
                "interface `{name}` does not exist ({error}); `ip link` lists those that do"
            ))
        })?;
    }
    Ok(())
}

fn load(settings: &config::Filter, pins: &Pins) -> Result<Ebpf, XdpError> {
    let flags = flags(settings);
    let tcp_ports = port_bitmap(&settings.ports);
    let udp_ports = port_bitmap(&settings.udp_ports);
    let destinations = destinations(settings);

    let mut loader = EbpfLoader::new();
    loader
        .override_global(abi::SETTINGS, &flags, true)
        .override_global(abi::TCP_PORTS, tcp_ports.as_slice(), true)
        .override_global(abi::UDP_PORTS, udp_ports.as_slice(), true)
        .override_global(abi::DESTINATIONS, destinations.as_slice(), true);
    for name in abi::MAPS {
        loader.map_pin_path(name, pins.map(name));
    }
    loader.load(OBJECT).map_err(XdpError::Object)
}

fn flags(settings: &config::Filter) -> u32 {
    let mut flags = 0;
    if settings.fragments == Fragments::Pass {
        flags |= abi::SETTING_FRAGMENTS_PASS;
    }
    if settings.mode == Mode::Monitor {
        flags |= abi::SETTING_MONITOR;
    }
    if !settings.udp_ports.is_empty() {
        flags |= abi::SETTING_UDP;
    }
    // At most `DESTINATIONS_MAX`, by the configuration.
    let destinations = u32::try_from(settings.destinations.len()).unwrap_or(u32::MAX);
    flags | destinations << abi::SETTING_DESTINATIONS_SHIFT
}

fn port_bitmap(ports: &[u16]) -> [u8; abi::PORT_BITMAP] {
    let mut bitmap = [0; abi::PORT_BITMAP];
    for port in ports {
        bitmap[usize::from(port >> 3)] |= 1 << (port & 7);
    }
    bitmap
}

/// IPv4 as IPv4-mapped IPv6.
fn destinations(settings: &config::Filter) -> [u128; abi::DESTINATIONS_MAX] {
    let mut bits = [0; abi::DESTINATIONS_MAX];
    for (bits, address) in bits.iter_mut().zip(&settings.destinations) {
        *bits = match address {
            IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
            IpAddr::V6(address) => address.to_bits(),
        };
    }
    bits
}

/// The verifier's log goes to the log, where its hundreds of lines belong.
fn refused(error: ProgramError) -> XdpError {
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return XdpError::Load(error);
    };
    debug!(%verifier_log, "the kernel refuses the XDP program");
    XdpError::Refused(io_error)
}

fn program(ebpf: &mut Ebpf) -> Result<&mut Xdp, XdpError> {
    let program = ebpf.program_mut(abi::PROGRAM);
    let program = program.ok_or(XdpError::Missing { name: abi::PROGRAM })?;
    program.try_into().map_err(XdpError::Load)
}

fn take_map(ebpf: &mut Ebpf, name: &'static str) -> Result<aya::maps::Map, XdpError> {
    ebpf.take_map(name).ok_or(XdpError::Missing { name })
}

fn map_error(name: &'static str) -> impl Fn(MapError) -> XdpError {
    move |source| XdpError::Map { name, source }
}

/// Why the filter could not be put into the kernel, or could not be changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum XdpError {
    /// This binary carries no XDP program.
    #[error(
        "this build of pullgate carries no XDP program, so it cannot filter; build it with \
         `cargo xtask build`"
    )]
    NoProgram,
    /// The process lacks a capability.
    #[error("{name} is missing; run as root, or give the service that capability")]
    Capability {
        /// The capability.
        name: &'static str,
    },
    /// The process's capabilities cannot be read.
    #[error("capabilities cannot be read")]
    Capabilities {
        /// Why not.
        source: io::Error,
    },
    /// The pin directory is not on a bpffs.
    #[error(
        "{} is not on a BPF file system, so the filter would vanish with this process; \
         `mount -t bpf bpf /sys/fs/bpf`, or set `paths.bpf`", path.display()
    )]
    NotBpffs {
        /// The directory.
        path: PathBuf,
    },
    /// Something that is not ours is where our pins should be.
    #[error(
        "{} is not a directory that this user alone may open; find out who made it, and remove it",
        path.display()
    )]
    NotOurs {
        /// The directory.
        path: PathBuf,
    },
    /// The interface is filtered generically, and the configuration wants it natively.
    #[error(
        "`{interface}` is filtered by generic XDP, which `attach = \"native\"` excludes; \
         `pullgate unload` first"
    )]
    Lower {
        /// The interface.
        interface: String,
    },
    /// A pin cannot be made, read or removed.
    #[error("pin {}", path.display())]
    Pin {
        /// The pin.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The object file lacks a map or the program.
    #[error("the XDP object has no `{name}`")]
    Missing {
        /// What is missing.
        name: &'static str,
    },
    /// The maps cannot be created.
    #[error("the XDP object cannot be loaded")]
    Object(#[source] EbpfError),
    /// The kernel's verifier refuses the program.
    #[error(
        "the kernel refuses the XDP program; PULLGATE_LOG=pullgate=debug shows the verifier's log"
    )]
    Refused(#[source] io::Error),
    /// The program cannot be loaded or taken hold of.
    #[error("the XDP program cannot be loaded")]
    Load(#[source] ProgramError),
    /// A map cannot be read or written.
    #[error("map {name}")]
    Map {
        /// The map.
        name: &'static str,
        /// Why not.
        source: MapError,
    },
    /// What was read back from the maps is not what was written, or judges an address wrongly.
    #[error("the table read back from the kernel is not the one written; the old one stays in use")]
    NotVerified,
    /// The program cannot be attached to an interface.
    #[error("cannot attach to `{interface}`")]
    Attach {
        /// The interface.
        interface: String,
        /// The kernel's reason.
        source: ProgramError,
    },
    /// Another XDP program is on the interface.
    #[error(
        "another XDP program is on `{interface}`; see it with `ip link show {interface}`, and \
         remove it with `ip link set {interface} xdp off` or through the tool that put it there"
    )]
    Occupied {
        /// The interface.
        interface: String,
    },
    /// The kernel has no BPF links for XDP (before 5.9).
    #[error("the kernel cannot link XDP programs; Linux 5.9 or later is needed")]
    NoLinks,
}

impl XdpError {
    /// The exit code for this error: sysexits.h.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Capability { .. } => EX_NOPERM,
            Self::Pin { source, .. } if source.kind() == ErrorKind::PermissionDenied => EX_NOPERM,
            Self::NotBpffs { .. } => EX_CONFIG,
            Self::NoProgram
            | Self::Capabilities { .. }
            | Self::NotOurs { .. }
            | Self::Lower { .. }
            | Self::Pin { .. }
            | Self::Missing { .. }
            | Self::Object(_)
            | Self::Refused(_)
            | Self::Load(_)
            | Self::Map { .. }
            | Self::NotVerified
            | Self::Attach { .. }
            | Self::Occupied { .. }
            | Self::NoLinks => EX_SOFTWARE,
        }
    }
}

/// The XDP object, empty in builds without it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/filter.o"));
