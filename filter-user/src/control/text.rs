//! The status of a host as people read it; with `{:#}`, in full.

use std::cmp::Reverse;
use std::fmt::{self, Display, Formatter, Write as _};

use super::protocol::{
    Admits, CONFINED, DropStatus, FilterStatus, FramesStatus, HostStatus, RangesStatus,
    RefreshStatus, RefusalStatus, SourceStatus, Status,
};
use crate::observe::Finding;
use crate::report::span;
use crate::role::Role;

impl Display for HostStatus {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.protected, self.findings.is_empty()) {
            (true, true) => "PROTECTED\n",
            (true, false) => "PROTECTED, but:\n",
            (false, _) => "NOT PROTECTED:\n",
        })?;
        if let (true, Some(admits)) = (self.protected, self.admits) {
            writeln!(f, "  admits {admits}")?;
        }
        for (roles, finding) in merged(&self.findings) {
            let mark = finding.severity.mark();
            writeln!(f, "  {mark} {roles}{finding}")?;
        }
        for role in &self.roles {
            writeln!(
                f,
                "\n{} (pid {}, pullgate {})",
                role.role.label(),
                role.pid,
                role.version
            )?;
            writeln!(f, "  {:<12} {}", "ranges", role.ranges)?;
            for (name, value) in &role.details {
                if f.alternate() || name != CONFINED {
                    writeln!(f, "  {name:<12} {value}")?;
                }
            }
            for refresh in &role.refresh {
                writeln!(f, "  {:<12} {refresh}", "refresh")?;
            }
            if let Some(filter) = &role.filter {
                filter.fmt(f)?;
            }
            for (name, value) in shown(role) {
                writeln!(f, "  {value:>12}  {}", in_words(name))?;
            }
            if !role.refusals.is_empty() {
                writeln!(f, "  last refusal for each reason")?;
            }
            for refusal in &role.refusals {
                writeln!(f, "  {refusal}")?;
            }
        }
        Ok(())
    }
}

impl Display for FilterStatus {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if !self.frames.is_empty() {
            writeln!(f, "  {:>14} {:>10}  frames", "total", "per second")?;
        }
        for frames in &self.frames {
            let FramesStatus {
                iface,
                family,
                verdict,
                reason,
                total,
                per_second,
            } = frames;
            writeln!(
                f,
                "  {total:>14} {per_second:>10}  {verdict:<10} {reason:<16} {family:<4} {iface}"
            )?;
        }
        if !f.alternate() {
            return Ok(());
        }
        if !self.drops.is_empty() {
            writeln!(f, "  last drops, of a sample")?;
        }
        for drop in &self.drops {
            let source = drop
                .source
                .map_or_else(|| "?".to_owned(), |ip| ip.to_string());
            let destination = drop
                .destination
                .map_or_else(|| "?".to_owned(), |ip| ip.to_string());
            let port = drop
                .port
                .map_or_else(|| "-".to_owned(), |port| port.to_string());
            let DropStatus {
                seconds_ago,
                iface,
                verdict,
                reason,
                ..
            } = drop;
            writeln!(
                f,
                "  {seconds_ago:>12} s ago  {verdict:<10} {reason:<16} {source} to {destination} port \
                 {port} on {iface}"
            )?;
        }
        if !self.top_sources.is_empty() {
            writeln!(f, "  top sources of drops, about")?;
        }
        for SourceStatus { source, about } in &self.top_sources {
            writeln!(f, "  {about:>14}  {source}")?;
        }
        Ok(())
    }
}

/// Each finding once, errors first, with the roles that report it.
fn merged(findings: &[Finding]) -> Vec<(String, Finding)> {
    let mut merged: Vec<(Vec<Role>, Finding)> = Vec::new();
    for finding in findings {
        let plain = Finding {
            role: None,
            ..finding.clone()
        };
        match merged.iter_mut().find(|(_, known)| *known == plain) {
            Some((roles, _)) => roles.extend(finding.role),
            None => merged.push((Vec::from_iter(finding.role), plain)),
        }
    }
    merged.sort_by_key(|(_, finding)| Reverse(finding.severity));
    let labelled = merged.into_iter().map(|(roles, finding)| {
        let roles: Vec<_> = roles.into_iter().map(Role::label).collect();
        let roles = match &roles[..] {
            [] => String::new(),
            roles => format!("{}: ", roles.join(", ")),
        };
        (roles, finding)
    });
    labelled.collect()
}

