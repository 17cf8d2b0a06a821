//! Web server configurations to paste: behind the gate, or demanding the certificate themselves.
//!
//! The words are in `dist/snippets`; the names in them come from pullgate's own configuration.

use std::net::SocketAddr;

use crate::cli::{Pairing, Server};
use crate::config::{Config, Host, ProxyProtocol, Target, Trust};

/// The configuration for a server; names that pullgate's own does not tell are placeholders.
#[must_use]
pub fn snippet(server: Server, pairing: Pairing, config: Option<&Config>) -> String {
    let gate = config.and_then(|config| config.gate.as_ref());
    match gate.map(|gate| &gate.hosts[..]) {
        None | Some([]) => fill(server, pairing, None),
        Some(hosts) => {
            let all = hosts.iter().map(|host| fill(server, pairing, Some(host)));
            all.collect::<Vec<_>>().join("\n")
        }
    }
}

fn fill(server: Server, pairing: Pairing, host: Option<&Host>) -> String {
    let names = host.map_or_else(
        || vec!["www.example.com".to_owned(), "example.com".to_owned()],
        |host| {
            host.names
                .iter()
                .map(|name| name.value.to_string())
                .collect()
        },
    );
    let (first, others) = names
        .split_first()
        .map_or(("", &[][..]), |(first, others)| (first.as_str(), others));
    let aliases = match others {
        [] => String::new(),
        others => format!("    ServerAlias {}\n", others.join(" ")),
    };
    let pair = host.and_then(|host| host.certificates.first());
    let path = |path: Option<&std::path::PathBuf>, default: &str| {
        path.map_or_else(|| default.to_owned(), |path| path.display().to_string())
    };
    let authority = host.and_then(|host| {
        let mut files = host.trust.iter().filter_map(|trust| match &trust.value {
            Trust::CaFile(path) => Some(path),
            Trust::Cloudflare | Trust::Pin(_) => None,
        });
        files.next()
    });
    let default = Target::Tcp(SocketAddr::from(([127, 0, 0, 1], 8080)));
    let target = host.map_or(default, |host| host.upstream.value.target.clone());
    let sites: Vec<_> = match (pairing, &target) {
        (Pairing::BehindGate, Target::Tcp(address)) => {
            vec![format!("http://:{}", address.port())]
        }
        (Pairing::BehindGate, Target::Unix(_)) | (Pairing::OwnMtls, _) => {
            names.iter().map(|name| format!("https://{name}")).collect()
        }
    };
    let (listen, from, bind) = match &target {
        Target::Tcp(address) => (
            address.to_string(),
            address.ip().to_string(),
            address.ip().to_string(),
        ),
        Target::Unix(path) => {
            let path = format!("unix:{}", path.display());
            (path.clone(), "unix:".to_owned(), path)
        }
    };
    let mut text = template(server, pairing).to_owned();
    for (placeholder, value) in [
        ("@NAMES@", names.join(" ")),
        ("@NAME@", first.to_owned()),
        ("@ALIASES@\n", aliases),
        ("@SITES@", sites.join(", ")),
        ("@LISTEN@", listen),
        ("@FROM@", from),
        ("@BIND@", bind),
        (
            "@CERTIFICATE@",
            path(
                pair.map(|pair| &pair.certificate.value),
                "/etc/pullgate/example.com.pem",
            ),
        ),
        (
            "@KEY@",
            path(
                pair.map(|pair| &pair.key.value),
                "/etc/pullgate/example.com.key",
            ),
        ),
        ("@CA@", path(authority, CLOUDFLARE_CA)),
    ] {
        text = text.replace(placeholder, &value);
    }
    match host.map(|host| host.proxy_protocol) {
        Some(ProxyProtocol::None) if pairing == Pairing::BehindGate => without_header(&text),
        Some(_) | None => text,
    }
}

/// The same for a host whose upstream is told by no header who asks.
fn without_header(text: &str) -> String {
    let is_about_it = |line: &&str| {
        let about = ["real_ip", "RemoteIPProxyProtocol"];
        !about.iter().any(|word| line.contains(word))
    };
    let kept: Vec<_> = text.lines().filter(is_about_it).collect();
    let text = kept.join("\n").replace(" proxy_protocol;", ";");
    text.replace(" accept-proxy", "") + "\n"
}

fn template(server: Server, pairing: Pairing) -> &'static str {
    match (server, pairing) {
        (Server::Nginx, Pairing::BehindGate) => include_str!("../dist/snippets/nginx-behind-gate"),
        (Server::Nginx, Pairing::OwnMtls) => include_str!("../dist/snippets/nginx-own-mtls"),
        (Server::Apache, Pairing::BehindGate) => {
            include_str!("../dist/snippets/apache-behind-gate")
        }
        (Server::Apache, Pairing::OwnMtls) => include_str!("../dist/snippets/apache-own-mtls"),
        (Server::Haproxy, Pairing::BehindGate) => {
            include_str!("../dist/snippets/haproxy-behind-gate")
        }
        (Server::Haproxy, Pairing::OwnMtls) => include_str!("../dist/snippets/haproxy-own-mtls"),
        (Server::Caddy, Pairing::BehindGate) => include_str!("../dist/snippets/caddy-behind-gate"),
        (Server::Caddy, Pairing::OwnMtls) => include_str!("../dist/snippets/caddy-own-mtls"),
    }
}

/// Where the package puts it.
const CLOUDFLARE_CA: &str = "/usr/share/pullgate/cloudflare-origin-pull-ca.pem";
