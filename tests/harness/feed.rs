//! A range feed over HTTPS that gives any answer, also one that no server should.

use std::collections::HashMap;
use std::io::{Read as _, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::eventually;
use crate::net::{Host, Network};
use crate::pki::Pki;

/// What the feed answers.
#[derive(Clone, Debug, Default)]
pub enum Answer {
    /// Status 200 with this body.
    Body(String),
    /// Status 200 with these header lines and this body.
    With(&'static str, Vec<u8>),
    /// This status line's code with these header lines, without a body.
    Status(u16, &'static str),
    /// Half of the announced body, then the end.
    Truncated(String),
    /// Status 200 and a byte of the body each second.
    Drip(String),
    /// Header lines without end.
    EndlessHead,
    /// A body without end.
    EndlessBody,
    /// The end of the connection before any answer.
    #[default]
    Nothing,
    /// No server listens.
    Refused,
}

/// The server; it stops when dropped.
pub struct Feed {
    address: SocketAddr,
    state: Arc<State>,
    serving: Option<JoinHandle<()>>,
    network: Arc<Network>,
}

struct State {
    script: Mutex<Script>,
    /// Notified when the script has changed.
    changed: Condvar,
}

struct Script {
    answer: Answer,
    /// Answers for single paths.
    at: HashMap<String, Answer>,
    tls: Arc<ServerConfig>,
    /// The heads of all requests.
    requests: Vec<String>,
    stop: bool,
}

impl Feed {
    /// Starts to serve on an address of the origin's loopback.
    #[must_use]
    pub fn start(network: &Arc<Network>, pki: &Pki, address: &str, answer: Answer) -> Self {
        let bind = |address: &str| network.on(Host::Origin, || TcpListener::bind(address).unwrap());
        let listener = bind(&format!("{address}:0"));
        let address = listener.local_addr().unwrap();
        let script = Script {
            answer,
            at: HashMap::new(),
            tls: tls(pki, "feed"),
            requests: Vec::new(),
            stop: false,
        };
        let state = Arc::new(State {
            script: Mutex::new(script),
            changed: Condvar::new(),
        });
        let (serving, namespace) = (Arc::clone(&state), network.namespace(Host::Origin));
        let serving = std::thread::spawn(move || {
            Network::enter(&namespace);
            listen(&serving, listener, address);
        });
        Self {
            address,
            state,
            serving: Some(serving),
            network: Arc::clone(network),
        }
    }

    /// Answers this from now on, whatever is asked for.
    pub fn answer(&self, answer: Answer) {
        self.change(|script| {
            script.answer = answer;
            script.at.clear();
        });
    }

    /// Answers this from now on, if this path is asked for.
    pub fn answer_at(&self, path: &str, answer: Answer) {
        self.change(|script| {
            script.at.insert(path.to_owned(), answer);
        });
    }

    /// Shows this certificate from now on.
    pub fn present(&self, pki: &Pki, identity: &str) {
        let tls = tls(pki, identity);
        self.change(|script| script.tls = tls);
    }

    /// The heads of the requests since the last call.
    #[must_use]
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.script.lock().unwrap().requests)
    }

    /// Where a path is served.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("https://{}{path}", self.address)
    }

    fn change(&self, change: impl FnOnce(&mut Script)) {
        let mut script = self.state.script.lock().unwrap();
        let was_closed = matches!(script.answer, Answer::Refused);
        change(&mut script);
        let is_closed = matches!(script.answer, Answer::Refused);
        self.state.changed.notify_all();
        drop(script);
        if was_closed != is_closed {
            // It looks up from accept and closes, or from its sleep and listens.
            let done = || (self.knock() != is_closed).then_some(());
            eventually("the feed opens or closes its socket", done);
        }
    }

    /// Whether a server listens.
    fn knock(&self) -> bool {
        let address = self.address;
        self.network
            .on(Host::Origin, move || TcpStream::connect(address).is_ok())
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.state.script.lock().unwrap().stop = true;
        self.state.changed.notify_all();
        self.knock();
        if let Some(serving) = self.serving.take() {
            drop(serving.join());
        }
    }
}

/// Accepts until the end, each connection in a thread of its own.
fn listen(state: &Arc<State>, mut listener: TcpListener, address: SocketAddr) {
    loop {
        let (stream, _) = listener.accept().unwrap();
        let mut script = state.script.lock().unwrap();
        if matches!(script.answer, Answer::Refused) && !script.stop {
            drop((stream, listener));
            while matches!(script.answer, Answer::Refused) && !script.stop {
                script = state.changed.wait(script).unwrap();
            }
            // The knock that announces the end may have come before we listen again.
            if script.stop {
                return;
            }
            listener = TcpListener::bind(address).unwrap();
            continue;
        }
        if script.stop {
            return;
        }
        drop(script);
        let state = Arc::clone(state);
        // A client that does not trust us, or has seen enough, ends its connection.
        std::thread::spawn(move || serve(stream, &state).ok());
    }
}

