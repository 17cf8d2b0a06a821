//! The gate as a role: its listeners, and how they come to an end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::StartError;
use super::tasks::Tasks;
use crate::config;
use crate::gate::{self, Gate};

/// The running gate.
pub(super) struct GateRole {
    pub(super) gate: Arc<Gate>,
    connections: TaskTracker,
    drain: Duration,
    pub(super) addresses: String,
}

impl GateRole {
    /// Binds the listening sockets; connections wait in them until [`Self::start`].
    pub(super) fn bind(config: &config::Gate) -> Result<Vec<TcpListener>, StartError> {
        let addresses = config.listen.iter();
        addresses
            .map(|address| {
                let listener = gate::bind(*address);
                listener.map_err(|source| StartError::Bind {
                    address: *address,
                    source,
                })
            })
            .collect()
    }

    /// Starts to serve what comes in.
    pub(super) fn start(
        config: &config::Gate,
        gate: Gate,
        listeners: Vec<TcpListener>,
        tasks: &Tasks,
    ) -> Self {
        raise_descriptor_limit(config.max_connections);
        let gate = Arc::new(gate);
        let looking = Arc::clone(&gate);
        tasks.spawn(async move { looking.sightings().follow().await });
        let connections = TaskTracker::new();
        for listener in listeners {
            let (gate, connections) = (Arc::clone(&gate), connections.clone());
            tasks.spawn_until(gate::serve(gate, listener, connections, tasks.stopped()));
        }
        let addresses: Vec<_> = config.listen.iter().map(SocketAddr::to_string).collect();
        info!(listen = addresses.join(" "), "gate is listening");
        Self {
            gate,
            connections,
            drain: config.drain_timeout,
            addresses: addresses.join(" "),
        }
    }

    /// Waits for live connections, and closes those that take too long.
    pub(super) async fn drain(&self) {
        self.connections.close();
        let drained = tokio::time::timeout(self.drain, self.connections.wait());
        if drained.await.is_err() {
            warn!(
                left = self.connections.len(),
                "closing connections that did not end in time"
            );
            self.gate.abort();
            self.connections.wait().await;
        }
    }
}

/// A relayed connection takes two descriptors; most hosts grant 1,024 unless asked for more.
fn raise_descriptor_limit(connections: usize) {
    let wanted = 2 * connections as u64 + SPARE_DESCRIPTORS;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let granted = maximum.map_or(wanted, |maximum| maximum.min(wanted));
    if current.is_some_and(|current| current < granted) {
        let raised = Rlimit {
            current: Some(granted),
            maximum,
        };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            warn!(%error, "the limit of open files cannot be raised");
        }
    }
    if granted < wanted {
        warn!(
            granted,
            wanted, "the limit of open files is too low for `max_connections`; raise LimitNOFILE"
        );
    }
}

/// For listeners, sockets and files besides the connections.
const SPARE_DESCRIPTORS: u64 = 64;
