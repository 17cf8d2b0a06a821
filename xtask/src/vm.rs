//! Machines for `cargo xtask test --vm`: Debian's kernels, and Debian as they boot it, under
//! `target/vm`. Made of packages alone, once; removing the directory makes them again.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};

use crate::exec::{exec, root, say, shown};
use crate::setup::{self, KEYRING};

/// A kernel of the matrix, as `tests/vm/kernels` describes it.
struct Kernel<'a> {
    name: &'a str,
    /// The Debian whose user space it boots.
    user_space: &'a str,
    /// The suites that have its package.
    suites: Vec<&'a str>,
    /// Whether it is an error if the mirror does not have it.
    is_required: bool,
}

/// Makes what these kernels, or all, need to be booted; returns the names of those that can be, and
/// says why the others cannot.
pub(crate) fn prepare(wanted: &[String]) -> anyhow::Result<Vec<String>> {
    setup::vm_packages()?;
    let kernels = kernels()?;
    for name in wanted {
        let known = kernels.iter().any(|kernel| kernel.name == *name);
        ensure!(known, "tests/vm/kernels has no `{name}`");
    }
    let mut ready = Vec::new();
    for kernel in &kernels {
        if !wanted.is_empty() && wanted.iter().all(|name| kernel.name != name) {
            continue;
        }
        match kernel.prepare() {
            Ok(()) => ready.push(kernel.name.to_owned()),
            Err(error) if !kernel.is_required => {
                say(&format!("SKIPPED vm {}: {error:#}", kernel.name));
            }
            Err(error) => return Err(error.context(format!("kernel {}", kernel.name))),
        }
    }
    Ok(ready)
}

fn kernels() -> anyhow::Result<Vec<Kernel<'static>>> {
    let lines = KERNELS.lines().filter(|line| !line.starts_with('#'));
    let kernels = lines.map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let [name, user_space, suites, needed] = words[..] else {
            bail!("tests/vm/kernels: `{line}` has not four words");
        };
        Ok(Kernel {
            name,
            user_space,
            suites: suites.split(',').collect(),
            is_required: needed == "required",
        })
    });
    kernels.collect()
}

impl Kernel<'_> {
    fn directory(&self) -> PathBuf {
        vm().join(self.name)
    }

    /// Fetches the kernel, and makes its initrd and its root.
    fn prepare(&self) -> anyhow::Result<()> {
        let directory = self.directory();
        let image = directory.join("root.img");
        // What it is made of, written last.
        let (stamp, parts) = (directory.join("parts"), parts());
        if fs::read_to_string(&stamp).is_ok_and(|made| made == parts) {
            return Ok(());
        }
        fs::create_dir_all(&directory).context("target/vm")?;
        let tree = match directory.join("tree") {
            tree if tree.exists() => tree,
            tree => {
                self.fetch(&tree)?;
                tree
            }
        };
        let modules = fs::read_dir(tree.join("lib/modules")).context("lib/modules")?;
        let release = modules.flatten().next().context("no modules")?.file_name();
        let release = release.to_string_lossy().into_owned();
        let tree = Tree { tree, release };
        let kernel = tree.kernel()?;
        fs::copy(&kernel, directory.join("vmlinuz")).context("vmlinuz")?;
        tree.initrd(&directory)?;
        let base = debian(self.user_space)?;
        let unfinished = directory.join("root.unfinished");
        tree.image(&base, &directory.join("root"), &unfinished)?;
        fs::rename(unfinished, image).context("root.img")?;
        fs::write(stamp, parts).context("target/vm")
    }

    /// Unpacks the packages of the newest such kernel.
    fn fetch(&self, place: &Path) -> anyhow::Result<()> {
        let apt = Apt::new(&self.directory().join("apt"), &self.suites)?;
        let image = apt.depends("linux-image-amd64", &["linux-image-"])?;
        let image = image.first().context("linux-image-amd64 names no kernel")?;
        let mut packages = vec![image.clone()];
        // Newer ones are split.
        packages.extend(apt.depends(image, &["linux-base-", "linux-binary-", "linux-modules-"])?);
        let debs = self.directory().join("debs");
        let tree = self.directory().join("tree.unfinished");
        for path in [&debs, &tree] {
            if path.exists() {
                fs::remove_dir_all(path).context("target/vm")?;
            }
            fs::create_dir_all(path).context("target/vm")?;
        }
        exec(
            apt.command("apt-get")
                .current_dir(&debs)
                .arg("download")
                .args(&packages),
        )?;
        for deb in fs::read_dir(&debs).context("target/vm")?.flatten() {
            let mut unpack = Command::new("dpkg-deb");
            exec(unpack.arg("--extract").arg(deb.path()).arg(&tree))?;
        }
        if !tree.join("lib").exists() {
            std::os::unix::fs::symlink("usr/lib", tree.join("lib")).context("lib")?;
        }
        fs::remove_dir_all(&debs).context("target/vm")?;
        fs::rename(tree, place).context("target/vm")
    }
}

