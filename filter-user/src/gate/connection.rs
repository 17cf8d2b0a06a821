//! One connection, from the accepted socket to its outcome.

use std::io;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use filter_ebpf::{Class, Ranges as _};
use rustls::{AlertDescription, CipherSuite, ProtocolVersion};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::client_hello::{Hello, LimitedStream, Unreadable, read_hello};
use super::endpoint::Endpoint;
use super::limits::{Admission, source};
use super::printable::printable;
use super::proxy::{self, ConnectionAddrs, ProxyInfo};
use super::range_usage::ActiveClient;
use super::refusal::{Limit, Outcome, Phase, Refusal};
use super::refused::{Presented, Refused, noting};
use super::relay::Relay;
use super::session::Session;
use super::threads::Assignment;
use super::tls::peer::VerifiedPeer;
use super::tls::policy::Policy;
use super::upstream;
use super::{Gate, is_one_of};

impl Gate {
    /// Takes one connection through all steps, and counts and logs how it ended.
    ///
    /// The handshake needs much more room than the relay, which may last for hours, so it has a
    /// place of its own.
    pub(super) async fn handle(self: Arc<Self>, arrival: Box<Arrival>) {
        self.metrics.opened();
        let mut about = About {
            client: arrival.client,
            host: Host::Unknown,
            server_name: None,
            presented: None,
        };
        let outcome = match Box::pin(self.admit(arrival, &mut about)).await {
            Err(refusal) => Outcome::Refused(refusal),
            Ok(mut admitted) => {
                let outcome = admitted.relay.run(admitted.policy.shutdown()).await;
                self.metrics.relayed(admitted.relay.up, admitted.relay.down);
                outcome
            }
        };
        let About { client, host, .. } = &about;
        self.metrics.closed(host.label(), outcome.label());
        debug!(
            id = "connection-closed",
            %client,
            host = host.label(),
            outcome = outcome.label(),
            "closed"
        );
        if let Outcome::Refused(refusal) = outcome {
            self.report_refusal(about.refused(refusal));
        }
    }

    /// The way in: each step takes the proof of the one before, and the first refusal ends it.
    async fn admit(
        &self,
        arrival: Box<Arrival>,
        about: &mut About,
    ) -> Result<Box<Admitted<'_>>, Refusal> {
        let Arrival {
            mut stream,
            client,
            permit,
            assignment,
        } = *arrival;
        let started = Instant::now();
        let in_use = self.in_use();
        let deadline = started + in_use.settings.handshake_timeout;
        let mut admission = self.limits.arrive(&in_use.allowed)?;

        let reading = self.addresses(&mut stream, client, deadline);
        let addresses = or_superseded(&mut admission, reading).await?;
        about.client = addresses.client;
        self.check_source(addresses.client)?;
        admission.await_hello(addresses.client.ip(), &in_use.allowed)?;

        let hello = match or_superseded(&mut admission, hello(stream, deadline)).await {
            Ok(hello) => hello,
            Err(Unreadable {
                refusal,
                unanswered,
            }) => {
                // What is left to do takes no room from handshakes.
                admission.handshake_done();
                if let Some(unanswered) = unanswered {
                    refuse_hello(unanswered, refusal, deadline).await;
                }
                return Err(refusal);
            }
        };
        let name = hello.client_hello().server_name().map(str::to_owned);
        about.server_name = name.as_deref().map(printable);
        let (hello, offered) = self
            .find_policy(hello, &mut admission, about, deadline)
            .await?;
        let shaking = shake_hands(hello, &offered, about, deadline);
        let (limited, session) = or_superseded(&mut admission, shaking).await?;
        let (policy, peer) = match self.judge(name.as_deref(), &session) {
            Ok(judged) => judged,
            Err((refusal, presented)) => {
                about.presented = presented;
                admission.handshake_done();
                linger(limited, deadline).await;
                return Err(refusal);
            }
        };
        self.metrics.handshake(started.elapsed().as_secs_f64());
        admission.handshake_done();
        self.report_peer(&policy, &peer, about);

