//! Verifies that a role keeps no power that it does not need: what it can still do once it is
//! confined, and that every thread of a running one is.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::Command;

use tests::gate::{blog, shop};
use tests::pki::SHOP;
use tests::upstream::{Manner, Upstream};
use tests::{Lab, Plan, Rig};

#[test]
fn a_confined_role_can_do_what_it_must_and_nothing_else() {
    let rig = Rig::new();
    for directory in ["state", "state-filter", "run", "bpf/pullgate"] {
        fs::create_dir(rig.network.path(directory)).unwrap();
    }
    // A role that may connect finds a listener.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let name = SocketAddr::from_abstract_name(format!("pullgate-attempt-{port}")).unwrap();
    let _abstract = UnixListener::bind_addr(&name).unwrap();

    // `stranger` is not confined, so that each attempt is seen to succeed where it may. A gate that opens
    // connections in its clients' names has the capability for raw sockets, and no way to make one.
    let transparent = "steer = true\nclient_address = \"transparent\"\n";
    let roles = ["stranger", "filter", "ranges", "gate"].map(|role| (role, ""));
    for (role, lines) in roles.into_iter().chain([("gate", transparent)]) {
        let lines = format!("listen = [\"127.0.0.1:8443\"]\n{lines}");
        rig.configure(&lines, &[&shop(""), &blog("")]);
        rig.append("\n[filter]\ninterfaces = [\"wan0\"]\n");
        let mut attempt = Command::new(tests::daemon::binary().with_file_name("attempt"));
        attempt.args([role, &rig.config.display().to_string(), &port.to_string()]);
        let output = attempt.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let received: BTreeMap<_, _> = text
            .lines()
            .filter_map(|line| line.split_once(": "))
            .collect();

        assert!(
            output.status.success(),
            "{role}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let may: &[&str] = match role {
            "filter" => &[
                "read the configuration",
                "write a status socket's directory",
                "touch a link",
                "use BPF",
            ],
            "ranges" => &[
                "read the configuration",
                "write a status socket's directory",
                "write the state",
                "send datagrams",
            ],
            _ => &[
                "read the configuration",
                "write a status socket's directory",
            ],
        };
        assert_eq!(received.len(), 27, "{text}");
        for (what, answer) in &received {
            assert_eq!(
                *answer == "yes",
                role == "stranger" || may.contains(what),
                "{role}: {what}: {answer}"
            );
        }
    }
}

#[test]
fn a_reload_that_wants_more_is_refused_and_what_was_stays() {
    let rig = Rig::with_shop("");
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    fs::create_dir(rig.network.path("elsewhere")).unwrap();
    for file in ["shop.example.pem", "shop.example.key"] {
        let there = rig.network.path(format!("elsewhere/{file}"));
        fs::copy(rig.pki.path(file), there).unwrap();
    }
    // A host's own directory is below the configuration's, which may be read as a whole.
    let good = shop("").replace("@PKI@/shop", "@DIR@/elsewhere/shop");
    assert!(rig.reconfigure("", &[&good, &blog("")]));

    for (bad, lacking) in [
        (
            shop("upstream = \"127.0.0.1:8090\""),
            "TCP port 8090 is out of reach",
        ),
        (
            shop("crl = [\"/var/lib/dpkg/status\"]"),
            "/var/lib/dpkg is out of reach",
        ),
    ] {
        assert!(!rig.reconfigure("", &[&bad, &blog("")]), "{bad}");
        let warnings = rig.gate().status()["findings"].to_string();
        assert!(warnings.contains(lacking), "{warnings}");
        assert!(warnings.contains("restart it"), "{warnings}");
        assert_eq!(rig.tell(&rig.edge(), SHOP), "200, Relayed");
    }
}

#[test]
fn every_thread_of_a_running_role_is_confined() {
    let lab = Lab::start(&Plan::default());
    let filters = |status: &str| {
        let mut lines = status.lines();
        let count = lines.find_map(|line| line.strip_prefix("Seccomp_filters:"));
        count.unwrap().trim().parse::<u32>().unwrap()
    };
    // Those of the process that runs this test.
    let ours = filters(&fs::read_to_string("/proc/self/status").unwrap());

    for (role, running, capabilities) in [
        ("filter", lab.filter(), "000000c000001000"),
        ("ranges", lab.ranges(), "0000000000000000"),
        ("gate", lab.gate(), "0000000000000400"),
    ] {
        let status = running.status();
        let received = status["details"].to_string();
        assert!(received.contains("landlock ABI"), "{role}: {received}");
        let threads = fs::read_dir(format!("/proc/{}/task", running.pid())).unwrap();
        let mut count = 0;
        for thread in threads {
            let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
            let line = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap_or_default()
                    .trim_start_matches(':')
                    .trim()
                    .to_owned()
            };
            assert_eq!(line("CapEff"), capabilities, "{role}");
            assert_eq!(line("CapPrm"), capabilities, "{role}");
            assert_eq!(line("CapBnd"), capabilities, "{role}");
            assert_eq!(line("CapInh"), "0000000000000000", "{role}");
            assert_eq!(line("NoNewPrivs"), "1", "{role}");
            assert_eq!(line("Seccomp"), "2", "{role}");
            // For clone3(2), for calls that are not named, and for listen(2) later.
            assert_eq!(filters(&status), ours + 3, "{role}");
            count += 1;
        }
        assert!(count > 1, "{role}");
    }
}
