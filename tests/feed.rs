//! Verifies what the feed cannot do: each test is one thing that a server, or one that sits in its
//! place, may answer. Whatever it is, the set stays what the rule says, an edge is served, a
//! stranger is not, one log line says why, one counter moves, and memory does not grow.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use filter_ebpf::cases::Packet;
use nix::sys::signal::Signal;
use serde_json::Value;
use tests::feed::{API, Answer, IPS_V4, IPS_V6, api_answer, api_answer_of};
use tests::lab::{XDP_DROP, XDP_PASS, judge};
use tests::net::Host;
use tests::pki::SHOP;
use tests::{Lab, Plan, eventually};

// No server there, or another one.

#[test]
fn a_refused_connection() {
    fault(Answer::Refused, "NoAnswer", &["Connection refused"]);
}

#[test]
fn an_end_before_any_answer() {
    fault(Answer::Nothing, "NoAnswer", &["no answer"]);
}

#[test]
fn a_name_that_cannot_be_resolved() {
    let sources = "[{ url = \"https://feed.invalid/\" }]";
    fault_of(sources, "NoAnswer", &["dns"]);
}

#[test]
fn a_certificate_of_an_unknown_ca() {
    presented(
        "feed-untrusted",
        &["invalid peer certificate", "UnknownIssuer"],
    );
}

#[test]
fn an_expired_certificate() {
    presented("feed-expired", &["invalid peer certificate", "expired"]);
}

#[test]
fn a_certificate_for_another_host() {
    presented(
        "feed-of-another",
        &["invalid peer certificate", "not valid for name"],
    );
}

// Redirects.

#[test]
fn a_redirect_to_clear_text() {
    let to = "location: http://127.0.0.1/\r\n";
    fault(
        Answer::Status(301, to),
        "Redirected",
        &["redirected to http://127.0.0.1/"],
    );
}

#[test]
fn a_redirect_to_another_host() {
    let to = "location: https://evil.example/ips?secret\r\n";
    let words = ["redirected to https://evil.example/ips, which is another host"];
    let event = fault(Answer::Status(301, to), "Redirected", &words);

    assert!(!event.to_string().contains("secret"), "{event}");
}

#[test]
fn a_redirect_without_end() {
    let to = "location: /client/v4/ips\r\n";
    fault(Answer::Status(301, to), "Redirected", &["once too often"]);
}

#[test]
fn a_redirect_within_the_host_is_followed() {
    let rig = Rig::take();
    rig.lab.feed.answer(good());
    rig.lab
        .feed
        .answer_at(API, Answer::Status(301, "location: /elsewhere\r\n"));

    rig.succeeds("Unchanged");
}

// Other words than a list.

#[test]
fn a_web_page() {
    fault(
        body("<!DOCTYPE html><html>"),
        "BadList",
        &["web page, not ranges"],
    );
}

#[test]
fn a_web_page_that_says_so_in_its_header() {
    let page = Answer::With("Content-Type: Text/HTML; charset=utf-8\r\n", IPS_V4.into());
    fault(page, "BadList", &["web page, not ranges"]);
}

#[test]
fn an_empty_body() {
    fault(body(""), "Rejected", &["holds no IPv4 range"]);
}

#[test]
fn an_empty_object() {
    fault(body("{}"), "BadList", &["has no `success: true`"]);
}

#[test]
fn truncated_json() {
    let whole = api_answer(&[], &[]);
    fault(
        body(&whole[..whole.len() / 2]),
        "BadList",
        &["not the JSON"],
    );
}

#[test]
fn a_truncated_body() {
    fault(
        Answer::Truncated(api_answer(&[], &[])),
        "NoAnswer",
        &["no answer"],
    );
}

#[test]
fn json_with_wrong_types() {
    for wrong in [
        "7",
        "null",
        "{}",
        "[7]",
        "\"173.245.48.0/20\"",
        "[[\"173.245.48.0/20\"]]",
    ] {
        let text =
            format!("{{\"success\":true,\"result\":{{\"ipv4_cidrs\":{wrong},\"ipv6_cidrs\":[]}}}}");
        fault(body(&text), "BadList", &[]);
    }
}

#[test]
fn json_that_says_it_has_failed() {
    let failed = api_answer(&[], &[]).replace("true", "false");
    fault(body(&failed), "BadList", &["has no `success: true`"]);
}

#[test]
fn bytes_that_are_no_text() {
    let bytes = Answer::With("", vec![0xff; 100]);
    fault(bytes, "BadList", &["the list is not text"]);
}

