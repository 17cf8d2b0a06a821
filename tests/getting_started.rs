//! Verifies the manual's first page on a clean Debian whose systemd runs nginx or Apache with three sites:
//! from the package to monitoring, to enforcing, and back, with no line of the web server changed.

#![expect(
    clippy::unwrap_used,
    reason = "a rig that cannot be made stops the test"
)]

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use tests::client::Client;
use tests::debian::{Debian, text};
use tests::eventually;
use tests::gate::{PLENTY, StopAtTheEnd, origin};
use tests::net::{Host, INTERFACE, Network};
use tests::pki::{BLOG, Identity, Pki, SHOP, WIKI};

#[test]
fn nginx_is_protected_where_it_stands() {
    protect(
        "nginx",
        "etc/nginx/sites-enabled",
        |name| {
            format!(
                "server {{\n  listen 443 ssl http2;\n  listen [::]:443 ssl http2;\n  server_name {name};\n  \
                 ssl_certificate /etc/ssl/certs/{name}.pem;\n  ssl_certificate_key \
                 /etc/ssl/private/{name}.key;\n  ssl_client_certificate /etc/ssl/certs/ours-ca.pem;\n  \
                 ssl_verify_client optional;\n  default_type text/plain;\n  location / {{ return 200 \
                 \"{name} for $remote_addr\\n\"; }}\n}}\n"
            )
        },
        &["rm /etc/nginx/sites-enabled/default"],
    );
}

#[test]
fn apache_is_protected_where_it_stands() {
    protect(
        "apache2",
        "etc/apache2/sites-enabled",
        |name| {
            format!(
                "<VirtualHost *:443>\n  ServerName {name}\n  DocumentRoot /var/www/{name}\n  SSLEngine on\n  \
                 SSLCertificateFile /etc/ssl/certs/{name}.pem\n  SSLCertificateKeyFile \
                 /etc/ssl/private/{name}.key\n</VirtualHost>\n"
            )
        },
        &[
            "a2enmod --quiet ssl",
            "for name in shop blog wiki; do mkdir /var/www/$name.example && \
             echo $name.example >/var/www/$name.example/index.html; done",
        ],
    );
}

#[test]
fn these_are_the_commands_of_the_manual() {
    let manual = include_str!("../docs/getting-started.md");
    for command in [INIT, START, ENFORCE, RELOAD, BACK] {
        assert!(manual.contains(&format!("$ sudo {command}\n")), "{command}");
    }
    let operations = include_str!("../docs/operations.md");
    let troubleshooting = include_str!("../docs/troubleshooting.md");
    for command in [STOP_ALL, START_ALL, JOURNAL_FIELD] {
        assert!(operations.contains(&format!("{command}\n")), "{command}");
    }
    assert!(troubleshooting.contains(&format!("{JOURNAL}\n")));
}

