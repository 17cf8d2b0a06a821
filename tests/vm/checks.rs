//! What is looked at on each kernel, in the order in which a host is set up.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tests::daemon;
use tests::manual::Manual;
use tests::net::{Host, Network};
use tests::pki::Pki;

use crate::gate;
use crate::machine::{self, CARDS, Card, E1000E, Machine, VIRTIO, VIRTIO_FIXED, VMXNET3, put};
use crate::tunnels;
use crate::visitors::{Flood, knock};

/// One check on one kernel.
pub(crate) struct Row {
    /// What was looked at.
    pub(crate) check: &'static str,
    /// What was measured, if anything was.
    pub(crate) note: String,
    /// Why it is not as it should be.
    pub(crate) failure: Option<anyhow::Error>,
}

/// What to look at.
#[derive(Clone, Copy)]
pub(crate) struct Scope<'a> {
    /// Only what CI does.
    pub(crate) short: bool,
    /// What takes long, too.
    pub(crate) long: bool,
    /// Only checks whose name contains this, besides what they need.
    pub(crate) only: &'a str,
}

type Check = fn(&mut Machine<'_>, &Pki) -> anyhow::Result<String>;

/// What CI does on each kernel, and then the rest.
const SHORT: [(&str, Check); 7] = [
    ("native on virtio: stranger silent, edge answered", native),
    (
        "auto, remembered: not one answer at a boot",
        boot_remembered,
    ),
    ("every variant, and the verdict table", verdicts),
    ("generic XDP", generic),
    ("SYN cookies: an edge is answered by the filter", cookies),
    ("doctor: whether the clock is kept", clock),
    ("steering to the gate, nginx where it stands", gate::steer),
];
const REST: [(&str, Check); 22] = [
    ("tunnels: a stranger inside is silent", tunnelled),
    ("named: not one answer at a boot", boot_named),
    ("a driver that loads 20 s late: not one answer", boot_late),
    ("auto, nothing remembered: gap at a boot", boot_first),
    ("a new uplink: gap until it is filtered", new_uplink),
    ("tcx behind another program", tcx),
    (
        "virtio whose offloads are fixed: remedy, generic",
        virtio_fixed,
    ),
    ("e1000e: generic", e1000e),
    ("vmxnet3: native where the driver has it, MTU", vmxnet3),
    ("VLAN: covered by its parent", vlan),
    ("VLAN on a card with and without its offload", vlan_offload),
    ("VLAN, then a default route by its parent", vlan_and_parent),
    ("macvlan: covered by its parent", macvlan),
    ("bond", bond),
    ("bond that is made at boot", bond_at_boot),
    ("bridge over a port", bridge),
    ("PPP uplink: NOT PROTECTED", ppp),
    ("4,000 ranges in allow; locked memory", memory),
    ("explain, reload, restart, kill -9", lifecycle),
    ("trial: back by itself, and confirmed", trial),
    (
        "gate by socket activation, nginx behind it",
        gate::activated,
    ),
    (
        "gate: 20,000 handshakes in flight, an edge served",
        gate::crowd,
    ),
];

/// What takes an emulated processor a quarter of an hour.
const LONG: [(&str, Check); 1] = [("gate: 100,000 idle connections, an edge served", gate::idle)];

/// What the others' package goes with.
const LAST: [(&str, Check); 2] = [("upgrade", upgrade), ("unload, remove, purge", purge)];

/// Boots a kernel and looks at everything; a check that fails does not keep the next from being made,
/// unless there is no machine.
pub(crate) fn run(directory: &Path, scope: Scope<'_>) -> Vec<Row> {
    let network = Network::without_origin();
    let pki = Pki::new(&network.path("pki"));
    let mut rows = Rows::default();
    let boots = || boot(&network, &pki, directory, scope);
    let Some(mut machine) = rows.make("boots, systemd is content", boots) else {
        return rows.0;
    };
    rows.check(
        &mut machine,
        &pki,
        ("apt install, check, enable, monitor, enforce", install),
    );
    let rest = REST.iter().filter(|_| !scope.short);
    let long = LONG.iter().filter(|_| scope.long);
    let last = LAST.iter().filter(|_| !scope.short);
    for check in SHORT.iter().chain(rest).chain(long).chain(last) {
        if check.0.contains(scope.only) {
            rows.check(&mut machine, &pki, *check);
        }
    }
    rows.0
}

#[derive(Default)]
struct Rows(Vec<Row>);

impl Rows {
    fn make<T>(
        &mut self,
        check: &'static str,
        make: impl FnOnce() -> anyhow::Result<(T, String)>,
    ) -> Option<T> {
        let begun = Instant::now();
        let (made, note, failure) = match make() {
            Ok((made, note)) => (Some(made), note, None),
            Err(error) => (None, String::new(), Some(error)),
        };
        let seconds = begun.elapsed().as_secs();
        match &failure {
            None => println!("  ok     {seconds:>4} s  {check}  {note}"),
            Some(error) => println!("  FAILED {seconds:>4} s  {check}: {error:#}"),
        }
        self.0.push(Row {
            check,
            note,
            failure,
        });
        made
    }

    fn check(&mut self, machine: &mut Machine<'_>, pki: &Pki, check: (&'static str, Check)) {
        let (name, look) = check;
        let made = self.make(name, || Ok(((), look(machine, pki)?)));
        if made.is_none() {
            println!("{}", machine.last_words());
            // What is half done must not fail the others.
            if let Err(error) = recover(machine) {
                println!("  not recovered: {error:#}");
            }
        }
    }
}

