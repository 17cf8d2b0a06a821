//! How many: what clients may take of the gate, charged to whom it can be charged fairly.
//!
//! Until a ClientHello names a host, all that is known of a client is its address, and customers of
//! Cloudflare share those. So a connection that has not said its hello is cheap, may be one of many,
//! and gives way when there are more: the oldest first, for who is meant to be served says it at once.
//! From then on a source is charged by the host that it asked for, and all names that are not served
//! are one: what others send to names of their own takes nothing from a host's clients.
//!
//! A source is an IPv4 address or an IPv6 /64, a network an IPv4 /24 or an IPv6 /48: what a host, and
//! what a site is usually given.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::pending;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::rate::RateLimiter;
use crate::config::PeerLimit;
use crate::gate::refusal::{Limit, Quantity, Refusal};
use crate::sync::lock;

/// What clients have taken.
pub(in crate::gate) struct Limits {
    taken: Mutex<InUse>,
    rate: RateLimiter,
}

/// What clients may take.
#[derive(Clone, Copy, Debug)]
pub(in crate::gate) struct Allowed {
    /// Connections in all whose handshake is not over, hello or not.
    pub(in crate::gate) handshakes: usize,
    pub(in crate::gate) source: PeerLimit,
    pub(in crate::gate) network: PeerLimit,
}

#[derive(Default)]
struct InUse {
    /// Relayed or on their way to it, by scope and host.
    connections: HashMap<(IpNet, Arc<str>), usize>,
    in_flight: InFlight,
}

impl Limits {
    pub(in crate::gate) fn new() -> Self {
        Self {
            taken: Mutex::default(),
            rate: RateLimiter::new(),
        }
    }

    /// Makes room for a connection of which nothing is known.
    pub(in crate::gate) fn arrive(&self, allowed: &Allowed) -> Result<Admission<'_>, Refusal> {
        let mut taken = lock(&self.taken);
        let in_flight = &mut taken.in_flight;
        if in_flight.len() >= allowed.handshakes {
            let what = Limit::Handshakes;
            let silent = in_flight.oldest(&Queue::Hellos, Duration::ZERO, what);
            let oldest =
                silent.or_else(|_| in_flight.oldest(&Queue::Handshakes, PATIENCE, what))?;
            in_flight.dismiss(oldest, what);
        }
        Ok(Admission {
            limits: self,
            waiting: Some(in_flight.join(vec![Queue::Hellos])),
            connection: None,
        })
    }
}

/// One connection's place among all.
#[must_use]
pub(in crate::gate) struct Admission<'a> {
    limits: &'a Limits,
    /// As long as its handshake is not over.
    waiting: Option<Waiting>,
    /// What it is charged to, once it has named a host.
    connection: Option<[(IpNet, Arc<str>); 2]>,
}

