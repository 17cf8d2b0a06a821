//! Verifies what becomes of the ranges: a new one opens the way, a bad list changes nothing, much
//! is not removed before it is approved, and what an operator may do by hand.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;
use pullgate::digest::sha256;
use serde_json::Value;
use tests::daemon::{Pullgate, binary};
use tests::feed::{Answer, IPS_V4, IPS_V6, api_answer, api_answer_of, api_answer_without};
use tests::net::{Host, INTERFACE};
use tests::pki::SHOP;
use tests::{Lab, Plan, assert_matched, eventually, scenarios};

#[test]
fn a_range_that_the_feed_gains_and_loses_opens_and_closes_the_way() {
    let lab = Lab::start(&Plan::default());

    assert_matched(&scenarios::a_new_range_opens_the_way(&lab));
}

#[test]
fn a_bad_list_changes_nothing_and_is_counted() {
    let lab = Lab::start(&Plan::default());

    assert_matched(&scenarios::bad_lists_change_nothing(&lab));
}

// A list that shrinks.

#[test]
fn a_list_that_shrinks_is_held_until_the_operator_approves() {
    let lab = Lab::start(&Plan::default());
    assert_eq!(lab.pullgate(&["ranges", "approve"]).status.code(), Some(64));

    let held = lab.refresh(Answer::Body(half()));
    let status = lab.ranges().status();
    let shown = lab.pullgate(&["ranges", "approve", "--dry-run"]);
    let still = lab.refresh_as_it_is();

    assert_eq!(held["outcome"], "Held");
    assert_eq!(still["outcome"], "Held");
    assert_eq!(status["metrics"]["pullgate_ranges_held"], 1.0);
    let warnings = status["findings"].to_string();
    assert!(warnings.contains("list-held"), "{warnings}");
    let shown = text(&shown);
    assert!(shown.contains("% of the active IPv4 addresses"), "{shown}");
    assert!(shown.contains("- 104.16.0.0/13"), "{shown}");
    assert_eq!(exported(&lab).len(), 15 + 7);

    // Neither does a failure end the hold, nor is anything approved that was not shown.
    assert_eq!(lab.refresh(Answer::Nothing)["outcome"], "NoAnswer");
    let other = lab.pullgate(&["ranges", "approve", "0123456789abcdef01234567"]);
    assert_eq!(other.status.code(), Some(64), "{other:?}");
    let held = json(&lab, &["ranges", "approve", "--dry-run"]);
    let id = held[0]["held"]["id"].as_str().unwrap();
    let error = String::from_utf8(other.stderr).unwrap();
    assert!(
        error.contains(&format!("what is held is {id}; ")),
        "{error}"
    );
    let approved = lab.pullgate(&["ranges", "approve", id]);

    assert!(approved.status.success(), "{approved:?}");
    assert!(text(&approved).contains("taken in: "), "{approved:?}");
    lab.feed.answer(Answer::Body(half()));
    assert_eq!(
        lab.ranges().status()["metrics"]["pullgate_ranges_held"],
        0.0
    );
    // Approved is not gone: the grace is still due.
    eventually("the ranges go after their grace", || {
        assert_eq!(lab.refresh_as_it_is()["level"], "INFO");
        (exported(&lab).len() == 7 + 7).then_some(())
    });
}

#[test]
fn a_list_that_grows_much_is_held_and_the_way_back_is_short() {
    let lab = Lab::start(&Plan::default());
    let grown = || api_answer(&["64.0.0.0/9"], &[]);
    let added = "64.0.0.0/9".to_owned();

    assert_eq!(lab.refresh(Answer::Body(grown()))["outcome"], "Held");
    assert!(!exported(&lab).contains(&added));
    let held = json(&lab, &["ranges", "approve", "--dry-run"]);
    let id = held[0]["held"]["id"].as_str().unwrap();
    let approved = lab.pullgate(&["ranges", "approve", id]);
    assert!(approved.status.success(), "{approved:?}");
    assert!(exported(&lab).contains(&added));
    // The filter has it by the snapshot, which says that it was agreed to.
    eventually("the filter takes it over", || {
        let trouble = lab.filter().status()["findings"].to_string();
        assert!(!trouble.contains("snapshot-refused"), "{trouble}");
        (lab.filter().status()["ranges"]["v4"] == 16).then_some(())
    });

    let back = lab.refresh(Answer::Body(api_answer(&[], &[])));
    assert_eq!(back["id"], "ranges-refreshed", "{back}");
    assert!(!exported(&lab).contains(&added));
}

