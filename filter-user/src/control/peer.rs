//! Which role answers or asks at a socket: known by its user, whom the kernel names.

use std::io;
use std::os::unix::fs::MetadataExt as _;

use rustix::process::geteuid;

use crate::config::Paths;
use crate::role::Role;

/// Whether a process of this user is a role, or may stand in its place: root, or this process's own user.
///
/// The role's user is the one whose directory its sockets are in, if none but root could have made that.
/// Blocks: it looks at the file system.
///
/// # Errors
///
/// Returns why that cannot be found out.
pub(super) fn is_user_of(paths: &Paths, role: Role, user: u32) -> io::Result<bool> {
    let ourselves = geteuid().as_raw();
    if [0, ourselves].contains(&user) {
        return Ok(true);
    }
    let above = std::fs::metadata(&paths.run)?;
    let is_exclusive = [0, ourselves].contains(&above.uid()) && above.mode() & 0o022 == 0;
    let home = std::fs::symlink_metadata(paths.home(role))?;
    Ok(is_exclusive && home.is_dir() && home.uid() == user)
}
