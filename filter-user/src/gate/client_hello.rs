//! The first bytes of a client: distinguishes TLS from other protocols, and reads a ClientHello of a bounded size.

use std::io;
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::task::{Context, Poll};

use rustls::server::{Acceptor, ClientHello};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::StartHandshake;

use super::proxy;
use super::refusal::{Limit, Refusal};

/// Reads the ClientHello.
///
/// # Errors
///
/// Returns why there is none.
pub(super) async fn read_hello(stream: TcpStream) -> Result<Hello, Unreadable> {
    let mut first = [0; proxy::HEADER_BEGINS];
    let first = match stream.peek(&mut first).await {
        Ok(0) | Err(_) => return Err(Refusal::Closed.into()),
        Ok(length) => &first[..length],
    };
    let nodelay = stream.set_nodelay(true);
    let mut bounded = LimitedStream {
        stream,
        left: HELLO_MAX,
        read_ahead: Some(Vec::new()),
    };
    if let Err(refusal) = judge(first) {
        let is_record = matches!(first, [first, ..] if RECORDS.contains(first));
        bounded.read_ahead = None;
        return Err(Unreadable {
            refusal,
            unanswered: is_record.then_some(bounded),
        });
    }
    nodelay.map_err(|_gone| Refusal::Closed)?;
    let mut acceptor = LazyConfigAcceptor::new(Acceptor::default(), bounded);
    match (&mut acceptor).await {
        Ok(mut accepted) => {
            accepted.io.left = HANDSHAKE_MAX;
            let read_ahead = accepted.io.read_ahead.take().unwrap_or_default();
            Ok(Hello {
                accepted,
                read_ahead,
            })
        }
        Err(error) => {
            let refusal = Refusal::from_handshake(&error);
            // What rustls has refused, it has answered.
            let is_ours = refusal == Refusal::TooMany(Limit::HelloBytes);
            let mut unanswered = acceptor.take_io().filter(|_| is_ours);
            if let Some(taken) = &mut unanswered {
                // What is still on its way is read, so that the alert is not lost in a reset.
                taken.left = HANDSHAKE_MAX;
                taken.read_ahead = None;
            }
            Err(Unreadable {
                refusal,
                unanswered,
            })
        }
    }
}

/// A ClientHello, and the stream that it came by.
pub(super) struct Hello {
    accepted: StartHandshake<LimitedStream>,
    /// All that was read: the session begins with it.
    read_ahead: Vec<u8>,
}

impl Hello {
    /// What it says.
    pub(super) fn client_hello(&self) -> ClientHello<'_> {
        self.accepted.client_hello()
    }

    /// The stream, and what was read of it.
    pub(super) fn into_parts(self) -> (LimitedStream, Vec<u8>) {
        (self.accepted.io, self.read_ahead)
    }
}

/// Why no ClientHello was read.
pub(super) struct Unreadable {
    pub(super) refusal: Refusal,
    /// The stream, if the client speaks TLS and has got no alert yet.
    pub(super) unanswered: Option<LimitedStream>,
}

impl From<Refusal> for Unreadable {
    fn from(refusal: Refusal) -> Self {
        Self {
            refusal,
            unanswered: None,
        }
    }
}

/// Distinguishes TLS by its first bytes.
pub(super) fn judge(first: &[u8]) -> Result<(), Refusal> {
    match first {
        _ if proxy::begins(first) => Err(Refusal::BadProxyHeader),
        [HANDSHAKE_RECORD, ..] => Ok(()),
        [byte, ..] if byte.is_ascii_graphic() => Err(Refusal::Plaintext),
        _ => Err(Refusal::Protocol),
    }
}

/// A stream of which only so much is read before the handshake is over.
pub(super) struct LimitedStream {
    stream: TcpStream,
    left: usize,
    /// What was read, until the ClientHello is whole.
    read_ahead: Option<Vec<u8>>,
}

impl LimitedStream {
    /// The stream, without bounds.
    pub(super) fn into_inner(self) -> TcpStream {
        self.stream
    }
}

impl AsyncRead for LimitedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.left == 0 {
            let refusal = Refusal::TooMany(Limit::HelloBytes);
            return Poll::Ready(Err(io::Error::other(refusal)));
        }
        let wanted = buffer.remaining().min(self.left);
        let mut part = ReadBuf::new(buffer.initialize_unfilled_to(wanted));
        let poll = Pin::new(&mut self.stream).poll_read(context, &mut part);
        let read = part.filled().len();
        if let Some(read_ahead) = &mut self.read_ahead {
            read_ahead.extend_from_slice(part.filled());
        }
        buffer.advance(read);
        self.left -= read;
        poll
    }
}

impl AsyncWrite for LimitedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Every ContentType, RFC 8446 §5.1 and RFC 6520 §3.
const RECORDS: RangeInclusive<u8> = 20..=24;
/// ContentType handshake, RFC 8446 §5.1; every TLS connection begins with it.
const HANDSHAKE_RECORD: u8 = 22;
/// Bytes on the wire up to the end of the ClientHello, record headers included. Cloudflare's has
/// some hundred, and 2 KiB with a post-quantum key share.
const HELLO_MAX: usize = 16 << 10;
/// Bytes on the wire in the rest of the handshake: a chain of certificates.
const HANDSHAKE_MAX: usize = 64 << 10;
