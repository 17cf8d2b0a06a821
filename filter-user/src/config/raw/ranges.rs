//! `[ranges]` as it is written.

use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;
use url::Url;

use super::source::RawSource;
use crate::config::value::{RawNet, Spanned, duration, rules};
use crate::config::{ConfigError, FeedSource, Located, Place, Proxy, RangesSettings, Source};
use crate::ranges::guard::Documentation;
use crate::ranges::{Families, Feed, GuardLimits, RangeSet, Rules, Table};

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawRanges {
    /// Whose lists are admitted: `"cloudflare"`, `"cloudflare-jdcloud"`, `"fastly"`, `"cloudfront"`,
    /// `{ url = "https://…" }`, `{ file = "…" }`, or a list of several ways to the same list.
    #[cfg_attr(test, schemars(with = "Option<Vec<AnySource>>", extend("default" = ["cloudflare"])))]
    sources: Option<Spanned<Vec<Spanned<RawSource>>>>,
    /// Ranges and addresses that are admitted as those of a source, such as dedicated egress
    /// addresses.
    #[serde(rename = "static")]
    #[cfg_attr(test, schemars(extend("default" = [])))]
    static_: Spanned<Vec<Spanned<RawNet>>>,
    /// `true`: `static` alone counts. No source is asked, and the role ranges is not needed.
    #[cfg_attr(test, schemars(extend("default" = false)))]
    only: Spanned<bool>,
    /// The proxy by which sources are asked: `"none"`, `"env"` (`HTTPS_PROXY` and its like), or
    /// `"http://user:password@proxy:3128"`.
    #[cfg_attr(test, schemars(extend("default" = "none")))]
    proxy: Spanned<String>,
    /// Time between two refreshes of a source, ± 10 %. After a failure it is 1 min, doubled up to 1
    /// h, or as long as `Retry-After` says, but no longer than this.
    #[serde(deserialize_with = "duration")]
    #[cfg_attr(test, schemars(with = "String", extend("default" = "6h")))]
    interval: Duration,
    /// How long a range that vanished from its list is kept.
    #[serde(deserialize_with = "duration")]
    #[cfg_attr(test, schemars(with = "String", extend("default" = "24h")))]
    removal_grace: Duration,
    /// Ranges and addresses of your own that are admitted, such as a monitoring host.
    #[cfg_attr(test, schemars(extend("default" = [])))]
    allow: Vec<Spanned<RawNet>>,
    /// Ranges and addresses that are refused, whatever else admits them.
    #[cfg_attr(test, schemars(extend("default" = [])))]
    deny: Vec<Spanned<RawNet>>,
    /// Most ranges of a list, 64 to 4096. A longer one is refused.
    #[cfg_attr(test, schemars(extend("default" = 4096)))]
    max_entries: Spanned<u64>,
    /// Most IPv4 addresses of a list, and of all together; Cloudflare has 1.5 million. With `sources`
    /// or `static` of your own the default is 16777216.
    #[cfg_attr(test, schemars(extend("default" = 4194304)))]
    max_addresses_v4: Option<Spanned<u64>>,
    /// The same in IPv6 networks of /32; Cloudflare has 14. With `sources` or `static` of your own
    /// the default is 4096.
    #[cfg_attr(test, schemars(extend("default" = 64)))]
    max_networks_v6: Option<Spanned<u64>>,
    /// For test setups: accept documentation prefixes in lists.
    #[cfg_attr(test, schemars(extend("default" = false)))]
    unsafe_documentation_ranges: bool,
}

/// What the schema has of a source: a name, a table, or a list of both.
#[cfg(test)]
#[derive(schemars::JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "its shape is what matters")]
enum AnySource {
    Name(String),
    Table(super::source::RawTable),
    Ways(Vec<Self>),
}

impl Default for RawRanges {
    fn default() -> Self {
        Self {
            sources: None,
            static_: Spanned::unwritten(Vec::new()),
            only: Spanned::unwritten(false),
            proxy: Spanned::unwritten("none".to_owned()),
            interval: Duration::from_secs(6 * 3600),
            removal_grace: Duration::from_secs(24 * 3600),
            allow: Vec::new(),
            deny: Vec::new(),
            max_entries: Spanned::unwritten(*ENTRIES.end()),
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
            value.unwrap_or_else(|| Spanned::unwritten(default))
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
                    "only the ranges in `ranges.static` would be admitted, and there are none",
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

        let (allow, deny) = own_rules(source, self.allow, self.deny, (&static_, fixed_place))?;
        Ok(RangesSettings {
            sources,
            static_,
            proxy: convert_proxy(source, &self.proxy)?,
            interval: self.interval.max(Duration::from_secs(1)),
            removal_grace: self.removal_grace,
            allow,
            deny,
            limits,
        })
    }
}

/// What is to be admitted and refused besides: with what is fixed, it fits into the kernel's table.
fn own_rules(
    source: &Source<'_>,
    allow: Vec<Spanned<RawNet>>,
    deny: Vec<Spanned<RawNet>>,
    (static_, static_place): (&RangeSet, Place),
) -> Result<(Vec<IpNet>, Vec<IpNet>), ConfigError> {
    let begin = |rules: &[Spanned<RawNet>]| rules.first().map_or(0, |rule| rule.span().start);
    let places = [
        (allow.len(), source.place(begin(&allow), "ranges.allow")),
        (deny.len(), source.place(begin(&deny), "ranges.deny")),
        (static_.len(), static_place),
    ];
    let allow = rules(source, allow, "ranges.allow")?;
    let deny = rules(source, deny, "ranges.deny")?;
    let all = Rules {
        ranges: static_,
        allow: &allow,
        deny: &deny,
    };
    match (
        Table::compile(&all),
        places.into_iter().max_by_key(|(rules, _)| *rules),
    ) {
        (Err(full), Some((_, longest))) => Err(longest.error(full)),
        (_, _) => Ok((allow, deny)),
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
