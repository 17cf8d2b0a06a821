//! What `interfaces = "auto"` remembers across boots: the interfaces that have led to the internet.
//!
//! At boot routes come last, and strangers are answered as soon as there is an address. So what was an
//! uplink once is filtered from the start. The file is the filter's own; one that is damaged, or that
//! another user may write, is worth as much as none.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::file::{self, Keeper, ReadError};

/// The file, as JSON.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    uplinks: BTreeSet<String>,
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

/// Reads the names that were saved; none if there is no file.
///
/// # Errors
///
/// Returns why what is there cannot be used.
pub fn load(path: &Path) -> Result<BTreeSet<String>, UplinksError> {
    let path_of = || path.to_owned();
    let bytes = match file::read_kept(path, SIZE_MAX, Keeper::Nobody) {
        Ok((bytes, _)) => bytes,
        Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(BTreeSet::new());
        }
        Err(source) => {
            return Err(UplinksError::Read {
                path: path_of(),
                source,
            });
        }
    };
    let document: Document =
        serde_json::from_slice(&bytes).map_err(|source| UplinksError::Json {
            path: path_of(),
            source,
        })?;
    let Document { version, uplinks } = document;
    let is_ours = version == VERSION
        && uplinks.len() <= UPLINKS_MAX
        && uplinks.iter().all(|name| is_interface_name(name));
    match is_ours {
        true => Ok(uplinks),
        false => Err(UplinksError::Content { path: path_of() }),
    }
}

/// Writes names in one step: a reader finds the old ones or the new ones.
///
/// # Errors
///
/// Returns the operating system's error.
pub fn save(path: &Path, uplinks: &BTreeSet<String>) -> io::Result<()> {
    let uplinks = uplinks.iter().take(UPLINKS_MAX).cloned().collect();
    let document = Document {
        version: VERSION,
        uplinks,
    };
    let text = serde_json::to_vec(&document)?;
    let temporary = path.with_extension("json.new");
    file::remove(&temporary)?;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&temporary)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.write_all(&text)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(file::directory(path))?.sync_all()
}

/// As the kernel's `dev_valid_name`, net/core/dev.c.
fn is_interface_name(name: &str) -> bool {
    let is_odd = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    (1..=15).contains(&name.len()) && name != "." && name != ".." && !name.contains(is_odd)
}

const VERSION: u32 = 1;
/// More than any host has.
const UPLINKS_MAX: usize = 64;
const SIZE_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded_and_no_file_is_no_uplink() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("uplinks.json");
        assert_eq!(load(&path).unwrap(), BTreeSet::new());

        let uplinks = BTreeSet::from(["eth0".to_owned(), "bond0.7".to_owned()]);
        save(&path, &uplinks).unwrap();
        save(&path, &uplinks).unwrap();

        assert_eq!(load(&path).unwrap(), uplinks);
    }

    #[test]
    fn what_is_damaged_odd_or_open_to_others_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("uplinks.json");
        for text in [
            "",
            "{}",
            r#"{"version":2,"uplinks":[]}"#,
            r#"{"version":1,"uplinks":["a/b"]}"#,
            r#"{"version":1,"uplinks":["sixteen-letters-"]}"#,
            r#"{"version":1,"uplinks":["eth0"],"more":1}"#,
        ] {
            fs::write(&path, text).unwrap();
            assert!(load(&path).is_err(), "{text}");
        }

        save(&path, &BTreeSet::from(["eth0".to_owned()])).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        assert!(matches!(load(&path), Err(UplinksError::Read { .. })));
    }
}
