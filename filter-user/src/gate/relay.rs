//! Relaying: bytes both ways until both sides are done, one breaks off, or neither sends.
//!
//! Half-close is preserved: the end of one side's stream is passed on, and the other direction
//! goes on. A side that does not take what it is sent is not read for: at most one read of
//! [`SCRATCH_SIZE`] bytes waits for it. A silent connection holds no buffer.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::pin::pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tracing::debug;

use super::endpoint::Endpoint;
use super::refusal::{Outcome, Refusal, UpstreamFault, is_disconnect};
use super::shutdown::{Order, Signal};

/// What a relay has to think about.
enum Event {
    /// Both sides are done, or one has broken off.
    Ended(Result<(), RelayFailure>),
    /// It is ordered to end.
    Order,
    /// Time has passed.
    Tick,
}

/// A client and its upstream, and what has gone between them.
pub(super) struct Relay<C, U> {
    client: Endpoint<C>,
    upstream: Endpoint<U>,
    /// Bytes from the client to the upstream.
    pub(super) up: u64,
    /// Bytes from the upstream to the client.
    pub(super) down: u64,
    /// Bytes from the client since the upstream's last.
    unanswered: u64,
    /// The upstream takes nothing more: it may have answered already.
    deaf: bool,
    /// The upstream ended before it had sent a byte, and while the client was there.
    hung_up: bool,
}

