//! Verifies the package on a clean Debian: installed, checked, started as its units do, enforced,
//! reloaded, upgraded under load, and removed without a trace.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use tests::client::{Client, connect};
use tests::debian::{Debian, text};
use tests::eventually;
use tests::gate::{StopAtTheEnd, origin};
use tests::net::{Host, Network};
use tests::pki::{Pki, SHOP};
use tests::web::{Kind, Web};

#[test]
fn a_package_is_installed_enforces_is_upgraded_under_load_and_is_removed() {
    let network = Network::new();
    let pki = Pki::new(&network.path("pki"));
    let _web = Web::start(&network, Kind::Nginx);
    let debian = Debian::new(&network);
    debian.install(1);

    // As it comes, nothing runs, and what is configured is in order and cuts nobody off.
    assert_eq!(debian.run(&["pullgate", "check"]).status.code(), Some(0));
    assert!(
        debian
            .read("etc/pullgate/pullgate.toml")
            .contains("mode = \"monitor\"")
    );
    debian.judge_units();
    debian.configure(&pki);
    let journal = debian.journal();
    let checked = debian.run(&["pullgate", "check"]);
    assert_eq!(checked.status.code(), Some(0), "{}", text(&checked.stderr));
    let sockets = debian.listen();
    let start = |role: &'static str| debian.start(role, &sockets);
    let mut roles = vec![start("filter"), start("ranges"), start("gate")];
    for role in &roles {
        role.is_as_its_unit_says();
    }
    for words in ["SYSLOG_IDENTIFIER", "gate is listening", "F_LISTEN"] {
        eventually(words, || {
            journal.lock().unwrap().contains(words).then_some(())
        });
    }
    let edge = Client::new(&pki, Some(&pki.ours.client()));
    let ask = || edge.get(&network, Host::Edge, origin(), SHOP).0.brief();
    let enters = || connect(&network, Host::Stranger, origin()).is_ok();
    assert_eq!(ask(), "200");
    assert!(enters(), "monitor mode");

    let enforced = debian
        .read("etc/pullgate/pullgate.toml")
        .replace("\"monitor\"", "\"enforce\"");
    debian.write("etc/pullgate/pullgate.toml", &enforced);
    roles[0].reload();
    assert!(!enters());
    let status = debian.run(&["pullgate", "status"]);
    assert_eq!(status.status.code(), Some(0), "{}", text(&status.stdout));
    assert!(
        text(&status.stdout).starts_with("PROTECTED"),
        "{}",
        text(&status.stdout)
    );

    let (over, served, tried) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                assert_eq!(ask(), "200");
                served.fetch_add(1, Ordering::Relaxed);
            }
        });
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                assert!(!enters(), "a stranger got in");
                tried.fetch_add(1, Ordering::Relaxed);
            }
        });
        let _stop_at_the_end = StopAtTheEnd(&over);
        eventually("the load has begun", || {
            (served.load(Ordering::Relaxed) > 5).then_some(())
        });
        debian.install(2);
        // As the package's script has systemd do.
        for role in &mut roles {
            let name = role.name;
            role.stop();
            *role = start(name);
        }
        let before = served.load(Ordering::Relaxed);
        eventually("the load goes on", || {
            (served.load(Ordering::Relaxed) > before + 5).then_some(())
        });
        eventually("strangers come", || {
            (tried.load(Ordering::Relaxed) > 1).then_some(())
        });
    });
    let status = text(&debian.run(&["pullgate", "status", "--json"]).stdout);
    assert!(
        !status.contains("outcome=\\\"NotListed"),
        "the gate saw a stranger: {status}"
    );
    assert!(served.into_inner() > 10);

    for role in &mut roles {
        role.stop();
    }
    drop(sockets);
    assert!(debian.has_pins(), "the filter goes on");
    let removed = debian.run(&["dpkg", "--purge", "pullgate"]);
    assert!(removed.status.success(), "{}", text(&removed.stderr));
    assert!(!debian.has_pins());
    let key = debian.path("etc/pullgate/shop.example.key");
    assert!(key.exists(), "the operator's own");
    fs::remove_dir_all(debian.path("etc/pullgate")).unwrap();
    for path in ["var/lib/pullgate", "run/pullgate", "usr/bin/pullgate"] {
        assert!(!debian.path(path).exists(), "{path} is left");
    }
    let left = debian.run(&[
        "find",
        "/etc",
        "/usr",
        "/var/lib/pullgate",
        "-name",
        "*pullgate*",
    ]);
    assert_eq!(text(&left.stdout), "");
    assert!(matches!(
        connect(&network, Host::Stranger, origin()),
        Err(reply) if reply.to_string() == "connection refused"
    ));
}
