//! A set of programs that judge by the same maps: loaded, attached interface by interface, and given back.

use std::collections::{BTreeMap, BTreeSet};

use tracing::{debug, error};

use super::XdpError;
use super::attach::{self, Attached};
use super::events::Events;
use super::load::{self, Program};
use super::pins::{Pins, Staging};
use super::publish::Publisher;
use super::reconcile::AttachFailures;
use super::uplinks::{History, Targets, Topology};
use crate::config::{self, Interfaces};
use crate::host::netlink::Interface;
use crate::ranges::{Rules, Table};

/// What is active: programs that judge by the same maps.
pub(super) struct LoadedSet {
    pub(super) publisher: Publisher,
    pub(super) events: Events,
    /// By interface; also of interfaces that are gone or still to come.
    pub(super) programs: BTreeMap<String, Program>,
    pub(super) attached: Vec<Attached>,
    /// By name, every interface that was attached to, also if it is gone.
    pub(super) once_attached: BTreeSet<String>,
}

/// What a set is loaded for.
pub(super) struct Loading<'a> {
    pub(super) settings: &'a config::FilterSettings,
    pub(super) pins: &'a Pins,
    pub(super) staging: &'a Staging,
    pub(super) topology: &'a Topology,
    pub(super) uplinks: &'a BTreeSet<String>,
    pub(super) accept: Accept,
}

/// What a load may come to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Accept {
    /// Every interface takes the program, but for those that refused it before.
    Whole,
    /// At least one does, or none is there yet.
    Partial,
}

impl LoadedSet {
    pub(super) fn load(
        loading: &Loading<'_>,
        rules: &Rules<'_>,
        table: &Table,
        failures: &mut AttachFailures,
    ) -> Result<Self, XdpError> {
        let Loading {
            settings,
            pins,
            staging,
            topology,
            uplinks,
            accept,
        } = *loading;
        drop(pins.follow_renames(topology.interfaces())?);
        let linked = pins.interfaces()?;
        let targets = |refused: &BTreeSet<String>| {
            let history = History {
                uplinks,
                linked: &linked,
                refused,
            };
            topology.targets(settings, history)
        };
        let first = targets(&BTreeSet::new());
        refuse_absence(settings, &first, accept)?;
        let mut shared = load::shared_maps(staging, table)?;
        let mut publisher = Publisher::new(&mut shared)?;
        let took = publisher.publish(rules, table)?;
        debug!(
            id = "maps-filled",
            took_ms = took.as_secs_f64() * 1e3,
            "new maps are filled"
        );
        let mut set = Self {
            publisher,
            events: Events::new(&mut shared)?,
            programs: BTreeMap::new(),
            attached: Vec::new(),
            once_attached: BTreeSet::new(),
        };
        // All programs are loaded before the first is attached: most that can fail does so here, and
        // an interface that comes later finds its program ready.
        let present = first.attach.iter().map(|interface| &interface.name);
        for name in present.chain(&first.missing) {
            set.load_staged(name, loading)?;
        }

        let failed_before = std::mem::take(failures);
        let mut refusal = None;
        let mut tried = BTreeSet::new();
        loop {
            // What an interface that refuses would have covered is a target by itself.
            let targets = targets(&failures.names());
            let next = targets.attach.iter().find(|it| !tried.contains(&it.index));
            let Some(interface) = next else { break };
            tried.insert(interface.index);
            set.load_staged(&interface.name, loading)?;
            let Err(error) = set.attach(interface, loading) else {
                continue;
            };
            let is_tolerated = accept == Accept::Partial || failed_before.has(&interface.name);
            if !error.is_refusal() || !is_tolerated {
                set.revert(pins)?;
                return Err(error);
            }
            error!(
                id = "interface-not-filtered",
                interface = interface.name,
                %error,
                "the interface is not filtered"
            );
            failures.note(&interface.name, &error);
            refusal.get_or_insert(error);
        }
        match refusal.filter(|_| set.attached.is_empty()) {
            Some(error) => Err(error),
            None => Ok(set),
        }
    }

    /// Loads the program of an interface, unless it is loaded, on the maps that are to become active.
    fn load_staged(&mut self, name: &str, loading: &Loading<'_>) -> Result<(), XdpError> {
        let Loading {
            settings,
            pins,
            staging,
            ..
        } = *loading;
        self.load_program(name, settings, pins, |map| staging.shared(map))
    }

    fn attach(&mut self, interface: &Interface, loading: &Loading<'_>) -> Result<(), XdpError> {
        let Loading {
            settings,
            pins,
            staging,
            topology,
            ..
        } = *loading;
        if let Some(program) = self.programs.get_mut(&interface.name) {
            let place = attach::AttachPoint {
                interface,
                settings,
                pins,
                topology,
            };
            let attached = attach::attach(program, &place)?;
            let (mode, places) = (attached.mode, staging.programs(&interface.name));
            self.attached.push(attached);
            self.once_attached.insert(interface.name.clone());
            program.pin(mode, &places)?;
        }
        Ok(())
    }

    /// Gives the links back to the programs that were there before.
    pub(super) fn revert(&mut self, pins: &Pins) -> Result<(), XdpError> {
        let attached = self.attached.drain(..);
        attached
            .map(|attached| attached.revert(pins))
            .fold(Ok(()), Result::and)
    }
}

/// Nothing is put on trial, or in the place of what protects, for interfaces none of which is there.
fn refuse_absence(
    settings: &config::FilterSettings,
    targets: &Targets,
    accept: Accept,
) -> Result<(), XdpError> {
    let is_named = matches!(settings.interfaces, Interfaces::Named(_));
    match targets.missing.first() {
        Some(interface) if is_named && accept == Accept::Whole && targets.attach.is_empty() => {
            Err(XdpError::NoInterface {
                interface: interface.clone(),
            })
        }
        Some(_) | None => Ok(()),
    }
}
