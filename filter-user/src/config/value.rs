//! Single values: as they are written in, as they are meant out.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};
use url::{Host as UrlHost, Url};

use super::{ConfigError, Located, Source, Target};
use crate::ranges::exact;

/// A value with its place in the file.
#[derive(Deserialize)]
#[serde(transparent)]
pub(super) struct Spanned<T>(toml::Spanned<T>);

impl<T> Spanned<T> {
    /// A value that is in no file.
    pub(super) fn unwritten(value: T) -> Self {
        Self(toml::Spanned::new(0..0, value))
    }

    pub(super) fn span(&self) -> Range<usize> {
        self.0.span()
    }

    pub(super) fn into_inner(self) -> T {
        self.0.into_inner()
    }
}

impl<T> AsRef<T> for Spanned<T> {
    fn as_ref(&self) -> &T {
        self.0.as_ref()
    }
}

pub(super) fn located<T>(source: &Source<'_>, value: Spanned<T>, field: &str) -> Located<T> {
    Located {
        place: source.place(value.span().start, field),
        value: value.into_inner(),
    }
}

/// Relative paths are relative to the file that holds them.
pub(super) fn absolute(source: &Source<'_>, path: PathBuf) -> PathBuf {
    match source.file.parent() {
        Some(directory) => directory.join(path),
        None => path,
    }
}

/// Rules without host bits, none of which is every address.
pub(super) fn rules(
    source: &Source<'_>,
    rules: Vec<Spanned<RawNet>>,
    field: &str,
) -> Result<Vec<IpNet>, ConfigError> {
    let mut nets = Vec::new();
    let mut last = None;
    for rule in rules {
        let Located {
            value: RawNet(net),
            place,
        } = located(source, rule, field);
        if net != net.trunc() {
            return Err(place.error(format_args!(
                "`{net}` has host bits set; did you mean `{}`?",
                net.trunc()
            )));
        }
        if net.prefix_len() == 0 {
            return Err(place.error(format_args!(
                "`{net}` is every address; name the ranges that you mean"
            )));
        }
        nets.push(net);
        last = Some(place);
    }
    let union = IpNet::aggregate(&nets);
    let everybody = union.iter().find(|net| net.prefix_len() == 0);
    match (everybody, last) {
        (Some(net), Some(place)) => Err(place.error(format_args!(
            "with those before it is `{net}`, which is every address; name the ranges that you mean"
        ))),
        (_, _) => Ok(nets),
    }
}

pub(super) fn is_trustworthy(url: &Url) -> bool {
    url.scheme() == "https" || url.scheme() == "http" && is_loopback(url)
}

/// Whether a URL is of this host.
pub(crate) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(UrlHost::Ipv4(address)) => address.is_loopback(),
        Some(UrlHost::Ipv6(address)) => address.to_canonical().is_loopback(),
        Some(UrlHost::Domain(name)) => name == "localhost",
        None => false,
    }
}

/// RFC 1123 §2.1, as rustls will accept it in a ClientHello.
pub(super) fn is_host_name(name: &str) -> bool {
    let is_dns = rustls::pki_types::DnsName::try_from(name).is_ok();
    is_dns && name.parse::<IpAddr>().is_err()
}

pub(super) fn parse_target(source: &Source<'_>, text: &Spanned<String>) -> Result<Target, String> {
    let text = text.as_ref();
    if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
        let path = absolute(source, PathBuf::from(path));
        let length = path.as_os_str().len();
        if length > SOCKET_PATH_MAX {
            return Err(format!(
                "the path of a socket has at most {SOCKET_PATH_MAX} bytes, and this one {length}"
            ));
        }
        return Ok(Target::Unix(path));
    }
    let address = text.parse::<SocketAddr>().ok();
    address
        .filter(|address| address.port() != 0)
        .map(Target::Tcp)
        .ok_or_else(|| {
            format!(
                "`{text}` is neither an address with a port, such as 127.0.0.1:8080, nor unix:/path"
            )
        })
}

