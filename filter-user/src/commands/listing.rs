//! `pullgate ranges list` and `show`: the ranges on disk, where each came from, and which of them an
//! address is in.

use std::fmt::{self, Display, Formatter};
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Serialize;

use crate::config::RangesSettings;
use crate::ranges::ActiveRanges;

/// A range that is active.
#[derive(Debug, Serialize)]
pub struct ListedRange {
    /// The range.
    pub range: IpNet,
    /// The sources whose lists hold it.
    pub sources: Vec<String>,
    /// How long it was missing from the lists of all of them, if it has vanished.
    pub missing_seconds: Option<u64>,
}

impl ListedRange {
    fn new(active: &ActiveRanges, range: IpNet) -> Self {
        let holders = || active.holders(&range);
        let missing = holders().map(|list| list.known.vanishing(&range));
        // It has vanished if no list holds it any more, and since the last one lost it.
        let missing: Option<Vec<_>> = missing.collect();
        let missing_for = missing.into_iter().flatten().map(|gone| gone.missing_for);
        Self {
            range,
            sources: holders().map(|list| list.source.clone()).collect(),
            missing_seconds: missing_for.min().map(|time| time.as_secs()),
        }
    }
}

impl Display for ListedRange {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let range = self.range.to_string();
        write!(f, "{range:<20} {}", self.sources.join(" "))?;
        match self.missing_seconds {
            Some(seconds) => write!(f, ", listed no more, seen to be missing for {seconds} s"),
            None => Ok(()),
        }
    }
}

/// All active ranges, IPv4 first.
#[must_use]
pub fn list(active: &ActiveRanges) -> Vec<ListedRange> {
    let ranges = active.set().iter();
    ranges
        .map(|range| ListedRange::new(active, range))
        .collect()
}

/// What is to be said of one address.
#[derive(Debug, Serialize)]
pub struct ShownAddress {
    /// The address.
    pub address: IpAddr,
    /// Whether it may enter.
    pub enters: bool,
    /// The rule that says so; none if no rule holds the address.
    pub rule: Option<Rule>,
    /// All active ranges that hold it.
    pub ranges: Vec<ListedRange>,
}

/// Looks an address up.
#[must_use]
pub fn show(ranges: &RangesSettings, active: &ActiveRanges, address: IpAddr) -> ShownAddress {
    let rule = Rule::find(ranges, active, address);
    let address = address.to_canonical();
    let holding = active.set().iter().filter(|range| range.contains(&address));
    ShownAddress {
        address,
        enters: rule.as_ref().is_some_and(|rule| rule.list != Rule::DENY),
        rule,
        ranges: holding
            .map(|range| ListedRange::new(active, range))
            .collect(),
    }
}

impl Display for ShownAddress {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let verb = if self.enters {
            "may enter"
        } else {
            "is a stranger"
        };
        writeln!(f, "{} {verb}", self.address)?;
        match &self.rule {
            Some(rule) => writeln!(f, "  it is in {rule}")?,
            None => writeln!(f, "  it is in no published range, and not in `allow`")?,
        }
        for entry in &self.ranges {
            writeln!(f, "  {entry}")?;
        }
        Ok(())
    }
}

/// A range, and the list that it is in.
#[derive(Debug, Serialize)]
pub struct Rule {
    /// `published`, `allow` or `deny`.
    pub list: &'static str,
    /// The range.
    pub range: IpNet,
    /// The sources that list it, if it is published.
    pub sources: Vec<String>,
    /// Whether it has vanished from the published lists, and is kept for its grace.
    pub vanished: bool,
}

impl Rule {
    const DENY: &str = "deny";
    const PUBLISHED: &str = "published";

    /// The rule that decides about an address: `deny` first, then what is published, then `allow`.
    #[must_use]
    pub fn find(ranges: &RangesSettings, active: &ActiveRanges, address: IpAddr) -> Option<Self> {
        let address = address.to_canonical();
        let published: Vec<_> = active.set().iter().collect();
        let lists = [
            (Self::DENY, ranges.deny.as_slice()),
            (Self::PUBLISHED, published.as_slice()),
            ("allow", ranges.allow.as_slice()),
        ];
        lists.into_iter().find_map(|(list, nets)| {
            let holding = nets.iter().filter(|net| net.contains(&address));
            let range = *holding.max_by_key(|net| net.prefix_len())?;
            let entry = (list == Self::PUBLISHED).then(|| ListedRange::new(active, range));
            let vanished = entry
                .as_ref()
                .is_some_and(|entry| entry.missing_seconds.is_some());
            Some(Self {
                list,
                range,
                sources: entry.map(|entry| entry.sources).unwrap_or_default(),
                vanished,
            })
        })
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}, of the list `{}`", self.range, self.list)?;
        if !self.sources.is_empty() {
            write!(f, " ({})", self.sources.join(" "))?;
        }
        if self.vanished {
            write!(f, ", which holds it no more; it is kept for its grace")?;
        }
        Ok(())
    }
}
