//! Caddy, by `caddy adapt`: its Caddyfile as the JSON that it works with
//! (<https://caddyserver.com/docs/json/>).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::site::{Listen, ServedSite};

/// The sites that speak TLS, from what `caddy adapt` prints.
///
/// # Errors
///
/// Returns what cannot be read.
pub(super) fn sites(dump: &str) -> Result<Vec<ServedSite>, String> {
    let Adapted { apps } = serde_json::from_str(dump).map_err(|error| error.to_string())?;
    let port = apps.http.http_port.unwrap_or(HTTP);
    let files = apps.tls.certificates.load_files;
    let mut sites = Vec::new();
    for (name, server) in &apps.http.servers {
        let listens = server.listen.iter().filter_map(|text| parse_listen(text));
        let listens: Vec<_> = listens.filter(|listen| listen.port() != port).collect();
        if !listens.is_empty() {
            sites.extend(server.sites(name, &listens, &files));
        }
    }
    Ok(sites)
}

#[derive(Deserialize)]
struct Adapted {
    #[serde(default)]
    apps: Apps,
}

#[derive(Default, Deserialize)]
struct Apps {
    #[serde(default)]
    http: Http,
    #[serde(default)]
    tls: Tls,
}

#[derive(Default, Deserialize)]
struct Http {
    http_port: Option<u16>,
    #[serde(default)]
    servers: BTreeMap<String, HttpServer>,
}

#[derive(Deserialize)]
struct HttpServer {
    #[serde(default)]
    listen: Vec<String>,
    #[serde(default)]
    routes: Vec<Route>,
    #[serde(default)]
    tls_connection_policies: Vec<ConnectionPolicy>,
    #[serde(default)]
    automatic_https: AutomaticHttps,
}

/// Which hosts are served in clear text.
#[derive(Default, Deserialize)]
struct AutomaticHttps {
    #[serde(default)]
    disable: bool,
    #[serde(default)]
    skip: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Route {
    #[serde(default, rename = "match")]
    matches: Vec<Matched>,
}

#[derive(Default, Deserialize)]
struct Matched {
    #[serde(default)]
    host: Vec<String>,
    #[serde(default)]
    sni: Vec<String>,
}

#[derive(Deserialize)]
struct ConnectionPolicy {
    #[serde(default, rename = "match")]
    matched: Matched,
    #[serde(default)]
    certificate_selection: Selection,
    client_authentication: Option<ClientAuthentication>,
}

#[derive(Default, Deserialize)]
struct Selection {
    #[serde(default)]
    any_tag: BTreeSet<String>,
}

#[derive(Deserialize)]
struct ClientAuthentication {
    mode: Option<String>,
}

#[derive(Default, Deserialize)]
struct Tls {
    #[serde(default)]
    certificates: Certificates,
}

#[derive(Default, Deserialize)]
struct Certificates {
    #[serde(default)]
    load_files: Vec<LoadedFile>,
}

#[derive(Deserialize)]
struct LoadedFile {
    certificate: PathBuf,
    key: PathBuf,
    #[serde(default)]
    tags: BTreeSet<String>,
}

impl HttpServer {
    /// One site for the names of each policy, and one for the names that have none: Caddy fetches the
    /// certificates of those by itself.
    fn sites(&self, name: &str, listens: &[Listen], files: &[LoadedFile]) -> Vec<ServedSite> {
        let site = || ServedSite {
            place: format!("Caddy, `caddy adapt`: {name}"),
            listens: listens.to_vec(),
            ..ServedSite::default()
        };
        let mut sites = Vec::new();
        let policies = &self.tls_connection_policies;
        for policy in policies.iter().filter(|it| !it.matched.sni.is_empty()) {
            let mut named = site();
            named.name(policy.matched.sni.iter().cloned());
            let tags = &policy.certificate_selection.any_tag;
            let shown = files.iter().filter(|file| !file.tags.is_disjoint(tags));
            named.certificates = shown
                .map(|file| (absolute(&file.certificate), absolute(&file.key)))
                .collect();
            let mode = policy.client_authentication.as_ref().map(|it| &it.mode);
            // The default, where CAs are named.
            named.verifies = mode.is_some_and(|mode| {
                // `require` takes any certificate.
                mode.as_deref()
                    .is_none_or(|mode| mode == "require_and_verify")
            });
            sites.push(named);
        }
        let known: BTreeSet<_> = sites.iter().flat_map(|it| it.names.clone()).collect();
        let matches = self.routes.iter().flat_map(|route| &route.matches);
        let hosts = matches.flat_map(|matched| &matched.host);
        let mut rest = site();
        let AutomaticHttps { disable, skip } = &self.automatic_https;
        let in_tls = hosts.filter(|host| !disable && !skip.contains(*host));
        rest.name(in_tls.filter(|host| !known.contains(*host)).cloned());
        if !rest.names.is_empty() {
            rest.notes.push(
                "Caddy fetches these certificates by itself: name the files that it keeps them in \
                 (`caddy environ` has its data directory), or one of Cloudflare's Origin CA."
                    .to_owned(),
            );
            sites.push(rest);
        }
        sites
    }
}

/// Relative ones are below the directory that the unit starts Caddy in.
fn absolute(path: &Path) -> PathBuf {
    Path::new("/").join(path)
}

/// Where a listener address says; none of UNIX sockets.
fn parse_listen(text: &str) -> Option<Listen> {
    match text.split_once('/') {
        None => Listen::parse(text),
        Some(("tcp" | "tcp4" | "tcp6", address)) => Listen::parse(address),
        Some(_) => None,
    }
}

const HTTP: u16 = 80;

#[cfg(test)]
mod tests {
    use super::*;

