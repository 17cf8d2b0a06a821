//! What monitoring asks over HTTP: `/metrics`, `/healthz` and `/readyz`.
//!
//! Whoever asks is local, but no friend: what he sends is bounded in size and time, and how many ask
//! at once in number.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, error};

use super::Finding;

/// What is told.
pub trait MetricsSource: Send + Sync + 'static {
    /// All metrics of the moment, in the OpenMetrics text format.
    fn metrics(&self) -> String;
    /// What of the process does not answer; nothing, if all of it does.
    fn ailments(&self) -> impl Future<Output = Vec<Finding>> + Send;
    /// Why the role does not protect as it should; nothing, if it does.
    fn reservations(&self) -> Vec<Finding>;
}

/// A socket that waits for questions.
#[derive(Debug)]
pub enum Listener {
    /// A port.
    Tcp(TcpListener),
    /// A UNIX socket.
    Unix(UnixListener),
}

impl Listener {
    /// Binds a port.
    ///
    /// # Errors
    ///
    /// Returns the operating system's error.
    pub fn tcp(address: SocketAddr) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self::Tcp(TcpListener::from_std(listener)?))
    }

    /// Binds a UNIX socket; one that is left behind is replaced.
    ///
    /// # Errors
    ///
    /// Returns the operating system's error.
    pub fn unix(path: &Path) -> io::Result<Self> {
        // Its mode is that of a status socket: the role's user and group may ask.
        crate::host::socket::bind(path).map(Self::Unix)
    }

    /// Answers every client. If there are too many, the one that has been silent for longest makes
    /// room; one that is being answered does not, and if all are, the new one has to come again.
    pub async fn serve(self, told: Arc<impl MetricsSource>) {
        let mut clients: VecDeque<Client> = VecDeque::new();
        loop {
            let accepted: io::Result<Box<dyn Stream>> = match &self {
                Self::Tcp(listener) => listener.accept().await.map(|(it, _)| Box::new(it) as _),
                Self::Unix(listener) => listener.accept().await.map(|(it, _)| Box::new(it) as _),
            };
            match accepted {
                Ok(stream) => {
                    clients.retain(|client| !client.task.is_finished());
                    if clients.len() == CLIENTS_MAX {
                        let is_silent = |client: &Client| !client.has_asked.load(Ordering::Relaxed);
                        let Some(silent) = clients.iter().position(is_silent) else {
                            debug!(id = "metrics-busy", "too many ask for metrics at once");
                            continue;
                        };
                        clients.remove(silent);
                    }
                    let has_asked = Arc::<AtomicBool>::default();
                    let answering = answer(stream, Arc::clone(&told), Arc::clone(&has_asked));
                    let task = tokio::spawn(async move {
                        if timeout(ANSWER_TIMEOUT, answering).await.is_err() {
                            debug!(
                                id = "metrics-timed-out",
                                "a question about metrics took too long"
                            );
                        }
                    });
                    clients.push_back(Client {
                        task: AbortOnDropHandle::new(task),
                        has_asked,
                    });
                }
                Err(error) => {
                    error!(id = "metrics-socket-failed", %error, "metrics socket");
                    tokio::time::sleep(ANSWER_TIMEOUT).await;
                }
            }
        }
    }
}

/// A connection that is being answered, or waited for.
struct Client {
    task: AbortOnDropHandle<()>,
    /// Whether its request has come.
    has_asked: Arc<AtomicBool>,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

async fn answer(
    stream: Box<dyn Stream>,
    told: Arc<impl MetricsSource>,
    has_asked: Arc<AtomicBool>,
) {
    let service = service_fn(|request| {
        has_asked.store(true, Ordering::Relaxed);
        let told = Arc::clone(&told);
        async move { Ok::<_, Infallible>(reply(&request, &*told).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(ANSWER_TIMEOUT)
        .max_buf_size(HEAD_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        debug!(id = "metrics-not-served", %error, "a question about metrics");
    }
}

async fn reply(request: &Request<Incoming>, told: &impl MetricsSource) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return say(
            StatusCode::METHOD_NOT_ALLOWED,
            PLAIN,
            "GET or HEAD only\n".to_owned(),
        );
    }
    match request.uri().path() {
        "/metrics" => say(StatusCode::OK, OPEN_METRICS, told.metrics()),
        "/healthz" => judge(&told.ailments().await),
        "/readyz" => judge(&told.reservations()),
        _ => say(
            StatusCode::NOT_FOUND,
            PLAIN,
            "/metrics, /healthz or /readyz\n".to_owned(),
        ),
    }
}

fn judge(findings: &[Finding]) -> Response<Full<Bytes>> {
    match findings {
        [] => say(StatusCode::OK, PLAIN, "ok\n".to_owned()),
        findings => {
            let lines = findings.iter().map(|finding| format!("{finding}\n"));
            let text = lines.collect();
            say(StatusCode::SERVICE_UNAVAILABLE, PLAIN, text)
        }
    }
}

fn say(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let kind = hyper::header::HeaderValue::from_static(kind);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

const PLAIN: &str = "text/plain; charset=utf-8";
/// The OpenMetrics specification, version 1.0.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Bytes of a request's head; what hyper takes at least.
const HEAD_MAX: usize = 8192;
/// Connections at once.
const CLIENTS_MAX: usize = 16;
/// For a question and its answer together.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    use tokio::sync::Semaphore;

    use super::*;

    /// Takes its time with `/healthz`: as long as there is no permit.
    struct Slow {
        begun: Arc<Semaphore>,
        released: Arc<Semaphore>,
    }

    impl MetricsSource for Slow {
        fn metrics(&self) -> String {
            String::new()
        }

        async fn ailments(&self) -> Vec<Finding> {
            self.begun.add_permits(1);
            drop(self.released.acquire().await);
            Vec::new()
        }

        fn reservations(&self) -> Vec<Finding> {
            Vec::new()
        }
    }

    #[tokio::test]
    async fn one_that_is_being_answered_makes_no_room_and_a_silent_one_does() {
        let (begun, released) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let Listener::Tcp(socket) = &listener else {
            panic!("a port");
        };
        let address = socket.local_addr().unwrap();
        let told = Arc::new(Slow {
            begun: Arc::clone(&begun),
            released: Arc::clone(&released),
        });
        let serving = tokio::spawn(listener.serve(told));
        let connect = || TcpStream::connect(address);
        let ask = async |path: &str| {
            let mut stream = connect().await.unwrap();
            let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            stream
        };
        let answer = async |mut stream: TcpStream| {
            let mut text = String::new();
            // One that was let go is reset.
            stream.read_to_string(&mut text).await.ok();
            text
        };

        let mut silent = connect().await.unwrap();
        let mut asking = Vec::new();
        for _ in 1..CLIENTS_MAX {
            asking.push(ask("/healthz").await);
        }
        let _all = begun.acquire_many(15).await.unwrap();
        // One more: there is a silent one to make room.
        asking.push(ask("/healthz").await);
        assert_eq!(silent.read(&mut [0]).await.unwrap_or(0), 0);
        let _last = begun.acquire().await.unwrap();
        // And one more: all are being answered.
        assert_eq!(answer(ask("/healthz").await).await, "");
        released.add_permits(CLIENTS_MAX);

        for stream in asking {
            let text = answer(stream).await;
            assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        }
        serving.abort();
    }
}
