//! An upstream of the tests' own, which tells what it was told: it reads the PROXY header by the
//! letter of the specification, with no code of the gate's.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use serde_json::{Value, json};

use crate::eventually;
use crate::net::{Host, Network};
use crate::web::ADDRESS;

/// What to do with a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Manner {
    /// Read a PROXY header, if there is one, and a request; answer what was told, as JSON.
    Answer,
    /// Take it, and say nothing.
    Hang,
    /// Close at once.
    Close,
    /// Answer at once, close that side, and go on reading to the end.
    HalfClose,
    /// Answer 413 to the beginning of a request, and close without reading the rest.
    TooLarge,
    /// Send back what comes, to its end.
    Echo,
    /// Send without end.
    Flood,
}

/// A listener on the origin's loopback; it stops when dropped.
pub struct Upstream {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicU64>,
    serving: Option<JoinHandle<()>>,
    network: Arc<Network>,
}

impl Upstream {
    /// Starts to listen at [`ADDRESS`].
    #[must_use]
    pub fn start(network: &Arc<Network>, manner: Manner) -> Self {
        // One that was here before lives on for a moment in a process that another test forks.
        let listener = eventually("the upstream's port is free", || {
            network.on(Host::Origin, || TcpListener::bind(ADDRESS).ok())
        });
        let address = listener.local_addr().unwrap();
        let (stop, accepted) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&accepted));
        let serving = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                count.fetch_add(1, Ordering::Relaxed);
                let stream = stream.unwrap();
                std::thread::spawn(move || {
                    // Whoever hangs up has seen enough.
                    drop(serve(stream, manner));
                });
            }
        });
        Self {
            address,
            stop,
            accepted,
            serving: Some(serving),
            network: Arc::clone(network),
        }
    }

    /// Connections so far.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let address = self.address;
        // The accept that waits.
        self.network
            .on(Host::Origin, || TcpStream::connect(address).ok());
        if let Some(serving) = self.serving.take() {
            drop(serving.join());
        }
    }
}

fn serve(mut stream: TcpStream, manner: Manner) -> io::Result<()> {
    stream.set_read_timeout(Some(crate::PATIENCE))?;
    match manner {
        Manner::Answer => {
            let mut header = ProxyHeader::read(&mut stream)?;
            while !header.rest.windows(4).any(|window| window == b"\r\n\r\n") {
                let mut more = [0; 4096];
                let read = stream.read(&mut more)?;
                if read == 0 {
                    return Ok(());
                }
                header.rest.extend(&more[..read]);
            }
            let body = format!("{}\n", header.json());
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            )
        }
        Manner::Hang => {
            let mut sink = [0; 4096];
            while stream.read(&mut sink)? > 0 {}
            Ok(())
        }
        Manner::Close => Ok(()),
        Manner::HalfClose => {
            ProxyHeader::read(&mut stream)?;
            stream.write_all(b"early")?;
            stream.shutdown(Shutdown::Write)?;
            let mut all = Vec::new();
            stream.read_to_end(&mut all)?;
            Ok(())
        }
        Manner::TooLarge => {
            let mut beginning = [0; 100];
            stream.read_exact(&mut beginning)?;
            stream.write_all(b"HTTP/1.1 413 Payload Too Large\r\nConnection: close\r\n\r\n")
        }
        Manner::Echo => {
            let header = ProxyHeader::read(&mut stream)?;
            stream.write_all(&header.rest)?;
            let mut buffer = [0; 16 << 10];
            loop {
                let read = stream.read(&mut buffer)?;
                if read == 0 {
                    return stream.shutdown(Shutdown::Write);
                }
                stream.write_all(&buffer[..read])?;
            }
        }
        Manner::Flood => loop {
            stream.write_all(&[b'x'; 64 << 10])?;
        },
    }
}

/// What a PROXY header says.
#[derive(Default)]
struct ProxyHeader {
    version: u8,
    client: String,
    local: String,
    /// By type, also those within the one for SSL, as 0x2021 and so on.
    tlvs: BTreeMap<u16, Vec<u8>>,
    /// What came behind it.
    rest: Vec<u8>,
}

impl ProxyHeader {
    fn read(stream: &mut TcpStream) -> io::Result<Self> {
        let mut bytes = vec![0; 16];
        stream.read_exact(&mut bytes)?;
        if bytes.starts_with(b"\r\n\r\n\0\r\nQUIT\n") {
            let length = usize::from(u16::from_be_bytes([bytes[14], bytes[15]]));
            let mut payload = vec![0; length];
            stream.read_exact(&mut payload)?;
            return Ok(Self::version_two(bytes[13], &payload));
        }
        if !bytes.starts_with(b"PROXY ") {
            return Ok(Self {
                rest: bytes,
                ..Self::default()
            });
        }
        while !bytes.ends_with(b"\r\n") {
            let mut one = [0];
            stream.read_exact(&mut one)?;
            bytes.push(one[0]);
        }
        let line = String::from_utf8_lossy(&bytes).into_owned();
        let words: Vec<_> = line.split_whitespace().collect();
        let end = |ip: usize, port: usize| format!("{} {}", words[ip], words[port]);
        Ok(Self {
            version: 1,
            client: end(2, 4),
            local: end(3, 5),
            ..Self::default()
        })
    }

    fn version_two(family: u8, payload: &[u8]) -> Self {
        let port = |at: usize| u16::from_be_bytes([payload[at], payload[at + 1]]);
        let (client, local, mut rest) = match family {
            0x11 => {
                let ip = |at: usize| {
                    let octets: [u8; 4] = payload[at..at + 4].try_into().unwrap();
                    IpAddr::from(Ipv4Addr::from(octets))
                };
                let (client, local) = (format!("{} {}", ip(0), port(8)), ip(4));
                (client, format!("{local} {}", port(10)), &payload[12..])
            }
            0x21 => {
                let ip = |at: usize| {
                    let octets: [u8; 16] = payload[at..at + 16].try_into().unwrap();
                    IpAddr::from(Ipv6Addr::from(octets))
                };
                let (client, local) = (format!("{} {}", ip(0), port(32)), ip(16));
                (client, format!("{local} {}", port(34)), &payload[36..])
            }
            _ => (String::new(), String::new(), payload),
        };
        let mut tlvs = BTreeMap::new();
        let mut take = |rest: &mut &[u8], within: u16| {
            let length = usize::from(u16::from_be_bytes([rest[1], rest[2]]));
            let kind = within << 8 | u16::from(rest[0]);
            tlvs.insert(kind, rest[3..3 + length].to_vec());
            *rest = &rest[3 + length..];
            (kind, tlvs[&kind].clone())
        };
        while !rest.is_empty() {
            let (kind, value) = take(&mut rest, 0);
            if kind == 0x20 {
                let mut inner = &value[5..];
                while !inner.is_empty() {
                    take(&mut inner, 0x20);
                }
            }
        }
        Self {
            version: 2,
            client,
            local,
            tlvs,
            rest: Vec::new(),
        }
    }

    fn json(&self) -> Value {
        let text = |value: &[u8]| value.escape_ascii().to_string();
        let tlvs = self.tlvs.iter();
        let tlvs: BTreeMap<_, _> = tlvs
            .map(|(kind, value)| (format!("{kind:#x}"), text(value)))
            .collect();
        json!({
            "version": self.version,
            "client": self.client,
            "local": self.local,
            "tlvs": tlvs,
        })
    }
}
