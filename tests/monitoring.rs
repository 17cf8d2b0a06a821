//! Verifies the dashboard and the alert rules: promtool takes them, a real Prometheus scrapes what they
//! ask for, and what should wake someone does.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use serde_json::Value;
use tests::lab::METRICS;
use tests::net::Host;
use tests::web::Server;
use tests::{Lab, Plan};

const ALERTS: &str = include_str!("../filter-user/dist/monitoring/alerts.yml");
const DASHBOARD: &str = include_str!("../filter-user/dist/monitoring/dashboard.json");

#[test]
fn rules_and_dashboard_name_what_the_manual_names() {
    let manual = names(include_str!("../README.md"));
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

#[test]
fn a_prometheus_scrapes_all_roles_and_is_alarmed() {
    let mut lab = Lab::start(&Plan::default());
    lab.unload();
    lab.configure("attach = \"generic\"");
    lab.restart_with(METRICS);
    let directory = lab.network.path("");
    fs::write(directory.join("alerts.yml"), eager(ALERTS)).unwrap();
    for words in [
        ["check", "rules", "alerts.yml"],
        ["check", "config", "prometheus.conf"],
    ] {
        let config = include_str!("../filter-user/dist/monitoring/prometheus.yml");
        fs::write(directory.join("prometheus.conf"), eager(config)).unwrap();
        let output = Command::new("promtool")
            .current_dir(&directory)
            .args(words)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
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

    drop(lab.gate.take());
    tests::eventually("somebody is woken", || {
        let alerts = ask("alerts").to_string();
        let expected = ["PullgateBelowNative", "PullgateGone"];
        expected
            .iter()
            .all(|name| alerts.contains(name))
            .then_some(())
    });
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