#[test]
fn a_growth_that_another_host_confirms_needs_no_approval() {
    let lab = Lab::start(&two_ways("1s"));
    let grown = api_answer(&["64.0.0.0/9"], &[]);
    lab.mirror.answer(Answer::Body(grown.clone()));

    let approved = lab.refresh(Answer::Body(grown));

    assert_eq!(approved["id"], "ranges-refreshed", "{approved}");
    assert!(exported(&lab).contains(&"64.0.0.0/9".to_owned()));
}

#[test]
fn a_shrinking_that_another_host_confirms_needs_no_approval() {
    let lab = Lab::start(&two_ways("1s"));
    lab.mirror.answer(Answer::Body(half()));

    let approved = lab.refresh(Answer::Body(half()));

    assert_eq!(approved["id"], "ranges-refreshed", "{approved}");
    assert_eq!(approved["kept"], 8);
    eventually("the ranges go after their grace", || {
        assert_eq!(lab.refresh_as_it_is()["level"], "INFO");
        (exported(&lab).len() == 7 + 7).then_some(())
    });
}

#[test]
fn the_same_host_by_another_way_is_no_second_opinion() {
    let lab = Lab::start(&Plan {
        sources: "[[{ url = \"@FEED@/client/v4/ips\", ca_file = \"@CA@\", like = \"cloudflare\" }, \
             { url = \"@FEED@/ips\", ca_file = \"@CA@\" }]]",
        ..Plan::default()
    });

    assert_eq!(lab.refresh(Answer::Body(half()))["outcome"], "Held");
}

#[test]
fn where_text_and_json_disagree_the_list_that_removes_little_counts() {
    let lab = Lab::start(&two_ways("1h"));
    let whole = format!("{IPS_V4}{IPS_V6}");

    lab.mirror.answer(Answer::Body(whole));
    let contradicted = lab.refresh(Answer::Body(half()));
    lab.mirror.answer(Answer::Body(api_answer_of(
        &["64.0.0.0/13"],
        &["2a00::/29"],
    )));
    let at_odds = lab.refresh_as_it_is();

    assert_eq!(contradicted["id"], "ranges-refreshed");
    assert_eq!(contradicted["outcome"], "Unchanged");
    assert_eq!(at_odds["outcome"], "Held", "{at_odds}");
    let events = lab.ranges().events();
    let warned = events
        .iter()
        .any(|event| event["id"] == "list-way-failed" && event["level"] == "WARN");
    assert!(warned);
    assert_eq!(exported(&lab).len(), 15 + 7);
}

#[test]
fn a_range_that_an_authenticated_connection_came_from_stays() {
    let lab = Lab::start(&Plan::default());
    let visit = || {
        let origin = Host::Origin.addresses()[0];
        let (reply, _) = lab.edge().get(&lab.network, Host::Edge, origin, SHOP);
        reply.brief()
    };

    lab.refresh(Answer::Body(api_answer_without(EDGE_NET)));
    eventually("the gate looks out for the range", || {
        let usage = lab.gate().get("/range-usage");
        (usage[0]["range"] == EDGE_NET).then_some(())
    });
    // Longer than the grace, but he comes all the time.
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(2) {
        assert_eq!(visit(), "200");
        assert_eq!(lab.refresh_as_it_is()["kept"], 1);
    }
    assert!(lab.gate().get("/range-usage")[0]["seen_ms_ago"].is_number());

    // And then he does not.
    eventually("the range goes when no client comes from it", || {
        (lab.refresh_as_it_is()["kept"] == 0).then_some(())
    });
    eventually("he is a stranger now", || (visit() != "200").then_some(()));
}

#[test]
fn without_an_answer_of_the_gate_nothing_goes() {
    let mut lab = Lab::start(&Plan::default());
    lab.gate.take().unwrap().kill();

    lab.refresh(Answer::Body(api_answer_without(EDGE_NET)));
    eventually("the range is missing for longer than its grace", || {
        lab.refresh_as_it_is();
        let shown = json(&lab, &["ranges", "show", "173.245.48.5"]);
        (shown["ranges"][0]["missing_seconds"].as_u64() >= Some(2)).then_some(())
    });
    assert_eq!(lab.refresh_as_it_is()["kept"], 1);
    let warnings = lab.ranges().status()["findings"].to_string();
    assert!(warnings.contains("range-usage-unknown"), "{warnings}");

    lab.start_gate();
    eventually("the gate has looked out long enough", || {
        (lab.refresh_as_it_is()["kept"] == 0).then_some(())
    });
}

