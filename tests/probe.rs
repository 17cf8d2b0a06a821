//! Verifies `pullgate probe`: real servers, each set up rightly and in ways that leave something open. It finds what
//! is open, and nothing else.

#![expect(
    clippy::unwrap_used,
    reason = "a rig that cannot be made stops the test"
)]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::Stdio;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tests::daemon::binary;
use tests::gate::{blog, origin, shop};
use tests::net::Host;
use tests::pki::SHOP;
use tests::snippets::{APACHE, APACHE_PAGE, start};
use tests::web::Server;
use tests::{Lab, Pairing, Plan, Rig, assert_matched, eventually, scenarios};

/// What a server does with a connection.
type Manner = fn(&mut std::net::TcpStream);

/// What the probe says of a host that is not filtered from where it runs.
const OPEN_PORT: &str = "port-answers";

#[test]
fn the_snippets_leave_nothing_open() {
    for (server, more) in [
        ("nginx", &[][..]),
        // Apache shows a certificate before it knows the name.
        ("apache", &["certificate-shown", "certificate-shown"]),
        ("haproxy", &[]),
        ("caddy", &[]),
    ] {
        let rig = Rig::new();
        // HAProxy has one CA file for an address.
        let lines = match server {
            "haproxy" => "trust = [\"@PKI@/ours-ca.pem\"]",
            _ => "",
        };
        rig.configure("", &[&shop(""), &blog(lines)]);
        let _server = start(&rig, server, "--own-mtls");

        let (code, found) = probe(&rig, true);

        let expected = [&[OPEN_PORT], more].concat();
        assert_eq!(found, sorted(&expected), "{server}");
        assert_eq!(code, 0, "{server}");
    }
}

#[test]
fn the_gate_leaves_nothing_open() {
    let rig = Rig::with_shop("");
    let _web_server = nginx(
        &rig,
        "server { listen 127.0.0.1:8080 proxy_protocol; return 200 page; }",
        "127.0.0.1:8080",
    );

    let (code, found) = probe(&rig, true);

    // Behind steering, the web server's own port is the gate's as well.
    assert_eq!(found, sorted(&[OPEN_PORT]));
    assert_eq!(code, 0);
}

#[test]
fn behind_the_filter_a_stranger_sees_silence() {
    for pairing in [Pairing::Relayed, Pairing::Steered] {
        let lab = Lab::start(&Plan {
            pairing,
            ..Plan::default()
        });

        assert_matched(&scenarios::probe_finds_nothing_open(&lab));
    }
}

#[test]
fn a_look_that_is_repeated_is_served_to_prometheus() {
    let rig = Rig::with_shop("");
    let mut command = rig.network.command(Host::Edge, binary());
    command.args(["probe", SHOP, "--origin", &origin().to_string()]);
    command.args(["--repeat", "1h", "--metrics", "127.0.0.1:9469"]);
    let mut watching = command.stdout(Stdio::piped()).spawn().unwrap();
    let scrape = || {
        let words = ["curl", "--silent", "http://127.0.0.1:9469/metrics"];
        let output = rig.network.output(Host::Edge, &words);
        String::from_utf8(output.stdout).unwrap()
    };
    let subject = format!("subject=\"{SHOP} at {}:443\"", origin());
    let line = |question: &str, answer: &str| {
        format!(
            "pullgate_probe_answer{{{subject},question=\"{question}\",answer=\"{answer}\"}} 1\n"
        )
    };
    let text = eventually("the first look is over", || {
        Some(scrape()).filter(|text| text.contains("pullgate_probe_answer"))
    });

    assert!(text.contains(&line("port", "warning")), "{text}");
    assert!(text.contains(&line("certificate", "ok")), "{text}");
    assert!(
        text.contains("pullgate_probe_last_look_timestamp_seconds "),
        "{text}"
    );
    kill(
        Pid::from_raw(i32::try_from(watching.id()).unwrap()),
        Signal::SIGTERM,
    )
    .unwrap();
    assert_eq!(watching.wait().unwrap().code(), Some(0));
    let mut printed = String::new();
    watching
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut printed)
        .unwrap();
    assert_eq!(printed.matches(" not known\n").count(), 1, "{printed}");
}

