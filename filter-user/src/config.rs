//! The configuration: TOML text in, a complete and typed [`Config`] out.
//!
//! Pure, but for `load`: it is given the text. Whatever can be judged without looking at the
//! host is judged here; each later stage gets types, and a [`Place`] to blame if a file that the
//! configuration names turns out to be unusable.

use std::collections::BTreeMap;
use std::fmt::{Debug, Formatter};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use filter_ebpf::Settings;
use ipnet::IpNet;
use serde::Deserialize;
use url::Url;

pub use self::error::{ConfigError, ConfigErrorKind, Place};
pub use self::gate::{
    ClientAddress, ClientAuth, CrlExpired, CrlFile, DEFAULT_DEPTH, GateSettings, HostSettings,
    KeyPair, MinTls, Name, OnTrustChange, PeerLimit, ProxyProtocol, Reencryption, Resumption,
    Target, Trust, Upstream, UpstreamName, UpstreamTarget, UpstreamTrust,
};
pub use self::load::{LoadError, load, salvage_paths};
pub(crate) use self::raw::HTTP_PORTS;
pub use self::source::{Fallback, FeedSource, Location, SourceEndpoint, redacted};
pub(crate) use self::value::is_loopback;
use crate::host::netlink::ReturnPath;
use crate::ranges::{GuardLimits, RangeSet, Rules};
use crate::role::Role;

mod error;
mod gate;
mod load;
mod raw;
#[cfg(test)]
mod reference;
mod source;
#[cfg(test)]
mod tests;
mod value;

/// A whole configuration file.
#[derive(Clone, Debug)]
pub struct Config {
    /// What takes effect at a start.
    pub boot: Arc<Boot>,
    /// What a reload replaces.
    pub live: Live,
}

/// What takes effect at a start: a process keeps what it was started with.
#[derive(Debug)]
pub struct Boot {
    /// Where state, sockets and pins live.
    pub paths: Paths,
    /// `[metrics]`: where each role serves its metrics, if it does.
    pub metrics: BTreeMap<Role, Located<Target>>,
    /// `gate.listen`: the addresses that the gate listens on; none without a gate.
    pub listen: Vec<SocketAddr>,
    /// `gate.steer`: whether the gate hands its listening sockets to the filter, which steers connections
    /// to them.
    pub steer: bool,
    /// `gate.client_address = "transparent"`: what leads the web server's answers back to the gate, which
    /// opens connections in its clients' names.
    pub return_path: Option<ReturnPath>,
    /// `gate.max_connections`: connections at once.
    pub max_connections: usize,
}

/// What a reload replaces.
#[derive(Clone, Debug)]
pub struct Live {
    /// `[filter]`, if the host runs that role.
    pub filter: Option<FilterSettings>,
    /// `[ranges]`.
    pub ranges: RangesSettings,
    /// `[gate]`, if the host runs that role.
    pub gate: Option<GateSettings>,
}

impl Boot {
    /// Which address the web server sees.
    #[must_use]
    pub fn client_address(&self) -> ClientAddress {
        match self.return_path {
            Some(_) => ClientAddress::Transparent,
            None => ClientAddress::Loopback,
        }
    }

    /// The settings of these roles that differ, by their names.
    #[must_use]
    pub fn differences(&self, other: &Self, roles: &[Role]) -> Vec<&'static str> {
        let Self {
            paths,
            metrics,
            listen,
            steer,
            return_path,
            max_connections,
        } = self;
        let is_gate = roles.contains(&Role::Gate);
        let is_elsewhere = |role: &Role| metrics.get(role) != other.metrics.get(role);
        let is_filter = roles.contains(&Role::Filter);
        let leads_back = is_gate || is_filter;
        let is_other = |number: fn(&ReturnPath) -> u32| {
            let both = return_path.as_ref().zip(other.return_path.as_ref());
            is_filter && both.is_some_and(|(ours, theirs)| number(ours) != number(theirs))
        };
        let differs = [
            ("paths", *paths != other.paths),
            ("metrics", roles.iter().any(is_elsewhere)),
            ("gate.listen", is_gate && *listen != other.listen),
            ("gate.steer", is_gate && *steer != other.steer),
            (
                "gate.client_address",
                leads_back && return_path.is_some() != other.return_path.is_some(),
            ),
            ("gate.route_table", is_other(|path| path.table)),
            ("gate.rule_priority", is_other(|path| path.priority)),
            (
                "gate.max_connections",
                is_gate && *max_connections != other.max_connections,
            ),
        ];
        let differing = differs.into_iter().filter(|(_, differs)| *differs);
        differing.map(|(setting, _)| setting).collect()
    }

    /// What these roles work with once this is read: what they were started with, and where another
    /// role will be.
    #[must_use]
    pub fn keeping(&self, started: &Self, roles: &[Role]) -> Self {
        let of_gate = if roles.contains(&Role::Gate) {
            started
        } else {
            self
        };
        Self {
            paths: started.paths.clone(),
            metrics: started.metrics.clone(),
            listen: of_gate.listen.clone(),
            steer: of_gate.steer,
            return_path: if roles.contains(&Role::Filter) {
                started.return_path
            } else {
                of_gate.return_path
            },
            max_connections: of_gate.max_connections,
        }
    }
}

