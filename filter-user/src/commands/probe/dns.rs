//! What DNS says of the site: whether its name is proxied, and what else leads to the origin's address. Asked is this
//! host's own resolver, and no one else.

use std::collections::BTreeSet;
use std::net::{AddrParseError, IpAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::net::NetError;
use hickory_resolver::proto::rr::{RData, RecordType};
use ipnet::IpNet;

use super::target::ProbeError;
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
pub(super) fn resolver() -> Result<TokioResolver, ProbeError> {
    let mut builder = TokioResolver::builder_tokio().map_err(ProbeError::Resolver)?;
    let options = builder.options_mut();
    options.timeout = TIMEOUT;
    options.attempts = ATTEMPTS;
    builder.build().map_err(ProbeError::Resolver)
}

/// Asks all of it.
pub(super) async fn examine(resolver: &TokioResolver, site: &SiteNames<'_>) -> Vec<Check> {
    vec![
        is_proxied(resolver, site).await,
        leads_elsewhere(resolver, site).await,
    ]
}

async fn is_proxied(resolver: &TokioResolver, site: &SiteNames<'_>) -> Check {
    let check = |answered, seen: String, findings| Check {
        id: "proxied",
        about: "the site's name leads to Cloudflare alone",
        answered,
        seen,
        findings,
    };
    let addresses = match addresses(resolver, site.name).await {
        Ok(addresses) => addresses,
        Err(error) => return check(false, chain(&error), Vec::new()),
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
    check(true, seen.join(", "), Vec::from_iter(finding))
}

/// Mail servers, SPF, and other names.
async fn leads_elsewhere(resolver: &TokioResolver, site: &SiteNames<'_>) -> Check {
    let mut asked = Trail {
        resolver,
        origins: &site.origins,
        findings: Vec::new(),
        failed: None,
        names: 0,
    };
    for name in &site.others {
        asked
            .follow(name, &format!("{name}, another name of the site's,"))
            .await;
    }
    for domain in domains(site.name) {
        for data in asked.records(domain, RecordType::MX).await {
            if let RData::MX(mail) = data {
                let server = mail.exchange.to_utf8();
                asked
                    .follow(&server, &format!("{server}, the mail server of {domain},"))
                    .await;
            }
        }
        for data in asked.records(domain, RecordType::TXT).await {
            if let RData::TXT(text) = data {
                let text = text.txt_data.concat();
                asked
                    .sender_policy(domain, &String::from_utf8_lossy(&text))
                    .await;
            }
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
}

impl Trail<'_> {
    async fn records(&mut self, name: &str, kind: RecordType) -> Vec<RData> {
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

    /// RFC 7208 §5: what it names itself; what it includes is others' policy.
    async fn sender_policy(&mut self, domain: &str, text: &str) {
        let mut terms = text.split_ascii_whitespace();
        if terms.next() != Some("v=spf1") {
            return;
        }
        self.names += 1;
        for term in terms {
            let term = term.trim_start_matches(['+', '-', '~', '?']);
            match term.split_once(':') {
                Some(("ip4" | "ip6", network)) => {
                    let named = network.parse::<IpNet>();
                    let named = named.or_else(|_| term_address(term).map(IpNet::from));
                    let found = named.ok().and_then(|named| {
                        let mut origins = self.origins.iter();
                        let origin = origins.find(|origin| named.contains(*origin));
                        origin.map(|origin| (named, *origin))
                    });
                    self.findings.extend(found.map(|(range, address)| {
                        leak(&format!(
                            "the SPF record of {domain} names {range}, which has {address}"
                        ))
                    }));
                }
                Some(("a" | "mx", name)) => {
                    let name = name.split('/').next().unwrap_or(name).to_owned();
                    self.follow(
                        &name,
                        &format!("{name}, which the SPF record of {domain} names,"),
                    )
                    .await;
                }
                None if term == "a" => {
                    self.follow(domain, &format!("{domain}, which its SPF record names,"))
                        .await;
                }
                Some(_) | None => {}
            }
        }
    }
}

/// The address behind the colon of a term.
fn term_address(term: &str) -> Result<IpAddr, AddrParseError> {
    term.split_once(':')
        .map_or("", |(_, address)| address)
        .parse()
}

fn leak(text: &str) -> Finding {
    Finding::warning("address-leaked", format!("{text}: who looks for the origin finds it")).remedy(
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
            let answers = found.answers().iter().take(RECORDS_MAX);
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
/// Records of an answer, names that are followed, and domains above the site's, at most.
const RECORDS_MAX: usize = 20;
const NAMES_MAX: usize = 20;
const DOMAINS_MAX: usize = 3;