#[test]
fn what_nginx_leaves_open_is_found() {
    let verify = "ssl_client_certificate @PKI@/ours-ca.pem; ssl_verify_client on;";
    let reject = "server { listen 443 ssl default_server; ssl_reject_handshake on; return 444; }";
    let shop = |lines: &str| site("shop.example", "443 ssl", lines);
    let wrong_ca = verify.replace("ours", "other");
    for (what, sites, with_own, expected) in [
        (
            "nothing is demanded",
            shop("") + reject,
            false,
            &[
                "served-without-certificate",
                "served-with-forged-certificate",
                "served-with-forged-certificate",
            ][..],
        ),
        (
            "`optional` instead of `on`",
            shop(&verify.replace(" on;", " optional;")) + reject,
            false,
            &["served-without-certificate"],
        ),
        (
            "a certificate of any CA",
            shop(&verify.replace(" on;", " optional_no_ca;")) + reject,
            false,
            &[
                "served-without-certificate",
                "served-with-forged-certificate",
                "served-with-forged-certificate",
            ],
        ),
        (
            "demanded in one location alone",
            shop(&verify.replace(
                " on;",
                " optional; location /admin { if ($ssl_client_verify != SUCCESS) { return 403; } }",
            )) + reject,
            false,
            &["served-without-certificate"],
        ),
        (
            "no default server",
            shop(verify),
            false,
            &["certificate-shown", "certificate-shown"],
        ),
        (
            "a default site without a demand",
            site(
                "blog.example",
                "443 ssl default_server",
                "ssl_session_tickets off;",
            ) + &shop(&format!("{verify} ssl_session_tickets off;")),
            false,
            &[
                "certificate-shown",
                "certificate-shown",
                "default-site-served",
                "default-site-served",
            ],
        ),
        (
            "port 80 serves",
            shop(verify) + reject + "server { listen 80; return 200 page; }",
            false,
            &["other-port-serves"],
        ),
        (
            "port 80 redirects",
            shop(verify) + reject + "server { listen 80; return 301 https://$host/; }",
            false,
            &["other-port-open"],
        ),
        (
            "another port without a demand",
            shop(verify) + reject + &site("shop.example", "8443 ssl", ""),
            false,
            &["other-port-serves"],
        ),
        (
            "a header is believed from anywhere",
            site("shop.example", "443 ssl proxy_protocol", verify)
                + "server { listen 443 ssl proxy_protocol default_server; ssl_reject_handshake on; }",
            false,
            &["proxy-header-believed"],
        ),
        (
            "the CA is another one",
            shop(&wrong_ca) + reject,
            true,
            &["own-certificate-refused"],
        ),
        (
            "an application that answers 404 to everything",
            shop("location = / { return 404; }") + reject,
            false,
            &[
                "served-with-forged-certificate",
                "served-with-forged-certificate",
                "served-without-certificate",
            ],
        ),
        (
            "TLS 1.2 alone",
            shop(&format!("{verify} ssl_protocols TLSv1.2;"))
                + &reject.replace("return", "ssl_protocols TLSv1.2; return"),
            true,
            &[],
        ),
        (
            "one site's certificate is good for another site",
            shop(verify)
                + &site("blog.example", "443 ssl default_server", "").replace("page", "another"),
            true,
            &[
                "certificate-shown",
                "certificate-shown",
                "default-site-served",
                "default-site-served",
                "other-host-served",
            ],
        ),
        (
            "the client's address is believed from anywhere",
            shop("set_real_ip_from 0.0.0.0/0; real_ip_header X-Forwarded-For;")
                .replace("return 200 page", "return 200 $remote_addr")
                + reject,
            false,
            &[
                "client-address-believed",
                "served-with-forged-certificate",
                "served-with-forged-certificate",
                "served-without-certificate",
            ],
        ),
        (
            "clear text",
            "server { listen 443; return 200 page; }".to_owned(),
            false,
            &["clear-text-served", "no-tls"],
        ),
    ] {
        let rig = Rig::new();
        let _server = nginx(&rig, &sites, "127.0.0.1:443");

        let (_, found) = probe(&rig, with_own);

        let found = besides(&[OPEN_PORT], found);
        assert_eq!(found, sorted(expected), "{what}");
    }
}