fn protect(service: &str, sites: &str, site: impl Fn(&str) -> String, prepare: &[&str]) {
    let network = Network::new();
    let words = ["ip", "route", "add", "default", "dev", INTERFACE];
    assert!(network.output(Host::Origin, &words).status.success());
    let pki = Pki::new(&network.path("pki"));
    let debian = Debian::new(&network);
    debian.follow(prepare);
    debian.follow(&["mkdir --parents --mode=700 /etc/ssl/private"]);
    let extension = if service == "apache2" { ".conf" } else { "" };
    for name in [SHOP, BLOG, WIKI] {
        debian.write(&format!("{sites}/{name}{extension}"), &site(name));
        let key = debian.path(&format!("etc/ssl/private/{name}.key"));
        fs::copy(pki.path(&format!("{name}.key")), key).unwrap();
        let certificate = debian.path(&format!("etc/ssl/certs/{name}.pem"));
        fs::copy(pki.path(&format!("{name}.pem")), certificate).unwrap();
    }
    let authority = debian.path("etc/ssl/certs/ours-ca.pem");
    fs::copy(pki.path("ours-ca.pem"), authority).unwrap();
    debian.follow(&["chmod 644 /etc/ssl/certs/*-ca.pem /etc/ssl/certs/*.example.pem"]);
    // Two ways in which keys are kept: for root alone, and for a group of other servers.
    let steps = if service == "nginx" {
        debian.follow(&[
            "groupadd --force ssl-cert && chgrp --recursive ssl-cert /etc/ssl/private",
            "chmod 710 /etc/ssl/private && chmod 640 /etc/ssl/private/*",
        ]);
        1
    } else {
        // A directory and three keys.
        4
    };
    debian.systemctl(&["start", service]);
    let directory = sites.split('/').nth(1).unwrap();
    let sum = format!("find /etc/{directory} -type f | sort | xargs sha256sum");
    let untouched = debian.says(&["sh", "-c", &sum]);
    let ours = pki.ours.client();
    let (anybody, edge) = (None, Some(&ours));
    // A client each time: nginx refuses a session of another of its sites.
    let ask = |identity: Option<&Identity>, name: &str| {
        let (reply, _) = Client::new(&pki, identity).get(&network, Host::Edge, origin(), name);
        reply
    };
    let serves = |identity: Option<&Identity>| {
        for name in [SHOP, BLOG, WIKI] {
            let reply = ask(identity, name).to_string();
            assert!(reply.starts_with(&format!("200 {name}")), "{name}: {reply}");
        }
    };
    serves(anybody);

    // Three commands, and what the second one says of keys.
    debian.receive(1, "pullgate.deb");
    debian.follow(&["apt-get install --quiet --quiet ./pullgate.deb"]);
    let init = debian.run(&["sh", "-c", INIT]);
    assert!(init.status.success(), "{}", text(&init.stderr));
    let said = text(&init.stderr);
    let keys: Vec<_> = said
        .lines()
        .filter(|line| line.starts_with("  chgrp") || line.starts_with("  usermod"))
        .collect();
    assert_eq!(keys.len(), steps, "{said}");
    debian.follow(&keys);
    debian.follow(&["pullgate check"]);
    debian.follow(&[START]);
    serves(anybody);
    // The roles come back at the next boot, unless their units are disabled.
    let doctor = || text(&debian.run(&["pullgate", "doctor"]).stdout);
    let enabled = "✓ units";
    eventually("all roles answer", || {
        doctor().contains("✓ roles").then_some(())
    });
    assert!(doctor().contains(enabled), "{}", doctor());
    debian.systemctl(&["disable", "pullgate-ranges"]);
    assert!(
        doctor().contains("`systemctl enable pullgate-ranges.service`"),
        "{}",
        doctor()
    );
    debian.systemctl(&["enable", "pullgate-ranges"]);
    assert!(doctor().contains(enabled));
    let status = debian.run(&["pullgate", "status"]);
    assert!(
        text(&status.stdout).starts_with("NOT PROTECTED"),
        "monitor mode"
    );
    eventually("the gate logs what it would refuse", || {
        debian
            .journal("gate")
            .contains("would-refuse")
            .then_some(())
    });

    // Two more. Of Apache, no CA was known.
    if service == "apache2" {
        let trust =
            "sed -i 's|\"cloudflare\"|\"/etc/ssl/certs/ours-ca.pem\"|' /etc/pullgate/pullgate.toml";
        debian.follow(&[trust]);
    }
    debian.follow(&[ENFORCE, RELOAD]);
    serves(edge);
    assert_eq!(ask(anybody, SHOP).brief(), "alert CertificateRequired");
    let stranger = Client::new(&pki, edge);
    let (reply, _) = stranger.get(&network, Host::Stranger, origin(), SHOP);
    assert_eq!(reply.brief(), "silence");
    let status = debian.says(&["pullgate", "status"]);
    assert!(status.starts_with("PROTECTED"), "{status}");

    // Whatever is restarted, killed or upgraded, a client without the certificate is never served, and
    // one with it always; but for what the gate was at when it was killed.
    let plenty = format!("printf '{PLENTY}\\n' >>/etc/pullgate/pullgate.toml");
    debian.follow(&[&plenty, RELOAD]);
    debian.receive(2, "upgrade.deb");
    for (command, may_fail) in [
        ("systemctl restart pullgate-gate", 0),
        ("systemctl restart pullgate-filter", 0),
        ("systemctl restart pullgate-ranges", 0),
        ("systemctl kill --signal=KILL pullgate-filter", 0),
        ("dpkg --install upgrade.deb", 0),
        ("systemctl kill --signal=KILL pullgate-gate", 1),
    ] {
        let failed = meanwhile(
            &|| ask(anybody, SHOP).brief(),
            &|| ask(edge, SHOP).brief(),
            || {
                debian.follow(&[command]);
                serves(edge);
            },
        );
        assert!(failed <= may_fail, "{command}: {failed}");
    }
    debian.systemctl(&["restart", service]);
    eventually("the web server is back", || {
        (ask(edge, SHOP).brief() == "200").then_some(())
    });

    for command in [JOURNAL, JOURNAL_FIELD] {
        assert!(
            debian.says(&["sh", "-c", command]).contains("refused"),
            "{command}"
        );
    }
    // All of it at once: what drops is pinned, and goes on.
    debian.follow(&[STOP_ALL]);
    let is_active = [
        "systemctl",
        "list-units",
        "--quiet",
        "--state=active",
        "pullgate*",
    ];
    // systemctl waits for the target's own job, and not for those that follow it.
    eventually("all have stopped", || {
        debian.says(&is_active).is_empty().then_some(())
    });
    assert!(debian.has_pins());
    debian.follow(&[START_ALL]);
    eventually("all that is enabled runs", || {
        (ask(edge, SHOP).brief() == "200").then_some(())
    });
    assert_eq!(debian.says(&is_active).lines().count(), 5);

    // And back, by one.
    debian.follow(&[BACK]);
    eventually("the port is the web server's again", || {
        (ask(anybody, SHOP).brief() == "200").then_some(())
    });
    serves(anybody);
    assert_eq!(debian.says(&["sh", "-c", &sum]), untouched);
}

