//! Verifies that days of a hostile feed, while the clock is set to and fro, end with exactly the
//! right set. The refresh task and the HTTPS server are the real ones; only the hours are not.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use pullgate::config::Config;
use pullgate::observe::Metrics;
use pullgate::refresh::{Approval, Progress, Refresher};
use pullgate::snapshot;
use tests::PATIENCE;
use tests::feed::{
    API, Answer, Feed, IPS_V4, IPS_V6, api_answer, api_answer_of, api_answer_without,
};
use tests::net::{Host, Network};
use tests::pki::Pki;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

#[test]
fn seventy_two_hours_of_a_hostile_feed_end_with_exactly_the_right_set() {
    let (network, feed) = rig(Answer::Nothing);
    let (mut taken, mut refused) = (0, 0);
    for seed in 0..SEEDS {
        std::fs::create_dir(network.path(format!("state-{seed}"))).unwrap();
        let config = configuration(&network, &feed, seed);
        let counts = on_paused_time(&network, simulate(&feed, config, seed));
        taken += counts.0;
        refused += counts.1;
    }

    // It was a hostile feed, and now and then it was not.
    assert!(
        taken > 50 && refused > 300,
        "{taken} taken, {refused} refused"
    );
}

#[test]
fn a_wall_clock_that_is_set_back_and_forth_takes_nothing_from_the_grace() {
    let less = api_answer_without(LOST);
    let (network, feed) = rig(Answer::Body(less));
    std::fs::create_dir(network.path("state-0")).unwrap();
    let config = configuration(&network, &feed, 0);
    on_paused_time(&network, async {
        let mut run = Run::start(config);
        let first = run.attempt().await.elapsed;
        loop {
            // Ten years forth, ten years back.
            let years = if run.attempts.is_multiple_of(2) {
                1_400_000_000
            } else {
                1_750_000_000
            };
            WALL_CLOCK.store(years, Ordering::Relaxed);
            let attempt = run.advance().await;
            let is_kept = run.active_set().contains(LOST);
            assert_eq!(
                is_kept,
                attempt.elapsed - first < HOUR * 24,
                "{:?}",
                attempt.elapsed
            );
            if !is_kept {
                break;
            }
        }
        assert!(run.attempts > 3);
    });
}

#[test]
fn restarts_while_the_wall_clock_jumps_end_no_grace() {
    let less = api_answer_without(LOST);
    let (network, feed) = rig(Answer::Body(less));
    std::fs::create_dir(network.path("state-0")).unwrap();
    for round in 0..10 {
        // A year each time, as if the clock had been wrong while the role did not run.
        WALL_CLOCK.store(1_700_000_000 + round * 31_536_000, Ordering::Relaxed);
        let config = configuration(&network, &feed, 0);
        on_paused_time(&network, async {
            let mut run = Run::start(config);
            run.attempt().await;
            assert!(run.active_set().contains(LOST), "{round}");
        });
    }
}

#[test]
fn a_reload_counts_for_the_refresh_that_comes_with_it() {
    let many: Vec<_> = (0..80).map(|n| format!("64.0.{n}.0/24")).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    let many = api_answer(&many, &[]);
    let (network, feed) = rig(Answer::Body(many));
    std::fs::create_dir(network.path("state-0")).unwrap();
    let with = |entries: usize| {
        let mut config = configuration(&network, &feed, 0);
        config.live.ranges.limits.entries = entries;
        config
    };
    on_paused_time(&network, async {
        let mut run = Run::start(with(4096));
        assert_eq!(run.attempt().await.outcome, "Changed");
        for _ in 0..20 {
            for (entries, outcome) in [(64, "Rejected"), (4096, "Unchanged")] {
                run.config.send_replace(Arc::new(with(entries)));
                assert_eq!(run.attempt().await.outcome, outcome);
            }
        }
    });
}

#[test]
fn a_snapshot_that_somebody_removes_or_spoils_is_written_anew() {
    let (network, feed) = rig(Answer::Nothing);
    std::fs::create_dir(network.path("state-0")).unwrap();
    let config = configuration(&network, &feed, 0);
    play(&feed, &mut fastrand::Rng::with_seed(0), HOUR * 72);
    on_paused_time(&network, async {
        let mut run = Run::start(config);
        run.attempt().await;
        let whole = std::fs::read(&run.snapshot).unwrap();
        let aside = run.snapshot.with_extension("json.corrupt");

        std::fs::remove_file(&run.snapshot).unwrap();
        run.look_until_snapshot_is(&whole).await;
        assert!(!aside.exists());

        std::fs::write(&run.snapshot, "{").unwrap();
        run.look_until_snapshot_is(&whole).await;
        assert_eq!(std::fs::read(aside).unwrap(), b"{");
    });
}

/// A host, and a feed on it.
fn rig(answer: Answer) -> (Arc<Network>, Feed) {
    let network = Arc::new(Network::new());
    let pki = Pki::new(&network.path("pki"));
    let feed = Feed::start(&network, &pki, "127.0.0.1", answer);
    (network, feed)
}

