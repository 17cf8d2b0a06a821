//! By which interfaces strangers can come in, and where to attach so that each of them is covered.
//!
//! Pure: what netlink reports and the configuration in, [`Targets`] out. Interfaces are stacked (a
//! VLAN on a bond, a bridge over a port), and a program sees the frames of everything above it: it
//! is attached to the lowest interface that carries the frames, and those above are covered. The
//! kernel demands as much, for it refuses a program below another one.

use std::collections::BTreeSet;
use std::io;

use super::XdpError;
use crate::config::{self, Interfaces};
use crate::host::netlink::{self, Interface, InterfaceKind};
use crate::observe::Finding;

/// The network as the kernel describes it at one moment.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Topology {
    interfaces: Vec<Interface>,
    uplinks: netlink::Uplinks,
    /// Interfaces, by index, at which this host can be addressed.
    addressed: BTreeSet<u32>,
}

/// What was learned of interfaces before.
#[derive(Clone, Copy)]
pub(super) struct History<'a> {
    /// Those that have led to the internet.
    pub(super) uplinks: &'a BTreeSet<String>,
    /// Those that have our link.
    pub(super) linked: &'a [String],
    /// Those that refuse the program, and so cover nothing above them.
    pub(super) refused: &'a BTreeSet<String>,
}

/// What is to be filtered.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Targets {
    /// Where to attach, lower interfaces before those that are stacked on them.
    pub(super) attach: Vec<Interface>,
    /// Named by the configuration or remembered, but not there.
    pub(super) missing: Vec<String>,
}

impl Topology {
    /// Looks at all of it.
    pub(super) fn read() -> io::Result<Self> {
        Ok(Self {
            interfaces: netlink::interfaces()?,
            uplinks: netlink::uplinks()?,
            addressed: netlink::addressed()?,
        })
    }

    /// Looks at the interfaces again; a routing table may hold a million routes.
    pub(super) fn with_new_interfaces(&self) -> io::Result<Self> {
        Ok(Self {
            interfaces: netlink::interfaces()?,
            uplinks: self.uplinks.clone(),
            addressed: netlink::addressed()?,
        })
    }

    /// All interfaces.
    pub(super) fn interfaces(&self) -> &[Interface] {
        &self.interfaces
    }

    /// The interface of that name.
    pub(super) fn named(&self, name: &str) -> Option<&Interface> {
        self.interfaces
            .iter()
            .find(|interface| interface.name == name)
    }

    /// The interfaces by which strangers can come in, whatever is configured: those that lead to the
    /// internet.
    ///
    /// A tunnel that only a table of its own leads to (wg-quick, Tailscale) is a VPN's: what arrives
    /// by it was let in by its other end. An Ethernet interface that another table leads to is one
    /// uplink of several.
    pub(super) fn exposed(&self) -> impl Iterator<Item = &Interface> {
        self.interfaces
            .iter()
            .filter(|interface| self.is_exposed(interface))
    }

    fn is_exposed(&self, interface: &Interface) -> bool {
        let netlink::Uplinks { main, other } = &self.uplinks;
        main.contains(&interface.index) || interface.is_ethernet && other.contains(&interface.index)
    }

    /// Picks what `settings` are for.
    ///
    /// Under `"auto"`, an interface that once led to the internet stays a target: routes come and go
    /// with leases, and at boot they come last.
    pub(super) fn targets(
        &self,
        settings: &config::FilterSettings,
        history: History<'_>,
    ) -> Targets {
        let mut targets = Targets::default();
        let mut wanted: Vec<&Interface> = Vec::new();
        let mut missing = |name: &String| targets.missing.push(name.clone());
        match &settings.interfaces {
            Interfaces::Auto => {
                let exposed = self.exposed().map(|interface| self.carrier(interface));
                wanted.extend(exposed.filter(|interface| !self.has_no_ports(interface)));
                for name in history.uplinks {
                    match self.named(name).map(|interface| self.bond_of(interface)) {
                        // Guests behind a bridge are not this host's; the bridge is judged by itself.
                        Some(port) if self.is_bridge_port(port) => {}
                        Some(interface) if self.has_no_ports(interface) => missing(name),
                        Some(interface) => wanted.push(interface),
                        None => missing(name),
                    }
                }
                let linked = history.linked.iter().filter_map(|name| self.named(name));
                wanted.extend(linked.filter(|interface| !self.is_bridge_port(interface)));
                wanted.retain(|interface| interface.is_ethernet);
            }
            Interfaces::Named(names) => {
                for name in names.iter().map(|name| &name.value) {
                    match self.named(name).map(|interface| self.bond_of(interface)) {
                        Some(interface) if self.has_no_ports(interface) => missing(name),
                        Some(interface) => wanted.push(interface),
                        None => missing(name),
                    }
                }
            }
        }
        wanted.sort_by_key(|interface| (self.depth(interface, DEPTH_MAX), interface.index));
        wanted.dedup_by_key(|interface| interface.index);
        let mut covering = BTreeSet::new();
        let mut hidden = Vec::new();
        for interface in wanted {
            if self.cover(interface, &covering).is_some() {
                continue;
            }
            if history.refused.contains(&interface.name) {
                hidden.extend(self.stacked_on(interface));
            } else {
                covering.insert(interface.index);
            }
            targets.attach.push(interface.clone());
        }
        // Where the carrier of uplinks refuses the program, each of them may take it.
        for upper in hidden.into_iter().filter(|upper| self.is_exposed(upper)) {
            if self.cover(upper, &covering).is_none() {
                covering.insert(upper.index);
                targets.attach.push(upper.clone());
            }
        }
        targets
    }

