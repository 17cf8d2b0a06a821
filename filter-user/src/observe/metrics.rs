//! The metrics. Their names and labels are API.
//!
//! What happens is counted in [`Metrics`] by those to whom it happens. What *is*, a role looks up once per
//! scrape, and passes on as a [`Sample`]: no reader writes a metric.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::sample::Sample;
use crate::role::Role;

/// The metrics of this process; cheap to clone, all clones count together.
#[derive(Clone)]
pub struct Metrics {
    inner: Arc<Inner>,
}

struct Inner {
    reattached: Family<InterfaceLabels, Counter>,
    reloads: Family<OutcomeLabels, Counter>,
    publishes: Family<OutcomeLabels, Counter>,
    publish_seconds: Gauge<f64, AtomicU64>,
    refreshes: Family<OutcomeLabels, Counter>,
    held: Gauge,
    connections: Family<ConnectionLabels, Counter>,
    active: Gauge,
    handshakes: Histogram,
    relayed: Family<DirectionLabels, Counter>,
    expiry: Family<ExpiryLabels, Gauge>,
    tolerated: Family<ReasonLabels, Counter>,
    gate_reloads: Family<OutcomeLabels, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            inner: Arc::new(Inner {
                reattached: Family::default(),
                reloads: Family::default(),
                publishes: Family::default(),
                publish_seconds: Gauge::default(),
                refreshes: Family::default(),
                held: Gauge::default(),
                connections: Family::default(),
                active: Gauge::default(),
                handshakes: Histogram::new(HANDSHAKE_BUCKETS),
                relayed: Family::default(),
                expiry: Family::default(),
                tolerated: Family::default(),
                gate_reloads: Family::default(),
            }),
        }
    }
}

impl Metrics {
    /// Counts that an interface was found unfiltered and was attached again.
    pub fn reattached(&self, iface: &str) {
        let iface = iface.to_owned();
        let labels = InterfaceLabels { iface };
        self.inner.reattached.get_or_create(&labels).inc();
    }

    /// Counts an attempt to reload the filter's configuration.
    pub fn reloaded(&self, outcome: &'static str) {
        let labels = OutcomeLabels { outcome };
        self.inner.reloads.get_or_create(&labels).inc();
    }

    /// Counts an attempt to publish a table, and how long a successful one took.
    pub fn published(&self, took: Option<Duration>) {
        let outcome = if took.is_some() {
            "Published"
        } else {
            "Failed"
        };
        let labels = OutcomeLabels { outcome };
        self.inner.publishes.get_or_create(&labels).inc();
        if let Some(took) = took {
            self.inner.publish_seconds.set(took.as_secs_f64());
        }
    }

    /// Counts an attempt to refresh the ranges.
    pub fn refreshed(&self, outcome: &'static str) {
        self.inner
            .refreshes
            .get_or_create(&OutcomeLabels { outcome })
            .inc();
    }

    /// Notes how many lists wait for approval.
    pub fn held(&self, count: usize) {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        self.inner.held.set(count);
    }

    /// Counts a connection that was opened; [`Self::closed`] counts it when it ends.
    pub fn opened(&self) {
        self.inner.active.inc();
    }

    /// Counts a connection that ended.
    pub fn closed(&self, host: &str, outcome: &'static str) {
        self.inner.active.dec();
        let labels = ConnectionLabels {
            host: host.to_owned(),
            outcome,
        };
        self.inner.connections.get_or_create(&labels).inc();
    }

    /// Records how long it took from accept to a verified peer.
    pub fn handshake(&self, seconds: f64) {
        self.inner.handshakes.observe(seconds);
    }

    /// Counts relayed bytes: `up` towards the upstream, `down` towards the client.
    pub fn relayed(&self, up: u64, down: u64) {
        for (direction, bytes) in [("up", up), ("down", down)] {
            let labels = DirectionLabels { direction };
            self.inner.relayed.get_or_create(&labels).inc_by(bytes);
        }
    }

    /// Notes when the first of a host's certificates, anchors or revocation lists expires, if it
    /// has one.
    pub fn expires(&self, host: &str, kind: &'static str, timestamp: Option<i64>) {
        let labels = ExpiryLabels {
            host: host.to_owned(),
            kind,
        };
        match timestamp {
            Some(timestamp) => {
                self.inner.expiry.get_or_create(&labels).set(timestamp);
            }
            None => {
                self.inner.expiry.remove(&labels);
            }
        }
    }

    /// Counts a client that was let in, and would not be if its host enforced its trust.
    pub fn tolerated(&self, host: &str, reason: &'static str) {
        let labels = ReasonLabels {
            host: host.to_owned(),
            reason,
        };
        self.inner.tolerated.get_or_create(&labels).inc();
    }

    /// Counts an attempt to reload the gate's configuration or files.
    pub fn gate_reloaded(&self, outcome: &'static str) {
        let labels = OutcomeLabels { outcome };
        self.inner.gate_reloads.get_or_create(&labels).inc();
    }

    /// A role's metrics in the OpenMetrics text format. Those of another are not among them: zero is an
    /// answer, and two ports of one process would serve everything twice.
    ///
    /// # Errors
    ///
    /// Only if a metric cannot be formatted.
    pub fn text(&self, role: Role, sample: Sample) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.inner.registry(role, sample))?;
        Ok(text)
    }

    /// A role's metrics by name and labels, as the text format spells them.
    #[must_use]
    pub fn values(&self, role: Role, sample: Sample) -> BTreeMap<String, f64> {
        let text = self.text(role, sample).unwrap_or_default();
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        samples
            .filter_map(|line| {
                let (name, value) = line.rsplit_once(' ')?;
                Some((name.to_owned(), value.parse().ok()?))
            })
            .collect()
    }
}