fn boot<'a>(
    network: &'a Network,
    pki: &Pki,
    directory: &Path,
    scope: Scope<'_>,
) -> anyhow::Result<(Machine<'a>, String)> {
    let seed = machine::seed(&network.path(""))?;
    let target = daemon::binary();
    let target = target.ancestors().nth(2).context("target")?;
    let package =
        |number| fs::read(target.join(format!("dist/test/pullgate_0.0.{number}_amd64.deb")));
    put(&seed, Manual::read().package, package(1)?)?;
    put(&seed, UPGRADE, package(2)?)?;
    for name in ["shop.example.pem", "shop.example.key", "ours-ca.pem"] {
        put(&seed, &format!("root/{name}"), fs::read(pki.path(name))?)?;
    }
    put(&seed, "etc/nginx/conf.d/web.conf", NGINX)?;
    put_verdict_test(&seed, target)?;
    let memory = if scope.long { "3G" } else { "1536M" };
    let machine = Machine::boot(network, directory, &seed, memory)?;
    machine.settle()?;
    let release = machine.run("uname -r")?.trim().to_owned();
    Ok((machine, release))
}

/// Adds the built test, and the object that it loads.
fn put_verdict_test(seed: &Path, target: &Path) -> anyhow::Result<()> {
    let built = fs::read_dir(target.join("debug/deps"))?
        .flatten()
        .filter(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            name.starts_with("verdict-") && !name.contains('.')
        });
    let newest = built.max_by_key(|entry| entry.metadata().and_then(|found| found.modified()).ok());
    let place = seed.join(VERDICT);
    fs::create_dir_all(place.parent().context("a directory")?)?;
    let mut strip = Command::new("strip");
    strip
        .arg("-o")
        .arg(&place)
        .arg(newest.context("no built test")?.path());
    ensure!(strip.status()?.success(), "strip");
    let object = target.join("bpf/bpfel-unknown-none/release/filter");
    put(seed, OBJECT, fs::read(object)?)
}

fn install(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    let manual = Manual::read();
    for command in [manual.install, manual.check, manual.start_filter] {
        machine.run(command)?;
    }
    let (_, monitored) = machine.try_run(manual.status)?;
    ensure!(monitored.starts_with("NOT PROTECTED"), "{monitored}");
    ensure!(
        knock(machine.network(), VIRTIO.mac(), None)?.stranger,
        "monitor mode"
    );
    for command in [manual.enforce, manual.reload, manual.status] {
        machine.run(command)?;
    }
    let version = machine.run("cat /etc/debian_version")?;
    Ok(format!("Debian {}", version.trim()))
}

fn native(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    is_filtered(machine, VIRTIO, "native")?;
    Ok(String::new())
}

fn generic(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    start(machine, "interfaces = [\"wan0\"]\nattach = \"generic\"")?;
    is_filtered(machine, VIRTIO, "generic")?;
    Ok(String::new())
}

/// As if the queue of each listener were full.
fn cookies(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    start(machine, "interfaces = [\"wan0\"]\nsyn_cookies = \"auto\"")?;
    machine.run("sysctl -w net.ipv4.tcp_syncookies=2")?;
    // The filter asks what listens there for its demands, and it listens on.
    let listen = "systemd-socket-activate --accept --listen=443 /bin/true";
    machine.run(&format!("systemd-run --quiet --unit=listener {listen}"))?;
    machine.eventually("a program listens", "ss -Hltn | grep ':443 '")?;
    is_filtered(machine, VIRTIO, "native")?;
    let status = machine.status()?.to_string();
    ensure!(status.contains("\"verdict\":\"answer\""), "{status}");
    ensure!(!status.contains("syn-cookies-missing"), "{status}");
    machine.run("systemctl stop listener && sysctl -w net.ipv4.tcp_syncookies=1")?;
    Ok(String::new())
}