    /// The attached interface whose program sees all frames of `interface`: itself, or a lower one.
    pub(super) fn cover(
        &self,
        interface: &Interface,
        attached: &BTreeSet<u32>,
    ) -> Option<&Interface> {
        self.cover_within(interface, attached, DEPTH_MAX)
    }

    fn cover_within(
        &self,
        interface: &Interface,
        attached: &BTreeSet<u32>,
        depth: u32,
    ) -> Option<&Interface> {
        if attached.contains(&interface.index) {
            return self.at(interface.index);
        }
        let depth = depth.checked_sub(1)?;
        if let Some(lower) = self.lower(interface) {
            return self.cover_within(lower, attached, depth);
        }
        let bond = self.bond_of(interface);
        if bond.index != interface.index {
            return self.cover_within(bond, attached, depth);
        }
        // The frames of a switch come from all its ports; a container's are no stranger's.
        let mut by = None;
        for port in self.ports(interface) {
            match self.cover_within(port, attached, depth) {
                Some(lower) => by = Some(lower),
                None if port.kind == InterfaceKind::Veth => {}
                None => return None,
            }
        }
        by
    }

    /// The interfaces above `interface`, whose frames its program sees as well.
    pub(super) fn stacked_on<'a>(
        &'a self,
        interface: &'a Interface,
    ) -> impl Iterator<Item = &'a Interface> {
        self.interfaces
            .iter()
            .filter(|upper| upper.index != interface.index && self.is_above(upper, interface))
    }

    fn is_above(&self, upper: &Interface, interface: &Interface) -> bool {
        let mut below = vec![upper];
        for _ in 0..DEPTH_MAX {
            let next: Vec<_> = below
                .iter()
                .flat_map(|it| self.lower(it).into_iter().chain(self.ports(it)))
                .collect();
            if next.iter().any(|lower| lower.index == interface.index) {
                return true;
            }
            below = next;
        }
        false
    }

    /// The lowest interface that carries all frames of `interface`, and no others' than strangers can
    /// send: a private LAN on the same card is not to be filtered.
    fn carrier<'a>(&'a self, interface: &'a Interface) -> &'a Interface {
        let mut carrier = interface;
        for _ in 0..DEPTH_MAX {
            match self.lower(carrier) {
                Some(lower) if self.carries_uplinks_only(lower) => carrier = lower,
                Some(_) => return carrier,
                None => return self.bond_of(carrier),
            }
        }
        carrier
    }

    fn carries_uplinks_only(&self, lower: &Interface) -> bool {
        let is_private = !self.is_exposed(lower) && self.addressed.contains(&lower.index);
        !is_private && self.stacked_on(lower).all(|upper| self.is_exposed(upper))
    }

    /// Whether it is a bond without ports. A program on it would keep ports out whose drivers do not
    /// take it, and there are no frames to judge yet.
    fn has_no_ports(&self, interface: &Interface) -> bool {
        interface.kind == InterfaceKind::Bond && self.ports_of(interface).next().is_none()
    }

    /// Whether it is a port of a bridge.
    pub(super) fn is_bridge_port(&self, interface: &Interface) -> bool {
        let controller = interface.controller.and_then(|index| self.at(index));
        controller.is_some_and(|controller| controller.kind == InterfaceKind::Bridge)
    }

    /// The bond that `interface` is a port of, or itself: a program on such a port would keep one off the
    /// bond.
    fn bond_of<'a>(&'a self, interface: &'a Interface) -> &'a Interface {
        let controller = interface.controller.and_then(|index| self.at(index));
        controller
            .filter(|controller| controller.kind == InterfaceKind::Bond)
            .unwrap_or(interface)
    }

    /// The name of the interface with this index.
    pub(super) fn name_of(&self, index: u32) -> Option<&str> {
        self.at(index).map(|interface| interface.name.as_str())
    }

    fn lower(&self, interface: &Interface) -> Option<&Interface> {
        self.at(interface.lower?)
    }

    /// The interfaces below one that has ports, each of which takes a program.
    fn ports<'a>(&'a self, interface: &Interface) -> impl Iterator<Item = &'a Interface> {
        let has_ports = matches!(interface.kind, InterfaceKind::Bridge | InterfaceKind::Team);
        self.ports_of(interface).filter(move |_| has_ports)
    }

    /// The ports of a bond, bridge or team.
    pub(super) fn ports_of<'a>(
        &'a self,
        interface: &Interface,
    ) -> impl Iterator<Item = &'a Interface> {
        let index = interface.index;
        self.interfaces
            .iter()
            .filter(move |port| port.controller == Some(index))
    }

    /// How many interfaces lie below.
    fn depth(&self, interface: &Interface, most: u32) -> u32 {
        let Some(most) = most.checked_sub(1) else {
            return 0;
        };
        let below = self
            .lower(interface)
            .into_iter()
            .chain(self.ports(interface));
        below
            .map(|lower| 1 + self.depth(lower, most))
            .max()
            .unwrap_or(0)
    }

    fn at(&self, index: u32) -> Option<&Interface> {
        self.interfaces
            .iter()
            .find(|interface| interface.index == index)
    }
}

