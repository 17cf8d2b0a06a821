//! `pullgate probe` in a rig: web servers with a configuration of their own, and what is found of them.

use std::fs;

use serde_json::Value;

use crate::daemon::binary;
use crate::gate::{Rig, origin};
use crate::net::Host;
use crate::pki::{BLOG, SHOP};
use crate::snippets::{APACHE, APACHE_PAGE, HAPROXY};
use crate::web::{ADDRESS, Server};

/// What is found of a host that is not filtered from where the probe runs.
pub const OPEN_PORT: &str = "port-answers";
/// What is found where a client without the certificate is served, and with any other.
pub const SERVED: [&str; 3] = [
    "served-with-forged-certificate",
    "served-with-forged-certificate",
    "served-without-certificate",
];

/// The options of a probe that presents one of the rig's certificates, by `cert` or `other-cert`.
#[must_use]
pub fn presenting(rig: &Rig, option: &str, name: &str) -> Vec<String> {
    let path = |ending: &str| rig.pki.path(&format!("{name}.{ending}"));
    let [certificate, key] = ["pem", "key"].map(|ending| path(ending).display().to_string());
    let other = option.strip_suffix("cert").unwrap();
    Vec::from([
        format!("--{option}"),
        certificate,
        format!("--{other}key"),
        key,
    ])
}

/// A gate with its usual hosts, and nginx behind it, which serves a page.
#[must_use]
pub fn gated() -> (Rig, Server) {
    let rig = Rig::with_shop("");
    rig.pki.write_identity("client", &rig.pki.ours.client());
    let page = "server { listen 127.0.0.1:8080 proxy_protocol; return 200 page; }";
    let web_server = nginx(&rig, page, ADDRESS);
    (rig, web_server)
}

/// The exit code, and the ids of what is found from an edge's address.
#[must_use]
pub fn probe(rig: &Rig, more: &[String]) -> (i32, Vec<String>) {
    let origin = origin().to_string();
    probe_at(rig, &["--origin", &origin], more)
}

/// The same at other addresses.
#[must_use]
pub fn probe_at(rig: &Rig, origins: &[&str], more: &[String]) -> (i32, Vec<String>) {
    let (code, report) = report(rig, origins, more);
    (code, ids(report.as_bytes()))
}

/// The exit code, and the report in JSON.
#[must_use]
pub fn report(rig: &Rig, origins: &[&str], more: &[String]) -> (i32, String) {
    let program = binary().display().to_string();
    let url = format!("https://{SHOP}/");
    let words = [program.as_str(), "--json", "probe", &url];
    let words = words.into_iter().chain(origins.iter().copied());
    let words: Vec<_> = words.chain(more.iter().map(String::as_str)).collect();
    let output = rig.network.output(Host::Edge, &words);
    let code = output.status.code().unwrap();
    assert!(code < 2, "{}", String::from_utf8_lossy(&output.stderr));
    let report = String::from_utf8(output.stdout).unwrap();
    // Only what is wrong or not known makes it fail.
    let is_wrong =
        report.contains("\"severity\": \"error\"") || report.contains("\"answered\": false");
    assert_eq!(code, i32::from(is_wrong), "{report}");

    (code, report)
}

/// The ids of all findings of a report.
#[must_use]
pub fn ids(report: &[u8]) -> Vec<String> {
    let examined: Vec<Value> = serde_json::from_slice(report).unwrap();
    let checks = examined
        .iter()
        .flat_map(|it| it["checks"].as_array().unwrap());
    let findings = checks.flat_map(|check| check["findings"].as_array().unwrap());
    let ids: Vec<_> = findings.map(|it| it["id"].as_str().unwrap()).collect();
    sorted(&ids)
}

/// What is found but for what a set-up has always.
#[must_use]
pub fn besides(always: &[&str], mut found: Vec<String>) -> Vec<String> {
    found.retain(|id| !always.contains(&id.as_str()));
    found
}

/// Ids, as reports are compared.
#[must_use]
pub fn sorted(ids: &[&str]) -> Vec<String> {
    let mut ids: Vec<_> = ids.iter().map(|id| (*id).to_owned()).collect();
    ids.sort();
    ids
}

/// A site of nginx.
#[must_use]
pub fn nginx_site(name: &str, listen: &str, lines: &str) -> String {
    format!(
        "server {{ listen {listen}; server_name {name}; ssl_certificate @PKI@/shop.example.pem; \
         ssl_certificate_key @PKI@/shop.example.key; {lines} location / {{ return 200 page; }} }}\n"
    )
}

/// nginx on the origin with these sites, once it listens at the address.
#[must_use]
pub fn nginx(rig: &Rig, sites: &str, address: &str) -> Server {
    let text = format!(
        "daemon off; user root; pid @DIR@/nginx.pid; error_log @DIR@/nginx.log; events {{}}\n\
         http {{ access_log off; @NGINX@\n{sites}\n}}"
    );
    start(rig, "nginx", &[], &text, address)
}

/// A site of Apache.
#[must_use]
pub fn apache_site(name: &str, lines: &str) -> String {
    format!(
        "<VirtualHost *:443>\nServerName {name}\nSSLEngine on\nSSLCertificateFile @PKI@/{SHOP}.pem\n\
         SSLCertificateKeyFile @PKI@/{SHOP}.key\nDocumentRoot @DIR@/htdocs\n{lines}\n</VirtualHost>\n"
    )
}

/// Apache with these sites.
#[must_use]
pub fn apache(rig: &Rig, sites: &str) -> Server {
    let htdocs = rig.network.path("htdocs");
    if !htdocs.exists() {
        fs::create_dir(&htdocs).unwrap();
        fs::write(htdocs.join("index.html"), APACHE_PAGE).unwrap();
    }
    let text = APACHE
        .replace("@LISTEN@", "Listen 443")
        .replace("@SNIPPET@", sites);
    start(
        rig,
        "apache2",
        &["-DFOREGROUND", "-f"],
        &text,
        "127.0.0.1:443",
    )
}

/// HAProxy with these frontends.
#[must_use]
pub fn haproxy(rig: &Rig, frontends: &str) -> Server {
    // It wants a certificate and its key in one file.
    for name in [SHOP, BLOG] {
        let file = |ending: &str| fs::read_to_string(rig.pki.path(&format!("{name}.{ending}")));
        let both = file("pem").unwrap() + &file("key").unwrap();
        rig.pki.write(&format!("{name}.both"), &both);
    }
    let text = format!("{HAPROXY}{frontends}");
    start(rig, "haproxy", &["-db", "-f"], &text, "127.0.0.1:443")
}

/// Caddy with these sites, and lines for all of them.
#[must_use]
pub fn caddy(rig: &Rig, all: &str, sites: &str) -> Server {
    let text = format!("{{\n admin off\n storage file_system @DIR@/caddy\n{all}\n}}\n{sites}");
    let words = ["run", "--adapter", "caddyfile", "--config"];
    start(rig, "caddy", &words, &text, "127.0.0.1:443")
}

fn start(rig: &Rig, program: &str, words: &[&str], text: &str, address: &str) -> Server {
    let text = text.replace("@PKI@", "@DIR@/pki");
    Server::start_at(&rig.network, program, words, &text, address)
}
