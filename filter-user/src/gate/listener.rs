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
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::yield_now;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error};

use super::Gate;
use super::connection::Arrival;
use super::threads::{Thread, Threads};

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

/// A thread that accepts connections, and serves those that it is given.
pub struct Worker {
    /// What all threads serve.
    pub gate: Arc<Gate>,
    /// All of them.
    pub threads: Arc<Threads>,
    /// The one of them that it is.
    pub own: Thread,
    /// What all of them have accepted.
    pub connections: TaskTracker,
}

impl Worker {
    /// Gives a connection to the thread with the fewest, in a task of its own.
    fn give(
        &self,
        stream: TcpStream,
        client: SocketAddr,
        permit: OwnedSemaphorePermit,
    ) -> io::Result<()> {
        let (assignment, elsewhere) = self.threads.assign(&self.own);
        let arrive = move |socket| {
            Box::new(Arrival {
                stream: socket,
                client,
                permit,
                assignment,
            })
        };
        let gate = Arc::clone(&self.gate);
        let Some(runtime) = elsewhere else {
            self.connections.spawn(gate.handle(arrive(stream)));
            return Ok(());
        };
        // A socket is known to one runtime, which wakes the task that waits for it.
        let (unknown, connections) = (stream.into_std()?, self.connections.clone());
        let taking_over = async move {
            match TcpStream::from_std(unknown) {
                Ok(known) => drop(connections.spawn(gate.handle(arrive(known)))),
                Err(error) => error!(
                    id = "connection-lost",
                    %error,
                    "cannot hand a connection over to another thread"
                ),
            }
        };
        drop(self.connections.spawn_on(taking_over, runtime));
        Ok(())
    }
}

/// Accepts connections from any of the sockets until `stop`; who comes later is left to a successor.
///
/// All threads accept from one socket, so that an idle one does. A socket each (SO_REUSEPORT) would
/// give a busy thread as many as an idle one, and lose what waits in it when it is closed.
///
/// One permit waits for all of them: a permit each would keep as many connections out.
pub async fn serve(worker: &Worker, listeners: Vec<TcpListener>, stop: CancellationToken) {
    let mut backoff = BACKOFF_MIN;
    let (mut first, mut accepted) = (0, 0_usize);
    loop {
        // The permit first: what cannot be served stays in the kernel's queue.
        let permit = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            permit = Arc::clone(&worker.gate.connections).acquire_owned() => permit,
        };
        let Ok(permit) = permit else { return };
        // Each socket in turn comes first.
        first = (first + 1) % listeners.len().max(1);
        let arrived = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            arrived = poll_fn(|context| accept(&listeners, first, context)) => arrived,
        };
        match arrived.and_then(|(stream, client)| worker.give(stream, client, permit)) {
            Ok(()) => {
                backoff = BACKOFF_MIN;
                accepted += 1;
                if accepted % AT_ONCE == 0 {
                    // What was accepted goes on before there is more.
                    yield_now().await;
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
/// Connections that are accepted before others' tasks have their turn.
const AT_ONCE: usize = 16;
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
            let worker = alone(&gate);
            serve(&worker, vec![listener], stop.clone()).await;
            assert!(worker.connections.is_empty());
        }
    }

    #[tokio::test]
    async fn others_have_their_turn_while_many_are_accepted() {
        let socket = bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let address = socket.local_addr().unwrap();
        let waiting: Vec<_> = (0..200)
            .map(|_| StdStream::connect(address).unwrap())
            .collect();
        let listener = TcpListener::from_std(socket).unwrap();
        let worker = alone(&gate());
        let connections = worker.connections.clone();

        let serving = tokio::spawn(async move {
            serve(&worker, vec![listener], CancellationToken::new()).await;
        });
        let mut seen = vec![0];
        for _ in 0..10_000 {
            yield_now().await;
            seen.push(connections.len());
        }
        serving.abort();
        assert_eq!(
            seen.last(),
            Some(&waiting.len()),
            "each waits for its ClientHello"
        );

        let at_once = seen.windows(2).map(|turns| turns[1] - turns[0]);
        assert!(at_once.max() <= Some(AT_ONCE), "{seen:?}");
    }

    /// The only thread of a gate's.
    fn alone(gate: &Arc<Gate>) -> Worker {
        let threads = Threads::new([Handle::current()]);
        let own = threads.iter().next().unwrap().clone();
        Worker {
            gate: Arc::clone(gate),
            own,
            threads: Arc::new(threads),
            connections: TaskTracker::new(),
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
        let loopback = "127.0.0.0/8".parse().unwrap();
        let active = Compiled::new(ActiveRanges::default(), &[loopback], &[]).unwrap();
        Arc::new(Gate::new(
            &config.live.gate.unwrap(),
            loaded,
            watch::channel(Arc::new(active)).1,
            config.boot.max_connections,
            Metrics::default(),
        ))
    }
}