#[test]
fn what_others_leave_open_is_found() {
    // Caddy's own choice is HTTP/3 as well.
    let caddy = "{\n admin off\n storage file_system @DIR@/caddy\n auto_https disable_redirects\n}\n\
         https://shop.example {\n tls @DIR@/pki/shop.example.pem @DIR@/pki/shop.example.key {\n client_auth {\n \
         mode @MODE@\n trusted_ca_cert_file @DIR@/pki/ours-ca.pem\n }\n }\n respond page\n}\n";
    let haproxy = "defaults\n mode http\n timeout connect 5s\n timeout client 5s\n timeout server 5s\n\
         frontend f\n bind :443 ssl crt @DIR@/pki/shop.pem ca-file @DIR@/pki/ours-ca.pem verify @MODE@\n \
         http-request return status 200 content-type text/plain string page\n";
    for (program, words, text, expected) in [
        (
            "caddy",
            &["run", "--adapter", "caddyfile", "--config"][..],
            caddy.replace("@MODE@", "require_and_verify"),
            &["quic-open"][..],
        ),
        (
            "caddy",
            &["run", "--adapter", "caddyfile", "--config"],
            caddy.replace("@MODE@", "request"),
            &[
                "quic-open",
                "served-with-forged-certificate",
                "served-with-forged-certificate",
                "served-without-certificate",
            ],
        ),
        (
            "haproxy",
            &["-db", "-f"],
            haproxy.replace("@MODE@", "optional"),
            &[
                "certificate-shown",
                "certificate-shown",
                "default-site-served",
                "default-site-served",
                "served-without-certificate",
            ],
        ),
        (
            "haproxy",
            &["-db", "-f"],
            haproxy.replace("@MODE@", "required"),
            &["certificate-shown", "certificate-shown"],
        ),
    ] {
        let rig = Rig::new();
        let [certificate, key] =
            ["pem", "key"].map(|ending| rig.pki.path(&format!("{SHOP}.{ending}")));
        let both = fs::read_to_string(certificate).unwrap() + &fs::read_to_string(key).unwrap();
        rig.pki.write("shop.pem", &both);
        let _server = Server::start_at(&rig.network, program, words, &text, "127.0.0.1:443");

        let (_, found) = probe(&rig, false);

        let found = besides(&[OPEN_PORT], found);
        assert_eq!(found, sorted(expected), "{program} {text}");
    }
}

#[test]
fn what_apache_leaves_open_is_found() {
    let site = |name: &str, lines: &str| {
        format!(
            "<VirtualHost *:443>\nServerName {name}\nSSLEngine on\nSSLCertificateFile @DIR@/pki/{SHOP}.pem\n\
             SSLCertificateKeyFile @DIR@/pki/{SHOP}.key\nDocumentRoot @DIR@/htdocs\n{lines}\n</VirtualHost>\n"
        )
    };
    let verify = "SSLCACertificateFile @DIR@/pki/ours-ca.pem\nSSLVerifyClient require\n";
    let as_with = |word: &str| verify.replace("require", word);
    // It has nothing that refuses a handshake for its name: a first site takes what is unknown.
    let first = site(
        "first.invalid",
        "<Location />\nRequire all denied\n</Location>",
    );
    for (what, sites, expected) in [
        (
            "as it should be",
            first.clone() + &site(SHOP, verify),
            &[][..],
        ),
        (
            "nothing is demanded",
            first.clone() + &site(SHOP, ""),
            &[
                "served-with-forged-certificate",
                "served-with-forged-certificate",
                "served-without-certificate",
            ],
        ),
        (
            "`optional` instead of `require`",
            first.clone() + &site(SHOP, &as_with("optional")),
            &["served-without-certificate"],
        ),
        (
            "a certificate of any CA",
            first.clone() + &site(SHOP, &as_with("optional_no_ca")),
            &[
                "served-with-forged-certificate",
                "served-with-forged-certificate",
                "served-without-certificate",
            ],
        ),
        (
            "demanded in one location alone",
            first.clone()
                + &site(
                    SHOP,
                    "SSLCACertificateFile @DIR@/pki/ours-ca.pem\n<Location /admin>\nSSLVerifyClient require\n\
                     </Location>",
                ),
            &[
                "served-with-forged-certificate",
                "served-with-forged-certificate",
                "served-without-certificate",
            ],
        ),
        ("no first site", site(SHOP, verify), &[]),
        (
            "a first site that serves",
            site("blog.example", "") + &site(SHOP, verify),
            &["default-site-served", "default-site-served"],
        ),
        (
            "a PROXY header of anyone's",
            first
                .clone()
                .replace("SSLEngine", "RemoteIPProxyProtocol On\nSSLEngine")
                + &site(SHOP, &format!("{verify}RemoteIPProxyProtocol On\n")),
            &["proxy-header-believed"],
        ),
        (
            "RemoteIPHeader without a proxy that is trusted",
            first.clone() + &site(SHOP, "RemoteIPHeader X-Forwarded-For"),
            &[
                "client-address-believed",
                "served-with-forged-certificate",
                "served-with-forged-certificate",
                "served-without-certificate",
            ],
        ),
        (
            "port 80 serves",
            first.clone()
                + &site(SHOP, verify)
                + "Listen 80\n<VirtualHost *:80>\nDocumentRoot @DIR@/htdocs\n</VirtualHost>\n",
            &["other-port-serves"],
        ),
    ] {
        let rig = Rig::new();
        let _server = apache(&rig, &sites);

        let (_, found) = probe(&rig, false);

        // It shows a certificate before it knows the name.
        let found = besides(&[OPEN_PORT, "certificate-shown"], found);
        assert_eq!(found, sorted(expected), "{what}");
    }
}

