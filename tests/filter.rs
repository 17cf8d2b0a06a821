//! Verifies how the filter is attached, changed, asked and put on trial.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{Xdp, XdpMode};
use filter_ebpf::cases::Packet;
use filter_ebpf::verdict::{Reason, Verdict};
use pullgate::config::Config;
use pullgate::host::netlink::Changed;
use pullgate::host::uplinks::Memory;
use pullgate::ranges::Table;
use pullgate::snapshot;
use pullgate::xdp::{Filter, FilterStart, Lifetime};
use serde_json::Value;
use tests::daemon::{self, Pullgate};
use tests::gate::origin;
use tests::net::{Host, INTERFACE, ip};
use tests::traffic::Objects;
use tests::wire::Sender;
use tests::{Lab, Plan, assert_matched, eventually, scenarios};

#[test]
fn a_reload_changes_settings_and_rules_without_detaching() {
    let mut lab = Lab::start(&Plan::default());
    let link = link_id(&lab, "native");
    send(&lab, Host::Stranger, 443);
    let before = eventually("the SYN is counted", || some(lab.frames(NOT_LISTED)));

    lab.configure("ports = [\"cloudflare-tls\", \"http\"]\ndestinations = [\"203.0.113.10\"]");
    let event = lab.reload();
    send(&lab, Host::Stranger, 80);
    let after = eventually("the SYN to 80 is counted", || {
        Some(lab.frames(NOT_LISTED)).filter(|count| *count > before)
    });

    assert_eq!(event["level"], "INFO", "{event}");
    assert_eq!(link_id(&lab, "native"), link, "the link is still the same");
    assert_eq!(after, before + 1, "counters go on");
    let explained = explain(&lab, &["2001:db8::7", "--to", "2001:db8:10::10"]);
    assert_eq!(explained["reason"], "OtherDestination");
    assert_eq!(
        lab.filter()
            .metric("pullgate_filter_reload_total{outcome=\"Reloaded\"}"),
        1
    );
}

#[test]
fn a_bad_file_leaves_what_was_active_and_status_says_so() {
    let mut lab = Lab::start(&Plan::default());

    lab.configure("ports = [443, \"https\"]");
    let event = lab.reload();
    let status = lab.filter().status();

    assert_eq!(event["level"], "ERROR");
    assert!(
        event["error"].to_string().contains("`filter.ports"),
        "{event}"
    );
    let warnings = status["findings"].to_string();
    assert!(
        warnings.contains("configuration-not-reloaded"),
        "{warnings}"
    );
    assert_eq!(
        lab.filter()
            .metric("pullgate_filter_reload_total{outcome=\"Failed\"}"),
        1
    );
    assert_matched(&scenarios::strangers_are_dropped(&lab));

    lab.configure("interfaces = [\"gone0\"]");
    let event = lab.reload();
    assert!(
        event["error"]
            .to_string()
            .contains("`gone0` does not exist"),
        "{event}"
    );
    assert_matched(&scenarios::strangers_are_dropped(&lab));

    lab.configure("");
    assert_eq!(lab.reload()["level"], "INFO");
    assert!(
        !lab.filter().status()["findings"]
            .to_string()
            .contains("configuration-not-reloaded")
    );
}

#[test]
fn jumbo_frames_are_filtered_natively() {
    let mut lab = Lab::start(&Plan::default());
    lab.unload();
    let namespace = lab.network.namespace(Host::Origin);
    ip(&["-n", &namespace, "link", "set", INTERFACE, "mtu", "9000"]);

    lab.configure("attach = \"native\"");
    lab.start_filter();

    assert_eq!(mode(&lab, INTERFACE), "native");
    assert_matched(&scenarios::strangers_are_dropped(&lab));
    assert_matched(&scenarios::edge_is_served(&lab, "nginx"));
}

#[test]
fn where_the_driver_refuses_the_kernels_words_are_told() {
    let mut lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    ip(&["-n", &namespace, "link", "add", "br0", "type", "bridge"]);
    lab.unload();

    lab.configure("interfaces = [\"wan0\", \"br0\"]");
    lab.start_filter();

    assert_eq!(mode(&lab, "br0"), "generic");
    assert_eq!(mode(&lab, INTERFACE), "native");
    lab.filter().event(0, "the refusal is logged", |event| {
        let message = event["message"].to_string();
        event["id"] == "attach-mode-refused"
            && event["interface"] == "br0"
            && message.contains("does not support XDP in native mode")
    });

    lab.unload();
    lab.configure("interfaces = [\"br0\"]\nattach = \"native\"");
    let refused = lab.pullgate(&["run", "--only", "filter"]);
    assert_eq!(refused.status.code(), Some(70));
    assert!(
        error(&refused).contains("cannot attach to `br0`"),
        "{}",
        error(&refused)
    );
    assert!(!lab.has_pins(), "nothing is left behind");

    lab.configure("interfaces = [\"lo\"]");
    let refused = lab.pullgate(&["run", "--only", "filter"]);
    assert_eq!(refused.status.code(), Some(78));
    assert!(error(&refused).contains("`lo` is not an Ethernet interface"));
}

