//! The gate as a role: its listeners, and how they come to an end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::StartError;
use crate::config;
use crate::gate::{self, Gate, Policies};
use crate::ranges::Table;
use crate::telemetry::Metrics;

/// The running gate.
pub(super) struct GateRole {
    gate: Arc<Gate>,
    connections: TaskTracker,
    drain: Duration,
    pub(super) addresses: String,
}

impl GateRole {
    pub(super) fn start(
        config: &config::Gate,
        policies: Policies,
        table: watch::Receiver<Arc<Table>>,
        metrics: &Metrics,
        stop: &CancellationToken,
        tasks: &TaskTracker,
    ) -> Result<Self, StartError> {
        let listeners = config
            .listen
            .iter()
            .map(|address| {
                let listener = gate::bind(*address);
                listener.map_err(|source| StartError::Bind {
                    address: *address,
                    source,
                })
            })
            .collect::<Result<Vec<TcpListener>, _>>()?;
        let gate = Arc::new(Gate::new(config, policies, table, metrics.clone()));
        let connections = TaskTracker::new();
        for listener in listeners {
            let (gate, connections) = (Arc::clone(&gate), connections.clone());
            tasks.spawn(gate::serve(gate, listener, connections, stop.clone()));
        }
        let addresses: Vec<_> = config.listen.iter().map(SocketAddr::to_string).collect();
        info!(listen = addresses.join(" "), "gate is listening");
        Ok(Self {
            gate,
            connections,
            drain: config.drain_timeout,
            addresses: addresses.join(" "),
        })
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
