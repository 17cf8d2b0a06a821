//! Verifies that `status` is no wrong all-clear: what stands open beside the filter and behind it is
//! named, when it happens.

use std::net::TcpListener;

use tests::daemon::{self, Pullgate};
use tests::net::Host;
use tests::origin::Origin;
use tests::web::Server;

#[test]
fn without_a_gate_the_web_server_is_asked_what_it_demands() {
    let origin = Origin::new();
    // Behind the filter there is no web server: it is not known what will be.
    assert_eq!(origin.status().0["admits"], "unknown");
    let demand = "ssl_client_certificate @DIR@/pki/ours-ca.pem;\n        ssl_verify_client on;";
    let shared = demand.replace("ours-ca", "cloudflare-ca");
    origin.pki.write("cloudflare-ca.pem", CLOUDFLARE_CA);
    for (listen, lines, admits, word) in [
        (
            "443 ssl",
            "",
            "cloudflare",
            "serves clients without a certificate (200)",
        ),
        ("443 ssl", demand, "defaultsite", ""),
        (
            "443 ssl",
            &shared,
            "cloudflare",
            "a certificate of Cloudflare's shared CA",
        ),
        ("443", "", "cloudflare", "speaks no TLS"),
        (
            "[::]:443 ssl",
            "",
            "cloudflare",
            "serves clients without a certificate (200)",
        ),
    ] {
        let nginx = NGINX.replace("@LISTEN@", listen).replace("@LINES@", lines);
        let address = if listen.contains("::") {
            "[::1]:443"
        } else {
            "127.0.0.1:443"
        };
        let _nginx = Server::start_at(&origin.network, "nginx", &[], &nginx, address);
        let (status, text) = origin.status();
        assert_eq!(status["protected"], true, "{status:?}");
        assert_eq!(status["admits"], admits, "{listen} {lines}");
        assert!(text.contains(word), "{listen}: {text}");
        assert_eq!(
            text.contains("any Cloudflare customer"),
            admits == "cloudflare",
            "{text}"
        );
        let check = daemon::output(&origin.network, &origin.config, &["check"]);
        let check = String::from_utf8(check.stderr).unwrap();
        assert!(check.contains(word), "{listen}: {check}");
    }
    // It refuses the handshake itself, as TLS 1.3 and 1.2 have it.
    for version in ["-tls1_3", "-tls1_2"] {
        let pki = origin.network.path("pki");
        let [certificate, key] = ["shop.example.pem", "shop.example.key"]
            .map(|file| pki.join(file).display().to_string());
        let words = [
            "s_server",
            "-www",
            "-quiet",
            version,
            "-accept",
            "443",
            "-Verify",
            "1",
            "-verify_return_error",
            "-cert",
            &certificate,
            "-key",
            &key,
            "-CAfile",
        ];
        let ours = origin.pki.ours.pem();
        let _server = Server::start_at(&origin.network, "openssl", &words, ours, "127.0.0.1:443");
        assert_eq!(origin.status().0["admits"], "defaultsite", "{version}");
    }
}

#[test]
fn a_program_on_another_port_that_cloudflare_proxies_is_named_while_it_is_there() {
    let origin = Origin::new();
    let warning = |port: u16| format!("a program answers strangers on port {port},");
    assert!(!origin.status().1.contains("answers strangers"));

    {
        let listen = |address: &str| {
            origin
                .network
                .on(Host::Origin, || TcpListener::bind(address).unwrap())
        };
        let _listeners = [
            listen("0.0.0.0:80"),
            listen("[::]:8443"),
            listen("127.0.0.1:8080"),
            listen("0.0.0.0:22"),
        ];
        let (status, text) = origin.status();
        for port in [80, 8443] {
            assert!(text.contains(&warning(port)), "{port}: {text}");
        }
        for port in [22, 443, 8080] {
            assert!(!text.contains(&warning(port)), "{port}: {text}");
        }
        assert_eq!(status["protected"], true);
    }
    assert!(!origin.status().1.contains("answers strangers"));
}

