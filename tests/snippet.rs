//! Verifies what `pullgate snippet` prints: each variant is loaded by the real server, lets in whom it
//! should and no other client.

#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::fs;
use std::time::Duration;

use tests::Rig;
use tests::client::{Client, Reply};
use tests::gate::{blog, origin, shop};
use tests::net::Host;
use tests::pki::{BLOG, SHOP};
use tests::snippets::{APACHE, HAPROXY, HAPROXY_APPLICATION, print, start};
use tests::web::Server;
use time::OffsetDateTime;

#[test]
fn a_server_behind_the_gate_is_told_who_asks() {
    for (server, proxy) in [
        ("nginx", "v2"),
        ("nginx", "none"),
        ("apache", "v2"),
        ("apache", "v1"),
        ("haproxy", "v2"),
        ("caddy", "none"),
    ] {
        let mut rig = Rig::new();
        let how = format!("proxy_protocol = \"{proxy}\"");
        rig.start("", &[&shop_and_more(&how), &blog(&how)]);
        let _server = start(&rig, server, "--behind-gate");

        let (reply, outcome) = rig.ask(&rig.edge(), SHOP);

        let Reply::Response(200, body) = reply else {
            panic!("{server} {proxy}: {reply}, {outcome}");
        };
        let [edge, _] = Host::Edge.addresses();
        // A file server does not tell whom it serves.
        let seen = match (server, proxy) {
            ("caddy", _) => "page".to_owned(),
            (_, "none") => "127.0.0.1".to_owned(),
            _ => edge.to_string(),
        };
        assert!(body.contains(&seen), "{server} {proxy}: {body}");
    }
}

#[test]
fn redirects_stay_on_https_and_on_the_visitors_port() {
    for server in ["nginx", "apache"] {
        let mut rig = Rig::new();
        rig.start("", &[&shop(""), &blog("")]);
        let _server = start(&rig, server, "--behind-gate");
        fs::create_dir(rig.network.path("htdocs/dir")).unwrap();
        rig.pki.write_identity("client", &rig.pki.ours.client());

        let there = format!("{SHOP}:443:{}", origin());
        let script = format!(
            "curl --silent --max-time 5 --output /dev/null --write-out '%{{redirect_url}}' --resolve {there} \
             --cacert @PKI@/web-ca.pem --cert @PKI@/client.pem --key @PKI@/client.key https://{SHOP}/dir"
        );
        let location = rig.on_edge(&["sh", "-c", &script]);

        assert_eq!(location, format!("https://{SHOP}/dir/"), "{server}");
    }
}

#[test]
fn a_server_that_demands_the_certificate_itself_lets_in_nobody_else() {
    for server in ["nginx", "apache", "haproxy", "caddy"] {
        let rig = Rig::new();
        // HAProxy has one CA file for an address.
        let (lines, theirs) = match server {
            "haproxy" => ("trust = [\"@PKI@/ours-ca.pem\"]", &rig.pki.ours),
            _ => ("", &rig.pki.other),
        };
        rig.configure("", &[&shop_and_more(""), &blog(lines)]);
        let _server = start(&rig, server, "--own-mtls");
        let ask = |client: &Client, name: &str| {
            let (reply, _) = client.get(&rig.network, Host::Edge, origin(), name);
            reply.brief()
        };
        let of =
            |authority: &tests::pki::Authority| Client::new(&rig.pki, Some(&authority.client()));

        assert_eq!(ask(&rig.edge(), SHOP), "200", "{server}");
        assert_eq!(ask(&of(theirs), BLOG), "200", "{server}");
        for (who, client) in [
            ("no certificate", Client::new(&rig.pki, None)),
            ("another CA's", of(&rig.pki.other)),
            ("the shared CA's", of(&rig.pki.shared)),
        ] {
            assert_ne!(ask(&client, SHOP), "200", "{server}: {who}");
        }
        // A name of another customer's, which leads here: he verifies nothing.
        serves_no_unknown_name(&rig, server);
        // QUIC would lead around a filter of TCP.
        let listening = ["ss", "--no-header", "--listening", "--udp", "--numeric"];
        let listening = rig.network.output(Host::Origin, &listening);
        assert_eq!(String::from_utf8_lossy(&listening.stdout), "", "{server}");
    }
}

