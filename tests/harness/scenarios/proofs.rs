//! Scenario 9: what the tools say that prove both ends, `probe` from outside and `doctor` on the origin.

use std::net::IpAddr;

use serde_json::Value;

use super::gate::pairs;
use super::{Attempt, NOT_LISTED, Row};
use crate::Lab;
use crate::daemon::binary;
use crate::net::Host;
use crate::pki::SHOP;

/// 9a. `pullgate probe` by a stranger, who sees silence, and by the edge: what Cloudflare presents is admitted, what
///     another site's would present is not, and nothing is open.
#[must_use]
pub fn probe_finds_nothing_open(lab: &Lab) -> Vec<Row> {
    lab.pki.write_identity("edge", &lab.pki.ours.client());
    lab.pki.write_identity("other", &lab.pki.other.client());
    let file = |name: &str| lab.pki.path(name).display().to_string();
    let own = ["--cert", &file("edge.pem"), "--key", &file("edge.key")].map(str::to_owned);
    let other = [
        "--other-cert",
        &file("other.pem"),
        "--other-key",
        &file("other.key"),
    ]
    .map(str::to_owned);
    let mut rows = Vec::new();
    for [stranger, origin] in pairs(Host::Stranger) {
        let attempt = Attempt {
            scenario: 9,
            who: &format!("stranger {stranger}"),
            what: "pullgate probe",
            expected: "silence; 0 wrong",
        };
        rows.push(attempt.frames(lab, NOT_LISTED, 1..=u64::MAX, || {
            probe(lab, Host::Stranger, origin, &[])
        }));
    }
    let [origin, _] = Host::Origin.addresses();
    let attempt = Attempt {
        scenario: 9,
        who: "edge",
        what: "pullgate probe, as Cloudflare and as another customer",
        expected: "an answer; 0 wrong",
    };
    rows.push(attempt.counted(
        "gate: Relayed",
        1..=u64::MAX,
        || lab.gate().outcomes("Relayed"),
        || probe(lab, Host::Edge, origin, &[own, other].concat()),
    ));
    rows
}

/// 9b. `pullgate doctor` on the origin: nothing is wrong, of all that it asks.
#[must_use]
pub fn doctor_finds_nothing_wrong(lab: &Lab) -> Vec<Row> {
    let output = lab.pullgate(&["--json", "doctor"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    vec![Row {
        scenario: 9,
        who: "the operator".to_owned(),
        what: "pullgate doctor".to_owned(),
        expected: "0 wrong".to_owned(),
        seen: wrong(&report["checks"]),
        decided: String::new(),
        counter: (0, 0),
        steps: 0..=0,
    }]
}

/// What is seen of the port, and how much is wrong or not known.
fn probe(lab: &Lab, host: Host, origin: IpAddr, more: &[String]) -> String {
    let program = binary().display().to_string();
    let origin = origin.to_string();
    let mut words = vec![
        program.as_str(),
        "--json",
        "probe",
        SHOP,
        "--origin",
        &origin,
    ];
    words.extend(more.iter().map(String::as_str));
    let output = lab.network.output(host, &words);
    let Ok(report) = serde_json::from_slice::<Value>(&output.stdout) else {
        return String::from_utf8_lossy(&output.stderr).into_owned();
    };
    let checks = &report[0]["checks"];
    let port = checks[0]["seen"].as_str().unwrap_or_default();
    format!(
        "{}; {}",
        port.split(',').next().unwrap_or_default(),
        wrong(checks)
    )
}

/// How many questions have an answer that is wrong, or none; and which.
fn wrong(checks: &Value) -> String {
    let Some(checks) = checks.as_array().filter(|checks| !checks.is_empty()) else {
        return "nothing was asked".to_owned();
    };
    let is_wrong = |check: &&Value| {
        check["answered"] == false || check["findings"].to_string().contains("\"error\"")
    };
    let wrong: Vec<_> = checks
        .iter()
        .filter(is_wrong)
        .filter_map(|check| check["id"].as_str())
        .collect();
    format!("{} wrong {}", wrong.len(), wrong.join(" "))
        .trim_end()
        .to_owned()
}
