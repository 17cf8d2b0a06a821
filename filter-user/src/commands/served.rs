//! What the web servers of this host serve, as their own tools report; and where the firewall redirects a port.

mod apache;
mod caddy;
mod nginx;
mod site;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

pub(super) use self::site::{ServedSite, comment};
use crate::host::netlink::{self, Connection};
use crate::host::process::holder_of;

/// A web server that is installed.
pub(super) struct WebServer {
    /// Its tool.
    pub(super) program: PathBuf,
    /// The sites that speak TLS, or why they cannot be read.
    pub(super) sites: Result<Vec<ServedSite>, String>,
    /// The names of its processes.
    processes: &'static [&'static str],
}

impl WebServer {
    /// Whether a process of it has a port that its sites are on; none, if they are not known.
    fn listens(&self, listening: &[Connection]) -> Option<bool> {
        let sites = self.sites.as_deref().unwrap_or_default();
        let listens = sites.iter().flat_map(|site| &site.listens);
        let ports: BTreeSet<_> = listens.map(|listen| listen.port()).collect();
        let here = listening
            .iter()
            .filter(|socket| ports.contains(&socket.local.port()));
        let is_ours = |name: &str| self.processes.contains(&name) || name == "systemd";
        let mut holders = here.filter_map(|socket| holder_of(socket.inode));
        (!ports.is_empty()).then(|| holders.any(|(_, name)| is_ours(&name)))
    }
}

/// The web servers that serve, and those that do not: one that is installed and stopped does not, while another
/// listens.
pub(super) fn web_servers() -> (Vec<WebServer>, Vec<WebServer>) {
    let installed = installed();
    // A kernel that does not answer is no reason to leave sites out.
    let sockets = netlink::listening_sockets().ok();
    let listens = installed
        .iter()
        .map(|server| server.listens(sockets.as_deref()?));
    let listens: Vec<_> = listens.collect();
    let is_one_up = listens.contains(&Some(true));
    let (serving, stopped): (Vec<_>, Vec<_>) = installed
        .into_iter()
        .zip(listens)
        .partition(|(_, listens)| *listens != Some(false) || !is_one_up);
    let servers =
        |pairs: Vec<(WebServer, Option<bool>)>| pairs.into_iter().map(|(server, _)| server);
    (servers(serving).collect(), servers(stopped).collect())
}

/// The web servers whose tools print what they serve.
fn installed() -> Vec<WebServer> {
    let installed = KNOWN.iter().filter_map(|known| {
        let program = known.tools.iter().find_map(|name| tool(name))?;
        let sites = run(&program, known.arguments).and_then(|text| (known.read)(&text));
        Some(WebServer {
            program,
            sites,
            processes: known.processes,
        })
    });
    installed.collect()
}

/// Those of these TCP ports that a rule of the firewall leads elsewhere, each with the tool that prints it.
pub(super) fn redirected(ports: &BTreeSet<u16>) -> Vec<(&'static str, u16)> {
    let mut redirected = Vec::new();
    for (name, arguments) in [
        ("iptables-save", ["-t", "nat"].as_slice()),
        ("ip6tables-save", ["-t", "nat"].as_slice()),
        ("nft", ["list", "ruleset"].as_slice()),
    ] {
        let rules = tool(name).and_then(|program| run(&program, arguments).ok());
        let rules = rules.unwrap_or_default();
        let led_elsewhere = ports.iter().filter(|port| is_redirected(&rules, **port));
        redirected.extend(led_elsewhere.map(|port| (name, *port)));
    }
    // nft prints the rules of iptables too.
    redirected.sort_by_key(|(_, port)| *port);
    redirected.dedup_by_key(|(_, port)| *port);
    redirected
}

/// Whether a rule of the firewall leads a TCP port elsewhere, as far as a reader of single rules can tell: a named set
/// is not looked up.
fn is_redirected(rules: &str, port: u16) -> bool {
    rules.lines().any(|rule| {
        let rule = rule.to_lowercase();
        let leads = ["dnat", "redirect"].iter().any(|word| rule.contains(word));
        leads && rule.contains("tcp") && has_port(&rule, port)
    })
}

