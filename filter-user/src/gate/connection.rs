//! One connection, from the accepted socket to its outcome.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use filter_ebpf::{Class, Ranges as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::{StartHandshake, TlsStream};
use tracing::{debug, info, warn};

use super::Gate;
use super::peer::VerifiedPeer;
use super::policy::Policy;
use super::refusal::{Outcome, Phase, Refusal};
use super::relay::relay;
use super::upstream::{self, Ends};

impl Gate {
    /// Takes one connection through all steps, and counts and logs how it ended.
    pub(super) async fn handle(&self, stream: TcpStream, client: SocketAddr) {
        self.metrics.opened();
        let mut host = Host::Unknown;
        let outcome = match self.admit(stream, client, &mut host).await {
            Ok(outcome) => outcome,
            Err(refusal) => Outcome::Refused(refusal),
        };
        self.metrics.closed(host.label(), outcome.label());
        match &outcome {
            Outcome::Refused(refusal) => self.log_refusal(refusal, client, &host),
            Outcome::Relayed | Outcome::Idle | Outcome::Aborted => {
                debug!(%client, host = host.label(), outcome = outcome.label(), "closed");
            }
        }
    }

    async fn admit(
        &self,
        stream: TcpStream,
        client: SocketAddr,
        host: &mut Host,
    ) -> Result<Outcome, Refusal> {
        let started = Instant::now();
        let deadline = started + self.limits.handshake;
        self.check_source(client)?;
        let permit = self.handshakes.try_acquire();
        let permit = permit.map_err(|_none_left| Refusal::TooManyHandshakes)?;
        let ends = Ends {
            client,
            local: stream.local_addr().map_err(|_gone| Refusal::Closed)?,
        };

        let hello = read_hello(stream, deadline).await?;
        let name = hello.client_hello().server_name().map(str::to_owned);
        let policy = match self.policies.find(name.as_deref()) {
            Ok(policy) => policy,
            Err(refusal) => {
                refuse_name(hello.io).await;
                return Err(refusal);
            }
        };
        *host = Host::Known(Arc::clone(policy));
        debug!(%client, host = policy.label(), "server certificate shown, client certificate asked for");

        let (stream, peer) = shake_hands(hello, policy, deadline).await?;
        self.metrics.handshake(started.elapsed().as_secs_f64());
        drop(permit);
        debug!(
            %client, host = policy.label(), subject = peer.subject(), trust = peer.trust(),
            resumed = peer.resumed(), "client certificate presented and verified"
        );

        let _visit = self.sightings.visit(client.ip());

        let dial_deadline = deadline.min(Instant::now() + self.limits.connect);
        let upstream = timeout_at(dial_deadline, upstream::dial(policy, &peer, ends)).await;
        let upstream = upstream
            .map_err(|_elapsed| Refusal::Timeout(Phase::Upstream))?
            .map_err(|error| {
                debug!(upstream = %policy.upstream(), %error, "upstream not reached");
                Refusal::Upstream
            })?;
        debug!(%client, host = policy.label(), upstream = %policy.upstream(), "relayed");

        let relayed = relay(stream, upstream, self.limits.idle, &self.abort).await;
        self.metrics.relayed(relayed.up, relayed.down);
        Ok(relayed.outcome)
    }

    /// The same ranges that the filter drops by: an evaded or detached filter costs CPU, no more.
    fn check_source(&self, client: SocketAddr) -> Result<(), Refusal> {
        let class = self.table.borrow().class(client.ip());
        match class {
            Class::Listed | Class::Allowed => {
                debug!(%client, ?class, "source checked");
                Ok(())
            }
            Class::Absent => Err(Refusal::NotListed),
            Class::Denied => Err(Refusal::Denied),
        }
    }

