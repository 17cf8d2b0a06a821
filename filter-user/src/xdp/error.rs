//! Why the filter could not be put into the kernel, or could not be changed.

use std::io::{self, ErrorKind};
use std::path::PathBuf;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;

use crate::host::kernel;
use crate::report::{EX_CONFIG, EX_NOPERM, EX_SOFTWARE, EX_USAGE, ExitStatus};

/// Why the filter could not be put into the kernel, or could not be changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum XdpError {
    /// This binary carries no XDP program.
    #[error(
        "this build of pullgate carries no XDP program, so it cannot filter; build it with \
         `cargo xtask build`"
    )]
    NoProgram,
    /// The process lacks a capability.
    #[error("{name} is missing; run as root, or give the service that capability")]
    Capability {
        /// The capability.
        name: &'static str,
    },
    /// The process's capabilities cannot be read.
    #[error("capabilities cannot be read")]
    Capabilities {
        /// Why not.
        source: io::Error,
    },
    /// The pin directory is not on a bpffs.
    #[error(
        "{} is not on a BPF file system, so the filter would vanish with this process; \
         `mount -t bpf bpf /sys/fs/bpf`, or set `paths.bpf`", path.display()
    )]
    NotBpffs {
        /// The directory.
        path: PathBuf,
    },
    /// The pins are another user's, and we are not root.
    #[error("{} is not this user's; run as root, or as the user of the filter role", path.display())]
    NotPermitted {
        /// The directory.
        path: PathBuf,
    },
    /// Another process holds the pins.
    #[error(
        "another pullgate filter runs with the pins in {}; stop it, or give this one another \
         `paths.bpf`",
        path.display()
    )]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// Something that is not ours is where our pins should be.
    #[error(
        "{} is not a directory that this user alone may open; find out who made it, and remove it",
        path.display()
    )]
    NotOurs {
        /// The directory.
        path: PathBuf,
    },
    /// The interface is filtered on a lower mode than the configuration allows.
    #[error(
        "`{interface}` is filtered by {mode}, which the configuration excludes; \
         `pullgate unload` first"
    )]
    Lower {
        /// The interface.
        interface: String,
        /// The mode.
        mode: &'static str,
    },
    /// A pin cannot be made, read or removed.
    #[error("pin {}", path.display())]
    Pin {
        /// The pin.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The object file lacks a map or the program.
    #[error("the XDP object has no `{name}`")]
    Missing {
        /// What is missing.
        name: &'static str,
    },
    /// The maps cannot be created.
    #[error("the XDP object cannot be loaded")]
    Object(#[source] Box<EbpfError>),
    /// The kernel's verifier refuses the program.
    #[error(
        "the verifier of Linux {} refuses the XDP program{}; the manual names the kernels that were \
         tried: run one of them, and report this with all that `PULLGATE_LOG=pullgate=debug` logs",
        kernel::release(),
        quoted(words)
    )]
    Refused {
        /// The last lines of the verifier's log, in one.
        words: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Before Linux 5.11 maps and programs count against the limit of locked memory.
    #[error(
        "Linux {} counts BPF maps and programs against the limit of locked memory, which is \
         {limit_kib} KiB; start it as root, or raise the limit (`LimitMEMLOCK=infinity` in the unit, \
         `ulimit -l unlimited`)",
        kernel::release()
    )]
    LockedMemory {
        /// The limit.
        limit_kib: u64,
    },
    /// The program cannot be loaded or taken hold of.
    #[error("the XDP program cannot be loaded")]
    Load(#[source] ProgramError),
    /// A map cannot be read or written.
    #[error("map {name}")]
    Map {
        /// The map.
        name: &'static str,
        /// Why not.
        source: MapError,
    },
    /// What was read back from the maps is not what was written, or judges an address wrongly.
    #[error("the table read back from the kernel is not the one written; the old one stays in use")]
    NotVerified,
    /// The CPUs cannot be counted.
    #[error("CPUs cannot be counted")]
    Cpus(#[source] io::Error),
    /// Interfaces and routes cannot be listed.
    #[error("interfaces and routes cannot be listed")]
    Netlink(#[source] io::Error),
    /// The interface does not exist, or not any more.
    #[error("interface `{interface}` does not exist")]
    NoInterface {
        /// The interface.
        interface: String,
    },
    /// The interface's frames are not Ethernet frames.
    #[error(
        "`{interface}` is not an Ethernet interface, so its frames cannot be judged; name the one \
         below it"
    )]
    NotEthernet {
        /// The interface.
        interface: String,
    },
    /// The program cannot be attached to an interface.
    #[error("cannot attach to `{interface}`: {reason}")]
    Attach {
        /// The interface.
        interface: String,
        /// The kernel's reason, and what to do.
        reason: String,
    },
    /// Another XDP program is on the interface.
    #[error(
        "another XDP program{program} is on `{interface}`; remove it with `ip link set dev \
         {interface} {hook} off` or through the tool that put it there (`bpftool link show` names \
         its link){coexist}; a filter of pullgate's own that another `paths.bpf` has pinned goes \
         with `rm -r` of that directory"
    )]
    Occupied {
        /// The interface.
        interface: String,
        /// The word of ip(8) for where it is.
        hook: &'static str,
        /// Its number and name in parentheses, as far as they are known.
        program: String,
        /// How to live with it, on kernels where that is possible.
        coexist: String,
    },
    /// Another XDP program is on an interface that is stacked on this one.
    #[error(
        "another XDP program{program} is on `{upper}`, which is stacked on `{interface}`, and the \
         kernel attaches none below it; remove that one through the tool that put it there \
         (`bpftool link show` names its link; one without a link goes with `ip link set dev {upper} \
         xdp off`)"
    )]
    OccupiedAbove {
        /// The interface.
        interface: String,
        /// The one above.
        upper: String,
        /// The program's number and name in parentheses, as far as they are known.
        program: String,
    },
    /// A trial could not be ended by going back.
    #[error(
        "`{interface}` is filtered by a program that another version has not pinned, so a trial \
         could not go back to it; run without `--confirm`"
    )]
    NoWayBack {
        /// The interface.
        interface: String,
    },
    /// The filter was unloaded.
    #[error("the filter was unloaded, so there is nothing to change; restart its role")]
    Unloaded,
    /// What is active is on trial.
    #[error(
        "the filter is on trial; `pullgate confirm` lets it stay, and other changes go on then"
    )]
    OnTrial,
    /// The kernel has no BPF links for XDP (before 5.9).
    #[error("the kernel cannot link XDP programs; Linux 5.9 or later is needed")]
    NoLinks,
    /// The kernel has no `sk_lookup` programs (before 5.9).
    #[error(
        "Linux {} cannot steer connections to the gate, 5.9 or later is needed; leave `gate.steer` \
         out, and let the gate listen on the port itself",
        kernel::release()
    )]
    NoSteering,
    /// The program that steers cannot be put on the network namespace.
    #[error("connections cannot be steered to the gate")]
    Steer {
        /// Why not.
        source: io::Error,
    },
    /// No connection is steered, so there is no use for a socket.
    #[error("the filter steers no connections: its configuration has no `gate.steer = true`")]
    NotSteering,
    /// The program that steers is not attached.
    #[error("no connection is steered: the program is not attached, see the filter's status")]
    SteeringDetached,
    /// Nothing is loaded that could be asked.
    #[error(
        "no filter is loaded on {interface}; `pullgate status` names those that it is on, \
         `pullgate run` loads it"
    )]
    NotLoaded {
        /// The interface, or a word for all of them.
        interface: String,
    },
    /// The kernel does not run the program on a frame.
    #[error("the kernel does not run the loaded program on a frame")]
    TestRun(#[source] ProgramError),
    /// The twin of the loaded program is not there.
    #[error(
        "{} is not there, which gives the reason: the filter was started by an older version, or its log \
         says why; restart the filter role",
        pin.display()
    )]
    NoTwin {
        /// Its pin.
        pin: PathBuf,
    },
    /// The twin of the loaded program returns what no version of ours counts.
    #[error(
        "the loaded program counts by slot {slot}, which this version does not know; restart the filter role"
    )]
    UnknownSlot {
        /// The slot.
        slot: u32,
    },
    /// A frame cannot be built.
    #[error("such a frame cannot be built: {problem}")]
    Frame {
        /// Why not.
        problem: &'static str,
    },
}

