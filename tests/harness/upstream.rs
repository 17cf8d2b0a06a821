//! An upstream of the tests' own, which answers with what it received: it reads the PROXY header by the
//! letter of the specification, with no code of the gate's.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use pullgate::config::{Config, HostSettings};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

use crate::eventually;
use crate::net::{Host, Network};
use crate::pairing::Pairing;
use crate::web::ADDRESS;

/// What to do with a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Manner {
    /// Read a PROXY header, if there is one, and a request; answer with what was received, as JSON.
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

/// A listener on the origin's loopback, and where connections are steered past it one on 443, in
/// TLS; it stops when dropped.
pub struct Upstream {
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicU64>,
    serving: Vec<(SocketAddr, JoinHandle<()>)>,
    network: Arc<Network>,
}

impl Upstream {
    /// Starts to listen at [`ADDRESS`], and at 443 if the gate does not.
    #[must_use]
    pub fn start(network: &Arc<Network>, manner: Manner) -> Self {
        let mut upstream = Self {
            stop: Arc::default(),
            accepted: Arc::default(),
            serving: Vec::new(),
            network: Arc::clone(network),
        };
        upstream.listen(ADDRESS, manner, None);
        if Pairing::of_this_run().steers() {
            let shown = Arc::new(ConfiguredCertificates::new(network.path("pullgate.toml")));
            let provider = rustls::crypto::aws_lc_rs::default_provider();
            let config = ServerConfig::builder_with_provider(Arc::new(provider))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_cert_resolver(shown);
            upstream.listen("[::]:443", manner, Some(&Arc::new(config)));
        }
        upstream
    }

    fn listen(&mut self, address: &str, manner: Manner, tls: Option<&Arc<ServerConfig>>) {
        // One that was here before lives on for a moment in a process that another test forks.
        let listener = eventually("the upstream's port is free", || {
            self.network
                .on(Host::Origin, || TcpListener::bind(address).ok())
        });
        let mut address = listener.local_addr().unwrap();
        if address.ip().is_unspecified() {
            address.set_ip(Ipv6Addr::LOCALHOST.into());
        }
        let (stopped, count) = (Arc::clone(&self.stop), Arc::clone(&self.accepted));
        let tls = tls.cloned();
        let serving = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                count.fetch_add(1, Ordering::Relaxed);
                let (stream, tls) = (stream.unwrap(), tls.clone());
                std::thread::spawn(move || {
                    // A peer that hangs up has seen enough.
                    drop(serve(stream, manner, tls));
                });
            }
        });
        self.serving.push((address, serving));
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
        for (address, serving) in self.serving.drain(..) {
            // The accept that waits.
            self.network
                .on(Host::Origin, || TcpStream::connect(address).ok());
            drop(serving.join());
        }
    }
}

/// What a web server shows that has the same files as the gate: the first certificate that the
/// configuration has for a name. What cannot be read is as it was before.
#[derive(Debug)]
struct ConfiguredCertificates {
    config: PathBuf,
    read: Mutex<ReadFiles>,
}

#[derive(Debug, Default)]
struct ReadFiles {
    hosts: Vec<HostSettings>,
    /// By the path of the certificate.
    keys: HashMap<PathBuf, Arc<CertifiedKey>>,
}

impl ConfiguredCertificates {
    /// Reads what there is already.
    fn new(config: PathBuf) -> Self {
        let mut read = ReadFiles::default();
        read.renew(&config);
        Self {
            config,
            read: Mutex::new(read),
        }
    }
}

impl ReadFiles {
    fn renew(&mut self, config: &Path) {
        let text = std::fs::read_to_string(config).unwrap_or_default();
        let parsed = Config::parse(config, &text).ok();
        if let Some(gate) = parsed.and_then(|config| config.live.gate) {
            self.hosts = gate.hosts;
        }
        for host in &self.hosts {
            let [shown, ..] = host.certificates.as_slice() else {
                continue;
            };
            let certificate = &shown.certificate.value;
            if let Some(key) = certified(certificate, &shown.key.value) {
                self.keys.insert(certificate.clone(), key);
            }
        }
    }

