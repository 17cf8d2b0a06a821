//! `[ranges]` as it is written.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;
use url::Url;

use super::source::RawSource;
use crate::config::value::{RawNet, duration, rules};
use crate::config::{ConfigError, FeedSource, Located, Proxy, RangesSettings, Source};
use crate::ranges::guard::Documentation;
use crate::ranges::{Families, Feed, GuardLimits, RangeSet};

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawRanges {
    sources: Option<Spanned<Vec<Spanned<RawSource>>>>,
    #[serde(rename = "static")]
    static_: Spanned<Vec<Spanned<RawNet>>>,
    only: Spanned<bool>,
    proxy: Spanned<String>,
    #[serde(deserialize_with = "duration")]
    interval: Duration,
    #[serde(deserialize_with = "duration")]
    removal_grace: Duration,
    allow: Vec<Spanned<RawNet>>,
    deny: Vec<Spanned<RawNet>>,
    max_entries: Spanned<u64>,
    max_addresses_v4: Option<Spanned<u64>>,
    max_networks_v6: Option<Spanned<u64>>,
    unsafe_documentation_ranges: bool,
}

impl Default for RawRanges {
    fn default() -> Self {
        Self {
            sources: None,
            static_: Spanned::new(0..0, Vec::new()),
            only: Spanned::new(0..0, false),
            proxy: Spanned::new(0..0, "none".to_owned()),
            interval: Duration::from_secs(6 * 3600),
            removal_grace: Duration::from_secs(24 * 3600),
            allow: Vec::new(),
            deny: Vec::new(),
            max_entries: Spanned::new(0..0, *ENTRIES.end()),
            max_addresses_v4: None,
            max_networks_v6: None,
            unsafe_documentation_ranges: false,
        }
    }
}

impl RawRanges {
    pub(super) fn convert(self, source: &Source<'_>) -> Result<RangesSettings, ConfigError> {
        // Unless it is said, what Cloudflare's list needs, if that is the only one.
        let is_alone = self.sources.is_none() && self.static_.as_ref().is_empty();
        let unsaid = if is_alone {
            GuardLimits::of_cloudflare()
        } else {
            GuardLimits::default()
        };
        let said = |value: Option<Spanned<u64>>, default| {
            value.unwrap_or_else(|| Spanned::new(0..0, default))
        };
        let max_addresses_v4 = said(self.max_addresses_v4, unsaid.addresses_v4);
        let max_networks_v6 = said(self.max_networks_v6, unsaid.networks_v6);
        let limits = GuardLimits {
            entries: usize::try_from(bounded(source, &self.max_entries, "max_entries", ENTRIES)?)
                .unwrap_or(usize::MAX),
            addresses_v4: bounded(source, &max_addresses_v4, "max_addresses_v4", ADDRESSES_V4)?,
            networks_v6: bounded(source, &max_networks_v6, "max_networks_v6", NETWORKS_V6)?,
            documentation: if self.unsafe_documentation_ranges {
                Documentation::Accept
            } else {
                Documentation::Refuse
            },
        };
        let fixed_place = source.place(self.static_.span().start, "ranges.static");
        let static_ = rules(source, self.static_.into_inner(), "ranges.static")?;
        let static_ = if static_.is_empty() {
            RangeSet::default()
        } else {
            // The guard's rules are the same for what an operator writes as for what is fetched.
            RangeSet::check(Feed::new(static_), Families::Either, &limits)
                .map_err(|rejection| fixed_place.error(rejection))?
        };

        let only_place = source.place(self.only.span().start, "ranges.only");
        let sources = match (self.only.into_inner(), self.sources) {
            (true, _) if static_.is_empty() => {
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
                let place = source.place(0, "ranges.sources");
                vec![RawSource::cloudflare().convert(source, place)?]
            }
            (false, Some(sources)) => convert_sources(source, sources)?,
        };

        Ok(RangesSettings {
            sources,
            static_,
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
    for one in raw.into_inner() {
        let one_at = source.place(one.span().start, "ranges.sources");
        let next = one.into_inner().convert(source, one_at)?;
        let name = &next.value.name;
        if sources.iter().any(|known| known.value.name == *name) {
            return Err(next.place.error(format_args!(
                "`{name}` is there twice; leave one out, or give each a `name` if they are two"
            )));
        }
        sources.push(next);
    }
    if sources.is_empty() {
        Err(place.error(
            "is empty; leave it out to use Cloudflare's own lists, or write `only = true` to let \
             in `ranges.static` alone",
        ))
    } else {
        Ok(sources)
    }
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

/// A list limit below this would refuse Cloudflare's own 22 ranges, or soon might; above it, the
/// kernel's table may be too small.
const ENTRIES: RangeInclusive<u64> = 64..=4096;
/// A sixteenth of all IPv4 addresses is no CDN.
const ADDRESSES_V4: RangeInclusive<u64> = 256..=1 << 28;
/// A /16's worth.
const NETWORKS_V6: RangeInclusive<u64> = 1..=1 << 16;
