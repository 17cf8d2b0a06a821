//! The composition root: configuration in, running roles out. Nothing imports it but `commands`.
//!
//! A start has two halves. The first looks and changes nothing: interfaces, capabilities, certificates,
//! snapshot. Only when all of that is usable is the process confined, are sockets bound and packets
//! dropped, the filter first; see `running` for the states of a role, and `children` for where roles have
//! processes of their own.

pub mod access;
mod children;
mod error;
mod filter;
pub(crate) mod findings;
mod gate;
mod preflight;
mod ranges;
mod reporter;
mod role_report;
mod running;
mod signals;
mod sockets;
mod supervisor;
mod tasks;

use std::fs::DirBuilder;
use std::os::fd::RawFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::{Gid, getgroups, setgroups};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tracing::{debug, info, warn};

pub use self::error::{ReloadError, StartError};
pub(crate) use self::gate::exposures;
use self::preflight::Ancestors;
pub use self::preflight::OwnConnection;
use self::reporter::Reporter;
use self::running::{Prepared, StartContext};
use self::signals::Blocked;
use self::sockets::RoleSockets;
use self::supervisor::{Parts, Supervisor};
use self::tasks::Tasks;
use crate::config::{Config, ConfigError, LoadError, Paths, RangesSettings, load};
use crate::control::client::runs;
use crate::gate::Loaded;
use crate::host::accounts::Account;
use crate::host::sandbox::{self, Confined};
use crate::host::socket::BoundPath;
use crate::host::systemd;
use crate::observe::log::LogFormat;
use crate::observe::{Finding, Metrics};
use crate::role::Role;
use crate::snapshot::{self, Follower};
use crate::xdp;

/// How to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// One role only.
    pub only: Option<Role>,
    /// How long the filter waits to be confirmed, if it does.
    pub trial: Option<Duration>,
    /// What to do if the operator's own connection would be dropped.
    pub own_connection: OwnConnection,
    /// Listening sockets that were handed over, by their numbers.
    pub listen_fds: Vec<RawFd>,
    /// What becomes of the power that it was given.
    pub power: Power,
    /// The process that runs several roles, of which this one is to run one.
    pub child_of: Option<u32>,
    /// How logs are written, if it was asked for.
    pub log_format: Option<LogFormat>,
}

/// What becomes of the power that a process was given.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Power {
    /// What the roles do not need is given up.
    AsNeeded,
    /// It stays as it is.
    AsGiven,
}

/// Runs roles until SIGTERM or SIGINT, then lets connections drain.
///
/// # Errors
///
/// Returns what kept a role from starting, before anything on the host but the directories for
/// state, sockets and pins has changed; or that a role has failed while it ran.
pub fn run(file: &Path, options: &Options) -> Result<(), StartError> {
    let blocked = Blocked::block().map_err(StartError::signals)?;
    let mut config = load(file)?;
    let file = std::path::absolute(file).map_err(|source| LoadError::Read {
        path: file.to_owned(),
        source,
    })?;
    let mut roles = named(&config, options.only)?;
    if options.trial.is_some() && options.only.is_none() {
        leave_running(&config.boot.paths, &mut roles);
    }
    if roles.contains(&Role::Filter) {
        xdp::raise_memory_limit();
    }
    // Others' processes cannot be looked at any more once we are confined.
    let ancestors = Ancestors::look();
    if options.power == Power::AsNeeded {
        let paths = &config.boot.paths;
        let users = roles
            .iter()
            .map(|role| sandbox::user_of(*role, &paths.home(*role)));
        let users: Vec<_> = users.collect();
        match (&roles[..], &users[..]) {
            ([role], [Some(user)]) => become_user(*role, user, paths)?,
            // One process has one user.
            (_, users) if users.iter().any(Option::is_some) => {
                return children::run(&file, &config, &roles, options, blocked);
            }
            (_, _) => join_groups(&shared_groups(paths)),
        }
        // First of all, so that the start can read no more than a reload will.
        sandbox::drop_privileges(&roles, access::is_transparent(&config))?;
        config = load(&file)?;
    }
    if options
        .child_of
        .is_some_and(|parent| !children::end_with(parent))
    {
        return Ok(());
    }
    let prepared = prepare(&config, &roles, options)?;
    create_directories(&config.boot.paths, &roles)?;
    // Threads inherit it, so there must not be any yet.
    let confined = match options.power {
        Power::AsNeeded => Some(confine(&file, &config, &roles)?),
        Power::AsGiven => None,
    };
    let runtime = Runtime::new().map_err(|source| StartError::Workers { source })?;
    // What is started needs it, and blocks: it is no task of its own.
    let entered = runtime.enter();
    let signals = blocked.handle();
    let signals = signals.map_err(|source| StartError::Signals { source })?;
    let tasks = Tasks::default();
    let mut paths = Vec::new();
    let process = Process {
        file: &file,
        config,
        confined,
        ancestors: &ancestors,
        options,
    };
    let outcome = process
        .start(prepared, &mut paths, &tasks)
        .and_then(|supervisor| runtime.block_on(supervisor.run(signals, options, &tasks)));
    drop(paths);
    drop(entered);
    // A name that is being looked up is not waited for.
    runtime.shutdown_background();
    outcome
}

