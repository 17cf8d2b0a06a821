//! What the web servers of this host serve, as their own tools report; and where the firewall redirects a port.

mod apache;
mod caddy;
mod nginx;
mod site;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

pub(super) use self::site::{ServedSite, comment};

/// A web server that is installed.
pub(super) struct WebServer {
    /// Its tool.
    pub(super) program: PathBuf,
    /// The sites that speak TLS, or why they cannot be read.
    pub(super) sites: Result<Vec<ServedSite>, String>,
}

/// The web servers whose tools print what they serve.
pub(super) fn web_servers() -> Vec<WebServer> {
    let installed = WEB_SERVERS.iter().filter_map(|(names, arguments, read)| {
        let program = names.iter().find_map(|name| tool(name))?;
        let sites = run(&program, arguments).and_then(|text| read(&text));
        Some(WebServer { program, sites })
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

/// Whether a rule of the firewall leads a TCP port elsewhere, as far as a reader of single rules can tell.
fn is_redirected(rules: &str, port: u16) -> bool {
    rules.lines().any(|rule| {
        let rule = format!("{} ", rule.to_lowercase());
        let leads = ["dnat", "redirect"].iter().any(|word| rule.contains(word));
        rule.contains("tcp") && rule.contains(&format!("dport {port} ")) && leads
    })
}

/// How the sites of a web server are read from what a tool of it prints.
type Read = fn(&str) -> Result<Vec<ServedSite>, String>;

/// Names of the tool, what it is run with, and what
/// reads that.
const WEB_SERVERS: [(&[&str], &[&str], Read); 3] = [
    (&["nginx"], &["-T"], nginx::sites),
    (
        &["apache2ctl", "apachectl"],
        &["-t", "-D", "DUMP_VHOSTS"],
        apache::sites,
    ),
    (
        &["caddy"],
        &["adapt", "--config", "/etc/caddy/Caddyfile"],
        caddy::sites,
    ),
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
