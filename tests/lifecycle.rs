//! Verifies what survives what: killed roles, a second instance, a stop with live connections.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use nix::sys::signal::Signal;
use tests::daemon::Pullgate;
use tests::net::{Host, INTERFACE, ip};
use tests::pki::SHOP;
use tests::{Lab, Plan, assert_matched, eventually, scenarios};

#[test]
fn killed_roles_leave_the_host_protected_and_come_back() {
    let mut lab = Lab::start(&Plan::default());

    assert_matched(&scenarios::killed_roles_leave_the_host_protected(&mut lab));
}

#[test]
fn one_process_can_play_all_roles() {
    let mut lab = Lab::start(&Plan::default());
    for role in [&mut lab.filter, &mut lab.ranges, &mut lab.gate] {
        role.take().unwrap().kill();
    }

    let all = Pullgate::start_all(&lab.network, &lab.config);
    let served = lab
        .edge()
        .get(&lab.network, Host::Edge, Host::Origin.addresses()[0], SHOP)
        .0;
    let status = status(&lab);
    let code = all.stop();

    assert_eq!(served.brief(), "200");
    assert_eq!(status["roles"].as_array().unwrap().len(), 3);
    assert_eq!(code, Some(0));
    assert!(
        lab.network.pin("native-wan0").exists(),
        "a stop leaves the filter active"
    );
}

#[test]
fn unload_removes_every_pin_and_says_so() {
    let mut lab = Lab::start(&Plan::default());
    lab.filter.take().unwrap().kill();

    let first = lab.pullgate(&["unload"]);
    let second = lab.pullgate(&["unload"]);

    assert!(first.status.success() && second.status.success());
    assert!(
        String::from_utf8(first.stdout)
            .unwrap()
            .contains("native-wan0")
    );
    assert_eq!(
        String::from_utf8(second.stdout).unwrap(),
        "nothing was loaded\n"
    );
    assert!(!lab.network.path("bpf/pullgate").exists());
}

#[test]
fn an_interface_that_returns_is_attached_anew_and_said_to_be_unfiltered_until_then() {
    let lab = Lab::start(&Plan::default());
    let mark = lab.filter().mark();
    let namespace = lab.network.namespace(Host::Origin);

    ip(&["-n", &namespace, "link", "del", INTERFACE]);
    lab.filter().event(mark, "the loss is noticed", |event| {
        event["level"] == "ERROR"
    });
    let unfiltered = status(&lab);
    lab.network.connect(Host::Origin);
    lab.filter().event(mark, "the return is noticed", |event| {
        event["id"] == "interface-reattached"
    });

    assert_eq!(unfiltered["protected"], false);
    assert!(
        unfiltered["findings"]
            .to_string()
            .contains("`wan0` is not filtered")
    );
    assert_eq!(status(&lab)["protected"], true);
    assert_matched(&scenarios::strangers_are_dropped(&lab));
}

#[test]
fn a_link_of_another_interface_is_not_taken_for_ours() {
    let mut lab = Lab::start(&Plan::default());
    lab.filter.take().unwrap().kill();
    let namespace = lab.network.namespace(Host::Origin);
    let rename = |from: &str, to: &str| {
        ip(&["-n", &namespace, "link", "set", from, "down"]);
        ip(&["-n", &namespace, "link", "set", from, "name", to]);
        ip(&["-n", &namespace, "link", "set", to, "up"]);
    };

    // The pinned link stays with the interface, the configuration's name goes to another one.
    rename(INTERFACE, "lan0");
    ip(&[
        "-n", &namespace, "link", "add", INTERFACE, "type", "veth", "peer", "name", "peer0",
    ]);
    lab.start_filter();

    assert_eq!(status(&lab)["protected"], true);
    let shown = lab
        .network
        .output(Host::Origin, &["ip", "link", "show", INTERFACE]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("xdp"), "{shown}");
}