#[test]
fn status_429_that_says_when_to_ask_again() {
    let busy = Answer::Status(429, "retry-after: 600\r\n");
    let event = fault(busy, "BadStatus", &["status 429"]);

    assert_eq!(event["again_in"], "10m");
}

#[test]
fn status_429_that_says_never_to_ask_again() {
    let busy = Answer::Status(429, "retry-after: 99999999999\r\n");
    let event = fault(busy, "BadStatus", &["status 429"]);

    let again_in = event["again_in"].as_str().unwrap();
    assert!(
        again_in.starts_with("5") || again_in.starts_with("1h"),
        "{again_in}"
    );
}

#[test]
fn status_204() {
    fault(Answer::Status(204, ""), "BadStatus", &["status 204"]);
}

#[test]
fn status_500() {
    fault(Answer::Status(500, ""), "BadStatus", &["status 500"]);
}

#[test]
fn status_304_without_anything_remembered() {
    fault(Answer::Status(304, ""), "BadStatus", &["status 304"]);
}

#[test]
fn status_304_of_a_list_that_is_remembered() {
    let rig = Rig::take();
    let list = api_answer(&[], &[]).into_bytes();
    let head = "etag: \"one\"\r\nlast-modified: Sat, 21 Nov 2026 12:00:00 GMT\r\n";
    rig.lab.feed.answer(Answer::With(head, list));
    rig.succeeds("Unchanged");
    assert!(!rig.lab.feed.requests()[0].contains("if-none-match"));

    rig.lab.feed.answer(Answer::Status(304, ""));
    rig.succeeds("Unchanged");

    let request = &rig.lab.feed.requests()[0];
    assert!(request.contains("if-none-match: \"one\"\r\n"), "{request}");
    assert!(
        request.contains("if-modified-since: Sat, 21 Nov 2026"),
        "{request}"
    );
}

// Lists by which no client may be admitted.

#[test]
fn all_of_ipv4() {
    hostile_v4("0.0.0.0/0", "Rejected", &["`0.0.0.0/0` is wider than /8"]);
}

#[test]
fn all_of_ipv6() {
    hostile_v6("::/0", "Rejected", &["`::/0` is wider than /19"]);
}

#[test]
fn private_and_reserved_ranges() {
    for range in RFC_6890_V4 {
        hostile_v4(range, "Rejected", &["reserved or private"]);
    }
    for range in RFC_6890_V6 {
        hostile_v6(range, "Rejected", &["reserved or private"]);
    }
}

#[test]
fn host_bits() {
    hostile_v4(
        "131.0.72.1/22",
        "BadList",
        &["has host bits set, did it mean `131.0.72.0/22`?"],
    );
}

#[test]
fn ipv4_in_the_ipv6_list() {
    hostile_v6(
        "131.0.72.0/22",
        "BadList",
        &["ipv6_cidrs[7]", "wrong family's list"],
    );
}

#[test]
fn a_hundred_thousand_entries() {
    let many: String = (0..100_000)
        .map(|n| format!("64.{}.{}.{}/32\n", n >> 16, n >> 8 & 255, n & 255))
        .collect();
    fault(body(&many), "TooLarge", &["larger than 65536 bytes"]);
}

#[test]
fn more_entries_than_the_limit() {
    let many: String = (0..4500)
        .map(|n| format!("64.{}.{}.0/24\n", n >> 8, n & 255))
        .collect();
    // Small enough to be read, too many all the same.
    assert!(many.len() > 60_000, "{}", many.len());
    let sources = "[{ url = \"@FEED@/many\", ca_file = \"@CA@\", max_bytes = 1000000 }]";
    let mut rig = Rig::take();
    rig.lab.feed.answer(body(&many));
    rig.with_sources(sources);
    rig.fails("Rejected", &["holds 4500 ranges, more than 4096"]);
}

#[test]
fn more_addresses_than_the_budget() {
    let nine: Vec<_> = (64..73).map(|first| format!("{first}.0.0.0/12")).collect();
    let nine: Vec<_> = nine.iter().map(String::as_str).collect();
    let wide = api_answer(&nine, &[]);
    let wide = wide.replace("64.0.0.0/12", "64.0.0.0/8");
    fault(body(&wide), "Rejected", &["addresses, more than 16777216"]);
}

#[test]
fn a_range_that_others_read_differently() {
    for (v4, v6) in [
        ("064.0.0.0/24", "2a00::/32"),
        ("64.0.0.0/24", "::ffff:64.0.0.0/120"),
    ] {
        fault(
            body(&api_answer(&[v4], &[v6])),
            "BadList",
            &["is not a CIDR range"],
        );
    }
}

