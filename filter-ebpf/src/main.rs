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
mod program {
    use core::net::{IpAddr, Ipv6Addr};

    use aya_ebpf::Global;
    use aya_ebpf::bindings::xdp_action;
    use aya_ebpf::btf_maps::lpm_trie::Key;
    use aya_ebpf::btf_maps::{Array, LpmTrie, PerCpuArray};
    use aya_ebpf::macros::{btf_map, xdp};
    use aya_ebpf::programs::XdpContext;
    use filter_ebpf::abi::{
        DEEP_ENTRIES, DEEP_KEY, DEEP_KEY_BITS, DESTINATIONS_MAX, GENERATIONS, NODES, PORT_BITMAP,
        SETTING_DESTINATIONS_SHIFT, SETTING_FRAGMENTS_PASS, SETTING_MONITOR, SETTING_UDP,
    };
    use filter_ebpf::table::{self, ABSENT, Class, Node, Table, Tree};
    use filter_ebpf::{Frame, Ranges, Settings, Verdict, decide, verdict};

    #[btf_map]
    static ACTIVE: Array<u32, 1> = Array::new();
    #[btf_map]
    static COUNTERS: PerCpuArray<u64, { verdict::COUNTERS }> = PerCpuArray::new();
    #[btf_map]
    static RANGES_V4: Nodes = Array::new();
    #[btf_map]
    static RANGES_V6: Nodes = Array::new();
    #[btf_map]
    static DEEP_V6: LpmTrie<[u8; DEEP_KEY], u8, { DEEP_ENTRIES as usize }> = LpmTrie::new();

    #[unsafe(no_mangle)]
    static SETTINGS: Global<u32> = Global::new(0);
    #[unsafe(no_mangle)]
    static TCP_PORTS: [Global<u8>; PORT_BITMAP] = [const { Global::new(0) }; PORT_BITMAP];
    #[unsafe(no_mangle)]
    static UDP_PORTS: [Global<u8>; PORT_BITMAP] = [const { Global::new(0) }; PORT_BITMAP];
    #[unsafe(no_mangle)]
    static DESTINATIONS: [Global<u128>; DESTINATIONS_MAX] =
        [const { Global::new(0) }; DESTINATIONS_MAX];

    #[xdp]
    #[expect(
        clippy::needless_pass_by_value,
        reason = "the macro passes the context by value"
    )]
    pub(crate) fn pullgate(ctx: XdpContext) -> u32 {
        let settings = Loaded(SETTINGS.load());
        let verdict = decide(&Packet(&ctx), &settings, &Published);

        let monitor = settings.has(SETTING_MONITOR);
        if let Some(counter) = COUNTERS.get_ptr_mut(verdict.counter_index(monitor)) {
            // SAFETY: the slot is this CPU's own, and XDP does not interrupt itself on one CPU.
            unsafe { *counter += 1 };
        }

        match verdict {
            Verdict::Drop(_) if !monitor => xdp_action::XDP_DROP,
            Verdict::Drop(_) | Verdict::Pass(_) => xdp_action::XDP_PASS,
        }
    }

    struct Packet<'a>(&'a XdpContext);

    impl Packet<'_> {
        #[inline(always)]
        fn read<T: Copy>(&self, at: usize) -> Option<T> {
            let start = self.0.data() + at;
            if start + size_of::<T>() > self.0.data_end() {
                return None;
            }
            // SAFETY: the bytes were just checked to lie inside the frame, and the read makes no
            // assumption of alignment. `T` is an integer below, so any bytes are a value.
            Some(unsafe { (start as *const T).read_unaligned() })
        }
    }

    impl Frame for Packet<'_> {
        #[inline(always)]
        fn u8(&self, at: usize) -> Option<u8> {
            self.read(at)
        }
        #[inline(always)]
        fn u16(&self, at: usize) -> Option<u16> {
            self.read(at).map(u16::from_be)
        }
        #[inline(always)]
        fn u32(&self, at: usize) -> Option<u32> {
            self.read(at).map(u32::from_be)
        }
    }

    /// The settings that the loader wrote into the read-only globals; holds the flags.
    struct Loaded(u32);

    impl Loaded {
        #[inline(always)]
        fn has(&self, flag: u32) -> bool {
            self.0 & flag != 0
        }
    }

    impl Settings for Loaded {
        #[inline(always)]
        fn protects_tcp(&self, port: u16) -> bool {
            bit(&TCP_PORTS, port)
        }

        #[inline(always)]
        fn protects_udp(&self, port: u16) -> bool {
            self.has(SETTING_UDP) && bit(&UDP_PORTS, port)
        }

        #[inline(always)]
        fn protects_destination(&self, address: IpAddr) -> bool {
            let count = (self.0 >> SETTING_DESTINATIONS_SHIFT) as usize;
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
            self.has(SETTING_FRAGMENTS_PASS)
        }
    }

    #[inline(always)]
    fn bit(bitmap: &[Global<u8>; PORT_BITMAP], port: u16) -> bool {
        bitmap[usize::from(port >> 3)].load() & 1 << (port & 7) != 0
    }

    /// The range maps, in the generation that `ACTIVE` names.
    struct Published;

    impl Ranges for Published {
        #[inline(always)]
        fn class(&self, address: IpAddr) -> Class {
            // Read once, so that the whole lookup stays in one generation.
            let generation = ACTIVE.get(0).map_or(0, |generation| *generation & 1);
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
        fn deep(&self, address: Ipv6Addr) -> u16 {
            let mut key = [0; DEEP_KEY];
            let [first, rest @ ..] = &mut key;
            *first = u8::from(self.0 == 1);
            rest.copy_from_slice(&address.octets());
            DEEP_V6
                .get(&Key::new(DEEP_KEY_BITS, key))
                .map_or(ABSENT, |class| u16::from(*class))
        }
    }

    /// A family's nodes, both generations.
    type Nodes = Array<Node, { (GENERATIONS * NODES) as usize }>;

    /// A family's nodes, and the generation to read.
    struct Map(&'static Nodes, u32);

    impl Tree for Map {
        #[inline(always)]
        fn entry(&self, node: u16, index: u8) -> u16 {
            self.0
                .get(self.1 * NODES + u32::from(node))
                .map_or(ABSENT, |node| node[usize::from(index)])
        }
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}
