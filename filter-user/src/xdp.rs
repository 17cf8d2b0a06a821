//! The kernel side of the filter: load, attach, pin, publish, count. The only user of aya.

mod attach;
mod error;
mod events;
mod interfaces;
mod load;
mod pins;
mod probe;
mod publish;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use aya::programs::ProgramError;
use filter_ebpf::verdict::Counted;
use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use tracing::{debug, error, info};

pub use self::attach::{Attached, Rung, Stay};
pub use self::error::XdpError;
use self::events::Events;
pub use self::events::{Drop, TopSources};
pub use self::interfaces::check_interfaces;
use self::load::Program;
use self::pins::{Pins, Staging};
pub use self::pins::{check_bpffs, is_loaded, unload};
pub use self::probe::{Probe, frame, loaded_interface, probe};
use self::publish::Publisher;
use crate::config;
use crate::netlink::{self, Interface};
use crate::ranges::{Rules, Table};

/// The filter in the kernel: attached, pinned and published.
///
/// Holding one keeps programs and maps open, but no link: the pins alone keep the programs attached,
/// so neither the end of this process nor anything it may be talked into detaches them.
pub struct Filter {
    pins: Pins,
    settings: config::Filter,
    force: Force,
    /// Pins that wait for the end of the trial.
    trial: Option<Staging>,
    /// Whether a trial is over, and what was before is in force again: nothing here is looked after.
    reverted: bool,
    /// Interfaces with a default route whose frames cannot be judged, as of the last look.
    unfit: Vec<String>,
    /// By interface, what keeps failing.
    failures: BTreeMap<String, Failure>,
    /// Keeps the pins to this process.
    lock: Option<File>,
}

/// An interface that could not be attached to.
#[derive(Default)]
struct Failure {
    /// Times in a row.
    times: u32,
    /// Looks until the next attempt.
    pause: u32,
}

/// What is in force: programs that judge by the same maps.
struct Force {
    publisher: Publisher,
    events: Events,
    /// By interface; also of interfaces that are gone, for their return.
    programs: BTreeMap<String, Program>,
    attached: Vec<Attached>,
}

impl Filter {
    /// Loads the program with `settings`, publishes `table`, and only then attaches.
    ///
    /// Links that are pinned already are adopted, of whatever version: the program is replaced
    /// through its link in one step, so that no packet passes in between, and counters go on.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. What was attached before still is.
    pub fn start(
        settings: &config::Filter,
        base: &Path,
        rules: &Rules<'_>,
        table: &Table,
        stay: Stay,
    ) -> Result<Self, XdpError> {
        let pins = Pins::open(base)?;
        let lock = Some(pins.lock()?);
        pins.adopt_other_versions()?;
        if stay == Stay::OnTrial {
            for interface in pins.interfaces()? {
                if !pins.program(&interface).exists() {
                    return Err(XdpError::NoWayBack { interface });
                }
            }
        }
        let staging = pins.stage()?;
        let force = match Force::load(settings, &pins, &staging, rules, table) {
            Ok(force) => force,
            Err(error) => {
                pins.remove_unless_linked()?;
                return Err(error);
            }
        };
        let mut filter = Self {
            pins,
            settings: settings.clone(),
            force,
            trial: Some(staging),
            reverted: false,
            unfit: Vec::new(),
            failures: BTreeMap::new(),
            lock,
        };
        if stay == Stay::Pinned {
            filter.confirm()?;
        }
        Ok(filter)
    }

    /// Leaves the pins to a successor, who may start while this process ends.
    pub fn let_go(&mut self) {
        self.lock = None;
    }

    /// Lets what is on trial stay.
    ///
    /// # Errors
    ///
    /// Returns the pin that cannot be made.
    pub fn confirm(&mut self) -> Result<(), XdpError> {
        for attached in &mut self.force.attached {
            attached.pin()?;
        }
        if let Some(staging) = self.trial.take() {
            self.pins.commit(&staging)?;
            let mut kept: Vec<_> = self.force.programs.keys().map(String::as_str).collect();
            if let config::Interfaces::Named(names) = &self.settings.interfaces {
                kept.extend(names.iter().map(|name| name.value.as_str()));
            }
            self.pins.keep_only(&kept)?;
            self.pins.remove_other_versions()?;
        }
        Ok(())
    }

