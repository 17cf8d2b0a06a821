//! What the kernel knows of a BPF link that aya does not ask for: the interface that it is on.

use std::fs;
use std::path::Path;

use aya::programs::links::{FdLink, PinnedLink};

/// The index of the interface that a pinned link is attached to, as [`link_index`].
pub(super) fn pinned_index(pin: &Path) -> Option<u32> {
    let pinned = PinnedLink::from_pin(pin).ok()?;
    link_index(&FdLink::from(pinned))
}

/// The index of the interface that a link is attached to; 0 if that is gone.
///
/// The kernel's fdinfo has it (`bpf_xdp_link_show_fdinfo`, net/core/dev.c, `tcx_link_fdinfo`,
/// kernel/bpf/tcx.c): ours is the descriptor whose fdinfo has the link's id.
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
