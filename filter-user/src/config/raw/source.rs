//! One source of ranges as it is written.

use std::fmt::{self, Formatter};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use url::Url;

use crate::config::source::{CLOUDFLARE, CLOUDFLARE_WAYS, Preset, SIZE_MAX, redacted};
use crate::config::value::{absolute, is_trustworthy};
use crate::config::{
    ConfigError, Fallback, FeedSource, Located, Location, Place, Source, SourceEndpoint,
};
use crate::ranges::{Families, Format, STATIC};

/// One way to a list, or several ways to the same.
///
/// By hand, because serde's untagged enums do not report what is wrong inside them.
pub(super) struct RawSource(Vec<RawWay>);

impl RawSource {
    /// Cloudflare's own list.
    pub(super) fn cloudflare() -> Self {
        Self(vec![RawWay::Preset(CLOUDFLARE)])
    }

    pub(super) fn convert(
        self,
        source: &Source<'_>,
        place: Place,
    ) -> Result<Located<FeedSource>, ConfigError> {
        let Self(raw) = self;
        let is_cloudflare = matches!(raw.first(), Some(RawWay::Preset(CLOUDFLARE)));
        let is_own = raw.iter().all(RawWay::is_own);
        let mut ways = Vec::new();
        let mut fallback = None;
        for one in raw {
            for (way, way_fallback) in one.convert(source, &place)? {
                ways.push(way);
                fallback.get_or_insert(way_fallback);
            }
        }
        let (Some(first), Some(fallback)) = (ways.first(), fallback) else {
            return Err(place.error("holds an empty list of ways to a list; name at least one"));
        };
        let name = if is_cloudflare {
            CLOUDFLARE.to_owned()
        } else {
            first.name.clone()
        };
        let value = FeedSource {
            name,
            ways,
            fallback,
            is_own,
        };
        Ok(Located { value, place })
    }
}

enum RawWay {
    /// The name of a preset, or `cloudflare`.
    Preset(&'static str),
    Table(Box<RawTable>),
}

struct SourceVisitor;

impl<'de> Visitor<'de> for SourceVisitor {
    type Value = RawSource;

    fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(
            "a name such as \"cloudflare\", { url = \"https://…\" }, { file = \"…\" }, or a list of \
             these that lead to the same ranges",
        )
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<RawSource, E> {
        WayVisitor.visit_str(name).map(|way| RawSource(vec![way]))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RawSource, A::Error> {
        WayVisitor.visit_map(map).map(|way| RawSource(vec![way]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<RawSource, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(seq)).map(RawSource)
    }
}

struct WayVisitor;

impl<'de> Visitor<'de> for WayVisitor {
    type Value = RawWay;

    fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(
            "a name such as \"cloudflare-api\", { url = \"https://…\" } or { file = \"…\" }",
        )
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<RawWay, E> {
        let known = Preset::named(name).map(|preset| preset.name);
        match (name == CLOUDFLARE).then_some(CLOUDFLARE).or(known) {
            Some(name) => Ok(RawWay::Preset(name)),
            None => Err(E::custom(format_args!(
                "`{name}` is no known source; write one of {}",
                Preset::names()
            ))),
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RawWay, A::Error> {
        let table = RawTable::deserialize(MapAccessDeserializer::new(map))?;
        Ok(RawWay::Table(Box::new(table)))
    }
}

impl<'de> Deserialize<'de> for RawSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SourceVisitor)
    }
}

impl<'de> Deserialize<'de> for RawWay {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WayVisitor)
    }
}

impl RawWay {
    fn is_own(&self) -> bool {
        matches!(self, Self::Table(table) if table.like.is_none())
    }

    fn convert(
        self,
        source: &Source<'_>,
        place: &Place,
    ) -> Result<Vec<(SourceEndpoint, Fallback)>, ConfigError> {
        let name = match self {
            Self::Table(table) => return Ok(vec![table.convert(source, place)?]),
            Self::Preset(name) => name,
        };
        let names = match name {
            CLOUDFLARE => CLOUDFLARE_WAYS.as_slice(),
            _ => &[name],
        };
        let presets = names.iter().filter_map(|named| Preset::named(named));
        let ways = presets.map(|preset| {
            let way = preset.way().map_err(|error| place.error(error))?;
            Ok((way, preset.fallback))
        });
        ways.collect()
    }
}

