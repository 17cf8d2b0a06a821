//! `cargo xtask test --arm64`: the arm64 package, on Debian's arm64 kernel in a virtual machine. The
//! lab's 82 rows and the verdict table, with the package's own binary.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

use crate::build::with_object;
use crate::dist::{self, Target};
use crate::exec::{exec, root, say, shown};
use crate::setup;

pub(crate) fn test() -> anyhow::Result<()> {
    setup::arm64_packages()?;
    let package = dist::package(Target::Aarch64, env!("CARGO_PKG_VERSION"))?;
    let payload = payload(&package)?;
    let machine = machine()?;
    boot(&machine, &payload)
}

/// What runs inside, as an archive that is a disk.
fn payload(package: &Path) -> anyhow::Result<PathBuf> {
    let musl = Target::Aarch64.musl();
    let mut tests = with_object(&[
        "test",
        "--no-run",
        "--package",
        "tests",
        "--test",
        "verdict",
    ])?;
    let mut lab = with_object(&["build", "--package", "tests", "--bin", "lab"])?;
    for command in [&mut tests, &mut lab] {
        command.args(["--target", musl]);
        command.env("CARGO_PROFILE_DEV_STRIP", "true");
        command.envs(Target::Aarch64.tools().iter().copied());
        exec(command)?;
    }
    let built = root().join("target").join(musl).join("debug");
    let verdicts = fs::read_dir(built.join("deps"))
        .context("target")?
        .flatten();
    let verdicts = verdicts.filter(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.starts_with("verdict-") && !name.contains('.')
    });
    let verdict = verdicts
        .max_by_key(|entry| entry.metadata().and_then(|found| found.modified()).ok())
        .context("no test was built")?;

    let tree = directory().join("payload");
    if tree.exists() {
        fs::remove_dir_all(&tree).context("target/vm")?;
    }
    let inside = tree.join("root");
    fs::create_dir_all(&inside).context("target/vm")?;
    exec(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(package)
            .arg(&inside),
    )?;
    let object = root().join("target/bpf/bpfel-unknown-none/release/filter");
    for (from, to) in [
        (verdict.path(), inside.join("usr/bin/verdict")),
        (built.join("lab"), inside.join("usr/bin/lab")),
        (object, tree.join("filter")),
    ] {
        fs::copy(&from, &to).with_context(|| from.display().to_string())?;
    }
    fs::write(tree.join("run"), RUN).context("target/vm")?;
    let disk = directory().join("payload.tar");
    let mut tar = Command::new("tar");
    tar.arg("--create").arg("--file").arg(&disk);
    exec(tar.arg("--directory").arg(&tree).arg("."))?;
    Ok(disk)
}

/// Makes a kernel and an initramfs that holds a whole Debian, none of whose programs is run for it.
fn machine() -> anyhow::Result<PathBuf> {
    let directory = directory();
    let (stamp, parts) = (directory.join("parts"), [INIT, INCLUDE].join("\n"));
    if fs::read_to_string(&stamp).is_ok_and(|made| made == parts) {
        return Ok(directory);
    }
    let tree = directory.join("root");
    if tree.exists() {
        fs::remove_dir_all(&tree).context("target/vm")?;
    }
    let mut make = Command::new("mmdebstrap");
    make.args(["--quiet", "--mode=root", "--architectures=arm64"])
        .args(["--variant=extract", "--include", INCLUDE])
        .arg("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr")
        .arg("bookworm")
        .arg(&tree);
    exec(make.arg(format!("deb {} bookworm main", setup::archive("bookworm")?)))?;
    let modules = tree.join("usr/lib/modules");
    let release = fs::read_dir(&modules)
        .context("no modules")?
        .flatten()
        .next();
    let release = release.context("no modules")?.file_name();
    let release = release.to_string_lossy().into_owned();
    let kernel = tree.join(format!("boot/vmlinuz-{release}"));
    fs::copy(kernel, directory.join("vmlinuz")).context("vmlinuz")?;
    keep_modules(&modules.join(&release))?;
    exec(
        Command::new("depmod")
            .arg("--basedir")
            .arg(&tree)
            .arg(&release),
    )?;
    for rubbish in ["boot", "usr/share/doc", "usr/share/man", "usr/share/locale"] {
        fs::remove_dir_all(tree.join(rubbish)).context("target/vm")?;
    }
    // What the packages' own scripts would have made.
    for (path, text) in [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/bash\nwww-data:x:33:33::/var/www:/usr/sbin/nologin\nnobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n",
        ),
        (
            "etc/group",
            "root:x:0:\nadm:x:4:\nwww-data:x:33:\nnogroup:x:65534:\n",
        ),
        ("etc/hosts", "127.0.0.1 localhost\n"),
        ("init", INIT),
    ] {
        fs::write(tree.join(path), text).with_context(|| path.to_owned())?;
    }
    exec(Command::new("chmod").arg("755").arg(tree.join("init")))?;
    crate::vm::archive(&tree, &directory.join("initramfs"))?;
    fs::remove_dir_all(&tree).context("target/vm")?;
    fs::write(stamp, parts).context("target/vm")?;
    Ok(directory)
}

