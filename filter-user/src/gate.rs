//! The gate: a TLS listener that relays only for clients whose certificate it has verified.
//!
//! ```text
//! TcpStream ─permit▶ ─source check▶ ─ClientHello▶ Policy ─handshake▶ VerifiedPeer
//!                                                    ─dial▶ upstream ─relay▶ closed(Outcome)
//! ```
//! Each arrow is a step of `connection`, and each step takes the proof of the one before.

mod connection;
mod credentials;
mod listener;
mod peer;
mod policy;
mod refusal;
mod relay;
mod sightings;
mod upstream;

use std::sync::Arc;
use std::time::Duration;

use rustls::time_provider::TimeProvider;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

pub use self::listener::{bind, serve};
pub use self::peer::VerifiedPeer;
pub use self::policy::{Policies, Policy};
pub use self::refusal::{Outcome, Phase, Refusal};
pub use self::sightings::{Sighting, Sightings, Visit};
use crate::config::{self, ConfigError};
use crate::ranges::{InForce, Table};
use crate::telemetry::Metrics;
use crate::telemetry::log::Budget;

/// What all connections share.
pub struct Gate {
    policies: Policies,
    table: watch::Receiver<Arc<Table>>,
    sightings: Sightings,
    metrics: Metrics,
    limits: Limits,
    connections: Arc<Semaphore>,
    handshakes: Semaphore,
    refusals: Budget,
    /// Cancelled when live connections have had their time to drain.
    abort: CancellationToken,
}

/// How long and how many.
#[derive(Clone, Copy, Debug)]
struct Limits {
    handshake: Duration,
    connect: Duration,
    idle: Duration,
}

impl Gate {
    /// A gate with these policies, that checks its peers' addresses by the newest `table`.
    #[must_use]
    pub fn new(
        config: &config::Gate,
        policies: Policies,
        table: watch::Receiver<Arc<Table>>,
        in_force: watch::Receiver<Arc<InForce>>,
        metrics: Metrics,
    ) -> Self {
        Self {
            policies,
            table,
            sightings: Sightings::new(in_force),
            metrics,
            limits: Limits {
                handshake: config.handshake_timeout,
                connect: config.connect_timeout,
                idle: config.idle_timeout,
            },
            connections: Arc::new(Semaphore::new(config.max_connections)),
            handshakes: Semaphore::new(config.max_handshakes),
            refusals: Budget::new(REFUSALS_PER_SECOND),
            abort: CancellationToken::new(),
        }
    }

    /// What is seen of ranges that have vanished.
    #[must_use]
    pub fn sightings(&self) -> &Sightings {
        &self.sightings
    }

    /// Closes every live connection.
    pub fn abort(&self) {
        self.abort.cancel();
    }
}

/// Reads certificates, keys and CAs, and builds the policies of all hosts.
///
/// # Errors
///
/// Returns the first file that cannot be used, with its place in the configuration.
pub fn load(
    config: &config::Gate,
    clock: &Arc<dyn TimeProvider>,
    metrics: &Metrics,
) -> Result<Policies, ConfigError> {
    let policies = config
        .hosts
        .iter()
        .map(|host| Policy::load(host, clock, metrics))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Policies::new(policies))
}

/// Log lines about refusals; the metrics count them all.
const REFUSALS_PER_SECOND: u32 = 20;
