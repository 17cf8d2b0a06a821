//! Loading: the settings as read-only globals, the maps where the pins say, a program per interface.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Once;

use aya::maps::{Array, MapData, MapError, MapInfo, PerCpuArray};
use aya::programs::{ProgramError, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader};
use aya_log::EbpfLogger;
use filter_ebpf::abi;
use filter_ebpf::verdict::{COUNTERS, Counted};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::{debug, warn};

use super::cookies::{Answering, LeftToKernel};
use super::mode::AttachMode;
use super::pins::{self, Pins, ProgramPins, Staging};
use super::{XdpError, errno};
use crate::config::{self, Fragments, Mode};
use crate::host::kernel;
use crate::ranges::Table;
use crate::report::chain;

/// Loads the object for its maps: all that the programs of the interfaces share, empty.
pub(super) fn shared_maps(staging: &Staging, table: &Table) -> Result<Ebpf, XdpError> {
    let entries = capacity(table).div_ceil(u32::from(abi::CHUNK)) * abi::GENERATIONS;
    let mut loader = EbpfLoader::new();
    loader
        .map_max_entries(abi::RANGES_V4, entries)
        .map_max_entries(abi::RANGES_V6, entries);
    for name in abi::SHARED_MAPS {
        loader.map_pin_path(name, staging.shared(name));
    }
    load(&mut loader)
}

/// Nodes per family and generation that a table needs, and as many again for it to grow.
///
/// What outgrows them is loaded again, see [`super::Filter::publish`].
fn capacity(table: &Table) -> u32 {
    let needed = table
        .tree_v4()
        .nodes()
        .len()
        .max(table.tree_v6().nodes().len());
    let roomy = u32::try_from(2 * needed).unwrap_or(u32::MAX);
    roomy.next_power_of_two().clamp(abi::NODES, abi::NODES_MAX)
}

/// What a program is loaded for.
pub(super) struct LoadRequest<'a> {
    /// What it protects.
    pub(super) settings: &'a config::FilterSettings,
    /// The interface, or the name that stands for one that is not there yet.
    pub(super) interface: &'a str,
    /// Where its own maps are kept.
    pub(super) pins: &'a Pins,
    /// The generation of the range maps that packets are judged by.
    pub(super) active: u64,
    /// Where a map that all programs share is kept.
    pub(super) shared: &'a dyn Fn(&str) -> PathBuf,
}

/// The program of one interface, loaded, and what it counts.
pub(super) struct Program {
    ebpf: Ebpf,
    /// The variant that the kernel took.
    variant: &'static str,
    /// Why SYNs are left to the kernel, unless it answers them.
    left_to_kernel: Option<LeftToKernel>,
    counters: PerCpuArray<MapData, u64>,
    explained: Array<MapData, u64>,
    /// Whether its twin was pinned beside it.
    has_twin: bool,
    /// What the program logs, in builds for debugging.
    log: Option<EbpfLogger<&'static dyn log::Log>>,
}

impl Program {
    /// Loads the program; without answers to SYNs, if the kernel takes none with them.
    pub(super) fn load(request: &LoadRequest<'_>) -> Result<Self, XdpError> {
        let answering = Answering::of(request.settings, request.interface);
        match Self::load_with(request, answering) {
            Err(error @ XdpError::Refused { .. }) if answering.is_ok() => {
                warn!(
                    id = "syn-cookies-refused",
                    interface = request.interface,
                    error = %chain(&error),
                    "the kernel takes no program that answers SYNs; it answers them itself"
                );
                Self::load_with(request, Err(LeftToKernel::Refused))
            }
            loaded => loaded,
        }
    }