        let of_host = CountGuard::one_more(Arc::clone(&policy.connections), policy.max_connections);
        let of_host = of_host.ok_or(Refusal::TooMany(Limit::HostConnections))?;
        let visit = self.range_usage.visit(about.client.ip());
        let upstream = self
            .dial(
                &policy,
                &peer,
                addresses,
                name.as_deref(),
                &session,
                deadline,
            )
            .await?;
        let downstream = Endpoint::encrypted(limited.into_inner(), session);
        Ok(Box::new(Admitted {
            relay: Relay::new(downstream, upstream),
            policy,
            _held: (admission, visit, permit, assignment, of_host),
        }))
    }

    /// The addresses of a connection: a balancer that is named may pass on its client's.
    async fn addresses(
        &self,
        stream: &mut TcpStream,
        client: SocketAddr,
        deadline: Instant,
    ) -> Result<ConnectionAddrs, Refusal> {
        let direct = ConnectionAddrs {
            client,
            local: stream.local_addr().map_err(|_gone| Refusal::Closed)?,
        };
        if !is_one_of(&self.in_use().settings.proxy_from, client) {
            return Ok(direct);
        }
        let read = timeout_at(deadline, proxy::read(stream)).await;
        let passed_on = read.unwrap_or(Err(Refusal::Timeout(Phase::ProxyHeader)))?;
        Ok(passed_on.unwrap_or(direct))
    }

    /// The policy for the name that a client has said, to which it is charged from now on; no
    /// certificate is shown for a name that is not served.
    async fn find_policy(
        &self,
        hello: Hello,
        admission: &mut Admission<'_>,
        about: &mut About,
        deadline: Instant,
    ) -> Result<(Hello, Arc<Policy>), Refusal> {
        // A client that was slow to greet is judged by what is active now.
        let in_use = self.in_use();
        let client = about.client;
        let found = in_use.policies.find(hello.client_hello().server_name());
        let policy = match found.map(Arc::clone) {
            Ok(policy) => policy,
            Err(refusal) => {
                admission.name_host(client.ip(), "", &in_use.allowed)?;
                // What is left to do takes no room from handshakes.
                admission.handshake_done();
                refuse_hello(hello.into_parts().0, refusal, deadline).await;
                return Err(refusal);
            }
        };
        about.host = Host::Known(Arc::clone(&policy));
        admission.name_host(client.ip(), policy.label(), &in_use.allowed)?;
        if !policy.shares_protocol(&hello.client_hello()) {
            admission.handshake_done();
            let refusal = Refusal::NoSharedProtocol;
            refuse_hello(hello.into_parts().0, refusal, deadline).await;
            return Err(refusal);
        }
        debug!(
            id = "certificate-shown",
            %client,
            host = policy.label(),
            "server certificate shown"
        );
        Ok((hello, policy))
    }

    async fn dial(
        &self,
        policy: &Policy,
        peer: &VerifiedPeer,
        addresses: ConnectionAddrs,
        name: Option<&str>,
        session: &Session,
        deadline: Instant,
    ) -> Result<Endpoint<upstream::Stream>, Refusal> {
        let id = self.ids.next();
        let deadline = deadline.min(Instant::now() + self.in_use().settings.connect_timeout);
        let upstream = dial(policy, peer, addresses, name, session, &id, deadline).await?;
        debug!(
            id = "connection-relayed",
            client = %addresses.client,
            host = policy.label(),
            upstream = %policy.dialer().upstream,
            connection_id = id,
            "relayed"
        );
        Ok(upstream)
    }

    /// Judges the peer of a finished handshake by the policy of now: another may have been put in
    /// force meanwhile.
    fn judge(
        &self,
        name: Option<&str>,
        session: &Session,
    ) -> Result<(Arc<Policy>, VerifiedPeer), (Refusal, Option<Presented>)> {
        let in_use = self.in_use();
        let found = in_use.policies.find(name);
        let policy = found.map_err(|refusal| (refusal, None))?;
        let peer = policy.verified_peer(session)?;
        Ok((Arc::clone(policy), peer))
    }

    /// The same ranges that the filter drops by: an evaded or detached filter costs CPU, no more.
    fn check_source(&self, client: SocketAddr) -> Result<(), Refusal> {
        let class = self.active.borrow().table().class(client.ip());
        match class {
            Class::Listed | Class::Allowed => {
                debug!(id = "source-checked", %client, ?class, "source checked");
                Ok(())
            }
            Class::Absent => Err(Refusal::NotListed),
            Class::Denied => Err(Refusal::Denied),
        }
    }

    fn report_peer(&self, policy: &Policy, peer: &VerifiedPeer, about: &About) {
        let (host, client) = (policy.label(), about.client);
        if let Some((refusal, presented)) = peer.tolerated() {
            self.metrics.tolerated(host, refusal.label());
            let refused = Refused {
                presented: presented.cloned(),
                is_admitted: true,
                ..about.refused(refusal)
            };
            if let Some(suppressed) = self.sample(refusal, client) {
                refused.log_tolerated(suppressed);
            }
            self.last_refusals.keep(refused);
        }
        if let Some(identity) = peer.identity() {
            debug!(
                id = "client-verified",
                %client,
                host,
                subject = identity.subject,
                trust = identity.trust,
                resumed = peer.resumed(),
                "client certificate presented and verified"
            );
        }
    }

    fn report_refusal(&self, refused: Refused) {
        if let Some(suppressed) = self.sample(refused.refusal, refused.client) {
            refused.log(suppressed);
        }
        self.last_refusals.keep(refused);
    }

    /// Whether a line about this is worth its room, and how many before it were not.
    fn sample(&self, refusal: Refusal, client: SocketAddr) -> Option<u64> {
        let key = (source(client.ip()), refusal);
        if self.sampling.admits(&key, SAMPLE_INTERVAL, SAMPLE_BURST) {
            self.refusals.take()
        } else {
            self.refusals.skip();
            None
        }
    }
}

