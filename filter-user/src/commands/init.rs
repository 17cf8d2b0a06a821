//! `init`: looks at this host, and writes the configuration that protects it in front of the web server as it
//! stands. What cannot be read is a comment, not a guess.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::output::{complain, print, say, show_json};
use super::served::{ServedSite, comment, redirections, tool, web_servers};
use crate::cli::OutputFormat;
use crate::config::Config;
use crate::gate::{GATE_GROUP, KEY_GROUP, service_groups};
use crate::host::{accounts, file, kernel, netlink};
use crate::report::{EX_CONFIG, EX_SOFTWARE, ExitStatus, Failure};
use crate::xdp;

/// Prints the configuration, or puts it in place.
pub(super) fn execute(target: &Path, write: bool, format: OutputFormat) -> Result<(), Failure> {
    let host = HostFacts::look();
    let configuration = host.configuration();
    // What we write ourselves is read as an operator's would be; not put in place, if it cannot be.
    let parsed = Config::parse(target, &configuration);
    let written = write && parsed.is_ok();
    if written {
        put(target, &configuration)?;
    }
    let next_steps = host.next_steps(target);
    match format {
        OutputFormat::Json => show_json(&json!({
            "written": written,
            "configuration": configuration,
            "next_steps": next_steps,
        }))?,
        OutputFormat::Text if written => say(&format!("{}: written", target.display()))?,
        OutputFormat::Text => print(&configuration)?,
    }
    parsed?;
    if format == OutputFormat::Text {
        next_steps.iter().for_each(|line| complain(line));
    }
    Ok(())
}

/// What was found on this host.
struct HostFacts {
    /// Interfaces that lead to the internet.
    uplinks: Vec<String>,
    sites: Vec<ServedSite>,
    /// What an operator has to know, and no setting says.
    notes: Vec<String>,
}

impl HostFacts {
    fn look() -> Self {
        let mut notes = Vec::new();
        let mut sites = Vec::new();
        let (serving, stopped) = web_servers();
        for server in stopped {
            let program = server.program.display();
            notes.push(format!(
                "{program} is installed and does not listen: its sites are left out."
            ));
        }
        for server in serving {
            let program = server.program.display();
            match server.sites {
                Ok(found) if found.is_empty() => {
                    notes.push(format!("{program} has no site that speaks TLS."));
                }
                Ok(found) => sites.extend(found),
                Err(problem) => {
                    let text = format!("What {program} serves cannot be read: {problem}.");
                    complain(&text);
                    notes.push(text);
                }
            }
        }
        if tool("haproxy").is_some() {
            notes.push(
                "HAProxy is installed, and has no command that prints its configuration: if it serves sites, add a \
                 [[gate.host]] for each."
                    .to_owned(),
            );
        }
        once(&mut sites);
        let mut host = Self {
            uplinks: uplinks(),
            sites,
            notes,
        };
        host.look_at_network();
        host
    }

    /// What is in the way of packets and connections.
    fn look_at_network(&mut self) {
        let ports = self.ports();
        // A kernel that does not answer is no reason to warn.
        let listening = netlink::listeners().unwrap_or_default();
        for port in &ports {
            if !listening.iter().any(|address| address.port() == *port) {
                self.notes.push(format!(
                    "Nothing listens on TCP port {port} now: does the web server run?"
                ));
            }
        }
        let datagrams = netlink::udp_listeners().unwrap_or_default();
        for port in &ports {
            let answers = datagrams.iter().any(|address| address.port() == *port);
            if answers {
                self.notes.push(format!(
                    "A program answers UDP on port {port} (HTTP/3), which Cloudflare does not speak to \
                     origins: switch it off, or write `udp_ports = [{port}]` into [filter]."
                ));
            }
        }
        for (name, port) in redirections(&ports).led {
            self.notes.push(format!(
                "A rule of {name} redirects TCP port {port} (as Docker's published ports are), before \
                 connections are steered: these do not reach the gate. The filter covers them."
            ));
        }
    }

    /// The ports on which TLS is spoken, as far as it is known.
    fn ports(&self) -> BTreeSet<u16> {
        let served = self.served();
        let listens = served.flat_map(|site| &site.listens);
        let ports: BTreeSet<_> = listens.map(|listen| listen.port()).collect();
        if ports.is_empty() {
            BTreeSet::from([HTTPS])
        } else {
            ports
        }
    }

