//! Steering: the kernel assigns connections to protected ports to the gate's sockets, by a `sk_lookup`
//! program on the network namespace, while the web server goes on listening on the same ports.
//!
//! ```text
//! <paths.bpf>/v4/steer_link       what keeps the program on the namespace
//!                steer_program    the program behind it
//!                steer_sockets    the gate's listening sockets, by family
//! ```
//! A socket is in the map for as long as any process has it open: the map keeps none.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use aya::maps::{MapData, SockMap};
use aya::programs::SkLookup;
use aya::programs::links::FdLink;
use aya::{Ebpf, EbpfLoader};
use filter_ebpf::abi;
use filter_ebpf::steering::{Connection, SteerSettings, is_steered};
use serde::Serialize;
use socket2::SockRef;
use tracing::{info, warn};

use super::hook::{self, Lookup};
use super::load::{self, map_error, pin_error, take_map, uninterrupted};
use super::pins::{self, Pins};
use super::{XdpError, link};
use crate::config::FilterSettings;
use crate::host::kernel;
use crate::report::chain;

/// The program that steers, and the sockets that it steers to.
pub(super) struct Steering {
    ebpf: Ebpf,
    sockets: SockMap<MapData>,
    /// The number of the program.
    program: u32,
    /// A connection that it steers, by family; none of a family that it does not.
    examples: [Option<Connection>; abi::SOCKET_SLOTS],
    pins: Pins,
    /// A new link until it is pinned: it ends with this value, or with this process.
    held: Option<FdLink>,
    /// Whether a program of ours was there before.
    replaced: bool,
    /// Why the kernel did not take the program the last time, if it did not.
    refusal: Option<String>,
}

/// A listening socket of the gate.
#[derive(Debug)]
pub struct GateSocket {
    /// The socket.
    pub socket: OwnedFd,
    /// Whether it is of IPv6.
    pub is_ipv6: bool,
}

/// Whether connections are steered, and to what.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SteerState {
    /// Why our program is not on this network namespace, if it is not.
    pub detached: Option<Detached>,
    /// Whether the gate has a socket for connections of IPv4; none where the kernel cannot be asked
    /// (before Linux 5.13), or no address of that family is steered.
    pub has_ipv4: Option<bool>,
    /// The same of IPv6.
    pub has_ipv6: Option<bool>,
    /// Other programs that are asked as well, by number and name: the last that chooses a socket decides.
    pub others: Vec<String>,
}

/// Why nothing is steered.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Detached {
    /// The filter was unloaded.
    Unloaded,
    /// The kernel does not take the program, for this reason.
    Refused(String),
    /// Another process has detached it.
    ByAnother,
}

impl SteerState {
    /// Whether every connection that should be is the gate's, or refused.
    #[must_use]
    pub fn leads_to_gate(&self) -> bool {
        self.detached.is_none() && self.others.is_empty()
    }
}

impl Steering {
    /// Loads the program with `settings`, on the sockets that the pins keep; none, if nothing is steered.
    pub(super) fn load(settings: &FilterSettings, pins: &Pins) -> Result<Option<Self>, XdpError> {
        if settings.steered_ports.is_empty() {
            return Ok(None);
        }
        if !kernel::is_at_least(STEERS_SINCE) {
            return Err(XdpError::NoSteering);
        }
        let flags = load::flags(settings);
        let ports = load::port_bitmap(&settings.steered_ports);
        let destinations = load::destinations(settings);
        let mut loader = EbpfLoader::new();
        loader
            .override_global(abi::SETTINGS, &flags, true)
            .override_global(abi::TCP_PORTS, ports.as_slice(), true)
            .override_global(abi::DESTINATIONS, destinations.as_slice(), true)
            .map_pin_path(abi::GATE_SOCKETS, pins.steer_sockets());
        let mut ebpf = load::load_object(&mut loader, OBJECT)?;
        let sockets = take_map(&mut ebpf, abi::GATE_SOCKETS)?;
        let sockets = SockMap::try_from(sockets).map_err(map_error(abi::GATE_SOCKETS))?;
        let program = lookup(&mut ebpf)?;
        uninterrupted(|| program.load()).map_err(load::refused)?;
        let program = program.info().map_err(XdpError::Load)?.id();
        Ok(Some(Self {
            ebpf,
            sockets,
            program,
            examples: examples(settings),
            pins: pins.clone(),
            held: None,
            replaced: false,
            refusal: None,
        }))
    }

    /// Puts the program on this network namespace: through the link that is pinned already, else by a
    /// new one, which is held until [`Self::pin`].
    pub(super) fn attach(&mut self) -> Result<(), XdpError> {
        let attached = self.try_attach();
        self.refusal = attached.as_ref().err().map(|error| chain(error));
        attached
    }