impl Config {
    /// What a process of these roles works with once this is read, see [`Boot::keeping`].
    #[must_use]
    pub fn keeping(mut self, started: &Boot, roles: &[Role]) -> Self {
        let boot = self.boot.keeping(started, roles);
        if let Some(gate) = &mut self.live.gate {
            gate.client_address = boot.client_address();
        }
        Self {
            boot: Arc::new(boot),
            live: self.live,
        }
    }

    /// Parses the text of `file`; relative paths in it are relative to the file's directory.
    ///
    /// # Errors
    ///
    /// Returns the first [`ConfigError`], with file, line and field.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        raw::parse(&Source::new(file, text))
    }

    /// The roles that it describes.
    #[must_use]
    pub fn roles(&self) -> Vec<Role> {
        let is_described = |role: &Role| match role {
            Role::Filter => self.live.filter.is_some(),
            Role::Ranges => true,
            Role::Gate => self.live.gate.is_some(),
        };
        Role::ALL.into_iter().filter(is_described).collect()
    }
}

/// Where things live on disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Paths {
    /// Directory of `ranges.json`, the last known good ranges.
    pub state: PathBuf,
    /// Directory of the roles' sockets.
    pub run: PathBuf,
    /// Directory of the pins, on a bpffs.
    pub bpf: PathBuf,
    /// Directory of what the filter alone keeps: the uplinks that it remembers.
    pub filter: PathBuf,
}

impl Paths {
    /// Where things live, by a file the rest of which may be wrong; the defaults, if nothing can be
    /// made of it. A typo must not stand between an operator and `unload` or `status`.
    #[must_use]
    pub fn salvage(file: &Path, text: &str) -> Self {
        raw::paths(&Source::new(file, text))
    }

    /// The directory that is a role's alone: its sockets are there, and no other role creates any.
    #[must_use]
    pub fn home(&self, role: Role) -> PathBuf {
        self.run.join(role.label())
    }

    /// The socket at which a role answers questions.
    #[must_use]
    pub fn socket(&self, role: Role) -> PathBuf {
        self.home(role).join("status.sock")
    }

    /// The socket at which a role takes orders, from root and its own user alone.
    #[must_use]
    pub fn control_socket(&self, role: Role) -> PathBuf {
        self.home(role).join("control.sock")
    }

    /// The socket at which the filter takes the gate's listening sockets, from the gate's user alone.
    #[must_use]
    pub fn handover_socket(&self) -> PathBuf {
        self.home(Role::Filter).join("handover.sock")
    }

    /// The snapshot of the last known good ranges.
    #[must_use]
    pub fn snapshot(&self) -> PathBuf {
        self.state.join("ranges.json")
    }

    /// What `interfaces = "auto"` remembers across boots.
    #[must_use]
    pub fn uplinks(&self) -> PathBuf {
        self.filter.join("uplinks.json")
    }
}

/// `[filter]`: what the XDP program protects.
#[derive(Clone, Debug)]
pub struct FilterSettings {
    /// Interfaces that the program is attached to.
    pub interfaces: Interfaces,
    /// Protected TCP ports.
    pub ports: Vec<u16>,
    /// Those of them whose connections are steered to the gate.
    pub steered_ports: Vec<u16>,
    /// Protected UDP ports.
    pub udp_ports: Vec<u16>,
    /// Protected addresses; empty protects all.
    pub destinations: Vec<IpAddr>,
    /// What to do with a drop verdict.
    pub mode: Mode,
    /// What to do with strangers' later TCP fragments.
    pub fragments: Fragments,
    /// Whether SYNs are answered in the kernel's place.
    pub syn_cookies: SynCookies,
    /// Which modes of the attach ladder may be used.
    pub attach: Attach,
    /// What to do where another program holds the XDP hook.
    pub coexist: Coexist,
    /// How long a start waits for interfaces that are not there.
    pub interface_timeout: Duration,
}

