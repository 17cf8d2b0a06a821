//! The benchmark of the gate: CPU time per handshake, request and megabyte, how long requests take, also beside a busy
//! process, and memory per idle connection, against what others use for the same job.
//!
//! The same certificates (server ECDSA P-256, client RSA-2048 under an RSA-4096 CA), the same nginx
//! behind it, the same clients; round by round, so that what disturbs one disturbs all.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Instant;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};
use tests::net::{Host, Network};
use tests::pki::Pki;
use tests::proxies::{Peer, Proxy};
use tests::web;

use crate::busy::{Busy, Priority};
use crate::load::{BODY, CONNECTIONS, DOWNLOADS, HANDSHAKES, Load, MEGABYTES, REQUESTS};
use crate::report::{self, Bar, median, quantile, spread};
use crate::{cpu, floor};

/// What to measure.
pub(crate) struct Options {
    pub(crate) json: Option<PathBuf>,
    pub(crate) only: String,
    pub(crate) rounds: u32,
    pub(crate) part: Part,
}

/// Which measurements.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Part {
    /// All of them.
    All,
    /// Full handshakes.
    Full,
    /// Resumed handshakes.
    Resumed,
    /// Keep-alive requests.
    Requests,
    /// Keep-alive requests beside a busy process.
    Beside,
    /// Downloads.
    Bulk,
    /// Idle connections.
    Idle,
}

impl Part {
    fn covers(self, part: Self) -> bool {
        self == Self::All || self == part
    }
}

/// What was measured of one proxy.
struct Account {
    proxy: Proxy,
    /// Microseconds of CPU time.
    full: Vec<f64>,
    resumed: Vec<f64>,
    request: Vec<f64>,
    /// Per megabyte.
    bulk: Vec<f64>,
    per_second: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
    /// The work of the busiest thread, as a share of the average one's, while requests came.
    busiest: Vec<f64>,
    /// Microseconds that threads were ready and had no core, per request.
    delay: Vec<f64>,
    /// With each of [`Priority::ALL`] beside it.
    p99_beside: [Vec<f64>; 2],
    /// Why resumption was not measured.
    not_resumed: bool,
    /// KiB with so many idle connections.
    memory: Vec<(u32, f64)>,
}

impl Account {
    fn new(proxy: Proxy) -> Self {
        Self {
            proxy,
            full: Vec::new(),
            resumed: Vec::new(),
            request: Vec::new(),
            bulk: Vec::new(),
            per_second: Vec::new(),
            p50: Vec::new(),
            p99: Vec::new(),
            busiest: Vec::new(),
            delay: Vec::new(),
            p99_beside: Default::default(),
            not_resumed: false,
            memory: Vec::new(),
        }
    }

    fn label(&self) -> String {
        self.proxy.peer().label()
    }

    fn version(&self) -> String {
        format!("{}: {}", self.label(), self.proxy.peer().version())
    }

    /// What each of its threads has done (proc(5), schedstat): microseconds that it ran, and that it waited for a core.
    fn threads(&self) -> HashMap<PathBuf, [f64; 2]> {
        let processes = self.proxy.processes().into_iter();
        let tasks = processes.map(|pid| std::fs::read_dir(format!("/proc/{pid}/task")));
        let tasks = tasks.flatten().flatten().flatten();
        let read = tasks.filter_map(|task| {
            let path = task.path();
            let text = std::fs::read_to_string(path.join("schedstat")).ok()?;
            let mut words = text.split_whitespace().map(str::parse::<f64>);
            let mut next = || Some(words.next()?.ok()? / 1e3);
            Some((path, [next()?, next()?]))
        });
        read.collect()
    }

    /// Microseconds of CPU time that all its processes have used.
    fn cpu(&self) -> f64 {
        cpu::of_processes(self.proxy.processes())
    }

    /// CPU time that something has cost, per item.
    fn cost<T>(&self, items: u32, work: impl FnOnce() -> T) -> (f64, T) {
        let before = self.cpu();
        let result = work();
        ((self.cpu() - before) / f64::from(items), result)
    }

