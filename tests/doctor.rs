//! Verifies `pullgate doctor`: each of its questions has a host that answers it well, and one that does not.

#![expect(
    clippy::unwrap_used,
    reason = "a rig that cannot be made stops the test"
)]

use std::fs;
use std::net::TcpListener;

use serde_json::Value;
use tests::client::Client;
use tests::daemon::{self, Pullgate, binary};
use tests::feed::{Answer, api_answer_without};
use tests::gate::{blog, origin, shop};
use tests::net::Host;
use tests::origin::Origin;
use tests::pki::{BLOG, SHOP};
use tests::web::{Server, Software};
use tests::{Lab, Plan, Rig, Steered, eventually};

/// Cloudflare's own, as it is shipped.
const SHARED_CA: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../filter-user/baseline/authenticated_origin_pull_ca.pem"
);

#[test]
fn settings_of_the_kernel_are_looked_at() {
    let host = Origin::new();
    host.configure("", &host.gate());
    for (setting, bad, good, id) in [
        ("net.ipv4.tcp_syncookies", "0", "1", "syncookies-off"),
        ("net.ipv4.tcp_syncookies", "2", "1", "syncookies-always"),
        ("net.core.somaxconn", "128", "4096", "backlog-short"),
        ("net.ipv4.tcp_timestamps", "0", "1", "timestamps-off"),
    ] {
        let set = |value: &str| {
            let words = ["sysctl", "-w", &format!("{setting}={value}")];
            assert!(host.network.output(Host::Origin, &words).status.success());
        };
        set(bad);
        assert_eq!(
            verdict(&host.doctor().1, "kernel", id),
            "warning",
            "{setting}"
        );
        // As the remedy says.
        set(good);
        assert_eq!(verdict(&host.doctor().1, "kernel", id), "OK", "{setting}");
    }
}

#[test]
fn a_program_beside_the_gate_and_the_shared_ca_in_a_file_admit_any_customer() {
    let host = Origin::new();
    let [v4, _] = Host::Origin.addresses();
    let gate = host.gate();
    host.configure("", &gate);
    let trust = |id: &str| verdict(&host.doctor().1, "trust", id);

    assert_eq!(trust("port-beside-gate"), "OK");
    let beside = host
        .network
        .on(Host::Origin, || TcpListener::bind((v4, 443)).unwrap());
    assert_eq!(trust("port-beside-gate"), "warning");
    drop(beside);
    assert_eq!(trust("shared-ca"), "OK");
    let both = host.network.path("both.pem");
    let own = fs::read_to_string(host.pki.path("ours-ca.pem")).unwrap();
    fs::write(&both, own + &fs::read_to_string(SHARED_CA).unwrap()).unwrap();
    let ours = host.pki.path("ours-ca.pem").display().to_string();
    host.configure("", &gate.replace(&ours, &both.display().to_string()));
    assert_eq!(trust("shared-ca"), "warning");
}

#[test]
fn an_address_that_is_not_judged_is_an_error_where_a_program_answers() {
    let host = Origin::new();
    let [v4, v6] = Host::Origin.addresses();
    let _web_server = host
        .network
        .on(Host::Origin, || TcpListener::bind("[::]:443").unwrap());
    let one = format!("destinations = [\"{v4}\"]");
    host.configure(&one, "");
    let (code, report) = host.doctor();
    assert_eq!(
        verdict(&report, "destinations", "destination-missing"),
        "error"
    );
    assert!(
        report.to_string().contains(&format!("{v6} is an address")),
        "{report:#}"
    );
    assert_eq!(code, 1);

    host.configure(&format!("destinations = [\"{v4}\", \"{v6}\"]"), "");
    let report = host.doctor().1;
    assert_eq!(
        verdict(&report, "destinations", "destination-missing"),
        "OK"
    );
}

