//! `[[gate.host]]` as it is written.

use std::path::PathBuf;

use serde::Deserialize;
use serde::de::Deserializer;

use super::super::value::{Spanned, absolute, count, is_host_name, located, parse_target};
use super::super::{
    ClientAuth, ConfigError, CrlExpired, DEFAULT_DEPTH, HostSettings, KeyPair, Located, MinTls,
    Name, OnTrustChange, ProxyProtocol, Reencryption, Resumption, Source, Target, Trust, Upstream,
    UpstreamName, UpstreamTarget, UpstreamTrust,
};

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct RawHost {
    /// Server names in full, or `*.example.com` for every name one label below. The first one stands
    /// for the host in metrics and logs.
    #[cfg_attr(test, schemars(extend("examples" = [["www.example.com", "example.com"]])))]
    names: Spanned<Vec<Spanned<String>>>,
    /// `true` on one host: unknown names, and clients that send none, belong to it.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = false)))]
    default: bool,
    /// PEM file of the certificate chain, leaf first; or a list of several (ECDSA and RSA), of which
    /// the first that suits the client is shown.
    #[cfg_attr(test, schemars(extend("examples" = ["/etc/pullgate/example.com.pem"])))]
    certificate: Spanned<OneOrMore>,
    /// PEM file of the private key; a list, if `certificate` is one. It is readable by its owner
    /// alone, or by the gate's group (or Debian's ssl-cert, if the gate is in it), or it is a systemd
    /// credential.
    #[cfg_attr(test, schemars(extend("examples" = ["/etc/pullgate/example.com.key"])))]
    key: Spanned<OneOrMore>,
    /// Which client certificates are trusted, any of: `"cloudflare"` (any Cloudflare customer's!),
    /// paths of CA files, key pins `"sha256:…"` (`pullgate spki`). One suffices, so that old and new
    /// overlap.
    #[cfg_attr(test, schemars(extend("examples" = [["/etc/pullgate/our-ca.pem"]])))]
    trust: Option<Spanned<Vec<Spanned<String>>>>,
    /// `"enforce"` refuses clients that are not trusted. `"log"` admits them, and log and
    /// `pullgate_gate_would_refuse_total` name them (a client without the key of its certificate is
    /// refused all the same). `"off"` asks no client. `status` calls the host unprotected in the last
    /// two.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = "enforce")))]
    client_auth: ClientAuth,
    /// PEM files of revocation lists, each signed by a CA in `trust` or by an intermediate. A
    /// certificate on a list of its CA is refused, also if its key is pinned; so is a CA. Of several
    /// lists of one CA and scope the newest counts. Once a CA has a list, its intermediates need one.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = [])))]
    crl: Vec<Spanned<PathBuf>>,
    /// `"refuse"` or `"accept"`: what an expired list is worth. With `"accept"` it counts as if it
    /// had not expired.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = "refuse")))]
    crl_expired: CrlExpired,
    /// The oldest TLS version: `"1.2"` or `"1.3"`.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = "1.2")))]
    min_tls: MinTls,
    /// Most intermediates between a client certificate and its CA, 0 to 6.
    #[serde(default = "intermediates")]
    #[cfg_attr(test, schemars(extend("default" = 2)))]
    max_depth: Spanned<usize>,
    /// `true`: the client certificate must name client authentication. By default it must only not
    /// name other usages alone.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = false)))]
    require_client_eku: bool,
    /// `"verified"`: the certificate of a resumed session is verified again. `"off"`: no session is
    /// resumed.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = "verified")))]
    resumption: Resumption,
    /// `"close"`: live connections of the host end when anything changes that decides which clients
    /// are trusted. `"keep"`: they go on.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = "keep")))]
    on_trust_change: OnTrustChange,
    /// Application protocols, first choice first. `"h2"` is offered only if the upstream is seen to
    /// speak it. Keep `"http/1.1"` for WebSockets. Without `upstream`, the default is `["h2",
    /// "http/1.1"]`.
    #[cfg_attr(test, schemars(extend("default" = ["http/1.1"])))]
    alpn: Option<Spanned<Vec<String>>>,
    /// The web server: `address:port`, or `unix:/path`. With `gate.steer`, the default is the web
    /// server on the same port of loopback, in TLS.
    #[cfg_attr(test, schemars(extend("examples" = ["127.0.0.1:8080"])))]
    upstream: Option<Spanned<String>>,
    /// Speaks TLS to the upstream, and verifies it.
    upstream_tls: Option<Spanned<RawReencryption>>,
    /// `true`: allows clear text to an upstream that is not loopback.
    #[serde(default)]
    #[cfg_attr(test, schemars(extend("default" = false)))]
    unsafe_upstream: bool,
    /// The header that names the client to the upstream: `"v2"`, `"v1"` or `"none"`. Without
    /// `upstream`, the default is `"none"`.
    #[cfg_attr(test, schemars(extend("default" = "v2")))]
    proxy_protocol: Option<ProxyProtocol>,
    /// `false`: a header of v2 has the addresses alone.
    #[serde(default = "yes")]
    #[cfg_attr(test, schemars(extend("default" = true)))]
    proxy_tlvs: bool,
    /// Most relayed connections of this host, if fewer than the gate's.
    #[serde(default, deserialize_with = "some_count")]
    #[cfg_attr(test, schemars(extend("examples" = [16384])))]
    max_connections: Option<usize>,
}

