//! `cargo xtask fuzz`: libFuzzer on a target of `tests/fuzz`, for a bounded time.

use clap::{Args, ValueEnum};

use crate::exec::{cargo, exec, root, with_tools};
use crate::setup;

/// What to fuzz, and for how long.
#[derive(Args)]
pub(crate) struct Options {
    /// The target.
    target: Target,
    /// Seconds to go on.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

#[derive(Clone, Copy, ValueEnum)]
enum Target {
    /// The filter's decision, against an oracle on etherparse.
    Decide,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    setup::run()?;
    setup::cargo_fuzz()?;
    let Target::Decide = options.target;
    let corpus = root().join("target/fuzz/corpus/decide");
    let manifest = ["--manifest-path", "tests/fuzz/Cargo.toml"];
    let mut seeds = cargo(&["run", "--quiet", "--bin", "seeds"]);
    seeds
        .args(manifest)
        .args(["--target-dir", "target/fuzz", "--"]);
    exec(seeds.arg(&corpus))?;

    let mut fuzz = cargo(&["fuzz", "run", "--fuzz-dir", "tests/fuzz"]);
    // Without a sanitizer the stable compiler will do; there is no unsafe code to look for.
    fuzz.args([
        "--target-dir",
        "target/fuzz",
        "--sanitizer",
        "none",
        "decide",
    ]);
    fuzz.arg(&corpus).args(["--", "-max_len=2048"]);
    fuzz.arg(format!("-max_total_time={}", options.seconds));
    fuzz.arg("-print_final_stats=1");
    exec(with_tools(&mut fuzz)?)
}
