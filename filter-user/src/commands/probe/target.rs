//! What is looked at: words of the command line in, an address with the site's name out.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use url::Url;

use crate::cli::ProbeArgs;
use crate::report::{EX_CONFIG, EX_SOFTWARE, EX_USAGE, ExitStatus};

/// An address of the origin, and the site that it serves.
#[derive(Debug)]
pub(super) struct ProbeTarget {
    pub(super) address: SocketAddr,
    /// The site's name.
    pub(super) name: String,
    /// What is asked for.
    pub(super) path: String,
    /// The site's own port, where visitors come.
    pub(super) port: u16,
}

/// The addresses, each with the site.
pub(super) fn targets(arguments: &ProbeArgs) -> Result<Vec<ProbeTarget>, ProbeError> {
    let site = &arguments.site;
    let (name, path, usual) = if site.contains("://") {
        let url = Url::parse(site).ok();
        let url = url.filter(|url| url.scheme() == "https");
        let url = url.ok_or_else(|| ProbeError::Site { site: site.clone() })?;
        let name = url.domain().map(str::to_owned);
        let name = name.ok_or_else(|| ProbeError::Site { site: site.clone() })?;
        let path = url[url::Position::BeforePath..url::Position::AfterQuery].to_owned();
        (name, path, url.port().unwrap_or(HTTPS))
    } else {
        (site.clone(), "/".to_owned(), HTTPS)
    };
    if rustls::pki_types::DnsName::try_from(name.as_str()).is_err() {
        return Err(ProbeError::Site { site: site.clone() });
    }
    let parse = |origin: &String| {
        let bare = origin.trim_start_matches('[').trim_end_matches(']');
        let address = match bare.parse::<IpAddr>() {
            Ok(address) => Some(SocketAddr::new(address, usual)),
            Err(_) => origin.parse().ok(),
        };
        let address = address.ok_or_else(|| ProbeError::Address {
            origin: origin.clone(),
        })?;
        Ok(ProbeTarget {
            address,
            name: name.clone(),
            path: path.clone(),
            port: usual,
        })
    };
    arguments.origin.iter().map(parse).collect()
}

/// Why nothing can be looked at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum ProbeError {
    /// The site has no name that a client could send.
    #[error("`{site}` is neither a host name nor a URL of https with one; write `www.example.com`")]
    Site {
        /// As it was written.
        site: String,
    },
    /// An origin is no address: names lead to Cloudflare.
    #[error("`{origin}` is no address; write 203.0.113.10, [2001:db8::1]:8443, or the like")]
    Address {
        /// As it was written.
        origin: String,
    },
    /// The identity cannot be used.
    #[error("{} cannot be used as a client's certificate or key in PEM", path.display())]
    Identity {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No certificate can be made up.
    #[error("no certificate can be made to try with")]
    Forging(#[source] rcgen::Error),
    /// Metrics cannot be served.
    #[error("metrics cannot be served at {address}")]
    Metrics {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// A look has ended early.
    #[error("a look at the origin has ended early: please report that")]
    Ended,
}

impl ExitStatus for ProbeError {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Site { .. } | Self::Address { .. } => EX_USAGE,
            Self::Identity { .. } => EX_CONFIG,
            Self::Forging(_) | Self::Metrics { .. } | Self::Ended => EX_SOFTWARE,
        }
    }
}

pub(super) const HTTPS: u16 = 443;
