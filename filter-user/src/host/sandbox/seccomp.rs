//! System calls: those that a role makes, and no others. What is refused fails with EPERM, and does
//! not kill: a library that tries something new gets an error and does not end the protection.

use std::collections::BTreeMap;

use libc::{c_int, c_long};
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter, apply_filter_all_threads,
};

use super::access::Access;
use crate::role::Role;

type SyscallRules = BTreeMap<c_long, Vec<SeccompRule>>;

pub(super) fn confine(access: &Access) -> Result<(), Error> {
    let mut rules: SyscallRules = COMMON.iter().map(|call| (*call, Vec::new())).collect();
    rules.extend(OLD.iter().map(|call| (*call, Vec::new())));
    if access.has(Role::Filter) {
        rules.insert(libc::SYS_bpf, Vec::new());
    }
    rules.insert(libc::SYS_socket, sockets(access)?);
    rules.insert(libc::SYS_prctl, equal(0, &PRCTL)?);
    // Threads, and never a process or a namespace of their own.
    let thread = word(libc::CLONE_THREAD);
    let threads = SeccompCmpOp::MaskedEq(NAMESPACES | thread);
    rules.insert(libc::SYS_clone, vec![rule(0, threads, thread)?]);
    let ourselves = word(rustix::process::getpid().as_raw_pid());
    rules.insert(
        libc::SYS_tgkill,
        vec![rule(0, SeccompCmpOp::Eq, ourselves)?],
    );
    // landlock does not see a connection that begins with a send.
    for (call, flags) in [
        (libc::SYS_sendto, 3),
        (libc::SYS_sendmsg, 2),
        (libc::SYS_sendmmsg, 3),
    ] {
        let is_fast_open = SeccompCmpOp::MaskedEq(word(libc::MSG_FASTOPEN));
        rules.insert(call, vec![rule(flags, is_fast_open, 0)?]);
    }
    // No other protocol is put over a connection, in the kernel: rustls speaks TLS.
    rules.insert(
        libc::SYS_setsockopt,
        vec![
            rule(1, SeccompCmpOp::Ne, word(libc::IPPROTO_TCP))?,
            rule(2, SeccompCmpOp::Ne, word(libc::TCP_ULP))?,
        ],
    );
    // Nothing is typed into a terminal.
    rules.insert(
        libc::SYS_ioctl,
        vec![SeccompRule::new(vec![
            condition(1, SeccompCmpOp::Ne, TIOCSTI)?,
            condition(1, SeccompCmpOp::Ne, TIOCLINUX)?,
        ])?],
    );
    // A filter cannot see the flags of clone3(2); libraries fall back to clone(2) where it is missing.
    apply_filter(&without(&[libc::SYS_clone3], ENOSYS)?)?;
    apply_filter(&compile(
        rules,
        SeccompAction::Errno(EPERM),
        SeccompAction::Allow,
    )?)
}

/// Takes listen(2) from every thread, and the call that did so.
pub(super) fn refuse_listening() -> Result<(), Error> {
    let calls = [libc::SYS_listen, libc::SYS_seccomp];
    apply_filter_all_threads(&without(&calls, EPERM)?)
}

/// All that was let through before, but for these calls.
fn without(calls: &[c_long], errno: u32) -> Result<BpfProgram, Error> {
    let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
    compile(rules, SeccompAction::Allow, SeccompAction::Errno(errno))
}

fn compile(
    rules: SyscallRules,
    otherwise: SeccompAction,
    if_named: SeccompAction,
) -> Result<BpfProgram, Error> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(rules, otherwise, if_named, arch)?;
    Ok(filter.try_into()?)
}

