//! Verifies what the service manager and the monitoring receive, against stand-ins that speak
//! their protocols: sd_notify(3) and HTTP.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};
use tests::daemon::{self, Pullgate};
use tests::gate::{blog, shop};
use tests::net::Host;
use tests::{Lab, Plan, Rig};

#[test]
fn the_service_manager_is_told_of_reloads_and_of_the_end() {
    let rig = Rig::with_shop("");
    let patient = fs::read_to_string(&rig.config).unwrap();
    let patient = patient.replace("drain_timeout = \"5s\"", "drain_timeout = \"10m\"");
    fs::write(&rig.config, &patient).unwrap();
    assert!(rig.reload());
    rig.gate().tells("RELOADING=1\nMONOTONIC_USEC=", 1);
    rig.gate().tells("READY=1", 1);

    // One that is refused is over as well.
    fs::write(&rig.config, "[gate").unwrap();
    assert!(!rig.reload());
    rig.gate().tells("RELOADING=1", 2);
    rig.gate().tells("READY=1", 2);

    rig.gate().signal(nix::sys::signal::Signal::SIGTERM);
    // As configured now: a manager that waited less would kill.
    let within = Duration::from_secs(600 + 15).as_micros();
    rig.gate()
        .tells(&format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={within}"), 1);

    // A role without connections needs none of it.
    fs::write(&rig.config, patient).unwrap();
    let ranges = Pullgate::start(&rig.network, &rig.config, "ranges");
    ranges.signal(nix::sys::signal::Signal::SIGTERM);
    ranges.tells("STOPPING=1\nEXTEND_TIMEOUT_USEC=15000000", 1);
}

#[test]
fn who_asks_for_a_reload_is_told_what_became_of_it() {
    let rig = Rig::with_shop("");
    let reload = || rig.pullgate(&["reload", "--only", "gate"]);
    rig.configure("", &[&shop("")]);

    assert_eq!(reload().status.code(), Some(0));
    assert_eq!(rig.gate().status()["reload"]["count"], 1);

    rig.configure("", &[&shop("upstream = \"127.0.0.1:8090\"")]);
    let refused = reload();
    let error = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(78), "{error}");
    assert!(error.contains("runs the gate: TCP port 8090"), "{error}");
}

#[test]
fn the_watchdog_is_fed_for_as_long_as_every_part_goes_on() {
    let rig = with_metrics();
    let interval = Duration::from_millis(200);
    let gate = Pullgate::start_watched(&rig.network, &rig.config, "gate", interval);

    gate.tells("WATCHDOG=1", 3);

    // One of the gate's threads is held up; the process is not, and says so.
    let threads = fs::read_dir(format!("/proc/{}/task", gate.pid())).unwrap();
    let is_worker = |path: &std::path::PathBuf| {
        fs::read_to_string(path.join("comm")).unwrap().trim() == "gate-0"
    };
    let mut threads = threads.map(|thread| thread.unwrap().path());
    let worker = threads.find(is_worker).unwrap();
    let number = worker.file_name().unwrap().to_string_lossy().parse();
    let worker = Pid::from_raw(number.unwrap());
    let held = Held::up(worker);
    let mark = gate.mark();
    gate.event(mark, "it is seen", |event| {
        let text = event["message"].to_string();
        event["id"] == "gate-thread-hangs" && text.contains("thread 0 does nothing")
    });
    gate.event(mark, "the watchdog goes hungry", |event| {
        event["id"] == "watchdog-not-fed"
    });
    let ask = || {
        let stream = rig.network.on(Host::Origin, || {
            TcpStream::connect("127.0.0.1:9145").unwrap()
        });
        ask(stream, "/healthz")
    };
    assert!(ask().starts_with("HTTP/1.1 503"));

    drop(held);
    tests::eventually("it goes on", || {
        ask().starts_with("HTTP/1.1 200").then_some(())
    });
}

#[test]
fn monitoring_is_told_what_the_status_tells() {
    let mut lab = Lab::start(&Plan::default());
    let sockets = lab.network.path("run/metrics.sock");
    let metrics = format!(
        "\n[metrics]\nfilter = \"127.0.0.1:9143\"\nranges = \"unix:{}\"\ngate = \"[::1]:9145\"\n",
        sockets.display()
    );
    lab.restart_with(&metrics);

    let tcp = |address: &str, path: &str| {
        let stream = lab
            .network
            .on(Host::Origin, || TcpStream::connect(address).unwrap());
        ask(stream, path)
    };
    let ranges = |path: &str| ask(UnixStream::connect(&sockets).unwrap(), path);
    for (answer, metric) in [
        (
            tcp("127.0.0.1:9143", "/metrics"),
            "pullgate_filter_attached",
        ),
        (
            tcp("[::1]:9145", "/metrics"),
            "pullgate_gate_active_connections",
        ),
        (ranges("/metrics"), "pullgate_ranges_age_seconds"),
    ] {
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(
            answer.contains("openmetrics-text; version=1.0.0"),
            "{answer}"
        );
        assert!(answer.contains(metric), "{answer}");
        assert!(answer.ends_with("# EOF\n"), "{answer}");
    }
    for path in ["/healthz", "/readyz"] {
        assert!(
            tcp("127.0.0.1:9143", path).starts_with("HTTP/1.1 200"),
            "{path}"
        );
        assert!(
            tcp("[::1]:9145", path).starts_with("HTTP/1.1 200"),
            "{path}"
        );
        assert!(ranges(path).starts_with("HTTP/1.1 200"), "{path}");
    }
    assert!(ranges("/").starts_with("HTTP/1.1 404"));

    // Ready is a role that protects, and no other.
    let text = fs::read_to_string(&lab.config).unwrap();
    let text = text.replace("[filter]", "[filter]\nmode = \"monitor\"");
    fs::write(&lab.config, text).unwrap();
    let event = lab.reload();
    assert_eq!(event["id"], "filter-reloaded", "{event}");
    let answer = tcp("127.0.0.1:9143", "/readyz");
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.contains("monitor mode"), "{answer}");
    assert!(tcp("127.0.0.1:9143", "/healthz").starts_with("HTTP/1.1 200"));
}

