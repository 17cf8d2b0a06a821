//! What the kernel knows of a BPF link that aya does not ask for: the interface that it is on.

use std::path::Path;

use aya::programs::links::{FdLink, LinkType, PinnedLink};

use super::hook;
use crate::host::netlink;

/// The index of the interface that a pinned link is attached to, as [`link_index`].
pub(super) fn pinned_index(pin: &Path) -> Option<u32> {
    link_index(&pinned(pin)?)
}

/// A pinned link, if there is one.
pub(super) fn pinned(pin: &Path) -> Option<FdLink> {
    PinnedLink::from_pin(pin).ok().map(FdLink::from)
}

/// The number of the program that a link is to.
pub(super) fn program(link: &FdLink) -> Option<u32> {
    link.info().ok().map(|info| info.program_id())
}

/// The index of the interface of this namespace that a link is attached to; 0 if the interface is
/// gone, none if it is in another namespace.
pub(super) fn link_index(link: &FdLink) -> Option<u32> {
    let info = link.info().ok()?;
    let index = hook::link_interface(link).ok()?;
    // An interface that was moved keeps its link, which has the index that it has there, and that may
    // be another interface's here: only the interface itself knows its program.
    let is_xdp = info.link_type().is_ok_and(|kind| kind == LinkType::Xdp);
    let program = |of| netlink::occupant(of).map(|occupant| occupant.program);
    (!is_xdp || index == GONE || program(index) == Some(info.program_id())).then_some(index)
}

/// The index that a link has whose interface is gone.
pub(super) const GONE: u32 = 0;
