//! What keeps a role from starting or from being reloaded, and the exit code for it.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process;

use nix::errno::Errno;
use rustix::process::geteuid;

use crate::config::{ConfigError, LoadError};
use crate::host::sandbox::ConfineError;
use crate::report::{EX_CONFIG, EX_NOPERM, EX_SOFTWARE, EX_TEMPFAIL, EX_USAGE, ExitStatus};
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
        path.display(), geteuid().as_raw()
    )]
    Directory {
        /// The directory, or a file in it.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A socket of the role cannot be bound.
    #[error("the socket {} cannot be used", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A socket of the role is another user's.
    #[error(
        "socket {} is another user's; run as root, or as the user of that role",
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
    /// Another process listens there.
    #[error("cannot listen on {address}, where another process listens; `pullgate check` names it")]
    PortTaken {
        /// The address.
        address: SocketAddr,
        /// What the kernel says.
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
    /// The way back for connections in clients' names cannot be made.
    #[error(
        "the rules and routes of `gate.client_address = \"transparent\"` cannot be added or removed"
    )]
    ReturnPath {
        /// Why not.
        source: io::Error,
    },
    /// The gate may not open connections in another's name.
    #[error(
        "CAP_NET_RAW is missing, which `gate.client_address = \"transparent\"` needs; run as root, or copy \
         /usr/share/doc/pullgate/steering/transparent.conf to \
         /etc/systemd/system/pullgate-gate.service.d/"
    )]
    TransparentCapability,
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
        status: process::ExitStatus,
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
    /// The filter was on trial, and was not confirmed.
    #[error(
        "not confirmed in time, so what was active before is so again; \
         if this host was reachable, run it again with a longer time, and `pullgate confirm` within it"
    )]
    NotConfirmed,
    /// The filter was on trial, and was stopped before it was confirmed.
    #[error("stopped before it was confirmed, so what was active before is so again")]
    StoppedOnTrial,
    /// A trial is asked for, but no filter.
    #[error("`--confirm` puts a filter on trial, and this would run none")]
    TrialWithoutFilter,
    /// Enforcement would drop the operator's own connection.
    #[error(
        "your own connection from {peer} to port {port} would be dropped; put its source into \
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
    /// Signals cannot be received.
    #[error("signals cannot be received")]
    Signals {
        /// Why not.
        source: io::Error,
    },
}

impl StartError {
    /// Why signals cannot be received.
    pub(super) fn signals(errno: Errno) -> Self {
        Self::Signals {
            source: errno.into(),
        }
    }

    /// What is wrong with a socket of a role.
    pub(super) fn socket(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        let is_forbidden = source.kind() == io::ErrorKind::PermissionDenied;
        match (is_forbidden, path.exists()) {
            (true, true) => Self::SocketForbidden { path },
            (true, false) => Self::Directory { path, source },
            (false, _) => Self::Socket { path, source },
        }
    }
}

impl ExitStatus for StartError {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Load(error) => error.exit_status(),
            Self::Config(error) => error.exit_status(),
            Self::RoleEnded { status, .. } => {
                let code = status.code().and_then(|code| u8::try_from(code).ok());
                code.filter(|code| *code != 0).unwrap_or(EX_SOFTWARE)
            }
            Self::Directory { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                EX_NOPERM
            }
            Self::OwnConnection { .. }
            | Self::NotDescribed { .. }
            | Self::ListenFd { .. }
            | Self::NoIpv6 { .. }
            | Self::Directory { .. } => EX_CONFIG,
            Self::BindCapability { .. }
            | Self::TransparentCapability
            | Self::SocketForbidden { .. } => EX_NOPERM,
            Self::NotConfirmed | Self::StoppedOnTrial => EX_TEMPFAIL,
            Self::TrialWithoutFilter | Self::OneProcessExpected => EX_USAGE,
            Self::Xdp(error) => error.exit_status(),
            Self::Snapshot(error) => error.exit_status(),
            Self::Socket { .. }
            | Self::Child { .. }
            | Self::Confine(_)
            | Self::Bind { .. }
            | Self::PortTaken { .. }
            | Self::Workers { .. }
            | Self::TaskEnded
            | Self::ReturnPath { .. }
            | Self::Signals { .. } => EX_SOFTWARE,
        }
    }
}

/// Why a changed configuration is not used, or not all of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReloadError {
    /// The configuration file cannot be read or used.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A file that it names cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It has no section any more for a role that runs.
    #[error("the configuration has no [{}] section any more; stop that role instead", role.label())]
    NotDescribed {
        /// The role.
        role: Role,
    },
    /// It needs what a confined process gave up.
    #[error(
        "{what} is out of reach of this process, which gave up what it did not need at its start; \
         restart it"
    )]
    OutOfReach {
        /// What is lacking.
        what: String,
    },
    /// The active ranges cannot be used by its rules.
    #[error(transparent)]
    Ranges(#[from] SnapshotError),
    /// The kernel does not take it.
    #[error(transparent)]
    Xdp(#[from] XdpError),
    /// The rest of it is used, and some hosts are not served by it.
    #[error("{hosts}; the rest is active")]
    HostsKept {
        /// Which, how they are served, and why.
        hosts: String,
    },
    /// The ranges cannot be compiled by its rules.
    #[error(
        "peers are still judged by the ranges and rules of before; `pullgate status` shows why"
    )]
    RangesKept,
    /// The role is about to end.
    #[error("this role is about to end")]
    Ending,
    /// It was not read to its end.
    #[error("the reload has failed; the log shows why")]
    Failed,
}

impl ExitStatus for ReloadError {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Load(error) => error.exit_status(),
            Self::Config(error) => error.exit_status(),
            Self::Ranges(error) => error.exit_status(),
            Self::Xdp(error) => error.exit_status(),
            Self::NotDescribed { .. } | Self::OutOfReach { .. } | Self::HostsKept { .. } => {
                EX_CONFIG
            }
            Self::Ending => EX_TEMPFAIL,
            Self::RangesKept | Self::Failed => EX_SOFTWARE,
        }
    }
}