#[test]
fn ports_that_a_firewall_redirects_are_found() {
    let host = Origin::new();
    let nft = |rules: &str| {
        let output = host.network.output(Host::Origin, &["nft", rules]);
        assert!(output.status.success(), "{output:?}");
    };
    nft(
        "add table ip nat; add chain ip nat prerouting { type nat hook prerouting priority -100; }",
    );
    assert_eq!(verdict(&host.doctor().1, "ports", "port-redirected"), "OK");
    nft("add rule ip nat prerouting tcp dport { 8443, 10000-10010 } dnat to 192.0.2.9:443");

    let report = host.doctor().1;
    assert_eq!(verdict(&report, "ports", "port-redirected"), "warning");
    assert!(report.to_string().contains("port 8443"), "{report:#}");
    // As the remedy says; what is redirected is not for the host to answer then.
    host.configure("ports = [443, 8443]", "");
    let report = host.doctor().1;
    assert_eq!(verdict(&report, "ports", "port-redirected"), "warning");
    assert!(
        report
            .to_string()
            .contains("redirected connections are lost"),
        "{report:#}"
    );
    host.configure("ports = [443, 8443]\nsyn_cookies = \"off\"", "");
    assert_eq!(verdict(&host.doctor().1, "ports", "port-redirected"), "OK");
    // Steering comes after it, however well the port is protected.
    let steered = format!("[gate]\nsteer = true\n{}", host.gate());
    host.configure("ports = [443, 8443]", &steered);
    let report = host.doctor().1;
    assert_eq!(verdict(&report, "ports", "port-redirected"), "error");
    nft("flush chain ip nat prerouting");
    assert_eq!(verdict(&host.doctor().1, "ports", "port-redirected"), "OK");
}

#[test]
fn a_neighbour_that_reaches_loopback_is_found_where_connections_are_steered() {
    let host = Origin::new();
    let set = |value: &str| {
        let words = format!("sysctl -w net.ipv4.conf.wan0.route_localnet={value}");
        let words: Vec<_> = words.split(' ').collect();
        assert!(host.network.output(Host::Origin, &words).status.success());
    };
    set("1");
    // The gate that has the port itself listens at no address of the web server's.
    host.configure("", &host.gate());
    assert_eq!(verdict(&host.doctor().1, "ports", "loopback-routed"), "OK");
    let steered = format!("[gate]\nsteer = true\n{}", host.gate());
    host.configure("", &steered);
    let report = host.doctor().1;
    assert_eq!(verdict(&report, "ports", "loopback-routed"), "warning");
    // As the remedy says.
    set("0");
    assert_eq!(verdict(&host.doctor().1, "ports", "loopback-routed"), "OK");
}

#[test]
fn errors_521_and_522_have_their_causes() {
    let host = Origin::new();
    let text = fs::read_to_string(&host.config).unwrap();
    let cloudflare = |lines: &str| {
        let (before, _) = text.split_once("[ranges]").unwrap();
        fs::write(&host.config, format!("{before}[ranges]\n{lines}\n")).unwrap();
    };
    // No program listens: Cloudflare is refused, and says 521.
    let silent = |report: &Value| verdict(report, "listening", "port-silent");
    cloudflare("");
    let report = host.doctor().1;
    assert_eq!(silent(&report), "error");
    assert!(report.to_string().contains("error 521"), "{report:#}");
    let web_server = host
        .network
        .on(Host::Origin, || TcpListener::bind("0.0.0.0:443").unwrap());
    assert_eq!(silent(&host.doctor().1), "OK");
    drop(web_server);

    // A rule of the operator's keeps Cloudflare out.
    let refused = |report: &Value| verdict(report, "cloudflare", "cloudflare-refused");
    assert_eq!(refused(&host.doctor().1), "OK");
    cloudflare("deny = [\"172.64.0.0/13\"]");
    let (code, report) = host.doctor();
    assert_eq!(refused(&report), "error");
    assert_eq!(code, 1);
    let text = report.to_string();
    assert!(
        text.contains("172.64.0.0 of Cloudflare's 172.64.0.0/13 is refused"),
        "{text}"
    );
    assert!(text.contains("`ranges.deny`"), "{text}");
    assert!(text.contains("error 522"), "{text}");
}

