//! Verifies that `pullgate probe` finds what nginx, Apache, HAProxy, Caddy and the gate leave open where they are set up
//! wrongly, and nothing else. Each server's tests begin with a set-up that is right.

#![expect(
    clippy::unwrap_used,
    reason = "a rig that cannot be made stops the test"
)]

use std::fs;
use std::time::Duration;

use tests::Rig;
use tests::gate::{ON_LOOPBACK, blog, origin, shop};
use tests::net::Host;
use tests::pki::{BLOG, SHOP};
use tests::probing::{
    OPEN_PORT, SERVED, apache, apache_site, besides, caddy, haproxy, ids, nginx, nginx_site,
    presenting, probe, probe_at, report, sorted,
};

/// A rig with the certificates that visitors of these tests present: ours, ours by way of an intermediate CA, ours that
/// was revoked or has expired, and another site's.
fn rig() -> Rig {
    let rig = Rig::new();
    let (pki, ours) = (&rig.pki, &rig.pki.ours);
    let between = ours.intermediate("Between", |_| {});
    let in_a_day = time::OffsetDateTime::now_utc() + Duration::from_secs(86_400);
    for (name, identity) in [
        ("client", ours.client()),
        ("between", between.client()),
        ("old", ours.client_numbered(7)),
        ("expired", ours.expired_client()),
        ("blog", pki.other.client()),
        ("customer", pki.shared.client()),
    ] {
        pki.write_identity(name, &identity);
    }
    let leaf = fs::read_to_string(pki.path("between.pem")).unwrap();
    pki.write("between.pem", &(leaf + between.pem()));
    pki.write("ours.crl", &ours.crl(&[7], in_a_day));
    rig
}

/// The options of a probe that presents what Cloudflare would.
const OWN: (&str, &str) = ("cert", "client");
/// Of one that presents what the site has to refuse.
const REVOKED: (&str, &str) = ("other-cert", "old");
/// Of one that presents nothing.
const NOTHING: (&str, &str) = ("", "");

fn words(rig: &Rig, (option, name): (&str, &str)) -> Vec<String> {
    if option.is_empty() {
        return Vec::new();
    }
    presenting(rig, option, name)
}

/// The same, for a site beside another.
fn words_beside(rig: &Rig, presented: (&str, &str)) -> Vec<String> {
    let name = ["--other-name", BLOG].map(str::to_owned);
    [&name[..], &words(rig, presented)].concat()
}

