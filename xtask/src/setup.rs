//! `cargo xtask setup`: whatever the other commands need. Costs nothing if nothing is missing.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail};

use crate::exec::{EX_UNAVAILABLE, Exit, cargo, exec, is_root, root, say};

pub(crate) fn run() -> anyhow::Result<()> {
    toolchain()?;
    bpf_linker()?;
    packages()
}

/// What `rust-toolchain.toml` names; rustup installs it by itself only where that is allowed.
fn toolchain() -> anyhow::Result<()> {
    let output = Command::new("rustc")
        .current_dir(root())
        .args(["--print", "sysroot"])
        .output()
        .context("rustc")?;
    let sysroot = String::from_utf8(output.stdout).context("rustc --print sysroot")?;
    let sysroot = Path::new(sysroot.trim_end());
    let complete = [
        "lib/rustlib/src/rust/library/core",
        "bin/cargo-clippy",
        "bin/rustfmt",
        "lib/rustlib/aarch64-unknown-linux-musl",
        "lib/rustlib/x86_64-unknown-linux-musl",
    ]
    .iter()
    .all(|part| sysroot.join(part).exists());
    if complete {
        return Ok(());
    }
    exec(
        Command::new("rustup")
            .current_dir(root())
            // Set by the rustup that runs us; with it, the file and its components are not read.
            .env_remove("RUSTUP_TOOLCHAIN")
            .args(["toolchain", "install"]),
    )
}

/// The linker for the BPF target, with the LLVM of the pinned toolchain.
fn bpf_linker() -> anyhow::Result<()> {
    let features = ["--no-default-features", "--features", "rust-llvm-22"];
    tool("bpf-linker", BPF_LINKER, &features)
}

/// The driver of libFuzzer, which only `cargo xtask fuzz` needs.
pub(crate) fn cargo_fuzz() -> anyhow::Result<()> {
    tool("cargo-fuzz", CARGO_FUZZ, &[])
}

/// The judge of dependencies.
pub(crate) fn cargo_deny() -> anyhow::Result<()> {
    // It runs for seconds; optimising it takes minutes.
    tool("cargo-deny", CARGO_DENY, &["--debug"])
}

/// The maker of Debian packages.
pub(crate) fn cargo_deb() -> anyhow::Result<()> {
    tool("cargo-deb", CARGO_DEB, &[])
}

/// A Debian under `target/debian`, for tests that install in a copy of it; from where this host has
/// its own packages.
pub(crate) fn debian() -> anyhow::Result<()> {
    let tree = root().join("target/debian");
    // One from before it had web servers is made again.
    if tree.join("usr/sbin/nginx").exists() {
        return Ok(());
    }
    let packages = "ca-certificates,systemd,nginx,apache2";
    debootstrap(DEBIAN, packages, &tree, |unfinished| {
        // They are started where a test wants one.
        let wanted = unfinished.join("etc/systemd/system/multi-user.target.wants");
        for service in ["nginx.service", "apache2.service"] {
            fs::remove_file(wanted.join(service))
                .with_context(|| format!("{service} in target/debian"))?;
        }
        Ok(())
    })
}

/// A newer Debian under `target/debian-newer`, whose TLS proxies the benchmark of the gate starts from there; only root
/// can make one.
pub(crate) fn newer_debian() -> anyhow::Result<()> {
    let tree = root().join("target/debian-newer");
    let wanted = ["haproxy", "hitch", "nginx"];
    if wanted
        .iter()
        .all(|it| tree.join("usr/sbin").join(it).exists())
    {
        return Ok(());
    }
    if !is_root() {
        say(
            "SKIPPED the proxies of a newer Debian: only root can make one (`sudo cargo xtask bench gate`)",
        );
        return Ok(());
    }
    install_packages(&["debian-archive-keyring"])?;
    let packages = format!("{},libnginx-mod-stream", wanted.join(","));
    debootstrap("trixie", &packages, &tree, |_unfinished| Ok(()))
}

/// Makes a Debian of that name in `tree`, and nothing there unless `finish` has succeeded.
pub(crate) fn debootstrap(
    suite: &str,
    packages: &str,
    tree: &Path,
    finish: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let archive = archive(DEBIAN)?;
    let unfinished = tree.with_extension("unfinished");
    let remove = |path: &Path| {
        if path.exists() {
            fs::remove_dir_all(path).with_context(|| path.display().to_string())?;
        }
        anyhow::Ok(())
    };
    remove(&unfinished)?;
    let mut make = Command::new("debootstrap");
    make.args(["--variant=minbase", "--keyring", KEYRING]);
    make.arg(format!("--include={packages}")).arg(suite);
    exec(make.arg(&unfinished).arg(archive))?;
    finish(&unfinished)?;
    remove(tree)?;
    fs::rename(&unfinished, tree).with_context(|| tree.display().to_string())
}

