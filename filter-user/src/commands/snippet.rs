//! Web server configurations to paste: behind the gate, or demanding the certificate themselves.
//!
//! The words are in `dist/snippets`: what stands there once, what for each host, what once after that,
//! between lines of dashes. The names in them come from pullgate's own configuration.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;

use serde_json::json;

use super::output::{complain, show_either};
use crate::cli::{Extent, OutputFormat, Pairing, Server, SnippetArgs};
use crate::config::{
    ClientAuth, Config, ConfigError, DEFAULT_DEPTH, HostSettings, Located, MinTls, Place,
    ProxyProtocol, Target, Trust, load,
};
use crate::report::{EX_USAGE, ExitStatus, Failure};

/// Prints it.
pub(super) fn execute(
    file: &Path,
    arguments: &SnippetArgs,
    format: OutputFormat,
) -> Result<(), Failure> {
    let pairing = arguments.pairing().ok_or(SnippetError::NoPairing)?;
    let config = match file.try_exists() {
        Ok(false) => {
            complain(&format!(
                "{} is not there, so placeholders stand for names and files",
                file.display()
            ));
            None
        }
        Ok(true) | Err(_) => Some(load(file)?),
    };
    let text = snippet(
        arguments.server,
        pairing,
        arguments.extent(),
        config.as_ref(),
    )?;
    show_either((&text, json!({ "configuration": text })), format)?;
    Ok(())
}

/// The configuration for a server; names that pullgate's own does not tell are placeholders.
///
/// # Errors
///
/// Returns what of pullgate's configuration the server cannot do, or only by letting more in.
fn snippet(
    server: Server,
    pairing: Pairing,
    extent: Extent,
    config: Option<&Config>,
) -> Result<String, SnippetError> {
    let template = template(server, pairing, extent).ok_or(SnippetError::NoInclude)?;
    let gate = config.and_then(|config| config.live.gate.as_ref());
    let hosts = gate.map_or(&[][..], |gate| &gate.hosts);
    let shared = gate.and_then(|gate| gate.cloudflare_ca.as_ref());
    let shared = shared.map_or_else(|| Path::new(CLOUDFLARE_CA), |ca| &ca.value);
    let sites: Result<Vec<_>, _> = hosts
        .iter()
        .map(|host| Site::of(server, pairing, host, shared))
        .collect();
    let mut sites = sites?;
    if sites.is_empty() {
        sites.push(Site::example());
    }
    match pairing {
        Pairing::OwnMtls => same_demands(server, &sites)?,
        Pairing::BehindGate => same_header(&sites)?,
    }

    match extent {
        Extent::Whole => {
            if server == Server::Apache {
                sites = closest_first(&sites);
            }
            number_upstreams(&mut sites);
        }
        Extent::Included => sites = alike(sites, pairing),
    }

    let mut parts = template.split("---\n");
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
    let is_shared = |host: &HostSettings| {
        host.trust
            .iter()
            .any(|trust| trust.value == Trust::Cloudflare)
    };
    if pairing == Pairing::OwnMtls && hosts.iter().any(is_shared) {
        text.insert_str(0, SHARED);
    }
    Ok(text)
}

/// What a web server that trusts Cloudflare's shared CA does not prove.
const SHARED: &str = "\
# Cloudflare's shared CA proves only that some Cloudflare customer asks: another one who points a name
# at this address gets in. Upload a certificate of your own to Cloudflare (Authenticated Origin Pulls),
# and name its CA in `trust` instead.
";

/// What a snippet has about a host.
#[derive(Clone)]
struct Site {
    place: Place,
    names: Vec<String>,
    certificate: String,
    key: String,
    authority: String,
    min_tls: MinTls,
    max_depth: usize,
    target: Target,
    /// Tells an upstream from others in the names of what is there for it.
    suffix: String,
    proxy_protocol: ProxyProtocol,
    /// Whether the gate relays HTTP/2 alone: in clear text, these servers speak either.
    speaks_h2: bool,
}

impl Site {
    fn of(
        server: Server,
        pairing: Pairing,
        host: &HostSettings,
        shared: &Path,
    ) -> Result<Self, ConfigError> {
        let [certificate, key, authority] = match pairing {
            Pairing::BehindGate => {
                can_be_behind(server, host)?;
                Default::default()
            }
            Pairing::OwnMtls => {
                no_more_than(server, host)?;
                let pair = &host.certificates[0];
                let [certificate, key] = [&pair.certificate, &pair.key];
                [
                    plain(&certificate.place, &certificate.value)?,
                    plain(&key.place, &key.value)?,
                    authority(host, shared)?,
                ]
            }
        };
        Ok(Self {
            place: host.place().clone(),
            names: host
                .names
                .iter()
                .map(|name| name.value.to_string())
                .collect(),
            certificate,
            key,
            authority,
            min_tls: host.min_tls,
            max_depth: host.max_depth,
            target: host
                .upstream
                .value
                .fixed()
                .cloned()
                .unwrap_or_else(example_target),
            suffix: String::new(),
            proxy_protocol: host.proxy_protocol,
            speaks_h2: host.alpn == ["h2"],
        })
    }

