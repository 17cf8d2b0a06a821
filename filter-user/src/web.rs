//! The web server on this host, asked as a client without a certificate would ask: an address in,
//! what it demands out.

use std::io;
use std::net::SocketAddr;

use rustls::Error as TlsError;

use self::visit::{Answer, Ending, Issuers, Visit, tls_error};

pub mod visit;

/// What a web server demands of a client.
#[derive(Debug)]
pub enum Demand {
    /// A certificate: it refused the handshake, or the request.
    Certificate(Issuers),
    /// Nothing: it answered the request, with this status if it was HTTP.
    Nothing(Option<u16>),
    /// It speaks no TLS.
    NoTls,
    /// It refused, and that may have been for the name.
    Unknown(io::Error),
}

/// Asks the server at an address of this host for a page, for two seconds to connect and as
/// long for the rest.
///
/// It is asked by no name, so by its default site: which names it serves is not known here.
#[must_use]
pub fn demand(address: SocketAddr) -> Demand {
    demand_by(address, None)
}

/// The same of the site of a name.
#[must_use]
pub fn demand_by(address: SocketAddr, name: Option<&str>) -> Demand {
    let host = address.to_string();
    let visit = Visit {
        server_name: name,
        ..Visit::new(address, name.unwrap_or(&host))
    };
    let visited = visit.connect();
    match (visited.ending, visited.requested) {
        (Ending::Answered(answer), issuers) if refuses(&answer) => {
            Demand::Certificate(issuers.unwrap_or(Issuers::Unsaid))
        }
        (Ending::Answered(answer), _) => Demand::Nothing(answer.status),
        (Ending::NoTls, _) => Demand::NoTls,
        // TLS 1.2 has no alert of its own for the certificate that was asked for and is not there.
        (Ending::Refused(error), Some(issuers)) => match tls_error(&error) {
            Some(TlsError::AlertReceived(_)) => Demand::Certificate(issuers),
            Some(_) | None => Demand::Unknown(error),
        },
        (Ending::Refused(error) | Ending::NotListening(error) | Ending::NotAsked(error), _) => {
            Demand::Unknown(error)
        }
        (Ending::Silence | Ending::Late, _) => Demand::Unknown(io::ErrorKind::TimedOut.into()),
    }
}

/// Whether a request was refused for its certificate: nginx does that, and not the handshake, and Apache where it asks
/// for one behind it.
#[must_use]
pub fn refuses(answer: &Answer) -> bool {
    let words = [
        "ssl certificate",
        "client certificate",
        "post-handshake authentication",
    ];
    match answer.status {
        Some(400 | 403) => words.iter().any(|words| answer.says(words)),
        Some(495 | 496) => true,
        _ => false,
    }
}
