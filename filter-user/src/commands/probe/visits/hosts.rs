//! Whether a connection that was let in for another name serves the site as `Host`, by HTTP/1.1, or by HTTP/2 beside
//! pages of its own: a browser does that where one certificate has both names (RFC 9113 §9.1.1), an attacker anywhere.

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;

use super::{ANY, OriginProbe, UNKNOWN};
use crate::commands::examination::Check;
use crate::commands::probe::reception::{Both, is_page};
use crate::host::deadline::is_late;
use crate::observe::Finding;
use crate::web::visit::{Answer, Visit};

impl OriginProbe<'_> {
    /// On connections for other names, for none, and for one that no origin serves.
    pub(super) fn on_other_connections(
        &self,
        as_stranger: &Both,
        shown: Option<&CertificateDer<'static>>,
    ) -> Check {
        let check = |answered, seen, findings| Check {
            id: "hosts",
            about: "no other name's connection serves the site",
            answered,
            seen,
            findings,
        };
        if as_stranger.served().is_some() {
            return check(true, "the site is open without one".to_owned(), Vec::new());
        }
        let names = self.other_names(shown).into_iter().map(Some).chain([None]);
        let (mut serving, mut unknown, mut asked) = (Vec::new(), Vec::new(), 0);
        for name in names {
            let what = name.as_deref().unwrap_or("no name");
            for identity in [None]
                .into_iter()
                .chain(self.visitors.other.as_ref().map(Some))
            {
                let connection = OtherConnection {
                    probe: self,
                    name: name.as_deref(),
                    identity,
                };
                asked += 1;
                match connection.serves_the_site() {
                    Served::By(version) => serving.push(format!("{what} by {version}")),
                    Served::Unknown(why) => unknown.push(format!("{what}: {why}")),
                    Served::No => {}
                }
            }
        }
        serving.dedup();
        let name = &self.target.name;
        let finding = (!serving.is_empty()).then(|| {
            let text = format!(
                "a connection for another name ({}) serves {name} as `Host`, to a visitor whom {name} itself refuses: a \
                 client that knows the address gets around Cloudflare",
                serving.join(", ")
            );
            Finding::error("site-on-another-connection", text).remedy(SAME_NAME)
        });
        let seen = [format!("{asked} connections tried")]
            .into_iter()
            .chain(unknown.clone());
        let seen: Vec<_> = seen.collect();
        check(unknown.is_empty(), seen.join("; "), Vec::from_iter(finding))
    }
}

/// A connection that is not the site's.
struct OtherConnection<'a> {
    probe: &'a OriginProbe<'a>,
    name: Option<&'a str>,
    identity: Option<&'a Arc<CertifiedKey>>,
}

impl<'a> OtherConnection<'a> {
    fn serves_the_site(&self) -> Served {
        match self.serves_by_http1() {
            Served::No => self.serves_by_http2(),
            served @ (Served::By(_) | Served::Unknown(_)) => served,
        }
    }

    fn serves_by_http1(&self) -> Served {
        let ask = |host| self.visit(host).connect().ending;
        let page = ask(self.site());
        if page.is_unanswered() {
            return Served::Unknown("no answer");
        }
        match page.answer().filter(is_page) {
            Some(page) => judge(
                &page,
                [ask(self.own()).answer(), ask(self.own()).answer()],
                "HTTP/1.1",
            ),
            None => Served::No,
        }
    }

    fn serves_by_http2(&self) -> Served {
        let hosts = [self.own(), self.site(), self.own()];
        let answers = match self.visit(self.own()).ask_by_http2(&hosts) {
            Ok(answers) => answers,
            Err(error) if is_late(&error) => return Served::Unknown("no answer"),
            // What does not speak it serves nothing by it.
            Err(_) => return Served::No,
        };
        match <[Answer; 3]>::try_from(answers) {
            Ok([before, page, after]) if is_page(&page) => {
                judge(&page, [Some(before), Some(after)], "HTTP/2")
            }
            Ok(_) | Err(_) => Served::No,
        }
    }

    fn visit(&self, host: &'a str) -> Visit<'a> {
        Visit {
            server_name: self.name,
            host,
            ..self.probe.visit(self.identity, ANY)
        }
    }

    fn site(&self) -> &'a str {
        &self.probe.target.name
    }

    /// The host that the connection is for.
    fn own(&self) -> &'a str {
        self.name.unwrap_or(UNKNOWN)
    }
}

/// Whether the site's page was served.
enum Served {
    No,
    /// By this version of HTTP.
    By(&'static str),
    /// It is not known, and why.
    Unknown(&'static str),
}

/// It is the site's if the connection's own page is another one, and stays the same.
fn judge(page: &Answer, own: [Option<Answer>; 2], version: &'static str) -> Served {
    let content = |answer: &Option<Answer>| {
        let answer = answer.as_ref()?;
        Some((answer.status, answer.body().to_owned()))
    };
    let own = own.map(|answer| content(&answer));
    if own[0] != own[1] {
        Served::Unknown("its pages differ each time, so whose they are cannot be seen")
    } else if own[0] == Some((page.status, page.body().to_owned())) {
        Served::No
    } else {
        Served::By(version)
    }
}

const SAME_NAME: &str = "demand the same certificate for all names of a port, or refuse a `Host` that is not the connection's name \
                         (nginx and Apache do that for a site that demands one; HAProxy: `http-request deny unless { \
                         ssl_fc_sni,strcmp(txn.host) eq 0 }`; Caddy: `strict_sni_host`; pullgate: an `upstream` for each \
                         policy)";
