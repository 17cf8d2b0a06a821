//! When a source is asked again.

use std::time::Duration;

/// How a source has fared so far.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    failures: u32,
}

impl Schedule {
    /// The time until the next attempt: the interval ± 10 %, so that a fleet does not ask in step.
    pub(super) fn after_success(&mut self, interval: Duration) -> Duration {
        self.failures = 0;
        vary(interval)
    }

    /// The time until the next attempt: a minute that doubles up to an hour, or as long as the
    /// server wishes, but never more than the interval.
    pub(super) fn after_failure(
        &mut self,
        interval: Duration,
        retry_after: Option<Duration>,
    ) -> Duration {
        let backoff = BACKOFF_MIN.saturating_mul(1 << self.failures.min(6));
        self.failures = self.failures.saturating_add(1);
        let wished = retry_after.unwrap_or_default();
        let pause = vary(backoff.min(BACKOFF_MAX));
        pause.max(wished).min(vary(interval))
    }
}

fn vary(pause: Duration) -> Duration {
    pause.mul_f64(fastrand::f64().mul_add(0.2, 0.9))
}

const BACKOFF_MIN: Duration = Duration::from_secs(60);
const BACKOFF_MAX: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_retried_sooner_but_ever_less_often() {
        let mut schedule = Schedule::default();
        let mut fail = || schedule.after_failure(HOURS_6, None);

        for seconds in [60, 120, 240, 480, 960, 1920, 3600, 3600] {
            assert!(is_about(seconds, fail()));
        }
        for _ in 0..100 {
            assert!(is_about(3600, fail()));
        }
        assert!(is_about(6 * 3600, schedule.after_success(HOURS_6)));
        assert!(is_about(60, schedule.after_failure(HOURS_6, None)));
        assert!(is_about(
            30,
            schedule.after_failure(Duration::from_secs(30), None)
        ));
    }

    #[test]
    fn a_server_is_obeyed_within_bounds() {
        let after = |seconds| {
            let wished = Some(Duration::from_secs(seconds));
            Schedule::default().after_failure(HOURS_6, wished)
        };

        assert!(is_about(60, after(0)));
        assert_eq!(after(7200), Duration::from_secs(7200));
        assert!(is_about(6 * 3600, after(u64::MAX)));
    }

    #[test]
    fn a_fleet_does_not_ask_in_step() {
        let pauses = (0..100).map(|_| Schedule::default().after_success(HOURS_6));
        let pauses: std::collections::BTreeSet<_> = pauses.collect();

        assert!(pauses.len() > 90);
    }

    fn is_about(seconds: u64, pause: Duration) -> bool {
        let plain = Duration::from_secs(seconds);
        pause >= plain.mul_f64(0.899) && pause <= plain.mul_f64(1.101)
    }

    const HOURS_6: Duration = Duration::from_secs(6 * 3600);
}
