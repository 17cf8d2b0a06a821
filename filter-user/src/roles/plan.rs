//! The plan: what is to run, examined before the host is touched, and then started.

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use nix::errno::Errno;
use rustix::thread::CapabilitySet;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tracing::{debug, error, warn};

use super::access;
use super::error::StartError;
use super::filter::FilterRole;
use super::findings::all_weaknesses;
use super::gate::{Bound, GateRole, sentence, stamps};
use super::preflight::Ancestors;
use super::rules::{compile, compiled};
use super::tasks::Tasks;
use super::view::View;
use super::{Options, Running, Sockets};
use crate::config::{Config, ConfigError, Located, Ranges, Target};
use crate::control::{client, server};
use crate::feed;
use crate::gate::{Gate, Loaded};
use crate::host::file::{self, FileId};
use crate::host::sandbox::{self, Confined};
use crate::host::systemd::Inherited;
use crate::host::{socket, systemd};
use crate::observe::{Finding, Metrics, http};
use crate::ranges::ActiveRanges;
use crate::refresh::{Progress, Refresher};
use crate::report::chain;
use crate::role::Role;
use crate::snapshot::{self, Follower};
use crate::xdp::{self, Lifetime, XdpError};

/// Everything that can be known before the host is touched.
pub(super) struct Plan {
    config: watch::Sender<Arc<Config>>,
    roles: Vec<Role>,
    stay: Lifetime,
    metrics: Metrics,
    loaded: Option<(Loaded, Vec<Option<FileId>>)>,
    /// Listening sockets that were handed over.
    inherited: Vec<Inherited>,
    confined: Option<Confined>,
}

impl Plan {
    pub(super) fn new(
        config: Config,
        roles: Vec<Role>,
        options: &Options,
    ) -> Result<Self, StartError> {
        // What changes while it is read is read again.
        let read = config.gate.as_ref().map(stamps).unwrap_or_default();
        let loaded = examine(&config, &roles)?;
        // A host that cannot be served keeps no other down.
        if let Some(error) = loaded.as_ref().and_then(sentence) {
            error!(
                id = "hosts-not-served",
                error, "some hosts are not served until their files can be used"
            );
        }
        let loaded = loaded.map(|loaded| (loaded, read));
        let stay = match (options.trial, roles.contains(&Role::Filter)) {
            (Some(_), true) => Lifetime::OnTrial,
            (Some(_), false) => return Err(StartError::TrialWithoutFilter),
            (None, _) => Lifetime::Pinned,
        };
        if roles.contains(&Role::Filter) {
            xdp::check_capabilities()?;
        }
        let mut inherited = Vec::new();
        if let (Some(gate), true) = (&config.gate, roles.contains(&Role::Gate)) {
            inherited = systemd::inherited(&options.listen_fds)
                .map_err(|(descriptor, source)| StartError::ListenFd { descriptor, source })?;
            check_bind_capability(&gate.listen, &inherited)?;
        }
        all_weaknesses(&config, &roles)
            .iter()
            .for_each(Finding::log);
        if let (Some(gate), Some((loaded, _))) = (&config.gate, &loaded) {
            loaded.lints(gate).iter().for_each(Finding::log);
        }
        Ok(Self {
            config: watch::channel(Arc::new(config)).0,
            roles,
            stay,
            metrics: Metrics::default(),
            loaded,
            inherited,
            confined: None,
        })
    }

    /// Makes the directories for state and sockets.
    pub(super) fn create_directories(&self) -> Result<(), StartError> {
        let config = self.config.borrow();
        for path in [&config.paths.state, &config.paths.run] {
            std::fs::create_dir_all(path).map_err(|source| StartError::Directory {
                path: path.clone(),
                source,
            })?;
        }
        for role in &self.roles {
            // For its group to look, and for nobody to put anything there.
            let path = config.paths.home(*role);
            let created = DirBuilder::new().recursive(true).mode(0o750).create(&path);
            created.map_err(|source| StartError::Directory { path, source })?;
        }
        if self.roles.contains(&Role::Filter) {
            // Else all of the BPF file system would have to be within reach. Why it cannot be made is
            // said where it is missed.
            if let Err(error) = xdp::prepare(&config.paths.bpf) {
                debug!(
                    id = "pins-not-prepared",
                    %error,
                    "the directory of the pins is not there yet"
                );
            }
            let path = &config.paths.filter;
            // No other role reads or writes it. Without it uplinks are not remembered, and no more.
            let created = DirBuilder::new().recursive(true).mode(0o700).create(path);
            if let Err(error) = created {
                warn!(
                    id = "uplinks-not-remembered",
                    %error,
                    path = %path.display(),
                    "uplinks are not remembered across boots"
                );
            }
        }
        Ok(())
    }

