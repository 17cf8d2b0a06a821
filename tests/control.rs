//! Verifies the control sockets: who may instruct a role, that an instruction is answered when it is
//! done, and that no reload keeps a role from being stopped.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::Value;
use tests::gate::{host, origin, shop};
use tests::net::Host;
use tests::pki::SHOP;
use tests::upstream::{Manner, Upstream};
use tests::{Rig, daemon};

#[test]
fn a_role_takes_instructions_from_root_and_its_own_user_alone() {
    let rig = Rig::with_shop("");
    let home = rig.network.path("run/gate");
    let socket = home.join("control.sock");
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&home.join("status.sock")), 0o660);
    assert_eq!(mode(&socket), 0o600);
    let post = |user: &str| {
        let mut command = rig.network.command(Host::Origin, "setpriv");
        command.args([
            "--reuid",
            user,
            "--clear-groups",
            "curl",
            "--silent",
            "--fail",
        ]);
        command.args(["--request", "POST", "--unix-socket"]);
        let output = command.arg(&socket).arg("http://pullgate/reload").output();
        output.unwrap().status.success()
    };
    assert!(post("0"));
    assert!(!post("1"));

    // Whatever becomes of the modes, the kernel knows who asks.
    for path in [
        &rig.network.path(""),
        &rig.network.path("run"),
        &home,
        &socket,
    ] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let mark = rig.gate().mark();
    let before = rig.gate().reloads();
    assert!(!post("1"));
    let event = rig.gate().event(mark, "it is logged", |event| {
        event["id"] == "instruction-forbidden"
    });
    assert_eq!(event["user"], 1);
    assert_eq!(rig.gate().reloads(), before);
}

