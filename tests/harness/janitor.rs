//! The janitor: a child process that cleans up when we are gone, however we went.
//!
//! It waits for the end of a pipe that only this process holds. A panic, Ctrl-C or SIGKILL all
//! close it, so nothing that a test made outlives the test.

use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Cleans up when dropped, or when this process dies.
pub(crate) struct Janitor {
    child: Child,
}

impl Janitor {
    /// Takes charge of namespaces and of a directory with a bpffs, before they are made.
    pub(crate) fn new(namespaces: &[&str], directory: &Path) -> Self {
        let child = Command::new("setsid")
            .args(["sh", "-c", SCRIPT, "janitor"])
            .arg(directory)
            .args(namespaces)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child }
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        // A failure to clean up is not worth a second panic, and `ip netns list` will show it.
        drop(self.child.wait());
    }
}

/// Links go with the bpffs they are pinned on, veth pairs with their namespaces.
const SCRIPT: &str = r#"
directory=$1; shift
while read -r _; do :; done
for namespace in "$@"; do
    kill -9 $(ip netns pids "$namespace" 2>/dev/null) 2>/dev/null
done
# A killed process may not be gone yet.
for try in 1 2 3 4 5 6 7 8 9; do
    group="$directory/cgroup/${directory##*/}"
    find "$group" -depth -type d -exec rmdir {} \; 2>/dev/null
    [ -e "$group" ] || break
    sleep 0.$try
done
umount -l "$directory/cgroup" 2>/dev/null
umount -l "$directory/bpf" 2>/dev/null
umount -l "$directory/state" 2>/dev/null
for namespace in "$@"; do
    ip netns del "$namespace" 2>/dev/null
done
rm -rf "$directory"
"#;
