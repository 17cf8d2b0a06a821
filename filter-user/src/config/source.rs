//! The sources of ranges: what there is to choose from, and how each is reached.

use std::fmt::{Display, Formatter};
use std::path::PathBuf;

use url::Url;

use crate::ranges::{Families, Format};

/// One list of ranges, and the ways to get it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FeedSource {
    /// Its name in log, status and snapshot: the first way's, or `cloudflare`.
    pub name: String,
    /// Tried in this order until one yields a list that may be taken in.
    pub ways: Vec<SourceEndpoint>,
    /// What is active before the list was ever fetched.
    pub fallback: Fallback,
    /// Whether the list is the operator's own: none of its ways leads to a published one, or to a mirror of one.
    pub is_own: bool,
}

impl FeedSource {
    /// Whether one of its ways is a local file.
    #[must_use]
    pub fn is_local(&self) -> bool {
        let mut ways = self.ways.iter();
        ways.any(SourceEndpoint::is_local)
    }
}

/// What is active before a list was ever fetched.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fallback {
    /// Cloudflare's ranges, as they are embedded.
    Baseline,
    /// Nothing.
    Nothing,
}

/// A way to get a list.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SourceEndpoint {
    /// Its name in the log: without what a URL may hold of secrets.
    pub name: String,
    /// Where it leads.
    pub place: Location,
    /// How the list is written.
    pub format: Format,
    /// Which families the list must hold.
    pub families: Families,
    /// The most bytes of a body.
    pub size_max: usize,
}

/// Where a list is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Location {
    /// A local file.
    File(PathBuf),
    /// HTTPS, or HTTP to loopback; several parts make one list.
    Web {
        /// The parts.
        urls: Vec<Url>,
        /// A PEM file with the roots to trust instead of the system's.
        ca_file: Option<PathBuf>,
    },
}

impl SourceEndpoint {
    /// Whether it is a local file.
    #[must_use]
    pub fn is_local(&self) -> bool {
        matches!(self.place, Location::File(_))
    }

    /// Whether the other way's list comes from elsewhere: another host, or another file.
    #[must_use]
    pub fn is_independent_of(&self, other: &Self) -> bool {
        match (&self.place, &other.place) {
            (Location::File(a), Location::File(b)) => a != b,
            (Location::Web { urls: a, .. }, Location::Web { urls: b, .. }) => {
                let is_in_b = |url: &Url| b.iter().any(|in_b| in_b.host() == url.host());
                !a.iter().any(is_in_b)
            }
            (Location::File(_), Location::Web { .. })
            | (Location::Web { .. }, Location::File(_)) => true,
        }
    }
}

impl Display for SourceEndpoint {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

/// A URL without user, password, query and fragment, any of which may be a secret.
#[must_use]
pub fn redacted(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // Only URLs that cannot have a user refuse to lose him.
    match url.set_username("") {
        Ok(_) | Err(_) => {}
    }
    match url.set_password(None) {
        Ok(_) | Err(_) => {}
    }
    url.to_string()
}

/// A list that is published, by the name that the configuration has for it.
pub(super) struct Preset {
    pub(super) name: &'static str,
    urls: &'static [&'static str],
    format: PresetFormat,
    pub(super) families: Families,
    pub(super) size_max: usize,
    pub(super) fallback: Fallback,
}

enum PresetFormat {
    Cloudflare,
    ByFamily,
    Jdcloud,
    Pointers(&'static [&'static str]),
    CloudFront,
}

