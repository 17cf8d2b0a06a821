//! The plan: what is to run, examined before the host is touched, and then started.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use rustix::thread::CapabilitySet;
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use tokio::sync::{Notify, watch};
use tracing::{error, info, warn};

use super::error::StartError;
use super::gate::GateRole;
use super::tasks::Tasks;
use super::view::View;
use super::{Running, Sockets, described, lock, socket};
use crate::cli::Role;
use crate::config::{Config, Located};
use crate::feed;
use crate::gate::{Gate, Policies};
use crate::ranges::Table;
use crate::ranges::guard::Documentation;
use crate::refresh::Refresher;
use crate::report::chain;
use crate::snapshot::{Follower, InForce};
use crate::telemetry::{Metrics, admin};
use crate::xdp::{self, Filter, Tended, XdpError};

/// Everything that can be known before the host is touched.
pub(super) struct Plan {
    config: Arc<Config>,
    roles: Vec<Role>,
    metrics: Metrics,
    policies: Option<Policies>,
}

impl Plan {
    pub(super) fn new(config: Config, only: Option<Role>) -> Result<Self, StartError> {
        let described = described(&config);
        let roles = match only {
            Some(role) if !described.contains(&role) => {
                return Err(StartError::NotDescribed { role });
            }
            Some(role) => vec![role],
            None => described,
        };
        let metrics = Metrics::default();
        let policies = examine(&config, &roles, &metrics)?;
        if roles.contains(&Role::Filter) {
            xdp::check_capabilities()?;
        }
        if let (Some(gate), true) = (&config.gate, roles.contains(&Role::Gate)) {
            check_bind_capability(&gate.listen)?;
        }
        warn_of_weaknesses(&config);
        Ok(Self {
            config: Arc::new(config),
            roles,
            metrics,
            policies,
        })
    }

    /// Binds, attaches and serves.
    pub(super) fn start(self, tasks: &Tasks) -> Result<Running, StartError> {
        let config = &self.config;
        for directory in [&config.paths.state, &config.paths.run] {
            std::fs::create_dir_all(directory).map_err(|source| StartError::Directory {
                path: directory.clone(),
                source,
            })?;
        }
        let mut running = Running {
            sockets: Sockets::default(),
            wake: Arc::new(Notify::new()),
            gate: None,
        };
        // The sockets first: a second instance must not get any further.
        let mut listeners = Vec::new();
        for role in &self.roles {
            let path = socket(config, *role);
            let listener = admin::bind(&path).map_err(|source| StartError::Socket {
                path: path.clone(),
                source,
            })?;
            listeners.push((*role, listener));
            running.sockets.0.push(path);
        }

        // A port that is taken must be known before anything is attached.
        let bound = match (&config.gate, &self.policies) {
            (Some(gate), Some(_)) => GateRole::bind(gate)?,
            (_, _) => Vec::new(),
        };

        let follower = Follower::new(config.paths.snapshot(), config.ranges.limits.clone())?;
        let in_force = follower.subscribe();
        tasks.spawn(follower.run());

        let mut policies = self.policies.map(|policies| (policies, bound));
        for (role, listener) in listeners {
            let mut view = View::new(role, config, &self.metrics, &in_force);
            match role {
                Role::Filter => {
                    view.filter = start_filter(config, &in_force, tasks)?;
                }
                Role::Ranges => {
                    let (last, attempts) = watch::channel(None);
                    view.attempts = Some(attempts);
                    let refresher = Refresher {
                        ranges: config.ranges.clone(),
                        snapshot: config.paths.snapshot(),
                        metrics: self.metrics.clone(),
                        now: SystemTime::now,
                        last,
                    };
                    let known = InForce::clone(&in_force.borrow());
                    let wake = Arc::clone(&running.wake);
                    tasks.spawn(async move { refresher.run(known, &wake).await });
                }
                Role::Gate => {
                    let (Some(gate), Some((policies, bound))) = (&config.gate, policies.take())
                    else {
                        continue;
                    };
                    let table = compiled(config, &in_force, tasks)?;
                    let shared = Gate::new(gate, policies, table, self.metrics.clone());
                    let gate_role = GateRole::start(gate, shared, bound, tasks);
                    view.listen = gate_role.addresses.clone();
                    running.gate = Some(gate_role);
                }
            }
            tasks.spawn(admin::serve(listener, move || view.status()));
        }
        Ok(running)
    }
}

/// Loads and attaches the filter, and publishes every change of the ranges.
fn start_filter(
    config: &Arc<Config>,
    in_force: &watch::Receiver<Arc<InForce>>,
    tasks: &Tasks,
) -> Result<Option<Arc<Mutex<Filter>>>, StartError> {
    let Some(settings) = &config.filter else {
        return Ok(None);
    };
    let mut in_force = in_force.clone();
    let now = in_force.borrow_and_update().clone();
    let (now, table) = usable(config, now)?;
    let filter = Filter::start(
        settings,
        &config.paths.bpf,
        &config.ranges.rules(now.known.set()),
        &table,
    )?;
    let filter = Arc::new(Mutex::new(filter));

    let (publishing, config) = (Arc::clone(&filter), Arc::clone(config));
    tasks.spawn(async move {
        let mut published_set = now.known.set().clone();
        while in_force.changed().await.is_ok() {
            let now = in_force.borrow_and_update().clone();
            if *now.known.set() == published_set {
                continue;
            }
            let published = compile(&config, &now).and_then(|table| {
                lock(&publishing).publish(&config.ranges.rules(now.known.set()), &table)?;
                Ok(())
            });
            match published {
                Ok(()) => {
                    published_set = now.known.set().clone();
                    info!(ranges = published_set.iter().count(), "ranges published");
                }
                Err(error) => error!(error = %chain(&error), "ranges not published, the old stay"),
            }
        }
    });
    tasks.spawn(tend(Arc::clone(&filter)));
    Ok(Some(filter))
}

