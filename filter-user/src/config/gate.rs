//! `[gate]`: the TLS listener, its limits, and one policy per `[[gate.host]]`.

use std::collections::HashMap;
use std::fmt::{self, Display, Formatter};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;

use super::{ConfigError, Located, Place};

/// `[gate]`.
#[derive(Clone, Debug)]
pub struct GateSettings {
    /// Load balancers that must tell by a PROXY header whom they speak for.
    pub proxy_from: Vec<IpNet>,
    /// Cloudflare's origin-pull CA, if it is another than the one built in.
    pub cloudflare_ca: Option<Located<PathBuf>>,
    /// Everything before the first relayed byte, together.
    pub handshake_timeout: Duration,
    /// Connecting to the upstream, within `handshake_timeout`.
    pub connect_timeout: Duration,
    /// A connection without a byte in either direction.
    pub idle_timeout: Duration,
    /// How long live connections may go on after a stop was asked for.
    pub drain_timeout: Duration,
    /// Connections whose handshake is not over, hello or not.
    pub max_handshakes: usize,
    /// What one source may take: an IPv4 address, or an IPv6 /64.
    pub per_source: PeerLimit,
    /// What a network may take: an IPv4 /24, or an IPv6 /48.
    pub per_network: PeerLimit,
    /// Which address the web server sees.
    pub client_address: ClientAddress,
    /// The TCP ports whose connections are steered to the gate; none, if it listens on them itself.
    pub steered_ports: Vec<u16>,
    /// The policies, one per `[[gate.host]]`.
    pub hosts: Vec<HostSettings>,
}

/// Which address the web server sees connections from.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ClientAddress {
    /// Loopback's.
    #[default]
    Loopback,
    /// The client's own: the gate opens connections in its name.
    Transparent,
}

/// What one part of the internet may take of the gate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PeerLimit {
    /// Connections that have not said their hello, to whatever host.
    pub hellos: usize,
    /// Open connections to one host, handshakes included.
    pub connections: usize,
    /// Handshakes in flight with one host.
    pub handshakes: usize,
    /// Handshakes begun per second with one host, and at once.
    pub handshakes_per_second: usize,
}

/// `[[gate.host]]`: one policy for one name or several.
#[derive(Clone, Debug)]
pub struct HostSettings {
    /// The names; the first stands for the policy in metrics and logs.
    pub names: Vec<Located<Name>>,
    /// Whether unknown names, and clients that send none, end here too.
    pub is_default: bool,
    /// Certificates with their keys; the first that suits the client is shown. Not empty.
    pub certificates: Vec<KeyPair>,
    /// Whom a client certificate must come from; any one suffices.
    pub trust: Vec<Located<Trust>>,
    /// What happens to a client that is not trusted.
    pub client_auth: ClientAuth,
    /// Lists of revoked certificates.
    pub crls: Vec<CrlFile>,
    /// What an expired list is worth.
    pub crl_expired: CrlExpired,
    /// The oldest TLS version that is spoken.
    pub min_tls: MinTls,
    /// Intermediates between a client certificate and its CA.
    pub max_depth: usize,
    /// Whether a client certificate must say that it is one.
    pub require_client_eku: bool,
    /// What sessions may be resumed.
    pub resumption: Resumption,
    /// What becomes of live connections when their policy changes.
    pub on_trust_change: OnTrustChange,
    /// Protocols offered by ALPN, in order of preference.
    pub alpn: Vec<String>,
    /// Whether the file has `alpn`: an operator who did not ask for HTTP/2 does not miss it.
    pub has_alpn: bool,
    /// Where accepted connections are relayed to.
    pub upstream: Located<Upstream>,
    /// The header that names the client to the upstream.
    pub proxy_protocol: ProxyProtocol,
    /// Whether a PROXY header of version 2 says more than the addresses: its TLVs.
    pub proxy_tlvs: bool,
    /// Relayed connections of this host, if they are fewer than the gate's.
    pub max_connections: Option<usize>,
}

