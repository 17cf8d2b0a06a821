//! A configuration file that others cannot have written: its path in, the configuration out.

use std::io;
use std::path::{Path, PathBuf};

use super::{Config, ConfigError, Paths};
use crate::host::file::{self, ReadError, TrustedOwner, UntrustedFile};
use crate::report::{EX_CONFIG, EX_NOPERM, ExitStatus};

/// Reads a configuration file.
///
/// # Errors
///
/// Returns why the file cannot be read or used.
pub fn load(file: &Path) -> Result<Config, LoadError> {
    let blame = |source| LoadError::Read {
        path: file.to_owned(),
        source,
    };
    let read = file::read_trusted(file, CONFIG_MAX, TrustedOwner::RootOrSelf);
    let (text, _) = read.map_err(|error| match error {
        ReadError::Io(source) => blame(source),
        ReadError::UntrustedFile(untrusted) => LoadError::UntrustedFile(untrusted),
    })?;
    let text = String::from_utf8(text).map_err(|error| {
        let before = error.as_bytes().get(..error.utf8_error().valid_up_to());
        let lines = before.unwrap_or_default().split(|byte| *byte == b'\n');
        let problem = format!("line {} is not UTF-8", lines.count());
        blame(io::Error::new(io::ErrorKind::InvalidData, problem))
    })?;
    // Whatever the file names is named by one path, wherever a command is called.
    let file = std::path::absolute(file).map_err(blame)?;
    Ok(Config::parse(&file, &text)?)
}

/// Where things live, by a configuration file that cannot be used.
#[must_use]
pub fn salvage_paths(file: &Path) -> Paths {
    // What others may write does not say where root looks.
    let read = file::read_trusted(file, CONFIG_MAX, TrustedOwner::RootOrSelf);
    let text = read.map(|(text, _)| String::from_utf8_lossy(&text).into_owned());
    Paths::salvage(file, &text.unwrap_or_default())
}

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// It cannot be read.
    #[error(
        "{} cannot be read; is it there, is it text, and may this user read it?", path.display()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others could say what is protected.
    #[error(transparent)]
    UntrustedFile(UntrustedFile),
    /// It can be read, but not be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl ExitStatus for LoadError {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Read { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                EX_NOPERM
            }
            Self::Read { .. } | Self::UntrustedFile(_) => EX_CONFIG,
            Self::Config(error) => error.exit_status(),
        }
    }
}

/// Bytes of a configuration: thousands of hosts.
const CONFIG_MAX: usize = 4 << 20;