impl Admission<'_> {
    /// Charges the wait for a hello to the client's address.
    pub(in crate::gate) fn await_hello(
        &mut self,
        client: IpAddr,
        allowed: &Allowed,
    ) -> Result<(), Refusal> {
        let mut queues = vec![Queue::Hellos];
        let mut taken = lock(&self.limits.taken);
        for (scope, share, what) in scopes(client, allowed) {
            let queue = Queue::HellosOf(scope);
            let rule = (share.hellos, Duration::ZERO, what(Quantity::Hellos));
            taken.in_flight.make_room(&queue, rule)?;
            queues.push(queue);
        }
        taken.in_flight.rejoin(&mut self.waiting, queues)
    }

    /// Charges the connection, and the handshake that begins, to client and host; `host` is empty for
    /// names that are not served.
    pub(in crate::gate) fn name_host(
        &mut self,
        client: IpAddr,
        host: &str,
        allowed: &Allowed,
    ) -> Result<(), Refusal> {
        let host: Arc<str> = Arc::from(host);
        let scopes = scopes(client, allowed);
        let charged = scopes.map(|(scope, _, _)| (scope, Arc::clone(&host)));
        let queues = scopes.map(|(scope, share, what)| {
            let queue = Queue::HandshakesOf(scope, Arc::clone(&host));
            (
                queue,
                (share.handshakes, PATIENCE, what(Quantity::Handshakes)),
            )
        });
        let mut taken = lock(&self.limits.taken);
        for (key, (_, share, what)) in charged.iter().zip(scopes) {
            let connections = taken.connections.get(key).copied().unwrap_or_default();
            if connections >= share.connections {
                return Err(Refusal::TooMany(what(Quantity::Connections)));
            }
        }
        // None gives way to one that is refused.
        for (queue, rule) in &queues {
            taken.in_flight.find_room(queue, *rule)?;
        }
        // Last, for it counts: who is refused for another reason spends no rate.
        for (key, (_, share, what)) in charged.iter().zip(scopes) {
            let per_second = share.handshakes_per_second as u64;
            let interval = 1_000_000_000 / per_second.max(1);
            if !self.limits.rate.admits(key, interval, per_second) {
                return Err(Refusal::TooMany(what(Quantity::PerSecond)));
            }
        }
        for (queue, rule) in &queues {
            taken.in_flight.make_room(queue, *rule)?;
        }
        let mut queues: Vec<_> = queues.into_iter().map(|(queue, _)| queue).collect();
        queues.push(Queue::Handshakes);
        taken.in_flight.rejoin(&mut self.waiting, queues)?;
        for key in &charged {
            *taken.connections.entry(key.clone()).or_default() += 1;
        }
        drop(taken);
        self.connection = Some(charged);
        Ok(())
    }

    /// The handshake is over.
    pub(in crate::gate) fn handshake_done(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            lock(&self.limits.taken).in_flight.leave(waiting.id);
        }
    }

    /// Waits until it has to give way to another.
    pub(in crate::gate) async fn superseded(&mut self) -> Refusal {
        if let Some(waiting) = &mut self.waiting
            && let Ok(refusal) = (&mut waiting.superseded).await
        {
            return refusal;
        }
        pending().await
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        self.handshake_done();
        let mut taken = lock(&self.limits.taken);
        for key in self.connection.iter().flatten() {
            if let Some(count) = taken.connections.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    taken.connections.remove(key);
                }
            }
        }
    }
}

/// Connections whose handshake is not over, in queues by age.
#[derive(Default)]
struct InFlight {
    next: u64,
    /// By age.
    all: BTreeMap<u64, AdmissionEntry>,
    queues: HashMap<Queue, BTreeSet<u64>>,
}

struct AdmissionEntry {
    since: Instant,
    queues: Vec<Queue>,
    superseded: oneshot::Sender<Refusal>,
}

/// What connections are queued by.
#[derive(Clone, Eq, Hash, PartialEq)]
enum Queue {
    /// All that have not said their hello.
    Hellos,
    /// Those of a source or a network.
    HellosOf(IpNet),
    /// All that have named a host.
    Handshakes,
    /// Those of a source or a network that have named this one.
    HandshakesOf(IpNet, Arc<str>),
}

struct Waiting {
    id: u64,
    superseded: oneshot::Receiver<Refusal>,
}

impl InFlight {
    fn len(&self) -> usize {
        self.all.len()
    }

    /// Makes room in a queue of so many: the oldest gives way if it has waited for long enough.
    fn make_room(&mut self, queue: &Queue, rule: AdmissionRule) -> Result<(), Refusal> {
        if let Some(oldest) = self.find_room(queue, rule)? {
            let (_, _, what) = rule;
            self.dismiss(oldest, what);
        }
        Ok(())
    }

    /// Whether there is room in a queue of so many, or which one would have to give way.
    fn find_room(
        &self,
        queue: &Queue,
        (max, patience, what): AdmissionRule,
    ) -> Result<Option<u64>, Refusal> {
        if self.queues.get(queue).map_or(0, BTreeSet::len) < max {
            return Ok(None);
        }
        self.oldest(queue, patience, what).map(Some)
    }

    /// Puts a connection into other queues, unless it has to give way meanwhile.
    fn rejoin(&mut self, waiting: &mut Option<Waiting>, queues: Vec<Queue>) -> Result<(), Refusal> {
        if let Some(waiting) = waiting
            && self.leave(waiting.id).is_none()
            && let Ok(refusal) = waiting.superseded.try_recv()
        {
            return Err(refusal);
        }
        *waiting = Some(self.join(queues));
        Ok(())
    }

    fn join(&mut self, queues: Vec<Queue>) -> Waiting {
        let id = self.next;
        self.next += 1;
        for queue in &queues {
            self.queues.entry(queue.clone()).or_default().insert(id);
        }
        let (sender, superseded) = oneshot::channel();
        self.all.insert(
            id,
            AdmissionEntry {
                since: Instant::now(),
                queues,
                superseded: sender,
            },
        );
        Waiting { id, superseded }
    }