impl<C, U> Relay<C, U>
where
    C: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    pub(super) fn new(client: Endpoint<C>, upstream: Endpoint<U>) -> Self {
        Self {
            client,
            upstream,
            up: 0,
            down: 0,
            unanswered: 0,
            deaf: false,
            hung_up: false,
        }
    }

    /// Relays until the end, or until it is ordered to end: at once, or when no byte has come
    /// between two ticks.
    pub(super) async fn run(&mut self, shutdown: &Signal) -> Outcome {
        let mut outcome = self.go_on(shutdown).await;
        let is_over = matches!(outcome, Outcome::Relayed | Outcome::Aborted);
        // Who asked nothing may have been silent for too long, unless the upstream reset the line.
        if is_over && self.hung_up && (self.up > 0 || self.deaf) {
            outcome = Outcome::Refused(Refusal::Upstream(UpstreamFault::Broken));
        }
        if self.deaf {
            // Rare, and large: it has a place of its own.
            Box::pin(self.client.linger()).await;
        }
        // A client that receives close_notify can distinguish it from a truncation (RFC 8446 §6.1).
        if outcome == Outcome::Stopped || outcome == Outcome::TrustChanged {
            let farewell = poll_fn(|context| self.client.poll_end(context));
            if let Ok(Err(error)) = tokio::time::timeout(FAREWELL, farewell).await {
                debug!(id = "client-gone", %error, "client gone");
            }
        }
        outcome
    }

    async fn go_on(&mut self, shutdown: &Signal) -> Outcome {
        let mut drains = false;
        let mut ticks = shutdown.ticks();
        // The first tick comes at any time, so it only begins to measure.
        let mut before = None;
        loop {
            let known = if drains { Order::Drain } else { Order::GoOn };
            match self.next_event(shutdown, known, ticks).await {
                Event::Ended(Ok(())) => return Outcome::Relayed,
                Event::Ended(Err(RelayFailure::Client(error))) => {
                    debug!(id = "client-aborted", %error, "client broke off");
                    if self.is_farewell(&error) {
                        return Outcome::Relayed;
                    }
                    let is_misuse = error.kind() == ErrorKind::InvalidData;
                    return if is_misuse {
                        Outcome::Misused
                    } else {
                        Outcome::Aborted
                    };
                }
                Event::Ended(Err(RelayFailure::Upstream(error))) => {
                    debug!(id = "upstream-aborted", %error, "upstream broke off");
                    if self.client.ended && self.is_farewell(&error) {
                        return Outcome::Relayed;
                    }
                    // An alert in TLS 1.3 comes after the handshake (RFC 8446 §4.4.2.4): one for
                    // the certificate that it demands and that we have not.
                    let is_refusal = error.kind() == ErrorKind::InvalidData && self.down == 0;
                    return if is_refusal {
                        Outcome::Refused(Refusal::Upstream(UpstreamFault::Tls))
                    } else {
                        Outcome::Aborted
                    };
                }
                Event::Order => match shutdown.word() {
                    Order::TrustChanged => return Outcome::TrustChanged,
                    Order::Stop => return Outcome::Stopped,
                    Order::Drain => {
                        drains = true;
                        // Its silence is measured from now on.
                        before = Some((self.up, self.down));
                    }
                    Order::GoOn => {}
                },
                Event::Tick => {
                    ticks = shutdown.ticks();
                    let after = Some((self.up, self.down));
                    let is_silent = after == std::mem::replace(&mut before, after);
                    match (is_silent, drains) {
                        (true, false) => return Outcome::Idle,
                        (true, true) if self.owes_nothing() => return Outcome::Stopped,
                        (_, _) => {}
                    }
                }
            }
        }
    }

    async fn next_event(&mut self, shutdown: &Signal, known: Order, ticks: u32) -> Event {
        let mut changed = pin!(shutdown.changed());
        poll_fn(|context| {
            if let Poll::Ready(ended) = self.poll(context) {
                return Poll::Ready(Event::Ended(ended));
            }
            // What is said is there to see before it wakes us, so we may have seen it already; who
            // was woken listens again in any case.
            while changed.as_mut().poll(context).is_ready() {
                changed.set(shutdown.changed());
            }
            if shutdown.word() > known {
                return Poll::Ready(Event::Order);
            }
            if shutdown.ticks() != ticks {
                return Poll::Ready(Event::Tick);
            }
            Poll::Pending
        })
        .await
    }

    /// Whether the last word was the upstream's, and has arrived: no answer is being waited for.
    fn owes_nothing(&self) -> bool {
        self.unanswered == 0 && !self.client.holds_back()
    }

    /// Whether an end without close_notify comes when the last word was the upstream's, and has arrived: so clients go,
    /// and nginx after them. By HTTP/2 a client's acknowledgement may follow it. Only the outcome depends on it: what was
    /// cut off cannot be seen, and the other side gets no close_notify either.
    fn is_farewell(&self, error: &io::Error) -> bool {
        let may_follow = if self.client.speaks_h2() {
            ACKNOWLEDGED
        } else {
            0
        };
        let is_answered = self.unanswered <= may_follow && !self.client.holds_back();
        error.kind() == ErrorKind::UnexpectedEof && self.down > 0 && is_answered
    }

    /// Moves what can be moved; ready when both directions have ended.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<(), RelayFailure>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let (up, down) = (self.up, self.down);
            let (client, upstream) = (&mut self.client, &mut self.upstream);
            let mut upwards = Poll::Ready(());
            if !self.deaf {
                upwards = match pump(client, upstream, &mut self.up, scratch, context) {
                    Poll::Ready(Err(Broken::Writing(error))) if is_disconnect(error.kind()) => {
                        debug!(id = "upstream-closed", %error, "upstream takes nothing more");
                        self.deaf = true;
                        Poll::Ready(())
                    }
                    Poll::Ready(moved) => Poll::Ready(moved.map_err(|broken| match broken {
                        Broken::Reading(error) => RelayFailure::Client(error),
                        Broken::Writing(error) => RelayFailure::Upstream(error),
                    })?),
                    Poll::Pending => Poll::Pending,
                };
            }
            let downwards = pump(upstream, client, &mut self.down, scratch, context);
            if let Poll::Ready(Err(Broken::Reading(_))) = &downwards {
                upstream.ended = true;
                // A reset: it takes nothing more either, and may have answered before.
                self.deaf = true;
            }
            self.hung_up |= self.down == 0 && !client.ended && (upstream.ended || self.deaf);
            let downwards = downwards.map_err(|broken| match broken {
                Broken::Reading(error) => RelayFailure::Upstream(error),
                Broken::Writing(error) => RelayFailure::Client(error),
            })?;
            // What TLS has to say for itself while it is being read: an answer to a key update.
            if upstream.holds_back() {
                let flushed: Poll<Result<(), io::Error>> = upstream.poll_flush(context);
                let _later: Poll<()> = flushed.map_err(RelayFailure::Upstream)?;
            }
            self.unanswered = if self.down == down {
                self.unanswered + (self.up - up)
            } else {
                0
            };
            match (upwards, downwards) {
                (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok(())),
                (_, _) => Poll::Pending,
            }
        })
    }
}

/// Whose stream failed.
enum RelayFailure {
    Client(io::Error),
    Upstream(io::Error),
}