    /// KiB of memory, pages that processes share counted once.
    fn memory(&self) -> f64 {
        let sizes = self.proxy.processes().into_iter().map(|pid| {
            let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"));
            let rollup = rollup.unwrap_or_default();
            let line = rollup.lines().find(|line| line.starts_with("Pss:"));
            let size = line.and_then(|line| line.split_whitespace().nth(1));
            size.and_then(|size| size.parse::<f64>().ok())
                .unwrap_or(0.0)
        });
        sizes.sum()
    }

    /// Notes how even the work of its threads was, and how long they waited for a core.
    fn note_threads(&mut self, before: &HashMap<PathBuf, [f64; 2]>) {
        let after = self.threads();
        let spent = after.iter().map(|(path, [ran, waited])| {
            let [ran_before, waited_before] = before.get(path).copied().unwrap_or_default();
            [ran - ran_before, waited - waited_before]
        });
        let spent: Vec<_> = spent.collect();
        let total: f64 = spent.iter().map(|[ran, _]| ran).sum();
        // Those that look after others do next to nothing.
        let workers = spent.iter().filter(|[ran, _]| *ran > total / 100.0);
        let most = spent.iter().map(|[ran, _]| *ran).fold(0.0, f64::max);
        self.busiest.push(most * workers.count() as f64 / total);
        let waited: f64 = spent.iter().map(|[_, waited]| waited).sum();
        self.delay.push(waited / f64::from(CONNECTIONS * REQUESTS));
    }

    /// KiB per idle connection.
    fn per_idle(&self) -> Option<f64> {
        let ((_, none), (many, with)) = (self.memory.first()?, self.memory.last()?);
        Some((with - none) / f64::from(*many))
    }

    fn json(&self) -> Value {
        let cost = |values: &[f64]| json!({"us": median(values), "spread": spread(values)});
        json!({
            "name": self.label(),
            "full_handshake": cost(&self.full),
            "resumed_handshake": (!self.not_resumed).then(|| cost(&self.resumed)),
            "keep_alive_request": cost(&self.request),
            "per_mb": cost(&self.bulk),
            "requests_per_second": median(&self.per_second),
            "p50_us": median(&self.p50),
            "p99_us": median(&self.p99),
            "busiest_thread": median(&self.busiest),
            "run_queue_delay_us": median(&self.delay),
            "p99_us_beside_normal": median(&self.p99_beside[0]),
            "p99_us_beside_nice_19": median(&self.p99_beside[1]),
            "memory_kib": self.memory.iter().map(|(idle, kib)| json!({"idle": idle, "kib": kib})).collect::<Vec<_>>(),
        })
    }
}

/// What a full handshake cannot cost less than, in microseconds.
#[derive(Default)]
struct Floor {
    tls: Vec<f64>,
    connections: Vec<f64>,
}

impl Floor {
    fn print(&self, accounts: &[Account]) {
        let (tls, connections) = (median(&self.tls), median(&self.connections));
        println!(
            "\nfull handshake: TLS alone {tls:.0} µs, its connections alone {connections:.0} µs"
        );
        for account in accounts {
            let above = median(&account.full) / (tls + connections);
            println!("{:<16} {above:.2} times both", account.label());
        }
    }
}

