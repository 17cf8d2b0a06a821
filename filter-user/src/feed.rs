//! Fetching: a [`FeedSource`] in, a parsed [`Feed`] out. The only user of reqwest.
//!
//! Whatever answers is hostile until its list has parsed: time, size, redirects and content are
//! bounded here, and the guard still has to judge the result.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE};
use reqwest::redirect::{Attempt, Policy};
use reqwest::{Certificate, Client, Response, StatusCode};
use url::Url;

use crate::config::FeedSource;
use crate::ranges::{Feed, ListError};

/// Fetches and parses one source.
///
/// # Errors
///
/// Returns why there is no list; see [`FeedError`].
pub async fn fetch(source: &FeedSource) -> Result<Feed, FeedError> {
    match source {
        FeedSource::CloudflareApi => {
            let body = get(&client(None)?, parse_url(CLOUDFLARE_API)?).await?;
            Feed::parse(&body).map_err(FeedError::List)
        }
        FeedSource::CloudflareText => {
            let client = client(None)?;
            let mut ranges = Vec::new();
            for url in CLOUDFLARE_TEXT {
                let body = get(&client, parse_url(url)?).await?;
                let list = Feed::parse(&body).map_err(FeedError::List)?;
                ranges.extend_from_slice(list.ranges());
            }
            Ok(Feed::new(ranges))
        }
        FeedSource::Url { url, ca_file } => {
            let client = client(ca_file.as_deref())?;
            let body = get(&client, url.clone()).await?;
            Feed::parse(&body).map_err(FeedError::List)
        }
        FeedSource::File(path) => {
            let body = read(path)?;
            Feed::parse(&body).map_err(FeedError::List)
        }
    }
}

/// Checks the files that a source names, without asking the network.
///
/// # Errors
///
/// Returns why a fetch could not succeed.
pub fn check(source: &FeedSource) -> Result<(), FeedError> {
    match source {
        FeedSource::CloudflareApi | FeedSource::CloudflareText => Ok(()),
        FeedSource::Url { ca_file, .. } => client(ca_file.as_deref()).map(|_| ()),
        FeedSource::File(path) => {
            let list = Feed::parse(&read(path)?);
            list.map(|_| ()).map_err(FeedError::List)
        }
    }
}

/// A client for one fetch: nothing is kept between two that are hours apart.
fn client(ca_file: Option<&Path>) -> Result<Client, FeedError> {
    let mut builder = Client::builder()
        .user_agent(concat!("pullgate/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(TOTAL_TIMEOUT)
        .redirect(Policy::custom(follow))
        .referer(false)
        .no_proxy();
    if let Some(path) = ca_file {
        let pem = read(path)?;
        let roots = Certificate::from_pem_bundle(&pem).map_err(FeedError::Request)?;
        if roots.is_empty() {
            return Err(FeedError::NoRoots {
                path: path.to_owned(),
            });
        }
        builder = builder.tls_certs_only(roots);
    }
    builder.build().map_err(FeedError::Request)
}

/// Follows a redirect only within the same host, to the same scheme, a few times.
fn follow(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    let hops = attempt.previous().len();
    let is_same_host = attempt.previous().last().is_some_and(|previous| {
        previous.scheme() == attempt.url().scheme() && previous.host() == attempt.url().host()
    });
    if hops > REDIRECTS_MAX || !is_same_host {
        // Stopping yields the redirect itself as the answer, which is then refused by status.
        return attempt.stop();
    }
    attempt.follow()
}

async fn get(client: &Client, url: Url) -> Result<Vec<u8>, FeedError> {
    // Nothing compressed: the list is a few hundred bytes, and a bomb stays as small as it is.
    let request = client.get(url).header(ACCEPT_ENCODING, "identity");
    let response = request.send().await.map_err(FeedError::Request)?;
    check_head(&response)?;
    read_body(response).await
}

fn check_head(response: &Response) -> Result<(), FeedError> {
    if response.status() != StatusCode::OK {
        return Err(FeedError::Status {
            status: response.status().as_u16(),
        });
    }
    if response.headers().contains_key(CONTENT_ENCODING) {
        return Err(FeedError::Encoded);
    }
    let content_type = response.headers().get(CONTENT_TYPE);
    if content_type.is_some_and(|value| value.as_bytes().starts_with(b"text/html")) {
        return Err(FeedError::List(ListError::Markup));
    }
    Ok(())
}

async fn read_body(mut response: Response) -> Result<Vec<u8>, FeedError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(FeedError::Request)? {
        if body.len() + chunk.len() > BODY_MAX {
            return Err(FeedError::TooLarge);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

fn read(path: &Path) -> Result<Vec<u8>, FeedError> {
    let mut body = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(BODY_MAX as u64 + 1).read_to_end(&mut body))
        .map_err(|source| FeedError::File {
            path: path.to_owned(),
            source,
        })?;
    if body.len() > BODY_MAX {
        return Err(FeedError::TooLarge);
    }
    Ok(body)
}

fn parse_url(url: &'static str) -> Result<Url, FeedError> {
    Url::parse(url).map_err(|source| FeedError::Url { url, source })
}

/// Why there is no list.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FeedError {
    /// The server cannot be reached or trusted, or broke off.
    #[error("no answer")]
    Request(#[source] reqwest::Error),
    /// The server answers something else than 200, a redirect to elsewhere included.
    #[error("the server answered with status {status}")]
    Status {
        /// The HTTP status.
        status: u16,
    },
    /// The answer is compressed, which was not asked for.
    #[error("the answer has a content encoding that was not asked for")]
    Encoded,
    /// The answer or file is larger than any list.
    #[error("the list is larger than {BODY_MAX} bytes")]
    TooLarge,
    /// What came is not a list.
    #[error(transparent)]
    List(ListError),
    /// A file cannot be read.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file with the roots to trust holds none.
    #[error("{} holds no certificate", path.display())]
    NoRoots {
        /// The file.
        path: PathBuf,
    },
    /// An address that is built in does not parse.
    #[error("{url}")]
    Url {
        /// The address.
        url: &'static str,
        /// Why not.
        source: url::ParseError,
    },
}

impl FeedError {
    /// The word for this error in metrics.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Request(error) if error.is_timeout() => "Timeout",
            Self::Request(_) => "NoAnswer",
            Self::Status { .. } => "BadStatus",
            Self::Encoded => "Encoded",
            Self::TooLarge => "TooLarge",
            Self::List(_) => "BadList",
            Self::File { .. } | Self::NoRoots { .. } => "BadFile",
            Self::Url { .. } => "BadUrl",
        }
    }
}

/// <https://developers.cloudflare.com/api/resources/ips/>
const CLOUDFLARE_API: &str = "https://api.cloudflare.com/client/v4/ips";
/// <https://www.cloudflare.com/ips/>
const CLOUDFLARE_TEXT: [&str; 2] = [
    "https://www.cloudflare.com/ips-v4",
    "https://www.cloudflare.com/ips-v6",
];

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const TOTAL_TIMEOUT: Duration = Duration::from_secs(20);
/// Cloudflare's own list is below one KiB.
const BODY_MAX: usize = 64 << 10;
const REDIRECTS_MAX: usize = 3;
