//! The attach ladder: native XDP, else generic XDP, else a TCX classifier, the lower the louder.

use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::programs::links::{FdLink, LinkOrder, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::xdp::XdpLink;
use aya::programs::{ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode};
use aya_obj::programs::XdpAttachType;
use rustix::io::Errno;
use tracing::{debug, info, warn};

use super::hook;
use super::link::{self, link_index};
use super::load::{Program, pin_error};
use super::mode::AttachMode;
use super::pins::{self, Pins};
use super::remedy::{self, NativeRefusal};
use super::uplinks::Topology;
use super::{XdpError, errno};
use crate::config::{self, Coexist};
use crate::host::kernel;
use crate::host::netlink::{
    self, Interface, InterfaceKind, Occupant, XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE,
};
use crate::report::chain;

/// An interface that the program is attached to.
#[derive(Debug)]
pub struct Attached {
    /// The interface.
    pub interface: String,
    /// The mode of the ladder.
    pub mode: AttachMode,
    /// The pin that keeps it attached.
    pin: PathBuf,
    /// The link itself until it is pinned: it ends with this value, or with this process.
    held: Option<FdLink>,
    /// The number of the program.
    program: u32,
    /// Whether a program of ours was there before.
    replaced: bool,
    /// Where programs of ours were that had to make way.
    moved: Vec<Moved>,
}

/// An interface that our program was detached from, because the kernel allows none there and here.
#[derive(Clone, Debug)]
struct Moved {
    interface: Interface,
    mode: AttachMode,
}

impl Attached {
    /// The index of the interface, if it is filtered by our link and program at this moment.
    ///
    /// Not so if the pin was removed, if the link was detached or given to another program, or if the
    /// interface was deleted and created again, or renamed.
    pub(super) fn filtered_index(&self, interfaces: &[Interface]) -> Option<u32> {
        let index = interfaces
            .iter()
            .find(|interface| interface.name == self.interface)
            .map(|interface| interface.index);
        let pinned = match self.held {
            Some(_) => None,
            None => link::pinned(&self.pin),
        };
        let link = self.held.as_ref().or(pinned.as_ref())?;
        let is_ours = link::program(link) == Some(self.program);
        link_index(link).filter(|linked| is_ours && Some(*linked) == index)
    }

    /// The program that judges before ours, on a hook that takes several.
    pub(super) fn overtaken_by(&self, interface: u32) -> Option<String> {
        if self.mode != AttachMode::Tcx {
            return None;
        }
        // A kernel that does not answer is no reason to alarm.
        let first = hook::tcx_programs(interface).ok()?.first().copied()?;
        (first != self.program).then(|| link::describe(first))
    }

    /// The interface has another name; its pins have followed.
    pub(super) fn rename(&mut self, name: &str, pins: &Pins) {
        name.clone_into(&mut self.interface);
        self.pin = pins.link(self.mode, name);
    }

    /// From here on the link stays.
    pub(super) fn pin(&mut self) -> Result<(), XdpError> {
        match self.held.take() {
            Some(link) => {
                let pinned = link.pin(&self.pin).map(drop);
                pinned.map_err(|error| pin_error(&self.pin, &error))
            }
            None => Ok(()),
        }
    }

    /// What was there before is there again.
    pub(super) fn revert(mut self, pins: &Pins) -> Result<(), XdpError> {
        // Dropping a link that has no pin detaches it, as removing its pin does.
        drop(self.held.take());
        if !self.replaced {
            if self.pin.exists() {
                pins::remove(&self.pin)?;
            }
            return restore(&self.moved, pins);
        }
        let link = open(&self.pin)?;
        let before = pins.program(&self.interface);
        let blame = |error| pin_error(&before, &error);
        let replaced = match self.mode {
            AttachMode::Native | AttachMode::Generic => {
                let xdp = Xdp::from_pin(&before, XdpAttachType::Interface);
                update_xdp(&mut xdp.map_err(blame)?, link)
            }
            AttachMode::Tcx => {
                let tcx = SchedClassifier::from_pin(&before);
                update_tcx(&mut tcx.map_err(blame)?, link)
            }
        };
        replaced.map_err(|error| pin_error(&self.pin, &error))
    }
}

/// Where a program is to be attached.
#[derive(Clone, Copy)]
pub(super) struct AttachPoint<'a> {
    pub(super) interface: &'a Interface,
    pub(super) settings: &'a config::FilterSettings,
    pub(super) pins: &'a Pins,
    /// What lies above and below the interface.
    pub(super) topology: &'a Topology,
}

