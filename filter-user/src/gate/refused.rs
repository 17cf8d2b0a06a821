//! A refusal with what was refused: who asked, for which name, with which certificate.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Instant;

use tracing::{info, warn};

use super::refusal::{Phase, Refusal};
use crate::sync::lock;

/// A connection that was refused, or would have been.
#[derive(Clone, Debug)]
pub struct Refused {
    /// Why.
    pub refusal: Refusal,
    /// The client, as far as a load balancer passes it on.
    pub client: SocketAddr,
    /// The host that it was charged to; empty, if the name is not served.
    pub host: String,
    /// The name that it asked for, escaped and bounded.
    pub server_name: Option<String>,
    /// The certificate that it presented, if that was judged.
    pub presented: Option<Presented>,
    /// Whether it was admitted all the same: its host does not enforce its trust.
    pub is_admitted: bool,
}

/// What a judged certificate says of itself: escaped, and at most 256 bytes a field.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Presented {
    /// Its subject.
    pub subject: String,
    /// Its issuer.
    pub issuer: String,
    /// The CA in `trust` that bears the name of its issuer, or of one of those behind it.
    pub anchor: Option<String>,
}

impl Refused {
    /// Writes the line of a refusal; `suppressed` ones before it had none.
    pub(super) fn log(&self, suppressed: u64) {
        let (reason, advice) = (self.refusal.label(), self.refusal.advice());
        let Self {
            client,
            host,
            server_name,
            ..
        } = self;
        let (server_name, host) = (server_name.as_deref(), host.as_str());
        let (subject, issuer, anchor) = self.certificate();
        if matches!(
            self.refusal,
            Refusal::Upstream(_) | Refusal::Timeout(Phase::Upstream)
        ) {
            warn!(
                id = "refused",
                reason,
                %client,
                host,
                server_name,
                advice,
                suppressed,
                "refused"
            );
        } else {
            info!(
                id = "refused",
                reason,
                %client,
                host,
                server_name,
                subject,
                issuer,
                anchor,
                advice,
                suppressed,
                "refused"
            );
        }
    }

    /// Writes the line of a client that was admitted all the same.
    pub(super) fn log_tolerated(&self, suppressed: u64) {
        let (reason, advice) = (self.refusal.label(), self.refusal.advice());
        let (client, host) = (self.client, self.host.as_str());
        let server_name = self.server_name.as_deref();
        let (subject, issuer, anchor) = self.certificate();
        warn!(
            id = "would-refuse",
            reason,
            %client,
            host,
            server_name,
            subject,
            issuer,
            anchor,
            advice,
            suppressed,
            "admitted, would be refused"
        );
    }

    fn certificate(&self) -> (Option<&str>, Option<&str>, Option<&str>) {
        let presented = self.presented.as_ref();
        let subject = presented.map(|it| it.subject.as_str());
        let issuer = presented.map(|it| it.issuer.as_str());
        let anchor = presented.and_then(|it| it.anchor.as_deref());
        (subject, issuer, anchor)
    }
}

/// The last refusal for each reason.
#[derive(Debug, Default)]
pub(super) struct LastRefusals(Mutex<BTreeMap<&'static str, (Instant, Refused)>>);

impl LastRefusals {
    pub(super) fn keep(&self, refused: Refused) {
        lock(&self.0).insert(refused.refusal.label(), (Instant::now(), refused));
    }

    /// Each with the time when it was, by reason.
    pub(super) fn all(&self) -> Vec<(Instant, Refused)> {
        lock(&self.0).values().cloned().collect()
    }
}

tokio::task_local! {
    /// rustls hands a failed handshake's certificates to nothing but the verifier, which has no connection.
    static REFUSED_CHAIN: RefCell<Option<(Refusal, Presented)>>;
}

/// Runs a handshake, and returns what [`note`] noted meanwhile.
pub(super) async fn noting<T>(
    handshake: impl Future<Output = T>,
) -> (T, Option<(Refusal, Presented)>) {
    let noted = async {
        let output = handshake.await;
        (output, REFUSED_CHAIN.with(RefCell::take))
    };
    REFUSED_CHAIN.scope(RefCell::new(None), noted).await
}

/// Notes for the handshake in which it is called that this certificate was refused.
pub(super) fn note(refusal: Refusal, presented: Presented) {
    let noted = REFUSED_CHAIN.try_with(|noted| noted.replace(Some((refusal, presented))));
    // Outside of a handshake nothing asks for it.
    drop(noted);
}
