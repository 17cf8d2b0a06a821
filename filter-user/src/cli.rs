//! The command line: arguments in, a typed command out.

use std::net::{AddrParseError, IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::observe::log::{LogFormat, LogLevel};
use crate::ranges::export::Language;
use crate::role::Role;

/// Makes a web origin behind Cloudflare reachable only through Cloudflare.
#[derive(Debug, Parser)]
#[command(name = "pullgate", version)]
pub struct Cli {
    /// The configuration file.
    #[arg(
        long,
        short,
        global = true,
        default_value = "/etc/pullgate/pullgate.toml"
    )]
    pub config: PathBuf,
    /// How logs are written; for the journal under systemd, else for people.
    #[arg(long, global = true, value_parser = log_formats())]
    pub log_format: Option<LogFormat>,
    /// Print the result as JSON.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// How results are printed.
    #[must_use]
    pub fn format(&self) -> OutputFormat {
        if self.json {
            OutputFormat::Json
        } else {
            OutputFormat::Text
        }
    }
}

/// For each command, lines to begin with.
pub const EXAMPLES: [(&str, &str); 30] = [
    ("pullgate init", "what would protect this host"),
    ("pullgate init --write", "puts it in place"),
    (
        "pullgate run --confirm 60s",
        "a filter on trial, for a minute",
    ),
    ("pullgate run --only gate", "one role, as its unit does"),
    ("pullgate confirm", "the filter on trial stays"),
    ("pullgate check", "is the configuration OK?"),
    (
        "pullgate check new.toml --only gate",
        "would this role start with that one?",
    ),
    ("pullgate doctor", "what is not right on this host?"),
    (
        "pullgate probe www.example.com --origin 203.0.113.10",
        "what would a stranger get there?",
    ),
    (
        "pullgate probe www.example.com --origin 203.0.113.10 --cert client.pem --key client.key",
        "and Cloudflare?",
    ),
    ("pullgate reload", "all roles that run"),
    ("pullgate reload --only gate", "one of them"),
    (
        "pullgate log-level debug --only gate",
        "each step of each connection",
    ),
    ("pullgate log-level default", "as at the start"),
    ("pullgate status", "what is protected?"),
    ("pullgate status --verbose", "with the last drops"),
    ("pullgate --json status", "for a script"),
    (
        "pullgate explain 198.51.100.7",
        "what becomes of a stranger's SYN?",
    ),
    (
        "pullgate explain 2400:cb00::1 --port 8443 --iface eth0",
        "and of this one?",
    ),
    (
        "pullgate ranges list",
        "what is active, and from which source",
    ),
    ("pullgate ranges refresh", "asks every source now"),
    (
        "pullgate ranges approve --dry-run",
        "what is held, and why?",
    ),
    ("pullgate ranges approve", "takes it in"),
    (
        "pullgate ranges show 173.245.48.5",
        "is it admitted, and why?",
    ),
    ("pullgate ranges diff", "what would a refresh change?"),
    ("pullgate ranges export nft", "for another program"),
    ("pullgate spki client.pem", "a pin for `trust`"),
    (
        "pullgate snippet nginx --behind-gate --include",
        "lines for sites that are there",
    ),
    (
        "pullgate snippet apache --own-mtls",
        "a web server that demands the certificate itself",
    ),
    ("pullgate unload", "the way back"),
];

/// How results are printed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OutputFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Look at this host and its web server, and print the configuration that protects them.
    Init {
        /// Put it in place, if no operator's is there.
        #[arg(long)]
        write: bool,
    },
    /// Protect: run the roles that the configuration describes.
    Run(RunArgs),
    /// Let a filter stay that `run --confirm` has put on trial.
    Confirm,
    /// Check the configuration and every file that it names; change nothing.
    Check {
        /// The configuration file, instead of `--config`.
        file: Option<PathBuf>,
        /// For one role only.
        #[arg(long, value_parser = roles())]
        only: Option<Role>,
    },
    /// Ask everything that can be asked on this host: what is not right, and what to do about it.
    Doctor,
    /// Look at an origin from outside: what would a stranger get there, and another Cloudflare customer?
    Probe(ProbeArgs),
    /// Let the running roles read their configuration again, and wait until that is active.
    Reload {
        /// One role only.
        #[arg(long, value_parser = roles())]
        only: Option<Role>,
    },
    /// Log more or less from now on, until a role ends.
    LogLevel {
        /// How much.
        #[arg(value_parser = log_levels())]
        level: LogLevel,
        /// One role only.
        #[arg(long, value_parser = roles())]
        only: Option<Role>,
    },
    /// Show what is protected, and by which roles.
    Status {
        /// With the last drops, the sources of most drops, and how each role is confined.
        #[arg(long, short)]
        verbose: bool,
    },
    /// Ask the loaded filter what it does with a packet, and why.
    Explain(Explain),
    /// Look at the ranges that are active, and at what becomes of them.
    Ranges {
        /// What to do with them; by default `list`.
        #[command(subcommand)]
        command: Option<RangesCommand>,
    },
    /// Print the key pin of a certificate, for a host's `trust`: SHA-256 of its SubjectPublicKeyInfo.
    #[command(alias = "pin")]
    Spki {
        /// PEM file.
        certificate: PathBuf,
    },
    /// Print a web server's configuration, to paste.
    Snippet(SnippetArgs),
    /// Detach the filter, end steering, and remove all pins: strangers' packets pass again.
    Unload,
}