#[test]
fn a_server_that_demands_the_certificate_itself_demands_as_much() {
    for server in ["nginx", "apache", "haproxy", "caddy"] {
        let rig = Rig::new();
        let counts = server == "nginx" || server == "apache";
        let depth = if counts { "max_depth = 1\n" } else { "" };
        let lines = format!("min_tls = \"1.3\"\n{depth}trust = [\"@PKI@/ours-ca.pem\"]");
        rig.configure("", &[&shop(&lines), &blog(&lines)]);
        let _server = start(&rig, server, "--own-mtls");
        let one = rig.pki.ours.intermediate("one", |_| ());
        let two = one.intermediate("two", |_| ());
        let ask = |client: &Client| {
            let (reply, _) = client.get(&rig.network, Host::Edge, origin(), SHOP);
            reply.brief()
        };
        let of = |identity| Client::new(&rig.pki, Some(&identity));

        assert_eq!(ask(&rig.edge()), "200", "{server}");
        assert_eq!(ask(&of(one.client().through(&[&one]))), "200", "{server}");
        let long = ask(&of(two.client().through(&[&two, &one])));
        assert_eq!(long == "200", !counts, "{server}: {long}");
        let ours = rig.pki.ours.client();
        let old = Client::speaking(&rig.pki, Some(&ours), &[&rustls::version::TLS12]);
        assert_ne!(ask(&old), "200", "{server}: TLS 1.2");
    }
}

#[test]
fn sites_that_are_there_include_what_they_lack() {
    for (server, pairing) in [
        ("nginx", "--behind-gate"),
        ("nginx", "--own-mtls"),
        ("apache", "--behind-gate"),
        ("apache", "--own-mtls"),
    ] {
        let mut rig = Rig::new();
        // Behind the gate, both have the same upstream, and so the same file.
        let hosts = [shop(""), blog("")];
        if pairing == "--behind-gate" {
            rig.start("", &hosts.each_ref().map(String::as_str));
        } else {
            rig.configure("", &hosts.each_ref().map(String::as_str));
        }
        let output = rig.pullgate(&["snippet", server, pairing, "--include"]);
        let text = String::from_utf8(output.stdout).unwrap();
        let files = files(&text);
        for (name, content) in &files {
            fs::write(rig.network.path(name), content).unwrap();
        }
        let names: Vec<_> = files.iter().map(|(name, _)| name.as_str()).collect();
        let expected: &[&str] = match (server, pairing) {
            ("nginx", "--behind-gate") => &["snippets-pullgate.conf"],
            ("nginx", _) => &[
                "conf.d-pullgate.conf",
                "snippets-pullgate.conf",
                "snippets-pullgate-2.conf",
            ],
            (_, "--behind-gate") => &["sites-enabled-000-pullgate.conf", "apache2-pullgate.conf"],
            (_, _) => &[
                "sites-enabled-000-pullgate.conf",
                "apache2-pullgate.conf",
                "apache2-pullgate-2.conf",
            ],
        };
        assert_eq!(names, expected, "{text}");
        let _server = start_site(&rig, server, pairing);

        let (reply, _) = rig.edge().get(&rig.network, Host::Edge, origin(), SHOP);

        let Reply::Response(200, body) = reply else {
            panic!("{server} {pairing}: {reply}");
        };
        // What is particular to the site is still served.
        assert!(body.contains("of the site"), "{body}");
        if pairing == "--own-mtls" {
            let stranger = Client::new(&rig.pki, None);
            let (reply, _) = stranger.get(&rig.network, Host::Edge, origin(), SHOP);
            assert_ne!(reply.brief(), "200", "{server}");
            let theirs = Client::new(&rig.pki, Some(&rig.pki.other.client()));
            let (reply, _) = theirs.get(&rig.network, Host::Edge, origin(), SHOP);
            assert_ne!(reply.brief(), "200", "{server}");
            let (reply, _) = theirs.get(&rig.network, Host::Edge, origin(), BLOG);
            assert_eq!(reply.brief(), "200", "{server}");
            // A name of another customer's, which leads here.
            serves_no_unknown_name(&rig, server);
        }
    }
    let output = Rig::new().pullgate(&["snippet", "haproxy", "--own-mtls", "--include"]);
    assert_eq!(output.status.code(), Some(64));
}

