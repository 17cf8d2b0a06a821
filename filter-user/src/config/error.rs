//! What is wrong with a configuration, and where: file, line and field.

use std::fmt::{Debug, Display, Formatter};
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::report::{EX_CONFIG, EX_NOPERM, ExitStatus};

/// A place in the configuration.
#[derive(Clone)]
pub struct Place {
    pub(super) file: Arc<Path>,
    pub(super) line: usize,
    pub(super) field: String,
}

impl Place {
    /// The error that something here is wrong.
    pub fn error(&self, problem: impl Display) -> ConfigError {
        ConfigError {
            place: self.clone(),
            problem: problem.to_string(),
            source: None,
        }
    }

    /// The error that a file that is named here cannot be read.
    pub(crate) fn unreadable(&self, problem: impl Display, source: io::Error) -> ConfigError {
        ConfigError {
            source: Some(source),
            ..self.error(problem)
        }
    }

    /// No place: what is wrong does not come from a configuration.
    pub(crate) fn nowhere() -> Self {
        Self {
            file: Arc::from(Path::new("")),
            line: 0,
            field: String::new(),
        }
    }

    /// The same line, but another field.
    pub(crate) fn of(&self, field: &str) -> Self {
        Self {
            field: field.to_owned(),
            ..self.clone()
        }
    }

    /// Line number, from 1.
    #[must_use]
    pub fn line(&self) -> usize {
        self.line
    }
}

impl Debug for Place {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        Display::fmt(self, f)
    }
}

impl Display for Place {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        if self.line > 0 {
            write!(f, "{}:{}: ", self.file.display(), self.line)?;
        }
        match self.field.as_str() {
            "" => Ok(()),
            field => write!(f, "`{field}`: "),
        }
    }
}

/// Why a configuration cannot be used: one sentence that names file, line and field.
#[derive(Debug, thiserror::Error)]
#[error("{place}{problem}")]
pub struct ConfigError {
    place: Place,
    /// Finished prose: it may quote the TOML parser or a rule of ours.
    problem: String,
    /// Why a file cannot be read, if that is what is wrong.
    source: Option<io::Error>,
}

/// What kind of error a [`ConfigError`] is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ConfigErrorKind {
    /// This user may not read a file.
    Forbidden,
    /// The configuration, or a file that it names, cannot be used by any user.
    Unusable,
}

impl ConfigError {
    /// What kind of error it is.
    #[must_use]
    pub fn kind(&self) -> ConfigErrorKind {
        match &self.source {
            Some(source) if source.kind() == io::ErrorKind::PermissionDenied => {
                ConfigErrorKind::Forbidden
            }
            Some(_) | None => ConfigErrorKind::Unusable,
        }
    }
}

impl ExitStatus for ConfigError {
    fn exit_status(&self) -> u8 {
        match self.kind() {
            ConfigErrorKind::Forbidden => EX_NOPERM,
            ConfigErrorKind::Unusable => EX_CONFIG,
        }
    }
}
