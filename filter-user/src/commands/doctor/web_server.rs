//! What the web server's own configuration leaves open, where no gate stands in front of it.

use std::path::Path;

use rustls::DistinguishedName;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::commands::served::{Listen, ServedSite, web_servers};
use crate::config::{Config, FilterSettings};
use crate::gate::is_shared_authority;
use crate::observe::Finding;
use crate::web::{Demand, demand_by};

pub(super) fn findings(config: &Config) -> Vec<Finding> {
    let (Some(filter), None) = (&config.live.filter, &config.live.gate) else {
        return Vec::new();
    };
    let (mut findings, mut sites) = (Vec::new(), Vec::new());
    let (serving, _stopped) = web_servers();
    for server in serving {
        match server.sites {
            Ok(mut found) => {
                findings.extend(found.iter().filter_map(|site| beside(site, filter)));
                found.retain(|site| is_protected(site, filter));
                findings.extend(server.flaw.and_then(|flaw| resuming(&found, &flaw)));
                sites.extend(found);
            }
            Err(error) => {
                let program = server.program.display();
                let text = format!("what {program} serves cannot be read: {error}");
                findings.push(Finding::warning("sites-unreadable", text));
            }
        }
    }
    if sites.is_empty() {
        let text = "no site on a protected port is in what nginx, Apache and Caddy print of themselves: whether each \
                    site there demands a certificate is not known";
        findings.push(Finding::warning("sites-unreadable", text));
    }
    findings.extend(sites.iter().filter_map(undemanding));
    findings.extend(sites.iter().filter_map(shared));
    findings.extend(sites.iter().filter_map(serving_all_the_same));
    findings
}

fn is_protected(site: &ServedSite, filter: &FilterSettings) -> bool {
    let mut ports = site.listens.iter().map(|listen| listen.port());
    ports.any(|port| filter.ports.contains(&port))
}

/// A site that is served on a port which the filter does not judge, too.
fn beside(site: &ServedSite, filter: &FilterSettings) -> Option<Finding> {
    let is_open =
        |listen: &&Listen| !listen.is_loopback() && !filter.ports.contains(&listen.port());
    let mut open = site
        .listens
        .iter()
        .filter(|_| !site.refuses_all)
        .filter(is_open);
    let port = open.next()?.port();
    let text = format!(
        "{}: {} is served on port {port}, which `filter.ports` does not name: strangers reach it there",
        site.place,
        name(site)
    );
    Some(
        Finding::warning("site-on-open-port", text)
            .remedy("add the port to `filter.ports`, or let the site listen on loopback alone"),
    )
}

fn name(site: &ServedSite) -> String {
    match &site.names[..] {
        [] => "a site without a name".to_owned(),
        names => names.join(" "),
    }
}

fn undemanding(site: &ServedSite) -> Option<Finding> {
    if site.verifies || site.refuses_all {
        return None;
    }
    let finding = if site.is_whole {
        let text = format!(
            "{}: {} serves clients without a certificate: any Cloudflare customer who points a name at this \
             address gets in",
            site.place,
            name(site)
        );
        Finding::error("site-without-demand", text)
    } else {
        let text = format!(
            "{}: nothing there says that {} demands a certificate; what it includes, and what holds for all sites, was \
             not looked at",
            site.place,
            name(site)
        );
        Finding::warning("site-without-demand", text)
    };
    Some(finding.remedy(
        "nginx: `ssl_verify_client on`; Apache: `SSLVerifyClient require` (`pullgate snippet … --own-mtls --include`)",
    ))
}

/// A site that demands a certificate by what is written, and serves a client without one.
fn serving_all_the_same(site: &ServedSite) -> Option<Finding> {
    let name = site.names.iter().find(|name| !name.contains('*'));
    let (name, listen) = (name.filter(|_| site.verifies)?, site.listens.first()?);
    let Demand::Nothing(Some(status @ 200..300)) = demand_by(listen.address(), Some(name)) else {
        return None;
    };
    let text = format!(
        "{}: {name} answers a client without a certificate with a page ({status}), although it demands one: any \
         Cloudflare customer who points a name at this address gets in",
        site.place
    );
    Some(
        Finding::error("site-without-demand", text)
            .remedy("look at its `error_page` for 495 and 496"),
    )
}

/// A site that trusts the CA which every customer's certificate comes from.
fn shared(site: &ServedSite) -> Option<Finding> {
    let file = site.authority.as_deref().filter(|_| site.verifies)?;
    if !has_shared_authority(file) {
        return None;
    }
    let text = format!(
        "{}: {} trusts Cloudflare's shared CA ({}), which every customer's certificate comes from",
        site.place,
        name(site),
        file.display()
    );
    Some(
        Finding::warning("site-admits-any-customer", text)
            .remedy("upload a certificate of your own to Cloudflare, and name its CA instead"),
    )
}

fn has_shared_authority(file: &Path) -> bool {
    let Ok(certificates) = CertificateDer::pem_file_iter(file) else {
        return false;
    };
    certificates.flatten().any(|certificate| {
        let anchor = webpki::anchor_from_trusted_cert(&certificate);
        // An anchor has what is in the sequence that a name is.
        let subject = anchor.map(|anchor| DistinguishedName::in_sequence(&anchor.subject));
        subject.is_ok_and(|subject| is_shared_authority(subject.as_ref()))
    })
}

/// Sites of one web server, which has a flaw by which one's session opens another.
fn resuming(sites: &[ServedSite], flaw: &str) -> Option<Finding> {
    let mut verifying = sites
        .iter()
        .filter(|site| site.verifies && !site.refuses_all);
    // What does not say so resumes them.
    let site = verifying.find(|site| site.resumes_sessions != Some(false))?;
    let others = sites.iter().filter(|other| !other.refuses_all).count();
    (others > 1).then(|| {
        let text = format!(
            "{}: sessions are resumed there, also one that another site has granted, as {flaw}, unless your distribution \
             has mended it",
            site.place
        );
        Finding::warning("sessions-shared", text).remedy(
            "install a newer one; or nginx: `ssl_session_tickets off; ssl_session_cache off;` in each `server`, Apache: \
             `SSLSessionTickets off` and `SSLSessionCache none` (as `pullgate snippet … --own-mtls` prints it)",
        )
    })
}
