//! Verifies reloads: nothing is lost, nothing that is bad takes effect, and what
//! was granted by older terms is worth nothing.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use rustls::version::{TLS12, TLS13};
use tests::Rig;
use tests::client::{Client, connect};
use tests::gate::{ON_LOOPBACK, PLENTY, blog, host, origin, shop};
use tests::net::Host;
use tests::pki::{self, SHOP};
use tests::upstream::{Manner, Upstream};
use time::OffsetDateTime;

#[test]
fn tickets_are_worthless_once_the_trust_has_changed_and_not_before() {
    let mut rig = Rig::new();
    let tomorrow = OffsetDateTime::now_utc() + Duration::from_secs(86_400);
    rig.pki.write("crl.pem", &rig.pki.ours.crl(&[7], tomorrow));
    let pin = format!("sha256:{}", "0".repeat(64));
    // Which headers the web server gets is one of the changes.
    let shop = |lines: &str| shop(&format!("{lines}\n{ON_LOOPBACK}"));
    rig.start("", &[&shop("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let changes = [
        // Another certificate to show, another limit: whom to trust is the same.
        (shop("proxy_protocol = \"v1\""), true),
        (
            shop("trust = [\"@PKI@/ours-ca.pem\", \"@PKI@/other-ca.pem\"]"),
            false,
        ),
        (
            shop(&format!("trust = [\"@PKI@/ours-ca.pem\", \"{pin}\"]")),
            false,
        ),
        (shop("crl = [\"@PKI@/crl.pem\"]"), false),
        (shop("crl = [\"@PKI@/crl.pem\"]\nmax_depth = 1"), false),
        (shop(""), false),
    ];

    for (change, survives) in changes {
        let identity = rig.pki.ours.client();
        for version in [&TLS13, &TLS12] {
            let client = Client::speaking(&rig.pki, Some(&identity), &[version]);
            let get = || {
                let (reply, resumed) = client.get(&rig.network, Host::Edge, origin(), SHOP);
                (reply.brief(), resumed)
            };
            assert_eq!(get(), ("200".to_owned(), false));
            assert_eq!(get(), ("200".to_owned(), true));
            let before = fs::read_to_string(&rig.config).unwrap();
            assert!(rig.reconfigure("", &[&change]));
            assert_eq!(get(), ("200".to_owned(), survives), "{change}");
            fs::write(&rig.config, before).unwrap();
            assert!(rig.reload());
        }
        assert!(rig.reconfigure("", &[&change]));
    }
}

#[test]
fn a_shorter_idle_timeout_counts_at_once() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Echo);
    let mark = rig.gate().mark();
    let _silent = rig
        .edge()
        .connect(&rig.network, Host::Edge, origin(), SHOP)
        .unwrap();

    assert!(rig.reconfigure("idle_timeout = \"1s\"", &[&shop("")]));
    assert_eq!(rig.outcome(mark), "Idle");
}

#[test]
fn without_resumption_there_are_no_tickets() {
    let rig = Rig::with_shop("resumption = \"off\"");
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    for version in [&TLS13, &TLS12] {
        let client = Client::speaking(&rig.pki, Some(&rig.pki.ours.client()), &[version]);
        for _ in 0..2 {
            let (reply, resumed) = client.get(&rig.network, Host::Edge, origin(), SHOP);
            assert_eq!((reply.brief().as_str(), resumed), ("200", false));
        }
    }
}

#[test]
fn live_connections_end_with_their_trust_if_that_is_wanted() {
    let mut rig = Rig::new();
    let close = "on_trust_change = \"close\"";
    rig.start(
        "",
        &[&shop(close), &blog("trust = [\"@PKI@/ours-ca.pem\"]")],
    );
    let _upstream = Upstream::start(&rig.network, Manner::Echo);
    let open = |name: &str| {
        let edge = rig.edge();
        let mut session = edge
            .connect(&rig.network, Host::Edge, origin(), name)
            .unwrap();
        session.write_all(b"once").unwrap();
        session.read_exact(&mut [0; 4]).unwrap();
        session
    };
    let (mut ending, mut staying) = (open(SHOP), open("blog.example"));
    let both = "trust = [\"@PKI@/ours-ca.pem\", \"@PKI@/other-ca.pem\"]";

    // A reload that changes no trust ends nothing.
    assert!(rig.reload());
    ending.write_all(b"more").unwrap();
    ending.read_exact(&mut [0; 4]).unwrap();
    let mark = rig.gate().mark();
    assert!(rig.reconfigure("", &[&shop(&format!("{close}\n{both}")), &blog(both)]));

    let mut rest = Vec::new();
    ending.read_to_end(&mut rest).unwrap();
    assert_eq!(rig.outcome(mark), "TrustChanged");
    staying.write_all(b"more").unwrap();
    staying.read_exact(&mut [0; 4]).unwrap();
}