/// In a machine of its own, whose clock is no one else's.
fn clock(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    // adjtimex(2): the error since the last look, and whether a program looks (STA_PLL, STA_UNSYNC).
    for (status, is_kept) in [(0x40, false), (0x1, true)] {
        let set = format!(
            "perl -e '$b = pack(\"Lx4qqqql\", 0x1c, 0, 0, 0, 0, {status}) . \"\\0\" x 160; exit(syscall(159, $b) < 0)'"
        );
        machine.run(&set)?;
        let (_, report) = machine.try_run("pullgate doctor")?;
        ensure!(
            report.contains("no program keeps this host's clock") != is_kept,
            "{report}"
        );
    }
    Ok(String::new())
}

/// The test that asks the loaded program every row of the table, in namespaces of its own.
fn verdicts(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    let test = format!("PULLGATE_XDP_OBJECT=/{OBJECT} /{VERDICT} --test-threads=1 2>&1");
    let (status, text) = machine.try_run(&test)?;
    ensure!(status == 0, "{text}");
    let passed = text.lines().filter(|line| line.ends_with("... ok")).count();
    Ok(format!("{passed} tests"))
}

fn tunnelled(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    tunnels::check(machine)
}

fn boot_remembered(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    machine.run("grep -q wan0 /var/lib/pullgate-filter/uplinks.json")?;
    reboot_unanswered(machine, VIRTIO)
}

fn boot_named(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    start(machine, "interfaces = [\"wan0\"]")?;
    reboot_unanswered(machine, VIRTIO)
}

fn boot_late(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    machine.write("/etc/modprobe.d/late.conf", "blacklist e1000e\n")?;
    machine.write("/etc/systemd/system/late.service", LATE)?;
    machine.run("systemctl --quiet enable late.service")?;
    uplink_by(machine, E1000E)?;
    start(machine, "interfaces = [\"wan2\"]")?;
    let outcome = reboot_unanswered(machine, E1000E).and_then(|note| {
        let log = "journalctl --boot --unit pullgate-filter | grep 'ready without interfaces'";
        machine.run(log).context("it was not late")?;
        Ok(note)
    });
    machine.run("systemctl --quiet disable late.service && rm /etc/modprobe.d/late.conf")?;
    machine.run("modprobe e1000e")?;
    uplink_by(machine, VIRTIO)?;
    outcome
}

fn boot_first(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    start(machine, "interfaces = \"auto\"")?;
    machine.run("rm /var/lib/pullgate-filter/uplinks.json")?;
    let network = machine.network();
    let answers = Flood::during(network, VIRTIO.mac(), || machine.reboot())?;
    is_filtered(machine, VIRTIO, "native")?;
    // Else no other boot would prove anything.
    ensure!(answers.stranger > 0, "nothing was there to be remembered");
    let gap = answers.gap().as_millis();
    Ok(format!("{gap} ms, {} answers", answers.stranger))
}

fn new_uplink(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    machine.run(
        "systemctl stop pullgate-filter && pullgate unload && ip route del default && ip -6 route del default",
    )?;
    // Host routes lead back to them, so that they are answered from the first packet on.
    let hosts = [Host::Stranger, Host::Edge].map(Host::addresses).concat();
    for address in &hosts {
        machine.run(&format!("ip route add {address} dev wan0"))?;
    }
    write_configuration(machine, "interfaces = \"auto\"", "")?;
    machine.run("systemctl start pullgate-filter")?;
    let network = machine.network();
    ensure!(
        knock(network, VIRTIO.mac(), None)?.stranger,
        "no uplink, so not filtered"
    );
    // The guest's own clock: what it takes to start a command there is not the filter's doing.
    let mut took = String::new();
    let answers = Flood::during(network, VIRTIO.mac(), || {
        let log = "journalctl --boot --output=short-unix --unit pullgate-filter";
        let script = format!(
            "ip route add default dev wan0; added=$(date +%s%N); \
             until {log} | grep -q 'has come, and is filtered'; do :; done; \
             {log} | grep 'program attached' | tail -1 | \
             awk -v added=$added '{{ printf \"%d\", ($1 * 1e9 - added) / 1e6 }}'"
        );
        took = machine.run(&script)?;
        Ok(())
    })?;
    is_filtered(machine, VIRTIO, "native")?;
    for address in &hosts {
        machine.run(&format!("ip route del {address} dev wan0"))?;
    }
    recover(machine)?;
    let took: i64 = took.trim().parse().context("milliseconds")?;
    ensure!(answers.stranger > 0, "nothing was measured");
    Ok(format!("{} ms", took.max(0)))
}