// A disk that fails.

#[test]
fn a_full_disk_changes_nothing_and_is_said() {
    let lab = Lab::start(&Plan {
        small_disk: true,
        ..Plan::default()
    });
    let filler = lab.network.path("state/filler");
    let mut file = fs::File::create(&filler).unwrap();
    while file.write(&[0; 512]).is_ok_and(|written| written != 0) {}
    let more = || Answer::Body(api_answer(&["64.0.0.0/24"], &[]));

    let refused = lab.refresh(more());
    assert_eq!(refused["outcome"], "NotSaved", "{refused}");
    assert!(
        refused["error"].as_str().unwrap().contains("No space left"),
        "{refused}"
    );
    assert_eq!(exported(&lab).len(), 15 + 7);
    assert!(!lab.network.path("state/ranges.json.new").exists());

    drop(file);
    fs::remove_file(filler).unwrap();
    assert_eq!(lab.refresh(more())["outcome"], "Changed");
    assert_eq!(exported(&lab).len(), 15 + 7 + 1);
}

#[test]
fn a_disk_that_became_read_only_changes_nothing_and_is_said() {
    let lab = Lab::start(&Plan {
        small_disk: true,
        ..Plan::default()
    });
    let remount = |flags| {
        let none = None::<&str>;
        let state = lab.network.path("state");
        mount(none, &state, none, MsFlags::MS_REMOUNT | flags, none).unwrap();
    };

    remount(MsFlags::MS_RDONLY);
    let refused = lab.refresh(Answer::Body(api_answer(&["64.0.0.0/24"], &[])));
    assert_eq!(refused["outcome"], "NotSaved", "{refused}");
    assert_eq!(exported(&lab).len(), 15 + 7);

    remount(MsFlags::empty());
    assert_eq!(lab.refresh_as_it_is()["outcome"], "Changed");
}

#[test]
fn a_corrupt_snapshot_is_said_set_aside_and_lets_nobody_in() {
    let mut lab = Lab::start(&Plan::default());
    let snapshot = lab.network.path("state/ranges.json");
    let evil = fs::read_to_string(&snapshot).unwrap();
    let evil = evil.replace("173.245.48.0/20", "198.51.100.0/24");
    let mark = lab.filter().mark();
    // In one step: a file that is being written is refused for another reason.
    let other = lab.network.path("state/other");
    fs::write(&other, &evil).unwrap();
    fs::rename(&other, &snapshot).unwrap();
    lab.filter().event(mark, "the filter refuses it", |event| {
        event["level"] == "ERROR" && event["error"].to_string().contains("checksum is wrong")
    });

    let warnings = lab.filter().status()["findings"].to_string();
    assert!(warnings.contains("snapshot-refused"), "{warnings}");

    for role in [&mut lab.ranges, &mut lab.filter] {
        role.take().unwrap().kill();
    }
    lab.feed.answer(Answer::Nothing);
    lab.start_filter();
    lab.start_ranges();
    let status = lab.filter().status();
    assert!(status["findings"].to_string().contains("baseline-active"));
    assert_matched(&scenarios::strangers_are_dropped(&lab));

    lab.refresh(Answer::Body(api_answer(&[], &[])));
    let aside = lab.network.path("state/ranges.json.corrupt");
    assert_eq!(fs::read_to_string(aside).unwrap(), evil);
    assert_eq!(exported(&lab).len(), 15 + 7);
}

// Sources.

