//! Which connections are the gate's: the addresses of a connection in, yes or no out.
//!
//! The kernel asks for every connection to a port that has no connection of these addresses yet, before
//! it looks for a listening socket (`BPF_PROG_TYPE_SK_LOOKUP`, Linux 5.9).

use core::net::IpAddr;

/// A connection that begins, as the host sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Connection {
    /// The client's address.
    pub client: IpAddr,
    /// The address that the client connects to.
    pub local: IpAddr,
    /// The TCP port that the client connects to.
    pub port: u16,
}

/// What is steered.
pub trait SteerSettings {
    /// Whether connections to this TCP port are.
    fn steers_port(&self, port: u16) -> bool;
    /// Whether connections to this address of the host are.
    fn steers_address(&self, address: IpAddr) -> bool;
}

/// Whether a connection is assigned to the gate's socket.
///
/// Never one from or to loopback: by these the gate itself reaches the web server, from 127.0.0.1 or, as
/// its client, at 127.0.0.1; and so does whatever runs on this host. No client elsewhere has or reaches
/// such an address (RFC 1122 §3.2.1.3, RFC 4291 §2.5.3; `ip_route_input_slow` and `ip6_rcv_core` drop it).
/// Nor one that an address of this host opens to itself, for the same reason.
#[inline(always)]
pub fn is_steered(connection: &Connection, settings: &impl SteerSettings) -> bool {
    let Connection {
        client,
        local,
        port,
    } = connection;
    settings.steers_port(*port)
        && !client.is_loopback()
        && !local.is_loopback()
        && client != local
        && settings.steers_address(*local)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 443 of one address a family.
    struct Some443;

    impl SteerSettings for Some443 {
        fn steers_port(&self, port: u16) -> bool {
            port == 443
        }

        fn steers_address(&self, address: IpAddr) -> bool {
            [[203, 0, 113, 10].into(), ip("2001:db8:a::10")].contains(&address)
                || address.is_loopback()
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn what_comes_from_elsewhere_to_a_steered_port_and_address_is_the_gates() {
        for (client, local, port, expected) in [
            ("173.245.48.5", "203.0.113.10", 443, true),
            ("198.51.100.7", "203.0.113.10", 443, true),
            ("2400:cb00::5", "2001:db8:a::10", 443, true),
            ("173.245.48.5", "203.0.113.10", 80, false),
            ("173.245.48.5", "203.0.113.10", 22, false),
            ("173.245.48.5", "203.0.113.11", 443, false),
            ("2400:cb00::5", "2001:db8:a::11", 443, false),
            // From this host, and to the web server in the client's name.
            ("127.0.0.1", "203.0.113.10", 443, false),
            ("127.9.9.9", "127.0.0.1", 443, false),
            ("::1", "2001:db8:a::10", 443, false),
            ("173.245.48.5", "127.0.0.1", 443, false),
            ("2400:cb00::5", "::1", 443, false),
            ("203.0.113.10", "203.0.113.10", 443, false),
            ("2001:db8:a::10", "2001:db8:a::10", 443, false),
        ] {
            let connection = Connection {
                client: ip(client),
                local: ip(local),
                port,
            };
            assert_eq!(
                is_steered(&connection, &Some443),
                expected,
                "{connection:?}"
            );
        }
    }
}