#[test]
fn more_at_once_than_a_quarter_of_what_there_is() {
    let grown = api_answer(&["64.0.0.0/9"], &[]);
    fault(body(&grown), "Held", &["would add", "waits for approval"]);
}

#[test]
fn duplicate_and_overlapping_entries_are_harmless() {
    let rig = Rig::take();
    let again = ["173.245.48.0/20", "173.245.48.0/24"];
    rig.lab
        .feed
        .answer(Answer::Body(api_answer(&again, &["2400:cb00::/32"])));

    rig.succeeds("Changed");
    assert!(rig.ranges().contains("173.245.48.0/24"));
}

#[test]
fn glued_lines() {
    let glued = format!("{}{IPS_V6}", IPS_V4.trim_end());
    fault(
        body(&glued),
        "BadList",
        &["`131.0.72.0/222400:cb00::/32` is not a CIDR range"],
    );
}

#[test]
fn an_address_is_the_range_of_it_alone() {
    let rig = Rig::take();
    let text = format!("{IPS_V4}89.187.188.227 # a comment\n{IPS_V6}");
    rig.lab.feed.answer(Answer::Body(text));

    rig.succeeds("Changed");
    assert!(rig.ranges().contains("89.187.188.227/32"));
}

#[test]
fn crlf_and_a_byte_order_mark_are_harmless() {
    let rig = Rig::take();
    let text = format!("\u{feff}{IPS_V4}{IPS_V6}").replace('\n', "\r\n");
    rig.lab.feed.answer(Answer::Body(text));

    rig.succeeds("Unchanged");
}

// Too much, or too slow.

#[test]
fn a_body_of_ten_megabytes() {
    fault(
        body(&"1".repeat(10 << 20)),
        "TooLarge",
        &["larger than 65536 bytes"],
    );
}

#[test]
fn a_body_without_end() {
    fault(
        Answer::EndlessBody,
        "TooLarge",
        &["larger than 65536 bytes"],
    );
}

#[test]
fn one_byte_per_second() {
    fault(
        Answer::Drip(api_answer(&[], &[])),
        "Timeout",
        &["no whole answer in time"],
    );
}

#[test]
fn headers_without_end() {
    fault(Answer::EndlessHead, "NoAnswer", &["no answer"]);
}

#[test]
fn a_gzip_bomb() {
    // What gzip makes of a gigabyte of zeros begins like this.
    let mut bomb = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 2, 3, 0xec, 0xc1];
    bomb.extend(vec![0; 60_000]);
    let encoded = Answer::With("content-encoding: gzip\r\n", bomb.clone());
    fault(
        encoded,
        "Encoded",
        &["content encoding that was not asked for"],
    );
    fault(Answer::With("", bomb), "BadList", &["the list is not text"]);
}

#[test]
fn no_encoding_by_name() {
    let rig = Rig::take();
    let list = format!("{IPS_V4}89.187.188.0/24\n{IPS_V6}").into_bytes();
    rig.lab
        .feed
        .answer(Answer::With("Content-Encoding: Identity\r\n", list));

    rig.succeeds("Changed");
}

// Lists that are good by themselves, and wrong all the same.

#[test]
fn one_family_that_fails() {
    let mut rig = Rig::take();
    rig.lab.feed.answer_at("/ips-v4", body(IPS_V4));
    rig.lab.feed.answer_at("/ips-v6", body(IPS_V6));
    rig.with_sources(TEXTS);
    rig.succeeds("Unchanged");

    rig.lab.feed.answer_at("/ips-v6", Answer::Status(500, ""));
    rig.fails("BadStatus", &["status 500"]);
    rig.lab.feed.answer_at("/ips-v6", body(""));
    rig.fails("Rejected", &["holds no IPv6 range"]);
    rig.lab
        .feed
        .answer_at("/ips-v6", body(&format!("{IPS_V6}64.0.0.0/24\n")));
    rig.fails("BadList", &["IPv6 part[7]", "wrong family's list"]);
}

#[test]
fn a_list_that_halves() {
    let half: Vec<_> = IPS_V4.lines().take(7).collect();
    let half = api_answer_of(&half, &IPS_V6.lines().collect::<Vec<_>>());
    fault(
        body(&half),
        "Held",
        &["% of the active IPv4 addresses", "waits for approval"],
    );

    let half: Vec<_> = IPS_V6.lines().take(4).collect();
    let half = api_answer_of(&IPS_V4.lines().collect::<Vec<_>>(), &half);
    fault(
        body(&half),
        "Held",
        &["% of the active IPv6 addresses", "waits for approval"],
    );
}

