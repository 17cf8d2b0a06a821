//! Verifies the pages: each command in them runs, in a lab or by another test, and each link leads somewhere.
#![expect(
    clippy::unwrap_used,
    reason = "a page that cannot be read stops the test"
)]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tests::gate::origin;
use tests::lab::METRICS;
use tests::manual::Manual;
use tests::net::Host;
use tests::pki::SHOP;
use tests::{Lab, Plan};
use time::OffsetDateTime;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const KERNELS: &str = include_str!("../docs/kernels.md");

#[test]
fn every_command_runs() {
    let mut lab = Lab::start(&Plan::default());
    lab.restart_with(METRICS);
    let pki = &lab.pki;
    pki.write_identity("client", &pki.ours.client());
    pki.write("our-ca.pem", pki.ours.pem());
    let tomorrow = OffsetDateTime::now_utc() + Duration::from_secs(86_400);
    pki.write("crl.pem", &pki.ours.crl(&[7], tomorrow));
    let tools = tools(&lab);
    let api = Api::start(&lab);

    let mut count = 0;
    for (page, text) in pages() {
        // What a page makes is its own.
        let directory = lab.network.path(format!("page-{page}"));
        let copied = Command::new("cp")
            .arg("--recursive")
            .arg(pki.path(""))
            .arg(&directory)
            .status();
        assert!(copied.unwrap().success());
        for command in commands(&page, &text)
            .into_iter()
            .filter(|it| !runs_elsewhere(it))
        {
            run(&lab, &tools, &directory, &command);
            count += 1;
        }
    }
    assert!(count > 60, "{count}");
    api.was_asked_as_documented();
    try_on_trial(&mut lab, &tools);
    run(&lab, &tools, &lab.pki.path(""), "sudo pullgate unload");
}

/// A place where Cloudflare's API is not, which takes down what it is asked.
struct Api(Arc<Mutex<Vec<(String, String)>>>);

impl Api {
    fn start(lab: &Lab) -> Self {
        let listener = lab
            .network
            .on(Host::Origin, || TcpListener::bind(API).unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let taken_down = Arc::clone(&asked);
        // It ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.unwrap());
                let head = (&mut stream).lines().map(Result::unwrap);
                let head: Vec<_> = head.take_while(|line| !line.is_empty()).collect();
                let length = head
                    .iter()
                    .find_map(|line| line.strip_prefix("Content-Length: "));
                let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
                stream.read_exact(&mut body).unwrap();
                taken_down
                    .lock()
                    .unwrap()
                    .push((head.join("\n"), String::from_utf8(body).unwrap()));
                let answer = "HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{\"success\":true}";
                stream.get_mut().write_all(answer.as_bytes()).unwrap();
            }
        });
        Self(asked)
    }

    /// developers.cloudflare.com/api, "Zone-level authenticated origin pulls".
    fn was_asked_as_documented(&self) {
        let asked = self.0.lock().unwrap();
        assert_eq!(asked.len(), 3, "{asked:?}");
        let [(upload, pair), (look, _), (switch, on)] = [&asked[0], &asked[1], &asked[2]];
        let at = "/client/v4/zones/a-zone/origin_tls_client_auth";
        assert!(upload.starts_with(&format!("POST {at} ")), "{upload}");
        assert!(look.starts_with(&format!("GET {at} ")), "{look}");
        assert!(
            switch.starts_with(&format!("PUT {at}/settings ")),
            "{switch}"
        );
        for (head, _) in &*asked {
            assert!(head.contains("\nAuthorization: Bearer a token"), "{head}");
        }
        let pair: Value = serde_json::from_str(pair).unwrap();
        for (field, kind) in [
            ("certificate", "CERTIFICATE"),
            ("private_key", "PRIVATE KEY"),
        ] {
            let text = pair[field].as_str().unwrap();
            assert!(
                text.starts_with(&format!("-----BEGIN {kind}-----\n")),
                "{text}"
            );
        }
        assert_eq!(serde_json::from_str::<Value>(on).unwrap()["enabled"], true);
    }
}