#[test]
fn a_foreign_program_is_named_and_can_be_lived_with() {
    let mut lab = Lab::start(&Plan::default());
    lab.unload();
    let mut objects = Objects::load();
    let foreign: &mut Xdp = objects.program("bare_pass");
    lab.network.on(Host::Origin, || {
        foreign.attach(INTERFACE, XdpMode::Driver).unwrap()
    });

    // Its name is for CAP_SYS_ADMIN alone to know, which a confined role has not.
    for (words, about) in [
        (
            &["run", "--only", "filter"] as &[_],
            "another XDP program (id ",
        ),
        (
            &["run", "--only", "filter", "--unconfined"],
            "name bare_pass",
        ),
    ] {
        let refused = lab.pullgate(words);
        assert_eq!(refused.status.code(), Some(70));
        assert!(error(&refused).contains(about), "{}", error(&refused));
        assert!(error(&refused).contains("ip link set dev wan0 xdp off"));
    }

    lab.configure("coexist = \"tcx\"");
    lab.start_filter();
    assert_eq!(mode(&lab, INTERFACE), "tcx");
    let warnings = lab.filter().status()["findings"].to_string();
    assert!(warnings.contains("attach-mode-weaker"), "{warnings}");
    assert_matched(&scenarios::strangers_are_dropped(&lab));
    assert_matched(&scenarios::the_rest_works_as_before(&lab));
    assert_matched(&scenarios::edge_is_served(&lab, "nginx"));
    assert_eq!(explain(&lab, &["198.51.100.7"])["verdict"], "drop");

    // It is replaced through its link as well.
    let link = link_id(&lab, "tcx");
    assert_eq!(lab.reload()["level"], "INFO");
    assert_eq!(link_id(&lab, "tcx"), link);
}

#[test]
fn a_link_that_somebody_takes_away_is_put_back_and_counted() {
    let lab = Lab::start(&Plan::default());
    let mark = lab.filter().mark();

    let detached = Command::new("bpftool")
        .args(["link", "detach", "pinned"])
        .arg(lab.network.pin("native-wan0"))
        .output()
        .unwrap();
    assert!(detached.status.success(), "{}", error(&detached));
    lab.filter().event(mark, "it is put back", |event| {
        event["id"] == "interface-reattached"
    });

    assert_eq!(
        lab.filter()
            .metric("pullgate_filter_reattached_total{iface=\"wan0\"}"),
        1
    );
    assert_matched(&scenarios::strangers_are_dropped(&lab));
}

#[test]
fn interfaces_with_a_default_route_are_found_as_they_come() {
    let mut lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    lab.unload();

    lab.configure("interfaces = \"auto\"");
    lab.start_filter();
    let none = lab.filter().status();
    let mark = lab.filter().mark();
    ip(&[
        "-n", &namespace, "route", "add", "default", "dev", INTERFACE,
    ]);
    lab.filter().event(mark, "it is attached", |event| {
        event["interface"] == INTERFACE
    });

    assert_eq!(none["enforcing"], false);
    assert!(none["findings"].to_string().contains("no-interface"));
    assert_eq!(lab.filter().status()["enforcing"], true);
    assert_matched(&scenarios::strangers_are_dropped(&lab));

    let mark = lab.filter().mark();
    add_second_card(&namespace);
    ip(&[
        "-6", "-n", &namespace, "route", "add", "default", "dev", "wan2",
    ]);
    lab.filter()
        .event(mark, "a second one is attached", |event| {
            event["interface"] == "wan2"
        });
    assert_eq!(mode(&lab, "wan2"), "native");
}

#[test]
fn an_uplink_is_remembered_and_filtered_before_it_has_a_route() {
    let mut lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    lab.unload();
    lab.configure("interfaces = \"auto\"");
    lab.start_filter();
    ip(&[
        "-n", &namespace, "route", "add", "default", "dev", INTERFACE,
    ]);
    let memory = lab.network.path("state-filter/uplinks.json");
    eventually("it is remembered", || {
        let text = fs::read_to_string(&memory).ok()?;
        text.contains(INTERFACE).then_some(())
    });

    // As at a boot: no pin, no route.
    reboot(&mut lab);
    ip(&["-n", &namespace, "route", "del", "default"]);
    lab.start_filter();

    assert_eq!(mode(&lab, INTERFACE), "native");
    assert_matched(&scenarios::strangers_are_dropped(&lab));

    // After `unload` nothing is remembered.
    lab.unload();
    lab.start_filter();
    assert_eq!(lab.filter().status()["enforcing"], false);
    assert!(!attached(&lab, INTERFACE));
}

#[test]
fn remembered_uplinks_that_others_could_write_are_not_believed() {
    let mut lab = Lab::start(&Plan::default());
    lab.unload();
    let memory = lab.network.path("state-filter/uplinks.json");
    let text = r#"{"version":1,"interfaces":{"uplinks":["wan0"],"software":[]}}"#;
    fs::write(&memory, text).unwrap();
    fs::set_permissions(&memory, fs::Permissions::from_mode(0o666)).unwrap();

    lab.configure("interfaces = \"auto\"");
    lab.start_filter();

    assert!(!attached(&lab, INTERFACE));
    lab.filter().event(0, "it is said", |event| {
        event["error"]
            .to_string()
            .contains("uplinks.json may be changed by every user")
    });
}

#[test]
fn an_interface_that_is_missing_at_the_start_is_waited_for() {
    let mut lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    lab.unload();
    ip(&["-n", &namespace, "link", "del", INTERFACE]);

    // It does not come: the role is ready after a while, and status says what is missing.
    lab.start_filter();
    let status = lab.filter().status();
    assert_eq!(status["enforcing"], false, "{status}");
    assert_eq!(status["filter"]["interfaces"][0]["mode"], "none");
    let warnings = status["findings"].to_string();
    assert!(
        warnings.contains("`wan0` is not filtered: it does not exist"),
        "{warnings}"
    );
    let attached_metric = "pullgate_filter_attached{iface=\"wan0\",mode=\"none\"}";
    assert_eq!(status["metrics"][attached_metric], 0.0, "{status}");

    // It comes, under another name first, as a driver gives it.
    let mark = lab.filter().mark();
    lab.network.connect(Host::Origin);
    lab.filter().event(mark, "it is attached", |event| {
        event["id"] == "interface-attached"
    });
    assert_eq!(lab.filter().status()["enforcing"], true);
    assert_matched(&scenarios::strangers_are_dropped(&lab));

    // It comes while the start waits, which is over then.
    lab.unload();
    ip(&["-n", &namespace, "link", "del", INTERFACE]);
    lab.configure("interface_timeout = \"1day\"");
    let has_come = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let network = &lab.network;
        let appears = scope.spawn(|| {
            // By then, a role that did not wait would be ready.
            eventually("the role reports what is missing", || {
                let socket = network.path("run/filter/status.sock");
                let status = daemon::http(&socket, "GET", "/status", "").ok()?;
                (status["filter"]["interfaces"][0]["mode"] == "none").then_some(())
            });
            has_come.store(true, Ordering::SeqCst);
            network.connect(Host::Origin);
        });
        let started = Pullgate::start(network, &lab.config, "filter");
        assert!(has_come.load(Ordering::SeqCst), "it was ready before");
        appears.join().unwrap();
        assert_eq!(started.stop(), Some(0));
    });
}

