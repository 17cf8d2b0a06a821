//! Connections that end at a deadline.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::time::Instant;

use socket2::SockRef;

/// A connection that ends at a deadline, however slowly it answers.
#[derive(Debug)]
pub struct DeadlineStream<S> {
    stream: S,
    deadline: Instant,
}

impl<S: AsFd> DeadlineStream<S> {
    /// The same connection, until then.
    #[must_use]
    pub fn new(stream: S, deadline: Instant) -> Self {
        Self { stream, deadline }
    }

    /// Limits the next step to the time that is left.
    fn limit(&self) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        let socket = SockRef::from(&self.stream);
        socket.set_read_timeout(Some(left))?;
        socket.set_write_timeout(Some(left))
    }
}

impl<S: AsFd + Read> Read for DeadlineStream<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.limit()?;
        self.stream.read(buffer).map_err(in_words)
    }
}

impl<S: AsFd + Write> Write for DeadlineStream<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.limit()?;
        self.stream.write(bytes).map_err(in_words)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// A socket's own limit returns `EAGAIN` (socket(7), `SO_RCVTIMEO`), which says nothing of a time.
fn in_words(error: io::Error) -> io::Error {
    if is_late(&error) {
        ErrorKind::TimedOut.into()
    } else {
        error
    }
}

/// Whether an error is that of a deadline: what a socket's own limit returns.
#[must_use]
pub fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock)
}