fn tcx(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    // Another filter, whose pins are elsewhere, is a foreign program to this one.
    start(machine, "interfaces = [\"wan0\"]\ncoexist = \"tcx\"")?;
    machine.run("systemctl stop pullgate-filter && pullgate unload")?;
    let other = "[paths]\nstate = \"/run/other\"\nrun = \"/run/other\"\nbpf = \"/sys/fs/bpf/other\"\n\
                 [filter]\ninterfaces = [\"wan0\"]\nmode = \"monitor\"\n";
    machine.write("/root/other.toml", other)?;
    machine.run(
        "mkdir -p /run/other && systemd-run --quiet --unit=other --property=Type=notify \
                 pullgate --config /root/other.toml run --only filter --yes",
    )?;
    let (status, text) = machine.try_run("systemctl start pullgate-filter")?;
    let has_tcx = kernel(machine)? >= (6, 6);
    let outcome = if has_tcx {
        ensure!(status == 0, "{text}");
        is_filtered(machine, VIRTIO, "tcx").map(|()| String::new())
    } else {
        // What it advises must be possible here.
        let log = machine.run("journalctl --boot --no-pager --unit pullgate-filter --lines=30")?;
        let names_kernel = log.contains("needs Linux 6.6, and this is");
        let advises = log.contains("or set `filter.coexist");
        ensure!(status != 0 && names_kernel && !advises, "{log}");
        Ok("refused".to_owned())
    };
    machine.run("systemctl stop other pullgate-filter; pullgate --config /root/other.toml unload; pullgate unload")?;
    outcome
}

fn virtio_fixed(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    uplink_by(machine, VIRTIO_FIXED)?;
    configure(machine, "interfaces = [\"wan1\"]\nattach = \"native\"")?;
    let (status, _) = machine.try_run("systemctl restart pullgate-filter")?;
    let log = machine.run("journalctl --boot --no-pager --unit pullgate-filter --lines=30")?;
    ensure!(
        status != 0 && log.contains("only the hypervisor can change that"),
        "{log}"
    );
    start(machine, "interfaces = [\"wan1\"]")?;
    is_filtered(machine, VIRTIO_FIXED, "generic")?;
    uplink_by(machine, VIRTIO)?;
    Ok(String::new())
}

fn e1000e(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    uplink_by(machine, E1000E)?;
    start(machine, "interfaces = \"auto\"")?;
    is_filtered(machine, E1000E, "generic")?;
    uplink_by(machine, VIRTIO)?;
    Ok(String::new())
}

fn vmxnet3(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    uplink_by(machine, VMXNET3)?;
    machine.run("ip link set wan3 mtu 9000")?;
    start(machine, "interfaces = [\"wan3\"]")?;
    is_filtered(machine, VMXNET3, "generic")?;
    let has_native = kernel(machine)? >= (6, 6);
    let log = machine.run("journalctl --boot --no-pager --unit pullgate-filter --lines=30")?;
    let advice = "ip link set dev wan3 mtu 3400";
    ensure!(log.contains(advice) == has_native, "{log}");
    machine.run("systemctl stop pullgate-filter && pullgate unload")?;
    machine.run("ip link set wan3 mtu 3400")?;
    start(machine, "interfaces = [\"wan3\"]")?;
    let mode = if has_native { "native" } else { "generic" };
    is_filtered(machine, VMXNET3, mode)?;
    machine.run("ip link set wan3 mtu 1500")?;
    uplink_by(machine, VIRTIO)?;
    Ok(mode.to_owned())
}

fn vlan(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    stacked(machine, VIRTIO, VLAN)?;
    start(machine, "interfaces = \"auto\"")?;
    is_covered(machine, "up0", VIRTIO.name)?;
    vlan_is_silent(machine, VIRTIO)?;
    recover(machine)?;
    Ok(String::new())
}

/// A card that takes the tags off keeps them from the program, which sees the packets all the same.
fn vlan_offload(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    stacked(machine, E1000E, VLAN)?;
    start(machine, "interfaces = \"auto\"")?;
    is_covered(machine, "up0", E1000E.name)?;
    for offload in ["off", "on"] {
        machine.run(&format!("ethtool --offload wan2 rxvlan {offload}"))?;
        // The card starts again, and has lost its neighbours.
        has_uplink(machine, "up0")?;
        vlan_is_silent(machine, E1000E)?;
    }
    recover(machine)?;
    Ok(String::new())
}