#[test]
fn a_certificate_to_refuse_is_found_until_it_is_revoked() {
    let rig = Rig::new();
    let path = |name: &str| rig.pki.path(name).display().to_string();
    rig.pki
        .write_identity("old", &rig.pki.ours.client_numbered(7));
    rig.pki
        .write_identity("expired", &rig.pki.ours.expired_client());
    let in_a_day = time::OffsetDateTime::now_utc() + Duration::from_secs(86_400);
    rig.pki.write("ours.crl", &rig.pki.ours.crl(&[7], in_a_day));
    let reject = "server { listen 443 ssl default_server; ssl_reject_handshake on; }";
    let verify = "ssl_client_certificate @PKI@/ours-ca.pem; ssl_verify_client on;";
    for (lines, old, expected) in [
        ("", "old", &["other-certificate-admitted"][..]),
        ("ssl_crl @PKI@/ours.crl;", "old", &[]),
        ("", "expired", &[]),
    ] {
        let site = site(SHOP, "443 ssl", &format!("{verify} {lines}"));
        let _server = nginx(&rig, &(site + reject), "127.0.0.1:443");
        let files = [path(&format!("{old}.pem")), path(&format!("{old}.key"))];

        let (_, found) = probe_as(&rig, &["--other-cert", &files[0], "--other-key", &files[1]]);

        let found = besides(&[OPEN_PORT], found);
        assert_eq!(found, sorted(expected), "{old} {lines}");
    }
}

#[test]
fn a_session_of_another_name_is_found() {
    let rig = Rig::new();
    rig.pki.write_identity("blog", &rig.pki.other.client());
    let path = |name: &str| rig.pki.path(name).display().to_string();
    let demands =
        |ca: &str| format!("ssl_client_certificate @PKI@/{ca}-ca.pem; ssl_verify_client on;");
    let off = "ssl_session_tickets off; ssl_session_cache off;";
    let [blog, shop] = [demands("other"), demands("ours")];
    let nothing = String::new();
    for (what, blog, shop, expected) in [
        (
            "another CA",
            blog.clone(),
            shop.clone(),
            &["session-of-another-name"][..],
        ),
        // Of a client without a certificate, nginx looks at that again.
        ("nothing is demanded", nothing, shop.clone(), &[]),
        (
            "an application that answers 404",
            blog.clone(),
            shop.clone() + " location = / { return 404; }",
            &["session-of-another-name"],
        ),
        (
            "caches of their own",
            blog.clone() + "ssl_session_tickets off; ssl_session_cache shared:blog:1m;",
            shop.clone() + "ssl_session_tickets off; ssl_session_cache shared:shop:1m;",
            &["session-of-another-name"],
        ),
        ("no sessions", blog + off, shop + off, &[]),
    ] {
        let sites =
            site("blog.example", "443 ssl default_server", &blog) + &site(SHOP, "443 ssl", &shop);
        let _server = nginx(&rig, &sites, "127.0.0.1:443");
        let files = [path("blog.pem"), path("blog.key")];
        let words = [
            "--other-name",
            "blog.example",
            "--other-cert",
            &files[0],
            "--other-key",
            &files[1],
        ];

        let (_, found) = probe_as(&rig, &words);

        let found = besides(
            &["certificate-shown", "default-site-served", OPEN_PORT],
            found,
        );
        assert_eq!(found, sorted(expected), "{what}");
    }
}

