//! A flood of SYNs with Cloudflare's addresses, which another host forges, the way that their answers take, and edges
//! that mean it.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use filter_ebpf::cases::Packet;

use crate::net::{DIRECT, Host, Network};
use crate::traffic::{Objects, Traffic};

/// What drops the answers, for as long as it lives.
pub struct Forger {
    _sink: Objects,
}

impl Forger {
    /// Leads the answers to the sender's end of [`DIRECT`], where they are dropped. A pair's program sends only where
    /// the other end has one (`veth_xdp_xmit`, drivers/net/veth.c).
    #[must_use]
    pub fn new(network: &Network) -> Self {
        let gateway = Host::Stranger
            .mac()
            .map(|byte| format!("{byte:02x}"))
            .join(":");
        for words in [
            format!("addr add 192.0.2.1/30 dev {DIRECT}"),
            format!("neigh add 192.0.2.2 lladdr {gateway} dev {DIRECT} nud permanent"),
            format!("route add {RANGE} via 192.0.2.2 dev {DIRECT}"),
        ] {
            let words: Vec<_> = ["ip"].into_iter().chain(words.split(' ')).collect();
            let output = network.output(Host::Origin, &words);
            assert!(output.status.success(), "{words:?}: {output:?}");
        }
        Self {
            _sink: network.dropping_all(Host::Stranger, DIRECT),
        }
    }

    /// Begins to send SYNs to the origin's port 443, as fast as one thread can.
    #[must_use]
    pub fn flood(&self, network: &Network) -> Traffic {
        Traffic::forge(network, Host::Stranger, DIRECT, Self::syn())
    }

    /// One of the SYNs; the last two octets of its source are others each time.
    #[must_use]
    pub fn syn() -> Vec<u8> {
        let [origin, _] = Host::Origin.addresses();
        let syn = Packet::tcp(SOURCE.parse().unwrap(), origin, 443).tcp_options(&[2, 4, 5, 0xb4]);
        syn.between(Network::direct_mac(), Host::Stranger.mac())
            .build()
    }
}

/// A connection to the gate, from this thread's network: how long it takes until the gate answers. An empty
/// ClientHello gets an alert, which only a connection that is accepted can bring.
///
/// # Errors
///
/// Returns what ended it.
pub fn visit() -> io::Result<Duration> {
    let [origin, _] = Host::Origin.addresses();
    let begun = Instant::now();
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((origin, 443)), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"\x16\x03\x01\0\x04\x01\0\0\0")?;
    stream.read_exact(&mut [0; 7])?;
    Ok(begun.elapsed())
}

/// How long a visit may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// One of Cloudflare's, with an address of it.
const RANGE: &str = "104.16.0.0/13";
const SOURCE: &str = "104.16.0.1";
