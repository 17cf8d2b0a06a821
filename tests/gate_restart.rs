//! Verifies restarts: sockets are handed over and taken, who waits is served by the next, and what
//! is relayed comes to its end.

use std::io::{Read as _, Write as _};

use nix::sys::signal::Signal;
use tests::client::connect;
use tests::daemon::{Pullgate, Stored};
use tests::gate::{PLENTY, host, origin, shop};
use tests::net::Host;
use tests::pki::SHOP;
use tests::upstream::{Manner, Upstream};
use tests::{Pairing, Rig};

#[test]
fn twenty_restarts_under_load_fail_no_request() {
    let mut rig = Rig::new();
    let stored = start_keeping(&mut rig, PLENTY);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    // The role has handed its sockets over; each successor is given them.
    let mut words = vec!["--only".to_owned(), "gate".to_owned()];
    for descriptor in &stored.0 {
        words.extend(["--listen-fd".to_owned(), descriptor.to_string()]);
    }
    assert_eq!(words.len(), 2 + 2 * 2, "two sockets, one per family");
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let gate = std::sync::Mutex::new(rig.gate.take());

    let served = rig.under_load(|| {
        for _ in 0..20 {
            let old = gate.lock().unwrap().take().unwrap();
            assert_eq!(old.stop(), Some(0));
            let (new, again) = Pullgate::start_keeping(&rig.network, &rig.config, "gate", &words);
            assert!(
                again.0.is_empty(),
                "what was handed over is not handed back"
            );
            *gate.lock().unwrap() = Some(new);
        }
    });

    assert!(served > 20, "{served} requests");
}

#[test]
fn who_waits_while_nobody_accepts_is_served_by_the_next() {
    let mut rig = Rig::new();
    let stored = start_keeping(&mut rig, "");
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let gate = rig.gate.take().unwrap();
    let descriptors: Vec<_> = stored.0.iter().map(ToString::to_string).collect();
    gate.kill();
    let waiting = connect(&rig.network, Host::Edge, origin()).unwrap();

    let words = [
        "--only",
        "gate",
        "--listen-fd",
        &descriptors[0],
        "--listen-fd",
        &descriptors[1],
    ];
    rig.gate = Some(Pullgate::start_with(
        &rig.network,
        &rig.config,
        "gate",
        &words,
    ));

    assert_eq!(rig.edge().get_over(waiting, SHOP).brief(), "200");
}

#[test]
fn sockets_that_the_service_manager_announces_are_taken() {
    let mut rig = Rig::new();
    let stored = start_keeping(&mut rig, "");
    rig.gate.take().unwrap().kill();
    // sd_listen_fds(3): from the third on, for the process that is named.
    let announced = |pid: &str| {
        let script = format!(
            "LISTEN_PID={pid} LISTEN_FDS=1 exec {} --config {} run --only gate 3<&{}",
            tests::daemon::binary().display(),
            rig.config.display(),
            stored.0[0]
        );
        // Of descriptors with two digits, a plain sh knows nothing.
        let words = ["timeout", "--signal=TERM", "2", "bash", "-c", &script];
        let output = rig.network.output(Host::Origin, &words);
        String::from_utf8_lossy(&output.stderr).into_owned()
    };

    let text = announced("$$");
    assert!(
        text.contains("the listening socket was handed over"),
        "{text}"
    );
    let text = announced("1");
    assert!(
        !text.contains("the listening socket was handed over"),
        "{text}"
    );
    assert!(text.contains("Address already in use"), "{text}");
}

#[test]
fn a_descriptor_that_is_no_listener_is_refused() {
    let rig = Rig::new();
    rig.configure("", &[&shop("")]);

    for descriptor in ["0", "999"] {
        let output = rig.pullgate(&["run", "--only", "gate", "--listen-fd", descriptor]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{text}");
        assert!(
            text.contains(&format!("descriptor {descriptor} was handed over")),
            "{text}"
        );
    }
}

#[test]
fn a_gate_that_stops_lets_answers_come_and_tells_the_others() {
    let mut rig = Rig::new();
    rig.start(
        "",
        &[&host(
            &[SHOP],
            SHOP,
            "trust = [\"@PKI@/ours-ca.pem\"]\nproxy_protocol = \"none\"",
        )],
    );
    let _upstream = Upstream::start(&rig.network, Manner::Echo);
    let open = || {
        let edge = rig.edge();
        edge.connect(&rig.network, Host::Edge, origin(), SHOP)
            .unwrap()
    };
    let mut idle = open();
    idle.write_all(b"a question and its answer").unwrap();
    idle.read_exact(&mut [0; 25]).unwrap();

    let gate = rig.gate.take().unwrap();
    gate.signal(Signal::SIGTERM);
    // The end is a close_notify: nothing was cut off.
    let mut rest = Vec::new();
    idle.read_to_end(&mut rest).unwrap();

    assert_eq!(gate.stop(), Some(0));
}

#[test]
fn a_gate_that_drains_leaves_its_port_to_the_next() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("proxy_protocol = \"none\"")]);
    let _upstream = Upstream::start(&rig.network, Manner::Hang);
    let edge = rig.edge();
    let mut waiting = edge
        .connect(&rig.network, Host::Edge, origin(), SHOP)
        .unwrap();
    waiting.write_all(b"a question").unwrap();
    tests::eventually("it is relayed", || {
        (rig.gate().metric("pullgate_gate_active_connections") == 1).then_some(())
    });

    let mut old = rig.gate.take().unwrap();
    let mark = old.mark();
    old.signal(Signal::SIGTERM);
    old.event(mark, "it stops", |event| event["id"] == "stopping");
    tests::eventually("its port is closed", || {
        connect(&rig.network, Host::Edge, origin())
            .is_err()
            .then_some(())
    });
    rig.gate = Some(Pullgate::start(&rig.network, &rig.config, "gate"));
    assert!(old.is_running(), "an answer is being waited for");

    // The end of the old one takes nothing of the new one's away.
    assert_eq!(old.stop(), Some(0));
    assert!(rig.gate().is_answering());
}

#[test]
fn a_socket_that_nobody_asked_for_is_closed() {
    let mut rig = Rig::new();
    let stored = start_keeping(&mut rig, "");
    rig.gate.take().unwrap().kill();
    assert!(connect(&rig.network, Host::Edge, origin()).is_ok());

    let words = ["--only", "gate", "--listen-fd", &stored.0[0].to_string()];
    rig.configure("listen = [\"127.0.0.1:444\"]", &[&shop("")]);
    rig.gate = Some(Pullgate::start_with(
        &rig.network,
        &rig.config,
        "gate",
        &words,
    ));

    let refused = connect(&rig.network, Host::Edge, origin()).err();
    match Pairing::of_this_run() {
        Pairing::Relayed => assert_eq!(
            refused.map(|reply| reply.to_string()).as_deref(),
            Some("connection refused")
        ),
        // Connections are steered to whichever socket the gate has, and no process has that one any more.
        Pairing::Steered => {
            let there = || std::net::TcpStream::connect("127.0.0.1:44300");
            assert!(rig.network.on(Host::Origin, there).is_err());
        }
    }
}

/// Starts a gate, and keeps what it hands over.
fn start_keeping(rig: &mut Rig, lines: &str) -> Stored {
    rig.configure(lines, &[&shop("")]);
    let words = ["--only", "gate"];
    let (gate, stored) = Pullgate::start_keeping(&rig.network, &rig.config, "gate", &words);
    rig.gate = Some(gate);
    stored
}
