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
use tests::contenders::{Firewall, XdpFilter};
use tests::net::{DIRECT, Host, Network};
use tests::traffic::{self, Objects, Traffic};
use tests::{Lab, Plan};

use crate::report::{self, Bar, median, spread};

pub(crate) fn run(json: Option<&Path>) {
    traffic::pin_to_cpu(0);

    let (runs, publishes) = test_runs();
    let rates = rates();
    let bars = bars(&runs, &rates, publishes);
    let report = json!({
        "test_runs": runs.iter().map(Run::json).collect::<Vec<_>>(),
        "packets_per_second": rates.iter().map(Rate::json).collect::<Vec<_>>(),
        "publish_ms": {"all_anew": publishes[0], "one_more": publishes[1]},
        "bars": bars.iter().map(Bar::json).collect::<Vec<_>>(),
    });

    print(&runs, &rates);
    report::print(&bars);
    report::write("filter", &report, &bars, json);
}

/// A kind of frame, and what a program takes for it.
struct Run {
    name: String,
    floor: &'static str,
    frame: Vec<u8>,
    floors: Vec<f64>,
    ours: Vec<f64>,
}

impl Run {
    fn new(name: &str, verdict: &Verdict, frame: Vec<u8>) -> Self {
        Self {
            name: name.to_owned(),
            floor: match verdict {
                Verdict::Drop(_) => "bare_drop",
                Verdict::Pass(_) => "bare_pass",
            },
            frame,
            floors: Vec::new(),
            ours: Vec::new(),
        }
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
    let publishes = [filled(&many), published(&many)];
    let (ours, crowded) = (few.program(), many.program());
    let mut objects = Objects::load();
    for name in ["bare_drop", "bare_pass"] {
        traffic::park(&many.network, name, objects.program(name));
    }
    let contenders = XdpFilter::load_all(&many.network);

    let mut runs = frames();
    let first_crowded = runs.len();
    runs.extend(crowded_frames());
    let first_foreign = runs.len();
    for contender in &contenders {
        let [v4, _] = syns(STRANGER, 443);
        runs.push(Run::new(contender.name(), &DROP, v4));
    }
    for _ in 0..ROUNDS {
        for (index, run) in runs.iter_mut().enumerate() {
            let program = if index >= first_foreign {
                contenders[index - first_foreign].program()
            } else if index >= first_crowded {
                &crowded
            } else {
                &ours
            };
            run.floors
                .push(nanoseconds(objects.program(run.floor), &run.frame));
            run.ours.push(nanoseconds(program, &run.frame));
        }
    }
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
        Run::new(&format!("{what}, {MANY} ranges"), &verdict, frame)
    });
    runs.collect()
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
    for _ in 0..RATE_ROUNDS {
        for (what, attach) in [
            ("native", "attach = \"native\""),
            ("generic", "attach = \"generic\""),
        ] {
            native.unload();
            native.configure(attach);
            native.start_filter();
            let counters = native.counters_of(DIRECT);
            let rate = flood(&native, || counters.count(Verdict::Drop(Reason::NotListed)));
            record(&format!("pullgate, {what}"), rate);
        }
        native.unload();
        for firewall in Firewall::ALL {
            match firewall.set_up(&native.network) {
                Ok(rules) => record(firewall.label(), flood(&native, || rules.dropped())),
                Err(error) => println!("SKIPPED {}: {error}", firewall.label()),
            }
        }
    }
    ways
}

/// Drops per second by that counter, while a stranger sends as fast as he can.
fn flood(lab: &Lab, dropped: impl Fn() -> u64) -> f64 {
    let [v4, _] = packets(STRANGER, 443);
    let frame = v4
        .between(Network::direct_mac(), Host::Stranger.mac())
        .build();
    let traffic = Traffic::start(&lab.network, Host::Stranger, DIRECT, frame);
    let before = tests::eventually("the flood has begun", || {
        Some(dropped()).filter(|dropped| *dropped > 0)
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
    for (name, limit) in [
        ("IPv4 stranger", 1.35),
        ("IPv4 listed", 1.35),
        ("IPv4 not protected", 1.2),
        ("IPv6 stranger", 1.4),
        ("IPv6 listed", 1.4),
        ("IPv6 not protected", 1.4),
    ] {
        bars.push(Bar::at_most(
            format!("{name} / floor"),
            run(name).ratio(),
            limit,
        ));
    }
    for family in FAMILIES {
        let name = format!("{family} stranger");
        let tag = run(&format!("{name}, one tag")).ratio() - run(&name).ratio();
        bars.push(Bar::at_most(
            format!("{family} one VLAN tag, more"),
            tag,
            0.1,
        ));
    }
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
    let faster = cheapest / above(stranger);
    bars.push(Bar::at_least(
        "xdp-filter / pullgate, above the floor",
        faster,
        4.0,
    ));

    let rate = |name: &str| {
        rates
            .iter()
            .find(|rate| rate.name == name)
            .map(|r| median(&r.per_second))
    };
    if let (Some(ours), Some(theirs)) = (rate("pullgate, native"), rate("nftables netdev ingress"))
    {
        let name = "pullgate / nftables netdev ingress, packets per second";
        bars.push(Bar::at_least(name, ours / theirs, 3.5));
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