fn vlan_is_silent(machine: &Machine<'_>, card: Card) -> anyhow::Result<()> {
    // The hosts' kernel has no VLAN devices, so that it answers no question for their addresses.
    for host in [Host::Stranger, Host::Edge] {
        for address in host.addresses() {
            let mac = machine::colons(host.mac());
            machine.run(&format!(
                "ip neighbour replace {address} lladdr {mac} dev up0"
            ))?;
        }
    }
    let answered = knock(machine.network(), card.mac(), Some(10))?;
    ensure!(!answered.stranger, "a stranger in the VLAN is answered");
    Ok(())
}

/// What was the wrong all-clear: the VLAN is filtered, and then its parent is an uplink as well.
fn vlan_and_parent(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    stacked(machine, VIRTIO, VLAN)?;
    start(machine, "interfaces = [\"up0\"]")?;
    ensure!(
        mode(&machine.status()?, "up0") == "generic",
        "named, so attached to itself"
    );
    let log = machine.run("journalctl --boot --no-pager --unit pullgate-filter --lines=30")?;
    ensure!(
        log.contains("it is stacked on `wan0`: name that instead"),
        "{log}"
    );
    machine.run("ip route add default dev wan0 metric 50")?;
    machine.eventually(
        "NOT PROTECTED",
        "pullgate status | grep '`wan0` is not filtered'; [ $? = 0 ]",
    )?;
    let (code, _) = machine.try_run("pullgate status")?;
    ensure!(code == 1, "exit code {code}");
    // Named as well, it takes over, in whatever order.
    configure(machine, "interfaces = [\"up0\", \"wan0\"]")?;
    machine.run("systemctl reload pullgate-filter")?;
    is_covered(machine, "up0", "wan0")?;
    machine.run("ip route del default dev wan0 metric 50")?;
    start(machine, "interfaces = \"auto\"")?;
    is_covered(machine, "up0", "wan0")?;
    recover(machine)?;
    Ok(String::new())
}

fn macvlan(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    stacked(
        machine,
        VIRTIO,
        "ip link add link wan0 name up0 address 02:00:00:00:00:21 type macvlan mode bridge",
    )?;
    start(machine, "interfaces = \"auto\"")?;
    is_covered(machine, "up0", "wan0")?;
    let answered = knock(machine.network(), [2, 0, 0, 0, 0, 0x21], None)?;
    ensure!(!answered.stranger, "a stranger at the macvlan is answered");
    recover(machine)?;
    Ok(String::new())
}

fn bond(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    stacked(
        machine,
        VIRTIO,
        "ip link add up0 address 02:00:00:00:00:01 type bond mode active-backup && \
         ip link set wan0 down && ip link set wan0 master up0",
    )?;
    start(machine, "interfaces = \"auto\"")?;
    let expected = if kernel(machine)? >= (5, 15) {
        "native"
    } else {
        "generic"
    };
    is_mode(machine, "up0", expected)?;
    ensure!(
        !knock(machine.network(), VIRTIO.mac(), None)?.stranger,
        "answered"
    );
    // A port stands for its bond.
    start(machine, "interfaces = [\"wan0\"]")?;
    is_covered(machine, "wan0", "up0")?;
    recover(machine)?;
    Ok(expected.to_owned())
}

/// A bond that systemd-networkd makes at boot, when the filter runs already: its port must get in, and
/// the filter onto it.
fn bond_at_boot(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    for (path, text) in [
        (
            "/etc/systemd/network/15-up0.netdev",
            "[NetDev]\nName=up0\nKind=bond\nMACAddress=02:00:00:00:00:01\n[Bond]\nMode=active-backup\n".to_owned(),
        ),
        (
            "/etc/systemd/network/16-port.network",
            "[Match]\nName=wan0\n[Network]\nBond=up0\n".to_owned(),
        ),
        ("/etc/systemd/network/20-uplink.network", machine::uplink("up0")),
    ] {
        machine.write(path, &text)?;
    }
    // Its port is named, it is named, and neither is.
    let mut modes = Vec::new();
    for interfaces in ["[\"wan0\"]", "[\"up0\"]", "\"auto\""] {
        configure(machine, &format!("interfaces = {interfaces}"))?;
        let network = machine.network();
        machine.reboot()?;
        has_uplink(machine, "up0")?;
        machine.eventually("PROTECTED", "pullgate status")?;
        ensure!(!knock(network, VIRTIO.mac(), None)?.stranger, "answered");
        modes.push(mode(&machine.status()?, "up0"));
    }
    machine.run("rm /etc/systemd/network/15-up0.netdev /etc/systemd/network/16-port.network")?;
    recover(machine)?;
    Ok(modes.join(" "))
}

