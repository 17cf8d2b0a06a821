//! What a web server serves, as its own tools tell.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use crate::config::HTTP_PORTS;

/// A site that speaks TLS, of whatever web server.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(in crate::commands) struct ServedSite {
    /// The file and line where it is configured.
    pub(in crate::commands) place: String,
    /// The names that it serves, as `gate.host` takes them.
    pub(in crate::commands) names: Vec<String>,
    /// Names of it that `gate.host` does not take.
    pub(in crate::commands) other_names: Vec<String>,
    /// Its certificates, each with its key.
    pub(in crate::commands) certificates: Vec<(PathBuf, PathBuf)>,
    /// Where it listens.
    pub(in crate::commands) listens: Vec<Listen>,
    /// Whether it refuses clients without a certificate today.
    pub(in crate::commands) verifies: bool,
    /// Whether it refuses all clients: it is there for names that are not served.
    pub(in crate::commands) refuses_all: bool,
    /// Whether all of what holds for it was looked at.
    pub(in crate::commands) is_whole: bool,
    /// Whether it resumes TLS sessions, as far as its configuration says.
    pub(in crate::commands) resumes_sessions: Option<bool>,
    /// The CAs that it verifies clients' certificates by.
    pub(in crate::commands) authority: Option<PathBuf>,
    /// Names of it that another site has, which comes first.
    pub(in crate::commands) taken_names: Vec<String>,
    /// Whether it resumes sessions of other sites, or anything else that the operator has to look at.
    pub(in crate::commands) notes: Vec<String>,
}

/// Where a site listens for TLS.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::commands) enum Listen {
    /// On this port of every address.
    Every(u16),
    /// On this port of one address.
    One(SocketAddr),
}

impl Listen {
    /// Whether only this host reaches it.
    pub(in crate::commands) fn is_loopback(&self) -> bool {
        match self {
            Self::Every(_) => false,
            Self::One(address) => address.ip().is_loopback(),
        }
    }

    /// Where this host reaches it.
    pub(in crate::commands) fn address(&self) -> SocketAddr {
        match self {
            Self::Every(port) => SocketAddr::from((Ipv4Addr::LOCALHOST, *port)),
            Self::One(address) => *address,
        }
    }

    /// From `address:port`, where an IPv6 address is in brackets, and `*` or nothing stands for all.
    pub(in crate::commands) fn parse(text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        Self::on(host, port.parse().ok()?)
    }

    /// On a port of what is before it in such a word; none, where a name stands whose address is not known.
    pub(in crate::commands) fn on(host: &str, port: u16) -> Option<Self> {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let address = match host {
            "" | "*" | "_default_" => return Some(Self::Every(port)),
            "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
            address => address.parse().ok()?,
        };
        Some(if address.is_unspecified() {
            Self::Every(port)
        } else {
            Self::One(SocketAddr::new(address, port))
        })
    }

    pub(in crate::commands) fn port(self) -> u16 {
        match self {
            Self::Every(port) => port,
            Self::One(address) => address.port(),
        }
    }

    /// Whether loopback reaches it.
    fn is_on_loopback(self) -> bool {
        self.is_private() || matches!(self, Self::Every(_))
    }

    /// Whether nothing but loopback reaches it.
    fn is_private(self) -> bool {
        match self {
            Self::Every(_) => false,
            Self::One(address) => address.ip().is_loopback(),
        }
    }
}

impl ServedSite {
    /// Takes the names that `gate.host` takes, each once, and keeps the others apart.
    pub(in crate::commands) fn name(&mut self, names: impl IntoIterator<Item = String>) {
        for name in names {
            let name = name.to_ascii_lowercase();
            let kept = if takes(&name) {
                &mut self.names
            } else {
                &mut self.other_names
            };
            if !kept.contains(&name) {
                kept.push(name);
            }
        }
    }

    /// Its `[[gate.host]]`; in comments, if the gate cannot serve it as it is.
    pub(in crate::commands) fn host(&self) -> String {
        let mut text = format!("\n{}", comment(&self.place));
        for name in &self.other_names {
            text.push_str(&comment(&format!(
                "left out: `{name}` is no name that a client sends by itself"
            )));
        }
        for name in &self.taken_names {
            text.push_str(&comment(&format!(
                "left out: `{name}` is another site's already"
            )));
        }
        for note in &self.notes {
            text.push_str(&comment(note));
        }
        let Some(problem) = self.problem() else {
            text.push_str(&self.lines());
            return text;
        };
        text.push_str(&comment(&format!("left out: {problem}")));
        text
    }

