//! Interfaces: what they are, what they lie on, and their addresses.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{ask, consistent};

/// Whether the kernel would let an interface have this name: `dev_valid_name`, net/core/dev.c.
#[must_use]
pub fn is_interface_name(name: &str) -> bool {
    let is_odd = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    (1..=15).contains(&name.len()) && name != "." && name != ".." && !name.contains(is_odd)
}

/// A network interface.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Interface {
    /// Its number in this network namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether its frames begin with an Ethernet header.
    pub is_ethernet: bool,
    /// What it is, as far as that matters to where its frames come from.
    pub kind: InterfaceKind,
    /// The interface of this namespace that carries its frames, if it is a VLAN or the like.
    pub lower: Option<u32>,
    /// The bond, bridge or team that it is a port of.
    pub controller: Option<u32>,
    /// The longest packet that goes out by it, in bytes.
    pub mtu: u32,
    /// How packets are wrapped that it unwraps, if they come in by another interface in a way that
    /// cannot be looked into there.
    pub unwraps: Option<Wrapping>,
}

/// How packets are wrapped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Wrapping {
    /// What it is called.
    pub name: &'static str,
    /// The UDP port that it comes to, as far as the interface says.
    pub udp_port: Option<u16>,
}

/// What an interface is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum InterfaceKind {
    /// Several ports that act as one; the kernel attaches programs to the bond alone.
    Bond,
    /// A switch: frames for this host come from any of its ports.
    Bridge,
    /// Several ports that act as one, each with a program of its own.
    Team,
    /// Frames of another interface, picked by tag or address: VLAN, macvlan, ipvlan.
    Stacked,
    /// One end of a pair whose other end is on this host: a container's.
    Veth,
    /// A network card, a tunnel, or anything else whose frames come from elsewhere.
    Other,
}

/// All interfaces of this network namespace.
///
/// # Errors
///
/// Returns the error of the request.
pub fn interfaces() -> io::Result<Vec<Interface>> {
    let links = consistent(|| {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let mut links = Vec::new();
        ask(NETLINK_ROUTE, request, NLM_F_DUMP, |message| {
            if let RouteNetlinkMessage::NewLink(link) = message {
                links.push(link);
            }
        })?;
        Ok(links)
    })?;
    let interfaces = links.iter().filter_map(|link| {
        let kind = kind(link);
        Some(Interface {
            index: link.header.index,
            name: name(link)?,
            is_ethernet: link.header.link_layer_type == LinkLayerType::Ether,
            kind,
            lower: lower(link).filter(|_| kind == InterfaceKind::Stacked),
            controller: controller(link),
            mtu: mtu(link),
            unwraps: unwraps(link),
        })
    });
    Ok(interfaces.collect())
}

/// The index of the interface of this network namespace that has this name.
#[must_use]
pub fn index(name: &str) -> Option<u32> {
    let interfaces = interfaces().ok()?;
    let found = interfaces.iter().find(|interface| interface.name == name)?;
    Some(found.index)
}

/// The addresses of all interfaces of this network namespace.
///
/// # Errors
///
/// Returns the error of the request.
pub fn addresses() -> io::Result<Vec<IpAddr>> {
    let addresses = interface_addresses()?.into_iter();
    Ok(addresses.map(|(_, address)| address).collect())
}

/// The interfaces, by index, that have an address beyond their own link.
///
/// # Errors
///
/// Returns the error of the request.
pub fn addressed() -> io::Result<BTreeSet<u32>> {
    let is_local = |address: &IpAddr| match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    let addresses = interface_addresses()?.into_iter();
    Ok(addresses
        .filter(|(_, address)| !is_local(address))
        .map(|(index, _)| index)
        .collect())
}

fn interface_addresses() -> io::Result<Vec<(u32, IpAddr)>> {
    consistent(|| {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let mut addresses = Vec::new();
        ask(NETLINK_ROUTE, request, NLM_F_DUMP, |message| {
            if let RouteNetlinkMessage::NewAddress(message) = message {
                let index = message.header.index;
                addresses.extend(own_address(&message).map(|address| (index, address)));
            }
        })?;
        Ok(addresses)
    })
}

/// Where a link has two ends, ours is the local one: rtnetlink(7).
fn own_address(message: &AddressMessage) -> Option<IpAddr> {
    let mut address = None;
    for attribute in &message.attributes {
        if let AddressAttribute::Local(local) = attribute {
            return Some(*local);
        }
        if let AddressAttribute::Address(either_end) = attribute {
            address = Some(*either_end);
        }
    }
    address
}

fn name(link: &LinkMessage) -> Option<String> {
    link.attributes.iter().find_map(|attribute| {
        if let LinkAttribute::IfName(name) = attribute {
            Some(name.clone())
        } else {
            None
        }
    })
}

