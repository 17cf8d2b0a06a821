//! What a role can be instructed to do at its control socket, and why it does not.

use hyper::StatusCode;

use crate::observe::log::LogLevel;
use crate::report::EX_CONFIG;

/// What a role can be instructed to do. It answers when that is done.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Instruction {
    /// `/approve`: take in the lists that are held and have these IDs, a JSON array.
    Approve(Vec<String>),
    /// `/confirm`: let the filter stay that is on trial.
    Confirm,
    /// `/end-trial`: end, if a filter is on trial, as if its time were over. The end of the connection is
    /// the answer.
    EndTrial,
    /// `/log-level`: log as much from now on, a JSON string.
    LogLevel(LogLevel),
    /// `/refresh`: ask every source of ranges now.
    Refresh,
    /// `/reload`: read the configuration again.
    Reload,
    /// `/stop`: end, as by SIGTERM. The end of the connection is the answer.
    Stop,
}

impl Instruction {
    /// The path that it is posted to.
    #[must_use]
    pub fn path(&self) -> &'static str {
        match self {
            Self::Approve(_) => "/approve",
            Self::Confirm => "/confirm",
            Self::EndTrial => "/end-trial",
            Self::LogLevel(_) => "/log-level",
            Self::Refresh => "/refresh",
            Self::Reload => "/reload",
            Self::Stop => "/stop",
        }
    }

    /// The body that is posted.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        match self {
            // Strings have nothing in them that could fail.
            Self::Approve(ids) => serde_json::to_vec(ids).unwrap_or_default(),
            Self::LogLevel(level) => serde_json::to_vec(level).unwrap_or_default(),
            Self::Confirm | Self::EndTrial | Self::Refresh | Self::Reload | Self::Stop => {
                Vec::new()
            }
        }
    }

    /// The instruction that was posted; none, if there is none by that path.
    ///
    /// # Errors
    ///
    /// Returns what is wrong with the body.
    pub fn parse(path: &str, body: &[u8]) -> Result<Option<Self>, serde_json::Error> {
        Ok(Some(match path {
            "/approve" => Self::Approve(serde_json::from_slice(body)?),
            "/confirm" => Self::Confirm,
            "/end-trial" => Self::EndTrial,
            "/log-level" => Self::LogLevel(serde_json::from_slice(body)?),
            "/refresh" => Self::Refresh,
            "/reload" => Self::Reload,
            "/stop" => Self::Stop,
            _ => return Ok(None),
        }))
    }
}

/// Why a role does not do what it is instructed to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Declined {
    /// 404: another role does that.
    NotMine,
    /// 409: there is nothing to do it to.
    Nothing(String),
    /// 422: what it should work with cannot be used; all goes on as before, or as the text says.
    Unusable {
        /// What is wrong.
        text: String,
        /// The exit code for it, see [`crate::report::ExitStatus`].
        status: u8,
    },
    /// 500: it was tried.
    Failed(String),
}

impl Declined {
    /// It was tried, or cannot be any more.
    #[must_use]
    pub fn failed(text: &str) -> Self {
        Self::Failed(text.to_owned())
    }

    /// How HTTP says it: a status, a text, and for 422 an exit code.
    #[must_use]
    pub fn into_parts(self) -> (StatusCode, String, Option<u8>) {
        match self {
            Self::NotMine => {
                let text = "another role does that".to_owned();
                (StatusCode::NOT_FOUND, text, None)
            }
            Self::Nothing(text) => (StatusCode::CONFLICT, text, None),
            Self::Unusable { text, status } => {
                (StatusCode::UNPROCESSABLE_ENTITY, text, Some(status))
            }
            Self::Failed(text) => (StatusCode::INTERNAL_SERVER_ERROR, text, None),
        }
    }

    /// What a status of HTTP other than success says.
    #[must_use]
    pub fn from_parts(status: StatusCode, text: String, exit_status: Option<u8>) -> Self {
        match status {
            StatusCode::NOT_FOUND => Self::NotMine,
            StatusCode::CONFLICT => Self::Nothing(text),
            StatusCode::UNPROCESSABLE_ENTITY => Self::Unusable {
                text,
                status: exit_status.unwrap_or(EX_CONFIG),
            },
            _ => Self::Failed(text),
        }
    }
}

/// The header of an answer that has an exit code.
pub const EXIT_STATUS: &str = "exit-status";
