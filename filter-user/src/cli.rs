//! The command line: arguments in, a typed command out.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

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
    /// How logs are written.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Protect: run the roles that the configuration describes.
    Run {
        /// Run this role only.
        #[arg(long, value_enum)]
        only: Option<Role>,
    },
    /// Check the configuration and every file that it names; change nothing.
    Check,
    /// Show what is protected, and by which roles.
    Status {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Detach the filter and remove all its pins: strangers' packets pass again.
    Unload,
}

/// A part of pullgate that can run as a process of its own.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Role {
    /// Drops strangers' packets in the kernel. Needs CAP_BPF and CAP_NET_ADMIN.
    Filter,
    /// Keeps the ranges fresh. Needs no privilege.
    Ranges,
    /// Demands the client certificate. Needs CAP_NET_BIND_SERVICE for ports below 1024.
    Gate,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 3] = [Self::Filter, Self::Ranges, Self::Gate];

    /// The word in sockets, status and logs.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Ranges => "ranges",
            Self::Gate => "gate",
        }
    }
}

/// How logs are written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}
