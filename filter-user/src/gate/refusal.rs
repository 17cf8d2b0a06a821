//! How a connection ended: relayed, or refused for a reason that metrics, logs and docs share. `manual` has
//! what operators read of each.

mod manual;

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

    /// How an admitted connection ended.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Relayed => {
                "both sides ended it, or one did when the upstream had had the last word"
            }
            Self::Idle => "no byte came in either direction for `idle_timeout`",
            Self::Aborted => "one side broke it off",
            Self::Misused => "the client misused TLS: a flood of key updates or empty records",
            Self::Stopped => "the gate was stopped",
            Self::TrustChanged => {
                "the host's trust has changed, with `on_trust_change = \"close\"`"
            }
            Self::Refused(refusal) => refusal.meaning(),
        }
    }

    /// Those of admitted connections.
    #[must_use]
    pub fn of_admitted() -> [Self; 6] {
        [
            Self::Relayed,
            Self::Idle,
            Self::Aborted,
            Self::Misused,
            Self::Stopped,
            Self::TrustChanged,
        ]
    }
}

/// Why a connection was refused.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// We received a certificate that no CA of the host's may vouch for, even if it signed it.
    BadCertificate(Defect),
    /// We received no PROXY header from a load balancer that must send one, a damaged one, or one
    /// from a client that may not send one.
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
    /// The client offers no application protocol that this host speaks (ALPN, RFC 7301 §3.2).
    NoSharedProtocol,
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

/// What is wrong with a certificate.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Defect {
    /// It has a critical extension that is not understood (RFC 5280 §4.2).
    CriticalExtension,
    /// It was signed by a certificate that may not sign: no CA, or no keyCertSign (RFC 5280 §4.2.1.3).
    IssuerNotCa,
    /// It breaks a rule of a CA on its chain: name constraints, path length.
    RuleOfCa,
    /// It cannot be read.
    Unreadable,
    /// It is not of X.509 version 3.
    Version,
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
    /// No server listens there, or it cannot be reached.
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
            TlsError::NoApplicationProtocol => Self::NoSharedProtocol,
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
                refusal
                    .copied()
                    .unwrap_or(Self::BadCertificate(Defect::Unreadable))
            }
            _ => Self::BadCertificate(Defect::Unreadable),
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
            WebpkiError::UnsupportedCertVersion => Self::BadCertificate(Defect::Version),
            WebpkiError::UnsupportedCriticalExtension => {
                Self::BadCertificate(Defect::CriticalExtension)
            }
            WebpkiError::EndEntityUsedAsCa => Self::BadCertificate(Defect::IssuerNotCa),
            WebpkiError::NameConstraintViolation | WebpkiError::PathLenConstraintViolated => {
                Self::BadCertificate(Defect::RuleOfCa)
            }
            _ => Self::BadCertificate(Defect::Unreadable),
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
            Self::BadCertificate(_) => CertificateError::BadEncoding,
            Self::BadProxyHeader
            | Self::Closed
            | Self::Denied
            | Self::HostUnavailable
            | Self::NoCertificate
            | Self::NoServerName
            | Self::NoSharedProtocol
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
