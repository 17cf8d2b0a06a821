//! What the kernel's network configuration is, and that it has changed. The only user of netlink.

mod connections;
mod links;
mod occupant;
mod return_path;
mod routes;
mod watch;

use std::io;

use netlink_packet_core::{
    NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr as Port};

pub use self::connections::{Connection, connections, listeners, listening_sockets, udp_listeners};
pub use self::links::{
    Interface, InterfaceKind, Wrapping, addressed, addresses, index, interfaces, is_interface_name,
};
pub use self::occupant::{
    Occupant, XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE, occupant, why_not_attached,
};
pub use self::return_path::{ReturnPath, return_paths};
pub use self::routes::{Uplinks, uplinks};
pub use self::watch::{Changed, NetworkWatch};

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

#[cfg(test)]
mod tests {
    use super::*;

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