    /// The sites that the gate can serve.
    fn served(&self) -> impl Iterator<Item = &ServedSite> {
        self.sites.iter().filter(|site| site.problem().is_none())
    }

    fn configuration(&self) -> String {
        let ports: Vec<_> = self.ports().iter().map(u16::to_string).collect();
        let leads = match self.uplinks.as_slice() {
            [] => "none leads to the internet now".to_owned(),
            uplinks => format!("now {}", uplinks.join(", ")),
        };
        let mut text = format!(
            "# Written by `pullgate init` from what this host and its web server say of themselves. Look at each\n\
             # line. All options: /usr/share/doc/pullgate/reference.toml.\n\n\
             [filter]\n\
             interfaces = \"auto\"  # those that lead to the internet: {leads}\n\
             ports = [{}]\n\
             # Strangers' packets: monitor counts them, enforce drops them.\n\
             mode = \"monitor\"\n",
            ports.join(", ")
        );
        for note in &self.notes {
            text.push_str(&comment(note));
        }
        let steers = kernel::is_at_least(xdp::STEERS_SINCE);
        if self.served().next().is_none() || !steers {
            text.push_str(if steers {
                "\n# No site was found that the gate could serve, so there is no [gate].\n"
            } else {
                "\n# This kernel cannot steer connections to the gate (Linux 5.9), so there is no [gate].\n"
            });
        } else {
            text.push_str(
                "\n[gate]\n\
                 steer = true  # the web server keeps its port, and is reached through the gate\n\
                 # The web server sees 127.0.0.1, unless this is set (docs/gate.md, Steering):\n\
                 # client_address = \"transparent\"\n",
            );
        }
        for site in &self.sites {
            let host = site.host();
            if steers {
                text.push_str(&host);
            }
        }
        text
    }

    /// What is left to do, a command a line.
    fn next_steps(&self, target: &Path) -> Vec<String> {
        let mut steps = Vec::new();
        let commands = self.key_commands();
        if !commands.is_empty() {
            steps.push("To let the package's gate read certificates and keys:".to_owned());
            steps.extend(commands.into_iter().map(|command| format!("  {command}")));
        }
        let left_out = self.sites.iter().flat_map(|site| match site.problem() {
            Some(_) => site.names.iter().chain(&site.other_names).collect(),
            None => Vec::from_iter(&site.other_names),
        });
        let left_out: Vec<_> = left_out.map(String::as_str).collect();
        if !left_out.is_empty() && self.served().next().is_some() {
            steps.push(format!(
                "Refused from the start of the gate, as no [[gate.host]] has them: {}",
                left_out.join(", ")
            ));
        }
        if self.served().next().is_some() {
            steps.push(
                "The web server sees 127.0.0.1 from then on, unless `client_address` is \"transparent\"; to let \
                 it read the visitor's address:"
                    .to_owned(),
            );
            for (server, lines) in VISITORS_ADDRESS {
                let is_there = self.served().any(|site| site.place.starts_with(server));
                steps.extend(is_there.then(|| format!("  {lines}")));
            }
        }
        steps.push(format!(
            "Then: pullgate --config {} check",
            target.display()
        ));
        steps
    }

    /// What lets the package's gate read the files of sites, which may be root's alone.
    fn key_commands(&self) -> BTreeSet<String> {
        let mut commands = BTreeSet::new();
        let groups = service_groups();
        if groups.is_empty() {
            return commands;
        }
        let pairs = self.served().flat_map(|site| &site.certificates);
        for path in pairs.flat_map(|(certificate, key)| [certificate, key]) {
            // By the name that is configured, and where links lead.
            let real = fs::canonicalize(path);
            for name in [path].into_iter().chain(&real) {
                commands.extend(access_commands(name, &groups));
            }
        }
        commands
    }
}

/// What lets web servers read the visitor's address; the Caddy of Debian 12 has no option for it.
const VISITORS_ADDRESS: [(&str, &str); 3] = [
    (
        "nginx",
        "printf 'set_real_ip_from 127.0.0.1;\\nset_real_ip_from ::1;\\nreal_ip_header CF-Connecting-IP;\\n' \
         >/etc/nginx/conf.d/visitors-address.conf && systemctl reload nginx",
    ),
    (
        "Apache",
        "a2enmod remoteip && printf 'RemoteIPHeader CF-Connecting-IP\\nRemoteIPInternalProxy 127.0.0.1 ::1\\n' \
         >/etc/apache2/conf-available/visitors-address.conf && a2enconf visitors-address && systemctl reload \
         apache2",
    ),
    (
        "Caddy",
        "Caddy 2.6 cannot: set `client_address = \"transparent\"`, or let the application read CF-Connecting-IP",
    ),
];