    /// Ends a trial: what was in force before is so again.
    ///
    /// # Errors
    ///
    /// Returns the first link that cannot be given back; the others are.
    pub fn revert(&mut self) -> Result<(), XdpError> {
        let staging = self.trial.take();
        self.reverted = true;
        let outcome = self.force.revert(&self.pins);
        if let Some(staging) = staging {
            self.pins.discard(&staging)?;
        }
        self.pins.remove_unless_linked()?;
        outcome
    }

    /// Puts other settings in force, together with a table: one step per interface.
    ///
    /// # Errors
    ///
    /// Returns the step that failed; what was in force before is so again.
    pub fn reload(
        &mut self,
        settings: &config::Filter,
        rules: &Rules<'_>,
        table: &Table,
    ) -> Result<(), XdpError> {
        if self.is_on_trial() {
            return Err(XdpError::OnTrial);
        }
        if !self.pins.exist() {
            return Err(XdpError::Unloaded);
        }
        let staging = self.pins.stage()?;
        self.force = Force::load(settings, &self.pins, &staging, rules, table)?;
        self.settings = settings.clone();
        self.failures.clear();
        self.trial = Some(staging);
        let confirmed = self.confirm();
        self.trial = None;
        confirmed
    }

    /// Looks after the links: attaches wherever the filter should be in force and is not, unless it
    /// was unloaded or was on a trial that is over.
    ///
    /// # Errors
    ///
    /// Returns why the interfaces cannot be looked at.
    pub fn tend(&mut self) -> Result<Tended, XdpError> {
        if self.reverted {
            return Ok(Tended::default());
        }
        let all = netlink::interfaces().map_err(XdpError::Netlink)?;
        let attached: Vec<_> = self
            .force
            .attached
            .iter()
            .map(|a| a.interface.clone())
            .collect();
        let wanted = interfaces::wanted(&self.settings, &all, &attached)?;
        self.unfit = wanted.unfit;
        let mut tended = Tended {
            missing: wanted.missing,
            ..Tended::default()
        };
        // An interface that is gone has no frames left to judge.
        let is_there = |attached: &Attached| all.iter().any(|i| i.name == attached.interface);
        self.force.attached.retain(is_there);
        let is_filtered = |interface: &Interface| {
            let mut attached = self.force.attached.iter();
            attached.any(|a| a.interface == interface.name && a.is_filtered(&all))
        };
        let mut unfiltered = wanted.present;
        unfiltered.retain(|interface| !is_filtered(interface));
        // What comes during a trial waits for its end: only then is it known what it shall be.
        if unfiltered.is_empty() || self.is_on_trial() {
            return Ok(tended);
        }
        if !self.pins.exist() {
            tended.unloaded = true;
            return Ok(tended);
        }
        self.pins.follow_renames(&all)?;
        for interface in unfiltered {
            let name = &interface.name;
            let failure = self.failures.entry(name.clone()).or_default();
            if failure.pause > 0 {
                failure.pause -= 1;
                continue;
            }
            let was_there = self.force.programs.contains_key(name);
            match self
                .force
                .attach_late(&interface, &self.settings, &self.pins)
            {
                Ok(()) => {
                    self.failures.remove(name);
                    let list = match was_there {
                        true => &mut tended.attached_anew,
                        false => &mut tended.found,
                    };
                    list.push(interface.name);
                }
                Err(error) => {
                    failure.times += 1;
                    failure.pause = failure.times.min(PAUSE_MAX);
                    if failure.times == 1 {
                        tended.failed.push((interface.name, error));
                    }
                }
            }
        }
        Ok(tended)
    }

    /// Lets the next look try everything again: the network has changed.
    pub fn try_again(&mut self) {
        for failure in self.failures.values_mut() {
            failure.pause = 0;
        }
    }

