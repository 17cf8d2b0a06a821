//! What was dropped: a sample of it, as the program reports it, and whose it mostly is.

use std::collections::HashMap;
use std::net::IpAddr;

use aya::Ebpf;
use aya::maps::{MapData, PerCpuArray, PerCpuValues, RingBuf};
use aya::util::nr_cpus;
use filter_ebpf::abi::{EVENT, EVENTS, EVENTS_BYTES, SAMPLE_BUDGET};
use filter_ebpf::nested::innermost;
use filter_ebpf::packet::Transport;
use filter_ebpf::verdict::Counted;

use super::XdpError;
use super::load::{map_error, take_map};

/// The ring buffer of the program, and its credit.
pub(super) struct Events {
    ring: RingBuf<MapData>,
    credit: PerCpuArray<MapData, u64>,
}

impl Events {
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self, XdpError> {
        let (ring, credit) = (take_map(ebpf, EVENTS)?, take_map(ebpf, SAMPLE_BUDGET)?);
        Ok(Self {
            ring: RingBuf::try_from(ring).map_err(map_error(EVENTS))?,
            credit: PerCpuArray::try_from(credit).map_err(map_error(SAMPLE_BUDGET))?,
        })
    }

    /// Takes what was reported since the last time, and grants credit for as much again.
    pub(super) fn take(&mut self) -> Result<Vec<DropEvent>, XdpError> {
        let mut drops = Vec::new();
        // Bounded: the program may report while we read.
        for _ in 0..EVENTS_MAX {
            let Some(event) = self.ring.next() else {
                break;
            };
            // A test run's frames come in by loopback, which is never filtered.
            drops.extend(DropEvent::parse(&event).filter(|drop| drop.interface != LOOPBACK));
        }
        let cpus = nr_cpus().map_err(|(_, error)| XdpError::Cpus(error))?;
        let granted = PerCpuValues::try_from(vec![SAMPLES_GRANTED; cpus]);
        let granted = granted.map_err(XdpError::Cpus)?;
        let granted = self.credit.set(0, granted, 0);
        granted.map_err(map_error(SAMPLE_BUDGET))?;
        Ok(drops)
    }
}

/// A packet that was dropped or, in monitor mode, would have been.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DropEvent {
    /// The interface, by index.
    pub interface: u32,
    /// Verdict, reason and family, as they are counted.
    pub counted: Counted,
    /// Source address, if the packet has one that can be read.
    pub source: Option<IpAddr>,
    /// Destination address, if the packet has one that can be read and is final.
    pub destination: Option<IpAddr>,
    /// Destination port, if the packet shows one.
    pub port: Option<u16>,
}

impl DropEvent {
    /// Parses an event: see [`EVENT`].
    fn parse(event: &[u8]) -> Option<Self> {
        let event: &[u8; EVENT] = event.try_into().ok()?;
        let (head, frame) = event.split_at(16);
        let number = |at: usize| {
            let bytes = head.get(at..)?.first_chunk()?;
            Some(u32::from_ne_bytes(*bytes))
        };
        let length = head.get(8..)?.first_chunk()?;
        let length = usize::try_from(u64::from_ne_bytes(*length)).ok()?;
        let frame = frame.get(..length.min(frame.len()))?;

        let headers = innermost(frame).ok();
        Some(Self {
            interface: number(4)?,
            counted: Counted::at(number(0)?)?,
            source: headers.map(|headers| headers.source.ip()),
            destination: headers.and_then(|headers| Some(headers.destination?.ip())),
            port: match headers.map(|headers| headers.transport) {
                Some(Transport::Tcp(port) | Transport::Udp(port)) => Some(port),
                Some(
                    Transport::Other
                    | Transport::UdpTooShort
                    | Transport::LaterFragment
                    | Transport::ChainCut
                    | Transport::ChainTooLong
                    | Transport::TooShort,
                )
                | None => None,
            },
        })
    }
}

/// The sources of most drops, approximately and in bounded memory.
///
/// Space-Saving (Metwally, Agrawal and El Abbadi, 2005): a source with more than a
/// 256th of the weight is in it, and no count is too low. IPv6 sources count by their
/// /64, as a host may have any address of it.
#[derive(Debug, Default)]
pub struct TopSources {
    counts: HashMap<IpAddr, u64>,
}

