//! The events that announce a change of interfaces or routes.

use std::io;

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr as Port, TokioSocket};
use rustix::io::Errno;

use super::routes::leads_out;

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

/// include/uapi/linux/rtnetlink.h.
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_IPV4_ROUTE: u32 = 7;
const RTNLGRP_IPV6_ROUTE: u32 = 11;
/// Messages that are taken together.
const MESSAGES_MAX: u32 = 1000;
/// Bytes of a message: the kernel's own NLMSG_GOODSIZE is at most this.
const BUFFER: usize = 1 << 15;
/// Bytes that wait to be read: some thousand routes.
const RECEIVE_BUFFER: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::NetlinkHeader;
    use netlink_packet_route::AddressFamily;
    use netlink_packet_route::link::LinkMessage;
    use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};

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
}