/// A duration within reason: none that is zero, none that overflows a clock.
pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    let duration = humantime::parse_duration(&text).map_err(|error| {
        D::Error::custom(format_args!(
            "`{text}` is not a duration ({error}); write it as \"10s\", \"5m\" or \"6h\""
        ))
    })?;
    if !(DURATION_MIN..=DURATION_MAX).contains(&duration) {
        return Err(D::Error::custom(format_args!(
            "`{text}` is out of bounds; write a duration between \"100ms\" and \"365days\""
        )));
    }
    Ok(duration)
}

/// A number of connections or handshakes, within reason.
pub(super) fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    let count = i64::deserialize(deserializer)?;
    let bounded = usize::try_from(count).ok();
    bounded
        .filter(|it| (1..=COUNT_MAX).contains(it))
        .ok_or_else(|| {
            D::Error::custom(format_args!(
                "{count} is out of bounds; write a number from 1 to {COUNT_MAX}"
            ))
        })
}

/// Text in a form that has a name, and an example for who misses it.
fn parsed<'de, D: Deserializer<'de>, T: FromStr>(
    deserializer: D,
    form: &str,
) -> Result<T, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse()
        .map_err(|_other_form| D::Error::custom(format_args!("`{text}` is not {form}")))
}

/// An address with a port.
pub(super) struct Address(pub(super) SocketAddr);

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let form = "an address with a port; write it as \"0.0.0.0:443\" or \"[::]:443\"";
        parsed(deserializer, form).map(Self)
    }
}

/// A rule of the operator's.
#[derive(Clone, Copy)]
pub(super) struct RawNet(pub(super) IpNet);

impl<'de> Deserialize<'de> for RawNet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        exact(&text).map(Self).ok_or_else(|| match text.parse::<IpNet>() {
            Ok(range) => D::Error::custom(format_args!(
                "`{text}` is read differently by others (leading zeros, or IPv4 as IPv6); did you \
                 mean `{}`?",
                canonical(range)
            )),
            Err(_) => D::Error::custom(format_args!(
                "`{text}` is not a range or an address; write it as 192.0.2.0/24 or 192.0.2.1"
            )),
        })
    }
}

/// IPv4 as such.
fn canonical(range: IpNet) -> IpNet {
    let address = range.addr().to_canonical();
    let is_mapped = address != range.addr();
    let length = range
        .prefix_len()
        .saturating_sub(if is_mapped { 96 } else { 0 });
    IpNet::new(address, length).unwrap_or(range)
}

/// unix(7): `sun_path`, and a zero behind it.
const SOCKET_PATH_MAX: usize = 107;
const DURATION_MIN: Duration = Duration::from_millis(100);
const DURATION_MAX: Duration = Duration::from_secs(365 * 86_400);
/// What a host with a million file descriptors could hold.
const COUNT_MAX: usize = 1 << 20;

/// The shape of what is a text or something else, for the schema.
#[cfg(test)]
#[derive(schemars::JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "its shape is what matters")]
pub(super) enum TextOr<T> {
    Text(String),
    Other(T),
}

/// Their shape in the schema: that of the value, and text.
#[cfg(test)]
mod schemas {
    use std::borrow::Cow;

    use schemars::{JsonSchema, Schema, SchemaGenerator};

    use super::{Address, RawNet, Spanned};

    impl<T: JsonSchema> JsonSchema for Spanned<T> {
        fn inline_schema() -> bool {
            T::inline_schema()
        }

        fn schema_name() -> Cow<'static, str> {
            T::schema_name()
        }

        fn json_schema(generator: &mut SchemaGenerator) -> Schema {
            T::json_schema(generator)
        }
    }

    impl JsonSchema for Address {
        fn inline_schema() -> bool {
            true
        }

        fn schema_name() -> Cow<'static, str> {
            "Address".into()
        }

        fn json_schema(generator: &mut SchemaGenerator) -> Schema {
            String::json_schema(generator)
        }
    }

    impl JsonSchema for RawNet {
        fn inline_schema() -> bool {
            true
        }

        fn schema_name() -> Cow<'static, str> {
            "Range".into()
        }

        fn json_schema(generator: &mut SchemaGenerator) -> Schema {
            String::json_schema(generator)
        }
    }
}