    fn example() -> Self {
        Self {
            place: Place::nowhere(),
            names: ["www.example.com", "example.com"].map(str::to_owned).into(),
            certificate: "/etc/pullgate/example.com.pem".to_owned(),
            key: "/etc/pullgate/example.com.key".to_owned(),
            authority: CLOUDFLARE_CA.to_owned(),
            min_tls: MinTls::default(),
            max_depth: DEFAULT_DEPTH,
            target: example_target(),
            suffix: String::new(),
            proxy_protocol: ProxyProtocol::default(),
            speaks_h2: false,
        }
    }

    fn fill(&self, part: &str, server: Server, pairing: Pairing) -> String {
        // Apache takes a wildcard for another name of a site only: one that it covers is the first.
        let exact = self.names.iter().find(|name| !name.starts_with('*'));
        let first = exact
            .or_else(|| self.names.first())
            .cloned()
            .unwrap_or_default();
        let first = first.replacen('*', "any", 1);
        let others = self.names.iter().filter(|name| **name != first);
        let aliases: String = others
            .map(|name| format!("    ServerAlias {name}\n"))
            .collect();
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
                // The gate is another user; nginx lets everybody in by itself.
                let mode = match server {
                    Server::Haproxy => " mode 666",
                    Server::Nginx | Server::Apache | Server::Caddy => "",
                };
                let listen = format!("{scheme}{}{mode}", path.display());
                (listen, "unix:".to_owned())
            }
        };
        let mut text = part.to_owned();
        for (placeholder, value) in [
            ("@NAMES@", self.names.join(" ")),
            ("@NAME@", first),
            ("@ALIASES@\n", aliases),
            ("@SITES@", sites.collect::<Vec<_>>().join(", ")),
            ("@LISTEN@", listen),
            ("@SUFFIX@", self.suffix.clone()),
            (
                "@HTTP2@",
                if self.speaks_h2 { " http2" } else { "" }.to_owned(),
            ),
            (
                "@PROTO@",
                if self.speaks_h2 { " proto h2" } else { "" }.to_owned(),
            ),
            ("@FROM@", from),
            ("@CERTIFICATE@", self.certificate.clone()),
            ("@KEY@", self.key.clone()),
            ("@CA@", self.authority.clone()),
            ("@TLS@", versions(server, self.min_tls).to_owned()),
            // mod_ssl counts the CA that is trusted too.
            (
                "@DEPTH@",
                (self.max_depth + usize::from(server == Server::Apache)).to_string(),
            ),
        ] {
            text = text.replace(placeholder, &value);
        }
        let has_header = self.proxy_protocol != ProxyProtocol::None;
        if pairing == Pairing::OwnMtls || has_header {
            text
        } else {
            without_header(&text)
        }
    }
}

fn example_target() -> Target {
    Target::Tcp(SocketAddr::from(([127, 0, 0, 1], 8080)))
}

/// Looks for what the server does not understand of what the gate says.
fn can_be_behind(server: Server, host: &HostSettings) -> Result<(), ConfigError> {
    let Some(target) = host.upstream.value.fixed() else {
        return Err(host.place().of("gate.host.upstream").error(
            "is the web server as it is, to which connections are steered back (`gate.steer`): it \
             needs no other configuration",
        ));
    };
    if host.upstream.value.tls.is_some() {
        return Err(host.place().of("gate.host.upstream_tls").error(
            "the gate speaks TLS to this upstream, for which there is no snippet; a web server on \
             this host needs none: leave `upstream_tls` out",
        ));
    }
    if server == Server::Caddy && host.proxy_protocol != ProxyProtocol::None {
        return Err(host.place().of("gate.host.proxy_protocol").error(
            "Debian's Caddy 2.6 reads no PROXY header, and would answer 400 to every client; let this \
             host have \"none\"",
        ));
    }
    match (server, target) {
        (Server::Apache, Target::Unix(_)) => Err(host
            .upstream
            .place
            .error("Apache listens on no UNIX socket; give it an address, such as 127.0.0.1:8080")),
        (Server::Caddy, Target::Unix(_)) => Err(host.upstream.place.error(
            "Debian's Caddy 2.6 lets no other user into its UNIX socket; give it an address, such as \
             127.0.0.1:8080",
        )),
        (_, Target::Unix(path)) => plain(&host.upstream.place, path).map(drop),
        (_, Target::Tcp(_)) => Ok(()),
    }
}

