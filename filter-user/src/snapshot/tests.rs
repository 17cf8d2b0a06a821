//! Verifies that a snapshot is what was saved, or nothing that anybody is let in by.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::config::Config;
use crate::ranges::guard::Documentation;
use crate::ranges::{Feed, Vanished};

#[test]
fn what_was_saved_is_loaded() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ranges.json");

    save(&path, &fetched(), &GuardLimits::default()).unwrap();

    assert_eq!(load(&path, &config("").live.ranges).unwrap(), fetched());
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
}

#[test]
fn without_a_snapshot_the_baseline_is_active() {
    let directory = tempfile::tempdir().unwrap();

    let active = load(
        &directory.path().join("ranges.json"),
        &config("").live.ranges,
    )
    .unwrap();

    assert_eq!(active.lists()[0].origin, Origin::Baseline);
    assert_eq!(active.set().len(), 15 + 7);
}

#[test]
fn a_source_without_a_baseline_lets_nobody_in_before_it_was_asked() {
    let path = Path::new("/nonexistent/ranges.json");
    let set = |lines| {
        load(path, &config(lines).live.ranges)
            .unwrap()
            .set()
            .clone()
    };

    assert!(set("sources = [\"fastly\"]").is_empty());
    assert_eq!(set("sources = [\"fastly\", \"cloudflare\"]").len(), 15 + 7);
    assert_eq!(set("static = [\"64.0.0.0/24\"]\nonly = true").len(), 1);
}

#[test]
fn a_source_that_is_configured_no_more_is_not_active_any_more() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ranges.json");
    save(&path, &fetched(), &GuardLimits::default()).unwrap();

    let active = load(&path, &config("sources = [\"fastly\"]").live.ranges).unwrap();

    assert!(active.set().is_empty());
}

#[test]
fn a_snapshot_that_was_tampered_with_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ranges.json");
    let ranges = config("").live.ranges;
    let limits = GuardLimits::default();
    save(&path, &fetched(), &limits).unwrap();
    let good = fs::read_to_string(&path).unwrap();

    for bad in [
        good.replace("173.245.48.0/20", "0.0.0.0/0"),
        good.replace("173.245.48.0/20", "64.0.0.0/20"),
        good.replace("\"version\": 2", "\"version\": 3"),
        good.replace("\"agreed\": false", "\"agreed\": true"),
        good[..good.len() / 2].to_owned(),
        String::new(),
    ] {
        fs::write(&path, bad).unwrap();
        assert!(matches!(
            load(&path, &ranges),
            Err(SnapshotError::Corrupt { .. })
        ));
    }
}

#[test]
fn a_snapshot_is_spoilt_by_accidents_and_not_by_a_lowered_limit() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ranges.json");
    let limits = GuardLimits::default();
    assert!(!is_whole(&path, &limits));
    save(&path, &fetched(), &limits).unwrap();
    assert!(is_whole(&path, &limits));

    let lowered = GuardLimits {
        entries: 7,
        ..limits.clone()
    };
    assert!(load(&path, &config("").live.ranges).is_ok());
    assert!(is_whole(&path, &lowered));

    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("173.245", "173.246")).unwrap();
    assert!(!is_whole(&path, &limits));
}

#[test]
fn a_snapshot_of_what_nobody_may_list_is_refused_whatever_its_checksum() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ranges.json");
    let lenient = GuardLimits {
        documentation: Documentation::Accept,
        ..GuardLimits::default()
    };
    let feed = Feed::from_texts(["192.0.2.0/24"]).unwrap();
    let mut list = fetched().lists()[0].clone();
    list.known = SourceRanges::new(RangeSet::check(feed, Families::Either, &lenient).unwrap());
    save(
        &path,
        &ActiveRanges::new(vec![list], &lenient).unwrap(),
        &lenient,
    )
    .unwrap();

    let error = load(&path, &config("").live.ranges).unwrap_err();

    assert!(chain(&error).contains("reserved"), "{}", chain(&error));
}

