//! TLS over a stream, without a buffer while nothing is on its way.
//!
//! rustls' buffered connections keep 4 KiB each to read into. Here records are read into a buffer of the thread's, and a
//! session keeps what of them has not come whole.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Poll, ready};

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, Error as TlsError, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::nonblocking::{flush, poll};

/// A session of either side.
pub(super) struct Session {
    tls: Box<dyn Unbuffered>,
    /// The beginning of a record, or records of a handshake that has not come whole.
    incoming: Vec<u8>,
    /// Records that the stream has yet to take.
    outgoing: Vec<u8>,
    /// What the peer has sent, and was not read yet.
    plain: Vec<u8>,
    /// The peer has sent a close_notify.
    is_over: bool,
    /// Why rustls is not asked any more.
    failure: Option<TlsError>,
    /// Bytes on the wire since the last that meant something.
    barren: usize,
}

impl Deref for Session {
    type Target = CommonState;

    fn deref(&self) -> &CommonState {
        self.tls.common()
    }
}

impl Session {
    /// One with a client, of which these bytes were read already.
    ///
    /// # Errors
    ///
    /// Returns what rustls cannot use.
    pub(super) fn server(config: Arc<ServerConfig>, read_ahead: Vec<u8>) -> io::Result<Self> {
        let tls = UnbufferedServerConnection::new(config).map_err(failed)?;
        Ok(Self::new(Box::new(tls), read_ahead))
    }

    /// One with a server.
    ///
    /// # Errors
    ///
    /// As [`Self::server`].
    pub(super) fn client(config: Arc<ClientConfig>, name: ServerName<'static>) -> io::Result<Self> {
        let tls = UnbufferedClientConnection::new(config, name).map_err(failed)?;
        Ok(Self::new(Box::new(tls), Vec::new()))
    }

    fn new(tls: Box<dyn Unbuffered>, incoming: Vec<u8>) -> Self {
        Self {
            tls,
            incoming,
            outgoing: Vec::new(),
            plain: Vec::new(),
            is_over: false,
            failure: None,
            barren: 0,
        }
    }