    fn load_with(
        request: &LoadRequest<'_>,
        answering: Result<Answering, LeftToKernel>,
    ) -> Result<Self, XdpError> {
        let &LoadRequest {
            settings,
            interface,
            pins,
            active,
            shared,
        } = request;
        let mut flags = flags(settings);
        if answering.is_ok() {
            flags |= abi::SETTING_SYN_COOKIES;
        }
        let mss = answering.map_or(0, Answering::encoded);
        let tcp_ports = port_bitmap(&settings.ports);
        let udp_ports = port_bitmap(&settings.udp_ports);
        let destinations = destinations(settings);
        let mut loader = EbpfLoader::new();
        loader
            .override_global(abi::SETTINGS, &flags, true)
            .override_global(abi::MSS, &mss, true)
            .override_global(abi::TCP_PORTS, tcp_ports.as_slice(), true)
            .override_global(abi::UDP_PORTS, udp_ports.as_slice(), true)
            .override_global(abi::DESTINATIONS, destinations.as_slice(), true)
            // aya writes the initial value even where the map is there already.
            .override_global(abi::ACTIVE_GLOBAL, &active, true);
        for name in abi::SHARED_MAPS {
            loader.map_pin_path(name, shared(name));
        }
        let own = abi::INTERFACE_MAPS.map(|name| (name, pins.of_interface(name, interface)));
        drop_misfits(&own)?;
        for (name, pin) in own {
            loader.map_pin_path(name, pin);
        }

        let mut ebpf = load(&mut loader)?;
        let counters = take_map(&mut ebpf, abi::COUNTERS)?;
        let counters = PerCpuArray::try_from(counters).map_err(map_error(abi::COUNTERS))?;
        let explained = take_map(&mut ebpf, abi::EXPLAINED)?;
        let explained = Array::try_from(explained).map_err(map_error(abi::EXPLAINED))?;
        let variant = load_xdp(&mut ebpf)?;
        let log = EbpfLogger::init(&mut ebpf).ok();
        if log.is_some() {
            warn!(
                id = "program-logs-frames",
                "the XDP program logs every frame: a build for debugging, which costs much"
            );
        }
        Ok(Self {
            ebpf,
            log,
            variant,
            left_to_kernel: answering.err(),
            counters,
            explained,
            has_twin: false,
        })
    }

    /// Passes on what the program has logged since the last time.
    pub(super) fn pass_log_on(&mut self) {
        if let Some(log) = &mut self.log {
            log.flush();
        }
    }

    /// The loaded XDP program.
    pub(super) fn xdp(&mut self) -> Result<&mut Xdp, XdpError> {
        xdp(&mut self.ebpf, self.variant)
    }

    /// The classifier, loaded when it is first asked for.
    pub(super) fn tcx(&mut self) -> Result<&mut SchedClassifier, XdpError> {
        let name = abi::PROGRAM_TCX;
        let program = self.ebpf.program_mut(name);
        let program = program.ok_or(XdpError::Missing { name })?;
        let program: &mut SchedClassifier = program.try_into().map_err(XdpError::Load)?;
        match uninterrupted(|| program.load()) {
            Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(program),
            Err(error) => Err(refused(error)),
        }
    }

    /// The program's twin for test runs, loaded when it is first asked for.
    fn slot(&mut self) -> Result<&mut Xdp, XdpError> {
        let program = xdp(&mut self.ebpf, abi::PROGRAM_SLOT)?;
        match uninterrupted(|| program.load()) {
            Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(program),
            Err(error) => Err(refused(error)),
        }
    }

    /// The number that the kernel knows the program of that mode by.
    pub(super) fn number(&mut self, mode: AttachMode) -> Result<u32, XdpError> {
        let info = match mode {
            AttachMode::Native | AttachMode::Generic => self.xdp()?.info(),
            AttachMode::Tcx => self.tcx()?.info(),
        };
        Ok(info.map_err(XdpError::Load)?.id())
    }

