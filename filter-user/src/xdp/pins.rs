//! The pins: where maps, programs and links live on the BPF file system, and how they go.
//!
//! ```text
//! <paths.bpf>/v4/native-eth0      the link: what keeps the program attached
//!                program-eth0     the program behind it
//!                slot-eth0        its twin, which `pullgate explain` asks for the reason
//!                counters-eth0    what the program counts
//!                explained-eth0   what `pullgate explain` added to that
//!                ranges_v4 …      the maps that the programs of all interfaces share
//!                counters-%spare  counters of the program that waits for the next interface
//!                next/            the same, of a load that is not yet active
//!                steer_link …     see `steer`
//! ```

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use filter_ebpf::abi;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tracing::{info, warn};

use super::XdpError;
use super::link::{self, GONE, pinned_index};
use super::mode::AttachMode;
use crate::host::accounts;
use crate::host::netlink::{self, Interface};
use crate::role::Role;

/// The pin directory of this version.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    base: PathBuf,
    directory: PathBuf,
}

impl Pins {
    /// Opens the directory, and creates it (0700) if it is missing.
    pub(super) fn open(base: &Path) -> Result<Self, XdpError> {
        check_bpffs(base)?;
        let pins = Self::at(base);
        for path in [base, &pins.directory] {
            create(path)?;
        }
        Ok(pins)
    }