/// What is protected, as the kernel's program reads it.
impl Settings for FilterSettings {
    fn protects_tcp(&self, port: u16) -> bool {
        self.ports.contains(&port)
    }

    fn protects_udp(&self, port: u16) -> bool {
        self.udp_ports.contains(&port)
    }

    fn protects_some_udp(&self) -> bool {
        !self.udp_ports.is_empty()
    }

    fn protects_destination(&self, address: IpAddr) -> bool {
        self.destinations.is_empty() || self.destinations.contains(&address)
    }

    fn fragments_pass(&self) -> bool {
        self.fragments == Fragments::Pass
    }
}

/// Interfaces that the program is attached to.
#[derive(Clone, Debug)]
pub enum Interfaces {
    /// Those with a default route, and those that will have one.
    Auto,
    /// These.
    Named(Vec<Located<String>>),
}

/// What to do where another program holds the XDP hook.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Coexist {
    /// Refuse, and say whose it is.
    #[default]
    Refuse,
    /// Judge behind it, at TCX ingress.
    Tcx,
}

/// What to do with a drop verdict.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Drop.
    #[default]
    Enforce,
    /// Count what would be dropped, and let it pass.
    Monitor,
}

/// What to do with strangers' later TCP fragments.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Fragments {
    /// Drop them: they spare the stack's reassembly memory, and TCP does not fragment.
    #[default]
    Drop,
    /// Let them pass.
    Pass,
}

/// Whether SYNs are answered in the kernel's place.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum SynCookies {
    /// While the queue of a listener is full, where it is sure that the answer gets out.
    #[default]
    Auto,
    /// On one end of a veth pair too.
    On,
    /// Never: the kernel does it.
    Off,
}

/// Which modes of the attach ladder may be used.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Attach {
    /// Native, else generic with a warning.
    #[default]
    Auto,
    /// Native or not at all.
    Native,
    /// Generic only.
    Generic,
}

/// `[ranges]`: where the ranges come from, and the operator's own rules.
#[derive(Clone, Debug)]
pub struct RangesSettings {
    /// Sources; the active ranges are the union of their lists.
    pub sources: Vec<Located<FeedSource>>,
    /// Ranges that stand in the configuration, and count like a source's.
    pub static_: RangeSet,
    /// By which way the sources are asked.
    pub proxy: Proxy,
    /// Time between two refreshes.
    pub interval: Duration,
    /// How long a range that vanished is kept.
    pub removal_grace: Duration,
    /// Sources that may enter besides the published ranges.
    pub allow: Vec<IpNet>,
    /// Sources that may not enter whatever else says so.
    pub deny: Vec<IpNet>,
    /// What the guard lets through.
    pub limits: GuardLimits,
}

impl RangesSettings {
    /// Who may enter by these ranges and the operator's own rules.
    #[must_use]
    pub fn rules<'a>(&'a self, ranges: &'a RangeSet) -> Rules<'a> {
        Rules {
            ranges,
            allow: &self.allow,
            deny: &self.deny,
        }
    }
}

/// By which way the sources are asked.
#[derive(Clone, Eq, PartialEq)]
pub enum Proxy {
    /// Directly.
    None,
    /// By what `HTTPS_PROXY` and its like say.
    Environment,
    /// By this proxy; the URL may hold a password.
    Url(Url),
}

impl Debug for Proxy {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Environment => f.write_str("env"),
            Self::Url(url) => f.write_str(&redacted(url)),
        }
    }
}

/// A value, and the place in the configuration that it came from.
#[derive(Clone, Debug)]
pub struct Located<T> {
    /// The value.
    pub value: T,
    /// Where it stands.
    pub place: Place,
}

/// Two say the same wherever they stand.
impl<T: PartialEq> PartialEq for Located<T> {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

impl<T: Eq> Eq for Located<T> {}

/// A configuration file's name and text.
struct Source<'a> {
    file: Arc<Path>,
    text: &'a str,
    /// Where lines end: thousands of values ask for their line.
    line_ends: Vec<usize>,
}

impl<'a> Source<'a> {
    fn new(file: &Path, text: &'a str) -> Self {
        Self {
            file: Arc::from(file),
            text,
            line_ends: text.match_indices('\n').map(|(end, _)| end).collect(),
        }
    }

    fn place(&self, offset: usize, field: impl Into<String>) -> Place {
        Place {
            file: Arc::clone(&self.file),
            line: 1 + self.line_ends.partition_point(|end| *end < offset),
            field: field.into(),
        }
    }
}
