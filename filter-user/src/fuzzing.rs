//! What fuzz targets ask: each function takes hostile bytes as its module gets them, and panics if an
//! answer is wrong.

use std::io::Cursor;
use std::path::Path;

use rustls::server::Acceptor;

use crate::config::Config;
use crate::ranges::guard::GuardLimits;
use crate::ranges::{Feed, Format};
use crate::{gate, snapshot};

/// A PROXY header as a load balancer sends it.
pub fn proxy_header(bytes: &[u8]) {
    gate::fuzzing::proxy_header(bytes);
}

/// A file of certificates, keys or lists.
pub fn pem(text: &[u8]) {
    gate::fuzzing::pem(text);
}

/// A list of ranges as a server answers it, in every format.
pub fn feed(body: &[u8]) {
    for format in [
        Format::Cloudflare,
        Format::ByFamily,
        Format::Jdcloud,
        Format::CloudFront,
        Format::Pointers(vec!["/prefixes".to_owned()]),
    ] {
        if let Ok(feed) = Feed::parse(body, &format) {
            let has_host_bits = feed.ranges().iter().any(|range| range.trunc() != *range);
            assert!(!has_host_bits, "{format:?}: {feed:?}");
        }
    }
}

/// The snapshot of the ranges on disk.
pub fn snapshot(bytes: &[u8]) {
    snapshot::fuzz(bytes, &GuardLimits::of_cloudflare());
}

/// The configuration.
pub fn configuration(text: &[u8]) {
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    if let Err(error) = Config::parse(Path::new("/pullgate.toml"), text) {
        let sentence = error.to_string();
        assert!(
            !sentence.is_empty() && !sentence.contains('\n'),
            "{sentence:?}"
        );
    }
}

/// What a client does to its session, as a script.
pub fn session(script: &[u8]) {
    gate::fuzzing::session(script);
}

/// The first bytes of a client.
pub fn client_hello(bytes: &[u8]) {
    if !gate::fuzzing::may_be_tls(bytes) {
        return;
    }
    let mut acceptor = Acceptor::default();
    let mut stream = Cursor::new(bytes);
    while acceptor.read_tls(&mut stream).is_ok_and(|read| read > 0) {
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                gate::fuzzing::find(hello.server_name());
                return;
            }
            Err(_) => return,
        }
    }
}
