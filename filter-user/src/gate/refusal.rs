//! How a connection ended: relayed, or refused for a reason that metrics, logs and docs share.

use std::fmt::{self, Display, Formatter};
use std::io::{self, ErrorKind};

use rustls::{AlertDescription, CertificateError, Error as TlsError};

/// How a connection ended.
#[derive(Debug)]
pub enum Outcome {
    /// Bytes were relayed until both sides were done.
    Relayed,
    /// Neither side sent a byte for the idle time.
    Idle,
    /// One side broke off, or the gate was stopped.
    Aborted,
    /// It was refused before a byte was relayed.
    Refused(Refusal),
}

impl Outcome {
    /// The word in `pullgate_gate_connections_total{outcome}`.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Relayed => "Relayed",
            Self::Idle => "Idle",
            Self::Aborted => "Aborted",
            Self::Refused(refusal) => refusal.label(),
        }
    }
}

/// Why a connection was refused.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// We received a certificate that is none, or of a kind that is not accepted.
    BadCertificate,
    /// We received a signature that its key did not make.
    BadSignature,
    /// The client closed the connection before the handshake was done.
    Closed,
    /// The source address is in the operator's `deny`.
    Denied,
    /// The client certificate has expired.
    Expired,
    /// The client presented no certificate.
    NoCertificate,
    /// The client named no host.
    NoServerName,
    /// The source address is in no range and no rule.
    NotListed,
    /// The client certificate is not valid yet.
    NotYetValid,
    /// We received HTTP, or other text, where TLS was due.
    Plaintext,
    /// We received something that is not TLS, or not a version of it that is offered.
    Protocol,
    /// The client refused us: an alert of its own.
    RefusedByClient,
    /// The client certificate is revoked.
    Revoked,
    /// The client was too slow.
    Timeout(Phase),
    /// Too many handshakes are in flight.
    TooManyHandshakes,
    /// The client certificate comes from no CA that this host trusts.
    UnknownIssuer,
    /// The client named a host that is not served here.
    UnknownServerName,
    /// The upstream cannot be reached.
    Upstream,
    /// The client certificate may not be used by a client.
    WrongUsage,
}

/// What was being waited for when the time was up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Phase {
    /// The ClientHello.
    Hello,
    /// The rest of the handshake.
    Handshake,
    /// The upstream.
    Upstream,
}

impl Refusal {
    /// Reads the reason out of a failed handshake.
    #[must_use]
    pub fn from_handshake(error: &io::Error) -> Self {
        let source = error.get_ref();
        match source.and_then(|source| source.downcast_ref::<TlsError>()) {
            Some(error) => Self::from_tls(error),
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
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Self::NotYetValid
            }
            CertificateError::UnknownIssuer => Self::UnknownIssuer,
            CertificateError::Revoked => Self::Revoked,
            CertificateError::BadSignature => Self::BadSignature,
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                Self::WrongUsage
            }
            _ => Self::BadCertificate,
        }
    }

    /// The word in metrics, logs and documentation.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::BadCertificate => "BadCertificate",
            Self::BadSignature => "BadSignature",
            Self::Closed => "Closed",
            Self::Denied => "Denied",
            Self::Expired => "Expired",
            Self::NoCertificate => "NoCertificate",
            Self::NoServerName => "NoServerName",
            Self::NotListed => "NotListed",
            Self::NotYetValid => "NotYetValid",
            Self::Plaintext => "Plaintext",
            Self::Protocol => "Protocol",
            Self::RefusedByClient => "RefusedByClient",
            Self::Revoked => "Revoked",
            Self::Timeout(Phase::Hello) => "TimeoutHello",
            Self::Timeout(Phase::Handshake) => "TimeoutHandshake",
            Self::Timeout(Phase::Upstream) => "TimeoutUpstream",
            Self::TooManyHandshakes => "TooManyHandshakes",
            Self::UnknownIssuer => "UnknownIssuer",
            Self::UnknownServerName => "UnknownServerName",
            Self::Upstream => "Upstream",
            Self::WrongUsage => "WrongUsage",
        }
    }

    /// What the operator should look at, for refusals that a legitimate set-up runs into.
    #[must_use]
    pub fn advice(&self) -> &'static str {
        match self {
            Self::NoCertificate => {
                "is Authenticated Origin Pulls on (dashboard: SSL/TLS, Origin Server), and is the \
                 encryption mode Full or Full (strict)?"
            }
            Self::UnknownIssuer => {
                "another Cloudflare customer may be pointing at this address, or the certificate \
                 uploaded to Cloudflare is from a CA that `trust` does not name"
            }
            Self::Expired => {
                "Cloudflare goes on presenting an expired certificate: upload a new one (and let \
                 `trust` name the old and the new CA until it is in use)"
            }
            Self::NotYetValid => "is this host's clock right?",
            Self::WrongUsage => "the uploaded certificate must allow client authentication",
            Self::UnknownServerName | Self::NoServerName => {
                "if this name is yours, add a [[gate.host]] for it"
            }
            Self::NotListed => {
                "a connection around Cloudflare reached the gate: is the filter attached?"
            }
            Self::RefusedByClient => {
                "with Full (strict), Cloudflare verifies this host's certificate: is it valid, and \
                 for this name?"
            }
            Self::Upstream | Self::Timeout(Phase::Upstream) => {
                "is the web server running, and does it listen on `upstream`?"
            }
            Self::Plaintext => "is the encryption mode Full or Full (strict), not Flexible or Off?",
            Self::TooManyHandshakes => "a flood, or `max_handshakes` is too low for this host",
            Self::BadCertificate => {
                "is the uploaded certificate of X.509 version 3? `openssl x509 -req` makes version \
                 1 unless it is given an -extfile"
            }
            Self::BadSignature
            | Self::Closed
            | Self::Denied
            | Self::Protocol
            | Self::Revoked
            | Self::Timeout(Phase::Hello | Phase::Handshake) => "",
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