    /// Pins the program of that mode and its twin, in place of those that are there already.
    pub(super) fn pin(&mut self, mode: AttachMode, pins: &ProgramPins) -> Result<(), XdpError> {
        for pin in pins.all().into_iter().filter(|pin| pin.exists()) {
            pins::remove(pin)?;
        }
        let ProgramPins { program, slot } = pins;
        let pinned = match mode {
            AttachMode::Native | AttachMode::Generic => self.xdp()?.pin(program),
            AttachMode::Tcx => self.tcx()?.pin(program),
        };
        pinned.map_err(|error| pin_error(program, &error))?;
        if let Err(error) = self.pin_twin(slot) {
            warn!(
                id = "twin-not-pinned",
                error = %chain(&error),
                "`pullgate explain` cannot give reasons: its program is not loaded"
            );
        }
        Ok(())
    }

    /// What protects does not depend on it.
    fn pin_twin(&mut self, pin: &Path) -> Result<(), XdpError> {
        self.has_twin = false;
        let pinned = self.slot()?.pin(pin);
        pinned.map_err(|error| pin_error(pin, &error))?;
        self.has_twin = true;
        Ok(())
    }

    /// Why SYNs are left to the kernel, unless it answers them where it is attached to XDP.
    pub(super) fn left_to_kernel(&self) -> Option<LeftToKernel> {
        self.left_to_kernel
    }

    /// Whether its twin is pinned beside it.
    pub(super) fn has_twin(&self) -> bool {
        self.has_twin
    }

    /// How many frames were judged so far, over all CPUs, but for those of test runs.
    pub(super) fn frames(&self) -> Result<Vec<(Counted, u64)>, XdpError> {
        let frames = Counted::all().map(|(index, counted)| {
            let total = total(&self.counters, index)?;
            let explained = self.explained.get(&index, 0);
            let explained = explained.map_err(map_error(abi::EXPLAINED))?;
            Ok((counted, total.saturating_sub(explained)))
        });
        frames.collect()
    }
}

/// One counter, over all CPUs.
pub(super) fn total(counters: &PerCpuArray<MapData, u64>, slot: u32) -> Result<u64, XdpError> {
    let per_cpu = counters.get(&slot, 0).map_err(map_error(abi::COUNTERS))?;
    Ok(per_cpu.iter().sum())
}

/// Loads the XDP program for frames of several buffers or, on old kernels, of one.
fn load_xdp(ebpf: &mut Ebpf) -> Result<&'static str, XdpError> {
    let program = xdp(ebpf, abi::PROGRAM)?;
    match uninterrupted(|| program.load()) {
        Ok(()) => return Ok(abi::PROGRAM),
        Err(error) if errno(&error) == Some(Errno::INVAL) => {}
        Err(error) => return Err(refused(error)),
    }
    let linear = xdp(ebpf, abi::PROGRAM_LINEAR)?;
    match uninterrupted(|| linear.load()) {
        Ok(()) => {
            LINEAR.call_once(|| {
                warn!(
                    id = "frames-of-one-buffer",
                    "this kernel (before 5.18) takes no XDP program for frames of several buffers"
                );
            });
            Ok(abi::PROGRAM_LINEAR)
        }
        // On kernels that know no such frames, the first refusal is of the flag alone, and its log is
        // empty.
        Err(error) => Err(refused(error)),
    }
}

