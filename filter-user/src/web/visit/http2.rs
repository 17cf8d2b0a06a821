//! Several requests on one connection, by HTTP/2, which lets each name a host of its own (RFC 9113 §8.3.1).

use std::io::{self, ErrorKind};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use bytes::Buf as _;
use h2::client::SendRequest;
use http::Request;
use tokio::net::TcpStream as AsyncTcpStream;
use tokio::runtime::Builder;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::{AGENT, ANSWER_MAX, Answer, CONNECT_TIMEOUT, ClientMemory, Visit};

impl Visit<'_> {
    /// Connects, asks for the page of each host in turn, and leaves. Neither [`Self::host`] nor [`Self::headers`] is
    /// sent.
    ///
    /// # Errors
    ///
    /// Returns why there is not an answer to each: the server does not speak HTTP/2, refuses the handshake or the
    /// stream, or takes too long.
    pub fn ask_by_http2(&self, hosts: &[&str]) -> io::Result<Vec<Answer>> {
        let stream = TcpStream::connect_timeout(&self.address, CONNECT_TIMEOUT)?;
        stream.set_nonblocking(true)?;
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let patience = self.patience + PATIENCE_EACH * u32::try_from(hosts.len()).unwrap_or(0);
        runtime.block_on(async {
            let asking = self.ask_each(AsyncTcpStream::from_std(stream)?, hosts);
            let answers = timeout(patience, asking).await;
            answers.map_err(|_elapsed| io::Error::from(ErrorKind::TimedOut))?
        })
    }

    async fn ask_each(&self, stream: AsyncTcpStream, hosts: &[&str]) -> io::Result<Vec<Answer>> {
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
        let (requests, connection) = builder.handshake(stream).await.map_err(io::Error::other)?;
        let asking = async {
            let mut answers = Vec::new();
            for host in hosts {
                answers.push(self.ask_for(requests.clone(), host).await?);
            }
            Ok(answers)
        };
        tokio::select! {
            biased;
            answers = asking => answers,
            ended = connection => Err(ended.map_or_else(io::Error::other, |()| ErrorKind::UnexpectedEof.into())),
        }
    }

    async fn ask_for(&self, requests: SendRequest<bytes::Bytes>, host: &str) -> io::Result<Answer> {
        let request = Request::get(format!("https://{host}{}", self.path));
        let request = request.header("user-agent", AGENT).body(());
        let request = request.map_err(io::Error::other)?;
        let mut requests = requests.ready().await.map_err(io::Error::other)?;
        let (response, _) = requests
            .send_request(request, true)
            .map_err(io::Error::other)?;
        let response = response.await.map_err(io::Error::other)?;
        let status = response.status().as_u16();
        let mut pages = response.into_body();
        let mut page = Vec::new();
        while page.len() < ANSWER_MAX {
            let Some(part) = pages.data().await else {
                break;
            };
            let part = part.map_err(io::Error::other)?;
            let room = part.len().min(ANSWER_MAX - page.len());
            page.extend_from_slice(&part.chunk()[..room]);
            pages
                .flow_control()
                .release_capacity(part.len())
                .map_err(io::Error::other)?;
        }
        let page = String::from_utf8_lossy(&page);
        Ok(Answer {
            status: Some(status),
            text: format!("HTTP/2 {status}\r\n\r\n{page}"),
        })
    }
}

/// Bytes of an answer's head that are taken.
const HEAD_MAX: u32 = 16 << 10;
/// What each request adds to the time for a connection.
const PATIENCE_EACH: Duration = Duration::from_millis(500);
