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
    /// The first bytes of a client.
    ClientHello,
    /// The configuration.
    Configuration,
    /// The filter's decision, against an oracle on etherparse.
    Decide,
    /// A list of ranges as a server answers it.
    Feed,
    /// A file of certificates, keys or lists.
    Pem,
    /// A PROXY header of a load balancer's.
    ProxyHeader,
    /// What a client does to its session.
    Session,
    /// The snapshot of the ranges.
    Snapshot,
    /// A frame that is answered with a SYN cookie.
    Synack,
}

impl Target {
    /// Its binary, and the directory of its inputs.
    fn name(self) -> &'static str {
        match self {
            Self::ClientHello => "client_hello",
            Self::Configuration => "configuration",
            Self::Decide => "decide",
            Self::Feed => "feed",
            Self::Pem => "pem",
            Self::ProxyHeader => "proxy_header",
            Self::Session => "session",
            Self::Snapshot => "snapshot",
            Self::Synack => "synack",
        }
    }
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    setup::run()?;
    setup::cargo_fuzz()?;
    let target = options.target.name();
    let corpora = root().join("target/fuzz/corpus");
    let manifest = ["--manifest-path", "tests/fuzz/Cargo.toml"];
    let mut seeds = cargo(&["run", "--quiet", "--bin", "seeds"]);
    seeds
        .args(manifest)
        .args(["--target-dir", "target/fuzz", "--"]);
    exec(seeds.arg(&corpora))?;

    let mut fuzz = cargo(&["fuzz", "run", "--fuzz-dir", "tests/fuzz"]);
    // Without a sanitizer the stable compiler will do; there is no unsafe code to look for.
    fuzz.args(["--target-dir", "target/fuzz", "--sanitizer", "none", target]);
    fuzz.arg(corpora.join(target)).args(["--", "-max_len=2048"]);
    fuzz.arg(format!("-max_total_time={}", options.seconds));
    fuzz.arg("-print_final_stats=1");
    exec(with_tools(&mut fuzz)?)
}