#[test]
fn a_pin_directory_of_somebody_else_is_refused_and_left_alone() {
    let mut lab = Lab::start(&Plan::default());
    lab.filter.take().unwrap().kill();
    assert!(lab.pullgate(&["unload"]).status.success());
    let theirs = lab.network.path("bpf/pullgate");
    let refuses = || {
        for arguments in [["run", "--only", "filter"].as_slice(), &["unload"]] {
            let output = lab.pullgate(arguments);

            let error = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(70), "{error}");
            assert!(
                error.contains("is not a directory that this user alone may open"),
                "{error}"
            );
        }
        assert!(theirs.exists());
    };

    fs::create_dir(&theirs).unwrap();
    std::os::unix::fs::chown(&theirs, Some(65_534), None).unwrap();
    refuses();
    // Nor is a link followed to where another user would have the pins.
    let elsewhere = lab.network.path("bpf/elsewhere");
    fs::rename(&theirs, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &theirs).unwrap();
    refuses();
    assert!(
        !lab.network.path("run/filter/status.sock").exists(),
        "a failed start leaves no socket"
    );
}

#[test]
fn unloading_under_a_running_filter_is_not_hidden() {
    let lab = Lab::start(&Plan::default());

    let unloaded = lab.pullgate(&["unload"]);
    let status = status(&lab);
    let said = |event: &serde_json::Value| event["id"] == "filter-unloaded";
    lab.filter().event(0, "the filter notices", said);

    assert!(unloaded.status.success());
    assert_eq!(status["protected"], false);
    assert!(
        status["findings"]
            .to_string()
            .contains("`wan0` is not filtered")
    );
}

#[test]
fn a_second_instance_is_refused_and_the_first_stays() {
    let mut lab = Lab::start(&Plan::default());

    for role in ["filter", "ranges", "gate"] {
        let second = lab.pullgate(&["run", "--only", role]);

        let error = String::from_utf8(second.stderr).unwrap();
        assert_eq!(second.status.code(), Some(70), "{error}");
        assert!(
            error.contains("another instance of this role answers there"),
            "{error}"
        );
    }
    // Nor has it the pins to itself if its sockets are elsewhere.
    let elsewhere = lab.network.path("elsewhere.toml");
    let text = fs::read_to_string(&lab.config).unwrap();
    fs::write(&elsewhere, text.replace("run = ", "run = \"elsewhere\" # ")).unwrap();
    let words = [
        "run",
        "--only",
        "filter",
        "--config",
        &elsewhere.display().to_string(),
    ];
    let second = lab.pullgate(&words);
    let error = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(70), "{error}");
    assert!(
        error.contains("another pullgate filter runs with the pins in"),
        "{error}"
    );
    assert!(lab.filter.as_mut().unwrap().is_running());
    assert_matched(&scenarios::edge_is_served(&lab, "nginx"));
}

#[test]
fn what_others_may_write_is_refused_and_the_running_state_kept() {
    let mut lab = Lab::start(&Plan::default());
    let open =
        |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();

    open(&lab.config, 0o666);
    let event = lab.reload();
    assert_eq!(event["id"], "configuration-not-reloaded", "{event}");
    assert!(
        event["error"]
            .to_string()
            .contains("may be changed by every user"),
        "{event}"
    );
    let checked = lab.pullgate(&["check"]);
    assert_eq!(checked.status.code(), Some(78));
    lab.ranges().signal(Signal::SIGHUP);
    eventually("the role ranges says so", || {
        let warnings = lab.ranges().status()["findings"].to_string();
        warnings
            .contains("may be changed by every user")
            .then_some(())
    });
    assert_matched(&scenarios::strangers_are_dropped(&lab));
    open(&lab.config, 0o640);

    let snapshot = lab.network.path("state/ranges.json");
    lab.gate.take().unwrap().kill();
    open(&snapshot, 0o646);
    lab.start_gate();
    // As a corrupt one is: the baseline protects, and the role says so.
    let warnings = lab.gate().status()["findings"].to_string();
    assert!(
        warnings.contains("ranges.json may be changed by every user"),
        "{warnings}"
    );
    assert_matched(&scenarios::edge_is_served(&lab, "nginx"));
    assert_matched(&scenarios::strangers_are_dropped(&lab));
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let mut lab = Lab::start(&Plan::default());
    lab.gate.take().unwrap().kill();
    let text = fs::read_to_string(&lab.config).unwrap();
    fs::write(
        &lab.config,
        text.replace("run = ", "run = \"/proc/none\" # "),
    )
    .unwrap();

    let started = lab.pullgate(&["run", "--only", "gate"]);

    let error = String::from_utf8(started.stderr).unwrap();
    assert_eq!(started.status.code(), Some(78), "{error}");
    assert!(error.contains("/proc/none"), "{error}");
}