/// Returns how many lists were taken in, and how many attempts came to nothing.
async fn simulate(feed: &Feed, config: Config, seed: u64) -> (usize, usize) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut model = Model::default();
    let mut refused = 0;
    let mut next = play(feed, &mut random, Duration::ZERO);
    let mut run = Run::start(config);
    let mut attempt = run.attempt().await;
    loop {
        match (attempt.outcome, next) {
            ("Changed" | "Unchanged", Some(list)) => model.take(attempt.elapsed, list),
            (outcome, list) => {
                assert_eq!(list, None, "the truth was refused: {outcome}");
                refused += 1;
            }
        }
        assert_eq!(run.active_set(), model.set(), "{}", attempt.outcome);
        if attempt.next > HOUR * 72 {
            break;
        }
        next = play(feed, &mut random, attempt.next);
        // Up to three years, forth and back.
        WALL_CLOCK.store(random.u64(1_700_000_000..1_800_000_000), Ordering::Relaxed);
        attempt = run.advance().await;
    }

    let mut right = published();
    right.insert(GAINED);
    right.remove(LOST);
    assert!(right.contains(LOST_OF_LATE));
    let mut set = run.active_set();
    // There or not, as the dice fell; the model has said which.
    set.remove(FLAPPING);
    assert_eq!(set, right);
    (model.taken.len(), refused)
}

/// A refresh task in a time of its own.
struct Run {
    begin: Instant,
    attempts: u64,
    next: Instant,
    received: watch::Receiver<Vec<Progress>>,
    config: watch::Sender<Arc<Config>>,
    _approve: mpsc::Sender<Approval>,
    snapshot: PathBuf,
}

/// What one attempt came to; times are since the run began.
struct Attempt {
    outcome: &'static str,
    elapsed: Duration,
    next: Duration,
}

impl Run {
    fn start(config: Config) -> Self {
        let snapshot = config.boot.paths.snapshot();
        let before = snapshot::load(&snapshot, &config.live.ranges).unwrap();
        let (config, receiver) = watch::channel(Arc::new(config));
        let (progress, received) = watch::channel(Vec::new());
        let (approve, approvals) = mpsc::channel(1);
        let refresher = Refresher {
            config: receiver,
            metrics: Metrics::default(),
            now: wall_clock,
            snapshot: snapshot.clone(),
            idle: Arc::new(|_config, _grace| Box::pin(async { None })),
            wake: Arc::new(Notify::new()),
            approvals,
            progress,
        };
        // It ends with the runtime.
        tokio::spawn(refresher.run(before));
        let begin = Instant::now();
        Self {
            begin,
            attempts: 0,
            next: begin,
            received,
            config,
            _approve: approve,
            snapshot,
        }
    }

    /// Waits for the attempt that is due. The server's answer takes real time, which is none to
    /// speak of.
    async fn attempt(&mut self) -> Attempt {
        tokio::time::resume();
        let before = self.attempts;
        let is_new =
            |received: &Vec<Progress>| received.iter().any(|received| received.attempts > before);
        let made = tokio::time::timeout(PATIENCE, self.received.wait_for(is_new)).await;
        let made = made.unwrap().unwrap()[0].clone();
        tokio::time::pause();
        self.attempts = made.attempts;
        self.next = made.next;
        Attempt {
            outcome: made.last.unwrap().outcome,
            elapsed: self.begin.elapsed(),
            next: made.next - self.begin,
        }
    }

    /// Lets the time until the next attempt pass, and waits for it.
    async fn advance(&mut self) -> Attempt {
        let pause = self.next.saturating_duration_since(Instant::now());
        tokio::time::advance(pause).await;
        self.attempt().await
    }

    /// Lets the time pass in which the task looks at the snapshot, and waits for what a thread
    /// writes then.
    async fn look_until_snapshot_is(&self, whole: &[u8]) {
        tokio::time::advance(Duration::from_secs(61)).await;
        let start = std::time::Instant::now();
        while std::fs::read(&self.snapshot).ok().as_deref() != Some(whole) {
            assert!(start.elapsed() < PATIENCE);
            tokio::task::yield_now().await;
        }
    }

    /// The active set, as everybody reads it from disk.
    fn active_set(&self) -> BTreeSet<&'static str> {
        active_set(&self.snapshot, &self.config.borrow())
    }
}

/// Runs in the origin, in a time that passes by order only.
fn on_paused_time<T: Send>(network: &Network, future: impl Future<Output = T> + Send) -> T {
    network.on(Host::Origin, || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().start_paused(true).build().unwrap();
        runtime.block_on(future)
    })
}

