//! `[filter]` as it is written.

use std::fmt::Formatter;
use std::net::IpAddr;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Unexpected, Visitor};

use super::super::value::{Spanned, duration, located};
use super::super::{
    Attach, Coexist, ConfigError, FilterSettings, Fragments, Interfaces, Located, Mode, Source,
    SynCookies,
};
use crate::host::netlink::is_interface_name;

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct RawFilter {
    /// Interfaces that face the internet, by name; one that does not exist yet is filtered when it
    /// appears. Or `"auto"`: those that a route to the internet leads to, which are remembered over
    /// reboots.
    #[cfg_attr(test, schemars(with = "crate::config::value::TextOr<Vec<String>>", extend("examples" = ["auto"])))]
    interfaces: Spanned<RawInterfaces>,
    /// Protected TCP ports. `"cloudflare-tls"` stands for 443, 2053, 2083, 2087, 2096 and 8443,
    /// `"http"` for 80.
    #[serde(default = "https")]
    #[cfg_attr(test, schemars(extend("default" = [443])))]
    ports: Spanned<Vec<RawPort>>,
    /// Protected UDP ports. Cloudflare connects by TCP, so a program that answers UDP (HTTP/3) on a
    /// protected port is there for strangers alone: `check` and `status` warn of it.
    #[serde(default = "nothing::<u16>")]
    #[cfg_attr(test, schemars(extend("default" = [])))]
    udp_ports: Spanned<Vec<u16>>,
    /// Protected addresses of this host, at most 16. Empty: every address.
    #[serde(default = "nothing::<IpAddr>")]
    #[cfg_attr(test, schemars(extend("default" = [])))]
    destinations: Spanned<Vec<IpAddr>>,
    /// `"enforce"` drops strangers' packets, `"monitor"` only counts them.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = "enforce")))]
    mode: Mode,
    /// What becomes of strangers' later TCP fragments: `"drop"` or `"pass"`.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = "drop")))]
    fragments: Fragments,
    /// While the queue of a listener is full: `"auto"` answers the SYNs of admitted sources with the kernel's own SYN
    /// cookies, before a buffer is allocated for them, and drops their segments of no connection, so that an attacker who
    /// forges Cloudflare's addresses costs less. `"on"` does so on one end of a veth pair too, whose other end needs an
    /// XDP program, and warns where the filter's cannot answer. `"off"` leaves it to the kernel.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = "auto")))]
    syn_cookies: SynCookies,
    /// The attach mode: `"native"`, `"generic"`, or `"auto"`: native, else generic with a warning.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = "auto")))]
    attach: Attach,
    /// What to do where another XDP program is attached: `"refuse"` names it, `"tcx"` judges behind
    /// it, with a warning.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = "refuse")))]
    coexist: Coexist,
    /// How long a start waits for interfaces that are named or remembered and do not exist yet. Under
    /// systemd the network waits with it.
    #[serde(default = "ten_seconds", deserialize_with = "duration")]
    #[cfg_attr(test, schemars(with = "String", extend("default" = "10s")))]
    interface_timeout: Duration,
}

enum RawInterfaces {
    Auto,
    Named(Vec<Spanned<String>>),
}

/// By hand, because serde's untagged enums lose the places of what is in them.
impl<'de> Deserialize<'de> for RawInterfaces {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = RawInterfaces;

            fn expecting(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
                f.write_str("\"auto\" or a list of names, such as [\"eth0\"]")
            }

            fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<RawInterfaces, E> {
                match word {
                    "auto" => Ok(RawInterfaces::Auto),
                    _ => Err(E::invalid_value(Unexpected::Str(word), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut names: A) -> Result<RawInterfaces, A::Error> {
                let mut named = Vec::new();
                while let Some(name) = names.next_element()? {
                    named.push(name);
                }
                Ok(RawInterfaces::Named(named))
            }
        }

        deserializer.deserialize_any(Either)
    }
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(
    untagged,
    expecting = "a port is a number from 1 to 65535, \"cloudflare-tls\" or \"http\""
)]
enum RawPort {
    Number(u16),
    Preset(PortPreset),
}

/// What Cloudflare connects to: developers.cloudflare.com/fundamentals/reference/network-ports.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
enum PortPreset {
    CloudflareTls,
    Http,
}

impl RawPort {
    fn numbers(&self) -> &[u16] {
        match self {
            Self::Number(number) => std::slice::from_ref(number),
            Self::Preset(PortPreset::CloudflareTls) => &[443, 2053, 2083, 2087, 2096, 8443],
            Self::Preset(PortPreset::Http) => &[80],
        }
    }
}

fn interfaces(raw: Spanned<RawInterfaces>, source: &Source<'_>) -> Result<Interfaces, ConfigError> {
    let place = source.place(raw.span().start, FIELD);
    let names = match raw.into_inner() {
        RawInterfaces::Auto => return Ok(Interfaces::Auto),
        RawInterfaces::Named(names) if names.is_empty() => {
            return Err(place
                .error("is empty; name the interfaces that face the internet, or write \"auto\""));
        }
        RawInterfaces::Named(names) if names.iter().any(|name| name.as_ref() == "auto") => {
            return Err(place.error("write \"auto\" by itself, without brackets"));
        }
        RawInterfaces::Named(names) => names,
    };
    let mut unique: Vec<Located<String>> = Vec::new();
    for name in names.into_iter().map(|name| located(source, name, FIELD)) {
        if !is_interface_name(&name.value) {
            return Err(name.place.error(format_args!(
                "`{}` cannot be an interface's name; `ip link` lists those that exist",
                name.value
            )));
        }
        if unique.iter().all(|other| other.value != name.value) {
            unique.push(name);
        }
    }
    Ok(Interfaces::Named(unique))
}

impl RawFilter {
    pub(super) fn convert(self, source: &Source<'_>) -> Result<FilterSettings, ConfigError> {
        let at = |span: usize, field| source.place(span, format!("filter.{field}"));
        let interfaces = interfaces(self.interfaces, source)?;
        let ports_at = at(self.ports.span().start, "ports");
        let mut ports: Vec<u16> = self
            .ports
            .as_ref()
            .iter()
            .flat_map(RawPort::numbers)
            .copied()
            .collect();
        ports.sort_unstable();
        ports.dedup();
        if ports.contains(&SSH) {
            return Err(ports_at.error(
                "port 22 would lock you out of this host; name only ports that Cloudflare connects to",
            ));
        }
        let udp_ports_at = at(self.udp_ports.span().start, "udp_ports");
        let udp_ports = self.udp_ports.into_inner();
        for (named, place) in [(&ports, &ports_at), (&udp_ports, &udp_ports_at)] {
            if named.contains(&0) {
                return Err(place.error("port 0 does not exist; name ports from 1 to 65535"));
            }
        }
        if ports.is_empty() && udp_ports.is_empty() {
            return Err(
                ports_at.error("is empty, so nothing would be protected; name a port, such as 443")
            );
        }
        let most = filter_ebpf::abi::DESTINATIONS_MAX;
        if self.destinations.as_ref().len() > most {
            return Err(
                at(self.destinations.span().start, "destinations").error(format_args!(
                    "holds more than {most} addresses; leave it out to protect all"
                )),
            );
        }

        Ok(FilterSettings {
            interfaces,
            ports,
            // The gate's section says which, and how.
            steered_ports: Vec::new(),
            udp_ports,
            destinations: self.destinations.into_inner(),
            mode: self.mode,
            fragments: self.fragments,
            syn_cookies: self.syn_cookies,
            attach: self.attach,
            coexist: self.coexist,
            interface_timeout: self.interface_timeout,
        })
    }
}

fn https() -> Spanned<Vec<RawPort>> {
    Spanned::unwritten(vec![RawPort::Number(443)])
}

fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}

fn nothing<T>() -> Spanned<Vec<T>> {
    Spanned::unwritten(Vec::new())
}

const FIELD: &str = "filter.interfaces";
const SSH: u16 = 22;