    /// The host of a name: exactly, by a wildcard, or by default.
    fn host(&self, name: &str) -> Option<&HostSettings> {
        let having = |name: &str| {
            let mut hosts = self.hosts.iter();
            hosts.find(|host| host.names.iter().any(|it| it.value.to_string() == name))
        };
        let wildcard = name.split_once('.').map(|(_, rest)| format!("*.{rest}"));
        let otherwise = || self.hosts.iter().find(|host| host.is_default);
        having(name)
            .or_else(|| having(&wildcard?))
            .or_else(otherwise)
    }
}

impl ResolvesServerCert for ConfiguredCertificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut read = self.read.lock().unwrap();
        read.renew(&self.config);
        let host = read.host(hello.server_name().unwrap_or_default())?;
        let shown = &host.certificates.first()?.certificate.value;
        read.keys.get(shown).cloned()
    }
}

fn certified(certificate: &Path, key: &Path) -> Option<Arc<CertifiedKey>> {
    let chain = CertificateDer::pem_file_iter(certificate).ok()?;
    let chain = chain.collect::<Result<Vec<_>, _>>().ok()?;
    let key = any_supported_type(&PrivateKeyDer::from_pem_file(key).ok()?).ok()?;
    let certified = CertifiedKey::new(chain, key);
    certified.keys_match().is_ok().then(|| Arc::new(certified))
}

/// A connection whose sending side can be closed alone.
trait Stream: Read + Write {
    fn shut_down(&mut self) -> io::Result<()>;
}

impl Stream for TcpStream {
    fn shut_down(&mut self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Stream for StreamOwned<ServerConnection, TcpStream> {
    fn shut_down(&mut self) -> io::Result<()> {
        self.conn.send_close_notify();
        self.flush()?;
        self.sock.shutdown(Shutdown::Write)
    }
}

fn serve(stream: TcpStream, manner: Manner, tls: Option<Arc<ServerConfig>>) -> io::Result<()> {
    stream.set_read_timeout(Some(crate::PATIENCE))?;
    match tls {
        None => act(stream, manner, ProxyHeader::read),
        Some(config) => {
            let connection = ServerConnection::new(config).map_err(io::Error::other)?;
            // By default none is sent to a web server that keeps the port.
            let none = |_: &mut _| Ok(ProxyHeader::default());
            act(StreamOwned::new(connection, stream), manner, none)
        }
    }
}

fn act<S: Stream>(
    mut stream: S,
    manner: Manner,
    read_header: impl Fn(&mut S) -> io::Result<ProxyHeader>,
) -> io::Result<()> {
    match manner {
        Manner::Answer => {
            let mut header = read_header(&mut stream)?;
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
            )?;
            stream.shut_down()
        }
        Manner::Hang => {
            let mut sink = [0; 4096];
            while stream.read(&mut sink)? > 0 {}
            Ok(())
        }
        Manner::Close => Ok(()),
        Manner::HalfClose => {
            read_header(&mut stream)?;
            stream.write_all(b"early")?;
            stream.shut_down()?;
            let mut all = Vec::new();
            stream.read_to_end(&mut all)?;
            Ok(())
        }
        Manner::TooLarge => {
            let mut beginning = [0; 100];
            stream.read_exact(&mut beginning)?;
            stream.write_all(b"HTTP/1.1 413 Payload Too Large\r\nConnection: close\r\n\r\n")?;
            stream.flush()
        }
        Manner::Echo => {
            let header = read_header(&mut stream)?;
            stream.write_all(&header.rest)?;
            let mut buffer = [0; 16 << 10];
            loop {
                let read = stream.read(&mut buffer)?;
                if read == 0 {
                    return stream.shut_down();
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
    fn read(stream: &mut impl Read) -> io::Result<Self> {
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
