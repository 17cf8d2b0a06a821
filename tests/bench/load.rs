//! The load: TLS clients on rustls, in the edge's namespace, whose CPU time is not counted.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, HandshakeKind, RootCertStore};
use tests::pki::{Identity, Pki, SHOP};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Clients with the certificate that the proxies demand.
pub(crate) struct Load {
    runtime: Runtime,
    config: ClientConfig,
}

/// An open connection.
pub(crate) type Connection = TlsStream<TcpStream>;

impl Load {
    pub(crate) fn new(pki: &Pki, identity: &Identity) -> Self {
        let mut provider = aws_lc_rs::default_provider();
        // What every peer speaks, so that no client is asked twice.
        provider.kx_groups = vec![aws_lc_rs::kx_group::X25519];
        let mut roots = RootCertStore::empty();
        roots.add(pki.web.der.clone()).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![identity.certificate.clone()], identity.key())
            .unwrap();
        config.resumption = Resumption::disabled();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        Self { runtime, config }
    }

    /// What its clients offer.
    pub(crate) fn config(&self) -> &ClientConfig {
        &self.config
    }

    /// Shakes hands so often, some at a time, and ends each connection as soon as it stands.
    pub(crate) fn full_handshakes(&self, to: SocketAddr, count: u32) {
        let config = Arc::new(self.config.clone());
        self.runtime.block_on(async {
            in_parallel(AT_ONCE, count, |_| {
                let config = Arc::clone(&config);
                async move {
                    let stream = connect(to, &config).await;
                    assert_ne!(kind(&stream), Some(HandshakeKind::Resumed));
                    end(stream).await;
                }
            })
            .await;
        });
    }

    /// The same with resumed sessions; the part of handshakes that were indeed resumed.
    pub(crate) fn resumed_handshakes(&self, to: SocketAddr, count: u32) -> f64 {
        let resumed = self.runtime.block_on(async {
            let mut chains = JoinSet::new();
            for _ in 0..AT_ONCE {
                let mut config = self.config.clone();
                config.resumption = Resumption::in_memory_sessions(16);
                let config = Arc::new(config);
                chains.spawn(async move {
                    end(connect(to, &config).await).await;
                    let mut resumed = 0_u32;
                    for _ in 0..count / AT_ONCE {
                        let stream = connect(to, &config).await;
                        resumed += u32::from(kind(&stream) == Some(HandshakeKind::Resumed));
                        end(stream).await;
                    }
                    resumed
                });
            }
            chains.join_all().await.iter().sum::<u32>()
        });
        f64::from(resumed) / f64::from(count)
    }

    /// Opens connections, each of which has had an answer; `None` if the server does not take so
    /// many.
    pub(crate) fn open(&self, to: SocketAddr, count: u32) -> Option<Vec<Connection>> {
        let mut config = self.config.clone();
        // Idle connections are not what handshakes are measured by.
        config.resumption = Resumption::in_memory_sessions(16);
        let config = Arc::new(config);
        self.runtime.block_on(async {
            let mut opened = JoinSet::new();
            let mut all = Vec::new();
            for _ in 0..count {
                if opened.len() == 32 {
                    all.push(opened.join_next().await?.unwrap()?);
                }
                let config = Arc::clone(&config);
                opened.spawn(async move {
                    let mut stream = try_connect(to, &config).await.ok()?;
                    ask(&mut stream, "/").await.ok()?;
                    Some(stream)
                });
            }
            for stream in opened.join_all().await {
                all.push(stream?);
            }
            Some(all)
        })
    }

    /// Returns when a connection is served: a gate takes a moment to hand its sockets over.
    pub(crate) fn wait_for(&self, to: SocketAddr) {
        let config = Arc::new(self.config.clone());
        tests::eventually("a connection is served", || {
            self.runtime.block_on(async {
                let mut stream = try_connect(to, &config).await.ok()?;
                ask(&mut stream, "/").await.ok()
            })
        });
    }

    /// Asks for a page over and over on each connection; how long each answer took, in seconds.
    pub(crate) fn requests(
        &self,
        connections: Vec<Connection>,
        each: u32,
    ) -> (Vec<Connection>, Vec<f64>) {
        self.runtime.block_on(async {
            let mut asking = JoinSet::new();
            for mut stream in connections {
                asking.spawn(async move {
                    let mut times = Vec::new();
                    for _ in 0..each {
                        let begun = Instant::now();
                        ask(&mut stream, "/").await.unwrap();
                        times.push(begun.elapsed().as_secs_f64());
                    }
                    (stream, times)
                });
            }
            let (streams, times): (Vec<_>, Vec<_>) = asking.join_all().await.into_iter().unzip();
            (streams, times.concat())
        })
    }

    /// Fetches the big file so often.
    pub(crate) fn bulk(&self, connection: Connection, count: u32) -> Connection {
        self.runtime.block_on(async {
            let mut stream = connection;
            for _ in 0..count {
                ask(&mut stream, "/big").await.unwrap();
            }
            stream
        })
    }

    /// Ends connections.
    pub(crate) fn close(&self, connections: Vec<Connection>) {
        self.runtime.block_on(async {
            for mut stream in connections {
                // Whether the proxy hears it does not matter.
                drop(stream.shutdown().await);
            }
        });
    }
}