impl GateSettings {
    /// The files that it names, each once.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        let shared = self.cloudflare_ca.iter().map(|ca| ca.value.as_path());
        let hosts = self.hosts.iter().flat_map(HostSettings::files);
        let all = shared.chain(hosts.map(|(_, path)| path));
        let mut files: Vec<_> = all.map(Path::to_owned).collect();
        files.sort();
        files.dedup();
        files
    }
}

impl HostSettings {
    /// The word that stands for the policy: its first name.
    #[must_use]
    pub fn label(&self) -> String {
        let first = self.names.first();
        first.map_or_else(String::new, |name| name.value.to_string())
    }

    /// The files that it names, and where.
    #[must_use]
    pub fn files(&self) -> Vec<(&Place, &Path)> {
        let pairs = self.certificates.iter();
        let own = pairs.flat_map(|pair| [&pair.certificate, &pair.key]);
        let upstream = self.upstream.value.tls.iter();
        let upstream = upstream.filter_map(|tls| match &tls.trust {
            UpstreamTrust::CaFile(path) => Some(path),
            UpstreamTrust::Shown => None,
        });
        let files = own.chain(&self.crls).chain(upstream);
        let files = files.map(|Located { value, place }| (place, value.as_path()));
        let trusted = self.trust.iter().filter_map(|trust| match &trust.value {
            Trust::CaFile(path) => Some((&trust.place, path.as_path())),
            Trust::Cloudflare | Trust::Pin(_) => None,
        });
        files.chain(trusted).collect()
    }

    /// The place to blame for what concerns the host as a whole.
    #[must_use]
    pub fn place(&self) -> &Place {
        match self.names.first() {
            Some(name) => &name.place,
            None => &self.upstream.place,
        }
    }
}

/// A server name, lower case and without the root's dot.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Name {
    /// This name.
    Exact(String),
    /// Every name that has one label more than this: `example.com` for `*.example.com`.
    Wildcard(String),
}

impl Display for Name {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Wildcard(parent) => write!(f, "*.{parent}"),
        }
    }
}

/// A server's certificate and its key.
#[derive(Clone, Debug)]
pub struct KeyPair {
    /// PEM file, leaf first.
    pub certificate: Located<PathBuf>,
    /// PEM file with the leaf's private key.
    pub key: Located<PathBuf>,
}

/// A PEM file of lists of revoked certificates.
pub type CrlFile = Located<PathBuf>;

/// Whom a client certificate must come from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Trust {
    /// Cloudflare's origin-pull CA: proves some Cloudflare customer, not which.
    Cloudflare,
    /// The CAs in a PEM file.
    CaFile(PathBuf),
    /// The key with this SHA-256 digest of its SubjectPublicKeyInfo (RFC 7469 §2.4), whichever CA
    /// signed the certificate.
    Pin([u8; 32]),
}

/// What happens to a client that is not trusted.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ClientAuth {
    /// It is refused.
    #[default]
    Enforce,
    /// It is admitted; log and metric name what it would be refused for.
    Log,
    /// It is not even asked for a certificate.
    Off,
}

/// What an expired list of revoked certificates is worth.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum CrlExpired {
    /// Nothing: what it should vouch for is refused.
    #[default]
    Refuse,
    /// As much as one that is not.
    Accept,
}

/// The oldest TLS version that is spoken.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum MinTls {
    /// TLS 1.2.
    #[default]
    #[serde(rename = "1.2")]
    Tls12,
    /// TLS 1.3.
    #[serde(rename = "1.3")]
    Tls13,
}

/// What sessions may be resumed.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Resumption {
    /// None: every connection is a full handshake.
    Off,
    /// Those whose client certificate still verifies.
    #[default]
    Verified,
}

/// What becomes of live connections when their policy changes.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum OnTrustChange {
    /// They go on.
    #[default]
    Keep,
    /// They are closed.
    Close,
}

