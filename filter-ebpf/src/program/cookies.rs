//! SYN cookies, by the kernel's own means: the cookie for a SYN, and whether another segment acknowledges one.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the kernel's numbers: sizes of headers, and flags of 32 bits"
)]

use core::ffi::c_void;
use core::mem::MaybeUninit;

use aya_ebpf::bindings::{
    BPF_F_CURRENT_NETNS, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NOT_FWDED,
    bpf_fib_lookup as FibQuestion, bpf_sock_tuple, tcphdr,
};
use aya_ebpf::helpers::generated::{
    bpf_fib_lookup, bpf_sk_release, bpf_skc_lookup_tcp, bpf_tcp_check_syncookie,
    bpf_tcp_gen_syncookie,
};
use aya_ebpf::programs::XdpContext;
use filter_ebpf::Frame as _;
use filter_ebpf::synack::{ANSWER_HEADER, Segment, Syn, TCP_HEADER, V4_HEADER, V6_HEADER};

use super::{Hook as _, Packet};

/// The cookie for a SYN, if the kernel would answer with one and the packet is for this host.
#[inline(always)]
pub(super) fn make(ctx: &XdpContext, packet: &Packet, syn: Syn) -> Option<u32> {
    // A copy, as the verifier loses a packet's bounds on the way.
    let words = syn.header(packet)?;
    let mut header = Words::new();
    for (index, word) in words.into_iter().enumerate() {
        header.put(index, word);
    }
    let ports = words[0];
    match syn.0 {
        Segment::V4 { ip } => {
            let ip: &[u8; V4_HEADER] = packet.bytes(ip)?;
            let ends = ends_v4(ip, ports);
            let cookie = at_listener(ctx, ends, |it| generate(it, ip, &mut header))??;
            is_for_this_host(ctx, question_v4(ctx, ends)).then_some(cookie)
        }
        Segment::V6 { ip } => {
            let ip: &[u8; V6_HEADER] = packet.bytes(ip)?;
            let ends = ends_v6(ip, ports);
            let cookie = at_listener(ctx, ends, |it| generate(it, ip, &mut header))??;
            is_for_this_host(ctx, question_v6(ctx, ends)).then_some(cookie)
        }
    }
}

/// What a segment that is no SYN goes on with.
pub(super) enum Continued {
    /// A connection, or what is not seen here: it is the kernel's.
    Connection,
    /// A SYN cookie.
    Cookie,
    /// Nothing: the kernel would reset it, unless it is a reset itself.
    Nothing,
}

/// What a segment that is no SYN goes on with, where SYNs are answered with cookies.
#[inline(always)]
pub(super) fn check(ctx: &XdpContext, packet: &Packet, segment: Segment) -> Option<Continued> {
    let tcp: &[u8; TCP_HEADER] = packet.bytes(segment.tcp())?;
    let ports = word(tcp, 0);
    let (is_cookie, question) = match segment {
        Segment::V4 { ip } => {
            let ip: &[u8; V4_HEADER] = packet.bytes(ip)?;
            let ends = ends_v4(ip, ports);
            let is_cookie = at_listener(ctx, ends, |it| is_cookie(it, ip, tcp))??;
            (is_cookie, question_v4(ctx, ends))
        }
        Segment::V6 { ip } => {
            let ip: &[u8; V6_HEADER] = packet.bytes(ip)?;
            let ends = ends_v6(ip, ports);
            let is_cookie = at_listener(ctx, ends, |it| is_cookie(it, ip, tcp))??;
            (is_cookie, question_v6(ctx, ends))
        }
    };
    Some(if is_cookie {
        Continued::Cookie
    } else if is_for_this_host(ctx, question) {
        Continued::Nothing
    } else {
        Continued::Connection
    })
}

/// Addresses and ports as a packet has them, which is the tuple that the kernel looks up.
#[inline(always)]
fn ends_v4(ip: &[u8; V4_HEADER], ports: u32) -> [u32; 3] {
    [word(ip, 12), word(ip, 16), ports]
}

/// As [`ends_v4`].
#[inline(always)]
fn ends_v6(ip: &[u8; V6_HEADER], ports: u32) -> [u32; 9] {
    [
        word(ip, 8),
        word(ip, 12),
        word(ip, 16),
        word(ip, 20),
        word(ip, 24),
        word(ip, 28),
        word(ip, 32),
        word(ip, 36),
        ports,
    ]
}

/// What `ask` makes of the listener that a segment reaches; `None` if it reaches a connection, or nothing.
#[inline(always)]
fn at_listener<const T: usize, R>(
    ctx: &XdpContext,
    ends: [u32; T],
    ask: impl FnOnce(*mut c_void) -> R,
) -> Option<R> {
    let mut tuple = Words::<T>::new();
    for (index, word) in ends.into_iter().enumerate() {
        tuple.put(index, word);
    }
    // SAFETY: the context is the kernel's; the tuple has the size that is named with it.
    let socket = unsafe {
        bpf_skc_lookup_tcp(
            ctx.ctx.cast(),
            tuple.pointer().cast::<bpf_sock_tuple>(),
            (T * 4) as u32,
            BPF_F_CURRENT_NETNS as u64,
            0,
        )
    };
    if socket.is_null() {
        return None;
    }
    // SAFETY: it was looked up, and is not released yet.
    let is_listener = unsafe { (*socket).state } == BPF_TCP_LISTEN;
    let asked = is_listener.then(|| ask(socket.cast()));
    // SAFETY: it was looked up, and is released once.
    unsafe { bpf_sk_release(socket.cast()) };
    asked
}