/// Looks after the filter: what was detached by others is attached anew, unless it was unloaded.
async fn tend(filter: Arc<Mutex<Filter>>) {
    let mut unwell = false;
    loop {
        tokio::time::sleep(TEND).await;
        let tended = lock(&filter).tend();
        let was_unwell = std::mem::replace(&mut unwell, true);
        match tended {
            Ok(Tended::InForce) => unwell = false,
            Ok(Tended::AttachedAnew) => {
                unwell = false;
                warn!("the filter was not in force on every interface, and was attached anew");
            }
            Ok(Tended::Unloaded) if was_unwell => {}
            Ok(Tended::Unloaded) => {
                error!("the filter was unloaded, nothing is filtered until this role is restarted");
            }
            Err(_) if was_unwell => {}
            Err(error) => error!(error = %chain(&error), "an interface is not filtered"),
        }
    }
}

/// The newest compiled table; a change that cannot be compiled leaves the old one.
fn compiled(
    config: &Arc<Config>,
    in_force: &watch::Receiver<Arc<InForce>>,
    tasks: &Tasks,
) -> Result<watch::Receiver<Arc<Table>>, StartError> {
    let mut in_force = in_force.clone();
    let now = in_force.borrow_and_update().clone();
    let (_, table) = usable(config, now)?;
    let (sender, receiver) = watch::channel(Arc::new(table));
    let config = Arc::clone(config);
    tasks.spawn(async move {
        while in_force.changed().await.is_ok() {
            let now = in_force.borrow_and_update().clone();
            match compile(&config, &now) {
                Ok(table) => {
                    sender.send_replace(Arc::new(table));
                }
                Err(error) => error!(error = %chain(&error), "ranges not usable, the old stay"),
            }
        }
    });
    Ok(receiver)
}

/// The ranges in force with their table; the baseline's, if those do not fit with the rules.
fn usable(config: &Config, in_force: Arc<InForce>) -> Result<(Arc<InForce>, Table), StartError> {
    match compile(config, &in_force) {
        Ok(table) => Ok((in_force, table)),
        Err(error) => {
            error!(error = %chain(&error), "snapshot not usable, the embedded baseline protects");
            let baseline = InForce::baseline(&config.ranges.limits)?;
            let table = compile(config, &baseline)?;
            Ok((Arc::new(baseline), table))
        }
    }
}

fn compile(config: &Config, in_force: &InForce) -> Result<Table, StartError> {
    let rules = config.ranges.rules(in_force.known.set());
    Ok(Table::compile(&rules)?)
}

/// Looks at everything that the configuration names for these roles, and changes nothing.
pub(super) fn examine(
    config: &Config,
    roles: &[Role],
    metrics: &Metrics,
) -> Result<Option<Policies>, StartError> {
    let mut policies = None;
    for role in roles {
        match (role, &config.filter, &config.gate) {
            (Role::Filter, Some(filter), _) => {
                xdp::check_interfaces(filter)?;
                xdp::check_bpffs(&config.paths.bpf)?;
            }
            (Role::Gate, _, Some(gate)) => {
                let clock: Arc<dyn TimeProvider> = Arc::new(DefaultTimeProvider);
                policies = Some(crate::gate::load(gate, &clock, metrics)?);
            }
            (Role::Ranges, _, _) => {
                for Located { value, place } in &config.ranges.sources {
                    feed::check(value).map_err(|error| place.error(chain(&error)))?;
                }
            }
            (Role::Filter | Role::Gate, _, _) => {}
        }
    }
    // Rules that do not fit even with the baseline must be known before anything is attached.
    let baseline = InForce::baseline(&config.ranges.limits)?;
    compile(config, &baseline)?;
    Ok(policies)
}

fn warn_of_weaknesses(config: &Config) {
    if config.ranges.limits.documentation == Documentation::Accept {
        warn!("documentation ranges are accepted: this is a test bed, not a host to protect");
    }
    if let (Some(filter), Some(gate)) = (&config.filter, &config.gate) {
        let ports = gate.listen.iter().map(SocketAddr::port);
        for port in ports.filter(|port| !filter.ports.contains(port)) {
            warn!(
                port,
                "the gate listens on a port that is not in `filter.ports`"
            );
        }
    }
}

fn check_bind_capability(listen: &[SocketAddr]) -> Result<(), StartError> {
    // Namespaces and hosts may have moved the border, ip-sysctl.
    let border = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    let border = border.ok().and_then(|text| text.trim().parse().ok());
    let border: u16 = border.unwrap_or(1024);
    let privileged = listen.iter().find(|address| address.port() < border);
    let held = rustix::thread::capabilities(None).map_err(|errno| XdpError::Capabilities {
        source: errno.into(),
    })?;
    match privileged {
        Some(address) if !held.effective.contains(CapabilitySet::NET_BIND_SERVICE) => {
            Err(StartError::BindCapability { address: *address })
        }
        Some(_) | None => Ok(()),
    }
}

/// How often the filter is looked after.
const TEND: Duration = Duration::from_secs(1);
