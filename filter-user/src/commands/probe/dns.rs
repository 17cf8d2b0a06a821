//! What DNS has of the site: whether its name is proxied, and what else leads to the origin's address. Asked is this
//! host's own resolver, and no one else.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::ResolveHosts;
use hickory_resolver::net::NetError;
use hickory_resolver::proto::rr::{RData, RecordType};
use ipnet::IpNet;

use crate::commands::examination::Check;
use crate::observe::Finding;
use crate::ranges::baseline;
use crate::report::chain;

/// The site, and what is known of its origin.
pub(super) struct SiteNames<'a> {
    pub(super) name: &'a str,
    /// The origin's addresses.
    pub(super) origins: BTreeSet<IpAddr>,
    /// Other names that may lead there.
    pub(super) others: BTreeSet<String>,
}

/// The addresses of a name; none, if it has none.
pub(super) async fn addresses(
    resolver: &TokioResolver,
    name: &str,
) -> Result<Vec<IpAddr>, NetError> {
    let mut addresses = Vec::new();
    for kind in [RecordType::A, RecordType::AAAA] {
        for data in records(resolver, name, kind).await? {
            // What an alias is called on the way is no address.
            addresses.extend(data.ip_addr());
        }
    }
    Ok(addresses)
}

/// A resolver that asks whom this host asks, for as long as a visit takes.
pub(super) fn resolver() -> Result<TokioResolver, NetError> {
    let mut builder = TokioResolver::builder_tokio()?;
    let options = builder.options_mut();
    options.timeout = TIMEOUT;
    options.attempts = ATTEMPTS;
    // What this host believes by itself, no visitor sees.
    options.use_hosts_file = ResolveHosts::Never;
    builder.build()
}

/// Asks all of it.
pub(super) async fn examine(resolver: &TokioResolver, site: &SiteNames<'_>) -> Vec<Check> {
    vec![
        is_proxied(resolver, site).await,
        leads_elsewhere(resolver, site).await,
    ]
}

/// No resolver can be asked.
pub(super) fn unanswered(error: &NetError) -> Check {
    proxied(
        false,
        format!("this host's resolver cannot be asked: {}", chain(error)),
        Vec::new(),
    )
}

fn proxied(answered: bool, seen: String, findings: Vec<Finding>) -> Check {
    Check {
        id: "proxied",
        about: "the site's name leads to Cloudflare alone",
        answered,
        seen,
        findings,
    }
}

async fn is_proxied(resolver: &TokioResolver, site: &SiteNames<'_>) -> Check {
    let addresses = match addresses(resolver, site.name).await {
        Ok(addresses) => addresses,
        Err(error) => return proxied(false, chain(&error), Vec::new()),
    };
    let seen: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    let strange = addresses
        .iter()
        .filter(|address| !is_cloudflares(**address));
    let strange: Vec<_> = strange.collect();
    let finding = if addresses.is_empty() {
        let text = format!("{} has no address", site.name);
        Some(Finding::error("name-without-address", text))
    } else if strange.iter().any(|address| site.origins.contains(address)) {
        let text = format!(
            "{} leads to the origin itself: its address is no secret, and visitors come around Cloudflare",
            site.name
        );
        Some(Finding::error("name-leads-to-origin", text).remedy(PROXY))
    } else {
        let first = strange.first();
        first.map(|address| {
            let text = format!(
                "{} leads to {address}, which is not Cloudflare's",
                site.name
            );
            Finding::error("name-not-proxied", text).remedy(PROXY)
        })
    };
    proxied(true, seen.join(", "), Vec::from_iter(finding))
}

/// Mail servers, SPF, and other names.
async fn leads_elsewhere(resolver: &TokioResolver, site: &SiteNames<'_>) -> Check {
    let mut asked = Trail {
        resolver,
        origins: &site.origins,
        findings: Vec::new(),
        failed: None,
        names: 0,
        lookups: 0,
    };
    for name in &site.others {
        asked
            .follow(name, &format!("{name}, another name of the site's,"))
            .await;
    }
    for domain in domains(site.name) {
        asked.mail_servers(domain).await;
        // A domain may leave its policy to another domain; there it ends.
        if let Some(other) = asked.sender_policy(domain).await {
            asked.sender_policy(&other).await;
        }
    }
    Check {
        id: "dns-leaks",
        about: "nothing else in DNS leads to the origin",
        answered: asked.failed.is_none(),
        seen: asked
            .failed
            .unwrap_or_else(|| format!("{} names, mail servers and SPF records", asked.names)),
        findings: asked.findings,
    }
}

/// What was followed, and where it led.
struct Trail<'a> {
    resolver: &'a TokioResolver,
    origins: &'a BTreeSet<IpAddr>,
    findings: Vec<Finding>,
    /// Why a question has no answer, if one has none.
    failed: Option<String>,
    names: usize,
    /// Questions for mail servers and policies.
    lookups: usize,
}