/// How to run.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Run this role only.
    #[arg(long, value_parser = roles())]
    pub only: Option<Role>,
    /// Go back to what was before, unless `pullgate confirm` comes within this time.
    #[arg(long, value_name = "TIME", value_parser = trial)]
    pub confirm: Option<Duration>,
    /// Start even if that drops your own connection to this host.
    #[arg(long)]
    pub yes: bool,
    /// A listening socket of the gate's that was handed over: its number.
    #[arg(long, value_name = "NUMBER")]
    pub listen_fd: Vec<i32>,
    /// Keep all privileges that were given, to find out whether it is their loss that hurts.
    #[arg(long)]
    pub unconfined: bool,
    /// The process that runs this role as one of several, and that it does not outlive.
    #[arg(long, hide = true, requires = "only")]
    pub child_of: Option<u32>,
}

/// What to do with the ranges.
#[derive(Clone, Debug, Subcommand)]
pub enum RangesCommand {
    /// List the active ranges, and where each came from.
    List,
    /// Show whether an address is admitted, and by which range or rule.
    Show {
        /// The address.
        address: IpAddr,
    },
    /// Ask every source, and show what a refresh would change; change nothing.
    Diff,
    /// Let the ranges role ask every source now, and show the result.
    Refresh,
    /// Show a list that would remove many ranges and is held, and let it be taken in.
    Approve {
        /// The list that is meant, as the command shows it; whatever is held, if none is named.
        id: Vec<String>,
        /// Show it only.
        #[arg(long)]
        dry_run: bool,
    },
    /// Write the active ranges in another program's words.
    Export {
        /// For whom.
        #[arg(value_parser = languages())]
        language: Language,
    },
}

/// A packet to ask the filter about: a TCP SYN.
#[derive(Args, Clone, Debug)]
pub struct Explain {
    /// The source address; IPv4 as such, if it is written as IPv6 (as a dual-stack server logs it).
    #[arg(value_parser = canonical)]
    pub source: IpAddr,
    /// The destination port.
    #[arg(long, default_value_t = 443, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,
    /// The destination address; by default one of documentation.
    #[arg(long, value_parser = canonical)]
    pub to: Option<IpAddr>,
    /// The interface that it comes in by.
    #[arg(long)]
    pub iface: Option<String>,
    /// In a VLAN; several times for tags within tags, the outermost first.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(0..4096))]
    pub vlan: Vec<u16>,
    /// As a later fragment.
    #[arg(long)]
    pub fragment: bool,
    /// As UDP instead of TCP.
    #[arg(long)]
    pub udp: bool,
}

/// What to print of a web server's configuration.
#[derive(Args, Clone, Debug)]
pub struct SnippetArgs {
    /// For whom.
    #[arg(value_enum)]
    pub server: Server,
    /// For a server behind the gate.
    #[arg(long, conflicts_with = "own_mtls")]
    behind_gate: bool,
    /// For a server that demands Cloudflare's certificate itself, behind the filter alone.
    #[arg(long)]
    own_mtls: bool,
    /// Only the lines to include into sites that are there already.
    #[arg(long)]
    include: bool,
}

impl SnippetArgs {
    /// For which of the pairings; none, if none was named.
    #[must_use]
    pub fn pairing(&self) -> Option<Pairing> {
        if self.behind_gate {
            return Some(Pairing::BehindGate);
        }
        self.own_mtls.then_some(Pairing::OwnMtls)
    }

    /// How much of it.
    #[must_use]
    pub fn extent(&self) -> Extent {
        if self.include {
            Extent::Included
        } else {
            Extent::Whole
        }
    }
}

/// Which origin to look at, and as whom.
#[derive(Args, Clone, Debug)]
pub struct ProbeArgs {
    /// The site: its name, or a URL of it.
    pub site: String,
    /// An address of the origin, with a port if that is not 443; several times for several.
    #[arg(long, required = true, value_name = "ADDRESS")]
    pub origin: Vec<String>,
    /// The client certificate that Cloudflare presents, in a PEM file, to look as Cloudflare too.
    #[arg(long, requires = "key", value_name = "FILE")]
    pub cert: Option<PathBuf>,
    /// Its key.
    #[arg(long, requires = "cert", value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// A client certificate that the site has to refuse: expired, revoked, or another site's.
    #[arg(long, requires = "other_key", value_name = "FILE")]
    pub other_cert: Option<PathBuf>,
    /// Its key.
    #[arg(long, requires = "other_cert", value_name = "FILE")]
    pub other_key: Option<PathBuf>,
    /// Another name that the origin serves: neither its sessions nor its connections may open the site; several times
    /// for several.
    #[arg(long, value_name = "NAME")]
    pub other_name: Vec<String>,
    /// Ask DNS too, by this host's resolver: whether the name is proxied, and what else leads to the origin.
    #[arg(long)]
    pub dns: bool,
    /// One more name that must not lead to the origin, which need not serve it; several times for several.
    #[arg(long, requires = "dns", value_name = "NAME")]
    pub dns_name: Vec<String>,
    /// Visit the site by its name too, through Cloudflare, and compare.
    #[arg(long)]
    pub through: bool,
    /// Look again and again, with this time between two looks (from 1min), until SIGINT or SIGTERM.
    #[arg(long, value_name = "TIME", value_parser = interval)]
    pub repeat: Option<Duration>,
    /// Serve what the last look has shown to Prometheus, at /metrics of this address.
    #[arg(long, requires = "repeat", value_name = "ADDRESS:PORT")]
    pub metrics: Option<SocketAddr>,
}

