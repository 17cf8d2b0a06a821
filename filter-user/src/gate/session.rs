//! TLS over a stream, without a buffer while nothing is on its way.
//!
//! rustls' buffered connections keep 4 KiB each to read into. Here records are read into a buffer of the thread's, and a
//! session keeps what of them has not come whole.

use std::cell::RefCell;
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::ops::Deref;
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
    /// What the peer has said, and was not asked for yet.
    plain: Vec<u8>,
    /// The peer has said that this was all.
    is_over: bool,
    /// rustls is not asked any more.
    has_failed: bool,
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
    pub(super) fn server(config: Arc<ServerConfig>, heard: Vec<u8>) -> io::Result<Self> {
        let tls = UnbufferedServerConnection::new(config).map_err(invalid)?;
        Ok(Self::new(Box::new(tls), heard))
    }

    /// One with a server.
    ///
    /// # Errors
    ///
    /// As [`Self::server`].
    pub(super) fn client(config: Arc<ClientConfig>, name: ServerName<'static>) -> io::Result<Self> {
        let tls = UnbufferedClientConnection::new(config, name).map_err(invalid)?;
        Ok(Self::new(Box::new(tls), Vec::new()))
    }

    fn new(tls: Box<dyn Unbuffered>, incoming: Vec<u8>) -> Self {
        Self {
            tls,
            incoming,
            outgoing: Vec::new(),
            plain: Vec::new(),
            is_over: false,
            has_failed: false,
            barren: 0,
        }
    }

    /// Shakes hands.
    ///
    /// # Errors
    ///
    /// Returns what keeps it from that; its alert is sent.
    pub(super) async fn shake_hands(
        mut self,
        stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    ) -> io::Result<Self> {
        loop {
            let taken = self.take_kept();
            let sent = stream.write_all(&self.outgoing).await;
            self.outgoing = Vec::new();
            taken.and(sent)?;
            if !self.is_handshaking() {
                self.incoming.shrink_to_fit();
                return Ok(self);
            }
            if stream.read_buf(&mut self.incoming).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Takes what is kept; what it answers waits.
    fn take_kept(&mut self) -> io::Result<()> {
        SENDING.with_borrow_mut(|sending| {
            let said = self.say(None, sending);
            self.outgoing.extend_from_slice(sending.records());
            said
        })
    }

    /// Says something, after what is kept was taken.
    fn say(&mut self, mut word: Option<Word<'_>>, sending: &mut Sending) -> io::Result<()> {
        sending.clear();
        let mut kept = mem::take(&mut self.incoming);
        let (consumed, _none) = self.take(&mut kept, &mut [], &mut word, sending)?;
        kept.drain(..consumed);
        self.incoming = kept;
        match word {
            Some(_) => Err(invalid("the session takes nothing now")),
            None => Ok(()),
        }
    }

    /// Takes the records at the beginning of some bytes, and then says something: how many bytes the records are, and how
    /// many of `into` are filled. What does not fit there waits.
    fn take(
        &mut self,
        incoming: &mut [u8],
        into: &mut [u8],
        word: &mut Option<Word<'_>>,
        sending: &mut Sending,
    ) -> io::Result<(usize, usize)> {
        if self.has_failed {
            return Err(invalid("the session has failed"));
        }
        let mut exchange = Exchange {
            into,
            filled: 0,
            more: &mut self.plain,
            word,
            sending,
        };
        let mut consumed = 0;
        let mut step = || {
            // rustls may still refer to what it has not discarded.
            let records = incoming.get_mut(consumed..).unwrap_or_default();
            let (discard, next) = self.tls.step(records, &mut exchange);
            consumed += discard;
            next
        };
        let failure = loop {
            match step() {
                Ok(Next::Again) => {}
                Ok(Next::Over) => self.is_over = true,
                Ok(Next::Idle) => break None,
                Err(error) => break Some(error),
            }
        };
        if let Some(failure) = failure {
            self.has_failed = true;
            // Its alert comes after it. rustls must not look at the record once more.
            while self.tls.common().wants_write() {
                drop(self.tls.step(&mut [], &mut exchange));
            }
            return Err(invalid(failure));
        }
        Ok((consumed, exchange.filled))
    }

    /// Whether the stream has yet to take something.
    pub(super) fn holds_back(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Reads; 0 is the end, which the peer has said.
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
            while !self.is_over {
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
                    let (consumed, filled) = self.take_read(&mut incoming, into, stream)?;
                    if consumed > 0 {
                        incoming = incoming[consumed..].to_vec();
                    }
                    self.incoming = incoming;
                    filled
                } else {
                    records[..kept].copy_from_slice(&incoming);
                    let records = &mut records[..kept + read];
                    let (consumed, filled) = self.take_read(records, into, stream)?;
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
            Poll::Ready(Ok(0))
        })
    }

    /// Takes records that were read: [`Self::take`]. What they are answered waits, unless it is an alert.
    fn take_read(
        &mut self,
        records: &mut [u8],
        into: &mut [u8],
        stream: &mut impl Write,
    ) -> io::Result<(usize, usize)> {
        SENDING.with_borrow_mut(|sending| {
            sending.clear();
            let taken = self.take(records, into, &mut None, sending);
            if taken.is_err() {
                // If there is one, and it fits.
                let _lost = stream.write(sending.records());
            } else {
                self.outgoing.extend_from_slice(sending.records());
            }
            taken
        })
    }

    /// Takes all the bytes; what the stream does not take waits.
    pub(super) fn push(&mut self, stream: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
        SENDING.with_borrow_mut(|sending| {
            self.say(Some(Word::Bytes(bytes)), sending)?;
            let records = sending.records();
            // Nothing waits yet, as a rule: who does not take that is not sent more.
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
            Ok(())
        })
    }

    /// Says that nothing more comes; it waits to be sent.
    pub(super) fn end(&mut self) {
        SENDING.with_borrow_mut(|sending| {
            // One that has failed says nothing more.
            let _failed = self.say(Some(Word::End), sending);
            self.outgoing.extend_from_slice(sending.records());
        });
    }

    /// Sends what waits.
    pub(super) fn poll_flush(&mut self, stream: &mut impl Write) -> Poll<io::Result<()>> {
        flush(&mut self.outgoing, stream)
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

/// What becomes of a session after a step.
enum Next {
    /// There may be more to do.
    Again,
    /// The peer has said that this was all.
    Over,
    /// It waits for bytes.
    Idle,
}

/// What is said to the peer.
enum Word<'a> {
    Bytes(&'a [u8]),
    /// That this was all.
    End,
}

/// A connection of rustls', of either side.
trait Unbuffered: Send + Sync {
    fn common(&self) -> &CommonState;

    /// Takes a step, by what is at the beginning of some bytes: how many of them are done with.
    fn step(
        &mut self,
        incoming: &mut [u8],
        exchange: &mut Exchange<'_, '_>,
    ) -> (usize, Result<Next, TlsError>);
}

impl Unbuffered for UnbufferedServerConnection {
    fn common(&self) -> &CommonState {
        self
    }

    fn step(
        &mut self,
        incoming: &mut [u8],
        exchange: &mut Exchange<'_, '_>,
    ) -> (usize, Result<Next, TlsError>) {
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
    ) -> (usize, Result<Next, TlsError>) {
        exchange.step(self.process_tls_records(incoming))
    }
}

/// What is heard, and what is said.
struct Exchange<'a, 'w> {
    into: &'a mut [u8],
    filled: usize,
    /// What does not fit.
    more: &'a mut Vec<u8>,
    word: &'a mut Option<Word<'w>>,
    sending: &'a mut Sending,
}

impl Exchange<'_, '_> {
    fn hear(&mut self, bytes: &[u8]) {
        let room = &mut self.into[self.filled..];
        let (fits, rest) = bytes.split_at(room.len().min(bytes.len()));
        room[..fits.len()].copy_from_slice(fits);
        self.filled += fits.len();
        self.more.extend_from_slice(rest);
    }

    fn step<D>(
        &mut self,
        UnbufferedStatus { mut discard, state }: UnbufferedStatus<'_, '_, D>,
    ) -> (usize, Result<Next, TlsError>) {
        let next = state.and_then(|state| match state {
            ConnectionState::ReadTraffic(mut traffic) => {
                while let Some(record) = traffic.next_record() {
                    let record = record?;
                    discard += record.discard;
                    self.hear(record.payload);
                }
                Ok(Next::Again)
            }
            ConnectionState::EncodeTlsData(mut message) => {
                let added = self.sending.add(|room| {
                    message.encode(room).map_err(|error| match error {
                        EncodeError::InsufficientSize(error) => error.into(),
                        EncodeError::AlreadyEncoded => EncryptError::EncryptExhausted,
                    })
                });
                added.map(|()| Next::Again)
            }
            ConnectionState::TransmitTlsData(sent) => {
                // It is sent before anything else is.
                sent.done();
                Ok(Next::Again)
            }
            ConnectionState::WriteTraffic(mut traffic) => {
                let sending = &mut *self.sending;
                match self.word.take() {
                    Some(Word::Bytes(bytes)) => sending.add(|room| traffic.encrypt(bytes, room))?,
                    Some(Word::End) => sending.add(|room| traffic.queue_close_notify(room))?,
                    None => {}
                }
                Ok(Next::Idle)
            }
            ConnectionState::PeerClosed => Ok(Next::Over),
            ConnectionState::BlockedHandshake | ConnectionState::Closed => Ok(Next::Idle),
            // The first is not offered.
            ConnectionState::ReadEarlyData(_) | _ => {
                Err(TlsError::General("a state that is not known".to_owned()))
            }
        });
        (discard, next)
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

/// Four records of the greatest size, less their headers; so that what is in them fits where it is wanted.
const RECORDS_SIZE: usize = 64 << 10;
/// Bytes on the wire without content: some records of the greatest size, or thousands of empty ones.
const BARREN_MAX: usize = 128 << 10;

#[cfg(feature = "fuzzing")]
pub(super) mod fuzzing;
#[cfg(test)]
mod tests;