    /// Takes the handshake to its end.
    ///
    /// # Errors
    ///
    /// Returns why there is none; the alert is sent, if there is room for it.
    pub(super) async fn handshake(
        mut self,
        stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    ) -> io::Result<Self> {
        loop {
            if let Err(error) = self.queue(None) {
                let alert = mem::take(&mut self.outgoing);
                // A peer that does not read it is not waited for.
                poll_fn(|context| {
                    let _lost = Pin::new(&mut *stream).poll_write(context, &alert);
                    Poll::Ready(())
                })
                .await;
                return Err(error);
            }
            stream.write_all(&mem::take(&mut self.outgoing)).await?;
            if !self.is_handshaking() {
                self.incoming.shrink_to_fit();
                return Ok(self);
            }
            self.incoming.reserve(FLIGHT);
            if stream.read_buf(&mut self.incoming).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Takes what is kept; what it is answered, and the record of `next`, wait to be sent.
    fn queue(&mut self, next: Option<Outgoing<'_>>) -> io::Result<()> {
        SENDING.with_borrow_mut(|sending| {
            let taken = self.send(next, sending);
            self.outgoing.extend_from_slice(sending.records());
            taken
        })
    }

    /// Makes records of something, after what is kept was taken.
    fn send(&mut self, mut next: Option<Outgoing<'_>>, sending: &mut Sending) -> io::Result<()> {
        sending.clear();
        self.check()?;
        let mut kept = mem::take(&mut self.incoming);
        let (consumed, _none) = self.take(&mut kept, &mut [], &mut next, sending);
        kept.drain(..consumed);
        self.incoming = kept;
        self.check()?;
        match next {
            Some(_) => Err(io::Error::other("the TLS session takes nothing now")),
            None => Ok(()),
        }
    }

    /// # Errors
    ///
    /// Returns why it goes on no more.
    fn check(&self) -> io::Result<()> {
        self.failure
            .clone()
            .map_or(Ok(()), |error| Err(failed(error)))
    }

    /// Takes the records at the beginning of some bytes, and then makes a record of `next`: how many bytes they are, and how
    /// many of `into` are filled. What does not fit there waits.
    fn take(
        &mut self,
        incoming: &mut [u8],
        into: &mut [u8],
        next: &mut Option<Outgoing<'_>>,
        sending: &mut Sending,
    ) -> (usize, usize) {
        let mut exchange = Exchange {
            into,
            filled: 0,
            more: &mut self.plain,
            next,
            sending,
        };
        let mut consumed = 0;
        let failure = loop {
            // rustls may still refer to what it has not discarded.
            let records = incoming.get_mut(consumed..).unwrap_or_default();
            let (discard, step) = self.tls.step(records, &mut exchange);
            consumed += discard;
            match step {
                Ok(Step::Again) => {}
                Ok(Step::Over) => self.is_over = true,
                Ok(Step::Idle) => break None,
                Err(error) => break Some(error),
            }
        };
        if failure.is_some() {
            self.failure = failure;
            // The alert comes after it. rustls must not look at the record once more.
            while self.tls.common().wants_write() {
                drop(self.tls.step(&mut [], &mut exchange));
            }
        }
        // What is behind an end means nothing, nor what is behind a failure.
        if self.is_over || self.failure.is_some() {
            consumed = incoming.len();
        }
        (consumed, exchange.filled)
    }

    /// Whether the stream has yet to take something.
    pub(super) fn holds_back(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Reads; 0 is the end, by a close_notify.
    pub(super) fn poll_read(
        &mut self,
        stream: &mut (impl Read + Write),
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if !self.plain.is_empty() {
            let some = self.plain.len().min(into.len());
            into[..some].copy_from_slice(&self.plain[..some]);
            self.plain = self.plain[some..].to_vec();
            return Poll::Ready(Ok(some));
        }
        RECORDS.with_borrow_mut(|records| {
            loop {
                // Behind what came before it.
                self.check()?;
                if self.is_over {
                    return Poll::Ready(Ok(0));
                }
                let kept = self.incoming.len();
                let room = records.get_mut(kept..).unwrap_or_default();
                if room.is_empty() {
                    return Poll::Ready(Err(invalid("a message that is too large")));
                }
                let read = ready!(poll(stream.read(room)))?;
                if read == 0 {
                    return Poll::Ready(Err(ErrorKind::UnexpectedEof.into()));
                }
                let mut incoming = mem::take(&mut self.incoming);
                // The lesser part is copied to the other: byte by byte it would be much otherwise.
                let filled = if read < kept {
                    incoming.extend_from_slice(&records[kept..kept + read]);
                    let (consumed, filled) = self.take_read(&mut incoming, into, stream);
                    if consumed > 0 {
                        incoming = incoming[consumed..].to_vec();
                    }
                    self.incoming = incoming;
                    filled
                } else {
                    records[..kept].copy_from_slice(&incoming);
                    let records = &mut records[..kept + read];
                    let (consumed, filled) = self.take_read(records, into, stream);
                    self.incoming = records[consumed..].to_vec();
                    filled
                };
                if filled > 0 {
                    self.barren = 0;
                    return Poll::Ready(Ok(filled));
                }
                self.barren += read;
                if self.barren > BARREN_MAX {
                    return Poll::Ready(Err(invalid("records without content")));
                }
            }
        })
    }

    /// Takes records that were read: [`Self::take`]. What they are answered waits, and an alert is sent if it fits.
    fn take_read(
        &mut self,
        records: &mut [u8],
        into: &mut [u8],
        stream: &mut impl Write,
    ) -> (usize, usize) {
        SENDING.with_borrow_mut(|sending| {
            sending.clear();
            let taken = self.take(records, into, &mut None, sending);
            self.outgoing.extend_from_slice(sending.records());
            if self.failure.is_some() {
                let _lost = self.poll_flush(stream);
            }
            taken
        })
    }

    /// Takes all the bytes; what the stream does not take waits.
    pub(super) fn push(&mut self, stream: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
        SENDING.with_borrow_mut(|sending| {
            let sent = self.send(Some(Outgoing::Bytes(bytes)), sending);
            let records = sending.records();
            if records.is_empty() {
                return sent;
            }
            // Nothing waits yet, as a rule: a peer that does not take that is not sent more.
            let written = if self.outgoing.is_empty() {
                poll(stream.write(records))?
            } else {
                Poll::Pending
            };
            let written = match written {
                Poll::Ready(written) => written,
                Poll::Pending => 0,
            };
            self.outgoing.extend_from_slice(&records[written..]);
            sent
        })
    }

    /// Makes a close_notify, which waits to be sent.
    pub(super) fn send_close_notify(&mut self) {
        // One that has failed has sent an alert.
        let _failed = self.queue(Some(Outgoing::CloseNotify));
    }

    /// Sends what waits.
    pub(super) fn poll_flush(&mut self, stream: &mut impl Write) -> Poll<io::Result<()>> {
        flush(&mut self.outgoing, stream)
    }
}

/// A failure of the session's; only the peer's is misuse.
fn failed(error: TlsError) -> io::Error {
    if error == TlsError::EncryptError {
        io::Error::other(error)
    } else {
        invalid(error)
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, error)
}

/// Records to be sent, in memory that is used again.
struct Sending {
    buffer: Vec<u8>,
    length: usize,
}

impl Sending {
    fn clear(&mut self) {
        self.length = 0;
    }

    fn records(&self) -> &[u8] {
        &self.buffer[..self.length]
    }

    /// Adds what is written into a slice, which has to be as large as the error says.
    fn add(
        &mut self,
        mut write: impl FnMut(&mut [u8]) -> Result<usize, EncryptError>,
    ) -> Result<(), TlsError> {
        loop {
            match write(&mut self.buffer[self.length..]) {
                Ok(written) => {
                    self.length += written;
                    return Ok(());
                }
                Err(EncryptError::InsufficientSize(error)) => {
                    self.buffer.resize(self.length + error.required_size, 0);
                }
                Err(EncryptError::EncryptExhausted) => return Err(TlsError::EncryptError),
            }
        }
    }
}

/// What is left to do after a step.
enum Step {
    /// There may be more.
    Again,
    /// A close_notify came.
    Over,
    /// Nothing, until more bytes come.
    Idle,
}

/// What a record is made of.
enum Outgoing<'a> {
    Bytes(&'a [u8]),
    CloseNotify,
}

/// A connection of rustls', of either side.
trait Unbuffered: Send + Sync {
    fn common(&self) -> &CommonState;

    /// Takes a step, by what is at the beginning of some bytes: how many of them are done with.
    fn step(
        &mut self,
        incoming: &mut [u8],
        exchange: &mut Exchange<'_, '_>,
    ) -> (usize, Result<Step, TlsError>);
}

impl Unbuffered for UnbufferedServerConnection {
    fn common(&self) -> &CommonState {
        self
    }

    fn step(
        &mut self,
        incoming: &mut [u8],
        exchange: &mut Exchange<'_, '_>,
    ) -> (usize, Result<Step, TlsError>) {
        exchange.step(self.process_tls_records(incoming))
    }
}

impl Unbuffered for UnbufferedClientConnection {
    fn common(&self) -> &CommonState {
        self
    }

    fn step(
        &mut self,
        incoming: &mut [u8],
        exchange: &mut Exchange<'_, '_>,
    ) -> (usize, Result<Step, TlsError>) {
        exchange.step(self.process_tls_records(incoming))
    }
}

/// Where what came goes to, and what is to be sent.
struct Exchange<'a, 'n> {
    into: &'a mut [u8],
    filled: usize,
    /// What does not fit.
    more: &'a mut Vec<u8>,
    next: &'a mut Option<Outgoing<'n>>,
    sending: &'a mut Sending,
}

impl Exchange<'_, '_> {
    fn deliver(&mut self, bytes: &[u8]) {
        let room = &mut self.into[self.filled..];
        let (fits, rest) = bytes.split_at(room.len().min(bytes.len()));
        room[..fits.len()].copy_from_slice(fits);
        self.filled += fits.len();
        self.more.extend_from_slice(rest);
    }

    fn step<D>(
        &mut self,
        UnbufferedStatus { mut discard, state }: UnbufferedStatus<'_, '_, D>,
    ) -> (usize, Result<Step, TlsError>) {
        let step = state.and_then(|state| match state {
            ConnectionState::ReadTraffic(mut traffic) => {
                while let Some(record) = traffic.next_record() {
                    let record = record?;
                    discard += record.discard;
                    self.deliver(record.payload);
                }
                Ok(Step::Again)
            }
            ConnectionState::EncodeTlsData(mut message) => {
                let added = self.sending.add(|room| {
                    message.encode(room).map_err(|error| match error {
                        EncodeError::InsufficientSize(error) => error.into(),
                        EncodeError::AlreadyEncoded => EncryptError::EncryptExhausted,
                    })
                });
                added.map(|()| Step::Again)
            }
            ConnectionState::TransmitTlsData(sent) => {
                // It is sent before anything else is.
                sent.done();
                Ok(Step::Again)
            }
            ConnectionState::WriteTraffic(mut traffic) => {
                let sending = &mut *self.sending;
                match self.next.take() {
                    Some(Outgoing::Bytes(bytes)) => {
                        sending.add(|room| traffic.encrypt(bytes, room))?
                    }
                    Some(Outgoing::CloseNotify) => {
                        sending.add(|room| traffic.queue_close_notify(room))?
                    }
                    None => {}
                }
                Ok(Step::Idle)
            }
            ConnectionState::PeerClosed => Ok(Step::Over),
            ConnectionState::BlockedHandshake | ConnectionState::Closed => Ok(Step::Idle),
            // The first is not offered.
            ConnectionState::ReadEarlyData(_) | _ => {
                Err(TlsError::General("a state that is not known".to_owned()))
            }
        });
        (discard, step)
    }
}

thread_local! {
    /// Where records are read, within one call.
    static RECORDS: RefCell<Box<[u8]>> = RefCell::new(vec![0; RECORDS_SIZE].into_boxed_slice());
    /// Where they are made, within one call.
    static SENDING: RefCell<Sending> = const {
        RefCell::new(Sending { buffer: Vec::new(), length: 0 })
    };
}

/// Bytes of a handshake that are read at once: a chain of certificates comes in one or two.
const FLIGHT: usize = 4 << 10;
/// Four records of the greatest size, less their headers; so that what is in them fits where it is wanted.
const RECORDS_SIZE: usize = 64 << 10;
/// Bytes on the wire without content: some records of the greatest size, or thousands of empty ones.
const BARREN_MAX: usize = 128 << 10;

#[cfg(feature = "fuzzing")]
pub(super) mod fuzzing;
#[cfg(test)]
mod tests;