/// apt with a root of its own, for suites that this host has not.
struct Apt {
    root: PathBuf,
}

impl Apt {
    fn new(directory: &Path, suites: &[&str]) -> anyhow::Result<Self> {
        for part in [
            "etc/apt/apt.conf.d",
            "var/lib/apt/lists/partial",
            "var/lib/dpkg",
            "var/cache/apt/archives/partial",
        ] {
            fs::create_dir_all(directory.join(part)).context("target/vm")?;
        }
        fs::write(directory.join("var/lib/dpkg/status"), "").context("target/vm")?;
        let mut sources = String::new();
        for suite in suites {
            let of = if suite.ends_with("-security") {
                "bookworm-security"
            } else {
                "bookworm"
            };
            let archive = setup::archive(of)?;
            sources += &format!("deb [signed-by={KEYRING}] {archive} {suite} main\n");
        }
        fs::write(directory.join("etc/apt/sources.list"), sources).context("target/vm")?;
        let apt = Self {
            root: directory.to_owned(),
        };
        exec(apt.command("apt-get").args(["update", "--quiet"]))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let at = |path: &str| self.root.join(path).display().to_string();
        let mut command = Command::new(program);
        for option in [
            format!("Dir={}", at("")),
            format!("Dir::State::status={}", at("var/lib/dpkg/status")),
            format!("Dir::Etc::sourcelist={}", at("etc/apt/sources.list")),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            "Dir::Bin::methods=/usr/lib/apt/methods".to_owned(),
            "Dir::Bin::solvers=/usr/lib/apt/solvers".to_owned(),
            "APT::Architecture=amd64".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }

    /// What a package depends on whose name begins so, and goes on with a version.
    fn depends(&self, package: &str, prefixes: &[&str]) -> anyhow::Result<Vec<String>> {
        let mut depends = self.command("apt-cache");
        let output = depends
            .args(["depends", "--important", package])
            .output()
            .context("apt-cache")?;
        let text = String::from_utf8(output.stdout).context("apt-cache")?;
        let names = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "));
        let is_wanted = |name: &&str| {
            prefixes.iter().any(|prefix| {
                let rest = name.strip_prefix(prefix);
                rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
            })
        };
        Ok(names.filter(is_wanted).map(str::to_owned).collect())
    }
}

/// An unpacked kernel.
struct Tree {
    tree: PathBuf,
    release: String,
}

impl Tree {
    fn kernel(&self) -> anyhow::Result<PathBuf> {
        let release = &self.release;
        let places = [
            format!("boot/vmlinuz-{release}"),
            format!("lib/modules/{release}/vmlinuz"),
        ];
        let mut places = places.iter().map(|place| self.tree.join(place));
        places.find(|place| place.exists()).context("no vmlinuz")
    }

    fn modules(&self) -> PathBuf {
        self.tree.join("lib/modules").join(&self.release)
    }

    /// The files of these modules and of all that they depend on, in the order to insert them; of
    /// those that are built in or that this kernel has not, none.
    fn closure(&self, modules: &[&str]) -> anyhow::Result<Vec<PathBuf>> {
        if !self.modules().join("modules.dep.bin").exists() {
            let mut depmod = Command::new("depmod");
            exec(depmod.arg("--basedir").arg(&self.tree).arg(&self.release))?;
        }
        let mut files = Vec::new();
        for module in modules {
            let mut modprobe = Command::new("modprobe");
            modprobe
                .arg("--dirname")
                .arg(&self.tree)
                .args(["--set-version", &self.release]);
            let output = modprobe.args(["--show-depends", module]).output();
            let text = String::from_utf8(output.context("modprobe")?.stdout);
            let text = text.context("modprobe")?;
            for line in text.lines() {
                let file = line.strip_prefix("insmod ").map(str::trim);
                let file = file.and_then(|rest| rest.split(' ').next());
                if let Some(file) = file.map(PathBuf::from)
                    && !files.contains(&file)
                {
                    files.push(file);
                }
            }
        }
        Ok(files)
    }

