//! Verifies the documents beside the manual: each command in them runs, in a lab, and each reason is
//! explained.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;
use std::time::Duration;

use tests::gate::origin;
use tests::lab::METRICS;
use tests::net::Host;
use tests::pki::SHOP;
use tests::{Lab, Plan};
use time::OffsetDateTime;

const TROUBLESHOOTING: &str = include_str!("../docs/troubleshooting.md");
const KERNELS: &str = include_str!("../docs/kernels.md");
const DOCUMENTS: [&str; 5] = [
    TROUBLESHOOTING,
    KERNELS,
    include_str!("../docs/migrating.md"),
    include_str!("../docs/fleet.md"),
    include_str!("../docs/threat-model.md"),
];

#[test]
fn every_command_runs() {
    let mut lab = Lab::start(&Plan::default());
    lab.restart_with(METRICS);
    let pki = &lab.pki;
    pki.write_identity("client", &pki.ours.client());
    pki.write("our-ca.pem", pki.ours.pem());
    let tomorrow = OffsetDateTime::now_utc() + Duration::from_secs(86_400);
    pki.write("crl.pem", &pki.ours.crl(&[7], tomorrow));
    // The commands as an operator has them; systemd is not process 1 here, so it only listens.
    let tools = lab.network.path("tools");
    fs::create_dir(&tools).unwrap();
    let ours = tests::daemon::binary().display().to_string();
    let config = lab.config.display();
    for (name, script) in [
        ("pullgate", format!("exec {ours} --config {config} \"$@\"")),
        (
            "systemctl",
            "case $1 in reload|restart) ;; *) exit 64 ;; esac".to_owned(),
        ),
    ] {
        let path = tools.join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    let commands: BTreeSet<_> = DOCUMENTS.iter().flat_map(|text| commands(text)).collect();
    assert!(commands.len() > 30, "{commands:?}");
    for command in commands {
        let here = command
            .replace("www.example.com", SHOP)
            .replace("203.0.113.10:443", &format!("{}:443", origin()))
            .replace(
                "/usr/share/doc/pullgate/",
                concat!(env!("CARGO_MANIFEST_DIR"), "/../filter-user/dist/"),
            );
        let mut shell = lab.network.command(Host::Origin, "sh");
        let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap());
        shell
            .args(["-c", &here])
            .env("PATH", path)
            .current_dir(pki.path(""));
        let output = shell.stdin(Stdio::null()).output().unwrap();

        let (out, error) = (
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).to_lowercase(),
        );
        // What the gate refuses says so, and who is in no range is not there; nothing else fails.
        let expected: &[i32] = match command.as_str() {
            "pullgate ranges show 198.51.100.7" | "pullgate ranges show 203.0.113.10" => &[1],
            it if it.starts_with("openssl s_client") => &[1],
            it if it.starts_with("curl") && it.contains("http://203.0.113.10:443") => &[52, 56],
            _ => &[0],
        };
        let code = output.status.code().unwrap();
        assert!(expected.contains(&code), "{command}: {code} {error}");
        for word in ["usage", "unknown option", "unrecognized", "no such file"] {
            assert!(!error.contains(word), "{command}: {error}");
        }
        let is_silent = out.is_empty() && error.is_empty();
        assert!(!is_silent || command.starts_with("systemctl"), "{command}");
    }
}

#[test]
fn every_reason_is_explained() {
    let manual = include_str!("../README.md");
    let section = manual.split("## Why the gate refuses").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    let reasons: BTreeSet<_> = rows
        .flat_map(|row| quoted(row.split('|').nth(1).unwrap()))
        .collect();
    assert!(reasons.len() > 30, "{reasons:?}");

    for reason in reasons {
        assert!(TROUBLESHOOTING.contains(&format!("`{reason}`")), "{reason}");
    }
}

#[test]
fn the_kernels_that_are_named_are_those_that_are_booted() {
    let lines = include_str!("vm/kernels").lines();
    let booted: Vec<_> = lines
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split_whitespace().next().unwrap())
        .collect();
    let section = KERNELS.split("Others were not run").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| "));
    let named: Vec<_> = rows
        .skip(1)
        .map(|row| row.split_whitespace().nth(1).unwrap())
        .collect();
    assert_eq!(named, booted);

    let manual = include_str!("../README.md");
    let requirements = manual.split("## Requirements").nth(1).unwrap();
    let requirements = requirements.split("\n## ").next().unwrap();
    for kernel in booted {
        assert!(requirements.contains(kernel), "{kernel}");
    }
    // What an operator must know before the first attach of a production card.
    assert!(KERNELS.contains("## The first attach"));
    assert!(requirements.contains("docs/kernels.md"));
}

#[test]
fn links_lead_somewhere() {
    for text in DOCUMENTS {
        for link in text.split("](").skip(1) {
            let link = link.split(')').next().unwrap();
            let (file, section) = link.split_once('#').unwrap_or((link, ""));
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/").to_owned() + file;
            let target = fs::read_to_string(&path).unwrap();
            let headings = target.lines().filter_map(|line| line.strip_prefix("## "));
            let mut names = headings.map(|heading| heading.to_lowercase().replace(' ', "-"));
            assert!(
                section.is_empty() || names.any(|name| name == section),
                "{link}"
            );
        }
    }
}

/// What stands behind a prompt, and what the last column of a table says.
fn commands(text: &str) -> Vec<String> {
    let prompted = text
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("$ "));
    let rows = text
        .lines()
        .filter(|line| line.starts_with('|') && line.ends_with("` |"));
    let confirming = rows.filter_map(|row| quoted(row).pop());
    let known = ["pullgate ", "openssl ", "curl ", "ss ", "date ", "bpftool "];
    let confirming =
        confirming.filter(|word| known.iter().any(|program| word.starts_with(program)));
    prompted.map(str::to_owned).chain(confirming).collect()
}

fn quoted(text: &str) -> Vec<String> {
    text.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}