/// What this process is, once it has given up the rest.
struct Process<'a> {
    file: &'a Path,
    config: Config,
    confined: Option<Confined>,
    ancestors: &'a Ancestors,
    options: &'a Options,
}

impl Process<'_> {
    /// Binds, attaches and serves.
    fn start(
        self,
        prepared: Vec<Prepared>,
        paths: &mut Vec<BoundPath>,
        tasks: &Tasks,
    ) -> Result<Arc<Supervisor>, StartError> {
        let Self {
            file,
            config,
            confined,
            ancestors,
            options,
        } = self;
        let boot = Arc::clone(&config.boot);
        let config = watch::Sender::new(Arc::new(config));
        // The sockets first: a second instance must not get any further.
        let mut sockets = Vec::new();
        for role in &prepared {
            sockets.push(RoleSockets::bind(role.role(), &boot, paths)?);
        }
        let mut bound = Vec::new();
        for role in prepared {
            bound.push(role.bind(&boot)?);
        }
        if let Some(confined) = &confined {
            confined.refuse_listening()?;
        }
        let follower = Follower::new(boot.paths.snapshot(), config.subscribe())?;
        let metrics = Metrics::default();
        let with = StartContext {
            config: config.subscribe(),
            active: follower.subscribe(),
            own: (options.own_connection, ancestors),
            metrics: &metrics,
            tasks,
        };
        let mut roles = Vec::new();
        for role in bound {
            roles.push(role.start(&with)?);
        }
        let parts = Parts {
            file: file.to_owned(),
            active: follower.subscribe(),
            snapshot_refused: follower.refused(),
            followed: follower.followed(),
            config,
            roles: roles.clone(),
            confined,
            metrics: metrics.clone(),
        };
        let supervisor = Supervisor::start(parts, tasks);
        for (of_role, role) in sockets.into_iter().zip(roles) {
            let disabled = of_role.metrics_disabled();
            let reporter = Reporter::new(role, Arc::clone(&supervisor), disabled);
            of_role.serve(reporter, tasks);
        }
        tasks.spawn(follower.run());
        Ok(supervisor)
    }
}

/// Looks at everything that the roles need, and logs what could be better.
fn prepare(
    config: &Config,
    roles: &[Role],
    options: &Options,
) -> Result<Vec<Prepared>, StartError> {
    if options.trial.is_some() && !roles.contains(&Role::Filter) {
        return Err(StartError::TrialWithoutFilter);
    }
    check_ranges(&config.live.ranges)?;
    let found = findings::of_roles(config, roles);
    found.iter().for_each(Finding::log);
    let prepared = roles
        .iter()
        .map(|role| Prepared::new(*role, config, options.trial, &options.listen_fds));
    prepared.collect()
}

/// Ranges and rules that do not fit even with the baseline must be known before anything is attached.
fn check_ranges(ranges: &RangesSettings) -> Result<(), StartError> {
    let baseline = snapshot::baseline(ranges)?;
    snapshot::compile(ranges, baseline)?;
    Ok(())
}

/// Looks at everything that the configuration names for these roles, and changes nothing.
pub(crate) fn examine(config: &Config, roles: &[Role]) -> Result<Option<Loaded>, StartError> {
    let mut loaded = None;
    for role in roles {
        match role {
            Role::Filter => {
                filter::examine(config)?;
            }
            Role::Ranges => {}
            Role::Gate => loaded = Some(gate::examine(config)?),
        }
    }
    check_ranges(&config.live.ranges)?;
    Ok(loaded)
}

