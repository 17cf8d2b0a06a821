//! SYN cookies, as the kernel makes them: a SYN in, the cookie that the kernel will know again out.
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
    bpf_fib_lookup, bpf_sk_release, bpf_skc_lookup_tcp, bpf_tcp_gen_syncookie,
};
use aya_ebpf::programs::XdpContext;
use filter_ebpf::Frame as _;
use filter_ebpf::synack::{ANSWER_HEADER, Syn};

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
    match syn {
        Syn::V4 { ip } => {
            let ip: &[u8; 20] = packet.bytes(ip)?;
            let (source, destination) = (word(ip, 12), word(ip, 16));
            let mut tuple = [source, destination, ports];
            let cookie = ask(ctx, &mut tuple, ip, &mut header)?;
            let question = question(ctx, AF_INET, [source, 0, 0, 0], [destination, 0, 0, 0]);
            is_for_this_host(ctx, question).then_some(cookie)
        }
        Syn::V6 { ip } => {
            let ip: &[u8; 40] = packet.bytes(ip)?;
            let part = |at: usize| {
                [
                    word(ip, at),
                    word(ip, at + 4),
                    word(ip, at + 8),
                    word(ip, at + 12),
                ]
            };
            let ([a, b, c, d], [e, f, g, h]) = (part(8), part(24));
            let mut tuple = [a, b, c, d, e, f, g, h, ports];
            let cookie = ask(ctx, &mut tuple, ip, &mut header)?;
            let question = question(ctx, AF_INET6, [a, b, c, d], [e, f, g, h]);
            is_for_this_host(ctx, question).then_some(cookie)
        }
    }
}

/// Addresses and ports as a packet has them are the tuple that the kernel looks up.
#[inline(always)]
fn ask<const T: usize, const P: usize>(
    ctx: &XdpContext,
    tuple: &mut [u32; T],
    ip: &[u8; P],
    tcp: &mut Words<{ ANSWER_HEADER / 4 }>,
) -> Option<u32> {
    // SAFETY: the context is the kernel's; the tuple has the size that is named with it.
    let listener = unsafe {
        bpf_skc_lookup_tcp(
            ctx.ctx.cast(),
            tuple.as_mut_ptr().cast::<bpf_sock_tuple>(),
            (T * 4) as u32,
            BPF_F_CURRENT_NETNS as u64,
            0,
        )
    };
    if listener.is_null() {
        return None;
    }
    let listener = listener.cast::<c_void>();
    // SAFETY: both headers are as long as is said; the kernel reads them, and refuses a socket that listens not.
    let cookie = unsafe {
        bpf_tcp_gen_syncookie(
            listener,
            ip.as_ptr().cast_mut().cast(),
            P as u32,
            tcp.pointer().cast::<tcphdr>(),
            ANSWER_HEADER as u32,
        )
    };
    // SAFETY: it was looked up, and is released once.
    unsafe { bpf_sk_release(listener) };
    // An error is negative: ENOENT, if the queue has room.
    (cookie >= 0).then_some(cookie as u32)
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
/// is in no section that aya looks into.
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
