//! Verifies steering: connections to the web server's own port reach the gate, and the web server through
//! it, for as long as the filter's link stands; nothing of the web server is changed.

use std::fs::{File, Permissions};
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use aya::programs::SkLookup;
use aya::programs::links::FdLink;
use pullgate::config::{ClientAddress, Config};
use pullgate::control::handover::hand_over;
use serde_json::Value;
use tests::client::{Client, Session};
use tests::daemon::{Pullgate, binary};
use tests::gate::{PLENTY, StopAtTheEnd, origin};
use tests::net::Host;
use tests::pki::{BLOG, SHOP, WIKI};
use tests::web::Software;
use tests::{Steered, eventually};

#[test]
fn the_web_server_stays_as_it_is_and_is_reached_through_the_gate() {
    for software in [Software::Nginx, Software::Apache] {
        let rig = Steered::start(software, "", "");
        let edge = rig.edge();

        let status = rig.filter().status();
        assert!(!has(&status, "no-gate-socket"), "{status:#}");
        assert_eq!(status["enforcing"], true);
        let metrics = rig
            .filter()
            .metric("pullgate_filter_steered{family=\"ipv4\"}");
        assert_eq!(metrics, 1);
        let explained = |arguments: &[&str]| {
            let all = [&["explain", "--json", "173.245.48.5"], arguments].concat();
            let output = rig.pullgate(&all);
            let explained: Value = serde_json::from_slice(&output.stdout).unwrap();
            explained["steered"].clone()
        };
        assert_eq!(explained(&["--port", "443"]), "gate");
        assert_eq!(explained(&["--port", "8443"]), "listener");
        assert_eq!(explained(&["--port", "443", "--udp"]), Value::Null);
        let page = rig.tell(&edge, Host::Edge, SHOP);
        assert!(
            page.starts_with("shop.example saw 127.0.0.1, https, host=shop.example"),
            "{software:?}: {page}"
        );
        // What was not asked for is not missed: Apache speaks no HTTP/2 here.
        let status = rig.gate().status();
        assert!(!has(&status, "h2-not-spoken"), "{status:#}");
        assert!(!has(&status, "h2-unknown"), "{software:?}: {status:#}");
        // A host that trusts another CA refuses it, and so does a stranger's address.
        assert_eq!(rig.tell(&edge, Host::Edge, BLOG), "alert UnknownCA");
        let without = Client::new(&rig.pki, None);
        assert_eq!(
            rig.tell(&without, Host::Edge, SHOP),
            "alert CertificateRequired"
        );
        assert_eq!(rig.tell(&edge, Host::Stranger, SHOP), "silence");
    }
}