fn is_mode(machine: &Machine<'_>, interface: &str, expected: &str) -> anyhow::Result<()> {
    let status = machine.status()?;
    let found = mode(&status, interface);
    ensure!(
        found == expected,
        "{interface}: {found}: {}",
        status["findings"]
    );
    Ok(())
}

fn bridge(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    stacked(
        machine,
        VIRTIO,
        "ip link add up0 address 02:00:00:00:00:01 type bridge && ip link set wan0 master up0",
    )?;
    start(machine, "interfaces = \"auto\"")?;
    ensure!(
        mode(&machine.status()?, "up0") == "generic",
        "on the bridge itself"
    );
    ensure!(
        !knock(machine.network(), VIRTIO.mac(), None)?.stranger,
        "answered"
    );
    start(machine, "interfaces = [\"wan0\"]")?;
    is_covered(machine, "up0", "wan0")?;
    ensure!(
        !knock(machine.network(), VIRTIO.mac(), None)?.stranger,
        "answered"
    );
    recover(machine)?;
    Ok(String::new())
}

fn ppp(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    start(machine, "interfaces = [\"wan0\"]")?;
    ensure!(machine.status()?["protected"] == true, "before");
    // Two ends on one host: what counts is the interface.
    machine.run(
        "systemd-run --quiet --unit=ppp --property=Type=exec pppd nodetach noauth local noipdefault \
         192.0.2.1:192.0.2.2 pty 'pppd nodetach notty noauth local 192.0.2.2:192.0.2.1'",
    )?;
    machine.eventually("ppp0", "ip -brief address show ppp0 | grep 192.0.2")?;
    machine.run("ip route add default dev ppp0 metric 10")?;
    let text = machine.eventually(
        "NOT PROTECTED",
        "pullgate status | grep '`ppp0` is not filtered'",
    )?;
    let (code, _) = machine.try_run("pullgate status")?;
    ensure!(code == 1, "exit code {code}: {text}");
    machine.run("systemctl stop ppp")?;
    machine.eventually("PROTECTED", "pullgate status")?;
    Ok(String::new())
}

fn memory(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    let ranges = (0..4000).map(|n| format!("\"10.{}.{}.0/24\"", n / 256 * 16 % 256, n % 256));
    let allow: Vec<_> = ranges.collect();
    start_with(machine, "interfaces = [\"wan0\"]", &allow.join(", "))?;
    is_filtered(machine, VIRTIO, "native")?;
    // Without the unit, and with the limit that a shell has.
    machine.run("systemctl stop pullgate-filter && pullgate unload")?;
    configure(machine, "interfaces = [\"wan0\"]")?;
    machine.run(
        "systemd-run --quiet --unit=shell --property=Type=notify --property=LimitMEMLOCK=65536 \
         pullgate run --only filter --yes && systemctl stop shell && pullgate unload",
    )?;
    // One that may not raise it reports the limit, on kernels where it counts.
    let (status, text) = machine.try_run(
        "prlimit --memlock=65536:65536 setpriv --bounding-set=-sys_resource --inh-caps=-sys_resource \
         timeout --preserve-status 20 pullgate run --only filter --yes 2>&1",
    )?;
    machine.try_run("pullgate unload")?;
    let counts = kernel(machine)? < (5, 11);
    let says = text.contains("against the limit of locked memory, which is 64 KiB");
    ensure!(
        says == counts && (status == 70) == counts,
        "{status}: {text}"
    );
    start(machine, "interfaces = [\"wan0\"]")?;
    Ok(String::new())
}

fn lifecycle(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    let [stranger, _] = Host::Stranger.addresses();
    let explained = machine.run(&format!("pullgate explain {stranger}"))?;
    ensure!(explained.contains("drop (NotListed)"), "{explained}");
    let network = machine.network();
    let answers = Flood::during(network, VIRTIO.mac(), || {
        machine.run("systemctl reload pullgate-filter && systemctl restart pullgate-filter")?;
        machine.run("systemctl kill --signal=KILL pullgate-filter")?;
        machine
            .eventually("it is back", "pullgate status")
            .map(drop)
    })?;
    ensure!(answers.stranger == 0, "{answers:?}");
    Ok(format!("{} SYNs", answers.sent))
}

