//! UNIX sockets of ours: bound where no other instance answers.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;

use tokio::net::UnixListener;

use super::file;

/// Binds the socket with these permissions; one left behind by a process that is gone is replaced.
///
/// # Errors
///
/// Returns why the socket cannot be bound.
pub fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let is_gone = |kind| matches!(kind, ErrorKind::ConnectionRefused | ErrorKind::NotFound);
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => {
            let text = "another instance of this role answers there; stop that one first";
            return Err(io::Error::new(ErrorKind::AddrInUse, text));
        }
        // Who may not ask does not know whether somebody is behind it.
        Err(error) if !is_gone(error.kind()) => return Err(error),
        Err(_) => {}
    }
    if fs::symlink_metadata(path).is_ok_and(|found| !found.file_type().is_socket()) {
        let text = "there is something else than a socket, which is not ours to replace";
        return Err(io::Error::new(ErrorKind::AlreadyExists, text));
    }
    file::remove(path)?;
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(listener)
}