impl Inner {
    fn registry(&self, role: Role, sample: Sample) -> Registry {
        let mut registry = Registry::with_prefix("pullgate");
        registry.register_collector(Box::new(sample));
        match role {
            Role::Filter => self.register_filter(&mut registry),
            Role::Ranges => self.register_ranges(&mut registry),
            Role::Gate => self.register_gate(&mut registry),
        }
        Self::register_common(&mut registry);
        registry
    }

    fn register_filter(&self, r: &mut Registry) {
        r.register(
            "filter_reattached",
            "Times that an interface was found unfiltered and was attached again",
            self.reattached.clone(),
        );
        r.register(
            "filter_reload",
            "Attempts to reload the filter's configuration",
            self.reloads.clone(),
        );
        r.register(
            "filter_publish",
            "Attempts to publish a range table",
            self.publishes.clone(),
        );
        r.register(
            "filter_publish_seconds",
            "How long the last published table took until packets were judged by it",
            self.publish_seconds.clone(),
        );
    }

    fn register_ranges(&self, r: &mut Registry) {
        r.register(
            "ranges_refresh",
            "Attempts to refresh the ranges",
            self.refreshes.clone(),
        );
        r.register(
            "ranges_held",
            "Sources whose list waits for approval",
            self.held.clone(),
        );
    }

    fn register_gate(&self, r: &mut Registry) {
        r.register(
            "gate_connections",
            "Connections ended",
            self.connections.clone(),
        );
        r.register(
            "gate_active_connections",
            "Connections open",
            self.active.clone(),
        );
        r.register(
            "gate_handshake_seconds",
            "From accept to verified peer",
            self.handshakes.clone(),
        );
        r.register("gate_relayed_bytes", "Bytes relayed", self.relayed.clone());
        r.register(
            "gate_would_refuse",
            "Clients that were admitted, and would be refused with client_auth = enforce",
            self.tolerated.clone(),
        );
        r.register(
            "gate_reload",
            "Attempts to reload the gate's configuration or files",
            self.gate_reloads.clone(),
        );
        r.register(
            "certificate_expiry_timestamp_seconds",
            "When a certificate expires",
            self.expiry.clone(),
        );
    }

    /// What each role knows.
    fn register_common(r: &mut Registry) {
        let build = Family::<BuildLabels, Gauge>::default();
        build
            .get_or_create(&BuildLabels {
                version: env!("CARGO_PKG_VERSION").to_owned(),
            })
            .set(1);
        r.register("build_info", "The build", build);
    }
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct InterfaceLabels {
    iface: String,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct OutcomeLabels {
    outcome: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ConnectionLabels {
    host: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct DirectionLabels {
    direction: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ExpiryLabels {
    host: String,
    kind: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ReasonLabels {
    host: String,
    reason: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct BuildLabels {
    version: String,
}

/// Seconds; a full handshake takes about a millisecond of CPU and one round trip or two.
const HANDSHAKE_BUCKETS: [f64; 8] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];

#[cfg(test)]
mod tests {
    use super::super::sample::{FilterSample, FrameLabels, RangesSample};
    use super::*;

    #[test]
    fn each_role_tells_its_own_as_documented() {
        let metrics = Metrics::default();

        let labels = FrameLabels {
            iface: "eth0".to_owned(),
            family: "ipv4",
            verdict: "drop",
            reason: "NotListed",
        };
        let sample = Sample {
            ranges: RangesSample {
                v4: 15,
                v6: 7,
                age_seconds: None,
            },
            filter: None,
        };
        let filtering = Sample {
            filter: Some(FilterSample {
                is_enforcing: true,
                attached: Vec::new(),
                steered: Vec::new(),
                frames: vec![(labels, 7)],
            }),
            ..sample.clone()
        };
        metrics.opened();
        metrics.closed("a.example", "NoCertificate");
        metrics.refreshed("Unchanged");

        let filter = metrics.values(Role::Filter, filtering);
        let ranges = metrics.values(Role::Ranges, sample.clone());
        let gate = metrics.values(Role::Gate, sample);
        assert_eq!(
            filter["pullgate_filter_frames_total{iface=\"eth0\",family=\"ipv4\",\
                    verdict=\"drop\",reason=\"NotListed\"}"],
            7.0
        );
        assert_eq!(
            gate["pullgate_gate_connections_total{host=\"a.example\",outcome=\"NoCertificate\"}"],
            1.0
        );
        assert_eq!(gate["pullgate_gate_active_connections"], 0.0);
        assert_eq!(
            ranges["pullgate_ranges_refresh_total{outcome=\"Unchanged\"}"],
            1.0
        );
        for values in [&filter, &ranges, &gate] {
            assert_eq!(values["pullgate_ranges{family=\"ipv6\"}"], 7.0);
            assert_eq!(values["pullgate_ranges_age_seconds"], -1.0);
        }
        let has = |values: &BTreeMap<String, f64>, what: &str| {
            values.keys().any(|name| name.starts_with(what))
        };
        for (what, expected) in [
            ("pullgate_filter_", [true, false, false]),
            ("pullgate_ranges_refresh", [false, true, false]),
            ("pullgate_ranges_held", [false, true, false]),
            ("pullgate_gate_", [false, false, true]),
        ] {
            assert_eq!(
                [&filter, &ranges, &gate].map(|values| has(values, what)),
                expected
            );
        }
    }
}