#[test]
fn several_sources_are_one_set_and_each_range_knows_its_own() {
    let mut lab = Lab::start(&Plan::default());
    let file = lab.network.path("own");
    fs::write(&file, "64.0.0.0/24\n").unwrap();
    reload(
        &mut lab,
        "[{ url = \"@FEED@/client/v4/ips\", ca_file = \"@CA@\" }, \
         { file = \"@DIR@/own\", families = [\"ipv4\"] }]\nstatic = [\"64.9.0.0/24\"]",
    );
    eventually("both sources are active", || {
        (exported(&lab).len() == 15 + 7 + 2).then_some(())
    });

    let sources =
        |address: &str| json(&lab, &["ranges", "show", address])["rule"]["sources"].clone();
    assert_eq!(
        sources("64.0.0.1"),
        serde_json::json!([file.display().to_string()])
    );
    assert_eq!(sources("64.9.0.1"), serde_json::json!(["static"]));
    let listed = text(&lab.pullgate(&["ranges", "list"]));
    assert!(listed.contains("64.9.0.0/24          static\n"), "{listed}");

    // A file is watched, and takes nothing of the others with it.
    fs::write(&file, "64.0.0.0/24\n64.0.1.0/24\n").unwrap();
    eventually("the file's new range is active", || {
        exported(&lab)
            .contains(&"64.0.1.0/24".to_owned())
            .then_some(())
    });
    let mark = lab.ranges().mark();
    fs::write(&file, "64.0.0.0/33\n").unwrap();
    let refused = lab.ranges().event(mark, "the file is refused", |event| {
        event["level"] == "WARN"
    });
    assert_eq!(refused["source"], file.display().to_string());
    assert_eq!(exported(&lab).len(), 15 + 7 + 3);

    // A source that is configured no more is not active any more.
    reload(
        &mut lab,
        "[{ url = \"@FEED@/client/v4/ips\", ca_file = \"@CA@\" }]",
    );
    eventually("its ranges are gone", || {
        (exported(&lab).len() == 15 + 7).then_some(())
    });
}

#[test]
fn what_another_source_lists_needs_nobodys_word_to_leave_a_list() {
    let mut lab = Lab::start(&Plan::default());
    let [one, other] = ["one", "other"].map(|name| lab.network.path(name));
    let both = "64.0.0.0/24\n64.0.1.0/24\n64.0.2.0/24\n64.0.3.0/24\n64.0.4.0/24\n";
    for file in [&one, &other] {
        fs::write(file, both).unwrap();
    }
    reload(
        &mut lab,
        "[{ file = \"@DIR@/one\", families = [\"ipv4\"], name = \"one\" }, \
         { file = \"@DIR@/other\", families = [\"ipv4\"], name = \"other\" }]",
    );
    let sources = || json(&lab, &["ranges", "show", "64.0.0.1"])["rule"]["sources"].clone();
    let both_list_it = serde_json::json!(["one", "other"]);
    eventually("both are active", || {
        (sources() == both_list_it).then_some(())
    });

    fs::write(&one, both.replace("64.0.0.0/24\n", "")).unwrap();

    eventually("one has it no more", || {
        lab.ranges().post("/refresh");
        (sources() == serde_json::json!(["other"])).then_some(())
    });
}

#[test]
fn ranges_that_cannot_be_published_are_tried_until_they_can() {
    let lab = Lab::start(&Plan::default());
    let bpf = lab.network.path("bpf");
    let remount = |flags| {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags;
        mount(None::<&str>, &bpf, None::<&str>, flags, None::<&str>).unwrap();
    };
    // More than the maps hold, so that larger ones have to be pinned.
    let many =
        (0..1_500).map(|n| format!("2a06:{:x}:{:x}::/48", 0x9900 + (n >> 8), (n & 0xff) << 8));
    let many: Vec<_> = many.collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    let mark = lab.filter().mark();

    remount(MsFlags::MS_RDONLY);
    let refreshed = lab.refresh(Answer::Body(api_answer(&[], &many)));
    assert_eq!(refreshed["id"], "ranges-refreshed", "{refreshed}");
    lab.filter().event(mark, "it is logged", |event| {
        event["id"] == "ranges-not-published"
    });
    let status = lab.filter().status();
    let findings = status["findings"].to_string();
    assert!(findings.contains("ranges-not-published"), "{findings}");
    assert_matched(&scenarios::strangers_are_dropped(&lab));

    remount(MsFlags::empty());
    lab.filter().event(mark, "they are published", |event| {
        event["id"] == "ranges-published"
    });
    let findings = lab.filter().status()["findings"].to_string();
    assert!(!findings.contains("ranges-not-published"), "{findings}");
}

#[test]
fn a_slow_source_keeps_no_other_waiting() {
    let mut lab = Lab::start(&Plan::default());
    lab.feed
        .answer_at("/slow", Answer::Drip(api_answer(&[], &[])));
    let mark = lab.ranges().mark();

    reload(
        &mut lab,
        "[{ url = \"@FEED@/slow\", ca_file = \"@CA@\", name = \"slow\" }, \
         { url = \"@FEED@/ips\", ca_file = \"@CA@\", name = \"fast\" }]",
    );
    let slow = lab.ranges().event(mark, "the slow one fails", |event| {
        event["source"] == "slow"
    });
    let events = lab.ranges().events();
    let fast = events.iter().position(|event| event["source"] == "fast");
    let slow = events.iter().position(|event| *event == slow);

    assert!(
        fast.is_some_and(|fast| Some(fast) < slow),
        "{fast:?} {slow:?}"
    );
}

