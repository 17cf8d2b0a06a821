//! What the kernel knows of hooks and links that aya does not ask for, or only as one who may everything:
//! bpf(2) itself, in the one place with an unsafe call.

use std::ffi::c_long;
use std::io;

use aya::programs::Link as _;
use aya::programs::links::FdLink;

/// The numbers of the programs at an interface's TCX ingress, in the order in which they judge.
///
/// # Errors
///
/// Returns the kernel's error.
pub(super) fn tcx_programs(interface: u32) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; PROGRAMS_MAX as usize];
    let mut query = Query {
        interface,
        attach_type: BPF_TCX_INGRESS,
        program_ids: ids.as_mut_ptr().expose_provenance() as u64,
        program_count: PROGRAMS_MAX,
        ..Query::default()
    };
    // What the kernel writes to is `ids`, of whose length it is told.
    bpf(BPF_PROG_QUERY, &mut query)?;
    let count = usize::try_from(query.program_count).unwrap_or(0);
    Ok(ids.iter().take(count).copied().collect())
}

/// The index of the interface that an XDP or TCX link is on: 0, if that is gone.
///
/// # Errors
///
/// Returns the kernel's error.
pub(super) fn link_interface(link: &FdLink) -> io::Result<u32> {
    // aya gives the descriptor away in no other way.
    let debug = format!("{:?}", link.id());
    let number: String = debug.chars().filter(char::is_ascii_digit).collect();
    let descriptor = number.parse().map_err(io::Error::other)?;
    // `struct bpf_link_info`: type, number, program, four bytes of padding, and of XDP and TCX the index.
    let mut info = [0_u32; 16];
    let mut attributes = Info {
        descriptor,
        length: u32::try_from(size_of_val(&info)).unwrap_or(0),
        info: info.as_mut_ptr().expose_provenance() as u64,
    };
    // What the kernel writes to is `info`, of whose length it is told.
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    let [_, _, _, _, index, ..] = info;
    Ok(index)
}

/// Makes the call. What attributes point to has to be there, and as long as they say.
fn bpf<A>(command: c_long, attributes: &mut A) -> io::Result<()> {
    // SAFETY: the kernel reads and writes the attributes, whose size it is given, and what they point to:
    // the callers above own that, and it outlives the call.
    let outcome =
        unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<A>()) };
    match outcome {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Of `union bpf_attr`, include/uapi/linux/bpf.h: what is zero is not asked for.
#[derive(Default)]
#[repr(C)]
struct Query {
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

/// The same.
#[repr(C)]
struct Info {
    descriptor: u32,
    length: u32,
    info: u64,
}

/// As many as the kernel takes: `BPF_MPROG_MAX`, include/linux/bpf_mprog.h.
const PROGRAMS_MAX: u32 = 64;
const BPF_OBJ_GET_INFO_BY_FD: c_long = 15;
const BPF_PROG_QUERY: c_long = 16;
const BPF_TCX_INGRESS: u32 = 46;
