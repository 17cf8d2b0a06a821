//! What a client may do to a session, before and after its handshake: the session never panics, and says nothing that was
//! not said to it.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::{Arc, LazyLock};
use std::task::Poll;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig};

use super::Session;

/// Carries out two bytes at a time: what is done, and to how much.
pub(in crate::gate) fn session(script: &[u8]) {
    let Some(mut play) = Play::new() else {
        return;
    };
    for &[what, much] in script.as_chunks().0 {
        let much = usize::from(much);
        match what % 8 {
            // Records arrive, whole or in part; or are changed, lost or made up on their way.
            0 => play.deliver(much * much),
            1 => {
                play.is_honest = false;
                if let Some(byte) = play.on_its_way.get_mut(much) {
                    *byte ^= 1 << (what >> 5);
                }
            }
            2 => {
                play.is_honest &= play.on_its_way.is_empty() || much == 0;
                play.on_its_way.drain(..much.min(play.on_its_way.len()));
            }
            3 => {
                play.is_honest = false;
                play.on_its_way.extend([what ^ 22, 3, 3, 0, what, what]);
            }
            // Either says something.
            4 => {
                let text = play.text(much);
                drop(play.client.writer().write_all(&text));
            }
            5 => drop(play.session.push(&mut play.pipe, &[b'.'; 9])),
            6 => drop(play.client.refresh_traffic_keys()),
            _ if much == 0 => {
                play.is_honest &= !play.client.is_handshaking();
                // rustls' client would assert that it has sent no alert yet.
                play.is_deaf |= play.client.is_handshaking();
                play.client.send_close_notify();
            }
            _ => play.answer(),
        }
    }
}

struct Play {
    session: Session,
    client: ClientConnection,
    pipe: Pipe,
    /// What the client has sent.
    on_its_way: VecDeque<u8>,
    /// Nothing was changed.
    is_honest: bool,
    /// The client has heard what it cannot go on after.
    is_deaf: bool,
    said: usize,
    heard: usize,
}

impl Play {
    fn new() -> Option<Self> {
        let (server, client) = CONFIGS.as_ref()?;
        let name = ServerName::try_from(NAME).ok()?;
        Some(Self {
            session: Session::server(Arc::clone(server), Vec::new()).ok()?,
            client: ClientConnection::new(Arc::clone(client), name).ok()?,
            pipe: Pipe::default(),
            on_its_way: VecDeque::new(),
            is_honest: true,
            is_deaf: false,
            said: 0,
            heard: 0,
        })
    }

    /// What the client says next.
    fn text(&mut self, length: usize) -> Vec<u8> {
        let text = (self.said..self.said + length).map(letter).collect();
        self.said += length;
        text
    }

    /// Lets so many bytes arrive, and the session hear them.
    fn deliver(&mut self, count: usize) {
        while self.client.wants_write() {
            let mut records = Vec::new();
            if self.client.write_tls(&mut records).is_err() {
                break;
            }
            self.on_its_way.extend(records);
        }
        let count = count.min(self.on_its_way.len());
        self.pipe.to_us.extend(self.on_its_way.drain(..count));
        let mut into = [0; 300];
        while let Poll::Ready(read) = self.session.poll_read(&mut self.pipe, &mut into) {
            let Ok(read @ 1..) = read else {
                assert!(!self.is_honest || read.is_ok(), "{read:?}");
                break;
            };
            for byte in &into[..read] {
                assert_eq!(*byte, letter(self.heard));
                self.heard += 1;
            }
        }
        let _later: Poll<io::Result<()>> = self.session.poll_flush(&mut self.pipe);
    }

    /// Lets the client hear what the session has sent.
    fn answer(&mut self) {
        // rustls asserts that it is asked no more after an error.
        if self.is_deaf {
            return;
        }
        let records = std::mem::take(&mut self.pipe.from_us);
        let mut records = &records[..];
        while self
            .client
            .read_tls(&mut records)
            .is_ok_and(|read| read > 0)
        {
            let heard = self.client.process_new_packets();
            assert!(!self.is_honest || heard.is_ok(), "{heard:?}");
            drop(self.client.reader().read_to_end(&mut Vec::new()));
            if heard.is_err() {
                self.is_deaf = true;
                break;
            }
        }
    }
}

fn letter(place: usize) -> u8 {
    b'a' + u8::try_from(place % 26).unwrap_or_default()
}

#[derive(Default)]
struct Pipe {
    to_us: VecDeque<u8>,
    from_us: Vec<u8>,
}

impl Read for Pipe {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self.to_us.read(into)? {
            0 => Err(ErrorKind::WouldBlock.into()),
            read => Ok(read),
        }
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.from_us.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

static CONFIGS: LazyLock<Option<(Arc<ServerConfig>, Arc<ClientConfig>)>> = LazyLock::new(|| {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(vec![NAME.to_owned()]).ok()?;
    let mut roots = RootCertStore::empty();
    roots.add(cert.der().clone()).ok()?;
    let key = signing_key.serialize_der().try_into().ok()?;
    let server = ServerConfig::builder().with_no_client_auth();
    let server = server
        .with_single_cert(vec![cert.der().clone()], key)
        .ok()?;
    let client = ClientConfig::builder().with_root_certificates(roots);
    Some((Arc::new(server), Arc::new(client.with_no_client_auth())))
});

const NAME: &str = "shop.example";
