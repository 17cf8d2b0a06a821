//! UNIX sockets of ours, bound where no other instance answers; and sockets that others hand to us.

use std::fs;
use std::io::{self, ErrorKind, IoSlice};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use socket2::{Protocol, SockRef};
use tokio::net::UnixListener;
use tracing::warn;

use super::file::{self, FileId};

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

/// Sends bytes, and listening sockets beside them (SCM_RIGHTS, unix(7)).
///
/// # Errors
///
/// Returns the operating system's error, or that there are more sockets than [`SOCKETS_MAX`].
pub fn send_with(stream: impl AsFd, bytes: &[u8], sockets: &[TcpListener]) -> io::Result<()> {
    let descriptors: Vec<_> = sockets.iter().map(|socket| socket.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("too many listening sockets"));
    }
    let message = [IoSlice::new(bytes)];
    sendmsg(stream, &message, &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The path of a socket that this process has bound; removed when dropped.
#[derive(Debug)]
pub struct BoundPath {
    path: PathBuf,
    ours: Option<FileId>,
}

impl BoundPath {
    /// That of a socket that was bound there just now.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            ours: file::file_id(path),
        }
    }
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        let Self { path, ours } = self;
        // A successor may have put its own there.
        if file::file_id(path) != *ours {
            return;
        }
        if let Err(error) = fs::remove_file(&path) {
            warn!(id = "socket-not-removed", socket = %path.display(), %error, "socket not removed");
        }
    }
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
        // Without permission to connect it is not known whether a process listens.
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

/// Sockets in a message.
pub const SOCKETS_MAX: usize = 64;
