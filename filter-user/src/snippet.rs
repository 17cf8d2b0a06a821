//! Web server configurations to paste: behind the gate, or demanding the certificate themselves.
//!
//! The words are in `dist/snippets`: what stands there once, what for each host, what once after that,
//! between lines of dashes. The names in them come from pullgate's own configuration.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;

use crate::cli::{Pairing, Server};
use crate::config::{
    ClientAuth, Config, ConfigError, Host, Located, Place, ProxyProtocol, Target, Trust,
};

/// The configuration for a server; names that pullgate's own does not tell are placeholders.
///
/// # Errors
///
/// Returns what of pullgate's configuration the server cannot do, or only by letting more in.
pub fn snippet(
    server: Server,
    pairing: Pairing,
    config: Option<&Config>,
) -> Result<String, ConfigError> {
    let gate = config.and_then(|config| config.gate.as_ref());
    let hosts = gate.map_or(&[][..], |gate| &gate.hosts);
    let sites: Result<Vec<_>, _> = hosts
        .iter()
        .map(|host| Site::of(server, pairing, host))
        .collect();
    let mut sites = sites?;
    if sites.is_empty() {
        sites.push(Site::example());
    }
    match (server, pairing) {
        (Server::Haproxy, Pairing::OwnMtls) => same_authority(&sites)?,
        (_, Pairing::OwnMtls) => {}
        (_, Pairing::BehindGate) => same_header(&sites)?,
    }

    let mut parts = template(server, pairing).split("---\n");
    let mut part = || parts.next().unwrap_or_default();
    let listens = sites.iter().map(|site| format!("Listen {}", site.target));
    let listens: Vec<_> = listens.collect::<BTreeSet<_>>().into_iter().collect();
    let crts = sites.iter().map(|site| format!("crt {}", site.certificate));
    let mut text = sites[0]
        .fill(part(), server, pairing)
        .replace("@LISTENS@", &listens.join("\n"))
        .replace("@CRTS@", &crts.collect::<Vec<_>>().join(" "));
    let each = part();
    let mut filled: Vec<String> = Vec::new();
    for site in &sites {
        let site = site.fill(each, server, pairing);
        // Several hosts of one upstream may need it once.
        if !filled.contains(&site) {
            filled.push(site);
        }
    }
    text.extend(filled);
    text.push_str(part());
    Ok(text)
}

/// What is told of a host.
struct Site {
    place: Place,
    names: Vec<String>,
    certificate: String,
    key: String,
    authority: String,
    target: Target,
    proxy_protocol: ProxyProtocol,
}

impl Site {
    fn of(server: Server, pairing: Pairing, host: &Host) -> Result<Self, ConfigError> {
        let upstream = &host.upstream;
        let is_unix = matches!(upstream.value.target, Target::Unix(_));
        if (server, pairing, is_unix) == (Server::Apache, Pairing::BehindGate, true) {
            let text =
                "Apache listens on no UNIX socket; give it an address, such as 127.0.0.1:8080";
            return Err(upstream.place.error(text));
        }
        let authority = match pairing {
            Pairing::BehindGate => String::new(),
            Pairing::OwnMtls => authority(host)?,
        };
        let path = |path: &Path| path.display().to_string();
        let pair = host.certificates.first();
        Ok(Self {
            place: host.place().clone(),
            names: host
                .names
                .iter()
                .map(|name| name.value.to_string())
                .collect(),
            certificate: pair
                .map(|pair| path(&pair.certificate.value))
                .unwrap_or_default(),
            key: pair.map(|pair| path(&pair.key.value)).unwrap_or_default(),
            authority,
            target: upstream.value.target.clone(),
            proxy_protocol: host.proxy_protocol,
        })
    }

    fn example() -> Self {
        Self {
            place: Place::nowhere(),
            names: ["www.example.com", "example.com"].map(str::to_owned).into(),
            certificate: "/etc/pullgate/example.com.pem".to_owned(),
            key: "/etc/pullgate/example.com.key".to_owned(),
            authority: CLOUDFLARE_CA.to_owned(),
            target: Target::Tcp(SocketAddr::from(([127, 0, 0, 1], 8080))),
            proxy_protocol: ProxyProtocol::default(),
        }
    }

