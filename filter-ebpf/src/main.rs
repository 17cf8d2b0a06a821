//! The XDP program: maps, the packet read, and the verdict's way back to the kernel.
//!
//! No parsing and no rules here; they are in the library.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(not(target_arch = "bpf"))]
fn main() -> std::process::ExitCode {
    // The kernel loads this program; on the host there is nothing to run.
    std::process::ExitCode::FAILURE
}

#[cfg(target_arch = "bpf")]
#[expect(
    clippy::needless_pass_by_value,
    reason = "the macros pass the context by value"
)]
mod program {
    mod cookies;

    use core::cell::UnsafeCell;
    use core::ffi::c_void;
    use core::net::IpAddr;
    use core::ptr;

    use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action, xdp_md};
    use aya_ebpf::btf_maps::{Array, PerCpuArray, RingBuf};
    use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_xdp_adjust_tail};
    use aya_ebpf::macros::{btf_map, classifier, xdp};
    use aya_ebpf::programs::{TcContext, XdpContext};
    use aya_ebpf::{EbpfContext, Global};
    use filter_ebpf::abi::{
        self, CHUNK, DESTINATIONS_MAX, EVENT, EVENTS_BYTES, GENERATIONS, NODES, PORT_BITMAP,
        SETTING_DESTINATIONS_SHIFT, SETTING_FRAGMENTS_PASS, SETTING_MONITOR, SETTING_SYN_COOKIES,
        SETTING_UDP, SNAPSHOT,
    };
    use filter_ebpf::synack::{self, Answer, Segment, Syn};
    use filter_ebpf::table::{self, Chunk, Class, Node, Table, Tail, Tree};
    use filter_ebpf::verdict::{self, decide_nested, decide_plain};
    use filter_ebpf::{Frame, Ranges, Settings, Slot};

    use cookies::Continued;

    #[btf_map]
    static RANGES_V4: Nodes = Array::new();
    #[btf_map]
    static RANGES_V6: Nodes = Array::new();
    #[btf_map]
    static EVENTS: RingBuf<Event, EVENTS_BYTES> = RingBuf::new();
    #[btf_map]
    static COUNTERS: PerCpuArray<u64, { verdict::COUNTERS }> = PerCpuArray::new();
    #[btf_map]
    static EXPLAINED: Array<u64, { verdict::COUNTERS }> = Array::new();
    #[btf_map]
    static SAMPLE_BUDGET: PerCpuArray<u64, 1> = PerCpuArray::new();

    #[btf_map]
    static BEGUN: PerCpuArray<u64, { 1 << (64 - BEGUN_SHIFT) }> = PerCpuArray::new();

    // A section of its own, hence a map of its own, but reading it is one load. Only user space
    // writes it, which the compiler must not conclude to be constant.
    #[unsafe(no_mangle)]
    #[unsafe(link_section = ".data.active")]
    static ACTIVE: Global<u64> = Global::new(0);

    // When SYNs were last answered, and of which port: ticks, and the port in the lowest 16 bits. 0 until then, so
    // that nothing else pays more than a load.
    #[unsafe(link_section = ".data.armed")]
    static ARMED: Shared = Shared(UnsafeCell::new(0));

    #[unsafe(no_mangle)]
    static SETTINGS: Global<u32> = Global::new(0);
    #[unsafe(no_mangle)]
    static MSS: Global<u32> = Global::new(0);
    // The verifier of Linux 5.10 knows no bounds of a number whose bytes were swapped; and of a constant the compiler
    // knows that it changes nothing.
    static PORT_BYTES: Global<u16> = Global::new(u16::MAX >> 3);
    #[unsafe(no_mangle)]
    static TCP_PORTS: [Global<u8>; PORT_BITMAP] = [const { Global::new(0) }; PORT_BITMAP];
    #[unsafe(no_mangle)]
    static UDP_PORTS: [Global<u8>; PORT_BITMAP] = [const { Global::new(0) }; PORT_BITMAP];
    #[unsafe(no_mangle)]
    static DESTINATIONS: [Global<u128>; DESTINATIONS_MAX] =
        [const { Global::new(0) }; DESTINATIONS_MAX];

    /// For frames of several buffers: their headers are in the first.
    #[xdp(frags)]
    pub(crate) fn pullgate(ctx: XdpContext) -> u32 {
        xdp_action(&ctx)
    }

    /// For kernels before 5.18.
    #[xdp]
    pub(crate) fn pullgate_linear(ctx: XdpContext) -> u32 {
        xdp_action(&ctx)
    }

    /// For interfaces whose XDP hook another program holds.
    #[classifier]
    pub(crate) fn pullgate_tcx(ctx: TcContext) -> i32 {
        // Drivers leave as much as they like in further buffers.
        let wanted = ctx.len().min(PULLED);
        if ctx.data_end() - ctx.data() < wanted as usize {
            // If it fails there is less to look at, which is no way around us.
            let _shorter = ctx.pull_data(wanted);
        }
        let slot = counted(slot(&ctx).0);
        settle(&ctx, slot);
        if slot.is_drop() {
            TC_ACT_SHOT
        } else {
            TC_ACT_UNSPEC
        }
    }

    /// For test runs, which see no more of another program than its action.
    #[xdp]
    pub(crate) fn pullgate_slot(ctx: XdpContext) -> u32 {
        counted(slot(&ctx).0).0
    }

    #[inline(always)]
    fn xdp_action(ctx: &XdpContext) -> u32 {
        let (mut slot, flags) = slot(ctx);
        if has(SETTING_SYN_COOKIES) && slot.is_admitted() {
            if synack::is_syn(flags) {
                if answer(ctx.ctx) {
                    count(slot.answered());
                    return xdp_action::XDP_TX;
                }
            } else if ARMED.load() != 0 {
                slot = Slot(continued(ctx.ctx, slot.0));
            }
        }
        let slot = counted(slot);
        settle(ctx, slot);
        if slot.is_drop() {
            xdp_action::XDP_DROP
        } else {
            xdp_action::XDP_PASS
        }
    }

    /// Answers a SYN in the kernel's place if its listener's queue is full, which the kernel says itself: then it knows
    /// the cookie again. Else it goes the way of all others.
    #[expect(clippy::cast_possible_truncation, reason = "lengths of a frame")]
    #[cold]
    #[inline(never)]
    fn answer(ctx: *mut xdp_md) -> bool {
        let ctx = XdpContext::new(ctx);
        let packet = ctx.packet();
        let Some(segment) = Segment::find(&packet) else {
            return false;
        };
        let Some(syn) = segment.syn(&packet) else {
            return false;
        };
        let Some(port) = segment.port(&packet) else {
            return false;
        };
        let Some(cookie) = cookies::make(&ctx, &packet, syn) else {
            return false;
        };
        arm(port);
        let length = packet.end - packet.start;
        let change = syn.answer_length() as i32 - length as i32;
        // SAFETY: the context is the kernel's, and valid while the program runs.
        let is_refused = unsafe { bpf_xdp_adjust_tail(ctx.ctx, change) } != 0;
        !is_refused && turn(&mut ctx.packet(), syn, cookie).is_some()
    }

    /// What becomes of an admitted segment that is no SYN, while SYNs of its port are answered: it goes on with a
    /// connection, or begins one that a cookie was sent for, or there is none. A slot as a number, in and out.
    #[cold]
    #[inline(never)]
    fn continued(ctx: *mut xdp_md, slot: u32) -> u32 {
        let ctx = XdpContext::new(ctx);
        let packet = ctx.packet();
        let slot = Slot(slot);
        let Some(segment) = Segment::find(&packet) else {
            return slot.0;
        };
        let Some(port) = segment.port(&packet) else {
            return slot.0;
        };
        if !is_armed(port) {
            return slot.0;
        }
        let Some(flow) = segment.flow(&packet) else {
            return slot.0;
        };
        match cookies::check(&ctx, &packet, segment) {
            None | Some(Continued::Connection) => slot.0,
            Some(Continued::Cookie) => {
                begin(flow);
                slot.acknowledging().0
            }
            Some(Continued::Nothing) if has_begun(flow) => slot.0,
            Some(Continued::Nothing) => slot.unconnected().0,
        }
    }

    /// Notes a connection that begins: what follows in the same batch is judged before the kernel has its socket.
    #[inline(always)]
    fn begin(flow: u64) {
        if let Some(begun) = BEGUN.get_ptr_mut((flow >> BEGUN_SHIFT) as u32) {
            // SAFETY: the slot is this CPU's own, as the queue of a connection is, and the hook does not interrupt
            // itself.
            unsafe { *begun = flow & !TICKS | ticks() & TICKS };
        }
    }

    /// Whether a connection has begun a moment ago. No one is noted without a cookie.
    #[inline(always)]
    fn has_begun(flow: u64) -> bool {
        let Some(begun) = BEGUN.get((flow >> BEGUN_SHIFT) as u32) else {
            return false;
        };
        (*begun ^ flow) & !TICKS == 0 && ticks().wrapping_sub(*begun) & TICKS <= BEGUN_TICKS
    }

    /// Notes that SYNs of a port are answered; of several ports, the last.
    #[inline(always)]
    fn arm(port: u16) {
        let now = ticks() << ARMED_SHIFT | u64::from(port);
        if ARMED.load() != now {
            ARMED.store(now);
        }
    }

    /// Whether SYNs of a port were answered a moment ago. If none was for long, nothing is asked any more.
    #[inline(always)]
    fn is_armed(port: u16) -> bool {
        let armed = ARMED.load();
        // Another CPU may be a tick ahead.
        if ticks().saturating_sub(armed >> ARMED_SHIFT) > ARMED_TICKS {
            ARMED.store(0);
            return false;
        }
        armed & ((1 << ARMED_SHIFT) - 1) == u64::from(port)
    }

    /// About a second each, since the start.
    #[inline(always)]
    fn ticks() -> u64 {
        // SAFETY: it has no arguments.
        unsafe { bpf_ktime_get_ns() >> 30 }
    }

    /// Makes the answer in the frame.
    #[inline(always)]
    fn turn(packet: &mut Packet, syn: Syn, cookie: u32) -> Option<()> {
        let [v6_high, v6_low, v4_high, v4_low] = MSS.load().to_be_bytes();
        match syn.0 {
            Segment::V4 { ip } => {
                let mss = u16::from_be_bytes([v4_high, v4_low]);
                synack::answer_v4(packet.writable(ip)?, Answer { cookie, mss });
            }
            Segment::V6 { ip } => {
                let mss = u16::from_be_bytes([v6_high, v6_low]);
                synack::answer_v6(packet.writable(ip)?, Answer { cookie, mss });
            }
        }
        synack::turn_ethernet(packet.writable(0)?);
        Some(())
    }

    /// What the hooks' contexts have in common.
    trait Hook: EbpfContext + Sized {
        /// Where the packet's linear part begins and ends.
        ///
        /// Read again each time: a compiler that keeps them widens them where they are used, and the
        /// verifier forbids arithmetic with pointers to a packet's end.
        fn packet(&self) -> Packet;
        /// The index of the interface.
        fn interface(&self) -> u32;
        /// The context behind the kernel's pointer.
        fn new(pointer: *mut c_void) -> Self;
    }

    impl Hook for XdpContext {
        #[inline(always)]
        fn new(pointer: *mut c_void) -> Self {
            Self::new(pointer.cast())
        }

        #[inline(always)]
        fn packet(&self) -> Packet {
            // SAFETY: the context is the kernel's, and valid while the program runs.
            let ctx = unsafe { &*self.ctx };
            Packet::new(read(&ctx.data), read(&ctx.data_end))
        }

        #[inline(always)]
        fn interface(&self) -> u32 {
            // SAFETY: the context is the kernel's, and valid while the program runs.
            unsafe { (*self.ctx).ingress_ifindex }
        }
    }

    impl Hook for TcContext {
        #[inline(always)]
        fn new(pointer: *mut c_void) -> Self {
            Self::new(pointer.cast())
        }

        #[inline(always)]
        fn packet(&self) -> Packet {
            // SAFETY: the context is the kernel's, and valid while the program runs.
            let skb = unsafe { &*self.skb.skb };
            Packet::new(read(&skb.data), read(&skb.data_end))
        }

        #[inline(always)]
        fn interface(&self) -> u32 {
            // SAFETY: the context is the kernel's, and valid while the program runs.
            unsafe { (*self.skb.skb).ifindex }
        }
    }

    /// Reads a bound of the packet here and now.
    #[inline(always)]
    fn read(bound: &u32) -> u32 {
        // SAFETY: a reference is valid.
        unsafe { ptr::from_ref(bound).read_volatile() }
    }

    /// [`decide_nested`] by itself: the verifier walks it once, knowing nothing, and not behind every
    /// number of VLAN tags.
    // Cold, hence in the section of the program's other functions: aya finds callees in one only.
    #[expect(clippy::cast_possible_truncation, reason = "a slot stays one")]
    #[cold]
    #[inline(never)]
    fn nested<H: Hook>(ctx: *mut c_void) -> Slot {
        let ctx = H::new(ctx);
        let frame = Reread(&ctx);
        let Slot(slot) = decide_nested(&frame, &Loaded, &Published).slot();
        Slot(frame.forgotten(slot as usize) as u32)
    }

    /// Tells of every frame, in builds for debugging.
    #[inline(always)]
    #[cfg_attr(
        not(feature = "log"),
        expect(unused_variables, reason = "only builds for debugging say anything")
    )]
    fn log(ctx: &impl EbpfContext, slot: Slot) {
        #[cfg(feature = "log")]
        aya_log_ebpf::debug!(ctx, "a frame is counted in slot {}", slot.0);
    }

    /// Counts a packet, and samples it if it is dropped, or would be.
    #[inline(always)]
    fn settle<H: Hook>(ctx: &H, slot: Slot) {
        count(slot);
        log(ctx, slot);
        if slot.is_refused() {
            sample(ctx, slot);
        }
    }

    #[inline(always)]
    fn count(slot: Slot) {
        if let Some(counter) = COUNTERS.get_ptr_mut(slot.0) {
            // SAFETY: the slot is this CPU's own, and the hook does not interrupt itself.
            unsafe { *counter += 1 };
        }
    }

    /// The judgement of a packet, by the counter that is its own; and its flags, 0 unless they are plain to see.
    #[inline(always)]
    fn slot<H: Hook>(ctx: &H) -> (Slot, u8) {
        match decide_plain(&ctx.packet(), &Loaded, &Published) {
            Some((judgement, flags)) => (judgement.slot(), flags),
            None => (nested::<H>(ctx.as_ptr()), 0),
        }
    }

    /// The counter of a judgement: in monitor mode that of what would be dropped.
    #[inline(always)]
    fn counted(slot: Slot) -> Slot {
        if has(SETTING_MONITOR) {
            slot.monitored()
        } else {
            slot
        }
    }

    /// Reports a drop, as long as user space grants credit for it.
    #[inline(always)]
    fn sample(ctx: &impl Hook, slot: Slot) {
        let Some(credit) = SAMPLE_BUDGET.get_ptr_mut(0) else {
            return;
        };
        // SAFETY: the slot is this CPU's own; only user space writes it besides, and whole.
        let left = unsafe { *credit };
        if left == 0 {
            return;
        }
        // SAFETY: as above. A refill at this moment is lost, or outlives this report.
        unsafe { *credit = left - 1 };
        report(&ctx.packet(), slot, ctx.interface());
    }

    #[cold]
    #[inline(never)]
    fn report(packet: &Packet, slot: Slot, interface: u32) {
        // Full if there is no reader: then it is not missed.
        if let Some(mut event) = EVENTS.reserve(0) {
            let length = (packet.end - packet.start) as u64;
            let mut frame = [0; SNAPSHOT / 8];
            for (at, word) in (0..).step_by(8).zip(&mut frame) {
                let Some(bytes) = packet.bytes(at) else {
                    break;
                };
                *word = u64::from_ne_bytes(*bytes);
            }
            event.write(Event {
                slot: slot.0,
                interface,
                length,
                frame,
            });
            event.submit(0);
        }
    }

    /// [`abi::EVENT`] bytes.
    #[repr(C)]
    struct Event {
        slot: u32,
        interface: u32,
        length: u64,
        frame: [u64; SNAPSHOT / 8],
    }

    const _: () = assert!(size_of::<Event>() == EVENT);

    /// A word that the program writes, on any CPU. Each value is whole, and none depends on another.
    struct Shared(UnsafeCell<u64>);

    // SAFETY: it is read and written whole, by one instruction each.
    unsafe impl Sync for Shared {}

    impl Shared {
        #[inline(always)]
        fn load(&self) -> u64 {
            // SAFETY: it is aligned, and always a value.
            unsafe { self.0.get().read_volatile() }
        }

        #[inline(always)]
        fn store(&self, value: u64) {
            // SAFETY: as above.
            unsafe { self.0.get().write_volatile(value) };
        }
    }

    /// The linear part of a packet.
    struct Packet {
        start: usize,
        end: usize,
    }

    impl Packet {
        #[inline(always)]
        fn new(start: u32, end: u32) -> Self {
            Self {
                start: start as usize,
                end: end as usize,
            }
        }
    }

    impl Packet {
        /// [`Frame::bytes`], for as long as the program runs.
        #[inline(always)]
        fn outlived<'a, const N: usize>(&self, at: usize) -> Option<&'a [u8; N]> {
            let start = self.start + at;
            if start + N > self.end {
                return None;
            }
            // SAFETY: the bytes were just checked to lie inside the packet, which nothing else
            // writes to while the program runs; bytes need no alignment, and any are a value.
            Some(unsafe { &*(start as *const [u8; N]) })
        }
    }

    impl Packet {
        /// Bytes that are changed.
        #[inline(always)]
        fn writable<const N: usize>(&mut self, at: usize) -> Option<&mut [u8; N]> {
            let start = self.start + at;
            if start + N > self.end {
                return None;
            }
            // SAFETY: as above, and the packet is borrowed for as long as they are.
            Some(unsafe { &mut *(start as *mut [u8; N]) })
        }
    }

    impl Frame for Packet {
        #[inline(always)]
        fn bytes<const N: usize>(&self, at: usize) -> Option<&[u8; N]> {
            self.outlived(at)
        }
    }

    /// A packet whose bounds are read for every header, so that the verifier carries no pointer from
    /// one to the next.
    struct Reread<'a, C>(&'a C);

    impl<C: Hook> Frame for Reread<'_, C> {
        #[inline(always)]
        fn bytes<const N: usize>(&self, at: usize) -> Option<&[u8; N]> {
            self.0.packet().outlived(at)
        }

        #[inline(always)]
        fn forgotten(&self, number: usize) -> usize {
            // What user space writes there is below 2, which the verifier does not know. Of a sum or
            // a difference it would keep bounds, of an exclusive or it keeps none.
            number ^ (ACTIVE.load() >> 1) as usize
        }
    }

    /// The settings that the loader wrote into the read-only globals.
    struct Loaded;

    /// Whether a flag is set. The verifier knows the answer, and drops the branch that is not taken.
    #[inline(always)]
    fn has(flag: u32) -> bool {
        SETTINGS.load() & flag != 0
    }

    impl Settings for Loaded {
        #[inline(always)]
        fn protects_tcp(&self, port: u16) -> bool {
            bit(&TCP_PORTS, port)
        }

        #[inline(always)]
        fn protects_udp(&self, port: u16) -> bool {
            has(SETTING_UDP) && bit(&UDP_PORTS, port)
        }

        #[inline(always)]
        fn protects_some_udp(&self) -> bool {
            has(SETTING_UDP)
        }

        #[inline(always)]
        fn protects_destination(&self, address: IpAddr) -> bool {
            let count = (SETTINGS.load() >> SETTING_DESTINATIONS_SHIFT) as usize;
            if count == 0 {
                return true;
            }
            let address = match address {
                IpAddr::V4(address) => address.to_ipv6_mapped(),
                IpAddr::V6(address) => address,
            };
            DESTINATIONS
                .iter()
                .take(count)
                .any(|destination| destination.load() == address.to_bits())
        }

        #[inline(always)]
        fn fragments_pass(&self) -> bool {
            has(SETTING_FRAGMENTS_PASS)
        }
    }

    #[inline(always)]
    fn bit(bitmap: &[Global<u8>; PORT_BITMAP], port: u16) -> bool {
        let byte = port >> 3 & PORT_BYTES.load();
        bitmap[usize::from(byte)].load() & 1 << (port & 7) != 0
    }

    /// The range maps, in the generation that `ACTIVE` names.
    struct Published;

    impl Ranges for Published {
        #[inline(always)]
        fn class(&self, address: IpAddr) -> Class {
            // Read once, so that the whole lookup stays in one generation.
            let generation = (ACTIVE.load() & 1) as u32;
            table::lookup(&Generation(generation), address)
        }
    }

    /// One generation of the range maps.
    struct Generation(u32);

    impl Table for Generation {
        #[inline(always)]
        fn v4(&self) -> impl Tree {
            Map(&RANGES_V4, self.0)
        }

        #[inline(always)]
        fn v6(&self) -> impl Tree {
            Map(&RANGES_V6, self.0)
        }

        #[inline(always)]
        fn walk_v6_tail(&self, entry: u16, Tail { high, low }: Tail) -> u16 {
            walk_v6_tail(self.0, entry, high, low)
        }
    }

    /// Out of the way of all the packets that need it not, whose registers it would take.
    #[cold]
    #[inline(never)]
    fn walk_v6_tail(generation: u32, entry: u16, high: u64, low: u64) -> u16 {
        table::walk_tail(&Map(&RANGES_V6, generation), entry, Tail { high, low })
    }

    /// A family's nodes, both generations.
    type Nodes = Array<Chunk, { (GENERATIONS * NODES) as usize / CHUNK as usize }>;

    /// A family's nodes, and the generation to read.
    struct Map(&'static Nodes, u32);

    impl Tree for Map {
        #[inline(always)]
        fn node(&self, number: u16) -> Option<&Node> {
            let chunk = self.0.get(abi::chunk_index(number, self.1))?;
            // A node, and then an entry, not an index made of both: before Linux 6.10 the verifier knows no
            // bounds of `a | b` (it forgets them in `reg |= reg`), and refuses the program. Only a load on
            // such a kernel proves that the compiler has kept them apart.
            let (nodes, _) = chunk.as_chunks::<{ size_of::<Node>() / size_of::<u16>() }>();
            Some(&nodes[usize::from(number % CHUNK)])
        }
    }

    /// Where the ticks stand in [`ARMED`].
    const ARMED_SHIFT: u32 = 16;
    /// How long after the last answer segments of no connection are dropped: longer than an acknowledgement is on its
    /// way.
    const ARMED_TICKS: u64 = 15;

    /// The highest bits of a flow are where it is noted.
    const BEGUN_SHIFT: u32 = 64 - 8;
    /// The lowest are the ticks, when it was.
    const TICKS: u64 = 0xffff;
    /// How long a connection is one that begins.
    const BEGUN_TICKS: u64 = 2;

    /// Bytes that the classifier looks at.
    const PULLED: u32 = 256;

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}
