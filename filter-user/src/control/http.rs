//! HTTP/1 for local clients.
//!
//! A client is local, but not trusted: what it sends is bounded in size and time, and how many there are
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
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::geteuid;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, error, warn};

use crate::host::socket;

/// What is served at a socket.
pub trait Service: Send + Sync + 'static {
    /// The answer to a request.
    fn respond(
        &self,
        request: Request<Incoming>,
    ) -> impl Future<Output = Response<Full<Bytes>>> + Send;
}

/// A socket that waits for requests.
#[derive(Debug)]
pub enum Listener {
    /// A port.
    Tcp(TcpListener),
    /// A UNIX socket for the role's user and group.
    Unix(UnixListener),
    /// A UNIX socket for root and the role's user.
    Private(UnixListener),
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

    /// Binds a UNIX socket (0660); one that is left behind is replaced.
    ///
    /// # Errors
    ///
    /// Returns the operating system's error.
    pub fn unix(path: &Path) -> io::Result<Self> {
        socket::bind(path, 0o660).map(Self::Unix)
    }

    /// Binds a UNIX socket (0600) that serves root and this process's own user alone.
    ///
    /// # Errors
    ///
    /// Returns the operating system's error.
    pub fn private(path: &Path) -> io::Result<Self> {
        socket::bind(path, 0o600).map(Self::Private)
    }

    /// Answers every client. If there are too many, the one that has been silent for longest makes
    /// room; one that is being answered does not, and if all are, the new one has to come again.
    pub async fn serve(self, service: Arc<impl Service>) {
        let mut clients: VecDeque<Client> = VecDeque::new();
        loop {
            match self.accept().await {
                Ok(Some((stream, user))) => {
                    clients.retain(|client| !client.task.is_finished());
                    if clients.len() == CLIENTS_MAX {
                        let is_silent = |client: &Client| !client.has_asked.load(Ordering::Relaxed);
                        let silent = clients.iter().position(is_silent);
                        // Others cannot keep root from being answered.
                        let gives_way = |client: &Client| user == User::Ours && client.user != user;
                        let other = || clients.iter().position(gives_way);
                        let Some(one) = silent.or_else(other) else {
                            debug!(id = "clients-too-many", "too many clients ask at once");
                            continue;
                        };
                        clients.remove(one);
                    }
                    let has_asked = Arc::<AtomicBool>::default();
                    let answering = answer(stream, Arc::clone(&service), Arc::clone(&has_asked));
                    let patience = self.patience();
                    let task = tokio::spawn(async move {
                        if timeout(patience, answering).await.is_err() {
                            debug!(id = "answer-timed-out", "an answer took too long");
                        }
                    });
                    clients.push_back(Client {
                        task: AbortOnDropHandle::new(task),
                        has_asked,
                        user,
                    });
                }
                Ok(None) => {}
                Err(error) => {
                    error!(id = "socket-failed", %error, "a socket of this role does not accept clients");
                    tokio::time::sleep(ANSWER_TIMEOUT).await;
                }
            }
        }
    }

    /// A client's connection; none, if the client may not ask here.
    async fn accept(&self) -> io::Result<Option<(Box<dyn LocalStream>, User)>> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                Ok(Some((Box::new(stream), User::Other)))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let user = User::new(stream.peer_cred()?.uid());
                Ok(Some((Box::new(stream), user)))
            }
            Self::Private(listener) => {
                let (stream, _) = listener.accept().await?;
                // The socket's mode admits no other user; the kernel's answer holds if the mode was changed.
                let user = stream.peer_cred()?.uid();
                if User::new(user) == User::Ours {
                    return Ok(Some((Box::new(stream), User::Ours)));
                }
                warn!(
                    id = "instruction-forbidden",
                    user, "another user may not instruct this role"
                );
                Ok(None)
            }
        }
    }

    /// For a request and its answer together.
    fn patience(&self) -> Duration {
        match self {
            Self::Tcp(_) | Self::Unix(_) => ANSWER_TIMEOUT,
            Self::Private(_) => INSTRUCTION_TIMEOUT,
        }
    }
}

/// A connection that is being answered, or waited for.
struct Client {
    task: AbortOnDropHandle<()>,
    /// Whether its request has come.
    has_asked: Arc<AtomicBool>,
    user: User,
}

/// Who a client is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum User {
    /// Root, or the user of this process.
    Ours,
    /// Any other, or not known.
    Other,
}

impl User {
    fn new(id: u32) -> Self {
        if id == 0 || id == geteuid().as_raw() {
            Self::Ours
        } else {
            Self::Other
        }
    }
}

trait LocalStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> LocalStream for S {}

async fn answer(
    stream: Box<dyn LocalStream>,
    service: Arc<impl Service>,
    has_asked: Arc<AtomicBool>,
) {
    let service = service_fn(|request| {
        has_asked.store(true, Ordering::Relaxed);
        let service = Arc::clone(&service);
        async move { Ok::<_, Infallible>(service.respond(request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(ANSWER_TIMEOUT)
        .max_buf_size(HEAD_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        debug!(id = "client-not-answered", %error, "a client was not answered");
    }
}

/// Bytes of a request's head; what hyper takes at least.
const HEAD_MAX: usize = 8192;
/// Connections at once.
const CLIENTS_MAX: usize = 16;
/// For a question and its answer together.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
/// For an instruction until it is done: a client has less patience.
const INSTRUCTION_TIMEOUT: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    use tokio::sync::Semaphore;

    use super::*;

    /// Takes its time: as long as there is no permit.
    struct Slow {
        begun: Arc<Semaphore>,
        released: Arc<Semaphore>,
    }

    impl Service for Slow {
        async fn respond(&self, _: Request<Incoming>) -> Response<Full<Bytes>> {
            self.begun.add_permits(1);
            drop(self.released.acquire().await);
            Response::default()
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
        let slow = Arc::new(Slow {
            begun: Arc::clone(&begun),
            released: Arc::clone(&released),
        });
        let serving = tokio::spawn(listener.serve(slow));
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
            drop(stream.read_to_string(&mut text).await);
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
