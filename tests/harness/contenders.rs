//! What others use for the same job: xdp-filter's programs, nftables, ipset with iptables.

use std::path::PathBuf;
use std::process::Command;

use aya::programs::Xdp;
use aya::{Ebpf, EbpfLoader};
use pullgate::xdp::uninterrupted;

use crate::feed::IPS_V4;
use crate::net::{DIRECT, Host, Network};
use crate::traffic::park;

/// A program of xdp-filter (Debian's xdp-tools) that denies by default.
pub struct XdpFilter {
    name: &'static str,
    ebpf: Ebpf,
}

impl XdpFilter {
    /// Loads those that look at addresses; its own loader fails on kernels of 2025.
    #[must_use]
    pub fn load_all(network: &Network) -> Vec<Self> {
        XDP_FILTERS
            .into_iter()
            .map(|name| {
                let pins = network.path(format!("bpf/{name}"));
                std::fs::create_dir_all(&pins).unwrap();
                let object = PathBuf::from(format!("{XDP_FILTER_OBJECTS}/{name}.o"));
                let mut loader = EbpfLoader::new();
                let mut ebpf = loader
                    .default_map_pin_directory(pins)
                    .load_file(object)
                    .unwrap();
                for (_, program) in ebpf.programs_mut() {
                    let program: &mut Xdp = program.try_into().unwrap();
                    uninterrupted(|| program.load()).unwrap();
                    park(network, &name.replace("xdpfilt", "x"), program);
                }
                Self { name, ebpf }
            })
            .collect()
    }

    /// The name of its object.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The loaded program.
    #[must_use]
    pub fn program(&self) -> &Xdp {
        let (_, program) = self.ebpf.programs().next().unwrap();
        program.try_into().unwrap()
    }
}

/// A firewall that drops strangers on [`DIRECT`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Firewall {
    /// ipset, asked by iptables in INPUT.
    Ipset,
    /// An nftables set, asked at ingress of the interface.
    NftIngress,
    /// An nftables set, asked in the input hook.
    NftInput,
}

impl Firewall {
    /// Every firewall.
    pub const ALL: [Self; 3] = [Self::NftIngress, Self::NftInput, Self::Ipset];

    /// The words for it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Ipset => "ipset and iptables",
            Self::NftIngress => "nftables netdev ingress",
            Self::NftInput => "nftables input",
        }
    }

    /// Sets it up in the origin.
    ///
    /// # Errors
    ///
    /// Returns the tool's reason, if this kernel has not what it takes.
    pub fn set_up(self, network: &Network) -> Result<Rules<'_>, String> {
        let ranges: Vec<_> = IPS_V4.lines().collect();
        let script = match self {
            Self::Ipset => {
                let add = ranges
                    .iter()
                    .map(|range| format!("ipset add edges {range} &&"));
                let add: Vec<_> = add.collect();
                format!(
                    "ipset create edges hash:net && {} iptables -A INPUT -i {DIRECT} -p tcp \
                     --dport 443 -m set ! --match-set edges src -j DROP",
                    add.join(" ")
                )
            }
            Self::NftIngress => {
                let hook = format!("hook ingress device {DIRECT} priority 0");
                nft("netdev", &hook, "", &ranges)
            }
            Self::NftInput => {
                let interface = format!("iifname {DIRECT} ");
                nft("inet", "hook input priority 0", &interface, &ranges)
            }
        };
        let rules = Rules {
            firewall: self,
            network,
        };
        let output = network.output(Host::Origin, &["sh", "-c", &script]);
        if output.status.success() {
            Ok(rules)
        } else {
            Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
        }
    }
}

/// The command for a set of ranges, asked in a hook.
fn nft(family: &str, hook: &str, interface: &str, ranges: &[&str]) -> String {
    let elements = ranges.join(", ");
    format!(
        "nft 'table {family} bench {{ set edges {{ type ipv4_addr; flags interval; elements = {{ \
         {elements} }}; }}; chain in {{ type filter {hook}; policy accept; {interface}tcp dport \
         443 ip saddr != @edges counter drop; }}; }}'"
    )
}

/// An active firewall; gone when dropped.
pub struct Rules<'a> {
    firewall: Firewall,
    network: &'a Network,
}

impl Rules<'_> {
    /// How many packets it has dropped.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        let words: &[&str] = match self.firewall {
            Firewall::Ipset => &["iptables", "-nvxL", "INPUT"],
            Firewall::NftIngress | Firewall::NftInput => &["nft", "list", "ruleset"],
        };
        let shown = self.network.output(Host::Origin, words).stdout;
        let shown = String::from_utf8(shown).unwrap();
        let number = match self.firewall {
            Firewall::Ipset => {
                let rule = shown.lines().find(|line| line.contains("edges"));
                rule.and_then(|rule| rule.split_whitespace().next())
            }
            Firewall::NftIngress | Firewall::NftInput => {
                let (_, behind) = shown.split_once("counter packets ").unwrap();
                behind.split_whitespace().next()
            }
        };
        number.unwrap().parse().unwrap()
    }
}

impl Drop for Rules<'_> {
    fn drop(&mut self) {
        let script = match self.firewall {
            Firewall::Ipset => "iptables -F INPUT; ipset destroy edges",
            Firewall::NftIngress | Firewall::NftInput => "nft flush ruleset",
        };
        let mut command: Command = self.network.command(Host::Origin, "sh");
        // What cannot be removed goes with the namespace.
        drop(command.args(["-c", script]).output());
    }
}

/// The packages that all of these come from, with their versions, as Debian has them.
#[must_use]
pub fn versions() -> Vec<String> {
    let mut asked = Command::new("dpkg-query");
    asked.args(["--show", "--showformat", "${Package} ${Version}\n"]);
    let output = asked.args(PACKAGES).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    said.lines().map(str::to_owned).collect()
}

const PACKAGES: [&str; 4] = ["xdp-tools", "nftables", "iptables", "ipset"];
/// Where Debian's xdp-tools puts its objects.
const XDP_FILTER_OBJECTS: &str = "/usr/lib/x86_64-linux-gnu/bpf";
/// Those that look at addresses, ports, or both, and drop what they do not know.
const XDP_FILTERS: [&str; 3] = ["xdpfilt_dny_ip", "xdpfilt_dny_tcp", "xdpfilt_dny_all"];
