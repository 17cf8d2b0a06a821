//! Confinement: whatever started us, a role keeps only the power that it needs.
//!
//! ```text
//! Config + roles ─▶ Reach ─enter▶ Confined: capabilities, no new privileges, files and ports
//!                                           (landlock), system calls (seccomp), no dumps
//! ```
//! All of it holds for the thread that enters and for those that it starts, so it is entered before
//! there are others. Nothing of it can be given back.

mod access;
mod seccomp;
mod user;

use std::fmt::{self, Display, Formatter};
use std::io;
use std::path::PathBuf;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible as _, LandlockStatus,
    NetPort, PathBeneath, PathFd, Ruleset, RulesetAttr as _, RulesetCreated,
    RulesetCreatedAttr as _, RulesetError, Scope,
};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

pub use self::access::{Access, Ports};
pub use self::user::{become_user, hide_service_managers, show_pins_alone, user_of};
use crate::role::Role;

/// Proof that the process is confined, and how far this kernel goes.
#[derive(Clone, Debug)]
pub struct Confined {
    access: Access,
    /// What is left of what was given.
    held: CapabilitySet,
    /// Whether the user's number is 0.
    is_root: bool,
    /// The landlock ABI that is active; 0 where the kernel has none.
    landlock: u8,
}

impl Confined {
    /// Gives up listening, in every thread: what is bound by now is heard, and nothing else will be.
    ///
    /// Landlock has no say in a listen(2) without a bind(2), for which the kernel picks the port.
    ///
    /// # Errors
    ///
    /// Returns what the kernel refuses.
    pub fn refuse_listening(&self) -> Result<(), ConfineError> {
        seccomp::refuse_listening().map_err(ConfineError::Calls)
    }

    /// What is out of reach of this process, and in a new one's that goes by `wanted`.
    #[must_use]
    pub fn lacks(&self, wanted: &Access) -> Vec<String> {
        self.access.lacks(wanted)
    }

    /// Whether the user's number is 0, which can regain privileges through the service manager and buses.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.is_root
    }

    /// The landlock ABI that is active, if it does not confine files and TCP ports in full.
    #[must_use]
    pub fn lacking_landlock(&self) -> Option<u8> {
        (self.landlock < NETWORK_ABI).then_some(self.landlock)
    }
}

impl Display for Confined {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let kept: Vec<_> = self.held.iter_names().map(|(name, _)| name).collect();
        write!(
            f,
            "capabilities {}, landlock ABI {}, seccomp, no new privileges, no dumps",
            if kept.is_empty() {
                "none".to_owned()
            } else {
                kept.join(" ")
            },
            self.landlock
        )
    }
}

