//! The questions: what is so if all is OK, and which findings say otherwise.

use super::Facts;
use crate::control::protocol::HostStatus;
use crate::host::kernel;
use crate::role::Role;

/// A question.
pub(super) struct Question {
    pub(super) subject: Subject,
    pub(super) answered_by: AnsweredBy,
    /// Stays the same from version to version.
    pub(super) id: &'static str,
    /// What is so if it is OK.
    pub(super) about: &'static str,
    /// The findings that say otherwise.
    pub(super) findings: &'static [&'static str],
}

/// Who knows the answer: without it, nothing is known, and that is no all-clear.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum AnsweredBy {
    /// A look from here.
    Us,
    /// A role that runs.
    Role(Role),
    /// Any role that runs.
    AnyRole,
    /// A filter that is attached.
    AttachedFilter,
}

impl AnsweredBy {
    pub(super) fn is_there(self, report: &HostStatus) -> bool {
        let mut roles = report.roles.iter();
        match self {
            Self::Us => true,
            Self::Role(role) => roles.any(|status| status.role == role),
            Self::AnyRole => roles.next().is_some(),
            Self::AttachedFilter => {
                let mut interfaces = roles.filter_map(|status| status.filter.as_ref());
                interfaces.any(|filter| filter.interfaces.iter().any(|it| it.filtered))
            }
        }
    }
}

/// What a question is about; one that the configuration has nothing of is not asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Subject {
    Pullgate,
    Filter,
    Steering,
    Ranges,
    /// Lists that should have Cloudflare's ranges: not fixed ranges alone, and not another network's.
    CloudflareRanges,
    Gate,
    /// A web server that demands the certificate itself: there is no gate.
    WebServer,
    Host,
}

/// What was looked at for a question, as far as it is worth a line.
pub(super) fn seen(question: &str, facts: &Facts) -> String {
    let roles = || facts.report.roles.iter();
    let detail = |name: &str| {
        let found = roles().flat_map(|role| {
            let details = role.details.iter().filter(|(key, _)| key == name);
            details.map(|(_, value)| format!("{}: {value}", role.role.label()))
        });
        found.collect::<Vec<_>>().join("; ")
    };
    match question {
        "roles" => roles()
            .map(|role| format!("{} (pid {})", role.role.label(), role.pid))
            .collect::<Vec<_>>()
            .join(", "),
        "interfaces" => roles()
            .filter_map(|role| role.filter.as_ref())
            .flat_map(|filter| &filter.interfaces)
            .map(|it| format!("{} ({})", it.name, it.mode))
            .collect::<Vec<_>>()
            .join(", "),
        "lists" => roles()
            .next()
            .map_or_else(String::new, |role| role.ranges.to_string()),
        "port" => detail("listen"),
        "certificates" => detail("hosts"),
        "kernel" => format!("Linux {}", kernel::release()),
        _ => String::new(),
    }
}