#[test]
fn what_nginx_leaves_open_is_found() {
    let verify = "ssl_client_certificate @PKI@/ours-ca.pem; ssl_verify_client on;";
    let reject = "server { listen 443 ssl default_server; ssl_reject_handshake on; return 444; }";
    let shop = |lines: &str| nginx_site(SHOP, "443 ssl", lines);
    let wrong_ca = verify.replace("ours", "other");
    for (what, sites, presented, expected) in [
        (
            "nothing is demanded",
            shop("") + reject,
            NOTHING,
            &SERVED[..],
        ),
        (
            "`optional` instead of `on`",
            shop(&verify.replace(" on;", " optional;")) + reject,
            NOTHING,
            &["served-without-certificate"],
        ),
        (
            "a certificate of any CA",
            shop(&verify.replace(" on;", " optional_no_ca;")) + reject,
            NOTHING,
            &SERVED,
        ),
        (
            "demanded in one location alone",
            shop(&verify.replace(
                " on;",
                " optional; location /admin { if ($ssl_client_verify != SUCCESS) { return 403; } }",
            )) + reject,
            NOTHING,
            &["served-without-certificate"],
        ),
        (
            "no default server",
            shop(verify),
            NOTHING,
            &["certificate-shown", "certificate-shown"],
        ),
        (
            "a default site without a demand",
            nginx_site(BLOG, "443 ssl default_server", "ssl_session_tickets off;")
                + &shop(&format!("{verify} ssl_session_tickets off;")),
            NOTHING,
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
            NOTHING,
            &["other-port-serves"],
        ),
        (
            "port 80 redirects",
            shop(verify) + reject + "server { listen 80; return 301 https://$host/; }",
            NOTHING,
            &["other-port-open"],
        ),
        (
            "another port without a demand",
            shop(verify) + reject + &nginx_site(SHOP, "8443 ssl", ""),
            NOTHING,
            &["other-port-serves"],
        ),
        (
            "a header is believed from anywhere",
            nginx_site(SHOP, "443 ssl proxy_protocol", verify)
                + "server { listen 443 ssl proxy_protocol default_server; ssl_reject_handshake on; }",
            NOTHING,
            &["proxy-header-believed"],
        ),
        (
            "the CA is another one",
            shop(&wrong_ca) + reject,
            OWN,
            &["own-certificate-refused"],
        ),
        ("as it should be", shop(verify) + reject, OWN, &[]),
        (
            "a page that differs each time",
            shop(&format!(
                "{verify} location = / {{ return 200 $request_id; }}"
            )) + reject,
            OWN,
            &[],
        ),
        (
            "an application that does not answer",
            shop(&format!(
                "{verify} location = / {{ proxy_pass http://127.0.0.1:1; }}"
            )) + reject,
            OWN,
            &["origin-error"],
        ),
        (
            "a chain, and `ssl_verify_depth`",
            shop(&format!("{verify} ssl_verify_depth 2;")) + reject,
            ("cert", "between"),
            &[],
        ),
        (
            "a chain that is longer than `ssl_verify_depth`",
            shop(&format!("{verify} ssl_verify_depth 0;")) + reject,
            ("cert", "between"),
            &["own-certificate-refused"],
        ),
        (
            "one site for all names",
            shop(verify)
                .replace(SHOP, "_")
                .replace("_.", "shop.example."),
            NOTHING,
            &["certificate-shown", "certificate-shown"],
        ),
        (
            "no list of what is revoked",
            shop(verify) + reject,
            REVOKED,
            &["other-certificate-admitted"],
        ),
        (
            "an application that answers 404 to everything",
            shop("location = / { return 404; }") + reject,
            NOTHING,
            &SERVED,
        ),
        (
            "TLS 1.2 alone",
            shop(&format!("{verify} ssl_protocols TLSv1.2;"))
                + &reject.replace("return", "ssl_protocols TLSv1.2; return"),
            OWN,
            &[],
        ),
        (
            "one site's certificate is good for another site",
            shop(verify)
                + &nginx_site(BLOG, "443 ssl default_server", "").replace("page", "another"),
            OWN,
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
            NOTHING,
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
            NOTHING,
            &["clear-text-served", "no-tls"],
        ),
    ] {
        let rig = rig();
        let _server = nginx(&rig, &sites, "127.0.0.1:443");

        let (_, found) = probe(&rig, &words(&rig, presented));

        let found = besides(&[OPEN_PORT], found);
        assert_eq!(found, sorted(expected), "{what}");
    }
}

