//! One side of a relay: a stream, and the TLS session in it, if there is one.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::Connection;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tracing::debug;

use super::refusal::is_disconnect;

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
    /// Bytes on the wire since the last that meant something.
    barren: usize,
}

/// What is spoken in a stream.
enum Layer {
    /// Clear text, and the bytes that the stream would not take yet.
    Clear(Vec<u8>),
    /// TLS, which keeps such bytes itself. On the heap: a future is as large as its largest moment.
    Encrypted(Box<Connection>),
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
            barren: 0,
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
    pub(super) fn encrypted(stream: S, mut session: Connection) -> Self {
        // The relay itself bounds what waits.
        session.set_buffer_limit(None);
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
            Layer::Encrypted(session) => session.wants_write(),
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
        let session = match &mut self.layer {
            Layer::Clear(_) => return poll(stream.read(into)),
            Layer::Encrypted(session) => session,
        };
        loop {
            match session.reader().read(into) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read),
            }
            let read = ready!(poll(session.read_tls(&mut stream)))?;
            let state = match session.process_new_packets() {
                Ok(state) => state,
                Err(error) => {
                    // The alert, if there is one and it fits.
                    let _lost = session.write_tls(&mut stream);
                    return Poll::Ready(Err(io::Error::new(ErrorKind::InvalidData, error)));
                }
            };
            self.barren = match state.plaintext_bytes_to_read() {
                0 => self.barren + read,
                _ => 0,
            };
            if self.barren > BARREN_MAX {
                let text = "records without content";
                return Poll::Ready(Err(io::Error::new(ErrorKind::InvalidData, text)));
            }
        }
    }

    /// Takes all the bytes; what the stream does not take waits.
    pub(super) fn push(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> io::Result<()> {
        match &mut self.layer {
            Layer::Encrypted(session) => session.writer().write_all(bytes)?,
            Layer::Clear(waiting) => {
                let mut stream = Nonblocking {
                    stream: &mut self.stream,
                    context,
                };
                // Nothing waits yet: who does not take that is not sent more.
                match poll(stream.write(bytes))? {
                    Poll::Ready(written) => *waiting = bytes[written..].to_vec(),
                    Poll::Pending => *waiting = bytes.to_vec(),
                }
            }
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
            Layer::Encrypted(session) => {
                while session.wants_write() {
                    ready!(poll(session.write_tls(&mut stream)))?;
                }
            }
            Layer::Clear(waiting) => {
                while !waiting.is_empty() {
                    let written = ready!(poll(stream.write(waiting)))?;
                    waiting.drain(..written);
                }
                // A buffer that was needed once is not kept.
                *waiting = Vec::new();
            }
        }
        Poll::Ready(Ok(()))
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

/// A stream as rustls reads and writes it: what would wait is `WouldBlock`, and wakes the task.
struct Nonblocking<'a, 'b, S> {
    stream: &'a mut S,
    context: &'a mut Context<'b>,
}

impl<S: AsyncRead + Unpin> Read for Nonblocking<'_, '_, S> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut buffer = ReadBuf::new(into);
        match Pin::new(&mut *self.stream).poll_read(self.context, &mut buffer) {
            Poll::Ready(Ok(())) => Ok(buffer.filled().len()),
            Poll::Ready(Err(error)) => Err(error),
            Poll::Pending => Err(ErrorKind::WouldBlock.into()),
        }
    }
}

impl<S: AsyncWrite + Unpin> Write for Nonblocking<'_, '_, S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        written(Pin::new(&mut *self.stream).poll_write(self.context, bytes))
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match slices {
            // send(2) costs less than writev(2).
            [one] => self.write(one),
            _ => written(Pin::new(&mut *self.stream).poll_write_vectored(self.context, slices)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn written(poll: Poll<io::Result<usize>>) -> io::Result<usize> {
    match poll {
        Poll::Ready(Ok(0)) => Err(ErrorKind::WriteZero.into()),
        Poll::Ready(written) => written,
        Poll::Pending => Err(ErrorKind::WouldBlock.into()),
    }
}

/// Turns `WouldBlock` back into what it stands for.
fn poll<T>(result: io::Result<T>) -> Poll<io::Result<T>> {
    match result {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Poll::Pending,
        result => Poll::Ready(result),
    }
}

/// Bytes on the wire without content: some records of the greatest size, or thousands of empty ones.
const BARREN_MAX: usize = 128 << 10;
/// How long a client may go on sending what is discarded.
const LINGER: Duration = Duration::from_millis(500);