impl Trail<'_> {
    async fn records(&mut self, name: &str, kind: RecordType) -> Vec<RData> {
        if self.lookups >= LOOKUPS_MAX {
            self.failed = Some(format!(
                "more than {LOOKUPS_MAX} lookups: {name} was not asked"
            ));
            return Vec::new();
        }
        self.lookups += 1;
        match records(self.resolver, name, kind).await {
            Ok(records) => records,
            Err(error) => {
                self.failed = Some(format!("{name}: {}", chain(&error)));
                Vec::new()
            }
        }
    }

    async fn follow(&mut self, name: &str, what: &str) {
        if self.names >= NAMES_MAX {
            self.failed = Some(format!("more than {NAMES_MAX} names: {name} was not asked"));
            return;
        }
        self.names += 1;
        match addresses(self.resolver, name).await {
            Ok(addresses) => {
                let leads = addresses.into_iter().find(|it| self.origins.contains(it));
                self.findings
                    .extend(leads.map(|address| leak(&format!("{what} leads to {address}"))));
            }
            Err(error) => self.failed = Some(format!("{name}: {}", chain(&error))),
        }
    }

    /// RFC 7208 §5 and §6.1: what a domain's own policy names; what it includes is others'. Returns the domain that
    /// it is left to, if it is.
    async fn sender_policy(&mut self, domain: &str) -> Option<String> {
        let mut left_to = None;
        for data in self.records(domain, RecordType::TXT).await {
            let RData::TXT(text) = data else {
                continue;
            };
            let text = String::from_utf8_lossy(&text.txt_data.concat()).to_ascii_lowercase();
            let mut terms = text.split_ascii_whitespace();
            if terms.next() != Some("v=spf1") {
                continue;
            }
            self.names += 1;
            for term in terms {
                if let Some(other) = term.strip_prefix("redirect=") {
                    left_to = Some(other.to_owned());
                }
                self.mechanism(domain, term).await;
            }
        }
        left_to
    }

    async fn mechanism(&mut self, domain: &str, term: &str) {
        let term = term.trim_start_matches(['+', '-', '~', '?']);
        let (mechanism, value) = term.split_once(':').unwrap_or((term, ""));
        let (mechanism, _) = mechanism.split_once('/').unwrap_or((mechanism, ""));
        let (host, _) = value.split_once('/').unwrap_or((value, ""));
        let host = if host.is_empty() { domain } else { host };
        match mechanism {
            "ip4" | "ip6" => self.network(domain, value),
            "a" => {
                let what = format!("{host}, which the SPF record of {domain} names,");
                self.follow(host, &what).await;
            }
            "mx" => self.mail_servers(host).await,
            _ => {}
        }
    }

    fn network(&mut self, domain: &str, text: &str) {
        let network = text.parse::<IpNet>();
        let network = network.or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        let Ok(network) = network else {
            return;
        };
        let origins = self
            .origins
            .iter()
            .filter(|origin| network.contains(*origin));
        self.findings.extend(origins.map(|origin| {
            leak(&format!(
                "the SPF record of {domain} names {network}, which has {origin}"
            ))
        }));
    }

    async fn mail_servers(&mut self, domain: &str) {
        for data in self.records(domain, RecordType::MX).await {
            if let RData::MX(mail) = data {
                let server = mail.exchange.to_utf8();
                self.follow(&server, &format!("{server}, the mail server of {domain},"))
                    .await;
            }
        }
    }
}

fn leak(text: &str) -> Finding {
    Finding::warning("address-leaked", format!("{text}: a scanner that looks for the origin finds it")).remedy(
        "move that service to another host, or change the origin's address and let only Cloudflare's packets pass",
    )
}

async fn records(
    resolver: &TokioResolver,
    name: &str,
    kind: RecordType,
) -> Result<Vec<RData>, NetError> {
    // The name as it is, and not below a domain of this host's.
    let name = format!("{}.", name.trim_end_matches('.'));
    match resolver.lookup(name, kind).await {
        Ok(found) => {
            let answers = found.answers().iter();
            Ok(answers.map(|record| record.data.clone()).collect())
        }
        Err(error) if error.is_no_records_found() || error.is_nx_domain() => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Whether an address is in Cloudflare's ranges, as they were known when this was built.
pub(super) fn is_cloudflares(address: IpAddr) -> bool {
    baseline().is_ok_and(|feed| feed.ranges().iter().any(|range| range.contains(&address)))
}

/// A name, and the domains above it, but for the last label.
fn domains(name: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(name), |name| {
        let (_, above) = name.split_once('.')?;
        above.contains('.').then_some(above)
    })
    .take(DOMAINS_MAX)
}

const PROXY: &str =
    "switch the name to proxied at Cloudflare, and change the origin's address, which is known now";
/// How long the resolver may take, each time.
const TIMEOUT: Duration = Duration::from_secs(2);
const ATTEMPTS: usize = 2;
/// Questions for mail servers and policies: a policy may ask for ten (RFC 7208 §4.6.4).
const LOOKUPS_MAX: usize = 20;
/// Names that are followed, and domains from the site's upwards, at most.
const NAMES_MAX: usize = 20;
const DOMAINS_MAX: usize = 3;