    /// An initrd that mounts the root, and renames no interface, as small ones do.
    fn initrd(&self, directory: &Path) -> anyhow::Result<()> {
        let tree = directory.join("initrd.tree");
        if tree.exists() {
            fs::remove_dir_all(&tree).context("target/vm")?;
        }
        for name in ["bin", "modules", "proc", "sys", "dev", "root"] {
            fs::create_dir_all(tree.join(name)).context("target/vm")?;
        }
        fs::copy("/bin/busybox", tree.join("bin/busybox")).context("busybox")?;
        write_program(&tree.join("init"), INIT)?;
        let mut order = String::new();
        for file in self.closure(&EARLY)? {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let (name, unpack) = match name.rsplit_once('.') {
                Some((name, "xz")) => (name, "xz"),
                Some((name, "zst")) => (name, "zstd"),
                Some(_) | None => (&*name, "cat"),
            };
            let unpacked = File::create(tree.join("modules").join(name)).context("target/vm")?;
            let mut command = Command::new(unpack);
            if unpack != "cat" {
                command.args(["--decompress", "--stdout", "--quiet"]);
            }
            exec(command.arg(&file).stdout(unpacked))?;
            order += &format!("{name}\n");
        }
        fs::write(tree.join("order"), order).context("target/vm")?;
        archive(&tree, &directory.join("initrd"))?;
        fs::remove_dir_all(&tree).context("target/vm")
    }

