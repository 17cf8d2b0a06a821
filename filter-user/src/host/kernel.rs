//! Which Linux this is: what a message says, and what it may advise; and whether its clock is kept.

use std::mem::MaybeUninit;

/// The release, as `uname -r` prints it.
#[must_use]
pub fn release() -> String {
    let name = rustix::system::uname();
    name.release().to_string_lossy().into_owned()
}

/// Whether this kernel is of that version or a later one. One whose release has another form counts
/// as new.
#[must_use]
pub fn is_at_least(wanted: (u32, u32)) -> bool {
    version(&release()).is_none_or(|found| found >= wanted)
}

/// Whether a program keeps the clock in time, as the kernel knows it (adjtimex(2), `TIME_ERROR`). None, if it may not be
/// asked.
#[must_use]
#[expect(unsafe_code, reason = "rustix and nix have no adjtimex")]
pub fn is_clock_kept() -> Option<bool> {
    let mut asked = MaybeUninit::<libc::timex>::zeroed();
    // SAFETY: the kernel reads and writes one `timex` there; with no bit of `modes` set, it changes nothing.
    let state = unsafe { libc::adjtimex(asked.as_mut_ptr()) };
    (state >= 0).then_some(state != libc::TIME_ERROR)
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let major = numbers.next()?.parse().ok()?;
    let minor = numbers.next()?.parse().ok()?;
    Some((major, minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_distributions_are_read() {
        assert_eq!(version("5.10.0-46-amd64"), Some((5, 10)));
        assert_eq!(version("6.12.117+deb13-amd64"), Some((6, 12)));
        assert_eq!(version("5.14.0-503.el9"), Some((5, 14)));
        assert_eq!(version("next"), None);
        assert!(is_at_least((5, 9)));
        assert!(!is_at_least((99, 0)));
    }
}
