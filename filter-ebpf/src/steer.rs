//! The `sk_lookup` program: what the kernel asks it, and the gate's socket as its answer.
//!
//! No rules here; they are in the library.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(not(target_arch = "bpf"))]
fn main() -> std::process::ExitCode {
    // The kernel loads this program; on the host there is nothing to run.
    std::process::ExitCode::FAILURE
}

#[cfg(target_arch = "bpf")]
mod program {
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    use core::ptr;

    use aya_ebpf::Global;
    use aya_ebpf::bindings::sk_action;
    use aya_ebpf::btf_maps::SockMap;
    use aya_ebpf::macros::{btf_map, sk_lookup};
    use aya_ebpf::programs::SkLookupContext;
    use filter_ebpf::abi::{
        DESTINATIONS_MAX, PORT_BITMAP, SETTING_DESTINATIONS_SHIFT, SOCKET_SLOTS, SOCKET_V4,
        SOCKET_V6,
    };
    use filter_ebpf::steering::{Connection, SteerSettings, is_steered};

    #[btf_map]
    static GATE_SOCKETS: SockMap<SOCKET_SLOTS> = SockMap::new();

    #[unsafe(no_mangle)]
    static SETTINGS: Global<u32> = Global::new(0);
    #[unsafe(no_mangle)]
    static TCP_PORTS: [Global<u8>; PORT_BITMAP] = [const { Global::new(0) }; PORT_BITMAP];
    #[unsafe(no_mangle)]
    static DESTINATIONS: [Global<u128>; DESTINATIONS_MAX] =
        [const { Global::new(0) }; DESTINATIONS_MAX];

    /// Assigns a connection to the gate's socket, if it is the gate's. Where there is no socket, the
    /// connection is refused: no listening socket of others is looked for.
    #[sk_lookup]
    #[expect(
        clippy::needless_pass_by_value,
        reason = "the macro passes the context by value"
    )]
    pub(crate) fn pullgate_steer(ctx: SkLookupContext) -> u32 {
        let Some((connection, slot)) = connection(&ctx) else {
            return sk_action::SK_PASS;
        };
        if !is_steered(&connection, &Loaded) {
            return sk_action::SK_PASS;
        }
        // Whatever a program before ours has chosen.
        match GATE_SOCKETS.redirect_sk_lookup(&ctx, slot, REPLACE) {
            Ok(()) => sk_action::SK_PASS,
            Err(_none) => sk_action::SK_DROP,
        }
    }

    /// The connection, and where the gate's socket for its family is; none of protocols but TCP.
    #[inline(always)]
    fn connection(ctx: &SkLookupContext) -> Option<(Connection, u32)> {
        // SAFETY: the context is the kernel's, and valid while the program runs.
        let lookup = unsafe { &*ctx.lookup };
        if read(&lookup.protocol) != TCP {
            return None;
        }
        let [low, high, ..] = read(&lookup.local_port).to_le_bytes();
        let port = u16::from_le_bytes([low, high]);
        let (client, local, slot) = match read(&lookup.family) {
            AF_INET => (v4(&lookup.remote_ip4), v4(&lookup.local_ip4), SOCKET_V4),
            AF_INET6 => (v6(&lookup.remote_ip6), v6(&lookup.local_ip6), SOCKET_V6),
            _ => return None,
        };
        let connection = Connection {
            client,
            local,
            port,
        };
        Some((connection, slot))
    }

    #[inline(always)]
    fn v4(address: &u32) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from_octets(read(address).to_ne_bytes()))
    }

    #[inline(always)]
    fn v6(address: &[u32; 4]) -> IpAddr {
        let words = [0, 1, 2, 3].map(|index| read(&address[index]).to_ne_bytes());
        let [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]] = words;
        IpAddr::V6(Ipv6Addr::from_octets([
            a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p,
        ]))
    }

    /// Reads a word by itself: of the context, the kernel lets programs load single words alone.
    #[inline(always)]
    fn read(word: &u32) -> u32 {
        // SAFETY: a reference is valid.
        unsafe { ptr::from_ref(word).read_volatile() }
    }

    /// The settings that the loader wrote into the read-only globals.
    struct Loaded;

    impl SteerSettings for Loaded {
        #[inline(always)]
        fn steers_port(&self, port: u16) -> bool {
            TCP_PORTS[usize::from(port >> 3)].load() & 1 << (port & 7) != 0
        }

        #[inline(always)]
        fn steers_address(&self, address: IpAddr) -> bool {
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
    }

    /// include/uapi/linux/in.h, and the kernel's address families.
    const TCP: u32 = 6;
    const AF_INET: u32 = 2;
    const AF_INET6: u32 = 10;
    /// `BPF_SK_LOOKUP_F_REPLACE`, include/uapi/linux/bpf.h.
    const REPLACE: u64 = 1;

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}
