//! `Host` and server name apart: whether a connection that was let in for one name serves another, by HTTP/1.1, or by
//! HTTP/2, where a browser does so if one certificate has both names (RFC 9113 §9.1.1).

use std::slice;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;

use super::{OriginProbe, REFUSE_NAMES, UNKNOWN};
use crate::commands::examination::Check;
use crate::commands::probe::pages::{Connections, Page, Shown, Version};
use crate::observe::Finding;

impl OriginProbe<'_> {
    /// On connections for other names, for none, and for one that no origin serves: by visitors whom the site refuses.
    pub(super) fn on_other_connections(&self, shown: Option<&CertificateDer<'static>>) -> Check {
        let others = self.other_names(shown);
        let names = [&others[..], slice::from_ref(&self.target.name)].concat();
        let own = self.visitors.own.as_ref();
        let expected = own.and_then(|own| self.page(own, &names));
        let (mut findings, mut seen, mut answered) = (Vec::new(), Vec::new(), true);
        for name in others.iter().map(|name| Some(name.as_str())).chain([None]) {
            let what = name.unwrap_or("no name");
            let served = self.serves(name, expected.as_ref(), &names);
            seen.push(format!("{what}: {}", served.in_words()));
            answered &= !matches!(served, Served::Unknown(_));
            findings.extend(self.finding(name, served));
        }
        Check {
            id: "hosts",
            about: "no other name's connection serves the site",
            answered,
            seen: seen.join("; "),
            findings,
        }
    }

    fn finding(&self, name: Option<&str>, served: Served) -> Option<Finding> {
        let (site, what) = (&self.target.name, name.unwrap_or("no name"));
        match served {
            Served::Site(version) => {
                let text = format!(
                    "a connection for {what} serves {site} as `Host`, by {version}, to a visitor whom {site} itself \
                     refuses: a client that knows the address gets around Cloudflare"
                );
                let is_served_there = name.is_some_and(|name| name != UNKNOWN);
                let remedy = if is_served_there {
                    SAME_NAME
                } else {
                    REFUSE_NAMES
                };
                Some(Finding::error("site-on-another-connection", text).remedy(remedy))
            }
            Served::SamePage => {
                let text = format!(
                    "{what} shows the page of {site} to a visitor whom {site} itself refuses: a client that knows the \
                     address gets around Cloudflare"
                );
                Some(Finding::error("other-name-served", text).remedy(DEMAND_THERE))
            }
            Served::OtherPage => {
                let text = format!(
                    "{what} is served at this address without a certificate that is good for it: a client that knows \
                     the address gets around Cloudflare there"
                );
                Some(Finding::warning("other-name-served", text).remedy(DEMAND_THERE))
            }
            Served::Nothing | Served::Unknown(_) => None,
        }
    }

    /// The worst of what the connections of a name serve to visitors whom the site refuses.
    fn serves(&self, name: Option<&str>, expected: Option<&Page>, names: &[String]) -> Served {
        let mut worst = Served::Nothing;
        for visitor in self.strangers() {
            let connections = Connections {
                target: self.target,
                server_name: name,
                identity: visitor.identity,
                names,
            };
            for version in Version::ALL {
                let mut served = self.judge(&connections, version, expected);
                // Its certificate is good there.
                if served == Served::OtherPage && visitor.is_known_elsewhere {
                    served = Served::Nothing;
                }
                worst = worst.max(served);
            }
        }
        worst
    }

    fn judge(
        &self,
        connections: &Connections<'_>,
        version: Version,
        expected: Option<&Page>,
    ) -> Served {
        let own = connections.server_name.unwrap_or(UNKNOWN);
        // Most connections are refused, and asked no more.
        let site = self.target.name.as_str();
        if version == Version::Http1 {
            match connections.show(version, [own, site]) {
                [Shown::Refused, Shown::Refused] => return Served::Nothing,
                [Shown::Unknown(why), Shown::Unknown(_)] => return Served::Unknown(why),
                _ => {}
            }
        }
        let shown = connections.show(version, [own, site, UNKNOWN, own]);
        let served = compare(&shown, expected, version);
        // What an unknown name shows, and none, is a question of its own.
        let is_its_own = matches!(served, Served::SamePage | Served::OtherPage);
        if is_its_own && own == UNKNOWN {
            Served::Nothing
        } else {
            served
        }
    }

    /// What Cloudflare's certificate is shown, if that stays the same.
    fn page(&self, own: &Arc<CertifiedKey>, names: &[String]) -> Option<Page> {
        let connections = Connections {
            target: self.target,
            server_name: Some(&self.target.name),
            identity: Some(own),
            names,
        };
        let site = self.target.name.as_str();
        match connections.show(Version::Http1, [site, site]) {
            [Shown::Page(page), again] if again == Shown::Page(page.clone()) => Some(page),
            _ => None,
        }
    }

    /// Other hosts on a connection for the site, which Cloudflare's certificate has opened: those that are served a
    /// page of their own.
    pub(super) fn of_other_hosts(&self, own: &Arc<CertifiedKey>) -> Option<Finding> {
        let unknown = [UNKNOWN.to_owned()];
        let others = [&self.visitors.other_names[..], &unknown].concat();
        let names = [&others[..], slice::from_ref(&self.target.name)].concat();
        let connections = Connections {
            target: self.target,
            server_name: Some(&self.target.name),
            identity: Some(own),
            names: &names,
        };
        let site = self.target.name.as_str();
        let mut served = Vec::new();
        for host in &others {
            for version in Version::ALL {
                let [first, other, again] = connections.show(version, [site, host, site]);
                let is_another = matches!(&other, Shown::Page(page) if !page.is_empty());
                if is_another && first == again && !other.is_like(&first) {
                    served.push(format!("{host} by {}", version.label()));
                }
            }
        }
        (!served.is_empty()).then(|| {
            let text = format!(
                "on a connection for {site}, other hosts have pages of their own ({}): the certificate of one is good for \
                 these too",
                served.join(", ")
            );
            Finding::warning("other-host-served", text).remedy(format!(
                "let the web server refuse a `Host` that is not the connection's name, if its sites have different \
                 visitors. {REFUSE_NAMES}"
            ))
        })
    }
}

