//! What the kernel's network configuration is, and that it has changed. The only user of netlink.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
    LinkXdp, XdpAttached,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_sys::protocols::{NETLINK_ROUTE, NETLINK_SOCK_DIAG};
use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, Socket, SocketAddr as Port, TokioSocket};
use rustix::io::Errno;

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
            unwraps: unwraps(link),
        })
    });
    Ok(interfaces.collect())
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

/// The interfaces, by index, that routes to the internet lead to.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Uplinks {
    /// By the table that packets take unless a rule says otherwise.
    pub main: BTreeSet<u32>,
    /// By any other table.
    pub other: BTreeSet<u32>,
}

/// Finds the interfaces that routes to the internet lead to: default routes of either family, and
/// their halves (`0.0.0.0/1`, `2000::/3`), as VPNs and some hosters set them.
///
/// # Errors
///
/// Returns the error of the request.
pub fn uplinks() -> io::Result<Uplinks> {
    consistent(|| {
        let mut uplinks = Uplinks::default();
        let request = RouteNetlinkMessage::GetRoute(RouteMessage::default());
        ask(NETLINK_ROUTE, request, NLM_F_DUMP, |message| {
            if let RouteNetlinkMessage::NewRoute(route) = message {
                uplinks.add(&route);
            }
        })?;
        Ok(uplinks)
    })
}

impl Uplinks {
    fn add(&mut self, route: &RouteMessage) {
        if !leads_out(route) {
            return;
        }
        let table = match table(route) {
            RT_TABLE_MAIN => &mut self.main,
            _ => &mut self.other,
        };
        for attribute in &route.attributes {
            if let RouteAttribute::Oif(index) = attribute {
                table.insert(*index);
            } else if let RouteAttribute::MultiPath(hops) = attribute {
                table.extend(hops.iter().map(|hop| hop.interface_index));
            }
        }
    }
}

/// Whether a route is for more of the internet than any network holds: networks are of /8 at the
/// most, and private IPv6 space is fc00::/7. Multicast, 224.0.0.0/4, is not the internet.
fn leads_out(route: &RouteMessage) -> bool {
    let longest = if route.header.address_family == AddressFamily::Inet6 {
        6
    } else {
        7
    };
    let is_multicast = route.attributes.iter().any(|attribute| {
        if let RouteAttribute::Destination(RouteAddress::Inet(address)) = attribute {
            address.octets()[0] >= 224
        } else {
            false
        }
    });
    let is_wide = route.header.destination_prefix_length <= longest;
    route.header.kind == RouteType::Unicast && is_wide && !is_multicast
}

/// The number of a route's table; numbers above 255 are in an attribute.
fn table(route: &RouteMessage) -> u32 {
    let attributes = &mut route.attributes.iter();
    let large = attributes.find_map(|attribute| {
        if let RouteAttribute::Table(table) = attribute {
            Some(*table)
        } else {
            None
        }
    });
    large.unwrap_or_else(|| route.header.table.into())
}

/// The kernel's own words on why a program cannot be attached to an interface.
///
/// BPF links answer with a number alone, so this asks by netlink. Should the request be granted
/// after all, it is undone, and nothing is returned.
pub fn why_not_attached(interface: u32, program: BorrowedFd<'_>, flags: u32) -> Option<String> {
    let set = |xdp: Vec<LinkXdp>| {
        let mut message = LinkMessage::default();
        message.header.index = interface;
        message.attributes = vec![LinkAttribute::Xdp(xdp)];
        let request = RouteNetlinkMessage::SetLink(message);
        ask(NETLINK_ROUTE, request, NLM_F_ACK, |_| {})
    };
    let program: RawFd = program.as_raw_fd();
    let attach = vec![
        LinkXdp::Fd(program),
        LinkXdp::Flags(flags | XDP_FLAGS_UPDATE_IF_NOEXIST),
    ];
    match set(attach) {
        Ok(()) => {
            let detach = vec![
                LinkXdp::Fd(-1),
                LinkXdp::Flags(flags | XDP_FLAGS_REPLACE),
                LinkXdp::ExpectedFd(u32::try_from(program).unwrap_or(u32::MAX)),
            ];
            drop(set(detach));
            None
        }
        Err(error) => error
            .get_ref()
            .and_then(|error| error.downcast_ref::<NetlinkRefusal>())
            .map(|refusal| refusal.0.clone()),
    }
}