    fn log_refusal(&self, refusal: &Refusal, client: SocketAddr, host: &Host) {
        let Some(suppressed) = self.refusals.take() else {
            return;
        };
        let (reason, host, advice) = (refusal.label(), host.label(), refusal.advice());
        if *refusal == Refusal::Upstream {
            warn!(reason, %client, host, advice, suppressed, "refused");
        } else {
            info!(reason, %client, host, advice, suppressed, "refused");
        }
    }
}

/// The host that a connection asked for, as far as it is known.
enum Host {
    Known(Arc<Policy>),
    Unknown,
}

impl Host {
    /// Strangers choose the names they ask for, so an unknown one is no label.
    fn label(&self) -> &str {
        match self {
            Self::Known(policy) => policy.label(),
            Self::Unknown => "",
        }
    }
}

/// Reads the ClientHello, and tells what is not TLS from what is.
async fn read_hello(
    stream: TcpStream,
    deadline: Instant,
) -> Result<StartHandshake<TcpStream>, Refusal> {
    let reading = async {
        let mut first = [0; 1];
        match stream.peek(&mut first).await {
            Ok(0) | Err(_) => return Err(Refusal::Closed),
            Ok(_) if first == [HANDSHAKE_RECORD] => {}
            Ok(_) if first[0].is_ascii_graphic() => return Err(Refusal::Plaintext),
            Ok(_) => return Err(Refusal::Protocol),
        }
        stream.set_nodelay(true).map_err(|_gone| Refusal::Closed)?;
        let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await;
        hello.map_err(|error| Refusal::from_handshake(&error))
    };
    timeout_at(deadline, reading)
        .await
        .unwrap_or(Err(Refusal::Timeout(Phase::Hello)))
}

/// Finishes the handshake by the host's policy; the peer is verified when it returns.
async fn shake_hands(
    hello: StartHandshake<TcpStream>,
    policy: &Policy,
    deadline: Instant,
) -> Result<(TlsStream<TcpStream>, VerifiedPeer), Refusal> {
    let accept = hello.into_stream(policy.tls()).into_fallible();
    let stream = match timeout_at(deadline, accept).await {
        Err(_) => return Err(Refusal::Timeout(Phase::Handshake)),
        Ok(Ok(stream)) => stream,
        Ok(Err((error, stream))) => {
            let refusal = Refusal::from_handshake(&error);
            debug!(%error, "handshake refused");
            linger(stream).await;
            return Err(refusal);
        }
    };
    match policy.verified_peer(stream.get_ref().1) {
        Ok(peer) => Ok((stream, peer)),
        Err(refusal) => {
            let (stream, _) = stream.into_inner();
            linger(stream).await;
            Err(refusal)
        }
    }
}

/// Answers a name that is not served, without showing a certificate (RFC 6066 §3).
async fn refuse_name(mut stream: TcpStream) {
    match timeout(LINGER, stream.write_all(&UNRECOGNIZED_NAME)).await {
        Ok(Ok(())) => linger(stream).await,
        Ok(Err(error)) => debug!(%error, "alert not sent"),
        Err(_) => debug!("alert not sent in time"),
    }
}

/// Closes so that the alert arrives: unread bytes would turn the close into a reset, which
/// discards what the client has not read yet.
async fn linger(mut stream: TcpStream) {
    let draining = async {
        stream.shutdown().await?;
        let mut sink = [0; 4096];
        for _ in 0..LINGER_READS {
            if stream.read(&mut sink).await? == 0 {
                break;
            }
        }
        Ok::<_, io::Error>(())
    };
    match timeout(LINGER, draining).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "client gone"),
        Err(_) => debug!("client did not close in time"),
    }
}

/// ContentType handshake, RFC 8446 §5.1; every TLS connection begins with it.
const HANDSHAKE_RECORD: u8 = 22;
/// An alert record: fatal, unrecognized_name (RFC 8446 §6).
const UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];
/// How long a refused client may take to read its alert.
const LINGER: Duration = Duration::from_millis(500);
/// Reads of 4 KiB that a refused client's last words are worth.
const LINGER_READS: usize = 16;