#[test]
fn a_server_that_does_not_end_is_left() {
    let rig = Rig::new();
    let listen = |port: u16| {
        let address = format!("0.0.0.0:{port}");
        rig.network
            .on(Host::Origin, || TcpListener::bind(address).unwrap())
    };
    let slow: [(u16, Manner); 4] = [
        (9001, |stream| {
            drop(
                stream
                    .read(&mut [0; 1 << 16])
                    .and_then(|_| stream.read(&mut [0; 1 << 16])),
            )
        }),
        (9002, |stream| {
            drop(stream.write_all(b"no TLS, and nothing else\r\n"))
        }),
        (
            9003,
            |stream| while stream.write_all(&[b'x'; 1 << 16]).is_ok() {},
        ),
        (9004, |stream| {
            while stream.write_all(b"x").is_ok() {
                // To be slow is what this server does wrong.
                thread::sleep(Duration::from_millis(200));
            }
        }),
    ];
    for (port, manner) in slow {
        let listener = listen(port);
        // They end with the test's process.
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                thread::spawn(move || manner(&mut stream));
            }
        });
    }
    let mut words = vec![
        "timeout".to_owned(),
        "120".to_owned(),
        binary().display().to_string(),
        "--json".to_owned(),
        "probe".to_owned(),
        SHOP.to_owned(),
    ];
    for (port, _) in slow {
        words.extend(["--origin".to_owned(), format!("{}:{port}", origin())]);
    }
    let words: Vec<_> = words.iter().map(String::as_str).collect();

    let output = rig.network.output(Host::Edge, &words);

    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let examined: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(examined.len(), 4);
}

#[test]
fn what_dns_leads_to_the_origin_is_found() {
    let rig = Rig::with_shop("");
    let origin = origin();
    let [edge, stranger] = [Host::Edge, Host::Stranger].map(|host| host.addresses()[0]);
    let proxied = format!("host-record={SHOP},{edge}");
    for (records, expected) in [
        (vec![proxied.clone()], &[][..]),
        (
            vec![format!("host-record={SHOP},{origin}")],
            &["name-leads-to-origin"],
        ),
        (
            vec![
                format!("host-record={SHOP},{edge},{stranger}"),
                format!("host-record={SHOP},{stranger}"),
            ],
            &["name-not-proxied"],
        ),
        (
            vec!["address=/other.example/192.0.2.1".to_owned()],
            &["name-without-address"],
        ),
        (
            vec![
                proxied.clone(),
                format!("mx-host={SHOP},mail.example,10"),
                format!("host-record=mail.example,{origin}"),
            ],
            &["address-leaked"],
        ),
        (
            vec![
                proxied.clone(),
                format!("txt-record={SHOP},v=spf1 ip4:{origin}/24 ~all"),
            ],
            &["address-leaked"],
        ),
        (
            vec![
                proxied.clone(),
                format!("txt-record={SHOP},v=spf1 ip4:192.0.2.0/24 a:mail.example -all"),
                format!("host-record=mail.example,{stranger}"),
            ],
            &[],
        ),
        (
            vec![
                proxied.clone(),
                format!("host-record=direct.example,{origin}"),
            ],
            &["address-leaked"],
        ),
        (
            vec![
                proxied.clone(),
                format!("txt-record={SHOP},v=SPF1 redirect=policy.example"),
                "txt-record=policy.example,v=spf1 MX:list.example/24 -all".to_owned(),
                "mx-host=list.example,mail.example,10".to_owned(),
                format!("host-record=mail.example,{origin}"),
            ],
            &["address-leaked"],
        ),
    ] {
        let _dns = name_server(&rig, &records);

        let (found, unanswered) = probe_by_name(&rig, &["--dns", "--other-name", "direct.example"]);

        assert_eq!(
            (found, unanswered),
            (sorted(expected), Vec::new()),
            "{records:?}"
        );
    }
    // No name server answers, so nothing is known.
    let (found, unanswered) = probe_by_name(&rig, &["--dns"]);
    assert_eq!(
        (found, unanswered),
        (Vec::new(), sorted(&["dns-leaks", "proxied"]))
    );
}

