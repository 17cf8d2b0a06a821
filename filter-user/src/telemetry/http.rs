//! What monitoring asks over HTTP: `/metrics`, `/healthz` and `/readyz`.
//!
//! Whoever asks is local, but no friend: what he sends is bounded in size and time, and how many ask
//! at once in number.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
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

/// What is told.
pub trait Told: Send + Sync + 'static {
    /// All metrics of the moment, in the OpenMetrics text format.
    fn metrics(&self) -> String;
    /// What of the process does not answer; nothing, if all of it does.
    fn ailments(&self) -> impl Future<Output = Vec<String>> + Send;
    /// Why the role does not protect as it should; nothing, if it does.
    fn reservations(&self) -> Vec<String>;
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
        let listener = super::admin::bind(path)?;
        // Whoever may enter the directory may ask.
        fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
        Ok(Self::Unix(listener))
    }

    /// Answers whoever asks; if too many do, who has asked first is let go, for he has had his time.
    pub async fn serve(self, told: Arc<impl Told>) {
        let mut askers = VecDeque::new();
        loop {
            let accepted: io::Result<Box<dyn Stream>> = match &self {
                Self::Tcp(listener) => listener.accept().await.map(|(it, _)| Box::new(it) as _),
                Self::Unix(listener) => listener.accept().await.map(|(it, _)| Box::new(it) as _),
            };
            match accepted {
                Ok(stream) => {
                    askers.retain(|asker: &AbortOnDropHandle<()>| !asker.is_finished());
                    if askers.len() == ASKERS_MAX {
                        askers.pop_front();
                    }
                    let answering = timeout(ANSWER_TIMEOUT, answer(stream, Arc::clone(&told)));
                    askers.push_back(AbortOnDropHandle::new(tokio::spawn(async move {
                        if answering.await.is_err() {
                            debug!("a question about metrics took too long");
                        }
                    })));
                }
                Err(error) => {
                    error!(%error, "metrics socket");
                    tokio::time::sleep(ANSWER_TIMEOUT).await;
                }
            }
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

async fn answer(stream: Box<dyn Stream>, told: Arc<impl Told>) {
    let service = service_fn(|request| {
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
        debug!(%error, "a question about metrics");
    }
}

async fn reply(request: &Request<Incoming>, told: &impl Told) -> Response<Full<Bytes>> {
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

fn judge(complaints: &[String]) -> Response<Full<Bytes>> {
    match complaints {
        [] => say(StatusCode::OK, PLAIN, "ok\n".to_owned()),
        complaints => {
            let text = complaints.join("\n") + "\n";
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
/// Who ask at once.
const ASKERS_MAX: usize = 16;
/// For a question and its answer together.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
