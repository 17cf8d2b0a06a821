//! How a connection ended: relayed, or refused for a reason that metrics, logs and docs share.

use std::fmt::{self, Display, Formatter};
use std::io::{self, ErrorKind};
use std::sync::Arc;

use rustls::{AlertDescription, CertificateError, Error as TlsError, OtherError};
use webpki::Error as WebpkiError;

/// How a connection ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// Bytes were relayed until both sides were done.
    Relayed,
    /// Neither side sent a byte for the idle time.
    Idle,
    /// One side broke off.
    Aborted,
    /// The client misused TLS after the handshake: empty records or key updates without end.
    Misused,
    /// The gate was stopped.
    Stopped,
    /// The host's trust was changed, and live connections are to end with it.
    TrustChanged,
    /// It was refused before a byte was relayed.
    Refused(Refusal),
}

impl Outcome {
    /// The word in `pullgate_gate_connections_total{outcome}`.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Relayed => "Relayed",
            Self::Idle => "Idle",
            Self::Aborted => "Aborted",
            Self::Misused => "Misused",
            Self::Stopped => "Stopped",
            Self::TrustChanged => "TrustChanged",
            Self::Refused(refusal) => refusal.label(),
        }
    }
}

/// Why a connection was refused.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// We received a certificate that is none, or of a kind that is not accepted.
    BadCertificate,
    /// We received no PROXY header from a load balancer that must send one, a damaged one, or one
    /// from somebody who may not.
    BadProxyHeader,
    /// We received a signature that its key did not make, or that proves too little: SHA-1, RSA
    /// of less than 2,048 bits.
    BadSignature,
    /// The client closed the connection before the handshake was done.
    Closed,
    /// The list of revoked certificates has expired.
    CrlExpired,
    /// There is no list of revoked certificates of an intermediate CA.
    CrlMissing,
    /// The source address is in the operator's `deny`.
    Denied,
    /// The client certificate has expired.
    Expired,
    /// The client presented no certificate.
    NoCertificate,
    /// The client named a host of which a file cannot be used.
    HostUnavailable,
    /// The client named no host.
    NoServerName,
    /// The source address is in no range and no rule.
    NotListed,
    /// The client certificate is not valid yet.
    NotYetValid,
    /// The client certificate's key is not one of those that are pinned.
    PinMismatch,
    /// We received HTTP, or other text, where TLS was due.
    Plaintext,
    /// We received something that is not TLS, or not a version of it that is offered.
    Protocol,
    /// The client refused us: an alert of its own.
    RefusedByClient,
    /// The client certificate is revoked.
    Revoked,
    /// The client certificate is from Cloudflare's shared CA, where an own one is demanded.
    SharedCertificate,
    /// The client, or the upstream, was too slow.
    Timeout(Phase),
    /// There is more of something than the limits allow.
    TooMany(Limit),
    /// The client certificate comes from no CA that this host trusts.
    UnknownIssuer,
    /// The client named a host that is not served here.
    UnknownServerName,
    /// The upstream does not take the connection.
    Upstream(UpstreamFault),
    /// The client certificate may not be used by a client.
    WrongUsage,
}

/// What was being waited for when the time was up.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Phase {
    /// A load balancer's PROXY header.
    ProxyHeader,
    /// The ClientHello.
    Hello,
    /// The rest of the handshake.
    Handshake,
    /// The upstream.
    Upstream,
}

/// What there is too much of.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Limit {
    /// Handshakes in flight.
    Handshakes,
    /// Bytes before the end of the ClientHello.
    HelloBytes,
    /// Connections of the host.
    HostConnections,
    /// What one source takes.
    OfSource(Quantity),
    /// The same of one network.
    OfNetwork(Quantity),
}

/// What a share is of.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Quantity {
    /// Open connections to one host.
    Connections,
    /// Handshakes in flight with one host.
    Handshakes,
    /// Connections that have not said their hello.
    Hellos,
    /// Handshakes begun per second with one host.
    PerSecond,
}

/// What is wrong with the upstream.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum UpstreamFault {
    /// Nobody listens there, or it cannot be reached.
    Unreachable,
    /// Its certificate does not verify, or its TLS fails.
    Tls,
    /// It went away without an answer.
    Broken,
}