#[test]
fn metrics_that_cannot_be_told_keep_no_role_from_starting() {
    let rig = with_metrics();
    let listen = || TcpListener::bind("127.0.0.1:9145").unwrap();
    let _taken = rig.network.on(Host::Origin, listen);

    let gate = Pullgate::start(&rig.network, &rig.config, "gate");

    let warnings = gate.status()["findings"].to_string();
    assert!(
        warnings.contains("metrics-disabled") && warnings.contains("`metrics.gate`"),
        "{warnings}"
    );
    drop(gate);

    // Nor is anything replaced that is no socket.
    let precious = rig.network.path("run/precious");
    fs::write(&precious, "precious").unwrap();
    let text = fs::read_to_string(&rig.config).unwrap();
    let socket = format!("\"unix:{}\"", precious.display());
    fs::write(&rig.config, text.replace("\"127.0.0.1:9145\"", &socket)).unwrap();
    let gate = Pullgate::start(&rig.network, &rig.config, "gate");
    let warnings = gate.status()["findings"].to_string();
    assert!(warnings.contains("not ours to replace"), "{warnings}");
    drop(gate);
    assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
}

#[test]
fn who_asks_for_metrics_is_bounded() {
    let rig = with_metrics();
    let _gate = Pullgate::start(&rig.network, &rig.config, "gate");
    let connect = || {
        let connecting = || TcpStream::connect("127.0.0.1:9145").unwrap();
        rig.network.on(Host::Origin, connecting)
    };

    // A head without an end.
    let mut endless = connect();
    let line = format!("x: {}\r\n", "y".repeat(1000));
    let _cut_short = (0..100).try_for_each(|_| endless.write_all(line.as_bytes()));
    let mut answer = String::new();
    let _reset = endless.read_to_string(&mut answer);
    assert!(!answer.contains("200 OK"), "{answer}");

    // A client that sends nothing holds up no other for long.
    let mut silent: Vec<_> = (0..40).map(|_| connect()).collect();
    assert!(ask(connect(), "/healthz").starts_with("HTTP/1.1 200"));
    // The first have made room for later ones, before their time was over.
    let mut is_open = |number: usize| {
        let socket: &mut TcpStream = &mut silent[number];
        socket.set_nonblocking(true).unwrap();
        let read = socket.read(&mut [0]);
        read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    };
    assert!(!is_open(0));
    assert!(is_open(30));
}

/// A gate that is to be started, and asked for its metrics.
fn with_metrics() -> Rig {
    let rig = Rig::new();
    rig.configure("", &[&shop(""), &blog("")]);
    rig.append("\n[metrics]\ngate = \"127.0.0.1:9145\"\n");
    rig
}

/// A thread that is held up until this is dropped.
struct Held(Pid);

impl Held {
    fn up(thread: Pid) -> Self {
        ptrace::attach(thread).unwrap();
        waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
        Self(thread)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Else its process could not be waited for, if the test fails.
        match ptrace::detach(self.0, None) {
            Ok(_) | Err(_) => {}
        }
    }
}

fn ask(mut stream: impl std::io::Read + std::io::Write, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_kernel_without_ipv6_is_served_over_ipv4_and_status_says_so() {
    let rig = Rig::new();
    rig.configure("", &[&shop("")]);
    let gate = on_a_kernel_without_ipv6(|| Pullgate::start(&rig.network, &rig.config, "gate"));

    let status = gate.status();
    let warnings = status["findings"].to_string();
    assert!(
        warnings.contains("`gate.listen`: [::]:443 is not served, because this kernel has no IPv6"),
        "{warnings}"
    );
    let listen = serde_json::json!(["listen", "0.0.0.0:443"]);
    assert!(status["details"].as_array().unwrap().contains(&listen));
    assert_eq!(gate.stop(), Some(0));

    rig.configure("listen = [\"[::]:443\"]", &[&shop("")]);
    let words = ["run", "--only", "gate"];
    let refused = on_a_kernel_without_ipv6(|| daemon::output(&rig.network, &rig.config, &words));
    assert_eq!(refused.status.code(), Some(78));
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(
        error.contains("this kernel has no IPv6") && error.contains("`gate.listen`"),
        "{error}"
    );
}

/// Starts processes as if the kernel had been booted with `ipv6.disable=1`.
fn on_a_kernel_without_ipv6<T: Send>(start: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            refuse_ipv6();
            start()
        });
        inside.join().unwrap()
    })
}

/// For this thread and the processes that it starts.
fn refuse_ipv6() {
    let is_ipv6 = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        u64::try_from(nix::libc::AF_INET6).unwrap(),
    );
    let rule = SeccompRule::new(vec![is_ipv6.unwrap()]).unwrap();
    let rules = [(nix::libc::SYS_socket, vec![rule])].into();
    let unsupported = u32::try_from(nix::libc::EAFNOSUPPORT).unwrap();
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(unsupported),
        TargetArch::x86_64,
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    apply_filter(&program).unwrap();
}
