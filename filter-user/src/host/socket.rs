//! UNIX sockets of ours, bound where no other instance answers; and sockets that others hand to us.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;

use socket2::{Protocol, SockRef};
use tokio::net::UnixListener;

use super::file;

/// Where a descriptor of which nothing is known listens.
///
/// # Errors
///
/// Returns that it is no listening TCP socket.
pub fn listening_address(descriptor: &impl AsFd) -> io::Result<SocketAddr> {
    let reference = SockRef::from(descriptor);
    let is_listener = reference.is_listener()? && reference.protocol()? == Some(Protocol::TCP);
    let address = reference.local_addr()?.as_socket();
    address.filter(|_| is_listener).ok_or_else(|| {
        let text = "it is no listening TCP socket";
        io::Error::new(ErrorKind::InvalidInput, text)
    })
}

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
