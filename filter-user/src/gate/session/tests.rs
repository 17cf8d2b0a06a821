//! Verifies sessions against rustls' buffered connections, over a wire that cuts records anywhere.

use std::collections::VecDeque;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::version::{TLS12, TLS13};
use rustls::{Connection, RootCertStore, SupportedProtocolVersion};
use tokio::io::{DuplexStream, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;

#[tokio::test]
async fn what_is_said_arrives_whole_however_the_wire_cuts_it() {
    for piece in [1, 2, 5, 100, 16 << 10, 64 << 10] {
        for mut rig in Rig::all().await {
            rig.wire.piece = piece;
            let text: Vec<_> = (0..50_000_u32).map(|n| (n % 251) as u8).collect();

            rig.peer.writer().write_all(&text).unwrap();
            assert_eq!(rig.hear(text.len()), text, "{piece}");
            for part in text.chunks(20_000) {
                rig.say(part);
            }
            assert_eq!(rig.heard_by_peer(), text, "{piece}");
            assert_eq!(rig.kept(), 0, "{piece}");
        }
    }
}

#[tokio::test]
async fn keys_are_renewed_by_either_side_while_it_goes_on() {
    for mut rig in Rig::both(&TLS13, None).await {
        for _ in 0..3 {
            rig.peer.refresh_traffic_keys().unwrap();
            rig.peer.writer().write_all(b"question").unwrap();
            assert_eq!(rig.hear(8), b"question");
            // Its own are renewed with what it says next.
            rig.say(b"answer");
            assert_eq!(rig.heard_by_peer(), b"answer");
        }
        assert_eq!(rig.kept(), 0);
    }
}

#[tokio::test]
async fn an_end_is_heard_and_said_and_a_missing_one_is_an_error() {
    for mut rig in Rig::all().await {
        rig.peer.writer().write_all(b"last").unwrap();
        rig.peer.send_close_notify();
        rig.write_tls();
        // What is behind an end means nothing.
        rig.wire.to_us.extend([23; 1_000]);
        assert_eq!(rig.hear(4), b"last");
        assert!(matches!(rig.poll_read(&mut [0; 8]), Poll::Ready(Ok(0))));
        assert_eq!(rig.kept(), 0);
        // The other way is open.
        rig.say(b"answer");
        assert_eq!(rig.heard_by_peer(), b"answer");
        rig.session.send_close_notify();
        assert!(rig.session.holds_back());
        rig.flush();
        rig.heard_by_peer();
        assert!(matches!(rig.peer.reader().read(&mut [0; 8]), Ok(0)));
    }
    for mut rig in Rig::all().await {
        rig.wire.is_cut = true;
        let Poll::Ready(Err(error)) = rig.poll_read(&mut [0; 8]) else {
            panic!("no error");
        };
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }
}

#[tokio::test]
async fn what_the_stream_does_not_take_waits_and_keeps_its_order() {
    for mut rig in Rig::all().await {
        rig.wire.room = 10;
        rig.say(b"first");
        assert!(rig.session.holds_back());
        rig.say(b"second");
        while rig.session.holds_back() {
            rig.wire.room = 3;
            rig.flush();
        }

        assert_eq!(rig.heard_by_peer(), b"firstsecond");
        assert_eq!(rig.kept(), 0);
    }
}

#[tokio::test]
async fn between_the_pieces_of_a_message_of_the_handshake_something_is_said() {
    // A server's tickets, of which each is several records.
    let [_, mut rig] = Rig::both(&TLS13, Some(32)).await;
    rig.wire.piece = 1;
    rig.write_tls();
    let mut said = 0;
    while !rig.wire.to_us.is_empty() {
        assert!(rig.poll_read(&mut [0; 8]).is_pending());
        rig.wire.next();
        if said < 1_000 {
            rig.say(b".");
            said += 1;
        }
    }
    rig.peer.writer().write_all(b"answer").unwrap();

    assert_eq!(rig.hear(6), b"answer");
    assert_eq!(rig.heard_by_peer().len(), said);
}

#[tokio::test]
async fn a_forged_record_is_answered_by_an_alert_behind_what_waits() {
    for mut rig in Rig::all().await {
        rig.wire.room = 10;
        rig.say(b"answer");
        rig.wire.room = usize::MAX;
        rig.peer.writer().write_all(b"question").unwrap();
        rig.write_tls();
        rig.peer.writer().write_all(b"forged").unwrap();
        rig.write_tls();
        *rig.wire.to_us.back_mut().unwrap() ^= 1;
        // What came before it is read.
        assert_eq!(rig.hear(8), b"question");
        let Poll::Ready(Err(error)) = rig.poll_read(&mut [0; 64]) else {
            panic!("no error");
        };

        assert_eq!(error.kind(), ErrorKind::InvalidData);
        let mut records = &rig.wire.from_us[..];
        rig.peer.read_tls(&mut records).unwrap();
        let mut answer = [0; 6];
        let alert = rig.peer.process_new_packets().unwrap_err();
        assert!(matches!(alert, TlsError::AlertReceived(_)), "{alert}");
        rig.peer.reader().read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
        // And rustls is left alone.
        assert!(rig.session.push(&mut rig.wire, b".").is_err());
        rig.peer.send_close_notify();
        assert!(matches!(rig.poll_read(&mut [0; 64]), Poll::Ready(Err(_))));
    }
}

/// A session, and rustls' own at the other end.
struct Rig {
    session: Session,
    peer: Connection,
    wire: Wire,
}

impl Rig {
    async fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for version in [&TLS13, &TLS12] {
            all.extend(Self::both(version, None).await);
        }
        all
    }

    /// A session as server, and one as client; a server's records may be so small.
    async fn both(
        version: &'static SupportedProtocolVersion,
        max_fragment_size: Option<usize>,
    ) -> [Self; 2] {
        let (server, client) = configs(version, max_fragment_size);
        [
            Self::as_server(Arc::clone(&server), Arc::clone(&client)).await,
            Self::as_client(server, client).await,
        ]
    }

    async fn as_server(server: Arc<ServerConfig>, client: Arc<ClientConfig>) -> Self {
        let (mut ours, theirs) = duplex(PIPE);
        let connector = TlsConnector::from(client);
        let accepting = async {
            // Some of the ClientHello was read before.
            let mut read_ahead = vec![0; 100];
            ours.read_exact(&mut read_ahead).await.unwrap();
            let session = Session::server(server, read_ahead).unwrap();
            session.handshake(&mut ours).await
        };
        let (established, connected) = tokio::join!(accepting, connector.connect(name(), theirs));
        let (rest, peer) = connected.unwrap().into_inner();
        Self::new(established.unwrap(), ours, peer.into(), rest).await
    }

    async fn as_client(server: Arc<ServerConfig>, client: Arc<ClientConfig>) -> Self {
        let (mut ours, theirs) = duplex(PIPE);
        let session = Session::client(client, name()).unwrap();
        let acceptor = TlsAcceptor::from(server);
        let (established, accepted) =
            tokio::join!(session.handshake(&mut ours), acceptor.accept(theirs));
        let (rest, peer) = accepted.unwrap().into_inner();
        Self::new(established.unwrap(), ours, peer.into(), rest).await
    }

    /// With what each has sent and the other has not read.
    async fn new(
        session: Session,
        mut ours: DuplexStream,
        peer: Connection,
        mut theirs: DuplexStream,
    ) -> Self {
        let (mut to_us, mut from_us) = (Vec::new(), Vec::new());
        ours.shutdown().await.unwrap();
        theirs.shutdown().await.unwrap();
        ours.read_to_end(&mut to_us).await.unwrap();
        theirs.read_to_end(&mut from_us).await.unwrap();
        Self {
            session,
            peer,
            wire: Wire {
                to_us: to_us.into(),
                from_us,
                ..Wire::default()
            },
        }
    }

    fn write_tls(&mut self) {
        while self.peer.wants_write() {
            let mut records = Vec::new();
            self.peer.write_tls(&mut records).unwrap();
            self.wire.to_us.extend(records);
        }
    }

    fn poll_read(&mut self, into: &mut [u8]) -> Poll<io::Result<usize>> {
        self.write_tls();
        self.session.poll_read(&mut self.wire, into)
    }

    /// What the session hears, up to so many bytes.
    fn hear(&mut self, length: usize) -> Vec<u8> {
        let mut heard = Vec::new();
        let mut into = vec![0; 64 << 10];
        while heard.len() < length {
            match self.poll_read(&mut into) {
                Poll::Ready(read) => heard.extend_from_slice(&into[..read.unwrap()]),
                Poll::Pending => self.wire.next(),
            }
        }
        heard
    }

    fn say(&mut self, text: &[u8]) {
        self.session.push(&mut self.wire, text).unwrap();
    }

    fn flush(&mut self) {
        let _later: Poll<()> = self.session.poll_flush(&mut self.wire).map(Result::unwrap);
    }

    fn heard_by_peer(&mut self) -> Vec<u8> {
        let mut heard = Vec::new();
        let records = mem::take(&mut self.wire.from_us);
        let mut records = &records[..];
        while !records.is_empty() {
            self.peer.read_tls(&mut records).unwrap();
            self.peer.process_new_packets().unwrap();
            let mut plain = self.peer.reader();
            // What is not there yet is no error.
            let _would_block = plain.read_to_end(&mut heard);
        }
        heard
    }

    /// Bytes of memory that the session keeps for what is on its way.
    fn kept(&self) -> usize {
        let Session {
            incoming,
            outgoing,
            plain,
            ..
        } = &self.session;
        incoming.capacity() + outgoing.capacity() + plain.capacity()
    }
}