#[test]
fn no_stranger_reaches_the_web_server_whatever_becomes_of_the_roles() {
    // In monitor mode strangers' packets pass: what keeps them from the web server is the gate alone.
    let mut rig = Steered::start(Software::Nginx, "mode = \"monitor\"", "");
    let edge = rig.edge();
    let stranger = rig.edge();
    let (stop, tried) = (AtomicBool::new(false), AtomicU32::new(0));
    let network = Arc::clone(&rig.network);
    std::thread::scope(|scope| {
        let _stop_at_the_end = StopAtTheEnd(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let (reply, _) = stranger.get(&network, Host::Stranger, origin(), SHOP);
                let reply = reply.brief();
                assert!(
                    ["closed", "connection refused"].contains(&reply.as_str()),
                    "{reply}"
                );
                tried.fetch_add(1, Ordering::Relaxed);
            }
        });
        let strangers_come = || {
            let before = tried.load(Ordering::Relaxed);
            eventually("strangers come", || {
                (tried.load(Ordering::Relaxed) > before + 2).then_some(())
            });
        };
        let serves = |rig: &Steered| {
            let page = rig.tell(&edge, Host::Edge, SHOP);
            assert!(page.starts_with("shop.example saw"), "{page}");
        };
        strangers_come();

        // Pinned, it goes on without its role, and the next one takes it over.
        rig.filter.take().unwrap().kill();
        strangers_come();
        serves(&rig);
        rig.start_filter();
        serves(&rig);
        // The gate notices that, and hands its sockets over again.
        rig.gate()
            .event(0, "the sockets are handed over twice", |event| {
                event["id"] == "filter-gone"
            });
        Steered::reload(rig.filter());
        serves(&rig);
        assert!(!has(&rig.filter().status(), "no-gate-socket"));

        // Without a gate nothing is served; the web server is not reached either.
        rig.gate.take().unwrap().kill();
        assert_eq!(rig.tell(&edge, Host::Edge, SHOP), "connection refused");
        let status = rig.filter().status();
        assert!(has(&status, "no-gate-socket"), "{status:#}");
        let metric = "pullgate_filter_steered{family=\"ipv6\"}";
        assert_eq!(rig.filter().metric(metric), 0);
        let output = rig.pullgate(&["explain", "173.245.48.5", "--port", "443"]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("the connection is refused"), "{text}");
        strangers_come();
        rig.start_gate();
        serves(&rig);
        assert_eq!(rig.gate.take().unwrap().stop(), Some(0));
        assert_eq!(rig.tell(&edge, Host::Edge, SHOP), "connection refused");
        rig.start_gate();
        serves(&rig);
    });
}