#[test]
fn what_apache_leaves_open_is_found() {
    let verify = "SSLCACertificateFile @PKI@/ours-ca.pem\nSSLVerifyClient require\n";
    let as_with = |word: &str| verify.replace("require", word);
    // It has nothing that refuses a handshake for its name: a first site takes what is unknown.
    let first = apache_site(
        "first.invalid",
        "<Location />\nRequire all denied\n</Location>",
    );
    for (what, sites, expected) in [
        (
            "as it should be",
            first.clone() + &apache_site(SHOP, verify),
            &[][..],
        ),
        (
            "nothing is demanded",
            first.clone() + &apache_site(SHOP, ""),
            &SERVED,
        ),
        (
            "`optional` instead of `require`",
            first.clone() + &apache_site(SHOP, &as_with("optional")),
            &["served-without-certificate"],
        ),
        (
            "a certificate of any CA",
            first.clone() + &apache_site(SHOP, &as_with("optional_no_ca")),
            &SERVED,
        ),
        (
            "demanded in one location alone",
            first.clone()
                + &apache_site(
                    SHOP,
                    "SSLCACertificateFile @PKI@/ours-ca.pem\n<Location /admin>\nSSLVerifyClient require\n\
                     </Location>",
                ),
            &SERVED,
        ),
        ("no first site", apache_site(SHOP, verify), &[]),
        (
            "demanded behind the handshake",
            first.clone()
                + &apache_site(
                    SHOP,
                    &format!("<Location />\n{verify}</Location>")
                        .replace("SSLCACertificateFile @PKI@/ours-ca.pem\n", ""),
                )
                .replace(
                    "SSLEngine on",
                    "SSLEngine on\nSSLCACertificateFile @PKI@/ours-ca.pem",
                ),
            &[],
        ),
        (
            "a first site that serves",
            apache_site(BLOG, "") + &apache_site(SHOP, verify),
            &["default-site-served", "default-site-served"],
        ),
        (
            "a PROXY header of anyone's",
            first
                .clone()
                .replace("SSLEngine", "RemoteIPProxyProtocol On\nSSLEngine")
                + &apache_site(SHOP, &format!("{verify}RemoteIPProxyProtocol On\n")),
            &["proxy-header-believed"],
        ),
        (
            "RemoteIPHeader without a proxy that is trusted",
            first.clone() + &apache_site(SHOP, "RemoteIPHeader X-Forwarded-For"),
            &[
                "client-address-believed",
                "served-with-forged-certificate",
                "served-with-forged-certificate",
                "served-without-certificate",
            ],
        ),
        (
            "`SSLVerifyDepth` and a chain",
            first.clone() + &apache_site(SHOP, &format!("{verify}SSLVerifyDepth 2")),
            &[],
        ),
        (
            "TLS 1.2 alone",
            first.clone() + &apache_site(SHOP, &format!("{verify}SSLProtocol TLSv1.2")),
            &[],
        ),
        (
            "an application that answers 404 to everything",
            first.clone() + &apache_site(SHOP, "DirectoryIndex gone.html"),
            &SERVED,
        ),
        (
            "another port without a demand",
            first.clone()
                + &apache_site(SHOP, verify)
                + "Listen 8443\n"
                + &apache_site(SHOP, "").replace("443>", "8443>"),
            &["other-port-serves"],
        ),
        (
            "clear text",
            format!(
                "<VirtualHost *:443>\nServerName {SHOP}\nDocumentRoot @DIR@/htdocs\n</VirtualHost>\n"
            ),
            &["clear-text-served", "no-tls"],
        ),
        (
            "port 80 serves",
            first.clone()
                + &apache_site(SHOP, verify)
                + "Listen 80\n<VirtualHost *:80>\nDocumentRoot @DIR@/htdocs\n</VirtualHost>\n",
            &["other-port-serves"],
        ),
    ] {
        let rig = rig();
        let _server = apache(&rig, &sites);

        let (_, found) = probe(&rig, &[]);

        // It shows a certificate before it knows the name.
        let found = besides(&[OPEN_PORT, "certificate-shown"], found);
        assert_eq!(found, sorted(expected), "{what}");
    }
}

