//! What the kernel knows of a hook that aya asks for only as one who may everything: the order of the
//! programs at TCX ingress. The one system call that no library makes for us.

use std::ffi::c_long;
use std::io;

/// The numbers of the programs at an interface's TCX ingress, in the order in which they judge.
///
/// # Errors
///
/// Returns the kernel's error.
pub(super) fn tcx_programs(interface: u32) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; PROGRAMS_MAX as usize];
    // `union bpf_attr` for BPF_PROG_QUERY, include/uapi/linux/bpf.h; what is zero is not asked for.
    let mut attributes = Attributes {
        interface,
        attach_type: BPF_TCX_INGRESS,
        program_ids: ids.as_mut_ptr().expose_provenance() as u64,
        program_count: PROGRAMS_MAX,
        ..Attributes::default()
    };
    // SAFETY: the kernel writes within the attributes, whose size it is given, and within `ids`, of whose
    // length it is told; both outlive the call.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_QUERY,
            &raw mut attributes,
            size_of::<Attributes>(),
        )
    };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    let count = usize::try_from(attributes.program_count).unwrap_or(0);
    Ok(ids.iter().take(count).copied().collect())
}

#[derive(Default)]
#[repr(C)]
struct Attributes {
    interface: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    program_count: u32,
    padding: u32,
    program_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// As many as the kernel takes: `BPF_MPROG_MAX`, include/linux/bpf_mprog.h.
const PROGRAMS_MAX: u32 = 64;
const BPF_PROG_QUERY: c_long = 16;
const BPF_TCX_INGRESS: u32 = 46;