/// Attaches a program to its interface: through the link that is pinned already, else by a new one.
///
/// A new link is held until [`Attached::pin`]; dropped before, it is detached.
pub(super) fn attach(program: &mut Program, place: &AttachPoint<'_>) -> Result<Attached, XdpError> {
    let interface = place.interface;
    if !interface.is_ethernet {
        return Err(XdpError::NotEthernet {
            interface: interface.name.clone(),
        });
    }
    let attached = match adopt(program, interface, place.settings, place.pins)? {
        Some(attached) => attached,
        None => attach_best(program, place)?,
    };
    if attached.mode != AttachMode::Native {
        let (interface, mode) = (&interface.name, attached.mode.name());
        warn!(id = "attach-mode-weaker", interface, mode, "{WEAKER}");
    }
    Ok(attached)
}

/// Replaces the program behind a link that is pinned, in one step.
fn adopt(
    program: &mut Program,
    interface: &Interface,
    settings: &config::FilterSettings,
    pins: &Pins,
) -> Result<Option<Attached>, XdpError> {
    for mode in AttachMode::ALL {
        let pin = pins.link(mode, &interface.name);
        if !pin.exists() {
            continue;
        }
        let link = open(&pin)?;
        if link_index(&link) != Some(interface.index) {
            // The interface was deleted and created again, another one took its name, or a process
            // has detached the link.
            info!(
                id = "stale-link-removed",
                interface = interface.name,
                "a stale link is removed"
            );
            pins::remove(&pin)?;
            continue;
        }
        if !mode.is_allowed(settings) {
            return Err(XdpError::Lower {
                interface: interface.name.clone(),
                mode: mode.name(),
            });
        }

        let replaced = match mode {
            AttachMode::Native | AttachMode::Generic => update_xdp(program.xdp()?, link),
            AttachMode::Tcx => update_tcx(program.tcx()?, link),
        };
        replaced.map_err(|error| XdpError::Attach {
            interface: interface.name.clone(),
            reason: chain(&error),
        })?;
        info!(
            id = "program-replaced",
            interface = interface.name,
            mode = mode.label(),
            "program replaced through its pinned link"
        );
        return Ok(Some(Attached {
            interface: interface.name.clone(),
            mode,
            pin,
            held: None,
            program: program.number(mode)?,
            replaced: true,
            moved: Vec::new(),
        }));
    }
    Ok(None)
}

fn open(pin: &Path) -> Result<FdLink, XdpError> {
    let pinned = PinnedLink::from_pin(pin).map_err(|error| pin_error(pin, &error))?;
    Ok(FdLink::from(pinned))
}

/// Puts the program behind the link; dropping our end leaves the link to its pin.
fn update_xdp(xdp: &mut Xdp, link: FdLink) -> Result<(), ProgramError> {
    let link =
        XdpLink::try_from(link).map_err(|error| ProgramError::IOError(io::Error::other(error)))?;
    let id = xdp.attach_to_link(link)?;
    xdp.take_link(id).map(drop)
}

/// As [`update_xdp`].
fn update_tcx(tcx: &mut SchedClassifier, link: FdLink) -> Result<(), ProgramError> {
    let link = SchedClassifierLink::try_from(link)
        .map_err(|error| ProgramError::IOError(io::Error::other(error)))?;
    let id = tcx.attach_to_link(link)?;
    tcx.take_link(id).map(drop)
}

