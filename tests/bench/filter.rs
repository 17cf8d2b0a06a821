//! The benchmark of the filter: everything in one run, interleaved, as ratios.
//!
//! Time per packet by test runs in the kernel, against programs that do nothing and against
//! xdp-filter's; packets per second over a veth pair, against nftables and iptables. Prints a table,
//! and writes `target/bench/filter.json` and `filter.svg`.

use std::path::Path;
use std::time::{Duration, Instant};

use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use filter_ebpf::cases::{Packet, ethernet};
use filter_ebpf::verdict::{Reason, Verdict};
use serde_json::{Value, json};
use tests::contenders::{self, Firewall, XdpFilter};
use tests::net::{DIRECT, Host, Network};
use tests::traffic::{self, Objects, Traffic};
use tests::{Lab, Plan};

use crate::forged::{self, Forged};
use crate::report::{self, Bar, median, spread};

pub(crate) fn run(json: Option<&Path>) {
    let every_cpu = forged::every_cpu();
    traffic::pin_to_cpu(0);

    let (runs, publishes) = test_runs();
    let rates = rates();
    let forged = Forged::measure(&every_cpu);
    let mut bars = bars(&runs, &rates, publishes);
    bars.extend(forged.bars());
    let report = json!({
        "machine": report::machine(),
        "versions": contenders::versions(),
        "test_runs": runs.iter().map(Run::json).collect::<Vec<_>>(),
        "packets_per_second": rates.iter().map(Rate::json).collect::<Vec<_>>(),
        "forged": forged.json(),
        "publish_ms": {"all_anew": publishes[0], "one_more": publishes[1]},
        "bars": bars.iter().map(Bar::json).collect::<Vec<_>>(),
    });

    print(&runs, &rates);
    forged.print();
    report::print(&bars);
    report::write("filter", &report, &bars, json);
}

/// Whose program judges a frame.
#[derive(Clone, Copy)]
enum Subject {
    /// Ours, with Cloudflare's ranges.
    Ours,
    /// Ours, with [`MANY`] ranges.
    Crowded,
    /// Ours, where it may answer SYNs.
    Answering,
    /// Another's, by its place.
    Foreign(usize),
}

/// A kind of frame, and what a program takes for it.
struct Run {
    name: String,
    subject: Subject,
    floor: &'static str,
    frame: Vec<u8>,
    floors: Vec<f64>,
    ours: Vec<f64>,
}

impl Run {
    fn new(name: &str, verdict: &Verdict, frame: Vec<u8>) -> Self {
        Self {
            name: name.to_owned(),
            subject: Subject::Ours,
            floor: match verdict {
                Verdict::Drop(_) => "bare_drop",
                Verdict::Pass(_) => "bare_pass",
            },
            frame,
            floors: Vec::new(),
            ours: Vec::new(),
        }
    }

    fn of(self, subject: Subject) -> Self {
        Self { subject, ..self }
    }

    /// Time as a multiple of the floor's, round by round: what disturbs one disturbs the other.
    fn ratios(&self) -> Vec<f64> {
        self.ours
            .iter()
            .zip(&self.floors)
            .map(|(ours, floor)| ours / floor)
            .collect()
    }

    fn ratio(&self) -> f64 {
        median(&self.ratios())
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "floor_ns": median(&self.floors),
            "ns": median(&self.ours),
            "ratio": self.ratio(),
            "spread": spread(&self.ratios()),
        })
    }
}