#[test]
fn each_upstream_has_a_place_of_its_own() {
    let mut rig = Rig::new();
    let elsewhere = format!(
        "upstream = \"unix:{}\"",
        rig.network.path("web.sock").display()
    );
    rig.start("", &[&shop(""), &blog(&elsewhere)]);
    let text = print(&rig, "haproxy", "--behind-gate");
    let (shop_only, blog_only) = text.split_once("frontend pullgate-2\n").unwrap();
    assert!(shop_only.contains("default_backend application\n"));
    assert!(blog_only.contains("default_backend application-2\n"));

    let other = HAPROXY_APPLICATION.replace("application\n", "application-2\n");
    let text = format!(
        "{HAPROXY}{text}{HAPROXY_APPLICATION}{}",
        other.replace("200", "203")
    );
    let _server = Server::start(&rig.network, "haproxy", &["-db", "-f"], &text);

    assert_eq!(rig.tell(&rig.edge(), SHOP), "200, Relayed");
    let theirs = Client::new(&rig.pki, Some(&rig.pki.other.client()));
    assert_eq!(rig.tell(&theirs, BLOG), "203, Relayed");
}

#[test]
fn the_closest_name_decides_which_ca_is_asked_for() {
    for server in ["nginx", "apache", "caddy"] {
        let rig = Rig::new();
        let wide = shop("").replace(SHOP_NAME, "names = [\"*.example\"");
        let narrow = blog("").replace("names = [\"blog.example\"", "names = [\"shop.example\"");
        rig.configure("", &[&wide, &narrow]);
        let _server = start(&rig, server, "--own-mtls");
        let ask = |authority: &tests::pki::Authority| {
            rig.pki.write_identity("client", &authority.client());
            ask_without_verifying(&rig, SHOP)
        };

        assert_eq!(ask(&rig.pki.other), "200", "{server}");
        assert_ne!(ask(&rig.pki.ours), "200", "{server}");
    }
}