#[test]
fn what_haproxy_leaves_open_is_found() {
    let page = "http-request return status 200 content-type text/plain string page";
    let bound = |port: u16, options: &str, rules: &str| {
        format!(
            "frontend f{port}\n bind :{port} ssl crt @PKI@/{SHOP}.both {options}\n {rules}\n {page}\n"
        )
    };
    let on_443 = |options: &str| bound(443, options, "");
    let ours = "strict-sni ca-file @PKI@/ours-ca.pem verify";
    let right = on_443(&format!("{ours} required"));
    let nothing = on_443("strict-sni");
    for (what, frontends, presented, expected) in [
        ("as it should be", right.clone(), OWN, &[][..]),
        ("a chain", right.clone(), ("cert", "between"), &[]),
        (
            "TLS 1.2 alone",
            on_443(&format!("{ours} required ssl-max-ver TLSv1.2")),
            OWN,
            &[],
        ),
        ("nothing is demanded", nothing, NOTHING, &SERVED),
        (
            "a CA, and nothing demanded",
            on_443(&format!("{ours} none")),
            NOTHING,
            &SERVED,
        ),
        (
            "`optional` instead of `required`",
            on_443(&format!("{ours} optional")),
            NOTHING,
            &["served-without-certificate"],
        ),
        (
            "errors are ignored",
            on_443(&format!(
                "{ours} required crt-ignore-err all ca-ignore-err all"
            )),
            NOTHING,
            &SERVED[..2],
        ),
        (
            "demanded for one path alone",
            bound(
                443,
                &format!("{ours} optional"),
                "http-request deny if { path_beg /admin } !{ ssl_c_used }",
            ),
            NOTHING,
            &["served-without-certificate"],
        ),
        (
            "demanded by HTTP/1.1 alone",
            bound(
                443,
                &format!("{ours} optional alpn h2,http/1.1"),
                "http-request return status 496 content-type text/plain string no if { req.ver 1.1 } !{ ssl_c_used }",
            ),
            NOTHING,
            &["served-without-certificate"],
        ),
        (
            "no `strict-sni`",
            right.replace("strict-sni", ""),
            NOTHING,
            &["certificate-shown", "certificate-shown"],
        ),
        (
            "no `strict-sni`, and `optional`",
            on_443(&format!("{ours} optional")).replace("strict-sni", ""),
            NOTHING,
            &[
                "certificate-shown",
                "certificate-shown",
                "default-site-served",
                "default-site-served",
                "served-without-certificate",
            ],
        ),
        (
            "the CA is another one",
            right.replace("ours-ca", "other-ca"),
            OWN,
            &["own-certificate-refused"],
        ),
        (
            "no list of what is revoked",
            right.clone(),
            REVOKED,
            &["other-certificate-admitted"],
        ),
        (
            "a list of what is revoked",
            on_443(&format!("{ours} required crl-file @PKI@/ours.crl")),
            REVOKED,
            &[],
        ),
        (
            "port 80 serves",
            format!("{right}frontend clear\n bind :80\n {page}\n"),
            NOTHING,
            &["other-port-serves"],
        ),
        (
            "port 80 redirects",
            format!("{right}frontend clear\n bind :80\n http-request redirect scheme https\n"),
            NOTHING,
            &["other-port-open"],
        ),
        (
            "another port without a demand",
            right.clone() + &bound(8443, "strict-sni", ""),
            NOTHING,
            &["other-port-serves"],
        ),
        (
            "a header is believed from anywhere",
            on_443(&format!("{ours} required accept-proxy")),
            NOTHING,
            &["proxy-header-believed"],
        ),
        (
            "the client's address is believed from anywhere",
            bound(
                443,
                &format!("{ours} optional"),
                "http-request set-src hdr(x-forwarded-for)",
            )
            .replace("string page", "lf-string %[src]"),
            NOTHING,
            &["client-address-believed", "served-without-certificate"],
        ),
        (
            "clear text",
            format!("frontend f\n bind :443\n {page}\n"),
            NOTHING,
            &["clear-text-served", "no-tls"],
        ),
    ] {
        let rig = rig();
        let _server = haproxy(&rig, &frontends);

        let (_, found) = probe(&rig, &words(&rig, presented));

        assert_eq!(besides(&[OPEN_PORT], found), sorted(expected), "{what}");
    }
}

