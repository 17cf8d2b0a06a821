//! What is served and shown by names that are not the site's.

use rustls::pki_types::CertificateDer;
use std::net::IpAddr;
use webpki::EndEntityCert;

use super::{OriginProbe, REFUSE_NAMES, UNKNOWN};
use crate::commands::examination::Check;
use crate::commands::probe::reception::Reception;
use crate::observe::Finding;
use crate::web::visit::Visit;

impl OriginProbe<'_> {
    /// By names that the origin does not serve.
    pub(super) fn by_other_names(&self) -> Check {
        let (mut seen, mut findings, mut answered) = (Vec::new(), Vec::new(), true);
        let address = match self.target.address.ip() {
            IpAddr::V4(address) => address.to_string(),
            IpAddr::V6(address) => format!("[{address}]"),
        };
        for (what, server_name) in [("an unknown name", Some(UNKNOWN)), ("no name", None)] {
            let by_host = |host| {
                self.by_both(Reception::elsewhere, |versions| Visit {
                    server_name,
                    host,
                    ..self.visit(None, versions)
                })
            };
            let both = by_host(UNKNOWN);
            findings.extend(
                both.served()
                    .map(|by| self.default_site(what, &by, both.redirects)),
            );
            let names = both.shown.as_ref().map(names);
            findings.extend(names.map(|names| {
                let names = in_words(&names);
                let text = format!(
                    "a client that asks for {what} is shown a certificate ({names}): a scanner of addresses learns \
                     whose this one is"
                );
                Finding::warning("certificate-shown", text).remedy(REFUSE_NAMES)
            }));
            answered &= both.is_known;
            seen.push(format!("{what}: {}", both.seen));
            // The address is no name that a ClientHello may have (RFC 6066 §3), and a `Host` all the same.
            if server_name.is_none() && both.served().is_none() {
                let by_address = by_host(&address);
                answered &= by_address.is_known;
                seen.push(format!("its address: {}", by_address.seen));
                let served = by_address.served();
                findings.extend(
                    served.map(|by| self.default_site("its address", &by, by_address.redirects)),
                );
            }
        }
        Check {
            id: "names",
            about: "names that are not served are refused",
            answered,
            seen: seen.join("; "),
            findings,
        }
    }

    fn default_site(&self, what: &str, by: &str, redirects: bool) -> Finding {
        let address = self.target.address.ip();
        let finding = if redirects {
            let text = format!("a client that asks for {what} is redirected, by {by}");
            Finding::warning("default-site-redirects", text)
        } else {
            let text = format!(
                "a client that asks for {what} is served, by {by}: another Cloudflare customer who points a name at \
                 {address} gets this site by way of Cloudflare"
            );
            Finding::error("default-site-served", text)
        };
        finding.remedy(REFUSE_NAMES)
    }
}

/// The names that a certificate is for, as far as it can be read.
pub(super) fn names(certificate: &CertificateDer<'static>) -> Vec<String> {
    let parsed = EndEntityCert::try_from(certificate).ok();
    let parsed = parsed.iter();
    let names = parsed.flat_map(|parsed| parsed.valid_dns_names());
    names.take(NAMES_MAX).map(str::to_owned).collect()
}

fn in_words(names: &[String]) -> String {
    match names {
        [] => "for no name that can be read".to_owned(),
        names => names[..names.len().min(SHOWN_MAX)].join(" "),
    }
}

/// Names of a certificate that are kept: one more than are asked for in DNS.
const NAMES_MAX: usize = 21;
/// Names of it that a finding has.
const SHOWN_MAX: usize = 5;
