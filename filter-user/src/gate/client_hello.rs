//! The first bytes of a client: what is TLS is told from what is not, and no more is read than a
//! greeting can be worth.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::StartHandshake;

use super::proxy;
use super::refusal::{Limit, Refusal};

/// Reads the ClientHello.
pub(super) async fn read_hello(
    stream: TcpStream,
) -> Result<StartHandshake<LimitedStream>, Refusal> {
    let mut first = [0; proxy::HEADER_BEGINS];
    let first = match stream.peek(&mut first).await {
        Ok(0) | Err(_) => return Err(Refusal::Closed),
        Ok(length) => &first[..length],
    };
    judge(first)?;
    stream.set_nodelay(true).map_err(|_gone| Refusal::Closed)?;
    let bounded = LimitedStream {
        stream,
        left: HELLO_MAX,
    };
    let mut hello = LazyConfigAcceptor::new(Acceptor::default(), bounded)
        .await
        .map_err(|error| Refusal::from_handshake(&error))?;
    hello.io.left = HANDSHAKE_MAX;
    Ok(hello)
}

/// Tells TLS by its first bytes from what is not.
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

/// ContentType handshake, RFC 8446 §5.1; every TLS connection begins with it.
const HANDSHAKE_RECORD: u8 = 22;
/// Bytes on the wire up to the end of the ClientHello, record headers included. Cloudflare's has
/// some hundred, and 2 KiB with a post-quantum key share.
const HELLO_MAX: usize = 16 << 10;
/// Bytes on the wire in the rest of the handshake: a chain of certificates.
const HANDSHAKE_MAX: usize = 64 << 10;