/// Where it is.
const API: &str = "127.0.0.1:8099";
/// What a page lets run elsewhere, to look from outside.
const OUTSIDE: &str =
    "curl --max-time 5 --resolve www.example.com:443:203.0.113.10 https://www.example.com/";

/// The pages and the files beside them, by name.
fn pages() -> Vec<(String, String)> {
    let all = ["", "docs", "docs/development"].into_iter().flat_map(files);
    let pages = all.map(|(_, page)| {
        let name = page.file_stem().unwrap().to_str().unwrap().to_owned();
        (name, fs::read_to_string(&page).unwrap())
    });
    let mut pages: Vec<_> = pages.collect();
    pages.sort();
    pages
}

/// What needs a Debian with systemd, or cargo, and is run there by other tests, word for word: it is one of
/// their strings.
fn runs_elsewhere(command: &str) -> bool {
    // At the end of this one.
    const TRIAL: [&str; 3] = [
        "sudo pullgate run --confirm 60s",
        "sudo pullgate confirm",
        "sudo pullgate unload",
    ];
    // CI calls them.
    const CARGO: [&str; 5] = [
        "cargo xtask run",
        "cargo xtask test",
        "cargo xtask dist",
        "cargo xtask build",
        "cargo test ",
    ];
    let plain = command.strip_prefix("sudo ").unwrap_or(command);
    let manual = Manual::read();
    let on_debian = [
        manual.install,
        manual.start_filter,
        manual.enforce,
        manual.start_gate,
        manual.start_steered,
        manual.unpack,
    ];
    let guide = include_str!("getting_started.rs").replace("\\\"", "\u{0}");
    let mut guide = guide.split('"').map(|text| text.replace('\u{0}', "\""));
    TRIAL.contains(&command)
        || CARGO.iter().any(|it| command.starts_with(it))
        || on_debian.contains(&plain)
        || manual.take_in.contains(&plain)
        || plain.starts_with("apt install ./pullgate_")
        || guide.any(|text| text == plain)
}

/// The commands as an operator has them; systemd is not process 1 here, so it only listens.
fn tools(lab: &Lab) -> PathBuf {
    let tools = lab.network.path("tools");
    fs::create_dir(&tools).unwrap();
    let ours = tests::daemon::binary().display().to_string();
    let config = lab.config.display();
    for (name, script) in [
        ("pullgate", format!("exec {ours} --config {config} \"$@\"")),
        ("sudo", "exec \"$@\"".to_owned()),
        (
            "systemctl",
            "case $1 in reload|restart) ;; *) exit 64 ;; esac".to_owned(),
        ),
    ] {
        let path = tools.join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    tools
}

fn shell(lab: &Lab, tools: &Path, directory: &Path, command: &str) -> Command {
    let here = command
        .replace("www.example.com", SHOP)
        .replace("203.0.113.10:443", &format!("{}:443", origin()))
        .replace("chgrp pullgate-gate", "chgrp root")
        .replace(
            "/usr/share/doc/pullgate/",
            &format!("{ROOT}/filter-user/dist/"),
        )
        .replace("https://api.cloudflare.com", &format!("http://{API}"))
        .replace(":203.0.113.10 ", &format!(":{} ", origin()));
    let is_outside = command == OUTSIDE || command.starts_with("pullgate probe ");
    let host = if is_outside {
        Host::Stranger
    } else {
        Host::Origin
    };
    let mut shell = lab.network.command(host, "sh");
    let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap());
    shell
        .args(["-c", &here])
        .env("PATH", path)
        .env("TOKEN", "a token")
        .env("ZONE", "a-zone")
        .current_dir(directory)
        .stdin(Stdio::null());
    shell
}

