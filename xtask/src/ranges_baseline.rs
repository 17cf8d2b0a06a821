//! `cargo xtask ranges-baseline`: rewrites the ranges that are embedded, and shows what changes.
//!
//! The list is fetched, parsed and judged by pullgate itself: what its guard would refuse from a
//! feed does not become the baseline either.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use clap::Args;

use crate::exec::{cargo, root, say, shown};

/// Where the ranges come from.
#[derive(Args)]
pub(crate) struct Options {
    /// Cloudflare's API answer or a list of ranges: a file, or an https URL.
    source: String,
    /// The day on which Cloudflare published them: year-month-day; today, if nothing is said.
    #[arg(long)]
    date: Option<String>,
    /// Write them even if that removes much.
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let date = match &options.date {
        Some(date) => date.clone(),
        None => output(Command::new("date").args(["-u", "+%F"]))?.1,
    };
    let date = date.trim();
    let parts: Option<Vec<u32>> = date.split('-').map(|part| part.parse().ok()).collect();
    match parts.as_deref() {
        Some([2026..=2999, 1..=12, 1..=31]) if date.len() == 10 => {}
        Some(_) | None => bail!("`{date}` is not a date; write it as 2026-11-21"),
    }

    let diff = diff(&options.source)?;
    let changed = |sign: &str| -> Vec<&str> {
        let lines = diff.lines().map(str::trim);
        lines.filter_map(|line| line.strip_prefix(sign)).collect()
    };
    let (added, removed) = (changed("+ "), changed("- "));
    say(diff.trim_end());
    if diff.contains(": Held: ") && !options.force {
        bail!("this would remove much; if that is right, say `--force`");
    }
    let baseline = root().join("filter-user/baseline");
    for (name, is_v6) in [("ips-v4", false), ("ips-v6", true)] {
        let path = baseline.join(name);
        let old = fs::read_to_string(&path).with_context(|| name.to_owned())?;
        let kept = old.lines().filter(|range| !removed.contains(range));
        let new = added
            .iter()
            .copied()
            .filter(|range| range.contains(':') == is_v6);
        let text: String = kept.chain(new).map(|range| format!("{range}\n")).collect();
        fs::write(&path, text).with_context(|| name.to_owned())?;
    }
    fs::write(baseline.join("date"), format!("{date}\n")).context("date")?;
    let (added, removed) = (added.len(), removed.len());
    say(&format!(
        "the baseline is of {date}: {added} added, {removed} removed"
    ));
    Ok(())
}

/// What `pullgate ranges diff` says of the source, where nothing but the baseline is active.
fn diff(source: &str) -> anyhow::Result<String> {
    let directory = root().join("target/ranges-baseline");
    fs::create_dir_all(&directory).context("target/ranges-baseline")?;
    let source = if source.contains("://") {
        format!("url = {source:?}")
    } else {
        let path = Path::new(source).canonicalize();
        format!("file = {:?}", path.with_context(|| source.to_owned())?)
    };
    let config = directory.join("pullgate.toml");
    let text = format!(
        "[paths]\nstate = \"no-state\"\n[filter]\ninterfaces = \"auto\"\n\
         [ranges]\nsources = [{{ {source}, like = \"cloudflare\" }}]\n"
    );
    fs::write(&config, text).context("target/ranges-baseline/pullgate.toml")?;

    let mut pullgate = cargo(&[
        "run",
        "--quiet",
        "--package",
        "filter-user",
        "--",
        "--config",
    ]);
    let outcome = output(pullgate.arg(&config).args(["ranges", "diff"]));
    fs::remove_dir_all(&directory).context("target/ranges-baseline")?;
    let (success, diff) = outcome?;
    if !success && !diff.contains(": Held: ") {
        bail!("the ranges are no baseline: {}", diff.trim_end());
    }
    Ok(diff)
}

/// Runs a command to its end; whether it succeeded, and what it said.
fn output(command: &mut Command) -> anyhow::Result<(bool, String)> {
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("cannot start {}", shown(command)))?;
    let text = String::from_utf8(output.stdout).context("not text")?;
    Ok((output.status.success(), text))
}
