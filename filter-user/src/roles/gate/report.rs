//! What the gate says of itself.

use std::time::Duration;

use super::GateRole;
use crate::config::{Config, GateSettings};
use crate::control::protocol::{Admits, RangeUseStatus, RefusalStatus};
use crate::gate::{self, Refused};
use crate::host::netlink;
use crate::observe::{Finding, Severity};
use crate::roles::access::is_transparent;
use crate::roles::role_report::RoleReport;

impl GateRole {
    /// Looks at policies, listeners and files.
    pub(in crate::roles) fn report(&self, config: &Config) -> RoleReport {
        let mut findings = self.findings();
        findings.extend(self.gate.lints());
        findings.extend(config.live.gate.iter().flat_map(exposures));
        findings.extend(is_transparent(config).then(transparent));
        let (hosts, is_enforcing, is_own) = self.gate.with_policies(|policies| {
            let hosts: Vec<_> = policies.iter().map(|policy| policy.label()).collect();
            let is_enforcing = policies.iter().all(|policy| policy.enforces());
            let is_own = policies.iter().all(|policy| policy.proves_account());
            (hosts.join(" "), is_enforcing, is_own)
        });
        RoleReport {
            findings,
            details: vec![
                ("listen".to_owned(), self.addresses.clone()),
                ("hosts".to_owned(), hosts),
            ],
            is_enforcing: is_enforcing && self.steered.borrow().finding().is_none(),
            admits: Some(if is_own {
                Admits::Account
            } else {
                Admits::Cloudflare
            }),
            range_usage: self.range_usage(),
            refusals: self.refusals(),
            ..RoleReport::default()
        }
    }

    /// What is not as asked, also where every host enforces its trust.
    pub(in crate::roles) fn shortcomings(&self) -> Vec<Finding> {
        let mut lints = self.gate.lints();
        lints.retain(|lint| lint.severity == Severity::Error);
        lints.extend(self.steered.borrow().finding());
        lints
    }

    /// What was seen of ranges that have vanished.
    pub(in crate::roles) fn range_usage(&self) -> Vec<RangeUseStatus> {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let usage = self.gate.range_usage().report().into_iter();
        let statuses = usage.map(|usage| RangeUseStatus {
            range: usage.range,
            watched_ms: ms(usage.watched),
            seen_ms_ago: usage.seen_ago.map(ms),
        });
        statuses.collect()
    }

    fn refusals(&self) -> Vec<RefusalStatus> {
        let last = self.gate.last_refusals().into_iter();
        let statuses = last.map(|(time, refused)| {
            let Refused {
                refusal,
                client,
                host,
                server_name,
                presented,
                is_admitted: admitted,
            } = refused;
            let (subject, issuer, anchor) = presented.map_or((None, None, None), |it| {
                (Some(it.subject), Some(it.issuer), it.anchor)
            });
            RefusalStatus {
                reason: refusal.label().to_owned(),
                meaning: refusal.meaning().to_owned(),
                seconds_ago: time.elapsed().as_secs(),
                client,
                host,
                server_name,
                subject,
                issuer,
                anchor,
                admitted,
            }
        });
        statuses.collect()
    }

    /// What is not right about listeners and files.
    fn findings(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        findings.extend(self.steered.borrow().finding());
        if let Some(error) = &*self.unusable.borrow() {
            findings.push(Finding::error("files-unusable", error));
        }
        findings.extend(self.unanswered.iter().map(|address| {
            let text = format!(
                "a client that connects to {address} hangs: `pullgate-gate.socket` listens there, and \
                 `gate.listen` does not name it"
            );
            Finding::warning("socket-unanswered", text).remedy("let both name the same")
        }));
        if let Some(affordable) = self.affordable {
            let text = format!(
                "the limit of open files allows {affordable} connections, fewer than \
                 `gate.max_connections`: the others wait in the kernel"
            );
            findings.push(Finding::warning("file-limit-low", text).remedy("raise LimitNOFILE"));
        }
        findings.extend(self.without_ipv6.iter().map(|address| {
            let text = format!(
                "`gate.listen`: {address} is not served, because this kernel has no IPv6 \
                 (`ipv6.disable=1`)"
            );
            Finding::warning("ipv6-missing", text)
        }));
        findings
    }
}

/// The gate has more power than it would else.
fn transparent() -> Finding {
    let text = "the gate keeps CAP_NET_RAW to open connections in its clients' names \
                (`client_address = \"transparent\"`); its system calls are confined to stream sockets";
    Finding::warning("client-address-transparent", text)
}

/// Upstreams that can be reached around the gate.
pub(crate) fn exposures(settings: &GateSettings) -> Vec<Finding> {
    // A kernel that does not answer is no reason to warn.
    let listening = netlink::listeners().unwrap_or_default();
    gate::listeners(settings, &listening)
}