#[test]
fn sites_of_one_address_of_haproxys_share_what_one_of_them_demands() {
    let rig = rig();
    let path = |name: &str| rig.pki.path(name).display().to_string();
    let [shop, blog, ours, other] = [
        "shop.example.both",
        "blog.example.both",
        "ours-ca.pem",
        "other-ca.pem",
    ]
    .map(path);
    let remedy = [
        "http-request set-var(txn.host) req.hdr(host),host_only,lower",
        "http-request deny unless { ssl_fc_sni,lower,strcmp(txn.host) eq 0 }",
    ];
    let in_its_own_name = remedy.join("\n ");
    for (what, demand, rules, (options, cache), presented, expected) in [
        (
            "one that demands nothing",
            "verify none".to_owned(),
            "",
            ("", 20_000),
            NOTHING,
            &["session-of-another-name", "site-on-another-connection"][..],
        ),
        (
            "one that demands another certificate, and sessions",
            format!("ca-file {other} verify required"),
            "",
            ("", 20_000),
            ("other-cert", "blog"),
            &["session-of-another-name", "site-on-another-connection"],
        ),
        (
            "one that demands another certificate",
            format!("ca-file {other} verify required"),
            "",
            ("no-tls-tickets", 0),
            ("other-cert", "blog"),
            &["site-on-another-connection"],
        ),
        (
            "one that demands another certificate, and by HTTP/2 alone",
            format!("ca-file {other} verify required"),
            "http-request deny if { req.ver 1.1 }",
            ("no-tls-tickets", 0),
            ("other-cert", "blog"),
            &["site-on-another-connection"],
        ),
        (
            "and neither in the other's name",
            format!("ca-file {other} verify required"),
            &in_its_own_name,
            ("no-tls-tickets", 0),
            ("other-cert", "blog"),
            &[],
        ),
    ] {
        let list =
            format!("{shop} [ca-file {ours} verify required] {SHOP}\n{blog} [{demand}] {BLOG}\n");
        rig.pki.write("sites", &list);
        let page = |name: &str, page: &str| {
            format!(
                " http-request return status 200 content-type text/plain string {page} if {{ hdr(host) {name} }}\n"
            )
        };
        let text = format!(
            "global\n tune.ssl.cachesize {cache}\nfrontend f\n bind :443 ssl crt-list @PKI@/sites strict-sni alpn h2,http/1.1 {options}\n {rules}\n{}{}",
            page(SHOP, "goods"),
            page(BLOG, "posts")
        );
        let _server = haproxy(&rig, &text);

        let at = ["--origin", &origin().to_string()];
        let (_, report) = report(&rig, &at, &words_beside(&rig, presented));

        let found = ids(report.as_bytes());
        assert_eq!(besides(&[OPEN_PORT], found), sorted(expected), "{what}");
        for line in remedy {
            assert_eq!(
                report.contains(line),
                !expected.is_empty(),
                "{what}: {report}"
            );
        }
    }
}