    fn leave(&mut self, id: u64) -> Option<AdmissionEntry> {
        let entry = self.all.remove(&id)?;
        for queue in &entry.queues {
            if let Some(queued) = self.queues.get_mut(queue) {
                queued.remove(&id);
                if queued.is_empty() {
                    self.queues.remove(queue);
                }
            }
        }
        Some(entry)
    }

    /// The oldest of a queue, if it has waited for long enough.
    fn oldest(&self, queue: &Queue, patience: Duration, what: Limit) -> Result<u64, Refusal> {
        let refusal = Refusal::TooMany(what);
        let oldest = self.queues.get(queue).and_then(BTreeSet::first).copied();
        let oldest = oldest.ok_or(refusal)?;
        let waited = self.all.get(&oldest).map(|entry| entry.since.elapsed());
        if waited.is_some_and(|waited| waited < patience) {
            return Err(refusal);
        }
        Ok(oldest)
    }

    /// Lets one give way.
    fn dismiss(&mut self, id: u64, what: Limit) {
        if let Some(entry) = self.leave(id) {
            // It may have ended meanwhile.
            match entry.superseded.send(Refusal::TooMany(what)) {
                Ok(_) | Err(_) => {}
            }
        }
    }
}

/// How many may be in a queue, how long the oldest is spared, and what there is too much of.
type AdmissionRule = (usize, Duration, Limit);

/// Whom something is charged to, what that may take, and what it takes too much of if it does.
type LimitScope = (IpNet, PeerLimit, fn(Quantity) -> Limit);

/// The source and the network of an address.
fn scopes(client: IpAddr, allowed: &Allowed) -> [LimitScope; 2] {
    let [source, network] = nets(client);
    [
        (source, allowed.source, Limit::OfSource),
        (network, allowed.network, Limit::OfNetwork),
    ]
}

fn nets(client: IpAddr) -> [IpNet; 2] {
    let client = client.to_canonical();
    let lengths = match client {
        IpAddr::V4(_) => [32, 24],
        IpAddr::V6(_) => [64, 48],
    };
    // These lengths fit their families.
    lengths.map(|length| IpNet::new_assert(client, length).trunc())
}

/// The source of an address: what one host is usually given.
pub(in crate::gate) fn source(client: IpAddr) -> IpNet {
    nets(client)[0]
}