#[test]
fn a_corrupt_snapshot_is_set_aside_and_not_lost() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ranges.json");
    for broken in ["one", "another"] {
        fs::write(&path, broken).unwrap();

        save(&path, &fetched(), &GuardLimits::default()).unwrap();

        let aside = directory.path().join("ranges.json.corrupt");
        assert_eq!(fs::read_to_string(aside).unwrap(), broken);
        assert_eq!(load(&path, &config("").live.ranges).unwrap(), fetched());
    }
}

/// A process that saves one list and another in turn is killed, 1,000 times at some moment.
#[test]
fn kill_9_while_saving_leaves_the_old_snapshot_or_the_new_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ranges.json");
    let ranges = config("").live.ranges;
    let [one, other] = [fetched(), another()];
    save(&path, &one, &ranges.limits).unwrap();
    let (mut seen_one, mut seen_other, mut half_written) = (0, 0, 0);
    for round in 0..ROUNDS {
        let mut saver = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "snapshot::tests::saver", "--nocapture"])
            .env(SAVER, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = BufReader::new(saver.stdout.take().unwrap());
        let begun = output.lines().any(|line| line.unwrap().ends_with(BEGUN));
        assert!(begun, "the saver has not begun");
        // Any moment of the some milliseconds that saving takes, twice.
        let moment = Duration::from_micros(u64::from(round * 7919 % 8000));
        let until = std::time::Instant::now() + moment;
        while std::time::Instant::now() < until {
            std::hint::spin_loop();
        }
        saver.kill().unwrap();
        saver.wait().unwrap();

        half_written += u32::from(path.with_extension("json.new").exists());
        let loaded = load(&path, &ranges).unwrap();
        assert!(loaded == one || loaded == other);
        seen_one += u32::from(loaded == one);
        seen_other += u32::from(loaded == other);
    }
    // It was killed in the midst of things, not before or behind them.
    let seen = (seen_one, seen_other, half_written);
    assert!(
        seen_one > 0 && seen_other > 0 && half_written > 0,
        "{seen:?}"
    );
    save(&path, &one, &ranges.limits).unwrap();
    assert!(!path.with_extension("json.new").exists());
}

/// Not a test by itself: the process that the one above kills.
#[test]
fn saver() {
    let Some(path) = std::env::var_os(SAVER) else {
        return;
    };
    let path = Path::new(&path);
    let lists = [another(), fetched()];
    writeln!(io::stdout(), "\n{BEGUN}").unwrap();
    for list in lists.iter().cycle().take(1_000_000) {
        save(path, list, &GuardLimits::default()).unwrap();
    }
}

pub(super) fn config(ranges: &str) -> Config {
    let text = format!("[filter]\ninterfaces = \"auto\"\n[ranges]\n{ranges}");
    Config::parse(Path::new("/etc/pullgate/pullgate.toml"), &text).unwrap()
}

pub(super) fn fetched() -> ActiveRanges {
    let since = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let vanished = Vanished {
        range: "173.245.48.0/20".parse().unwrap(),
        missing_for: Duration::from_millis(1500),
        approved: false,
    };
    let set = embedded(&GuardLimits::default()).unwrap();
    let list = List {
        source: "cloudflare".to_owned(),
        known: SourceRanges::with_vanished(set, vec![vanished]),
        origin: Origin::Fetched {
            way: "cloudflare-api".to_owned(),
            at: since,
        },
    };
    ActiveRanges::new(vec![list], &GuardLimits::default()).unwrap()
}

fn another() -> ActiveRanges {
    let mut list = fetched().lists()[0].clone();
    list.known = SourceRanges::new(list.known.set().clone());
    ActiveRanges::new(vec![list], &GuardLimits::default()).unwrap()
}

const ROUNDS: u32 = 1000;
const SAVER: &str = "PULLGATE_TEST_SAVER";
const BEGUN: &str = "begun";
