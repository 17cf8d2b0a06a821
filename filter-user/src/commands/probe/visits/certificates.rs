//! Which client certificates are admitted, Cloudflare's among them.

use std::sync::Arc;

use rustls::sign::CertifiedKey;

use super::{OriginProbe, UNKNOWN, VERSIONS, Versions};
use crate::commands::examination::Check;
use crate::commands::probe::reception::{Both, Reception};
use crate::observe::Finding;
use crate::report::chain;
use crate::web::visit::{ClientMemory, Ending, Visit, is_alert};

impl OriginProbe<'_> {
    pub(super) fn without_certificate(&self) -> (Check, Both) {
        let both = self.by_both(Reception::at_the_site, |versions| {
            self.visit(None, versions)
        });
        let name = &self.target.name;
        let finding = both.served().map(|by| {
            let text = format!(
                "{name} is served without a client certificate, by {by}: a client that knows the address gets \
                 around Cloudflare"
            );
            Finding::error("served-without-certificate", text).remedy(DEMAND)
        });
        let check = Check {
            id: "certificate",
            about: "a visitor without a certificate is refused",
            answered: both.is_known,
            seen: both.seen.clone(),
            findings: Vec::from_iter(finding),
        };
        (check, both)
    }

    pub(super) fn with_forged_certificates(&self) -> Check {
        let (mut seen, mut findings, mut answered) = (Vec::new(), Vec::new(), true);
        for (what, identity) in &self.visitors.forged {
            let both = self.by_both(Reception::at_the_site, |versions| {
                self.visit(Some(identity), versions)
            });
            findings.extend(both.served().map(|by| {
                let text = format!("{what} is taken, by {by}: any client can make one");
                Finding::error("served-with-forged-certificate", text).remedy(VERIFY)
            }));
            answered &= both.is_known;
            seen.push(format!("{what}: {}", both.seen));
        }
        Check {
            id: "forged",
            about: "forged certificates are refused",
            answered,
            seen: seen.join("; "),
            findings,
        }
    }

    /// What the operator says is not good for the site.
    pub(super) fn with_other_certificate(&self) -> Option<Check> {
        let other = self.visitors.other.as_ref()?;
        let both = self.by_both(Reception::at_the_site, |versions| {
            self.visit(Some(other), versions)
        });
        let finding = both.served().map(|by| {
            let text = format!(
                "the certificate that has to be refused is taken, by {by}: a client that has its key gets around Cloudflare"
            );
            Finding::error("other-certificate-admitted", text).remedy(REFUSE)
        });
        Some(Check {
            id: "other",
            about: "the certificate that is not good for the site is refused",
            answered: both.is_known,
            seen: both.seen,
            findings: Vec::from_iter(finding),
        })
    }

    pub(super) fn as_cloudflare(&self) -> Option<Check> {
        let own = self.visitors.own.as_ref()?;
        let (mut findings, mut seen, mut served_by) = (Vec::new(), Vec::new(), Vec::new());
        let (mut refusals, mut endings) = (Vec::new(), Vec::new());
        for (versions, word) in VERSIONS {
            let memory = ClientMemory::new();
            let with_memory = |identity| Visit {
                memory: Some(&memory),
                ..self.visit(identity, versions)
            };
            let visited = with_memory(Some(own)).connect();
            // What the application says to Cloudflare is its own matter.
            let reception = match (&visited.ending, Reception::at_the_site(&visited)) {
                (Ending::Answered(answer), Reception::Unknown(_)) => {
                    Reception::Served(answer.status)
                }
                (_, reception) => reception,
            };
            let mut received = reception.in_words();
            if reception.is_served() && !memory.is_empty() {
                // TLS permits that (RFC 8446 §2.2): who has the session has shown the certificate.
                let again = with_memory(None).connect();
                if again.is_resumed && Reception::at_the_site(&again).is_served() {
                    received += ", and its session without it";
                }
            }
            seen.push(format!("{word}: {received}"));
            match (&visited.ending, visited.requested) {
                (Ending::Answered(answer), _) if reception.is_served() => {
                    served_by.push((versions, answer.body().to_owned()));
                }
                (Ending::Refused(error), Some(_)) if is_alert(error) => {
                    refusals.push(format!("by {word}: {}", chain(error)));
                }
                (Ending::Refused(error), Some(_)) => {
                    endings.push(format!("by {word}: {}", chain(error)));
                }
                (Ending::Answered(_), _) => {
                    refusals.push(format!("by {word}: {}", reception.in_words()))
                }
                // A version that is not spoken says nothing of the certificate.
                (_, _) => {}
            }
        }
        let answered = !(served_by.is_empty() && refusals.is_empty() && endings.is_empty());
        findings.extend(not_admitted(refusals, endings));
        let first = served_by.first();
        findings
            .extend(first.and_then(|(versions, page)| self.of_another_host(own, versions, page)));
        Some(Check {
            id: "cloudflare",
            about: "Cloudflare's certificate is admitted, for its own host",
            answered,
            seen: seen.join("; "),
            findings,
        })
    }

    /// HTTP/1.1 and HTTP/2 let a request name any host, on a connection for one. The same page is that of the one
    /// site that there is, or of the first.
    fn of_another_host(
        &self,
        own: &Arc<CertifiedKey>,
        versions: Versions,
        page: &str,
    ) -> Option<Finding> {
        let other = Visit {
            host: UNKNOWN,
            ..self.visit(Some(own), versions)
        };
        let visited = other.connect();
        let Ending::Answered(answer) = &visited.ending else {
            return None;
        };
        if !Reception::elsewhere(&visited).is_served() || answer.body() == page {
            return None;
        }
        let text = format!(
            "on a connection for {}, a request for another host is answered by another site: the certificate of one \
             is good for that too",
            self.target.name
        );
        Some(Finding::warning("other-host-served", text).remedy(
            "let the web server refuse a `Host` that is not the connection's name, if its sites have different visitors",
        ))
    }
}