/// Where accepted connections are relayed to, and how.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Upstream {
    /// Where.
    pub target: UpstreamTarget,
    /// Encrypted again, if it is.
    pub tls: Option<Reencryption>,
}

/// Where accepted connections are relayed to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum UpstreamTarget {
    /// Loopback, of the family and at the port that the client connected to: the web server that listens
    /// there while connections are steered.
    SamePort,
    /// There.
    Fixed(Target),
}

impl Upstream {
    /// Where it is, unless that depends on the connection.
    #[must_use]
    pub fn fixed(&self) -> Option<&Target> {
        match &self.target {
            UpstreamTarget::SamePort => None,
            UpstreamTarget::Fixed(target) => Some(target),
        }
    }
}

/// A stream socket of this host.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Target {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A UNIX socket.
    Unix(PathBuf),
}

/// How an upstream's certificate is verified.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Reencryption {
    /// The name that is sent as server name.
    pub name: UpstreamName,
    /// Whose certificate it is.
    pub trust: UpstreamTrust,
}

/// The server name that an upstream is asked for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum UpstreamName {
    /// This one.
    Fixed(String),
    /// That which the client names.
    Clients,
}

/// What an upstream's certificate must be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum UpstreamTrust {
    /// For the name, and from a CA in this PEM file.
    CaFile(Located<PathBuf>),
    /// One of those that the gate itself shows for the host.
    Shown,
}

impl Display for Target {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => Display::fmt(address, f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Display for Upstream {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.target {
            UpstreamTarget::SamePort => f.write_str("the same port of loopback")?,
            UpstreamTarget::Fixed(target) => Display::fmt(target, f)?,
        }
        match self.tls.as_ref().map(|tls| &tls.name) {
            Some(UpstreamName::Fixed(name)) => write!(f, " (TLS, {name})"),
            Some(UpstreamName::Clients) => f.write_str(" (TLS)"),
            None => Ok(()),
        }
    }
}

/// The header that names the client to the upstream.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ProxyProtocol {
    /// No header: the upstream sees connections from this host.
    None,
    /// Version 1, a line of text.
    V1,
    /// Version 2, binary.
    #[default]
    V2,
}

/// Refuses two hosts with one name, and two that want to be the default.
pub(super) fn check_names(hosts: &[HostSettings]) -> Result<(), ConfigError> {
    let mut seen: HashMap<&Name, &Place> = HashMap::new();
    for name in hosts.iter().flat_map(|host| &host.names) {
        if let Some(first) = seen.insert(&name.value, &name.place) {
            return Err(name.place.error(format_args!(
                "`{}` already has a policy, at line {}; give each name to one host",
                name.value,
                first.line()
            )));
        }
    }
    let mut defaults = hosts.iter().filter(|host| host.is_default);
    if let (Some(first), Some(second)) = (defaults.next(), defaults.next()) {
        return Err(second.place().error(format_args!(
            "`default = true` is said by the host at line {} already; one host can take the \
             unknown names",
            first.place().line()
        )));
    }
    Ok(())
}

/// Refuses an upstream that is one of the gate's own listeners.
pub(super) fn check_upstreams(
    hosts: &[HostSettings],
    listen: &[SocketAddr],
) -> Result<(), ConfigError> {
    for Located { value, place } in hosts.iter().map(|host| &host.upstream) {
        let Some(Target::Tcp(upstream)) = value.fixed() else {
            continue;
        };
        let reaches = |address: &SocketAddr| {
            let same_family = address.is_ipv4() == upstream.is_ipv4();
            let covers = address.ip() == upstream.ip() || address.ip().is_unspecified();
            address.port() == upstream.port() && same_family && covers
        };
        if listen.iter().any(reaches) {
            return Err(place.error(format_args!(
                "`{upstream}` is the gate itself; let the web server listen on another port"
            )));
        }
    }
    Ok(())
}

/// [`HostSettings::max_depth`] where nothing is said: Cloudflare's CA allows two (pathlen:2).
pub const DEFAULT_DEPTH: usize = 2;
