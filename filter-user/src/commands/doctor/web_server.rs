//! What the web server's own configuration leaves open, where no gate stands in front of it.

use crate::commands::served::{ServedSite, web_servers};
use crate::config::Config;
use crate::observe::Finding;

pub(super) fn findings(config: &Config) -> Vec<Finding> {
    let (Some(filter), None) = (&config.live.filter, &config.live.gate) else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    let servers = web_servers();
    if servers.is_empty() {
        let text = "neither nginx nor Apache nor Caddy is installed, whose tools print the sites: whether each of \
                    them demands a certificate is not known";
        findings.push(Finding::warning("sites-unreadable", text));
    }
    for server in servers {
        let program = server.program.display();
        let sites = match server.sites {
            Ok(sites) => sites,
            Err(error) => {
                let text = format!("what {program} serves cannot be read: {error}");
                findings.push(Finding::warning("sites-unreadable", text));
                continue;
            }
        };
        let is_protected = |site: &&ServedSite| {
            let mut ports = site.listens.iter().map(|listen| listen.port());
            ports.any(|port| filter.ports.contains(&port))
        };
        let protected: Vec<_> = sites.iter().filter(is_protected).collect();
        findings.extend(
            protected
                .iter()
                .filter(|site| !site.verifies)
                .map(undemanding),
        );
        let verifying = || protected.iter().filter(|site| site.verifies);
        let resuming = verifying().find(|site| site.resumes_sessions == Some(true));
        if let (Some(site), true) = (resuming, protected.len() > 1) {
            let text = format!(
                "{}: sessions are resumed there; nginx before 1.26.3 resumes one that another site has granted, \
                 without a certificate (CVE-2025-23419), unless your distribution has mended it",
                site.place
            );
            findings.push(Finding::warning("sessions-shared", text).remedy(
                "`ssl_session_tickets off; ssl_session_cache none;` in each `server`, as `pullgate snippet nginx \
                 --own-mtls` prints it",
            ));
        }
    }
    findings
}

fn undemanding(site: &&ServedSite) -> Finding {
    let names = match &site.names[..] {
        [] => "a site without a name".to_owned(),
        names => names.join(" "),
    };
    let text = format!(
        "{}: {names} serves clients without a certificate: any Cloudflare customer who points a name at this \
         address gets in",
        site.place
    );
    Finding::error("site-without-demand", text).remedy(
        "nginx: `ssl_verify_client on`; Apache: `SSLVerifyClient require` (`pullgate snippet … --own-mtls --include`)",
    )
}