/// How long a handshake is not taken for one that was begun to take room: a client far away answers
/// within this, and under load work is not thrown away that is nearly done.
const PATIENCE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_of_one_ipv6_host_share_and_mapped_ones_are_ipv4() {
        let limits = Limits::new();
        let one = allowed(1, 10);
        let _first = named(&limits, "2001:db8::1", &one).unwrap();

        let refused = |text| named(&limits, text, &one).err();

        let too_many = Some(Refusal::TooMany(Limit::OfSource(Quantity::Connections)));
        assert_eq!(refused("2001:db8::ffff"), too_many);
        assert_eq!(refused("2001:db8:0:1::1"), None);
        let _v4 = named(&limits, "::ffff:192.0.2.1", &one).unwrap();
        assert_eq!(refused("192.0.2.1"), too_many);
        assert_eq!(refused("192.0.2.2"), None);
    }

    #[tokio::test]
    async fn many_sources_of_one_network_are_one_network() {
        let limits = Limits::new();
        let allowed = allowed(10, 3);

        let mut held: Vec<_> = (0..3)
            .map(|n| named(&limits, &format!("192.0.2.{n}"), &allowed))
            .collect();
        let refused = named(&limits, "192.0.2.9", &allowed).err();

        let too_many = Some(Refusal::TooMany(Limit::OfNetwork(Quantity::Connections)));
        assert_eq!(refused, too_many);
        assert!(named(&limits, "192.0.3.9", &allowed).is_ok());
        held.pop();
        assert!(named(&limits, "192.0.2.9", &allowed).is_ok());
    }

    #[tokio::test]
    async fn what_is_sent_to_other_names_takes_nothing_from_a_host() {
        let limits = Limits::new();
        let mut allowed = allowed(5, 5);
        allowed.source.handshakes_per_second = 5;
        let client = address("192.0.2.1");
        let connect = |host: &str| {
            let mut admission = limits.arrive(&allowed)?;
            admission.await_hello(client, &allowed)?;
            admission.name_host(client, host, &allowed)?;
            Ok::<_, Refusal>(admission)
        };

        let others: Vec<_> = (0..20).map(|_| connect("")).collect();
        let own: Vec<_> = (0..5).map(|_| connect("shop.example")).collect();

        assert_eq!(others.iter().filter(|one| one.is_ok()).count(), 5);
        assert!(own.iter().all(Result::is_ok));
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_that_is_silent_gives_way() {
        let limits = Limits::new();
        let mut allowed = allowed(100, 100);
        allowed.source.hellos = 2;
        let arrive = |text| {
            let mut admission = limits.arrive(&allowed).unwrap();
            admission.await_hello(address(text), &allowed).unwrap();
            admission
        };

        let mut first = arrive("192.0.2.1");
        let mut elsewhere = arrive("192.0.2.2");
        let mut second = arrive("192.0.2.1");
        let _third = arrive("192.0.2.1");

        let too_many = Refusal::TooMany(Limit::OfSource(Quantity::Hellos));
        assert_eq!(first.superseded().await, too_many);
        for waits in [&mut second, &mut elsewhere] {
            let superseded = tokio::time::timeout(Duration::from_secs(9), waits.superseded());
            assert!(superseded.await.is_err());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_handshake_gives_way_only_after_some_time() {
        let limits = Limits::new();
        let mut allowed = allowed(100, 100);
        allowed.source.handshakes = 1;

        let mut first = named(&limits, "192.0.2.1", &allowed).unwrap();
        let refused = named(&limits, "192.0.2.1", &allowed).err();
        tokio::time::advance(PATIENCE).await;
        let second = named(&limits, "192.0.2.1", &allowed);

        let too_many = Refusal::TooMany(Limit::OfSource(Quantity::Handshakes));
        assert_eq!(refused, Some(too_many));
        assert!(second.is_ok());
        assert_eq!(first.superseded().await, too_many);
    }

    #[tokio::test(start_paused = true)]
    async fn of_all_in_flight_the_silent_give_way_and_others_late() {
        let limits = Limits::new();
        let mut allowed = allowed(100, 100);
        allowed.handshakes = 2;

        let mut shaking = named(&limits, "192.0.2.1", &allowed).unwrap();
        let mut silent = limits.arrive(&allowed).unwrap();
        let second = named(&limits, "192.0.2.2", &allowed).unwrap();
        assert_eq!(
            silent.superseded().await,
            Refusal::TooMany(Limit::Handshakes)
        );

        let refused = limits.arrive(&allowed).err();
        assert_eq!(refused, Some(Refusal::TooMany(Limit::Handshakes)));
        tokio::time::advance(PATIENCE).await;
        assert!(limits.arrive(&allowed).is_ok());
        assert_eq!(
            shaking.superseded().await,
            Refusal::TooMany(Limit::Handshakes)
        );
        drop(second);
    }

    #[tokio::test]
    async fn a_settled_handshake_makes_room_and_an_empty_gate_remembers_nobody() {
        let limits = Limits::new();
        let mut allowed = allowed(10, 10);
        allowed.source.handshakes = 1;

        let mut first = named(&limits, "192.0.2.1", &allowed).unwrap();
        let too_many = Some(Refusal::TooMany(Limit::OfSource(Quantity::Handshakes)));
        assert_eq!(named(&limits, "192.0.2.1", &allowed).err(), too_many);
        first.handshake_done();
        let second = named(&limits, "192.0.2.1", &allowed).unwrap();

        drop((first, second));
        let taken = lock(&limits.taken);
        assert!(taken.connections.is_empty());
        assert!(taken.in_flight.all.is_empty());
        assert!(taken.in_flight.queues.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn handshakes_per_second_are_bounded() {
        let limits = Limits::new();
        let mut allowed = allowed(100, 100);
        allowed.source.handshakes_per_second = 5;

        let admitted = (0..20).filter(|_| named(&limits, "192.0.2.1", &allowed).is_ok());

        assert_eq!(admitted.count(), 5);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(named(&limits, "192.0.2.1", &allowed).is_ok());
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// A connection that has named a host.
    fn named<'a>(
        limits: &'a Limits,
        client: &str,
        allowed: &Allowed,
    ) -> Result<Admission<'a>, Refusal> {
        let mut admission = limits.arrive(allowed)?;
        admission.await_hello(address(client), allowed)?;
        admission.name_host(address(client), "shop.example", allowed)?;
        Ok(admission)
    }

    fn allowed(source: usize, network: usize) -> Allowed {
        let share = |connections| PeerLimit {
            hellos: 100,
            connections,
            handshakes: 100,
            handshakes_per_second: 100,
        };
        Allowed {
            handshakes: 1000,
            source: share(source),
            network: share(network),
        }
    }
}
