//! What answers beside the site's port.

use std::io;
use std::net::SocketAddr;

use super::{ANY, OriginProbe};
use crate::commands::examination::Check;
use crate::commands::probe::ports::{open_beside, speaks_quic};
use crate::commands::probe::reception::Reception;
use crate::commands::probe::target::{HTTPS, ProbeTarget};
use crate::observe::Finding;
use crate::web::visit::{Ending, Visit, ask_in_clear_text};

impl OriginProbe<'_> {
    pub(super) fn at_other_ports(&self) -> Check {
        let (open, unasked) = known(open_beside(self.target.address));
        let findings = open.iter().map(|port| {
            let there = SocketAddr::new(self.target.address.ip(), *port);
            let reception = self.reception_at(there);
            let text = format!("port {port} answers from here: {}", reception.in_words());
            let finding = match reception {
                // What leads to HTTPS gives nothing away.
                Reception::Served(Some(300..=399)) => Finding::warning("other-port-open", text),
                Reception::Served(_) => Finding::error("other-port-serves", text),
                Reception::Refused | Reception::RefusedByHttp(_) | Reception::Unknown(_) => {
                    Finding::warning("other-port-open", text)
                }
            };
            finding.remedy(
                "protect it too (`filter.ports`), or let the server listen on loopback alone",
            )
        });
        Check {
            id: "other-ports",
            about: "no other port that Cloudflare proxies answers",
            answered: unasked.is_none(),
            seen: match (open.as_slice(), unasked) {
                (_, Some(why)) => why,
                ([], None) => "none answers".to_owned(),
                (open, None) => format!("{open:?}"),
            },
            findings: findings.collect(),
        }
    }

    /// In TLS, or in clear text where that is not spoken.
    fn reception_at(&self, there: SocketAddr) -> Reception {
        let in_tls = Visit {
            address: there,
            ..self.visit(None, ANY)
        };
        let visited = in_tls.connect();
        if !matches!(
            visited.ending,
            Ending::NoTls | Ending::Refused(_) | Ending::Late
        ) {
            return Reception::at_the_site(&visited);
        }
        let ProbeTarget { name, path, .. } = self.target;
        let status = ask_in_clear_text(there, name, path)
            .ok()
            .and_then(|answer| answer.status);
        match status {
            // So servers answer that expect TLS.
            Some(400) | None => Reception::at_the_site(&visited),
            status => Reception::Served(status),
        }
    }

    pub(super) fn by_quic(&self) -> Check {
        let ports = [self.target.address.port(), HTTPS];
        let ports = &ports[..if ports[0] == HTTPS { 1 } else { 2 }];
        let asked = ports.iter().map(|port| {
            let there = SocketAddr::new(self.target.address.ip(), *port);
            Ok(speaks_quic(there)?.then_some(*port))
        });
        let (speaking, unasked) = known(asked.collect());
        let speaking: Vec<_> = speaking.into_iter().flatten().collect();
        let speaking = speaking.first();
        let finding = speaking.map(|port| {
            let text = format!(
                "UDP port {port} speaks QUIC, by which Cloudflare does not come: what filters TCP does not see it"
            );
            Finding::error("quic-open", text).remedy(
                "switch HTTP/3 off (nginx: no `listen … quic`; Caddy: `protocols h1 h2`), or `filter.udp_ports`",
            )
        });
        Check {
            id: "quic",
            about: "QUIC is not spoken",
            answered: unasked.is_none(),
            seen: match (speaking, unasked) {
                (_, Some(why)) => why,
                (None, None) => "no answer".to_owned(),
                (Some(port), None) => format!("UDP {port}"),
            },
            findings: Vec::from_iter(finding),
        }
    }
}

/// What was seen, and why not all was asked.
fn known<T>(asked: io::Result<Vec<T>>) -> (Vec<T>, Option<String>) {
    match asked {
        Ok(seen) => (seen, None),
        Err(error) => (Vec::new(), Some(format!("this host cannot ask ({error})"))),
    }
}
