//! What the filter remembers of interfaces across boots.
//!
//! At boot routes come last, and strangers are answered as soon as there is an address. So what was an
//! uplink once is filtered from the start. The file is the filter's own; one that is damaged, or that
//! another user may write, is worth as much as none.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::netlink::is_interface_name;
use crate::host::file::{self, ReadError, TrustedOwner};

/// What is known of interfaces, by name.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Those that have led to the internet, for `interfaces = "auto"`.
    pub uplinks: BTreeSet<String>,
    /// Filtered ones that are no cards but made by the network's configuration (bonds, bridges,
    /// VLANs): a start must not wait for them, since that configuration waits for the start.
    pub software: BTreeSet<String>,
}

/// The file, as JSON.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct UplinksFile {
    version: u32,
    interfaces: Memory,
}

/// Why remembered uplinks cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UplinksError {
    /// The file cannot be read, or others may write it.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: ReadError,
    },
    /// The file is not one of ours.
    #[error("{} does not hold uplinks", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// The file is of another version, or holds what cannot be an interface's name, or too many.
    #[error("{} holds no names of interfaces that this version knows", path.display())]
    Content {
        /// The file.
        path: PathBuf,
    },
}

/// Reads what was saved; nothing if there is no file.
///
/// # Errors
///
/// Returns why what is there cannot be used.
pub fn load(path: &Path) -> Result<Memory, UplinksError> {
    let path_of = || path.to_owned();
    let bytes = match file::read_trusted(path, SIZE_MAX, TrustedOwner::RootOrSelf) {
        Ok((bytes, _)) => bytes,
        Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Memory::default());
        }
        Err(source) => {
            return Err(UplinksError::Read {
                path: path_of(),
                source,
            });
        }
    };
    let document: UplinksFile =
        serde_json::from_slice(&bytes).map_err(|source| UplinksError::Json {
            path: path_of(),
            source,
        })?;
    let UplinksFile {
        version,
        interfaces,
    } = document;
    let Memory { uplinks, software } = &interfaces;
    let is_ours = version == VERSION
        && uplinks.len().max(software.len()) <= NAMES_MAX
        && uplinks.union(software).all(|name| is_interface_name(name));
    if is_ours {
        Ok(interfaces)
    } else {
        Err(UplinksError::Content { path: path_of() })
    }
}

/// Writes it in one step: a reader finds the old or the new.
///
/// # Errors
///
/// Returns the operating system's error.
pub fn save(path: &Path, memory: &Memory) -> io::Result<()> {
    let bounded = |names: &BTreeSet<String>| names.iter().take(NAMES_MAX).cloned().collect();
    let document = UplinksFile {
        version: VERSION,
        interfaces: Memory {
            uplinks: bounded(&memory.uplinks),
            software: bounded(&memory.software),
        },
    };
    let text = serde_json::to_vec(&document)?;
    file::replace(path, &text, 0o600, None)
}

const VERSION: u32 = 1;
/// More than any host has.
const NAMES_MAX: usize = 64;
const SIZE_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_is_saved_is_loaded_and_no_file_is_no_memory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("uplinks.json");
        assert_eq!(load(&path).unwrap(), Memory::default());

        let memory = memory();
        save(&path, &memory).unwrap();
        save(&path, &memory).unwrap();

        assert_eq!(load(&path).unwrap(), memory);
    }

    #[test]
    fn what_is_damaged_odd_or_open_to_others_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("uplinks.json");
        let good = r#"{"version":1,"interfaces":{"uplinks":["eth0"],"software":[]}}"#;
        fs::write(&path, good).unwrap();
        load(&path).unwrap();
        for (from, to) in [
            (good, ""),
            (good, "{}"),
            ("1", "2"),
            ("eth0", "a/b"),
            ("eth0", "sixteen-letters-"),
            ("[]}", "[]},\"more\":1"),
        ] {
            fs::write(&path, good.replacen(from, to, 1)).unwrap();
            assert!(load(&path).is_err(), "{to}");
        }

        save(&path, &memory()).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        assert!(matches!(load(&path), Err(UplinksError::Read { .. })));
    }

    fn memory() -> Memory {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Memory {
            uplinks: names(&["eth0", "bond0"]),
            software: names(&["bond0"]),
        }
    }
}
