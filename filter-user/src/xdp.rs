//! The kernel side of the filter: load, attach, pin, publish, count. The only user of aya.

mod attach;
mod cookies;
mod error;
mod events;
#[expect(unsafe_code, reason = "a system call that no library makes for us")]
mod hook;
mod link;
mod load;
mod loaded;
mod mode;
mod pins;
mod probe;
mod publish;
mod reconcile;
mod remedy;
mod steer;
mod uplinks;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use filter_ebpf::abi;
use filter_ebpf::verdict::Counted;
use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use tracing::{error, info};

pub use self::attach::Attached;
pub use self::cookies::LeftToKernel;
pub use self::error::XdpError;
pub use self::events::{DropEvent, TopSources};
pub use self::link::interfaces_with_our_program;
use self::load::Program;
pub use self::load::{raise_memory_limit, uninterrupted};
use self::loaded::{Accept, LoadedSet, Loading};
pub use self::mode::{AttachMode, Lifetime};
use self::pins::{Pins, Staging};
pub use self::pins::{check_bpffs, is_loaded, prepare, unload};
pub use self::probe::{Probe, Probed, frame, loaded_interface, probe};
use self::reconcile::AttachFailures;
pub use self::reconcile::{Coverage, InterfaceState, Reconciled};
use self::steer::Steering;
pub use self::steer::{Detached, GateSocket, STEERS_SINCE, SteerState, SteeredTo, steered_to};
use self::uplinks::Topology;
pub use self::uplinks::{check_interfaces, check_kinds};
use crate::config;
use crate::host::uplinks::Memory;
use crate::ranges::{Rules, Table};

/// The filter in the kernel: attached, pinned and published.
///
/// Holding one keeps programs and maps open, but no link: the pins alone keep the programs attached,
/// so neither the end of this process nor anything it may be talked into detaches them.
pub struct Filter {
    pins: Pins,
    settings: config::FilterSettings,
    loaded: LoadedSet,
    /// What assigns connections to the gate, if it is configured.
    steering: Option<Steering>,
    /// The network as of the last look.
    topology: Topology,
    /// What the next boot is to know of interfaces.
    memory: Memory,
    /// Pins that wait for the end of the trial.
    trial: Option<Staging>,
    /// Whether a trial is over, and what was before is active again: nothing here is reconciled.
    reverted: bool,
    /// By interface, what keeps failing.
    failures: AttachFailures,
    /// Keeps the pins to this process.
    lock: Option<File>,
}

/// What a filter starts from.
pub struct FilterStart<'a> {
    /// What is configured.
    pub settings: &'a config::FilterSettings,
    /// The directory of the pins.
    pub base: &'a Path,
    /// What `table` was compiled from.
    pub rules: &'a Rules<'a>,
    /// The table that packets are judged by first.
    pub table: &'a Table,
    /// Whether it outlives this process.
    pub lifetime: Lifetime,
    /// What was remembered of interfaces from before.
    pub memory: Memory,
}

impl Filter {
    /// Loads the program with the settings, publishes the table, and only then attaches.
    ///
    /// Links that are pinned already are adopted, of whatever version: the program is replaced
    /// through its link in one step, so that no packet passes in between, and counters go on.
    ///
    /// Interfaces that are named and not there are attached to when they come, see
    /// [`Self::reconcile`]. So are those that refuse the program, as long as another one takes it.
    ///
    /// # Errors
    ///
    /// Returns the step that failed. What was attached before still is.
    pub fn start(start: FilterStart<'_>) -> Result<Self, XdpError> {
        let FilterStart {
            settings,
            base,
            rules,
            table,
            lifetime,
            memory,
        } = start;
        let pins = Pins::open(base)?;
        let lock = Some(pins.lock()?);
        pins.adopt_other_versions()?;
        if lifetime == Lifetime::OnTrial {
            for interface in pins.interfaces()? {
                if !pins.program(&interface).exists() {
                    return Err(XdpError::NoWayBack { interface });
                }
            }
        }
        let topology = Topology::read().map_err(XdpError::Netlink)?;
        let staging = pins.stage()?;
        let mut failures = AttachFailures::default();
        let accept = match lifetime {
            Lifetime::Pinned => Accept::Partial,
            Lifetime::OnTrial => Accept::Whole,
        };
        let loading = Loading {
            settings,
            pins: &pins,
            staging: &staging,
            topology: &topology,
            uplinks: &memory.uplinks,
            accept,
        };
        let loaded = load_all(&loading, rules, table, &mut failures, accept);
        let (loaded, steering) = match loaded {
            Ok(loaded) => loaded,
            Err(error) => {
                pins.remove_unless_linked()?;
                return Err(error);
            }
        };
        let mut filter = Self {
            pins,
            settings: settings.clone(),
            loaded,
            steering,
            topology,
            memory,
            trial: Some(staging),
            reverted: false,
            failures,
            lock,
        };
        if lifetime == Lifetime::Pinned {
            filter.confirm()?;
        }
        Ok(filter)
    }