    /// Keeps other processes from changing the pins, for as long as the lock is held.
    pub(super) fn lock(&self) -> Result<File, XdpError> {
        let directory = File::open(&self.base).map_err(blame(&self.base))?;
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(directory),
            Err(Errno::WOULDBLOCK) => Err(XdpError::InUse {
                path: self.base.clone(),
            }),
            Err(errno) => Err(blame(&self.base)(errno.into())),
        }
    }

    /// The pins below `base`, if there are any.
    pub(super) fn existing(base: &Path) -> Result<Option<Self>, XdpError> {
        let pins = Self::at(base);
        if !fs::exists(base).map_err(blame(base))? {
            return Ok(None);
        }
        check_ours(base)?;
        if !pins.exist() {
            return Ok(None);
        }
        check_ours(&pins.directory)?;
        Ok(Some(pins))
    }

    fn at(base: &Path) -> Self {
        Self {
            base: base.to_owned(),
            directory: base.join(format!("v{}", abi::VERSION)),
        }
    }

    /// Takes over what other versions of pullgate have pinned for interfaces: the links, so that
    /// their programs can be replaced through them, these programs, to which a trial may have to go
    /// back, and their counters. Maps that interfaces share are of no use: every load fills its own.
    pub(super) fn adopt_other_versions(&self) -> Result<(), XdpError> {
        for version in self.other_versions()? {
            // What `unload` has begun to remove is of no use.
            if name(&version).ends_with(GOING) {
                remove_directory(&version)?;
                continue;
            }
            for pin in list(&version)? {
                let name = name(&pin);
                if !name.contains('-') && !name.starts_with(STEER) {
                    continue;
                }
                let ours = self.directory.join(name);
                if !ours.exists() {
                    fs::rename(&pin, &ours).map_err(blame(&pin))?;
                    info!(
                        id = "pin-adopted",
                        pin = %ours.display(),
                        from = %version.display(),
                        "pin adopted"
                    );
                }
            }
        }
        Ok(())
    }

    /// Removes what other versions of pullgate have left.
    pub(super) fn remove_other_versions(&self) -> Result<(), XdpError> {
        for version in self.other_versions()? {
            remove_directory(&version)?;
            warn!(
                id = "old-pins-removed",
                directory = %version.display(),
                "pins of another version removed"
            );
        }
        Ok(())
    }

    fn other_versions(&self) -> Result<Vec<PathBuf>, XdpError> {
        let mut versions = list(&self.base)?;
        versions.retain(|version| *version != self.directory && version.is_dir());
        for version in &versions {
            check_ours(version)?;
        }
        Ok(versions)
    }

    /// Whether the directory is still there: `unload` takes it away.
    pub(super) fn exist(&self) -> bool {
        self.directory.is_dir()
    }

    /// An empty directory for the pins of a load that is to take effect.
    pub(super) fn stage(&self) -> Result<Staging, XdpError> {
        let staging = self.staging();
        self.discard(&staging)?;
        create(&staging.directory)?;
        Ok(staging)
    }

    fn staging(&self) -> Staging {
        Staging {
            directory: self.directory.join("next"),
        }
    }

    /// Removes the pins of a load that does not take effect.
    pub(super) fn discard(&self, staging: &Staging) -> Result<(), XdpError> {
        if staging.directory.exists() {
            remove_directory(&staging.directory)?;
        }
        Ok(())
    }

    /// Puts the staged pins in the place of the active ones.
    pub(super) fn commit(&self, staging: &Staging) -> Result<(), XdpError> {
        for pin in list(&staging.directory)? {
            let place = self.directory.join(pin.file_name().unwrap_or_default());
            fs::rename(&pin, &place).map_err(blame(&place))?;
        }
        fs::remove_dir(&staging.directory).map_err(blame(&staging.directory))
    }

    /// Removes everything if no link is pinned: whatever is left serves nothing. The directory itself
    /// may be out of a role's reach to remove, and is empty then.
    pub(super) fn remove_unless_linked(&self) -> Result<(), XdpError> {
        if !self.interfaces()?.is_empty() || self.steer_link().exists() {
            return Ok(());
        }
        self.remove_other_versions()?;
        remove_directory(&self.directory)?;
        drop(fs::remove_dir(&self.base));
        Ok(())
    }

    /// Removes every pin of interfaces that are not among `names`; their links are thereby detached.
    pub(super) fn keep_only(&self, names: &[&str]) -> Result<(), XdpError> {
        let mut pins = list(&self.directory)?;
        pins.sort_by_key(|pin| !is_link(pin));
        for pin in pins {
            let Some((_, interface)) = parts(&pin) else {
                continue;
            };
            if names.contains(&interface.as_str()) {
                continue;
            }
            if is_link(&pin) {
                warn!(
                    id = "interface-detached",
                    pin = %pin.display(),
                    "detached: this interface is not to be filtered"
                );
            }
            remove(&pin)?;
        }
        Ok(())
    }

    /// Removes every pin of an interface; its link is thereby detached.
    pub(super) fn remove_of(&self, interface: &str) -> Result<(), XdpError> {
        let mut pins = list(&self.directory)?;
        pins.retain(|pin| parts(pin).is_some_and(|(_, name)| name == interface));
        pins.sort_by_key(|pin| !is_link(pin));
        pins.iter().try_for_each(|pin| remove(pin))
    }

    /// The pin of a map that all interfaces share.
    pub(super) fn shared(&self, name: &str) -> PathBuf {
        self.directory.join(map_name(name))
    }

    /// The pin of a map that belongs to one interface.
    pub(super) fn of_interface(&self, name: &str, interface: &str) -> PathBuf {
        let name = map_name(name);
        self.directory.join(format!("{name}-{}", escape(interface)))
    }

    /// The pin of an interface's loaded program.
    pub(super) fn program(&self, interface: &str) -> PathBuf {
        self.programs(interface).program
    }

    /// The pins of an interface's loaded program and its twin.
    pub(super) fn programs(&self, interface: &str) -> ProgramPins {
        ProgramPins::new(&self.directory, interface)
    }

    /// The pins of the program that an interface runs: the committed ones or, while a filter is on trial
    /// and after one that was killed, the staged ones. The kernel knows which.
    pub(super) fn active_programs(&self, interface: &str) -> ProgramPins {
        let staged = self.staging().programs(interface);
        let link = self.linked(interface);
        let link = link.and_then(|mode| link::pinned(&self.link(mode, interface)));
        let runs = match link {
            Some(link) => link::program(&link),
            // The link of a trial is in no pin.
            None => netlink::index(interface)
                .and_then(netlink::occupant)
                .map(|occupant| occupant.program),
        };
        let committed = self.programs(interface);
        let is_staged = runs.is_some() && runs == link::pinned_program(&staged.program);
        // Of a classifier on trial the interface itself knows nothing.
        let is_alone = !committed.program.exists() && link::is_classifier(&staged.program);
        if is_staged || is_alone {
            staged
        } else {
            committed
        }
    }

    /// The pin of an interface's link; its name holds the mode, which the link itself does not.
    pub(super) fn link(&self, mode: AttachMode, interface: &str) -> PathBuf {
        let name = format!("{}-{}", mode.label(), escape(interface));
        self.directory.join(name)
    }

    /// The mode on which an interface is linked, as far as the pins tell.
    pub(super) fn linked(&self, interface: &str) -> Option<AttachMode> {
        let is_pinned = |mode: &AttachMode| self.link(*mode, interface).exists();
        AttachMode::ALL.into_iter().find(is_pinned)
    }

    /// The pin of the link that steers.
    pub(super) fn steer_link(&self) -> PathBuf {
        self.directory.join(STEER_LINK)
    }

    /// The pin of the program that steers.
    pub(super) fn steer_program(&self) -> PathBuf {
        self.directory.join("steer_program")
    }

    /// The pin of the map of the gate's sockets.
    pub(super) fn steer_sockets(&self) -> PathBuf {
        self.directory.join("steer_sockets")
    }

    /// Lets the pins of interfaces that were renamed follow them: a link stays with its interface.
    /// Returns the old names, with the new ones.
    pub(super) fn follow_renames(
        &self,
        interfaces: &[Interface],
    ) -> Result<Vec<(String, String)>, XdpError> {
        let mut renamed = Vec::new();
        for old in self.interfaces()? {
            let mode = self.linked(&old);
            let linked = mode.and_then(|mode| pinned_index(&self.link(mode, &old)));
            let now = interfaces
                .iter()
                .find(|interface| Some(interface.index) == linked);
            let Some(new) = now
                .map(|interface| &interface.name)
                .filter(|new| **new != old)
            else {
                continue;
            };
            if self.linked(new).is_some() {
                continue;
            }
            info!(
                id = "interface-renamed",
                from = old,
                to = new,
                "the interface was renamed, its pins follow"
            );
            for pin in list(&self.directory)? {
                if let Some((kind, interface)) = parts(&pin)
                    && interface == old
                {
                    let place = self.directory.join(format!("{kind}-{}", escape(new)));
                    fs::rename(&pin, &place).map_err(blame(&place))?;
                }
            }
            renamed.push((old, new.clone()));
        }
        Ok(renamed)
    }

    /// Gives an interface the counters of another name; not if it has some already.
    pub(super) fn rename_counters(&self, from: &str, to: &str) -> Result<bool, XdpError> {
        let moves = abi::INTERFACE_MAPS
            .map(|map| (self.of_interface(map, from), self.of_interface(map, to)));
        if moves.iter().any(|(_, place)| place.exists()) {
            return Ok(false);
        }
        for (pin, place) in moves {
            fs::rename(&pin, &place).map_err(blame(&place))?;
        }
        Ok(true)
    }

    /// The names of the interfaces that have a program, committed or staged.
    pub(super) fn programmed_interfaces(&self) -> Result<Vec<String>, XdpError> {
        let mut pins = list(&self.directory)?;
        let staging = self.staging().directory;
        if staging.is_dir() {
            pins.extend(list(&staging)?);
        }
        let parts = pins.iter().filter_map(|pin| parts(pin));
        let programs = parts.filter(|(kind, interface)| *kind == PROGRAM && interface != SPARE);
        let mut names: Vec<_> = programs.map(|(_, interface)| interface).collect();
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    /// The names of the interfaces that have a link.
    pub(super) fn interfaces(&self) -> Result<Vec<String>, XdpError> {
        let pins = list(&self.directory)?;
        let links = pins.iter().filter(|pin| is_link(pin));
        // That of steering is on no interface.
        let parts = links.filter_map(|link| parts(link));
        Ok(parts.map(|(_, interface)| interface).collect())
    }
}

