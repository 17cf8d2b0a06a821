//! The rig's programs: two that look at nothing, the benchmark's floor, and one that makes traffic.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(not(target_arch = "bpf"))]
fn main() -> std::process::ExitCode {
    // The kernel loads these programs; on the host there is nothing to run.
    std::process::ExitCode::FAILURE
}

#[cfg(target_arch = "bpf")]
mod program {
    use aya_ebpf::Global;
    use aya_ebpf::bindings::xdp_action;
    use aya_ebpf::helpers::bpf_get_prandom_u32;
    use aya_ebpf::macros::xdp;
    use aya_ebpf::programs::XdpContext;

    #[xdp(frags)]
    pub(crate) fn bare_drop(_: XdpContext) -> u32 {
        xdp_action::XDP_DROP
    }

    #[xdp(frags)]
    pub(crate) fn bare_pass(_: XdpContext) -> u32 {
        xdp_action::XDP_PASS
    }

    /// Sends every frame back out, from another source: turns a test run into traffic.
    #[xdp]
    #[expect(
        clippy::needless_pass_by_value,
        reason = "the macro passes the context by value"
    )]
    pub(crate) fn transmit(ctx: XdpContext) -> u32 {
        let frame = ctx.data() as *mut [u16; WORDS];
        if ctx.data() + size_of::<[u16; WORDS]>() <= ctx.data_end() {
            // SAFETY: all of the array was just checked to lie inside the frame, which is ours, and
            // frames begin at even addresses.
            vary(unsafe { &mut *frame });
        }
        xdp_action::XDP_TX
    }

    /// As [`transmit`], and writes the whole frame: who received the last one in its buffer may have changed it.
    #[xdp]
    #[expect(
        clippy::needless_pass_by_value,
        reason = "the macro passes the context by value"
    )]
    pub(crate) fn forge(ctx: XdpContext) -> u32 {
        let frame = ctx.data() as *mut [u16; SYN_WORDS];
        if ctx.data() + size_of::<[u16; SYN_WORDS]>() <= ctx.data_end() {
            // SAFETY: as above.
            let frame = unsafe { &mut *frame };
            for (word, forged) in frame.iter_mut().zip(&FORGED) {
                *word = forged.load();
            }
            if let Some(head) = frame.first_chunk_mut() {
                vary(head);
            }
        }
        xdp_action::XDP_TX
    }

    /// Changes the last two octets of an IPv4 source, and both checksums by as much: RFC 1624.
    #[inline(always)]
    fn vary(frame: &mut [u16; WORDS]) {
        if frame[ETHERTYPE] != 0x0800_u16.to_be() {
            return;
        }
        // SAFETY: the helper has no preconditions.
        let random = unsafe { bpf_get_prandom_u32() };
        let [source, _] = halves(random);
        let before = core::mem::replace(&mut frame[SOURCE], source);
        for checksum in [IP_CHECKSUM, TCP_CHECKSUM] {
            let sum = u32::from(!frame[checksum]) + u32::from(!before) + u32::from(source);
            let sum = (sum & 0xffff) + (sum >> 16);
            let [low, carry] = halves(sum);
            frame[checksum] = !(low + carry);
        }
    }

    /// The lower and the upper half of a word.
    #[inline(always)]
    fn halves(word: u32) -> [u16; 2] {
        let [a, b, c, d] = word.to_le_bytes();
        [u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])]
    }

    /// What [`forge`] sends: a frame of so many bytes, as it is on the wire.
    #[unsafe(no_mangle)]
    static FORGED: [Global<u16>; SYN_WORDS] = [const { Global::new(0) }; SYN_WORDS];
    /// Words of an untagged SYN over IPv4 with the segment size.
    const SYN_WORDS: usize = WORDS + 2;

    /// Words of an untagged TCP segment without options over IPv4, and where in them things are.
    const WORDS: usize = (14 + 20 + 20) / 2;
    const ETHERTYPE: usize = 12 / 2;
    const IP_CHECKSUM: usize = (14 + 10) / 2;
    const SOURCE: usize = (14 + 14) / 2;
    const TCP_CHECKSUM: usize = (14 + 20 + 16) / 2;

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}
