//! The file as it is written: serde shapes, and their conversion into the typed configuration.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;

use super::value::{Spanned, absolute, parse_target};
use super::{
    Boot, ClientAddress, Config, ConfigError, FilterSettings, Live, Located, Paths, Place, Source,
    Target,
};
use crate::host::netlink::ReturnPath;
use crate::role::Role;

mod filter;
mod gate;
mod host;
mod ranges;
mod source;

pub(super) fn parse(source: &Source<'_>) -> Result<Config, ConfigError> {
    let deserializer = toml::Deserializer::parse(source.text)
        .map_err(|error| blame(source, &error, String::new()))?;
    let raw: RawConfig = serde_path_to_error::deserialize(deserializer).map_err(|error| {
        let field = field(error.path());
        blame(source, error.inner(), field)
    })?;
    raw.convert(source)
}

fn blame(source: &Source<'_>, error: &toml::de::Error, field: String) -> ConfigError {
    let offset = error.span().map_or(0, |span| span.start);
    let message = match error.message().trim_end() {
        "duplicate key" => there_twice(source.text, error.span().unwrap_or_default()),
        message => message.replace('\n', ", "),
    };
    source.place(offset, field).error(in_plain_words(&message))
}

/// Of a key's place in the text: that it is there before.
fn there_twice(text: &str, place: Range<usize>) -> String {
    let before = text.get(..place.start).unwrap_or_default();
    let line = before.rsplit('\n').next().unwrap_or_default();
    let key = text.get(place).unwrap_or_default();
    if line.trim_start().starts_with('[') {
        format!(
            "the section `{key}` is there before; make one of the two, or write [[…]] before each, if there may be several"
        )
    } else {
        format!("`{key}` is there twice; leave one out")
    }
}

/// What serde says in the words of its data model, in those of TOML.
fn in_plain_words(message: &str) -> String {
    if message == "wanted string or table" {
        return "expected one of its words, in quotes: \"…\"".to_owned();
    }
    let Some((found, expected)) = message.rsplit_once(", expected ") else {
        return message.to_owned();
    };
    // A parser's word for what the sentence has said already.
    if expected == "literal string" {
        return found.to_owned();
    }
    let found = found.replace("type: map", "type: table");
    let found = found.replace("type: sequence", "type: list");
    let expected = match expected {
        "a sequence" => "a list: […, …], or [[…]] before each of several sections",
        "a string" => "text in quotes: \"…\"",
        "i64" | "u8" | "u16" => "a whole number",
        structure if structure.starts_with("struct ") => "a section, or a table { … = … }",
        other => other,
    };
    match meant(&found, expected) {
        Some(word) => format!("{found}; did you mean `{word}`? Expected {expected}"),
        None => format!("{found}, expected {expected}"),
    }
}

/// The expected word of which an unknown one is a slip of the keys, if it is.
fn meant<'a>(found: &str, expected: &'a str) -> Option<&'a str> {
    let unknown = found.strip_prefix("unknown field ")?.split('`').nth(1)?;
    let words = expected.split('`').skip(1).step_by(2);
    let slips = words.map(|word| (strsim::osa_distance(unknown, word), word));
    let (slips, word) = slips.min_by_key(|(slips, _)| *slips)?;
    (slips <= SLIPS_MAX).then_some(word)
}

/// Letters that are wrong, missing, too many or in the wrong order. One more, and `client_ca` is `client_auth`.
const SLIPS_MAX: usize = 2;

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
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct RawConfig {
    /// Where pullgate keeps what it needs.
    #[serde(default)]
    paths: RawPaths,
    /// What the kernel drops. Without this section, nothing is filtered.
    filter: Option<filter::RawFilter>,
    /// Who may connect: the union of all sources' lists, with your own rules.
    ranges: Option<ranges::RawRanges>,
    /// The listener that demands the client certificate. Without this section, the web server has to
    /// demand it (`pullgate snippet nginx --own-mtls`).
    gate: Option<gate::RawGate>,
    /// Where a role serves its metrics to Prometheus: a loopback address or a UNIX socket. A change
    /// takes effect at the next start.
    #[serde(default)]
    metrics: RawMetrics,
}