/// A web server.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Server {
    /// nginx, from 1.19.4 on.
    Nginx,
    /// Apache httpd 2.4.
    Apache,
    /// HAProxy.
    Haproxy,
    /// Caddy 2.
    Caddy,
}

/// How a web server and pullgate share the work.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Pairing {
    /// The gate demands the certificate, and relays.
    BehindGate,
    /// The web server demands it, and the filter drops the rest.
    OwnMtls,
}

/// How much of a web server's configuration is printed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Extent {
    /// A server to start from.
    Whole,
    /// What sites that are there include.
    Included,
}

fn roles() -> impl TypedValueParser<Value = Role> {
    let about = |role| match role {
        Role::Filter => {
            "Drops strangers' packets in the kernel. Needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
        }
        Role::Ranges => "Keeps the ranges fresh. Needs no privilege",
        Role::Gate => {
            "Demands the client certificate. Needs CAP_NET_BIND_SERVICE for ports below 1024"
        }
    };
    one_of(Role::ALL.map(|role| (role, role.label(), about(role))))
}

fn log_formats() -> impl TypedValueParser<Value = LogFormat> {
    let all = [
        (LogFormat::Text, "For people"),
        (LogFormat::Json, "One JSON object per line"),
        (
            LogFormat::Journald,
            "For systemd's journal, with a field of its own for each of an event's",
        ),
    ];
    one_of(all.map(|(format, about)| (format, format.label(), about)))
}

fn log_levels() -> impl TypedValueParser<Value = LogLevel> {
    let all = [
        (
            LogLevel::Default,
            "As at the start: `PULLGATE_LOG`, or `info`",
        ),
        (LogLevel::Error, "Errors alone"),
        (LogLevel::Warn, "Warnings too"),
        (LogLevel::Info, "What has happened"),
        (LogLevel::Debug, "Each step of each connection"),
    ];
    one_of(all.map(|(level, about)| (level, level.label(), about)))
}

fn languages() -> impl TypedValueParser<Value = Language> {
    one_of([
        (
            Language::Ipset,
            "ipset",
            "For `ipset restore`: the sets `pullgate-v4` and `pullgate-v6`, filled aside and swapped in",
        ),
        (
            Language::Nft,
            "nft",
            "For `nft -f -`: the sets `ranges_v4` and `ranges_v6` of the table `inet pullgate`",
        ),
        (
            Language::Nginx,
            "nginx",
            "For nginx: `set_real_ip_from` lines",
        ),
        (Language::Text, "text", "One range per line"),
    ])
}

/// One of these values, by its word; the help says what each is.
fn one_of<T, const N: usize>(
    choices: [(T, &'static str, &'static str); N],
) -> impl TypedValueParser<Value = T>
where
    T: Copy + Send + Sync + 'static,
{
    let words = choices.map(|(_, word, about)| PossibleValue::new(word).help(about));
    PossibleValuesParser::new(words).try_map(move |chosen| {
        let mut choices = choices.into_iter();
        let found = choices.find(|(_, word, _)| *word == chosen);
        found.map(|(value, ..)| value).ok_or("no such word")
    })
}

/// An address, IPv4-mapped IPv6 as the IPv4 address that it is.
fn canonical(text: &str) -> Result<IpAddr, AddrParseError> {
    text.parse().map(|address: IpAddr| address.to_canonical())
}

/// The time between two looks: not so short that an origin takes them for an attack.
fn interval(text: &str) -> Result<Duration, String> {
    let bounds = Duration::from_secs(60)..=Duration::from_secs(30 * 86_400);
    time_within(text, &bounds, "1min to 30days")
}

/// How long a trial may take: long enough to be confirmed, short enough to wait for.
fn trial(text: &str) -> Result<Duration, String> {
    let bounds = Duration::from_millis(100)..=Duration::from_secs(86_400);
    time_within(text, &bounds, "100ms to 1day")
}

fn time_within(
    text: &str,
    bounds: &RangeInclusive<Duration>,
    words: &str,
) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if bounds.contains(&time) {
        Ok(time)
    } else {
        Err(format!("write a time from {words}"))
    }
}
