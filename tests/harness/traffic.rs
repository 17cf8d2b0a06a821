//! Traffic by the million: frames that the kernel itself sends, over a veth pair to the origin.
//!
//! A test run of an XDP program that answers `XDP_TX`, on live frames, is as fast as a network
//! card: `BPF_F_TEST_XDP_LIVE_FRAMES`, net/bpf/test_run.c.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use aya::programs::{TestRun as _, TestRunAttrs, TestRunOptions, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};
use nix::net::if_::if_nametoindex;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use pullgate::xdp::uninterrupted;

use crate::net::{Host, Network, ip};

/// A sender that goes on until it is stopped or dropped.
pub struct Traffic {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    sender: Option<JoinHandle<()>>,
}

impl Traffic {
    /// Begins to send frames, again and again, out of an interface of a host.
    ///
    /// The last two octets of an IPv4 source are others in every frame; checksums stay right.
    #[must_use]
    pub fn start(network: &Network, host: Host, interface: &str, frame: Vec<u8>) -> Self {
        Self::start_with("transmit", network, host, interface, frame)
    }

    /// The same for SYNs over IPv4 of [`Objects::FORGED`] bytes, which who receives them may change: frames are used
    /// again.
    #[must_use]
    pub fn forge(network: &Network, host: Host, interface: &str, syn: Vec<u8>) -> Self {
        Self::start_with("forge", network, host, interface, syn)
    }

    fn start_with(
        program: &'static str,
        network: &Network,
        host: Host,
        interface: &str,
        frame: Vec<u8>,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&sent));
        let namespace = network.namespace(host);
        let interface = interface.to_owned();
        let sender = std::thread::spawn(move || {
            Network::enter(&namespace);
            let mut objects = Objects::sending(&frame);
            let program = objects.program(program);
            let context = context(&interface, frame.len());
            // Bounded, should it not be stopped.
            for _ in 0..BATCHES_MAX {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                send(program, &frame, &context, BATCH);
                count.fetch_add(u64::from(BATCH), Ordering::Relaxed);
            }
        });
        Self {
            stop,
            sent,
            sender: Some(sender),
        }
    }

    /// How many frames were sent so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Stops, and returns how many frames were sent.
    #[must_use]
    pub fn stop(mut self) -> u64 {
        self.end();
        self.sent()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(sender) = self.sender.take() {
            sender.join().unwrap();
        }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.end();
    }
}

/// Sends that many frames from this thread's namespace, on this thread's CPU, and returns when the
/// receiver has had them.
pub fn send(program: &Xdp, frame: &[u8], context: &[u8], frames: u32) {
    let options = TestRunOptions {
        data_in: Some(frame),
        ctx_in: Some(context),
        repeat: frames,
        attrs: TestRunAttrs::new().xdp_live_frames(LIVE_BATCH),
        ..TestRunOptions::new()
    };
    program.test_run(options).unwrap();
}

/// `struct xdp_md`, include/uapi/linux/bpf.h: a frame of that length, in by that interface of this
/// thread's namespace.
#[must_use]
pub fn context(interface: &str, length: usize) -> Vec<u8> {
    let index = if_nametoindex(interface).unwrap();
    let words = [0, u32::try_from(length).unwrap(), 0, index, 0, 0];
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Attaches a program to an interface of its own in the origin, where no frame comes by.
///
/// The kernel calls programs that are attached somewhere directly, and others through a retpoline;
/// and a test run of the latter changes the kernel's text before and after. So programs whose times
/// are to be compared must all be attached.
pub fn park(network: &Network, name: &str, program: &mut Xdp) {
    let namespace = network.namespace(Host::Origin);
    ip(&["-n", &namespace, "link", "add", name, "type", "veth"]);
    network.on(Host::Origin, || {
        program.attach(name, XdpMode::Driver).unwrap()
    });
}

/// Keeps this thread on one CPU.
pub fn pin_to_cpu(cpu: usize) {
    let mut cpus = CpuSet::new();
    cpus.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(0), &cpus).unwrap();
}

/// The programs that do nothing, and the one that sends.
pub struct Objects {
    ebpf: Ebpf,
}

impl Objects {
    /// Bytes of a frame that `forge` sends.
    pub const FORGED: usize = 14 + 20 + 24;

    /// Loads all of them.
    #[must_use]
    pub fn load() -> Self {
        Self::sending(&[])
    }

    /// The same, where `forge` sends this frame.
    fn sending(frame: &[u8]) -> Self {
        let mut forged = [0; Self::FORGED];
        for (byte, wanted) in forged.iter_mut().zip(frame) {
            *byte = *wanted;
        }
        let object = Path::new(env!("CARGO_MANIFEST_DIR")).join(FLOOR);
        let object = fs::read(object).unwrap();
        let mut loader = EbpfLoader::new();
        loader.override_global("FORGED", forged.as_slice(), true);
        let mut ebpf = loader.load(&object).unwrap();
        for (_, program) in ebpf.programs_mut() {
            let program: &mut Xdp = program.try_into().unwrap();
            uninterrupted(|| program.load()).unwrap();
        }
        Self { ebpf }
    }

    /// One of them: `bare_drop`, `bare_pass`, `transmit` or `forge`.
    #[must_use]
    pub fn program(&mut self, name: &str) -> &mut Xdp {
        self.ebpf.program_mut(name).unwrap().try_into().unwrap()
    }
}

/// Where `cargo xtask` puts `filter-ebpf`'s second object.
const FLOOR: &str = "../target/bpf/bpfel-unknown-none/release/floor";
/// Frames of one test run. Each begins and ends with a change of the kernel's text that takes
/// milliseconds (`bpf_prog_change_xdp`, kernel/bpf/dispatcher.c).
const BATCH: u32 = 1 << 19;
/// Frames that the kernel sends at once.
const LIVE_BATCH: u32 = 64;
/// Ten minutes and more.
const BATCHES_MAX: u32 = 1 << 14;
