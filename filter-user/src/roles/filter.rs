//! The filter as a role: publishes every change of the ranges, reloads with the configuration,
//! reconciles its links with the network, and keeps an account of what it drops.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::{self, Display, Formatter};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use filter_ebpf::verdict::Counted;
use tokio::sync::{Notify, watch};
use tokio::task::block_in_place;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{debug, error, info, warn};

use super::error::StartError;
use super::preflight::{self, Ancestors, OwnConnection};
use super::rules::{compile, usable};
use super::tasks::Tasks;
use crate::config::{self, Config};
use crate::host::netlink::{self, Changed};
use crate::host::systemd;
use crate::host::uplinks::{self, Memory};
use crate::observe::Metrics;
use crate::ranges::ActiveRanges;
use crate::report::chain;
use crate::role::Role;
use crate::sync::lock;
use crate::xdp::{self, Coverage, Filter, Frames, Lifetime, TopSources, XdpError};

/// The running filter; cheap to clone.
#[derive(Clone)]
pub(super) struct FilterRole {
    state: Arc<Mutex<State>>,
    account: Arc<Mutex<Tally>>,
    metrics: Metrics,
    /// Notified after each reconciliation.
    reconciled: Arc<Notify>,
}

/// The filter, and what it was made from.
pub(super) struct State {
    pub(super) filter: Filter,
    config: Arc<Config>,
    published: Arc<ActiveRanges>,
    /// What is on disk.
    saved: Memory,
    /// Why the next boot knows nothing of uplinks, or why this one did not.
    pub(super) amnesia: Option<String>,
    /// When another process was last seen to have changed the ranges in the kernel.
    pub(super) tampered: Option<Tampered>,
    /// Pins that are gone.
    pub(super) unpinned: Vec<PathBuf>,
}

/// Another process has changed what packets are judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tampered {
    at: Instant,
}

impl Display for Tampered {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "another process changed the ranges in the kernel; they were published again {} s ago",
            self.at.elapsed().as_secs()
        )
    }
}

impl FilterRole {
    /// Loads and attaches, and goes on looking after it.
    pub(super) fn start(
        config: &Arc<Config>,
        mut in_force: watch::Receiver<Arc<ActiveRanges>>,
        stay: Lifetime,
        own: (OwnConnection, &Ancestors),
        metrics: &Metrics,
        tasks: &Tasks,
    ) -> Result<Self, StartError> {
        let settings = settings(config)?;
        let now = in_force.borrow_and_update().clone();
        let (now, table) = usable(config, now)?;
        preflight::check(settings, &table, own)?;
        let watch = netlink::Watch::new().map_err(XdpError::Netlink)?;
        let (memory, amnesia) = match uplinks::load(&config.paths.uplinks()) {
            Ok(memory) => (memory, None),
            Err(error) => {
                let error = chain(&error);
                warn!(
                    id = "uplinks-unreadable",
                    error, "the remembered uplinks are not used"
                );
                (Memory::default(), Some(error))
            }
        };
        let filter = Filter::start(xdp::Start {
            settings,
            base: &config.paths.bpf,
            rules: &config.ranges.rules(now.set()),
            table: &table,
            stay,
            memory: memory.clone(),
        })?;
        let role = Self {
            state: Arc::new(Mutex::new(State {
                filter,
                config: Arc::clone(config),
                published: now,
                saved: memory,
                amnesia,
                tampered: None,
                unpinned: Vec::new(),
            })),
            account: Arc::new(Mutex::new(Tally::default())),
            metrics: metrics.clone(),
            reconciled: Arc::default(),
        };
        role.remember_uplinks();
        tasks.spawn(role.clone().run(in_force, watch));
        Ok(role)
    }

    /// Leaves the pins to a successor.
    pub(super) fn release_lock(&self) {
        self.state().filter.release_lock();
    }

    /// Returns when all interfaces that are named or remembered are there and filtered, or after
    /// `filter.interface_timeout`: at boot, drivers load while we start, and the service manager holds
    /// the network back for as long.
    pub(super) async fn wait_for_interfaces(&self) {
        let (awaited, patience) = {
            let state = self.state();
            let filter = &state.filter;
            (filter.awaited(), filter.settings().interface_timeout)
        };
        if awaited.is_empty() {
            return;
        }
        let interfaces = awaited.join(", ");
        warn!(
            id = "interfaces-awaited",
            interfaces,
            ?patience,
            "waiting for interfaces that do not exist yet"
        );
        systemd::extend(patience + MARGIN);
        let arrival = async {
            loop {
                let reconciled = self.reconciled.notified();
                if self.state().filter.awaited().is_empty() {
                    return;
                }
                reconciled.await;
            }
        };
        if tokio::time::timeout(patience, arrival).await.is_err() {
            let missing = self.state().filter.awaited().join(", ");
            error!(
                id = "interfaces-missing",
                interfaces = missing,
                "ready without interfaces that still do not exist; they are filtered when they come \
                 (`pullgate unload` forgets those that \"auto\" remembers)"
            );
        }
    }

