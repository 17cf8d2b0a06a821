//! The filter as a role: publishes every change of the ranges, reloads with the configuration,
//! looks after its links, and keeps an account of what it drops.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use filter_ebpf::verdict::Counted;
use tokio::sync::watch;
use tokio::task::block_in_place;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{debug, error, info, warn};

use super::error::{LoadError, StartError};
use super::lockout::{self, OwnConnection};
use super::rules::{compile, usable};
use super::tasks::Tasks;
use crate::config::{self, Config, Mode};
use crate::netlink;
use crate::report::chain;
use crate::snapshot::InForce;
use crate::telemetry::Metrics;
use crate::xdp::{self, Filter, Frames, Stay, Tended, TopSources, XdpError};

/// The running filter; cheap to clone.
#[derive(Clone)]
pub(super) struct FilterRole {
    filter: Arc<Mutex<Filter>>,
    account: Arc<Mutex<Account>>,
    metrics: Metrics,
}

impl FilterRole {
    /// Loads and attaches, and goes on looking after it.
    pub(super) fn start(
        settings: &config::Filter,
        config: watch::Receiver<Arc<Config>>,
        mut in_force: watch::Receiver<Arc<InForce>>,
        stay: Stay,
        metrics: &Metrics,
        tasks: &Tasks,
    ) -> Result<Self, StartError> {
        let now = in_force.borrow_and_update().clone();
        let started = Arc::clone(&config.borrow());
        let (now, table) = usable(&started, now)?;
        let rules = started.ranges.rules(now.known.set());
        let filter = Filter::start(settings, &started.paths.bpf, &rules, &table, stay)?;
        let role = Self {
            filter: Arc::new(Mutex::new(filter)),
            account: Arc::new(Mutex::new(Account::default())),
            metrics: metrics.clone(),
        };
        let watch = netlink::Watch::new().map_err(XdpError::Netlink)?;
        tasks.spawn(role.clone().run(config, in_force, now, watch));
        Ok(role)
    }

    async fn run(
        self,
        mut config: watch::Receiver<Arc<Config>>,
        mut in_force: watch::Receiver<Arc<InForce>>,
        mut published: Arc<InForce>,
        watch: netlink::Watch,
    ) {
        let mut watch = Some(watch);
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tending = Tending::default();
        loop {
            tokio::select! {
                changed = in_force.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = in_force.borrow_and_update().clone();
                    if *now.known.set() != *published.known.set()
                        && block_in_place(|| self.publish(&config.borrow(), &now))
                    {
                        published = now;
                    }
                }
                changed = config.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let config = Arc::clone(&config.borrow_and_update());
                    block_in_place(|| self.reload(&config, &published));
                }
                changed = changed(&mut watch) => {
                    if let Err(error) = changed {
                        warn!(%error, "network changes are not told any more, only looked for");
                        watch = None;
                    }
                    self.tend(&mut tending);
                }
                _ = tick.tick() => {
                    if tending.is_time() {
                        self.tend(&mut tending);
                    }
                    self.look();
                }
            }
        }
    }

    /// Returns whether the ranges are published.
    fn publish(&self, config: &Config, now: &InForce) -> bool {
        let outcome = compile(config, now).and_then(|table| {
            Ok(lock(&self.filter).publish(&config.ranges.rules(now.known.set()), &table)?)
        });
        match outcome {
            Ok(took) => {
                let ranges = now.known.set().iter().count();
                self.metrics.published(Some(took));
                info!(
                    ranges,
                    took_ms = took.as_secs_f64() * 1e3,
                    "ranges published"
                );
                true
            }
            Err(error) => {
                self.metrics.published(None);
                error!(error = %chain(&error), "ranges not published, the old stay");
                false
            }
        }
    }

    fn reload(&self, config: &Config, published: &InForce) {
        let Some(settings) = &config.filter else {
            error!(
                "the configuration has no [filter] section any more; the old one stays in force"
            );
            return;
        };
        let outcome = compile(config, published).and_then(|table| {
            let rules = config.ranges.rules(published.known.set());
            let mut filter = lock(&self.filter);
            if filter.settings().mode == Mode::Monitor {
                // Nobody is there to ask, but the log shall tell whose connections end.
                lockout::check(settings, &table, OwnConnection::Cut)?;
            }
            Ok(filter.reload(settings, &rules, &table)?)
        });
        let mut account = lock(&self.account);
        match outcome {
            Ok(()) => {
                account.reload_error = None;
                self.metrics.reloaded("Reloaded");
                info!("the filter is reloaded");
            }
            Err(error) => {
                account.reload_error = Some(chain(&error));
                self.metrics.reloaded("Failed");
                error!(error = %chain(&error), "the filter is not reloaded, the old one stays");
            }
        }
    }

    /// Keeps in mind that the configuration on disk is not the one in force.
    pub(super) fn note_bad_configuration(&self, error: &LoadError) {
        self.metrics.reloaded("Failed");
        lock(&self.account).reload_error = Some(chain(error));
    }

    /// Looks after the links; says once what is wrong, and tries seldom what keeps failing.
    fn tend(&self, tending: &mut Tending) {
        let tended = match lock(&self.filter).tend() {
            Ok(tended) => tended,
            Err(error) => {
                if tending.fails() {
                    error!(error = %chain(&error), "the filter cannot be looked after");
                }
                return;
            }
        };
        for interface in &tended.attached_anew {
            self.metrics.reattached(interface);
            warn!(interface, "was not filtered, and is again: attached anew");
        }
        if tended.is_well() {
            tending.succeeds();
            return;
        }
        let Tended {
            failed,
            missing,
            unloaded,
            ..
        } = &tended;
        if !failed.is_empty() {
            tending.try_seldom();
        }
        if !tending.fails() {
            return;
        }
        for (interface, error) in failed {
            error!(interface, error = %chain(error), "the interface is not filtered");
        }
        for interface in missing {
            error!(
                interface,
                "the interface is gone, and will be filtered if it returns"
            );
        }
        if *unloaded {
            error!("the filter was unloaded, nothing is filtered until this role is restarted");
        }
    }

    /// Brings the account up to date.
    fn look(&self) {
        let mut filter = lock(&self.filter);
        let (drops, totals) = match (filter.drops(), Totals::of(&filter)) {
            (Ok(drops), Ok(totals)) => (drops, totals),
            (Err(error), _) | (_, Err(error)) => {
                warn!(error = %chain(&error), "counters not readable");
                return;
            }
        };
        drop(filter);
        for drop in &drops {
            debug!(
                source = drop.source.map(tracing::field::display),
                port = drop.port,
                reason = drop.counted.reason.label(),
                verdict = drop.counted.verdict,
                interface = drop.interface,
                "a drop, of a sample"
            );
        }
        lock(&self.account).add(drops, totals);
    }

    /// The filter, for a look at it.
    pub(super) fn filter(&self) -> MutexGuard<'_, Filter> {
        lock(&self.filter)
    }

    /// What was seen of it.
    pub(super) fn account(&self) -> MutexGuard<'_, Account> {
        lock(&self.account)
    }

    /// Lets what is on trial stay.
    pub(super) fn confirm(&self) {
        match self.filter().confirm() {
            Ok(()) => info!("confirmed: the filter stays in force"),
            Err(error) => error!(error = %chain(&error), "not confirmed"),
        }
    }

    /// Ends a trial that was not confirmed; returns whether there was one.
    pub(super) fn end_trial(&self) -> bool {
        let mut filter = self.filter();
        if !filter.is_on_trial() {
            return false;
        }
        match filter.revert() {
            Ok(()) => warn!("not confirmed: what was in force before is so again"),
            Err(error) => error!(error = %chain(&error), "what was before is not restored"),
        }
        true
    }
}