/// `: …`, if there is something to quote.
fn quoted(words: &str) -> String {
    match words {
        "" => String::new(),
        words => format!(": {words}"),
    }
}

impl XdpError {
    /// Whether it is about one interface that does not take the program, and no other.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Attach { .. } | Self::Occupied { .. } | Self::OccupiedAbove { .. }
        )
    }
}

impl ExitStatus for XdpError {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Capability { .. } | Self::NotPermitted { .. } => EX_NOPERM,
            Self::Pin { source, .. } if source.kind() == ErrorKind::PermissionDenied => EX_NOPERM,
            Self::NotBpffs { .. } | Self::NoInterface { .. } | Self::NotEthernet { .. } => {
                EX_CONFIG
            }
            // The packet that was asked about is the command line's.
            Self::Frame { .. } => EX_USAGE,
            Self::NoProgram
            | Self::Capabilities { .. }
            | Self::InUse { .. }
            | Self::NotOurs { .. }
            | Self::Lower { .. }
            | Self::Pin { .. }
            | Self::Missing { .. }
            | Self::Object(_)
            | Self::Refused { .. }
            | Self::LockedMemory { .. }
            | Self::Load(_)
            | Self::Map { .. }
            | Self::NotVerified
            | Self::Cpus(_)
            | Self::Netlink(_)
            | Self::Attach { .. }
            | Self::Occupied { .. }
            | Self::OccupiedAbove { .. }
            | Self::NoLinks
            | Self::NoSteering
            | Self::Steer { .. }
            | Self::NotSteering
            | Self::SteeringDetached
            | Self::NoWayBack { .. }
            | Self::Unloaded
            | Self::OnTrial
            | Self::NotLoaded { .. }
            | Self::TestRun(_)
            | Self::NoTwin { .. }
            | Self::UnknownSlot { .. } => EX_SOFTWARE,
        }
    }
}