fn serve(stream: TcpStream, state: &State) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let tls = Arc::clone(&state.script.lock().unwrap().tls);
    let connection = ServerConnection::new(tls).map_err(std::io::Error::other)?;
    let mut stream = StreamOwned::new(connection, stream);
    let mut request = Vec::new();
    let mut chunk = [0; 1024];
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        match stream.read(&mut chunk)? {
            0 => return Ok(()),
            count => request.extend_from_slice(&chunk[..count]),
        }
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let path = request.split(' ').nth(1).unwrap_or_default();
    let answer = {
        let mut script = state.script.lock().unwrap();
        let answer = script.at.get(path).unwrap_or(&script.answer).clone();
        script.requests.push(request.clone());
        answer
    };
    match answer {
        Answer::Body(body) => respond(&mut stream, 200, "", body.len(), body.as_bytes())?,
        Answer::With(head, body) => respond(&mut stream, 200, head, body.len(), &body)?,
        Answer::Status(status, head) => respond(&mut stream, status, head, 0, &[])?,
        Answer::Truncated(body) => {
            let half = &body.as_bytes()[..body.len() / 2];
            respond(&mut stream, 200, "", body.len(), half)?;
        }
        Answer::Drip(body) => {
            respond(&mut stream, 200, "", body.len(), &[])?;
            // As long as the client waits for, and not for ever.
            for byte in body.as_bytes().iter().take(60) {
                stream.write_all(&[*byte])?;
                stream.flush()?;
                std::thread::sleep(Duration::from_secs(1));
            }
        }
        Answer::EndlessHead => {
            stream.write_all(b"HTTP/1.1 200 OK\r\n")?;
            for number in 0..1_000_000 {
                write!(stream, "x-{number}: {}\r\n", "x".repeat(100))?;
            }
        }
        Answer::EndlessBody => {
            respond(&mut stream, 200, "", usize::MAX / 2, &[])?;
            for _ in 0..1_000_000 {
                stream.write_all(&[b'1'; 1024])?;
            }
        }
        Answer::Nothing | Answer::Refused => return Ok(()),
    }
    stream.conn.send_close_notify();
    stream.flush()
}

/// Answers with these header lines, each of which ends itself.
fn respond(
    stream: &mut impl Write,
    status: u16,
    head: &str,
    length: usize,
    body: &[u8],
) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 {status} Status\r\ncontent-length: {length}\r\n{head}\r\n"
    )?;
    stream.write_all(body)
}

fn tls(pki: &Pki, identity: &str) -> Arc<ServerConfig> {
    let certificate = pki.path(&format!("{identity}.pem"));
    let certificate = CertificateDer::from_pem_file(certificate).unwrap();
    let key = PrivateKeyDer::from_pem_file(pki.path(&format!("{identity}.key"))).unwrap();
    let config = ServerConfig::builder().with_no_client_auth();
    Arc::new(config.with_single_cert(vec![certificate], key).unwrap())
}

/// Where the lab's feed serves the API's answer.
pub const API: &str = "/client/v4/ips";

/// Cloudflare's API answer with the embedded ranges and some more.
#[must_use]
pub fn api_answer(more_v4: &[&str], more_v6: &[&str]) -> String {
    let list = |text: &'static str, more| text.lines().chain(more).collect::<Vec<_>>();
    api_answer_of(
        &list(IPS_V4, more_v4.iter().copied()),
        &list(IPS_V6, more_v6.iter().copied()),
    )
}

/// Cloudflare's API answer with the embedded ranges but for one of IPv4.
#[must_use]
pub fn api_answer_without(gone: &str) -> String {
    let v4: Vec<_> = IPS_V4.lines().filter(|net| *net != gone).collect();
    api_answer_of(&v4, &IPS_V6.lines().collect::<Vec<_>>())
}

/// Cloudflare's API answer with these ranges.
#[must_use]
pub fn api_answer_of(v4: &[&str], v6: &[&str]) -> String {
    serde_json::json!({
        "result": {
            "ipv4_cidrs": v4,
            "ipv6_cidrs": v6,
            "etag": "38f79d050aa027e3be3865e495dcc9bc",
        },
        "success": true,
        "errors": [],
        "messages": [],
    })
    .to_string()
}

/// The embedded IPv4 ranges.
pub const IPS_V4: &str = include_str!("../../filter-user/baseline/ips-v4");
/// The embedded IPv6 ranges.
pub const IPS_V6: &str = include_str!("../../filter-user/baseline/ips-v6");