    fn fill(&self, part: &str, server: Server, pairing: Pairing) -> String {
        let (first, others) = self
            .names
            .split_first()
            .map_or(("", &[][..]), |(first, others)| (first.as_str(), others));
        let aliases = match others {
            [] => String::new(),
            others => format!("    ServerAlias {}\n", others.join(" ")),
        };
        let sites = self.names.iter().map(|name| match (pairing, &self.target) {
            (Pairing::OwnMtls, _) => format!("https://{name}"),
            (Pairing::BehindGate, Target::Tcp(address)) => {
                format!("http://{name}:{}", address.port())
            }
            (Pairing::BehindGate, Target::Unix(_)) => format!("http://{name}"),
        });
        let (listen, from) = match &self.target {
            Target::Tcp(address) if server == Server::Caddy => {
                (address.ip().to_string(), String::new())
            }
            Target::Tcp(address) => (address.to_string(), address.ip().to_string()),
            Target::Unix(path) => {
                let scheme = match server {
                    Server::Haproxy => "unix@",
                    Server::Caddy => "unix/",
                    Server::Nginx | Server::Apache => "unix:",
                };
                (format!("{scheme}{}", path.display()), "unix:".to_owned())
            }
        };
        let mut text = part.to_owned();
        for (placeholder, value) in [
            ("@NAMES@", self.names.join(" ")),
            ("@NAME@", first.to_owned()),
            ("@ALIASES@\n", aliases),
            ("@SITES@", sites.collect::<Vec<_>>().join(", ")),
            ("@LISTEN@", listen),
            ("@FROM@", from),
            ("@CERTIFICATE@", self.certificate.clone()),
            ("@KEY@", self.key.clone()),
            ("@CA@", self.authority.clone()),
        ] {
            text = text.replace(placeholder, &value);
        }
        let has_header = self.proxy_protocol != ProxyProtocol::None;
        match pairing == Pairing::OwnMtls || has_header {
            true => text,
            false => without_header(&text),
        }
    }
}

/// The one file of CAs whose client certificates a server is to take; none of them takes a pin.
fn authority(host: &Host) -> Result<String, ConfigError> {
    if host.client_auth == ClientAuth::Off {
        return Err(host.place().of("gate.host.client_auth").error(
            "this host demands no certificate, so there is nothing that a web server should demand",
        ));
    }
    if !host.crls.is_empty() {
        return Err(host.place().of("gate.host.crl").error(
            "the web server would let in what is revoked; leave `crl` out, or let the gate verify",
        ));
    }
    let [Located { value, place }] = &host.trust[..] else {
        let first = host.trust.first();
        let first = first.map_or_else(|| host.place(), |trust| &trust.place);
        return Err(first.error(
            "a web server takes one file of CAs; put those that it shall trust into one, and name it \
             alone",
        ));
    };
    match value {
        Trust::CaFile(path) => Ok(path.display().to_string()),
        Trust::Cloudflare => Ok(CLOUDFLARE_CA.to_owned()),
        Trust::Pin(_) => Err(place.error(
            "a web server knows no pins, and would let in whatever the CA has signed; name the CA of \
             your client certificate, or let the gate verify",
        )),
    }
}

/// One bind has one file of CAs.
fn same_authority(sites: &[Site]) -> Result<(), ConfigError> {
    let other = sites
        .iter()
        .find(|site| site.authority != sites[0].authority);
    other.map_or(Ok(()), |other| {
        Err(other.place.of("gate.host.trust").error(
            "HAProxy takes one file of CAs for all hosts of an address; put both into one, or let \
             the gate verify",
        ))
    })
}

/// Who listens expects a header of everybody, or of nobody.
fn same_header(sites: &[Site]) -> Result<(), ConfigError> {
    let differs = |a: &Site, b: &Site| {
        let has_header = |site: &Site| site.proxy_protocol != ProxyProtocol::None;
        a.target == b.target && has_header(a) != has_header(b)
    };
    let mut others = sites.iter();
    let other = others.rfind(|site| sites.iter().any(|first| differs(first, site)));
    other.map_or(Ok(()), |other| {
        Err(other.place.of("gate.host.proxy_protocol").error(
            "another host of this upstream sends a header, or none, as this one does not; let both \
             do the same, or give each an upstream of its own",
        ))
    })
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
