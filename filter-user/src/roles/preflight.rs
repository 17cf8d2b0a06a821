//! Before enforcement: which connections would be dropped, and is one of them the operator's?

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use filter_ebpf::{Ranges as _, Settings as _};
use tracing::{info, warn};

use super::error::StartError;
use crate::config::{self, Mode};
use crate::host::netlink::{self, Connection};
use crate::host::process::{parent_of, sockets_of};
use crate::ranges::Table;

/// What to do if the operator's own connection would be dropped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OwnConnection {
    /// Refuse to start.
    Refuse,
    /// Go on: `--yes` was given.
    Drop,
}

/// Looks at the established connections that enforcement would drop.
///
/// # Errors
///
/// Returns the operator's own connection if it is among them, unless it may be.
pub(super) fn check(
    settings: &config::FilterSettings,
    table: &Table,
    (own, ancestors): (OwnConnection, &Ancestors),
) -> Result<(), StartError> {
    let dropped = dropped(settings, table);
    let is_ours = |it: &&Connection| {
        ancestors.sockets.contains(&u64::from(it.inode)) || Some(it.peer) == ssh_client()
    };
    let Some(ours) = dropped.iter().find(is_ours) else {
        return Ok(());
    };
    if own == OwnConnection::Drop {
        info!(
            id = "own-connection-dropped",
            peer = %ours.peer,
            "your own connection will be dropped, as `--yes` allows"
        );
        return Ok(());
    }
    Err(StartError::OwnConnection {
        peer: ours.peer,
        port: ours.local.port(),
    })
}

/// The established connections that enforcement would drop, which are logged.
pub(super) fn dropped(settings: &config::FilterSettings, table: &Table) -> Vec<Connection> {
    if settings.mode == Mode::Monitor {
        return Vec::new();
    }
    let connections = match netlink::connections() {
        Ok(connections) => connections,
        Err(error) => {
            warn!(
                id = "connections-not-listed",
                %error,
                "established connections cannot be listed; some may be dropped"
            );
            return Vec::new();
        }
    };
    let dropped: Vec<_> = connections
        .into_iter()
        .filter(|connection| would_drop(settings, table, connection))
        .collect();
    if !dropped.is_empty() {
        warn!(
            id = "connections-dropped",
            connections = dropped.len(),
            "established connections of strangers will be dropped"
        );
    }
    for Connection { local, peer, .. } in dropped.iter().take(SHOWN) {
        warn!(id = "connection-dropped", %local, %peer, "will be dropped");
    }
    dropped
}

fn would_drop(settings: &config::FilterSettings, table: &Table, connection: &Connection) -> bool {
    let Connection { local, peer, .. } = connection;
    let is_protected =
        settings.protects_tcp(local.port()) && settings.protects_destination(local.ip());
    is_protected && !peer.ip().is_loopback() && !table.class(peer.ip()).may_enter()
}

/// The operator's end as sshd tells it (`SSH_CONNECTION`, ssh(1)): what is left of it in tmux, whose
/// processes do not descend from sshd.
fn ssh_client() -> Option<SocketAddr> {
    let connection = std::env::var("SSH_CONNECTION").ok()?;
    let mut words = connection.split_whitespace();
    let address: IpAddr = words.next()?.parse().ok()?;
    Some(SocketAddr::new(
        address.to_canonical(),
        words.next()?.parse().ok()?,
    ))
}

/// The processes that this one descends from.
#[derive(Debug, Default)]
pub(super) struct Ancestors {
    /// Their sockets, by inode: sshd's is among them if the operator came by SSH, whatever sudo has
    /// made of the environment.
    sockets: BTreeSet<u64>,
}

impl Ancestors {
    /// Looks at all of them.
    pub(super) fn look() -> Self {
        let mut sockets = BTreeSet::new();
        let mut process = std::process::id();
        // Bounded: process numbers may be reused while we look.
        for _ in 0..GENERATIONS {
            sockets.extend(sockets_of(process));
            match parent_of(process) {
                Some(parent) if parent > 1 => process = parent,
                Some(_) | None => break,
            }
        }
        Self { sockets }
    }
}

/// Connections that are listed; all are counted.
const SHOWN: usize = 20;
/// Ancestors that are looked at.
const GENERATIONS: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_sockets_are_among_our_ancestors() {
        let _listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();

        let ours = sockets_of(std::process::id());

        assert!(!ours.is_empty());
        assert!(
            Ancestors::look()
                .sockets
                .is_superset(&ours.into_iter().collect())
        );
    }
}