fn trial(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    machine.run("systemctl stop pullgate-filter && pullgate unload")?;
    let (code, text) = machine.try_run("pullgate run --only filter --confirm 3s --yes 2>&1")?;
    ensure!(code == 75, "{code}: {text}");
    ensure!(
        knock(machine.network(), VIRTIO.mac(), None)?.stranger,
        "nothing is left"
    );
    machine.run(
        "systemd-run --quiet --unit=trial --property=Type=notify pullgate run --only filter --confirm 1h --yes && \
         pullgate confirm && systemctl stop trial",
    )?;
    ensure!(
        !knock(machine.network(), VIRTIO.mac(), None)?.stranger,
        "it stays"
    );
    machine.run("systemctl start pullgate-filter")?;
    Ok(String::new())
}

fn upgrade(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    let network = machine.network();
    let answers = Flood::during(network, VIRTIO.mac(), || {
        machine.run(&format!("dpkg --install /{UPGRADE}"))?;
        machine.eventually("PROTECTED", "pullgate status").map(drop)
    })?;
    ensure!(answers.stranger == 0, "{answers:?}");
    machine.run("dpkg-query --show pullgate | grep -q 0.0.2")?;
    Ok(format!("{} SYNs", answers.sent))
}

fn purge(machine: &mut Machine<'_>, _: &Pki) -> anyhow::Result<String> {
    machine.run(
        "systemctl stop pullgate-filter && pullgate unload && ! ls /sys/fs/bpf | grep pullgate",
    )?;
    ensure!(
        knock(machine.network(), VIRTIO.mac(), None)?.stranger,
        "the way back in"
    );
    machine.run("systemctl start pullgate-filter")?;
    machine.run("apt-get --yes remove pullgate && ! ls /sys/fs/bpf | grep pullgate")?;
    machine.run(
        "apt-get --yes purge pullgate && ! ls -d /var/lib/pullgate* /run/pullgate 2>/dev/null",
    )?;
    ensure!(
        knock(machine.network(), VIRTIO.mac(), None)?.stranger,
        "nothing is left"
    );
    Ok(String::new())
}

/// Reboots while SYNs come all the time; none of the stranger's may be answered.
fn reboot_unanswered(machine: &mut Machine<'_>, card: Card) -> anyhow::Result<String> {
    let network = machine.network();
    let answers = Flood::during(network, card.mac(), || machine.reboot())?;
    ensure!(answers.stranger == 0, "{answers:?}");
    machine.eventually("PROTECTED", "pullgate status")?;
    Ok(format!("{} SYNs", answers.sent))
}

/// Looks at status and at the wire.
fn is_filtered(machine: &Machine<'_>, card: Card, expected: &str) -> anyhow::Result<()> {
    let status = machine.status()?;
    ensure!(status["protected"] == true, "{}", status["findings"]);
    let found = mode(&status, card.name);
    ensure!(
        found == expected,
        "{}: {found}: {}",
        card.name,
        status["findings"]
    );
    let answered = knock(machine.network(), card.mac(), None)?;
    ensure!(!answered.stranger, "a stranger is answered");
    Ok(())
}

fn is_covered(machine: &Machine<'_>, upper: &str, lower: &str) -> anyhow::Result<()> {
    let script = format!(
        "pullgate status --json | grep -A3 '\"name\": \"{upper}\"' | grep -q '\"covered_by\": \"{lower}\"' && pullgate status"
    );
    machine
        .eventually(&format!("{upper} is covered by {lower}"), &script)
        .map(drop)
}

fn mode(status: &Value, interface: &str) -> String {
    let roles = status["roles"].as_array();
    let interfaces = roles
        .into_iter()
        .flatten()
        .flat_map(|role| role["filter"]["interfaces"].as_array())
        .flatten();
    let mut named = interfaces.filter(|it| it["name"] == interface);
    let found = named.next().map(|it| it["mode"].to_string());
    found.unwrap_or_default().trim_matches('"').to_owned()
}

/// Starts the filter from nothing.
pub(crate) fn start(machine: &Machine<'_>, filter: &str) -> anyhow::Result<()> {
    start_with(machine, filter, "")
}

pub(crate) fn start_with(machine: &Machine<'_>, filter: &str, allow: &str) -> anyhow::Result<()> {
    machine.run("systemctl stop pullgate-filter && pullgate unload")?;
    write_configuration(machine, filter, allow)?;
    machine.run("systemctl start pullgate-filter").map(drop)
}