/// Where the pins of a load are until it is active.
#[derive(Debug)]
pub(super) struct Staging {
    directory: PathBuf,
}

impl Staging {
    /// As [`Pins::shared`].
    pub(super) fn shared(&self, name: &str) -> PathBuf {
        self.directory.join(map_name(name))
    }

    /// As [`Pins::programs`].
    pub(super) fn programs(&self, interface: &str) -> ProgramPins {
        ProgramPins::new(&self.directory, interface)
    }
}

/// The pins of a program and its twin.
#[derive(Debug)]
pub(super) struct ProgramPins {
    /// The program that is attached.
    pub(super) program: PathBuf,
    /// The one that returns a counter's index.
    pub(super) slot: PathBuf,
}

impl ProgramPins {
    fn new(directory: &Path, interface: &str) -> Self {
        let interface = escape(interface);
        Self {
            program: directory.join(format!("{PROGRAM}-{interface}")),
            slot: directory.join(format!("slot-{interface}")),
        }
    }

    pub(super) fn all(&self) -> [&Path; 2] {
        [&self.program, &self.slot]
    }
}

/// Removes every pin below `base`, of whatever version: the filter is detached when it returns.
///
/// The directories of the versions are renamed first: by that a running role knows, and attaches nothing
/// again. Links go before the rest, so that no packet is judged by maps that are half gone. What is not
/// ours is not touched. Returns what was removed; nothing if there was nothing.
///
/// # Errors
///
/// Returns the pin that cannot be removed.
pub fn unload(base: &Path) -> Result<Vec<PathBuf>, XdpError> {
    let mut removed = Vec::new();
    if !fs::exists(base).map_err(blame(base))? {
        return Ok(removed);
    }
    check_bpffs(base)?;
    check_ours(base)?;
    let mut versions = list(base)?;
    // One that was left half gone makes room for the next.
    versions.sort_by_key(|version| !name(version).ends_with(GOING));
    for version in versions {
        check_ours(&version)?;
        let going = if name(&version).ends_with(GOING) {
            version.clone()
        } else {
            let going = base.join(format!("{}{GOING}", name(&version)));
            fs::rename(&version, &going).map_err(blame(&version))?;
            going
        };
        for pin in remove_directory(&going)? {
            let within = pin.strip_prefix(&going).unwrap_or(&pin);
            removed.push(version.join(within));
        }
    }
    fs::remove_dir(base).map_err(blame(base))?;
    Ok(removed)
}