#[test]
fn lists_of_the_operators_own_are_compared_with_cloudflares() {
    let mut lab = Lab::start(&Plan::default());
    let with = |lab: &mut Lab, sources: &'static str| {
        // A role that runs reaches no other port than it has needed.
        lab.ranges.take().unwrap().kill();
        lab.configure_sources(sources);
        lab.start_ranges();
        lab.ranges().event(0, "the new source is asked", |event| {
            event["id"] == "ranges-refreshed"
        });
        let report = lab.pullgate(&["--json", "doctor"]).stdout;
        serde_json::from_slice::<Value>(&report).unwrap()
    };

    let report = with(
        &mut lab,
        "[{ url = \"@FEED@/client/v4/ips\", ca_file = \"@CA@\" }]",
    );
    assert_eq!(verdict(&report, "cloudflare", ""), "OK");
    lab.mirror
        .answer(Answer::Body(api_answer_without("131.0.72.0/22")));
    let lacking = "[{ url = \"@MIRROR@/client/v4/ips\", ca_file = \"@CA@\" }]";
    let report = with(&mut lab, lacking);
    let unlisted = verdict(&report, "cloudflare", "cloudflare-unlisted");
    assert_eq!(unlisted, "warning", "{report:#}");
    let text = report.to_string();
    assert!(
        text.contains("1 of Cloudflare's 22 published ranges are in no active list (131.0.72.0/22"),
        "{text}"
    );
    // Another network's list is not expected to have them.
    let like =
        "[{ url = \"@MIRROR@/client/v4/ips\", ca_file = \"@CA@\", like = \"cloudflare-jdcloud\" }]";
    lab.configure_sources(like);
    let report: Value =
        serde_json::from_slice(&lab.pullgate(&["--json", "doctor"]).stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.iter().all(|check| check["id"] != "cloudflare"));
}

#[test]
fn rules_that_admit_half_of_the_internet_are_named() {
    let host = Origin::new();
    let text = fs::read_to_string(&host.config).unwrap();
    for (allow, expected) in [
        (
            "\"10.0.0.0/8\", \"172.16.0.0/12\", \"64.0.0.0/8\", \"fd00::/8\", \"2600::/20\"",
            "OK",
        ),
        ("\"0.0.0.0/1\"", "warning"),
        ("\"64.0.0.0/8\", \"192.0.2.1\"", "warning"),
        ("\"2600::/19\"", "warning"),
        ("\"2000::/3\"", "warning"),
    ] {
        let line = format!("[ranges]\nallow = [{allow}]");
        fs::write(&host.config, text.replace("[ranges]", &line)).unwrap();
        let report = host.doctor().1;
        assert_eq!(verdict(&report, "allow", "allow-wide"), expected, "{allow}");
    }
}

#[test]
fn errors_520_and_525_have_the_reason_of_the_refusal() {
    let rig = Rig::with_shop("");
    assert_eq!(verdict(&doctor(&rig), "refusals", "clients-refused"), "OK");
    for (client, name, reason, error) in [
        (
            Client::new(&rig.pki, None),
            SHOP,
            "NoCertificate",
            "error 520 or 525",
        ),
        (
            rig.edge(),
            "unknown.example",
            "UnknownServerName",
            "error 525",
        ),
        (rig.edge(), SHOP, "UpstreamUnreachable", "error 520"),
    ] {
        // What the client sees is another test's matter.
        drop(client.get(&rig.network, Host::Edge, origin(), name));
        let report = doctor(&rig);
        assert_eq!(verdict(&report, "refusals", "clients-refused"), "warning");
        // Nothing listens behind the gate.
        assert_eq!(verdict(&report, "upstream", "upstream-silent"), "error");
        let text = report.to_string();
        assert!(text.contains(reason), "{text}");
        assert!(text.contains(error), "{text}");
    }
}