/// Removes all modules but those that the machine inserts: they would fill its memory.
fn keep_modules(tree: &Path) -> anyhow::Result<()> {
    let kernel = tree.join("kernel");
    let kept = tree.join("kept");
    for part in MODULES {
        let place = kept.join(part);
        fs::create_dir_all(place.parent().unwrap_or(&place)).context("target/vm")?;
        fs::rename(kernel.join(part), &place).with_context(|| part.to_owned())?;
    }
    fs::remove_dir_all(&kernel).context("target/vm")?;
    fs::rename(kept, kernel).context("target/vm")
}

/// Boots, shows what is said inside, and returns when all of it was well.
fn boot(machine: &Path, disk: &Path) -> anyhow::Result<()> {
    let mut qemu = Command::new("qemu-system-aarch64");
    // The fastest to emulate that has what the kernel wants.
    qemu.args(["-machine", "virt", "-cpu", "cortex-a72", "-smp", "2"])
        .args(["-m", "2048", "-nographic", "-no-reboot", "-nic", "none"])
        .args(["-append", "console=ttyAMA0 panic=-1 quiet"])
        .arg("-kernel")
        .arg(machine.join("vmlinuz"))
        .arg("-initrd")
        .arg(machine.join("initramfs"))
        .arg("-drive")
        .arg(format!(
            "file={},format=raw,if=virtio,readonly=on",
            disk.display()
        ))
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut limited = Command::new("timeout");
    limited
        .arg("1800")
        .arg(qemu.get_program())
        .args(qemu.get_args());
    limited.stdin(Stdio::null()).stdout(Stdio::piped());
    say(&format!("+ {}", shown(&limited)));
    let mut child = limited.spawn().context("qemu")?;
    let output = child.stdout.take().context("qemu")?;
    let mut is_well = false;
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("qemu")?;
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end();
        writeln!(std::io::stdout(), "{line}").context("standard output")?;
        is_well |= line.ends_with("arm64: status 0");
    }
    child.wait().context("qemu")?;
    ensure!(is_well, "the arm64 machine has not said that all is well");
    Ok(())
}

fn directory() -> PathBuf {
    root().join("target/vm/arm64")
}

const INIT: &str = include_str!("../../tests/vm/arm64/init");
const RUN: &str = include_str!("../../tests/vm/arm64/run");
/// What the lab needs.
const INCLUDE: &str = "base-files,bash,bpftool,ca-certificates,coreutils,curl,dash,ethtool,findutils,\
    gawk,grep,iproute2,iputils-ping,kmod,libc-bin,linux-image-arm64,mount,nginx-light,openssl,procps,\
    sed,tar,util-linux";
/// Below `kernel/`. Without `mptcp_diag`, each question about sockets starts a modprobe.
const MODULES: [&str; 17] = [
    "drivers/block/virtio_blk.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/veth.ko",
    "drivers/net/virtio_net.ko",
    "drivers/virtio",
    "net/802",
    "net/bridge/bridge.ko",
    "net/core/failover.ko",
    "net/ipv4/inet_diag.ko",
    "net/ipv4/raw_diag.ko",
    "net/ipv4/tcp_diag.ko",
    "net/ipv4/udp_diag.ko",
    "net/llc/llc.ko",
    "net/mptcp/mptcp_diag.ko",
    "net/netlink/netlink_diag.ko",
    "net/sched/sch_ingress.ko",
    "net/unix/unix_diag.ko",
];
