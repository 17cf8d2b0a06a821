//! The status socket of a role: whoever connects is told the status, and nothing is read.

use std::io::{self};
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::{UnixListener, UnixStream};
use tracing::{debug, error};

use super::protocol::Status;

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