/// An XDP program that is on an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Occupant {
    /// The program's number.
    pub program: u32,
    /// Whether it is in the stack (generic XDP), not in the driver.
    pub is_generic: bool,
}

/// The XDP program that is on an interface.
#[must_use]
pub fn occupant(interface: u32) -> Option<Occupant> {
    let mut message = LinkMessage::default();
    message.header.index = interface;
    let mut found = None;
    let request = RouteNetlinkMessage::GetLink(message);
    ask(NETLINK_ROUTE, request, NLM_F_ACK, |answer| {
        let RouteNetlinkMessage::NewLink(link) = answer else {
            return;
        };
        for attribute in link.attributes {
            let LinkAttribute::Xdp(xdp) = attribute else {
                continue;
            };
            let is_generic = xdp.contains(&LinkXdp::Attached(XdpAttached::SocketBuffer));
            for word in xdp {
                if let LinkXdp::ProgId(program)
                | LinkXdp::DrvProgId(program)
                | LinkXdp::SkbProgId(program) = word
                {
                    found = Some(Occupant {
                        program,
                        is_generic,
                    });
                }
            }
        }
    })
    .ok()?;
    found
}

/// An established TCP connection of this host.
#[derive(Clone, Copy, Debug)]
pub struct Connection {
    /// This host's end.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
    /// The number of the socket, as `/proc/<pid>/fd` shows it.
    pub inode: u32,
}

/// All established TCP connections of this network namespace: sock_diag(7).
///
/// # Errors
///
/// Returns the error of the request.
pub fn connections() -> io::Result<Vec<Connection>> {
    sockets(IPPROTO_TCP, &StateFlags::ESTABLISHED)
}

/// The addresses that TCP sockets of this network namespace listen on.
///
/// # Errors
///
/// Returns the error of the request.
pub fn listeners() -> io::Result<Vec<SocketAddr>> {
    let sockets = sockets(IPPROTO_TCP, &StateFlags::LISTEN)?;
    Ok(sockets.iter().map(|socket| socket.local).collect())
}

/// The addresses at which UDP sockets of this network namespace take datagrams of everybody.
///
/// # Errors
///
/// Returns the error of the request.
pub fn udp_listeners() -> io::Result<Vec<SocketAddr>> {
    // So the kernel calls one that is not connected: net/ipv4/udp.c.
    let sockets = sockets(IPPROTO_UDP, &StateFlags::CLOSE)?;
    Ok(sockets.iter().map(|socket| socket.local).collect())
}

fn sockets(protocol: u8, states: &StateFlags) -> io::Result<Vec<Connection>> {
    let mut connections = Vec::new();
    for (family, socket_id) in [
        (AF_INET, SocketId::new_v4()),
        (AF_INET6, SocketId::new_v6()),
    ] {
        let request = SockDiagMessage::InetRequest(InetRequest {
            family,
            protocol,
            extensions: ExtensionFlags::empty(),
            states: states.clone(),
            socket_id,
        });
        ask(NETLINK_SOCK_DIAG, request, NLM_F_DUMP, |message| {
            if let SockDiagMessage::InetResponse(response) = message {
                let id = response.header.socket_id;
                let end = |address: IpAddr, port| SocketAddr::new(address.to_canonical(), port);
                connections.push(Connection {
                    local: end(id.source_address, id.source_port),
                    peer: end(id.destination_address, id.destination_port),
                    inode: response.header.inode,
                });
            }
        })?;
    }
    Ok(connections)
}

/// Reports changes of interfaces and of routes to the internet.
pub struct NetworkWatch {
    socket: TokioSocket,
}

/// What has changed.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Changed {
    /// An interface has come, gone, or become another's port.
    pub links: bool,
    /// A route to the internet has come or gone.
    pub routes: bool,
}

impl Changed {
    /// Anything may have.
    pub const ALL: Self = Self {
        links: true,
        routes: true,
    };

    fn is_any(self) -> bool {
        self.links || self.routes
    }

    /// Adds what a message reports.
    fn add(&mut self, datagram: &[u8]) {
        let mut rest = datagram;
        while !rest.is_empty() {
            let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest) else {
                // What cannot be read may be anything.
                *self = Self::ALL;
                return;
            };
            let length = usize::try_from(message.header.length).unwrap_or(rest.len());
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            match message.payload {
                NetlinkPayload::InnerMessage(
                    RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route),
                ) => self.routes |= leads_out(&route),
                NetlinkPayload::InnerMessage(_) => self.links = true,
                NetlinkPayload::Overrun(_) => *self = Self::ALL,
                NetlinkPayload::Done(_) | NetlinkPayload::Error(_) | NetlinkPayload::Noop | _ => {}
            }
        }
    }
}

