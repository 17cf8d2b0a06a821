//! `cargo xtask dist`: the Debian package and the static tarball, under `target/dist`.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::build::with_object;
use crate::exec::{cargo, exec, root, say, with_tools};
use crate::setup;

/// What to package.
#[derive(Args)]
pub(crate) struct Options {
    /// Another version than the workspace's, for the Debian package.
    #[arg(long)]
    version: Option<String>,
    /// For which processor.
    #[arg(long, value_enum, default_value_t = Target::X86_64)]
    target: Target,
}

/// A processor that packages are made for.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub(crate) enum Target {
    #[value(name = "x86_64")]
    X86_64,
    Aarch64,
}

impl Target {
    /// What Debian calls it.
    fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// What uname(1) calls it.
    fn machine(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// The target of a binary that needs no library.
    pub(crate) fn musl(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-musl",
            Self::Aarch64 => "aarch64-unknown-linux-musl",
        }
    }

    /// What cargo needs to know to build such a binary. C's side of the cryptography is compiled
    /// with musl's headers where Debian has them, and else with glibc's, of which it takes nothing
    /// that musl does not have.
    pub(crate) fn tools(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::X86_64 => &[("CC_x86_64_unknown_linux_musl", "musl-gcc")],
            Self::Aarch64 => &[
                ("CC_aarch64_unknown_linux_musl", "aarch64-linux-gnu-gcc"),
                (
                    "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER",
                    "aarch64-linux-gnu-gcc",
                ),
            ],
        }
    }

    /// What takes the symbols out of its binaries.
    fn strip(self) -> &'static str {
        match self {
            Self::X86_64 => "strip",
            Self::Aarch64 => "aarch64-linux-gnu-strip",
        }
    }
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    setup::run()?;
    let version = options.version.as_deref();
    package(options.target, version.unwrap_or(env!("CARGO_PKG_VERSION"))).map(drop)
}

/// Makes both; returns the Debian package.
pub(crate) fn package(target: Target, version: &str) -> anyhow::Result<PathBuf> {
    setup::cargo_deb()?;
    let dist = root().join("target/dist");
    let (binary, package) = match target {
        Target::X86_64 => {
            let package = ["--package", "filter-user", "--release"];
            exec(with_object(&["build", "--bins", "--examples"])?.args(package))?;
            documents("release", target)?;
            let package = debian_package("release", version, &dist, None)?;
            (static_binary(target)?, package)
        }
        Target::Aarch64 => {
            setup::cross()?;
            // The pages are written here, by a program for here.
            let pages = ["--package", "filter-user", "--example", "pages"];
            exec(with_object(&["build"])?.args(pages))?;
            documents("debug", target)?;
            let binary = static_binary(target)?;
            (
                binary,
                debian_package("release", version, &dist, Some(target))?,
            )
        }
    };
    tarball(&package, &binary, &dist, target)?;
    Ok(package)
}

/// What the tests install: two versions of what `cargo build` has built, the same as a tarball, and a
/// Debian to install them in.
pub(crate) fn for_tests() -> anyhow::Result<()> {
    setup::cargo_deb()?;
    documents("debug", Target::X86_64)?;
    let dist = root().join("target/dist/test");
    debian_package("dev", "0.0.1", &dist, None)?;
    let package = debian_package("dev", "0.0.2", &dist, None)?;
    let binary = root().join("target/debug/pullgate");
    tarball(&package, &binary, &dist, Target::X86_64)?;
    setup::debian()
}

/// Writes what the packages carry besides what stands in the repository.
fn documents(built: &str, target: Target) -> anyhow::Result<()> {
    let dist = root().join("target/dist");
    fs::create_dir_all(dist.join("doc")).context("target/dist")?;
    let pages = root().join("target").join(built).join("examples/pages");
    exec(Command::new(pages).arg(&dist))?;
    third_party(&dist.join("doc/THIRD-PARTY"), target)
}

/// Packages what was built with a profile, for here or as a static binary; returns the package.
fn debian_package(
    profile: &str,
    version: &str,
    directory: &Path,
    cross: Option<Target>,
) -> anyhow::Result<PathBuf> {
    let mut deb = cargo(&["deb", "--quiet", "--no-build", "--package", "filter-user"]);
    deb.args(["--profile", profile, "--deb-version", version, "--output"]);
    deb.arg(directory);
    if let Some(target) = cross {
        deb.args(["--target", target.musl()]);
    }
    exec(with_tools(&mut deb)?)?;
    let architecture = cross.unwrap_or(Target::X86_64).debian();
    Ok(directory.join(format!("pullgate_{version}_{architecture}.deb")))
}

