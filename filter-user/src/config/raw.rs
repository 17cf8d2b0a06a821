//! The file as it is written: serde shapes, and their conversion into the typed configuration.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::value::{absolute, count, duration, is_host_name, located, parse_upstream};
use super::{
    Config, ConfigError, Gate, Host, Located, Paths, ProxyProtocol, Resumption, Source, Trust,
    Upstream, check_names, check_upstreams,
};

mod filter;
mod ranges;
mod source;

pub(super) fn parse(source: &Source<'_>) -> Result<Config, ConfigError> {
    let deserializer = toml::Deserializer::parse(source.text)
        .map_err(|error| blame(source, &error, String::new()))?;
    let raw: Raw = serde_path_to_error::deserialize(deserializer).map_err(|error| {
        let field = field(error.path());
        blame(source, error.inner(), field)
    })?;
    raw.convert(source)
}

fn blame(source: &Source<'_>, error: &toml::de::Error, field: String) -> ConfigError {
    let offset = error.span().map_or(0, |span| span.start);
    let message = error.message().trim_end().replace('\n', ", ");
    source.place(offset, field).error(message)
}

/// The path to a field without the segments that belong to `Spanned` itself.
fn field(path: &serde_path_to_error::Path) -> String {
    let mut field = String::new();
    for segment in path.iter() {
        let text = segment.to_string();
        if text.contains("$__serde_spanned") || text == "?" {
            continue;
        }
        let is_key = matches!(segment, serde_path_to_error::Segment::Map { .. });
        if is_key && !field.is_empty() {
            field.push('.');
        }
        field.push_str(&text);
    }
    field
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    #[serde(default)]
    paths: RawPaths,
    filter: Option<filter::Raw>,
    ranges: Option<ranges::Raw>,
    gate: Option<RawGate>,
}

impl Raw {
    fn convert(self, source: &Source<'_>) -> Result<Config, ConfigError> {
        let Self {
            paths,
            filter,
            ranges,
            gate,
        } = self;
        let has_ranges = ranges.is_some();
        let config = Config {
            paths: paths.convert(source),
            filter: filter.map(|filter| filter.convert(source)).transpose()?,
            ranges: ranges.unwrap_or_default().convert(source)?,
            gate: gate.map(|gate| gate.convert(source)).transpose()?,
        };
        if config.filter.is_none() && config.gate.is_none() && !has_ranges {
            return Err(source.place(0, "").error(
                "there is neither a [filter] nor a [gate] section, so nothing would be protected \
                 (and no [ranges] section, to keep ranges fresh for other tools)",
            ));
        }
        Ok(config)
    }
}

