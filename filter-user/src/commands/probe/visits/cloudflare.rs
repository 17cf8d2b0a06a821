//! Whether the certificate that Cloudflare presents is admitted and answered, and for its own host alone.

use std::sync::Arc;

use rustls::sign::CertifiedKey;

use super::{ANY, OriginProbe, VERSIONS, Versions};
use crate::commands::examination::Check;
use crate::commands::probe::reception::{Reception, in_words};
use crate::observe::{Finding, Severity};
use crate::report::chain;
use crate::web::visit::{ClientMemory, Ending, Visit, is_about_certificate, is_about_version};

impl OriginProbe<'_> {
    pub(super) fn as_cloudflare(&self) -> Option<Check> {
        let own = self.visitors.own.as_ref()?;
        let mut outcomes = Outcomes::default();
        for (versions, word) in VERSIONS {
            self.visit_by(own, versions, word, &mut outcomes);
        }
        // Cloudflare speaks HTTP/2 to origins that offer it.
        let by_http2 = self
            .visit(Some(own), ANY)
            .ask_by_http2(&[&self.target.name]);
        match by_http2.map(|mut answers| answers.pop()) {
            Ok(Some(Ok(answer))) => outcomes
                .seen
                .push(format!("HTTP/2: {}", in_words(answer.status))),
            Ok(Some(Err(error))) => outcomes
                .unanswered
                .push(format!("by HTTP/2: {}", chain(&error))),
            // The versions of TLS say why the handshake failed.
            Ok(None) | Err(_) => {}
        }
        let is_admitted = outcomes.is_admitted;
        let answered = is_admitted || !outcomes.is_empty();
        let seen = outcomes.seen.join("; ");
        let mut findings = outcomes.into_findings();
        findings.extend(is_admitted.then(|| self.of_other_hosts(own)).flatten());
        Some(Check {
            id: "cloudflare",
            about: "Cloudflare's certificate is admitted and answered, for its own host",
            answered,
            seen,
            findings,
        })
    }

    fn visit_by(
        &self,
        own: &Arc<CertifiedKey>,
        versions: Versions,
        word: &str,
        outcomes: &mut Outcomes,
    ) {
        let memory = ClientMemory::new();
        let with_memory = |identity| Visit {
            memory: Some(&memory),
            ..self.visit(identity, versions)
        };
        let visited = with_memory(Some(own)).connect();
        // What the application says to Cloudflare is its own matter.
        let reception = match (&visited.ending, Reception::at_the_site(&visited)) {
            (Ending::Answered(answer), Reception::Unknown(_)) => Reception::Served(answer.status),
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
        outcomes.seen.push(format!("{word}: {received}"));
        match (&visited.ending, visited.requested) {
            (Ending::Answered(answer), _) if answer.status.is_none() => {
                outcomes
                    .unanswered
                    .push(format!("by {word}: an answer that is no HTTP"));
            }
            (Ending::Answered(answer), _) if reception.is_served() => {
                outcomes.is_admitted = true;
                let status = answer
                    .status
                    .filter(|status| matches!(status, 400 | 421 | 500..));
                outcomes
                    .errors
                    .extend(status.map(|status| format!("{status} by {word}")));
            }
            (Ending::Answered(_), _) => outcomes.refused.push(format!("{received} by {word}")),
            (Ending::Refused(error), Some(_)) => {
                let outcome = format!("by {word}: {}", chain(error));
                if is_about_certificate(error) {
                    outcomes.refused.push(outcome);
                } else {
                    outcomes.unanswered.push(outcome);
                }
            }
            // The handshake was over, as a certificate was shown.
            (Ending::Refused(error), None)
                if visited.shown.is_some() && !is_about_version(error) =>
            {
                outcomes
                    .unanswered
                    .push(format!("by {word}: {}", chain(error)));
            }
            // A version that is not spoken says nothing of the certificate.
            (_, _) => {}
        }
    }
}

/// What came of the visits, and why visitors see an error if they do.
#[derive(Default)]
struct Outcomes {
    seen: Vec<String>,
    is_admitted: bool,
    /// Statuses that say that the web server or what is behind it is broken.
    errors: Vec<String>,
    /// The certificate was refused.
    refused: Vec<String>,
    /// The connection ended, and nothing says why.
    unanswered: Vec<String>,
}

impl Outcomes {
    fn is_empty(&self) -> bool {
        self.refused.is_empty() && self.unanswered.is_empty()
    }

    fn into_findings(mut self) -> Vec<Finding> {
        let mut findings = Vec::new();
        if !self.errors.is_empty() {
            let text = format!(
                "Cloudflare's certificate is admitted, and the answer is an error ({}): visitors see it too",
                self.errors.join(", ")
            );
            findings.push(Finding::warning("origin-error", text));
        }
        // A reset can overtake the reason, which the other version has then.
        if !self.refused.is_empty() {
            self.refused.append(&mut self.unanswered);
            let text = format!(
                "the certificate that Cloudflare presents is not admitted ({}): visitors see error 520 or 525",
                self.refused.join("; ")
            );
            findings.push(Finding::error("own-certificate-refused", text));
        } else if !self.unanswered.is_empty() {
            let text = format!(
                "the connection with the certificate that Cloudflare presents ends without an answer, and nothing says \
                 that it is for the certificate ({}): visitors see error 520, 525 or 502",
                self.unanswered.join("; ")
            );
            findings.push(Finding::error("no-answer-to-cloudflare", text));
        }
        let remedied = findings.into_iter().map(|finding| {
            // It is admitted by the other version.
            let severity = if self.is_admitted {
                Severity::Warning
            } else {
                finding.severity
            };
            let finding = Finding {
                severity,
                ..finding
            };
            finding.remedy("on the origin: `pullgate doctor`, or the web server's error log")
        });
        remedied.collect()
    }
}