#[test]
fn a_bad_list_file_is_named_by_check_and_keeps_no_role_from_starting() {
    let mut lab = Lab::start(&Plan::default());
    for role in [&mut lab.ranges, &mut lab.filter] {
        role.take().unwrap().kill();
    }
    fs::write(lab.network.path("own"), "foo\n").unwrap();
    lab.configure_sources(
        "[{ file = \"@DIR@/own\", name = \"own\" }, \
         { url = \"@FEED@/ips\", ca_file = \"@CA@\", like = \"cloudflare\" }]",
    );

    let checked = lab.pullgate(&["check"]);
    let error = String::from_utf8(checked.stderr).unwrap();
    assert_eq!(checked.status.code(), Some(78), "{error}");
    assert!(
        error.contains("`ranges.sources`: own: line 1: `foo` is not a CIDR range"),
        "{error}"
    );

    lab.start_filter();
    lab.start_ranges();
    assert_matched(&scenarios::strangers_are_dropped(&lab));
    let refused = lab
        .ranges()
        .event(0, "the file is refused", |event| event["source"] == "own");
    assert_eq!(refused["outcome"], "BadList");
}

#[test]
fn static_ranges_alone_need_no_feed() {
    let mut lab = Lab::start(&Plan::default());
    for role in [&mut lab.ranges, &mut lab.filter] {
        role.take().unwrap().kill();
    }
    let config = fs::read_to_string(&lab.config).unwrap();
    let from = config.find("sources = ").unwrap();
    let to = from + config[from..].find('\n').unwrap();
    let only = "static = [\"173.245.48.0/24\", \"2400:cb00::/48\"]\nonly = true";
    fs::write(
        &lab.config,
        format!("{}{only}{}", &config[..from], &config[to..]),
    )
    .unwrap();
    let _requests = lab.feed.requests();

    lab.start_filter();
    lab.start_ranges();

    assert_eq!(exported(&lab), ["173.245.48.0/24", "2400:cb00::/48"]);
    assert_matched(&scenarios::strangers_are_dropped(&lab));
    assert_eq!(lab.feed.requests(), Vec::<String>::new());
    let status = lab.filter().status();
    assert!(
        !status["findings"].to_string().contains("baseline-active"),
        "{status}"
    );
}

#[test]
fn mirrors_of_other_lists_are_read_as_they_are_written() {
    let mut lab = Lab::start(&Plan::default());
    let fastly = "{\"addresses\":[\"64.1.0.0/24\"],\"ipv6_addresses\":[\"2a04:4e40::/32\"]}";
    let prefix = |service, net| format!("{{\"ip_prefix\":\"{net}\",\"service\":\"{service}\"}}");
    // As large as the original, of which pullgate wants little.
    let others: Vec<_> = (0..40_000)
        .map(|n| prefix("EC2", format!("3.{}.{}.0/24", n >> 8, n & 255)))
        .collect();
    let aws = format!(
        "{{\"prefixes\":[{},{}],\"ipv6_prefixes\":[]}}",
        others.join(","),
        prefix("CLOUDFRONT_ORIGIN_FACING", "64.2.0.0/24".to_owned())
    );
    assert!(aws.len() > 1 << 20);
    let jdcloud =
        api_answer(&[], &[]).replace("\"etag\"", "\"jdcloud_cidrs\":[\"64.3.0.0/24\"],\"etag\"");
    lab.feed
        .answer_at("/fastly", Answer::Body(fastly.to_owned()));
    lab.feed.answer_at("/aws", Answer::Body(aws));
    lab.feed.answer_at("/jdcloud", Answer::Body(jdcloud));

    reload(
        &mut lab,
        "[{ url = \"@FEED@/fastly\", ca_file = \"@CA@\", like = \"fastly\" }, \
         { url = \"@FEED@/aws\", ca_file = \"@CA@\", like = \"cloudfront\" }, \
         { url = \"@FEED@/jdcloud\", ca_file = \"@CA@\", like = \"cloudflare-jdcloud\" }]",
    );

    eventually("all three are active", || {
        (exported(&lab)
            == [
                "64.1.0.0/24",
                "64.2.0.0/24",
                "64.3.0.0/24",
                "2a04:4e40::/32",
            ])
        .then_some(())
    });
}

// Transport.