impl RawConfig {
    fn convert(self, source: &Source<'_>) -> Result<Config, ConfigError> {
        let Self {
            paths,
            filter,
            ranges,
            gate,
            metrics,
        } = self;
        let has_ranges = ranges.is_some();
        let paths = paths.convert(source);
        let mut filter = filter.map(|filter| filter.convert(source)).transpose()?;
        let ranges = ranges.unwrap_or_default().convert(source)?;
        let gate = gate.map(|gate| gate.convert(source)).transpose()?;
        let (mut gate, listening) = gate.unzip();
        let RawListening {
            listen,
            steer,
            return_path,
            max_connections,
        } = listening.unwrap_or_default();
        if let (Some(gate), Some(place)) = (&mut gate, &steer) {
            gate.steered_ports = steered_ports(filter.as_ref(), place)?;
            if let Some(filter) = &mut filter {
                filter.steered_ports.clone_from(&gate.steered_ports);
            }
        }
        let is_transparent = gate
            .as_ref()
            .is_some_and(|gate| gate.client_address == ClientAddress::Transparent);
        let boot = Boot {
            paths,
            metrics: metrics.convert(source)?,
            listen,
            steer: steer.is_some(),
            return_path: is_transparent.then_some(return_path),
            max_connections,
        };
        refuse_taken(&boot)?;
        if filter.is_none() && gate.is_none() && !has_ranges {
            return Err(source.place(0, "").error(
                "there is neither a [filter] nor a [gate] section, so nothing would be protected \
                 (and no [ranges] section, to keep ranges fresh for other tools)",
            ));
        }
        Ok(Config {
            boot: Arc::new(boot),
            live: Live {
                filter,
                ranges,
                gate,
            },
        })
    }
}

/// What of `[gate]` takes effect at a start.
#[derive(Default)]
struct RawListening {
    listen: Vec<SocketAddr>,
    /// Where it stands that connections are steered, if they are.
    steer: Option<Place>,
    return_path: ReturnPath,
    max_connections: usize,
}

/// The protected ports whose connections are steered to the gate: all on which TLS is spoken.
fn steered_ports(filter: Option<&FilterSettings>, place: &Place) -> Result<Vec<u16>, ConfigError> {
    let Some(filter) = filter else {
        return Err(place.error(
            "needs a [filter] section, whose program steers the connections; add one, or leave \
             this out and let the gate listen on the port itself",
        ));
    };
    let mut ports = filter.ports.clone();
    ports.retain(|port| !HTTP_PORTS.contains(port));
    if ports.is_empty() {
        return Err(place.error(
            "has no port to steer: `filter.ports` names none on which TLS is spoken; name one, such \
             as 443",
        ));
    }
    Ok(ports)
}

/// Where Cloudflare speaks HTTP without TLS: developers.cloudflare.com/fundamentals/reference/network-ports.
pub(crate) const HTTP_PORTS: [u16; 7] = [80, 8080, 8880, 2052, 2082, 2086, 2095];

/// Refuses metrics where something else of ours is served.
fn refuse_taken(boot: &Boot) -> Result<(), ConfigError> {
    for (index, (role, Located { value, place })) in boot.metrics.iter().enumerate() {
        let mut others = boot.metrics.iter().take(index);
        if let Some((other, _)) = others.find(|(_, target)| target.value == *value) {
            return Err(place.error(format_args!(
                "`{value}` is where the role {} serves its metrics; each role needs a place of its \
                 own",
                other.label()
            )));
        }
        let is_taken = match value {
            Target::Tcp(address) => boot.listen.iter().any(|served| {
                let is_any = served.ip().is_unspecified();
                let is_same =
                    is_any && served.is_ipv4() == address.is_ipv4() || served.ip() == address.ip();
                is_same && served.port() == address.port()
            }),
            Target::Unix(path) => {
                let sockets = Role::ALL.iter().flat_map(|other| {
                    [boot.paths.socket(*other), boot.paths.control_socket(*other)]
                });
                let mut sockets = sockets.chain([boot.paths.handover_socket()]);
                sockets.any(|socket| socket == *path)
            }
        };
        if is_taken {
            return Err(place.error(format_args!(
                "`{value}` is taken by pullgate itself; let the role {} serve its metrics elsewhere",
                role.label()
            )));
        }
    }
    Ok(())
}