/// Finds a named interface whose frames cannot be judged.
///
/// # Errors
///
/// Returns the interface, with its place in the configuration.
pub fn check_kinds(settings: &config::FilterSettings) -> Result<(), config::ConfigError> {
    let Interfaces::Named(names) = &settings.interfaces else {
        return Ok(());
    };
    let all = netlink::interfaces().unwrap_or_default();
    for name in names {
        let found = all.iter().find(|interface| interface.name == name.value);
        if found.is_some_and(|interface| !interface.is_ethernet) {
            let interface = name.value.clone();
            return Err(name.place.error(XdpError::NotEthernet { interface }));
        }
    }
    Ok(())
}

/// Finds what an operator would want to know of the interfaces before a role runs: names that do not
/// exist, and interfaces that strangers can come in by and that are not named.
///
/// # Errors
///
/// Returns the first name, with its place in the configuration, if none of them exists.
pub fn check_interfaces(
    settings: &config::FilterSettings,
) -> Result<Vec<Finding>, config::ConfigError> {
    // A kernel that does not answer is no reason to warn.
    let topology = Topology::read().unwrap_or_default();
    let nothing = BTreeSet::new();
    let history = History {
        uplinks: &nothing,
        linked: &[],
        refused: &nothing,
    };
    let Targets { attach, missing } = topology.targets(settings, history);
    let Interfaces::Named(names) = &settings.interfaces else {
        return Ok(Vec::new());
    };
    let mut findings = Vec::new();
    for name in names.iter().filter(|name| missing.contains(&name.value)) {
        let text = format!("interface `{}` does not exist", name.value);
        let finding =
            Finding::warning("interface-missing", text).remedy("`ip link` lists those that do");
        if attach.is_empty() {
            return Err(name.place.error(finding));
        }
        findings.push(finding.at(&name.place));
    }
    let attached = attach.iter().map(|interface| interface.index).collect();
    for interface in topology.exposed() {
        if topology.cover(interface, &attached).is_none() {
            let text = format!(
                "strangers can come in by `{}` (a route to the internet leads there), and \
                 `filter.interfaces` does not name it",
                interface.name
            );
            findings.push(Finding::warning("interface-not-named", text).remedy("add it"));
        }
    }
    Ok(findings)
}