/// Makes the directory of the pins, so that a process can be confined to it.
///
/// # Errors
///
/// Returns why it cannot be made, or whose it is.
pub fn prepare(base: &Path) -> Result<(), XdpError> {
    check_bpffs(base)?;
    create(base)
}

/// Whether any pinned link below `base` is on an interface: a filter is then active, whether a role runs
/// or not.
#[must_use]
pub fn is_loaded(base: &Path) -> bool {
    let versions = list(base).unwrap_or_default();
    let mut pins = versions
        .iter()
        .flat_map(|version| list(version).unwrap_or_default());
    pins.any(|pin| is_link(&pin) && pinned_index(&pin).is_some_and(|index| index != GONE))
}

/// Checks that pins below `base` would be on a BPF file system.
///
/// # Errors
///
/// Returns [`XdpError::NotBpffs`].
pub fn check_bpffs(base: &Path) -> Result<(), XdpError> {
    let existing = base.ancestors().find(|path| path.exists());
    let magic = existing.and_then(|path| rustix::fs::statfs(path).ok());
    let is_bpffs = magic.is_some_and(|statfs| statfs.f_type == BPF_FS_MAGIC);
    if !is_bpffs {
        return Err(XdpError::NotBpffs {
            path: base.to_owned(),
        });
    }
    Ok(())
}

/// Creates a directory for us alone, or checks that it is one.
fn create(path: &Path) -> Result<(), XdpError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(blame(path)(error)),
        Ok(()) | Err(_) => check_ours(path),
    }
}

/// A fresh bpffs is open to every user, so another process may have been there before us.
fn check_ours(path: &Path) -> Result<(), XdpError> {
    let metadata = fs::symlink_metadata(path).map_err(blame(path))?;
    let ours = rustix::process::geteuid().as_raw();
    if ours != ROOT && metadata.uid() != ours {
        return Err(XdpError::NotPermitted {
            path: path.to_owned(),
        });
    }
    // Root looks after what is the role's.
    let is_owner =
        metadata.uid() == ours || Some(metadata.uid()) == accounts::user(Role::Filter.account());
    let is_ours = metadata.is_dir() && is_owner && metadata.mode() & 0o077 == 0;
    if !is_ours {
        return Err(XdpError::NotOurs {
            path: path.to_owned(),
        });
    }
    Ok(())
}

