//! The reconciler: what should be filtered and what is, brought together, interface by interface.
//!
//! [`Filter::reconcile`] acts, [`Filter::coverage`] only looks; both use the same [`Targets`], and cover
//! every interface that strangers can come in by, whether the configuration names it or not.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use tracing::{info, warn};

use super::attach::{self, Attached};
use super::load::{LoadRequest, Program};
use super::mode::AttachMode;
use super::pins::{Pins, SPARE};
use super::steer::Steering;
use super::uplinks::{History, Targets, Topology};
use super::{Filter, LoadedSet, XdpError};
use crate::config::Interfaces;
use crate::host::netlink::{Changed, Interface, InterfaceKind};
use crate::host::uplinks::Memory;
use crate::report::chain;

/// How one interface fares.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Coverage {
    /// The interface: strangers can come in by it, or the configuration names it.
    pub interface: String,
    /// Whether its frames are judged, and by what.
    pub state: InterfaceState,
}

/// Whether an interface's frames are judged, and by what.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum InterfaceState {
    /// By a program on it.
    Attached(AttachMode),
    /// By the program on this other interface, which carries its frames.
    Covered(String),
    /// Not: its link was detached, or is about to be made.
    Detached,
    /// Not: the configuration names it, and it does not exist, or is a bond without ports.
    Missing,
    /// Not: its frames do not begin with an Ethernet header.
    NotEthernet,
    /// Not: the configuration does not name it.
    NotNamed,
    /// Not surely: this program judges before ours, and may let pass what ours would drop.
    Overtaken(String),
    /// Not: the kernel does not take the program, for this reason.
    Refused(String),
}

impl InterfaceState {
    /// Whether strangers' frames are judged.
    #[must_use]
    pub fn is_covered(&self) -> bool {
        match self {
            Self::Attached(_) | Self::Covered(_) => true,
            Self::Detached
            | Self::Missing
            | Self::NotEthernet
            | Self::NotNamed
            | Self::Overtaken(_)
            | Self::Refused(_) => false,
        }
    }

    /// The other interface whose program judges the frames.
    #[must_use]
    pub fn covered_by(&self) -> Option<&str> {
        if let Self::Covered(lower) = self {
            Some(lower)
        } else {
            None
        }
    }

    /// The word in metrics and status.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Attached(mode) => mode.label(),
            Self::Covered(_) => "covered",
            Self::Detached
            | Self::Missing
            | Self::NotEthernet
            | Self::NotNamed
            | Self::Overtaken(_)
            | Self::Refused(_) => "none",
        }
    }
}

/// What [`Filter::reconcile`] did and found.
#[derive(Debug, Default)]
pub struct Reconciled {
    /// Interfaces that have come, and are filtered.
    pub found: Vec<String>,
    /// Interfaces that were filtered before, were not, and are again.
    pub reattached: Vec<String>,
    /// Interfaces that are not filtered, and why: only the first time in a row.
    pub failed: Vec<(String, XdpError)>,
    /// Interfaces that are named or remembered, and do not exist.
    pub missing: Vec<String>,
    /// Another process has unloaded the filter; only a restart brings it back.
    pub unloaded: bool,
    /// Connections were not steered to the gate, and are again; or why they are not.
    pub steered_again: Option<Result<(), XdpError>>,
}

impl Filter {
    /// Attaches wherever the filter should be and is not, unless it was unloaded or was on a trial
    /// that is over.
    ///
    /// # Errors
    ///
    /// Returns why the interfaces cannot be listed.
    pub fn reconcile(&mut self, changed: Changed) -> Result<Reconciled, XdpError> {
        if self.reverted {
            return Ok(Reconciled::default());
        }
        let is_loaded = self.look_again(changed)?;
        let targets = self.targets();
        let mut reconciled = Reconciled {
            missing: targets.missing,
            ..Reconciled::default()
        };
        if is_loaded && !self.is_on_trial() {
            let steering = self.steering.as_mut();
            let steered = steering.map_or(Ok(false), Steering::reconcile);
            reconciled.steered_again = steered.map(|again| again.then_some(())).transpose();
        }
        let all = self.topology.interfaces();
        // An interface that is gone has no frames left to judge. On trial, what was there before it
        // must come back, whatever is seen of it meanwhile.
        let is_there = |attached: &Attached| all.iter().any(|i| i.name == attached.interface);
        if !self.is_on_trial() {
            self.loaded.attached.retain(is_there);
        }
        let filtered = self.loaded.filtered(all);
        let mut unfiltered = targets.attach;
        unfiltered.retain(|interface| !filtered.contains_key(&interface.index));
        // What comes during a trial waits for its end: only then is it known what it shall be.
        if unfiltered.is_empty() || self.is_on_trial() {
            return Ok(reconciled);
        }
        if !is_loaded {
            reconciled.unloaded = true;
            return Ok(reconciled);
        }
        for interface in unfiltered {
            if self.failures.is_waiting(&interface.name) {
                continue;
            }
            let was_there = self.loaded.was_attached(&interface.name);
            match self.attach_late(&interface) {
                Ok(()) => {
                    self.failures.forget(&interface.name);
                    let list = if was_there {
                        &mut reconciled.reattached
                    } else {
                        &mut reconciled.found
                    };
                    list.push(interface.name);
                }
                Err(error) => {
                    if self.failures.note(&interface.name, &error) {
                        reconciled.failed.push((interface.name, error));
                    }
                }
            }
        }
        self.release_ports()?;
        self.note();
        self.prepare_spare();
        Ok(reconciled)
    }