pub(crate) fn run(options: &Options) {
    let network = Network::new();
    let pki = Pki::new(&network.path("pki"));
    let identity = pki.write_rsa_authority("rsa-ca.pem");
    let many = idle_connections();
    let _web = web::plain(&network, BODY);
    let wanted = |peer: &Peer| peer.label().contains(&options.only) || *peer == Peer::Pullgate;
    let peers = Peer::ALL.into_iter().filter(wanted);
    let (peers, skipped): (Vec<_>, Vec<_>) = peers.partition(|peer| peer.is_installed());
    let skipped: Vec<_> = skipped.into_iter().map(Peer::label).collect();
    for label in &skipped {
        println!("SKIPPED {label}: not installed");
    }
    let mut accounts: Vec<_> = peers
        .into_iter()
        .map(|peer| Account::new(Proxy::start(&network, &pki, peer)))
        .collect();

    let load = Load::new(&pki, &identity);
    let mut floor = Floor::default();
    // Over loopback: what the network costs is the same for all, and hides what differs.
    network.on(Host::Origin, || {
        for _ in 0..options.rounds {
            for account in &mut accounts {
                round(account, &load, options.part);
            }
            if options.part.covers(Part::Full) {
                floor.tls.push(floor::tls(&pki, load.config(), HANDSHAKES));
                floor.connections.push(floor::connections(HANDSHAKES));
            }
            // The one behind a costly one tidies up after it: not always the same.
            fastrand::shuffle(&mut accounts);
        }
        accounts.sort_by_key(|account| Peer::ALL.iter().position(|it| *it == account.proxy.peer()));
        if options.part.covers(Part::Idle) {
            for account in &mut accounts {
                hold(account, &load, [FEW, many]);
            }
        }
    });

    let bars = bars(&accounts, options.part);
    print(&accounts);
    if options.part.covers(Part::Full) {
        floor.print(&accounts);
    }
    report::print(&bars);
    let report = json!({
        "machine": report::machine(),
        "versions": accounts.iter().map(Account::version).collect::<Vec<_>>(),
        "skipped": skipped,
        "servers": accounts.iter().map(Account::json).collect::<Vec<_>>(),
        "floor": {"tls_us": median(&floor.tls), "connections_us": median(&floor.connections)},
        "bars": bars.iter().map(Bar::json).collect::<Vec<_>>(),
    });
    report::write("gate", &report, &bars, options.json.as_deref());
}

fn round(account: &mut Account, load: &Load, part: Part) {
    let to = account.proxy.address();
    if part.covers(Part::Full) {
        let (cost, ()) = account.cost(HANDSHAKES, || load.full_handshakes(to, HANDSHAKES));
        account.full.push(cost);
    }
    if part.covers(Part::Resumed) {
        let (cost, part) = account.cost(HANDSHAKES, || load.resumed_handshakes(to, HANDSHAKES));
        // The first of each chain is a full one.
        account.not_resumed |= part < 0.99;
        account.resumed.push(cost);
    }
    if part.covers(Part::Requests) {
        let connections = load.open(to, CONNECTIONS).unwrap();
        let (connections, _) = load.requests(connections, REQUESTS / 10);
        let before = account.threads();
        let begun = Instant::now();
        let (cost, (connections, times)) = account.cost(CONNECTIONS * REQUESTS, || {
            load.requests(connections, REQUESTS)
        });
        account.request.push(cost);
        let per_second = f64::from(CONNECTIONS * REQUESTS) / begun.elapsed().as_secs_f64();
        account.per_second.push(per_second);
        account.p50.push(quantile(&times, 0.5) * 1e6);
        account.p99.push(quantile(&times, 0.99) * 1e6);
        account.note_threads(&before);
        load.close(connections);
    }
    if part.covers(Part::Beside) {
        for (at, priority) in Priority::ALL.into_iter().enumerate() {
            let connections = load.open(to, CONNECTIONS).unwrap();
            let _busy = Busy::start(priority);
            let (connections, times) = load.requests(connections, REQUESTS);
            account.p99_beside[at].push(quantile(&times, 0.99) * 1e6);
            load.close(connections);
        }
    }
    if part.covers(Part::Bulk) {
        let mut one = load.open(to, 1).unwrap();
        let connection = one.remove(0);
        let (cost, connection) =
            account.cost(DOWNLOADS * MEGABYTES, || load.bulk(connection, DOWNLOADS));
        account.bulk.push(cost);
        load.close(vec![connection]);
    }
}

/// Memory with more and more idle connections.
fn hold(account: &mut Account, load: &Load, counts: [u32; 2]) {
    account.memory.push((0, account.memory()));
    let mut held = Vec::new();
    for count in counts {
        let have = u32::try_from(held.len()).unwrap();
        let Some(more) = load.open(account.proxy.address(), count - have) else {
            println!("{} does not take {count} connections", account.label());
            break;
        };
        held.extend(more);
        account.memory.push((count, account.memory()));
    }
    load.close(held);
}

/// How many idle connections this host lets a process relay.
fn idle_connections() -> u32 {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let possible = u32::try_from(hard.saturating_sub(SPARE) / 2).unwrap_or(MANY);
    if possible < MANY {
        println!("{possible} idle connections instead of {MANY}: a process may open {hard} files");
    }
    possible.min(MANY)
}

