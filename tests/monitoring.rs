//! Verifies the dashboard and the alert rules: promtool takes them, a real Prometheus scrapes what they
//! ask for, and what should wake someone does.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tests::lab::METRICS;
use tests::net::Host;
use tests::web::Server;
use tests::{Lab, Plan};

const ALERTS: &str = include_str!("../filter-user/dist/monitoring/alerts.yml");
const DASHBOARD: &str = include_str!("../filter-user/dist/monitoring/dashboard.json");

#[test]
fn rules_and_dashboard_name_what_the_manual_names() {
    let manual = names(include_str!("../docs/metrics.md"));
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    assert!(dashboard["panels"].as_array().unwrap().len() > 8);

    for text in [ALERTS, DASHBOARD] {
        for name in names(text) {
            // A pattern of several names begins like one.
            let plain = name.trim_end_matches("_bucket");
            if plain == "pullgate_" {
                continue;
            }
            assert!(manual.contains(plain), "{name}");
        }
    }
}

/// An alert, what it is asked after in minutes, series that raise it, and the same that do not: each
/// with its values, minute by minute.
type Case = (
    &'static str,
    u32,
    &'static [(&'static str, &'static str)],
    &'static [(&'static str, &'static str)],
);

#[test]
fn every_alert_fires_when_it_should_and_else_does_not() {
    const CASES: [Case; 16] = [
        (
            "PullgateNotAttached",
            120,
            &[(
                r#"pullgate_filter_attached{iface="eth0",mode="none"}"#,
                "0+0x120",
            )],
            &[
                (
                    r#"pullgate_filter_attached{iface="eth0",mode="native"}"#,
                    "0+0x110 1+0x10",
                ),
                (
                    r#"pullgate_filter_attached{iface="eth1",mode="generic"}"#,
                    "1+0x120",
                ),
            ],
        ),
        (
            "PullgateNotSteered",
            120,
            &[(r#"pullgate_filter_steered{family="ipv4"}"#, "0+0x120")],
            &[(
                r#"pullgate_filter_steered{family="ipv4"}"#,
                "0+0x110 1+0x10",
            )],
        ),
        (
            "PullgateMonitorMode",
            120,
            &[("pullgate_filter_enforcing", "0+0x120")],
            &[("pullgate_filter_enforcing", "0+0x30 1+0x90")],
        ),
        (
            "PullgateBelowNative",
            120,
            &[(r#"pullgate_filter_attached{mode="tcx"}"#, "1+0x120")],
            &[(r#"pullgate_filter_attached{mode="native"}"#, "1+0x120")],
        ),
        (
            "PullgateNotReloaded",
            120,
            &[(
                r#"pullgate_gate_reload_total{outcome="Failed"}"#,
                "_x115 1+0x5",
            )],
            &[(
                r#"pullgate_filter_reload_total{outcome="Failed"}"#,
                "3+0x120",
            )],
        ),
        (
            "PullgateRangesOld",
            120,
            &[("pullgate_ranges_age_seconds", "300000+60x120")],
            &[("pullgate_ranges_age_seconds", "-1+0x120")],
        ),
        (
            "PullgateRangesOld",
            120,
            &[
                ("pullgate_ranges_age_seconds", "-1+0x120"),
                (
                    r#"pullgate_ranges_refresh_total{outcome="Timeout"}"#,
                    "1+1x120",
                ),
            ],
            &[("pullgate_ranges_age_seconds", "600+0x120")],
        ),
        (
            "PullgateRemovalHeld",
            120,
            &[("pullgate_ranges_held", "1+0x120")],
            &[("pullgate_ranges_held", "0+0x120")],
        ),
        (
            "PullgateCertificateExpires",
            120,
            &[(
                r#"pullgate_certificate_expiry_timestamp_seconds{kind="authority"}"#,
                "1728000+0x120",
            )],
            &[(
                r#"pullgate_certificate_expiry_timestamp_seconds{kind="authority"}"#,
                "7776000+0x120",
            )],
        ),
        (
            "PullgateCertificateExpired",
            120,
            &[(
                r#"pullgate_certificate_expiry_timestamp_seconds{kind="crl"}"#,
                "9000+0x120",
            )],
            &[(
                r#"pullgate_certificate_expiry_timestamp_seconds{kind="crl"}"#,
                "14400+0x120",
            )],
        ),
        (
            "PullgateEdgeRefused",
            120,
            &[(
                r#"pullgate_gate_connections_total{outcome="NoCertificate"}"#,
                "0+10x120",
            )],
            &[(
                r#"pullgate_gate_connections_total{outcome="NotListed"}"#,
                "0+10x120",
            )],
        ),
        (
            "PullgateSharedCertificate",
            120,
            &[(
                r#"pullgate_gate_connections_total{outcome="SharedCertificate"}"#,
                "_x115 1+0x5",
            )],
            &[(
                r#"pullgate_gate_connections_total{outcome="SharedCertificate"}"#,
                "1+0x120",
            )],
        ),
        (
            "PullgateUpstreamDown",
            120,
            &[(
                r#"pullgate_gate_connections_total{outcome="TimeoutUpstream"}"#,
                "0+10x120",
            )],
            &[(
                r#"pullgate_gate_connections_total{outcome="Relayed"}"#,
                "0+10x120",
            )],
        ),
        (
            "PullgateFlood",
            120,
            &[(
                r#"pullgate_filter_frames_total{verdict="drop"}"#,
                "0+12000000x120",
            )],
            &[(
                r#"pullgate_filter_frames_total{verdict="pass"}"#,
                "0+12000000x120",
            )],
        ),
        (
            "PullgateSynFlood",
            120,
            &[(
                r#"pullgate_filter_syn_cookies_total{outcome="sent"}"#,
                "0+6000x120",
            )],
            &[(
                r#"pullgate_filter_syn_cookies_total{outcome="received"}"#,
                "0+60x120",
            )],
        ),
        (
            "PullgateWouldRefuse",
            1560,
            &[("pullgate_gate_would_refuse_total", "0+1x1560")],
            &[("pullgate_gate_would_refuse_total", "0+1x120 120+0x1440")],
        ),
    ];
    let raised: BTreeSet<_> = CASES.iter().map(|(alert, ..)| *alert).collect();
    let rules = ALERTS
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "));
    // Of the one that is left, a Prometheus is asked below.
    let rules = rules.filter(|alert| *alert != "PullgateGone");
    assert_eq!(raised, rules.collect());

    let mut groups = Vec::new();
    for (alert, minutes, fires, rests) in CASES {
        for (series, count) in [(fires, Some(1)), (rests, None)] {
            let series = series
                .iter()
                .map(|(series, values)| json!({ "series": series, "values": values }));
            let sample = count.map(|count| json!({ "labels": "{}", "value": count }));
            groups.push(json!({
                "interval": "1m",
                "input_series": series.collect::<Vec<_>>(),
                "promql_expr_test": [{
                    "expr": format!("count(ALERTS{{alertname=\"{alert}\", alertstate=\"firing\"}})"),
                    "eval_time": format!("{minutes}m"),
                    "exp_samples": sample.iter().collect::<Vec<_>>(),
                }],
            }));
        }
    }
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("alerts.yml"), ALERTS).unwrap();
    let unit = json!({ "rule_files": ["alerts.yml"], "tests": groups });
    // YAML takes JSON as it is.
    fs::write(directory.path().join("unit.yml"), unit.to_string()).unwrap();
    promtool(directory.path(), &["test", "rules", "unit.yml"]);
}

#[test]
fn a_prometheus_scrapes_all_roles_and_is_alarmed() {
    let mut lab = Lab::start(&Plan::default());
    lab.unload();
    lab.configure("attach = \"generic\"");
    lab.restart_with(METRICS);
    let directory = lab.network.path("");
    fs::write(directory.join("alerts.yml"), eager(ALERTS)).unwrap();
    let config = include_str!("../filter-user/dist/monitoring/prometheus.yml");
    fs::write(directory.join("prometheus.conf"), eager(config)).unwrap();
    promtool(&directory, &["check", "rules", "alerts.yml"]);
    promtool(&directory, &["check", "config", "prometheus.conf"]);
    let _prometheus = Server::start_at(
        &lab.network,
        "prometheus",
        &[
            "--web.listen-address=127.0.0.1:9090",
            &format!("--storage.tsdb.path={}", directory.join("tsdb").display()),
            "--config.file",
        ],
        &eager(include_str!(
            "../filter-user/dist/monitoring/prometheus.yml"
        )),
        "127.0.0.1:9090",
    );
    let ask = |path: &str| -> Value {
        let url = format!("http://127.0.0.1:9090/api/v1/{path}");
        let output = lab
            .network
            .output(Host::Origin, &["curl", "--silent", "--globoff", &url]);
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    };

    tests::eventually("all roles are scraped", || {
        let up = ask("query?query=sum(up)");
        (up["data"]["result"][0]["value"][1] == "3").then_some(())
    });
    let known = ask("label/__name__/values");
    for name in names(DASHBOARD) {
        // What has no value yet has no series.
        let is_rare = ["would_refuse", "refresh_total", "handshake"]
            .iter()
            .any(|rare| name.contains(rare));
        let listed = known["data"]
            .as_array()
            .unwrap()
            .contains(&Value::from(name.clone()));
        assert!(
            listed || is_rare || name.contains("gate_connections") || name.contains("relayed"),
            "{name}"
        );
    }

    // Of what is in order there is nothing to say: the filter's mode is generic, and all else is well.
    let alarmed_by = |expected: &[&str]| {
        tests::eventually("an alert fires", || {
            let answer = ask("alerts");
            let alerts = answer["data"]["alerts"].as_array()?.iter();
            let names: BTreeSet<_> = alerts
                .filter_map(|alert| alert["labels"]["alertname"].as_str())
                .collect();
            (names == expected.iter().copied().collect()).then_some(())
        });
    };
    alarmed_by(&["PullgateBelowNative"]);
    drop(lab.gate.take());
    alarmed_by(&["PullgateBelowNative", "PullgateGone"]);
}

/// Asks Prometheus' own tool, which must agree.
fn promtool(directory: &Path, words: &[&str]) {
    let mut command = Command::new("promtool");
    let output = command.current_dir(directory).args(words).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&said)
    );
}

/// The same in a hurry.
fn eager(text: &str) -> String {
    let text = text.replace("scrape_interval: 15s", "scrape_interval: 200ms");
    let hurried: Vec<_> = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("for: "))
        .collect();
    hurried.join("\n").replace(
        "  - name: pullgate",
        "  - name: pullgate\n    interval: 200ms",
    )
}

/// The metrics that a text names.
fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let ours = words.filter(|word| word.starts_with("pullgate_"));
    ours.map(str::to_owned).collect()
}