#[test]
fn what_visitors_get_through_cloudflare_is_compared() {
    let rig = Rig::with_shop("");
    let _web_server = nginx(
        &rig,
        "server { listen 127.0.0.1:8080 proxy_protocol; return 200 page; }",
        "127.0.0.1:8080",
    );
    rig.pki.write_identity("client", &rig.pki.ours.client());
    let path = |name: &str| rig.pki.path(name).display().to_string();
    let edge = Host::Edge.addresses()[0];
    let _dns = name_server(&rig, &[format!("host-record={SHOP},{edge}")]);
    let files = [path("client.pem"), path("client.key")];
    let words = ["--through", "--cert", &files[0], "--key", &files[1]];
    let ray = "add_header cf-ray 8d2f1e9c3b7a4d60-FRA always;";
    for (lines, expected) in [
        (format!("{ray} return 200 page;"), &[][..]),
        ("return 200 page;".to_owned(), &["not-through-cloudflare"]),
        (
            format!("{ray} add_header cf-error-type origin always; return 522;"),
            &["error-through-cloudflare"],
        ),
        (format!("{ray} return 403 no;"), &["answers-differ"]),
        // A challenge is Cloudflare's own answer.
        (
            format!("{ray} add_header cf-mitigated challenge always; return 403 no;"),
            &[],
        ),
    ] {
        let _cloudflare = edge_server(&rig, &lines);

        let (found, unanswered) = probe_by_name(&rig, &words);

        assert_eq!(
            (found, unanswered),
            (sorted(expected), Vec::new()),
            "{lines}"
        );
    }
}

/// The name server of an edge, which answers what it is given and has no other to ask.
fn name_server(rig: &Rig, records: &[String]) -> Server {
    let program = (
        "dnsmasq",
        &["--keep-in-foreground", "--user=root", "--pid-file", "-C"][..],
    );
    let text = format!(
        "no-resolv\nno-hosts\nlocal=/example/\nlisten-address=127.0.0.1\nbind-interfaces\n{}\n",
        records.join("\n")
    );
    Server::start_on(&rig.network, Host::Edge, program, &text, "127.0.0.1:53")
}

/// What stands for Cloudflare towards visitors.
fn edge_server(rig: &Rig, lines: &str) -> Server {
    let text = format!(
        "daemon off; user root; pid @DIR@/edge.pid; error_log @DIR@/edge.log; events {{}}\n\
         http {{ access_log off; @NGINX@\n server {{ listen 443 ssl; ssl_certificate @DIR@/pki/{SHOP}.pem; \
         ssl_certificate_key @DIR@/pki/{SHOP}.key; {lines} }} }}"
    );
    let program = ("nginx", &[][..]);
    Server::start_on(&rig.network, Host::Edge, program, &text, "127.0.0.1:443")
}

