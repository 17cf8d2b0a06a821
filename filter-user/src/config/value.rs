//! Single values: as they are written in, as they are meant out.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize as _;
use serde::de::{Deserializer, Error as _};
use toml::Spanned;
use url::{Host as UrlHost, Url};

use super::{ConfigError, Located, Source, Upstream};

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

pub(super) fn rules(
    source: &Source<'_>,
    rules: Vec<Spanned<IpNet>>,
    field: &str,
) -> Result<Vec<IpNet>, ConfigError> {
    let mut nets = Vec::new();
    for rule in rules {
        let Located { value, place } = located(source, rule, field);
        if value != value.trunc() {
            return Err(place.error(format_args!(
                "`{value}` has host bits set; did you mean `{}`?",
                value.trunc()
            )));
        }
        if value.prefix_len() == 0 {
            return Err(place.error(format_args!(
                "`{value}` is everybody; use `mode = \"monitor\"` to let everybody in"
            )));
        }
        nets.push(value);
    }
    Ok(nets)
}

pub(super) fn is_trustworthy(url: &Url) -> bool {
    let is_loopback = match url.host() {
        Some(UrlHost::Ipv4(address)) => address.is_loopback(),
        Some(UrlHost::Ipv6(address)) => address.is_loopback(),
        Some(UrlHost::Domain(name)) => name == "localhost",
        None => false,
    };
    url.scheme() == "https" || url.scheme() == "http" && is_loopback
}

/// RFC 1123 §2.1, as rustls will accept it in a ClientHello.
pub(super) fn is_host_name(name: &str) -> bool {
    let is_dns = rustls::pki_types::DnsName::try_from(name).is_ok();
    is_dns && name.parse::<IpAddr>().is_err()
}

pub(super) fn parse_upstream(
    source: &Source<'_>,
    text: &Spanned<String>,
) -> Result<Upstream, String> {
    let text = text.as_ref();
    if let Some(path) = text.strip_prefix("unix:") {
        return Ok(Upstream::Unix(absolute(source, PathBuf::from(path))));
    }
    text.parse().map(Upstream::Tcp).map_err(|_not_an_address| {
        format!(
            "`{text}` is neither an address with a port, such as 127.0.0.1:8080, nor unix:/path"
        )
    })
}

pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map_err(|error| {
        D::Error::custom(format_args!(
            "`{text}` is not a duration ({error}); write it as \"10s\", \"5m\" or \"6h\""
        ))
    })
}