    fn try_attach(&mut self) -> Result<(), XdpError> {
        let pin = self.pins.steer_link();
        if pin.exists() {
            if let Some(link) = link::pinned(&pin).filter(is_here) {
                let program = lookup(&mut self.ebpf)?.fd().map_err(XdpError::Load)?;
                hook::replace_program(&link, program).map_err(attach_error)?;
                self.replaced = true;
                info!(
                    id = "steering-replaced",
                    "steering program replaced through its pinned link"
                );
                return Ok(());
            }
            info!(id = "stale-link-removed", pin = %pin.display(), "a stale link is removed");
            pins::remove(&pin)?;
        }
        let namespace = namespace().map_err(attach_error)?;
        let program = lookup(&mut self.ebpf)?;
        let id = program.attach(namespace).map_err(XdpError::Load)?;
        let link = program.take_link(id).map_err(XdpError::Load)?;
        self.held = Some(FdLink::from(link));
        info!(
            id = "steering-attached",
            "connections to protected ports are steered to the gate"
        );
        Ok(())
    }

    /// From here on the link stays.
    pub(super) fn pin(&mut self) -> Result<(), XdpError> {
        if let Some(link) = self.held.take() {
            let pin = self.pins.steer_link();
            let pinned = link.pin(&pin).map(drop);
            pinned.map_err(|error| pin_error(&pin, &error))?;
        }
        let pin = self.pins.steer_program();
        if pin.exists() {
            pins::remove(&pin)?;
        }
        let pinned = lookup(&mut self.ebpf)?.pin(&pin);
        pinned.map_err(|error| pin_error(&pin, &error))
    }

    /// What was there before is there again.
    pub(super) fn revert(mut self) -> Result<(), XdpError> {
        // Dropping a link that has no pin detaches it.
        drop(self.held.take());
        if !self.replaced {
            return Ok(());
        }
        let pin = self.pins.steer_program();
        let before = SkLookup::from_pin(&pin).map_err(|error| pin_error(&pin, &error))?;
        let program = before.fd().map_err(XdpError::Load)?;
        let link = link::pinned(&self.pins.steer_link()).ok_or(XdpError::Unloaded)?;
        hook::replace_program(&link, program).map_err(attach_error)
    }

    /// Steers to these sockets from now on; a family that none is of keeps its own.
    pub(super) fn steer_to(&mut self, sockets: &[GateSocket]) -> Result<(), XdpError> {
        if !self.is_attached() {
            return Err(XdpError::SteeringDetached);
        }
        for GateSocket { socket, is_ipv6 } in sockets {
            let (slot, example) = match (is_ipv6, self.examples) {
                (false, [ipv4, _]) => (abi::SOCKET_V4, ipv4),
                (true, [_, ipv6]) => (abi::SOCKET_V6, ipv6),
            };
            // None takes its own place: the kernel adds the new one before it lets go of the old, by its
            // place, which would be both (`sock_map_update_common`, net/core/sock_map.c).
            let assigned = example.and_then(|it| self.assigned(&it));
            let cookie = SockRef::from(socket).cookie().ok();
            match assigned {
                Some(assigned) if assigned.is_some() && assigned == cookie => continue,
                Some(_) => {}
                // It cannot be asked for: whichever is there goes first.
                None => match self.sockets.clear_index(&slot) {
                    Ok(()) | Err(_) => {}
                },
            }
            let set = self.sockets.set(slot, socket, 0);
            set.map_err(map_error(abi::GATE_SOCKETS))?;
        }
        Ok(())
    }

    /// Attaches again, if another process has detached the program; whether that was needed.
    pub(super) fn reconcile(&mut self) -> Result<bool, XdpError> {
        if self.is_attached() {
            return Ok(false);
        }
        self.attach()?;
        self.pin()?;
        Ok(true)
    }

    /// Looks at the kernel.
    pub(super) fn state(&mut self) -> SteerState {
        let [ipv4, ipv6] = self.examples;
        SteerState {
            detached: self.detached(),
            has_ipv4: ipv4.and_then(|it| self.has_socket(&it)),
            has_ipv6: ipv6.and_then(|it| self.has_socket(&it)),
            others: self.others(),
        }
    }

    fn detached(&self) -> Option<Detached> {
        if self.is_attached() {
            return None;
        }
        if self.held.is_none() && !self.pins.exist() {
            return Some(Detached::Unloaded);
        }
        let refusal = self.refusal.clone();
        Some(refusal.map_or(Detached::ByAnother, Detached::Refused))
    }

    /// Whether our link is on this network namespace, with our program.
    pub(super) fn is_attached(&self) -> bool {
        let pinned = match self.held {
            Some(_) => None,
            None => link::pinned(&self.pins.steer_link()),
        };
        let link = self.held.as_ref().or(pinned.as_ref());
        link.is_some_and(|link| link::program(link) == Some(self.program) && is_here(link))
    }

    fn has_socket(&mut self, example: &Connection) -> Option<bool> {
        Some(self.assigned(example)?.is_some())
    }

    /// The cookie of the socket that a connection is assigned to, if there is one; none, where the kernel
    /// cannot be asked.
    fn assigned(&mut self, example: &Connection) -> Option<Option<u64>> {
        let program = lookup(&mut self.ebpf).ok()?.fd().ok()?;
        Some(hook::lookup(program, example).ok()?.cookie)
    }

