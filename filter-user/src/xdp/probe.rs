//! Asking the loaded program what it does with a packet: a test run in the kernel.

use std::net::IpAddr;
use std::path::Path;

use aya::maps::{Array, Map, MapData};
use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use aya_obj::programs::XdpAttachType;
use etherparse::{EtherType, Ethernet2Header, IpFragOffset, IpNumber, Ipv4Header};
use etherparse::{Ipv6FlowLabel, Ipv6FragmentHeader, Ipv6Header, SingleVlanHeader, TcpHeader};
use etherparse::{UdpHeader, VlanId};
use filter_ebpf::abi;
use filter_ebpf::verdict::Counted;

use super::XdpError;
use super::link::is_classifier;
use super::load::{map_error, pin_error};
use super::pins::Pins;

/// A packet to ask about.
#[derive(Clone, Copy, Debug)]
pub struct Probe<'a> {
    /// The source address.
    pub source: IpAddr,
    /// The destination address, of the same family.
    pub destination: IpAddr,
    /// The destination port.
    pub port: u16,
    /// VLAN numbers, the outermost first.
    pub vlans: &'a [u16],
    /// Whether it is a fragment other than the first.
    pub is_fragment: bool,
    /// UDP instead of TCP.
    pub is_udp: bool,
}

/// The interface to ask about: the one that is named, or the only one that is filtered.
///
/// # Errors
///
/// Returns [`XdpError::NotLoaded`] if there is none.
pub fn loaded_interface(base: &Path, named: Option<&str>) -> Result<String, XdpError> {
    let pins = Pins::existing(base)?;
    let interfaces = pins.map_or_else(|| Ok(Vec::new()), |pins| pins.programmed_interfaces())?;
    let found = match named {
        Some(name) => interfaces.into_iter().find(|interface| interface == name),
        None => interfaces.into_iter().next(),
    };
    found.ok_or_else(|| XdpError::NotLoaded {
        interface: named.map_or_else(|| "any interface".to_owned(), |name| format!("`{name}`")),
    })
}

/// The packet as an Ethernet frame.
///
/// # Errors
///
/// Returns [`XdpError::Frame`] if the addresses are of two families, or there are too many tags.
pub fn frame(probe: &Probe<'_>) -> Result<Vec<u8>, XdpError> {
    let (ethertype, packet) = packet(probe, &transport(probe)?)?;
    let mut frame = Vec::new();
    // What follows a header: another tag, or the packet.
    let follows = |tags: usize| match probe.vlans.get(tags) {
        Some(_) => EtherType::VLAN_TAGGED_FRAME,
        None => ethertype,
    };
    let ethernet = Ethernet2Header {
        ether_type: follows(0),
        ..Ethernet2Header::default()
    };
    let mut written = ethernet.write(&mut frame);
    for (number, vlan) in (1..).zip(probe.vlans) {
        let tag = SingleVlanHeader {
            vlan_id: VlanId::try_new(*vlan).map_err(|_too_big| invalid("the VLAN number"))?,
            ether_type: follows(number),
            ..SingleVlanHeader::default()
        };
        written = written.and_then(|()| tag.write(&mut frame));
    }
    written.map_err(|_to_a_vector| invalid("the Ethernet header"))?;
    frame.extend(packet);
    Ok(frame)
}

fn transport(probe: &Probe<'_>) -> Result<Vec<u8>, XdpError> {
    let mut transport = Vec::new();
    let written = if probe.is_udp {
        let header = UdpHeader::without_ipv4_checksum(SOURCE_PORT, probe.port, 0);
        header.map_or(Ok(()), |header| header.write(&mut transport))
    } else {
        let mut header = TcpHeader::new(SOURCE_PORT, probe.port, 1, 64_240);
        header.syn = true;
        header.write(&mut transport)
    };
    written.map_err(|_to_a_vector| invalid("the transport header"))?;
    Ok(transport)
}

