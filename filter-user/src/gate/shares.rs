//! How many: what one source and one network take of the gate.
//!
//! A source is an IPv4 address or an IPv6 /64, a network an IPv4 /24 or an IPv6 /48: what a host, and
//! what a site is usually given.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Mutex;

use ipnet::IpNet;

use super::pace::Pace;
use super::refusal::{Kind, Refusal, What};
use crate::config::Share;
use crate::sync::lock;

/// What sources and networks have taken.
pub(super) struct Shares {
    taken: Mutex<HashMap<IpNet, Taken>>,
    pace: Pace,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Taken {
    connections: usize,
    handshakes: usize,
}

/// What a source, and a network, may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowed {
    pub(super) source: Share,
    pub(super) network: Share,
}

impl Shares {
    pub(super) fn new() -> Self {
        Self {
            taken: Mutex::default(),
            pace: Pace::new(),
        }
    }

    /// Counts a connection, whose handshake begins, for as long as the seat is held.
    pub(super) fn seat(&self, client: IpAddr, allowed: &Allowed) -> Result<Seat<'_>, Refusal> {
        let [source, network] = scopes(client);
        let scopes = [
            (source, allowed.source, What::OfSource as fn(Kind) -> What),
            (network, allowed.network, What::OfNetwork),
        ];
        let mut taken = lock(&self.taken);
        for (scope, share, what) in scopes {
            let Taken {
                connections,
                handshakes,
            } = taken.get(&scope).copied().unwrap_or_default();
            if connections >= share.connections {
                return Err(Refusal::TooMany(what(Kind::Connections)));
            }
            if handshakes >= share.handshakes {
                return Err(Refusal::TooMany(what(Kind::Handshakes)));
            }
        }
        // Last, for it counts: who is refused for another reason spends no rate.
        for (scope, share, what) in scopes {
            let per_second = share.handshakes_per_second as u64;
            let interval = 1_000_000_000 / per_second.max(1);
            if !self.pace.admits(&scope, interval, per_second) {
                return Err(Refusal::TooMany(what(Kind::PerSecond)));
            }
        }
        for (scope, _, _) in scopes {
            let taken = taken.entry(scope).or_default();
            taken.connections += 1;
            taken.handshakes += 1;
        }
        Ok(Seat {
            shares: self,
            client,
            shakes_hands: true,
        })
    }

    fn give_back(&self, client: IpAddr, back: Taken) {
        let mut all = lock(&self.taken);
        for scope in scopes(client) {
            if let Some(taken) = all.get_mut(&scope) {
                taken.connections -= back.connections;
                taken.handshakes -= back.handshakes;
                if *taken == Taken::default() {
                    all.remove(&scope);
                }
            }
        }
    }
}

/// One connection's place.
#[must_use]
pub(super) struct Seat<'a> {
    shares: &'a Shares,
    client: IpAddr,
    shakes_hands: bool,
}

impl Seat<'_> {
    /// The handshake is over.
    pub(super) fn settle(&mut self) {
        if std::mem::take(&mut self.shakes_hands) {
            let back = Taken {
                connections: 0,
                handshakes: 1,
            };
            self.shares.give_back(self.client, back);
        }
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let back = Taken {
            connections: 1,
            handshakes: usize::from(self.shakes_hands),
        };
        self.shares.give_back(self.client, back);
    }
}

/// The source and the network of an address.
fn scopes(client: IpAddr) -> [IpNet; 2] {
    let client = client.to_canonical();
    let lengths = match client {
        IpAddr::V4(_) => [32, 24],
        IpAddr::V6(_) => [64, 48],
    };
    // These lengths fit their families.
    lengths.map(|length| IpNet::new_assert(client, length).trunc())
}

/// The source of an address: what one host is usually given.
pub(super) fn source(client: IpAddr) -> IpNet {
    scopes(client)[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_ipv6_host_share_and_mapped_ones_are_ipv4() {
        let shares = Shares::new();
        let one = allowed(1, 10);
        let _seat = shares.seat(address("2001:db8::1"), &one).unwrap();

        let refused = |text| shares.seat(address(text), &one).err();

        let too_many = Some(Refusal::TooMany(What::OfSource(Kind::Connections)));
        assert_eq!(refused("2001:db8::ffff"), too_many);
        assert_eq!(refused("2001:db8:0:1::1"), None);
        let _v4 = shares.seat(address("::ffff:192.0.2.1"), &one).unwrap();
        assert_eq!(refused("192.0.2.1"), too_many);
        assert_eq!(refused("192.0.2.2"), None);
    }

    #[test]
    fn many_sources_of_one_network_are_one_network() {
        let shares = Shares::new();
        let allowed = allowed(10, 3);

        let mut seats: Vec<_> = (0..3)
            .map(|n| shares.seat(address(&format!("192.0.2.{n}")), &allowed))
            .collect();
        let refused = shares.seat(address("192.0.2.9"), &allowed).err();

        let too_many = Some(Refusal::TooMany(What::OfNetwork(Kind::Connections)));
        assert_eq!(refused, too_many);
        assert!(shares.seat(address("192.0.3.9"), &allowed).is_ok());
        seats.pop();
        assert!(shares.seat(address("192.0.2.9"), &allowed).is_ok());
    }

    #[test]
    fn a_settled_handshake_makes_room_and_an_empty_gate_remembers_nobody() {
        let shares = Shares::new();
        let share = Share {
            connections: 10,
            handshakes: 1,
            handshakes_per_second: 100,
        };
        let allowed = Allowed {
            source: share,
            network: share,
        };
        let client = address("192.0.2.1");

        let mut first = shares.seat(client, &allowed).unwrap();
        let too_many = Some(Refusal::TooMany(What::OfSource(Kind::Handshakes)));
        assert_eq!(shares.seat(client, &allowed).err(), too_many);
        first.settle();
        let second = shares.seat(client, &allowed).unwrap();

        drop((first, second));
        assert!(lock(&shares.taken).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn handshakes_per_second_are_bounded() {
        let shares = Shares::new();
        let mut allowed = allowed(100, 100);
        allowed.source.handshakes_per_second = 5;
        let client = address("192.0.2.1");

        let admitted = (0..20).filter(|_| shares.seat(client, &allowed).is_ok());

        assert_eq!(admitted.count(), 5);
        tokio::time::advance(std::time::Duration::from_secs(1)).await;
        assert!(shares.seat(client, &allowed).is_ok());
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn allowed(source: usize, network: usize) -> Allowed {
        let share = |connections| Share {
            connections,
            handshakes: 100,
            handshakes_per_second: 100,
        };
        Allowed {
            source: share(source),
            network: share(network),
        }
    }
}
