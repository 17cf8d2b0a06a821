//! What the kernel knows of hooks and links that aya does not ask for, or only as one who may everything:
//! bpf(2) itself, in the one place with an unsafe call.

use std::ffi::c_long;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use aya::programs::Link as _;
use aya::programs::links::FdLink;
use filter_ebpf::steering::Connection;

/// The numbers of the programs at an interface's TCX ingress, in the order in which they judge.
///
/// # Errors
///
/// Returns the kernel's error.
pub(super) fn tcx_programs(interface: u32) -> io::Result<Vec<u32>> {
    programs_at(interface, BPF_TCX_INGRESS)
}

/// The numbers of the `sk_lookup` programs of a network namespace, in the order in which they are asked.
///
/// # Errors
///
/// Returns the kernel's error.
pub(super) fn lookup_programs(namespace: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    programs_at(number(namespace), BPF_SK_LOOKUP)
}

/// The numbers of the programs at a hook of what `target` names: an interface, or a descriptor.
fn programs_at(target: u32, attach_type: u32) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; PROGRAMS_MAX as usize];
    let mut query = Query {
        target,
        attach_type,
        program_ids: address(&mut ids),
        program_count: PROGRAMS_MAX,
        ..Query::default()
    };
    // What the kernel writes to is `ids`, whose length the request names.
    bpf(BPF_PROG_QUERY, &mut query)?;
    let count = usize::try_from(query.program_count).unwrap_or(0);
    Ok(ids.iter().take(count).copied().collect())
}

/// What a link is attached to: of an XDP or TCX link the index of the interface, of one on a network
/// namespace its inode; 0, if that is gone.
///
/// # Errors
///
/// Returns the kernel's error.
pub(super) fn link_target(link: &FdLink) -> io::Result<u32> {
    // `struct bpf_link_info`: type, number, program, four bytes of padding, and what it is attached to.
    let mut info = [0_u32; 16];
    let mut attributes = Info {
        descriptor: descriptor(link)?,
        length: u32::try_from(size_of_val(&info)).unwrap_or(0),
        info: address(&mut info),
    };
    // What the kernel writes to is `info`, whose length the request names.
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    let [_, _, _, _, target, ..] = info;
    Ok(target)
}

/// Puts another program behind a link, in one step.
///
/// # Errors
///
/// Returns the kernel's error; the program of before is then still there.
pub(super) fn replace_program(link: &FdLink, program: impl AsFd) -> io::Result<()> {
    let mut update = Update {
        link: descriptor(link)?,
        program: number(program.as_fd()),
        ..Update::default()
    };
    bpf(BPF_LINK_UPDATE, &mut update)
}

/// What a `sk_lookup` program makes of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lookup {
    /// The cookie of the socket that it assigns it to, if it does.
    pub(super) cookie: Option<u64>,
    /// Whether it is refused (`SK_DROP`).
    pub(super) is_refused: bool,
}

/// Asks a loaded `sk_lookup` program about a connection that is none (Linux 5.13). The addresses are of one
/// family.
///
/// # Errors
///
/// Returns the kernel's error.
pub(super) fn lookup(program: impl AsFd, connection: &Connection) -> io::Result<Lookup> {
    let mut context = LookupContext {
        protocol: IPPROTO_TCP,
        // Network byte order in a word whose other half is padding; any port does.
        remote_port: u32::from(ANY_PORT.to_be()),
        local_port: connection.port.into(),
        ..LookupContext::default()
    };
    match (connection.client, connection.local) {
        (IpAddr::V4(client), IpAddr::V4(local)) => {
            context.family = AF_INET;
            context.remote_ip4 = u32::from_ne_bytes(client.octets());
            context.local_ip4 = u32::from_ne_bytes(local.octets());
        }
        (client, local) => {
            context.family = AF_INET6;
            context.remote_ip6 = words(client);
            context.local_ip6 = words(local);
        }
    }
    let size = u32::try_from(size_of_val(&context)).unwrap_or(0);
    let mut run = TestRun {
        program: number(program.as_fd()),
        context_in_size: size,
        context_out_size: size,
        context_in: (&raw const context).expose_provenance() as u64,
        context_out: (&raw mut context).expose_provenance() as u64,
        ..TestRun::default()
    };
    // The kernel copies `context` before it runs, and writes to it after, as many bytes as the request says.
    bpf(BPF_PROG_TEST_RUN, &mut run)?;
    Ok(Lookup {
        cookie: Some(context.cookie).filter(|cookie| *cookie != 0),
        is_refused: run.returned == SK_DROP,
    })
}

/// Four words in network byte order.
fn words(address: IpAddr) -> [u32; 4] {
    let address = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address.octets();
    let words = [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]];
    words.map(u32::from_ne_bytes)
}

/// The number of a link's descriptor.
fn descriptor(link: &FdLink) -> io::Result<u32> {
    // aya gives the descriptor away in no other way.
    let debug = format!("{:?}", link.id());
    let number: String = debug.chars().filter(char::is_ascii_digit).collect();
    number.parse().map_err(io::Error::other)
}

fn number(descriptor: BorrowedFd<'_>) -> u32 {
    descriptor.as_raw_fd().cast_unsigned()
}

/// Where the kernel is to write.
fn address<T>(buffer: &mut [T]) -> u64 {
    buffer.as_mut_ptr().expose_provenance() as u64
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
    target: u32,
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

/// The same.
#[derive(Default)]
#[repr(C)]
struct Update {
    link: u32,
    program: u32,
    flags: u32,
    expected: u32,
}

/// The same.
#[derive(Default)]
#[repr(C)]
struct TestRun {
    program: u32,
    returned: u32,
    data_in_size: u32,
    data_out_size: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_in_size: u32,
    context_out_size: u32,
    context_in: u64,
    context_out: u64,
}

/// `struct bpf_sk_lookup`, as it is since Linux 5.17; what is behind its end on older ones is zero, as
/// they ask for.
#[derive(Default)]
#[repr(C)]
struct LookupContext {
    cookie: u64,
    family: u32,
    protocol: u32,
    remote_ip4: u32,
    remote_ip6: [u32; 4],
    remote_port: u32,
    local_ip4: u32,
    local_ip6: [u32; 4],
    local_port: u32,
    ingress: u32,
    padding: u32,
}

/// `enum sk_action`, include/uapi/linux/bpf.h.
const SK_DROP: u32 = 0;
/// As many as the kernel takes: `BPF_MPROG_MAX`, include/linux/bpf_mprog.h.
const PROGRAMS_MAX: u32 = 64;
const BPF_PROG_TEST_RUN: c_long = 10;
const BPF_OBJ_GET_INFO_BY_FD: c_long = 15;
const BPF_PROG_QUERY: c_long = 16;
const BPF_LINK_UPDATE: c_long = 29;
const BPF_SK_LOOKUP: u32 = 36;
const BPF_TCX_INGRESS: u32 = 46;
/// include/uapi/linux/in.h, and the kernel's address families.
const IPPROTO_TCP: u32 = 6;
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
/// A client's port of a connection that is none.
const ANY_PORT: u16 = 49_152;
