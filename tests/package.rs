//! Verifies the package on a clean Debian whose systemd runs it: installed, checked, started,
//! enforced, reloaded, upgraded under load, booted with, and removed without a trace.

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
    let mut debian = Debian::new(&network);
    debian.install(1);

    // As it comes, nothing runs, and what is configured is in order and cuts nobody off.
    let units = ["systemctl", "list-units", "--quiet", "pullgate*"];
    assert_eq!(debian.says(&units), "");
    let check = || debian.says(&["pullgate", "check"]);
    assert!(check().ends_with("in order\n"));
    let configuration = "etc/pullgate/pullgate.toml";
    assert!(debian.read(configuration).contains("mode = \"monitor\""));
    debian.judge_units();
    debian.configure(&pki);
    assert!(check().ends_with("in order\n"));
    debian.systemctl(&["enable", "--now", "--quiet", FILTER, RANGES]);
    debian.systemctl(&["enable", "--now", "--quiet", "pullgate-gate.socket", GATE]);
    for role in ROLES {
        debian.runs_as_its_unit_says(role);
    }
    eventually("the journal has fields", || {
        let journal = debian.journal("gate");
        (journal.contains("gate is listening") && journal.contains("\"F_LISTEN\"")).then_some(())
    });
    let edge = Client::new(&pki, Some(&pki.ours.client()));
    let ask = || edge.get(&network, Host::Edge, origin(), SHOP).0.brief();
    let enters = || connect(&network, Host::Stranger, origin()).is_ok();
    assert_eq!(ask(), "200");
    assert!(enters(), "monitor mode");
    eventually("the gate has seen the stranger", || {
        (seen_by_gate(&debian) == 1).then_some(())
    });

    let enforced = debian
        .read(configuration)
        .replace("\"monitor\"", "\"enforce\"");
    debian.write(configuration, &enforced);
    debian.systemctl(&["reload", FILTER]);
    eventually("the filter enforces", || (!enters()).then_some(()));
    let strangers = seen_by_gate(&debian);
    assert!(
        debian
            .says(&["pullgate", "status"])
            .starts_with("PROTECTED")
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
        let more = |what: &str, count: &AtomicU32| {
            let before = count.load(Ordering::Relaxed);
            eventually(what, || {
                (count.load(Ordering::Relaxed) > before + 2).then_some(())
            });
        };
        more("the load has begun", &served);
        let before = ROLES.map(|role| debian.property(&unit(role), "MainPID"));
        debian.install(2);
        let after = ROLES.map(|role| debian.property(&unit(role), "MainPID"));
        for (before, after) in before.iter().zip(&after) {
            assert_ne!(before, after, "the new version runs");
        }
        more("the load goes on", &served);
        more("strangers come", &tried);
    });
    assert_eq!(seen_by_gate(&debian), strangers, "the gate saw a stranger");

    // A host that boots is protected without anybody's help, and before it has a network.
    debian.reboot();
    assert!(
        debian
            .says(&["pullgate", "status"])
            .starts_with("PROTECTED")
    );
    assert_eq!(ask(), "200");
    assert!(!enters());
    let since = |unit: &str| {
        let time = debian.property(unit, "ActiveEnterTimestampMonotonic");
        time.parse::<u64>().unwrap()
    };
    assert!((1..since("network-pre.target")).contains(&since(FILTER)));
    for role in ROLES {
        debian.runs_as_its_unit_says(role);
        assert_eq!(debian.property(&unit(role), "NRestarts"), "0", "{role}");
    }

    debian.systemctl(&["stop", FILTER, RANGES, GATE, "pullgate-gate.socket"]);
    assert!(debian.has_pins(), "the filter goes on");
    let removed = debian.run(&["dpkg", "--purge", "pullgate"]);
    assert!(removed.status.success(), "{}", text(&removed.stderr));
    assert!(!debian.has_pins());
    let key = debian.path("etc/pullgate/shop.example.key");
    assert!(key.exists(), "the operator's own");
    fs::remove_dir_all(debian.path("etc/pullgate")).unwrap();
    let left = "find /etc /usr /run /var/lib -name '*pullgate*'";
    assert_eq!(debian.says(&["sh", "-c", left]), "");
    assert!(matches!(
        connect(&network, Host::Stranger, origin()),
        Err(reply) if reply.to_string() == "connection refused"
    ));
}

/// How many lines of the gate's, of all its processes, name the stranger.
fn seen_by_gate(debian: &Debian<'_>) -> usize {
    let journal = debian.journal("gate");
    let [v4, v6] = Host::Stranger
        .addresses()
        .map(|address| address.to_string());
    let names_him = |line: &&str| line.contains(&v4) || line.contains(&v6);
    journal.lines().filter(names_him).count()
}

fn unit(role: &str) -> String {
    format!("pullgate-{role}.service")
}

const ROLES: [&str; 3] = ["filter", "ranges", "gate"];
const FILTER: &str = "pullgate-filter";
const RANGES: &str = "pullgate-ranges";
const GATE: &str = "pullgate-gate";