#[test]
fn an_uplink_that_is_not_named_takes_the_all_clear_away() {
    let lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    add_second_card(&namespace);
    assert_eq!(lab.filter().status()["enforcing"], true);
    let uncovered = |routes: &[&[&str]]| {
        for route in routes {
            let mut words = vec!["-n", &namespace, "route", "add"];
            words.extend(*route);
            words.extend(["dev", "wan2"]);
            ip(&words);
        }
        let said = eventually("it is not protected", || {
            let status = lab.filter().status();
            let text = status["findings"].to_string();
            (status["enforcing"] == false).then_some(text)
        });
        assert!(
            said.contains("`wan2` is not filtered") && said.contains("does not name it"),
            "{said}"
        );
        let metric = "pullgate_filter_attached{iface=\"wan2\",mode=\"none\"}";
        assert_eq!(lab.filter().status()["metrics"][metric], 0.0);
        assert_eq!(lab.pullgate(&["status"]).status.code(), Some(1));
        let checked = lab.pullgate(&["check"]);
        assert!(
            error(&checked).contains("strangers can come in by `wan2`"),
            "{}",
            error(&checked)
        );
        for route in routes {
            let mut words = vec!["-n", &namespace, "route", "del"];
            words.extend(*route);
            words.extend(["dev", "wan2"]);
            ip(&words);
        }
        eventually("it is protected again", || {
            (lab.filter().status()["enforcing"] == true).then_some(())
        });
    };

    uncovered(&[&["default"]]);
    uncovered(&[&["0.0.0.0/1"], &["128.0.0.0/1"]]);
    uncovered(&[&["2000::/3"]]);
    uncovered(&[&["default", "table", "100"]]);
}

#[test]
fn a_vpn_with_a_table_of_its_own_takes_no_protection_away() {
    let mut lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    lab.unload();
    ip(&[
        "-n", &namespace, "route", "add", "default", "dev", INTERFACE,
    ]);
    ip(&["-n", &namespace, "tuntap", "add", "wg0", "mode", "tun"]);
    ip(&["-n", &namespace, "link", "set", "wg0", "up"]);
    let add = |table: &[&str]| {
        let mut words = vec!["-n", &namespace, "route", "add", "0.0.0.0/1", "dev", "wg0"];
        words.extend(table);
        ip(&words);
    };
    add(&["table", "51820"]);

    lab.configure("interfaces = \"auto\"");
    lab.start_filter();
    let status = lab.filter().status();
    assert_eq!(status["enforcing"], true, "{status}");

    // What packets take by default is another matter.
    add(&[]);
    eventually("the tunnel is an uplink", || {
        let status = lab.filter().status();
        let said = status["findings"].to_string();
        let names_it = said.contains("`wg0` is not filtered: a route to the internet leads there");
        (status["enforcing"] == false && names_it).then_some(())
    });
}

#[test]
fn a_bridge_and_its_port_are_filtered_in_whatever_order_they_come() {
    let mut lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    lab.unload();
    ip(&["-n", &namespace, "link", "add", "br0", "type", "bridge"]);
    ip(&["-n", &namespace, "link", "set", "br0", "up"]);
    ip(&["-n", &namespace, "tuntap", "add", "guest0", "mode", "tap"]);
    for port in [INTERFACE, "guest0"] {
        ip(&["-n", &namespace, "link", "set", port, "master", "br0"]);
    }
    let modes = |lab: &Lab| [mode(lab, "br0"), mode(lab, INTERFACE)];

    // The bridge alone, and then its port as well: the kernel takes none below another one.
    lab.configure("interfaces = [\"br0\"]");
    lab.start_filter();
    lab.configure("interfaces = [\"br0\", \"wan0\"]");
    let event = lab.reload();
    assert_eq!(event["level"], "INFO", "{event}");
    assert_eq!(modes(&lab), ["generic", "native"]);

    // With no other port, what is on the port sees all of it.
    ip(&["-n", &namespace, "link", "del", "guest0"]);
    lab.unload();
    lab.configure("interfaces = [\"wan0\"]");
    lab.start_filter();
    ip(&["-n", &namespace, "route", "add", "default", "dev", "br0"]);
    eventually("the bridge is covered", || {
        let status = lab.filter().status();
        let interfaces = status["filter"]["interfaces"].as_array().unwrap().clone();
        let bridge = interfaces.iter().find(|it| it["name"] == "br0")?;
        (bridge["covered_by"] == INTERFACE).then_some(())
    });
    assert_eq!(lab.filter().status()["enforcing"], true);
}

