//! One side of a relay: a stream, and the TLS session in it, if there is one.

use std::io::{self, Read as _, Write as _};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tracing::debug;

use super::nonblocking::{Nonblocking, flush, poll};
use super::refusal::is_disconnect;
use super::session::Session;

/// One side of a relay: a stream, and what is spoken in it.
pub(super) struct Endpoint<S> {
    stream: S,
    layer: Layer,
    /// Nothing more comes from it.
    pub(super) ended: bool,
    /// Our side is shut down.
    pub(super) shut: bool,
    /// Once it was, it may go away without an end of its own.
    pub(super) may_vanish: bool,
}

/// What is spoken in a stream.
enum Layer {
    /// Clear text, and the bytes that the stream would not take yet.
    Clear(Vec<u8>),
    /// TLS, which keeps such bytes itself. On the heap: a future is as large as its largest moment.
    Encrypted(Box<Session>),
}

impl<S: AsyncRead + AsyncWrite + Unpin> Endpoint<S> {
    /// A stream in clear text.
    pub(super) fn clear(stream: S) -> Self {
        Self {
            stream,
            layer: Layer::Clear(Vec::new()),
            ended: false,
            shut: false,
            may_vanish: true,
        }
    }

    /// One whose stream is not whole unless its end says so.
    pub(super) fn until_its_end(self) -> Self {
        Self {
            may_vanish: false,
            ..self
        }
    }

    /// A stream whose TLS handshake is over.
    pub(super) fn encrypted(stream: S, session: Session) -> Self {
        Self {
            layer: Layer::Encrypted(Box::new(session)),
            ..Self::clear(stream)
        }
    }

    /// Reads what it still sends, for a while: unread bytes would turn the close into
    /// a reset, which discards an answer on its way.
    pub(super) async fn linger(&mut self) {
        let mut sink = [0; 4096];
        let discarding = async { while matches!(self.stream.read(&mut sink).await, Ok(1..)) {} };
        if tokio::time::timeout(LINGER, discarding).await.is_err() {
            debug!(id = "client-still-sending", "client goes on sending");
        }
    }

    /// Whether its requests are frames among others.
    pub(super) fn speaks_h2(&self) -> bool {
        match &self.layer {
            Layer::Clear(_) => false,
            Layer::Encrypted(session) => session.alpn_protocol() == Some(b"h2"),
        }
    }

    /// Whether it has yet to take something that it was sent.
    pub(super) fn holds_back(&self) -> bool {
        match &self.layer {
            Layer::Clear(waiting) => !waiting.is_empty(),
            Layer::Encrypted(session) => session.holds_back(),
        }
    }

    /// Reads; 0 is the end.
    pub(super) fn poll_read(
        &mut self,
        context: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut stream = Nonblocking {
            stream: &mut self.stream,
            context,
        };
        match &mut self.layer {
            Layer::Clear(_) => poll(stream.read(into)),
            Layer::Encrypted(session) => session.poll_read(&mut stream, into),
        }
    }

    /// Takes all the bytes; what the stream does not take waits.
    pub(super) fn push(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> io::Result<()> {
        let mut stream = Nonblocking {
            stream: &mut self.stream,
            context,
        };
        match &mut self.layer {
            Layer::Encrypted(session) => session.push(&mut stream, bytes)?,
            // Nothing waits yet: who does not take that is not sent more.
            Layer::Clear(waiting) => match poll(stream.write(bytes))? {
                Poll::Ready(written) => *waiting = bytes[written..].to_vec(),
                Poll::Pending => *waiting = bytes.to_vec(),
            },
        }
        let _later: Poll<()> = self.poll_flush(context)?;
        Ok(())
    }

    /// Sends what waits.
    pub(super) fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut stream = Nonblocking {
            stream: &mut self.stream,
            context,
        };
        match &mut self.layer {
            Layer::Encrypted(session) => session.poll_flush(&mut stream),
            Layer::Clear(waiting) => flush(waiting, &mut stream),
        }
    }

    /// Says that nothing more comes.
    pub(super) fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.shut {
            self.shut = true;
            if let Layer::Encrypted(session) = &mut self.layer {
                session.send_close_notify();
            }
        }
        let gone = |error: io::Error| {
            if is_disconnect(error.kind()) {
                // It is gone, which is an end as well.
                Ok(())
            } else {
                Err(error)
            }
        };
        if let Err(error) = ready!(self.poll_flush(context)) {
            return Poll::Ready(gone(error));
        }
        let shut = ready!(Pin::new(&mut self.stream).poll_shutdown(context));
        Poll::Ready(shut.or_else(gone))
    }
}

/// How long a client may go on sending what is discarded.
const LINGER: Duration = Duration::from_millis(500);
