//! Routes: which interfaces lead to the internet.

use std::collections::BTreeSet;
use std::io;

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{ask, consistent};

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
pub(super) fn leads_out(route: &RouteMessage) -> bool {
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

/// `RT_TABLE_MAIN`, include/uapi/linux/rtnetlink.h.
const RT_TABLE_MAIN: u32 = 254;