/// What the connections of a name serve, from what is well to what is worst.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Served {
    Nothing,
    /// It is not known, and why.
    Unknown(&'static str),
    /// The name's own page.
    OtherPage,
    /// The page of the site, by the other name.
    SamePage,
    /// The site as `Host`.
    Site(&'static str),
}

impl Served {
    fn in_words(self) -> String {
        match self {
            Self::Nothing => "nothing".to_owned(),
            Self::Unknown(why) => format!("not known ({why})"),
            Self::OtherPage => "a page".to_owned(),
            Self::SamePage => "the site's page".to_owned(),
            Self::Site(version) => format!("the site as `Host` ({version})"),
        }
    }
}

/// Whose the pages for its own name, the site, an unknown host and its own name again are. `expected` is the site's.
fn compare(
    [own, site, unknown, again]: &[Shown; 4],
    expected: Option<&Page>,
    version: Version,
) -> Served {
    let is_expected = |shown: &Shown| matches!((shown, expected), (Shown::Page(page), Some(expected)) if page == expected);
    let of_its_own = match own {
        _ if is_expected(own) => Served::SamePage,
        Shown::Page(page) if !page.is_empty() => Served::OtherPage,
        Shown::Page(_) | Shown::Refused => Served::Nothing,
        Shown::Unknown(why) => Served::Unknown(why),
    };
    let of_the_site = match site {
        _ if is_expected(site) => Served::Site(version.label()),
        Shown::Refused => Served::Nothing,
        Shown::Unknown(why) => Served::Unknown(why),
        // What is not the page that is expected, and not a host's own either, is nothing.
        Shown::Page(page) if own != again || site.is_like(own) || site.is_like(unknown) => {
            if page.is_empty() || expected.is_some() {
                Served::Nothing
            } else {
                Served::Unknown(
                    "it shows one page for all hosts, or another each time: `--cert` would show whose",
                )
            }
        }
        Shown::Page(_) => Served::Site(version.label()),
    };
    if is_expected(own) && is_expected(site) {
        return Served::SamePage;
    }
    of_its_own.max(of_the_site)
}

const DEMAND_THERE: &str = "demand the certificate for that name too, or serve it elsewhere";
const SAME_NAME: &str = "demand the same certificate, of the same CA, for all names of a port, or refuse a `Host` that is not the \
                         connection's name (nginx and Apache do that for a site that demands one; HAProxy: `http-request \
                         set-var(txn.host) req.hdr(host),host_only,lower` and `http-request deny unless { \
                         ssl_fc_sni,lower,strcmp(txn.host) eq 0 }`; Caddy: `strict_sni_host`; pullgate: an `upstream` for \
                         each policy)";
