//! The benchmark of the gate: CPU time per handshake, request and megabyte, and memory per idle
//! connection, against what others use for the same job.
//!
//! The same certificates (server ECDSA P-256, client RSA-2048 under an RSA-4096 CA), the same nginx
//! behind it, the same clients; round by round, so that what disturbs one disturbs all.

use std::path::PathBuf;
use std::time::Instant;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::net::{Host, Network};
use tests::pki::Pki;
use tests::proxies::{Peer, Proxy};
use tests::web;

use crate::load::{BODY, CONNECTIONS, DOWNLOADS, HANDSHAKES, Load, MEGABYTES, REQUESTS};
use crate::report::{self, Bar, median, quantile, spread};

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
            not_resumed: false,
            memory: Vec::new(),
        }
    }

    fn label(&self) -> &'static str {
        self.proxy.peer().label()
    }

    /// Microseconds of CPU time that all its processes have used.
    fn cpu(&self) -> f64 {
        cpu_time(self.proxy.processes())
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

    /// KiB per idle connection.
    fn per_idle(&self) -> Option<f64> {
        let ((_, none), (many, with)) = (self.memory.first()?, self.memory.last()?);
        Some((with - none) / f64::from(*many))
    }

    fn json(&self) -> Value {
        let cost = |values: &[f64]| json!({"us": median(values), "spread": spread(values)});
        json!({
            "name": self.label(),
            "version": self.proxy.peer().version(),
            "full_handshake": cost(&self.full),
            "resumed_handshake": (!self.not_resumed).then(|| cost(&self.resumed)),
            "keep_alive_request": cost(&self.request),
            "per_mb": cost(&self.bulk),
            "requests_per_second": median(&self.per_second),
            "p50_us": median(&self.p50),
            "p99_us": median(&self.p99),
            "memory_kib": self.memory.iter().map(|(idle, kib)| json!({"idle": idle, "kib": kib})).collect::<Vec<_>>(),
        })
    }
}

/// Microseconds of CPU time that processes have used.
pub(crate) fn cpu_time(processes: impl IntoIterator<Item = i32>) -> f64 {
    let clocks = processes.into_iter().filter_map(|pid| {
        let clock = clock_getcpuclockid(Pid::from_raw(pid)).ok()?;
        let time = clock.now().ok()?;
        Some(time.tv_sec() as f64 * 1e6 + time.tv_nsec() as f64 / 1e3)
    });
    clocks.sum()
}

pub(crate) fn run(options: &Options) {
    let network = Network::new();
    let pki = Pki::new(&network.path("pki"));
    let identity = pki.write_rsa_authority("rsa-ca.pem");
    let many = idle_connections();
    let _web = web::plain(&network, BODY);
    let peers = Peer::ALL.into_iter().filter(|peer| {
        let wanted = peer.label().contains(&options.only) || *peer == Peer::Pullgate;
        if wanted && !peer.is_installed() {
            println!("SKIPPED {}: not installed", peer.label());
        }
        wanted && peer.is_installed()
    });
    let mut accounts: Vec<_> = peers
        .map(|peer| Account::new(Proxy::start(&network, &pki, peer)))
        .collect();

    let load = Load::new(&pki, &identity);
    // Over loopback: what the network costs is the same for all, and hides what differs.
    network.on(Host::Origin, || {
        for _ in 0..options.rounds {
            for account in &mut accounts {
                round(account, &load, options.part);
            }
            // The one behind a costly one tidies up after it: not always the same.
            fastrand::shuffle(&mut accounts);
        }
        accounts.sort_by_key(|account| account.proxy.peer() as u8);
        if options.part.covers(Part::Idle) {
            for account in &mut accounts {
                hold(account, &load, [FEW, many]);
            }
        }
    });

    let bars = bars(&accounts, options.part);
    print(&accounts);
    report::print(&bars);
    let report = json!({
        "machine": report::machine(),
        "servers": accounts.iter().map(Account::json).collect::<Vec<_>>(),
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
        let begun = Instant::now();
        let (cost, (connections, times)) = account.cost(CONNECTIONS * REQUESTS, || {
            load.requests(connections, REQUESTS)
        });
        account.request.push(cost);
        let per_second = f64::from(CONNECTIONS * REQUESTS) / begun.elapsed().as_secs_f64();
        account.per_second.push(per_second);
        account.p50.push(quantile(&times, 0.5) * 1e6);
        account.p99.push(quantile(&times, 0.99) * 1e6);
        load.close(connections);
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
        peers.fold(f64::INFINITY, f64::min)
    };
    let ratio = |name: &str, limit, values: &dyn Fn(&Account) -> Option<f64>| {
        let value = values(ours).unwrap_or(f64::NAN) / best(values);
        Bar::at_most(format!("{name}, pullgate / best peer"), value, limit)
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
        let fastest = rates.fold(0.0, f64::max);
        bars.push(Bar::at_least(
            "requests per second, pullgate / best peer",
            median(&ours.per_second) / fastest,
            1.0,
        ));
    }
    if part.covers(Part::Idle) {
        bars.push(ratio("memory per idle connection", 0.7, &Account::per_idle));
    }
    bars
}

fn print(accounts: &[Account]) {
    println!(
        "\n{:<14} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8} {:>9} {:>9} {:>9} {:>7}",
        "µs CPU per",
        "full",
        "resumed",
        "request",
        "MB",
        "req/s",
        "p50 µs",
        "p99 µs",
        "KiB 0",
        "1,000",
        "10,000",
        "KiB/idle"
    );
    for account in accounts {
        let memory = |index: usize| {
            let value = account.memory.get(index).map(|(_, kib)| *kib);
            value.map_or_else(|| "-".to_owned(), |kib| format!("{kib:.0}"))
        };
        let resumed = if account.not_resumed {
            "not".to_owned()
        } else {
            format!("{:.1}", median(&account.resumed))
        };
        println!(
            "{:<14} {:>9.1} {resumed:>9} {:>9.2} {:>9.1} {:>9.0} {:>8.0} {:>8.0} {:>9} {:>9} {:>9} {:>7.1}",
            account.label(),
            median(&account.full),
            median(&account.request),
            median(&account.bulk),
            median(&account.per_second),
            median(&account.p50),
            median(&account.p99),
            memory(0),
            memory(1),
            memory(2),
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
