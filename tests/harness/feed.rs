//! A range feed over HTTPS that answers whatever it is told to, also what no server should.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::net::{Host, Network};
use crate::pki::Pki;

/// What the feed answers.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Answer {
    /// Status 200 with this body.
    Body(String),
    /// This status line's code, without a body.
    Status(u16),
    /// Half of the announced body, then the end.
    Truncated(String),
    /// The end of the connection before any answer.
    #[default]
    Nothing,
}

/// The server; it stops when dropped.
pub struct Feed {
    address: SocketAddr,
    answer: Arc<Mutex<Answer>>,
    serving: Option<JoinHandle<()>>,
    network: Arc<Network>,
}

impl Feed {
    /// Starts to serve on the origin's loopback.
    #[must_use]
    pub fn start(network: &Arc<Network>, pki: &Pki, answer: Answer) -> Self {
        let certificate = CertificateDer::from_pem_file(pki.path("feed.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_file(pki.path("feed.key")).unwrap();
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        let config = Arc::new(config);
        let listener = network.on(Host::Origin, || TcpListener::bind("127.0.0.1:0").unwrap());
        let address = listener.local_addr().unwrap();
        let answer = Arc::new(Mutex::new(answer));

        let answers = Arc::clone(&answer);
        // A socket stays in the namespace it was opened in, whoever accepts from it.
        let serving = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                let answer = answers.lock().unwrap().clone();
                if Arc::strong_count(&answers) == 1 {
                    return;
                }
                // A client that does not trust us, or has seen enough, ends its connection.
                serve(stream, Arc::clone(&config), &answer).ok();
            }
        });
        Self {
            address,
            answer,
            serving: Some(serving),
            network: Arc::clone(network),
        }
    }

    /// Answers this from now on.
    pub fn answer(&self, answer: Answer) {
        *self.answer.lock().unwrap() = answer;
    }

    /// Where it is served.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}/client/v4/ips", self.address)
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        let address = self.address;
        // The server looks up from accept, and finds that nobody else holds its answers.
        self.answer = Arc::default();
        let woken = self
            .network
            .on(Host::Origin, move || TcpStream::connect(address).is_ok());
        if let Some(serving) = self.serving.take().filter(|_| woken) {
            serving.join().ok();
        }
    }
}

fn serve(stream: TcpStream, config: Arc<ServerConfig>, answer: &Answer) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let connection = ServerConnection::new(config).map_err(std::io::Error::other)?;
    let mut stream = StreamOwned::new(connection, stream);
    let mut request = Vec::new();
    let mut chunk = [0; 1024];
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        match stream.read(&mut chunk)? {
            0 => return Ok(()),
            count => request.extend_from_slice(&chunk[..count]),
        }
    }
    match answer {
        Answer::Body(body) => {
            write!(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )?;
        }
        Answer::Status(status) => {
            write!(
                stream,
                "HTTP/1.1 {status} Status\r\ncontent-length: 0\r\n\r\n"
            )?;
        }
        Answer::Truncated(body) => {
            let half = &body[..body.len() / 2];
            write!(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{half}",
                body.len()
            )?;
        }
        Answer::Nothing => return Ok(()),
    }
    stream.conn.send_close_notify();
    stream.flush()
}

/// Cloudflare's API answer with the embedded ranges and some more.
#[must_use]
pub fn api_answer(more_v4: &[&str], more_v6: &[&str]) -> String {
    let list = |text: &str, more: &[&str]| {
        let lines: Vec<_> = text.lines().chain(more.iter().copied()).collect();
        serde_json::Value::from(lines)
    };
    serde_json::json!({
        "result": {
            "ipv4_cidrs": list(IPS_V4, more_v4),
            "ipv6_cidrs": list(IPS_V6, more_v6),
            "etag": "38f79d050aa027e3be3865e495dcc9bc",
        },
        "success": true,
        "errors": [],
        "messages": [],
    })
    .to_string()
}

/// The embedded IPv4 ranges.
pub(crate) const IPS_V4: &str = include_str!("../../filter-user/baseline/ips-v4");
/// The embedded IPv6 ranges.
pub(crate) const IPS_V6: &str = include_str!("../../filter-user/baseline/ips-v6");
