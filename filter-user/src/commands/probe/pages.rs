//! What one kind of connection shows for several hosts, so that it can be compared: whose a page is cannot be seen by
//! itself.

use std::cmp::Reverse;
use std::sync::Arc;

use rustls::sign::CertifiedKey;

use super::reception::{NO_ANSWER, NO_PAGE};
use super::target::ProbeTarget;
use crate::host::deadline::is_late;
use crate::web::refuses;
use crate::web::visit::{Answer, Ending, Visit};

/// Connections by one name, of one visitor.
pub(super) struct Connections<'a> {
    pub(super) target: &'a ProbeTarget,
    pub(super) server_name: Option<&'a str>,
    pub(super) identity: Option<&'a Arc<CertifiedKey>>,
    /// The names that make no difference between pages.
    pub(super) names: &'a [String],
}

/// A version of HTTP.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Version {
    /// A connection for each request.
    Http1,
    /// All requests on one connection.
    Http2,
}

impl Version {
    pub(super) const ALL: [Self; 2] = [Self::Http1, Self::Http2];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Http1 => "HTTP/1.1",
            Self::Http2 => "HTTP/2",
        }
    }
}

/// What is shown for a host.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Shown {
    Page(Page),
    /// Nothing: the handshake or the request was refused.
    Refused,
    /// It is not known, and why.
    Unknown(&'static str),
}

/// A page.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Page {
    status: Option<u16>,
    /// Where it leads, if it does, and what it says.
    text: String,
    /// The same without the names of hosts, and cut where their lengths make no difference.
    anonymous: String,
}

impl Shown {
    /// Whether both are the same but for the names in them: a server may show each host its own.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Page(one), Self::Page(another)) => {
                one.status == another.status && one.anonymous == another.anonymous
            }
            (one, another) => one == another,
        }
    }
}

impl Page {
    /// Whether it says that there is none.
    pub(super) fn is_no_page(&self) -> bool {
        self.status.is_some_and(|status| NO_PAGE.contains(&status))
    }

    /// Whether it says that the server has nothing to show, or shows another place: that can be anyone's.
    pub(super) fn is_empty(&self) -> bool {
        self.status.is_some_and(|status| status >= 300)
    }
}

impl Connections<'_> {
    /// What is shown for each host, in their order.
    pub(super) fn show<const N: usize>(&self, version: Version, hosts: [&str; N]) -> [Shown; N] {
        match version {
            Version::Http1 => hosts.map(|host| {
                let ending = self.visit(host).connect().ending;
                match ending {
                    Ending::Answered(answer) => shown(&answer, self.names),
                    Ending::Refused(_) | Ending::NoTls => Shown::Refused,
                    Ending::Silence
                    | Ending::Late
                    | Ending::NotListening(_)
                    | Ending::NotAsked(_) => Shown::Unknown(NO_ANSWER),
                }
            }),
            Version::Http2 => {
                let mut answers = match self.visit(hosts[0]).ask_by_http2(&hosts) {
                    Ok(answers) => answers.into_iter(),
                    Err(error) if is_late(&error) => {
                        return [(); N].map(|()| Shown::Unknown(NO_ANSWER));
                    }
                    // What does not speak it shows nothing by it.
                    Err(_) => return [(); N].map(|()| Shown::Refused),
                };
                hosts.map(|_| match answers.next() {
                    Some(Ok(answer)) => shown(&answer, self.names),
                    Some(Err(error)) if !is_late(&error) => Shown::Refused,
                    Some(Err(_)) | None => Shown::Unknown(NO_ANSWER),
                })
            }
        }
    }

    fn visit<'a>(&'a self, host: &'a str) -> Visit<'a> {
        Visit {
            server_name: self.server_name,
            path: &self.target.path,
            identity: self.identity.map(Arc::clone),
            ..Visit::new(self.target.address, host)
        }
    }
}

fn shown(answer: &Answer, names: &[String]) -> Shown {
    match answer.status {
        Some(429 | 500..) => Shown::Unknown("the server is busy or broken (429, or 500 and above)"),
        Some(400 | 421) => Shown::Refused,
        _ if refuses(answer) => Shown::Refused,
        status => {
            let location = answer.header("location").unwrap_or_default();
            let text = format!("{location}\n{}", answer.body);
            Shown::Page(Page {
                status,
                anonymous: anonymous(&text, names),
                text,
            })
        }
    }
}

fn anonymous(text: &str, names: &[String]) -> String {
    let mut names: Vec<_> = names.iter().map(|name| name.to_ascii_lowercase()).collect();
    // The longest first, as one may end with another.
    names.sort_by_key(|name| Reverse(name.len()));
    let text = text.to_ascii_lowercase();
    let text = names
        .iter()
        .fold(text, |text, name| text.replace(name, "…"));
    text.chars().take(COMPARED).collect()
}

/// Characters of a page that are compared: half of what is read, so that names may take the rest.
const COMPARED: usize = Answer::BODY_MAX / 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn page(body: &str) -> Shown {
        let answer = Answer {
            status: Some(200),
            head: "Location: https://Blog.Example/a\r\n".to_owned(),
            body: body.to_owned(),
        };
        shown(
            &answer,
            &["blog.example", "shop.blog.example"].map(str::to_owned),
        )
    }

    #[test]
    fn pages_that_differ_in_the_host_alone_are_alike() {
        let is_like = |one: &str, another: &str| page(one).is_like(&page(another));
        assert!(is_like("I am BLOG.example", "I am shop.blog.example"));
        assert!(!is_like("I am blog.example", "I am a shop"));
        assert_ne!(page("I am blog.example"), page("I am shop.blog.example"));
        let long = |host: &str| format!("{host} ").repeat(100) + &"x".repeat(Answer::BODY_MAX);
        assert!(is_like(&long("blog.example"), &long("shop.blog.example")));
    }
}