#[test]
fn a_bad_file_keeps_what_was_and_says_so() {
    let mut rig = Rig::new();
    let tomorrow = OffsetDateTime::now_utc() + Duration::from_secs(86_400);
    rig.pki.write("crl.pem", &rig.pki.ours.crl(&[7], tomorrow));
    rig.start(GATE, &[&shop("crl = [\"@PKI@/crl.pem\"]"), &blog(BLOG)]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    for (count, (file, defect)) in FILES
        .iter()
        .flat_map(|file| DEFECTS.iter().map(move |defect| (*file, *defect)))
        .enumerate()
    {
        let path = rig.pki.path(file);
        let good = fs::read(&path).unwrap();
        spoil(&rig, file, defect);
        assert!(!rig.reload(), "{file} {defect:?}");
        assert_eq!(
            rig.tell(&rig.edge(), SHOP),
            "200, Relayed",
            "{file} {defect:?}"
        );
        let status = rig.gate().status();
        let warnings = status["findings"].to_string();
        assert!(is_reported(&warnings), "{file} {defect:?}: {warnings}");
        assert!(warnings.contains(file), "{file} {defect:?}: {warnings}");
        let failed = rig
            .gate()
            .metric("pullgate_gate_reload_total{outcome=\"Failed\"}");
        assert!(failed > count as u64, "{file} {defect:?}");

        drop(fs::remove_dir(&path));
        rig.pki.write(file, &String::from_utf8(good).unwrap());
        assert!(rig.reload(), "{file} {defect:?}");
        let warnings = rig.gate().status()["findings"].to_string();
        assert!(!is_reported(&warnings), "{warnings}");
    }
    // So does a configuration that is none, and one without a gate.
    for bad in ["[gate", "[ranges]\n"] {
        let good = fs::read_to_string(&rig.config).unwrap();
        fs::write(&rig.config, bad).unwrap();
        assert!(!rig.reload());
        assert_eq!(rig.tell(&rig.edge(), SHOP), "200, Relayed");
        let warnings = rig.gate().status()["findings"].to_string();
        assert!(is_reported(&warnings), "{bad}: {warnings}");
        fs::write(&rig.config, good).unwrap();
    }
}

/// What is wrong with a host's file is reported as the host's, anything else as the reload's.
fn is_reported(findings: &str) -> bool {
    findings.contains("files-unusable") || findings.contains("configuration-not-reloaded")
}

#[test]
fn a_host_whose_file_is_broken_keeps_its_policy_and_the_others_go_on() {
    let mut rig = Rig::new();
    let ours = "trust = [\"@PKI@/ours-ca.pem\"]";
    rig.start("", &[&shop(""), &blog(ours)]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let other = Client::new(&rig.pki, Some(&rig.pki.other.client()));
    spoil(&rig, "blog.example.key", Defect::Empty);
    let trust = "trust = [\"@PKI@/other-ca.pem\"]";
    rig.configure(
        "",
        &[&shop(trust), &blog(&format!("{ours}\nmax_depth = 1"))],
    );

    let reload = rig.pullgate(&["reload", "--only", "gate"]);

    let error = String::from_utf8_lossy(&reload.stderr).into_owned();
    assert_eq!(reload.status.code(), Some(78), "{error}");
    assert!(
        error.contains("`blog.example` is served as before"),
        "{error}"
    );
    assert!(error.contains("blog.example.key"), "{error}");
    assert_eq!(rig.tell(&other, SHOP), "200, Relayed");
    assert_eq!(
        rig.tell(&rig.edge(), SHOP),
        "alert UnknownCA, UnknownIssuer"
    );
    assert_eq!(rig.tell(&rig.edge(), "blog.example"), "200, Relayed");
    let findings = rig.gate().status()["findings"].to_string();
    assert!(findings.contains("files-unusable"), "{findings}");
    assert!(
        !findings.contains("configuration-not-reloaded"),
        "{findings}"
    );
}

#[test]
fn a_host_that_is_kept_gives_up_the_name_that_is_anothers_by_now() {
    let mut rig = Rig::new();
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let names = ["a.example", "b.example", "moved.example"];
    rig.pki.write_server("all", &names);
    let ours = "trust = [\"@PKI@/ours-ca.pem\"]";
    let others = "trust = [\"@PKI@/other-ca.pem\"]";
    rig.start(
        "",
        &[
            &host(&["b.example"], "all", others),
            &host(&["a.example", "moved.example"], "all", ours),
        ],
    );
    let other = Client::new(&rig.pki, Some(&rig.pki.other.client()));
    assert_eq!(rig.tell(&rig.edge(), "moved.example"), "200, Relayed");

    let broken = "trust = [\"@PKI@/gone.pem\"]";
    assert!(!rig.reconfigure(
        "",
        &[
            &host(&["b.example", "moved.example"], "all", others),
            &host(&["a.example"], "all", broken),
        ],
    ));

    assert_eq!(rig.tell(&rig.edge(), "a.example"), "200, Relayed");
    assert_eq!(rig.tell(&other, "moved.example"), "200, Relayed");
    let refused = "alert UnknownCA, UnknownIssuer";
    assert_eq!(rig.tell(&rig.edge(), "moved.example"), refused);
}

#[test]
fn a_bad_file_at_the_start_is_refused_before_any_port_is_bound() {
    let rig = Rig::new();
    let tomorrow = OffsetDateTime::now_utc() + Duration::from_secs(86_400);
    rig.pki.write("crl.pem", &rig.pki.ours.crl(&[7], tomorrow));
    let lines = format!("crl = [\"@PKI@/crl.pem\"]\n{BLOG}");
    rig.configure(GATE, &[&shop(&lines)]);

    for file in FILES {
        for defect in DEFECTS {
            let path = rig.pki.path(file);
            let good = fs::read_to_string(&path).unwrap();
            spoil(&rig, file, defect);

            let output = rig.pullgate(&["run", "--only", "gate"]);

            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(78), "{file} {defect:?}: {text}");
            assert!(text.contains(file), "{text}");
            assert!(!text.contains("listening"), "{text}");
            drop(fs::remove_dir(&path));
            rig.pki.write(file, &good);
        }
    }
    // A list of a CA that is not trusted would be without effect.
    rig.pki.write("crl.pem", &rig.pki.other.crl(&[7], tomorrow));
    let output = rig.pullgate(&["run", "--only", "gate"]);
    assert_eq!(output.status.code(), Some(78));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is of no CA in `trust`"));
}

#[test]
fn a_key_that_the_group_may_read_is_fine_if_it_is_our_own() {
    let rig = Rig::new();
    rig.configure("", &[&shop("")]);
    let key = rig.pki.path("shop.example.key");
    let check = |mode: u32, group: u32| {
        fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
        nix::unistd::chown(&key, None, Some(nix::unistd::Gid::from_raw(group))).unwrap();
        rig.pullgate(&["check"]).status.success()
    };

    assert!(check(0o600, 54_321));
    assert!(check(0o640, 0));
    assert!(!check(0o640, 54_321));
    assert!(!check(0o604, 0));
}

#[test]
fn a_certificate_that_is_replaced_is_shown_without_a_signal() {
    let rig = Rig::with_shop("");
    let shown = || {
        let edge = rig.edge();
        let session = edge
            .connect(&rig.network, Host::Edge, origin(), SHOP)
            .unwrap();
        session.conn.peer_certificates().unwrap()[0].to_vec()
    };
    let before = shown();

    // The certificate alone does not belong to the key: it takes both.
    rig.pki.write_server("new", &[SHOP]);
    let mark = rig.gate().mark();
    fs::rename(rig.pki.path("new.pem"), rig.pki.path("shop.example.pem")).unwrap();
    rig.gate().event(mark, "half of it is not used", |event| {
        event["id"] == "files-partly-reloaded"
    });
    assert_eq!(shown(), before);
    let mark = rig.gate().mark();
    fs::rename(rig.pki.path("new.key"), rig.pki.path("shop.example.key")).unwrap();
    rig.gate().event(mark, "the new pair is active", |event| {
        event["id"] == "files-reloaded"
    });

    assert_ne!(shown(), before);
}

#[test]
fn a_file_of_one_host_that_cannot_be_used_keeps_no_other_down() {
    let mut rig = Rig::new();
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let blog_client = Client::new(&rig.pki, Some(&rig.pki.other.client()));
    let (certificate, aside) = (rig.pki.path("blog.example.pem"), rig.pki.path("aside.pem"));

    // At a start its host is refused, and no default takes its place.
    fs::rename(&certificate, &aside).unwrap();
    rig.start("", &[&blog(""), &shop("default = true")]);
    assert_eq!(rig.tell(&rig.edge(), SHOP), "200, Relayed");
    let refused = "alert InternalError, HostUnavailable";
    assert_eq!(rig.tell(&blog_client, pki::BLOG), refused);
    let warnings = rig.gate().status()["findings"].to_string();
    for words in ["`blog.example` is NOT SERVED", "blog.example.pem"] {
        assert!(warnings.contains(words), "{words}: {warnings}");
    }
    // Nothing is said of it that is of the other.
    assert!(
        !warnings.contains("no certificate of this host"),
        "{warnings}"
    );
    assert_eq!(rig.pullgate(&["check"]).status.code(), Some(78));
    let mark = rig.gate().mark();
    fs::rename(&aside, &certificate).unwrap();
    rig.gate()
        .event(mark, "it is read", |event| event["id"] == "files-reloaded");
    assert_eq!(rig.tell(&blog_client, pki::BLOG), "200, Relayed");

    // Later it is served as before, and what is new of the other is active.
    rig.pki
        .write("blog.example.pem", "-----BEGIN CERTIFICATE-----");
    rig.gate().event(mark, "it is not used", |event| {
        event["id"] == "files-partly-reloaded"
    });
    assert_eq!(rig.tell(&blog_client, pki::BLOG), "200, Relayed");
    let shown = || {
        let edge = rig.edge();
        let session = edge
            .connect(&rig.network, Host::Edge, origin(), SHOP)
            .unwrap();
        session.conn.peer_certificates().unwrap()[0].to_vec()
    };
    let before = shown();
    rig.pki.write_server("shop.example", &[SHOP]);
    tests::eventually("the other's new certificate is shown", || {
        (shown() != before).then_some(())
    });
}

#[test]
fn a_certificate_that_is_revoked_meanwhile_is_refused() {
    let mut rig = Rig::new();
    let tomorrow = OffsetDateTime::now_utc() + Duration::from_secs(86_400);
    let identity = rig.pki.ours.client_with(|params| {
        params.serial_number = Some(rcgen::SerialNumber::from(7));
    });
    rig.pki.write("crl.pem", &rig.pki.ours.crl(&[], tomorrow));
    rig.start("", &[&shop("crl = [\"@PKI@/crl.pem\"]")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let client = Client::new(&rig.pki, Some(&identity));
    assert_eq!(rig.tell(&client, SHOP), "200, Relayed");

    let mark = rig.gate().mark();
    rig.pki.write("crl.pem", &rig.pki.ours.crl(&[7], tomorrow));
    rig.gate().event(mark, "the list is read", |event| {
        event["id"] == "files-reloaded"
    });

    // Its ticket is of another trust; its certificate is seen to be revoked.
    assert_eq!(rig.tell(&client, SHOP), "alert CertificateRevoked, Revoked");
}

#[test]
fn who_connected_before_a_reload_is_judged_by_what_holds_after_it() {
    let mut rig = Rig::new();
    rig.start("handshake_timeout = \"30s\"", &[&shop("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let early = connect(&rig.network, Host::Edge, origin()).unwrap();
    tests::eventually("it is accepted", || {
        (rig.gate().metric("pullgate_gate_active_connections") == 1).then_some(())
    });

    let other = "trust = [\"@PKI@/other-ca.pem\"]";
    assert!(rig.reconfigure("handshake_timeout = \"30s\"", &[&shop(other)]));

    let reply = rig.edge().get_over(early, SHOP).to_string();
    assert_eq!(reply, "alert UnknownCA");
}

#[test]
fn connections_live_on_over_reloads() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("proxy_protocol = \"none\"")]);
    let _upstream = Upstream::start(&rig.network, Manner::Echo);
    let edge = rig.edge();
    let mut session = edge
        .connect(&rig.network, Host::Edge, origin(), SHOP)
        .unwrap();

    let mut ask = || {
        session.write_all(b"a question and its answer").unwrap();
        session.read_exact(&mut [0; 25]).unwrap();
    };
    ask();

    for trust in ["other", "ours", "other", "ours"] {
        let lines = format!("proxy_protocol = \"none\"\ntrust = [\"@PKI@/{trust}-ca.pem\"]");
        assert!(rig.reconfigure("", &[&shop(&lines)]));
        ask();
    }
}

#[test]
fn a_certificate_behind_links_is_followed_wherever_they_lead() {
    let mut rig = Rig::new();
    let at = |name: &str| rig.pki.path(name);
    for release in ["a", "b"] {
        rig.pki.write_server(release, &[SHOP]);
        fs::create_dir(at(&format!("release-{release}"))).unwrap();
        for kind in ["pem", "key"] {
            let file = format!("release-{release}/shop.{kind}");
            fs::rename(at(&format!("{release}.{kind}")), at(&file)).unwrap();
        }
    }
    // As a volume of secrets is: a link to a directory, and links through it.
    std::os::unix::fs::symlink("release-a", at("current")).unwrap();
    for kind in ["pem", "key"] {
        let through = format!("current/shop.{kind}");
        std::os::unix::fs::symlink(through, at(&format!("linked.{kind}"))).unwrap();
    }
    let files = "certificate = \"@PKI@/linked.pem\"\nkey = \"@PKI@/linked.key\"";
    rig.start("", &[&shop(files)]);

    let mark = rig.gate().mark();
    std::os::unix::fs::symlink("release-b", rig.pki.path("next")).unwrap();
    fs::rename(rig.pki.path("next"), rig.pki.path("current")).unwrap();

    rig.gate().event(mark, "the swap is seen", |event| {
        event["id"] == "files-reloaded"
    });
}

#[test]
fn what_waits_for_the_next_start_is_named_at_each_reload() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("")]);
    let named = |lines: &str| {
        let mark = rig.gate().mark();
        assert!(rig.reconfigure(lines, &[&shop("")]));
        let events = rig.gate().events();
        let text = events[mark..].iter().map(ToString::to_string);
        text.collect::<String>()
            .contains("`gate.listen` has changed")
    };

    let other = "listen = [\"127.0.0.1:444\"]";
    assert!(named(other));
    assert!(named(other));
    assert!(!named(""));
}