#[test]
fn a_web_server_that_expects_another_header_is_asked_both_ways() {
    for (server, header, words) in [
        ("nginx", "", "proxy_protocol"),
        ("apache", "", "RemoteIPProxyProtocol On"),
    ] {
        let rig = Rig::new();
        let verdict_with = |protocol: &str| {
            rig.configure("", &[&shop(&format!("proxy_protocol = \"{protocol}\""))]);
            let report = doctor(&rig);
            let found = verdict(&report, "upstream", "proxy-header-mismatch");
            (found, report.to_string())
        };
        {
            let _plain = web_server(&rig, server, header);
            let (found, text) = verdict_with("v2");
            assert_eq!(found, "error", "{server}: {text}");
            assert!(
                text.contains("serves with `proxy_protocol = \\\"none\\\"`"),
                "{server}: {text}"
            );
            assert_eq!(verdict_with("v1").0, "error", "{server}");
            assert_eq!(verdict_with("none").0, "OK", "{server}");
        }
        let _expecting = web_server(&rig, server, words);
        let (found, text) = verdict_with("none");
        assert_eq!(found, "error", "{server}: {text}");
        assert!(
            text.contains("serves with `proxy_protocol = \\\"v2\\\"`"),
            "{server}: {text}"
        );
        assert_eq!(verdict_with("v2").0, "OK", "{server}");
    }
}

#[test]
fn a_web_server_without_room_for_tlvs_and_one_with_another_certificate_are_named() {
    let rig = Rig::new();
    let pki = rig.pki.path("").display().to_string();
    let words = format!(
        "ssl proxy_protocol; ssl_certificate {pki}blog.example.pem; ssl_certificate_key {pki}blog.example.key"
    );
    let _nginx = web_server(&rig, "nginx", &words);
    let findings_with = |header: &str, name: &str| {
        let host = shop(&format!(
            "{header}\nupstream_tls = {{ name = \"{name}\", ca_file = \"@PKI@/web-ca.pem\" }}"
        ));
        rig.configure("", &[&host]);
        let report = doctor(&rig);
        let found = ["proxy-header-mismatch", "upstream-distrusted"];
        (
            found.map(|id| verdict(&report, "upstream", id)),
            report.to_string(),
        )
    };

    // nginx 1.22 has none.
    let (found, text) = findings_with("", BLOG);
    assert_eq!(found, ["error", "OK"], "{text}");
    assert!(
        text.contains("write `proxy_protocol = \\\"v2\\\"` and `proxy_tlvs = false`"),
        "{text}"
    );
    assert_eq!(findings_with("proxy_tlvs = false", BLOG).0, ["OK", "OK"]);
    let (found, text) = findings_with("proxy_tlvs = false", SHOP);
    assert_eq!(found, ["OK", "error"], "{text}");
    let tls = format!("upstream_tls = {{ name = \"{BLOG}\", ca_file = \"@PKI@/web-ca.pem\" }}");
    rig.configure(
        "",
        &[&shop(&format!("proxy_tlvs = false\n{tls}")), &blog(&tls)],
    );
    let second = verdict(&doctor(&rig), "upstream", "proxy-header-mismatch");
    assert_eq!(second, "error", "two hosts, one web server");
    assert!(
        text.contains("set `upstream_tls.name` to a name on it"),
        "{text}"
    );
}

/// nginx or Apache behind the gate, with these words about the header.
fn web_server(rig: &Rig, server: &str, words: &str) -> Server {
    if server == "nginx" {
        let text = format!(
            "daemon off; user root; pid @DIR@/nginx.pid; error_log @DIR@/nginx.log; events {{}}\n\
             http {{ access_log off; @NGINX@\nserver {{ listen 127.0.0.1:8080 {words}; return 204; }} }}"
        );
        return Server::start(&rig.network, "nginx", &[], &text);
    }
    let text = format!(
        "ServerRoot @DIR@\nServerName origin.example\nPidFile @DIR@/apache.pid\nErrorLog @DIR@/apache.log\n\
         Mutex file:@DIR@\n@APACHE@\nListen 127.0.0.1:8080\n<VirtualHost 127.0.0.1:8080>\n{words}\n</VirtualHost>\n"
    );
    Server::start(&rig.network, "apache2", &["-DFOREGROUND", "-f"], &text)
}