/// Time per packet by test runs, and milliseconds to publish [`MANY`] ranges: all of them, and one more.
fn test_runs() -> (Vec<Run>, [f64; 2]) {
    let few = Lab::start(&Plan {
        filter: DESTINATIONS,
        ..Plan::default()
    });
    let rules = many_rules();
    let many = Lab::start(&Plan {
        filter: DESTINATIONS,
        ranges: rules.leak(),
        ..Plan::default()
    });
    let answering = Lab::start(&Plan {
        filter: ANSWERING,
        ..Plan::default()
    });
    let publishes = [filled(&many), published(&many)];
    let (ours, crowded, may_answer) = (few.program(), many.program(), answering.program());
    let mut objects = Objects::load();
    for name in ["bare_drop", "bare_pass"] {
        traffic::park(&many.network, name, objects.program(name));
    }
    let contenders = XdpFilter::load_all(&many.network);

    let mut runs = frames();
    runs.extend(crowded_frames());
    runs.extend(answering_frames());
    for (place, contender) in contenders.iter().enumerate() {
        let [v4, _] = syns(STRANGER, 443);
        let run = Run::new(contender.name(), &DROP, v4);
        runs.push(run.of(Subject::Foreign(place)));
    }
    // Where the gate listens, which a SYN is looked up for.
    answering.network.on(Host::Origin, || {
        for _ in 0..ROUNDS {
            for run in &mut runs {
                let program = match run.subject {
                    Subject::Ours => &ours,
                    Subject::Crowded => &crowded,
                    Subject::Answering => &may_answer,
                    Subject::Foreign(place) => contenders[place].program(),
                };
                run.floors
                    .push(nanoseconds(objects.program(run.floor), &run.frame));
                run.ours.push(nanoseconds(program, &run.frame));
            }
        }
    });
    (runs, publishes)
}

/// Whole time per packet, in nanoseconds.
fn nanoseconds(program: &Xdp, frame: &[u8]) -> f64 {
    let begun = Instant::now();
    let options = TestRunOptions {
        data_in: Some(frame),
        repeat: REPEATS,
        ..TestRunOptions::new()
    };
    program.test_run(options).unwrap();
    begun.elapsed().as_secs_f64() * 1e9 / f64::from(REPEATS)
}

/// Each row of the verdict table that costs something.
fn frames() -> Vec<Run> {
    let mut runs = Vec::new();
    let kinds = [
        ("stranger", STRANGER, 443, DROP),
        ("listed", EDGE, 443, PASS),
        ("not protected", STRANGER, 80, PASS),
    ];
    for (what, source, port, verdict) in kinds {
        for (family, frame) in FAMILIES.into_iter().zip(syns(source, port)) {
            runs.push(Run::new(&format!("{family} {what}"), &verdict, frame));
        }
    }
    for (family, packet) in FAMILIES.into_iter().zip(packets(STRANGER, 443)) {
        let tagged = packet.clone().tagged(0x8100, 0).build();
        runs.push(Run::new(
            &format!("{family} stranger, one tag"),
            &DROP,
            tagged,
        ));
        let later = packet.fragments(&[0, 2]).remove(1).build();
        runs.push(Run::new(&format!("{family} later fragment"), &DROP, later));
    }
    let [v4, v6] = packets(STRANGER, 443);
    runs.push(Run::new(
        "IPv4 options",
        &DROP,
        v4.options(&[1; 40]).build(),
    ));
    let chain = v6.extension(60, &PADDING).extension(60, &PADDING);
    runs.push(Run::new("IPv6 two options headers", &DROP, chain.build()));
    runs.push(Run::new("ARP", &PASS, ethernet(0x0806, &[0; 46])));
    runs
}

/// The same against many ranges: a stranger, and sources in prefixes of all lengths.
fn crowded_frames() -> Vec<Run> {
    let sources = [
        ("IPv4 stranger", "198.51.100.7", DROP),
        ("IPv4 listed", "173.245.48.5", PASS),
        ("IPv4 in a /24", "11.7.5.1", PASS),
        ("IPv4 in a /32", "11.7.4.9", PASS),
        ("IPv6 stranger", "2001:db8::7", DROP),
        ("IPv6 listed", "2400:cb00::5", PASS),
        ("IPv6 in a /48", "2a10:1770:700::1", PASS),
        ("IPv6 in a /64", "2a11:1781:7:7::1", PASS),
        ("IPv6 in a /128", "2a12:1785::1", PASS),
    ];
    let runs = sources.into_iter().map(|(what, source, verdict)| {
        let source: std::net::IpAddr = source.parse().unwrap();
        let origin = Host::Origin.addresses()[usize::from(source.is_ipv6())];
        let frame = Packet::tcp(source, origin, 443).build();
        Run::new(&format!("{what}, {MANY} ranges"), &verdict, frame).of(Subject::Crowded)
    });
    runs.collect()
}