/// What is found by the site's name, from an edge that asks its own name server; and which questions have no answer.
fn probe_by_name(rig: &Rig, more: &[&str]) -> (Vec<String>, Vec<String>) {
    let resolv = rig.network.path("resolv.conf");
    fs::write(&resolv, "nameserver 127.0.0.1\noptions timeout:1\n").unwrap();
    // What a host believes by itself says nothing of DNS.
    let hosts = rig.network.path("hosts");
    fs::write(&hosts, format!("192.0.2.9 {SHOP}\n")).unwrap();
    let script = format!(
        "mount --bind {} /etc/resolv.conf && mount --bind {} /etc/hosts && exec {} --json probe {SHOP} --origin {} {}",
        resolv.display(),
        hosts.display(),
        binary().display(),
        origin(),
        more.join(" ")
    );
    let words = ["unshare", "--mount", "--", "sh", "-c", &script];
    let output = rig.network.output(Host::Edge, &words);
    assert!(
        !output.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let by_name = report.last().unwrap();
    assert_eq!(by_name["subject"], format!("{SHOP} by its name"));
    let checks = by_name["checks"].as_array().unwrap();
    let unanswered = checks.iter().filter(|check| check["answered"] == false);
    let unanswered: Vec<_> = unanswered
        .map(|check| check["id"].as_str().unwrap())
        .collect();
    let last = serde_json::to_vec(&[by_name]).unwrap();
    (ids(&last), sorted(&unanswered))
}

#[test]
fn what_cannot_be_looked_at_is_said() {
    let rig = Rig::new();
    for (arguments, code, words) in [
        (
            &["probe", "192.0.2.1", "--origin", "203.0.113.10"][..],
            64,
            "host name",
        ),
        (
            &[
                "probe",
                "https://shop.example/x",
                "--origin",
                "shop.example",
            ],
            64,
            "is no address",
        ),
        (&["probe", SHOP], 64, "--origin"),
        (
            &[
                "probe",
                SHOP,
                "--origin",
                "203.0.113.10",
                "--cert",
                "/gone",
                "--key",
                "/gone",
            ],
            78,
            "/gone cannot be used",
        ),
    ] {
        let output = rig.pullgate(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.contains(words), "{text}");
    }
}

/// A site of nginx.
fn site(name: &str, listen: &str, lines: &str) -> String {
    format!(
        "server {{ listen {listen}; server_name {name}; ssl_certificate @PKI@/shop.example.pem; \
         ssl_certificate_key @PKI@/shop.example.key; {lines} location / {{ return 200 page; }} }}\n"
    )
}

fn nginx(rig: &Rig, sites: &str, address: &str) -> Server {
    let text = format!(
        "daemon off; user root; pid @DIR@/nginx.pid; error_log @DIR@/nginx.log; events {{}}\n\
         http {{ access_log off; @NGINX@\n{sites}\n}}"
    );
    let text = text.replace("@PKI@", "@DIR@/pki");
    Server::start_at(&rig.network, "nginx", &[], &text, address)
}

fn apache(rig: &Rig, sites: &str) -> Server {
    let htdocs = rig.network.path("htdocs");
    fs::create_dir(&htdocs).unwrap();
    fs::write(htdocs.join("index.html"), APACHE_PAGE).unwrap();
    let text = APACHE
        .replace("@LISTEN@", "Listen 443")
        .replace("@SNIPPET@", sites);
    let words = ["-DFOREGROUND", "-f"];
    Server::start_at(&rig.network, "apache2", &words, &text, "127.0.0.1:443")
}

/// The exit code, and the ids of what is found from an edge's address.
fn probe(rig: &Rig, with_own: bool) -> (i32, Vec<String>) {
    rig.pki.write_identity("client", &rig.pki.ours.client());
    let path = |name: &str| rig.pki.path(name).display().to_string();
    let files = [path("client.pem"), path("client.key")];
    let own = ["--cert", &files[0], "--key", &files[1]];
    probe_as(rig, if with_own { &own } else { &[] })
}

fn probe_as(rig: &Rig, more: &[&str]) -> (i32, Vec<String>) {
    let url = format!("https://{SHOP}/");
    let mut words = vec![
        binary().display().to_string(),
        "--json".to_owned(),
        "probe".to_owned(),
        url,
        "--origin".to_owned(),
        origin().to_string(),
    ];
    words.extend(more.iter().map(|word| (*word).to_owned()));
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let output = Arc::clone(&rig.network).output(Host::Edge, &words);
    let code = output.status.code().unwrap();
    assert!(code < 2, "{}", String::from_utf8_lossy(&output.stderr));
    let found = ids(&output.stdout);
    let report = String::from_utf8(output.stdout).unwrap();
    // Only what is wrong or not known makes it fail.
    let is_wrong =
        report.contains("\"severity\": \"error\"") || report.contains("\"answered\": false");
    assert_eq!(code, i32::from(is_wrong), "{report}");

    (code, found)
}

fn ids(report: &[u8]) -> Vec<String> {
    let examined: Vec<Value> = serde_json::from_slice(report).unwrap();
    let checks = examined
        .iter()
        .flat_map(|it| it["checks"].as_array().unwrap());
    let findings = checks.flat_map(|check| check["findings"].as_array().unwrap());
    let ids: Vec<_> = findings.map(|it| it["id"].as_str().unwrap()).collect();
    sorted(&ids)
}

/// What is found but for what a set-up has always.
fn besides(always: &[&str], mut found: Vec<String>) -> Vec<String> {
    found.retain(|id| !always.contains(&id.as_str()));
    found
}

fn sorted(ids: &[&str]) -> Vec<String> {
    let mut ids: Vec<_> = ids.iter().map(|id| (*id).to_owned()).collect();
    ids.sort();
    ids
}