    const DUMP: &str = r#"{"apps":{"http":{"servers":{
        "srv0":{"listen":["203.0.113.10:8443"],
            "routes":[{"match":[{"host":["*.wild.example"]}]}],
            "tls_connection_policies":[{"match":{"sni":["*.wild.example"]},
                "certificate_selection":{"any_tag":["cert1"]}},{}]},
        "srv1":{"listen":[":443"],
            "routes":[{"match":[{"host":["shop.example","www.shop.example"]}]},
                {"match":[{"host":["blog.example"]}]}],
            "tls_connection_policies":[{"match":{"sni":["shop.example","www.shop.example"]},
                "certificate_selection":{"any_tag":["cert0"]},
                "client_authentication":{"trusted_ca_certs":["MII="],"mode":"require_and_verify"}},{}]},
        "srv2":{"listen":[":80"],"routes":[{"match":[{"host":["plain.example"]}]}]},
        "srv3":{"listen":["unix//run/caddy.sock"]},
        "srv4":{"listen":[":3000"],"routes":[{"match":[{"host":["clear.example"]}]}],
            "automatic_https":{"skip":["clear.example"]}}}},
        "tls":{"certificates":{"load_files":[
            {"certificate":"/pki/w.pem","key":"/pki/w.key","tags":["cert1"]},
            {"certificate":"/pki/shop.pem","key":"/pki/shop.key","tags":["cert0"]}]}}}}"#;

    #[test]
    fn sites_are_what_caddy_says_of_itself() {
        let sites = sites(DUMP).unwrap();

        let names: Vec<_> = sites.iter().map(|site| site.names.join(" ")).collect();
        assert_eq!(
            names,
            [
                "*.wild.example",
                "shop.example www.shop.example",
                "blog.example"
            ]
        );
        let [wild, shop, blog] = sites.as_slice() else {
            panic!("{sites:?}");
        };
        assert_eq!(wild.only_address(), "203.0.113.10:8443".parse().ok());
        assert!(wild.problem().is_some(), "no name to ask it by");
        assert_eq!(
            shop.certificates,
            [("/pki/shop.pem".into(), "/pki/shop.key".into())]
        );
        // Of which CA it demands certificates is in no file.
        assert!(shop.verifies && shop.problem().is_some());
        assert!(blog.certificates.is_empty() && blog.problem().is_some());
    }

    #[test]
    fn what_is_no_configuration_of_caddy_is_refused() {
        assert!(sites("").is_err());
        assert!(sites("42").is_err());
        assert_eq!(sites("{}"), Ok(Vec::new()));
    }
}
