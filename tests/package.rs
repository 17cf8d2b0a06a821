//! Verifies the package on a clean Debian whose systemd runs it: installed, checked, started,
//! enforced, reloaded, upgraded under load, booted with, and removed without a trace.

#![expect(
    clippy::unwrap_used,
    reason = "a manual that is not what it was must stop the test"
)]

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use tests::Pairing;
use tests::client::{Client, Session, connect};
use tests::debian::{Debian, text};
use tests::eventually;
use tests::gate::{StopAtTheEnd, origin};
use tests::manual::Manual;
use tests::net::{Host, Network};
use tests::pki::{Pki, SHOP};
use tests::web::{Software, Web};

#[test]
fn a_package_is_installed_enforces_is_upgraded_under_load_and_is_removed() {
    let network = Network::new();
    let pki = Pki::new(&network.path("pki"));
    let _web = Web::start(&network, Software::Nginx, Pairing::Relayed);
    let mut debian = Debian::new(&network);
    let manual = Manual::read();
    debian.receive(1, manual.package);

    // As it comes, nothing runs, and what is configured is OK and drops nothing.
    debian.follow(&[manual.install, manual.check]);
    let units = ["systemctl", "list-units", "--quiet", "pullgate*"];
    assert_eq!(debian.says(&units), "");
    debian.judge_units();
    debian.follow(&[manual.start_filter]);
    let watched = debian.run(&["sh", "-c", manual.status]);
    assert_eq!(watched.status.code(), Some(1), "{}", text(&watched.stdout));
    debian.configure(&pki);
    // As `openssl` makes a key: root reads it, and the gate of the package could not.
    let check = format!("{KEEP}; {} 2>&1; test $? = 1", manual.check);
    let check = debian.says(&["sh", "-c", &check]);
    assert!(check.contains("`chgrp pullgate-gate"), "{check}");
    debian.follow(&[SHARE]);
    debian.follow(&[manual.check, manual.start_gate]);
    for role in ROLES {
        debian.runs_as_its_unit_says(role);
    }
    eventually("the journal has fields", || {
        let journal = debian.journal("gate");
        (journal.contains("gate is listening") && journal.contains("\"F_LISTEN\"")).then_some(())
    });
    let edge = Client::new(&pki, Some(&pki.ours.client()));
    let visitors = Visitors {
        network: &network,
        edge,
    };
    assert_eq!(visitors.ask(), "200");
    assert!(visitors.stranger_enters(), "monitor mode");
    eventually("the gate has seen the stranger", || {
        (seen_by_gate(&debian) == 1).then_some(())
    });

    debian.follow(&[manual.enforce, manual.reload]);
    eventually("the filter enforces", || {
        (!visitors.stranger_enters()).then_some(())
    });
    let strangers = seen_by_gate(&debian);
    debian.follow(&[manual.status]);

    let (over, served, tried) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                assert_eq!(visitors.ask(), "200");
                served.fetch_add(1, Ordering::Relaxed);
            }
        });
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                assert!(!visitors.stranger_enters(), "a stranger got in");
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
        let before = pids(&debian);
        debian.receive(2, UPGRADE);
        debian.follow(&[&format!("dpkg --install {UPGRADE}")]);
        for (before, after) in before.iter().zip(&pids(&debian)) {
            assert_ne!(before, after, "the new version runs");
        }
        more("the load goes on", &served);
        more("strangers come", &tried);
    });
    assert_eq!(seen_by_gate(&debian), strangers, "the gate saw a stranger");
    // The check of a reload, in the unit's sandbox, has nothing to say of its files.
    assert!(!debian.journal("gate").contains("cannot enter"));

    mishaps(&debian, &visitors);

    // A host that boots is protected without anybody's help, and before it has a network.
    debian.reboot();
    assert!(
        debian
            .says(&["pullgate", "status"])
            .starts_with("PROTECTED")
    );
    assert_eq!(visitors.ask(), "200");
    assert!(!visitors.stranger_enters());
    let since = |unit: &str| {
        let time = debian.property(unit, "ActiveEnterTimestampMonotonic");
        time.parse::<u64>().unwrap()
    };
    assert!((1..since("network-pre.target")).contains(&since(FILTER)));
    for role in ROLES {
        debian.runs_as_its_unit_says(role);
        assert_eq!(debian.property(&unit(role), "NRestarts"), "0", "{role}");
    }

    debian.systemctl(&["stop", FILTER, RANGES]);
    assert!(debian.has_pins(), "the filter goes on");
    assert!(!visitors.stranger_enters());
    debian.systemctl(&["start", FILTER, RANGES]);

    by_hand(&debian, &visitors);

    // A removal ends whatever runs.
    debian.follow(&["dpkg --purge pullgate"]);
    assert_eq!(debian.says(&units), "");
    assert!(!debian.has_pins());
    let key = debian.path("etc/pullgate/shop.example.key");
    assert!(key.exists(), "the operator's own");
    fs::remove_dir_all(debian.path("etc/pullgate")).unwrap();
    let left = "find /etc /usr /run /var/lib -name '*pullgate*'; grep -l pullgate /proc/*/comm";
    let left = debian.run(&["sh", "-c", left]);
    assert_eq!(text(&left.stdout), "");
    assert!(matches!(
        connect(&network, Host::Stranger, origin()),
        Err(reply) if reply.to_string() == "connection refused"
    ));

    // Once more: nothing is started by itself, and nothing takes offence at who has swept up before.
    debian.follow(&[&format!("dpkg --install {UPGRADE}")]);
    assert_eq!(debian.says(&units), "");
    debian.follow(&["rm -r /etc/pullgate", "dpkg --purge pullgate"]);
}