impl Preset {
    /// The preset of this name.
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        PRESETS.iter().find(|preset| preset.name == name)
    }

    /// The names of all presets, for a message.
    pub(super) fn names() -> String {
        let names = PRESETS.iter().map(|preset| preset.name);
        let names = [CLOUDFLARE].into_iter().chain(names);
        names
            .map(|name| format!("\"{name}\""))
            .collect::<Vec<_>>()
            .join(", ")
    }

    pub(super) fn format(&self) -> Format {
        match self.format {
            PresetFormat::Cloudflare => Format::Cloudflare,
            PresetFormat::ByFamily => Format::ByFamily,
            PresetFormat::Jdcloud => Format::Jdcloud,
            PresetFormat::Pointers(pointers) => {
                Format::Pointers(pointers.iter().map(ToString::to_string).collect())
            }
            PresetFormat::CloudFront => Format::CloudFront,
        }
    }

    /// The way that the publisher offers.
    pub(super) fn way(&self) -> Result<SourceEndpoint, url::ParseError> {
        let urls = self.urls.iter().map(|url| Url::parse(url));
        Ok(SourceEndpoint {
            name: self.name.to_owned(),
            place: Location::Web {
                urls: urls.collect::<Result<_, _>>()?,
                ca_file: None,
            },
            format: self.format(),
            families: self.families,
            size_max: self.size_max,
        })
    }
}

/// `"cloudflare"` stands for both ways to the same list.
pub(super) const CLOUDFLARE: &str = "cloudflare";
pub(super) const CLOUDFLARE_WAYS: [&str; 2] = ["cloudflare-api", "cloudflare-text"];

/// Cloudflare's own list is below one KiB.
pub(super) const SIZE_MAX: usize = 64 << 10;

const PRESETS: [Preset; 5] = [
    // https://developers.cloudflare.com/api/resources/ips/
    Preset {
        name: CLOUDFLARE_WAYS[0],
        urls: &["https://api.cloudflare.com/client/v4/ips"],
        format: PresetFormat::Cloudflare,
        families: Families::Both,
        size_max: SIZE_MAX,
        fallback: Fallback::Baseline,
    },
    // https://www.cloudflare.com/ips/
    Preset {
        name: CLOUDFLARE_WAYS[1],
        urls: &[
            "https://www.cloudflare.com/ips-v4",
            "https://www.cloudflare.com/ips-v6",
        ],
        format: PresetFormat::ByFamily,
        families: Families::Both,
        size_max: SIZE_MAX,
        fallback: Fallback::Baseline,
    },
    // https://developers.cloudflare.com/china-network/
    Preset {
        name: "cloudflare-jdcloud",
        urls: &["https://api.cloudflare.com/client/v4/ips?networks=jdcloud"],
        format: PresetFormat::Jdcloud,
        families: Families::Either,
        size_max: SIZE_MAX,
        fallback: Fallback::Nothing,
    },
    // https://www.fastly.com/documentation/reference/api/utils/public-ip-list/
    Preset {
        name: "fastly",
        urls: &["https://api.fastly.com/public-ip-list"],
        format: PresetFormat::Pointers(&["/addresses", "/ipv6_addresses"]),
        families: Families::Both,
        size_max: SIZE_MAX,
        fallback: Fallback::Nothing,
    },
    // https://docs.aws.amazon.com/vpc/latest/userguide/aws-ip-ranges.html: some 2 MiB.
    Preset {
        name: "cloudfront",
        urls: &["https://ip-ranges.amazonaws.com/ip-ranges.json"],
        format: PresetFormat::CloudFront,
        families: Families::V4,
        size_max: 8 << 20,
        fallback: Fallback::Nothing,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_has_a_way() {
        for preset in &PRESETS {
            assert_eq!(preset.way().unwrap().name, preset.name);
        }
        for name in CLOUDFLARE_WAYS {
            assert!(Preset::named(name).is_some());
        }
    }

    #[test]
    fn only_other_hosts_are_independent() {
        let way = |name| Preset::named(name).unwrap().way().unwrap();

        assert!(way("cloudflare-api").is_independent_of(&way("cloudflare-text")));
        assert!(!way("cloudflare-api").is_independent_of(&way("cloudflare-jdcloud")));
    }

    #[test]
    fn secrets_in_a_url_are_not_shown() {
        let url = Url::parse("https://user:pw@mirror.example/list?token=x#y").unwrap();

        assert_eq!(redacted(&url), "https://mirror.example/list");
    }
}
