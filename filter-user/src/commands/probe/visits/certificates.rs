//! Whether clients are refused that have no certificate, or none that is good.

use super::OriginProbe;
use crate::commands::examination::Check;
use crate::commands::probe::pages::{Connections, Shown, Version};
use crate::commands::probe::reception::{Both, Reception};
use crate::observe::Finding;

impl OriginProbe<'_> {
    pub(super) fn without_certificate(&self) -> (Check, Both) {
        let mut both = self.by_both(Reception::at_the_site, |versions| {
            self.visit(None, versions)
        });
        self.by_http2(&mut both);
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

    /// A server may demand the certificate where HTTP/1.1 is spoken alone.
    fn by_http2(&self, both: &mut Both) {
        let connections = Connections {
            target: self.target,
            server_name: Some(&self.target.name),
            identity: None,
            names: &[],
        };
        match connections.show(Version::Http2, [&self.target.name]) {
            [Shown::Page(page)] if both.served_by.is_empty() && !page.is_no_page() => {
                both.served_by.push("HTTP/2");
                both.seen += "; HTTP/2: served";
            }
            _ => {}
        }
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
}

const DEMAND: &str = "nginx: `ssl_verify_client on` and `ssl_client_certificate` in that `server`; Apache: `SSLVerifyClient \
                      require` in that site; HAProxy: `verify required ca-file …` on the `bind` line; Caddy: `client_auth` \
                      with `require_and_verify`; pullgate: `client_auth = \"enforce\"`";
const VERIFY: &str = "nginx: `ssl_verify_client on`, not `optional_no_ca`; Apache: `SSLVerifyClient require`, not \
                      `optional_no_ca`; HAProxy: no `crt-ignore-err` or `ca-ignore-err`; Caddy: `require_and_verify`";
const REFUSE: &str = "revoke it (nginx: `ssl_crl`; Apache: `SSLCARevocationFile` with `SSLCARevocationCheck chain`; HAProxy: \
                        `crl-file`; pullgate: `crl`), or trust another CA";