impl NetworkWatch {
    /// Begins to watch this network namespace.
    ///
    /// # Errors
    ///
    /// Returns why not. Must be called within a tokio runtime.
    pub fn new() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        socket.socket_mut().bind(&Port::new(0, 0))?;
        // Of a full routing table (BGP) most messages are read and forgotten; a loss is noticed.
        socket.socket_mut().set_rx_buf_sz(RECEIVE_BUFFER)?;
        for group in [RTNLGRP_LINK, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_ROUTE] {
            socket.socket_mut().add_membership(group)?;
        }
        Ok(Self { socket })
    }

    /// Returns at once after a change, with all that has been reported by then.
    ///
    /// # Errors
    ///
    /// Returns an error of the socket.
    pub async fn changed(&mut self) -> io::Result<Changed> {
        let mut changed = Changed::default();
        while !changed.is_any() {
            self.receive(&mut changed).await?;
        }
        // What waits already is part of the same change. Bounded: on some hosts it never stops.
        for _ in 0..MESSAGES_MAX {
            tokio::select! {
                biased;
                received = self.receive(&mut changed) => received?,
                () = std::future::ready(()) => break,
            }
        }
        Ok(changed)
    }

    /// Takes one message; a loss of messages (ENOBUFS) may be of any.
    async fn receive(&mut self, changed: &mut Changed) -> io::Result<()> {
        let mut message = Vec::with_capacity(BUFFER);
        match self.socket.recv(&mut message).await {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NOBUFS) => {
                *changed = Changed::ALL;
                Ok(())
            }
            Err(error) => Err(error),
            Ok(()) => {
                changed.add(&message);
                Ok(())
            }
        }
    }
}

/// What the kernel says of a request that it refuses (NLMSGERR_ATTR_MSG).
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NetlinkRefusal(String);

/// Asks again if something has changed meanwhile, so that the answer may miss a part.
fn consistent<T>(dump: impl Fn() -> io::Result<T>) -> io::Result<T> {
    for _ in 1..DUMPS_MAX {
        match dump() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
    dump()
}

/// Sends one request, and hands on every message of the answer. One that the kernel could not give
/// whole fails as [`io::ErrorKind::Interrupted`].
fn ask<M: NetlinkSerializable + NetlinkDeserializable>(
    protocol: isize,
    request: M,
    flags: u16,
    mut each: impl FnMut(M),
) -> io::Result<()> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&Port::new(0, 0))?;
    drop(socket.set_ext_ack(true));
    drop(socket.set_cap_ack(true));

    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut question = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request));
    question.finalize();
    let mut bytes = vec![0; question.buffer_len()];
    question.serialize(&mut bytes);
    socket.send(&bytes, 0)?;

    let mut is_whole = true;
    loop {
        let (answer, _) = socket.recv_from_full()?;
        let mut rest = answer.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<M>::deserialize(rest).map_err(io::Error::other)?;
            let length = usize::try_from(message.header.length).unwrap_or(rest.len());
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            is_whole &= message.header.flags & NLM_F_DUMP_INTR == 0;
            match message.payload {
                NetlinkPayload::InnerMessage(message) => each(message),
                NetlinkPayload::Error(error) if error.code.is_none() => return Ok(()),
                NetlinkPayload::Error(error) => {
                    return Err(match explanation(&error.header) {
                        Some(text) => io::Error::other(NetlinkRefusal(text)),
                        None => error.to_io(),
                    });
                }
                NetlinkPayload::Done(_) if is_whole => return Ok(()),
                NetlinkPayload::Done(_) => return Err(io::ErrorKind::Interrupted.into()),
                NetlinkPayload::Noop | NetlinkPayload::Overrun(_) | _ => {}
            }
        }
    }
}