/// All of them, in the order in which they are asked.
pub(super) const QUESTIONS: [Question; 28] = [
    Question {
        subject: Subject::Pullgate,
        answered_by: AnsweredBy::Us,
        id: "configuration",
        about: "the configuration can be used, and is what the roles have read",
        findings: &[
            "configuration-not-read",
            "configuration-not-reloaded",
            "configuration-unusable",
            "file-unreadable",
            "files-on-disk-unusable",
            "files-unusable",
            "list-unreadable",
            "nothing-protected",
            "restart-needed",
            "start-refused",
        ],
    },
    Question {
        subject: Subject::Pullgate,
        answered_by: AnsweredBy::Us,
        id: "roles",
        about: "every role that is configured runs and answers",
        findings: &[
            "filter-hangs",
            "gate-thread-hangs",
            "metrics-disabled",
            "on-trial",
            "refresh-overdue",
            "role-not-answering",
            "role-not-running",
        ],
    },
    Question {
        subject: Subject::Pullgate,
        answered_by: AnsweredBy::Us,
        id: "units",
        about: "systemd starts the roles at the next boot",
        findings: &["unit-not-enabled", "units-unknown"],
    },
    Question {
        subject: Subject::Pullgate,
        answered_by: AnsweredBy::AnyRole,
        id: "confinement",
        about: "each role is confined to what it needs",
        findings: &[
            "client-address-transparent",
            "landlock-partial",
            "runs-as-root",
            "unconfined",
        ],
    },
    Question {
        subject: Subject::Filter,
        answered_by: AnsweredBy::AttachedFilter,
        id: "enforcing",
        about: "strangers' packets are dropped",
        findings: &["monitor-mode"],
    },
    Question {
        subject: Subject::Filter,
        answered_by: AnsweredBy::Role(Role::Filter),
        id: "interfaces",
        about: "the filter is wherever packets can come in",
        findings: &[
            "guests-filtered",
            "interface-missing",
            "interface-not-filtered",
            "interface-not-named",
            "interfaces-unreadable",
            "neighbours-filtered",
            "no-interface",
            "packets-unseen",
            "uplinks-not-remembered",
        ],
    },
    Question {
        subject: Subject::Filter,
        answered_by: AnsweredBy::AttachedFilter,
        id: "attachment",
        about: "it is attached by the fastest way, and is first",
        findings: &[
            "attach-mode-weaker",
            "counters-unreadable",
            "pin-removed",
            "tcx-program-before",
        ],
    },
    Question {
        subject: Subject::Filter,
        answered_by: AnsweredBy::Us,
        id: "ports",
        about: "no program answers strangers on a port that Cloudflare proxies",
        findings: &[
            "gate-port-unprotected",
            "loopback-routed",
            "outgoing-ports-protected",
            "port-redirected",
            "redirection-unread",
            "tcp-port-open",
            "udp-port-open",
        ],
    },
    Question {
        subject: Subject::Filter,
        answered_by: AnsweredBy::Us,
        id: "destinations",
        about: "packets to every address of this host are judged",
        findings: &[
            "destination-foreign",
            "destination-missing",
            "destinations-unread",
            "destinations-partial",
        ],
    },
    Question {
        subject: Subject::Filter,
        answered_by: AnsweredBy::AttachedFilter,
        id: "flood",
        about: "the filter has no flood of SYNs to answer",
        findings: &["syn-cookies-missing", "syn-flood"],
    },
    Question {
        subject: Subject::Filter,
        answered_by: AnsweredBy::AttachedFilter,
        id: "kernel-ranges",
        about: "packets are judged by the active ranges",
        findings: &["kernel-ranges-tampered", "ranges-not-published"],
    },
    Question {
        subject: Subject::Steering,
        answered_by: AnsweredBy::Role(Role::Filter),
        id: "steering",
        about: "connections to the web server's port reach the gate",
        findings: &[
            "no-gate-socket",
            "not-steered",
            "other-sk-lookup",
            "port-not-steered",
            "steered-until-confirmed",
            "steering-detached",
        ],
    },
    Question {
        subject: Subject::Steering,
        answered_by: AnsweredBy::Role(Role::Filter),
        id: "return-path",
        about: "the gate reaches the web server behind it",
        findings: &[
            "return-path-left",
            "return-path-missing",
            "return-path-removed",
            "web-server-absent",
            "web-server-demands-certificate",
            "web-server-unreached",
            "web-server-without-tls",
        ],
    },
    Question {
        subject: Subject::Ranges,
        answered_by: AnsweredBy::AnyRole,
        id: "lists",
        about: "the lists are fresh, and none waits for approval",
        findings: &[
            "baseline-active",
            "documentation-ranges",
            "list-expired",
            "list-held",
            "list-missing",
            "list-stale",
            "range-usage-unknown",
            "refresh-failed",
            "snapshot-refused",
        ],
    },
    Question {
        subject: Subject::Ranges,
        answered_by: AnsweredBy::Us,
        id: "allow",
        about: "your own rules admit no great part of the Internet",
        findings: &["allow-wide"],
    },
    Question {
        subject: Subject::CloudflareRanges,
        answered_by: AnsweredBy::Us,
        id: "cloudflare",
        about: "Cloudflare's addresses are admitted (else visitors see error 522)",
        findings: &["cloudflare-refused", "cloudflare-unlisted", "ranges-unread"],
    },
    Question {
        subject: Subject::Ranges,
        answered_by: AnsweredBy::AnyRole,
        id: "clock",
        about: "this host's clock is not behind the lists",
        findings: &["list-from-future"],
    },
    Question {
        subject: Subject::Gate,
        answered_by: AnsweredBy::Role(Role::Gate),
        id: "port",
        about: "the gate answers on its ports (else visitors see error 521)",
        findings: &[
            "file-limit-low",
            "gate-port-taken",
            "ipv6-missing",
            "socket-unanswered",
        ],
    },
    Question {
        subject: Subject::Gate,
        answered_by: AnsweredBy::Us,
        id: "certificates",
        about: "hosts show valid certificates (else visitors see error 526)",
        findings: &[
            "certificate-expired",
            "certificate-expires",
            "certificate-shared",
            "chain-incomplete",
            "name-not-on-certificate",
        ],
    },
    Question {
        subject: Subject::Gate,
        answered_by: AnsweredBy::Us,
        id: "trust",
        about: "only your account's certificate is admitted",
        findings: &[
            "authority-expired",
            "authority-expires",
            "client-auth-log",
            "client-auth-off",
            "crl-expired",
            "crl-expires",
            "port-beside-gate",
            "shared-ca",
        ],
    },
    Question {
        subject: Subject::Gate,
        answered_by: AnsweredBy::Role(Role::Gate),
        id: "refusals",
        about: "no client from Cloudflare was refused lately (visitors see 520 or 525)",
        findings: &["clients-refused"],
    },
    Question {
        subject: Subject::Gate,
        answered_by: AnsweredBy::Us,
        id: "upstream",
        about: "the web server behind the gate answers the gate alone",
        findings: &[
            "h2-not-spoken",
            "h2-unknown",
            "proxy-header-mismatch",
            "upstream-distrusted",
            "upstream-exposed",
            "upstream-path-open",
            "upstream-port-open",
            "upstream-shared",
            "upstream-silent",
        ],
    },
    Question {
        subject: Subject::WebServer,
        answered_by: AnsweredBy::Us,
        id: "listening",
        about: "a program answers on the protected ports (else visitors see error 521)",
        findings: &["listening-unread", "port-silent"],
    },
    Question {
        subject: Subject::WebServer,
        answered_by: AnsweredBy::Us,
        id: "demands",
        about: "the default site demands a certificate that your account alone has",
        findings: &["any-customer-admitted", "any-customer-unknown"],
    },
    Question {
        subject: Subject::WebServer,
        answered_by: AnsweredBy::Us,
        id: "sites",
        about: "so does every other site on its ports, and none resumes another's sessions",
        findings: &[
            "sessions-shared",
            "site-admits-any-customer",
            "site-on-open-port",
            "site-without-demand",
            "sites-unreadable",
        ],
    },
    Question {
        subject: Subject::Host,
        answered_by: AnsweredBy::Us,
        id: "kernel",
        about: "the kernel and the listeners are set up for a flood",
        findings: &[
            "backlog-short",
            "listener-queue-short",
            "syncookies-always",
            "syncookies-off",
            "timestamps-off",
        ],
    },
    Question {
        subject: Subject::Host,
        answered_by: AnsweredBy::Us,
        id: "time",
        about: "a program keeps this host's clock in time",
        findings: &["clock-not-kept"],
    },
    Question {
        subject: Subject::Filter,
        answered_by: AnsweredBy::Role(Role::Filter),
        id: "receiving",
        about: "packets are received on several processors",
        findings: &["one-processor-receives"],
    },
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_finding_answers_one_question() {
        let manual = include_str!("../../../../docs/findings.md");
        // What is asked from outside is no question of this command.
        let (manual, _) = manual.split_once("\n## Asked by probe\n").unwrap();
        let manual = manual.lines();
        let ids = manual.filter_map(|line| line.strip_prefix("| `")?.split('`').next());
        let documented: BTreeSet<_> = ids.collect();
        let mut sorted = BTreeSet::new();
        for id in QUESTIONS.iter().flat_map(|question| question.findings) {
            assert!(sorted.insert(*id), "{id} answers two");
        }

        assert_eq!(sorted, documented);
    }
}