#[test]
fn a_tarball_is_unpacked_over_a_host_and_leaves_what_is_configured() {
    let network = Network::new();
    let debian = Debian::new(&network);
    let manual = Manual::read();
    let archive = manual.unpack.rsplit('=').next().unwrap();
    debian.receive_tarball(archive);

    debian.follow(&[manual.unpack]);
    debian.follow(&manual.take_in);
    debian.follow(&[manual.check]);
    debian.judge_units();
    debian.follow(&[manual.start_filter, manual.enforce, manual.reload]);
    let configured = debian.read(CONFIGURATION);
    assert!(configured.contains("\"enforce\""));
    // What a version whose filter was root's has left, or root by hand, becomes the filter's user's.
    debian.systemctl(&["stop", FILTER]);
    debian.follow(&["chown -R root:root /sys/fs/bpf/pullgate /var/lib/pullgate-filter"]);
    debian.follow(&[manual.unpack]);
    debian.follow(&manual.take_in);
    debian.systemctl(&["restart", FILTER, RANGES]);

    assert_eq!(debian.read(CONFIGURATION), configured);
    eventually("the filter enforces", || {
        let status = debian.run(&["sh", "-c", manual.status]);
        text(&status.stdout).starts_with("PROTECTED").then_some(())
    });
    for role in ["filter", "ranges"] {
        debian.runs_as_its_unit_says(role);
    }
}