/// Listed segments, where SYNs may be answered and where not.
fn answering_frames() -> Vec<Run> {
    let mut runs = Vec::new();
    for (family, packet) in FAMILIES.into_iter().zip(packets(EDGE, 443)) {
        for (what, flags) in [("SYN", 2), ("ACK", 16)] {
            let frame = packet.clone().segment_byte(13, flags).build();
            for (subject, may) in [
                (Subject::Ours, "no cookies"),
                (Subject::Answering, "cookies"),
            ] {
                let name = format!("{family} listed {what}, {may}");
                runs.push(Run::new(&name, &PASS, frame.clone()).of(subject));
            }
        }
    }
    runs
}

/// [`MANY`] ranges of mixed lengths, as `allow` rules.
fn many_rules() -> String {
    let mut rules = Vec::new();
    for n in 0..MANY * 6 / 10 {
        let (a, b) = (n / 256, n % 256);
        rules.push(match n % 4 {
            0 => format!("\"11.{a}.{b}.9/32\""),
            1 => format!("\"11.{a}.{b}.0/24\""),
            2 => format!("\"11.{a}.{b}.0/25\""),
            _ => format!("\"{}.{b}.{}.0/20\"", 12 + a / 16, a % 16 * 16),
        });
    }
    for n in rules.len()..MANY {
        rules.push(match n % 4 {
            0 => format!("\"2a10:{n:x}:700::/48\""),
            1 if n % 8 == 5 => format!("\"2a12:{n:x}::1/128\""),
            1 => format!("\"2a11:{n:x}:7:7::/64\""),
            2 => format!("\"2a10:{n:x}:700::/44\""),
            _ => format!("\"2a10:{n:x}:700::/40\""),
        });
    }
    format!("allow = [{}]", rules.join(", "))
}

/// How long it took to fill new maps, at the start.
fn filled(lab: &Lab) -> f64 {
    let event = lab.filter().event(0, "the maps are filled", |event| {
        event["id"] == "maps-filled"
    });
    event["took_ms"].as_f64().unwrap()
}

/// How long it takes when the list gains a range.
fn published(lab: &Lab) -> f64 {
    let mut times = Vec::new();
    for n in 0..PUBLISHES {
        let mark = lab.filter().mark();
        let more = [format!("64.{n}.0.0/16")];
        let more: Vec<_> = more.iter().map(String::as_str).collect();
        let _refreshed = lab.refresh(tests::feed::Answer::Body(tests::feed::api_answer(
            &more,
            &[],
        )));
        let event = lab
            .filter()
            .event(mark, "the ranges are published", |event| {
                event["id"] == "ranges-published"
            });
        times.push(event["took_ms"].as_f64().unwrap());
    }
    median(&times)
}

/// A way to drop strangers, and how many it drops per second.
struct Rate {
    name: String,
    per_second: Vec<f64>,
}

impl Rate {
    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "per_second": median(&self.per_second),
            "spread": spread(&self.per_second),
        })
    }
}

