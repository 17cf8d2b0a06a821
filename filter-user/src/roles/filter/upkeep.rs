//! What a running filter does over and over: publish, read back, reconcile, remember and count.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::block_in_place;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{debug, error, info, warn};

use super::tally::{FloodChange, Totals};
use super::{FilterRole, FilterState};
use crate::host::netlink::{self, Changed};
use crate::host::uplinks;
use crate::ranges::Compiled;
use crate::report::chain;
use crate::sync::lock;
use crate::xdp::{self, Coverage, XdpError};

impl FilterRole {
    /// Looks after the filter until the process stops.
    pub(super) async fn look_after(
        self,
        mut active: watch::Receiver<Arc<Compiled>>,
        watch: netlink::NetworkWatch,
    ) {
        let mut watch = Some(watch);
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut unwell = Unwell::default();
        let mut ticks = 0;
        loop {
            tokio::select! {
                changed = active.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = active.borrow_and_update().clone();
                    block_in_place(|| self.publish(now));
                }
                changed = changed(&mut watch) => {
                    let changed = changed.unwrap_or_else(|error| {
                        warn!(
                            id = "network-changes-polled",
                            %error,
                            "network changes are no longer reported, only polled for"
                        );
                        watch = None;
                        Changed::ALL
                    });
                    block_in_place(|| self.reconcile(&mut unwell, changed));
                }
                _ = tick.tick() => {
                    // Routes are listed again now and then, should an event have been lost.
                    ticks = (ticks + 1) % ROUTES_TICKS;
                    let routes = ticks == 0 || watch.is_none();
                    let now = active.borrow().clone();
                    block_in_place(|| {
                        self.reconcile(&mut unwell, Changed { links: false, routes });
                        if ticks % VERIFY_TICKS == 0 {
                            // What could not be published is tried until it can.
                            self.publish(now);
                            self.verify();
                            self.look_at_hooks(&mut unwell);
                            self.look_at_pins();
                        }
                        self.look();
                    });
                }
            }
        }
    }

    /// Publishes what is active, unless packets are judged by it already.
    fn publish(&self, now: Arc<Compiled>) {
        let mut state = self.state();
        let FilterState {
            filter,
            config,
            published,
            unpublished,
            has_ended,
            ..
        } = &mut *state;
        let rules = &config.live.ranges;
        // What was compiled by the rules of before a reload is compiled again.
        if *has_ended || !now.has_rules(&rules.allow, &rules.deny) {
            return;
        }
        if now.judges_like(published) {
            *published = now;
            *unpublished = None;
            return;
        }
        match filter.publish(&now.rules(), now.table()) {
            Ok(took) => {
                let ranges = now.ranges().set().iter().count();
                self.metrics.published(Some(took));
                let took_ms = took.as_secs_f64() * 1e3;
                info!(id = "ranges-published", ranges, took_ms, "ranges published");
                *published = now;
                *unpublished = None;
            }
            Err(error) => {
                self.metrics.published(None);
                let error = chain(&error);
                if unpublished.as_ref() != Some(&error) {
                    error!(
                        id = "ranges-not-published",
                        error, "ranges not published, the old stay; trying again"
                    );
                }
                *unpublished = Some(error);
            }
        }
    }

    /// Reads back what packets are judged by, and publishes it again if that is not what it was.
    fn verify(&self) {
        let mut state = self.state();
        let FilterState {
            filter,
            published,
            tampered,
            has_ended,
            ..
        } = &mut *state;
        if *has_ended {
            return;
        }
        match filter.is_as_published() {
            Ok(true) => {
                tampered.take_if(|at| at.elapsed() > REMEMBERED);
                return;
            }
            Ok(false) => error!(
                id = "kernel-ranges-tampered",
                "another process changed the ranges in the kernel"
            ),
            Err(error) => {
                warn!(
                    id = "kernel-ranges-unreadable",
                    error = %chain(&error),
                    "the ranges in the kernel cannot be read back"
                );
                return;
            }
        }
        *tampered = Some(Instant::now());
        match filter.republish(&published.rules(), published.table()) {
            Ok(took) => {
                self.metrics.published(Some(took));
                info!(id = "ranges-republished", "ranges published again");
            }
            Err(error) => {
                self.metrics.published(None);
                error!(
                    id = "ranges-not-republished",
                    error = %chain(&error),
                    "ranges not published again"
                );
            }
        }
    }

    /// Looks whether another program has come before ours.
    fn look_at_hooks(&self, unwell: &mut Unwell) {
        let Ok(coverage) = self.state().filter.coverage() else {
            return;
        };
        let mut overtaken = BTreeSet::new();
        for Coverage { interface, state } in coverage {
            if let xdp::InterfaceState::Overtaken(program) = state {
                if !unwell.overtaken.contains(&interface) {
                    error!(
                        id = "tcx-program-before",
                        interface, program, "another TCX program judges before ours"
                    );
                }
                overtaken.insert(interface);
            }
        }
        unwell.overtaken = overtaken;
    }

    /// Looks whether another process has removed pins.
    fn look_at_pins(&self) {
        let mut state = self.state();
        let missing = state.filter.missing_pins();
        for pin in missing.iter().filter(|pin| !state.unpinned.contains(pin)) {
            error!(id = "pin-removed", pin = %pin.display(), "another process removed a pin");
        }
        state.unpinned = missing;
    }

    /// Attaches where the filter should be and is not, and logs what has changed.
    fn reconcile(&self, unwell: &mut Unwell, changed: Changed) {
        let mut state = self.state();
        if state.has_ended {
            return;
        }
        let reconciled = state.filter.reconcile(changed);
        // `unload` has removed it for good.
        if state.filter.is_loaded() {
            state.return_path.look();
            if !state.filter.is_loaded() {
                state.return_path.withdraw();
            }
        }
        drop(state);
        let reconciled = match reconciled {
            Ok(reconciled) => reconciled,
            Err(error) => {
                if !std::mem::replace(&mut unwell.blind, true) {
                    error!(
                        id = "filter-not-reconciled",
                        error = %chain(&error),
                        "the filter cannot be reconciled"
                    );
                }
                return;
            }
        };
        for interface in &reconciled.found {
            info!(
                id = "interface-attached",
                interface, "has come, and is filtered"
            );
        }
        for interface in &reconciled.reattached {
            self.metrics.reattached(interface);
            warn!(
                id = "interface-reattached",
                interface, "was not filtered, and is again: attached again"
            );
        }
        for (interface, error) in &reconciled.failed {
            error!(
                id = "interface-not-filtered",
                interface,
                error = %chain(error),
                "the interface is not filtered"
            );
        }
        let missing = |interface: &&String| !unwell.missing.contains(*interface);
        for interface in reconciled.missing.iter().filter(missing) {
            error!(
                id = "interface-absent",
                interface, "the interface does not exist, and will be filtered when it comes"
            );
        }
        report_steering(reconciled.steered_again.as_ref(), unwell);
        if reconciled.unloaded && !unwell.unloaded {
            // The gate is to know.
            self.steering.send_replace(());
            error!(
                id = "filter-unloaded",
                "the filter was unloaded, nothing is filtered until this role is restarted"
            );
        }
        unwell.blind = false;
        unwell.missing = reconciled.missing;
        unwell.unloaded = reconciled.unloaded;
        self.remember_uplinks();
        self.reconciled.notify_waiters();
    }

    /// Saves what the next boot is to know, if that is not on disk.
    pub(super) fn remember_uplinks(&self) {
        let mut state = self.state();
        if state.filter.is_on_trial() || *state.filter.memory() == state.saved {
            return;
        }
        let memory = state.filter.memory().clone();
        let path = state.config.boot.paths.uplinks();
        state.amnesia = uplinks::save(&path, &memory).err().map(|error| {
            warn!(
                id = "uplinks-not-remembered",
                %error,
                path = %path.display(),
                "uplinks are not remembered across boots"
            );
            format!(
                "{}: {error}; is its directory this role's to write?",
                path.display()
            )
        });
        // Not tried again each second.
        state.saved = memory;
    }

    /// Brings the account up to date.
    fn look(&self) {
        let mut state = self.state();
        let filter = &mut state.filter;
        let (drops, totals) = match (filter.drops(), Totals::of(filter)) {
            (Ok(drops), Ok(totals)) => (drops, totals),
            (Err(error), _) | (_, Err(error)) => {
                warn!(id = "counters-unreadable", error = %chain(&error), "counters not readable");
                return;
            }
        };
        drop(state);
        for drop in &drops {
            debug!(
                id = "drop-sampled",
                source = drop.source.map(tracing::field::display),
                port = drop.port,
                reason = drop.counted.reason.label(),
                verdict = drop.counted.verdict,
                interface = drop.interface,
                "a drop, of a sample"
            );
        }
        match lock(&self.tally).add(drops, totals) {
            None => {}
            Some(FloodChange::Began) => warn!(
                id = "syn-flood",
                "a flood of SYNs with Cloudflare's addresses has begun: they are answered with SYN cookies"
            ),
            Some(FloodChange::Ended { since }) => info!(
                id = "syn-flood-over",
                since = %humantime::format_rfc3339_seconds(since),
                "the flood of SYNs is over"
            ),
        }
    }
}

