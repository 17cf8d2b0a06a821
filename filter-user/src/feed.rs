//! Fetching: a [`SourceEndpoint`] in, a parsed [`Feed`] out. The only user of reqwest.
//!
//! Whatever answers is hostile until its list has parsed: time, size, redirects and content are
//! bounded here, and the guard still has to judge the result.

mod error;

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, DATE, ETAG, HeaderMap, HeaderName,
    HeaderValue, IF_MODIFIED_SINCE, IF_NONE_MATCH, LAST_MODIFIED, LOCATION, RETRY_AFTER,
};
use reqwest::redirect::{Attempt, Policy};
use reqwest::{Certificate, Client, Response, StatusCode};
use url::Url;

pub use self::error::FeedError;
use crate::config::{Location, Proxy, SourceEndpoint, is_loopback, redacted};
use crate::host::file::{self, ReadError, TrustedOwner};
use crate::ranges::{Feed, Format, ListError};
use crate::sync::lock;

/// Fetches lists, and remembers what servers said of them.
#[derive(Default)]
pub struct Fetcher {
    remembered: Mutex<HashMap<Url, Remembered>>,
}

/// A list that a server may answer "not modified" about, RFC 9110 §13.1.
#[derive(Clone)]
struct Remembered {
    validators: Vec<(HeaderName, HeaderValue)>,
    /// As which it was parsed.
    format: Format,
    feed: Feed,
}

impl Fetcher {
    /// Fetches and parses the list that a way leads to.
    ///
    /// # Errors
    ///
    /// Returns why there is no list; see [`FeedError`].
    pub async fn fetch(&self, way: &SourceEndpoint, proxy: &Proxy) -> Result<Feed, FeedError> {
        let fetched = tokio::time::timeout(TOTAL_TIMEOUT, self.fetch_whole(way, proxy)).await;
        fetched.unwrap_or(Err(FeedError::Timeout))
    }

    async fn fetch_whole(&self, way: &SourceEndpoint, proxy: &Proxy) -> Result<Feed, FeedError> {
        let (urls, ca_file) = match &way.place {
            Location::File(path) => {
                let (path, way) = (path.clone(), way.clone());
                // A file system may be one that hangs.
                let reading = tokio::task::spawn_blocking(move || read(&path, &way));
                return reading.await.unwrap_or(Err(FeedError::Timeout));
            }
            Location::Web { urls, ca_file } => (urls, ca_file.as_deref()),
        };
        let client = client(ca_file, proxy_for(urls, proxy))?;
        let mut ranges = Vec::new();
        // One list or none: a part that fails takes the others with it.
        for (index, url) in urls.iter().enumerate() {
            let part = self.fetch_part(&client, url, way).await?;
            part.check_part(index, &way.format)
                .map_err(FeedError::List)?;
            ranges.extend_from_slice(part.ranges());
        }
        Ok(Feed::new(ranges))
    }

    async fn fetch_part(
        &self,
        client: &Client,
        url: &Url,
        way: &SourceEndpoint,
    ) -> Result<Feed, FeedError> {
        // Nothing compressed: most lists are a few hundred bytes, and a bomb stays as small as it is.
        let mut request = client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
        let remembered = lock(&self.remembered).get(url).cloned();
        let remembered = remembered.filter(|remembered| remembered.format == way.format);
        for (name, value) in remembered
            .iter()
            .flat_map(|remembered| &remembered.validators)
        {
            request = request.header(name, value);
        }
        let response = request.send().await.map_err(FeedError::request)?;
        if let (StatusCode::NOT_MODIFIED, Some(remembered)) = (response.status(), remembered) {
            return Ok(remembered.feed);
        }

        check_head(&response)?;
        let validators = validators(response.headers());
        let body = read_body(response, way.size_max).await?;
        let feed = Feed::parse(&body, &way.format).map_err(FeedError::List)?;
        self.remember(
            url,
            Remembered {
                validators,
                format: way.format.clone(),
                feed: feed.clone(),
            },
        );
        Ok(feed)
    }

    fn remember(&self, url: &Url, new: Remembered) {
        let mut remembered = lock(&self.remembered);
        if new.validators.is_empty() {
            remembered.remove(url);
            return;
        }
        // No more than anybody configures; a reload may have left some behind.
        if remembered.len() >= REMEMBERED_MAX && !remembered.contains_key(url) {
            remembered.clear();
        }
        remembered.insert(url.clone(), new);
    }
}

/// Checks the files that a way names, without asking the network.
///
/// # Errors
///
/// Returns why a fetch could not succeed.
pub fn check(way: &SourceEndpoint, proxy: &Proxy) -> Result<Option<Feed>, FeedError> {
    match &way.place {
        Location::File(path) => read(path, way).map(Some),
        Location::Web { ca_file: None, .. } => Ok(None),
        Location::Web { urls, ca_file } => {
            client(ca_file.as_deref(), proxy_for(urls, proxy)).map(|_| None)
        }
    }
}

/// What a source on this host is asked for stays on this host.
fn proxy_for<'a>(urls: &[Url], proxy: &'a Proxy) -> &'a Proxy {
    if urls.iter().any(is_loopback) {
        &Proxy::None
    } else {
        proxy
    }
}