/// A connection that was accepted.
pub(super) struct Arrival {
    pub(super) stream: TcpStream,
    pub(super) client: SocketAddr,
    /// One of the gate's connections.
    pub(super) permit: OwnedSemaphorePermit,
    /// To the thread that serves it.
    pub(super) assignment: Assignment,
}

/// What is known of a connection for its last line.
struct About {
    client: SocketAddr,
    host: Host,
    /// The name that the client has said, for people.
    server_name: Option<String>,
    /// The certificate that was refused.
    presented: Option<Presented>,
}

impl About {
    fn refused(&self, refusal: Refusal) -> Refused {
        Refused {
            refusal,
            client: self.client,
            host: self.host.label().to_owned(),
            server_name: self.server_name.clone(),
            presented: self.presented.clone(),
            is_admitted: false,
        }
    }
}

/// A connection that is let in, with what it holds as long as it lasts.
struct Admitted<'a> {
    relay: Relay<TcpStream, upstream::Stream>,
    policy: Arc<Policy>,
    _held: (
        Admission<'a>,
        ActiveClient<'a>,
        OwnedSemaphorePermit,
        Assignment,
        CountGuard<Arc<AtomicU64>>,
    ),
}

/// One that is counted as long as this is held.
struct CountGuard<C: Deref<Target = AtomicU64>>(C);

impl<C: Deref<Target = AtomicU64>> CountGuard<C> {
    /// Counts one more, unless there are `max`.
    fn one_more(count: C, max: u64) -> Option<Self> {
        let one = Self(count);
        (one.0.fetch_add(1, Ordering::Relaxed) < max).then_some(one)
    }
}

impl<C: Deref<Target = AtomicU64>> Drop for CountGuard<C> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
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

/// What comes of a step, unless the connection has to make room for others meanwhile.
async fn or_superseded<T, E: From<Refusal>>(
    admission: &mut Admission<'_>,
    step: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    tokio::select! {
        biased;
        done = step => done,
        refusal = admission.superseded() => Err(refusal.into()),
    }
}

async fn hello(stream: TcpStream, deadline: Instant) -> Result<Hello, Unreadable> {
    let hello = timeout_at(deadline, read_hello(stream)).await;
    hello.unwrap_or_else(|_late| Err(Refusal::Timeout(Phase::Hello).into()))
}

/// Finishes the handshake by the host's policy.
async fn shake_hands(
    hello: Hello,
    policy: &Policy,
    about: &mut About,
    deadline: Instant,
) -> Result<(LimitedStream, Session), Refusal> {
    let (mut stream, read_ahead) = hello.into_parts();
    let session = Session::server(policy.tls(), read_ahead);
    let shaking = async { session?.handshake(&mut stream).await };
    let (done, noted) = noting(timeout_at(deadline, shaking)).await;
    match done {
        Err(_) => Err(Refusal::Timeout(Phase::Handshake)),
        Ok(Ok(established)) => Ok((stream, established)),
        Ok(Err(error)) => {
            debug!(id = "handshake-refused", %error, "handshake refused");
            linger(stream, deadline).await;
            let (refusal, presented) = noted.unzip();
            about.presented = presented;
            Err(refusal.unwrap_or_else(|| Refusal::from_handshake(&error)))
        }
    }
}

