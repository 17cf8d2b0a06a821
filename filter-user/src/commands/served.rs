//! What the web servers of this host serve, and where its firewall leads ports, as their own tools report.

mod apache;
mod caddy;
mod firewall;
mod nginx;
mod site;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

pub(super) use self::firewall::redirections;
pub(super) use self::site::{Listen, ServedSite, comment};
use crate::host::netlink::{self, Connection};
use crate::host::process::holder_of;

/// A web server that is installed.
pub(super) struct WebServer {
    /// Its tool.
    pub(super) program: PathBuf,
    /// The sites that speak TLS, or why they cannot be read.
    pub(super) sites: Result<Vec<ServedSite>, String>,
    /// By which one site's session can open another, if its version has the flaw or is not known.
    pub(super) flaw: Option<String>,
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
            flaw: known.flaw.and_then(|flaw| flaw.of(&program)),
            program,
            sites,
            processes: known.processes,
        })
    });
    installed.collect()
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
    flaw: Option<Flaw>,
}

/// A flaw by which a session of one site opens another that trusts another CA.
#[derive(Clone, Copy)]
struct Flaw {
    /// What it is called.
    name: &'static str,
    /// What its program is called, in what it prints for `-v`.
    software: &'static str,
    /// The first version of each line that is mended; the last line goes on.
    mended: &'static [[u32; 3]],
}

impl Flaw {
    /// Who has it, in words.
    fn of(self, program: &Path) -> Option<String> {
        let output = Command::new("timeout")
            .arg(PATIENCE)
            .arg(program)
            .arg("-v")
            .output();
        let text = output.map_or_else(
            |_unknown| String::new(),
            // nginx prints it to standard error.
            |it| {
                [it.stdout, it.stderr]
                    .map(|text| String::from_utf8_lossy(&text).into_owned())
                    .concat()
            },
        );
        match version(&text, self.software) {
            Some(version) if self.is_mended(version) => None,
            Some([major, minor, patch]) => Some(format!(
                "{} {major}.{minor}.{patch} has {}",
                self.software, self.name
            )),
            None => Some(format!(
                "{} has {} unless it is newer",
                self.software, self.name
            )),
        }
    }

    fn is_mended(self, version: [u32; 3]) -> bool {
        let is_line = |mended: &&[u32; 3]| mended[..2] == version[..2] && version >= **mended;
        self.mended.iter().any(|mended| is_line(&mended))
            || self.mended.last().is_some_and(|last| version >= *last)
    }
}

/// `nginx/1.22.1`, in what a program prints.
fn version(text: &str, software: &str) -> Option<[u32; 3]> {
    let (_, rest) = text.split_once(&format!("{software}/"))?;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next()?.parse().ok();
    Some([next()?, next()?, next()?])
}

const KNOWN: [Known; 3] = [
    Known {
        tools: &["nginx"],
        arguments: &["-T"],
        read: nginx::sites,
        processes: &["nginx"],
        flaw: Some(Flaw {
            name: "CVE-2025-23419",
            software: "nginx",
            mended: &[[1, 26, 3], [1, 27, 4]],
        }),
    },
    Known {
        tools: &["apache2ctl", "apachectl"],
        arguments: &["-t", "-D", "DUMP_VHOSTS"],
        read: apache::sites,
        processes: &["apache2", "httpd"],
        flaw: Some(Flaw {
            name: "CVE-2025-23048",
            software: "Apache",
            mended: &[[2, 4, 64]],
        }),
    },
    Known {
        tools: &["caddy"],
        arguments: &["adapt", "--config", "/etc/caddy/Caddyfile"],
        read: caddy::sites,
        processes: &["caddy"],
        flaw: None,
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
    fn a_flaw_is_known_by_the_version() {
        let flaws = KNOWN.map(|known| known.flaw);
        let [Some(nginx), Some(apache), None] = flaws else {
            unreachable!("Caddy has none");
        };
        for (flaw, text, is_mended) in [
            (nginx, "nginx version: nginx/1.22.1\n", false),
            (nginx, "nginx version: nginx/1.26.2", false),
            (nginx, "nginx version: nginx/1.26.3", true),
            (nginx, "nginx version: nginx/1.27.3", false),
            (nginx, "nginx version: nginx/1.28.0 (x)", true),
            (apache, "Server version: Apache/2.4.63 (Debian)", false),
            (apache, "Server version: Apache/2.4.64 (Debian)", true),
        ] {
            let version = version(text, flaw.software).unwrap();
            assert_eq!(flaw.is_mended(version), is_mended, "{text}");
        }
        assert_eq!(version("openresty", "nginx"), None);
    }
}