async fn in_parallel<F: Future<Output = ()> + Send + 'static>(
    at_once: u32,
    count: u32,
    task: impl Fn(u32) -> F,
) {
    let mut running = JoinSet::new();
    for n in 0..count {
        if running.len() == at_once as usize {
            running.join_next().await.unwrap().unwrap();
        }
        running.spawn(task(n));
    }
    running.join_all().await;
}

fn kind(stream: &Connection) -> Option<HandshakeKind> {
    stream.get_ref().1.handshake_kind()
}

async fn connect(to: SocketAddr, config: &Arc<ClientConfig>) -> Connection {
    try_connect(to, config).await.unwrap()
}

async fn try_connect(to: SocketAddr, config: &Arc<ClientConfig>) -> io::Result<Connection> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from(SHOP).unwrap();
    let connector = TlsConnector::from(Arc::clone(config));
    connector.connect(name, stream).await
}

/// Ends a connection, and waits until the other side has done all that was to do.
async fn end(mut stream: Connection) {
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await;
    // Some end with a reset, some without close_notify, some say 400; tickets have been read.
    let _seen: Result<usize, io::Error> = ended.unwrap();
}

async fn ask(stream: &mut Connection, path: &str) -> io::Result<()> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {SHOP}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut buffer = vec![0; 64 << 10];
    let mut length = 0;
    let (head, expected) = loop {
        let read = stream.read(&mut buffer[length..]).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        length += read;
        let text = String::from_utf8_lossy(&buffer[..length.min(2048)]).to_ascii_lowercase();
        if let Some(head) = text.find("\r\n\r\n") {
            assert!(text.starts_with("http/1.1 200"), "{text}");
            let expected = text[..head].split("content-length: ").nth(1).unwrap();
            let expected = expected.split("\r\n").next().unwrap();
            break (head + 4, expected.parse::<usize>().unwrap());
        }
    };
    let mut body = length - head;
    while body < expected {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        body += read;
    }
    assert_eq!(body, expected);
    Ok(())
}

/// Handshakes at a time: enough to keep a server busy while the client computes.
const AT_ONCE: u32 = 8;
/// Handshakes per round.
pub(crate) const HANDSHAKES: u32 = 800;
/// Connections that ask at the same time.
pub(crate) const CONNECTIONS: u32 = 64;
/// Requests per connection and round.
pub(crate) const REQUESTS: u32 = 200;
/// Fetches of the big file per round.
pub(crate) const DOWNLOADS: u32 = 8;
/// Its size.
pub(crate) const MEGABYTES: u32 = 10;
/// In bytes.
pub(crate) const BODY: usize = (MEGABYTES as usize) << 20;