async fn dial(
    policy: &Policy,
    peer: &VerifiedPeer,
    addresses: ConnectionAddrs,
    name: Option<&str>,
    session: &Session,
    unique_id: &str,
    deadline: Instant,
) -> Result<Endpoint<upstream::Stream>, Refusal> {
    let suite = session.negotiated_cipher_suite();
    let cipher = suite.and_then(|suite| cipher_name(suite.suite()));
    let info = ProxyInfo {
        addresses,
        alpn: session.alpn_protocol(),
        authority: name,
        tls_version: match session.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
            Some(_) | None => "TLSv1.2",
        },
        cipher: cipher.unwrap_or_default(),
        identity: peer.identity(),
        resumed: peer.resumed(),
        unique_id,
    };
    let dialled = timeout_at(deadline, policy.dialer().dial(peer, &info)).await;
    dialled.unwrap_or(Err(Refusal::Timeout(Phase::Upstream)))
}

/// What OpenSSL calls a cipher suite, as upstreams and their logs know it (openssl-ciphers(1)).
fn cipher_name(suite: CipherSuite) -> Option<&'static str> {
    let found = CIPHERS.iter().find(|(known, _)| *known == suite);
    found.map(|(_, name)| *name)
}

/// Answers a ClientHello that is refused, without showing a certificate.
async fn refuse_hello(mut stream: LimitedStream, refusal: Refusal, deadline: Instant) {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "all others are for the name"
    )]
    let alert = alert(match refusal {
        Refusal::HostUnavailable => AlertDescription::InternalError,
        Refusal::NoSharedProtocol => AlertDescription::NoApplicationProtocol,
        Refusal::Protocol => AlertDescription::UnexpectedMessage,
        Refusal::TooMany(Limit::HelloBytes) => AlertDescription::IllegalParameter,
        // RFC 6066 §3.
        _ => AlertDescription::UnrecognisedName,
    });
    match timeout_at(deadline, stream.write_all(&alert)).await {
        Ok(Ok(())) => linger(stream, deadline).await,
        Ok(Err(error)) => debug!(id = "alert-not-sent", %error, "alert not sent"),
        Err(_) => debug!(id = "alert-timed-out", "alert not sent in time"),
    }
}

/// Closes so that the alert arrives: unread bytes would turn the close into a reset, which
/// discards what the client has not read yet. No last word outlasts the deadline of the handshake.
async fn linger(mut stream: impl AsyncRead + AsyncWrite + Unpin, deadline: Instant) {
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
    match timeout_at(deadline.min(Instant::now() + LINGER), draining).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(id = "client-gone", %error, "client gone"),
        Err(_) => debug!(
            id = "client-close-timed-out",
            "client did not close in time"
        ),
    }
}

/// A fatal alert in a record of its own, before any key (RFC 8446 §5.1 and §6).
fn alert(description: AlertDescription) -> [u8; 7] {
    [21, 3, 3, 0, 2, 2, description.into()]
}

/// The cipher suites of rustls' provider.
const CIPHERS: [(CipherSuite, &str); 9] = [
    (
        CipherSuite::TLS13_AES_256_GCM_SHA384,
        "TLS_AES_256_GCM_SHA384",
    ),
    (
        CipherSuite::TLS13_AES_128_GCM_SHA256,
        "TLS_AES_128_GCM_SHA256",
    ),
    (
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
        "TLS_CHACHA20_POLY1305_SHA256",
    ),
    (
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        "ECDHE-ECDSA-AES256-GCM-SHA384",
    ),
    (
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        "ECDHE-ECDSA-AES128-GCM-SHA256",
    ),
    (
        CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        "ECDHE-ECDSA-CHACHA20-POLY1305",
    ),
    (
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
        "ECDHE-RSA-AES256-GCM-SHA384",
    ),
    (
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
        "ECDHE-RSA-AES128-GCM-SHA256",
    ),
    (
        CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
        "ECDHE-RSA-CHACHA20-POLY1305",
    ),
];
/// How long a refused client may take to read its alert.
const LINGER: Duration = Duration::from_millis(500);
/// Reads of 4 KiB that a refused client's last words are worth.
const LINGER_READS: usize = 16;
/// One line about a source and a reason in ten seconds, in nanoseconds.
const SAMPLE_INTERVAL: u64 = 10_000_000_000;
/// Lines about a source and a reason at once.
const SAMPLE_BURST: u64 = 3;

#[cfg(test)]
mod tests {
    use rustls::crypto::aws_lc_rs::ALL_CIPHER_SUITES;

    use super::*;

    #[test]
    fn every_cipher_suite_has_the_name_that_openssl_gives_it() {
        for suite in ALL_CIPHER_SUITES {
            assert!(cipher_name(suite.suite()).is_some(), "{suite:?}");
        }
    }
}
