//! The gate's listening sockets, handed over to the filter, which steers connections to them.

use std::io::ErrorKind;
use std::net::TcpListener;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, info, warn};

use super::GateRole;
use crate::config::{ClientAddress, Paths};
use crate::control::handover;
use crate::observe::Finding;

/// Whether connections are steered to the gate's sockets.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Steered {
    /// They are not to be: the gate listens where clients connect to.
    NotAsked,
    /// Not yet.
    Pending,
    /// The filter has the sockets.
    Taken,
    /// The filter does not take them, for this reason.
    Refused(String),
}

impl Steered {
    /// What is not right about it.
    pub(super) fn finding(&self) -> Option<Finding> {
        let reason = match self {
            Self::NotAsked | Self::Taken => return None,
            Self::Pending => "it was not asked yet",
            Self::Refused(reason) => reason,
        };
        let text = format!(
            "the filter has not taken the gate's sockets ({reason}): unless it had before, clients reach \
             the web server around the gate, or are refused"
        );
        let remedy = "start the filter role, whose status shows whether it steers";
        Some(Finding::error("not-steered", text).remedy(remedy))
    }
}

impl GateRole {
    /// Hands the sockets over, and again whenever the filter has forgotten them.
    pub(super) async fn hand_over(
        self,
        paths: Paths,
        sockets: Vec<TcpListener>,
        client_address: ClientAddress,
    ) {
        // The filter may start at the same time.
        let mut patience = Instant::now() + PATIENCE;
        let mut complained = false;
        loop {
            let steered = match handover::hand_over(&paths, &sockets, client_address).await {
                Ok(handed_over) => {
                    info!(
                        id = "sockets-handed-over",
                        "the filter steers connections to the gate"
                    );
                    self.steered.send_replace(Steered::Taken);
                    handed_over.ended().await;
                    (patience, complained) = (Instant::now() + PATIENCE, false);
                    // What it has pinned goes on without it.
                    warn!(
                        id = "filter-gone",
                        "the filter has ended, or reads its settings again"
                    );
                    Steered::Pending
                }
                Err(error) => {
                    let absent = [ErrorKind::NotFound, ErrorKind::ConnectionRefused];
                    if !absent.contains(&error.kind()) {
                        patience = Instant::now();
                    }
                    Steered::Refused(error.to_string())
                }
            };
            self.steered.send_replace(steered.clone());
            if let Steered::Refused(reason) = &steered {
                if Instant::now() >= patience && !complained {
                    error!(
                        id = "sockets-not-taken",
                        reason, "the filter does not take the gate's sockets; trying again"
                    );
                    complained = true;
                }
                // No event announces that another process listens.
                sleep(RETRY).await;
            }
        }
    }

    /// Returns when the filter has taken the sockets, or has had its time.
    pub(super) async fn wait_until_steered(&self) {
        let mut steered: watch::Receiver<Steered> = self.steered.subscribe();
        let done = steered.wait_for(|now| matches!(now, Steered::NotAsked | Steered::Taken));
        // It goes on trying.
        drop(timeout(PATIENCE, done).await);
    }
}

/// Between two attempts.
const RETRY: Duration = Duration::from_millis(200);
/// How long a start waits for the filter.
const PATIENCE: Duration = Duration::from_secs(5);
