//! Relaying: bytes both ways until both sides are done, one breaks off, or neither sends.
//!
//! Half-close is preserved: the end of one side's stream is passed on, and the other direction
//! goes on.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::refusal::{Outcome, is_disconnect};

/// How a relay ended, and how much it relayed.
pub(super) struct Relayed {
    pub(super) outcome: Outcome,
    /// Bytes from the client to the upstream.
    pub(super) up: u64,
    /// Bytes from the upstream to the client.
    pub(super) down: u64,
}

/// Relays between `client` and `upstream`.
///
/// The connection is idle when no byte has come from either side for `idle`; it is then closed
/// before twice that time is over.
pub(super) async fn relay(
    client: impl AsyncRead + AsyncWrite + Unpin,
    upstream: impl AsyncRead + AsyncWrite + Unpin,
    idle: Duration,
    abort: &CancellationToken,
) -> Relayed {
    let (up, down) = (Arc::default(), Arc::default());
    let mut client = Counted::new(client, &up);
    let mut upstream = Counted::new(upstream, &down);
    let outcome = tokio::select! {
        copied = copy_bidirectional(&mut client, &mut upstream) => match copied {
            Ok(_) => Outcome::Relayed,
            Err(error) => {
                debug!(%error, "relay broke off");
                Outcome::Aborted
            }
        },
        () = silence(&up, &down, idle) => Outcome::Idle,
        () = abort.cancelled() => Outcome::Aborted,
    };
    Relayed {
        outcome,
        up: up.load(Ordering::Relaxed),
        down: down.load(Ordering::Relaxed),
    }
}

/// Returns when neither count has moved for `idle`.
async fn silence(up: &AtomicU64, down: &AtomicU64, idle: Duration) {
    let moved = || (up.load(Ordering::Relaxed), down.load(Ordering::Relaxed));
    let mut before = moved();
    loop {
        tokio::time::sleep(idle).await;
        let after = moved();
        if before == after {
            return;
        }
        before = after;
    }
}

/// A stream that counts the bytes read from it.
struct Counted<S> {
    stream: S,
    read: Arc<AtomicU64>,
    /// Whether the end of the other stream was passed on to this one.
    ended: bool,
}

impl<S> Counted<S> {
    fn new(stream: S, read: &Arc<AtomicU64>) -> Self {
        Self {
            stream,
            read: Arc::clone(read),
            ended: false,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let poll = Pin::new(&mut self.stream).poll_read(context, buffer);
        let bytes = buffer.filled().len() - before;
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
        // Once it has our end, a peer may just go away; before that, a stream without a
        // close_notify may have been cut by somebody on the way.
        let gone = matches!(&poll, Poll::Ready(Err(error)) if is_disconnect(error.kind()));
        if gone && self.ended {
            return Poll::Ready(Ok(()));
        }
        poll
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.ended = true;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    #[tokio::test]
    async fn the_end_of_one_side_is_passed_on_and_the_other_goes_on() {
        let (mut client, gate_client) = duplex(64);
        let (mut server, gate_server) = duplex(64);
        let relaying = tokio::spawn(async move {
            let abort = CancellationToken::new();
            relay(gate_client, gate_server, IDLE, &abort).await
        });

        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = String::new();
        server.read_to_string(&mut question).await.unwrap();
        server.write_all(b"answer!").await.unwrap();
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();

        let relayed = relaying.await.unwrap();
        assert_eq!(
            (question.as_str(), answer.as_str()),
            ("question", "answer!")
        );
        assert!(matches!(relayed.outcome, Outcome::Relayed));
        assert_eq!((relayed.up, relayed.down), (8, 7));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_is_closed_and_one_that_speaks_is_not() {
        let (mut client, gate_client) = duplex(64);
        let (_server, gate_server) = duplex(64);
        let relaying = tokio::spawn(async move {
            let abort = CancellationToken::new();
            relay(gate_client, gate_server, IDLE, &abort).await
        });

        for _ in 0..3 {
            tokio::time::advance(IDLE.mul_f64(0.9)).await;
            client.write_all(b".").await.unwrap();
        }

        let relayed = relaying.await.unwrap();
        assert!(matches!(relayed.outcome, Outcome::Idle));
        assert_eq!(relayed.up, 3);
    }

    #[tokio::test]
    async fn a_stop_closes_live_connections() {
        let (_client, gate_client) = duplex(64);
        let (_server, gate_server) = duplex(64);
        let abort = CancellationToken::new();
        abort.cancel();

        let relayed = relay(gate_client, gate_server, IDLE, &abort).await;

        assert!(matches!(relayed.outcome, Outcome::Aborted));
    }

    const IDLE: Duration = Duration::from_secs(1000);
}
