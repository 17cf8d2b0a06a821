//! `[ranges]` as it is written.

use std::fmt::{self, Formatter};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use toml::Spanned;
use url::Url;

use super::super::source::{CLOUDFLARE, CLOUDFLARE_WAYS, Preset, SIZE_MAX, redacted};
use super::super::value::{Rule, absolute, duration, is_trustworthy, rules};
use super::super::{
    Before, ConfigError, FeedSource, Located, Location, Place, Proxy, Ranges, Source, Way,
};
use crate::ranges::guard::Documentation;
use crate::ranges::{FIXED, Families, Feed, Format, Limits, RangeSet};

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Raw {
    sources: Option<Spanned<Vec<Spanned<RawSource>>>>,
    #[serde(rename = "static")]
    fixed: Spanned<Vec<Spanned<Rule>>>,
    only: Spanned<bool>,
    proxy: Spanned<String>,
    #[serde(deserialize_with = "duration")]
    interval: Duration,
    #[serde(deserialize_with = "duration")]
    removal_grace: Duration,
    allow: Vec<Spanned<Rule>>,
    deny: Vec<Spanned<Rule>>,
    max_entries: Spanned<u64>,
    max_addresses_v4: Spanned<u64>,
    max_networks_v6: Spanned<u64>,
    unsafe_documentation_ranges: bool,
}

impl Default for Raw {
    fn default() -> Self {
        let limits = Limits::default();
        Self {
            sources: None,
            fixed: Spanned::new(0..0, Vec::new()),
            only: Spanned::new(0..0, false),
            proxy: Spanned::new(0..0, "none".to_owned()),
            interval: Duration::from_secs(6 * 3600),
            removal_grace: Duration::from_secs(24 * 3600),
            allow: Vec::new(),
            deny: Vec::new(),
            max_entries: Spanned::new(0..0, *ENTRIES.end()),
            max_addresses_v4: Spanned::new(0..0, limits.addresses_v4),
            max_networks_v6: Spanned::new(0..0, limits.networks_v6),
            unsafe_documentation_ranges: false,
        }
    }
}

impl Raw {
    pub(super) fn convert(self, source: &Source<'_>) -> Result<Ranges, ConfigError> {
        let limits = Limits {
            entries: usize::try_from(bounded(source, &self.max_entries, "max_entries", ENTRIES)?)
                .unwrap_or(usize::MAX),
            addresses_v4: bounded(
                source,
                &self.max_addresses_v4,
                "max_addresses_v4",
                ADDRESSES_V4,
            )?,
            networks_v6: bounded(
                source,
                &self.max_networks_v6,
                "max_networks_v6",
                NETWORKS_V6,
            )?,
            documentation: if self.unsafe_documentation_ranges {
                Documentation::Accept
            } else {
                Documentation::Refuse
            },
        };
        let fixed_place = source.place(self.fixed.span().start, "ranges.static");
        let fixed = rules(source, self.fixed.into_inner(), "ranges.static")?;
        let fixed = match fixed.is_empty() {
            true => RangeSet::default(),
            // The guard's rules are the same for what an operator writes as for what is fetched.
            false => RangeSet::check(Feed::new(fixed), Families::Either, &limits)
                .map_err(|rejection| fixed_place.error(rejection))?,
        };

        let only_place = source.place(self.only.span().start, "ranges.only");
        let sources = match (self.only.into_inner(), self.sources) {
            (true, _) if fixed.is_empty() => {
                return Err(only_place.error(
                    "only the ranges in `ranges.static` would be let in, and there are none",
                ));
            }
            (true, Some(_)) => {
                return Err(only_place.error(
                    "`ranges.static` alone is to count, but `ranges.sources` is there as well; \
                     remove one of them",
                ));
            }
            (true, None) => Vec::new(),
            (false, None) => {
                let cloudflare = RawSource::Way(RawWay::Preset(RawPreset(CLOUDFLARE)));
                let place = source.place(0, "ranges.sources");
                vec![convert_source(source, cloudflare, place)?]
            }
            (false, Some(sources)) => convert_sources(source, sources)?,
        };

        Ok(Ranges {
            sources,
            fixed,
            proxy: convert_proxy(source, &self.proxy)?,
            interval: self.interval.max(Duration::from_secs(1)),
            removal_grace: self.removal_grace,
            allow: rules(source, self.allow, "ranges.allow")?,
            deny: rules(source, self.deny, "ranges.deny")?,
            limits,
        })
    }
}

fn bounded(
    source: &Source<'_>,
    value: &Spanned<u64>,
    field: &str,
    bounds: RangeInclusive<u64>,
) -> Result<u64, ConfigError> {
    let number = *value.as_ref();
    if bounds.contains(&number) {
        return Ok(number);
    }
    let place = source.place(value.span().start, format!("ranges.{field}"));
    let (least, most) = (bounds.start(), bounds.end());
    Err(place.error(format_args!(
        "{number} is out of bounds; write a number from {least} to {most}"
    )))
}

