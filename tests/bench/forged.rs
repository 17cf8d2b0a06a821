//! The benchmark of a forged flood: what a listed SYN costs the kernel, and the program in its place; and whether those
//! who mean it are served meanwhile.

use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::forgery::{self, Forger};
use tests::net::{DIRECT, Host};
use tests::{Lab, Plan, eventually};

use crate::report::{Bar, median, quantile, spread};

/// What was measured.
pub(crate) struct Forged {
    /// Nanoseconds per frame on one core, its sender's part among them: dropped by a program that does nothing, answered
    /// by the program, answered by the kernel.
    dropped: Vec<f64>,
    program: Vec<f64>,
    kernel: Vec<f64>,
    /// SYNs a second while those who mean it came.
    forged: f64,
    /// What each visit took, in milliseconds, and how many failed.
    visits: Vec<f64>,
    failed: usize,
}

impl Forged {
    /// Measures all of it, on the CPU that this thread is kept on; visits have every CPU.
    pub(crate) fn measure(every_cpu: &CpuSet) -> Self {
        let mut lab = Lab::start(&Plan {
            filter: ANSWERING,
            direct: true,
            ..Plan::default()
        });
        let _other_end = lab.network.taking_what_is_sent();
        let forger = Forger::new(&lab.network);
        let [mut dropped, mut program, mut kernel] = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            lab.unload();
            dropped.push(dropping(&lab, &forger));
            for (filter, counter, times) in [
                (ANSWERING, Counter::Program, &mut program),
                ("syn_cookies = \"off\"", Counter::Kernel, &mut kernel),
            ] {
                lab.unload();
                lab.configure(filter);
                lab.start_filter();
                times.push(answering(&lab, &forger, counter));
            }
        }
        lab.unload();
        lab.configure(ANSWERING);
        sched_setaffinity(Pid::from_raw(0), every_cpu).unwrap();
        lab.start_filter();
        let before = Counter::Program.read(&lab);
        let flood = forger.flood(&lab.network);
        eventually("the program answers", || {
            (Counter::Program.read(&lab) > before).then_some(())
        });
        let sent = flood.sent();
        let begun = Instant::now();
        let visits = lab.network.on(Host::Edge, || {
            let mut visits = Vec::new();
            while begun.elapsed() < VISITED {
                visits.push(forgery::visit());
                // A source may begin so many handshakes a second (`gate.per_source`).
                std::thread::sleep(Duration::from_micros(2500));
            }
            visits
        });
        let forged = (flood.sent() - sent) as f64 / begun.elapsed().as_secs_f64();
        drop(flood);
        let failed = visits.iter().filter(|visit| visit.is_err()).count();
        let visits = visits.into_iter().flatten();
        Self {
            dropped,
            program,
            kernel,
            forged,
            visits: visits.map(|took| took.as_secs_f64() * 1e3).collect(),
            failed,
        }
    }

    /// How often the program's answer fits into the kernel's.
    fn faster(&self) -> f64 {
        let above = |times: &[f64]| median(times) - median(&self.dropped);
        above(&self.kernel) / above(&self.program)
    }

    /// The part of all visits that was answered.
    fn served(&self) -> f64 {
        let served = self.visits.len() as f64;
        served / (served + self.failed as f64)
    }

    pub(crate) fn bars(&self) -> Vec<Bar> {
        vec![
            Bar::at_least(
                "kernel / program, time per answered SYN",
                self.faster(),
                3.0,
            ),
            Bar::at_least("visits served in a forged flood", self.served(), 0.999),
        ]
    }

    pub(crate) fn print(&self) {
        println!(
            "\n{:<38} {:>10}  spread",
            "a listed SYN, forged, on one core", "ns"
        );
        for (name, times) in [
            ("sent, and dropped at once", &self.dropped),
            ("sent, and answered by the program", &self.program),
            ("sent, and answered by the kernel", &self.kernel),
        ] {
            let [low, high] = spread(times);
            println!("{name:<38} {:>10.0}  {low:.0} to {high:.0}", median(times));
        }
        println!(
            "{} visits in {} s of {:.2} million forged SYNs a second: {} failed, median {:.2} ms, p99 {:.2} ms",
            self.visits.len() + self.failed,
            VISITED.as_secs(),
            self.forged / 1e6,
            self.failed,
            median(&self.visits),
            quantile(&self.visits, 0.99),
        );
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "dropped_ns": median(&self.dropped),
            "program_ns": median(&self.program),
            "kernel_ns": median(&self.kernel),
            "forged_per_second": self.forged,
            "visits": self.visits.len() + self.failed,
            "failed": self.failed,
            "p50_ms": median(&self.visits),
            "p99_ms": quantile(&self.visits, 0.99),
        })
    }
}

/// The CPUs that this process may use.
pub(crate) fn every_cpu() -> CpuSet {
    sched_getaffinity(Pid::from_raw(0)).unwrap()
}

/// Whose answers are counted.
#[derive(Clone, Copy)]
enum Counter {
    Program,
    Kernel,
}

impl Counter {
    fn read(self, lab: &Lab) -> u64 {
        match self {
            Self::Program => {
                let sent = "pullgate_filter_syn_cookies_total{outcome=\"sent\"}";
                lab.filter().metric(sent)
            }
            Self::Kernel => lab
                .network
                .tcp_counter(Host::Origin, "TCPReqQFullDoCookies"),
        }
    }
}

/// Nanoseconds for a SYN that is dropped by a program that does nothing.
fn dropping(lab: &Lab, forger: &Forger) -> f64 {
    let _dropping = lab.network.dropping_all(Host::Origin, DIRECT);
    let flood = forger.flood(&lab.network);
    measured(|| lab.network.received(Host::Origin, DIRECT), flood)
}

/// Nanoseconds for a SYN that is answered.
fn answering(lab: &Lab, forger: &Forger, counter: Counter) -> f64 {
    let flood = forger.flood(&lab.network);
    measured(|| counter.read(lab), flood)
}

/// Nanoseconds from one count to the next, while a flood goes on.
fn measured(count: impl Fn() -> u64, flood: tests::traffic::Traffic) -> f64 {
    let before = count();
    eventually("the flood has begun", || (count() > before).then_some(()));
    let (begun, first) = (Instant::now(), count());
    std::thread::sleep(FLOOD);
    let (took, last) = (begun.elapsed(), count());
    drop(flood);
    took.as_secs_f64() * 1e9 / (last - first) as f64
}

const ANSWERING: &str = "syn_cookies = \"on\"";
const ROUNDS: u32 = 5;
/// How long each flood is measured.
const FLOOD: Duration = Duration::from_millis(1500);
/// How long visits go on.
const VISITED: Duration = Duration::from_secs(5);