/// Interfaces on top of each other: the kernel's own MAX_NEST_DEV, net/core/dev.c.
const DEPTH_MAX: u32 = 8;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    #[test]
    fn a_vlan_with_the_default_route_is_covered_by_its_parent() {
        let network = network([card("eth0"), vlan("eth0.10", 1)], [2]);

        let targets = network.targets(&auto(), nothing());

        assert_eq!(names(&targets), ["eth0"]);
        assert_eq!(covered_by(&network, "eth0.10", &targets), Some("eth0"));
    }

    #[test]
    fn a_private_lan_on_the_same_card_is_not_filtered() {
        let beside = network([card("eth0"), vlan("eth0.10", 1), vlan("eth0.20", 1)], [2]);
        assert_eq!(names(&beside.targets(&auto(), nothing())), ["eth0.10"]);

        let mut below = network([card("eth0"), vlan("eth0.10", 1)], [2]);
        below.addressed.insert(1);
        assert_eq!(names(&below.targets(&auto(), nothing())), ["eth0.10"]);

        let both = network(
            [card("eth0"), vlan("eth0.10", 1), vlan("eth0.20", 1)],
            [2, 3],
        );
        assert_eq!(names(&both.targets(&auto(), nothing())), ["eth0"]);
    }

    #[test]
    fn what_a_refusing_carrier_would_have_covered_is_attached_by_itself() {
        let network = network([card("eth0"), vlan("eth0.10", 1)], [2]);
        let refused = BTreeSet::from(["eth0".to_owned()]);
        let history = History {
            refused: &refused,
            ..nothing()
        };

        let targets = network.targets(&auto(), history);

        assert_eq!(names(&targets), ["eth0", "eth0.10"]);
    }

    #[test]
    fn a_bond_is_waited_for_until_it_has_ports() {
        let bond = of_kind("bond0", InterfaceKind::Bond);
        let empty = network([card("eth0"), bond.clone()], []);
        let targets = empty.targets(&named(&["bond0"]), nothing());
        assert_eq!(
            (names(&targets), targets.missing.clone()),
            (vec![], vec!["bond0".to_owned()])
        );

        let whole = network([port("eth0", 2), bond], []);
        assert_eq!(
            names(&whole.targets(&named(&["bond0"]), nothing())),
            ["bond0"]
        );
    }

    #[test]
    fn a_remembered_uplink_that_is_a_bridge_port_now_is_left_to_its_bridge() {
        let bridge = of_kind("br0", InterfaceKind::Bridge);
        let network = network([port("eth0", 2), bridge, port("tap0", 2)], [2]);
        let uplinks = BTreeSet::from(["eth0".to_owned()]);
        let history = History {
            uplinks: &uplinks,
            ..nothing()
        };

        assert_eq!(names(&network.targets(&auto(), history)), ["br0"]);
    }

    #[test]
    fn a_named_vlan_is_attached_to_itself_and_its_parent_is_not_covered() {
        let network = network([card("eth0"), vlan("eth0.10", 1)], [1, 2]);

        let targets = network.targets(&named(&["eth0.10"]), nothing());

        assert_eq!(names(&targets), ["eth0.10"]);
        assert_eq!(covered_by(&network, "eth0", &targets), None);
    }

    #[test]
    fn a_parent_and_its_vlan_need_one_program_in_whatever_order_they_are_named() {
        let network = network([vlan("eth0.10", 2), card("eth0")], []);

        for order in [["eth0", "eth0.10"], ["eth0.10", "eth0"]] {
            let targets = network.targets(&named(&order), nothing());

            assert_eq!(names(&targets), ["eth0"], "{order:?}");
        }
    }

    #[test]
    fn a_bond_stands_for_its_ports_and_for_the_vlans_on_it() {
        let bond = of_kind("bond0", InterfaceKind::Bond);
        let network = network(
            [port("eth0", 3), port("eth1", 3), bond, vlan("wan", 3)],
            [4],
        );

        for settings in [auto(), named(&["eth1", "wan", "bond0"])] {
            let targets = network.targets(&settings, nothing());

            assert_eq!(names(&targets), ["bond0"]);
            assert_eq!(covered_by(&network, "wan", &targets), Some("bond0"));
            assert_eq!(covered_by(&network, "eth0", &targets), Some("bond0"));
        }
    }

    #[test]
    fn a_bridge_is_covered_by_its_ports_if_all_of_them_are() {
        let bridge = of_kind("br0", InterfaceKind::Bridge);
        let container = Interface {
            kind: InterfaceKind::Veth,
            ..port("veth1", 2)
        };
        let guest = port("tap0", 2);
        let alone = network([port("eth0", 2), bridge.clone(), container], [2]);
        let shared = network([port("eth0", 2), bridge, guest], [2]);
        let settings = named(&["eth0"]);

        let targets = alone.targets(&settings, nothing());
        assert_eq!(covered_by(&alone, "br0", &targets), Some("eth0"));
        let of_shared = shared.targets(&settings, nothing());
        assert_eq!(covered_by(&shared, "br0", &of_shared), None);
        // Named both, the lower comes first: the kernel takes them in no other order.
        let of_both = shared.targets(&named(&["br0", "eth0"]), nothing());
        assert_eq!(names(&of_both), ["eth0", "br0"]);
        // By itself the bridge is the target, lest guests are filtered too.
        let automatic = shared.targets(&auto(), nothing());
        assert_eq!(names(&automatic), ["br0"]);
    }

    #[test]
    fn a_tunnel_counts_if_the_main_table_leads_to_it_and_a_card_in_any() {
        let tunnel = || Interface {
            is_ethernet: false,
            ..card("wg0")
        };
        let mut by_rule = network([card("eth0"), tunnel(), card("eth1")], [1]);
        by_rule.uplinks.other = BTreeSet::from([2, 3]);
        let exposed = |network: &Topology| {
            let exposed = network.exposed();
            exposed.map(|i| i.name.clone()).collect::<Vec<_>>()
        };

        assert_eq!(exposed(&by_rule), ["eth0", "eth1"]);
        let tunnelled = network([card("eth0"), tunnel()], [2]);
        assert_eq!(exposed(&tunnelled), ["wg0"]);
        let targets = tunnelled.targets(&auto(), nothing());
        assert_eq!(covered_by(&tunnelled, "wg0", &targets), None);
    }

    #[test]
    fn an_uplink_is_remembered_and_waited_for_and_a_lan_is_left_alone() {
        let network = network([card("eth0"), card("lan0")], []);
        let remembered = BTreeSet::from(["eth0".to_owned(), "eth9".to_owned()]);

        let history = History {
            uplinks: &remembered,
            ..nothing()
        };

        let targets = network.targets(&auto(), history);

        assert_eq!(names(&targets), ["eth0"]);
        assert_eq!(targets.missing, ["eth9"]);
    }

    #[test]
    fn interfaces_that_claim_to_lie_on_each_other_end_no_search() {
        let network = network([vlan("a", 2), vlan("b", 1)], [1, 2]);

        let targets = network.targets(&auto(), nothing());

        assert_eq!(targets.attach.len(), 1);
        assert_eq!(network.stacked_on(&network.interfaces[0]).count(), 1);
    }

    fn network<const N: usize, const M: usize>(
        interfaces: [Interface; N],
        uplinks: [u32; M],
    ) -> Topology {
        let numbered = interfaces.into_iter().zip(1..);
        Topology {
            interfaces: numbered
                .map(|(interface, index)| Interface { index, ..interface })
                .collect(),
            uplinks: netlink::Uplinks {
                main: uplinks.into(),
                other: BTreeSet::new(),
            },
            addressed: BTreeSet::new(),
        }
    }

    fn nothing() -> History<'static> {
        static NOTHING: BTreeSet<String> = BTreeSet::new();
        History {
            uplinks: &NOTHING,
            linked: &[],
            refused: &NOTHING,
        }
    }

    fn card(name: &str) -> Interface {
        of_kind(name, InterfaceKind::Other)
    }

    fn vlan(name: &str, lower: u32) -> Interface {
        Interface {
            lower: Some(lower),
            ..of_kind(name, InterfaceKind::Stacked)
        }
    }

    fn port(name: &str, controller: u32) -> Interface {
        Interface {
            controller: Some(controller),
            ..card(name)
        }
    }

    fn of_kind(name: &str, kind: InterfaceKind) -> Interface {
        Interface {
            index: 0,
            name: name.to_owned(),
            is_ethernet: true,
            kind,
            lower: None,
            controller: None,
            mtu: 1500,
            unwraps: None,
        }
    }

    fn auto() -> config::FilterSettings {
        filter("interfaces = \"auto\"")
    }

    fn named(names: &[&str]) -> config::FilterSettings {
        filter(&format!("interfaces = {names:?}"))
    }

    fn filter(line: &str) -> config::FilterSettings {
        let text = format!("[filter]\n{line}\n");
        let config = Config::parse(Path::new("pullgate.toml"), &text).unwrap();
        config.live.filter.unwrap()
    }

    fn names(targets: &Targets) -> Vec<&str> {
        let attach = targets.attach.iter();
        attach.map(|interface| interface.name.as_str()).collect()
    }

    fn covered_by<'a>(network: &'a Topology, name: &str, targets: &Targets) -> Option<&'a str> {
        let attached = targets.attach.iter().map(|interface| interface.index);
        let interface = network.named(name).unwrap();
        let by = network.cover(interface, &attached.collect())?;
        Some(by.name.as_str())
    }
}