#[test]
fn what_caddy_leaves_open_is_found() {
    let h1_and_h2 = " auto_https disable_redirects\n servers {\n protocols h1 h2\n }";
    let demanding = |mode: &str| {
        format!("client_auth {{\n mode {mode}\n trusted_ca_cert_file @PKI@/ours-ca.pem\n }}")
    };
    let site = |name: &str, tls: &str, page: &str| {
        format!(
            "https://{name} {{\n tls @PKI@/{SHOP}.pem @PKI@/{SHOP}.key {{\n {tls}\n }}\n {page}\n}}\n"
        )
    };
    let shop = |tls: &str| site(SHOP, tls, "respond page");
    let strict = demanding("require_and_verify");
    let right = shop(&strict);
    for (what, all, sites, presented, expected) in [
        ("as it should be", h1_and_h2, right.clone(), OWN, &[][..]),
        (
            "a chain",
            h1_and_h2,
            right.clone(),
            ("cert", "between"),
            &[],
        ),
        (
            "TLS 1.2 alone",
            h1_and_h2,
            shop(&format!("{strict}\n protocols tls1.2 tls1.2")),
            OWN,
            &[],
        ),
        (
            "HTTP/3, as it is by itself",
            " auto_https disable_redirects",
            right.clone(),
            NOTHING,
            &["quic-open"],
        ),
        ("nothing is demanded", h1_and_h2, shop(""), NOTHING, &SERVED),
        (
            "a certificate is requested",
            h1_and_h2,
            shop(&demanding("request")),
            NOTHING,
            &SERVED,
        ),
        (
            "any certificate",
            h1_and_h2,
            shop(&demanding("require")),
            NOTHING,
            &SERVED[..2],
        ),
        (
            "verified if there is one",
            h1_and_h2,
            shop(&demanding("verify_if_given")),
            NOTHING,
            &["served-without-certificate"],
        ),
        (
            "the CA is another one",
            h1_and_h2,
            right.replace("ours-ca", "other-ca"),
            OWN,
            &["own-certificate-refused"],
        ),
        // It reads no list of what is revoked.
        (
            "a certificate that was revoked",
            h1_and_h2,
            right.clone(),
            REVOKED,
            &["other-certificate-admitted"],
        ),
        (
            "port 80 serves",
            h1_and_h2,
            format!("{right}http://{SHOP} {{\n respond page\n}}\n"),
            NOTHING,
            &["other-port-serves"],
        ),
        (
            "port 80 redirects, as it does by itself",
            " servers {\n protocols h1 h2\n }",
            right.clone(),
            NOTHING,
            &["other-port-open"],
        ),
        (
            "another port without a demand",
            h1_and_h2,
            right.clone() + &site(&format!("{SHOP}:8443"), "", "respond page"),
            NOTHING,
            &["other-port-serves"],
        ),
        (
            "a site for all other names",
            h1_and_h2,
            right.clone() + &site(":443", "", "respond another").replace("https://", ""),
            NOTHING,
            // Without a name, it minds that none is the host either.
            &[
                "certificate-shown",
                "certificate-shown",
                "default-site-served",
            ],
        ),
        (
            "an application that answers 404 to everything",
            h1_and_h2,
            site(SHOP, "", "respond 404"),
            NOTHING,
            &SERVED,
        ),
        (
            "a client's own word for its address",
            h1_and_h2,
            site(
                SHOP,
                &demanding("verify_if_given"),
                "@office header CF-Connecting-IP *\n respond @office office 201\n respond page",
            ),
            NOTHING,
            &["client-address-believed", "served-without-certificate"],
        ),
    ] {
        let rig = rig();
        let _server = caddy(&rig, all, &sites);

        let (_, found) = probe(&rig, &words(&rig, presented));

        assert_eq!(besides(&[OPEN_PORT], found), sorted(expected), "{what}");
    }
}

#[test]
fn sites_of_caddys_share_what_one_of_them_demands_only_without_strict_names() {
    let site = |name: &str, authority: &str, page: &str| {
        format!(
            "https://{name} {{\n tls @PKI@/{SHOP}.pem @PKI@/{SHOP}.key {{\n client_auth {{\n mode require_and_verify\n \
             trusted_ca_cert_file @PKI@/{authority}-ca.pem\n }}\n }}\n respond {page}\n}}\n"
        )
    };
    let sites = site(SHOP, "ours", "goods") + &site(BLOG, "other", "posts");
    for (what, strict, expected) in [
        ("as it is by itself", "", &[][..]),
        (
            "`strict_sni_host` is off",
            "strict_sni_host insecure_off",
            &["site-on-another-connection"],
        ),
    ] {
        let rig = rig();
        let all =
            format!(" auto_https disable_redirects\n servers {{\n protocols h1 h2\n {strict}\n }}");
        let _server = caddy(&rig, &all, &sites);

        let (_, found) = probe(&rig, &words_beside(&rig, ("other-cert", "blog")));

        assert_eq!(besides(&[OPEN_PORT], found), sorted(expected), "{what}");
    }
}

