//! What is believed of a client's address, and whether TLS is needed at all.

use super::{ANY, OriginProbe};
use crate::commands::examination::Check;
use crate::commands::probe::reception::{Both, NO_ANSWER, NO_PAGE};
use crate::commands::probe::target::ProbeTarget;
use crate::host::deadline::is_late;
use crate::observe::Finding;
use crate::web::visit::{Answer, Ending, Visit, ask_in_clear_text};

impl OriginProbe<'_> {
    pub(super) fn in_clear_text(&self) -> Check {
        let ProbeTarget {
            address,
            name,
            path,
            ..
        } = self.target;
        let asked = ask_in_clear_text(*address, name, path);
        let no_answer = asked.as_ref().is_err_and(is_late);
        let status = asked.ok().and_then(|answer| answer.status);
        let finding = status.and_then(|status| {
            let text = format!("HTTP in clear text is answered on a port for TLS ({status})");
            let finding = match status {
                300..=399 => Finding::warning("clear-text-redirects", text),
                status if NO_PAGE.contains(&status) => return None,
                _ => Finding::error("clear-text-served", text),
            };
            Some(finding.remedy("let the server speak TLS alone there"))
        });
        Check {
            id: "clear-text",
            about: "HTTP in clear text is refused",
            answered: !no_answer,
            seen: match status {
                Some(status) => format!("HTTP {status}"),
                None if no_answer => NO_ANSWER.to_owned(),
                None => "no page".to_owned(),
            },
            findings: Vec::from_iter(finding),
        }
    }

    /// A header that only a load balancer in front may send.
    pub(super) fn behind_a_header(&self) -> Check {
        let visited = Visit {
            before: HEADER,
            ..self.visit(None, ANY)
        }
        .connect();
        let is_believed = visited.shown.is_some() || matches!(visited.ending, Ending::Answered(_));
        let finding = is_believed.then(|| {
            let text = "a PROXY header from here is taken: a client can give itself any address, Cloudflare's too, wherever the \
                        server believes it";
            Finding::error("proxy-header-believed", text).remedy(
                "expect the header on a listener of its own, which only the load balancer reaches (nginx: a `listen … \
                 proxy_protocol` on another address; Apache: `RemoteIPProxyProtocol` in a site of its own; HAProxy: \
                 `accept-proxy` on a `bind` of its own; pullgate: the balancer alone in `gate.proxy_from`)",
            )
        });
        let seen = if is_believed { "taken" } else { "refused" };
        let no_answer = visited.ending.is_unanswered();
        Check {
            id: "proxy-header",
            about: "a PROXY header from a stranger is refused",
            answered: is_believed || !no_answer,
            seen: seen.to_owned(),
            findings: Vec::from_iter(finding),
        }
    }

    /// Headers that a web server may take for the client's address; asked where a stranger is served at all.
    pub(super) fn with_forged_headers(&self, as_stranger: &Both) -> Option<Check> {
        as_stranger.served()?;
        let answer = |headers| {
            let visit = Visit {
                headers,
                ..self.visit(None, ANY)
            };
            visit.connect().ending.answer()
        };
        let (plain, echoed) = (answer(""), answer(CONTROL));
        let forged = CLIENT_HEADERS.map(|(name, headers)| (name, answer(headers)));
        // A server that answers now so, now so, does not do it for a header.
        let again = answer("");
        let steady = match (&plain, &again) {
            (Some(plain), Some(again)) if plain.status == again.status => Some(plain.status),
            (_, _) => None,
        };
        let echoes = echoed.is_some_and(|echo| echo.says(FORGED));
        let answered = steady.is_some() && forged.iter().all(|(_, it)| it.is_some());
        let differs = |it: &Answer| {
            let names_it = !echoes && it.says(FORGED);
            names_it || steady.is_some_and(|status| status != it.status)
        };
        let believed = forged.into_iter().filter_map(|(name, it)| {
            let is_believed = it.as_ref().is_some_and(differs);
            is_believed.then_some(name)
        });
        let believed: Vec<_> = believed.collect();
        let finding = (!believed.is_empty()).then(|| {
            let text = format!(
                "the answer to a stranger depends on its {}: what is permitted to an address is permitted to every client",
                believed.join(" and ")
            );
            Finding::error("client-address-believed", text).remedy(
                "believe it from Cloudflare's addresses alone (nginx: `set_real_ip_from` for each range; Apache: \
                 `RemoteIPTrustedProxy`; HAProxy: a `src` in front of `set-src`; Caddy: `trusted_proxies`), or demand the \
                 certificate",
            )
        });
        Some(Check {
            id: "client-address",
            about: "a stranger cannot give itself an address by a header",
            answered,
            seen: match believed.as_slice() {
                [] if steady.is_none() => "the answers differ without a header too".to_owned(),
                [] => "the answers are alike".to_owned(),
                believed => believed.join(", "),
            },
            findings: Vec::from_iter(finding),
        })
    }
}

/// From the first of Cloudflare's addresses, as who forges a header would say: it is in each list.
const HEADER: &[u8] = b"PROXY TCP4 173.245.48.1 192.0.2.2 12345 443\r\n";
/// An address of documentation (RFC 5737), which no client has.
const FORGED: &str = "192.0.2.77";
/// A header that means nothing: whether the site shows what it is sent.
const CONTROL: &str = "X-Pullgate-Probe: 192.0.2.77\r\n";
const CLIENT_HEADERS: [(&str, &str); 3] = [
    ("CF-Connecting-IP", "CF-Connecting-IP: 192.0.2.77\r\n"),
    ("X-Forwarded-For", "X-Forwarded-For: 192.0.2.77\r\n"),
    ("X-Real-IP", "X-Real-IP: 192.0.2.77\r\n"),
];