/// Builds a binary that needs no library.
fn static_binary(target: Target) -> anyhow::Result<PathBuf> {
    let mut build = with_object(&["build", "--package", "filter-user", "--release"])?;
    build.args(["--target", target.musl()]);
    build.envs(target.tools().iter().copied());
    exec(&mut build)?;
    let built = root().join("target").join(target.musl());
    Ok(built.join("release/pullgate"))
}

/// The files of a package with another binary, in the places where it puts them; what the operator
/// edits is beside them, and systemd-tmpfiles copies it to where there is none.
fn tarball(package: &Path, binary: &Path, dist: &Path, target: Target) -> anyhow::Result<()> {
    let (version, machine) = (env!("CARGO_PKG_VERSION"), target.machine());
    let name = format!("pullgate-{version}-{machine}-linux-musl");
    let tree = dist.join(&name);
    if tree.exists() {
        fs::remove_dir_all(&tree).context("target/dist")?;
    }
    fs::create_dir(&tree).context("target/dist")?;
    exec(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(package)
            .arg(&tree),
    )?;
    exec(
        Command::new("install")
            .arg("--strip")
            .arg(format!("--strip-program={}", target.strip()))
            .arg(binary)
            .arg(tree.join("usr/bin/pullgate")),
    )?;
    let shared = tree.join("usr/share/pullgate/pullgate.toml");
    fs::rename(tree.join("etc/pullgate/pullgate.toml"), shared).context("target/dist")?;
    fs::remove_dir_all(tree.join("etc")).context("target/dist")?;
    let file = tree.join("usr/lib/tmpfiles.d/pullgate-configuration.conf");
    let tmpfiles = "filter-user/dist/systemd/pullgate-configuration.tmpfiles";
    fs::copy(root().join(tmpfiles), file).context(tmpfiles)?;
    let archive = format!("{name}.tar.gz");
    let mut tar = Command::new("tar");
    tar.current_dir(dist)
        .args(["--create", "--gzip", "--owner=root", "--group=root"]);
    exec(tar.args(["--sort=name", "--file"]).arg(&archive).arg(&name))?;
    fs::remove_dir_all(&tree).context("target/dist")?;
    say(&format!("target/dist/{archive}"));
    Ok(())
}

/// Writes who wrote what is in the binary, and by which licence it may be given on.
fn third_party(file: &Path, target: Target) -> anyhow::Result<()> {
    let mut tree = cargo(&["tree", "--package", "filter-user", "--edges", "normal"]);
    tree.args(["--prefix", "none", "--no-dedupe", "--format", "{p}"]);
    tree.args(["--target", target.musl()]);
    let output = tree.output().context("cargo tree")?;
    let linked = String::from_utf8(output.stdout).context("cargo tree")?;
    let output = cargo(&["metadata", "--format-version", "1"]).output();
    let metadata: Value = serde_json::from_slice(&output.context("cargo metadata")?.stdout)?;

    let mut text =
        "The binary contains parts of these works, each by the licence named with it.\n".to_owned();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let word = |name: &str| package[name].as_str().unwrap_or_default();
        let name = format!("{} v{}", word("name"), word("version"));
        let is_linked = linked
            .lines()
            .any(|line| line.strip_prefix(&name).is_some_and(is_end));
        // What has no source is ours.
        if !is_linked || package["source"].is_null() {
            continue;
        }
        if word("license").is_empty() {
            bail!("{name} does not name its licence; read it, and say here what it is");
        }
        text += &format!(
            "\n{:=<80}\n{name}, {}\n{}\n",
            "",
            word("license"),
            word("repository")
        );
        for path in licences(Path::new(word("manifest_path")))? {
            let licence = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            text += &format!("\n{}\n", licence.trim_end());
        }
    }
    let mut out = fs::File::create(file).context("target/dist")?;
    out.write_all(text.as_bytes()).context("target/dist")
}

/// Behind a name and version: nothing, or where it is from.
fn is_end(rest: &str) -> bool {
    rest.is_empty() || rest.starts_with(' ')
}

/// The files beside a manifest that tell of a licence.
fn licences(manifest: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let directory = manifest.parent().unwrap_or(manifest);
    let entries = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    let mut files: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .to_uppercase();
            let tells = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE"];
            path.is_file() && tells.iter().any(|word| name.starts_with(word))
        })
        .collect();
    files.sort();
    Ok(files)
}