/// A client for one fetch: nothing is kept open between two that are hours apart.
fn client(ca_file: Option<&Path>, proxy: &Proxy) -> Result<Client, FeedError> {
    let mut builder = Client::builder()
        .user_agent(concat!("pullgate/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .redirect(Policy::custom(follow))
        .referer(false);
    builder = match proxy {
        Proxy::None => builder.no_proxy(),
        Proxy::Environment => builder,
        Proxy::Url(url) => {
            let all = reqwest::Proxy::all(url.clone()).map_err(FeedError::request)?;
            builder.no_proxy().proxy(all)
        }
    };
    if let Some(path) = ca_file {
        let pem = read_file(path, CA_FILE_MAX)?;
        let roots = Certificate::from_pem_bundle(&pem).map_err(FeedError::request)?;
        if roots.is_empty() {
            return Err(FeedError::NoRoots {
                path: path.to_owned(),
            });
        }
        builder = builder.tls_certs_only(roots);
    }
    builder.build().map_err(FeedError::request)
}

/// Follows a redirect only within the same host, scheme and port, a few times.
fn follow(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    let hops = attempt.previous().len();
    let last = attempt.previous().last();
    let is_same_host = last.is_some_and(|last| last.origin() == attempt.url().origin());
    if hops > REDIRECTS_MAX || !is_same_host {
        // Stopping yields the redirect itself as the answer, which is then refused.
        return attempt.stop();
    }
    attempt.follow()
}

fn check_head(response: &Response) -> Result<(), FeedError> {
    let (status, headers) = (response.status(), response.headers());
    if let (true, Some(to)) = (status.is_redirection(), headers.get(LOCATION)) {
        let to = to.to_str().ok().and_then(|to| response.url().join(to).ok());
        return Err(FeedError::Redirected {
            to: to.as_ref().map_or_else(
                || "nowhere".to_owned(),
                |to| redacted(to).chars().take(EXCERPT).collect(),
            ),
        });
    }
    if status != StatusCode::OK {
        return Err(FeedError::Status {
            status: status.as_u16(),
            retry_after: retry_after(headers),
        });
    }
    // RFC 9110 §12.5.3: no encoding, by name.
    let is_plain = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"identity");
    if !headers.get_all(CONTENT_ENCODING).iter().all(is_plain) {
        return Err(FeedError::Encoded);
    }
    let content_type = headers.get(CONTENT_TYPE);
    let is_page = |value: &HeaderValue| {
        let kind = value.as_bytes().get(..PAGE.len());
        kind.is_some_and(|kind| kind.eq_ignore_ascii_case(PAGE))
    };
    if content_type.is_some_and(is_page) {
        return Err(FeedError::List(ListError::Markup));
    }
    Ok(())
}

async fn read_body(mut response: Response, size_max: usize) -> Result<Vec<u8>, FeedError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(FeedError::request)? {
        if body.len() + chunk.len() > size_max {
            return Err(FeedError::TooLarge { size_max });
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// What a later request asks by whether the list is still the same, RFC 9110 §8.8.
fn validators(headers: &HeaderMap) -> Vec<(HeaderName, HeaderValue)> {
    let pairs = [(ETAG, IF_NONE_MATCH), (LAST_MODIFIED, IF_MODIFIED_SINCE)];
    let offered = pairs.into_iter().filter_map(|(offer, ask)| {
        let value = headers.get(offer)?;
        Some((ask, value.clone()))
    });
    offered.collect()
}

/// RFC 9110 §10.2.3: seconds, or a date, which is meant by the server's own clock.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name)?.to_str().ok();
    let after = text(RETRY_AFTER)?.trim();
    if let Ok(seconds) = after.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = |value| httpdate::parse_http_date(value).ok();
    date(after)?.duration_since(date(text(DATE)?)?).ok()
}

fn read(path: &Path, way: &SourceEndpoint) -> Result<Feed, FeedError> {
    let body = read_file(path, way.size_max)?;
    Feed::parse(&body, &way.format).map_err(FeedError::List)
}

/// A user who may change such a file decides which clients are admitted.
fn read_file(path: &Path, size_max: usize) -> Result<Vec<u8>, FeedError> {
    match file::read_trusted(path, size_max, TrustedOwner::RootOrSelf) {
        Ok((content, _)) => Ok(content),
        Err(ReadError::Io(error)) if error.kind() == ErrorKind::FileTooLarge => {
            Err(FeedError::TooLarge { size_max })
        }
        Err(ReadError::Io(source)) => Err(FeedError::File {
            path: path.to_owned(),
            source,
        }),
        Err(ReadError::UntrustedFile(untrusted)) => Err(FeedError::UntrustedFile(untrusted)),
    }
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// All parts of a list, redirects included.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(20);
const REDIRECTS_MAX: usize = 3;
const REMEMBERED_MAX: usize = 64;
/// Characters of a redirect's target that an error message repeats.
const EXCERPT: usize = 200;
/// All of a system's roots take a quarter of it.
const CA_FILE_MAX: usize = 1 << 20;
const PAGE: &[u8] = b"text/html";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_may_say_when_to_ask_again() {
        let headers = |after: &str, date: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, after.parse().unwrap());
            headers.extend(date.map(|date| (DATE, date.parse().unwrap())));
            retry_after(&headers)
        };
        let (now, later) = (
            "Sat, 21 Nov 2026 12:00:00 GMT",
            "Sat, 21 Nov 2026 12:02:00 GMT",
        );

        assert_eq!(headers("120", None), Some(Duration::from_secs(120)));
        assert_eq!(headers(later, Some(now)), Some(Duration::from_secs(120)));
        assert_eq!(headers(now, Some(later)), None);
        assert_eq!(headers(later, None), None);
        assert_eq!(headers("-1", None), None);
        assert_eq!(headers("soon", Some(now)), None);
    }
}