/// Moves bytes one way; ready when the end was passed on.
fn pump<F, T>(
    from: &mut Endpoint<F>,
    to: &mut Endpoint<T>,
    moved: &mut u64,
    scratch: &mut [u8],
    context: &mut Context<'_>,
) -> Poll<Result<(), Broken>>
where
    F: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        // First what it was sent already: who does not take that is not sent more.
        ready!(to.poll_flush(context)).map_err(Broken::Writing)?;
        if from.ended {
            return to.poll_end(context).map_err(Broken::Writing);
        }
        let read = match ready!(from.poll_read(context, scratch)) {
            Ok(read) => read,
            // Once it has our end, a peer may just go away; before that, a stream without a
            // close_notify may have been truncated on the way. An answer in TLS may have
            // been at any time: its end alone says that it is whole.
            Err(error) if from.shut && from.may_vanish && is_disconnect(error.kind()) => 0,
            Err(error) => return Poll::Ready(Err(Broken::Reading(error))),
        };
        if read == 0 {
            from.ended = true;
            continue;
        }
        *moved += read as u64;
        to.push(context, &scratch[..read])
            .map_err(Broken::Writing)?;
    }
}

/// Which side broke off.
enum Broken {
    /// The one that was to be read.
    Reading(io::Error),
    /// The one that was to be written.
    Writing(io::Error),
}

thread_local! {
    /// Where bytes are on their way from one side to the other, within one poll.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH_SIZE].into_boxed_slice());
}