#[test]
fn a_request_says_who_asks_and_wants_nothing_compressed() {
    let lab = Lab::start(&Plan::default());
    let _first = lab.feed.requests();

    lab.refresh_as_it_is();

    let requests = lab.feed.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    let request = &requests[0];
    assert!(request.contains("user-agent: pullgate/"), "{request}");
    assert!(request.contains("accept-encoding: identity"), "{request}");
    assert!(!request.contains("referer"), "{request}");
}

#[test]
fn a_proxy_is_asked_only_if_it_is_configured() {
    let mut lab = Lab::start(&Plan::default());
    let proxy = lab
        .network
        .on(Host::Origin, || TcpListener::bind("127.0.0.1:0").unwrap());
    let address = proxy.local_addr().unwrap();
    let asked = std::thread::spawn(move || {
        let (mut client, _) = proxy.accept().unwrap();
        let mut request = [0; 256];
        let length = client.read(&mut request).unwrap();
        client.write_all(b"HTTP/1.1 403 Forbidden\r\n\r\n").unwrap();
        String::from_utf8_lossy(&request[..length]).into_owned()
    });
    let config = fs::read_to_string(&lab.config).unwrap();
    // What is asked for on this host stays there, whatever is configured.
    let offline = config.replace("[ranges]", "[ranges]\nproxy = \"http://127.0.0.1:1\"");
    fs::write(&lab.config, offline).unwrap();
    assert!(lab.pullgate(&["ranges", "diff"]).status.success());
    let by_proxy = format!("[ranges]\nproxy = \"http://user:s3cret@{address}\"");
    let elsewhere = config.replace("https://127.0.0.1:", "https://list.example:");
    fs::write(&lab.config, elsewhere.replace("[ranges]", &by_proxy)).unwrap();
    lab.ranges.take().unwrap().kill();
    let _requests = lab.feed.requests();
    lab.start_ranges();

    let refused = lab
        .ranges()
        .event(0, "the proxy refuses", |event| event["level"] == "WARN");
    // user:s3cret, RFC 7617.
    let asked = asked.join().unwrap();
    assert!(asked.starts_with("CONNECT list.example:"), "{asked}");
    assert!(asked.contains("dXNlcjpzM2NyZXQ="), "{asked}");
    assert_eq!(lab.feed.requests(), Vec::<String>::new());
    assert!(refused["message"] != "", "{refused}");
    let events = format!("{:?}", lab.ranges().events());
    assert!(!events.contains("s3cret"), "{events}");
}

#[test]
fn the_environments_proxy_counts_only_where_it_was_asked_for() {
    let lab = Lab::start(&Plan::default());
    let config = fs::read_to_string(&lab.config).unwrap();
    let diff = || {
        let mut command = lab.network.command(Host::Origin, binary());
        // No server listens there.
        command.env("HTTPS_PROXY", "http://127.0.0.1:1");
        let command = command.arg("--config").arg(&lab.config);
        command.args(["ranges", "diff"]).output().unwrap()
    };

    assert!(diff().status.success());
    let by_environment = config.replace("[ranges]", "[ranges]\nproxy = \"env\"");
    fs::write(&lab.config, &by_environment).unwrap();
    assert!(diff().status.success());
    let elsewhere = by_environment.replace("https://127.0.0.1:", "https://list.example:");
    fs::write(&lab.config, elsewhere).unwrap();

    let refused = text(&diff());
    assert!(
        refused.contains(": NoAnswer: ") && refused.contains("tunnel error"),
        "{refused}"
    );
}

// By hand.

#[test]
fn refresh_and_diff_say_what_became_of_it() {
    let lab = Lab::start(&Plan::default());
    lab.feed
        .answer(Answer::Body(api_answer(&["64.0.0.0/24"], &[])));

    let diff = lab.pullgate(&["ranges", "diff"]);
    assert!(
        text(&diff).contains(": Changed\n  + 64.0.0.0/24\n"),
        "{diff:?}"
    );
    assert_eq!(exported(&lab).len(), 15 + 7);

    let refresh = lab.pullgate(&["ranges", "refresh"]);
    assert!(text(&refresh).contains(": Changed, 0 s ago"), "{refresh:?}");
    assert_eq!(exported(&lab).len(), 15 + 7 + 1);
    assert!(lab.pullgate(&["ranges", "diff"]).status.success());

    lab.feed.answer(Answer::Nothing);
    let refresh = lab.pullgate(&["ranges", "refresh", "--json"]);
    assert_eq!(refresh.status.code(), Some(1));
    let refresh: Value = serde_json::from_slice(&refresh.stdout).unwrap();
    assert_eq!(refresh[0]["outcome"], "NoAnswer");
    assert_eq!(lab.pullgate(&["ranges", "diff"]).status.code(), Some(1));
}