    /// Publishes another table; packets are judged by the old one or the new one, never a mix.
    ///
    /// Returns how long it took until packets were judged by it.
    ///
    /// # Errors
    ///
    /// Returns the step that failed; the old table is then still the one in use.
    pub fn publish(&mut self, rules: &Rules<'_>, table: &Table) -> Result<Duration, XdpError> {
        if self.force.publisher.fits(table) {
            return self.force.publisher.publish(rules, table);
        }
        info!("the table has outgrown its maps, larger ones are loaded");
        let begun = std::time::Instant::now();
        self.reload(&self.settings.clone(), rules, table)?;
        Ok(begun.elapsed())
    }

    /// Drops that the program reported since the last time: a sample.
    ///
    /// # Errors
    ///
    /// Returns the error of the map.
    pub fn drops(&mut self) -> Result<Vec<Drop>, XdpError> {
        for program in self.force.programs.values_mut() {
            program.pass_log_on();
        }
        self.force.events.take()
    }

    /// Whether what is in force still waits to be confirmed.
    #[must_use]
    pub fn is_on_trial(&self) -> bool {
        self.trial.is_some()
    }

    /// What is configured.
    #[must_use]
    pub fn settings(&self) -> &config::Filter {
        &self.settings
    }

    /// Where the program is attached, how, and whether it still is.
    ///
    /// # Errors
    ///
    /// Returns why the interfaces cannot be looked at.
    pub fn attached(&self) -> Result<Vec<(&Attached, bool)>, XdpError> {
        let all = netlink::interfaces().map_err(XdpError::Netlink)?;
        let attached = self.force.attached.iter();
        Ok(attached
            .map(|attached| (attached, attached.is_filtered(&all)))
            .collect())
    }

    /// Interfaces that the configuration names and that the program is not attached to.
    #[must_use]
    pub fn missing(&self) -> Vec<String> {
        let config::Interfaces::Named(names) = &self.settings.interfaces else {
            return Vec::new();
        };
        let is_attached =
            |name: &&String| self.force.attached.iter().any(|a| a.interface == **name);
        let names = names.iter().map(|name| &name.value);
        names.filter(|name| !is_attached(name)).cloned().collect()
    }

    /// Interfaces that lead to the internet and cannot be filtered: tunnels.
    #[must_use]
    pub fn unfit(&self) -> &[String] {
        &self.unfit
    }

    /// How many frames were judged so far, by interface.
    ///
    /// # Errors
    ///
    /// Returns the error of the read that failed.
    pub fn frames(&self) -> Result<BTreeMap<String, Frames>, XdpError> {
        let programs = self.force.programs.iter();
        programs
            .map(|(interface, program)| Ok((interface.clone(), program.frames()?)))
            .collect()
    }
}

impl Force {
    fn load(
        settings: &config::Filter,
        pins: &Pins,
        staging: &Staging,
        rules: &Rules<'_>,
        table: &Table,
    ) -> Result<Self, XdpError> {
        let mut shared = load::shared_maps(staging, table)?;
        let mut publisher = Publisher::new(&mut shared)?;
        let took = publisher.publish(rules, table)?;
        debug!(took_ms = took.as_secs_f64() * 1e3, "new maps are filled");
        let mut force = Self {
            publisher,
            events: Events::new(&mut shared)?,
            programs: BTreeMap::new(),
            attached: Vec::new(),
        };

        let active = force.publisher.active()?;
        let all = netlink::interfaces().map_err(XdpError::Netlink)?;
        pins.follow_renames(&all)?;
        let wanted = interfaces::wanted(settings, &all, &pins.interfaces()?)?;
        if let (Some(interface), true) = (wanted.missing.first(), wanted.present.is_empty()) {
            let interface = interface.clone();
            return Err(XdpError::NoInterface { interface });
        }
        // All programs are loaded before the first is attached: most that can fail does so here.
        for Interface { name, .. } in &wanted.present {
            let program = Program::load(settings, name, pins, active, |map| staging.shared(map))?;
            force.programs.insert(name.clone(), program);
        }
        for interface in &wanted.present {
            if let Err(error) = force.attach(interface, settings, pins, staging) {
                force.revert(pins)?;
                return Err(error);
            }
        }
        Ok(force)
    }

