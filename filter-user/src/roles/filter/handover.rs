//! The gate's listening sockets, taken from the gate and given to the kernel to steer to.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::FilterRole;
use crate::config::{ClientAddress, Paths};
use crate::control::handover::{Handover, HandoverListener};
use crate::host::socket;
use crate::observe::log::Budget;
use crate::report::chain;
use crate::sync::lock;
use crate::xdp::GateSocket;

impl FilterRole {
    /// Takes sockets from the gate, however often it starts.
    pub(super) async fn take_sockets(self, listener: HandoverListener, paths: Paths) {
        let permits = Arc::new(Semaphore::new(CLIENTS_MAX));
        let mut clients = JoinSet::new();
        let forbidden = Budget::new(FORBIDDEN_PER_SECOND);
        loop {
            while clients.try_join_next().is_some() {}
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
                return;
            };
            match listener.accept(&paths).await {
                Ok(Ok(handover)) => {
                    let role = self.clone();
                    clients.spawn(async move {
                        let _permit = permit;
                        role.take(handover).await;
                    });
                }
                Ok(Err(stranger)) => {
                    if let Some(suppressed) = forbidden.take() {
                        warn!(
                            id = "handover-forbidden",
                            user = stranger.user,
                            suppressed,
                            "another user than the gate's may not hand over a socket"
                        );
                    }
                }
                Err(error) => {
                    warn!(id = "handover-failed", %error, "no socket can be taken from the gate");
                    sleep(super::HEALTH_TIMEOUT).await;
                }
            }
        }
    }

    async fn take(self, handover: Handover) {
        let mut settings = self.steering.subscribe();
        let answer = match handover.receive().await {
            Ok(offer) => {
                let steered = self.on_state(move |state| {
                    let has_way_back = state.config.boot.return_path.is_some();
                    if offer.client_address == ClientAddress::Transparent && !has_way_back {
                        return Err(NO_WAY_BACK.to_owned());
                    }
                    let sockets = gate_sockets(offer.descriptors)?;
                    let steered = state.filter.steer_to(&sockets);
                    steered.map_err(|error| chain(&error))
                });
                steered.await.unwrap_or_else(|error| Err(error.to_string()))
            }
            Err(error) => Err(error.to_string()),
        };
        match &answer {
            Ok(()) => {
                *lock(&self.refused) = None;
                info!(
                    id = "sockets-taken",
                    "connections are steered to the gate's sockets"
                );
            }
            Err(problem) => {
                let known = lock(&self.refused).replace(problem.clone());
                if known.as_ref() != Some(problem) {
                    warn!(
                        id = "sockets-refused",
                        problem, "the gate's sockets are not taken"
                    );
                }
            }
        }
        // Whatever is steered by other settings is handed over again.
        let outcome = tokio::select! {
            outcome = handover.answer(&answer) => outcome,
            _ = settings.changed() => Ok(()),
        };
        if let Err(error) = outcome {
            debug!(id = "gate-gone", %error, "the gate was gone before it was answered");
        }
    }
}

/// Descriptors of which nothing is known, as what connections can be steered to: one a family.
fn gate_sockets(descriptors: Vec<OwnedFd>) -> Result<Vec<GateSocket>, String> {
    let mut sockets: Vec<GateSocket> = Vec::new();
    for descriptor in descriptors {
        let address = socket::listening_address(&descriptor);
        let address = address.map_err(|error| format!("a socket cannot be taken: {error}"))?;
        let is_ipv6 = address.is_ipv6();
        if sockets.iter().any(|socket| socket.is_ipv6 == is_ipv6) {
            return Err(
                "there are several sockets of one family; `gate.listen` must name one of \
                        IPv4 and one of IPv6 at most"
                    .to_owned(),
            );
        }
        sockets.push(GateSocket {
            socket: descriptor,
            is_ipv6,
        });
    }
    if sockets.is_empty() {
        return Err("there is no socket".to_owned());
    }
    Ok(sockets)
}

/// The gate knows of a configuration that this process was not started with.
const NO_WAY_BACK: &str = "the gate connects in its clients' names (`client_address = \"transparent\"`), and the \
    filter was started without: restart the filter";
/// Connections at once: a gate, its successor, and what tries to be in their way.
const CLIENTS_MAX: usize = 8;
/// Log lines about other users.
const FORBIDDEN_PER_SECOND: u32 = 1;