/// Packets per second through a veth pair.
fn rates() -> Vec<Rate> {
    let mut ways: Vec<Rate> = Vec::new();
    let mut record = |name: &str, rate: f64| match ways.iter_mut().find(|way| way.name == name) {
        Some(way) => way.per_second.push(rate),
        None => ways.push(Rate {
            name: name.to_owned(),
            per_second: vec![rate],
        }),
    };
    let mut native = Lab::start(&Plan {
        direct: true,
        ..Plan::default()
    });
    native.unload();
    for _ in 0..RATE_ROUNDS {
        for (family, frame) in FAMILIES.into_iter().zip(packets(STRANGER, 443)) {
            let objects = native.network.dropping_all(Host::Origin, DIRECT);
            let received = |lab: &Lab| lab.network.received(Host::Origin, DIRECT);
            let rate = flood(&native, &frame, || received(&native));
            record(&format!("bare XDP_DROP, {family}"), rate);
            drop(objects);
            native.configure("attach = \"native\"");
            native.start_filter();
            let rate = flood(&native, &frame, || received(&native));
            record(&format!("pullgate, {family}"), rate);
            native.unload();
        }
        let [v4, _] = packets(STRANGER, 443);
        native.configure("attach = \"generic\"");
        native.start_filter();
        let counters = native.counters_of(DIRECT);
        let dropped = || counters.count(Verdict::Drop(Reason::NotListed));
        let rate = flood(&native, &v4, dropped);
        record("pullgate, IPv4, generic", rate);
        native.unload();
        for firewall in Firewall::ALL {
            match firewall.set_up(&native.network) {
                Ok(rules) => {
                    record(firewall.label(), flood(&native, &v4, || rules.dropped()));
                }
                Err(error) => println!("SKIPPED {}: {error}", firewall.label()),
            }
        }
    }
    ways
}

/// Packets per second by that counter, while a stranger sends as fast as he can.
fn flood(lab: &Lab, packet: &Packet, dropped: impl Fn() -> u64) -> f64 {
    let frame = packet
        .clone()
        .between(Network::direct_mac(), Host::Stranger.mac())
        .build();
    let quiet = dropped();
    let traffic = Traffic::start(&lab.network, Host::Stranger, DIRECT, frame);
    let before = tests::eventually("the flood has begun", || {
        Some(dropped()).filter(|dropped| *dropped > quiet)
    });
    let begun = Instant::now();
    std::thread::sleep(FLOOD);
    let after = dropped();
    let rate = (after - before) as f64 / begun.elapsed().as_secs_f64();
    drop(traffic);
    rate
}

fn bars(runs: &[Run], rates: &[Rate], publishes: [f64; 2]) -> Vec<Bar> {
    let run = |name: &str| runs.iter().find(|run| run.name == name).unwrap();
    let mut bars = Vec::new();
    for (crowded, few) in [
        ("IPv4 stranger", "IPv4 stranger"),
        ("IPv4 listed", "IPv4 listed"),
        ("IPv4 in a /24", "IPv4 listed"),
        ("IPv4 in a /32", "IPv4 listed"),
        ("IPv6 stranger", "IPv6 stranger"),
        ("IPv6 listed", "IPv6 listed"),
        ("IPv6 in a /48", "IPv6 listed"),
        ("IPv6 in a /64", "IPv6 listed"),
    ] {
        let many = median(&run(&format!("{crowded}, {MANY} ranges")).ours);
        let flat = many / median(&run(few).ours);
        bars.push(Bar::at_most(
            format!("{crowded}, {MANY} / 22 ranges"),
            flat,
            1.25,
        ));
    }
    let stranger = run("IPv4 stranger");
    let above = |run: &Run| median(&run.ours) - median(&run.floors);
    // The one for TCP looks at ports alone, and knows no sources.
    let foreign = runs.iter().filter(|run| run.name.starts_with("xdpfilt"));
    let foreign = foreign.filter(|run| !run.name.ends_with("tcp"));
    let cheapest = foreign.map(above).fold(f64::INFINITY, f64::min);
    bars.push(Bar::at_most(
        "pullgate / xdp-filter, above the floor",
        above(stranger) / cheapest,
        0.6,
    ));
    for family in FAMILIES {
        let took = |what: &str| median(&run(&format!("{family} listed {what}")).ours);
        let more = took("SYN, cookies") - took("SYN, no cookies");
        bars.push(Bar::at_most(
            format!("{family} listed SYN, more where SYNs may be answered, ns"),
            more,
            150.0,
        ));
        let more = took("ACK, cookies") / took("ACK, no cookies");
        bars.push(Bar::at_most(
            format!("{family} listed ACK, the same, times"),
            more,
            1.05,
        ));
    }

    let rate = |name: &str| {
        rates
            .iter()
            .find(|rate| rate.name == name)
            .map(|r| median(&r.per_second))
    };
    for (family, limit) in FAMILIES.into_iter().zip([0.9, 0.85]) {
        let of = |what: &str| rate(&format!("{what}, {family}")).unwrap_or(f64::NAN);
        bars.push(Bar::at_least(
            format!("pullgate / bare XDP_DROP, {family}, packets per second"),
            of("pullgate") / of("bare XDP_DROP"),
            limit,
        ));
    }
    if let Some(theirs) = rate("nftables netdev ingress") {
        let of = |what: &str| rate(what).unwrap_or(f64::NAN) / theirs;
        // With a slow sender no program is so much faster, which the second number shows.
        println!(
            "bare XDP_DROP / nftables netdev ingress, packets per second: {:.2}",
            of("bare XDP_DROP, IPv4")
        );
        let name = "pullgate / nftables netdev ingress, packets per second";
        bars.push(Bar::at_least(name, of("pullgate, IPv4"), 3.5));
    }
    for (what, took) in ["all of them", "one more"].into_iter().zip(publishes) {
        bars.push(Bar::at_most(
            format!("publishing {MANY} ranges, {what}, ms"),
            took,
            20.0,
        ));
    }
    bars
}

