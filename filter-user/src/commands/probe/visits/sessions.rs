//! Whether a session that was made under another name, or with another certificate, opens the site: servers that keep
//! the sessions of all names together have done that (CVE-2025-23419, CVE-2025-23048).

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;

use super::names::names;
use super::{OriginProbe, UNKNOWN, VERSIONS};
use crate::commands::examination::Check;
use crate::observe::Finding;
use crate::web::refuses;
use crate::web::visit::{ClientMemory, Ending, Visit};

impl OriginProbe<'_> {
    /// Sessions by the other names of the certificate and by those of the command line, offered for the site.
    pub(super) fn with_sessions(&self, shown: Option<&CertificateDer<'static>>) -> Check {
        let strangers = self.strangers();
        let (mut opening, mut not_admitted, mut tries) = (Vec::new(), Vec::new(), Tries::default());
        for name in self.other_names(shown) {
            let before = tries.admitted;
            let opened = strangers
                .iter()
                .find_map(|stranger| self.opens(&name, stranger.identity, &mut tries));
            opening.extend(opened.map(|version| format!("{name} by {version}")));
            if tries.admitted == before && self.visitors.other_names.contains(&name) {
                not_admitted.push(name);
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
        let mut seen = format!("{} sessions offered", tries.offered);
        if !not_admitted.is_empty() {
            let advice = if self.visitors.other.is_some() {
                "is the name right, and is `--other-cert` good for it?"
            } else {
                "give `--other-cert` that is good for it, and not for the site"
            };
            seen = format!(
                "{seen}; none of these visitors is admitted to {}: {advice}",
                not_admitted.join(" ")
            );
        }
        if tries.unanswered > 0 {
            seen = format!("{seen}; {} visits had no answer", tries.unanswered);
        }
        Check {
            id: "sessions",
            about: "no other name's session opens the site",
            answered: not_admitted.is_empty() && tries.unanswered == 0,
            seen,
            findings: Vec::from_iter(finding),
        }
    }

    /// Those of the command line and of the certificate, and one that no origin serves.
    pub(super) fn other_names(&self, shown: Option<&CertificateDer<'static>>) -> Vec<String> {
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

    /// By which version a session of `name` opens the site, if by one.
    fn opens(
        &self,
        name: &str,
        identity: Option<&Arc<CertifiedKey>>,
        tries: &mut Tries,
    ) -> Option<&'static str> {
        for (versions, version) in VERSIONS {
            let memory = ClientMemory::new();
            let there = Visit {
                server_name: Some(name),
                host: name,
                path: "/",
                memory: Some(&memory),
                ..self.visit(identity, versions)
            };
            let first = there.connect().ending;
            // Tickets of TLS 1.3 come with the answer.
            let answered = matches!(first, Ending::Answered(_));
            tries.unanswered += usize::from(first.is_unanswered());
            tries.admitted += usize::from(answered && !is_refused(&first));
            if !answered || memory.is_empty() {
                continue;
            }
            let here = Visit {
                memory: Some(&memory),
                ..self.visit(identity, versions)
            };
            let resumed = here.connect();
            tries.offered += 1;
            tries.unanswered += usize::from(resumed.ending.is_unanswered());
            let is_open =
                matches!(resumed.ending, Ending::Answered(_)) && !is_refused(&resumed.ending);
            if resumed.is_resumed && is_open {
                return Some(version);
            }
        }
        None
    }
}

/// What came of the visits, of all names.
#[derive(Default)]
struct Tries {
    /// Sessions that were offered for the site.
    offered: usize,
    /// Visits that say nothing, as they had no answer.
    unanswered: usize,
    /// Visits that another name answered.
    admitted: usize,
}

/// Whether a server has looked at the session again, and refuses the request for it: what an application answers is
/// service, also if that is 404.
fn is_refused(ending: &Ending) -> bool {
    matches!(ending, Ending::Answered(answer) if refuses(answer) || answer.status == Some(421))
}

const OWN_SESSIONS: &str = "nginx: 1.26.3 or 1.27.4, or newer, or `ssl_session_tickets off` and `ssl_session_cache off` in each \
                            `server`; Apache: 2.4.64 or newer, or `SSLSessionTickets off` and `SSLSessionCache none`; HAProxy: one `verify` and \
                            one `ca-file` for all names of a `bind` line, or `no-tls-tickets` there and `tune.ssl.cachesize 0`";
/// Names of a certificate that are tried.
const NAMES_MAX: usize = 3;