/// The IP packet, and its EtherType.
fn packet(probe: &Probe<'_>, transport: &[u8]) -> Result<(EtherType, Vec<u8>), XdpError> {
    let protocol = if probe.is_udp {
        IpNumber::UDP
    } else {
        IpNumber::TCP
    };
    let offset = IpFragOffset::try_new(if probe.is_fragment { FRAGMENT_AT } else { 0 });
    let offset = offset.map_err(|_too_big| invalid("the fragment's offset"))?;
    let mut packet = Vec::new();
    let (ethertype, written) = match (probe.source, probe.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let length = u16::try_from(transport.len()).unwrap_or(u16::MAX);
            let (source, destination) = (source.octets(), destination.octets());
            let header = Ipv4Header::new(length, 64, protocol, source, destination);
            let mut header = header.map_err(|_too_long| invalid("the IPv4 header"))?;
            header.fragment_offset = offset;
            header.dont_fragment = !probe.is_fragment;
            (EtherType::IPV4, header.write(&mut packet))
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let fragment = probe
                .is_fragment
                .then(|| Ipv6FragmentHeader::new(protocol, offset, false, 1));
            let extensions = fragment.as_ref().map_or(0, Ipv6FragmentHeader::header_len);
            let header = Ipv6Header {
                traffic_class: 0,
                flow_label: Ipv6FlowLabel::ZERO,
                payload_length: u16::try_from(extensions + transport.len()).unwrap_or(u16::MAX),
                next_header: fragment
                    .as_ref()
                    .map_or(protocol, |_| IpNumber::IPV6_FRAGMENTATION_HEADER),
                hop_limit: 64,
                source: source.octets(),
                destination: destination.octets(),
            };
            let written = header.write(&mut packet);
            let written = written
                .and_then(|()| fragment.map_or(Ok(()), |fragment| fragment.write(&mut packet)));
            (EtherType::IPV6, written)
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
            return Err(invalid(
                "source and destination are of two address families",
            ));
        }
    };
    written.map_err(|_to_a_vector| invalid("the IP header"))?;
    packet.extend(transport);
    Ok((ethertype, packet))
}

fn invalid(problem: &'static str) -> XdpError {
    XdpError::Frame { problem }
}

/// What the loaded program does with a frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Probed {
    /// Whether it drops the frame.
    pub is_dropped: bool,
    /// What it counts the frame as, as its twin returns it.
    pub counted: Counted,
}

impl Probed {
    /// Whether action and reason are of one verdict, as they are of a program and its own twin.
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        self.is_dropped == (self.counted.verdict == "drop")
    }
}

/// Lets the loaded program of an interface and its twin judge `frame`, once each: a program returns
/// its action alone, and its twin, on the same maps and with the same settings, the counter.
///
/// What these runs add to the counters is recorded, so that metrics leave it out.
///
/// # Errors
///
/// Returns why the program cannot be asked.
pub fn probe(base: &Path, interface: &str, frame: &[u8]) -> Result<Probed, XdpError> {
    let not_loaded = || XdpError::NotLoaded {
        interface: format!("`{interface}`"),
    };
    let pins = Pins::existing(base)?.ok_or_else(not_loaded)?;
    let programs = pins.active_programs(interface);
    if !programs.program.exists() {
        return Err(not_loaded());
    }
    if !programs.slot.exists() {
        return Err(XdpError::NoTwin { pin: programs.slot });
    }
    let slot = run(&programs.slot, frame)?;
    let counted = Counted::at(slot).ok_or(XdpError::UnknownSlot { slot })?;
    let explained_pin = pins.of_interface(abi::EXPLAINED, interface);
    let explained = MapData::from_pin(&explained_pin).map_err(map_error(abi::EXPLAINED))?;
    let mut explained: Array<_, u64> =
        Array::try_from(Map::Array(explained)).map_err(map_error(abi::EXPLAINED))?;
    let noted = explained.get(&slot, 0).map_err(map_error(abi::EXPLAINED))?;

    let action = run(&programs.program, frame)?;
    let is_dropped = action == drop_action(&programs.program);
    let noted = explained.set(slot, noted + 1, 0);
    noted.map_err(map_error(abi::EXPLAINED))?;
    Ok(Probed {
        is_dropped,
        counted,
    })
}

/// What a pinned program returns for a frame that it drops; the other hook's number for that is this
/// one's for a frame that passes.
fn drop_action(pin: &Path) -> u32 {
    if is_classifier(pin) {
        TC_ACT_SHOT
    } else {
        XDP_DROP
    }
}

/// What a pinned program returns for a frame.
fn run(pin: &Path, frame: &[u8]) -> Result<u32, XdpError> {
    let options = TestRunOptions {
        data_in: Some(frame),
        ..TestRunOptions::new()
    };
    // A classifier takes the same frames by the same call.
    let program = Xdp::from_pin(pin, XdpAttachType::Interface);
    let program = program.map_err(|error| pin_error(pin, &error))?;
    let result = program.test_run(options).map_err(XdpError::TestRun)?;
    Ok(result.return_value)
}

/// Of the packet that is asked about.
const SOURCE_PORT: u16 = 49_152;
/// Offset of a fragment, in units of eight bytes.
const FRAGMENT_AT: u16 = 185;
/// include/uapi/linux/bpf.h.
const XDP_DROP: u32 = 1;
/// include/uapi/linux/pkt_cls.h.
const TC_ACT_SHOT: u32 = 2;