/// How it goes with looking after the links.
#[derive(Default)]
struct Tending {
    /// Times in a row that something was wrong.
    failures: u32,
    /// Ticks until the next attempt.
    pause: u32,
}

impl Tending {
    /// Whether this tick is one to look at the links.
    fn is_time(&mut self) -> bool {
        let is_time = self.pause == 0;
        self.pause = self.pause.saturating_sub(1);
        is_time
    }

    fn succeeds(&mut self) {
        *self = Self::default();
    }

    /// Returns whether it is the first time in a row, which is the one to tell of.
    fn fails(&mut self) -> bool {
        let is_first = self.failures == 0;
        self.failures += 1;
        is_first
    }

    /// Waits the longer, the more often it has failed.
    fn try_seldom(&mut self) {
        self.pause = self.failures.min(PAUSE_MAX);
    }
}

/// Returns when the network's configuration has changed.
async fn changed(watch: &mut Option<netlink::Watch>) -> io::Result<()> {
    match watch {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

/// What the filter was seen to do.
#[derive(Default)]
pub(super) struct Account {
    /// The last drops of the sample, newest last, and when they were taken.
    pub(super) drops: VecDeque<(SystemTime, xdp::Drop)>,
    pub(super) sources: TopSources,
    /// Why the last reload failed, if it did.
    pub(super) reload_error: Option<String>,
    /// One a tick, oldest first.
    totals: VecDeque<Totals>,
}

impl Account {
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
        let frames = last.total(interface, counted) - first.total(interface, counted);
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
        let frames = filter.frames()?.into_iter();
        Ok(Self {
            at: Instant::now(),
            frames: frames
                .map(|(name, frames)| (name.to_owned(), frames))
                .collect(),
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while publishing leaves the old generation in use, which is still right.
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Ticks between two attempts of what keeps failing; a change of the network ends the pause.
const PAUSE_MAX: u32 = 30;
/// How often the filter is looked after, beside when the network changes.
const TICK: Duration = Duration::from_secs(1);
/// Ticks that rates are taken over.
const RATE_TICKS: usize = 11;
/// Drops that are remembered.
const DROPS_KEPT: usize = 16;
