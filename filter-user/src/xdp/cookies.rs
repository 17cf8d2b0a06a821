//! Whether the program of an interface answers SYNs with the kernel's cookies, what it offers in them, and why not.

use std::fmt::{self, Display};

use crate::config::{FilterSettings, Mode, SynCookies};
use crate::host::netlink::{self, Interface, InterfaceKind};

/// What an answer to a SYN offers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Answering {
    /// The longest packet that goes out, in bytes.
    mtu: u32,
}

impl Answering {
    /// What the program of an interface offers, if it may answer.
    pub(super) fn of(settings: &FilterSettings, interface: &str) -> Result<Self, LeftToKernel> {
        if settings.syn_cookies == SynCookies::Off {
            return Err(LeftToKernel::Off);
        }
        if settings.mode == Mode::Monitor {
            return Err(LeftToKernel::Monitor);
        }
        let all = netlink::interfaces().map_err(|_unread| LeftToKernel::Unread)?;
        Self::among(&all, settings, interface)
    }

    fn among(
        all: &[Interface],
        settings: &FilterSettings,
        name: &str,
    ) -> Result<Self, LeftToKernel> {
        let mut named = all.iter().filter(|it| it.name == name);
        let interface = named.next().ok_or(LeftToKernel::Absent)?;
        let is_one_of_several = |index| {
            let controller = all.iter().find(|other| other.index == index);
            let kind = controller.map(|other| other.kind);
            matches!(kind, Some(InterfaceKind::Bond | InterfaceKind::Team))
        };
        let is_carrier = |other: &Interface| other.lower == Some(interface.index);
        let is_bridged = |index| !is_one_of_several(index);
        // Of `destinations` it is known that they are this host's.
        if settings.destinations.is_empty() {
            if interface.controller.is_some_and(is_bridged) {
                return Err(LeftToKernel::BridgePort);
            }
            if all.iter().any(is_carrier) {
                return Err(LeftToKernel::Carrier);
            }
        }
        if interface.kind == InterfaceKind::Veth && settings.syn_cookies != SynCookies::On {
            return Err(LeftToKernel::Veth);
        }
        Ok(Self { mtu: interface.mtu })
    }

    /// [`filter_ebpf::abi::MSS`]: what is left beside the headers (RFC 9293 §3.7.1).
    pub(super) fn encoded(self) -> u32 {
        let beside = |headers: u32| self.mtu.saturating_sub(headers).clamp(536, 0xffff);
        beside(20 + 20) | beside(40 + 20) << 16
    }
}

/// Why the SYNs that come in by an interface are left to the kernel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LeftToKernel {
    /// The configuration says so.
    Off,
    /// The interface was not there when its program was loaded.
    Absent,
    /// It is a port of a bridge, behind which guests may be.
    BridgePort,
    /// Other interfaces are stacked on it (VLAN, macvlan, ipvlan), which may be guests' or lead to them.
    Carrier,
    /// Nothing is done in monitor mode, where everything is only counted.
    Monitor,
    /// The kernel did not say which interfaces there are.
    Unread,
    /// It is one end of a pair, whose other end may not take what the program sends: without a program of its own it
    /// does not (`veth_xdp_xmit`, drivers/net/veth.c).
    Veth,
    /// The kernel took no program that answers.
    Refused,
    /// It is a classifier behind another XDP program, and cannot send.
    Classifier,
}

impl Display for LeftToKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "`filter.syn_cookies` is \"off\"",
            Self::Absent => "the interface was not there when its program was loaded",
            Self::BridgePort => "it is a port of a bridge, and `filter.destinations` is empty",
            Self::Carrier => {
                "other interfaces are stacked on it, and `filter.destinations` is empty"
            }
            Self::Monitor => "`filter.mode` is \"monitor\"",
            Self::Unread => "the kernel did not say which interfaces there are",
            Self::Veth => "it is one end of a veth pair",
            Self::Refused => "the kernel takes no program that answers",
            Self::Classifier => "the program is behind another XDP program",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    fn interface(index: u32, kind: InterfaceKind, controller: Option<u32>) -> Interface {
        Interface {
            index,
            name: format!("if{index}"),
            is_ethernet: true,
            kind,
            lower: None,
            controller,
            mtu: 9000,
            unwraps: None,
        }
    }

    fn settings(lines: &str) -> FilterSettings {
        let text = format!("[filter]\ninterfaces = \"auto\"\n{lines}");
        let config = Config::parse(Path::new("pullgate.toml"), &text).unwrap();
        config.live.filter.unwrap()
    }

    #[test]
    fn a_syn_is_answered_where_it_is_this_hosts_and_the_answer_gets_out() {
        let all = [
            interface(1, InterfaceKind::Other, None),
            interface(2, InterfaceKind::Veth, None),
            interface(3, InterfaceKind::Bridge, None),
            interface(4, InterfaceKind::Other, Some(3)),
            interface(5, InterfaceKind::Bond, None),
            interface(6, InterfaceKind::Other, Some(5)),
            interface(8, InterfaceKind::Other, None),
            Interface {
                lower: Some(8),
                ..interface(9, InterfaceKind::Stacked, None)
            },
        ];
        let of = |lines, name| Answering::among(&all, &settings(lines), name).err();
        let named = "destinations = [\"203.0.113.10\"]";
        let on = "syn_cookies = \"on\"";

        assert_eq!(of("", "if1"), None);
        assert_eq!(of("", "if2"), Some(LeftToKernel::Veth));
        assert_eq!(of(on, "if2"), None);
        assert_eq!(of("", "if4"), Some(LeftToKernel::BridgePort));
        assert_eq!(of(on, "if4"), Some(LeftToKernel::BridgePort));
        assert_eq!(of(named, "if4"), None);
        assert_eq!(of("", "if6"), None);
        assert_eq!(of("", "if8"), Some(LeftToKernel::Carrier));
        assert_eq!(of(named, "if8"), None);
        assert_eq!(of("", "if7"), Some(LeftToKernel::Absent));
    }

    #[test]
    fn the_segment_size_is_what_the_headers_leave() {
        let sizes = |mtu| {
            let encoded = Answering { mtu }.encoded();
            (encoded & 0xffff, encoded >> 16)
        };
        assert_eq!(sizes(1500), (1460, 1440));
        assert_eq!(sizes(9000), (8960, 8940));
        // The least that a client takes (RFC 9293 §3.7.1), and the most that the option says.
        assert_eq!(sizes(68), (536, 536));
        assert_eq!(sizes(70_000), (0xffff, 0xffff));
    }
}
