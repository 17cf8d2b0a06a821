//! `[gate]` as it is written.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::super::gate::{check_names, check_upstreams};
use super::super::value::{Address, RawNet, Spanned, absolute, count, duration, located, rules};
use super::super::{ClientAddress, ConfigError, GateSettings, PeerLimit, Source};
use super::RawListening;
use super::host::{RawHost, some_count};
use crate::host::netlink::ReturnPath;

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct RawGate {
    /// Where the gate listens. With `steer`, the default is `["127.0.0.1:44300", "[::1]:44300"]`. A
    /// change takes effect at the next start.
    #[cfg_attr(test, schemars(extend("default" = ["0.0.0.0:443", "[::]:443"])))]
    listen: Option<Spanned<Vec<Address>>>,
    /// `true`: connections to the protected ports are steered to the gate, and the web server keeps
    /// its port. A change takes effect at the next start of the gate.
    #[cfg_attr(test, schemars(extend("default" = false)))]
    steer: Option<Spanned<bool>>,
    /// The address that the web server sees where connections are steered: `"loopback"`, or
    /// `"transparent"`: the client's own. Restart filter and gate after a change.
    #[cfg_attr(test, schemars(extend("default" = "loopback")))]
    client_address: Option<Spanned<ClientAddress>>,
    /// The routing table for `"transparent"`: a number that nothing else uses.
    #[serde(default = "route_table")]
    #[cfg_attr(test, schemars(extend("default" = 44300)))]
    route_table: Spanned<u32>,
    /// The priority of the policy rules for `"transparent"`.
    #[serde(default = "rule_priority")]
    #[cfg_attr(test, schemars(extend("default" = 44)))]
    rule_priority: Spanned<u32>,
    /// Load balancers in front, whose connections must begin with a PROXY header, v1 or v2. Source
    /// check and limits use the address in it. No other client may send one. Let the filter admit
    /// them too: `ranges.allow`.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = [])))]
    proxy_from: Vec<Spanned<RawNet>>,
    /// Cloudflare's origin-pull CA, if it replaces the built-in one (valid until 2029-11-01).
    #[cfg_attr(test, schemars(extend("examples" = ["/etc/pullgate/cloudflare-ca.pem"])))]
    cloudflare_ca_file: Option<Spanned<PathBuf>>,
    /// Time from accept until the upstream is reached, absolute.
    #[serde(default = "seconds::<10>", deserialize_with = "duration")]
    #[cfg_attr(test, schemars(with = "String", extend("default" = "10s")))]
    handshake_timeout: Duration,
    /// Time to reach the upstream, within `handshake_timeout`.
    #[serde(default = "seconds::<5>", deserialize_with = "duration")]
    #[cfg_attr(test, schemars(with = "String", extend("default" = "5s")))]
    connect_timeout: Duration,
    /// A connection ends once no byte has come in either direction for once to twice this time. Keep
    /// it above Cloudflare's 900 s.
    #[serde(default = "seconds::<1000>", deserialize_with = "duration")]
    #[cfg_attr(test, schemars(with = "String", extend("default" = "1000s")))]
    idle_timeout: Duration,
    /// What live connections get when the gate is stopped. Under systemd, new ones wait as long at a
    /// restart.
    #[serde(default = "seconds::<30>", deserialize_with = "duration")]
    #[cfg_attr(test, schemars(with = "String", extend("default" = "30s")))]
    drain_timeout: Duration,
    /// Most connections; others wait in the kernel. Each takes two file descriptors, whose limit is
    /// raised as far as the host allows. A change takes effect at the next start.
    #[serde(default = "number::<16384>", deserialize_with = "count")]
    #[cfg_attr(test, schemars(extend("default" = 16384)))]
    max_connections: usize,
    /// Most handshakes in flight. Beyond that the oldest silent one is closed, or else the new one
    /// refused (`TooManyHandshakes`).
    #[serde(default = "number::<8192>", deserialize_with = "count")]
    #[cfg_attr(test, schemars(extend("default" = 8192)))]
    max_handshakes: usize,
    /// What one IPv4 address or IPv6 /64 may take.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = PER_SOURCE.shown())))]
    per_source: RawShare,
    /// What one IPv4 /24 or IPv6 /48 may take.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = PER_NETWORK.shown())))]
    per_network: RawShare,
    /// The hosts that are served: one policy each. A connection belongs to one by the server name in
    /// its ClientHello: the exact name's, else the wildcard's, else that of the host with `default =
    /// true`; else it is refused without a certificate.
    host: Spanned<Vec<RawHost>>,
}