/// What goes wrong on hosts, and must not let anybody in or keep anybody out.
fn mishaps(debian: &Debian<'_>, visitors: &Visitors<'_>) {
    // What cannot be used is refused, and stops no role.
    let good = debian.read(CONFIGURATION);
    let before = pids(debian);
    debian.write(CONFIGURATION, &format!("bad = 1\n{good}"));
    for role in ROLES {
        let reload = debian.run(&["systemctl", "reload", &unit(role)]);
        assert!(!reload.status.success(), "{role}");
    }
    // As an earlier version has enabled its units.
    let wanted = "/etc/systemd/system/pullgate.target.wants";
    debian.follow(&[&format!("rm -r {wanted}")]);
    debian.follow(&[&format!("dpkg --install {UPGRADE}")]);
    debian.follow(&[&format!(
        "test -L {wanted}/pullgate-gate.socket && test -L {wanted}/{FILTER}"
    )]);
    assert_eq!(pids(debian), before);
    assert!(
        debian
            .says(&["pullgate", "status"])
            .starts_with("PROTECTED")
    );

    // What only a start can reach is refused by a reload, and not by an upgrade.
    let (_, host) = good.rsplit_once("[[gate.host]]").unwrap();
    let host = host
        .replacen(SHOP, "blog.example", 1)
        .replacen(":8080", ":8090", 1);
    let more = format!("{good}[[gate.host]]{host}");
    debian.write(CONFIGURATION, &more);
    let reload = debian.run(&["systemctl", "reload", GATE]);
    assert!(!reload.status.success());
    assert!(
        debian
            .journal("gate")
            .contains("TCP port 8090 is out of reach")
    );
    debian.follow(&[&format!("dpkg --install {UPGRADE}")]);
    assert_ne!(pids(debian)[2], before[2]);
    debian.systemctl(&["reload", GATE]);

    // A gate that is to listen elsewhere leaves its socket unit alone; lost directories come back.
    debian.write(CONFIGURATION, &good.replace(", \"[::]:443\"", ""));
    debian.follow(&["rm -r /run/pullgate"]);
    for _ in 0..2 {
        debian.systemctl(&["restart", FILTER, RANGES, GATE]);
        assert_eq!(visitors.ask(), "200");
    }
    debian.write(CONFIGURATION, &good);
    debian.systemctl(&["restart", GATE]);
    assert_eq!(debian.property("pullgate-gate.socket", "Result"), "success");
    assert_eq!(visitors.ask(), "200");

    // A gate that cannot start does not take the port away, however many come meanwhile.
    debian.follow(&[KEEP]);
    assert!(!debian.run(&["systemctl", "restart", GATE]).status.success());
    let waiting: Vec<_> = (0..20).map(|_| visitors.edge_connects()).collect();
    assert!(waiting.iter().all(|reached| *reached));
    debian.follow(&[SHARE]);
    assert_eq!(visitors.ask(), "200");
    assert_eq!(
        debian.property("pullgate-gate.socket", "ActiveState"),
        "active"
    );

    // What others may write is refused at a start as well, and not mended on the quiet.
    debian.follow(&["chmod 666 /etc/pullgate/pullgate.toml"]);
    assert!(
        !debian
            .run(&["systemctl", "restart", FILTER])
            .status
            .success()
    );
    assert!(!visitors.stranger_enters());
    debian.follow(&["chmod 640 /etc/pullgate/pullgate.toml"]);
    debian.systemctl(&["restart", FILTER]);

    // Who ends slowly is not killed for it: connections get what they were promised.
    debian.follow(&[HURRY]);
    let silent = visitors.linger();
    debian.systemctl(&["stop", GATE]);
    assert_eq!(debian.property(&unit("gate"), "Result"), "success");
    drop(silent);
    debian.systemctl(&["start", GATE]);

    // Who is killed comes back; meanwhile the pins go on, and connections wait in the socket.
    debian.systemctl(&["kill", "--signal=KILL", FILTER, GATE]);
    assert!(!visitors.stranger_enters());
    assert_eq!(visitors.ask(), "200");
    let directories = debian.property("pullgate-directories.service", "Result");
    assert_eq!(directories, "success");
    for role in ["filter", "gate"] {
        eventually("it is back", || {
            let was_killed = debian.property(&unit(role), "NRestarts") != "0";
            let is_back = debian.property(&unit(role), "ActiveState") == "active";
            (was_killed && is_back).then_some(())
        });
    }
}

