//! What operators read of each reason: a word, what has happened, what to do next, and a command that shows the
//! cause. docs/refusals.md is made from it.

use super::{Defect, Limit, Phase, Quantity, Refusal, UpstreamFault};

impl Refusal {
    /// The word in metrics, logs and documentation.
    #[must_use]
    pub fn label(self) -> &'static str {
        self.entry().label
    }

    /// What has happened.
    #[must_use]
    pub fn meaning(self) -> &'static str {
        self.entry().meaning
    }

    /// What the operator should do next.
    #[must_use]
    pub fn advice(self) -> &'static str {
        self.entry().advice
    }

    /// The error of Cloudflare's that a visitor sees for it; none for what is no visitor's.
    ///
    /// developers.cloudflare.com/support, "Cloudflare 5xx errors": 525 is a failed handshake. With TLS 1.3 a
    /// certificate is refused after the client's side of it has ended, and Cloudflare lists that under 520.
    #[must_use]
    pub fn visitor_sees(self) -> Option<&'static str> {
        match self {
            Self::NotListed
            | Self::Denied
            | Self::Plaintext
            | Self::Closed
            | Self::Timeout(Phase::Handshake | Phase::Hello | Phase::ProxyHeader) => None,
            Self::NoServerName
            | Self::UnknownServerName
            | Self::NoSharedProtocol
            | Self::Protocol
            | Self::BadProxyHeader => Some("525"),
            Self::RefusedByClient => Some("526"),
            Self::Timeout(Phase::Upstream) | Self::Upstream(_) => Some("520"),
            Self::NoCertificate
            | Self::SharedCertificate
            | Self::UnknownIssuer
            | Self::PinMismatch
            | Self::Expired
            | Self::NotYetValid
            | Self::WrongUsage
            | Self::BadCertificate(_)
            | Self::BadSignature
            | Self::Revoked
            | Self::CrlExpired
            | Self::CrlMissing
            | Self::HostUnavailable
            | Self::TooMany(_) => Some("520 or 525"),
        }
    }

    /// A command on the host that shows the cause: `client.pem` is the certificate at Cloudflare, `our-ca.pem`
    /// what signed it.
    #[must_use]
    pub fn command(self) -> &'static str {
        match self {
            Self::NotListed => "pullgate ranges show 198.51.100.7",
            Self::Denied => "pullgate explain 198.51.100.7",
            Self::NoServerName => "openssl s_client -connect 203.0.113.10:443 -noservername",
            Self::NoCertificate => {
                "openssl s_client -connect 203.0.113.10:443 -servername www.example.com"
            }
            Self::NoSharedProtocol => {
                "openssl s_client -connect 203.0.113.10:443 -servername www.example.com -alpn http/1.1"
            }
            Self::Protocol => {
                "openssl s_client -connect 203.0.113.10:443 -servername www.example.com -tls1_2"
            }
            Self::SharedCertificate => "openssl x509 -in our-ca.pem -noout -subject",
            Self::UnknownIssuer => "openssl verify -CAfile our-ca.pem client.pem",
            Self::PinMismatch => "pullgate spki client.pem",
            Self::Expired => "openssl x509 -in client.pem -noout -enddate",
            Self::NotYetValid => "date --utc",
            Self::WrongUsage | Self::BadCertificate(_) | Self::BadSignature => {
                "openssl x509 -in client.pem -noout -text"
            }
            Self::Revoked => "openssl crl -in crl.pem -noout -text",
            Self::CrlExpired => "openssl crl -in crl.pem -noout -nextupdate",
            Self::CrlMissing => "openssl crl -in crl.pem -noout -issuer",
            Self::RefusedByClient | Self::Upstream(UpstreamFault::Tls) => {
                "openssl x509 -in shop.example.pem -noout -ext subjectAltName"
            }
            Self::Plaintext => "curl --max-time 5 http://203.0.113.10:443/",
            Self::Closed
            | Self::Timeout(Phase::Upstream)
            | Self::Upstream(UpstreamFault::Unreachable) => "ss --tcp --listening --numeric",
            Self::BadProxyHeader | Self::Timeout(Phase::ProxyHeader) => "pullgate check",
            Self::Upstream(UpstreamFault::Broken) => {
                "curl --silent --haproxy-protocol http://127.0.0.1:8080/"
            }
            Self::HostUnavailable
            | Self::UnknownServerName
            | Self::Timeout(Phase::Hello | Phase::Handshake)
            | Self::TooMany(_) => "pullgate status",
        }
    }

    #[expect(clippy::too_many_lines, reason = "a table")]
    fn entry(self) -> Entry {
        let entry = |label, meaning, advice| Entry {
            label,
            meaning,
            advice,
        };
        match self {
            Self::BadCertificate(Defect::CriticalExtension) => entry(
                "BadCertificate",
                "a critical extension of the certificate is not understood",
                "make the certificate without it",
            ),
            Self::BadCertificate(Defect::IssuerNotCa) => entry(
                "BadCertificate",
                "the certificate was signed by one that may not sign",
                "let a CA sign it: CA:TRUE and, if there is a key usage, keyCertSign",
            ),
            Self::BadCertificate(Defect::RuleOfCa) => entry(
                "BadCertificate",
                "the certificate breaks a rule of a CA on its chain: name constraints or path \
                 length",
                "make one that keeps to them, or name another CA in `trust`",
            ),
            Self::BadCertificate(Defect::Unreadable) => entry(
                "BadCertificate",
                "the certificate cannot be read",
                "upload another certificate to Cloudflare",
            ),
            Self::BadCertificate(Defect::Version) => entry(
                "BadCertificate",
                "the certificate is not of X.509 version 3",
                "`openssl x509 -req` makes version 1 unless it is given an -extfile; a pin \
                 takes either",
            ),
            Self::BadProxyHeader => entry(
                "BadProxyHeader",
                "a load balancer in `gate.proxy_from` sent no PROXY header or a damaged one, \
                 or an address that is not there sent one",
                "does each load balancer in `gate.proxy_from` send the PROXY protocol, and is \
                 each that sends it named there?",
            ),
            Self::BadSignature => entry(
                "BadSignature",
                "the client has not the certificate's key, or a signature proves too little: \
                 SHA-1, RSA of less than 2,048 bits",
                "was it signed by another CA of the same name as one in `trust`, such as one that was made again? Else a forgery; or is the uploaded certificate's key RSA of less than 2,048 bits, \
                 or its signature SHA-1?",
            ),
            Self::Closed => entry(
                "Closed",
                "the client went away during the handshake",
                "a health check, a scanner, or a client that gave up; nothing to do",
            ),
            Self::CrlExpired => entry(
                "CrlExpired",
                "the revocation list of the certificate's CA has expired",
                "fetch a new list for `crl`, and let a timer fetch it before it expires",
            ),
            Self::CrlMissing => entry(
                "CrlMissing",
                "a CA on the chain has no revocation list, or none with a good signature, and \
                 `crl` is in use",
                "is the list of each CA on the client's chain in `crl`, signed by that CA, \
                 and does its key usage have cRLSign?",
            ),
            Self::Denied => entry(
                "Denied",
                "the source address is in `ranges.deny`",
                "an address in `ranges.deny` reached the gate: is the filter attached?",
            ),
            Self::Expired => entry(
                "Expired",
                "the client certificate, or a CA on its chain, has expired by this host's clock",
                "Cloudflare goes on presenting an expired certificate: upload a new one (and \
                 let `trust` name the old and the new CA until it is in use)",
            ),
            Self::HostUnavailable => entry(
                "HostUnavailable",
                "a file of the host could not be used when the gate was started; other hosts \
                 are served",
                "`pullgate status` names the file: mend it, and it is read at once",
            ),
            Self::NoCertificate => entry(
                "NoCertificate",
                "the client presented no certificate",
                "is Authenticated Origin Pulls on (dashboard: SSL/TLS, Origin Server), and is \
                 the encryption mode Full or Full (strict)? Health checks come \
                 without a certificate, and so do Cloudflare's load-balancing monitors unless \
                 \"Simulate Zone\" is set",
            ),
            Self::NoServerName => entry(
                "NoServerName",
                "the client named no host, and no host is the default",
                "if this name is yours, add a [[gate.host]] for it; if not, another \
                 Cloudflare customer may be pointing at this address",
            ),
            Self::NoSharedProtocol => entry(
                "NoSharedProtocol",
                "the client offers no application protocol (ALPN) of `alpn`",
                "add \"http/1.1\" to `alpn`: WebSockets, and clients without ALPN, use it",
            ),
            Self::NotListed => entry(
                "NotListed",
                "the source address is in no range and not in `ranges.allow`",
                "a connection around Cloudflare reached the gate: is the filter attached? A \
                 load balancer of yours belongs into `gate.proxy_from`",
            ),
            Self::NotYetValid => entry(
                "NotYetValid",
                "the client certificate is not valid yet, by this host's clock",
                "is this host's clock right?",
            ),
            Self::PinMismatch => entry(
                "PinMismatch",
                "`trust` has key pins alone, and none is of this certificate's key",
                "was another certificate uploaded to Cloudflare? `pullgate spki \
                 <certificate>` prints what to add to `trust`",
            ),
            Self::Plaintext => entry(
                "Plaintext",
                "HTTP or other text came where TLS was due",
                "is the encryption mode Full or Full (strict), not Flexible or Off?",
            ),
            Self::Protocol => entry(
                "Protocol",
                "what came is not TLS, or no version of it that is offered",
                "a scanner; Cloudflare speaks TLS 1.2 and 1.3: is `min_tls` right?",
            ),
            Self::RefusedByClient => entry(
                "RefusedByClient",
                "the client sent an alert",
                "with Full (strict), Cloudflare verifies this host's certificate: is it \
                 valid, and for this name?",
            ),
            Self::Revoked => entry(
                "Revoked",
                "the certificate, or a CA on its chain, is on a revocation list",
                "upload a certificate to Cloudflare that is not revoked",
            ),
            Self::SharedCertificate => entry(
                "SharedCertificate",
                "Cloudflare's shared certificate, where one of an own CA is demanded",
                "another Cloudflare customer may be pointing at this address; if it is you, \
                 upload your own certificate to Cloudflare (zone or per-hostname \
                 Authenticated Origin Pulls), for this host does not trust the shared one",
            ),
            Self::Timeout(Phase::Handshake) => entry(
                "TimeoutHandshake",
                "the handshake was not over within `handshake_timeout`",
                "a slow client, or one that only holds connections open; nothing to do",
            ),
            Self::Timeout(Phase::Hello) => entry(
                "TimeoutHello",
                "no ClientHello within `handshake_timeout`",
                "a slow client, or one that only holds connections open; nothing to do",
            ),
            Self::Timeout(Phase::ProxyHeader) => entry(
                "TimeoutProxyHeader",
                "a load balancer in `gate.proxy_from` sent no PROXY header in time",
                "does each load balancer in `gate.proxy_from` send the PROXY protocol, and is \
                 each that sends it named there?",
            ),
            Self::Timeout(Phase::Upstream) => entry(
                "TimeoutUpstream",
                "the web server did not take the connection within `connect_timeout`",
                "is the web server running, and does it listen on `upstream`, or where \
                 connections are steered on the same port? With `client_address = \
                 \"transparent\"`: does a firewall of this host drop what comes in by `lo` \
                 from clients' addresses?",
            ),
            Self::TooMany(Limit::Handshakes) => entry(
                "TooManyHandshakes",
                "more than `max_handshakes` handshakes in flight",
                "a flood, or `max_handshakes` is too low for this host",
            ),
            Self::TooMany(Limit::HelloBytes) => entry(
                "TooManyHelloBytes",
                "a ClientHello of more than 16 KiB on the wire, record headers included, or more \
                 than 64 KiB in the rest of the handshake",
                "an attack: no client needs a ClientHello that long",
            ),
            Self::TooMany(Limit::HostConnections) => entry(
                "TooManyHostConnections",
                "more connections than the host's `max_connections`",
                "a flood, or the host's `max_connections` is too low",
            ),
            Self::TooMany(Limit::OfSource(Quantity::Connections)) => entry(
                "TooManySourceConnections",
                "more connections to one host from one address than `gate.per_source.connections`",
                "one address floods this host, or [gate.per_source] is too low",
            ),
            Self::TooMany(Limit::OfSource(Quantity::Handshakes)) => entry(
                "TooManySourceHandshakes",
                "more handshakes in flight with one host from one address than \
                 `gate.per_source.handshakes`",
                "one address floods this host, or [gate.per_source] is too low",
            ),
            Self::TooMany(Limit::OfSource(Quantity::Hellos)) => entry(
                "TooManySourceHellos",
                "more connections of one address without a ClientHello than \
                 `gate.per_source.hellos`",
                "connections that say nothing: the oldest was closed for a newer one; nothing \
                 to do",
            ),
            Self::TooMany(Limit::OfSource(Quantity::PerSecond)) => entry(
                "TooManySourcePerSecond",
                "more handshakes per second with one host from one address than \
                 `gate.per_source.handshakes_per_second`",
                "one address floods this host, or [gate.per_source] is too low",
            ),
            Self::TooMany(Limit::OfNetwork(Quantity::Connections)) => entry(
                "TooManyNetworkConnections",
                "more connections to one host from one network than \
                 `gate.per_network.connections`",
                "one network floods this host, or [gate.per_network] is too low",
            ),
            Self::TooMany(Limit::OfNetwork(Quantity::Handshakes)) => entry(
                "TooManyNetworkHandshakes",
                "more handshakes in flight with one host from one network than \
                 `gate.per_network.handshakes`",
                "one network floods this host, or [gate.per_network] is too low",
            ),
            Self::TooMany(Limit::OfNetwork(Quantity::Hellos)) => entry(
                "TooManyNetworkHellos",
                "more connections of one network without a ClientHello than \
                 `gate.per_network.hellos`",
                "connections that say nothing: the oldest was closed for a newer one; nothing \
                 to do",
            ),
            Self::TooMany(Limit::OfNetwork(Quantity::PerSecond)) => entry(
                "TooManyNetworkPerSecond",
                "more handshakes per second with one host from one network than \
                 `gate.per_network.handshakes_per_second`",
                "one network floods this host, or [gate.per_network] is too low",
            ),
            Self::UnknownIssuer => entry(
                "UnknownIssuer",
                "the certificate comes from no CA in `trust`",
                "is the certificate that was uploaded to Cloudflare from a CA that `trust` \
                 names, with all its intermediates and no more than `max_depth` of them?",
            ),
            Self::UnknownServerName => entry(
                "UnknownServerName",
                "the client named a host that is not served here; it was shown no certificate",
                "if this name is yours, add a [[gate.host]] for it; if not, another \
                 Cloudflare customer may be pointing at this address",
            ),
            Self::Upstream(UpstreamFault::Broken) => entry(
                "UpstreamBroken",
                "the web server hung up on a request without an answer",
                "does the web server expect the PROXY header that `proxy_protocol` sends, or none if \
                 that is \"none\"? `pullgate check` asks it both ways",
            ),
            Self::Upstream(UpstreamFault::Tls) => entry(
                "UpstreamTls",
                "the web server's certificate does not verify, or its TLS fails",
                "does the web server show another certificate than `certificate` (reload it \
                 after a renewal), or none from `upstream_tls.ca_file`, valid, and for \
                 `upstream_tls.name`? Does it take the header of `proxy_protocol` (nginx \
                 before 1.23.2: `proxy_tlvs = false`)?",
            ),
            Self::Upstream(UpstreamFault::Unreachable) => entry(
                "UpstreamUnreachable",
                "the web server does not take the connection",
                "is the web server running, and does it listen on `upstream`, or where \
                 connections are steered on the same port? With `client_address = \
                 \"transparent\"`: does a firewall of this host drop what comes in by `lo` \
                 from clients' addresses?",
            ),
            Self::WrongUsage => entry(
                "WrongUsage",
                "the certificate is a CA's, or may not be used by a client",
                "the uploaded certificate must be a leaf (CA:FALSE) whose key usage, if any, \
                 has digitalSignature and whose extended key usage, if any, has clientAuth; \
                 with `require_client_eku` it must have that",
            ),
        }
    }

    /// Every reason, by label and then by cause.
    #[must_use]
    pub fn all() -> Vec<Self> {
        vec![
            Self::BadCertificate(Defect::CriticalExtension),
            Self::BadCertificate(Defect::IssuerNotCa),
            Self::BadCertificate(Defect::RuleOfCa),
            Self::BadCertificate(Defect::Unreadable),
            Self::BadCertificate(Defect::Version),
            Self::BadProxyHeader,
            Self::BadSignature,
            Self::Closed,
            Self::CrlExpired,
            Self::CrlMissing,
            Self::Denied,
            Self::Expired,
            Self::HostUnavailable,
            Self::NoCertificate,
            Self::NoServerName,
            Self::NoSharedProtocol,
            Self::NotListed,
            Self::NotYetValid,
            Self::PinMismatch,
            Self::Plaintext,
            Self::Protocol,
            Self::RefusedByClient,
            Self::Revoked,
            Self::SharedCertificate,
            Self::Timeout(Phase::Handshake),
            Self::Timeout(Phase::Hello),
            Self::Timeout(Phase::ProxyHeader),
            Self::Timeout(Phase::Upstream),
            Self::TooMany(Limit::Handshakes),
            Self::TooMany(Limit::HelloBytes),
            Self::TooMany(Limit::HostConnections),
            Self::TooMany(Limit::OfSource(Quantity::Connections)),
            Self::TooMany(Limit::OfSource(Quantity::Handshakes)),
            Self::TooMany(Limit::OfSource(Quantity::Hellos)),
            Self::TooMany(Limit::OfSource(Quantity::PerSecond)),
            Self::TooMany(Limit::OfNetwork(Quantity::Connections)),
            Self::TooMany(Limit::OfNetwork(Quantity::Handshakes)),
            Self::TooMany(Limit::OfNetwork(Quantity::Hellos)),
            Self::TooMany(Limit::OfNetwork(Quantity::PerSecond)),
            Self::UnknownIssuer,
            Self::UnknownServerName,
            Self::Upstream(UpstreamFault::Broken),
            Self::Upstream(UpstreamFault::Tls),
            Self::Upstream(UpstreamFault::Unreachable),
            Self::WrongUsage,
        ]
    }
}

/// A reason's row in the manual.
struct Entry {
    label: &'static str,
    meaning: &'static str,
    advice: &'static str,
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_variant_is_listed_once() {
        // The table is exhaustive, and each of its rows begins like this.
        let source = include_str!("manual.rs").lines().map(str::trim_start);
        let is_row = |line: &&str| line.starts_with("Self::") && line.contains("=> entry(");
        let rows = source.filter(is_row).count();
        let all = Refusal::all();

        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        assert_eq!(all.len(), rows);
    }
}