/// A list of the operator's own, or a mirror of a published one.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct RawTable {
    /// The name in log and status. By default the URL, without user, password and query, or the path.
    name: Option<String>,
    /// The address of the list, HTTPS (HTTP to loopback only); or several, which are parts of one
    /// list. Text with one range or address per line (`#` begins a comment), a JSON array of them, or
    /// JSON like Cloudflare's API.
    #[cfg_attr(
        test,
        schemars(with = "Option<crate::config::value::TextOr<Vec<String>>>")
    )]
    url: Option<Urls>,
    /// A local file with the list, which is watched.
    file: Option<PathBuf>,
    /// PEM file of the CAs that the server's certificate may come from, instead of the system's.
    ca_file: Option<PathBuf>,
    /// The name of a published list that this one mirrors: it has its format, families, size and
    /// baseline.
    like: Option<String>,
    /// JSON pointers (RFC 6901) to arrays of ranges in the answer.
    pointers: Option<Vec<String>>,
    /// The families that the list must hold: `"ipv4"`, `"ipv6"`. By default both.
    families: Option<Vec<RawFamily>>,
    /// Most bytes that are read.
    #[cfg_attr(test, schemars(extend("default" = 65536)))]
    max_bytes: Option<usize>,
}

/// One URL, or the parts of one list.
struct Urls(Vec<Url>);

impl<'de> Deserialize<'de> for Urls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UrlsVisitor)
    }
}

struct UrlsVisitor;

impl<'de> Visitor<'de> for UrlsVisitor {
    type Value = Urls;

    fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("a URL such as \"https://…\", or a list of URLs")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Urls, E> {
        // Without the text: it may hold a password.
        let url = Url::parse(text).map_err(|error| {
            E::custom(format_args!(
                "not a URL ({error}); write it as \"https://…\""
            ))
        })?;
        Ok(Urls(vec![url]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Urls, A::Error> {
        let mut urls = Vec::new();
        while let Some(Urls(part)) = seq.next_element()? {
            urls.extend(part);
        }
        Ok(Urls(urls))
    }
}

#[derive(Clone, Copy, Deserialize, Eq, Ord, PartialEq, PartialOrd)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
enum RawFamily {
    Ipv4,
    Ipv6,
}

impl RawTable {
    fn convert(
        self,
        source: &Source<'_>,
        place: &Place,
    ) -> Result<(SourceEndpoint, Fallback), ConfigError> {
        let preset = match self.like.as_deref() {
            None => None,
            Some(CLOUDFLARE) => Preset::named(CLOUDFLARE_WAYS[0]),
            Some(name) => Some(Preset::named(name).ok_or_else(|| {
                place.error(format_args!(
                    "`like = \"{name}\"` names no published list; write one of {}",
                    Preset::names()
                ))
            })?),
        };
        let (name, location) = match (self.url, self.file) {
            (Some(urls), None) => web(source, place, urls, self.ca_file)?,
            (None, Some(file)) if self.ca_file.is_none() => {
                let path = absolute(source, file);
                (path.display().to_string(), Location::File(path))
            }
            (_, Some(_)) => {
                return Err(place.error("a `file` comes without `url` and `ca_file`; remove them"));
            }
            (None, None) => return Err(place.error("needs a `url` or a `file`")),
        };

        let format = match (self.pointers, preset) {
            (Some(_), Some(_)) => {
                return Err(place.error("has both `like` and `pointers`; remove one of them"));
            }
            (Some(pointers), None) => pointers_of(pointers, place)?,
            (None, Some(preset)) => preset.format(),
            (None, None) => Format::default(),
        };
        let fallback = preset.map_or(Fallback::Nothing, |preset| preset.fallback);
        let families = match self.families {
            Some(families) => families_of(&families, place)?,
            None => preset.map_or_else(Families::default, |preset| preset.families),
        };
        let size_max = match self.max_bytes {
            Some(bytes) if !SIZES.contains(&bytes) => {
                return Err(place.error(format_args!(
                    "`max_bytes = {bytes}` is out of bounds; write a number from {} to {}",
                    SIZES.start(),
                    SIZES.end()
                )));
            }
            Some(bytes) => bytes,
            None => preset.map_or(SIZE_MAX, |preset| preset.size_max),
        };
        if let (Format::ByFamily, Location::Web { urls, .. }) = (&format, &location)
            && urls.len() != 2
        {
            return Err(place.error("needs two URLs: `url = [\"…/ips-v4\", \"…/ips-v6\"]`"));
        }
        let name = match self.name {
            Some(own) if own.is_empty() || own.len() > NAME_MAX || !is_plain(&own) => {
                return Err(place.error(format_args!(
                    "`name` is to be a word of at most {NAME_MAX} letters, digits, dots and dashes"
                )));
            }
            Some(own) if own == STATIC => {
                return Err(place.error("`name = \"static\"` is the name of `ranges.static`"));
            }
            Some(own) => own,
            None => name,
        };
        let way = SourceEndpoint {
            name,
            place: location,
            format,
            families,
            size_max,
        };
        Ok((way, fallback))
    }
}

fn web(
    source: &Source<'_>,
    place: &Place,
    urls: Urls,
    ca_file: Option<PathBuf>,
) -> Result<(String, Location), ConfigError> {
    let Urls(urls) = urls;
    if let Some(url) = urls.iter().find(|url| !is_trustworthy(url)) {
        return Err(place.error(format_args!(
            "`{}` is neither https nor http to loopback; ranges that anyone on the way can change \
             protect no host",
            redacted(url)
        )));
    }
    if let (Some(_), Some(url)) = (&ca_file, urls.iter().find(|url| url.scheme() != "https")) {
        return Err(place.error(format_args!(
            "`ca_file` is of no use to `{}`, which is not https; remove it",
            redacted(url)
        )));
    }
    let Some(first) = urls.first() else {
        return Err(place.error("holds an empty list of URLs; name at least one"));
    };
    let name = redacted(first);
    let ca_file = ca_file.map(|path| absolute(source, path));
    Ok((name, Location::Web { urls, ca_file }))
}

fn is_plain(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'.' || byte == b'-')
}

/// RFC 6901 §3: empty, or each part behind a slash; a tilde only as `~0` or `~1`.
fn pointers_of(pointers: Vec<String>, place: &Place) -> Result<Format, ConfigError> {
    if pointers.is_empty() {
        return Err(place.error("has an empty list of `pointers`; name at least one"));
    }
    let is_wrong = |pointer: &&String| {
        let has_wrong_tilde = || {
            let mut behind = pointer.split('~').skip(1);
            behind.any(|behind| !behind.starts_with(['0', '1']))
        };
        !pointer.is_empty() && !pointer.starts_with('/') || has_wrong_tilde()
    };
    match pointers.iter().find(is_wrong) {
        Some(pointer) => Err(place.error(format_args!(
            "`{pointer}` is not a JSON pointer; write it as \"/addresses\" (RFC 6901)"
        ))),
        None => Ok(Format::Pointers(pointers)),
    }
}

fn families_of(families: &[RawFamily], place: &Place) -> Result<Families, ConfigError> {
    let has = |family| families.contains(&family);
    match (has(RawFamily::Ipv4), has(RawFamily::Ipv6)) {
        (true, true) => Ok(Families::Both),
        (true, false) => Ok(Families::V4),
        (false, true) => Ok(Families::V6),
        (false, false) => Err(place.error(
            "has an empty list of `families`; name those that the list must hold, \"ipv4\" or \
             \"ipv6\"",
        )),
    }
}

/// Bytes of a source's name.
const NAME_MAX: usize = 64;
/// The most bytes that a list may be allowed to have.
const SIZES: RangeInclusive<usize> = 64..=16 << 20;