/// Four TLS records.
const SCRATCH_SIZE: usize = 64 << 10;
/// Bytes that a client of HTTP/2 sends behind its last answer: a few frames that acknowledge (of 9 to 17 bytes each). A
/// request has more.
const ACKNOWLEDGED: u64 = 64;
/// How long a client may take to hear the end.
const FAREWELL: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio::task::JoinHandle;

    use super::*;

    #[tokio::test]
    async fn the_end_of_one_side_is_passed_on_and_the_other_goes_on() {
        let mut rig = Rig::new();

        rig.client.write_all(b"question").await.unwrap();
        rig.client.shutdown().await.unwrap();
        let mut question = String::new();
        rig.server.read_to_string(&mut question).await.unwrap();
        rig.server.write_all(b"answer!").await.unwrap();
        drop(rig.server);
        let mut answer = String::new();
        rig.client.read_to_string(&mut answer).await.unwrap();

        let relayed = rig.relaying.await.unwrap();
        assert_eq!(
            (question.as_str(), answer.as_str()),
            ("question", "answer!")
        );
        assert_eq!(relayed.outcome, Outcome::Relayed);
        assert_eq!((relayed.up, relayed.down), (8, 7));
    }

    #[tokio::test]
    async fn a_connection_that_is_silent_between_two_ticks_is_closed_and_no_other() {
        let mut rig = Rig::new();

        rig.shutdown.tick();
        for _ in 0..3 {
            rig.client.write_all(b".").await.unwrap();
            rig.server.read_exact(&mut [0]).await.unwrap();
            rig.shutdown.tick();
            tokio::task::yield_now().await;
            assert!(!rig.relaying.is_finished());
        }
        rig.shutdown.tick();

        let relayed = rig.relaying.await.unwrap();
        assert_eq!(relayed.outcome, Outcome::Idle);
        assert_eq!(relayed.up, 3);
    }

    #[tokio::test]
    async fn a_stop_closes_live_connections() {
        let rig = Rig::new();

        rig.shutdown.send(Order::Stop);

        let relayed = rig.relaying.await.unwrap();
        assert_eq!(relayed.outcome, Outcome::Stopped);
    }

    #[tokio::test]
    async fn while_it_drains_the_first_silence_ends_what_waits_for_nothing() {
        let mut rig = Rig::new();
        rig.shutdown.send(Order::Drain);
        tokio::task::yield_now().await;

        rig.shutdown.tick();

        let mut rest = Vec::new();
        rig.client.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rig.relaying.await.unwrap().outcome, Outcome::Stopped);
    }

    #[tokio::test]
    async fn while_it_drains_a_connection_ends_once_its_answer_has_come() {
        let mut rig = Rig::new();
        rig.client.write_all(b"question").await.unwrap();
        rig.server.read_exact(&mut [0; 8]).await.unwrap();
        rig.shutdown.send(Order::Drain);

        // However long the answer takes.
        for _ in 0..20 {
            rig.shutdown.tick();
            tokio::task::yield_now().await;
        }
        assert!(!rig.relaying.is_finished());
        rig.server.write_all(b"answer").await.unwrap();
        rig.client.read_exact(&mut [0; 6]).await.unwrap();
        for _ in 0..2 {
            rig.shutdown.tick();
            tokio::task::yield_now().await;
        }
        let mut answer = String::new();
        rig.client.read_to_string(&mut answer).await.unwrap();

        assert_eq!(answer, "");
        assert_eq!(rig.relaying.await.unwrap().outcome, Outcome::Stopped);
    }

    #[tokio::test]
    async fn who_does_not_read_is_not_read_for() {
        let mut rig = Rig::new();
        let mut sent = 0;

        let flood = vec![7; 1 << 20];
        let _full = tokio::time::timeout(Duration::from_millis(200), async {
            loop {
                sent += rig.server.write(&flood).await.unwrap();
            }
        })
        .await;

        assert!(sent <= SCRATCH_SIZE + 4 * PIPE, "{sent} bytes are held");
        let mut taken = vec![0; sent];
        rig.client.read_exact(&mut taken).await.unwrap();
        assert!(taken.iter().all(|byte| *byte == 7));
    }

    #[tokio::test]
    async fn an_answer_is_passed_on_although_its_question_is_not_taken() {
        let mut rig = Rig::new();

        rig.server.write_all(b"413").await.unwrap();
        drop(rig.server);
        rig.client.write_all(&[0; 50]).await.unwrap();
        let mut answer = String::new();
        rig.client.read_to_string(&mut answer).await.unwrap();

        assert_eq!(answer, "413");
    }

    #[tokio::test]
    async fn an_upstream_that_hangs_up_unasked_or_asked_is_broken_and_one_that_is_bored_is_not() {
        let broken = Outcome::Refused(Refusal::Upstream(UpstreamFault::Broken));
        for (asks_first, asks_after, goes_first, expected) in [
            (true, false, false, broken),
            // The question was on its way.
            (false, true, false, broken),
            (true, true, false, broken),
            // A client that never asked, and one that left first.
            (false, false, false, Outcome::Relayed),
            (true, false, true, Outcome::Relayed),
        ] {
            let mut rig = Rig::new();
            if asks_first {
                rig.client.write_all(b"question").await.unwrap();
                rig.server.read_exact(&mut [0; 8]).await.unwrap();
            }
            if goes_first {
                rig.client.shutdown().await.unwrap();
                rig.server.read_to_end(&mut Vec::new()).await.unwrap();
            }
            rig.server.shutdown().await.unwrap();
            let mut answer = Vec::new();
            rig.client.read_to_end(&mut answer).await.unwrap();
            if asks_after {
                rig.client.write_all(b"question").await.unwrap();
                let mut question = [0; 8];
                rig.server.read_exact(&mut question).await.unwrap();
            }
            drop(rig.client);

            let name = format!("{asks_first} {asks_after} {goes_first}");
            assert!(answer.is_empty(), "{name}");
            assert_eq!(rig.relaying.await.unwrap().outcome, expected, "{name}");
        }
    }

    #[tokio::test]
    async fn what_was_seen_before_it_woke_somebody_is_not_listened_to_twice() {
        let mut rig = Rig::new();
        rig.shutdown.tick();
        tokio::task::yield_now().await;

        // Bytes wake the relay between the two halves of a tick.
        rig.shutdown.count_tick();
        rig.client.write_all(b".").await.unwrap();
        rig.server.read_exact(&mut [0]).await.unwrap();
        rig.shutdown.wake();
        tokio::task::yield_now().await;
        rig.shutdown.send(Order::Stop);

        assert_eq!(rig.relaying.await.unwrap().outcome, Outcome::Stopped);
    }

    /// How a relay ended, and how much it relayed.
    struct Relayed {
        outcome: Outcome,
        up: u64,
        down: u64,
    }

    /// A relay between two pipes.
    struct Rig {
        client: DuplexStream,
        server: DuplexStream,
        relaying: JoinHandle<Relayed>,
        shutdown: Arc<Signal>,
    }

    impl Rig {
        fn new() -> Self {
            let (client, gate_client) = duplex(PIPE);
            let (server, gate_server) = duplex(PIPE);
            let shutdown = Arc::new(Signal::default());
            let signal = Arc::clone(&shutdown);
            let relaying = tokio::spawn(async move {
                let mut relay =
                    Relay::new(Endpoint::clear(gate_client), Endpoint::clear(gate_server));
                let outcome = relay.run(&signal).await;
                Relayed {
                    outcome,
                    up: relay.up,
                    down: relay.down,
                }
            });
            Self {
                client,
                server,
                relaying,
                shutdown,
            }
        }
    }

    const PIPE: usize = 64;
}