#[test]
fn without_a_configuration_there_are_placeholders() {
    let rig = Rig::new();
    for server in ["nginx", "apache", "haproxy", "caddy"] {
        for pairing in ["--behind-gate", "--own-mtls"] {
            let text = print(&rig, server, pairing);
            assert!(!text.contains('@'), "{text}");
            assert!(pairing != "--own-mtls" || text.contains("cloudflare-origin-pull-ca.pem"));
        }
    }
    rig.configure(
        "",
        &[&shop("").replace(SHOP_NAME, "names = [\"*.shop.example\"")],
    );
    let text = print(&rig, "apache", "--own-mtls");
    assert!(text.contains("ServerName any.shop.example\n"), "{text}");
    assert!(text.contains("ServerAlias *.shop.example\n"), "{text}");
    let shared = blog("trust = [\"cloudflare\"]");
    rig.configure("cloudflare_ca_file = \"@PKI@/shared-ca.pem\"", &[&shared]);
    assert!(print(&rig, "nginx", "--own-mtls").contains("/shared-ca.pem;"));
    rig.configure("", &[&shop(""), &blog("")]);
    let text = print(&rig, "nginx", "--own-mtls");
    for words in [
        "server_name shop.example;",
        "server_name blog.example;",
        "ours-ca.pem",
    ] {
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn without_a_pairing_both_are_explained() {
    let rig = Rig::new();
    rig.configure("", &[&shop(""), &blog("")]);

    let output = rig.pullgate(&["snippet", "nginx"]);

    assert_eq!(output.status.code(), Some(64));
    let error = String::from_utf8(output.stderr).unwrap();
    for words in ["`--behind-gate` for", "`--own-mtls` for"] {
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn what_would_let_more_in_is_not_printed() {
    let rig = Rig::new();
    let pin = format!("trust = [\"sha256:{}\"]", "0".repeat(64));
    let tomorrow = OffsetDateTime::now_utc() + Duration::from_secs(86_400);
    rig.pki.write("crl.pem", &rig.pki.ours.crl(&[7], tomorrow));
    let revoked = "crl = [\"@PKI@/crl.pem\"]".to_owned();
    let two = "trust = [\"@PKI@/ours-ca.pem\", \"@PKI@/other-ca.pem\"]";
    for (server, host, words) in [
        ("nginx", shop(&pin), "knows no pins"),
        ("apache", shop(two), "takes one file of CAs"),
        ("haproxy", shop(""), "for all hosts of an address"),
        ("nginx", shop(&revoked), "what is revoked"),
        ("nginx", shop("min_tls = \"1.3\""), "same TLS versions"),
        ("apache", shop("require_client_eku = true"), "do not say"),
        ("haproxy", shop("max_depth = 0"), "chains of any length"),
        ("caddy", shop("max_depth = 1"), "chains of any length"),
        (
            "nginx",
            shop("").replace("shop.example.pem", "a b.pem"),
            "would misread the name",
        ),
        (
            "nginx",
            shop("client_auth = \"log\""),
            "no client without one",
        ),
    ] {
        rig.configure("", &[&host, &blog("")]);
        let output = rig.pullgate(&["snippet", server, "--own-mtls"]);

        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{error}");
        assert!(error.contains("`gate.host."), "{error}");
        assert!(error.contains(words), "{error}");
        assert!(output.stdout.is_empty());
    }

    rig.configure("", &[&shop("proxy_protocol = \"none\""), &blog("")]);
    let output = rig.pullgate(&["snippet", "nginx", "--behind-gate"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("`gate.host.proxy_protocol`: "), "{error}");

    rig.configure("", &[&shop(""), &blog("")]);
    let output = rig.pullgate(&["snippet", "caddy", "--behind-gate"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("reads no PROXY header"), "{error}");

    let encrypted = "upstream_tls = { ca_file = \"@PKI@/web-ca.pem\", name = \"shop.example\" }";
    rig.configure("", &[&shop(encrypted), &blog("")]);
    let output = rig.pullgate(&["snippet", "nginx", "--behind-gate"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("`gate.host.upstream_tls`: "), "{error}");
}

/// [`SHOP`], which has a wildcard for its first name.
fn shop_and_more(lines: &str) -> String {
    shop(lines).replace(SHOP_NAME, "names = [\"*.shop.example\", \"shop.example\"")
}

/// A client that is let in, and verifies nothing, gets the site by its name and by no other.
fn serves_no_unknown_name(rig: &Rig, server: &str) {
    rig.pki.write_identity("client", &rig.pki.ours.client());
    assert_eq!(ask_without_verifying(rig, SHOP), "200", "{server}");
    assert_ne!(
        ask_without_verifying(rig, "unknown.example"),
        "200",
        "{server}"
    );
}

/// Asks with the identity "client".
fn ask_without_verifying(rig: &Rig, name: &str) -> String {
    let path = |name: &str| rig.pki.path(name).display().to_string();
    let there = format!("{name}:443:{}:443", origin());
    let words = [
        "curl",
        "--silent",
        "--insecure",
        "--max-time",
        "5",
        "--output",
        "/dev/null",
        "--write-out",
        "%{http_code}",
        "--cert",
        &path("client.pem"),
        "--key",
        &path("client.key"),
        "--connect-to",
        &there,
        &format!("https://{name}/"),
    ];
    let output = rig.network.output(Host::Edge, &words);
    String::from_utf8(output.stdout).unwrap()
}

/// Starts a server with sites of its own, which include what is printed for them.
fn start_site(rig: &Rig, server: &str, pairing: &str) -> Server {
    let own = pairing == "--own-mtls";
    let site = |name: &str, number: &str| {
        let (certificate, key) = (
            format!("@DIR@/pki/{name}.pem"),
            format!("@DIR@/pki/{name}.key"),
        );
        match (server, own) {
            ("nginx", true) => format!(
                "server {{ listen 443 ssl; server_name {name}; ssl_certificate {certificate}; \
                 ssl_certificate_key {key}; include @DIR@/snippets-pullgate{number}.conf; {NGINX_SITE} }}\n"
            ),
            ("nginx", false) => format!(
                "server {{ server_name {name}; include @DIR@/snippets-pullgate.conf; {NGINX_SITE} }}\n"
            ),
            (_, true) => format!(
                "<VirtualHost *:443>\nServerName {name}\nSSLEngine on\nSSLCertificateFile {certificate}\n\
                 SSLCertificateKeyFile {key}\nDocumentRoot @DIR@/htdocs\n\
                 Include @DIR@/apache2-pullgate{number}.conf\n</VirtualHost>\n"
            ),
            (_, false) => format!(
                "<VirtualHost 127.0.0.1:8080>\nServerName https://{name}:443\nDocumentRoot @DIR@/htdocs\n\
                 {TO_HTTPS}\nInclude @DIR@/apache2-pullgate.conf\n</VirtualHost>\n"
            ),
        }
    };
    let sites = site(SHOP, "") + &site(BLOG, "-2");
    let htdocs = rig.network.path("htdocs");
    fs::create_dir(&htdocs).unwrap();
    fs::write(htdocs.join("index.html"), "page of the site\n").unwrap();
    let text = match server {
        "nginx" => {
            let once = if own {
                "include @DIR@/conf.d-pullgate.conf;"
            } else {
                ""
            };
            format!(
                "daemon off; user root; pid @DIR@/nginx.pid; error_log @DIR@/nginx.log; events {{}}\n\
                 http {{ access_log off; @NGINX@\n{once}\n{sites}\n}}"
            )
        }
        _ => {
            let listen = if own {
                "Listen 443"
            } else {
                "LoadModule rewrite_module /usr/lib/apache2/modules/mod_rewrite.so"
            };
            let once = "Include @DIR@/sites-enabled-000-pullgate.conf\n";
            APACHE
                .replace("@LISTEN@", listen)
                .replace("@SNIPPET@", &format!("{once}{sites}"))
        }
    };
    let (program, words): (_, &[&str]) = match server {
        "apache" => ("apache2", &["-DFOREGROUND", "-f"]),
        _ => ("nginx", &[]),
    };
    let address = if own {
        "127.0.0.1:443"
    } else {
        "127.0.0.1:8080"
    };
    Server::start_at(&rig.network, program, words, &text, address)
}

/// The files that a text consists of, each of which begins with its path: by what is particular to that.
fn files(text: &str) -> Vec<(String, String)> {
    let mut files: Vec<(String, String)> = Vec::new();
    for line in text.lines() {
        if let Some(path) = line.strip_prefix("# /etc/") {
            let path = path.split([':', ',']).next().unwrap();
            let mut parts: Vec<_> = path.split('/').rev().take(2).collect();
            parts.reverse();
            files.push((parts.join("-"), String::new()));
        }
        let (_, content) = files.last_mut().unwrap();
        content.push_str(line);
        content.push('\n');
    }
    files
}

/// What sends visitors by HTTP elsewhere: for ever, if the site does not know that they came by HTTPS.
const TO_HTTPS: &str = "RewriteEngine On\nRewriteCond %{ENV:HTTPS} !=on\n\
    RewriteRule ^ https://%{SERVER_NAME}%{REQUEST_URI} [R=301,L]";
const NGINX_SITE: &str = "location / { return 200 \"page of the site\\n\"; }";
const SHOP_NAME: &str = "names = [\"shop.example\"";