    /// Gives up what the plan does not need; the directories are there by now.
    pub(super) fn confine(&mut self, file: &Path) -> Result<(), StartError> {
        let reach = access::reach(file, &self.config.borrow(), &self.roles)
            .with_abstract_sockets(systemd::is_abstract());
        self.confined = Some(sandbox::enter(reach)?);
        Ok(())
    }

    /// Binds, attaches and serves.
    pub(super) fn start(
        self,
        options: &Options,
        family: &Ancestors,
        tasks: &Tasks,
    ) -> Result<Running, StartError> {
        let config = &Arc::clone(&self.config.borrow());
        let (approvals, approved) = mpsc::channel(1);
        let mut approved = Some(approved);
        let mut running = Running::new(self.config, self.roles.clone(), approvals);
        running.confined = self.confined;
        // The sockets first: a second instance must not get any further.
        let listeners = bind_status(config, &self.roles, &mut running.sockets)?;
        let (mut asked, mut untold) = bind_metrics(config, &self.roles, &mut running.sockets);

        // A port that is taken must be known before anything is attached.
        let bound = match (&config.gate, &self.loaded) {
            (Some(gate), Some(_)) => GateRole::bind(gate, self.inherited)?,
            (_, _) => Bound::default(),
        };
        if let Some(confined) = &running.confined {
            confined.refuse_listening()?;
        }

        let follower = Follower::new(config.paths.snapshot(), running.config.subscribe())?;
        let in_force = follower.subscribe();
        let mut loaded = self.loaded.map(|(loaded, read)| (loaded, read, bound));
        for (role, listener) in listeners {
            let mut view = View::new(role, running.config.subscribe(), &self.metrics, &follower);
            view.confined.clone_from(&running.confined);
            view.reloads = Some(running.reloads.subscribe());
            view.untold = untold.remove(&role);
            match role {
                Role::Filter => {
                    let filter = FilterRole::start(
                        config,
                        in_force.clone(),
                        self.stay,
                        (options.own_connection, family),
                        &self.metrics,
                        tasks,
                    )?;
                    view.filter = Some(filter.clone());
                    running.filter = Some(filter);
                }
                Role::Ranges => {
                    let Some(approvals) = approved.take() else {
                        continue;
                    };
                    let active = ActiveRanges::clone(&in_force.borrow());
                    let progress = start_ranges(&running, active, approvals, &self.metrics, tasks);
                    running.refresh = Some(progress.clone());
                    view.progress = Some(progress);
                }
                Role::Gate => {
                    let Some((loaded, read, bound)) = loaded.take() else {
                        continue;
                    };
                    let followed = (running.config.subscribe(), in_force.clone());
                    let gate_role = start_gate(
                        config,
                        followed,
                        (loaded, read),
                        bound,
                        &self.metrics,
                        tasks,
                    )?;
                    let Some(gate_role) = gate_role else { continue };
                    view.gate = Some(gate_role.clone());
                    running.gate = Some(gate_role);
                }
            }
            let view = Arc::new(view);
            if let Some(asked) = asked.remove(&role) {
                tasks.spawn(asked.serve(Arc::clone(&view)));
            }
            tasks.spawn(server::serve(listener, move || view.status()));
        }
        tasks.spawn(follower.run());
        Ok(running)
    }
}

fn bind_status(
    config: &Config,
    roles: &[Role],
    sockets: &mut Sockets,
) -> Result<Vec<(Role, UnixListener)>, StartError> {
    let mut listeners = Vec::new();
    for role in roles {
        let path = config.paths.socket(*role);
        let listener = socket::bind(&path).map_err(|source| StartError::socket(&path, source))?;
        listeners.push((*role, listener));
        let ours = file::stamp(&path);
        sockets.0.push((path, ours));
    }
    Ok(listeners)
}

/// Starts to ask the sources, and returns what becomes of each.
fn start_ranges(
    running: &Running,
    active: ActiveRanges,
    approvals: mpsc::Receiver<Vec<String>>,
    metrics: &Metrics,
    tasks: &Tasks,
) -> watch::Receiver<Vec<Progress>> {
    let (progress, seen) = watch::channel(Vec::new());
    let refresher = Refresher {
        config: running.config.subscribe(),
        snapshot: running.config.borrow().paths.snapshot(),
        metrics: metrics.clone(),
        now: SystemTime::now,
        idle: Arc::new(client::idle_ranges),
        wake: Arc::clone(&running.wake),
        approvals,
        progress,
    };
    tasks.spawn(refresher.run(active));
    seen
}

