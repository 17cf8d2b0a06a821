//! Verifies that `status` is no wrong all-clear: what stands open beside the filter and behind it is
//! named, when it happens.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;
use tests::daemon::{self, Pullgate};
use tests::net::{Host, INTERFACE, Network};
use tests::pki::Pki;
use tests::web::Server;

#[test]
fn without_a_gate_the_web_server_is_asked_what_it_demands() {
    let origin = Origin::new();
    // Behind the filter there is nobody: it is not known what will be.
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

/// A host with a filter and without a gate.
struct Origin {
    _filter: Pullgate,
    config: PathBuf,
    pki: Pki,
    network: Arc<Network>,
}

impl Origin {
    fn new() -> Self {
        let network = Arc::new(Network::new());
        let pki = Pki::new(&network.path("pki"));
        let config = network.path("pullgate.toml");
        let directory = network.path("").display().to_string();
        let directory = directory.trim_end_matches('/');
        let text = format!(
            "[paths]\nrun = \"{directory}/run\"\nstate = \"{directory}/state\"\n\
             bpf = \"{directory}/bpf/pullgate\"\nfilter = \"{directory}/filter\"\n\
             [filter]\ninterfaces = [\"{INTERFACE}\"]\n\
             [ranges]\nonly = true\nstatic = [\"173.245.48.0/20\", \"2400:cb00::/32\"]\n"
        );
        fs::write(&config, text).unwrap();
        Self {
            _filter: Pullgate::start_all(&network, &config),
            config,
            pki,
            network,
        }
    }

    /// As JSON, and as a text of all warnings.
    fn status(&self) -> (Value, String) {
        let output = daemon::output(&self.network, &self.config, &["status", "--json"]);
        let status: Value = serde_json::from_slice(&output.stdout).unwrap();
        let warnings = status["findings"].to_string();
        (status, warnings)
    }
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