/// Attaches on the highest mode that the interface and the configuration allow.
fn attach_best(program: &mut Program, place: &AttachPoint<'_>) -> Result<Attached, XdpError> {
    let AttachPoint {
        interface,
        settings,
        pins,
        ..
    } = *place;
    let moved = make_way(place)?;
    let mut refusal = None;
    let modes = AttachMode::ALL
        .into_iter()
        .filter(|mode| mode.is_allowed(settings));
    for mode in modes {
        match attach_at(program, place, mode) {
            Ok(link) => {
                if let Some(refusal) = refusal {
                    // The first one: it is of the mode that was wanted most.
                    warn!(
                        id = "attach-mode-refused",
                        interface = interface.name,
                        mode = mode.name(),
                        "{refusal}"
                    );
                }
                return Ok(Attached {
                    interface: interface.name.clone(),
                    mode,
                    pin: pins.link(mode, &interface.name),
                    held: Some(link),
                    program: program.number(mode)?,
                    replaced: false,
                    moved,
                });
            }
            Err(error) if error.is_refusal() => {
                debug!(
                    id = "attach-mode-failed",
                    interface = interface.name,
                    mode = mode.name(),
                    "{error}"
                );
                refusal.get_or_insert(error);
            }
            Err(error) => {
                restore(&moved, pins)?;
                return Err(error);
            }
        }
    }
    restore(&moved, pins)?;
    Err(refusal.unwrap_or(XdpError::Attach {
        interface: interface.name.clone(),
        reason: "the configuration allows no way".to_owned(),
    }))
}

/// Detaches our programs from where the kernel would not have them beside one here: from interfaces
/// above, as this one carries their frames, and from the ports of a bond. For as long as it takes to
/// attach here, nothing judges these frames.
fn make_way(place: &AttachPoint<'_>) -> Result<Vec<Moved>, XdpError> {
    let AttachPoint {
        interface,
        pins,
        topology,
        ..
    } = *place;
    // Another's program stays, and keeps ours off here: then ours stay where they are.
    if netlink::occupant(interface.index).is_some() {
        return Ok(Vec::new());
    }
    let ports = topology
        .ports_of(interface)
        .filter(|_| interface.kind == InterfaceKind::Bond);
    let mut moved = Vec::new();
    for other in topology.stacked_on(interface).chain(ports) {
        let Some(mode @ (AttachMode::Native | AttachMode::Generic)) = pins.linked(&other.name)
        else {
            continue;
        };
        warn!(
            id = "program-moved",
            from = other.name,
            to = interface.name,
            "the program moves"
        );
        pins::remove(&pins.link(mode, &other.name))?;
        wait_for_detachment(other);
        moved.push(Moved {
            interface: other.clone(),
            mode,
        });
    }
    Ok(moved)
}