/// A stream that has so many bytes at a time, and takes so many.
struct Wire {
    to_us: VecDeque<u8>,
    from_us: Vec<u8>,
    /// Bytes of one read, behind which it would block once.
    piece: usize,
    /// Whether one was read since.
    is_read: bool,
    /// Bytes that it takes yet.
    room: usize,
    /// It is at its end when it is empty.
    is_cut: bool,
}

impl Default for Wire {
    fn default() -> Self {
        Self {
            to_us: VecDeque::new(),
            from_us: Vec::new(),
            piece: usize::MAX,
            is_read: false,
            room: usize::MAX,
            is_cut: false,
        }
    }
}

impl Wire {
    /// Lets the next piece come.
    fn next(&mut self) {
        self.is_read = false;
    }
}

impl Read for Wire {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.to_us.is_empty() && self.is_cut {
            return Ok(0);
        }
        if self.to_us.is_empty() || self.is_read && self.piece != usize::MAX {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.is_read = true;
        let some = into.len().min(self.piece);
        self.to_us.read(&mut into[..some])
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.room == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        let some = bytes.len().min(self.room);
        self.room = match self.room {
            usize::MAX => usize::MAX,
            room => room - some,
        };
        self.from_us.extend_from_slice(&bytes[..some]);
        Ok(some)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn configs(
    version: &'static SupportedProtocolVersion,
    max_fragment_size: Option<usize>,
) -> (Arc<ServerConfig>, Arc<ClientConfig>) {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(vec!["shop.example".to_owned()]).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(cert.der().clone()).unwrap();
    let key = signing_key.serialize_der().try_into().unwrap();
    let server = ServerConfig::builder_with_protocol_versions(&[version]).with_no_client_auth();
    let server = server.with_single_cert(vec![cert.der().clone()], key);
    let mut server = server.unwrap();
    server.max_fragment_size = max_fragment_size;
    let client = ClientConfig::builder().with_root_certificates(roots);
    (Arc::new(server), Arc::new(client.with_no_client_auth()))
}

fn name() -> ServerName<'static> {
    ServerName::try_from("shop.example").unwrap()
}

/// Bytes on their way during the handshake: records come in pieces.
const PIPE: usize = 700;