/// Removes a directory of pins, links first, and returns what was in it.
fn remove_directory(directory: &Path) -> Result<Vec<PathBuf>, XdpError> {
    let mut removed = Vec::new();
    let mut pins = list(directory)?;
    pins.sort_by_key(|pin| !is_link(pin));
    for pin in pins {
        // A link is not followed: what it leads to is not ours.
        if fs::symlink_metadata(&pin).is_ok_and(|found| found.is_dir()) {
            removed.extend(remove_directory(&pin)?);
        } else {
            remove(&pin)?;
            removed.push(pin);
        }
    }
    absent_is_removed(fs::remove_dir(directory)).map_err(blame(directory))?;
    Ok(removed)
}

/// Another process may remove the same.
fn absent_is_removed(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

/// bpffs has no dots in names, and sections do; no other part of their names matters.
fn map_name(name: &str) -> String {
    name.trim_start_matches(".data.").to_lowercase()
}

/// bpffs has no dots in names, and VLAN interfaces do; no interface has a percent sign.
fn escape(interface: &str) -> String {
    interface.replace('.', "%2e")
}

/// What an interface's pin is, and the interface: its whole name, for `lan` is not `br-lan`.
fn parts(pin: &Path) -> Option<(&str, String)> {
    let (kind, interface) = name(pin).split_once('-')?;
    Some((kind, interface.replace("%2e", ".")))
}

/// A pin's name; all of ours are text.
fn name(pin: &Path) -> &str {
    let name = pin.file_name().and_then(|name| name.to_str());
    name.unwrap_or_default()
}

/// Whether a pin's name is that of a link.
fn is_link(pin: &Path) -> bool {
    let is_of_interface = |(kind, _): (&str, String)| {
        let mut modes = AttachMode::ALL.iter();
        modes.any(|mode| mode.label() == kind)
    };
    name(pin) == STEER_LINK || parts(pin).is_some_and(is_of_interface)
}

/// Removes one pin: a link is detached by it.
pub(super) fn remove(pin: &Path) -> Result<(), XdpError> {
    absent_is_removed(fs::remove_file(pin)).map_err(blame(pin))
}

/// The error that something is wrong with a pin.
pub(super) fn blame(path: &Path) -> impl Fn(io::Error) -> XdpError {
    move |source| XdpError::Pin {
        path: path.to_owned(),
        source,
    }
}

fn list(directory: &Path) -> Result<Vec<PathBuf>, XdpError> {
    let entries = fs::read_dir(directory).map_err(blame(directory))?;
    let paths = entries.map(|entry| Ok(entry.map_err(blame(directory))?.path()));
    paths.collect()
}

/// What is at the end of a directory's name while its pins are removed.
const GOING: &str = "-going";
/// How the pins of steering begin.
const STEER: &str = "steer_";
const STEER_LINK: &str = "steer_link";
/// What the pins of programs are called.
const PROGRAM: &str = "program";
/// In the place of an interface's name, for the program that waits for the next one: no interface
/// has a percent sign in its name.
pub(super) const SPARE: &str = "%spare";
/// The user who may do everything.
const ROOT: u32 = 0;
/// `BPF_FS_MAGIC`, include/uapi/linux/magic.h.
const BPF_FS_MAGIC: rustix::fs::FsWord = 0xcafe_4a11;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_let_go_of_without_those_whose_names_end_alike() {
        let directory = tempfile::tempdir().unwrap();
        let pins = Pins::at(directory.path());
        fs::create_dir(&pins.directory).unwrap();
        for interface in ["lan", "br-lan", "lan.5", "br-lan.5"] {
            for pin in [
                pins.link(AttachMode::Native, interface),
                pins.program(interface),
                pins.of_interface(abi::COUNTERS, interface),
            ] {
                fs::write(pin, "").unwrap();
            }
        }

        pins.remove_of("lan").unwrap();
        assert_eq!(
            pins.programmed_interfaces().unwrap(),
            ["br-lan", "br-lan.5", "lan.5"]
        );
        assert!(!pins.program("lan").exists());
        assert!(pins.program("br-lan").exists());

        pins.keep_only(&["lan", "br-lan.5"]).unwrap();
        assert_eq!(pins.interfaces().unwrap(), ["br-lan.5"]);
        assert_eq!(list(&pins.directory).unwrap().len(), 3);
    }
}