/// `dport 443`, `--dports 80,443,8000:8100`, or `dport { 80, 443, 8000-8100 }`.
fn has_port(rule: &str, port: u16) -> bool {
    let Some((_, rest)) = rule.split_once("dport") else {
        return false;
    };
    let rest = rest.strip_prefix('s').unwrap_or(rest).trim_start();
    let ports = match rest.strip_prefix('{') {
        Some(set) => set.split('}').next(),
        None => rest.split_whitespace().next(),
    };
    ports.unwrap_or_default().split(',').any(|ports| {
        let (first, last) = ports.split_once([':', '-']).unwrap_or((ports, ports));
        let [first, last] = [first, last].map(|end| end.trim().parse::<u16>());
        matches!((first, last), (Ok(first), Ok(last)) if (first..=last).contains(&port))
    })
}

/// How the sites of a web server are read from what a tool of it prints.
type Read = fn(&str) -> Result<Vec<ServedSite>, String>;

/// A web server whose tool prints what it serves.
struct Known {
    /// Names of the tool.
    tools: &'static [&'static str],
    arguments: &'static [&'static str],
    read: Read,
    /// Names of its processes.
    processes: &'static [&'static str],
}

const KNOWN: [Known; 3] = [
    Known {
        tools: &["nginx"],
        arguments: &["-T"],
        read: nginx::sites,
        processes: &["nginx"],
    },
    Known {
        tools: &["apache2ctl", "apachectl"],
        arguments: &["-t", "-D", "DUMP_VHOSTS"],
        read: apache::sites,
        processes: &["apache2", "httpd"],
    },
    Known {
        tools: &["caddy"],
        arguments: &["adapt", "--config", "/etc/caddy/Caddyfile"],
        read: caddy::sites,
        processes: &["caddy"],
    },
];

/// A program of the host's, where its packages put it.
pub(super) fn tool(name: &str) -> Option<PathBuf> {
    let places = ["/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin"];
    let mut places = places.iter().map(|place| Path::new(place).join(name));
    places.find(|place| place.is_file())
}

/// What a program prints, if it ends well and in time.
pub(super) fn run(program: &Path, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new("timeout")
        .arg(PATIENCE)
        .arg(program)
        .args(arguments)
        .output()
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        // nginx names the cause before its last line, behind a time and its process.
        let causes = words.lines().filter_map(|line| line.split_once("[emerg] "));
        let cause = causes.map(|(_, cause)| match cause.split_once(": ") {
            Some((process, cause)) if process.contains('#') => cause,
            Some(_) | None => cause,
        });
        let cause = cause.chain(words.lines().last()).next();
        let cause = cause.unwrap_or("it prints no reason");
        return Err(cause.to_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Seconds for a web server to look at its own configuration.
const PATIENCE: &str = "20";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_leads_the_ports_elsewhere_that_it_names() {
        for (rule, led) in [
            (
                "-A DOCKER ! -i docker0 -p tcp -m tcp --dport 443 -j DNAT --to-destination 172.17.0.2:443",
                true,
            ),
            (
                "-A PREROUTING -p tcp -m multiport --dports 80,443 -j REDIRECT --to-ports 8443",
                true,
            ),
            (
                "-A PREROUTING -p tcp -m multiport --dports 400:500 -j REDIRECT --to-ports 8443",
                true,
            ),
            ("tcp dport { 80, 443 } dnat to 192.0.2.9", true),
            ("tcp dport { 80, 8000-8443 } dnat to 192.0.2.9", false),
            ("tcp dport 80-1024 redirect to :8443", true),
            ("tcp dport 4433 dnat to 192.0.2.9:443", false),
            ("tcp dport 443 accept", false),
            ("udp dport 443 dnat to 192.0.2.9", false),
        ] {
            assert_eq!(is_redirected(rule, 443), led, "{rule}");
        }
    }
}
