//! The gate as a role: its listeners, and how they come to an end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::StartError;
use crate::config;
use crate::gate::{self, Gate};

/// The running gate.
pub(super) struct GateRole {
    gate: Arc<Gate>,
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
        stop: &CancellationToken,
        tasks: &TaskTracker,
    ) -> Self {
        let gate = Arc::new(gate);
        let connections = TaskTracker::new();
        for listener in listeners {
            let (gate, connections) = (Arc::clone(&gate), connections.clone());
            tasks.spawn(gate::serve(gate, listener, connections, stop.clone()));
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
