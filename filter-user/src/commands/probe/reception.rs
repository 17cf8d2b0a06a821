//! How a visitor is received: what came of a visit in, whether that is service or a refusal out.

use rustls::pki_types::CertificateDer;

use crate::web::refuses;
use crate::web::visit::{Ending, Visited, is_about_version};

/// How a visitor is received.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Reception {
    /// In the handshake, or by hanging up.
    Refused,
    /// By a status of HTTP.
    RefusedByHttp(u16),
    /// With a page, whatever its status.
    Served(Option<u16>),
    /// In a way that says nothing of what was asked.
    Unknown(&'static str),
}

impl Reception {
    /// A visitor who asks for the site by its name: what an application answers is service, also if that is 404.
    pub(super) fn at_the_site(visited: &Visited) -> Self {
        match (&visited.ending, visited.requested) {
            (Ending::Answered(answer), requested) => match answer.status {
                Some(status) if refuses(answer) => Self::RefusedByHttp(status),
                Some(status) if requested.is_some() && NO_PAGE.contains(&status) => {
                    Self::Unknown("a certificate was requested, and no page shown")
                }
                status => Self::Served(status),
            },
            (Ending::Refused(error), _) if is_about_version(error) => {
                Self::Unknown("this version of TLS is not spoken")
            }
            (Ending::Refused(_), Some(_)) => Self::Refused,
            (Ending::Refused(_), None) => {
                Self::Unknown("refused, and no certificate was requested: is the name right?")
            }
            (
                Ending::Silence
                | Ending::Late
                | Ending::NotListening(_)
                | Ending::NotAsked(_)
                | Ending::NoTls,
                _,
            ) => Self::Unknown(NO_ANSWER),
        }
    }

    /// A visitor who asks for a site that is not there.
    pub(super) fn elsewhere(visited: &Visited) -> Self {
        match &visited.ending {
            Ending::Answered(answer) => match answer.status {
                Some(status) if refuses(answer) || NO_PAGE.contains(&status) => {
                    Self::RefusedByHttp(status)
                }
                status => Self::Served(status),
            },
            Ending::Refused(_) => Self::Refused,
            Ending::Silence
            | Ending::Late
            | Ending::NotListening(_)
            | Ending::NotAsked(_)
            | Ending::NoTls => Self::Unknown(NO_ANSWER),
        }
    }

    pub(super) fn is_served(self) -> bool {
        matches!(self, Self::Served(_))
    }

    pub(super) fn in_words(self) -> String {
        match self {
            Self::Refused => "refused".to_owned(),
            Self::RefusedByHttp(status) => format!("refused by HTTP ({status})"),
            Self::Served(Some(status)) => format!("served ({status})"),
            Self::Served(None) => "answered".to_owned(),
            Self::Unknown(why) => format!("not known ({why})"),
        }
    }
}

/// How visitors are received by both versions of TLS.
#[derive(Default)]
pub(super) struct Both {
    pub(super) seen: String,
    pub(super) served_by: Vec<&'static str>,
    /// Whether a redirect is all that is served.
    pub(super) redirects: bool,
    /// Whether one of the versions has shown how they are received, and none is silent.
    pub(super) is_known: bool,
    /// Whether one of them did not answer.
    pub(super) is_silent: bool,
    pub(super) shown: Option<CertificateDer<'static>>,
}

impl Both {
    /// By which it is served, if by any.
    pub(super) fn served(&self) -> Option<String> {
        (!self.served_by.is_empty()).then(|| self.served_by.join(" and "))
    }
}

/// A status.
pub(super) fn in_words(status: Option<u16>) -> String {
    status.map_or_else(|| "no HTTP".to_owned(), |status| status.to_string())
}

/// Why nothing is known of a visitor whom the server did not answer.
pub(super) const NO_ANSWER: &str = "no answer";
/// What says that there is no page.
pub(super) const NO_PAGE: [u16; 8] = [400, 403, 404, 410, 421, 426, 495, 496];