/// The kernel's words in a refusal: behind the header of the request, attribute 1, a C string.
fn explanation(refusal: &[u8]) -> Option<String> {
    let mut rest = refusal.get(NETLINK_HEADER..)?;
    while let [l0, l1, t0, t1, value @ ..] = rest {
        let length = usize::from(u16::from_ne_bytes([*l0, *l1]));
        let kind = u16::from_ne_bytes([*t0, *t1]);
        let value = value.get(..length.checked_sub(4)?)?;
        if kind == NLMSGERR_ATTR_MSG {
            let text = value.split(|byte| *byte == 0).next()?;
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

/// include/uapi/linux/netlink.h.
const NLMSGERR_ATTR_MSG: u16 = 1;
const NETLINK_HEADER: usize = 16;
const NLM_F_DUMP_INTR: u16 = 0x10;
/// Times that an interrupted answer is asked for.
const DUMPS_MAX: u32 = 10;
/// include/uapi/linux/if_link.h.
const XDP_FLAGS_UPDATE_IF_NOEXIST: u32 = 1;
/// In the driver.
pub const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
/// In the stack.
pub const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_REPLACE: u32 = 1 << 4;
/// include/uapi/linux/rtnetlink.h.
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_IPV4_ROUTE: u32 = 7;
const RTNLGRP_IPV6_ROUTE: u32 = 11;
/// `RT_TABLE_MAIN`.
const RT_TABLE_MAIN: u32 = 254;
/// Messages that are taken together.
const MESSAGES_MAX: u32 = 1000;
/// Bytes of a message: the kernel's own NLMSG_GOODSIZE is at most this.
const BUFFER: usize = 1 << 15;
/// Bytes that wait to be read: some thousand routes.
const RECEIVE_BUFFER: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_an_interface_but_not_an_ethernet() {
        let interfaces = interfaces().unwrap();

        let loopback = interfaces.iter().find(|interface| interface.name == "lo");
        assert!(!loopback.unwrap().is_ethernet);
    }

    #[test]
    fn an_established_connection_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (local, peer) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());

        let connections = connections().unwrap();

        let is_ours = |c: &&Connection| c.local == local && c.peer == peer;
        assert!(
            connections
                .iter()
                .find(is_ours)
                .is_some_and(|c| c.inode != 0)
        );
    }

    #[test]
    fn only_links_and_routes_to_the_internet_are_changes() {
        let of_route = |length, family| {
            let mut route = RouteMessage::default();
            route.header.kind = RouteType::Unicast;
            route.header.address_family = family;
            route.header.destination_prefix_length = length;
            RouteNetlinkMessage::NewRoute(route)
        };
        let (v4, v6) = (AddressFamily::Inet, AddressFamily::Inet6);
        let mut multicast = RouteMessage::default();
        multicast.header.kind = RouteType::Unicast;
        multicast.header.address_family = v4;
        multicast.header.destination_prefix_length = 4;
        let group = RouteAddress::Inet([224, 0, 0, 0].into());
        multicast
            .attributes
            .push(RouteAttribute::Destination(group));
        let multicast = RouteNetlinkMessage::NewRoute(multicast);
        let links = RouteNetlinkMessage::NewLink(LinkMessage::default());
        let routes = Changed {
            links: false,
            routes: true,
        };

        for (messages, changed) in [
            (
                vec![of_route(24, v4), of_route(8, v4), of_route(7, v6)],
                Changed::default(),
            ),
            (vec![of_route(0, v4)], routes),
            (vec![of_route(24, v4), of_route(1, v4)], routes),
            (vec![of_route(3, v6)], routes),
            (vec![multicast], Changed::default()),
            (vec![links, of_route(0, v6)], Changed::ALL),
        ] {
            let mut seen = Changed::default();
            for message in messages {
                seen.add(&bytes(message));
            }
            assert_eq!(seen, changed);
        }
        let mut seen = Changed::default();
        seen.add(&[1, 2, 3]);
        assert_eq!(seen, Changed::ALL, "what cannot be read may be anything");
    }

    fn bytes(inner: RouteNetlinkMessage) -> Vec<u8> {
        let payload = NetlinkPayload::InnerMessage(inner);
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), payload);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    #[test]
    fn the_kernels_words_are_found_behind_the_header() {
        let mut refusal = vec![0; NETLINK_HEADER];
        refusal.extend([6, 0, 2, 0, 9, 9, 0, 0]);
        refusal.extend([9, 0, 1, 0]);
        refusal.extend(*b"why?\0\0\0\0");

        assert_eq!(explanation(&refusal).unwrap(), "why?");
        assert_eq!(explanation(&refusal[..20]), None);
        assert_eq!(explanation(&[]), None);
    }
}