#[test]
fn a_list_that_changes_entirely() {
    let other = api_answer_of(&["64.0.0.0/13"], &["2a00::/29"]);
    fault(
        body(&other),
        "Held",
        &["would remove 100 % of the active IPv4 addresses"],
    );
}

#[test]
fn a_list_that_flaps_is_the_union_of_what_it_says() {
    let rig = Rig::take();
    for round in 0..10 {
        let more: &[&str] = if round % 2 == 0 {
            &["64.0.0.0/24"]
        } else {
            &[]
        };
        rig.lab.feed.answer(Answer::Body(api_answer(more, &[])));
        rig.succeeds(if round == 0 { "Changed" } else { "Unchanged" });

        assert!(rig.ranges().contains("64.0.0.0/24"), "{round}");
    }
}

#[test]
fn every_fault_a_hundred_times_takes_no_memory() {
    let rig = Rig::take();
    let faults = [
        body("{}"),
        body(&"1".repeat(10 << 20)),
        Answer::EndlessHead,
        Answer::Nothing,
        Answer::Status(301, "location: https://evil.example/\r\n"),
        Answer::Truncated(api_answer(&[], &[])),
        good(),
    ];
    let round = || {
        for answer in faults.iter().cycle().take(100) {
            rig.lab.refresh(answer.clone());
        }
        rig.memory()
    };

    // The first round fills what is kept: buffers, caches, arenas.
    let (first, second, third) = (round(), round(), round());

    assert!(
        third < first.max(second) + 1024,
        "{first} {second} {third} KiB"
    );
    rig.stands();
}

// The rig.

/// Lets the feed answer this, and asserts that nothing but log and counter has changed.
fn fault(answer: Answer, outcome: &str, words: &[&str]) -> Value {
    let rig = Rig::take();
    rig.lab.feed.answer(answer);
    rig.fails(outcome, words)
}

/// The same, with other sources than the rig's own.
fn fault_of(sources: &'static str, outcome: &str, words: &[&str]) {
    let mut rig = Rig::take();
    rig.with_sources(sources);
    rig.fails(outcome, words);
}

/// The same, with a good list behind a bad certificate.
fn presented(identity: &str, words: &[&str]) {
    let rig = Rig::take();
    rig.lab.feed.present(&rig.lab.pki, identity);
    rig.fails("Untrusted", words);
}

fn hostile_v4(range: &str, outcome: &str, words: &[&str]) {
    fault(Answer::Body(api_answer(&[range], &[])), outcome, words);
}

fn hostile_v6(range: &str, outcome: &str, words: &[&str]) {
    fault(Answer::Body(api_answer(&[], &[range])), outcome, words);
}

fn body(text: &str) -> Answer {
    Answer::Body(text.to_owned())
}

fn good() -> Answer {
    Answer::Body(api_answer(&[], &[]))
}

/// A lab that all tests of this file take in turn; the janitor ends it with the process.
struct Rig {
    lab: MutexGuard<'static, Lab>,
}

impl Rig {
    /// The lab as at its start: the feed good, Cloudflare's active ranges, none kept.
    fn take() -> Self {
        static LAB: OnceLock<Mutex<Lab>> = OnceLock::new();
        let lab = LAB.get_or_init(|| {
            Mutex::new(Lab::start(&Plan {
                grace: "1h",
                sources: SOURCES,
                ..Plan::default()
            }))
        });
        let mut lab = lab.lock().unwrap_or_else(PoisonError::into_inner);
        // Whatever the test before has left, also if it has failed.
        lab.feed.answer(good());
        lab.feed.present(&lab.pki, "feed");
        lab.configure_sources(SOURCES);
        // What it has added would stay for its grace.
        if let Some(ranges) = lab.ranges.take() {
            ranges.kill();
        }
        drop(std::fs::remove_file(lab.network.path("state/ranges.json")));
        lab.start_ranges();
        let rig = Self { lab };
        rig.lab.ranges().event(0, "the first refresh", |event| {
            event["id"] == "ranges-refreshed"
        });
        eventually("the filter has taken the ranges over", || {
            (rig.lab.filter().status()["ranges"]["kept"] == 0).then_some(())
        });
        assert_eq!(rig.ranges(), published());
        let _read = rig.lab.feed.requests();
        rig
    }

    /// Reloads with other sources, and waits until they were asked.
    fn with_sources(&mut self, sources: &'static str) {
        self.lab.configure_sources(sources);
        let mark = self.lab.ranges().mark();
        self.lab.ranges().signal(Signal::SIGHUP);
        self.lab.ranges().event(mark, "the reload", |event| {
            event["id"] == "refresh-configured"
        });
        self.lab
            .ranges()
            .event(mark, "the refresh behind it", |event| {
                event["id"] == "ranges-refreshed" || event["id"] == "refresh-failed"
            });
    }