/// The kernel's cookie; `None` if the listener's queue has room.
#[inline(always)]
fn generate<const P: usize>(
    listener: *mut c_void,
    ip: &[u8; P],
    tcp: &mut Words<{ ANSWER_HEADER / 4 }>,
) -> Option<u32> {
    // SAFETY: both headers are as long as is said; the kernel reads them.
    let cookie = unsafe {
        bpf_tcp_gen_syncookie(
            listener,
            ip.as_ptr().cast_mut().cast(),
            P as u32,
            tcp.pointer().cast::<tcphdr>(),
            ANSWER_HEADER as u32,
        )
    };
    // An error is negative: ENOENT, if the queue has room.
    (cookie >= 0).then_some(cookie as u32)
}

/// Whether a segment acknowledges a cookie of the kernel's; `None` if it does not say.
#[inline(always)]
fn is_cookie<const P: usize>(
    listener: *mut c_void,
    ip: &[u8; P],
    tcp: &[u8; TCP_HEADER],
) -> Option<bool> {
    // SAFETY: both headers are as long as is said; the kernel reads them.
    let checked = unsafe {
        bpf_tcp_check_syncookie(
            listener,
            ip.as_ptr().cast_mut().cast(),
            P as u32,
            tcp.as_ptr().cast_mut().cast::<tcphdr>(),
            TCP_HEADER as u32,
        )
    };
    match checked {
        0 => Some(true),
        ENOENT => Some(false),
        // Cookies are switched off.
        _ => None,
    }
}

/// `struct bpf_fib_lookup` (include/uapi/linux/bpf.h): family and protocol, ports, length, interface, class, and
/// the addresses; hardware addresses come back.
#[inline(always)]
fn question(
    ctx: &XdpContext,
    family: u8,
    source: [u32; 4],
    destination: [u32; 4],
) -> Words<FIB_WORDS> {
    let mut question = Words::new();
    question.put(0, u32::from_ne_bytes([family, TCP, 0, 0]));
    question.put(1, 0);
    question.put(2, ctx.interface());
    question.put(3, 0);
    for (index, word) in (4..).zip(source) {
        question.put(index, word);
    }
    for (index, word) in (8..).zip(destination) {
        question.put(index, word);
    }
    for index in 12..FIB_WORDS {
        question.put(index, 0);
    }
    question
}

#[inline(always)]
fn question_v4(ctx: &XdpContext, [source, destination, _]: [u32; 3]) -> Words<FIB_WORDS> {
    question(ctx, AF_INET, [source, 0, 0, 0], [destination, 0, 0, 0])
}

#[inline(always)]
fn question_v6(ctx: &XdpContext, [a, b, c, d, e, f, g, h, _]: [u32; 9]) -> Words<FIB_WORDS> {
    question(ctx, AF_INET6, [a, b, c, d], [e, f, g, h])
}

/// Whether a packet ends here, and is not passed on to another host.
#[inline(always)]
fn is_for_this_host(ctx: &XdpContext, mut question: Words<FIB_WORDS>) -> bool {
    // SAFETY: the context is the kernel's, and the question has the size that is named with it.
    let found = unsafe {
        bpf_fib_lookup(
            ctx.ctx.cast(),
            question.pointer().cast(),
            size_of::<FibQuestion>() as i32,
            0,
        )
    };
    let found = found as u32;
    found == BPF_FIB_LKUP_RET_NOT_FWDED || found == BPF_FIB_LKUP_RET_FWD_DISABLED
}

/// Words on the stack that are written one by one: what is set to zero as a whole becomes a call of memset, which
/// is in no section that aya looks into. Aligned, as the verifier demands of whatever the compiler writes at once.
#[repr(align(8))]
struct Words<const N: usize>(MaybeUninit<[u32; N]>);

impl<const N: usize> Words<N> {
    #[inline(always)]
    fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    #[inline(always)]
    fn put(&mut self, index: usize, word: u32) {
        if index < N {
            // SAFETY: it is one of the words.
            let place = unsafe { self.pointer().add(index) };
            // SAFETY: as above.
            unsafe { place.write_volatile(word) };
        }
    }

    #[inline(always)]
    fn pointer(&mut self) -> *mut u32 {
        self.0.as_mut_ptr().cast()
    }
}

#[inline(always)]
fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    word.map_or(0, |word| u32::from_ne_bytes(*word))
}

const FIB_WORDS: usize = size_of::<FibQuestion>() / 4;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const TCP: u8 = 6;
/// A socket that listens (include/uapi/linux/bpf.h).
const BPF_TCP_LISTEN: u32 = 10;
const ENOENT: i64 = -2;
