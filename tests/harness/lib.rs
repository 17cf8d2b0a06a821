//! The rig of the tests and the lab: network namespaces, frames, a PKI, web servers, a range
//! feed, and pullgate itself as processes. Nothing is mocked.
//!
//! [`Lab`] puts the parts together; [`scenarios`] plays them against each other.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]
#![expect(clippy::panic, reason = "a broken rig must stop the test")]

pub mod client;
pub mod contenders;
pub mod daemon;
pub mod debian;
pub mod exchange;
pub mod feed;
pub mod forgery;
pub mod gate;
mod janitor;
pub mod lab;
pub mod manual;
pub mod net;
pub mod oracle;
pub mod origin;
pub mod pairing;
pub mod pki;
pub mod probing;
pub mod proxies;
pub mod scenarios;
pub mod sites;
pub mod snippets;
pub mod steered;
pub mod traffic;
pub mod upstream;
pub mod web;
pub mod wire;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};

pub use self::gate::Rig;
pub use self::lab::{Lab, Plan};
pub use self::pairing::Pairing;
pub use self::steered::Steered;

/// Waits until `condition` yields a value, and gives up with `what` after [`PATIENCE`].
///
/// For what announces itself by no event: a counter in the kernel, a server's first accept.
pub fn eventually<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    match within_patience(condition) {
        Some(value) => value,
        None => panic!("not within {PATIENCE:?}: {what}"),
    }
}

/// The value that `condition` yields within [`PATIENCE`], if it does.
pub(crate) fn within_patience<T>(mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let value = condition();
        if value.is_some() || Instant::now() >= deadline {
            return value;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a shell makes of SIGINT.
const INTERRUPTED: i32 = 130;
/// How long anything in a test may take that is expected to happen.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Notes that a test was skipped and why; `cargo xtask test` shows and counts it.
pub fn skip(test: &str, reason: &str) {
    let line = format!("{test}: {reason}\n");
    let Some(path) = std::env::var_os("PULLGATE_SKIPS") else {
        panic!("{line}run `cargo xtask test`, which installs what is missing");
    };
    let mut file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .unwrap();
    file.write_all(line.as_bytes()).unwrap();
}

/// Ends this process at SIGINT and SIGTERM. The janitor cleans up behind it however it ends.
///
/// To be called before there is a second thread.
///
/// # Errors
///
/// Returns why signals cannot be blocked.
pub fn exit_on_interrupt() -> anyhow::Result<()> {
    // Every thread inherits the mask, so that the one below alone receives them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    std::thread::spawn(move || {
        match signals.wait() {
            Ok(_) | Err(_) => {}
        }
        std::process::exit(INTERRUPTED);
    });
    Ok(())
}

/// How often to do it: `cargo xtask test --long` has time for more.
#[must_use]
pub fn times(usual: u32, long: u32) -> u32 {
    match std::env::var_os("PULLGATE_LONG") {
        Some(_) => long,
        None => usual,
    }
}

/// Asserts that every row is as expected, and shows those that are not.
pub fn assert_matched(rows: &[scenarios::Row]) {
    assert!(!rows.is_empty());
    let wrong: Vec<_> = rows.iter().filter(|row| !row.matched()).cloned().collect();
    assert!(wrong.is_empty(), "\n{}", scenarios::Table(&wrong));
}