#[test]
fn what_the_gate_leaves_open_is_found() {
    let web_server = "server { listen 127.0.0.1:8080 proxy_protocol; return 200 page; }";
    let shop = |lines: &str| shop(&format!("{ON_LOOPBACK}\n{lines}"));
    let shared = "trust = [\"cloudflare\"]";
    let shared_ca = "cloudflare_ca_file = \"@PKI@/shared-ca.pem\"";
    let edge = Host::Edge.addresses()[0];
    for (what, gate, hosts, more, presented, expected) in [
        ("as it should be", "", shop(""), "", OWN, &[][..]),
        ("a chain", "", shop(""), "", ("cert", "between"), &[]),
        (
            "no client is refused",
            "",
            shop("client_auth = \"log\""),
            "",
            NOTHING,
            &SERVED,
        ),
        (
            "no client is asked",
            "",
            shop("client_auth = \"off\""),
            "",
            NOTHING,
            &SERVED,
        ),
        (
            "every customer of Cloudflare's",
            shared_ca,
            shop(shared),
            "",
            ("other-cert", "customer"),
            &["other-certificate-admitted"],
        ),
        (
            "a CA of one's own",
            shared_ca,
            shop(""),
            "",
            ("other-cert", "customer"),
            &[],
        ),
        (
            "the CA is another one",
            "",
            shop("trust = [\"@PKI@/other-ca.pem\"]"),
            "",
            OWN,
            &["own-certificate-refused"],
        ),
        (
            "no list of what is revoked",
            "",
            shop(""),
            "",
            REVOKED,
            &["other-certificate-admitted"],
        ),
        (
            "a list of what is revoked",
            "",
            shop("crl = [\"@PKI@/ours.crl\"]"),
            "",
            REVOKED,
            &[],
        ),
        (
            "an expired certificate",
            "",
            shop(""),
            "",
            ("other-cert", "expired"),
            &[],
        ),
        (
            "unknown names belong to a host",
            "",
            shop("default = true"),
            "",
            NOTHING,
            &["certificate-shown", "certificate-shown"],
        ),
        (
            "unknown names belong to a host that refuses no client",
            "",
            shop("default = true\nclient_auth = \"log\""),
            "",
            NOTHING,
            &[
                "certificate-shown",
                "certificate-shown",
                "default-site-served",
                "default-site-served",
                SERVED[0],
                SERVED[1],
                SERVED[2],
            ],
        ),
        (
            "port 80 of the web server serves",
            "",
            shop(""),
            "server { listen 80; return 200 page; }",
            NOTHING,
            &["other-port-serves"],
        ),
        (
            "another port of the web server serves",
            "",
            shop(""),
            "server { listen 8080; return 200 page; }",
            NOTHING,
            &["other-port-serves"],
        ),
        (
            "a client is taken for a load balancer",
            &format!("proxy_from = [\"{edge}\"]"),
            shop(""),
            "",
            NOTHING,
            &["proxy-header-believed"],
        ),
        (
            "no web server behind it",
            "",
            shop("").replace("8080", "8079"),
            "",
            OWN,
            &["no-answer-to-cloudflare"],
        ),
    ] {
        let mut rig = rig();
        let _web_server = nginx(&rig, &format!("{web_server}\n{more}"), "127.0.0.1:8080");
        rig.start(gate, &[&hosts]);

        let (_, found) = probe(&rig, &words(&rig, presented));

        assert_eq!(besides(&[OPEN_PORT], found), sorted(expected), "{what}");
    }
}