fn print(runs: &[Run], rates: &[Rate]) {
    println!(
        "\n{:<38} {:>8} {:>8} {:>7}  spread",
        "frame", "floor ns", "ns", "ratio"
    );
    for run in runs {
        let [low, high] = spread(&run.ratios());
        println!(
            "{:<38} {:>8.1} {:>8.1} {:>7.2}  {low:.2} to {high:.2}",
            run.name,
            median(&run.floors),
            median(&run.ours),
            run.ratio()
        );
    }
    println!("\n{:<38} {:>10}  spread", "dropping strangers", "million/s");
    for rate in rates {
        let [low, high] = spread(&rate.per_second).map(|rate| rate / 1e6);
        let rate_m = median(&rate.per_second) / 1e6;
        println!("{:<38} {rate_m:>10.2}  {low:.2} to {high:.2}", rate.name);
    }
}

fn packets(sources: [&str; 2], port: u16) -> [Packet; 2] {
    let [v4, v6] = Host::Origin.addresses();
    [(sources[0], v4), (sources[1], v6)]
        .map(|(source, origin)| Packet::tcp(source.parse().unwrap(), origin, port))
}

fn syns(sources: [&str; 2], port: u16) -> [Vec<u8>; 2] {
    packets(sources, port).map(|packet| packet.build())
}

const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];
const STRANGER: [&str; 2] = ["198.51.100.7", "2001:db8::7"];
const EDGE: [&str; 2] = ["173.245.48.5", "2400:cb00::5"];
const DROP: Verdict = Verdict::Drop(Reason::NotListed);
const PASS: Verdict = Verdict::Pass(Reason::Listed);
/// All but the first byte of a destination options header of eight.
const PADDING: [u8; 7] = [0, 1, 4, 0, 0, 0, 0];
/// As [`DESTINATIONS`], on one end of a pair.
const ANSWERING: &str =
    "syn_cookies = \"on\"\ndestinations = [\"203.0.113.10\", \"2001:db8:10::10\"]";
const DESTINATIONS: &str = "destinations = [\"203.0.113.10\", \"2001:db8:10::10\"]";
/// Ranges of the crowded table.
const MANY: usize = 10_000;
/// Frames of one test run: long against the clock's ticks.
const REPEATS: u32 = 1 << 21;
const ROUNDS: u32 = 11;
const RATE_ROUNDS: u32 = 5;
const PUBLISHES: u32 = 7;
/// How long each flood is measured.
const FLOOD: Duration = Duration::from_millis(700);
