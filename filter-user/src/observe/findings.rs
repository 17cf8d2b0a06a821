//! What is not right: one type for `check`, start, `status`, health and the log.

use std::borrow::Cow;
use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};
use tracing::{error, warn};

use crate::role::Role;

/// Something that is not right, where it is, and what to do about it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Finding {
    /// Stays the same from version to version: scripts match it.
    pub id: Cow<'static, str>,
    /// How bad it is.
    pub severity: Severity,
    /// The role that reports it, in the status of a host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// File, line and field, as far as they are to blame.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub place: String,
    /// What is wrong.
    pub text: String,
    /// What to do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Protection is as asked, and could be better or is about to get worse.
    Warning,
    /// Protection is weaker than asked, or clients are refused that should be served.
    Error,
}

impl Severity {
    /// What stands before a finding, for people.
    #[must_use]
    pub fn mark(self) -> char {
        match self {
            Self::Warning => '!',
            Self::Error => '✗',
        }
    }
}

impl Finding {
    /// Something that could be better.
    #[must_use]
    pub fn warning(id: &'static str, text: impl Into<String>) -> Self {
        Self {
            id: Cow::Borrowed(id),
            severity: Severity::Warning,
            role: None,
            place: String::new(),
            text: text.into(),
            remedy: String::new(),
        }
    }

    /// Something that is not as asked.
    #[must_use]
    pub fn error(id: &'static str, text: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            ..Self::warning(id, text)
        }
    }

    /// The same, to be mended like this.
    #[must_use]
    pub fn remedy(self, remedy: impl Into<String>) -> Self {
        Self {
            remedy: remedy.into(),
            ..self
        }
    }

    /// The same, at this place: a [`Display`] that ends where the text goes on.
    #[must_use]
    pub fn at(self, place: impl Display) -> Self {
        Self {
            place: place.to_string(),
            ..self
        }
    }

    /// The same, as bad as this.
    #[must_use]
    pub fn with_severity(self, severity: Severity) -> Self {
        Self { severity, ..self }
    }

    /// The same, of this role.
    #[must_use]
    pub fn of(self, role: Role) -> Self {
        Self {
            role: Some(role),
            ..self
        }
    }

    /// Whether it is the same finding, whatever its text has become.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        (&self.id, &self.place, self.severity) == (&other.id, &other.place, other.severity)
    }

    /// Writes it to the log.
    pub fn log(&self) {
        let id = self.id.as_ref();
        match self.severity {
            Severity::Warning => warn!(id, "{self}"),
            Severity::Error => error!(id, "{self}"),
        }
    }
}

impl Display for Finding {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if let Some(role) = self.role {
            write!(f, "{}: ", role.label())?;
        }
        write!(f, "{}{}", self.place, self.text)?;
        match self.remedy.as_str() {
            "" => Ok(()),
            remedy => write!(f, "; {remedy}"),
        }
    }
}