fn bars(accounts: &[Account], part: Part) -> Vec<Bar> {
    let (ours, peers): (Vec<_>, Vec<_>) = accounts
        .iter()
        .partition(|account| account.proxy.peer() == Peer::Pullgate);
    let [ours] = ours[..] else { return Vec::new() };
    let best = |values: &dyn Fn(&Account) -> Option<f64>| {
        let peers = peers.iter().filter_map(|peer| values(peer));
        // Without any there is no bar that could be met.
        peers.reduce(f64::min).unwrap_or(f64::NAN)
    };
    let ratio = |name: &str, limit, values: &dyn Fn(&Account) -> Option<f64>| {
        let value = values(ours).unwrap_or(f64::NAN) / best(values);
        Bar::at_most(format!("{name} / best peer's"), value, limit)
    };
    let mut bars = Vec::new();
    if part.covers(Part::Requests) {
        let values = |account: &Account| Some(median(&account.request));
        bars.push(ratio("CPU per keep-alive request", 0.8, &values));
    }
    if part.covers(Part::Full) {
        let values = |account: &Account| Some(median(&account.full));
        bars.push(ratio("CPU per full handshake", 0.6, &values));
    }
    if part.covers(Part::Resumed) {
        let values = |account: &Account| {
            let is_one = !account.not_resumed;
            is_one.then(|| median(&account.resumed))
        };
        bars.push(ratio("CPU per resumed handshake", 0.7, &values));
    }
    if part.covers(Part::Bulk) {
        let values = |account: &Account| Some(median(&account.bulk));
        bars.push(ratio("CPU per MB", 0.8, &values));
    }
    if part.covers(Part::Requests) {
        let values = |account: &Account| Some(median(&account.p99));
        bars.push(ratio("p99 under load", 1.0, &values));
        let rates = peers.iter().map(|peer| median(&peer.per_second));
        let fastest = rates.reduce(f64::max).unwrap_or(f64::NAN);
        bars.push(Bar::at_least(
            "requests per second / best peer's",
            median(&ours.per_second) / fastest,
            1.0,
        ));
    }
    if part.covers(Part::Beside) {
        for (at, priority) in Priority::ALL.into_iter().enumerate() {
            let name = format!("p99 beside a busy process, {}", priority.label());
            let values = |account: &Account| Some(median(&account.p99_beside[at]));
            bars.push(ratio(&name, 1.1, &values));
        }
    }
    if part.covers(Part::Idle) {
        bars.push(ratio("memory per idle connection", 0.7, &Account::per_idle));
    }
    bars
}

fn print(accounts: &[Account]) {
    println!(
        "\n{:<16} {:>8} {:>8} {:>8} {:>8} {:>8} {:>7} {:>7} {:>8} {:>8} {:>7} {:>7} {:>9}",
        "µs CPU per",
        "full",
        "resumed",
        "request",
        "MB",
        "req/s",
        "p50 µs",
        "p99 µs",
        "p99 busy",
        "nice 19",
        "busiest",
        "delay",
        "KiB/idle"
    );
    for account in accounts {
        let resumed = if account.not_resumed {
            "not".to_owned()
        } else {
            format!("{:.1}", median(&account.resumed))
        };
        let [normal, lowest] = &account.p99_beside;
        println!(
            "{:<16} {:>8.1} {resumed:>8} {:>8.2} {:>8.1} {:>8.0} {:>7.0} {:>7.0} {:>8.0} {:>8.0} {:>7.2} {:>7.1} {:>9.1}",
            account.label(),
            median(&account.full),
            median(&account.request),
            median(&account.bulk),
            median(&account.per_second),
            median(&account.p50),
            median(&account.p99),
            median(normal),
            median(lowest),
            median(&account.busiest),
            median(&account.delay),
            account.per_idle().unwrap_or(f64::NAN),
        );
    }
}

/// Idle connections, first.
const FEW: u32 = 1_000;
/// And then, if the host grants a process the descriptors for both sides of so many.
const MANY: u32 = 10_000;
/// Descriptors of a proxy besides those of connections.
const SPARE: u64 = 200;