#[test]
fn a_hundred_reloads_under_load_fail_no_request() {
    let mut rig = Rig::new();
    let configurations = [
        [shop(""), blog("")],
        [
            shop("trust = [\"@PKI@/ours-ca.pem\", \"@PKI@/other-ca.pem\"]"),
            blog(""),
        ],
    ];
    rig.start(PLENTY, &[&configurations[0][0], &configurations[0][1]]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    let served = rig.under_load(|| {
        for n in 0..100 {
            let [shop, blog] = &configurations[n % 2];
            assert!(rig.reconfigure(PLENTY, &[shop, blog]));
        }
    });

    assert!(served > 20, "{served} requests");
}

/// What a file may be that it should not be.
#[derive(Clone, Copy, Debug)]
enum Defect {
    Missing,
    Empty,
    Html,
    Directory,
    Truncated,
    /// PEM, of something else.
    Other,
}

/// The files that the gate reads, in a configuration with these lines.
const FILES: [&str; 6] = [
    "shop.example.pem",
    "shop.example.key",
    "ours-ca.pem",
    "shared-ca.pem",
    "web-ca.pem",
    "crl.pem",
];
const GATE: &str = "cloudflare_ca_file = \"@PKI@/shared-ca.pem\"";
const BLOG: &str = "upstream_tls = { ca_file = \"@PKI@/web-ca.pem\" }";
const DEFECTS: [Defect; 6] = [
    Defect::Missing,
    Defect::Empty,
    Defect::Html,
    Defect::Directory,
    Defect::Truncated,
    Defect::Other,
];

fn spoil(rig: &Rig, file: &str, defect: Defect) {
    let path = rig.pki.path(file);
    let good = fs::read_to_string(&path).unwrap();
    match defect {
        Defect::Missing => fs::remove_file(&path).unwrap(),
        Defect::Empty => rig.pki.write(file, ""),
        Defect::Html => rig
            .pki
            .write(file, "<!DOCTYPE html><title>Just a moment…</title>"),
        Defect::Directory => {
            fs::remove_file(&path).unwrap();
            fs::create_dir(&path).unwrap();
        }
        Defect::Truncated => rig.pki.write(file, &good[..good.len() / 2]),
        Defect::Other => {
            let other = match file {
                // A web server's own certificate is an authority for itself.
                "web-ca.pem" => "blog.example.key",
                _ if file.ends_with("ca.pem") => "blog.example.pem",
                _ => "ours-ca.pem",
            };
            let other = fs::read_to_string(rig.pki.path(other)).unwrap();
            rig.pki.write(file, &other);
        }
    }
}
