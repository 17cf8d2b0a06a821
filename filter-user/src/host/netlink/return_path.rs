//! The way back for connections that are opened in another's name: what loopback answers to such an
//! address is delivered on this host, instead of being sent to the host that has it.
//!
//! As `ip rule add from 127.0.0.0/8 iif lo priority P lookup T` and `ip route add local default dev lo table
//! T`, and the same for ::1 (Documentation/networking/tproxy.rst of the kernel).

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::route::{
    RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::io::Errno;

use super::{ask, consistent};

/// Where the rules and routes are.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct ReturnPath {
    /// The routing table, which nothing else uses.
    pub table: u32,
    /// The priority of the rules, before those of others that would match.
    pub priority: u32,
}

impl ReturnPath {
    /// Adds what is missing; returns whether anything was. No list is asked for: a full routing table (BGP) is
    /// long.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn restore(self) -> io::Result<bool> {
        let mut is_changed = false;
        for family in RouteFamily::ALL {
            is_changed |= add(RouteNetlinkMessage::NewRule(self.rule(family)))?;
            is_changed |= add(RouteNetlinkMessage::NewRoute(self.route(family)))?;
        }
        Ok(is_changed)
    }

    /// Removes it; what is not there need not be.
    ///
    /// # Errors
    ///
    /// Returns the kernel's error.
    pub fn remove(self) -> io::Result<()> {
        for family in RouteFamily::ALL {
            delete(RouteNetlinkMessage::DelRule(self.rule(family)))?;
            delete(RouteNetlinkMessage::DelRoute(self.route(family)))?;
        }
        Ok(())
    }

    /// Where a rule of ours is, and leads to; none of another's.
    fn of(rule: &RuleMessage) -> Option<Self> {
        let mut path = Self::default();
        let mut is_ours = false;
        for attribute in &rule.attributes {
            if let RuleAttribute::Table(table) = attribute {
                path.table = *table;
            } else if let RuleAttribute::Priority(priority) = attribute {
                path.priority = *priority;
            } else if let RuleAttribute::Protocol(protocol) = attribute {
                is_ours = *protocol == PROTOCOL;
            }
        }
        is_ours.then_some(path)
    }

    fn rule(self, family: RouteFamily) -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.family = family.number();
        rule.header.action = RuleAction::ToTable;
        let (source, length) = match family {
            RouteFamily::V4 => (IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8),
            RouteFamily::V6 => (IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
        };
        rule.header.src_len = length;
        rule.attributes = vec![
            RuleAttribute::Source(source),
            RuleAttribute::Iifname(LOOPBACK.to_owned()),
            RuleAttribute::Table(self.table),
            RuleAttribute::Priority(self.priority),
            RuleAttribute::Protocol(PROTOCOL),
        ];
        rule
    }

    fn route(self, family: RouteFamily) -> RouteMessage {
        let mut route = RouteMessage::default();
        route.header.address_family = family.number();
        route.header.protocol = PROTOCOL;
        route.header.scope = RouteScope::Host;
        route.header.kind = RouteType::Local;
        route.attributes = vec![
            RouteAttribute::Table(self.table),
            RouteAttribute::Oif(LOOPBACK_INDEX),
        ];
        route
    }
}

/// Where rules of ours are and lead to, each once.
///
/// # Errors
///
/// Returns the kernel's error.
pub fn return_paths() -> io::Result<BTreeSet<ReturnPath>> {
    consistent(|| {
        let mut found = BTreeSet::new();
        let request = RouteNetlinkMessage::GetRule(RuleMessage::default());
        let listed = ask(NETLINK_ROUTE, request, NLM_F_DUMP, |message| {
            if let RouteNetlinkMessage::NewRule(rule) = message {
                found.extend(ReturnPath::of(&rule));
            }
        });
        match listed {
            Err(error) if is_unsupported(&error) => Ok(BTreeSet::new()),
            listed => listed.map(|()| found),
        }
    })
}

/// Adds a rule or a route; whether it was missing. A kernel without IPv6 has no use for those.
fn add(message: RouteNetlinkMessage) -> io::Result<bool> {
    let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    match ask(NETLINK_ROUTE, message, flags, |_| {}) {
        Ok(()) => Ok(true),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::AFNOSUPPORT | Errno::OPNOTSUPP | Errno::EXIST) => Ok(false),
            Some(_) | None => Err(error),
        },
    }
}

/// Whether a kernel has no such rules.
fn is_unsupported(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::AFNOSUPPORT | Errno::OPNOTSUPP))
}

fn delete(message: RouteNetlinkMessage) -> io::Result<()> {
    match ask(NETLINK_ROUTE, message, NLM_F_ACK, |_| {}) {
        Ok(()) => Ok(()),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::AFNOSUPPORT | Errno::OPNOTSUPP | Errno::NOENT | Errno::SRCH) => Ok(()),
            Some(_) | None => Err(error),
        },
    }
}

#[derive(Clone, Copy)]
enum RouteFamily {
    V4,
    V6,
}

impl RouteFamily {
    const ALL: [Self; 2] = [Self::V4, Self::V6];

    fn number(self) -> AddressFamily {
        match self {
            Self::V4 => AddressFamily::Inet,
            Self::V6 => AddressFamily::Inet6,
        }
    }
}

/// Who has made them, as the kernel keeps it with each: a number that no routing daemon has
/// (`/etc/iproute2/rt_protos`).
const PROTOCOL: RouteProtocol = RouteProtocol::Other(171);
const LOOPBACK: &str = "lo";
/// `LOOPBACK_IFINDEX`, include/net/flow.h.
const LOOPBACK_INDEX: u32 = 1;