/// Where this host has the packages of a suite from.
pub(crate) fn archive(suite: &str) -> anyhow::Result<String> {
    let mut targets = Command::new("apt-get");
    targets.args([
        "indextargets",
        "--format",
        "$(CODENAME) $(REPO_URI)",
        "Created-By: Packages",
    ]);
    let output = targets.output().context("apt-get indextargets")?;
    let text = String::from_utf8(output.stdout).context("apt-get indextargets")?;
    let found = text
        .lines()
        .find_map(|line| line.strip_prefix(suite)?.strip_prefix(' '));
    match found {
        Some(archive) => Ok(archive.to_owned()),
        None => bail!("apt knows no archive of {suite}, which the tests install in"),
    }
}

/// Installs a tool under `target/tools`, unless that version is there already.
fn tool(name: &str, version: &str, options: &[&str]) -> anyhow::Result<()> {
    let tools = root().join("target/tools");
    let installed = fs::read_to_string(tools.join(".crates.toml")).unwrap_or_default();
    if installed.contains(&format!("\"{name} {version} ")) {
        return Ok(());
    }
    let mut install = cargo(&["install", name, "--version", version, "--locked"]);
    exec(install.args(options).arg("--root").arg(tools))
}

fn packages() -> anyhow::Result<()> {
    install_packages(&PACKAGES)
}

/// What only `cargo xtask test --vm` needs.
pub(crate) fn vm_packages() -> anyhow::Result<()> {
    install_packages(&VM_PACKAGES)
}

/// The C compiler and linker that only `cargo xtask dist --target aarch64` needs.
pub(crate) fn cross() -> anyhow::Result<()> {
    install_packages(&CROSS_PACKAGES)
}

/// What only `cargo xtask test --arm64` needs.
pub(crate) fn arm64_packages() -> anyhow::Result<()> {
    install_packages(&ARM64_PACKAGES)
}

fn install_packages(wanted: &[&str]) -> anyhow::Result<()> {
    let missing = missing(wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let update = ["apt-get", "update"];
    let install = ["apt-get", "install", "--yes", "--no-install-recommends"];
    let has_apt = Path::new("/usr/bin/apt-get").exists();
    if !has_apt || !is_root() {
        let sudo = "sudo env DEBIAN_FRONTEND=noninteractive";
        say("The lab and the tests need Debian packages that are not installed. Please run:");
        say(&format!("  sudo {}", update.join(" ")));
        say(&format!(
            "  {sudo} {} {}",
            install.join(" "),
            missing.join(" ")
        ));
        return Err(Exit(EX_UNAVAILABLE)).context("packages are missing");
    }

    exec(Command::new(update[0]).args(&update[1..]))?;
    exec(
        Command::new("sh")
            .args(["-c", WITHOUT_STARTS, "sh"])
            .args(install)
            .args(missing)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )
}

/// Installs, and starts no service: the lab starts web servers of its own, and those of the
/// distribution stay as they are. However it ends, the policy goes with it.
const WITHOUT_STARTS: &str = "\
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        trap 'rm -f $policy' EXIT
        trap 'exit 130' HUP INT TERM
        printf '#!/bin/sh\\nexit 101\\n' >$policy && chmod 755 $policy || exit 1
    fi
    \"$@\"";

/// The packages that dpkg does not call installed.
fn missing<'a>(wanted: &[&'a str]) -> Vec<&'a str> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"]);
    let output = query.args(wanted).output();
    let installed = output.map(|output| output.stdout).unwrap_or_default();
    let installed = String::from_utf8_lossy(&installed);
    wanted
        .iter()
        .copied()
        .filter(|package| {
            !installed
                .lines()
                .any(|line| line == format!("{package} installed"))
        })
        .collect()
}

/// Who signs the archive: debian-archive-keyring.
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The one that the package is made for, whose archive has the others, too.
const DEBIAN: &str = "bookworm";
/// The newest that builds with the LLVM inside the pinned toolchain.
const BPF_LINKER: &str = "0.10.4";
const CARGO_DEB: &str = "3.8.0";
const CARGO_DENY: &str = "0.20.2";
const CARGO_FUZZ: &str = "0.13.2";
/// What the lab, the tests and the benchmarks run.
const PACKAGES: [&str; 26] = [
    "apache2",
    "bpftool",
    "ca-certificates",
    "caddy",
    "curl",
    "debootstrap",
    "dnsmasq-base",
    "dpkg-dev",
    "ethtool",
    "haproxy",
    "hitch",
    "iproute2",
    "ipset",
    "iptables",
    "iputils-ping",
    "jq",
    "libnginx-mod-stream",
    "musl-tools",
    "nftables",
    "nginx",
    "openssl",
    "prometheus",
    "stunnel4",
    "systemd",
    "util-linux",
    "xdp-tools",
];
/// What makes and boots the machines of the kernel matrix.
const VM_PACKAGES: [&str; 9] = [
    "busybox-static",
    "cpio",
    "debian-archive-keyring",
    "e2fsprogs",
    "kmod",
    "procps",
    "qemu-system-x86",
    "xz-utils",
    "zstd",
];
/// The compiler only recommends the library that it compiles and links with.
const CROSS_PACKAGES: [&str; 2] = ["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"];
/// What makes and boots an arm64 machine.
const ARM64_PACKAGES: [&str; 5] = [
    "cpio",
    "debian-archive-keyring",
    "kmod",
    "mmdebstrap",
    "qemu-system-arm",
];