    /// Why no `[[gate.host]]` can be written for it.
    pub(in crate::commands) fn problem(&self) -> Option<&'static str> {
        if self.listens.iter().all(|listen| listen.is_private()) {
            return Some("this host alone reaches it");
        }
        if self
            .listens
            .iter()
            .all(|listen| HTTP_PORTS.contains(&listen.port()))
        {
            return Some("connections to its port are not steered: Cloudflare speaks HTTP there");
        }
        if self.names.is_empty() && !self.taken_names.is_empty() {
            return Some("its names are another site's already");
        }
        if self.names.is_empty() {
            return Some("it has no name that a client can send");
        }
        if self.verifies && self.authority.is_none() {
            return Some(
                "it demands a client certificate, and of which CA is in no file that is named here",
            );
        }
        let is_wildcard = |name: &String| name.starts_with('*');
        if self.only_address().is_some() && self.names.iter().all(is_wildcard) {
            return Some(
                "it listens on one address alone, and its names are wildcards: the gate has no name to ask \
                 it by; let it listen on all addresses",
            );
        }
        if self.certificates.is_empty() {
            return Some("its certificate and key are in no file that is named here");
        }
        None
    }

    fn lines(&self) -> String {
        let mut text = "[[gate.host]]\n".to_owned();
        // The first one is whom a web server on one address is asked by.
        let (wildcards, exact): (Vec<_>, Vec<_>) =
            self.names.iter().partition(|name| name.starts_with('*'));
        let names = exact.into_iter().chain(wildcards);
        let names: Vec<_> = names.map(|name| quoted(name)).collect();
        text.push_str(&format!("names = [{}]\n", names.join(", ")));
        let (certificates, keys): (Vec<_>, Vec<_>) = self.certificates.iter().cloned().unzip();
        text.push_str(&format!("certificate = {}\n", paths(&certificates)));
        text.push_str(&format!("key = {}\n", paths(&keys)));
        match &self.authority {
            Some(authority) => text.push_str(&format!(
                    "trust = [{}]  # as the web server demands it today\n",
                    quoted(&authority.display().to_string())
                ),
            ),
            None => text.push_str(
                "# Any Cloudflare customer has the shared certificate: upload one of your own, and name its CA.\n\
                 trust = [\"cloudflare\"]\n",
            ),
        }
        text.push_str(if self.verifies {
            "client_auth = \"enforce\"  # as the web server does today\n"
        } else {
            "# The clients that would be refused: log serves and logs them, enforce refuses them.\n\
             client_auth = \"log\"\n"
        });
        if let Some(address) = self.only_address() {
            text.push_str(&format!(
                "# It listens on this address alone, where loopback does not reach it; it sees the gate come from \
                 this address.\n\
                 upstream = \"{address}\"\nupstream_tls = {{}}\nproxy_protocol = \"none\"\n\
                 alpn = [\"h2\", \"http/1.1\"]\n"
            ));
        }
        text
    }

    /// The address that it listens on, if none of loopback reaches it.
    pub(in crate::commands) fn only_address(&self) -> Option<SocketAddr> {
        if self.listens.iter().any(|listen| listen.is_on_loopback()) {
            return None;
        }
        self.listens.iter().find_map(|listen| match listen {
            Listen::One(address) => Some(*address),
            Listen::Every(_) => None,
        })
    }
}

/// Whether `gate.host.names` takes it: a host name, or one with a first label `*`.
fn takes(name: &str) -> bool {
    let name = name.strip_prefix("*.").unwrap_or(name);
    let is_name = rustls::pki_types::DnsName::try_from(name).is_ok();
    is_name && name.contains('.') && name.parse::<IpAddr>().is_err()
}

/// One path, or a list of them.
fn paths(all: &[PathBuf]) -> String {
    let all: Vec<_> = all
        .iter()
        .map(|path| quoted(&path.display().to_string()))
        .collect();
    match all.as_slice() {
        [one] => one.clone(),
        several => format!("[{}]", several.join(", ")),
    }
}

/// A line of comment: what a web server's configuration says may hold line ends.
pub(in crate::commands) fn comment(text: &str) -> String {
    let is_odd = |c: char| c.is_control();
    format!("# {}\n", text.replace(is_odd, "\u{fffd}"))
}

/// A TOML string.
pub(in crate::commands) fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}
