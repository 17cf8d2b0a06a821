//! A process beside those that are measured, which always computes.

use std::io::Read as _;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How a busy process ranks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Priority {
    /// As the proxies do.
    Normal,
    /// Behind all others.
    Lowest,
}

impl Priority {
    pub(crate) const ALL: [Self; 2] = [Self::Normal, Self::Lowest];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Lowest => "nice 19",
        }
    }
}

/// A process that always computes; it ends when dropped.
pub(crate) struct Busy(Child);

impl Busy {
    pub(crate) fn start(priority: Priority) -> Self {
        let nice = match priority {
            Priority::Normal => "0",
            Priority::Lowest => "19",
        };
        let mut command = Command::new("timeout");
        // A benchmark that is killed leaves it for so long.
        command.args([
            BUSY_SECONDS,
            "nice",
            "-n",
            nice,
            "sh",
            "-c",
            "echo; while :; do :; done",
        ]);
        let mut busy = Self(command.stdout(Stdio::piped()).spawn().unwrap());
        let said = busy.0.stdout.as_mut().unwrap().read_exact(&mut [0]);
        // It computes from now on.
        said.unwrap();
        busy
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        // timeout(1) passes this on.
        kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM).unwrap();
        self.0.wait().unwrap();
    }
}

/// The longest that it computes.
const BUSY_SECONDS: &str = "60";