#[test]
fn hosts_of_the_gate_that_share_a_web_server_share_what_one_of_them_demands() {
    let site = |name: &str, address: &str| {
        let page = if name == SHOP { "goods" } else { "posts" };
        format!(
            "server {{ listen {address} proxy_protocol; server_name {name}; return 200 {page}; }}\n"
        )
    };
    let (one, another) = ("127.0.0.1:8080", "127.0.0.1:8082");
    let blog_at = |address: &str, lines: &str| blog(&format!("upstream = \"{address}\"\n{lines}"));
    for (what, sites, host, presented, expected) in [
        (
            "a host that refuses no client",
            site(BLOG, one),
            blog_at(one, "client_auth = \"log\""),
            NOTHING,
            &["site-on-another-connection"][..],
        ),
        (
            "a host that trusts another CA",
            site(BLOG, one),
            blog_at(one, ""),
            ("other-cert", "blog"),
            &["site-on-another-connection"],
        ),
        (
            "a host with an upstream of its own",
            site(BLOG, another),
            blog_at(another, ""),
            ("other-cert", "blog"),
            &[],
        ),
    ] {
        let mut rig = rig();
        let _web_server = nginx(&rig, &(sites + &site(SHOP, one)), one);
        rig.start("", &[&shop(ON_LOOPBACK), &host]);

        let (_, found) = probe(&rig, &words_beside(&rig, presented));

        assert_eq!(besides(&[OPEN_PORT], found), sorted(expected), "{what}");
    }
}

#[test]
fn an_address_that_was_forgotten_is_found() {
    let rig = rig();
    let verify = "ssl_client_certificate @PKI@/ours-ca.pem; ssl_verify_client on;";
    let reject = "server { listen 443 ssl default_server; listen [::]:443 ssl default_server; ssl_reject_handshake on; }";
    let sites =
        nginx_site(SHOP, "443 ssl", verify) + &nginx_site(SHOP, "[::]:443 ssl", "") + reject;
    let _server = nginx(&rig, &sites, "127.0.0.1:443");
    let [v4, v6] = Host::Origin.addresses().map(|address| address.to_string());

    let (v4_code, of_v4) = probe_at(&rig, &["--origin", &v4], &[]);
    let (code, of_both) = probe_at(&rig, &["--origin", &v4, "--origin", &v6], &[]);

    assert_eq!((v4_code, of_v4), (0, sorted(&[OPEN_PORT])));
    assert_eq!(code, 1);
    assert_eq!(besides(&[OPEN_PORT], of_both), sorted(&SERVED));
}

#[test]
fn a_certificate_to_refuse_is_found_until_it_is_revoked() {
    let rig = Rig::new();
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
        let site = nginx_site(SHOP, "443 ssl", &format!("{verify} {lines}"));
        let _server = nginx(&rig, &(site + reject), "127.0.0.1:443");

        let (_, found) = probe(&rig, &presenting(&rig, "other-cert", old));

        let found = besides(&[OPEN_PORT], found);
        assert_eq!(found, sorted(expected), "{old} {lines}");
    }
}

#[test]
fn a_session_of_another_name_is_found() {
    let rig = Rig::new();
    rig.pki.write_identity("blog", &rig.pki.other.client());
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
        (
            "nothing is demanded",
            nothing,
            shop.clone(),
            &["other-name-served"],
        ),
        (
            "an application that answers 404",
            blog.clone(),
            shop.clone() + " location = / { return 404; }",
            // For a connection by a name that is not served, it compares no names.
            &[
                "session-of-another-name",
                "site-on-another-connection",
                "site-on-another-connection",
            ],
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
            nginx_site(BLOG, "443 ssl default_server", &blog) + &nginx_site(SHOP, "443 ssl", &shop);
        let _server = nginx(&rig, &sites, "127.0.0.1:443");
        let name = ["--other-name".to_owned(), BLOG.to_owned()];
        let words = [&name[..], &presenting(&rig, "other-cert", "blog")].concat();

        let (_, found) = probe(&rig, &words);

        let found = besides(
            &["certificate-shown", "default-site-served", OPEN_PORT],
            found,
        );
        assert_eq!(found, sorted(expected), "{what}");
    }
}
