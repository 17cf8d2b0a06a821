//! CPU time, in microseconds.

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// What processes have used.
pub(crate) fn of_processes(processes: impl IntoIterator<Item = i32>) -> f64 {
    let clocks = processes.into_iter().filter_map(|pid| {
        let clock = clock_getcpuclockid(Pid::from_raw(pid)).ok()?;
        Some(microseconds(clock.now().ok()?))
    });
    clocks.sum()
}

/// What this thread has used.
pub(crate) fn of_thread() -> f64 {
    microseconds(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap())
}

fn microseconds(time: TimeSpec) -> f64 {
    time.tv_sec() as f64 * 1e6 + time.tv_nsec() as f64 / 1e3
}