    /// Looks at the network as it is now; returns whether the pins are there, as they are until the filter
    /// is unloaded.
    fn look_again(&mut self, changed: Changed) -> Result<bool, XdpError> {
        let topology = if changed.routes {
            Topology::read()
        } else {
            self.topology.with_new_interfaces()
        };
        let topology = topology.map_err(XdpError::Netlink)?;
        let is_new = topology != self.topology;
        if is_new {
            self.failures.retry_now();
        } else if changed.links {
            self.failures.retry_soon();
        }
        self.topology = topology;
        let is_loaded = self.pins.exist();
        if is_loaded && !self.is_on_trial() {
            if is_new {
                self.follow_renames()?;
            }
            self.note();
        }
        Ok(is_loaded)
    }

    /// Under `"auto"`, detaches from uplinks that have become ports of a bridge, once the bridge itself is
    /// filtered: guests on it are not this host's.
    fn release_ports(&mut self) -> Result<(), XdpError> {
        if !matches!(self.settings.interfaces, Interfaces::Auto) {
            return Ok(());
        }
        let Self {
            loaded,
            topology,
            pins,
            ..
        } = self;
        let filtered = loaded.filtered(topology.interfaces());
        let released = loaded.attached.iter().filter(|attached| {
            let port = topology.named(&attached.interface);
            let bridge = port
                .filter(|port| topology.is_bridge_port(port))
                .and_then(|port| port.controller);
            bridge.is_some_and(|bridge| filtered.contains_key(&bridge))
        });
        let released: Vec<_> = released.map(|it| it.interface.clone()).collect();
        for name in released {
            warn!(
                id = "port-detached",
                interface = name,
                "detached: its bridge is filtered instead"
            );
            loaded.attached.retain(|it| it.interface != name);
            loaded.programs.remove(&name);
            pins.remove_of(&name)?;
        }
        Ok(())
    }

    /// Interfaces that have another name keep their programs.
    fn follow_renames(&mut self) -> Result<(), XdpError> {
        for (old, new) in self.pins.follow_renames(self.topology.interfaces())? {
            let set = &mut self.loaded;
            for attached in set.attached.iter_mut().filter(|it| it.interface == old) {
                attached.rename(&new, &self.pins);
            }
            if let Some(program) = set.programs.remove(&old) {
                set.programs.insert(new.clone(), program);
            }
            if self.memory.uplinks.remove(&old) {
                self.memory.uplinks.insert(new.clone());
            }
            set.once_attached.insert(new);
        }
        Ok(())
    }