/// One file, or several.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged, expecting = "write a path, or a list of paths")]
enum OneOrMore {
    One(PathBuf),
    More(Vec<PathBuf>),
}

impl OneOrMore {
    fn paths(self) -> Vec<PathBuf> {
        match self {
            Self::One(path) => vec![path],
            Self::More(paths) => paths,
        }
    }
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
struct RawReencryption {
    /// The name on the upstream's certificate. By default the first of `names`; without `upstream`,
    /// the one that the client sent.
    #[cfg_attr(test, schemars(extend("examples" = ["example.com"])))]
    name: Option<String>,
    /// PEM file of the CAs that the upstream's certificate may come from, or of that certificate.
    /// Without it, the upstream must show the host's own certificate.
    #[cfg_attr(test, schemars(extend("examples" = ["/etc/pullgate/upstream-ca.pem"])))]
    ca_file: Option<Spanned<PathBuf>>,
}

impl RawHost {
    pub(super) fn convert(
        self,
        source: &Source<'_>,
        is_steered: bool,
    ) -> Result<HostSettings, ConfigError> {
        let at = |span: usize, field| source.place(span, format!("gate.host.{field}"));
        let names = convert_names(source, self.names)?;
        let certificates = convert_certificates(source, self.certificate, self.key)?;
        let trust = convert_trust(source, self.trust)?;
        if trust.is_empty() && self.client_auth != ClientAuth::Off {
            let place = names.first().map(|name| &name.place);
            let place = place.map_or_else(|| at(0, "trust"), |place| place.of("gate.host.trust"));
            return Err(place.error(
                "is missing or empty, so no client could connect; use \"cloudflare\", the path of \
                 your own CA, or a pin \"sha256:…\"",
            ));
        }
        let crls = self.crl.into_iter();
        let crls = crls
            .map(|path| located(source, path, "gate.host.crl").map(|path| absolute(source, path)));
        if *self.max_depth.as_ref() > DEPTH_MAX {
            return Err(
                at(self.max_depth.span().start, "max_depth").error(format_args!(
                    "is out of bounds; write a number of intermediates from 0 to {DEPTH_MAX}"
                )),
            );
        }
        let upstream = match &self.upstream {
            Some(upstream) => convert_upstream(source, upstream, self.upstream_tls, &names)?,
            None if is_steered => web_server(source, self.upstream_tls, &names)?,
            None => return Err(no_upstream(source, &names)),
        };
        let is_fixed = upstream.value.fixed().is_some();
        // What the web server speaks is asked; one behind a fixed address may be any program.
        let otherwise = if is_fixed { http } else { any_http };
        let has_alpn = self.alpn.is_some();
        let alpn = convert_alpn(source, self.alpn.unwrap_or_else(otherwise))?;

        if let Some(Target::Tcp(address)) = upstream.value.fixed()
            && !address.ip().to_canonical().is_loopback()
            && upstream.value.tls.is_none()
            && !self.unsafe_upstream
        {
            return Err(upstream.place.error(format_args!(
                "`{address}` is not loopback, so requests would travel in clear text and others \
                 may reach it around the gate; use 127.0.0.1, a UNIX socket, `upstream_tls`, or \
                 say `unsafe_upstream = true`"
            )));
        }

        Ok(HostSettings {
            names,
            is_default: self.default,
            certificates,
            trust,
            client_auth: self.client_auth,
            crls: crls.collect(),
            crl_expired: self.crl_expired,
            min_tls: self.min_tls,
            max_depth: self.max_depth.into_inner(),
            require_client_eku: self.require_client_eku,
            resumption: self.resumption,
            on_trust_change: self.on_trust_change,
            alpn,
            has_alpn,
            upstream,
            proxy_protocol: self.proxy_protocol.unwrap_or(if is_fixed {
                ProxyProtocol::V2
            } else {
                ProxyProtocol::None
            }),
            proxy_tlvs: self.proxy_tlvs,
            max_connections: self.max_connections,
        })
    }
}

fn convert_names(
    source: &Source<'_>,
    raw: Spanned<Vec<Spanned<String>>>,
) -> Result<Vec<Located<Name>>, ConfigError> {
    if raw.as_ref().is_empty() {
        let place = source.place(raw.span().start, "gate.host.names");
        return Err(place.error("is empty; name the hosts that this policy is for"));
    }
    let names = raw.into_inner().into_iter().map(|name| {
        let Located { mut value, place } = located(source, name, "gate.host.names");
        value.make_ascii_lowercase();
        // The root's dot is not part of a server name (RFC 6066 §3).
        if value.ends_with('.') {
            value.pop();
        }
        let parent = value.strip_prefix("*.");
        if !is_host_name(parent.unwrap_or(&value)) {
            return Err(place.error(format_args!(
                "`{}` is not a host name; write each name in full, such as www.example.com, or \
                 *.example.com for every name one label below, other alphabets as punycode",
                value.escape_debug()
            )));
        }
        let value = match parent {
            Some(parent) => Name::Wildcard(parent.to_owned()),
            None => Name::Exact(value),
        };
        Ok(Located { value, place })
    });
    names.collect()
}

fn convert_certificates(
    source: &Source<'_>,
    certificate: Spanned<OneOrMore>,
    key: Spanned<OneOrMore>,
) -> Result<Vec<KeyPair>, ConfigError> {
    let at = |span: usize, field| source.place(span, format!("gate.host.{field}"));
    let (certificate_at, key_at) = (
        at(certificate.span().start, "certificate"),
        at(key.span().start, "key"),
    );
    let (certificates, keys) = (certificate.into_inner().paths(), key.into_inner().paths());
    if certificates.is_empty() || certificates.len() != keys.len() {
        return Err(key_at.error(format_args!(
            "there are {} certificates and {} keys; name as many of each, in the same order, and \
             at least one",
            certificates.len(),
            keys.len()
        )));
    }
    let pairs = certificates.into_iter().zip(keys);
    let pairs = pairs.map(|(certificate_path, key_path)| KeyPair {
        certificate: Located {
            value: absolute(source, certificate_path),
            place: certificate_at.clone(),
        },
        key: Located {
            value: absolute(source, key_path),
            place: key_at.clone(),
        },
    });
    Ok(pairs.collect())
}

fn convert_trust(
    source: &Source<'_>,
    raw: Option<Spanned<Vec<Spanned<String>>>>,
) -> Result<Vec<Located<Trust>>, ConfigError> {
    let words = raw.map(Spanned::into_inner).unwrap_or_default();
    let trust = words.into_iter().map(|word| {
        let Located { value: word, place } = located(source, word, "gate.host.trust");
        let value = match word.split_once(':').filter(|(kind, _)| is_digest(kind)) {
            Some((_, digest)) => Trust::Pin(parse_digest(digest).ok_or_else(|| {
                place.error(format_args!(
                    "`{}` is no pin; write sha256: and the 64 hexadecimal digits that `pullgate \
                     pin <certificate>` prints",
                    word.escape_debug()
                ))
            })?),
            None if word == "cloudflare" => Trust::Cloudflare,
            None => Trust::CaFile(absolute(source, PathBuf::from(word))),
        };
        Ok(Located { value, place })
    });
    trust.collect()
}

fn is_digest(kind: &str) -> bool {
    kind.eq_ignore_ascii_case("sha256")
}

fn parse_digest(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    hex::decode_to_slice(text, &mut digest).ok()?;
    Some(digest)
}

fn convert_upstream(
    source: &Source<'_>,
    upstream: &Spanned<String>,
    tls: Option<Spanned<RawReencryption>>,
    names: &[Located<Name>],
) -> Result<Located<Upstream>, ConfigError> {
    let place = source.place(upstream.span().start, "gate.host.upstream");
    let target = parse_target(source, upstream).map_err(|problem| place.error(problem))?;
    let tls = tls.map(|tls| {
        let tls_at = source.place(tls.span().start, "gate.host.upstream_tls");
        let RawReencryption { name, ca_file } = tls.into_inner();
        let name = name.or_else(|| {
            names.iter().find_map(|served| match &served.value {
                Name::Exact(exact) => Some(exact.clone()),
                Name::Wildcard(_) => None,
            })
        });
        let name = name.filter(|name| is_host_name(name)).ok_or_else(|| {
            tls_at.error("`name` is missing or no host name; name whom the certificate is for")
        })?;
        Ok(Reencryption {
            name: UpstreamName::Fixed(name),
            trust: upstream_trust(source, ca_file),
        })
    });
    Ok(Located {
        value: Upstream {
            target: UpstreamTarget::Fixed(target),
            tls: tls.transpose()?,
        },
        place,
    })
}

fn convert_alpn(
    source: &Source<'_>,
    alpn: Spanned<Vec<String>>,
) -> Result<Vec<String>, ConfigError> {
    let place = source.place(alpn.span().start, "gate.host.alpn");
    let names = alpn.into_inner();
    let mut strange = names.iter();
    match strange.find(|name| !["h2", "http/1.1"].contains(&name.as_str())) {
        Some(name) => Err(place.error(format_args!(
            "`{}` is no protocol that Cloudflare speaks to origins over TLS; write \"http/1.1\" or \
             \"h2\"",
            name.escape_debug()
        ))),
        None => Ok(names),
    }
}

fn no_upstream(source: &Source<'_>, names: &[Located<Name>]) -> ConfigError {
    let place = names
        .first()
        .map(|name| name.place.of("gate.host.upstream"));
    let place = place.unwrap_or_else(|| source.place(0, "gate.host.upstream"));
    place.error(
        "is missing; name the web server, such as \"127.0.0.1:8080\" or \"unix:/path\" (with \
         `gate.steer = true` it is found by itself)",
    )
}

/// The web server that listens where clients connect to, as they would reach it without the gate.
fn web_server(
    source: &Source<'_>,
    tls: Option<Spanned<RawReencryption>>,
    names: &[Located<Name>],
) -> Result<Located<Upstream>, ConfigError> {
    let place = names
        .first()
        .map(|name| name.place.of("gate.host.upstream"));
    let place = place.unwrap_or_else(|| source.place(0, "gate.host.upstream"));
    let (name, ca_file) = match tls {
        None => (None, None),
        Some(tls) => {
            let tls_at = source.place(tls.span().start, "gate.host.upstream_tls");
            let RawReencryption { name, ca_file } = tls.into_inner();
            if name.as_ref().is_some_and(|name| !is_host_name(name)) {
                return Err(tls_at.error(
                    "`name` is no host name; name whom the certificate is for, or leave it out for \
                     the name that the client says",
                ));
            }
            (name, ca_file)
        }
    };
    Ok(Located {
        value: Upstream {
            target: UpstreamTarget::SamePort,
            tls: Some(Reencryption {
                name: name.map_or(UpstreamName::Clients, UpstreamName::Fixed),
                trust: upstream_trust(source, ca_file),
            }),
        },
        place,
    })
}

fn upstream_trust(source: &Source<'_>, ca_file: Option<Spanned<PathBuf>>) -> UpstreamTrust {
    ca_file.map_or(UpstreamTrust::Shown, |path| {
        let path = located(source, path, "gate.host.upstream_tls.ca_file");
        UpstreamTrust::CaFile(path.map(|path| absolute(source, path)))
    })
}

pub(super) fn some_count<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<usize>, D::Error> {
    count(deserializer).map(Some)
}

fn http() -> Spanned<Vec<String>> {
    Spanned::unwritten(vec!["http/1.1".to_owned()])
}

fn any_http() -> Spanned<Vec<String>> {
    Spanned::unwritten(vec!["h2".to_owned(), "http/1.1".to_owned()])
}

fn intermediates() -> Spanned<usize> {
    Spanned::unwritten(DEFAULT_DEPTH)
}

fn yes() -> bool {
    true
}

/// What webpki would try.
const DEPTH_MAX: usize = 6;