fn convert_sources(
    source: &Source<'_>,
    raw: Spanned<Vec<Spanned<RawSource>>>,
) -> Result<Vec<Located<FeedSource>>, ConfigError> {
    let place = source.place(raw.span().start, "ranges.sources");
    let mut sources: Vec<Located<FeedSource>> = Vec::new();
    for raw in raw.into_inner() {
        let place = source.place(raw.span().start, "ranges.sources");
        let next = convert_source(source, raw.into_inner(), place)?;
        let name = &next.value.name;
        if sources.iter().any(|known| known.value.name == *name) {
            return Err(next.place.error(format_args!(
                "`{name}` is there twice; leave one out, or give each a `name` if they are two"
            )));
        }
        sources.push(next);
    }
    match sources.is_empty() {
        true => Err(place.error(
            "is empty; leave it out to use Cloudflare's own lists, or write `only = true` to let \
             in `ranges.static` alone",
        )),
        false => Ok(sources),
    }
}

fn convert_source(
    source: &Source<'_>,
    raw: RawSource,
    place: Place,
) -> Result<Located<FeedSource>, ConfigError> {
    let raw = match raw {
        RawSource::Way(way) => vec![way],
        RawSource::Ways(ways) => ways,
    };
    let is_cloudflare =
        |way: &RawWay| matches!(way, RawWay::Preset(preset) if preset.0 == CLOUDFLARE);
    let cloudflare = raw.first().is_some_and(is_cloudflare);
    let mut ways = Vec::new();
    let mut before = None;
    for raw in raw {
        for (way, way_before) in raw.convert(source, &place)? {
            ways.push(way);
            before.get_or_insert(way_before);
        }
    }
    let (Some(first), Some(before)) = (ways.first(), before) else {
        return Err(place.error("holds an empty list of ways to a list; name at least one"));
    };
    let name = match cloudflare {
        true => CLOUDFLARE.to_owned(),
        false => first.name.clone(),
    };
    let value = FeedSource { name, ways, before };
    Ok(Located { value, place })
}

fn convert_proxy(source: &Source<'_>, raw: &Spanned<String>) -> Result<Proxy, ConfigError> {
    match raw.as_ref().as_str() {
        "none" => Ok(Proxy::None),
        "env" => Ok(Proxy::Environment),
        text => {
            let url = Url::parse(text).ok();
            let url = url.filter(|url| ["http", "https"].contains(&url.scheme()));
            // Without the text: it may hold a password.
            url.map(Proxy::Url).ok_or_else(|| {
                let place = source.place(raw.span().start, "ranges.proxy");
                place.error("is neither \"none\" nor \"env\" nor a URL such as http://proxy:3128")
            })
        }
    }
}

/// One way to a list, or several ways to the same.
///
/// By hand, because of what is wrong inside serde's untagged enums nothing is told.
enum RawSource {
    Way(RawWay),
    Ways(Vec<RawWay>),
}

enum RawWay {
    Preset(RawPreset),
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
        WayVisitor.visit_str(name).map(RawSource::Way)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RawSource, A::Error> {
        WayVisitor.visit_map(map).map(RawSource::Way)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<RawSource, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(seq)).map(RawSource::Ways)
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
            Some(name) => Ok(RawWay::Preset(RawPreset(name))),
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

/// The name of a preset, or `cloudflare`.
struct RawPreset(&'static str);

impl RawWay {
    fn convert(
        self,
        source: &Source<'_>,
        place: &Place,
    ) -> Result<Vec<(Way, Before)>, ConfigError> {
        let name = match self {
            Self::Table(table) => return Ok(vec![table.convert(source, place)?]),
            Self::Preset(RawPreset(name)) => name,
        };
        let names = match name {
            CLOUDFLARE => CLOUDFLARE_WAYS.as_slice(),
            _ => &[name],
        };
        let presets = names.iter().filter_map(|name| Preset::named(name));
        let ways = presets.map(|preset| {
            let way = preset.way().map_err(|error| place.error(error))?;
            Ok((way, preset.before))
        });
        ways.collect()
    }
}

/// A list of the operator's own, or his mirror of a published one.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTable {
    name: Option<String>,
    url: Option<Urls>,
    file: Option<PathBuf>,
    ca_file: Option<PathBuf>,
    like: Option<String>,
    pointers: Option<Vec<String>>,
    families: Option<Vec<RawFamily>>,
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
#[serde(rename_all = "lowercase")]
enum RawFamily {
    Ipv4,
    Ipv6,
}

impl RawTable {
    fn convert(self, source: &Source<'_>, place: &Place) -> Result<(Way, Before), ConfigError> {
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
        let before = preset.map_or(Before::Nothing, |preset| preset.before);
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
            Some(name) if name.is_empty() || name.len() > NAME_MAX || !is_plain(&name) => {
                return Err(place.error(format_args!(
                    "`name` is to be a word of at most {NAME_MAX} letters, digits, dots and dashes"
                )));
            }
            Some(name) if name == FIXED => {
                return Err(place.error("`name = \"static\"` is the name of `ranges.static`"));
            }
            Some(name) => name,
            None => name,
        };
        let way = Way {
            name,
            place: location,
            format,
            families,
            size_max,
        };
        Ok((way, before))
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
             protect nobody",
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
/// A list limit below this would refuse Cloudflare's own 22 ranges, or soon might; above it, the
/// kernel's table may be too small.
const ENTRIES: RangeInclusive<u64> = 64..=4096;
/// A sixteenth of all IPv4 addresses is no CDN.
const ADDRESSES_V4: RangeInclusive<u64> = 256..=1 << 28;
/// A /16's worth.
const NETWORKS_V6: RangeInclusive<u64> = 1..=1 << 16;
