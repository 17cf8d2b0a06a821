//! What the kernel knows of a BPF link that aya does not ask for: the interface that it is on.

use std::path::Path;

use aya::programs::links::{FdLink, LinkType, PinnedLink};
use aya::programs::{ProgramInfo, ProgramType, loaded_programs};
use filter_ebpf::abi;

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

/// The number of a pinned program.
pub(super) fn pinned_program(pin: &Path) -> Option<u32> {
    ProgramInfo::from_pin(pin).ok().map(|info| info.id())
}

/// Whether a pinned program is a classifier.
pub(super) fn is_classifier(pin: &Path) -> bool {
    let info = ProgramInfo::from_pin(pin);
    info.is_ok_and(|info| info.program_type() == ProgramType::SchedClassifier.into())
}

/// A loaded program by its number, and its name if that can be found out.
pub(super) fn describe(program: u32) -> String {
    let mut programs = loaded_programs();
    let found = programs.find_map(|info| info.ok().filter(|info| info.id() == program));
    let name = found.and_then(|info| info.name_as_str().map(str::to_owned));
    let name = name.map_or_else(String::new, |name| format!(", name {name}"));
    format!("id {program}{name}")
}

/// The interfaces of this namespace that a program of ours is attached to by XDP, whatever pins say.
#[must_use]
pub fn interfaces_with_our_program() -> Vec<String> {
    let programs = loaded_programs().filter_map(Result::ok);
    let is_ours = |info: &ProgramInfo| {
        info.name_as_str()
            .is_some_and(|name| name.starts_with(abi::PROGRAM))
    };
    let ours: Vec<_> = programs.filter(is_ours).map(|info| info.id()).collect();
    let mut interfaces = netlink::interfaces().unwrap_or_default();
    interfaces.retain(|interface| {
        let occupant = netlink::occupant(interface.index);
        occupant.is_some_and(|occupant| ours.contains(&occupant.program))
    });
    interfaces
        .into_iter()
        .map(|interface| interface.name)
        .collect()
}

/// The index of the interface of this namespace that a link is attached to; 0 if the interface is
/// gone, none if it is in another namespace.
pub(super) fn link_index(link: &FdLink) -> Option<u32> {
    let info = link.info().ok()?;
    let index = hook::link_target(link).ok()?;
    // An interface that was moved keeps its link, which has the index that it has there, and that may
    // be another interface's here: only the interface itself knows its program.
    let is_xdp = info.link_type().is_ok_and(|kind| kind == LinkType::Xdp);
    let program = |of| netlink::occupant(of).map(|occupant| occupant.program);
    (!is_xdp || index == GONE || program(index) == Some(info.program_id())).then_some(index)
}

/// The index that a link has whose interface is gone.
pub(super) const GONE: u32 = 0;
