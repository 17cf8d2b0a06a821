//! What is, at the moment of a scrape: looked up by a role, and passed on as metrics.

use std::fmt;

use filter_ebpf::Reason;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet};
use prometheus_client::metrics::MetricType;

/// What a role sees when it is asked for its metrics.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// The active ranges.
    pub ranges: RangesSample,
    /// What the filter sees in the kernel, if the role is the filter.
    pub filter: Option<FilterSample>,
}

/// The active ranges.
#[derive(Clone, Copy, Debug, Default)]
pub struct RangesSample {
    /// IPv4 ranges.
    pub v4: usize,
    /// IPv6 ranges.
    pub v6: usize,
    /// Seconds since they were fetched; none for the baseline.
    pub age_seconds: Option<u64>,
}

/// What the filter sees in the kernel.
#[derive(Clone, Debug)]
pub struct FilterSample {
    /// Whether strangers' packets are dropped.
    pub is_enforcing: bool,
    /// Interface by interface.
    pub attached: Vec<Attachment>,
    /// By family, whether connections are steered to a socket of the gate, where they should be.
    pub steered: Vec<(&'static str, bool)>,
    /// Frames of each kind, since the counters began.
    pub frames: Vec<(FrameLabels, u64)>,
}

/// Whether an interface is filtered, and how.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// Its name.
    pub iface: String,
    /// The attach mode, or why there is none.
    pub mode: &'static str,
    /// Whether it is filtered.
    pub is_filtered: bool,
}

impl Collector for Sample {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Self { ranges, filter } = self;
        let counts = [("ipv4", ranges.v4), ("ipv6", ranges.v6)];
        let counts = counts.map(|(family, count)| (FamilyLabels { family }, whole(count)));
        gauges(&mut encoder, "ranges", "Active ranges", &counts)?;
        let age = ranges.age_seconds.map_or(-1, whole);
        let help = "Seconds since the active ranges were fetched, -1 if none was: the baseline, or ranges.only";
        gauge(&mut encoder, "ranges_age_seconds", help, age)?;
        match filter {
            Some(filter) => filter.encode(&mut encoder),
            None => Ok(()),
        }
    }
}

impl FilterSample {
    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "1 where strangers' packets are dropped, 0 in monitor mode";
        gauge(
            encoder,
            "filter_enforcing",
            help,
            i64::from(self.is_enforcing),
        )?;
        let attached = self.attached.iter().map(|attachment| {
            let Attachment {
                iface,
                mode,
                is_filtered,
            } = attachment;
            let (iface, mode) = (iface.clone(), *mode);
            (AttachedLabels { iface, mode }, i64::from(*is_filtered))
        });
        let attached: Vec<_> = attached.collect();
        gauges(
            encoder,
            "filter_attached",
            "1 where the program is attached",
            &attached,
        )?;
        let steered = self.steered.iter();
        let steered = steered.map(|(family, is)| (FamilyLabels { family }, i64::from(*is)));
        gauges(
            encoder,
            "filter_steered",
            "1 where connections are steered to a socket of the gate",
            &steered.collect::<Vec<_>>(),
        )?;
        counters(encoder, "filter_frames", "Frames judged", &self.frames)?;
        let outcomes = self.syn_cookies();
        let outcomes = outcomes.map(|(outcome, total)| (CookieLabels { outcome }, total));
        counters(encoder, "filter_syn_cookies", COOKIES_HELP, &outcomes)
    }

    /// What became of SYN cookies, by the words of netstat(8).
    fn syn_cookies(&self) -> [(&'static str, u64); 3] {
        let sum = |is_it: &dyn Fn(&FrameLabels) -> bool| {
            let frames = self.frames.iter().filter(|(labels, _)| is_it(labels));
            frames.map(|(_, total)| total).sum()
        };
        let no_connection = Reason::NoConnection.label();
        [
            ("sent", sum(&|labels| labels.verdict == "answer")),
            (
                "received",
                sum(&|labels| labels.reason == Reason::SynCookie.label()),
            ),
            (
                "failed",
                sum(&|labels| labels.reason == no_connection && labels.verdict != "pass"),
            ),
        ]
    }
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: i64) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    metric.encode_gauge(&value)
}

fn counters<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    totals: &[(L, u64)],
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, total) in totals {
        let mut labelled = metric.encode_family(labels)?;
        labelled.encode_counter::<NoLabels, _, u64>(total, None)?;
    }
    Ok(())
}

fn gauges(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: &[(impl EncodeLabelSet, i64)],
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        metric.encode_family(labels)?.encode_gauge(value)?;
    }
    Ok(())
}

const COOKIES_HELP: &str =
    "SYN cookies sent, acknowledgements that had one, and segments of no connection";

/// What exemplars would be labelled by.
type NoLabels = [(&'static str, &'static str); 0];

/// A number as a gauge has it.
fn whole<T>(number: T) -> i64
where
    i64: TryFrom<T>,
{
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// What a frame is counted under.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct FrameLabels {
    /// The interface.
    pub iface: String,
    /// `ipv4`, `ipv6` or `none`.
    pub family: &'static str,
    /// `pass`, `drop` or `would_drop`.
    pub verdict: &'static str,
    /// Why.
    pub reason: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct AttachedLabels {
    iface: String,
    mode: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct FamilyLabels {
    family: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct CookieLabels {
    outcome: &'static str,
}