    async fn run(self, mut in_force: watch::Receiver<Arc<ActiveRanges>>, watch: netlink::Watch) {
        let mut watch = Some(watch);
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut unwell = Unwell::default();
        let mut ticks = 0;
        loop {
            tokio::select! {
                changed = in_force.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = in_force.borrow_and_update().clone();
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
                    block_in_place(|| {
                        self.reconcile(&mut unwell, Changed { links: false, routes });
                        if ticks % VERIFY_TICKS == 0 {
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

    fn publish(&self, now: Arc<ActiveRanges>) {
        let mut state = self.state();
        let State {
            filter,
            config,
            published,
            ..
        } = &mut *state;
        if *now.set() == *published.set() {
            return;
        }
        let outcome = compile(config, &now)
            .and_then(|table| Ok(filter.publish(&config.ranges.rules(now.set()), &table)?));
        match outcome {
            Ok(took) => {
                let ranges = now.set().iter().count();
                self.metrics.published(Some(took));
                let took_ms = took.as_secs_f64() * 1e3;
                info!(id = "ranges-published", ranges, took_ms, "ranges published");
                *published = now;
            }
            Err(error) => {
                self.metrics.published(None);
                error!(
                    id = "ranges-not-published",
                    error = %chain(&error),
                    "ranges not published, the old stay"
                );
            }
        }
    }

    /// Reads back what packets are judged by, and publishes it again if that is not what it was.
    fn verify(&self) {
        let mut state = self.state();
        let State {
            filter,
            config,
            published,
            tampered,
            ..
        } = &mut *state;
        match filter.is_as_published() {
            Ok(true) => {
                tampered.take_if(|tampered| tampered.at.elapsed() > REMEMBERED);
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
        *tampered = Some(Tampered { at: Instant::now() });
        let outcome = compile(config, published).and_then(|table| {
            let rules = config.ranges.rules(published.set());
            Ok(filter.republish(&rules, &table)?)
        });
        match outcome {
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
            if let xdp::State::Overtaken(program) = state {
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

    /// Puts a changed configuration in force, or returns why it cannot be.
    pub(super) fn reload(&self, config: &Arc<Config>) -> Result<(), String> {
        match self.try_reload(config) {
            Ok(()) => {
                self.metrics.reloaded("Reloaded");
                info!(id = "filter-reloaded", "the filter is reloaded");
                Ok(())
            }
            Err(error) => {
                let error = chain(&error);
                self.note_failure();
                error!(
                    id = "filter-not-reloaded",
                    error, "the filter is not reloaded, the old one stays"
                );
                Err(error)
            }
        }
    }

    fn try_reload(&self, config: &Arc<Config>) -> Result<(), StartError> {
        let settings = settings(config)?;
        let mut state = self.state();
        let published = Arc::clone(&state.published);
        let table = compile(config, &published)?;
        // Nobody is there to ask, but the log shall tell whose connections end.
        preflight::check(
            settings,
            &table,
            (OwnConnection::Cut, &Ancestors::default()),
        )?;
        let rules = config.ranges.rules(published.set());
        state.filter.reload(settings, &rules, &table)?;
        state.config = Arc::clone(config);
        Ok(())
    }

    /// Counts that the configuration on disk is not the one in force.
    pub(super) fn note_failure(&self) {
        self.metrics.reloaded("Failed");
    }

    /// Attaches where the filter should be and is not, and logs what has changed.
    fn reconcile(&self, unwell: &mut Unwell, changed: Changed) {
        let reconciled = match self.state().filter.reconcile(changed) {
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
                interface, "was not filtered, and is again: attached anew"
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
        if reconciled.unloaded && !unwell.unloaded {
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
    fn remember_uplinks(&self) {
        let mut state = self.state();
        if state.filter.is_on_trial() || *state.filter.memory() == state.saved {
            return;
        }
        let memory = state.filter.memory().clone();
        let path = state.config.paths.uplinks();
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
        self.account().add(drops, totals);
    }

    /// The filter, for a look at it.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // A panic while publishing leaves the old generation in use, which is still right.
        lock(&self.state)
    }

    /// What was seen of it.
    pub(super) fn account(&self) -> MutexGuard<'_, Tally> {
        lock(&self.account)
    }

    /// Lets what is on trial stay.
    pub(super) fn confirm(&self) {
        match self.state().filter.confirm() {
            Ok(()) => info!(
                id = "trial-confirmed",
                "confirmed: the filter stays in force"
            ),
            Err(error) => error!(
                id = "trial-not-confirmed",
                error = %chain(&error),
                "not confirmed"
            ),
        }
    }

    /// Ends a trial that was not confirmed; returns whether there was one.
    pub(super) fn end_trial(&self) -> bool {
        let filter = &mut self.state().filter;
        if !filter.is_on_trial() {
            return false;
        }
        match filter.revert() {
            Ok(()) => warn!(
                id = "trial-reverted",
                "not confirmed: what was in force before is so again"
            ),
            Err(error) => error!(
                id = "trial-not-reverted",
                error = %chain(&error),
                "what was before is not restored"
            ),
        }
        true
    }
}

/// What the configuration says of the filter.
fn settings(config: &Config) -> Result<&config::Filter, StartError> {
    let role = Role::Filter;
    let settings = config.filter.as_ref();
    settings.ok_or(StartError::NotDescribed { role })
}

/// What was said to be wrong already.
#[derive(Default)]
struct Unwell {
    /// The links cannot be looked at.
    blind: bool,
    missing: Vec<String>,
    unloaded: bool,
    /// Interfaces where another program judges first.
    overtaken: BTreeSet<String>,
}

/// Returns when the network's configuration has changed.
async fn changed(watch: &mut Option<netlink::Watch>) -> io::Result<Changed> {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

/// What the filter was seen to do.
#[derive(Default)]
pub(super) struct Tally {
    /// The last drops of the sample, newest last, and when they were taken.
    pub(super) drops: VecDeque<(SystemTime, xdp::Drop)>,
    pub(super) sources: TopSources,
    /// One a tick, oldest first.
    totals: VecDeque<Totals>,
}

impl Tally {
    fn add(&mut self, drops: Vec<xdp::Drop>, totals: Totals) {
        let dropped = totals.dropped();
        let before = self.totals.back().map_or(dropped, Totals::dropped);
        // Each reported drop stands for as many as were not reported.
        let weight = dropped.saturating_sub(before) / (drops.len() as u64).max(1);
        self.sources.add(&drops, weight.max(1));

        let now = SystemTime::now();
        self.drops.extend(drops.into_iter().map(|drop| (now, drop)));
        let surplus = self.drops.len().saturating_sub(DROPS_KEPT);
        self.drops.drain(..surplus);
        self.totals.push_back(totals);
        if self.totals.len() > RATE_TICKS {
            self.totals.pop_front();
        }
    }

    /// Frames per second over the last seconds.
    pub(super) fn rate(&self, interface: &str, counted: Counted) -> u64 {
        let (Some(first), Some(last)) = (self.totals.front(), self.totals.back()) else {
            return 0;
        };
        let millis = last.at.duration_since(first.at).as_millis();
        let frames = last
            .total(interface, counted)
            .saturating_sub(first.total(interface, counted));
        (u128::from(frames) * 1000)
            .checked_div(millis)
            .map_or(0, |rate| u64::try_from(rate).unwrap_or(u64::MAX))
    }
}

/// All counters at one time.
struct Totals {
    at: Instant,
    frames: BTreeMap<String, Frames>,
}

impl Totals {
    fn of(filter: &Filter) -> Result<Self, XdpError> {
        Ok(Self {
            at: Instant::now(),
            frames: filter.frames()?,
        })
    }

    fn total(&self, interface: &str, counted: Counted) -> u64 {
        let frames = self.frames.get(interface).into_iter().flatten();
        let mut totals = frames.filter(|(other, _)| *other == counted);
        totals.next().map_or(0, |(_, total)| *total)
    }

    fn dropped(&self) -> u64 {
        let frames = self.frames.values().flatten();
        let dropped = frames.filter(|(counted, _)| counted.verdict != "pass");
        dropped.map(|(_, total)| total).sum()
    }
}

/// What the rest of a start may take.
const MARGIN: Duration = Duration::from_secs(60);
/// Ticks between two listings of all routes.
const ROUTES_TICKS: u32 = 60;
/// Ticks between two looks at what the kernel judges by.
const VERIFY_TICKS: u32 = 10;
/// How long it is remembered that another process has meddled.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// How often the filter is reconciled, beside when the network changes.
const TICK: Duration = Duration::from_secs(1);
/// Ticks that rates are taken over.
const RATE_TICKS: usize = 11;
/// Drops that are remembered.
const DROPS_KEPT: usize = 16;