#[test]
fn sites_of_the_web_server_that_demand_nothing_are_named() {
    let host = Origin::new();
    let pki = host.pki.path("").display().to_string();
    let directory = host.network.path("nginx");
    fs::create_dir(&directory).unwrap();
    let write = |blog: &str, more: &str| {
        let site = |name: &str, lines: &str| {
            format!(
                "server {{ listen 443 ssl; server_name {name}; ssl_certificate {pki}{name}.pem; \
                 ssl_certificate_key {pki}{name}.key; {lines} }}\n"
            )
        };
        let demand =
            format!("ssl_client_certificate {pki}ours-ca.pem; ssl_verify_client on; {more}");
        let reject = "server { listen 443 ssl default_server; ssl_reject_handshake on; }";
        let sites = site(SHOP, &demand) + &site(BLOG, &format!("{blog} {more}")) + reject;
        let main = format!(
            "pid {0}/nginx.pid; error_log {0}/error.log;\nevents {{}}\nhttp {{ access_log off;\n{sites}}}\n",
            host.network.path("").display()
        );
        fs::write(directory.join("nginx.conf"), main).unwrap();
    };
    let doctor = || {
        let script = format!(
            "mount --bind {} /etc/nginx && exec {} --config {} --json doctor",
            directory.display(),
            binary().display(),
            host.config.display()
        );
        let words = ["unshare", "--mount", "--", "sh", "-c", &script];
        let output = host.network.output(Host::Origin, &words);
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    // One is open, and sessions of one are worth something at the other.
    write("", "");
    let report = doctor();
    assert_eq!(verdict(&report, "sites", "site-without-demand"), "error");
    assert!(
        report.to_string().contains("blog.example serves clients"),
        "{report:#}"
    );
    assert_eq!(verdict(&report, "sites", "sessions-shared"), "warning");

    // As the snippet has it.
    let closed = format!("ssl_client_certificate {pki}other-ca.pem; ssl_verify_client on;");
    write(&closed, "ssl_session_tickets off; ssl_session_cache none;");
    let report = doctor();
    assert_eq!(verdict(&report, "sites", "site-without-demand"), "OK");
    assert_eq!(verdict(&report, "sites", "sessions-shared"), "OK");

    // Both at once: the CA of every customer, and a port that is not protected.
    fs::copy(SHARED_CA, format!("{pki}cloudflare-ca.pem")).unwrap();
    let shared = format!(
        "ssl_client_certificate {pki}cloudflare-ca.pem; ssl_verify_client on; listen 4443 ssl;"
    );
    write(&shared, "ssl_session_tickets off; ssl_session_cache none;");
    let report = doctor();
    assert_eq!(
        verdict(&report, "sites", "site-admits-any-customer"),
        "warning"
    );
    assert_eq!(verdict(&report, "sites", "site-on-open-port"), "warning");
    assert!(report.to_string().contains("port 4443"), "{report:#}");
    write(&closed, "ssl_session_tickets off; ssl_session_cache none;");
    let report = doctor();
    assert_eq!(verdict(&report, "sites", ""), "OK");

    fs::write(directory.join("nginx.conf"), "nonsense").unwrap();
    let report = doctor();
    assert_eq!(verdict(&report, "sites", "sites-unreadable"), "warning");
    assert!(
        report.to_string().contains("unexpected end of file"),
        "{report:#}"
    );
}

#[test]
fn a_host_that_is_in_order_has_no_error_and_a_broken_one_says_what_is_wrong() {
    let host = Origin::new();
    let gate = host.gate();
    host.configure("", &gate);
    let running = Pullgate::start(&host.network, &host.config, "gate");
    let reloaded = daemon::output(&host.network, &host.config, &["reload"]);
    assert!(reloaded.status.success(), "{reloaded:?}");
    let _web_server = host.network.on(Host::Origin, || {
        TcpListener::bind("127.0.0.1:8080").unwrap()
    });
    let report = host.doctor().1;
    for question in [
        "configuration",
        "roles",
        "interfaces",
        "enforcing",
        "kernel-ranges",
    ] {
        assert_eq!(
            verdict(&report, question, ""),
            "OK",
            "{question}: {report:#}"
        );
    }
    drop(running);

    let (code, report) = host.doctor();
    assert_eq!(code, 1);
    assert_eq!(verdict(&report, "roles", "role-not-running"), "error");
    // What is attached nowhere drops nothing.
    let unloaded = daemon::output(&host.network, &host.config, &["unload"]);
    assert!(unloaded.status.success(), "{unloaded:?}");
    let report = host.doctor().1;
    assert_eq!(verdict(&report, "interfaces", ""), "error", "{report:#}");
    for question in ["enforcing", "attachment", "kernel-ranges"] {
        assert_eq!(verdict(&report, question, ""), "not known", "{question}");
    }
    assert_eq!(verdict(&report, "port", ""), "not known");
    host.configure("", &gate.replace("ours-ca.pem", "gone.pem"));
    let (code, report) = host.doctor();
    assert_eq!(code, 1);
    assert_eq!(verdict(&report, "configuration", "start-refused"), "error");
    fs::write(&host.config, "nonsense").unwrap();
    let (code, report) = host.doctor();
    assert_eq!(code, 1);
    assert_eq!(
        verdict(&report, "configuration", "configuration-unusable"),
        "error"
    );
}

#[test]
fn each_role_that_does_not_run_is_named() {
    let rig = Steered::new(Software::Nginx, "", "");
    let output = rig.pullgate(&["--json", "doctor"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap().iter();
    let roles = checks.filter(|check| check["id"] == "roles");
    let findings = roles.flat_map(|check| check["findings"].as_array().unwrap());
    let missing = findings.filter(|finding| finding["id"] == "role-not-running");
    let missing: Vec<_> = missing.map(|it| it["role"].as_str().unwrap()).collect();

    // What visitors see depends on which it is.
    assert_eq!(missing, ["filter", "ranges", "gate"], "{report:#}");
}

#[test]
fn a_web_server_that_shows_another_certificate_than_the_gate_expects_is_named() {
    let rig = Steered::start(Software::Nginx, "", "");
    let doctor = || {
        let output = rig.pullgate(&["--json", "doctor"]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        verdict(&report, "upstream", "upstream-distrusted")
    };
    assert_eq!(doctor(), "OK");

    rig.pki.renew(SHOP);
    assert_eq!(doctor(), "error");
    // As the remedy says.
    rig.web.reload();
    eventually("nginx shows the new one", || {
        (doctor() == "OK").then_some(())
    });
}

#[test]
fn generic_xdp_on_one_processor_is_named() {
    if std::thread::available_parallelism().unwrap().get() == 1 {
        tests::skip(
            "generic_xdp_on_one_processor_is_named",
            "this machine has one processor",
        );
        return;
    }
    let mut lab = Lab::start(&Plan::default());
    let add = ["ip", "link", "add", "br0", "type", "bridge"];
    assert!(lab.network.output(Host::Origin, &add).status.success());
    lab.unload();
    lab.configure("interfaces = [\"wan0\", \"br0\"]");
    lab.start_filter();
    let doctor = |processors: &str| {
        // The interfaces of the namespace, and of no other.
        let script = format!(
            "mount -t sysfs none /sys && echo {processors} >/sys/class/net/br0/queues/rx-0/rps_cpus && \
             exec {} --config {} --json doctor",
            binary().display(),
            lab.config.display()
        );
        let words = ["unshare", "--mount", "--", "sh", "-c", &script];
        let output = lab.network.output(Host::Origin, &words);
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };

    let report = doctor("0");
    assert_eq!(
        verdict(&report, "receiving", "one-processor-receives"),
        "warning"
    );
    // As the remedy says.
    let report = doctor("3");
    assert_eq!(
        verdict(&report, "receiving", "one-processor-receives"),
        "OK"
    );
}

fn doctor(rig: &Rig) -> Value {
    let output = rig.pullgate(&["--json", "doctor"]);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// How bad a finding is among those of a question; OK, if it is not there, or if there is none at all where
/// no finding is named.
fn verdict(report: &Value, question: &str, id: &str) -> String {
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["id"] == question);
    assert!(check.is_some(), "{question} is not asked: {report:#}");
    let check = check.unwrap();
    if check["answered"] == false {
        return "not known".to_owned();
    }
    let findings = check["findings"].as_array().unwrap();
    let found = findings
        .iter()
        .find(|finding| id.is_empty() || finding["id"] == id);
    found
        .map_or("OK", |finding| finding["severity"].as_str().unwrap())
        .to_owned()
}