    /// How every interface fares that strangers can come in by, or that the configuration names.
    ///
    /// # Errors
    ///
    /// Returns why the interfaces cannot be listed.
    pub fn coverage(&self) -> Result<Vec<Coverage>, XdpError> {
        let topology = self.topology.with_new_interfaces();
        let topology = topology.map_err(XdpError::Netlink)?;
        let targets = self.targets_in(&topology);
        let filtered = self.loaded.filtered(topology.interfaces());
        let indices = filtered.keys().copied().collect();
        let state = |interface: &Interface| {
            if let Some(attached) = filtered.get(&interface.index) {
                return match attached.overtaken_by(interface.index) {
                    Some(program) => InterfaceState::Overtaken(program),
                    None => InterfaceState::Attached(attached.mode),
                };
            }
            if let Some(lower) = topology.cover(interface, &indices) {
                return InterfaceState::Covered(lower.name.clone());
            }
            if let Some(reason) = self.failures.reason(&interface.name) {
                return InterfaceState::Refused(reason.to_owned());
            }
            let is_target = targets.attach.iter().any(|it| it.index == interface.index);
            let is_named = self.loaded.was_attached(&interface.name);
            match &self.settings.interfaces {
                _ if !interface.is_ethernet => InterfaceState::NotEthernet,
                Interfaces::Named(_) if !is_target && !is_named => InterfaceState::NotNamed,
                Interfaces::Named(_) | Interfaces::Auto => InterfaceState::Detached,
            }
        };
        let mut coverage = BTreeMap::new();
        let named = match &self.settings.interfaces {
            Interfaces::Named(names) => names.iter().map(|name| name.value.as_str()).collect(),
            Interfaces::Auto => Vec::new(),
        };
        let attached = self.loaded.attached.iter();
        let attached = attached.map(|attached| attached.interface.as_str());
        let exposed = topology.exposed().map(|interface| interface.name.as_str());
        let missing = targets.missing.iter().map(String::as_str);
        for name in named
            .into_iter()
            .chain(attached)
            .chain(exposed)
            .chain(missing)
        {
            let state = topology.named(name).map_or(InterfaceState::Missing, state);
            coverage.insert(name.to_owned(), state);
        }
        // A remembered uplink that is gone lets no stranger in.
        if matches!(self.settings.interfaces, Interfaces::Auto) {
            coverage.retain(|name, found| {
                *found != InterfaceState::Missing || !self.memory.uplinks.contains(name)
            });
        }
        let coverage = coverage.into_iter();
        Ok(coverage
            .map(|(interface, found)| Coverage {
                interface,
                state: found,
            })
            .collect())
    }

    /// Interfaces that are filtered only because they share a parent with an uplink (VLANs of one
    /// card): their clients are judged like strangers. With the parent's name.
    #[must_use]
    pub fn bystanders(&self) -> Vec<(String, String)> {
        if !matches!(self.settings.interfaces, Interfaces::Auto) {
            return Vec::new();
        }
        let exposed: BTreeSet<u32> = self.topology.exposed().map(|it| it.index).collect();
        let mut bystanders = Vec::new();
        for attached in &self.loaded.attached {
            let Some(lower) = self.topology.named(&attached.interface) else {
                continue;
            };
            for upper in self.topology.stacked_on(lower) {
                if !exposed.contains(&upper.index) {
                    bystanders.push((upper.name.clone(), lower.name.clone()));
                }
            }
        }
        bystanders
    }

    /// What the next boot is to know.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Cards that are named or remembered, and that do not exist yet.
    #[must_use]
    pub fn awaited(&self) -> Vec<String> {
        let mut awaited = self.targets().missing;
        awaited.retain(|name| !self.memory.software.contains(name));
        awaited
    }

    fn targets(&self) -> Targets {
        self.targets_in(&self.topology)
    }

    fn targets_in(&self, topology: &Topology) -> Targets {
        let attached = self.loaded.attached.iter();
        let linked: Vec<_> = attached.map(|a| a.interface.clone()).collect();
        let history = History {
            uplinks: &self.memory.uplinks,
            linked: &linked,
            refused: &self.failures.names(),
        };
        topology.targets(&self.settings, history)
    }

    /// Remembers what is attached.
    pub(super) fn note(&mut self) {
        let Self {
            memory,
            loaded,
            topology,
            ..
        } = self;
        let is_auto = matches!(self.settings.interfaces, Interfaces::Auto);
        if !is_auto {
            memory.uplinks.clear();
        }
        for attached in &loaded.attached {
            let name = &attached.interface;
            let Some(interface) = topology.named(name) else {
                continue;
            };
            // A port's bridge is the uplink, and is one by itself.
            if is_auto && !topology.is_bridge_port(interface) {
                memory.uplinks.insert(name.clone());
            } else {
                memory.uplinks.remove(name);
            }
            match interface.kind {
                InterfaceKind::Bond
                | InterfaceKind::Bridge
                | InterfaceKind::Team
                | InterfaceKind::Stacked => {
                    memory.software.insert(name.clone());
                }
                InterfaceKind::Veth | InterfaceKind::Other => {
                    memory.software.remove(name);
                }
            }
        }
    }

    /// Under `"auto"`, an uplink may appear at any time under any name: a program waits for it, so that
    /// it is attached in the event that announces it.
    pub(super) fn prepare_spare(&mut self) {
        let is_auto = matches!(self.settings.interfaces, Interfaces::Auto);
        if !is_auto || self.loaded.programs.contains_key(SPARE) || !self.pins.exist() {
            return;
        }
        let pins = &self.pins;
        let set = &mut self.loaded;
        if let Err(error) = set.load_program(SPARE, &self.settings, pins, |map| pins.shared(map)) {
            warn!(id = "spare-not-loaded", error = %chain(&error), "no program is loaded ahead");
        }
    }

