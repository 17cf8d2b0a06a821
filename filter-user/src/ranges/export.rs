//! The active ranges in other programs' words, for those who keep other tools.

use super::RangeSet;

/// For whom.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Language {
    /// For `ipset restore`: the sets `pullgate-v4` and `pullgate-v6`, filled aside and swapped in.
    Ipset,
    /// For `nft -f -`: the sets `ranges_v4` and `ranges_v6` of the table `inet pullgate`.
    Nft,
    /// For nginx: `set_real_ip_from` lines.
    Nginx,
    /// One range per line.
    Text,
}

/// The ranges as `language` puts them. Fed to its program again, it replaces what was there.
#[must_use]
pub fn export(ranges: &RangeSet, language: Language) -> String {
    match language {
        Language::Ipset => ipset(ranges),
        Language::Nft => nft(ranges),
        Language::Nginx => text(ranges.iter().map(|net| format!("set_real_ip_from {net};"))),
        Language::Text => text(ranges.iter().map(|net| net.to_string())),
    }
}

/// nft(8): one file is one transaction, so that no packet meets empty sets.
fn nft(ranges: &RangeSet) -> String {
    let mut lines = vec!["add table inet pullgate".to_owned()];
    for (set, kind, nets) in [
        ("ranges_v4", "ipv4_addr", texts(ranges.v4())),
        ("ranges_v6", "ipv6_addr", texts(ranges.v6())),
    ] {
        lines.push(format!(
            "add set inet pullgate {set} {{ type {kind}; flags interval; auto-merge; }}"
        ));
        lines.push(format!("flush set inet pullgate {set}"));
        // An empty list of elements is no sentence of the language.
        if !nets.is_empty() {
            let nets = nets.join(", ");
            lines.push(format!("add element inet pullgate {set} {{ {nets} }}"));
        }
    }
    text(lines)
}

/// ipset(8): `swap` is the one step that packets see.
fn ipset(ranges: &RangeSet) -> String {
    let mut lines = Vec::new();
    for (set, family, nets) in [
        ("pullgate-v4", "inet", texts(ranges.v4())),
        ("pullgate-v6", "inet6", texts(ranges.v6())),
    ] {
        for name in [set, &format!("{set}-new")] {
            lines.push(format!("create {name} hash:net family {family} -exist"));
        }
        lines.push(format!("flush {set}-new"));
        lines.extend(nets.iter().map(|net| format!("add {set}-new {net}")));
        lines.push(format!("swap {set}-new {set}"));
        lines.push(format!("destroy {set}-new"));
    }
    text(lines)
}

fn texts(nets: &[impl ToString]) -> Vec<String> {
    nets.iter().map(ToString::to_string).collect()
}

fn text(lines: impl IntoIterator<Item = String>) -> String {
    lines.into_iter().map(|line| line + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranges::{Families, Feed, GuardLimits};

    #[test]
    fn every_language_holds_every_range() {
        let lists = ["64.0.0.0/24\n64.0.1.0/24\n2a00::/32"];
        let feed = Feed::from_texts(lists).unwrap();
        let ranges = RangeSet::check(feed, Families::Both, &GuardLimits::default()).unwrap();

        assert_eq!(
            export(&ranges, Language::Text),
            "64.0.0.0/24\n64.0.1.0/24\n2a00::/32\n"
        );
        assert_eq!(
            export(&ranges, Language::Nginx),
            "set_real_ip_from 64.0.0.0/24;\nset_real_ip_from 64.0.1.0/24;\n\
             set_real_ip_from 2a00::/32;\n"
        );
        let nft = export(&ranges, Language::Nft);
        assert!(
            nft.contains("ranges_v4 { 64.0.0.0/24, 64.0.1.0/24 }\n"),
            "{nft}"
        );
        let ipset = export(&ranges, Language::Ipset);
        assert!(ipset.contains("add pullgate-v6-new 2a00::/32\n"), "{ipset}");
    }

    #[test]
    fn a_family_without_ranges_is_an_empty_set() {
        let nft = export(&RangeSet::default(), Language::Nft);

        assert!(nft.contains("flush set inet pullgate ranges_v6\n"), "{nft}");
        assert!(!nft.contains("add element"), "{nft}");
    }
}
