//! The pins: where maps and links live on the BPF file system, and how they go.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use aya::programs::Xdp;
use filter_ebpf::abi;

use super::XdpError;
use super::attach::Rung;

/// The pin directory of this version: `<paths.bpf>/v1`.
pub(super) struct Pins {
    directory: PathBuf,
}

impl Pins {
    /// Opens the directory, and creates it (0700) if it is missing.
    pub(super) fn open(base: PathBuf) -> Result<Self, XdpError> {
        let existing = base.ancestors().find(|path| path.exists());
        let is_bpffs = existing
            .and_then(|path| rustix::fs::statfs(path).ok())
            .is_some_and(|statfs| u64::try_from(statfs.f_type).is_ok_and(|t| t == BPF_FS_MAGIC));
        if !is_bpffs {
            return Err(XdpError::NotBpffs { path: base });
        }

        let directory = base.join(format!("v{}", abi::VERSION));
        let blame = |source| XdpError::Pin {
            path: directory.clone(),
            source,
        };
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&directory).map_err(blame)?;
        fs::set_permissions(&base, Permissions::from_mode(0o700)).map_err(blame)?;
        Ok(Self { directory })
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
        let blame = |source| XdpError::Pin {
            path: pin.clone(),
            source,
        };
        match fs::remove_file(&pin) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(blame(error)),
            Ok(()) | Err(_) => {}
        }
        program
            .pin(&pin)
            .map_err(|error| blame(io::Error::other(error)))
    }

    /// The pins of all links.
    pub(super) fn links(&self) -> Result<Vec<PathBuf>, XdpError> {
        let pins = list(&self.directory).map_err(|source| XdpError::Pin {
            path: self.directory.clone(),
            source,
        })?;
        let is_link = |pin: &PathBuf| {
            let name = pin.file_name().and_then(|name| name.to_str());
            let rungs = [Rung::Native, Rung::Generic];
            name.is_some_and(|name| {
                rungs.iter().any(|rung| {
                    let rest = name.strip_prefix(rung.label());
                    rest.is_some_and(|rest| rest.starts_with('-'))
                })
            })
        };
        Ok(pins.into_iter().filter(is_link).collect())
    }
}

/// Removes every pin below `base`, of whatever version: the filter is detached when it returns.
///
/// Links go first, so that no packet is judged by maps that are half gone. Returns what was
/// removed; nothing if there was nothing.
///
/// # Errors
///
/// Returns the pin that cannot be removed.
pub fn unload(base: &Path) -> Result<Vec<PathBuf>, XdpError> {
    let mut removed = Vec::new();
    let versions = match list(base) {
        Ok(versions) => versions,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(removed),
        Err(source) => {
            return Err(XdpError::Pin {
                path: base.to_owned(),
                source,
            });
        }
    };
    for version in versions {
        let blame = |source| XdpError::Pin {
            path: version.clone(),
            source,
        };
        let mut pins = list(&version).map_err(blame)?;
        pins.sort_by_key(|pin| {
            let name = pin.file_name().and_then(|name| name.to_str());
            abi::MAPS.iter().any(|map| name == Some(map))
        });
        for pin in pins {
            fs::remove_file(&pin).map_err(|source| XdpError::Pin {
                path: pin.clone(),
                source,
            })?;
            removed.push(pin);
        }
        fs::remove_dir(&version).map_err(blame)?;
    }
    fs::remove_dir(base).map_err(|source| XdpError::Pin {
        path: base.to_owned(),
        source,
    })?;
    Ok(removed)
}

fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(directory)?
        .map(|entry| Ok(entry?.path()))
        .collect()
}

/// `BPF_FS_MAGIC`, include/uapi/linux/magic.h.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