#[test]
fn a_stopped_gate_closes_what_does_not_end_in_time_and_exits_cleanly() {
    let mut lab = Lab::start(&Plan::default());
    let address = SocketAddr::new(Host::Origin.addresses()[0], 443);
    let mut idle = lab
        .network
        .on(Host::Edge, || TcpStream::connect(address).unwrap());
    // The first byte of a handshake: the gate has accepted, and waits for more.
    idle.write_all(&[22]).unwrap();
    lab.gate().event(0, "the connection is accepted", |event| {
        event["id"] == "source-checked"
    });

    let code = lab.gate.take().unwrap().stop();

    assert_eq!(code, Some(0));
    let mut rest = Vec::new();
    // A reset is an end like any other.
    drop(idle.read_to_end(&mut rest));
    assert_eq!(rest, b"");
}

#[test]
fn status_merges_the_roles_and_fails_when_one_is_missing() {
    let mut lab = Lab::start(&Plan::default());

    let whole = status(&lab);
    lab.gate.take().unwrap().kill();
    let without_gate = status(&lab);

    assert_eq!(whole["protected"], true);
    assert_eq!(whole["roles"].as_array().unwrap().len(), 3);
    assert_eq!(without_gate["protected"], false);
    let findings = without_gate["findings"].as_array().unwrap();
    let is_missing = |finding: &serde_json::Value| {
        finding["id"] == "role-not-running" && finding["role"] == "gate"
    };
    assert!(findings.iter().any(is_missing), "{findings:?}");
}

#[test]
fn a_typo_takes_no_protection_away_and_hides_no_role_that_is_down() {
    let mut lab = Lab::start(&Plan::default());
    let text = fs::read_to_string(&lab.config).unwrap();
    let received = |lab: &Lab| {
        let output = lab.pullgate(&["status"]);
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.code(), text)
    };
    fs::write(&lab.config, format!("{text}\nty po\n")).unwrap();

    let (code, text) = received(&lab);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("which roles should run is unknown"), "{text}");

    drop(lab.gate.take());
    let (code, text) = received(&lab);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("gate: not running"), "{text}");
}

fn status(lab: &Lab) -> serde_json::Value {
    let output = lab.pullgate(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let code = if status["protected"] == true { 0 } else { 1 };
    assert_eq!(output.status.code(), Some(code));
    status
}

#[test]
fn a_reload_without_a_role_reloads_all_that_run() {
    let mut lab = Lab::start(&Plan::default());
    drop(lab.gate.take());
    let roles = [lab.filter.as_ref().unwrap(), lab.ranges.as_ref().unwrap()];
    let before = roles.map(Pullgate::reloads);

    let output = lab.pullgate(&["reload"]);

    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text, "filter: reloaded\nranges: reloaded\n");
    assert!(output.status.success());
    let after = roles.map(Pullgate::reloads);
    assert!(
        after
            .iter()
            .zip(before)
            .all(|(after, before)| *after > before)
    );

    // One that cannot use it does not hold up the other.
    let good = fs::read_to_string(&lab.config).unwrap();
    fs::write(&lab.config, format!("{good}\n[oops]\n")).unwrap();
    let output = lab.pullgate(&["reload"]);
    assert_eq!(output.status.code(), Some(78));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(error.lines().count(), 3, "{error}");
}