    /// A file system image: a Debian with this kernel's modules, and an agent that runs scripts.
    fn image(&self, base: &Path, tree: &Path, image: &Path) -> anyhow::Result<()> {
        for path in [tree, image] {
            if path.is_dir() {
                fs::remove_dir_all(path).context("target/vm")?;
            }
        }
        exec(Command::new("cp").arg("--archive").arg(base).arg(tree))?;
        let modules = tree.join("usr/lib/modules").join(&self.release);
        for file in self.closure(&MODULES)? {
            let inside = file.strip_prefix(self.modules()).context("modprobe")?;
            let place = modules.join(inside);
            fs::create_dir_all(place.parent().unwrap_or(&place)).context("target/vm")?;
            fs::copy(&file, &place).with_context(|| file.display().to_string())?;
        }
        for name in [
            "modules.builtin",
            "modules.builtin.modinfo",
            "modules.order",
        ] {
            fs::copy(self.modules().join(name), modules.join(name)).context(name)?;
        }
        let mut depmod = Command::new("depmod");
        exec(depmod.arg("--basedir").arg(tree).arg(&self.release))?;

        write_program(&tree.join("usr/local/sbin/agent"), AGENT)?;
        for (path, text) in [
            ("etc/systemd/system/agent.service", AGENT_UNIT),
            // One that is set: at a first boot, systemd would enable what it likes.
            ("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
            ("etc/hostname", "origin\n"),
            ("etc/hosts", "127.0.0.1 localhost origin\n"),
            ("etc/fstab", ""),
        ] {
            fs::write(tree.join(path), text).with_context(|| path.to_owned())?;
        }
        for words in [
            ["enable", "agent.service"].as_slice(),
            &["enable", "systemd-networkd.service"],
            &["disable", "nginx.service"],
            &["mask", "apt-daily.timer", "apt-daily-upgrade.timer"],
        ] {
            let mut systemctl = Command::new("systemctl");
            exec(systemctl.arg("--root").arg(tree).args(words))?;
        }
        let file = File::create(image).context("target/vm")?;
        file.set_len(IMAGE).context("target/vm")?;
        let mut mkfs = Command::new("mkfs.ext4");
        mkfs.args(["-q", "-F", "-m", "0", "-d"]);
        exec(mkfs.arg(tree).arg(image))?;
        fs::remove_dir_all(tree).context("target/vm")
    }
}

/// A Debian of that name, with what the machines need.
fn debian(name: &str) -> anyhow::Result<PathBuf> {
    let packages = PACKAGES.join(",");
    let tree = vm().join(format!("debian-{name}"));
    let stamp = vm().join(format!("debian-{name}.packages"));
    if tree.exists() && fs::read_to_string(&stamp).is_ok_and(|made| made == packages) {
        return Ok(tree);
    }
    setup::debootstrap(name, &packages, &tree, |unfinished| {
        for garbage in [
            "var/cache/apt/archives",
            "var/lib/apt/lists",
            "usr/share/locale",
        ] {
            fs::remove_dir_all(unfinished.join(garbage)).context("target/vm")?;
        }
        for empty in [
            "var/cache/apt/archives/partial",
            "var/lib/apt/lists/partial",
        ] {
            fs::create_dir_all(unfinished.join(empty)).context("target/vm")?;
        }
        Ok(())
    })?;
    fs::write(stamp, packages).context("target/vm")?;
    Ok(tree)
}

/// Packs a tree as the kernel unpacks an initramfs.
pub(crate) fn archive(tree: &Path, place: &Path) -> anyhow::Result<()> {
    let listed = Command::new("find").current_dir(tree).output();
    let listed = listed.context("find")?.stdout;
    let archive = File::create(place).context("target/vm")?;
    let mut cpio = Command::new("cpio");
    cpio.current_dir(tree)
        .args(["--create", "--format=newc", "--quiet"]);
    cpio.stdin(Stdio::piped()).stdout(archive);
    say(&format!("+ {}", shown(&cpio)));
    let mut child = cpio.spawn().context("cpio")?;
    let mut names = child.stdin.take().context("cpio")?;
    names.write_all(&listed).context("cpio")?;
    drop(names);
    ensure!(child.wait().context("cpio")?.success(), "cpio failed");
    Ok(())
}

fn write_program(path: &Path, text: &str) -> anyhow::Result<()> {
    let context = || path.display().to_string();
    fs::write(path, text).with_context(context)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).with_context(context)
}

/// What else than the kernel an image is made of.
fn parts() -> String {
    [&[INIT, AGENT, AGENT_UNIT], &PACKAGES[..], &EARLY, &MODULES]
        .concat()
        .join("\n")
}

fn vm() -> PathBuf {
    root().join("target/vm")
}

const KERNELS: &str = include_str!("../../tests/vm/kernels");
const INIT: &str = include_str!("../../tests/vm/guest/init");
const AGENT: &str = include_str!("../../tests/vm/guest/agent");
const AGENT_UNIT: &str = include_str!("../../tests/vm/guest/agent.service");
/// Bytes of the file system; most of it is a hole.
const IMAGE: u64 = 1536 << 20;
/// What is in the Debian besides its essential packages.
const PACKAGES: [&str; 15] = [
    "ca-certificates",
    "curl",
    "dbus",
    "ethtool",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libnginx-mod-stream",
    "nginx",
    "openssl",
    "ppp",
    "procps",
    "systemd",
    "systemd-sysv",
    "udev",
];
/// What the initrd inserts.
const EARLY: [&str; 5] = [
    "virtio_pci",
    "virtio_blk",
    "crc32c_generic",
    "crc32c_intel",
    "ext4",
];
/// What is there to be loaded.
const MODULES: [&str; 34] = [
    "8021q",
    "af_packet_diag",
    "autofs4",
    "binfmt_misc",
    "bonding",
    "bridge",
    "button",
    "dummy",
    "e1000e",
    "fuse",
    "inet_diag",
    "ip6_gre",
    "ip6_tunnel",
    "ip_gre",
    "ipip",
    "ipvlan",
    "loop",
    "macvlan",
    "nf_tables",
    "ppp_async",
    "ppp_generic",
    "pppoe",
    "qemu_fw_cfg",
    "sch_ingress",
    "sit",
    "tcp_diag",
    "tun",
    "udp_diag",
    "veth",
    "virtio_console",
    "virtio_net",
    "virtio_rng",
    "vmxnet3",
    "vxlan",
];