/// The name of a file that every server takes for one word.
fn plain(place: &Place, path: &Path) -> Result<String, ConfigError> {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+=@:,~%".contains(c);
    if text.chars().all(is_plain) {
        return Ok(text);
    }
    Err(place.error(format_args!(
        "a web server would misread the name {text}; let it have no spaces or quotes"
    )))
}

/// Looks for what the server cannot demand of a client, and would let in.
fn no_more_than(server: Server, host: &HostSettings) -> Result<(), ConfigError> {
    if host.require_client_eku {
        return Err(host.place().of("gate.host.require_client_eku").error(
            "a web server takes certificates that do not say that they are a client's; leave it out, \
             or let the gate verify",
        ));
    }
    let counts = matches!(server, Server::Nginx | Server::Apache);
    if !counts && host.max_depth < DEFAULT_DEPTH {
        return Err(host.place().of("gate.host.max_depth").error(
            "this web server takes chains of any length; leave it out, or let the gate verify",
        ));
    }
    Ok(())
}

/// The one file of CAs whose client certificates a server is to take; none of them takes a pin.
fn authority(host: &HostSettings, shared: &Path) -> Result<String, ConfigError> {
    if host.client_auth == ClientAuth::Off {
        return Err(host.place().of("gate.host.client_auth").error(
            "this host demands no certificate, so there is nothing that a web server should demand",
        ));
    }
    if host.client_auth == ClientAuth::Log {
        return Err(host.place().of("gate.host.client_auth").error(
            "a web server that demands a certificate admits no client without one; write \"enforce\" \
             once no client of yours would be refused",
        ));
    }
    if !host.crls.is_empty() {
        return Err(host.place().of("gate.host.crl").error(
            "the web server would admit what is revoked; leave `crl` out, or let the gate verify",
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
        Trust::CaFile(path) => plain(place, path),
        Trust::Cloudflare => plain(place, shared),
        Trust::Pin(_) => Err(place.error(
            "a web server knows no pins, and would admit whatever the CA has signed; name the CA of \
             your client certificate, or let the gate verify",
        )),
    }
}

/// What is demanded before the host's name is known is demanded for all hosts.
fn same_demands(server: Server, sites: &[Site]) -> Result<(), ConfigError> {
    let first = &sites[0];
    let mut others = sites.iter().filter(|_| server != Server::Caddy);
    if let Some(other) = others.find(|site| site.min_tls != first.min_tls) {
        return Err(other.place.of("gate.host.min_tls").error(
            "a web server speaks the same TLS versions for all hosts of an address; let all hosts \
             say the same, or let the gate verify",
        ));
    }
    let mut of_haproxy = sites.iter().filter(|_| server == Server::Haproxy);
    let other = of_haproxy.find(|site| site.authority != first.authority);
    other.map_or(Ok(()), |other| {
        Err(other.place.of("gate.host.trust").error(
            "HAProxy takes one file of CAs for all hosts of an address; put both into one, or let \
             the gate verify",
        ))
    })
}

/// As the server spells them.
fn versions(server: Server, min_tls: MinTls) -> &'static str {
    match (server, min_tls) {
        (Server::Nginx, MinTls::Tls12) => "TLSv1.2 TLSv1.3",
        (Server::Nginx, MinTls::Tls13) | (Server::Haproxy, MinTls::Tls13) => "TLSv1.3",
        (Server::Apache, MinTls::Tls12) => "-all +TLSv1.2 +TLSv1.3",
        (Server::Apache, MinTls::Tls13) => "-all +TLSv1.3",
        (Server::Haproxy, MinTls::Tls12) => "TLSv1.2",
        (Server::Caddy, MinTls::Tls12) => "tls1.2",
        (Server::Caddy, MinTls::Tls13) => "tls1.3",
    }
}

/// Apache takes the first site that a name fits; who is let in is decided by the one that fits best.
fn closest_first(sites: &[Site]) -> Vec<Site> {
    let split = sites.iter().flat_map(|site| {
        let (wildcards, exact): (Vec<_>, Vec<_>) = site
            .names
            .iter()
            .cloned()
            .partition(|name| name.starts_with('*'));
        let wildcards = wildcards.into_iter().map(|name| vec![name]);
        let exact = Some(exact).filter(|names| !names.is_empty());
        let names = exact.into_iter().chain(wildcards);
        names.map(|names| Site {
            names,
            ..site.clone()
        })
    });
    let mut split: Vec<_> = split.collect();
    split.sort_by_key(|site| {
        let first = site.names.first().map_or("", String::as_str);
        // Of two wildcards, the longer one is the closer.
        let labels = first.split('.').count();
        (first.starts_with('*'), Reverse(labels))
    });
    split
}

/// One suffix for all sites of an upstream.
fn number_upstreams(sites: &mut [Site]) {
    let mut targets: Vec<Target> = Vec::new();
    for site in sites {
        let known = targets.iter().position(|target| *target == site.target);
        let index = known.unwrap_or_else(|| {
            targets.push(site.target.clone());
            targets.len() - 1
        });
        site.suffix = suffix(index);
    }
}

/// One site for all of which the same is demanded, or that have the same upstream: they include the same file.
fn alike(sites: Vec<Site>, pairing: Pairing) -> Vec<Site> {
    let mut files: Vec<Site> = Vec::new();
    for site in sites {
        let same = |file: &&mut Site| match pairing {
            Pairing::BehindGate => file.target == site.target && file.speaks_h2 == site.speaks_h2,
            Pairing::OwnMtls => {
                file.authority == site.authority && file.max_depth == site.max_depth
            }
        };
        match files.iter_mut().find(same) {
            Some(file) => file.names.extend(site.names),
            None => files.push(Site {
                suffix: suffix(files.len()),
                ..site
            }),
        }
    }
    files
}

/// A suffix for the one at this index; the first has none.
fn suffix(index: usize) -> String {
    match index {
        0 => String::new(),
        _ => format!("-{}", index + 1),
    }
}

/// A listener expects a header of every client, or of none.
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

/// The same for a host whose upstream gets no header.
fn without_header(text: &str) -> String {
    let is_about_it = |line: &&str| {
        let about = ["real_ip", "RemoteIPProxyProtocol"];
        !about.iter().any(|word| line.contains(word))
    };
    let kept: Vec<_> = text.lines().filter(is_about_it).collect();
    let without_nginx = kept.join("\n").replace(" proxy_protocol;", ";");
    without_nginx.replace(" accept-proxy", "") + "\n"
}

fn template(server: Server, pairing: Pairing, extent: Extent) -> Option<&'static str> {
    if extent == Extent::Included {
        return match (server, pairing) {
            (Server::Nginx, Pairing::BehindGate) => Some(include_str!(
                "../../dist/snippets/nginx-behind-gate-include"
            )),
            (Server::Nginx, Pairing::OwnMtls) => {
                Some(include_str!("../../dist/snippets/nginx-own-mtls-include"))
            }
            (Server::Apache, Pairing::BehindGate) => Some(include_str!(
                "../../dist/snippets/apache-behind-gate-include"
            )),
            (Server::Apache, Pairing::OwnMtls) => {
                Some(include_str!("../../dist/snippets/apache-own-mtls-include"))
            }
            (Server::Haproxy | Server::Caddy, _) => None,
        };
    }
    Some(match (server, pairing) {
        (Server::Nginx, Pairing::BehindGate) => {
            include_str!("../../dist/snippets/nginx-behind-gate")
        }
        (Server::Nginx, Pairing::OwnMtls) => include_str!("../../dist/snippets/nginx-own-mtls"),
        (Server::Apache, Pairing::BehindGate) => {
            include_str!("../../dist/snippets/apache-behind-gate")
        }
        (Server::Apache, Pairing::OwnMtls) => include_str!("../../dist/snippets/apache-own-mtls"),
        (Server::Haproxy, Pairing::BehindGate) => {
            include_str!("../../dist/snippets/haproxy-behind-gate")
        }
        (Server::Haproxy, Pairing::OwnMtls) => include_str!("../../dist/snippets/haproxy-own-mtls"),
        (Server::Caddy, Pairing::BehindGate) => {
            include_str!("../../dist/snippets/caddy-behind-gate")
        }
        (Server::Caddy, Pairing::OwnMtls) => include_str!("../../dist/snippets/caddy-own-mtls"),
    })
}

/// Why there is no snippet.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnippetError {
    /// What of pullgate's configuration the server cannot do.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It is not said which pairing is meant.
    #[error(
        "write `--behind-gate` for a web server to which the gate relays, or `--own-mtls` for one that demands \
         Cloudflare's certificate itself, behind the filter alone"
    )]
    NoPairing,
    /// The server's sites cannot include a file.
    #[error(
        "`--include` is for nginx and Apache; of what is printed without it, take the lines over that your sites lack"
    )]
    NoInclude,
}

impl ExitStatus for SnippetError {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Config(error) => error.exit_status(),
            Self::NoInclude | Self::NoPairing => EX_USAGE,
        }
    }
}

/// Where the package puts it.
const CLOUDFLARE_CA: &str = "/usr/share/pullgate/cloudflare-origin-pull-ca.pem";