/// The bond, bridge or team that an interface is a port of.
fn controller(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| {
        if let LinkAttribute::Controller(index) = attribute {
            Some(*index)
        } else {
            None
        }
    })
}

/// The interface that another is stacked on, unless that is in another namespace.
fn lower(link: &LinkMessage) -> Option<u32> {
    let mut found = None;
    for attribute in &link.attributes {
        if let LinkAttribute::LinkNetNsId(_) = attribute {
            return None;
        }
        if let LinkAttribute::Link(index) = attribute {
            found = Some(*index);
        }
    }
    found
}

/// What the kernel says of the kind of an interface.
fn infos(link: &LinkMessage) -> impl Iterator<Item = &LinkInfo> + Clone {
    let infos = link.attributes.iter().filter_map(|attribute| {
        if let LinkAttribute::LinkInfo(infos) = attribute {
            Some(infos)
        } else {
            None
        }
    });
    infos.flatten()
}

fn info_kinds(link: &LinkMessage) -> impl Iterator<Item = &InfoKind> + Clone {
    infos(link).filter_map(|info| {
        if let LinkInfo::Kind(kind) = info {
            Some(kind)
        } else {
            None
        }
    })
}

fn unwraps(link: &LinkMessage) -> Option<Wrapping> {
    // A guest's tap, or a port, brings frames that are not for this host.
    let is_port = controller(link).is_some();
    if is_port || !link.header.flags.contains(LinkFlags::Up) {
        return None;
    }
    let mut ports = infos(link).filter_map(|info| {
        if let LinkInfo::Data(InfoData::Vxlan(attributes)) = info {
            attributes.iter().find_map(|attribute| {
                if let InfoVxlan::Port(port) = attribute {
                    Some(*port)
                } else {
                    None
                }
            })
        } else {
            None
        }
    });
    let udp_port = ports.next();
    let kind = info_kinds(link).next()?;
    if *kind == InfoKind::Tun && link.header.link_layer_type == LinkLayerType::Ether {
        return None;
    }
    let found = WRAPPINGS.iter().find(|(known, _)| known == kind);
    found.map(|(_, name)| Wrapping { name, udp_port })
}

/// That of Ethernet, if the kernel does not say.
fn mtu(link: &LinkMessage) -> u32 {
    let mut attributes = link.attributes.iter();
    let mtu = attributes.find_map(|attribute| {
        if let LinkAttribute::Mtu(mtu) = attribute {
            Some(*mtu)
        } else {
            None
        }
    });
    mtu.unwrap_or(1500)
}

fn kind(link: &LinkMessage) -> InterfaceKind {
    let kinds = info_kinds(link);
    let is_any = |names: &[InfoKind]| kinds.clone().any(|kind| names.contains(kind));
    if is_any(&[InfoKind::Bond]) {
        InterfaceKind::Bond
    } else if is_any(&[InfoKind::Bridge]) {
        InterfaceKind::Bridge
    } else if is_any(&[InfoKind::Team]) {
        InterfaceKind::Team
    } else if is_any(&[
        InfoKind::Vlan,
        InfoKind::MacVlan,
        InfoKind::MacVtap,
        InfoKind::IpVlan,
        InfoKind::IpVtap,
    ]) {
        InterfaceKind::Stacked
    } else if is_any(&[InfoKind::Veth]) {
        InterfaceKind::Veth
    } else {
        InterfaceKind::Other
    }
}

/// The interfaces that unwrap what the filter cannot look into. IPIP, 6in4, GRE and PPPoE it can.
const WRAPPINGS: [(InfoKind, &str); 17] = [
    (InfoKind::Vxlan, "VXLAN"),
    (InfoKind::Geneve, "GENEVE"),
    (InfoKind::BareUdp, "UDP encapsulation"),
    (InfoKind::Gtp, "GTP"),
    (InfoKind::Pfcp, "PFCP"),
    (InfoKind::Amt, "AMT"),
    (InfoKind::Wireguard, "WireGuard"),
    (InfoKind::Tun, "a program's tunnel"),
    (InfoKind::GreTap, "GRE of Ethernet frames"),
    (InfoKind::GreTap6, "GRE of Ethernet frames"),
    (InfoKind::ErSpan, "ERSPAN"),
    (InfoKind::Ip6ErSpan, "ERSPAN"),
    (InfoKind::MacSec, "MACsec"),
    (InfoKind::Xfrm, "IPsec"),
    (InfoKind::Vti, "IPsec"),
    (InfoKind::Vti6, "IPsec"),
    (InfoKind::BatAdv, "B.A.T.M.A.N."),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_an_interface_but_not_an_ethernet() {
        let interfaces = interfaces().unwrap();

        let loopback = interfaces.iter().find(|interface| interface.name == "lo");
        assert!(!loopback.unwrap().is_ethernet);
    }
}
