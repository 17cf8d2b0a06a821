//! Listening: sockets in, one task per accepted connection out, on the thread that has the fewest.

use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error};

use super::Gate;
use super::connection::Arrival;
use super::threads::Threads;

/// Binds a listening socket. An IPv6 one takes IPv6 only: IPv4 has a socket of its own.
///
/// # Errors
///
/// Returns the operating system's error.
pub fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Accepts connections from any of the sockets until `stop`, each in a task of its own, on the thread with the fewest:
/// `own` is this one's number. Who comes later is left to a successor.
///
/// All threads accept from one socket, so that an idle one does. A socket each (SO_REUSEPORT) would
/// give a busy thread as many as an idle one, and lose what waits in it when it is closed.
///
/// One permit waits for all of them: a permit each would keep as many connections out.
pub async fn serve(
    gate: Arc<Gate>,
    listeners: Vec<TcpListener>,
    threads: &Threads,
    own: usize,
    connections: TaskTracker,
    stop: CancellationToken,
) {
    let mut backoff = BACKOFF_MIN;
    let mut first = 0;
    loop {
        // The permit first: what cannot be served stays in the kernel's queue.
        let permit = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            permit = Arc::clone(&gate.connections).acquire_owned() => permit,
        };
        let Ok(permit) = permit else { return };
        // Each socket in turn comes first.
        first = (first + 1) % listeners.len().max(1);
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = poll_fn(|context| accept(&listeners, first, context)) => accepted,
        };
        match accepted {
            Ok((stream, client)) => {
                backoff = BACKOFF_MIN;
                let (seat, elsewhere) = threads.seat(own);
                let arrive = move |socket| {
                    Box::new(Arrival {
                        stream: socket,
                        client,
                        permit,
                        seat,
                    })
                };
                let gate = Arc::clone(&gate);
                let Some(runtime) = elsewhere else {
                    connections.spawn(gate.handle(arrive(stream)));
                    continue;
                };
                match stream.into_std() {
                    Ok(socket) => {
                        drop(connections.spawn_on(take_over(gate, socket, arrive), runtime))
                    }
                    Err(error) => lost(&error),
                }
            }
            Err(error) if is_about_one_connection(&error) => debug!(
                id = "accept-retried",
                %error,
                "not accepted"
            ),
            Err(error) => {
                error!(
                    id = "accept-failed",
                    %error,
                    ?backoff,
                    "cannot accept connections, will try again"
                );
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(backoff) => {}
                }
                backoff = BACKOFF_MAX.min(backoff * 2);
            }
        }
    }
}

/// Serves a connection that another thread has accepted: a socket is known to one runtime, which wakes the task that
/// waits for it.
async fn take_over(
    gate: Arc<Gate>,
    socket: std::net::TcpStream,
    arrive: impl FnOnce(TcpStream) -> Box<Arrival>,
) {
    match TcpStream::from_std(socket) {
        Ok(stream) => gate.handle(arrive(stream)).await,
        Err(error) => lost(&error),
    }
}

fn lost(error: &io::Error) {
    error!(id = "connection-lost", %error, "cannot hand a connection over to another thread");
}

fn accept(
    listeners: &[TcpListener],
    first: usize,
    context: &mut Context<'_>,
) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
    let (before, after) = listeners.split_at(first.min(listeners.len()));
    for listener in after.iter().chain(before) {
        if let Poll::Ready(accepted) = listener.poll_accept(context) {
            return Poll::Ready(accepted);
        }
    }
    Poll::Pending
}

/// accept(2): errors that are already pending on the new socket, and concern no other.
fn is_about_one_connection(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    error.kind() == ErrorKind::ConnectionAborted
        || matches!(
            errno,
            Some(Errno::NETDOWN | Errno::PROTO | Errno::HOSTDOWN | Errno::HOSTUNREACH)
        )
}

/// Connections that wait in the kernel until they are accepted.
const BACKLOG: i32 = 4096;
const BACKOFF_MIN: Duration = Duration::from_millis(5);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::net::TcpStream as StdStream;
    use std::path::Path;

    use rustls::time_provider::DefaultTimeProvider;
    use tokio::runtime::Handle;
    use tokio::sync::watch;

    use super::super::{Loaded, Policies};
    use super::*;
    use crate::config::Config;
    use crate::observe::Metrics;
    use crate::ranges::{ActiveRanges, Compiled};

    #[tokio::test]
    async fn who_comes_after_the_stop_is_left_to_a_successor() {
        let gate = gate();
        let socket = bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let address = socket.local_addr().unwrap();
        let stop = CancellationToken::new();
        stop.cancel();

        for _ in 0..20 {
            let _waiting = [(); 2].map(|()| StdStream::connect(address).unwrap());
            let listener = TcpListener::from_std(socket.try_clone().unwrap()).unwrap();
            // This shows that a connection waits.
            drop(listener.accept().await.unwrap());
            let connections = TaskTracker::new();
            let threads = Threads::new([Handle::current()]);
            let accepting = serve(
                Arc::clone(&gate),
                vec![listener],
                &threads,
                0,
                connections.clone(),
                stop.clone(),
            );
            accepting.await;
            assert!(connections.is_empty());
        }
    }

    /// One that serves no client.
    fn gate() -> Arc<Gate> {
        let text = "[gate]\n[[gate.host]]\nnames = [\"a.example\"]\ncertificate = \"a.pem\"\n\
            key = \"a.key\"\ntrust = [\"cloudflare\"]\nupstream = \"127.0.0.1:8080\"\n";
        let config = Config::parse(Path::new("/pullgate.toml"), text).unwrap();
        let loaded = Loaded {
            policies: Policies::default(),
            clock: Arc::new(DefaultTimeProvider),
            broken: Vec::new(),
        };
        let active = Compiled::new(ActiveRanges::default(), &[], &[]).unwrap();
        Arc::new(Gate::new(
            &config.live.gate.unwrap(),
            loaded,
            watch::channel(Arc::new(active)).1,
            config.boot.max_connections,
            Metrics::default(),
        ))
    }
}