/// Where things live, by a file the rest of which may be wrong.
pub(super) fn paths(source: &Source<'_>) -> Paths {
    #[derive(Default, Deserialize)]
    struct PathsOnly {
        #[serde(default)]
        paths: RawPaths,
    }
    let read = |text| toml::from_str::<PathsOnly>(text);
    let only = read(source.text).or_else(|error| {
        // What stands before the line that is no TOML.
        let bad = error.span().map_or(0, |span| span.start);
        let good = source.text.get(..bad).unwrap_or_default();
        read(good.rfind('\n').map_or("", |end| &good[..end]))
    });
    only.unwrap_or_default().paths.convert(source)
}

#[derive(Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct RawMetrics {
    /// Those of the filter. Under systemd a port needs the drop-in `monitoring/filter-metrics.conf`;
    /// a UNIX socket does not.
    #[cfg_attr(test, schemars(extend("examples" = ["127.0.0.1:9143"])))]
    filter: Option<Spanned<String>>,
    /// Those of the role ranges.
    #[cfg_attr(test, schemars(extend("examples" = ["127.0.0.1:9144"])))]
    ranges: Option<Spanned<String>>,
    /// Those of the gate.
    #[cfg_attr(test, schemars(extend("examples" = ["127.0.0.1:9145"])))]
    gate: Option<Spanned<String>>,
}

impl RawMetrics {
    fn convert(self, source: &Source<'_>) -> Result<BTreeMap<Role, Located<Target>>, ConfigError> {
        let roles = [
            (Role::Filter, self.filter),
            (Role::Ranges, self.ranges),
            (Role::Gate, self.gate),
        ];
        let named = roles
            .into_iter()
            .filter_map(|(role, text)| Some((role, text?)));
        let targets = named.map(|(role, text)| {
            let field = format!("metrics.{}", role.label());
            let place = source.place(text.span().start, field);
            let target = parse_target(source, &text).map_err(|problem| place.error(problem))?;
            if let Target::Tcp(address) = target
                && !address.ip().to_canonical().is_loopback()
            {
                return Err(place.error(format_args!(
                    "`{address}` is not loopback, and metrics name the hosts that are served; use \
                     127.0.0.1 or a UNIX socket, and let your monitoring's agent fetch them there"
                )));
            }
            Ok((
                role,
                Located {
                    value: target,
                    place,
                },
            ))
        });
        targets.collect()
    }
}

#[derive(Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct RawPaths {
    /// Directory of `ranges.json`, the last known good ranges.
    #[cfg_attr(test, schemars(extend("default" = "/var/lib/pullgate")))]
    state: Option<PathBuf>,
    /// Directory of the roles' own directories, with their sockets `status.sock` (0660) and
    /// `control.sock` (0600).
    #[cfg_attr(test, schemars(extend("default" = "/run/pullgate")))]
    run: Option<PathBuf>,
    /// Directory of the pins, on a BPF file system: they keep the filter active without a process.
    #[cfg_attr(test, schemars(extend("default" = "/sys/fs/bpf/pullgate")))]
    bpf: Option<PathBuf>,
    /// Directory of `uplinks.json`, the uplinks that `interfaces = "auto"` remembers. By default
    /// beside `state`, with `-filter` at its end.
    #[cfg_attr(test, schemars(extend("default" = "/var/lib/pullgate-filter")))]
    filter: Option<PathBuf>,
}

impl RawPaths {
    fn convert(self, source: &Source<'_>) -> Paths {
        let or = |path: Option<PathBuf>, default: &str| {
            absolute(source, path.unwrap_or_else(|| PathBuf::from(default)))
        };
        let state = or(self.state, "/var/lib/pullgate");
        // Beside the other roles' state, not in it: that directory is another user's.
        let filter = match self.filter {
            Some(filter) => absolute(source, filter),
            None => {
                let mut beside = state.clone().into_os_string();
                beside.push("-filter");
                PathBuf::from(beside)
            }
        };
        Paths {
            state,
            run: or(self.run, "/run/pullgate"),
            bpf: or(self.bpf, "/sys/fs/bpf/pullgate"),
            filter,
        }
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