    /// Leaves the pins to a successor, who may start while this process ends.
    pub fn release_lock(&mut self) {
        self.lock = None;
    }

    /// Lets what is on trial stay.
    ///
    /// # Errors
    ///
    /// Returns the pin that cannot be made.
    pub fn confirm(&mut self) -> Result<(), XdpError> {
        for attached in &mut self.loaded.attached {
            attached.pin()?;
        }
        match &mut self.steering {
            Some(steering) => steering.pin()?,
            None => steer::remove(&self.pins)?,
        }
        if let Some(staging) = self.trial.take() {
            self.pins.commit(&staging)?;
            let kept: Vec<_> = self.loaded.programs.keys().map(String::as_str).collect();
            self.pins.keep_only(&kept)?;
            self.pins.remove_other_versions()?;
            self.note();
            self.prepare_spare();
        }
        Ok(())
    }

    /// Ends a trial: what was active before is so again.
    ///
    /// # Errors
    ///
    /// Returns the first link that cannot be given back; the others are.
    pub fn revert(&mut self) -> Result<(), XdpError> {
        let staging = self.trial.take();
        self.reverted = true;
        let steering = self.steering.take();
        let steering = steering.map_or(Ok(()), Steering::revert);
        let outcome = self.loaded.revert(&self.pins).and(steering);
        if let Some(staging) = staging {
            self.pins.discard(&staging)?;
        }
        self.pins.remove_unless_linked()?;
        outcome
    }

    /// Applies other settings together with a table: one step per interface.
    ///
    /// # Errors
    ///
    /// Returns the step that failed; what was active before is so again.
    pub fn reload(
        &mut self,
        settings: &config::FilterSettings,
        rules: &Rules<'_>,
        table: &Table,
    ) -> Result<(), XdpError> {
        if self.is_on_trial() {
            return Err(XdpError::OnTrial);
        }
        if !self.pins.exist() {
            return Err(XdpError::Unloaded);
        }
        let topology = Topology::read().map_err(XdpError::Netlink)?;
        let staging = self.pins.stage()?;
        let mut failures = self.failures.clone();
        let loading = Loading {
            settings,
            pins: &self.pins,
            staging: &staging,
            topology: &topology,
            uplinks: &self.memory.uplinks,
            // Where nothing is filtered, nothing is lost by waiting.
            accept: if self.loaded.attached.is_empty() {
                Accept::Partial
            } else {
                Accept::Whole
            },
        };
        // What is not steered is no reason to refuse the rest.
        let steers = match &self.steering {
            Some(steering) if !steering.is_attached() => Accept::Partial,
            Some(_) | None => Accept::Whole,
        };
        (self.loaded, self.steering) = load_all(&loading, rules, table, &mut failures, steers)?;
        self.settings = settings.clone();
        self.topology = topology;
        self.failures = failures;
        self.trial = Some(staging);
        let confirmed = self.confirm();
        self.trial = None;
        confirmed
    }

    /// Whether connections are steered by what a trial without steering would leave behind.
    #[must_use]
    pub fn steers_until_confirmed(&self) -> bool {
        self.is_on_trial() && self.steering.is_none() && self.pins.steer_link().exists()
    }

    /// Publishes another table; packets are judged by the old one or the new one, never a mix.
    ///
    /// Returns how long it took until packets were judged by it.
    ///
    /// # Errors
    ///
    /// Returns the step that failed; the old table is then still the one in use.
    pub fn publish(&mut self, rules: &Rules<'_>, table: &Table) -> Result<Duration, XdpError> {
        if self.loaded.publisher.fits(table) {
            return self.loaded.publisher.publish(rules, table);
        }
        info!(
            id = "maps-enlarged",
            "the table has outgrown its maps, larger ones are loaded"
        );
        let begun = std::time::Instant::now();
        self.reload(&self.settings.clone(), rules, table)?;
        Ok(begun.elapsed())
    }

    /// Whether the kernel's maps hold what was published: reads all of it back.
    ///
    /// # Errors
    ///
    /// Returns the error of the read that failed.
    pub fn is_as_published(&self) -> Result<bool, XdpError> {
        self.loaded.publisher.is_intact()
    }

    /// The pins that are gone: what was pinned goes on without them, but no other process finds it.
    #[must_use]
    pub fn missing_pins(&self) -> Vec<PathBuf> {
        if self.is_on_trial() || self.reverted || !self.pins.exist() {
            return Vec::new();
        }
        let shared = abi::SHARED_MAPS.map(|map| self.pins.shared(map));
        let own = self.loaded.attached.iter().flat_map(|attached| {
            let name = &attached.interface;
            let maps = abi::INTERFACE_MAPS.map(|map| self.pins.of_interface(map, name));
            let programs = self.pins.programs(name);
            let program = self.loaded.programs.get(name);
            let twin = program
                .is_some_and(Program::has_twin)
                .then_some(programs.slot);
            maps.into_iter().chain([programs.program]).chain(twin)
        });
        let steering = self.steering.iter();
        let steering =
            steering.flat_map(|_| [self.pins.steer_program(), self.pins.steer_sockets()]);
        let all = shared.into_iter().chain(own).chain(steering);
        all.filter(|pin| !pin.exists()).collect()
    }