impl TopSources {
    /// Adds sampled drops, each of which stands for `weight` of them.
    pub fn add(&mut self, drops: &[DropEvent], weight: u64) {
        for source in drops.iter().filter_map(|drop| drop.source) {
            let source = match source {
                IpAddr::V4(_) => source,
                IpAddr::V6(address) => IpAddr::V6((address.to_bits() >> 64 << 64).into()),
            };
            let mut inherited = 0;
            if self.counts.len() == TOP_SOURCES && !self.counts.contains_key(&source) {
                let least = self.counts.iter().min_by_key(|(_, count)| **count);
                if let Some((least, count)) = least.map(|(least, count)| (*least, *count)) {
                    self.counts.remove(&least);
                    inherited = count;
                }
            }
            *self.counts.entry(source).or_insert(inherited) += weight;
        }
    }

    /// The sources of most drops, most first, and about how many they sent.
    #[must_use]
    pub fn top(&self, most: usize) -> Vec<(IpAddr, u64)> {
        let mut sources: Vec<_> = self
            .counts
            .iter()
            .map(|(ip, count)| (*ip, *count))
            .collect();
        sources.sort_by_key(|(ip, count)| (std::cmp::Reverse(*count), *ip));
        sources.truncate(most);
        sources
    }
}

/// Reports that the program may make on each CPU between two looks.
const SAMPLES_GRANTED: u64 = 64;
/// Reports that are taken at once: as many as the ring buffer holds.
const EVENTS_MAX: usize = EVENTS_BYTES / EVENT;
/// The index of the loopback interface, in every network namespace (net/core/dev.c).
const LOOPBACK: u32 = 1;
/// Sources that are kept count of.
const TOP_SOURCES: usize = 256;

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use filter_ebpf::verdict::{Family, Judgement, Reason, Verdict};

    use super::*;

    #[test]
    fn an_event_is_parsed_as_the_program_writes_it() {
        let frame = [
            &[0; 12][..],
            &[8, 0, 0x45, 0, 0, 44, 0, 0, 0, 0, 64, 6, 0, 0],
            &[198, 51, 100, 7, 203, 0, 113, 10, 0xc0, 0, 1, 187],
        ]
        .concat();

        let drop = DropEvent::parse(&event(&frame)).unwrap();

        assert_eq!(drop.interface, 7);
        assert_eq!(drop.counted.reason, Reason::NotListed);
        assert_eq!(drop.source, Some("198.51.100.7".parse().unwrap()));
        assert_eq!(drop.destination, Some("203.0.113.10".parse().unwrap()));
        assert_eq!(drop.port, Some(443));
    }

    #[test]
    fn an_event_of_another_size_is_none() {
        assert_eq!(DropEvent::parse(&[]), None);
        assert_eq!(DropEvent::parse(&[0; EVENT + 1]), None);
        assert_eq!(DropEvent::parse(&[0xff; EVENT]), None);
    }

    #[test]
    fn heavy_sources_stay_among_many_light_ones() {
        let mut sources = TopSources::default();
        let drops = |source: u32| {
            let mut drop = DropEvent::parse(&event(&[0; 14])).unwrap();
            drop.source = Some(Ipv4Addr::from_bits(source).into());
            [drop]
        };

        for light in 0..10_000 {
            sources.add(&drops(1 << 24 | light), 1);
            sources.add(&drops(light % 2), 10);
        }

        let top = sources.top(2);
        assert_eq!(top.len(), 2);
        assert!(top.iter().all(|(ip, count)| {
            let heavy: [IpAddr; 2] = [Ipv4Addr::from_bits(0).into(), Ipv4Addr::from_bits(1).into()];
            heavy.contains(ip) && *count >= 50_000
        }));
        assert_eq!(sources.counts.len(), TOP_SOURCES);
    }

    fn event(frame: &[u8]) -> Vec<u8> {
        let judgement = Judgement {
            verdict: Verdict::Drop(Reason::NotListed),
            family: Family::V4,
        };
        let slot = judgement.slot().0;
        let mut event = [slot.to_ne_bytes(), 7_u32.to_ne_bytes()].concat();
        event.extend((frame.len() as u64).to_ne_bytes());
        event.extend(frame);
        event.resize(EVENT, 0);
        event
    }
}
