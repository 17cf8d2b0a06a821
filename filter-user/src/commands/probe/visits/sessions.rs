//! Whether a session that was made under another name, or with another certificate, opens the site: servers that keep
//! the sessions of all names together have done that (CVE-2025-23419, CVE-2025-23048).

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;

use super::names::names;
use super::{ANY, OriginProbe, UNKNOWN, VERSIONS};
use crate::commands::examination::Check;
use crate::commands::probe::reception::{Both, Reception};
use crate::observe::Finding;
use crate::web::visit::{ClientMemory, Ending, Visit};

impl OriginProbe<'_> {
    /// Sessions by the other names of the certificate and by those of the command line, offered for the site.
    pub(super) fn with_sessions(
        &self,
        as_stranger: &Both,
        shown: Option<&CertificateDer<'static>>,
    ) -> Check {
        let (about, id) = ("no other name's session opens the site", "sessions");
        let check = |seen: String, findings| Check {
            id,
            about,
            answered: true,
            seen,
            findings,
        };
        if as_stranger.served().is_some() {
            return check("the site is open without one".to_owned(), Vec::new());
        }
        let forged = self.visitors.forged.iter().map(|(_, forged)| Some(forged));
        let others = forged.chain(self.visitors.other.as_ref().map(Some));
        let strangers: Vec<_> = [None].into_iter().chain(others).collect();
        let (mut opening, mut closed, mut sessions) = (Vec::new(), Vec::new(), 0);
        for name in self.other_names(shown) {
            let opens = strangers.iter().find_map(|identity| {
                let (opened, offered) = self.opens(&name, *identity);
                sessions += offered;
                opened
            });
            opening.extend(opens.map(|version| format!("{name} by {version}")));
            if self.visitors.other_names.contains(&name) && !self.is_let_in(&name, &strangers) {
                closed.push(name);
            }
        }
        let finding = (!opening.is_empty()).then(|| {
            let text = format!(
                "a session that was made for another name ({}) opens {} without a certificate that is good for it: a \
                 client that knows the address gets around Cloudflare",
                opening.join(", "),
                self.target.name
            );
            Finding::error("session-of-another-name", text).remedy(OWN_SESSIONS)
        });
        let mut seen = match sessions {
            0 => "no other name gives one".to_owned(),
            sessions => format!("{sessions} sessions offered"),
        };
        if !closed.is_empty() {
            seen = format!(
                "{seen}; {} lets none of these visitors in: is the name right, and is `--other-cert` good for it?",
                closed.join(" ")
            );
        }
        Check {
            answered: closed.is_empty(),
            ..check(seen, Vec::from_iter(finding))
        }
    }

    fn other_names(&self, shown: Option<&CertificateDer<'static>>) -> Vec<String> {
        let named = self.visitors.other_names.iter().cloned();
        let on_certificate = shown
            .map(names)
            .unwrap_or_default()
            .into_iter()
            .take(NAMES_MAX);
        let mut others = Vec::new();
        for name in named.chain(on_certificate).chain([UNKNOWN.to_owned()]) {
            let is_ours = name.eq_ignore_ascii_case(&self.target.name);
            if !is_ours && !name.contains('*') && !others.contains(&name) {
                others.push(name);
            }
        }
        others
    }

    /// Whether a name that was given serves any of the visitors.
    fn is_let_in(&self, name: &str, visitors: &[Option<&Arc<CertifiedKey>>]) -> bool {
        let mut visitors = visitors.iter();
        visitors.any(|identity| {
            let there = Visit {
                server_name: Some(name),
                host: name,
                ..self.visit(*identity, ANY)
            };
            Reception::elsewhere(&there.connect()).is_served()
        })
    }

    /// By which version a session of `name` opens the site, if by one; and how many there were.
    fn opens(
        &self,
        name: &str,
        identity: Option<&Arc<CertifiedKey>>,
    ) -> (Option<&'static str>, usize) {
        let mut sessions = 0;
        for (versions, version) in VERSIONS {
            let memory = ClientMemory::new();
            let there = Visit {
                server_name: Some(name),
                host: name,
                memory: Some(&memory),
                ..self.visit(identity, versions)
            };
            // Tickets of TLS 1.3 come with the answer.
            if !matches!(there.connect().ending, Ending::Answered(_)) || memory.is_empty() {
                continue;
            }
            sessions += 1;
            let here = Visit {
                memory: Some(&memory),
                ..self.visit(identity, versions)
            };
            let visited = here.connect();
            if visited.is_resumed && Reception::elsewhere(&visited).is_served() {
                return (Some(version), sessions);
            }
        }
        (None, sessions)
    }
}

const OWN_SESSIONS: &str = "nginx: 1.27.4 or newer, or `ssl_session_tickets off` and a `ssl_session_cache` of its own for each \
                            site; Apache: 2.4.64 or newer, or `SSLSessionTickets off` and `SSLSessionCache none`";
/// Names of a certificate that are tried.
const NAMES_MAX: usize = 3;