#[test]
fn ports_of_this_hosts_own_connections_are_named_until_they_are_reserved() {
    let origin = Origin::new();
    origin.configure("ports = [443, 8443]", "");
    let sysctl = |line: &str| {
        let output = origin.network.output(Host::Origin, &["sysctl", "-w", line]);
        assert!(output.status.success(), "{output:?}");
    };
    let words = "outgoing connections may use protected ports (8443)";
    assert!(!origin.check().contains("outgoing"));
    sysctl("net.ipv4.ip_local_port_range=1024 65535");
    assert!(origin.check().contains(words), "{}", origin.check());
    assert!(origin.status().1.contains(words));
    // As the remedy says.
    sysctl("net.ipv4.ip_local_reserved_ports=8443");
    assert!(!origin.check().contains("outgoing"));
}

#[test]
fn guests_behind_a_filtered_port_of_a_bridge_are_named() {
    let origin = Origin::new();
    assert!(!origin.check().contains("bridge"));
    let commands = [
        "ip link add guest type veth peer name guest-end",
        "ip link add br0 type bridge",
        "ip link set guest master br0",
    ];
    for command in commands {
        let words: Vec<_> = command.split(' ').collect();
        assert!(origin.network.output(Host::Origin, &words).status.success());
    }
    origin.configure("interfaces = [\"guest\"]", "");
    let words = "`guest` is a port of the bridge `br0`";
    assert!(origin.check().contains(words), "{}", origin.check());
    // As the remedies say.
    origin.configure("interfaces = [\"br0\"]", "");
    assert!(!origin.check().contains("is a port of"));
    let [address, _] = Host::Origin.addresses();
    let named = format!("interfaces = [\"guest\"]\ndestinations = [\"{address}\"]");
    origin.configure(&named, "");
    assert!(!origin.check().contains("is a port of"));
}

#[test]
fn whatever_is_in_the_gates_way_is_named_with_its_holder() {
    let origin = Origin::new();
    let gate = origin.gate();
    origin.configure("", &gate);
    let silent = "no web server answers on 127.0.0.1:8080";
    assert!(origin.check().contains(silent), "{}", origin.check());
    {
        let listen = |address: &str| {
            let network = &origin.network;
            network.on(Host::Origin, || TcpListener::bind(address).unwrap())
        };
        let _listeners = [listen("127.0.0.1:8080"), listen("0.0.0.0:443")];
        let check = origin.check();
        let holder = format!("(pid {}) listens on 0.0.0.0:443", std::process::id());
        assert!(check.contains(&holder), "{check}");
        assert!(!check.contains(silent), "{check}");
    }
    assert!(!origin.check().contains("listens on"));
    {
        // One socket for both families (Rust's `TcpListener`), in the way of IPv4 alone.
        let for_both = || TcpListener::bind("[::]:443").unwrap();
        let _both = origin.network.on(Host::Origin, for_both);
        let ipv4 = format!("[gate]\nlisten = [\"0.0.0.0:443\"]\n{gate}");
        origin.configure("", &ipv4);
        let check = origin.check();
        assert!(check.contains("listens on [::]:443"), "{check}");
        origin.configure("", &gate);
    }
    // The gate is not in its own way.
    let _gate = Pullgate::start(&origin.network, &origin.config, "gate");
    assert!(!origin.check().contains("listens on"), "{}", origin.check());
}

#[test]
fn files_on_disk_that_the_gate_could_not_read_are_named_before_it_is_asked_to() {
    let origin = Origin::new();
    let gate = origin.gate();
    origin.configure("", &gate);
    let _gate = Pullgate::start(&origin.network, &origin.config, "gate");
    assert!(!origin.status().1.contains("on disk"));
    origin.configure("", &gate.replace("ours-ca.pem", "gone.pem"));
    let (status, text) = origin.status();
    assert!(text.contains("gone.pem cannot be read"), "{text}");
    assert!(text.contains("files-on-disk-unusable"), "{text}");
    // What runs goes on.
    assert_eq!(status["protected"], true, "{text}");
}

const CLOUDFLARE_CA: &str =
    include_str!("../filter-user/baseline/authenticated_origin_pull_ca.pem");
const NGINX: &str = r#"
daemon off;
pid @DIR@/nginx.pid;
error_log @DIR@/nginx.log;
events {}
http {
    access_log off;
    @NGINX@
    server {
        listen @LISTEN@;
        ssl_certificate @DIR@/pki/shop.example.pem;
        ssl_certificate_key @DIR@/pki/shop.example.key;
        @LINES@
        location / { return 200 "served\n"; }
    }
}
"#;