/// Loads a program, again if a signal ended the verifier's work.
///
/// The verifier returns EAGAIN as soon as a signal is pending (kernel/bpf/verifier.c, `do_check`),
/// also for one that stops the machine for a snapshot. libbpf tries five times.
///
/// # Errors
///
/// Returns what `load` last returned.
pub fn uninterrupted(
    mut load: impl FnMut() -> Result<(), ProgramError>,
) -> Result<(), ProgramError> {
    for _ in 1..LOAD_ATTEMPTS {
        match load() {
            Err(error) if errno(&error) == Some(Errno::AGAIN) => {
                debug!(
                    id = "load-retried",
                    "a signal interrupted the verifier; loading the program again"
                );
            }
            outcome => return outcome,
        }
    }
    load()
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Xdp, XdpError> {
    let program = ebpf.program_mut(name);
    let program = program.ok_or(XdpError::Missing { name })?;
    program.try_into().map_err(XdpError::Load)
}

fn load(loader: &mut EbpfLoader<'_>) -> Result<Ebpf, XdpError> {
    load_object(loader, OBJECT)
}

/// Loads an object, which is empty in builds without it.
pub(super) fn load_object(
    loader: &mut EbpfLoader<'_>,
    object: &'static [u8],
) -> Result<Ebpf, XdpError> {
    if object.is_empty() {
        return Err(XdpError::NoProgram);
    }
    loader.load(object).map_err(|source| {
        let (errno, source) = (errno(&source), Box::new(source));
        lacks_memory(errno).map_or(XdpError::Object(source), |limit_kib| {
            XdpError::LockedMemory { limit_kib }
        })
    })
}

/// The limit of locked memory in KiB, if that is what the kernel refuses a map or a program for.
fn lacks_memory(errno: Option<Errno>) -> Option<u64> {
    let limit = getrlimit(Resource::Memlock).current?;
    let counts = !kernel::is_at_least(MEMORY_CONTROLLED_SINCE);
    (counts && errno == Some(Errno::PERM)).then_some(limit >> 10)
}

/// Raises the limit of locked memory as far as this process may, see
/// [`XdpError::LockedMemory`]. To be called before it gives up CAP_SYS_RESOURCE.
pub fn raise_memory_limit() {
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    if setrlimit(Resource::Memlock, unlimited).is_err() {
        let maximum = getrlimit(Resource::Memlock).maximum;
        let highest = Rlimit {
            current: maximum,
            maximum,
        };
        // What is not granted is reported if it is missed.
        match setrlimit(Resource::Memlock, highest) {
            Ok(_) | Err(_) => {}
        }
    }
}

/// Removes the pins of counter maps, unless all are there and of our shape: what one has counted means
/// nothing without the others.
fn drop_misfits(maps: &[(&str, PathBuf)]) -> Result<(), XdpError> {
    let there: Vec<_> = maps.iter().filter(|(_, pin)| pin.exists()).collect();
    let fits = |pin: &Path| {
        MapInfo::from_pin(pin).is_ok_and(|info| {
            info.key_size() == 4
                && info.value_size() == 8
                && usize::try_from(info.max_entries()) == Ok(COUNTERS)
        })
    };
    if there.is_empty() || there.len() == maps.len() && there.iter().all(|(_, pin)| fits(pin)) {
        return Ok(());
    }
    for (_, pin) in there {
        warn!(
            id = "counters-reset",
            pin = %pin.display(),
            "counters of another shape: they begin at zero"
        );
        pins::remove(pin)?;
    }
    Ok(())
}

pub(super) fn flags(settings: &config::FilterSettings) -> u32 {
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

pub(super) fn port_bitmap(ports: &[u16]) -> [u8; abi::PORT_BITMAP] {
    let mut bitmap = [0; abi::PORT_BITMAP];
    for port in ports {
        bitmap[usize::from(port >> 3)] |= 1 << (port & 7);
    }
    bitmap
}

/// IPv4 as IPv4-mapped IPv6.
pub(super) fn destinations(settings: &config::FilterSettings) -> [u128; abi::DESTINATIONS_MAX] {
    let mut bits = [0; abi::DESTINATIONS_MAX];
    for (slot, address) in bits.iter_mut().zip(&settings.destinations) {
        *slot = match address {
            IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
            IpAddr::V6(address) => address.to_bits(),
        };
    }
    bits
}

/// The verifier's log goes to the log, where its hundreds of lines belong; its last words say why.
pub(super) fn refused(error: ProgramError) -> XdpError {
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return XdpError::Load(error);
    };
    debug!(id = "verifier-refused", %verifier_log, "the kernel refuses the XDP program");
    if let Some(limit_kib) = lacks_memory(Errno::from_io_error(&io_error)) {
        return XdpError::LockedMemory { limit_kib };
    }
    XdpError::Refused {
        words: last_words(&verifier_log.to_string()),
        source: io_error,
    }
}

/// The last lines of a verifier's log that say something, in one: the instruction, and the reason.
fn last_words(log: &str) -> String {
    let is_account = |line: &&str| {
        // Counts of what was verified stand behind the reason.
        let accounts = ["processed ", "verification time", "stack depth"];
        accounts.iter().any(|start| line.starts_with(start))
    };
    let lines = log.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines: Vec<_> = lines.filter(|line| !is_account(line)).collect();
    let from = lines.len().saturating_sub(LAST_WORDS);
    let words = lines.get(from..).unwrap_or_default().join(" / ");
    words.chars().take(WORDS_MAX).collect()
}

pub(super) fn take_map(ebpf: &mut Ebpf, name: &'static str) -> Result<aya::maps::Map, XdpError> {
    ebpf.take_map(name).ok_or(XdpError::Missing { name })
}

pub(super) fn map_error(name: &'static str) -> impl Fn(MapError) -> XdpError {
    move |source| XdpError::Map { name, source }
}

/// A pin's error, of whatever type.
pub(super) fn pin_error(pin: &Path, error: &dyn std::error::Error) -> XdpError {
    pins::blame(pin)(io::Error::other(chain(error)))
}

/// Once a process: every interface has a program.
static LINEAR: Once = Once::new();
/// How often a program is loaded until signals are taken for the cause.
const LOAD_ATTEMPTS: usize = 10;
/// Lines of the verifier's log in an error, and characters.
const LAST_WORDS: usize = 3;
const WORDS_MAX: usize = 600;
/// From this Linux on memory is charged to the control group: commit 97306be45fbe.
const MEMORY_CONTROLLED_SINCE: (u32, u32) = (5, 11);
/// The XDP object, empty in builds without it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/filter.o"));

#[cfg(test)]
mod tests {
    use aya::sys::SyscallError;

    use super::*;

    #[test]
    fn the_last_words_of_a_verifier_are_the_reason_without_the_account() {
        let log = "0: R1=ctx\n\n140: (0f) r0 += r3\nmath between map_value pointer and register with \
            unbounded min value is not allowed\nverification time 512 usec\nstack depth 32+0\n\
            processed 176 insns (limit 1000000) max_states_per_insn 0\n";

        assert_eq!(
            last_words(log),
            "0: R1=ctx / 140: (0f) r0 += r3 / math between map_value pointer and register with \
             unbounded min value is not allowed"
        );
        assert_eq!(last_words(""), "");
        assert_eq!(last_words(&"x".repeat(10_000)).len(), WORDS_MAX);
    }

    #[test]
    fn a_load_that_a_signal_interrupts_is_tried_again() {
        let mut attempts = 0;

        let loaded = uninterrupted(|| {
            attempts += 1;
            match attempts {
                1 | 2 => Err(interrupted(Errno::AGAIN)),
                _ => Ok(()),
            }
        });

        assert!(loaded.is_ok());
        assert_eq!(attempts, 3);
    }

    #[test]
    fn a_load_that_fails_for_good_is_not_tried_for_ever() {
        for (errno, expected) in [(Errno::AGAIN, LOAD_ATTEMPTS), (Errno::INVAL, 1)] {
            let mut attempts = 0;

            let loaded = uninterrupted(|| {
                attempts += 1;
                Err(interrupted(errno))
            });

            assert!(loaded.is_err());
            assert_eq!(attempts, expected, "{errno:?}");
        }
    }

    fn interrupted(errno: Errno) -> ProgramError {
        ProgramError::SyscallError(SyscallError {
            call: "BPF_PROG_LOAD",
            io_error: errno.into(),
        })
    }
}