/// Where things live, by a file the rest of which may be wrong.
pub(super) fn paths(source: &Source<'_>) -> Paths {
    #[derive(Default, Deserialize)]
    struct PathsOnly {
        #[serde(default)]
        paths: RawPaths,
    }
    let only: PathsOnly = toml::from_str(source.text).unwrap_or_default();
    only.paths.convert(source)
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPaths {
    state: Option<PathBuf>,
    run: Option<PathBuf>,
    bpf: Option<PathBuf>,
}

impl RawPaths {
    fn convert(self, source: &Source<'_>) -> Paths {
        let or = |path: Option<PathBuf>, default: &str| {
            absolute(source, path.unwrap_or_else(|| PathBuf::from(default)))
        };
        Paths {
            state: or(self.state, "/var/lib/pullgate"),
            run: or(self.run, "/run/pullgate"),
            bpf: or(self.bpf, "/sys/fs/bpf/pullgate"),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawGate {
    #[serde(default = "everywhere")]
    listen: Spanned<Vec<SocketAddr>>,
    #[serde(default = "seconds::<10>", deserialize_with = "duration")]
    handshake_timeout: Duration,
    #[serde(default = "seconds::<5>", deserialize_with = "duration")]
    connect_timeout: Duration,
    #[serde(default = "seconds::<1000>", deserialize_with = "duration")]
    idle_timeout: Duration,
    #[serde(default = "seconds::<30>", deserialize_with = "duration")]
    drain_timeout: Duration,
    #[serde(default = "number::<16384>", deserialize_with = "count")]
    max_connections: usize,
    #[serde(default = "number::<1024>", deserialize_with = "count")]
    max_handshakes: usize,
    host: Spanned<Vec<RawHost>>,
}

impl RawGate {
    fn convert(self, source: &Source<'_>) -> Result<Gate, ConfigError> {
        if self.host.as_ref().is_empty() {
            let place = source.place(self.host.span().start, "gate.host");
            return Err(place.error("is empty; add a [[gate.host]] for each name you serve"));
        }
        let hosts = self.host.into_inner().into_iter();
        let hosts = hosts
            .map(|host| host.convert(source))
            .collect::<Result<Vec<_>, _>>()?;
        check_names(&hosts)?;
        let listen = self.listen.as_ref();
        let twice = (1..listen.len()).any(|n| listen[..n].contains(&listen[n]));
        if listen.is_empty() || twice || listen.iter().any(|address| address.port() == 0) {
            let place = source.place(self.listen.span().start, "gate.listen");
            return Err(place.error(
                "names no address, one twice, or port 0; write each address with its port once, \
                 such as \"0.0.0.0:443\"",
            ));
        }

        check_upstreams(&hosts, listen)?;

        Ok(Gate {
            listen: self.listen.into_inner(),
            handshake_timeout: self.handshake_timeout,
            connect_timeout: self.connect_timeout,
            idle_timeout: self.idle_timeout,
            drain_timeout: self.drain_timeout,
            max_connections: self.max_connections,
            max_handshakes: self.max_handshakes,
            hosts,
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHost {
    names: Spanned<Vec<Spanned<String>>>,
    certificate: Spanned<PathBuf>,
    key: Spanned<PathBuf>,
    trust: Spanned<Vec<Spanned<String>>>,
    #[serde(default)]
    resumption: Resumption,
    #[serde(default = "http")]
    alpn: Vec<String>,
    upstream: Spanned<String>,
    #[serde(default)]
    unsafe_upstream: bool,
    #[serde(default)]
    proxy_protocol: ProxyProtocol,
}

impl RawHost {
    fn convert(self, source: &Source<'_>) -> Result<Host, ConfigError> {
        let at = |span: usize, field| source.place(span, format!("gate.host.{field}"));
        if self.names.as_ref().is_empty() {
            return Err(at(self.names.span().start, "names")
                .error("is empty; name the hosts that this policy is for"));
        }
        if self.trust.as_ref().is_empty() {
            return Err(at(self.trust.span().start, "trust").error(
                "is empty, so nobody could connect; use \"cloudflare\" or the path of your own CA",
            ));
        }

        let mut names = Vec::new();
        for name in self.names.into_inner() {
            let mut name = located(source, name, "gate.host.names");
            name.value.make_ascii_lowercase();
            // The root's dot is not part of a server name (RFC 6066 §3).
            if name.value.ends_with('.') {
                name.value.pop();
            }
            if !is_host_name(&name.value) {
                return Err(name.place.error(format_args!(
                    "`{}` is not a host name; write each name in full, such as www.example.com, \
                     without wildcards, other alphabets as punycode",
                    name.value.escape_debug()
                )));
            }
            names.push(name);
        }

        let upstream = parse_upstream(source, &self.upstream)
            .map_err(|problem| at(self.upstream.span().start, "upstream").error(problem))?;
        if let Upstream::Tcp(address) = upstream
            && !address.ip().to_canonical().is_loopback()
            && !self.unsafe_upstream
        {
            return Err(at(self.upstream.span().start, "upstream").error(format_args!(
                "`{address}` is not loopback, so requests would travel in clear text and others \
                 may reach it around the gate; use 127.0.0.1, a UNIX socket, or say \
                 `unsafe_upstream = true`"
            )));
        }

        let trust = self.trust.into_inner().into_iter();
        Ok(Host {
            names,
            certificate: located(source, self.certificate, "gate.host.certificate")
                .map(|path| absolute(source, path)),
            key: located(source, self.key, "gate.host.key").map(|path| absolute(source, path)),
            trust: trust
                .map(|trust| {
                    located(source, trust, "gate.host.trust").map(|trust| match trust.as_str() {
                        "cloudflare" => Trust::Cloudflare,
                        path => Trust::CaFile(absolute(source, PathBuf::from(path))),
                    })
                })
                .collect(),
            resumption: self.resumption,
            alpn: self.alpn,
            upstream: Located {
                value: upstream,
                place: at(self.upstream.span().start, "upstream"),
            },
            proxy_protocol: self.proxy_protocol,
        })
    }
}

impl<T> Located<T> {
    fn map<U>(self, f: impl FnOnce(T) -> U) -> Located<U> {
        Located {
            value: f(self.value),
            place: self.place,
        }
    }
}

fn http() -> Vec<String> {
    vec!["http/1.1".to_owned()]
}

fn everywhere() -> Spanned<Vec<SocketAddr>> {
    let v4 = SocketAddr::from(([0, 0, 0, 0], 443));
    let v6 = SocketAddr::from(([0_u16; 8], 443));
    Spanned::new(0..0, vec![v4, v6])
}

fn seconds<const N: u64>() -> Duration {
    Duration::from_secs(N)
}

fn number<const N: usize>() -> usize {
    N
}