/// Logs that steering was ended by another process, and what became of that.
fn report_steering(again: Option<&Result<(), XdpError>>, unwell: &mut Unwell) {
    let was_unsteered = std::mem::replace(&mut unwell.unsteered, matches!(again, Some(Err(_))));
    match again {
        None => {}
        Some(Ok(())) => warn!(
            id = "steering-reattached",
            "connections were not steered to the gate: attached again"
        ),
        Some(Err(error)) if !was_unsteered => error!(
            id = "not-steered",
            error = %chain(error),
            "connections are not steered to the gate"
        ),
        Some(Err(_)) => {}
    }
}

/// What was logged to be wrong already.
#[derive(Default)]
struct Unwell {
    /// The links cannot be looked at.
    blind: bool,
    missing: Vec<String>,
    unloaded: bool,
    /// Connections are not steered, and cannot be.
    unsteered: bool,
    /// Interfaces where another program judges first.
    overtaken: BTreeSet<String>,
}

/// Returns when the network's configuration has changed.
async fn changed(watch: &mut Option<netlink::NetworkWatch>) -> io::Result<Changed> {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

/// How often the filter is reconciled, beside when the network changes.
const TICK: Duration = Duration::from_secs(1);
/// Ticks between two listings of all routes.
const ROUTES_TICKS: u32 = 60;
/// Ticks between two looks at what the kernel judges by.
const VERIFY_TICKS: u32 = 10;
/// How long it is remembered that another process has meddled.
const REMEMBERED: Duration = Duration::from_secs(3600);