/// Binds the metrics endpoint of each role that has one, or says why it is disabled: that keeps no host from
/// being protected.
fn bind_metrics(
    config: &Config,
    roles: &[Role],
    sockets: &mut Sockets,
) -> (BTreeMap<Role, http::Listener>, BTreeMap<Role, Finding>) {
    let (mut bound, mut disabled) = (BTreeMap::new(), BTreeMap::new());
    let metrics = config.metrics.iter();
    for (role, Located { value, place }) in metrics.filter(|(role, _)| roles.contains(role)) {
        let listener = match value {
            Target::Tcp(address) => http::Listener::tcp(*address),
            Target::Unix(path) => http::Listener::unix(path),
        };
        match listener {
            Ok(listener) => {
                bound.insert(*role, listener);
                if let Target::Unix(path) = value {
                    sockets.0.push((path.clone(), file::stamp(path)));
                }
            }
            Err(error) => {
                let finding = metrics_disabled(&error).at(place);
                finding.log();
                disabled.insert(*role, finding);
            }
        }
    }
    (bound, disabled)
}

/// Starts the gate, if the configuration describes one.
fn start_gate(
    config: &Config,
    (followed, active): (
        watch::Receiver<Arc<Config>>,
        watch::Receiver<Arc<ActiveRanges>>,
    ),
    (loaded, read): (Loaded, Vec<Option<FileId>>),
    bound: Bound,
    metrics: &Metrics,
    tasks: &Tasks,
) -> Result<Option<GateRole>, StartError> {
    let Some(gate) = &config.gate else {
        return Ok(None);
    };
    let table = compiled(followed.clone(), active.clone(), tasks)?;
    let broken = sentence(&loaded);
    let shared = Gate::new(gate, loaded, table, active, metrics.clone());
    let role = GateRole::start(followed, (shared, broken), read, bound, metrics, tasks)?;
    Ok(Some(role))
}

/// Looks at everything that the configuration names for these roles, and changes nothing.
pub(crate) fn examine(config: &Config, roles: &[Role]) -> Result<Option<Loaded>, StartError> {
    let mut loaded = None;
    for role in roles {
        match (role, &config.filter, &config.gate) {
            (Role::Filter, Some(filter), _) => {
                xdp::check_kinds(filter)?;
                xdp::check_bpffs(&config.paths.bpf)?;
            }
            (Role::Gate, _, Some(gate)) => loaded = Some(super::gate::load(gate, None)?),
            (Role::Ranges | Role::Filter | Role::Gate, _, _) => {}
        }
    }
    // Rules that do not fit even with the baseline must be known before anything is attached.
    let baseline = snapshot::baseline(&config.ranges)?;
    compile(config, &baseline)?;
    Ok(loaded)
}

/// Looks at the files that sources of ranges name, and asks nobody else.
///
/// A role starts without them: protection by the last known good list is better than none.
pub(crate) fn examine_sources(ranges: &Ranges) -> Result<(), ConfigError> {
    for Located { value, place } in &ranges.sources {
        for way in &value.ways {
            feed::check(way, &ranges.proxy)
                .map_err(|error| place.error(format_args!("{way}: {}", chain(&error))))?;
        }
    }
    Ok(())
}

/// Why metrics are not served, and what helps.
fn metrics_disabled(error: &io::Error) -> Finding {
    // systemd.exec(5), RestrictAddressFamilies=.
    let remedy = match error.raw_os_error() == Some(Errno::EAFNOSUPPORT as i32) {
        true => {
            "the service may open no such port; use a UNIX socket, or for the filter copy \
             /usr/share/doc/pullgate/monitoring/filter-metrics.conf to \
             /etc/systemd/system/pullgate-filter.service.d/"
        }
        false => "is the port free, or the socket's directory there and this role's to write?",
    };
    let text = format!("metrics endpoint disabled until restart ({error})");
    Finding::warning("metrics-disabled", text).remedy(remedy)
}

fn check_bind_capability(listen: &[SocketAddr], inherited: &[Inherited]) -> Result<(), StartError> {
    // Namespaces and hosts may have moved the border, ip-sysctl.
    let border = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    let border = border.ok().and_then(|text| text.trim().parse().ok());
    let border: u16 = border.unwrap_or(1024);
    let is_bound = |address: &SocketAddr| inherited.iter().any(|it| it.address == *address);
    let mut to_bind = listen.iter().filter(|address| !is_bound(address));
    let privileged = to_bind.find(|address| address.port() < border);
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