/// Status sockets and the kernel's tables for all; the network for who listens or fetches, and
/// datagrams only for who looks names up.
fn sockets(access: &Access) -> Result<Vec<SeccompRule>, Error> {
    let mut rules = equal(0, &[libc::AF_UNIX])?;
    for protocol in [libc::NETLINK_ROUTE, libc::NETLINK_SOCK_DIAG] {
        rules.push(SeccompRule::new(vec![
            condition(0, SeccompCmpOp::Eq, word(libc::AF_NETLINK))?,
            condition(2, SeccompCmpOp::Eq, word(protocol))?,
        ])?);
    }
    let mut kinds = Vec::new();
    if access.has(Role::Ranges) || !access.bind.is_empty() {
        // By name, for landlock knows no other protocol of streams.
        kinds.extend([
            (libc::SOCK_STREAM, 0),
            (libc::SOCK_STREAM, libc::IPPROTO_TCP),
        ]);
    }
    if access.has(Role::Ranges) {
        kinds.extend([(libc::SOCK_DGRAM, 0), (libc::SOCK_DGRAM, libc::IPPROTO_UDP)]);
    }
    for family in [libc::AF_INET, libc::AF_INET6] {
        for (kind, protocol) in &kinds {
            rules.push(SeccompRule::new(vec![
                condition(0, SeccompCmpOp::Eq, word(family))?,
                condition(1, SeccompCmpOp::MaskedEq(word(TYPE_MASK)), word(*kind))?,
                condition(2, SeccompCmpOp::Eq, word(*protocol))?,
            ])?);
        }
    }
    Ok(rules)
}

fn equal(argument: u8, values: &[c_int]) -> Result<Vec<SeccompRule>, Error> {
    let rules = values
        .iter()
        .map(|value| rule(argument, SeccompCmpOp::Eq, word(*value)));
    rules.collect()
}

fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, Error> {
    Ok(SeccompRule::new(vec![condition(
        argument, operator, value,
    )?])?)
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition, Error> {
    let length = SeccompCmpArgLen::Dword;
    Ok(SeccompCondition::new(argument, length, operator, value)?)
}

/// As the kernel sees an int.
fn word(value: c_int) -> u64 {
    u64::from(value.cast_unsigned())
}

/// What the runtime, its threads, files, sockets and clocks take.
const COMMON: [c_long; 102] = [
    // Memory and threads.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getcpu,
    // Who we are, and what we may.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getgroups,
    libc::SYS_capget,
    libc::SYS_prlimit64,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_umask,
    libc::SYS_getrandom,
    // Signals: our own.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    // Clocks.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    // Descriptors.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    // Files.
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_flock,
    libc::SYS_mkdirat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlinkat,
    // Sockets.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_socketpair,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    // Sockets that were handed over.
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    // For the last filter, see `refuse_listening`.
    libc::SYS_seccomp,
];
/// What these were called before, on the one architecture that is old enough.
#[cfg(target_arch = "x86_64")]
const OLD: [c_long; 21] = [
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_rename,
    libc::SYS_unlink,
    libc::SYS_chmod,
    libc::SYS_dup2,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_create,
    libc::SYS_epoll_wait,
    libc::SYS_getrlimit,
    libc::SYS_setrlimit,
    libc::SYS_time,
    libc::SYS_arch_prctl,
    libc::SYS_getpgrp,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD: [c_long; 0] = [];
/// Threads have names, and so has memory; and one more filter follows.
const PRCTL: [c_int; 4] = [
    libc::PR_SET_NAME,
    libc::PR_GET_NAME,
    libc::PR_SET_VMA,
    libc::PR_SET_NO_NEW_PRIVS,
];
/// clone(2): every flag that asks for a new namespace.
const NAMESPACES: u64 = 0x7e02_0080;
/// ioctl_tty(2), whose types are not the same everywhere.
const TIOCSTI: u64 = 0x5412;
const TIOCLINUX: u64 = 0x541c;
/// socket(2): the type without the flags beside it.
const TYPE_MASK: c_int = 0xf;
const EPERM: u32 = libc::EPERM.cast_unsigned();
const ENOSYS: u32 = libc::ENOSYS.cast_unsigned();
