//! The attach ladder: native XDP, else generic XDP with a loud warning.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::xdp::XdpLink;
use aya::programs::{ProgramError, Xdp, XdpMode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use tracing::{info, warn};

use super::XdpError;
use super::pins::Pins;
use crate::config::{self, Attach};

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
    /// Whether the pin is still there; without it the interface is not filtered.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.pin.exists()
    }
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
        let rung = match adopt(program, interface, pins)? {
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
        remove(stale)?;
    }
    Ok(attached)
}

/// Replaces the program behind a link that is pinned, in one step.
fn adopt(program: &mut Xdp, interface: &str, pins: &Pins) -> Result<Option<Rung>, XdpError> {
    for rung in [Rung::Native, Rung::Generic] {
        let pin = pins.link(rung, interface);
        if !pin.exists() {
            continue;
        }
        let pinned = PinnedLink::from_pin(&pin).map_err(|error| XdpError::Pin {
            path: pin.clone(),
            source: io::Error::other(error),
        })?;
        let link = XdpLink::try_from(FdLink::from(pinned)).map_err(|error| XdpError::Pin {
            path: pin.clone(),
            source: io::Error::other(error),
        })?;
        let replaced = program.attach_to_link(link);
        match replaced.and_then(|id| program.take_link(id)) {
            // Dropping our end of the link leaves it to the pin.
            Ok(link) => drop(link),
            Err(error) if errno(&error) == Some(Errno::NOLINK) => {
                // The interface was deleted and created anew; this link filters nothing.
                info!(interface, "pinned link is dead, attaching anew");
                remove(&pin)?;
                continue;
            }
            Err(source) => {
                return Err(XdpError::Attach {
                    interface: interface.to_owned(),
                    source,
                });
            }
        }
        info!(
            interface,
            mode = rung.label(),
            "program replaced through its pinned link"
        );
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
                    error = %crate::snapshot::chain(&source),
                    "native XDP refused by the driver, falling back to generic XDP: same verdicts, \
                     but every packet costs many times as much"
                );
            }
            Err(error) => return Err(error),
        }
    } else {
        warn!(
            interface,
            "generic XDP by configuration: every packet costs many times as much"
        );
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

fn remove(pin: &Path) -> Result<(), XdpError> {
    fs::remove_file(pin).map_err(|source| XdpError::Pin {
        path: pin.to_owned(),
        source,
    })
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