impl RawGate {
    pub(super) fn convert(
        self,
        source: &Source<'_>,
    ) -> Result<(GateSettings, RawListening), ConfigError> {
        if self.host.as_ref().is_empty() {
            let place = source.place(self.host.span().start, "gate.host");
            return Err(place.error("is empty; add a [[gate.host]] for each name you serve"));
        }
        let steer = self.steer.filter(|steer| *steer.as_ref());
        let steer = steer.map(|steer| source.place(steer.span().start, "gate.steer"));
        let is_steered = steer.is_some();
        let client_address = client_address(source, self.client_address, is_steered)?;
        let return_path = return_path(source, &self.route_table, &self.rule_priority)?;
        let hosts = self.host.into_inner().into_iter();
        let hosts = hosts
            .map(|host| host.convert(source, is_steered))
            .collect::<Result<Vec<_>, _>>()?;
        check_names(&hosts)?;
        let otherwise = if is_steered {
            beside_the_web_server
        } else {
            everywhere
        };
        let named = self.listen.unwrap_or_else(otherwise);
        let listen_at = source.place(named.span().start, "gate.listen");
        let addresses = named.into_inner().into_iter();
        let listen: Vec<_> = addresses.map(|Address(address)| address).collect();
        let twice = (1..listen.len()).any(|n| listen[..n].contains(&listen[n]));
        if listen.is_empty() || twice || listen.iter().any(|address| address.port() == 0) {
            return Err(listen_at.error(
                "names no address, one twice, or port 0; write each address with its port once, \
                 such as \"0.0.0.0:443\"",
            ));
        }
        check_upstreams(&hosts, &listen)?;

        let listening = RawListening {
            listen,
            steer,
            return_path,
            max_connections: self.max_connections,
        };
        let settings = GateSettings {
            proxy_from: rules(source, self.proxy_from, "gate.proxy_from")?,
            cloudflare_ca: self.cloudflare_ca_file.map(|path| {
                located(source, path, "gate.cloudflare_ca_file").map(|path| absolute(source, path))
            }),
            handshake_timeout: self.handshake_timeout,
            connect_timeout: self.connect_timeout,
            idle_timeout: self.idle_timeout,
            drain_timeout: self.drain_timeout,
            max_handshakes: self.max_handshakes,
            per_source: self.per_source.convert(&PER_SOURCE),
            per_network: self.per_network.convert(&PER_NETWORK),
            client_address,
            // Those of the filter's section.
            steered_ports: Vec::new(),
            hosts,
        };
        Ok((settings, listening))
    }
}

fn client_address(
    source: &Source<'_>,
    raw: Option<Spanned<ClientAddress>>,
    is_steered: bool,
) -> Result<ClientAddress, ConfigError> {
    let Some(raw) = raw else {
        return Ok(ClientAddress::default());
    };
    let place = source.place(raw.span().start, "gate.client_address");
    match raw.into_inner() {
        ClientAddress::Transparent if !is_steered => Err(place.error(
            "\"transparent\" needs `steer = true`; without it, the PROXY header names the client to \
             the web server",
        )),
        ClientAddress::Transparent => Ok(ClientAddress::Transparent),
        ClientAddress::Loopback => Ok(ClientAddress::Loopback),
    }
}

