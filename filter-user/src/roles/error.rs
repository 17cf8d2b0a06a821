//! What keeps a role from starting, and the exit code for it.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use nix::unistd::geteuid;

use crate::config::{ConfigError, LoadError};
use crate::host::sandbox::ConfineError;
use crate::ranges::TableFull;
use crate::report::{EX_CONFIG, EX_NOPERM, EX_SOFTWARE, EX_TEMPFAIL, EX_USAGE};
use crate::role::Role;
use crate::snapshot::SnapshotError;
use crate::xdp::XdpError;

/// What kept a role from starting.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration, or a file that it names, cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The configuration file cannot be read or used.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The configuration has no section for the role.
    #[error("the configuration has no [{}] section, so there is nothing to run", role.label())]
    NotDescribed {
        /// The role.
        role: Role,
    },
    /// The ranges and rules do not fit.
    #[error(transparent)]
    Table(#[from] TableFull),
    /// The filter cannot be put into the kernel.
    #[error(transparent)]
    Xdp(#[from] XdpError),
    /// Neither snapshot nor baseline can be used, or the snapshot cannot be watched.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A directory cannot be made, or written to.
    #[error(
        "{} cannot be made or written by the user {}; `systemd-tmpfiles --create pullgate.conf` makes \
         the package's directories, for others see [paths]",
        path.display(), geteuid()
    )]
    Directory {
        /// The directory, or a file in it.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A status socket cannot be bound.
    #[error("the status socket {} cannot be used", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A status socket is another user's.
    #[error(
        "status socket {} is another user's; run as root, or as the user of that role",
        path.display()
    )]
    SocketForbidden {
        /// The socket.
        path: PathBuf,
    },
    /// A listening socket cannot be bound.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// None of the addresses can be listened on, for want of IPv6.
    #[error(
        "cannot listen on {address}: this kernel has no IPv6 (`ipv6.disable=1`); put an IPv4 address \
         into `gate.listen`, such as \"0.0.0.0:443\""
    )]
    NoIpv6 {
        /// The first address.
        address: SocketAddr,
    },
    /// A listening socket that was handed over cannot be used.
    #[error("descriptor {descriptor} was handed over to listen on, but cannot be used")]
    ListenFd {
        /// Its number.
        descriptor: i32,
        /// Why not.
        source: io::Error,
    },
    /// The threads of the process, or of the gate, cannot be started.
    #[error("threads cannot be started")]
    Workers {
        /// Why not.
        source: io::Error,
    },
    /// The gate may not bind a port below 1024.
    #[error(
        "CAP_NET_BIND_SERVICE is missing, which listening on {address} needs; run as root, or \
         give the service that capability"
    )]
    BindCapability {
        /// The address.
        address: SocketAddr,
    },
    /// A part of the process that should live as long as it does has ended; the log says why.
    #[error("a part of this process has failed")]
    TaskEnded,
    /// A role in a process of its own has ended; it has written why.
    #[error("{} has ended: {status}", role.label())]
    RoleEnded {
        /// The role.
        role: Role,
        /// How its process ended.
        status: ExitStatus,
    },
    /// A role cannot be started in a process of its own.
    #[error("{} cannot be started in a process of its own", role.label())]
    Child {
        /// The role.
        role: Role,
        /// Why not.
        source: io::Error,
    },
    /// A service manager has handed over sockets, or watches, and there are several processes.
    #[error(
        "each role has a user and a process of its own here, which handed-over sockets and a watchdog \
         cannot be shared among; start each with `--only`, from a unit of its own"
    )]
    OneProcessExpected,
    /// The filter was on trial, and nobody confirmed it.
    #[error(
        "not confirmed in time, so what was in force before is so again; \
         is this host still reachable? then run it without `--confirm`"
    )]
    NotConfirmed,
    /// The filter was on trial, and was stopped before anybody confirmed it.
    #[error("stopped before it was confirmed, so what was in force before is so again")]
    StoppedOnTrial,
    /// A trial is asked for, but no filter.
    #[error("`--confirm` puts a filter on trial, and this would run none")]
    TrialWithoutFilter,
    /// Enforcement would cut the operator's own connection.
    #[error(
        "your own connection from {peer} to port {port} would be cut; put its source into \
         `ranges.allow`, take port {port} out of `filter.ports`, or say `--yes`"
    )]
    OwnConnection {
        /// The operator's end.
        peer: SocketAddr,
        /// The protected port.
        port: u16,
    },
    /// The process cannot be confined.
    #[error(
        "this process cannot be confined; `--unconfined` runs it with all the power that it was given"
    )]
    Confine(#[from] ConfineError),
    /// A new configuration needs what a confined process gave up.
    #[error(
        "{what} is out of reach of this process, which gave up what it did not need at its start; \
         restart it"
    )]
    OutOfReach {
        /// What is lacking.
        what: String,
    },
    /// Signals cannot be received.
    #[error("signals")]
    Signals {
        /// Why not.
        source: io::Error,
    },
}

impl StartError {
    /// What is wrong with a status socket.
    pub(super) fn socket(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        let is_forbidden = source.kind() == io::ErrorKind::PermissionDenied;
        match (is_forbidden, path.exists()) {
            (true, true) => Self::SocketForbidden { path },
            (true, false) => Self::Directory { path, source },
            (false, _) => Self::Socket { path, source },
        }
    }

    /// The exit code that a service manager and a script can tell apart: sysexits.h.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Load(error) => error.exit_code(),
            Self::RoleEnded { status, .. } => {
                let code = status.code().and_then(|code| u8::try_from(code).ok());
                code.filter(|code| *code != 0).unwrap_or(EX_SOFTWARE)
            }
            Self::Config(_)
            | Self::OwnConnection { .. }
            | Self::NotDescribed { .. }
            | Self::ListenFd { .. }
            | Self::NoIpv6 { .. }
            | Self::Table(_)
            | Self::Directory { .. } => EX_CONFIG,
            Self::BindCapability { .. } | Self::SocketForbidden { .. } => EX_NOPERM,
            Self::NotConfirmed | Self::StoppedOnTrial => EX_TEMPFAIL,
            Self::TrialWithoutFilter | Self::OneProcessExpected => EX_USAGE,
            Self::Xdp(error) => error.exit_code(),
            Self::Snapshot(error) => error.exit_code(),
            Self::Socket { .. }
            | Self::Child { .. }
            | Self::Confine(_)
            | Self::OutOfReach { .. }
            | Self::Bind { .. }
            | Self::Workers { .. }
            | Self::TaskEnded
            | Self::Signals { .. } => EX_SOFTWARE,
        }
    }
}