#[test]
fn a_refresh_without_the_role_is_refused_with_advice() {
    let mut lab = Lab::start(&Plan::default());
    lab.ranges.take().unwrap().kill();

    let output = lab.pullgate(&["ranges", "refresh"]);

    assert_eq!(output.status.code(), Some(70));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains("the ranges role does not answer; does it run?"),
        "{error}"
    );
}

#[test]
fn an_address_is_shown_with_the_rule_that_decides() {
    let lab = Lab::start(&Plan {
        ranges: "allow = [\"198.51.100.200/32\"]\ndeny = [\"173.245.63.0/24\"]",
        ..Plan::default()
    });
    for (address, code, words) in [
        (
            "173.245.48.5",
            0,
            "is in 173.245.48.0/20, of the list `published`",
        ),
        ("::ffff:173.245.48.5", 0, "is in 173.245.48.0/20"),
        (
            "198.51.100.200",
            0,
            "is in 198.51.100.200/32, of the list `allow`",
        ),
        (
            "173.245.63.9",
            1,
            "is in 173.245.63.0/24, of the list `deny`",
        ),
        (
            "198.51.100.7",
            1,
            "is in no published range, and not in `allow`",
        ),
    ] {
        let output = lab.pullgate(&["ranges", "show", address]);
        assert_eq!(output.status.code(), Some(code), "{address}");
        assert!(text(&output).contains(words), "{}", text(&output));
    }
    assert_eq!(
        lab.pullgate(&["ranges", "show", "localhost"]).status.code(),
        Some(64)
    );
}

#[test]
fn who_may_not_read_the_snapshot_is_not_told_something_else() {
    let lab = Lab::start(&Plan::default());
    let mut command = lab.network.command(Host::Origin, "setpriv");
    command.args([
        "--reuid",
        "1",
        "--regid",
        "1",
        "--clear-groups",
        "--inh-caps",
        "-all",
    ]);
    // Temporary directories are their maker's own.
    let directory = lab.network.path("");
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();

    let command = command.arg(binary()).arg("--config").arg(&lab.config);
    let output = command.args(["ranges", "list"]).output().unwrap();

    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(77), "{error}");
    assert!(error.contains("ranges.json: Permission denied"), "{error}");
}

#[test]
fn the_export_is_what_nft_ipset_and_nginx_understand() {
    let lab = Lab::start(&Plan::default());
    let export = |language| lab.pullgate(&["ranges", "export", language]).stdout;

    // Twice: the second time replaces what the first has made.
    for _ in 0..2 {
        let nft = feed_into(&lab, &["nft", "-f", "-"], &export("nft"));
        assert!(nft.status.success(), "{nft:?}");
        let ipset = feed_into(&lab, &["ipset", "restore"], &export("ipset"));
        assert!(ipset.status.success(), "{ipset:?}");
    }
    let within = |command: &[&str]| lab.network.output(Host::Origin, command).status.success();
    let nft = |element| {
        within(&[
            "nft",
            "get",
            "element",
            "inet",
            "pullgate",
            "ranges_v4",
            element,
        ])
    };
    assert!(nft("{ 173.245.48.5 }"));
    assert!(!nft("{ 198.51.100.7 }"));
    assert!(within(&["ipset", "test", "pullgate-v6", "2400:cb00::5"]));
    assert!(!within(&["ipset", "test", "pullgate-v6", "2001:db8::7"]));

    let nginx = String::from_utf8(export("nginx")).unwrap();
    let config = lab.network.path("nginx-export.conf");
    let directory = lab.network.path("");
    let directory = directory.display();
    fs::write(
        &config,
        format!("pid {directory}export.pid;\nevents {{}}\nhttp {{\n{nginx}}}\n"),
    )
    .unwrap();
    let config = config.display().to_string();
    let checked = lab
        .network
        .output(Host::Origin, &["nginx", "-t", "-c", &config]);
    assert!(checked.status.success(), "{checked:?}");
    assert_eq!(nginx.lines().count(), 15 + 7);
}

