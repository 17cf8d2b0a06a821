//! The attach ladder: native XDP, else generic XDP with a loud warning.

use std::fs;
use std::io;
use std::path::PathBuf;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::xdp::XdpLink;
use aya::programs::{ProgramError, Xdp, XdpMode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use tracing::{info, warn};

use super::XdpError;
use super::pins::{self, Pins};
use crate::config::{self, Attach};
use crate::report::chain;

/// An interface that the program is attached to.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The interface.
    pub interface: String,
    /// The rung of the ladder.
    pub rung: Rung,
    /// The pin that keeps it attached.
    pin: PathBuf,
}

impl Attached {
    /// Whether the interface of that name is filtered by our link at this moment.
    ///
    /// Not so if the pin was removed, or if the interface was deleted and created anew, or renamed.
    #[must_use]
    pub fn is_filtered(&self) -> bool {
        let Ok(index) = interface_index(&self.interface) else {
            return false;
        };
        let pinned = PinnedLink::from_pin(&self.pin);
        pinned.is_ok_and(|pinned| link_index(&FdLink::from(pinned)) == Some(index))
    }
}

/// The index of the interface that a link is attached to; 0 if that is gone.
///
/// aya does not tell it, but the kernel's fdinfo does (`bpf_xdp_link_show_fdinfo`, net/core/dev.c):
/// ours is the descriptor whose fdinfo has the link's id.
fn link_index(link: &FdLink) -> Option<u32> {
    let id = format!("link_id:\t{}", link.info().ok()?.id());
    let descriptors = fs::read_dir("/proc/self/fdinfo").ok()?;
    descriptors.flatten().find_map(|descriptor| {
        let info = fs::read_to_string(descriptor.path()).ok()?;
        if !info.lines().any(|line| line == id) {
            return None;
        }
        let index = info
            .lines()
            .find_map(|line| line.strip_prefix("ifindex:"))?;
        index.trim().parse().ok()
    })
}

/// A rung of the attach ladder, highest first.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rung {
    /// In the driver, before an skb exists.
    Native,
    /// In the stack, after the skb was allocated: same verdicts, many times the cost.
    Generic,
}

impl Rung {
    /// The word in metrics, status and pin names.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }

    fn mode(self) -> XdpMode {
        match self {
            Self::Native => XdpMode::Driver,
            Self::Generic => XdpMode::Skb,
        }
    }
}

/// Attaches the loaded program to every interface, through the links that are pinned already.
pub(super) fn attach(
    program: &mut Xdp,
    settings: &config::Filter,
    pins: &Pins,
) -> Result<Vec<Attached>, XdpError> {
    let mut attached = Vec::new();
    for interface in &settings.interfaces {
        let interface = interface.value.as_str();
        let rung = match adopt(program, interface, settings.attach, pins)? {
            Some(rung) => rung,
            None => climb(program, interface, settings.attach, pins)?,
        };
        attached.push(Attached {
            interface: interface.to_owned(),
            rung,
            pin: pins.link(rung, interface),
        });
    }

    // Interfaces that the configuration names no more are not protected any more.
    let wanted: Vec<_> = attached.iter().map(|attached| &attached.pin).collect();
    for stale in pins.links()?.iter().filter(|pin| !wanted.contains(pin)) {
        warn!(pin = %stale.display(), "detached: the configuration does not name this interface");
        pins::remove(stale)?;
    }
    Ok(attached)
}

/// Replaces the program behind a link that is pinned, in one step.
fn adopt(
    program: &mut Xdp,
    interface: &str,
    allowed: Attach,
    pins: &Pins,
) -> Result<Option<Rung>, XdpError> {
    for rung in [Rung::Native, Rung::Generic] {
        let pin = pins.link(rung, interface);
        if !pin.exists() {
            continue;
        }
        let broken = |error: &dyn std::error::Error| XdpError::Pin {
            path: pin.clone(),
            source: io::Error::other(error.to_string()),
        };
        let pinned = PinnedLink::from_pin(&pin).map_err(|error| broken(&error))?;
        let link = FdLink::from(pinned);
        if link_index(&link) != interface_index(interface).ok() {
            // The interface was deleted and created anew, or another one took its name.
            info!(
                interface,
                "pinned link is of another interface, attaching anew"
            );
            pins::remove(&pin)?;
            continue;
        }
        if allowed == Attach::Native && rung != Rung::Native {
            return Err(XdpError::Lower {
                interface: interface.to_owned(),
            });
        }

        let link = XdpLink::try_from(link).map_err(|error| broken(&error))?;
        let replaced = program.attach_to_link(link);
        let link = replaced.and_then(|id| program.take_link(id));
        // Dropping our end of the link leaves it to the pin.
        drop(link.map_err(|source| XdpError::Attach {
            interface: interface.to_owned(),
            source,
        })?);
        info!(
            interface,
            mode = rung.label(),
            "program replaced through its pinned link"
        );
        if rung != Rung::Native {
            warn!(interface, "{GENERIC}");
        }
        return Ok(Some(rung));
    }
    Ok(None)
}

/// Attaches to the highest rung that the interface and the configuration allow.
fn climb(
    program: &mut Xdp,
    interface: &str,
    allowed: Attach,
    pins: &Pins,
) -> Result<Rung, XdpError> {
    if allowed != Attach::Generic {
        match attach_at(program, interface, Rung::Native, pins) {
            Ok(()) => return Ok(Rung::Native),
            Err(XdpError::Attach { source, .. }) if allowed == Attach::Auto => {
                warn!(
                    interface,
                    error = %chain(&source),
                    "native XDP refused by the driver, falling back: {GENERIC}"
                );
            }
            Err(error) => return Err(error),
        }
    } else {
        warn!(interface, "by configuration: {GENERIC}");
    }
    attach_at(program, interface, Rung::Generic, pins)?;
    Ok(Rung::Generic)
}

fn attach_at(program: &mut Xdp, interface: &str, rung: Rung, pins: &Pins) -> Result<(), XdpError> {
    let id = program.attach(interface, rung.mode()).map_err(|source| {
        let interface = interface.to_owned();
        match errno(&source) {
            Some(Errno::BUSY | Errno::EXIST) => XdpError::Occupied { interface },
            Some(_) | None => XdpError::Attach { interface, source },
        }
    })?;
    let link = program.take_link(id).map_err(XdpError::Load)?;
    // aya falls back to netlink on old kernels; such an attachment anyone may replace.
    let Ok(link) = FdLink::try_from(link) else {
        return Err(XdpError::NoLinks);
    };
    let pin = pins.link(rung, interface);
    link.pin(&pin).map_err(|error| XdpError::Pin {
        path: pin,
        source: io::Error::other(error),
    })?;
    info!(
        interface,
        mode = rung.label(),
        "program attached and pinned"
    );
    Ok(())
}

fn errno(error: &ProgramError) -> Option<Errno> {
    let mut source: &dyn std::error::Error = error;
    loop {
        if let Some(error) = source.downcast_ref::<io::Error>() {
            return Errno::from_io_error(error);
        }
        source = source.source()?;
    }
}

/// The index of an interface in this process's network namespace.
pub(super) fn interface_index(name: &str) -> io::Result<u32> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    Ok(rustix::net::netdevice::name_to_index(socket, name)?)
}

const GENERIC: &str = "generic XDP has the same verdicts, but each packet costs many times as much";