fn configure(machine: &Machine<'_>, filter: &str) -> anyhow::Result<()> {
    write_configuration(machine, filter, "")
}

fn write_configuration(machine: &Machine<'_>, filter: &str, allow: &str) -> anyhow::Result<()> {
    let text = format!("[ranges]\nallow = [{allow}]\n[filter]\n{filter}\n");
    // As it was installed: its owner and its mode stay.
    machine.write("/etc/pullgate/pullgate.toml", &text)
}

/// The state that every check begins with: the virtio card is the uplink, and is filtered.
fn recover(machine: &Machine<'_>) -> anyhow::Result<()> {
    machine.try_run(
        "systemctl stop other crowd pullgate-filter; rm -rf /run/crowd /etc/nginx/conf.d/idle.conf /etc/nginx/modules-enabled/files.conf \
         /etc/systemd/system/pullgate-gate.service.d; systemctl daemon-reload; pullgate --config /root/other.toml unload; \
         pullgate unload; ip link set wan0 nomaster; ip link del up0; \
         cd /etc/systemd/network && rm -f 15-up0.netdev 16-port.network 21-carrier.network; \
         modprobe e1000e",
    )?;
    uplink_by(machine, VIRTIO)?;
    start(machine, "interfaces = [\"wan0\"]")
}

/// Gives another card the addresses and the default routes.
fn uplink_by(machine: &Machine<'_>, card: Card) -> anyhow::Result<()> {
    machine.write(
        "/etc/systemd/network/20-uplink.network",
        &machine::uplink(card.name),
    )?;
    let others: Vec<_> = CARDS.iter().map(|card| card.name).collect();
    machine.run(&format!(
        "networkctl reload; for i in {}; do ip address flush dev $i 2>/dev/null; ip link set $i down 2>/dev/null; done; \
         networkctl up {name}; networkctl reconfigure {name}",
        others.join(" "),
        name = card.name,
    ))?;
    has_uplink(machine, card.name)
}

/// Puts an interface `up0` on top of the card, with its addresses and routes.
fn stacked(machine: &Machine<'_>, card: Card, make: &str) -> anyhow::Result<()> {
    machine.run("systemctl stop pullgate-filter && pullgate unload")?;
    let name = card.name;
    machine.write(
        "/etc/systemd/network/20-uplink.network",
        &machine::uplink("up0"),
    )?;
    machine.write(
        "/etc/systemd/network/21-carrier.network",
        &format!("[Match]\nName={name}\n[Network]\nLinkLocalAddressing=no\nKeepMaster=yes\n"),
    )?;
    let make = make.replace("@CARD@", name);
    machine.run(&format!(
        "networkctl reload; ip address flush dev wan0; ip -6 route flush dev wan0; {make}; \
         ip link set {name} up; ip link set up0 up"
    ))?;
    has_uplink(machine, "up0")
}

fn has_uplink(machine: &Machine<'_>, interface: &str) -> anyhow::Result<()> {
    let [v4, v6] = Host::Origin.addresses();
    machine
        .eventually(
            "addresses and routes",
            &format!(
                "ip -4 route show default | grep -q 'dev {interface}' && ip -6 route show default | grep -q 'dev {interface}' && \
                 ip address show dev {interface} | grep -q {v4} && ip address show dev {interface} | grep -q {v6}"
            ),
        )
        .map(drop)
}

fn kernel(machine: &Machine<'_>) -> anyhow::Result<(u32, u32)> {
    let release = machine.run("uname -r")?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || {
        numbers
            .next()
            .context("a version")?
            .parse()
            .context("a version")
    };
    Ok((next()?, next()?))
}

const UPGRADE: &str = "root/pullgate_upgrade.deb";
/// `@CARD@` is the card below it.
const VLAN: &str = "ip link add link @CARD@ name up0 type vlan id 10";
/// Beside the installed `pullgate`, which it starts.
const VERDICT: &str = "usr/bin/pullgate-verdict-test";
/// The object that it loads, in the same.
const OBJECT: &str = "usr/lib/pullgate-object";
const NGINX: &str = "server {\n    listen 127.0.0.1:8080 proxy_protocol;\n    location / { return 200 \"nginx\\n\"; }\n}\n";
const LATE: &str = "[Unit]\nDescription=a driver that loads late\nDefaultDependencies=no\n[Service]\nType=oneshot\n\
    ExecStart=sleep 20\nExecStart=modprobe e1000e\nTimeoutStartSec=120\n[Install]\nWantedBy=sysinit.target\n";