#[test]
fn the_filter_may_end_and_begin_again_under_load_and_be_unloaded() {
    let mut rig = Steered::start(Software::Nginx, "", PLENTY);
    let (network, pki) = (Arc::clone(&rig.network), Arc::new(rig.pki.ours.client()));
    let clients = [(); 2].map(|()| Client::new(&rig.pki, Some(&pki)));
    let (stop, served) = (AtomicBool::new(false), AtomicU32::new(0));
    let (is_given_back, refused) = (AtomicBool::new(false), AtomicU32::new(0));
    let without = Client::new(&rig.pki, None);
    std::thread::scope(|scope| {
        let _stop_at_the_end = StopAtTheEnd(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let (reply, _) = without.get(&network, Host::Edge, origin(), SHOP);
                if !is_given_back.load(Ordering::Relaxed) {
                    assert_eq!(reply.brief(), "alert CertificateRequired");
                    refused.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        for client in &clients {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let (reply, _) = client.get(&network, Host::Edge, origin(), SHOP);
                    assert_eq!(reply.brief(), "200");
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let clients_come = || {
            let before = served.load(Ordering::Relaxed);
            eventually("clients are served", || {
                (served.load(Ordering::Relaxed) > before + 4).then_some(())
            });
        };
        clients_come();
        for _ in 0..3 {
            rig.filter.take().unwrap().kill();
            clients_come();
            rig.start_filter();
            clients_come();
            assert_eq!(rig.filter.take().unwrap().stop(), Some(0));
            clients_come();
            rig.start_filter();
            Steered::reload(rig.filter());
            Steered::reload(rig.gate());
            clients_come();
        }
        // Beside a role that looks every second.
        is_given_back.store(true, Ordering::Relaxed);
        assert!(rig.pullgate(&["unload"]).status.success());
        clients_come();
        assert!(!rig.network.path("bpf/pullgate").exists());
    });
    assert!(refused.into_inner() > 10);
}

#[test]
fn a_trial_without_steering_says_that_it_is_not_tried_out() {
    let mut rig = Steered::start(Software::Nginx, "", "");
    assert_eq!(rig.filter.take().unwrap().stop(), Some(0));
    let text = std::fs::read_to_string(&rig.config).unwrap();
    let (without_gate, _) = text.split_once("[gate]").unwrap();
    std::fs::write(&rig.config, without_gate).unwrap();

    let trial = ["--only", "filter", "--confirm", "1h", "--yes"];
    let trial = Pullgate::start_with(&rig.network, &rig.config, "filter", &trial);

    assert!(has(&trial.status(), "steered-until-confirmed"));
    let without = Client::new(&rig.pki, None);
    assert_eq!(
        rig.tell(&without, Host::Edge, SHOP),
        "alert CertificateRequired"
    );
    assert!(rig.pullgate(&["confirm"]).status.success());
    eventually("the port is the web server's again", || {
        let page = rig.tell(&without, Host::Edge, SHOP);
        page.starts_with("shop.example saw 173.245.48.5")
            .then_some(())
    });
    assert!(!has(&trial.status(), "steered-until-confirmed"));
}

#[test]
fn unloading_gives_the_port_back_and_live_connections_go_on() {
    let rig = Steered::start(Software::Nginx, "", "");
    let edge = rig.edge();
    let mut live = edge
        .connect(&rig.network, Host::Edge, origin(), SHOP)
        .unwrap();
    let ask = |live: &mut Session| {
        let request = format!("GET / HTTP/1.1\r\nHost: {SHOP}\r\n\r\n");
        live.write_all(request.as_bytes()).unwrap();
        let mut answer = vec![0; 4096];
        let read = live.read(&mut answer).unwrap();
        String::from_utf8_lossy(&answer[..read]).into_owned()
    };
    assert!(ask(&mut live).starts_with("HTTP/1.1 200"));

    assert!(rig.pullgate(&["unload"]).status.success());

    // The web server asks no client for a certificate.
    let anybody = Client::new(&rig.pki, None);
    eventually("the port is the web server's again", || {
        let page = rig.tell(&anybody, Host::Edge, SHOP);
        page.starts_with("shop.example saw 173.245.48.5")
            .then_some(())
    });
    assert!(ask(&mut live).starts_with("HTTP/1.1 200"));
    // Both roles know, and neither says that all is well.
    let findings = rig.filter().status()["findings"].to_string();
    assert!(findings.contains("the filter was unloaded"), "{findings}");
    rig.gate().event(0, "the gate is notified", |event| {
        event["id"] == "sockets-not-taken"
    });
    let status = rig.gate().status();
    assert!(has(&status, "not-steered"), "{status:#}");
    assert_eq!(status["enforcing"], false);
    let output = rig.pullgate(&["status"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("NOT PROTECTED"), "{text}");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_gate_that_is_started_before_the_filter_complains_of_nothing() {
    let mut rig = Steered::new(Software::Nginx, "", "");
    let mut gate = rig.network.command(Host::Origin, binary());
    gate.arg("--config").arg(&rig.config);
    // As `pullgate run` starts it: ready, although there is no filter to take its sockets yet.
    let parent = std::process::id().to_string();
    gate.args([
        "--log-format",
        "json",
        "run",
        "--only",
        "gate",
        "--child-of",
        &parent,
    ]);
    let mut gate = gate
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 6];
    gate.stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut ready)
        .unwrap();
    rig.start_filter();

    eventually("it is steered to", || {
        let page = rig.tell(&rig.edge(), Host::Edge, SHOP);
        page.starts_with("shop.example saw 127.0.0.1").then_some(())
    });
    gate.kill().unwrap();
    let output = gate.wait_with_output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(log.contains("sockets-handed-over"), "{log}");
    assert!(!log.contains("sockets-not-taken"), "{log}");
}

#[test]
fn connections_to_and_from_this_host_are_not_steered() {
    let rig = Steered::start(Software::Nginx, "", "");
    let anybody = Client::new(&rig.pki, None);
    for to in ["127.0.0.1", "::1", "203.0.113.10", "2001:db8:10::10"] {
        let (reply, _) = anybody.get(&rig.network, Host::Origin, to.parse().unwrap(), SHOP);
        let page = rig.brief(reply);
        assert!(page.starts_with("shop.example saw"), "{to}: {page}");
    }
    // Over IPv6 as well.
    let [_, v6] = Host::Origin.addresses();
    let (reply, _) = rig.edge().get(&rig.network, Host::Edge, v6, SHOP);
    let page = rig.brief(reply);
    assert!(page.starts_with("shop.example saw ::1"), "{page}");
}

#[test]
fn what_is_not_a_destination_or_a_steered_port_is_the_web_servers() {
    let rig = Steered::start(Software::Nginx, "destinations = [\"2001:db8:10::10\"]", "");
    let anybody = Client::new(&rig.pki, None);

    let page = rig.tell(&anybody, Host::Edge, SHOP);
    assert!(page.starts_with("shop.example saw 173.245.48.5"), "{page}");
    let [_, v6] = Host::Origin.addresses();
    let (reply, _) = anybody.get(&rig.network, Host::Edge, v6, SHOP);
    assert_eq!(reply.brief(), "alert CertificateRequired");
    // Which the operator has asked for, and may not know.
    let status = rig.filter().status();
    let findings = status["findings"].to_string();
    assert!(has(&status, "destinations-partial"), "{status:#}");
    assert!(
        findings.contains("203.0.113.10") && !findings.contains("2001:db8:10::10,"),
        "{findings}"
    );
}

#[test]
fn http_2_is_offered_where_the_web_server_speaks_it_and_its_sessions_are_resumed() {
    let rig = Steered::start(Software::Nginx, "", "");
    let edge = rig.edge().offering(&["h2", "http/1.1"]);
    let agreed = |name: &str| {
        let mut session = edge
            .connect(&rig.network, Host::Edge, origin(), name)
            .unwrap();
        session.conn.complete_io(&mut session.sock).unwrap();
        session.conn.alpn_protocol().map(<[u8]>::to_vec)
    };
    eventually("the web server was asked", || {
        (agreed(SHOP).as_deref() == Some(b"h2")).then_some(())
    });

    let edge = rig.edge();
    let pages: Vec<_> = (0..3).map(|_| rig.tell(&edge, Host::Edge, SHOP)).collect();
    assert!(
        pages.iter().skip(1).all(|page| page.contains("reused=r")),
        "{pages:?}"
    );
    assert!(
        pages.iter().all(|page| page.contains("sni=shop.example")),
        "{pages:?}"
    );
}

#[test]
fn a_refused_client_costs_the_web_server_no_connection() {
    let rig = Steered::start(Software::Nginx, "mode = \"monitor\"", "");
    let others = Client::new(&rig.pki, Some(&rig.pki.other.client()));
    let edge = rig.edge();
    let before = rig.accepted();

    for _ in 0..20 {
        assert_eq!(rig.tell(&others, Host::Edge, SHOP), "alert UnknownCA");
        assert_eq!(rig.tell(&edge, Host::Edge, BLOG), "alert UnknownCA");
        assert_eq!(rig.tell(&edge, Host::Stranger, SHOP), "closed");
        assert_eq!(
            rig.tell(&edge, Host::Edge, "unknown.example"),
            "alert UnrecognisedName"
        );
    }

    // The second question is one itself.
    assert_eq!(rig.accepted(), before + 1);
}

#[test]
fn only_the_gates_user_hands_sockets_over_and_only_listening_ones() {
    let rig = Steered::start(Software::Nginx, "", "");
    let open = |path: &str, mode: u32| {
        let path = rig.network.path(path);
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    };
    // Whatever modes would let in.
    for directory in ["", "run", "run/filter", "pki"] {
        open(directory, 0o755);
    }
    open("run/filter/handover.sock", 0o666);

    // A gate of another user's, with files of its own, that knows the way.
    let theirs = rig.network.path("theirs");
    std::fs::create_dir(&theirs).unwrap();
    symlink(rig.network.path("run/filter"), theirs.join("filter")).unwrap();
    for path in [
        &theirs,
        &rig.pki.path(&format!("{SHOP}.key")),
        &rig.pki.path(""),
    ] {
        chown(path, Some(NO_USER), None).unwrap();
    }
    for name in [BLOG, WIKI] {
        chown(rig.pki.path(&format!("{name}.key")), Some(NO_USER), None).unwrap();
    }
    for entry in std::fs::read_dir(rig.pki.path("")).unwrap() {
        chown(entry.unwrap().path(), Some(NO_USER), None).unwrap();
    }
    let config = rig.network.path("theirs.toml");
    let text = std::fs::read_to_string(&rig.config).unwrap();
    let text = text.replace("run = \"run\"", "run = \"theirs\"");
    let text = text.replace("state = \"state\"", "state = \"theirs\"");
    let text = text.replace(
        "steer = true",
        "steer = true\nlisten = [\"127.0.0.1:44301\"]",
    );
    std::fs::write(&config, text).unwrap();
    let mark = rig.filter().mark();
    let mut command = rig.network.command(Host::Origin, "setpriv");
    let user = NO_USER.to_string();
    command.args(["--reuid", &user, "--regid", &user, "--clear-groups", "--"]);
    command.arg(binary()).arg("--config").arg(&config);
    let mut theirs = command.args(["run", "--only", "gate"]).spawn().unwrap();
    let event = rig.filter().event(mark, "it is refused", |event| {
        event["id"] == "handover-forbidden"
    });
    assert_eq!(event["user"], NO_USER);
    theirs.kill().unwrap();
    theirs.wait().unwrap();

    // The gate's own user, with what listens not.
    let mark = rig.filter().mark();
    let config =
        Config::parse(&rig.config, &std::fs::read_to_string(&rig.config).unwrap()).unwrap();
    let paths = &config.boot.paths;
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let sockets = [TcpListener::from(OwnedFd::from(socket))];
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let refused = runtime
        .block_on(hand_over(paths, &sockets, ClientAddress::Loopback))
        .err()
        .unwrap();
    assert!(
        refused.to_string().contains("no listening TCP socket"),
        "{refused}"
    );
    rig.filter().event(mark, "it is logged", |event| {
        event["id"] == "sockets-refused"
    });

    let page = rig.tell(&rig.edge(), Host::Edge, SHOP);
    assert!(page.starts_with("shop.example saw"), "{page}");
}

#[test]
fn a_program_that_another_process_detaches_is_attached_again() {
    let rig = Steered::start(Software::Nginx, "", "");
    let mark = rig.filter().mark();

    std::fs::remove_file(rig.network.pin("steer_link")).unwrap();

    rig.filter().event(mark, "it is attached again", |event| {
        event["id"] == "steering-reattached"
    });
    let without = Client::new(&rig.pki, None);
    assert_eq!(
        rig.tell(&without, Host::Edge, SHOP),
        "alert CertificateRequired"
    );
}

#[test]
fn a_program_that_the_kernel_does_not_take_is_tried_until_it_does() {
    let mut rig = Steered::start(Software::Nginx, "", "");
    let ours = rig.network.pin("steer_program");
    let spare = rig.network.path("bpf/spare");
    // A copy of it, so that it is known where the filter's is gone.
    rig.network.on(Host::Origin, || {
        SkLookup::from_pin(&ours).unwrap().pin(&spare).unwrap();
    });
    assert_eq!(rig.filter.take().unwrap().stop(), Some(0));
    assert!(rig.pullgate(&["unload"]).status.success());
    // As many as a network namespace takes.
    let taken = rig.network.on(Host::Origin, || {
        let mut links = Vec::new();
        loop {
            let mut program = SkLookup::from_pin(&spare).unwrap();
            let namespace = File::open("/proc/thread-self/ns/net").unwrap();
            match program.attach(namespace) {
                Ok(id) => links.push(FdLink::from(program.take_link(id).unwrap())),
                Err(error) => {
                    // E2BIG: there is room for no more.
                    assert!(format!("{error:?}").contains("code: 7"), "{error:?}");
                    return links;
                }
            }
            assert!(links.len() < 1000);
        }
    });

    rig.start_filter();

    let status = rig.filter().status();
    let findings = status["findings"].to_string();
    assert!(
        findings.contains("the kernel does not take the program"),
        "{findings}"
    );
    assert_eq!(status["enforcing"], false);
    let gate = rig.gate().status();
    assert!(has(&gate, "not-steered"), "{gate:#}");
    let explained = rig.pullgate(&["explain", "--json", "173.245.48.5"]);
    let explained: Value = serde_json::from_slice(&explained.stdout).unwrap();
    assert_eq!(explained["steered"], Value::Null);
    // The rest of a reload is applied.
    Steered::reload(rig.filter());
    let metric = "pullgate_filter_reload_total{outcome=\"Reloaded\"}";
    assert_eq!(rig.filter().metric(metric), 1);
    // What strangers may reach by that they do not: the filter is there.
    assert_eq!(rig.tell(&rig.edge(), Host::Stranger, SHOP), "silence");
    let mark = rig.filter().mark();
    drop(taken);
    rig.filter().event(mark, "it is taken", |event| {
        event["id"] == "steering-reattached"
    });
    eventually("connections are steered", || {
        let page = rig.tell(&rig.edge(), Host::Edge, SHOP);
        page.starts_with("shop.example saw 127.0.0.1").then_some(())
    });
    assert!(!has(&rig.filter().status(), "steering-detached"));
}

#[test]
fn another_program_that_chooses_sockets_is_reported() {
    let rig = Steered::start(Software::Nginx, "", "");
    let theirs = rig.network.path("bpf/theirs");
    let ours = rig.network.pin("steer_program");

    // The same program once more, by another's link.
    rig.network.on(Host::Origin, || {
        let mut program = SkLookup::from_pin(&ours).unwrap();
        let namespace = File::open("/proc/thread-self/ns/net").unwrap();
        let id = program.attach(namespace).unwrap();
        let link = FdLink::from(program.take_link(id).unwrap());
        link.pin(&theirs).unwrap();
    });
    // It is known as ours by its number; another one is not.
    assert!(!has(&rig.filter().status(), "other-sk-lookup"));
    Steered::reload(rig.filter());

    let status = rig.filter().status();
    assert!(has(&status, "other-sk-lookup"), "{status:#}");
    assert_eq!(status["enforcing"], false);
}

#[test]
fn a_certificate_that_is_replaced_is_trusted_before_and_after_the_web_server_reads_it() {
    let rig = Steered::start(Software::Nginx, "", "");
    let edge = rig.edge();
    let serves = || {
        let page = rig.tell(&edge, Host::Edge, SHOP);
        assert!(page.starts_with("shop.example saw"), "{page}");
    };
    serves();

    let renew = || {
        rig.pki.renew(SHOP);
        Steered::reload(rig.gate());
    };
    renew();
    // nginx still shows the old one.
    serves();
    rig.web.reload();
    serves();

    // One that is older than the last is any server's.
    renew();
    renew();
    assert_eq!(rig.tell(&edge, Host::Edge, SHOP), "closed");
    eventually("the connection is counted", || {
        (rig.gate().outcomes("UpstreamTls") == 1).then_some(())
    });
}

#[test]
fn a_transparent_gate_shows_the_web_server_the_clients_own_address() {
    for software in [Software::Nginx, Software::Apache] {
        let rig = Steered::start(software, "", "client_address = \"transparent\"");
        let edge = rig.edge();
        for (to, client) in Host::Origin.addresses().iter().zip(Host::Edge.addresses()) {
            let (reply, _) = edge.get(&rig.network, Host::Edge, *to, SHOP);
            let page = rig.brief(reply);
            let expected = format!("shop.example saw {client}, https");
            assert!(page.starts_with(&expected), "{software:?}: {page}");
        }

        // It is reported, and no other gate has the capability.
        let status = rig.gate().status();
        assert!(has(&status, "client-address-transparent"), "{status:#}");
        assert_eq!(rig.capabilities_of_gate(), NET_BIND_SERVICE | NET_RAW);
    }
    let rig = Steered::start(Software::Nginx, "", "");
    assert!(!has(&rig.gate().status(), "client-address-transparent"));
    assert_eq!(rig.capabilities_of_gate(), NET_BIND_SERVICE);
}

#[test]
fn rules_and_routes_of_a_transparent_gate_are_kept_and_go_with_unload() {
    let mut rig = Steered::start(
        Software::Nginx,
        "",
        "client_address = \"transparent\"\nroute_table = 443\nrule_priority = 99",
    );
    let network = Arc::clone(&rig.network);
    let rules = |family: &str| {
        let words = ["ip", family, "rule", "show", "priority", "99"];
        let output = network.output(Host::Origin, &words);
        String::from_utf8(output.stdout).unwrap()
    };
    let routes = |family: &str| {
        let words = ["ip", family, "route", "show", "table", "443"];
        let output = network.output(Host::Origin, &words);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let are_there = || {
        ["-4", "-6"].iter().all(|family| {
            rules(family).contains("iif lo lookup 443") && routes(family).contains("local default")
        })
    };
    assert!(are_there(), "{}{}", rules("-4"), routes("-4"));

    for words in [
        ["ip", "-4", "rule", "del", "priority", "99"].as_slice(),
        ["ip", "-6", "route", "flush", "table", "443"].as_slice(),
    ] {
        let mark = rig.filter().mark();
        assert!(rig.network.output(Host::Origin, words).status.success());
        rig.filter().event(mark, "it is put back", |event| {
            event["id"] == "return-path-removed"
        });
        assert!(are_there());
    }
    assert!(has(&rig.filter().status(), "return-path-removed"));
    let page = rig.tell(&rig.edge(), Host::Edge, SHOP);
    assert!(page.starts_with("shop.example saw 173.245.48.5"), "{page}");

    // Other numbers, or none, wait for a start, as the gate's capability does; a trial removes nothing.
    let other = "client_address = \"transparent\"\nroute_table = 444\nrule_priority = 98";
    for lines in ["", other] {
        rig.configure("", lines);
        Steered::reload(rig.filter());
        assert!(has(&rig.filter().status(), "restart-needed"), "{lines}");
        assert!(are_there(), "{lines}");
    }
    let page = rig.tell(&rig.edge(), Host::Edge, SHOP);
    assert!(page.starts_with("shop.example saw 173.245.48.5"), "{page}");
    // A filter that is started without them takes no such gate's sockets.
    let transparent = std::fs::read_to_string(&rig.config).unwrap();
    rig.configure("", "");
    assert_eq!(rig.filter.take().unwrap().stop(), Some(0));
    rig.start_filter();
    eventually("the gate reports it", || {
        let findings = rig.gate().status()["findings"].to_string();
        findings.contains("restart the filter").then_some(())
    });
    assert_eq!(rig.gate().status()["enforcing"], false);
    std::fs::write(&rig.config, transparent).unwrap();
    assert_eq!(rig.filter.take().unwrap().stop(), Some(0));
    rig.configure(
        "",
        "client_address = \"transparent\"\nroute_table = 443\nrule_priority = 99",
    );
    rig.start_filter();
    rig.configure("", other);
    assert_eq!(rig.filter.take().unwrap().stop(), Some(0));
    let trial = ["run", "--only", "filter", "--confirm", "100ms", "--yes"];
    let ended = rig.pullgate(&trial);
    assert_eq!(ended.status.code(), Some(75));
    assert!(are_there(), "{}", rules("-4"));
    let all = rig.network.output(Host::Origin, &["ip", "rule", "show"]);
    assert!(!String::from_utf8(all.stdout).unwrap().contains("444"));
    rig.start_filter();
    assert!(rules("-4").is_empty() && routes("-6").is_empty());

    assert!(rig.pullgate(&["unload"]).status.success());
    let all = rig.network.output(Host::Origin, &["ip", "rule", "show"]);
    let all = String::from_utf8(all.stdout).unwrap();
    assert!(!all.contains("444"), "{all}");
    rig.filter().event(0, "the filter knows", |event| {
        event["id"] == "filter-unloaded"
    });
    let all = rig
        .network
        .output(Host::Origin, &["ip", "-6", "rule", "show"]);
    assert!(!String::from_utf8(all.stdout).unwrap().contains("444"));
}

#[test]
fn what_keeps_the_gate_from_the_web_server_is_found_by_check() {
    let rig = Steered::new(Software::Nginx, "", "");
    let check = || {
        let output = rig.pullgate(&["check"]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        text + &String::from_utf8_lossy(&output.stdout)
    };
    let original = std::fs::read_to_string(rig.network.path("nginx-443.conf")).unwrap();
    for (from, to, expected) in [
        ("", "", None),
        (
            "listen 443 ssl http2;",
            "listen 443 ssl http2; ssl_verify_client on; ssl_client_certificate @PKI@/ours-ca.pem;",
            Some("demands a client certificate for `shop.example` itself"),
        ),
        // Of one site that is not the server's first.
        (
            "server_name wiki.example;",
            "server_name wiki.example; ssl_verify_client on; ssl_client_certificate @PKI@/ours-ca.pem;",
            Some("demands a client certificate for `wiki.example` itself"),
        ),
        (
            "listen 443 ssl http2;",
            "listen 443;",
            Some("speaks no TLS"),
        ),
        (
            "listen 443 ssl http2;",
            "listen 443 ssl http2 proxy_protocol;",
            Some("serves with `proxy_protocol = \"v"),
        ),
        (
            "listen 443 ssl http2;",
            "listen 8443 ssl http2;",
            Some("no web server listens on port 443"),
        ),
        // nginx binds no address of a port that it has on all of them: from another port it does.
        (
            "listen 443 ssl http2;",
            "listen 203.0.113.10:443 ssl http2;",
            Some("listens on 203.0.113.10:443 alone"),
        ),
    ] {
        let to = to.replace("@PKI@/", &rig.pki.path("").display().to_string());
        let mut changed = original.clone();
        if expected.is_some() {
            changed = changed.replace("listen [::]:443 ssl http2;", "");
            changed = changed.replace(from, &to);
        }
        std::fs::write(rig.network.path("nginx-443.conf"), changed).unwrap();
        rig.web.reload();
        eventually(&format!("check says {expected:?}: {}", check()), || {
            let said = check();
            let is_found = match expected {
                Some(expected) => said.contains(expected),
                None => !said.contains("web server"),
            };
            is_found.then_some(())
        });
        // What it answers is asked at a look at the status as well.
        let is_asked = |expected: &&str| {
            expected.starts_with("demands a client") || *expected == "speaks no TLS"
        };
        if let Some(expected) = expected.filter(is_asked) {
            let output = rig.pullgate(&["status"]);
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(text.contains(expected), "{text}");
        }
    }
}

#[test]
fn a_header_that_another_pairing_needed_is_found_by_check() {
    let rig = Steered::new(Software::Nginx, "", "");
    let text = std::fs::read_to_string(&rig.config).unwrap();
    let left_over = text.replace("\ntrust", "\nproxy_protocol = \"v2\"\ntrust");
    assert_ne!(text, left_over);
    std::fs::write(&rig.config, left_over).unwrap();

    let output = rig.pullgate(&["check"]);

    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("serves with `proxy_protocol = \"none\"`"),
        "{said}"
    );
    assert_eq!(output.status.code(), Some(0), "{said}");
}

/// Whether a status has a finding of that name.
fn has(status: &Value, id: &str) -> bool {
    let findings = status["findings"].as_array();
    findings.is_some_and(|all| all.iter().any(|finding| finding["id"] == id))
}

/// Bits of CapEff, include/uapi/linux/capability.h.
const NET_BIND_SERVICE: u64 = 1 << 10;
const NET_RAW: u64 = 1 << 13;
/// The account of no user (Debian's base-passwd).
const NO_USER: u32 = 65_534;