impl Refusal {
    /// Reads the reason out of a failed handshake.
    #[must_use]
    pub fn from_handshake(error: &io::Error) -> Self {
        let source = error.get_ref();
        if let Some(refusal) = source.and_then(|source| source.downcast_ref::<Self>()) {
            return *refusal;
        }
        match source.and_then(|source| source.downcast_ref::<TlsError>()) {
            Some(of_tls) => Self::from_tls(of_tls),
            None if is_disconnect(error.kind()) => Self::Closed,
            None => Self::Protocol,
        }
    }

    /// Reads the reason out of what rustls says.
    #[must_use]
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "rustls' errors are open-ended"
    )]
    pub fn from_tls(error: &TlsError) -> Self {
        match error {
            TlsError::NoCertificatesPresented => Self::NoCertificate,
            TlsError::InvalidCertificate(error) => Self::from_certificate(error),
            TlsError::AlertReceived(AlertDescription::CloseNotify) => Self::Closed,
            TlsError::AlertReceived(_) => Self::RefusedByClient,
            _ => Self::Protocol,
        }
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "rustls' errors are open-ended"
    )]
    fn from_certificate(error: &CertificateError) -> Self {
        match error {
            CertificateError::Expired => Self::Expired,
            CertificateError::NotValidYet => Self::NotYetValid,
            CertificateError::UnknownIssuer => Self::UnknownIssuer,
            CertificateError::Revoked => Self::Revoked,
            CertificateError::UnknownRevocationStatus => Self::CrlMissing,
            CertificateError::ExpiredRevocationList => Self::CrlExpired,
            CertificateError::BadSignature
            | CertificateError::UnsupportedSignatureAlgorithmContext { .. }
            | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
                Self::BadSignature
            }
            CertificateError::InvalidPurpose => Self::WrongUsage,
            CertificateError::Other(OtherError(error)) => {
                let refusal = error.downcast_ref::<Self>();
                refusal.copied().unwrap_or(Self::BadCertificate)
            }
            _ => Self::BadCertificate,
        }
    }

    /// Reads the reason out of what webpki says of a client's chain.
    #[must_use]
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "webpki's errors are open-ended"
    )]
    pub(super) fn from_webpki(error: &WebpkiError) -> Self {
        match error {
            WebpkiError::CertExpired { .. } => Self::Expired,
            WebpkiError::CertNotValidYet { .. } => Self::NotYetValid,
            WebpkiError::CertRevoked => Self::Revoked,
            WebpkiError::CrlExpired { .. } => Self::CrlExpired,
            WebpkiError::UnknownRevocationStatus
            | WebpkiError::InvalidCrlSignatureForPublicKey
            | WebpkiError::IssuerNotCrlSigner
            | WebpkiError::UnsupportedCrlSignatureAlgorithmContext(_)
            | WebpkiError::UnsupportedCrlSignatureAlgorithmForPublicKeyContext(_) => {
                Self::CrlMissing
            }
            WebpkiError::UnknownIssuer | WebpkiError::MaximumPathDepthExceeded => {
                Self::UnknownIssuer
            }
            WebpkiError::RequiredEkuNotFoundContext(_)
            | WebpkiError::EmptyEkuExtension
            | WebpkiError::CaUsedAsEndEntity => Self::WrongUsage,
            WebpkiError::InvalidSignatureForPublicKey
            | WebpkiError::UnsupportedSignatureAlgorithmContext(_)
            | WebpkiError::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => {
                Self::BadSignature
            }
            _ => Self::BadCertificate,
        }
    }

    /// The error that makes rustls send the alert that fits, and [`Self::from_tls`] find us again.
    pub(super) fn into_tls(self) -> TlsError {
        let error = match self {
            Self::Expired => CertificateError::Expired,
            Self::NotYetValid => CertificateError::NotValidYet,
            Self::UnknownIssuer => CertificateError::UnknownIssuer,
            Self::Revoked => CertificateError::Revoked,
            Self::CrlMissing => CertificateError::UnknownRevocationStatus,
            Self::CrlExpired => CertificateError::ExpiredRevocationList,
            Self::BadSignature => CertificateError::BadSignature,
            Self::WrongUsage => CertificateError::InvalidPurpose,
            Self::BadCertificate => CertificateError::BadEncoding,
            Self::BadProxyHeader
            | Self::Closed
            | Self::Denied
            | Self::HostUnavailable
            | Self::NoCertificate
            | Self::NoServerName
            | Self::NotListed
            | Self::PinMismatch
            | Self::Plaintext
            | Self::Protocol
            | Self::RefusedByClient
            | Self::SharedCertificate
            | Self::Timeout(_)
            | Self::TooMany(_)
            | Self::UnknownServerName
            | Self::Upstream(_) => CertificateError::Other(OtherError(Arc::new(self))),
        };
        TlsError::InvalidCertificate(error)
    }

    /// The word in metrics, logs and documentation.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::BadCertificate => "BadCertificate",
            Self::BadProxyHeader => "BadProxyHeader",
            Self::BadSignature => "BadSignature",
            Self::Closed => "Closed",
            Self::CrlExpired => "CrlExpired",
            Self::CrlMissing => "CrlMissing",
            Self::Denied => "Denied",
            Self::Expired => "Expired",
            Self::NoCertificate => "NoCertificate",
            Self::NoServerName => "NoServerName",
            Self::NotListed => "NotListed",
            Self::NotYetValid => "NotYetValid",
            Self::PinMismatch => "PinMismatch",
            Self::Plaintext => "Plaintext",
            Self::Protocol => "Protocol",
            Self::HostUnavailable => "HostUnavailable",
            Self::RefusedByClient => "RefusedByClient",
            Self::Revoked => "Revoked",
            Self::SharedCertificate => "SharedCertificate",
            Self::Timeout(Phase::ProxyHeader) => "TimeoutProxyHeader",
            Self::Timeout(Phase::Hello) => "TimeoutHello",
            Self::Timeout(Phase::Handshake) => "TimeoutHandshake",
            Self::Timeout(Phase::Upstream) => "TimeoutUpstream",
            Self::TooMany(Limit::Handshakes) => "TooManyHandshakes",
            Self::TooMany(Limit::HelloBytes) => "TooManyHelloBytes",
            Self::TooMany(Limit::HostConnections) => "TooManyHostConnections",
            Self::TooMany(Limit::OfSource(Quantity::Connections)) => "TooManySourceConnections",
            Self::TooMany(Limit::OfSource(Quantity::Handshakes)) => "TooManySourceHandshakes",
            Self::TooMany(Limit::OfSource(Quantity::Hellos)) => "TooManySourceHellos",
            Self::TooMany(Limit::OfSource(Quantity::PerSecond)) => "TooManySourcePerSecond",
            Self::TooMany(Limit::OfNetwork(Quantity::Connections)) => "TooManyNetworkConnections",
            Self::TooMany(Limit::OfNetwork(Quantity::Handshakes)) => "TooManyNetworkHandshakes",
            Self::TooMany(Limit::OfNetwork(Quantity::Hellos)) => "TooManyNetworkHellos",
            Self::TooMany(Limit::OfNetwork(Quantity::PerSecond)) => "TooManyNetworkPerSecond",
            Self::UnknownIssuer => "UnknownIssuer",
            Self::UnknownServerName => "UnknownServerName",
            Self::Upstream(UpstreamFault::Unreachable) => "UpstreamUnreachable",
            Self::Upstream(UpstreamFault::Tls) => "UpstreamTls",
            Self::Upstream(UpstreamFault::Broken) => "UpstreamBroken",
            Self::WrongUsage => "WrongUsage",
        }
    }

    /// What the operator should do next.
    #[must_use]
    #[expect(clippy::too_many_lines, reason = "a table")]
    pub fn advice(self) -> &'static str {
        match self {
            Self::NoCertificate => {
                "is Authenticated Origin Pulls on (dashboard: SSL/TLS, Origin Server), and is the \
                 encryption mode Full or Full (strict)?"
            }
            Self::SharedCertificate => {
                "another Cloudflare customer may be pointing at this address; if it is you, \
                 upload your own certificate to Cloudflare (zone or per-hostname Authenticated \
                 Origin Pulls), for this host does not trust the shared one"
            }
            Self::UnknownIssuer => {
                "is the certificate that was uploaded to Cloudflare from a CA that `trust` names, \
                 with all its intermediates and no more than `max_depth` of them?"
            }
            Self::PinMismatch => {
                "was another certificate uploaded to Cloudflare? `pullgate spki <certificate>` \
                 prints what to add to `trust`"
            }
            Self::Expired => {
                "Cloudflare goes on presenting an expired certificate: upload a new one (and let \
                 `trust` name the old and the new CA until it is in use)"
            }
            Self::NotYetValid => "is this host's clock right?",
            Self::WrongUsage => {
                "the uploaded certificate must be a leaf (CA:FALSE) that allows client \
                 authentication; with `require_client_eku`, it must say so"
            }
            Self::Revoked => "upload a certificate to Cloudflare that is not revoked",
            Self::CrlExpired => {
                "fetch a new list for `crl`, and let something fetch it before it expires"
            }
            Self::CrlMissing => {
                "is the list of each CA on the client's chain in `crl`, signed by that CA, and does \
                 its key usage have cRLSign?"
            }
            Self::UnknownServerName | Self::NoServerName => {
                "if this name is yours, add a [[gate.host]] for it; if not, another Cloudflare \
                 customer may be pointing at this address"
            }
            Self::NotListed => {
                "a connection around Cloudflare reached the gate: is the filter attached? A load \
                 balancer of yours belongs into `gate.proxy_from`"
            }
            Self::Denied => "an address in `ranges.deny` reached the gate: is the filter attached?",
            Self::HostUnavailable => {
                "a file of this host cannot be used since the gate was started: `pullgate status` \
                 names it"
            }
            Self::RefusedByClient => {
                "with Full (strict), Cloudflare verifies this host's certificate: is it valid, and \
                 for this name?"
            }
            Self::Upstream(UpstreamFault::Unreachable) | Self::Timeout(Phase::Upstream) => {
                "is the web server running, and does it listen on `upstream`, or where connections are steered \
                 on the same port? With `client_address = \"transparent\"`: does a firewall of this host drop \
                 what comes in by `lo` from clients' addresses?"
            }
            Self::Upstream(UpstreamFault::Tls) => {
                "does the web server show another certificate than `certificate` (reload it after a renewal), \
                 or none from `upstream_tls.ca_file`, valid, and for `upstream_tls.name`? Does it take the \
                 header of `proxy_protocol` (nginx before 1.23.2: \"v1\")?"
            }
            Self::Upstream(UpstreamFault::Broken) => {
                "the web server closed at once: does it expect the PROXY header of \
                 `proxy_protocol`?"
            }
            Self::Plaintext => "is the encryption mode Full or Full (strict), not Flexible or Off?",
            Self::BadProxyHeader | Self::Timeout(Phase::ProxyHeader) => {
                "does each load balancer in `gate.proxy_from` send the PROXY protocol, and is each \
                 that sends it named there?"
            }
            Self::TooMany(Limit::Handshakes) => {
                "a flood, or `max_handshakes` is too low for this host"
            }
            Self::TooMany(Limit::HostConnections) => {
                "a flood, or the host's `max_connections` is too low"
            }
            Self::TooMany(
                Limit::OfSource(Quantity::Hellos) | Limit::OfNetwork(Quantity::Hellos),
            ) => {
                "connections that say nothing: the oldest was closed for a newer one; nothing to do"
            }
            Self::TooMany(Limit::OfSource(_)) => {
                "one address floods this host, or [gate.per_source] is too low"
            }
            Self::TooMany(Limit::OfNetwork(_)) => {
                "one network floods this host, or [gate.per_network] is too low"
            }
            Self::BadCertificate => {
                "is the uploaded certificate of X.509 version 3? `openssl x509 -req` makes version \
                 1 unless it is given an -extfile; a pin takes either"
            }
            Self::BadSignature => {
                "a forgery; or is the uploaded certificate's key RSA of less than 2,048 bits, or \
                 its signature SHA-1?"
            }
            Self::Protocol => "a scanner; Cloudflare speaks TLS 1.2 and 1.3: is `min_tls` right?",
            Self::TooMany(Limit::HelloBytes) => {
                "an attack: no client needs a ClientHello that long"
            }
            Self::Timeout(Phase::Hello | Phase::Handshake) => {
                "a slow client, or one that only holds connections open; nothing to do"
            }
            Self::Closed => "a health check, a scanner, or a client that gave up; nothing to do",
        }
    }
}

impl Display for Refusal {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// Whether the error is one that any peer causes by going away.
pub(super) fn is_disconnect(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::NotConnected
    )
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_reason_is_in_the_manual() {
        let manual = include_str!("../../../README.md");
        let source = include_str!("refusal.rs");
        let labels = source.lines().filter_map(|line| {
            let (_, label) = line.trim().split_once(" => \"")?;
            let label = label.strip_suffix("\",")?;
            label.chars().all(char::is_alphanumeric).then_some(label)
        });
        let labels: Vec<_> = labels.collect();

        assert!(labels.len() > 30, "{labels:?}");
        for label in labels {
            assert!(manual.contains(&format!("`{label}`")), "{label}");
        }
    }
}