/// What lets the package's gate read a file, and enter the directories above it. Debian's group for keys stays:
/// it is how other servers read them.
fn access_commands(path: &Path, groups: &[u32]) -> Vec<String> {
    let mut commands = Vec::new();
    for (depth, part) in path.ancestors().enumerate() {
        let Ok(found) = fs::metadata(part) else {
            continue;
        };
        let (needed, letter) = if depth == 0 { (0o4, "r") } else { (0o1, "x") };
        let lets_group_in = found.mode() & needed << 3 != 0;
        let is_member = groups.contains(&found.gid());
        if found.mode() & needed != 0 || (is_member && lets_group_in) {
            continue;
        }
        // For a shell: nothing ends the quotes but the path itself.
        let part = part.display().to_string().replace('\'', "'\\''");
        let group = accounts::group_name(found.gid());
        let joins = match group.as_deref() {
            _ if is_member => None,
            Some(KEY_GROUP) => Some(format!(
                "usermod --append --groups {KEY_GROUP} {GATE_GROUP}"
            )),
            _ if found.gid() == ROOT => Some(format!("chgrp {GATE_GROUP} '{part}'")),
            // Who is in it is not known: neither is the gate added to it, nor are its members kept out.
            group => {
                commands.push(format!(
                    "# '{part}' is for the group {}: put copies of what is in it elsewhere, or use \
                     LoadCredential= (systemd.exec(5))",
                    group.map_or_else(|| found.gid().to_string(), str::to_owned)
                ));
                continue;
            }
        };
        let opens = (!lets_group_in).then(|| format!("chmod g+{letter} '{part}'"));
        let steps: Vec<_> = joins.into_iter().chain(opens).collect();
        commands.push(steps.join(" && "));
    }
    commands
}

/// Names that two sites have are the first one's, as they are for the web server.
fn once(sites: &mut [ServedSite]) {
    let mut taken = BTreeSet::new();
    for site in sites {
        let is_taken = |name: &mut String| !taken.insert(name.clone());
        site.taken_names = site.names.extract_if(.., is_taken).collect();
    }
}

fn uplinks() -> Vec<String> {
    let interfaces = netlink::interfaces().unwrap_or_default();
    let uplinks = netlink::uplinks().unwrap_or_default().main;
    let names = interfaces.into_iter();
    names
        .filter(|interface| uplinks.contains(&interface.index))
        .map(|interface| interface.name)
        .collect()
}

/// Puts the configuration in the place of the one that the package has brought, or of none.
fn put(target: &Path, text: &str) -> Result<(), InitError> {
    let blame = |source| InitError::Write {
        path: target.to_owned(),
        source,
    };
    let before = match fs::read(target) {
        Ok(content) if content == SHIPPED.as_bytes() => fs::metadata(target).map(Some),
        Ok(_) => {
            return Err(InitError::Taken {
                path: target.to_owned(),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    let before = before.map_err(blame)?;
    // The group of the directory may read it, as the package's own.
    let above = target.parent().and_then(|above| fs::metadata(above).ok());
    let group = before.or(above).as_ref().map(MetadataExt::gid);
    file::replace(target, text.as_bytes(), 0o640, group).map_err(blame)
}

/// Why the configuration is not put in place.
#[derive(Debug, thiserror::Error)]
enum InitError {
    /// The operator has written one.
    #[error("{} is not the one that the package has brought; move it away first, or leave `--write` out to see the new one", path.display())]
    Taken {
        /// The file.
        path: PathBuf,
    },
    /// It cannot be written.
    #[error("{} cannot be written", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl ExitStatus for InitError {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Taken { .. } => EX_CONFIG,
            Self::Write { .. } => EX_SOFTWARE,
        }
    }
}

/// The configuration that the package brings.
const SHIPPED: &str = include_str!("../../dist/pullgate.toml");
const HTTPS: u16 = 443;
/// The group of the user who may do everything.
const ROOT: u32 = 0;
