//! Verifies what `pullgate probe` finds by the site's name: what DNS has, and what a visitor sees through Cloudflare.

#![expect(
    clippy::unwrap_used,
    reason = "a rig that cannot be made stops the test"
)]

use std::fs;

use serde_json::Value;
use tests::Rig;
use tests::daemon::binary;
use tests::gate::origin;
use tests::net::Host;
use tests::pki::SHOP;
use tests::probing::{gated, ids, nginx, nginx_site, presenting, sorted};
use tests::web::Server;

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

        let (found, unanswered) = probe_by_name(&rig, &["--dns", "--dns-name", "direct.example"]);

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
    let (rig, _web_server) = gated();
    let edge = Host::Edge.addresses()[0];
    let _dns = name_server(&rig, &[format!("host-record={SHOP},{edge}")]);
    let own = presenting(&rig, "cert", "client");
    let mut words = vec!["--through"];
    words.extend(own.iter().map(String::as_str));
    let ray = "add_header cf-ray 8d2f1e9c3b7a4d60-FRA always;";
    let refusing = "127.0.0.1:8443";
    let _another = nginx(
        &rig,
        &nginx_site(SHOP, "8443 ssl", "return 403 no;"),
        refusing,
    );
    for (lines, expected) in [
        (format!("{ray} return 200 page;"), &[][..]),
        ("return 200 page;".to_owned(), &["not-through-cloudflare"]),
        (
            format!(
                "{ray} add_header cf-error-type origin always; add_header cf-error-origin 192.0.2.9 always; return 522;"
            ),
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
    // One of several origins may be the one.
    let _cloudflare = edge_server(&rig, &format!("{ray} return 403 no;"));
    let other = format!("{}:8443", origin());
    words.extend(["--origin", &other]);
    assert_eq!(probe_by_name(&rig, &words), (Vec::new(), Vec::new()));
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
    // A name that only DNS has is none of the origin's.
    let first = report[0]["checks"].as_array().unwrap();
    let sessions = first.iter().find(|check| check["id"] == "sessions");
    assert_eq!(sessions.unwrap()["answered"], true, "{report:#?}");
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
