//! `cargo xtask dist`: the Debian package and the static tarball, under `target/dist`.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use clap::Args;
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
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    setup::run()?;
    setup::cargo_deb()?;
    let package = ["--package", "filter-user", "--release"];
    exec(with_object(&["build", "--bins", "--examples"])?.args(package))?;
    documents("release")?;
    let version = options.version.as_deref();
    let version = version.unwrap_or(env!("CARGO_PKG_VERSION"));
    let dist = root().join("target/dist");
    let package = debian_package("release", version, &dist)?;
    tarball(&package, &static_binary()?, &dist)
}

/// What the tests install: two versions of what `cargo build` has built, the same as a tarball, and a
/// Debian to install them in.
pub(crate) fn for_tests() -> anyhow::Result<()> {
    setup::cargo_deb()?;
    documents("debug")?;
    let dist = root().join("target/dist/test");
    debian_package("dev", "0.0.1", &dist)?;
    let package = debian_package("dev", "0.0.2", &dist)?;
    tarball(&package, &root().join("target/debug/pullgate"), &dist)?;
    setup::debian()
}

/// Writes what the packages carry besides what stands in the repository.
fn documents(built: &str) -> anyhow::Result<()> {
    let dist = root().join("target/dist");
    fs::create_dir_all(dist.join("doc")).context("target/dist")?;
    let pages = root().join("target").join(built).join("examples/pages");
    exec(Command::new(pages).arg(&dist))?;
    third_party(&dist.join("doc/THIRD-PARTY"))
}

/// Packages what was built with a profile; returns the package.
fn debian_package(profile: &str, version: &str, directory: &Path) -> anyhow::Result<PathBuf> {
    let mut deb = cargo(&["deb", "--quiet", "--no-build", "--package", "filter-user"]);
    deb.args(["--profile", profile, "--deb-version", version, "--output"]);
    exec(with_tools(deb.arg(directory))?)?;
    Ok(directory.join(format!("pullgate_{version}_amd64.deb")))
}

/// Builds a binary that needs no library.
fn static_binary() -> anyhow::Result<PathBuf> {
    let mut build = with_object(&["build", "--package", "filter-user", "--release"])?;
    // C's side of the cryptography is compiled with musl's headers.
    build
        .args(["--target", MUSL])
        .env("CC_x86_64_unknown_linux_musl", "musl-gcc");
    exec(&mut build)?;
    Ok(root().join("target").join(MUSL).join("release/pullgate"))
}

/// The files of a package with another binary, in the places where it puts them; what the operator
/// edits is beside them, and systemd-tmpfiles copies it to where there is none.
fn tarball(package: &Path, binary: &Path, dist: &Path) -> anyhow::Result<()> {
    let name = format!("pullgate-{}-x86_64-linux-musl", env!("CARGO_PKG_VERSION"));
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
fn third_party(file: &Path) -> anyhow::Result<()> {
    let mut tree = cargo(&["tree", "--package", "filter-user", "--edges", "normal"]);
    tree.args(["--prefix", "none", "--no-dedupe", "--format", "{p}"]);
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

const MUSL: &str = "x86_64-unknown-linux-musl";