#[test]
fn the_level_of_the_log_changes_without_a_restart() {
    let rig = Rig::with_shop("");
    let level = |level: &str| {
        let output = rig.pullgate(&["log-level", level]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let steps_are_logged = || {
        let mark = rig.gate().mark();
        // No web server runs here.
        let (reply, _) = rig.edge().get(&rig.network, Host::Edge, origin(), SHOP);
        assert_eq!(reply.brief(), "closed");
        // Its event comes behind what was logged of the connection.
        assert!(rig.reload());
        let events = rig.gate().events().split_off(mark);
        events.iter().any(|event| event["id"] == "source-checked")
    };
    let shown = || String::from_utf8(rig.pullgate(&["status"]).stdout).unwrap();
    // As `PULLGATE_LOG` says.
    assert!(steps_are_logged());

    assert!(level("info").contains("gate: its process logs at the level `info`\n"));
    assert!(!steps_are_logged());
    assert!(shown().contains("\n  log          info\n"), "{}", shown());
    level("debug");
    assert!(steps_are_logged());

    level("warn");
    level("default");
    assert!(steps_are_logged());
    assert!(!shown().contains("  log  "), "{}", shown());
    let refused = rig.pullgate(&["log-level", "verbose"]);
    assert_eq!(refused.status.code(), Some(64));
}

#[test]
fn a_role_that_reads_another_file_is_not_reloaded() {
    let rig = Rig::with_shop("");
    let (other, link) = (
        rig.network.path("other.toml"),
        rig.network.path("link.toml"),
    );
    fs::copy(&rig.config, &other).unwrap();
    std::os::unix::fs::symlink(&rig.config, &link).unwrap();
    let before = rig.gate().reloads();

    let is_newer = || {
        rig.gate().status()["findings"]
            .to_string()
            .contains("configuration-not-read")
    };
    assert!(!is_newer());
    let text = fs::read_to_string(&rig.config).unwrap();
    fs::write(&rig.config, text + "# changed\n").unwrap();
    assert!(is_newer());

    let refused = daemon::output(&rig.network, &other, &["reload"]);
    assert_eq!(refused.status.code(), Some(64), "{refused:?}");
    let text = String::from_utf8(refused.stderr).unwrap();
    let words = format!(
        "the gate reads {} and not {}",
        rig.config.display(),
        other.display()
    );
    assert!(text.contains(&words), "{text}");
    assert_eq!(rig.gate().reloads(), before);
    // Another name of the same.
    assert!(
        daemon::output(&rig.network, &link, &["reload"])
            .status
            .success()
    );
    assert_eq!(rig.gate().reloads(), before + 1);
    assert!(!is_newer());
}

#[test]
fn every_result_is_to_be_had_as_json() {
    let rig = Rig::with_shop("");
    let certificate = rig.pki.path("ours-ca.pem");
    let certificate = certificate.to_str().unwrap();
    let json = |arguments: &[&str]| -> Value {
        let output = rig.pullgate(&[&["--json"], arguments].concat());
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {output:?}"))
    };

    assert_eq!(json(&["reload"])[0]["role"], "gate");
    assert_eq!(json(&["log-level", "info"])[0]["error"], Value::Null);
    assert_eq!(json(&["check"])["ok"], true);
    assert!(json(&["status"])["protected"].is_boolean());
    assert!(
        json(&["spki", certificate])["spki"]
            .as_str()
            .unwrap()
            .starts_with("sha256:")
    );
    assert!(json(&["ranges"]).is_array());
    assert!(json(&["ranges", "export", "text"])["export"].is_string());
    assert!(json(&["ranges", "show", "173.245.48.5"]).is_object());
    assert!(json(&["snippet", "nginx", "--behind-gate"])["configuration"].is_string());
    assert_eq!(json(&["init"])["written"], false);
    assert_eq!(json(&["unload"])["removed"], Value::Array(Vec::new()));
    let refused = rig.pullgate(&["--json", "run"]);
    assert_eq!(refused.status.code(), Some(64));
}

#[test]
fn what_is_no_instruction_is_refused_and_changes_nothing() {
    let rig = Rig::with_shop("");
    let home = rig.network.path("run/gate");
    let control = home.join("control.sock");
    let ask = |socket: &Path, request: &str| {
        let mut stream = UnixStream::connect(socket).unwrap();
        // A role that has heard enough closes.
        match stream.write_all(request.as_bytes()) {
            Ok(()) | Err(_) => {}
        }
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(_) | Err(_) => {}
        }
        let answer = String::from_utf8_lossy(&answer).into_owned();
        answer.get(9..12).unwrap_or_default().to_owned()
    };
    let long = format!(
        "POST /approve HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n{}",
        "x".repeat(1 << 20)
    );

    for (request, code) in [
        ("GET /reload HTTP/1.1\r\nHost: x\r\n\r\n", "405"),
        ("POST /everything HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        ("POST /confirm HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        (
            "POST /approve HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n{",
            "400",
        ),
        ("reload\r\n\r\n", "400"),
        (&long, "400"),
    ] {
        assert_eq!(
            ask(&control, request),
            code,
            "{}",
            &request[..20.min(request.len())]
        );
    }
    let status = home.join("status.sock");
    assert_eq!(
        ask(&status, "POST /reload HTTP/1.1\r\nHost: x\r\n\r\n"),
        "405"
    );
    assert_eq!(
        ask(&status, "GET /reload HTTP/1.1\r\nHost: x\r\n\r\n"),
        "404"
    );

    assert_eq!(rig.gate().reloads(), 0);
    let findings = rig.gate().get("/findings");
    assert_eq!(findings, rig.gate().status()["findings"]);
}

#[test]
fn a_stop_is_heard_while_a_reload_waits_for_upstreams_that_hang() {
    let mut rig = Rig::new();
    let alpn = "trust = [\"@PKI@/ours-ca.pem\"]\nalpn = [\"h2\", \"http/1.1\"]";
    let names: Vec<_> = (0..10).map(|n| format!("{n}.shop.example")).collect();
    rig.pki.write_server(
        "many",
        &names.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    let _upstream = Upstream::start(&rig.network, Manner::Hang);
    let hosts: Vec<_> = names
        .iter()
        .map(|name| host(&[name], "many", alpn))
        .collect();
    let hosts: Vec<_> = hosts.iter().map(String::as_str).collect();
    rig.start("", &hosts);
    let gate = rig.gate.take().unwrap();
    let mark = gate.mark();
    fs::write(&rig.config, fs::read_to_string(&rig.config).unwrap()).unwrap();

    gate.signal(Signal::SIGHUP);
    gate.signal(Signal::SIGTERM);
    gate.event(mark, "it stops", |event| event["id"] == "stopping");

    let ids: Vec<_> = gate.events()[mark..]
        .iter()
        .map(|event| event["id"].to_string())
        .collect();
    assert!(
        !ids.contains(&"\"configuration-reloaded\"".to_owned()),
        "{ids:?}"
    );
    assert_eq!(gate.stop(), Some(0));
}

#[test]
fn one_that_is_stopped_by_an_instruction_ends_as_by_a_signal() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("")]);
    let mut gate = rig.gate.take().unwrap();
    let mark = gate.mark();
    let socket = rig.network.path("run/gate/control.sock");

    // The end of the connection is the answer.
    let answer = daemon::http(&socket, "POST", "/stop", "");

    assert!(answer.is_err(), "{answer:?}");
    gate.event(mark, "it stops", |event| event["id"] == "stopping");
    tests::eventually("it ends", || (!gate.is_running()).then_some(()));
}

#[test]
fn a_reload_whose_client_leaves_comes_to_its_end() {
    let mut rig = Rig::new();
    let alpn = "alpn = [\"h2\", \"http/1.1\"]";
    let _upstream = Upstream::start(&rig.network, Manner::Hang);
    rig.start("", &[&shop(alpn)]);
    let gate = rig.gate();
    let before = gate.reloads();
    let mark = gate.mark();
    let mut client = UnixStream::connect(rig.network.path("run/gate/control.sock")).unwrap();
    client
        .write_all(b"POST /reload HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    gate.event(mark, "it has begun", |event| event["id"] == "instructed");

    drop(client);

    gate.event(mark, "it is over", |event| {
        event["id"] == "configuration-reloaded"
    });
    gate.wait_for_reload(before);
}

#[test]
fn a_signal_that_means_nothing_ends_nothing() {
    let rig = Rig::with_shop("");

    for signal in [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGALRM] {
        rig.gate().signal(signal);
    }

    // It comes behind them.
    assert!(rig.reload());
    assert!(rig.gate().is_answering());
}
