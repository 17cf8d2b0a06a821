//! A stream as it is read and written without waiting: what would wait is `WouldBlock`, and wakes the task.

use std::io::{self, ErrorKind, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A stream that is polled by a task.
pub(super) struct Nonblocking<'a, 'b, S> {
    pub(super) stream: &'a mut S,
    pub(super) context: &'a mut Context<'b>,
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
        match Pin::new(&mut *self.stream).poll_write(self.context, bytes) {
            Poll::Ready(Ok(0)) => Err(ErrorKind::WriteZero.into()),
            Poll::Ready(written) => written,
            Poll::Pending => Err(ErrorKind::WouldBlock.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends what waits.
pub(super) fn flush(waiting: &mut Vec<u8>, stream: &mut impl Write) -> Poll<io::Result<()>> {
    while !waiting.is_empty() {
        let written = ready!(poll(stream.write(waiting)))?;
        waiting.drain(..written);
    }
    // A buffer that was needed once is not kept.
    *waiting = Vec::new();
    Poll::Ready(Ok(()))
}

/// Turns `WouldBlock` back into what it stands for.
pub(super) fn poll<T>(result: io::Result<T>) -> Poll<io::Result<T>> {
    match result {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Poll::Pending,
        result => Poll::Ready(result),
    }
}
