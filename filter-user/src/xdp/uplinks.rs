//! Which interfaces are to be filtered: those that the configuration names, or those that lead to
//! the internet.

use std::fs;
use std::path::Path;

use aya::programs::links::{FdLink, PinnedLink};

use super::XdpError;
use crate::config::{self, Interfaces};
use crate::netlink::{self, Interface};

/// What is to be filtered, as far as it exists at this moment.
pub(super) struct Wanted {
    pub(super) present: Vec<Interface>,
    /// Named by the configuration, but not there.
    pub(super) missing: Vec<String>,
    /// With a default route, but not Ethernet.
    pub(super) unfit: Vec<String>,
}

/// Picks the interfaces that `settings` are for from all there are.
///
/// An interface that once had a default route stays wanted as long as it is `linked`: routes come and
/// go with leases, and none of that shall open the host.
pub(super) fn wanted(
    settings: &config::Filter,
    all: &[Interface],
    linked: &[String],
) -> Result<Wanted, XdpError> {
    let mut wanted = Wanted {
        present: Vec::new(),
        missing: Vec::new(),
        unfit: Vec::new(),
    };
    match &settings.interfaces {
        Interfaces::Auto => {
            let routes = netlink::default_routes().map_err(XdpError::Netlink)?;
            let leads_out = |interface: &Interface| {
                routes.contains(&interface.index) || linked.contains(&interface.name)
            };
            for interface in all.iter().filter(|interface| leads_out(interface)) {
                // A tunnel has no frames to judge; what carries it has.
                if interface.is_ethernet {
                    wanted.present.push(interface.clone());
                } else {
                    wanted.unfit.push(interface.name.clone());
                }
            }
        }
        Interfaces::Named(names) => {
            for name in names {
                match all.iter().find(|interface| interface.name == name.value) {
                    Some(interface) => wanted.present.push(interface.clone()),
                    None => wanted.missing.push(name.value.clone()),
                }
            }
        }
    }
    Ok(wanted)
}

/// Finds what is wrong with the named interfaces: one whose frames cannot be judged, or that none of
/// them exists. If only some are missing, these are filtered when they come.
///
/// # Errors
///
/// Returns the interface, with its place in the configuration.
pub fn check_interfaces(settings: &config::Filter) -> Result<(), config::ConfigError> {
    let Interfaces::Named(names) = &settings.interfaces else {
        return Ok(());
    };
    let all = netlink::interfaces().unwrap_or_default();
    let mut missing = None;
    let mut any = false;
    for name in names {
        match all.iter().find(|interface| interface.name == name.value) {
            Some(interface) if interface.is_ethernet => any = true,
            Some(_) => {
                let interface = name.value.clone();
                return Err(name.place.error(XdpError::NotEthernet { interface }));
            }
            None => missing = missing.or(Some(name)),
        }
    }
    match missing {
        Some(name) if !any => Err(name.place.error(format_args!(
            "interface `{}` does not exist; `ip link` lists those that do",
            name.value
        ))),
        Some(_) | None => Ok(()),
    }
}

/// The index of the interface that a pinned link is attached to, as [`link_index`].
pub(super) fn pinned_index(pin: &Path) -> Option<u32> {
    let pinned = PinnedLink::from_pin(pin).ok()?;
    link_index(&FdLink::from(pinned))
}

/// The index of the interface that a link is attached to; 0 if that is gone.
///
/// aya does not tell it, but the kernel's fdinfo does (`bpf_xdp_link_show_fdinfo`, net/core/dev.c,
/// `tcx_link_fdinfo`, kernel/bpf/tcx.c): ours is the descriptor whose fdinfo has the link's id.
pub(super) fn link_index(link: &FdLink) -> Option<u32> {
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
