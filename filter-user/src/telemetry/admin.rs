//! The status socket of a role: whoever connects is told the status, and nothing is read.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::{UnixListener, UnixStream};
use tracing::{debug, error};

use super::status::Status;
use crate::file;

/// Binds the socket; one left behind by a process that is gone is replaced.
///
/// # Errors
///
/// Returns why the socket cannot be bound.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
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
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// Tells everyone who connects the status of the moment.
pub async fn serve(listener: UnixListener, status: impl Fn() -> Status) {
    loop {
        match listener.accept().await {
            Ok((mut stream, _)) => {
                let status = status();
                match tokio::time::timeout(WRITE_TIMEOUT, tell(&mut stream, &status)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => debug!(id = "status-not-served", %error, "status not told"),
                    Err(_) => debug!(id = "status-timed-out", "status not told in time"),
                }
            }
            Err(error) => {
                error!(id = "status-socket-failed", %error, "status socket");
                tokio::time::sleep(WRITE_TIMEOUT).await;
            }
        }
    }
}

async fn tell(stream: &mut UnixStream, status: &Status) -> io::Result<()> {
    let text = serde_json::to_vec(status)?;
    stream.write_all(&text).await?;
    stream.shutdown().await
}

/// A client that does not read is let go after this.
const WRITE_TIMEOUT: Duration = Duration::from_secs(1);