    /// Refreshes, which must fail with this outcome and these words, and change nothing else.
    fn fails(&self, outcome: &str, words: &[&str]) -> Value {
        let (ranges, counters) = (self.ranges(), self.counters());
        let memory = self.memory();
        let mark = self.lab.ranges().mark();

        let event = self.lab.refresh_as_it_is();

        assert_eq!(event["level"], "WARN", "{event}");
        assert_eq!(event["outcome"], outcome, "{event}");
        for word in words {
            let error = event["error"].as_str().unwrap();
            assert!(error.contains(word), "{word}: {error}");
        }
        let events = &self.lab.ranges().events()[mark..];
        let complaints = events
            .iter()
            .filter(|event| event["level"] != "INFO" && event["level"] != "DEBUG");
        assert_eq!(complaints.count(), 1, "one line says why: {events:#?}");
        let label = format!("pullgate_ranges_refresh_total{{outcome=\"{outcome}\"}}");
        let mut expected = counters;
        *expected.entry(label).or_default() += 1.0;
        assert_eq!(self.counters(), expected, "one counter moves");
        assert_eq!(self.ranges(), ranges);
        assert!(
            self.memory() < memory + 4096,
            "from {memory} to {} KiB",
            self.memory()
        );
        self.stands();
        event
    }

    /// Refreshes, which must succeed with this outcome.
    fn succeeds(&self, outcome: &str) {
        let event = self.lab.refresh_as_it_is();

        assert_eq!(event["id"], "ranges-refreshed", "{event}");
        assert_eq!(event["outcome"], outcome, "{event}");
        self.stands();
    }

    /// Asserts that an edge is served, and that the loaded program drops strangers and no edge.
    fn stands(&self) {
        let program = self.lab.program();
        for (source, action) in [(Host::Edge, XDP_PASS), (Host::Stranger, XDP_DROP)] {
            for address in source.addresses() {
                let family = |origin: &IpAddr| origin.is_ipv4() == address.is_ipv4();
                let origin = Host::Origin.addresses().into_iter().find(family);
                let frame = Packet::tcp(address, origin.unwrap(), 443).build();
                assert_eq!(judge(&program, &frame), action, "{address}");
            }
        }
        let origin = Host::Origin.addresses()[0];
        let (reply, _) = self
            .lab
            .edge()
            .get(&self.lab.network, Host::Edge, origin, SHOP);
        assert_eq!(reply.brief(), "200");
    }

    /// The active ranges, as everybody reads them from disk.
    fn ranges(&self) -> BTreeSet<String> {
        let output = self.lab.pullgate(&["ranges", "export", "text"]);
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn counters(&self) -> BTreeMap<String, f64> {
        let status = self.lab.ranges().status();
        let metrics = status["metrics"].as_object().unwrap().iter();
        let refreshes =
            metrics.filter(|(name, _)| name.starts_with("pullgate_ranges_refresh_total"));
        let counters = refreshes.map(|(name, value)| (name.clone(), value.as_f64().unwrap()));
        counters.collect()
    }

    /// The most memory that the ranges role has ever had, in KiB: proc_pid_status(5).
    fn memory(&self) -> u64 {
        let path = format!("/proc/{}/status", self.lab.ranges().pid());
        let status = std::fs::read_to_string(path).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        line.unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap()
    }
}

fn published() -> BTreeSet<String> {
    IPS_V4
        .lines()
        .chain(IPS_V6.lines())
        .map(str::to_owned)
        .collect()
}

const SOURCES: &str =
    "[{ url = \"@FEED@/client/v4/ips\", ca_file = \"@CA@\", like = \"cloudflare\" }]";
/// The registries of RFC 6890 as IANA keeps them, without what is wider than a list may hold.
const RFC_6890_V4: [&str; 16] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.0.0/29",
    "192.0.0.170/32",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/8",
    "233.252.0.0/24",
    "240.0.0.0/8",
    "255.255.255.255/32",
];
const RFC_6890_V6: [&str; 11] = [
    "::1/128",
    "::/128",
    "64:ff9b::/96",
    "100::/64",
    "2001::/32",
    "2001:10::/28",
    "2001:20::/28",
    "2002::/19",
    "fc00::/20",
    "fe80::/64",
    "ff00::/20",
];
const TEXTS: &str = "[{ url = [\"@FEED@/ips-v4\", \"@FEED@/ips-v6\"], ca_file = \"@CA@\", \
    like = \"cloudflare-text\" }]";
