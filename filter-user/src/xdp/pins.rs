//! The pins: where maps and links live on the BPF file system, and how they go.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use aya::programs::Xdp;
use filter_ebpf::abi;

use super::XdpError;
use super::attach::Rung;

/// The pin directory of this version: `<paths.bpf>/v1`.
#[derive(Clone)]
pub(super) struct Pins {
    directory: PathBuf,
}

impl Pins {
    /// Opens the directory, and creates it (0700) if it is missing.
    pub(super) fn open(base: &Path) -> Result<Self, XdpError> {
        check_bpffs(base)?;
        let directory = base.join(format!("v{}", abi::VERSION));
        for path in [base, &directory] {
            match DirBuilder::new().mode(0o700).create(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(blame(path)(error));
                }
                Ok(()) | Err(_) => check_ours(path)?,
            }
        }
        Ok(Self { directory })
    }

    /// Whether the directory is still there: `unload` takes it away.
    pub(super) fn exist(&self) -> bool {
        self.directory.is_dir()
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The pin of the loaded program, which test runs use.
    pub(super) fn program(&self) -> PathBuf {
        self.directory.join("program")
    }

    /// The pin of an interface's link; its name tells the rung, which the link itself does not.
    pub(super) fn link(&self, rung: Rung, interface: &str) -> PathBuf {
        // bpffs has no dots in names, VLAN interfaces do; no interface has a percent sign.
        let interface = interface.replace('.', "%2e");
        self.directory.join(format!("{}-{interface}", rung.label()))
    }

    /// Pins the program in place of the one that was pinned before.
    pub(super) fn replace_program(&self, program: &mut Xdp) -> Result<(), XdpError> {
        let pin = self.program();
        if fs::exists(&pin).map_err(blame(&pin))? {
            remove(&pin)?;
        }
        let pinned = program.pin(&pin);
        pinned.map_err(|error| blame(&pin)(io::Error::other(error)))
    }

    /// The pins of all links.
    pub(super) fn links(&self) -> Result<Vec<PathBuf>, XdpError> {
        let mut pins = list(&self.directory).map_err(blame(&self.directory))?;
        pins.retain(|pin| is_link(pin));
        Ok(pins)
    }
}

/// Removes every pin below `base`, of whatever version: the filter is detached when it returns.
///
/// Links go first, so that no packet is judged by maps that are half gone. What is not ours is not
/// touched. Returns what was removed; nothing if there was nothing.
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
    for version in list(base).map_err(blame(base))? {
        check_ours(&version)?;
        let mut pins = list(&version).map_err(blame(&version))?;
        pins.sort_by_key(|pin| !is_link(pin));
        for pin in pins {
            remove(&pin)?;
            removed.push(pin);
        }
        fs::remove_dir(&version).map_err(blame(&version))?;
    }
    fs::remove_dir(base).map_err(blame(base))?;
    Ok(removed)
}

/// Whether any link is pinned below `base`: a filter is then in force, whether a role runs or not.
#[must_use]
pub fn is_loaded(base: &Path) -> bool {
    let versions = list(base).unwrap_or_default();
    let mut pins = versions
        .iter()
        .flat_map(|version| list(version).unwrap_or_default());
    pins.any(|pin| is_link(&pin))
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

/// A fresh bpffs is open to everybody, so somebody may have been there before us.
fn check_ours(path: &Path) -> Result<(), XdpError> {
    let metadata = fs::symlink_metadata(path).map_err(blame(path))?;
    let ours = rustix::process::geteuid().as_raw();
    let is_ours = metadata.is_dir() && metadata.uid() == ours && metadata.mode() & 0o077 == 0;
    if !is_ours {
        return Err(XdpError::NotOurs {
            path: path.to_owned(),
        });
    }
    Ok(())
}

/// Whether a pin's name is that of a link.
fn is_link(pin: &Path) -> bool {
    let name = pin.file_name().and_then(|name| name.to_str());
    let prefix = name.and_then(|name| name.split_once('-'));
    prefix.is_some_and(|(rung, _)| {
        [Rung::Native, Rung::Generic]
            .iter()
            .any(|r| r.label() == rung)
    })
}

/// Removes one pin: a link is detached by it.
pub(super) fn remove(pin: &Path) -> Result<(), XdpError> {
    fs::remove_file(pin).map_err(blame(pin))
}

fn blame(path: &Path) -> impl Fn(io::Error) -> XdpError {
    move |source| XdpError::Pin {
        path: path.to_owned(),
        source,
    }
}

fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(directory)?
        .map(|entry| Ok(entry?.path()))
        .collect()
}

/// `BPF_FS_MAGIC`, include/uapi/linux/magic.h.
const BPF_FS_MAGIC: rustix::fs::FsWord = 0xcafe_4a11;