    fn attach(
        &mut self,
        interface: &Interface,
        settings: &config::Filter,
        pins: &Pins,
        staging: &Staging,
    ) -> Result<(), XdpError> {
        if let Some(program) = self.programs.get_mut(&interface.name) {
            let attached = attach::attach(program, interface, settings, pins)?;
            let (rung, pin) = (attached.rung, staging.program(&interface.name));
            self.attached.push(attached);
            program.pin(rung, &pin)?;
        }
        Ok(())
    }

    /// Gives the links back to the programs that were there before.
    fn revert(&mut self, pins: &Pins) -> Result<(), XdpError> {
        let attached = self.attached.drain(..);
        attached
            .map(|attached| attached.revert(pins))
            .fold(Ok(()), Result::and)
    }

    /// Attaches on an interface that has come or has lost its link, with what is in force elsewhere.
    fn attach_late(
        &mut self,
        interface: &Interface,
        settings: &config::Filter,
        pins: &Pins,
    ) -> Result<(), XdpError> {
        let name = &interface.name;
        if !self.programs.contains_key(name) {
            let active = self.publisher.active()?;
            let program = Program::load(settings, name, pins, active, |map| pins.shared(map))?;
            self.programs.insert(name.clone(), program);
        }
        if let Some(program) = self.programs.get_mut(name) {
            let mut attached = attach::attach(program, interface, settings, pins)?;
            attached.pin()?;
            program.pin(attached.rung, &pins.program(name))?;
            self.attached.retain(|attached| attached.interface != *name);
            self.attached.push(attached);
        }
        Ok(())
    }
}

/// How many frames of each kind an interface has had.
pub type Frames = Vec<(Counted, u64)>;

/// What [`Filter::tend`] found.
#[derive(Debug, Default)]
pub struct Tended {
    /// Interfaces that have come, and are filtered.
    pub found: Vec<String>,
    /// Interfaces that were filtered before, were not, and are again.
    pub attached_anew: Vec<String>,
    /// Interfaces that are not filtered, and why: only the first time in a row.
    pub failed: Vec<(String, XdpError)>,
    /// Interfaces that the configuration names and that do not exist.
    pub missing: Vec<String>,
    /// Somebody has unloaded the filter; only a restart brings it back.
    pub unloaded: bool,
}

impl std::ops::Drop for Filter {
    /// A trial that ends in whatever way ends as if it had not been confirmed.
    fn drop(&mut self) {
        if self.is_on_trial()
            && let Err(error) = self.revert()
        {
            error!(%error, "what was before the trial is not restored");
        }
    }
}

/// Looks between two attempts of what keeps failing; a change of the network ends the pause.
const PAUSE_MAX: u32 = 30;

/// Finds the first capability that this process lacks for the filter.
///
/// # Errors
///
/// Returns [`XdpError::Capability`] with its name.
pub fn check_capabilities() -> Result<(), XdpError> {
    let held = rustix::thread::capabilities(None).map_err(|errno| XdpError::Capabilities {
        source: errno.into(),
    })?;
    for (name, capability) in [
        ("CAP_BPF", CapabilitySet::BPF),
        ("CAP_NET_ADMIN", CapabilitySet::NET_ADMIN),
        // Without it, the verifier neither lets a program subtract one packet pointer from another,
        // nor spares it the barriers against speculation.
        ("CAP_PERFMON", CapabilitySet::PERFMON),
    ] {
        if !held.effective.contains(capability) {
            return Err(XdpError::Capability { name });
        }
    }
    Ok(())
}

/// The number behind a program's error, if the kernel gave one.
fn errno(error: &ProgramError) -> Option<Errno> {
    let mut source: &dyn std::error::Error = error;
    loop {
        if let Some(error) = source.downcast_ref::<io::Error>() {
            return Errno::from_io_error(error);
        }
        source = source.source()?;
    }
}