/// Looks at the files that sources of ranges name.
pub(crate) fn examine_sources(ranges: &RangesSettings) -> Result<(), ConfigError> {
    ranges::examine(ranges)
}

/// The roles that are meant.
pub(crate) fn named(config: &Config, only: Option<Role>) -> Result<Vec<Role>, StartError> {
    let described = config.roles();
    match only {
        Some(role) if !described.contains(&role) => Err(StartError::NotDescribed { role }),
        Some(role) => Ok(vec![role]),
        None => Ok(described),
    }
}

/// A trial is the filter's: it leaves alone what runs already of the other roles.
fn leave_running(paths: &Paths, roles: &mut Vec<Role>) {
    roles.retain(|role| {
        let is_running = *role != Role::Filter && matches!(runs(paths, *role), Ok(true));
        if is_running {
            info!(
                id = "role-runs-already",
                role = role.label(),
                "runs already and is not started again"
            );
        }
        !is_running
    });
}

/// Root becomes the user of a role, as the package's unit would have started it.
fn become_user(role: Role, user: &Account, paths: &Paths) -> Result<(), StartError> {
    sandbox::hide_service_managers()?;
    // Without a BPF file system the start ends with an error of its own.
    if role == Role::Filter && xdp::check_bpffs(&paths.bpf).is_ok() {
        sandbox::show_pins_alone(&paths.bpf, user)?;
    }
    Ok(sandbox::become_user(user)?)
}

/// The groups of the directories that the roles share.
pub(crate) fn shared_groups(paths: &Paths) -> Vec<u32> {
    let homes = Role::ALL.map(|role| paths.home(role));
    let shared = homes.iter().chain([&paths.state]).map(std::fs::metadata);
    shared.flatten().map(|found| found.gid()).collect()
}

/// Lets root read what these groups may: confined, it reads no more than others may.
pub(crate) fn join_groups(more: &[u32]) {
    let mut groups: Vec<Gid> = getgroups().unwrap_or_default();
    groups.extend(more.iter().copied().map(Gid::from_raw));
    match setgroups(&groups) {
        // Another user is in its own groups.
        Ok(()) | Err(Errno::EPERM) => {}
        Err(error) => warn!(
            id = "groups-not-joined",
            %error,
            "the groups of the directories cannot be joined"
        ),
    }
}

/// Makes the directories for state and sockets.
fn create_directories(paths: &Paths, roles: &[Role]) -> Result<(), StartError> {
    for path in [&paths.state, &paths.run] {
        std::fs::create_dir_all(path).map_err(|source| StartError::Directory {
            path: path.clone(),
            source,
        })?;
    }
    for role in roles {
        // Its group may look, and no other user may create anything there.
        let path = paths.home(*role);
        let created = DirBuilder::new().recursive(true).mode(0o750).create(&path);
        created.map_err(|source| StartError::Directory { path, source })?;
    }
    if !roles.contains(&Role::Filter) {
        return Ok(());
    }
    // Else all of the BPF file system would have to be within reach. Why it cannot be made is reported
    // where it is missed.
    if let Err(error) = xdp::prepare(&paths.bpf) {
        debug!(
            id = "pins-not-prepared",
            %error,
            "the directory of the pins is not there yet"
        );
    }
    // No other role reads or writes it. Without it uplinks are not remembered, and no more.
    let path = &paths.filter;
    let created = DirBuilder::new().recursive(true).mode(0o700).create(path);
    if let Err(error) = created {
        warn!(
            id = "uplinks-not-remembered",
            %error,
            path = %path.display(),
            "uplinks are not remembered across boots"
        );
    }
    Ok(())
}

/// Gives up what the roles do not need; the directories are there by now.
fn confine(file: &Path, config: &Config, roles: &[Role]) -> Result<Confined, StartError> {
    let reach = access::reach(file, config, roles).with_abstract_sockets(systemd::is_abstract());
    Ok(sandbox::enter(reach)?)
}

/// How long it may take to end, besides what connections get.
const FAREWELL: Duration = Duration::from_secs(15);
/// For a part that is busy, when it is asked whether it goes on; who asks by HTTP waits for longer.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(2);
