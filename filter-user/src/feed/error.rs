//! Why there is no list.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::host::file::UntrustedFile;
use crate::ranges::ListError;

/// Why there is no list.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FeedError {
    /// The server cannot be reached, or broke off.
    #[error("no answer")]
    Request(#[source] reqwest::Error),
    /// The server is not who it should be: a third party may be in between.
    #[error("the server cannot be trusted")]
    Untrusted(#[source] reqwest::Error),
    /// The whole answer did not come in time.
    #[error("no whole answer in time")]
    Timeout,
    /// The server sends us to another host, or too often to itself.
    #[error("redirected to {to}, which is another host or once too often")]
    Redirected {
        /// Where to.
        to: String,
    },
    /// The server answers something else than 200.
    #[error("the server answered with status {status}")]
    Status {
        /// The HTTP status.
        status: u16,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// The answer is compressed, which was not asked for.
    #[error("the answer has a content encoding that was not asked for")]
    Encoded,
    /// The list is larger than it may be.
    #[error(
        "the list is larger than {size_max} bytes; a source of your own may send more with `max_bytes`"
    )]
    TooLarge {
        /// How large it may be.
        size_max: usize,
    },
    /// What came is not a list.
    #[error(transparent)]
    List(ListError),
    /// A file cannot be read.
    #[error("{} cannot be read; is the path right, and may this role read it?", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others than we could say what is in a file.
    #[error(transparent)]
    UntrustedFile(UntrustedFile),
    /// The file with the roots to trust holds none.
    #[error("{} holds no certificate", path.display())]
    NoRoots {
        /// The file.
        path: PathBuf,
    },
}

impl FeedError {
    /// The word for this error in metrics.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Request(error) if error.is_timeout() => "Timeout",
            Self::Request(_) => "NoAnswer",
            Self::Untrusted(_) => "Untrusted",
            Self::Timeout => "Timeout",
            Self::Redirected { .. } => "Redirected",
            Self::Status { .. } => "BadStatus",
            Self::Encoded => "Encoded",
            Self::TooLarge { .. } => "TooLarge",
            Self::List(_) => "BadList",
            Self::File { .. } | Self::UntrustedFile(_) | Self::NoRoots { .. } => "BadFile",
        }
    }

    /// When the server wants to be asked again, if it said so.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            Self::Request(_)
            | Self::Untrusted(_)
            | Self::Timeout
            | Self::Redirected { .. }
            | Self::Encoded
            | Self::TooLarge { .. }
            | Self::List(_)
            | Self::File { .. }
            | Self::UntrustedFile(_)
            | Self::NoRoots { .. } => None,
        }
    }

    /// Without the URL, which may hold a secret; who asked knows where he did.
    pub(super) fn request(error: reqwest::Error) -> Self {
        let error = error.without_url();
        if blames_certificate(&error) {
            Self::Untrusted(error)
        } else {
            Self::Request(error)
        }
    }
}

/// Whether the reason, somewhere beneath, is the server's certificate.
fn blames_certificate(error: &(dyn Error + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<rustls::Error>() {
        return matches!(error, rustls::Error::InvalidCertificate(_));
    }
    // What went through a socket is wrapped, and hides behind its wrapper's message.
    let wrapped = error
        .downcast_ref::<io::Error>()
        .and_then(io::Error::get_ref);
    wrapped.is_some_and(|wrapped| blames_certificate(wrapped))
        || error.source().is_some_and(blames_certificate)
}