#[test]
fn a_move_that_comes_to_nothing_leaves_the_program_where_it_was() {
    let mut lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    lab.unload();
    ip(&["-n", &namespace, "link", "add", "br0", "type", "bridge"]);
    ip(&["-n", &namespace, "link", "set", "br0", "up"]);
    ip(&["-n", &namespace, "link", "set", INTERFACE, "master", "br0"]);
    add_second_card(&namespace);
    let mut objects = Objects::load();
    let foreign: &mut Xdp = objects.program("bare_pass");
    lab.network.on(Host::Origin, || {
        foreign.attach("wan2", XdpMode::Driver).unwrap()
    });
    lab.configure("interfaces = [\"br0\"]");
    lab.start_filter();
    assert_eq!(mode(&lab, "br0"), "generic");

    // The port takes it, and the other interface does not: all of it is undone.
    lab.configure("interfaces = [\"wan0\", \"wan2\"]");
    let event = lab.reload();
    assert_eq!(event["level"], "ERROR", "{event}");
    assert_eq!(mode(&lab, "br0"), "generic");
    assert!(!attached(&lab, INTERFACE));

    // So does a trial that is over.
    lab.configure("interfaces = [\"wan0\"]");
    assert_eq!(lab.filter.take().unwrap().stop(), Some(0));
    let trial = ["run", "--only", "filter", "--confirm", "100ms", "--yes"];
    let ended = lab.pullgate(&trial);
    assert_eq!(ended.status.code(), Some(75), "{}", error(&ended));
    assert!(lab.network.pin("generic-br0").exists() && !lab.network.pin("native-wan0").exists());
}

#[test]
fn a_trial_leaves_alone_what_runs_already() {
    let mut lab = Lab::start(&Plan::default());
    assert_eq!(lab.filter.take().unwrap().stop(), Some(0));
    let ranges = lab.ranges.as_ref().unwrap().pid();

    // As the manual has it: without `--only`, beside the services that it has enabled.
    let ended = lab.pullgate(&["run", "--confirm", "100ms", "--yes"]);

    assert_eq!(ended.status.code(), Some(75), "{}", error(&ended));
    assert!(lab.ranges.as_mut().unwrap().is_running());
    assert_eq!(lab.ranges.as_ref().unwrap().status()["pid"], ranges);
}

#[test]
fn a_renamed_interface_stays_filtered_and_status_has_its_name() {
    let lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    let link = link_id(&lab, "native");

    ip(&["-n", &namespace, "link", "set", INTERFACE, "down"]);
    ip(&["-n", &namespace, "link", "set", INTERFACE, "name", "lan0"]);

    eventually("its pins follow", || {
        lab.network.pin("native-lan0").exists().then_some(())
    });
    eventually("status has the new name", || {
        attached(&lab, "lan0").then_some(())
    });
    ip(&["-n", &namespace, "link", "set", "lan0", "name", INTERFACE]);
    eventually("and the old one", || {
        attached(&lab, INTERFACE).then_some(())
    });
    assert_eq!(link_id(&lab, "native"), link);
}

#[test]
fn a_link_that_went_to_another_namespace_covers_no_interface_here() {
    let mut lab = Lab::start(&Plan::default());
    let origin = lab.network.namespace(Host::Origin);
    lab.unload();
    // The first uplink goes where its index is taken, and gets the next number, which is the second's.
    let elsewhere = lab.network.hub();
    let links = |name: &[&str]| {
        let mut command = Command::new("ip");
        command.args(["-n", &elsewhere, "-o", "link", "show"]);
        let shown = command.args(name).output().unwrap();
        String::from_utf8(shown.stdout).unwrap()
    };
    let numbers = links(&[]);
    let numbers = numbers.lines().filter_map(|line| line.split(':').next());
    let highest = numbers
        .filter_map(|number| number.parse::<u32>().ok())
        .max();
    let next = (highest.unwrap() + 1).to_string();
    ip(&[
        "-n", &origin, "link", "add", "wan2", "index", &next, "type", "veth", "peer", "name",
        "peer2",
    ]);
    for name in ["peer2", "wan2"] {
        ip(&["-n", &origin, "link", "set", name, "up"]);
    }
    lab.configure("interfaces = \"auto\"");
    ip(&["-n", &origin, "route", "add", "default", "dev", INTERFACE]);
    lab.start_filter();
    assert_eq!(mode(&lab, INTERFACE), "native");
    ip(&["-n", &origin, "link", "set", INTERFACE, "netns", &elsewhere]);
    ip(&["-n", &origin, "route", "add", "default", "dev", "wan2"]);

    eventually("the other uplink is filtered by itself", || {
        let shown = lab
            .network
            .output(Host::Origin, &["ip", "link", "show", "wan2"]);
        let has_program = String::from_utf8(shown.stdout).unwrap().contains("xdp");
        (attached(&lab, "wan2") && has_program).then_some(())
    });
    let moved = links(&[INTERFACE]);
    assert!(moved.starts_with(&format!("{next}:")), "{moved}");
}

#[test]
fn a_bridge_over_an_uplink_takes_the_program_over_and_guests_are_spared() {
    let mut lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    lab.unload();
    ip(&[
        "-n", &namespace, "route", "add", "default", "dev", INTERFACE,
    ]);
    lab.configure("interfaces = \"auto\"");
    lab.start_filter();
    assert_eq!(mode(&lab, INTERFACE), "native");

    ip(&["-n", &namespace, "link", "add", "br0", "type", "bridge"]);
    ip(&["-n", &namespace, "link", "set", "br0", "up"]);
    ip(&["-n", &namespace, "route", "del", "default"]);
    ip(&["-n", &namespace, "link", "set", INTERFACE, "master", "br0"]);
    ip(&["-n", &namespace, "route", "add", "default", "dev", "br0"]);

    eventually("the bridge is filtered, and its port is not", || {
        let ours =
            lab.network.pin("generic-br0").exists() && !lab.network.pin("native-wan0").exists();
        (ours && attached(&lab, "br0")).then_some(())
    });
    assert_eq!(lab.filter().status()["enforcing"], true);
    let memory = lab.network.path("state-filter/uplinks.json");
    eventually("the next boot knows the bridge", || {
        let text = fs::read_to_string(&memory).unwrap();
        (text.contains("br0") && !text.contains(INTERFACE)).then_some(())
    });
}

