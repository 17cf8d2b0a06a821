//! Several requests on one connection, by HTTP/2, which lets each name a host of its own (RFC 9113 §8.3.1).

use std::io::{self, ErrorKind};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use http::header::HeaderMap;
use tokio::net::TcpStream as AsyncTcpStream;
use tokio::runtime::Builder;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::{AGENT, Answer, CONNECT_TIMEOUT, ClientMemory, Visit};

impl Visit<'_> {
    /// Connects, asks for the page of each host in turn, and leaves. Neither [`Self::host`] nor [`Self::headers`] is
    /// sent, and no session is kept. For each host there is an answer, or why there is none.
    ///
    /// # Errors
    ///
    /// Returns why nothing could be asked: the server refuses the handshake, does not speak HTTP/2, or takes too long.
    pub fn ask_by_http2(&self, hosts: &[&str]) -> io::Result<Vec<io::Result<Answer>>> {
        let stream = TcpStream::connect_timeout(&self.address, CONNECT_TIMEOUT)?;
        stream.set_nonblocking(true)?;
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let more = PATIENCE_EACH * u32::try_from(hosts.len()).unwrap_or(0);
        let mut answers = Vec::new();
        let asked = runtime.block_on(async {
            let asking = self.ask_each(AsyncTcpStream::from_std(stream)?, hosts, &mut answers);
            match timeout(self.patience + more, asking).await {
                Ok(asked) => asked,
                Err(_elapsed) => Err(ErrorKind::TimedOut.into()),
            }
        });
        match asked {
            Err(error) if answers.is_empty() => return Err(error),
            Err(error) => answers.resize_with(hosts.len(), || Err(error.kind().into())),
            Ok(()) => {}
        }
        Ok(answers)
    }

    async fn ask_each(
        &self,
        stream: AsyncTcpStream,
        hosts: &[&str],
        answers: &mut Vec<io::Result<Answer>>,
    ) -> io::Result<()> {
        let memory = ClientMemory::new();
        memory.identity.begin(self.identity.clone());
        let (mut config, name) = self.client(&memory)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, stream).await?;
        if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Err(io::Error::other("the server does not speak HTTP/2"));
        }
        let mut builder = h2::client::Builder::new();
        builder.max_header_list_size(HEAD_MAX).enable_push(false);
        let opened = builder.handshake(stream).await;
        let (requests, connection) = opened.map_err(io::Error::other)?;
        let asking = async {
            for host in hosts {
                answers.push(self.ask_for(requests.clone(), host).await);
            }
            Ok(())
        };
        tokio::select! {
            biased;
            asked = asking => asked,
            ended = connection => match ended {
                Ok(()) => Err(ErrorKind::UnexpectedEof.into()),
                Err(error) => Err(io::Error::other(error)),
            },
        }
    }

    async fn ask_for(&self, requests: SendRequest<Bytes>, host: &str) -> io::Result<Answer> {
        let request = Request::get(format!("https://{host}{}", self.path));
        let request = request.header("user-agent", AGENT).body(());
        let request = request.map_err(io::Error::other)?;
        let mut requests = requests.ready().await.map_err(io::Error::other)?;
        let (response, _) = requests
            .send_request(request, true)
            .map_err(io::Error::other)?;
        let (head, mut parts) = response.await.map_err(io::Error::other)?.into_parts();
        let mut body = Vec::new();
        while body.len() < Answer::BODY_MAX {
            let Some(part) = parts.data().await else {
                break;
            };
            let part = part.map_err(io::Error::other)?;
            let room = part.len().min(Answer::BODY_MAX - body.len());
            body.extend_from_slice(&part[..room]);
            let window = parts.flow_control();
            window
                .release_capacity(part.len())
                .map_err(io::Error::other)?;
        }
        Ok(Answer {
            status: Some(head.status.as_u16()),
            head: lines(&head.headers),
            body: String::from_utf8_lossy(&body).into_owned(),
        })
    }
}

/// As HTTP/1.1 has them.
fn lines(headers: &HeaderMap) -> String {
    let lines = headers.iter().map(|(name, value)| {
        let value = String::from_utf8_lossy(value.as_bytes());
        format!("{name}: {value}\r\n")
    });
    lines.collect()
}

/// Bytes of an answer's head that are taken.
const HEAD_MAX: u32 = 16 << 10;
/// What each request adds to the time for a connection.
const PATIENCE_EACH: Duration = Duration::from_millis(500);