/// The tables and rules of the kernel's own are at the ends.
fn return_path(
    source: &Source<'_>,
    table: &Spanned<u32>,
    priority: &Spanned<u32>,
) -> Result<ReturnPath, ConfigError> {
    if [0, 253, 254, 255].contains(table.as_ref()) {
        let place = source.place(table.span().start, "gate.route_table");
        return Err(place.error("is one of the kernel's own; name one that nothing else uses"));
    }
    if !(1..RULE_MAIN).contains(priority.as_ref()) {
        let place = source.place(priority.span().start, "gate.rule_priority");
        return Err(place.error(format_args!(
            "is out of bounds; write a number from 1 to {}, lower than that of other rules",
            RULE_MAIN - 1
        )));
    }
    Ok(ReturnPath {
        table: *table.as_ref(),
        priority: *priority.as_ref(),
    })
}

#[derive(Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct RawShare {
    /// Connections without a ClientHello. Beyond that, the oldest is closed.
    #[serde(default, deserialize_with = "some_count")]
    hellos: Option<usize>,
    /// Connections to one host; all names that are not served count as one host.
    #[serde(default, deserialize_with = "some_count")]
    connections: Option<usize>,
    /// Handshakes in flight with one host. One that takes more than a second gives way.
    #[serde(default, deserialize_with = "some_count")]
    handshakes: Option<usize>,
    /// Handshakes begun a second with one host.
    #[serde(default, deserialize_with = "some_count")]
    handshakes_per_second: Option<usize>,
}

impl RawShare {
    fn convert(&self, default: &PeerLimit) -> PeerLimit {
        let per_second = self.handshakes_per_second;
        PeerLimit {
            hellos: self.hellos.unwrap_or(default.hellos),
            connections: self.connections.unwrap_or(default.connections),
            handshakes: self.handshakes.unwrap_or(default.handshakes),
            handshakes_per_second: per_second.unwrap_or(default.handshakes_per_second),
        }
    }
}

#[cfg(test)]
impl PeerLimit {
    /// As the schema shows them.
    fn shown(&self) -> serde_json::Value {
        serde_json::json!({
            "hellos": self.hellos,
            "connections": self.connections,
            "handshakes": self.handshakes,
            "handshakes_per_second": self.handshakes_per_second,
        })
    }
}

fn route_table() -> Spanned<u32> {
    Spanned::unwritten(ROUTE_TABLE)
}

fn rule_priority() -> Spanned<u32> {
    Spanned::unwritten(RULE_PRIORITY)
}

fn everywhere() -> Spanned<Vec<Address>> {
    let v4 = SocketAddr::from(([0, 0, 0, 0], 443));
    let v6 = SocketAddr::from(([0_u16; 8], 443));
    Spanned::unwritten(vec![Address(v4), Address(v6)])
}

/// A port of its own: the web server has that which clients connect to.
fn beside_the_web_server() -> Spanned<Vec<Address>> {
    let v4 = SocketAddr::from(([127, 0, 0, 1], STEERED_PORT));
    let v6 = SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], STEERED_PORT));
    Spanned::unwritten(vec![Address(v4), Address(v6)])
}

fn seconds<const N: u64>() -> Duration {
    Duration::from_secs(N)
}

fn number<const N: usize>() -> usize {
    N
}

/// One of Cloudflare's servers: it keeps connections alive, so it does not need many handshakes.
const PER_SOURCE: PeerLimit = PeerLimit {
    hellos: 1024,
    connections: 4096,
    handshakes: 256,
    handshakes_per_second: 500,
};
/// A few hundred of them.
const PER_NETWORK: PeerLimit = PeerLimit {
    hellos: 4096,
    connections: 8192,
    handshakes: 2048,
    handshakes_per_second: 2000,
};
/// Where the gate listens while connections are steered to it, as in the package's socket unit.
const STEERED_PORT: u16 = 44_300;
/// The routing table of the way back, as the port: one that nothing else uses.
const ROUTE_TABLE: u32 = 44_300;
/// Before the rules of VPNs and policy routing, which begin at some hundreds.
const RULE_PRIORITY: u32 = 44;
/// The priority of the rule for the table `main` (ip-rule(8)).
const RULE_MAIN: u32 = 32_766;
