//! Where the firewall leads a port elsewhere, before a filter or a socket sees it: printed rules in, ports out.

use std::collections::BTreeSet;

use super::{run, tool};

/// What the firewall's tools print of ports that are led elsewhere.
#[derive(Default)]
pub(in crate::commands) struct Redirections {
    /// The ports, each with the tool that prints the rule.
    pub(in crate::commands) led: Vec<(&'static str, u16)>,
    /// Rules that lead elsewhere what cannot be read from them, and tools that print nothing.
    pub(in crate::commands) unread: Vec<String>,
}

/// Which of these TCP ports a rule leads elsewhere.
pub(in crate::commands) fn redirections(ports: &BTreeSet<u16>) -> Redirections {
    let mut found = Redirections::default();
    for (name, arguments) in [
        ("iptables-save", ["-t", "nat"].as_slice()),
        ("ip6tables-save", ["-t", "nat"].as_slice()),
        ("nft", ["list", "ruleset"].as_slice()),
    ] {
        let Some(program) = tool(name) else {
            continue;
        };
        match run(&program, arguments) {
            Ok(rules) => found.read(name, &rules, ports),
            Err(error) => found
                .unread
                .push(format!("{name} prints no rules ({error})")),
        }
    }
    // nft prints the rules of iptables too.
    found.led.sort_by_key(|(_, port)| *port);
    found.led.dedup_by_key(|(_, port)| *port);
    found
}

impl Redirections {
    fn read(&mut self, name: &'static str, rules: &str, ports: &BTreeSet<u16>) {
        for rule in rules.lines() {
            match Led::by(rule) {
                Led::Nothing => {}
                Led::Ports(led) => {
                    let led = ports
                        .iter()
                        .filter(|port| led.iter().any(|range| range.contains(port)));
                    self.led.extend(led.map(|port| (name, *port)));
                }
                Led::Unread => self.unread.push(format!("`{}` of {name}", rule.trim())),
            }
        }
    }
}

/// What a rule leads elsewhere.
#[derive(Debug, Eq, PartialEq)]
enum Led {
    Nothing,
    Ports(Vec<std::ops::RangeInclusive<u16>>),
    /// It leads elsewhere, and names its ports in a way that is not read here, or names none.
    Unread,
}

impl Led {
    fn by(rule: &str) -> Self {
        let rule = rule.to_lowercase();
        let words: Vec<_> = rule.split_whitespace().collect();
        let leads = ["dnat", "redirect"].iter().any(|word| words.contains(word));
        let is_tcp = words.contains(&"tcp")
            || !["udp", "icmp", "sctp"]
                .iter()
                .any(|word| words.contains(word));
        if !leads || !is_tcp {
            return Self::Nothing;
        }
        let odd = ["!=", "!", "map", "vmap"];
        let port = words
            .iter()
            .position(|word| ["dport", "--dport", "--dports"].contains(word));
        let Some(port) = port.filter(|port| {
            let before = port.checked_sub(1).and_then(|before| words.get(before));
            let behind = words.get(port + 1);
            !before
                .into_iter()
                .chain(behind)
                .any(|word| odd.contains(word))
        }) else {
            return Self::Unread;
        };
        let rest = words.get(port + 1..).unwrap_or_default().join(" ");
        let named = match rest.strip_prefix('{') {
            Some(set) => set.split('}').next(),
            None => rest.split_whitespace().next(),
        };
        let ranges = named.unwrap_or_default().split(',').map(|ports| {
            let (first, last) = ports.split_once([':', '-']).unwrap_or((ports, ports));
            let [first, last] = [first, last].map(|end| end.trim().parse::<u16>().ok());
            Some(first?..=last?)
        });
        ranges
            .collect::<Option<_>>()
            .map_or(Self::Unread, Self::Ports)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_leads_the_ports_elsewhere_that_it_names() {
        for (rule, led) in [
            (
                "-A DOCKER ! -i docker0 -p tcp -m tcp --dport 443 -j DNAT --to-destination 172.17.0.2:443",
                Led::Ports(vec![443..=443]),
            ),
            (
                "-A PREROUTING -p tcp -m multiport --dports 80,400:500 -j REDIRECT --to-ports 8443",
                Led::Ports(vec![80..=80, 400..=500]),
            ),
            (
                "tcp dport { 80, 8000-8443 } dnat to 192.0.2.9",
                Led::Ports(vec![80..=80, 8000..=8443]),
            ),
            (
                "tcp dport 80-1024 redirect to :8443",
                Led::Ports(vec![80..=1024]),
            ),
            ("tcp dport 443 accept", Led::Nothing),
            ("udp dport 443 dnat to 192.0.2.9", Led::Nothing),
            (":MY-DNAT - [0:0]", Led::Nothing),
            (
                "-A PREROUTING -d 203.0.113.10/32 -j DNAT --to-destination 10.0.0.2",
                Led::Unread,
            ),
            (
                "-A PREROUTING -p tcp -m tcp ! --dport 22 -j DNAT --to-destination 10.0.0.2",
                Led::Unread,
            ),
            ("tcp dport != 22 dnat to 10.0.0.2", Led::Unread),
            ("tcp dport @served dnat to 10.0.0.2", Led::Unread),
            ("dnat ip to tcp dport map { 443 : 10.0.0.2 }", Led::Unread),
        ] {
            assert_eq!(Led::by(rule), led, "{rule}");
        }
    }
}