#[test]
fn a_list_that_is_old_is_warned_of_and_then_an_alarm() {
    let mut lab = Lab::start(&Plan::default());
    let snapshot = lab.network.path("state/ranges.json");
    let good = fs::read_to_string(&snapshot).unwrap();
    let day = 86_400;
    for (age, words, level) in [
        (4 * day, "was not confirmed for 4 days", "WARN"),
        (31 * day, "ALARM: the list of `https://127.0.0.1", "ERROR"),
        (-day, "is dated in the future", "ERROR"),
    ] {
        lab.ranges.take().unwrap().kill();
        lab.feed.answer(Answer::Nothing);
        fs::write(&snapshot, aged(&good, age)).unwrap();
        lab.start_ranges();
        let said = lab.ranges().event(0, "the age is said", |event| {
            ["list-stale", "list-expired", "list-from-future"]
                .iter()
                .any(|id| event["id"] == *id)
        });
        assert_eq!(said["level"], level, "{said}");

        let status = eventually("the filter knows", || {
            let status = lab.filter().status();
            status["findings"]
                .to_string()
                .contains(words)
                .then_some(status)
        });
        let seconds = status["metrics"]["pullgate_ranges_age_seconds"]
            .as_f64()
            .unwrap();
        assert!(seconds >= f64::from(age.max(0)), "{seconds}");
    }
}

#[test]
fn the_filter_is_up_before_the_feed_is_asked() {
    let mut lab = Lab::start(&Plan::default());
    for role in [&mut lab.filter, &mut lab.ranges, &mut lab.gate] {
        role.take().unwrap().kill();
    }
    assert!(lab.pullgate(&["unload"]).status.success());
    lab.feed.answer(Answer::Refused);

    let all = Pullgate::start_all(&lab.network, &lab.config);
    all.event(0, "the feed does not answer", |event| {
        event["outcome"] == "NoAnswer"
    });
    let events = all.events();
    let position = |id: &str| events.iter().position(|event| event["id"] == id).unwrap();

    assert!(position("program-attached") < position("refresh-failed"));
    assert!(lab.network.pin(&format!("native-{INTERFACE}")).exists());
    assert_eq!(all.stop(), Some(0));
}

// The rig.

fn two_ways(grace: &'static str) -> Plan {
    Plan {
        sources: "[[{ url = \"@FEED@/client/v4/ips\", ca_file = \"@CA@\", like = \"cloudflare\" }, \
             { url = \"@MIRROR@/ips\", ca_file = \"@CA@\" }]]",
        grace,
        ..Plan::default()
    }
}

/// Reloads the ranges role (and the filter, so that both know the same sources).
fn reload(lab: &mut Lab, sources: &'static str) {
    lab.configure_sources(sources);
    lab.reload();
    lab.ranges().signal(Signal::SIGHUP);
    lab.gate().signal(Signal::SIGHUP);
}

/// Seven of fifteen IPv4 ranges, and all of IPv6.
fn half() -> String {
    let v4: Vec<_> = IPS_V4.lines().take(7).collect();
    api_answer_of(&v4, &IPS_V6.lines().collect::<Vec<_>>())
}

/// The active ranges, as everybody reads them from disk.
fn exported(lab: &Lab) -> Vec<String> {
    let output = lab.pullgate(&["ranges", "export", "text"]);
    text(&output).lines().map(str::to_owned).collect()
}

fn json(lab: &Lab, arguments: &[&str]) -> Value {
    let mut arguments = arguments.to_vec();
    arguments.push("--json");
    serde_json::from_slice(&lab.pullgate(&arguments).stdout).unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn feed_into(lab: &Lab, command: &[&str], input: &[u8]) -> Output {
    let mut child = lab.network.command(Host::Origin, PathBuf::from(command[0]));
    let child = child
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = child.stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

/// The snapshot as if it had been fetched `age` seconds ago.
fn aged(snapshot: &str, age: i32) -> String {
    let mut document: Value = serde_json::from_str(snapshot).unwrap();
    let sources = &mut document["sources"];
    let at = sources[0]["fetched_at"].as_i64().unwrap() - i64::from(age);
    sources[0]["fetched_at"] = at.into();
    document["checksum"] = sha256(&ordered(&document["sources"])).into();
    document.to_string()
}

/// The sources as the program writes them: in the order of its fields.
fn ordered(sources: &Value) -> Vec<u8> {
    let source = &sources[0];
    let fields = ["source", "way", "fetched_at", "ranges", "vanished"];
    let fields: Vec<_> = fields
        .iter()
        .map(|field| format!("\"{field}\":{}", source[*field]))
        .collect();
    format!("[{{{}}}]", fields.join(",")).into_bytes()
}

/// The range that the lab's edge is in.
const EDGE_NET: &str = "173.245.48.0/20";