    /// Attaches on an interface that has come or has lost its link, with what is active elsewhere.
    fn attach_late(&mut self, interface: &Interface) -> Result<(), XdpError> {
        let Self {
            loaded,
            settings,
            pins,
            topology,
            ..
        } = self;
        let name = &interface.name;
        if !loaded.programs.contains_key(name) && !loaded.take_spare(name, pins)? {
            loaded.load_program(name, settings, pins, |map| pins.shared(map))?;
        }
        if let Some(program) = loaded.programs.get_mut(name) {
            let place = attach::AttachPoint {
                interface,
                settings,
                pins,
                topology,
            };
            let mut attached = attach::attach(program, &place)?;
            attached.pin()?;
            program.pin(attached.mode, &pins.programs(name))?;
            loaded.attached.retain(|other| other.interface != *name);
            loaded.attached.push(attached);
            loaded.once_attached.insert(name.clone());
        }
        Ok(())
    }
}

impl LoadedSet {
    /// The interfaces that are filtered by our links at this moment, by index.
    fn filtered(&self, all: &[Interface]) -> BTreeMap<u32, &Attached> {
        let attached = self.attached.iter();
        attached
            .filter_map(|attached| Some((attached.filtered_index(all)?, attached)))
            .collect()
    }

    fn was_attached(&self, name: &str) -> bool {
        self.once_attached.contains(name)
    }

    /// Loads a program on the maps that `shared` names, unless it is loaded.
    pub(super) fn load_program(
        &mut self,
        name: &str,
        settings: &crate::config::FilterSettings,
        pins: &Pins,
        shared: impl Fn(&str) -> PathBuf,
    ) -> Result<(), XdpError> {
        if !self.programs.contains_key(name) {
            let active = self.publisher.active()?;
            let program = Program::load(&LoadRequest {
                settings,
                interface: name,
                pins,
                active,
                shared: &shared,
            })?;
            self.programs.insert(name.to_owned(), program);
        }
        Ok(())
    }

    /// Makes the spare program that of an interface; not if that has counters from before.
    fn take_spare(&mut self, name: &str, pins: &Pins) -> Result<bool, XdpError> {
        if !self.programs.contains_key(SPARE) || !pins.rename_counters(SPARE, name)? {
            return Ok(false);
        }
        if let Some(spare) = self.programs.remove(SPARE) {
            info!(
                id = "spare-used",
                interface = name,
                "the program that was loaded ahead is taken"
            );
            self.programs.insert(name.to_owned(), spare);
        }
        Ok(true)
    }
}

/// What keeps failing, by interface.
#[derive(Clone, Debug, Default)]
pub(super) struct AttachFailures(BTreeMap<String, AttachFailure>);

/// An interface that could not be attached to.
#[derive(Clone, Debug, Default)]
struct AttachFailure {
    /// Times in a row.
    times: u32,
    /// Looks until the next attempt.
    pause: u32,
    reason: String,
}

impl AttachFailures {
    pub(super) fn names(&self) -> BTreeSet<String> {
        self.0.keys().cloned().collect()
    }

    pub(super) fn has(&self, interface: &str) -> bool {
        self.0.contains_key(interface)
    }

    fn reason(&self, interface: &str) -> Option<&str> {
        self.0.get(interface).map(|failure| failure.reason.as_str())
    }

    /// Notes a failure; returns whether it is news.
    pub(super) fn note(&mut self, interface: &str, error: &XdpError) -> bool {
        let failure = self.0.entry(interface.to_owned()).or_default();
        let reason = chain(error);
        let is_news = failure.reason != reason;
        failure.times += 1;
        failure.pause = failure.times.min(PAUSE_MAX);
        failure.reason = reason;
        is_news
    }

    fn forget(&mut self, interface: &str) {
        self.0.remove(interface);
    }

    /// Whether the next attempt is not due yet; each call is a look.
    fn is_waiting(&mut self, interface: &str) -> bool {
        let Some(failure) = self.0.get_mut(interface) else {
            return false;
        };
        let is_waiting = failure.pause > 0;
        failure.pause = failure.pause.saturating_sub(1);
        is_waiting
    }

    /// The network is another one.
    fn retry_now(&mut self) {
        for failure in self.0.values_mut() {
            failure.pause = 0;
        }
    }

    /// Something about an interface has changed: perhaps by our own attempt.
    fn retry_soon(&mut self) {
        for failure in self.0.values_mut() {
            failure.pause = failure.pause.min(1);
        }
    }
}

/// Looks between two attempts of what keeps failing.
const PAUSE_MAX: u32 = 30;