    /// Steers connections to these sockets of the gate from now on.
    ///
    /// # Errors
    ///
    /// Returns [`XdpError::NotSteering`], [`XdpError::SteeringDetached`], or why the kernel does not take a
    /// socket.
    pub fn steer_to(&mut self, sockets: &[GateSocket]) -> Result<(), XdpError> {
        if !self.is_on_trial() && !self.pins.exist() {
            return Err(XdpError::Unloaded);
        }
        let steering = self.steering.as_mut().ok_or(XdpError::NotSteering)?;
        steering.steer_to(sockets)
    }

    /// Whether connections are steered, and to what; none, if they are not to be.
    pub fn steer_state(&mut self) -> Option<SteerState> {
        self.steering.as_mut().map(Steering::state)
    }

    /// Publishes the table that is active again, whatever the maps hold.
    ///
    /// # Errors
    ///
    /// As [`Self::publish`].
    pub fn republish(&mut self, rules: &Rules<'_>, table: &Table) -> Result<Duration, XdpError> {
        self.loaded.publisher.forget();
        self.publish(rules, table)
    }

    /// Drops that the program reported since the last time: a sample.
    ///
    /// # Errors
    ///
    /// Returns the error of the map.
    pub fn drops(&mut self) -> Result<Vec<DropEvent>, XdpError> {
        for program in self.loaded.programs.values_mut() {
            program.pass_log_on();
        }
        self.loaded.events.take()
    }

    /// Whether there is a filter: it is on trial, or no other process has unloaded it.
    #[must_use]
    pub fn is_loaded(&self) -> bool {
        !self.reverted && (self.is_on_trial() || self.pins.exist())
    }

    /// Whether what is active still waits to be confirmed.
    #[must_use]
    pub fn is_on_trial(&self) -> bool {
        self.trial.is_some()
    }

    /// What is configured.
    #[must_use]
    pub fn settings(&self) -> &config::FilterSettings {
        &self.settings
    }

    /// Interfaces whose SYNs are left to the kernel in a flood, and why.
    pub fn left_to_kernel(&self) -> impl Iterator<Item = (&str, LeftToKernel)> {
        let attached = self.loaded.attached.iter();
        attached.filter_map(|attached| {
            let program = self.loaded.programs.get(&attached.interface)?;
            let is_classifier = attached.mode == AttachMode::Tcx;
            let classifier = is_classifier.then_some(LeftToKernel::Classifier);
            let cause = program.left_to_kernel().or(classifier)?;
            Some((attached.interface.as_str(), cause))
        })
    }

    /// How many frames were judged so far, by interface.
    ///
    /// # Errors
    ///
    /// Returns the error of the read that failed.
    pub fn frames(&self) -> Result<BTreeMap<String, Frames>, XdpError> {
        let programs = self.loaded.programs.iter();
        let of_interfaces = programs.filter(|(interface, _)| *interface != pins::SPARE);
        of_interfaces
            .map(|(interface, program)| Ok((interface.clone(), program.frames()?)))
            .collect()
    }
}

/// Loads and attaches all of it, or nothing. Connections are steered last: strangers are dropped by then.
/// Where steering may be partial, a program that the kernel does not take is tried again, by
/// [`Steering::reconcile`].
fn load_all(
    loading: &Loading<'_>,
    rules: &Rules<'_>,
    table: &Table,
    failures: &mut AttachFailures,
    steers: Accept,
) -> Result<(LoadedSet, Option<Steering>), XdpError> {
    let mut steering = Steering::load(loading.settings, loading.pins)?;
    let mut loaded = LoadedSet::load(loading, rules, table, failures)?;
    if let Some(Err(error)) = steering.as_mut().map(Steering::attach)
        && steers == Accept::Whole
    {
        loaded.revert(loading.pins)?;
        return Err(error);
    }
    Ok((loaded, steering))
}

/// How many frames of each kind an interface has had.
pub type Frames = Vec<(Counted, u64)>;

impl Drop for Filter {
    /// A trial that ends in whatever way ends as if it had not been confirmed.
    fn drop(&mut self) {
        if self.is_on_trial()
            && let Err(error) = self.revert()
        {
            error!(id = "trial-not-reverted", %error, "what was before the trial is not restored");
        }
    }
}

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

/// The number behind an error, if the kernel gave one.
fn errno(error: &(dyn std::error::Error + 'static)) -> Option<Errno> {
    let mut source = error;
    loop {
        if let Some(cause) = source.downcast_ref::<io::Error>() {
            return Errno::from_io_error(cause);
        }
        source = source.source()?;
    }
}