/// How many questions of a client that is to be served fail during `work`; another one, that is not to
/// be, asks all the while as well.
fn meanwhile(
    refused: &(dyn Fn() -> String + Sync),
    served: &(dyn Fn() -> String + Sync),
    work: impl FnOnce(),
) -> usize {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop_at_the_end = StopAtTheEnd(&stop);
        let refusing = scope.spawn(|| {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                let reply = refused();
                assert!(!reply.starts_with("200"), "served without a certificate");
                count += usize::from(reply == "alert CertificateRequired");
            }
            count
        });
        let serving = scope.spawn(|| {
            let (mut count, mut failed) = (0, 0);
            while !stop.load(Ordering::Relaxed) {
                count += 1;
                failed += usize::from(served() != "200");
            }
            (count, failed)
        });
        work();
        drop(stop_at_the_end);
        let (count, failed) = serving.join().unwrap();
        assert!(
            count > 3 && refusing.join().unwrap() > 3,
            "{count} were served"
        );
        failed
    })
}

const INIT: &str = "pullgate init --write";
const BACK: &str = "pullgate unload";
const START: &str =
    "systemctl enable --now pullgate-filter pullgate-ranges pullgate-steer.socket pullgate-gate";
const ENFORCE: &str =
    "sed -i 's/\"monitor\"/\"enforce\"/; s/\"log\"/\"enforce\"/' /etc/pullgate/pullgate.toml";
const JOURNAL: &str = "journalctl --unit pullgate-gate F_ID=refused";
const JOURNAL_FIELD: &str = "journalctl --unit pullgate-gate F_ID=refused F_REASON=NoCertificate";
const STOP_ALL: &str = "systemctl stop pullgate.target";
const START_ALL: &str = "systemctl start pullgate.target";
const RELOAD: &str = "systemctl reload pullgate-filter pullgate-ranges pullgate-gate";