/// The counters of a role that say something at a glance.
fn shown(role: &Status) -> impl Iterator<Item = (&str, f64)> {
    let families: &[&str] = match role.role {
        Role::Filter => &["pullgate_filter_reattached_total"],
        Role::Gate => &[
            "pullgate_gate_connections_total",
            "pullgate_gate_would_refuse_total",
        ],
        Role::Ranges => &["pullgate_ranges_refresh_total"],
    };
    let is_shown = |name: &str| families.iter().any(|family| name.starts_with(family));
    let counters = role.metrics.iter();
    let counters = counters.filter(move |(name, value)| **value != 0.0 && is_shown(name));
    counters.map(|(name, value)| (name.as_str(), *value))
}

/// A counter's name without what all names have, and its labels' values: `connections shop.example Relayed`.
fn in_words(name: &str) -> String {
    let (name, labels) = name.split_once('{').unwrap_or((name, ""));
    let parts = name.strip_prefix("pullgate_").unwrap_or(name);
    let parts = parts.strip_suffix("_total").unwrap_or(parts);
    let (_role, what) = parts.split_once('_').unwrap_or(("", parts));
    let values = labels.split('"').skip(1).step_by(2);
    let words = [what.replace('_', " ")].into_iter();
    let words = words.chain(values.map(str::to_owned));
    words.collect::<Vec<_>>().join("  ")
}

impl Display for RefusalStatus {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let ago = span(self.seconds_ago);
        write!(f, "{ago:>12} ago  {:<16} {}", self.reason, self.client)?;
        if let Some(name) = &self.server_name {
            write!(f, " for {name}")?;
        }
        if let (Some(subject), Some(issuer)) = (&self.subject, &self.issuer) {
            write!(f, ", certificate `{subject}` of `{issuer}`")?;
        }
        if let Some(anchor) = &self.anchor {
            write!(f, ", whose name is in {anchor}")?;
        }
        let admitted = if self.admitted { ", admitted" } else { "" };
        write!(f, "{admitted}: {}", self.meaning)
    }
}

impl Display for RangesStatus {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut text = format!("{} IPv4 and {} IPv6, {}", self.v4, self.v6, self.source);
        if let Some(age) = self.age_seconds {
            write!(text, ", {} old", span(age))?;
        }
        if self.kept != 0 {
            write!(text, ", {} vanished and kept", self.kept)?;
        }
        f.write_str(&text)
    }
}

impl Display for RefreshStatus {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let next = span(self.next_in_seconds);
        match (&self.outcome, self.seconds_ago) {
            (Some(outcome), Some(ago)) => {
                let (source, ago) = (&self.source, span(ago));
                write!(f, "{source}: {outcome}, {ago} ago, again in {next}")
            }
            (_, _) => write!(f, "{}: the first is under way", self.source),
        }?;
        let Some(held) = &self.held else {
            return match &self.error {
                Some(error) => write!(f, "\n    {error}"),
                None => Ok(()),
            };
        };
        write!(
            f,
            "\n    held, {} by {}: {}",
            held.id, held.way, held.reason
        )?;
        for range in &held.added {
            write!(f, "\n    + {range}")?;
        }
        for range in &held.removed {
            write!(f, "\n    - {range}")?;
        }
        Ok(())
    }
}

impl Display for Admits {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Account => "only your Cloudflare account",
            Self::DefaultSite => {
                "only your Cloudflare account, by the web server's default site; its other sites \
                 were not asked"
            }
            Self::Cloudflare => "Cloudflare, for any of its customers",
            Self::Unknown => "Cloudflare; whether for any of its customers is not known",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_of_several_roles_is_one_line_and_errors_come_first() {
        let root = |role| Finding::warning("runs-as-root", "runs as root").of(role);
        let mut findings: Vec<_> = Role::ALL.map(root).into();
        findings.push(Finding::error("role-not-running", "not running").of(Role::Gate));
        findings.push(Finding::warning("tcp-port-open", "a program answers"));
        let report = HostStatus {
            protected: false,
            admits: None,
            findings,
            roles: Vec::new(),
        };

        assert_eq!(
            report.to_string(),
            "NOT PROTECTED:\n  ✗ gate: not running\n  ! filter, ranges, gate: runs as root\n  \
             ! a program answers\n"
        );
    }
}