/// What an error in a visitor's browser comes from. Where one version has the reason, the other has it too: a reset can
/// overtake it.
fn not_admitted(mut refusals: Vec<String>, endings: Vec<String>) -> Option<Finding> {
    let finding = if refusals.is_empty() {
        let text = format!(
            "the connection with the certificate that Cloudflare presents ends without an answer and without a reason ({}): \
             visitors see error 520 or 502",
            endings.join("; ")
        );
        (!endings.is_empty()).then(|| Finding::error("no-answer-to-cloudflare", text))
    } else {
        refusals.extend(endings);
        let text = format!(
            "the certificate that Cloudflare presents is not admitted ({}): visitors see error 520 or 525",
            refusals.join("; ")
        );
        Some(Finding::error("own-certificate-refused", text))
    };
    finding.map(|finding| {
        finding.remedy("on the origin: `pullgate doctor`, or the web server's error log")
    })
}

const DEMAND: &str = "nginx: `ssl_verify_client on` and `ssl_client_certificate` in that `server`; Apache: `SSLVerifyClient \
                      require` in that site; HAProxy: `verify required ca-file …` on the `bind` line; Caddy: `client_auth` \
                      with `require_and_verify`; pullgate: `client_auth = \"enforce\"`";
const VERIFY: &str = "nginx: `ssl_verify_client on`, not `optional_no_ca`; Apache: `SSLVerifyClient require`, not \
                      `optional_no_ca`; HAProxy: no `crt-ignore-err` or `ca-ignore-err`; Caddy: `require_and_verify`";
const REFUSE: &str = "revoke it (nginx: `ssl_crl`; Apache: `SSLCARevocationFile` with `SSLCARevocationCheck chain`; HAProxy: \
                        `crl-file`; pullgate: `crl`), or trust another CA";