/// Why the process is not confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// The kernel refuses to take power from us.
    #[error("privileges cannot be dropped")]
    Privileges(#[source] Errno),
    /// The kernel refuses to make us another user.
    #[error("root cannot become the user {user}, which the role's directory belongs to")]
    User {
        /// The user's number.
        user: u32,
        /// Why not.
        source: io::Error,
    },
    /// The kernel refuses a mount namespace.
    #[error(
        "the service manager and the bus of this host cannot be hidden from the role, which needs \
         CAP_SYS_ADMIN"
    )]
    Namespace(#[source] io::Error),
    /// The pins cannot be given to the filter's user.
    #[error("the pins in {} cannot be given to the filter's user", path.display())]
    Pins {
        /// Their directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel refuses to confine files or ports.
    #[error("files and ports cannot be confined")]
    Files(#[source] RulesetError),
    /// The kernel refuses to confine system calls.
    #[error("system calls cannot be confined")]
    Calls(#[source] seccompiler::Error),
}

/// Gives up the capabilities that the roles do not need, and the way to new ones; `transparent`, if the gate
/// opens connections in its clients' names.
///
/// # Errors
///
/// Returns what the kernel refuses.
pub fn drop_privileges(roles: &[Role], transparent: bool) -> Result<(), ConfineError> {
    keep_only(access::capabilities(roles, transparent)).map_err(ConfineError::Privileges)
}

/// Gives up all capabilities but the one to signal processes of other users, and the way to new ones.
///
/// # Errors
///
/// Returns what the kernel refuses.
pub fn keep_signalling() -> Result<(), ConfineError> {
    keep_only(CapabilitySet::KILL).map_err(ConfineError::Privileges)
}

/// Gives up whatever is not within reach.
///
/// # Errors
///
/// Returns what the kernel refuses. A kernel without landlock is no error, see
/// [`Confined::lacking_landlock`].
pub fn enter(access: Access) -> Result<Confined, ConfineError> {
    drop_privileges(&access.roles, access.transparent)?;
    let held = capabilities(None)
        .map_err(ConfineError::Privileges)?
        .permitted;
    let landlock = confine_files(&access).map_err(ConfineError::Files)?;
    // Last: the others need calls that it refuses.
    seccomp::confine(&access).map_err(ConfineError::Calls)?;
    Ok(Confined {
        access,
        held,
        is_root: rustix::process::geteuid().is_root(),
        landlock,
    })
}

fn keep_only(kept: CapabilitySet) -> Result<(), Errno> {
    // A core dump, and a debugger of the same user's, would tell the keys.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    let held = capabilities(None)?;
    for capability in CapabilitySet::all() - kept {
        match remove_capability_from_bounding_set(capability) {
            // Who may not change the bounds has no need to: nothing is gained from them any more.
            Err(Errno::PERM | Errno::INVAL) | Ok(()) => {}
            Err(errno) => return Err(errno),
        }
    }
    let kept = held.permitted & kept;
    let wanted = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    // A service manager that has granted no more may not let us ask either. What was to be inherited
    // (by ambient capabilities) is lost: no program is started, and none would gain by it.
    if (held.effective, held.permitted) == (kept, kept) {
        return Ok(());
    }
    set_capabilities(None, wanted)
}

fn confine_files(access: &Access) -> Result<u8, RulesetError> {
    let scope = if access.abstract_sockets {
        BitFlags::from(Scope::Signal)
    } else {
        Scope::Signal | Scope::AbstractUnixSocket
    };
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::BindTcp)?
        .scope(scope)?;
    if matches!(access.connect, Ports::These(_)) {
        ruleset = ruleset.handle_access(AccessNet::ConnectTcp)?;
    }
    let mut ruleset = ruleset.create()?;
    // Programs are mapped, and none is started.
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = AccessFs::from_all(KNOWN) & !AccessFs::Execute;
    for path in &access.read {
        ruleset = allow(ruleset, path, read)?;
    }
    for path in &access.write {
        ruleset = allow(ruleset, path, write)?;
    }
    for port in &access.bind {
        ruleset = ruleset.add_rule(NetPort::new(*port, AccessNet::BindTcp))?;
    }
    if let Ports::These(ports) = &access.connect {
        for port in ports {
            ruleset = ruleset.add_rule(NetPort::new(*port, AccessNet::ConnectTcp))?;
        }
    }
    Ok(match ruleset.restrict_self()?.landlock {
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => 0,
        LandlockStatus::Available { effective_abi, .. } => effective_abi as u8,
    })
}

/// What does not exist is not within reach.
fn allow(
    ruleset: RulesetCreated,
    path: &std::path::Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    let Ok(descriptor) = PathFd::new(path) else {
        return Ok(ruleset);
    };
    let access = if path.is_dir() {
        access
    } else {
        access & AccessFs::from_file(KNOWN)
    };
    ruleset.add_rule(PathBeneath::new(descriptor, access))
}

/// The newest landlock that is used: from ABI 6 it confines signals. Of newer ones, connections to
/// UNIX sockets would have to be named.
const KNOWN: ABI = ABI::V6;
/// The first landlock that confines TCP ports.
pub const NETWORK_ABI: u8 = 4;