    fn others(&self) -> Vec<String> {
        // A kernel that does not answer is no reason to alarm.
        let programs = namespace().and_then(|it| hook::lookup_programs(it.as_fd()));
        let mut programs = programs.unwrap_or_default();
        programs.retain(|program| *program != self.program);
        programs.into_iter().map(link::describe).collect()
    }
}

impl SteerSettings for FilterSettings {
    fn steers_port(&self, port: u16) -> bool {
        self.steered_ports.contains(&port)
    }

    fn steers_address(&self, address: IpAddr) -> bool {
        self.destinations.is_empty() || self.destinations.contains(&address)
    }
}

/// Where a connection goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SteeredTo {
    /// To a socket of the gate.
    Gate,
    /// To none, as the gate has handed over no socket: it is refused.
    NoSocket,
    /// Not steered: to whatever listens there.
    Listener,
    /// It is not known: this kernel cannot be asked (before Linux 5.13).
    Unknown,
}

/// Asks the program by which the pinned link steers; none, if none does.
#[must_use]
pub fn steered_to(base: &Path, connection: &Connection) -> Option<SteeredTo> {
    let pins = Pins::existing(base).ok()??;
    let link = link::pinned(&pins.steer_link()).filter(is_here)?;
    let program = SkLookup::from_pin(pins.steer_program()).ok()?;
    let number = program.info().ok()?.id();
    if link::program(&link) != Some(number) {
        return None;
    }
    Some(match hook::lookup(program.fd().ok()?, connection) {
        Ok(Lookup {
            cookie: Some(_), ..
        }) => SteeredTo::Gate,
        Ok(Lookup {
            is_refused: true, ..
        }) => SteeredTo::NoSocket,
        Ok(_) => SteeredTo::Listener,
        Err(_) => SteeredTo::Unknown,
    })
}

/// Takes away what steers; the ports are the web server's again when it returns.
pub(super) fn remove(pins: &Pins) -> Result<(), XdpError> {
    let all = [
        pins.steer_link(),
        pins.steer_program(),
        pins.steer_sockets(),
    ];
    for pin in all.iter().filter(|pin| pin.exists()) {
        if *pin == all[0] {
            warn!(
                id = "steering-ended",
                "connections are no longer steered to the gate"
            );
        }
        pins::remove(pin)?;
    }
    Ok(())
}

/// Whether a link is on this network namespace.
fn is_here(link: &FdLink) -> bool {
    let here = namespace().and_then(|it| it.metadata());
    let there = hook::link_target(link);
    matches!((here, there), (Ok(here), Ok(there)) if here.ino() == u64::from(there))
}

/// This process's network namespace.
fn namespace() -> io::Result<File> {
    File::open(Path::new("/proc/self/ns/net"))
}

fn lookup(ebpf: &mut Ebpf) -> Result<&mut SkLookup, XdpError> {
    let name = abi::PROGRAM_STEER;
    let program = ebpf.program_mut(name).ok_or(XdpError::Missing { name })?;
    program.try_into().map_err(XdpError::Load)
}

/// A connection of each family that these settings steer, if they do: from an address that no host has, to
/// one that is protected.
fn examples(settings: &FilterSettings) -> [Option<Connection>; abi::SOCKET_SLOTS] {
    let port = settings.steered_ports.first().copied().unwrap_or_default();
    let [v4, v6] = [
        (IpAddr::V4(CLIENT_V4), IpAddr::V4(LOCAL_V4)),
        (IpAddr::V6(CLIENT_V6), IpAddr::V6(LOCAL_V6)),
    ];
    [v4, v6].map(|(client, otherwise)| {
        let mut named = settings.destinations.iter().copied();
        let local = named.find(|address| address.is_ipv6() == client.is_ipv6());
        let example = Connection {
            client,
            local: local.unwrap_or(otherwise),
            port,
        };
        Some(example).filter(|it| is_steered(it, settings))
    })
}

fn attach_error(source: io::Error) -> XdpError {
    XdpError::Steer { source }
}

/// The object of steering, empty in builds without it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/steer.o"));
/// The first kernel with `sk_lookup` programs (commit e9ddbb7707ff).
pub const STEERS_SINCE: (u32, u32) = (5, 9);
/// RFC 5737, RFC 3849. A connection from an address to itself would not be steered.
const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const LOCAL_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const LOCAL_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    #[test]
    fn the_examples_are_steered_where_their_family_is() {
        for (destinations, expected) in [
            ("", [true, true]),
            ("\"203.0.113.10\"", [true, false]),
            ("\"203.0.113.10\", \"2001:db8:10::10\"", [true, true]),
        ] {
            let text = format!(
                "[filter]\ninterfaces = \"auto\"\ndestinations = [{destinations}]\n[gate]\nsteer = true\n\
                 [[gate.host]]\nnames = [\"a.example\"]\ncertificate = \"a.pem\"\nkey = \"a.key\"\n\
                 trust = [\"cloudflare\"]\n"
            );
            let config = Config::parse(Path::new("/pullgate.toml"), &text).unwrap();
            let settings = config.live.filter.unwrap();
            let steered = examples(&settings).map(|it| it.is_some());
            assert_eq!(steered, expected, "{destinations}");
        }
    }
}