/// Waits until an interface has no program any more: the kernel lets go of a link some milliseconds
/// after its pin was removed (an RCU grace period, `bpf_free_inode`, kernel/bpf/inode.c).
fn wait_for_detachment(interface: &Interface) {
    let deadline = Instant::now() + DETACHMENT;
    while netlink::occupant(interface.index).is_some() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Attaches the programs again that had to make way for one that does not stay.
fn restore(moved: &[Moved], pins: &Pins) -> Result<(), XdpError> {
    for Moved { interface, mode } in moved {
        wait_for_detachment(interface);
        let before = pins.program(&interface.name);
        let pin = pins.link(*mode, &interface.name);
        let mode = match mode {
            AttachMode::Native => XdpMode::Driver,
            AttachMode::Generic | AttachMode::Tcx => XdpMode::Skb,
        };
        let restored = Xdp::from_pin(&before, XdpAttachType::Interface).and_then(|mut xdp| {
            let id = xdp.attach_to_if_index(interface.index, mode)?;
            let link = xdp.take_link(id)?;
            FdLink::try_from(link).map_err(|error| ProgramError::IOError(io::Error::other(error)))
        });
        let link = restored.map_err(|error| pin_error(&before, &error))?;
        link.pin(&pin).map_err(|error| pin_error(&pin, &error))?;
        warn!(
            id = "program-reattached",
            interface = interface.name,
            "the program is where it was before"
        );
    }
    Ok(())
}

fn attach_at(
    program: &mut Program,
    place: &AttachPoint<'_>,
    mode: AttachMode,
) -> Result<FdLink, XdpError> {
    let interface = place.interface;
    let link = match mode {
        AttachMode::Native => attach_xdp(program, place, XdpMode::Driver, XDP_FLAGS_DRV_MODE)?,
        AttachMode::Generic => attach_xdp(program, place, XdpMode::Skb, XDP_FLAGS_SKB_MODE)?,
        AttachMode::Tcx => attach_tcx(program, interface)?,
    };
    info!(
        id = "program-attached",
        interface = interface.name,
        mode = mode.label(),
        "program attached"
    );
    Ok(link)
}

fn attach_xdp(
    program: &mut Program,
    place: &AttachPoint<'_>,
    mode: XdpMode,
    flags: u32,
) -> Result<FdLink, XdpError> {
    let interface = place.interface;
    let xdp = program.xdp()?;
    let attached = xdp.attach_to_if_index(interface.index, mode);
    let id = match attached {
        Ok(id) => id,
        Err(error) if is_in_use(&error) => return Err(in_use(place, &error)),
        Err(error) => {
            let fd = xdp.fd().map_err(XdpError::Load)?.as_fd();
            let words = netlink::why_not_attached(interface.index, fd, flags);
            let refusal = NativeRefusal {
                errno: errno(&error),
                words: words.as_deref(),
                interface,
                parent: interface
                    .lower
                    .and_then(|index| place.topology.name_of(index)),
            };
            let mut reason = words.clone().unwrap_or_else(|| chain(&error));
            if let Some(remedy) = remedy::remedy(&refusal) {
                reason.push_str("; ");
                reason.push_str(&remedy);
            }
            return Err(XdpError::Attach {
                interface: interface.name.clone(),
                reason,
            });
        }
    };
    let link = xdp.take_link(id).map_err(XdpError::Load)?;
    // aya falls back to netlink on old kernels; such an attachment anyone may replace.
    FdLink::try_from(link).map_err(|_not_a_link| XdpError::NoLinks)
}

fn is_in_use(error: &ProgramError) -> bool {
    matches!(errno(error), Some(Errno::BUSY | Errno::EXIST))
}

/// Which program is in the way: one on the interface, or one on an interface that is stacked on it.
fn in_use(place: &AttachPoint<'_>, error: &ProgramError) -> XdpError {
    let AttachPoint {
        interface,
        topology,
        ..
    } = *place;
    let name = interface.name.clone();
    let describe = |occupant: Occupant| {
        let number = occupant.program;
        format!(" ({})", link::describe(number))
    };
    if let Some(occupant) = netlink::occupant(interface.index) {
        return XdpError::Occupied {
            interface: name,
            hook: if occupant.is_generic {
                "xdpgeneric"
            } else {
                "xdp"
            },
            program: describe(occupant),
            coexist: coexist_hint(place.settings.coexist),
        };
    }
    let above = topology
        .stacked_on(interface)
        .find_map(|upper| Some((upper, netlink::occupant(upper.index)?)));
    match above {
        Some((upper, occupant)) => XdpError::OccupiedAbove {
            interface: name,
            upper: upper.name.clone(),
            program: describe(occupant),
        },
        None => XdpError::Attach {
            interface: name,
            reason: chain(error),
        },
    }
}

/// The way to live with another program, where the kernel has it and it is not configured already.
fn coexist_hint(configured: Coexist) -> String {
    match (configured, kernel::is_at_least(TCX_SINCE)) {
        (Coexist::Refuse, true) => ", or set `filter.coexist = \"tcx\"`".to_owned(),
        (Coexist::Tcx, false) => format!(" (`filter.coexist = \"tcx\"` {})", no_tcx()),
        (Coexist::Refuse, false) | (Coexist::Tcx, true) => String::new(),
    }
}

fn no_tcx() -> String {
    let (major, minor) = TCX_SINCE;
    format!(
        "needs Linux {major}.{minor}, and this is {}",
        kernel::release()
    )
}

fn attach_tcx(program: &mut Program, interface: &Interface) -> Result<FdLink, XdpError> {
    if !kernel::is_at_least(TCX_SINCE) {
        return Err(XdpError::Attach {
            interface: interface.name.clone(),
            reason: format!("`filter.coexist = \"tcx\"` {}", no_tcx()),
        });
    }
    let tcx = program.tcx()?;
    // Before whatever else is there: it may redirect packets past us.
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let attached = tcx.attach_with_options(&interface.name, TcAttachType::Ingress, options);
    let id = attached.map_err(|error| XdpError::Attach {
        interface: interface.name.clone(),
        reason: chain(&error),
    })?;
    let link = tcx.take_link(id).map_err(XdpError::Load)?;
    FdLink::try_from(link).map_err(|_not_a_link| XdpError::NoLinks)
}

const WEAKER: &str = "the verdicts are the same, but each packet costs many times as much";
/// For the kernel to let go of a link.
const DETACHMENT: Duration = Duration::from_secs(2);
/// The first Linux with TCX: kernel/bpf/tcx.c.
const TCX_SINCE: (u32, u32) = (6, 6);
