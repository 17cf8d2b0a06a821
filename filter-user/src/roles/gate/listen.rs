//! The gate's listening sockets: inherited or bound, and as many descriptors as they need.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};

use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::CapabilitySet;
use tracing::{info, warn};

use crate::config::{ClientAddress, GateSettings};
use crate::gate;
use crate::host::systemd::{self, Inherited};
use crate::roles::error::StartError;
use crate::xdp::XdpError;

/// Sockets in which clients wait.
pub(super) struct Listening {
    pub(super) sockets: Vec<TcpListener>,
    /// Where clients hang: in a socket unit's sockets that `gate.listen` does not name.
    pub(super) unanswered: Vec<SocketAddr>,
    /// IPv6 addresses of `gate.listen` on a kernel that has no IPv6.
    pub(super) without_ipv6: Vec<SocketAddr>,
}

/// Takes the listening sockets that were inherited, and binds those that were not.
pub(super) fn bind(
    listen: &[SocketAddr],
    mut inherited: Vec<Inherited>,
) -> Result<Listening, StartError> {
    let mut sockets = Vec::new();
    let mut without_ipv6 = Vec::new();
    let mut bound = Vec::new();
    for address in listen {
        let found = inherited.iter().position(|it| it.address == *address);
        if let Some(index) = found {
            info!(id = "socket-inherited", %address, "the listening socket was handed over");
            sockets.push(inherited.swap_remove(index).socket);
            continue;
        }
        let socket = match gate::bind(*address) {
            Ok(socket) => socket,
            Err(source) if is_without_ipv6(address, &source) => {
                warn!(
                    id = "ipv6-missing",
                    %address,
                    "this kernel has no IPv6, so nothing can come in there"
                );
                without_ipv6.push(*address);
                continue;
            }
            Err(source) => {
                let address = *address;
                return Err(if source.kind() == ErrorKind::AddrInUse {
                    StartError::PortTaken { address, source }
                } else {
                    StartError::Bind { address, source }
                });
            }
        };
        bound.push(socket.try_clone().map_err(|source| StartError::Bind {
            address: *address,
            source,
        })?);
        sockets.push(socket);
    }
    if let (true, Some(address)) = (sockets.is_empty(), without_ipv6.first()) {
        return Err(StartError::NoIpv6 { address: *address });
    }
    inherited.retain(|it| !listen.contains(&it.address));
    let unanswered = inherited.iter().filter_map(leave).collect();
    systemd::store(&bound);
    Ok(Listening {
        sockets,
        unanswered,
        without_ipv6,
    })
}

/// Hangs up a socket that `gate.listen` does not name, and that was kept for us; returns the address of
/// any other.
fn leave(inherited: &Inherited) -> Option<SocketAddr> {
    let address = inherited.address;
    if !inherited.is_ours {
        // A socket unit would take it for a failure of its own if we hung up.
        warn!(
            id = "socket-unanswered",
            %address,
            "a socket was handed over that `gate.listen` does not name: clients that connect there \
             hang; take it out of `pullgate-gate.socket`"
        );
        return Some(address);
    }
    warn!(
        id = "socket-closed",
        %address,
        "a socket was handed over that `gate.listen` does not name, and is closed"
    );
    // As it hangs up by this, the service manager lets go of it (sd_notify(3), FDPOLL).
    if let Err(error) = shutdown(&inherited.socket, Shutdown::Both) {
        warn!(
            id = "socket-not-closed",
            %error,
            %address,
            "a listening socket cannot be closed"
        );
    }
    None
}

/// Whether the addresses that are to be bound may be.
pub(super) fn check_bind_capability(
    listen: &[SocketAddr],
    inherited: &[Inherited],
) -> Result<(), StartError> {
    // Namespaces and hosts may have moved the border, ip-sysctl.
    let border = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    let border = border.ok().and_then(|text| text.trim().parse().ok());
    let border: u16 = border.unwrap_or(1024);
    let is_bound = |address: &SocketAddr| inherited.iter().any(|it| it.address == *address);
    let mut to_bind = listen.iter().filter(|address| !is_bound(address));
    let privileged = to_bind.find(|address| address.port() < border);
    let held = rustix::thread::capabilities(None).map_err(|errno| XdpError::Capabilities {
        source: errno.into(),
    })?;
    match privileged {
        Some(address) if !held.effective.contains(CapabilitySet::NET_BIND_SERVICE) => {
            Err(StartError::BindCapability { address: *address })
        }
        Some(_) | None => Ok(()),
    }
}

/// Whether connections may be opened in clients' names, if they are to be.
pub(super) fn check_transparent_capability(settings: &GateSettings) -> Result<(), StartError> {
    if settings.client_address != ClientAddress::Transparent {
        return Ok(());
    }
    let held = rustix::thread::capabilities(None).map_err(|errno| XdpError::Capabilities {
        source: errno.into(),
    })?;
    if held.effective.contains(CapabilitySet::NET_RAW) {
        Ok(())
    } else {
        Err(StartError::TransparentCapability)
    }
}

/// Whether an address cannot be served because the kernel has no IPv6 (`ipv6.disable=1`).
fn is_without_ipv6(address: &SocketAddr, error: &std::io::Error) -> bool {
    address.is_ipv6() && Errno::from_io_error(error) == Some(Errno::AFNOSUPPORT)
}

/// A relayed connection takes two descriptors; most hosts grant 1,024 unless asked for more. Returns
/// how many connections there is room for, if not for all: what is accepted beyond would be dropped
/// after its handshake, for want of a descriptor for the upstream.
pub(super) fn raise_descriptor_limit(connections: usize) -> Option<usize> {
    let wanted = 2 * connections as u64 + SPARE_DESCRIPTORS;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let granted = maximum.map_or(wanted, |maximum| maximum.min(wanted));
    if current.is_some_and(|current| current < granted) {
        let raised = Rlimit {
            current: Some(granted),
            maximum,
        };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            warn!(id = "file-limit-not-raised", %error, "the limit of open files cannot be raised");
        }
    }
    if granted < wanted {
        let affordable = usize::try_from(granted.saturating_sub(SPARE_DESCRIPTORS) / 2);
        let affordable = affordable.unwrap_or(connections).max(1);
        warn!(
            id = "file-limit-low",
            granted,
            wanted,
            affordable,
            "the limit of open files is too low for `max_connections`; raise LimitNOFILE"
        );
        return Some(affordable);
    }
    None
}

/// For listeners, sockets and files besides the connections.
const SPARE_DESCRIPTORS: u64 = 64;
