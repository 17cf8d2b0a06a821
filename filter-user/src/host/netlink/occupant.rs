//! The XDP program of an interface, and why the kernel attaches none.

use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};

use netlink_packet_core::NLM_F_ACK;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, LinkXdp, XdpAttached};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{NetlinkRefusal, ask};

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

/// include/uapi/linux/if_link.h.
const XDP_FLAGS_UPDATE_IF_NOEXIST: u32 = 1;
/// In the driver.
pub const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
/// In the stack.
pub const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_REPLACE: u32 = 1 << 4;