/// Prepares the answer to the attempt at this time; returns the list, if it is an honest one.
fn play(feed: &Feed, random: &mut fastrand::Rng, at: Duration) -> Option<BTreeSet<&'static str>> {
    let truth = truth(at);
    let family = |is_v6| {
        truth
            .iter()
            .filter(move |net| net.contains(':') == is_v6)
            .copied()
    };
    let (v4, v6): (Vec<_>, Vec<_>) = (family(false).collect(), family(true).collect());
    let honest = api_answer_of(&v4, &v6);
    let with = |net: &'static str| {
        let v4: Vec<_> = v4.iter().copied().chain([net]).collect();
        Answer::Body(api_answer_of(&v4, &v6))
    };
    // What is lost at hour 20 must be seen to be missing in time, and gone at the end.
    let is_decisive = (HOUR * 20..HOUR * 27).contains(&at) || at > HOUR * 71;
    if is_decisive || random.u8(0..100) < 15 {
        feed.answer(Answer::Body(honest));
        return Some(truth);
    }
    let half = api_answer_of(&v4[..v4.len() / 2], &v6);
    let other = api_answer_of(&["65.0.0.0/13"], &["2a00::/29"]);
    feed.answer(match random.u8(0..16) {
        0 => Answer::Body(half),
        1 => Answer::Body(other),
        2 => with("0.0.0.0/0"),
        3 => with("10.0.0.0/16"),
        4 => with("131.0.72.1/22"),
        5 => with("131.0.72.0/222400:cb00::/32"),
        6 => Answer::Body(String::new()),
        7 => Answer::Body("{}".to_owned()),
        8 => Answer::Body("<html>".to_owned()),
        9 => Answer::Body(honest[..honest.len() / 2].to_owned()),
        10 => Answer::Truncated(honest),
        11 => Answer::Status(429, "retry-after: 1\r\n"),
        12 => Answer::Status(301, "location: http://127.0.0.1/\r\n"),
        13 => Answer::With("content-encoding: gzip\r\n", honest.into_bytes()),
        14 => Answer::Body(honest.replace("true", "false")),
        _ => Answer::Nothing,
    });
    None
}

/// What the publisher lists at this time.
fn truth(at: Duration) -> BTreeSet<&'static str> {
    let mut list = published();
    if at >= HOUR * 10 {
        list.insert(GAINED);
    }
    if at >= HOUR * 20 {
        list.remove(LOST);
    }
    if (HOUR * 30..HOUR * 60).contains(&at) && at.as_secs() / 3600 % 8 < 4 {
        list.insert(FLAPPING);
    }
    if at >= HOUR * 60 {
        list.remove(LOST_OF_LATE);
    }
    list
}

/// The rule, by all of history: what was listed stays until it was missing for the grace.
#[derive(Default)]
struct Model {
    taken: Vec<(Duration, BTreeSet<&'static str>)>,
}

impl Model {
    fn take(&mut self, at: Duration, list: BTreeSet<&'static str>) {
        self.taken.push((at, list));
    }

    fn set(&self) -> BTreeSet<&'static str> {
        // Before the first list, and with it, there is the baseline.
        let first = (Duration::ZERO, published());
        let taken: Vec<_> = [&first].into_iter().chain(&self.taken).collect();
        let now = taken.last().unwrap().0;
        let ever = taken.iter().flat_map(|(_, list)| list.iter().copied());
        let is_kept = |net: &&str| {
            let last = taken
                .iter()
                .rposition(|(_, list)| list.contains(*net))
                .unwrap();
            let missing_since = taken.get(last + 1).map(|(at, _)| *at);
            missing_since.is_none_or(|since| now - since < HOUR * 24)
        };
        ever.collect::<BTreeSet<_>>()
            .into_iter()
            .filter(is_kept)
            .collect()
    }
}

fn active_set(snapshot: &Path, config: &Config) -> BTreeSet<&'static str> {
    let active_set = snapshot::load(snapshot, &config.live.ranges).unwrap();
    let known: BTreeSet<_> = published().into_iter().chain([GAINED, FLAPPING]).collect();
    let nets = active_set.set().iter().map(|net| {
        let text = net.to_string();
        let known = known.iter().find(|known| ***known == text);
        assert!(known.is_some(), "{text} was let in");
        *known.unwrap()
    });
    nets.collect()
}

fn configuration(network: &Network, feed: &Feed, seed: u64) -> Config {
    let text = format!(
        "[paths]\nstate = \"state-{seed}\"\n[filter]\ninterfaces = \"auto\"\n\
         [ranges]\nsources = [{{ url = \"{}\", ca_file = \"pki/web-ca.pem\", \
         like = \"cloudflare\" }}]\n",
        feed.url(API)
    );
    let file: PathBuf = network.path("pullgate.toml");
    Config::parse(&file, &text).unwrap()
}

fn published() -> BTreeSet<&'static str> {
    IPS_V4.lines().chain(IPS_V6.lines()).collect()
}

/// A clock that is set to and fro.
fn wall_clock() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(WALL_CLOCK.load(Ordering::Relaxed))
}

static WALL_CLOCK: AtomicU64 = AtomicU64::new(1_750_000_000);
const HOUR: Duration = Duration::from_secs(3600);
const GAINED: &str = "64.0.0.0/24";
const FLAPPING: &str = "64.1.0.0/24";
const LOST: &str = "131.0.72.0/22";
const LOST_OF_LATE: &str = "197.234.240.0/22";
const SEEDS: u64 = 10;