/// What root starts by hand runs as the users of the units, and ends as a whole.
fn by_hand(debian: &Debian<'_>, visitors: &Visitors<'_>) {
    let stop = format!("systemctl stop {FILTER} {RANGES} {GATE}.service");
    debian.follow(&[&stop, "pullgate unload"]);
    // A gate that cannot start (the socket unit has its port) leaves the host as it was.
    let refused = debian.run(&["pullgate", "run"]);
    let said = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(70), "{said}");
    assert!(
        said.contains("where another process listens; `pullgate check` names it"),
        "{said}"
    );
    assert!(said.contains("gate has ended: exit status: 70"), "{said}");
    assert!(!debian.has_pins());
    // What a service manager has for one process is for one role.
    let refused = debian.run(&["env", "WATCHDOG_USEC=1000000", "pullgate", "run"]);
    assert_eq!(refused.status.code(), Some(64), "{}", text(&refused.stderr));

    debian.follow(&["systemctl stop pullgate-gate.socket"]);
    // What a role could not read again is refused at once, and so is what another user has made.
    debian.follow(&["chmod 600 /etc/pullgate/pullgate.toml"]);
    let refused = debian.run(&["pullgate", "run"]);
    assert_eq!(refused.status.code(), Some(77), "{}", text(&refused.stderr));
    debian.follow(&[
        "chmod 640 /etc/pullgate/pullgate.toml",
        "mkdir -m 700 /sys/fs/bpf/pullgate && chown pullgate-gate /sys/fs/bpf/pullgate",
    ]);
    let refused = debian.run(&["pullgate", "run", "--only", "filter"]);
    assert_eq!(refused.status.code(), Some(70), "{}", text(&refused.stderr));
    assert!(text(&refused.stderr).contains("has made that directory"));
    debian.follow(&["rmdir /sys/fs/bpf/pullgate"]);
    // One that is stopped while it starts has not failed.
    for delay in ["0.1", "0.2", "0.4"] {
        let stop = ["timeout", "--preserve-status", delay, "pullgate", "run"];
        let stopped = debian.run(&stop);
        assert_eq!(stopped.status.code(), Some(0), "{}", text(&stopped.stderr));
        debian.follow(&["pullgate unload"]);
    }
    debian.follow(&[&format!("{BY_HAND} pullgate run")]);
    let all = debian.children("hand");
    assert_eq!(all.len(), ROLES.len(), "{all:?}");
    for (role, capabilities) in [
        ("filter", "000000c000001000"),
        ("ranges", "0000000000000000"),
        ("gate", "0000000000000400"),
    ] {
        let is_it = |process: &&String| {
            let words = debian.says(&["cat", &format!("/proc/{process}/cmdline")]);
            words.contains(&format!("--only\0{role}\0"))
        };
        debian.runs_as_user(role, all.iter().find(is_it).unwrap(), capabilities);
    }
    let status = debian.says(&["pullgate", "status"]);
    assert!(status.starts_with("PROTECTED"), "{status}");
    assert!(!status.contains("runs as root"), "{status}");
    assert_eq!(visitors.ask(), "200");
    assert!(!visitors.stranger_enters());
    debian.follow(&["systemctl kill --signal=HUP --kill-whom=main hand"]);
    eventually("all have read their configuration again", || {
        let journal = debian.says(&["journalctl", "--unit=hand"]);
        (journal.matches("configuration reloaded").count() == ROLES.len()).then_some(())
    });

    // No role outlives what has started it; the pins do.
    debian.follow(&["systemctl kill --signal=KILL --kill-whom=main hand"]);
    eventually("all have ended", || {
        let is_there = |process: &String| debian.path(&format!("proc/{process}")).exists();
        (!all.iter().any(is_there)).then_some(())
    });
    assert!(!visitors.stranger_enters());

    let on_trial = format!("{BY_HAND} pullgate run --confirm 1h --yes");
    debian.follow(&[
        "systemctl reset-failed hand || true",
        "pullgate unload",
        &on_trial,
    ]);
    assert!(!visitors.stranger_enters());
    debian.follow(&["systemctl stop hand"]);
    assert_eq!(debian.property("hand", "ExecMainStatus"), "75");
    assert!(!debian.has_pins());
    let confirm = "pullgate confirm";
    debian.follow(&["systemctl reset-failed hand", &on_trial, confirm]);
    eventually("it is confirmed", || {
        let status = debian.run(&["pullgate", "status"]);
        (!text(&status.stdout).contains("on trial")).then_some(())
    });
    debian.follow(&["systemctl stop hand"]);
    assert!(debian.has_pins(), "confirmed");

    // The units take over what root has left.
    debian.systemctl(&["start", "pullgate-gate.socket", FILTER, RANGES, GATE]);
    assert_eq!(visitors.ask(), "200");
    assert!(!visitors.stranger_enters());
}

/// Who comes to the origin.
struct Visitors<'a> {
    network: &'a Network,
    edge: Client,
}

impl Visitors<'_> {
    /// What the edge is answered.
    fn ask(&self) -> String {
        let (reply, _) = self.edge.get(self.network, Host::Edge, origin(), SHOP);
        reply.brief()
    }

    /// A connection of the edge's that asks for nothing.
    fn linger(&self) -> Session {
        let session = self.edge.connect(self.network, Host::Edge, origin(), SHOP);
        session.unwrap()
    }

    fn edge_connects(&self) -> bool {
        connect(self.network, Host::Edge, origin()).is_ok()
    }

    fn stranger_enters(&self) -> bool {
        connect(self.network, Host::Stranger, origin()).is_ok()
    }
}

/// The number of each role's process.
fn pids(debian: &Debian<'_>) -> [String; 3] {
    ROLES.map(|role| debian.property(&unit(role), "MainPID"))
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

const KEEP: &str = "chown root:root /etc/pullgate/*.key && chmod 600 /etc/pullgate/*.key";
const SHARE: &str = "chgrp pullgate-gate /etc/pullgate/*.key && chmod 640 /etc/pullgate/*.key";
/// Until the next boot, systemd waits for less than it takes to end a silent connection.
const HURRY: &str = "cd /run/systemd/system && mkdir pullgate-gate.service.d && \
    printf '[Service]\\nTimeoutStopSec=3s\\n' >pullgate-gate.service.d/hurry.conf && \
    systemctl daemon-reload";
const BY_HAND: &str = "systemd-run --quiet --unit=hand --property=Type=notify";
const CONFIGURATION: &str = "etc/pullgate/pullgate.toml";
/// The package of a higher version.
const UPGRADE: &str = "pullgate_upgraded.deb";
const ROLES: [&str; 3] = ["filter", "ranges", "gate"];
const FILTER: &str = "pullgate-filter.service";
const RANGES: &str = "pullgate-ranges";
const GATE: &str = "pullgate-gate";