#[test]
fn a_memory_that_cannot_be_written_is_in_status() {
    let mut lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    lab.unload();
    let directory = lab.network.path("state-filter");
    fs::remove_dir_all(&directory).unwrap();
    fs::write(&directory, "").unwrap();
    ip(&[
        "-n", &namespace, "route", "add", "default", "dev", INTERFACE,
    ]);

    lab.configure("interfaces = \"auto\"");
    lab.start_filter();

    let status = lab.filter().status();
    let warnings = status["findings"].to_string();
    assert!(warnings.contains("uplinks-not-remembered"), "{warnings}");
    assert_eq!(status["enforcing"], true);
}

#[test]
fn a_foreign_program_above_an_interface_is_named_and_takes_the_all_clear_away() {
    let mut lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    lab.unload();
    ip(&["-n", &namespace, "link", "add", "br0", "type", "bridge"]);
    add_second_card(&namespace);
    ip(&["-n", &namespace, "link", "set", "wan2", "master", "br0"]);
    let mut objects = Objects::load();
    let foreign: &mut Xdp = objects.program("bare_pass");
    lab.network.on(Host::Origin, || {
        foreign.attach("br0", XdpMode::Skb).unwrap()
    });

    lab.configure("interfaces = [\"wan0\", \"wan2\"]");
    lab.start_filter();

    let status = lab.filter().status();
    assert_eq!(status["enforcing"], false, "{status}");
    let said = status["findings"].to_string();
    for word in [
        "`wan2` is not filtered: another XDP program (id ",
        "is on `br0`, which is stacked on `wan2`",
        "`bpftool link show` names its link",
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_eq!(lab.pullgate(&["status"]).status.code(), Some(1));
    // The other one is protected all the same, and a reload does not depend on what is amiss.
    assert_matched(&scenarios::strangers_are_dropped(&lab));
    assert_eq!(lab.reload()["level"], "INFO");

    let mark = lab.filter().mark();
    foreign.unload().unwrap();
    lab.filter().event(mark, "it is attached", |event| {
        event["interface"] == "wan2" && event["id"] == "interface-attached"
    });
    assert_eq!(lab.filter().status()["enforcing"], true);
}

#[test]
fn an_uplink_that_comes_later_and_refuses_the_program_takes_the_all_clear_away() {
    let mut lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    lab.unload();
    ip(&[
        "-n", &namespace, "route", "add", "default", "dev", INTERFACE,
    ]);
    add_second_card(&namespace);
    lab.configure("interfaces = \"auto\"");
    lab.start_filter();
    assert_eq!(lab.filter().status()["enforcing"], true);
    let mut objects = Objects::load();
    let foreign: &mut Xdp = objects.program("bare_pass");
    // In the stack, where ours would be in the driver: the kernel has one or the other.
    lab.network.on(Host::Origin, || {
        foreign.attach("wan2", XdpMode::Skb).unwrap()
    });

    ip(&[
        "-6", "-n", &namespace, "route", "add", "default", "dev", "wan2",
    ]);

    let said = eventually("it is not protected", || {
        let status = lab.filter().status();
        (status["enforcing"] == false).then(|| status["findings"].to_string())
    });
    for word in [
        "`wan2` is not filtered: another XDP program (id ",
        "ip link set dev wan2 xdpgeneric off",
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_eq!(lab.pullgate(&["status"]).status.code(), Some(1));
    foreign.unload().unwrap();
    eventually("it is protected", || {
        (lab.filter().status()["enforcing"] == true).then_some(())
    });
}

#[test]
fn pins_of_another_version_are_taken_over_through_their_links() {
    let mut lab = Lab::start(&Plan::default());
    let link = link_id(&lab, "native");
    send(&lab, Host::Stranger, 443);
    let counted = eventually("the SYN is counted", || some(lab.frames(NOT_LISTED)));
    lab.filter.take().unwrap().kill();
    let ours = lab.network.pin("");
    let theirs = lab.network.path("bpf/pullgate/v1");
    fs::rename(&ours, &theirs).unwrap();

    lab.start_filter();

    assert_eq!(link_id(&lab, "native"), link);
    assert_eq!(
        lab.frames(NOT_LISTED),
        counted,
        "counters of the same shape go on"
    );
    assert!(!theirs.exists());
    lab.filter().event(0, "the take-over is logged", |event| {
        event["id"] == "old-pins-removed"
    });
    assert_matched(&scenarios::strangers_are_dropped(&lab));
}

#[test]
fn explain_asks_the_loaded_program_and_nothing_is_counted() {
    let mut lab = Lab::start(&Plan {
        ranges: "allow = [\"192.0.2.0/24\"]\ndeny = [\"173.245.48.9/32\"]",
        ..Plan::default()
    });
    let namespace = lab.network.namespace(Host::Origin);
    ip(&["-n", &namespace, "link", "set", INTERFACE, "down"]);
    let before = frames(&lab);

    let cases: [(&[&str], &str, &str, Value); 9] = [
        (&["198.51.100.7"], "drop", "NotListed", Value::Null),
        (
            &["173.245.48.5"],
            "pass",
            "Listed",
            "173.245.48.0/20".into(),
        ),
        (&["2400:cb00::5"], "pass", "Listed", "2400:cb00::/32".into()),
        (&["192.0.2.7"], "pass", "Allowed", "192.0.2.0/24".into()),
        (
            &["173.245.48.9"],
            "drop",
            "Denied",
            "173.245.48.9/32".into(),
        ),
        (
            &["198.51.100.7", "--port", "80"],
            "pass",
            "OtherPort",
            Value::Null,
        ),
        (
            &["198.51.100.7", "--fragment"],
            "drop",
            "Fragment",
            Value::Null,
        ),
        (
            &["198.51.100.7", "--vlan", "7", "--vlan", "9"],
            "drop",
            "NotListed",
            Value::Null,
        ),
        (&["198.51.100.7", "--udp"], "pass", "NotTcp", Value::Null),
    ];
    for (arguments, verdict, reason, range) in cases {
        let explained = explain(&lab, arguments);

        assert_eq!(explained["verdict"], verdict, "{arguments:?}: {explained}");
        assert_eq!(explained["reason"], reason, "{arguments:?}: {explained}");
        assert_eq!(
            explained["rule"]["range"], range,
            "{arguments:?}: {explained}"
        );
        assert_eq!(
            explained["disagreement"],
            Value::Null,
            "{arguments:?}: {explained}"
        );
        assert_eq!(explained["interface"], INTERFACE);
    }
    assert_eq!(frames(&lab), before, "test runs are not counted");

    lab.configure("ports = [80]");
    let explained = explain(&lab, &["198.51.100.7"]);
    assert_eq!(explained["reason"], "NotListed", "the kernel's own answer");
    let disagreement = explained["disagreement"].to_string();
    assert!(disagreement.contains("pass (OtherPort)"), "{explained}");
    let text = lab.pullgate(&["explain", "173.245.48.5", "--port", "81"]);
    assert!(
        String::from_utf8(text.stdout)
            .unwrap()
            .contains("from any source")
    );
    assert_eq!(frames(&lab), before, "nor in a disagreement");
    let drops = &lab.filter().status()["filter"]["drops"];
    assert_eq!(*drops, serde_json::json!([]), "nor are they sampled");

    let mixed = lab.pullgate(&["explain", "173.245.48.5", "--to", "2001:db8::1"]);
    assert!(error(&mixed).contains("two address families"));
    let unknown = lab.pullgate(&["explain", "173.245.48.5", "--iface", "eth7"]);
    assert!(error(&unknown).contains("no filter is loaded on `eth7`"));
}

#[test]
fn a_sample_of_drops_and_their_sources_is_seen() {
    let lab = Lab::start(&Plan::default());
    let stranger = Host::Stranger.addresses()[0].to_string();

    // Credit is granted each second, so some of them are sampled.
    let status = eventually("a drop is sampled", || {
        send(&lab, Host::Stranger, 443);
        let status = lab.filter().status();
        let seen = !status["filter"]["drops"].as_array().unwrap().is_empty();
        seen.then_some(status)
    });

    let drop = &status["filter"]["drops"][0];
    assert_eq!(drop["source"], stranger.as_str());
    assert_eq!(drop["port"], 443);
    assert_eq!(drop["reason"], "NotListed");
    assert_eq!(drop["iface"], INTERFACE);
    assert_eq!(
        status["filter"]["top_sources"][0]["source"],
        stranger.as_str()
    );
    let shown = |arguments: &[&str]| String::from_utf8(lab.pullgate(arguments).stdout).unwrap();
    let brief = shown(&["status"]);
    assert!(!brief.contains("top sources of drops"), "{brief}");
    let shown = shown(&["status", "--verbose"]);
    assert!(shown.contains("top sources of drops"), "{shown}");
    assert!(
        shown.contains(&format!("{stranger} to {} port 443 on wan0", origin())),
        "{shown}"
    );
}

#[test]
fn a_trial_that_nobody_confirms_leaves_nothing() {
    let mut lab = Lab::start(&Plan::default());
    lab.unload();

    let ended = lab.pullgate(&["run", "--only", "filter", "--confirm", "100ms"]);

    assert_eq!(ended.status.code(), Some(75), "{}", error(&ended));
    assert!(error(&ended).contains("not confirmed in time"));
    assert!(!lab.has_pins());
    let nothing = lab.pullgate(&["confirm"]);
    assert_eq!(nothing.status.code(), Some(64), "{}", error(&nothing));
    assert!(error(&nothing).contains("no filter is on trial"));
}

#[test]
fn a_trial_that_nobody_confirms_gives_the_link_back() {
    let mut lab = monitored_before();
    let link = link_id(&lab, "native");

    lab.configure("mode = \"enforce\"");
    let trial = start_trial(&lab, "2s");
    send(&lab, Host::Stranger, 443);
    eventually("the trial drops", || some(lab.frames(NOT_LISTED)));
    eventually("the trial is over", || {
        (!trial.is_answering()).then_some(())
    });

    assert_eq!(link_id(&lab, "native"), link);
    lab.configure("mode = \"monitor\"");
    assert_eq!(
        explain(&lab, &["198.51.100.7"])["disagreement"],
        Value::Null
    );
}

#[test]
fn a_trial_that_is_confirmed_stays_and_one_that_is_killed_opens() {
    let mut lab = Lab::start(&Plan::default());
    lab.unload();

    start_trial(&lab, "1h").kill();
    assert!(
        !lab.network.pin("native-wan0").exists(),
        "what was not there before is gone"
    );

    let trial = start_trial(&lab, "1h");
    assert!(!lab.network.pin("native-wan0").exists());
    trial.signal(nix::sys::signal::Signal::SIGHUP);
    trial.event(0, "a reload has to wait", |event| {
        event["error"]
            .to_string()
            .contains("the filter is on trial")
    });
    let confirmed = lab.pullgate(&["confirm"]);
    assert!(confirmed.status.success(), "{}", error(&confirmed));
    trial.kill();
    assert!(lab.network.pin("native-wan0").exists());
    lab.start_filter();
    assert_matched(&scenarios::strangers_are_dropped(&lab));
}

#[test]
fn explain_asks_the_program_that_a_killed_trial_has_left() {
    let mut lab = monitored_before();
    lab.configure("mode = \"enforce\"");

    start_trial(&lab, "1h").kill();

    assert_eq!(explain(&lab, &["198.51.100.7"])["verdict"], "drop");
}

#[test]
fn an_unload_that_looks_elsewhere_reports_what_is_still_attached() {
    let lab = Lab::start(&Plan::default());
    // What others may write does not say where the pins are.
    let mode = |mode| fs::set_permissions(&lab.config, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o666);

    let refused = lab.pullgate(&["unload"]);

    mode(0o600);
    assert_eq!(refused.status.code(), Some(78), "{}", error(&refused));
    let words = format!("a filter is still attached to {INTERFACE}");
    assert!(error(&refused).contains(&words), "{}", error(&refused));
    assert!(lab.has_pins());
    assert!(lab.pullgate(&["unload"]).status.success());
}

#[test]
fn a_trial_ends_though_its_terminal_is_gone_and_its_filter_was_there_before() {
    let mut lab = monitored_before();
    let link = link_id(&lab, "native");
    lab.configure("mode = \"enforce\"");

    let mut trial = lab.network.command(Host::Origin, daemon::binary());
    trial.arg("--config").arg(&lab.config);
    trial.args(["run", "--only", "filter", "--confirm", "1s"]);
    let mut trial = trial.stderr(Stdio::piped()).spawn().unwrap();
    // Its log has no reader from here on: every line of its log fails.
    drop(trial.stderr.take());
    let ended = trial.wait().unwrap();

    assert_eq!(ended.code(), Some(75));
    assert_eq!(link_id(&lab, "native"), link);
    lab.configure("mode = \"monitor\"");
    assert_eq!(explain(&lab, &["198.51.100.7"])["verdict"], "would_drop");
}

#[test]
fn a_trial_that_is_over_takes_nothing_back_when_it_is_looked_after_once_more() {
    let mut lab = monitored_before();
    lab.configure("mode = \"enforce\"");

    // The role's own look at its links comes each second, also between the end of the trial and of
    // the process.
    let text = fs::read_to_string(&lab.config).unwrap();
    let config = Config::parse(&lab.config, &text).unwrap();
    let active = snapshot::load(&config.boot.paths.snapshot(), &config.live.ranges).unwrap();
    let rules = config.live.ranges.rules(active.set());
    let table = Table::compile(&rules).unwrap();
    lab.network.on(Host::Origin, || {
        let settings = config.live.filter.as_ref().unwrap();
        let mut filter = Filter::start(FilterStart {
            settings,
            base: &config.boot.paths.bpf,
            rules: &rules,
            table: &table,
            lifetime: Lifetime::OnTrial,
            memory: Memory::default(),
        })
        .unwrap();
        filter.revert().unwrap();
        filter.reconcile(Changed::ALL).unwrap();
    });

    lab.configure("mode = \"monitor\"");
    assert_eq!(explain(&lab, &["198.51.100.7"])["verdict"], "would_drop");
}

#[test]
fn unload_ends_a_trial_and_removes_what_was_there_before() {
    let mut lab = Lab::start(&Plan::default());
    assert_eq!(lab.filter.take().unwrap().stop(), Some(0));
    let trial = start_trial(&lab, "1h");

    let unloaded = lab.pullgate(&["unload"]);

    assert!(unloaded.status.success(), "{}", error(&unloaded));
    assert!(!trial.is_answering());
    assert!(!lab.network.path("bpf/pullgate").exists());
}

#[test]
fn a_lost_default_route_does_not_open_the_host() {
    let mut lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    lab.unload();
    ip(&[
        "-n", &namespace, "route", "add", "default", "dev", INTERFACE,
    ]);
    lab.configure("interfaces = \"auto\"");
    lab.start_filter();

    ip(&["-n", &namespace, "route", "del", "default"]);
    assert_eq!(lab.reload()["level"], "INFO");
    assert_matched(&scenarios::strangers_are_dropped(&lab));
    assert_eq!(lab.filter.take().unwrap().stop(), Some(0));
    lab.start_filter();
    assert_matched(&scenarios::strangers_are_dropped(&lab));
}

#[test]
fn a_renamed_interface_keeps_its_link_and_a_missing_one_keeps_nobody_from_starting() {
    let mut lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    let link = link_id(&lab, "native");
    for words in [&["down"][..], &["name", "new0"]] {
        let interface = INTERFACE;
        ip(&[&["-n", &namespace, "link", "set", interface], words].concat());
    }

    lab.configure("interfaces = [\"new0\", \"gone0\"]");
    assert_eq!(lab.reload()["level"], "INFO");

    assert_eq!(mode(&lab, "new0"), "native");
    let pinned = PinnedLink::from_pin(lab.network.pin("native-new0")).unwrap();
    assert_eq!(FdLink::from(pinned).info().unwrap().id(), link);
    let status = lab.filter().status();
    assert_eq!(status["enforcing"], false);
    assert!(
        status["findings"]
            .to_string()
            .contains("`gone0` is not filtered")
    );

    let mark = lab.filter().mark();
    ip(&["-n", &namespace, "link", "add", "gone0", "type", "veth"]);
    lab.filter().event(mark, "the missing one comes", |event| {
        event["interface"] == "gone0"
    });
    assert_eq!(mode(&lab, "gone0"), "native");
}

#[test]
fn a_broken_file_stands_between_nobody_and_the_way_back() {
    let mut lab = Lab::start(&Plan::default());
    lab.configure("prots = [443]");

    let status = lab.pullgate(&["status"]);
    let unloaded = lab.pullgate(&["unload"]);

    let shown = String::from_utf8(status.stdout).unwrap();
    // What is active is not undone by what is on disk.
    assert_eq!(status.status.code(), Some(0));
    assert!(shown.starts_with("PROTECTED, but:"), "{shown}");
    assert!(shown.contains("unknown field `prots`"), "{shown}");
    assert!(shown.contains("attached     wan0 (native)"), "{shown}");
    assert!(unloaded.status.success(), "{}", error(&unloaded));
    assert!(!lab.network.path("bpf/pullgate").exists());
}

#[test]
fn an_ordinary_user_is_told_that_he_is_one() {
    let lab = Lab::start(&Plan::default());
    // Only the directories of the lab itself are in his way.
    for path in ["", "bpf", "run"] {
        let permissions = fs::Permissions::from_mode(0o755);
        fs::set_permissions(lab.network.path(path), permissions).unwrap();
    }
    let pullgate = lab.network.path("pullgate");
    fs::copy(daemon::binary(), &pullgate).unwrap();

    for words in [
        &["explain", "198.51.100.7"][..],
        &["unload"],
        &["run", "--only", "filter"],
    ] {
        let mut command = lab.network.command(Host::Origin, "setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command.arg(&pullgate).arg("--config").arg(&lab.config);
        let refused = command.args(words).output().unwrap();

        assert_eq!(
            refused.status.code(),
            Some(77),
            "{words:?}: {}",
            error(&refused)
        );
        assert!(
            error(&refused).contains("run as root"),
            "{}",
            error(&refused)
        );
    }
}

#[test]
fn the_operators_own_connection_is_not_cut_unless_he_says_so() {
    let mut lab = Lab::start(&Plan::default());
    lab.unload();
    lab.configure("ports = [7443]");
    let address = SocketAddr::new(Host::Origin.addresses()[0], 7443);
    let listener = lab
        .network
        .on(Host::Origin, || TcpListener::bind(address).unwrap());
    let client = lab
        .network
        .on(Host::Stranger, || TcpStream::connect(address).unwrap());
    let (session, _) = listener.accept().unwrap();

    // A shell that holds the connection, as one under sshd does; pullgate is its child.
    let run = |more: &[&str]| {
        let pullgate = daemon::binary();
        let line = format!(
            "{} --config {} run --only filter {}; exit $?",
            pullgate.display(),
            lab.config.display(),
            more.join(" ")
        );
        let mut shell = lab.network.command(Host::Origin, "sh");
        shell
            .args(["-c", &line])
            .stdin(std::os::fd::OwnedFd::from(session.try_clone().unwrap()));
        shell.output().unwrap()
    };
    let refused = run(&[]);
    let cut = run(&["--yes", "--confirm", "100ms"]);

    assert_eq!(refused.status.code(), Some(78), "{}", error(&refused));
    let peer = client.local_addr().unwrap();
    assert!(
        error(&refused).contains(&format!("your own connection from {peer} to port 7443")),
        "{}",
        error(&refused)
    );
    assert!(!lab.has_pins());
    assert_eq!(cut.status.code(), Some(75), "{}", error(&cut));
    assert!(error(&cut).contains("your own connection will be dropped"));
}

fn start_trial(lab: &Lab, time: &str) -> Pullgate {
    Pullgate::start_with(
        &lab.network,
        &lab.config,
        "filter",
        &["--only", "filter", "--confirm", time],
    )
}

fn send(lab: &Lab, host: Host, port: u16) {
    let [source, origin] = [host.addresses()[0], Host::Origin.addresses()[0]];
    let packet = Packet::tcp(source, origin, port).between(Host::Origin.mac(), host.mac());
    Sender::open(&lab.network, host).send(&packet.build());
}

fn some(count: u64) -> Option<u64> {
    Some(count).filter(|count| *count > 0)
}

/// Adds `wan2` to the origin, which is up and leads nowhere.
fn add_second_card(namespace: &str) {
    ip(&[
        "-n", namespace, "link", "add", "wan2", "type", "veth", "peer", "name", "peer2",
    ]);
    for name in ["peer2", "wan2"] {
        ip(&["-n", namespace, "link", "set", name, "up"]);
    }
}

/// Takes away what a boot does: processes and pins, but no file.
fn reboot(lab: &mut Lab) {
    lab.filter.take().unwrap().kill();
    fs::remove_dir_all(lab.network.path("bpf/pullgate")).unwrap();
}

fn attached(lab: &Lab, interface: &str) -> bool {
    let status = lab.filter().status();
    let interfaces = status["filter"]["interfaces"].as_array().unwrap();
    let mut named = interfaces.iter().filter(|it| it["name"] == interface);
    named.any(|it| it["filtered"] == true)
}

fn mode(lab: &Lab, interface: &str) -> String {
    let status = lab.filter().status();
    let interfaces = status["filter"]["interfaces"].as_array().unwrap();
    let found = interfaces
        .iter()
        .find(|status| status["name"] == interface)
        .unwrap();
    assert_eq!(found["filtered"], true);
    found["mode"].as_str().unwrap().to_owned()
}

fn frames(lab: &Lab) -> Value {
    let status = lab.filter().status();
    let metrics = status["metrics"].as_object().unwrap();
    let frames = metrics
        .iter()
        .filter(|(name, _)| name.contains("frames_total"));
    frames
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// A lab whose filter monitors, and goes on without its role.
fn monitored_before() -> Lab {
    let mut lab = Lab::start(&Plan {
        filter: "mode = \"monitor\"",
        ..Plan::default()
    });
    lab.filter.take().unwrap().kill();
    lab
}

fn explain(lab: &Lab, arguments: &[&str]) -> Value {
    let all = [&["explain", "--json"], arguments].concat();
    let output = lab.pullgate(&all);
    assert!(output.status.success(), "{}", error(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn link_id(lab: &Lab, rung: &str) -> u32 {
    let pinned = PinnedLink::from_pin(lab.network.pin(&format!("{rung}-{INTERFACE}"))).unwrap();
    FdLink::from(pinned).info().unwrap().id()
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const NOT_LISTED: Verdict = Verdict::Drop(Reason::NotListed);