fn run(lab: &Lab, tools: &Path, directory: &Path, command: &str) {
    let output = shell(lab, tools, directory, command).output().unwrap();
    let (out, error) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).to_lowercase(),
    );
    // The gate refuses these clients, and these addresses are in no range; nothing else fails.
    let expected: &[i32] = match command {
        "pullgate ranges show 198.51.100.7" | "pullgate ranges show 203.0.113.10" => &[1],
        it if it.starts_with("openssl s_client") => &[1],
        // The filter answers with silence.
        OUTSIDE => &[28],
        it if it.starts_with("curl") && it.contains("http://203.0.113.10:443") => &[52, 56],
        _ => &[0],
    };
    let code = output.status.code().unwrap();
    assert!(expected.contains(&code), "{command}: {code} {error}");
    for word in ["usage:", "unknown option", "unrecognized", "no such file"] {
        assert!(!error.contains(word), "{command}: {error}");
    }
    let is_silent = out.is_empty() && error.is_empty();
    let may_be = ["systemctl", "sudo systemctl", "printf", "chgrp"];
    assert!(
        !is_silent || may_be.iter().any(|it| command.starts_with(it)),
        "{command}"
    );
}

/// The trial of the filter's page: `pullgate confirm` comes from a second connection.
fn try_on_trial(lab: &mut Lab, tools: &Path) {
    assert_eq!(lab.filter.take().unwrap().stop(), Some(0));
    let directory = lab.pki.path("");
    let mut trial = shell(
        lab,
        tools,
        &directory,
        "exec sudo pullgate run --confirm 60s --yes",
    )
    .spawn()
    .unwrap();
    tests::eventually("the trial is confirmed", || {
        let confirmed = shell(lab, tools, &directory, "sudo pullgate confirm")
            .output()
            .unwrap();
        confirmed.status.success().then_some(())
    });
    let pid = Pid::from_raw(i32::try_from(trial.id()).unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    let ended = trial.wait().unwrap();
    assert!(ended.success(), "{ended}");
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
    assert!(manual.lines().count() <= 150);
}

#[test]
fn links_lead_somewhere() {
    for (directory, page) in ["", "docs", "docs/development"].into_iter().flat_map(files) {
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1) {
            let link = link.split(')').next().unwrap();
            let (file, section) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() {
                page.clone()
            } else {
                directory.join(file)
            };
            let found = fs::read_to_string(&target);
            let found = found.unwrap_or_else(|error| panic!("{}: {link}: {error}", page.display()));
            let headings = found.lines().filter_map(|line| line.strip_prefix("## "));
            let mut names = headings.map(|heading| heading.to_lowercase().replace(' ', "-"));
            assert!(
                section.is_empty() || names.any(|name| name == section),
                "{}: {link}",
                page.display()
            );
        }
    }
}

/// The pages of a directory, with it.
fn files(directory: &str) -> Vec<(PathBuf, PathBuf)> {
    let directory = Path::new(ROOT).join(directory);
    let entries = fs::read_dir(&directory).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let pages = paths.filter(|path| path.extension().is_some_and(|it| it == "md"));
    pages.map(|page| (directory.clone(), page)).collect()
}

/// What stands behind a prompt, in blocks for a shell elsewhere, and in the last column of the tables that name a command for each cause.
fn commands(page: &str, text: &str) -> Vec<String> {
    let prompted = text
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("$ "))
        .map(|line| line.split("  #").next().unwrap().trim());
    let blocks = text.split("```sh\n").skip(1);
    let blocks = blocks.flat_map(|block| block.split("```").next().unwrap().lines());
    let rows = text
        .lines()
        .filter(|line| ["refusals", "troubleshooting"].contains(&page) && line.ends_with("` |"));
    let confirming = rows.filter_map(|row| quoted(row).pop());
    let known = ["pullgate ", "openssl ", "curl ", "ss ", "date ", "bpftool "];
    let confirming =
        confirming.filter(|word| known.iter().any(|program| word.starts_with(program)));
    let written = prompted.chain(blocks).map(str::to_owned);
    written.chain(confirming).collect()
}

fn quoted(text: &str) -> Vec<String> {
    text.split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}
