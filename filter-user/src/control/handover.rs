//! The gate's listening sockets on their way to the filter, which steers connections to them.
//!
//! ```text
//! gate ── whose addresses it connects from, with the sockets (SCM_RIGHTS, unix(7)) ─▶ filter
//!      ◀─ "ok\n", or a sentence that says why not ───────────
//! ```
//! The connection is held for as long as what was handed over counts: its end lets the gate begin again.

use std::io::{self, ErrorKind, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::peer;
use crate::config::{ClientAddress, Paths};
use crate::host::socket::{self, BoundPath, SOCKETS_MAX};
use crate::role::Role;

/// Where the filter takes sockets; its file goes with it.
pub struct HandoverListener {
    listener: UnixListener,
    _path: BoundPath,
}

impl HandoverListener {
    /// Binds it, for the group that the roles share; which of them is known once it has connected.
    ///
    /// # Errors
    ///
    /// Returns the operating system's error.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let listener = socket::bind(path, 0o660)?;
        Ok(Self {
            listener,
            _path: BoundPath::new(path),
        })
    }

    /// The next one that may hand sockets over; none, if it is neither the gate nor root.
    ///
    /// # Errors
    ///
    /// Returns the operating system's error, or why it cannot be found out who it is.
    pub async fn accept(&self, paths: &Paths) -> io::Result<Result<Handover, NotTheGate>> {
        let (stream, _) = self.listener.accept().await?;
        let user = stream.peer_cred()?.uid();
        let paths = paths.clone();
        let is_gate = spawn_blocking(move || peer::is_user_of(&paths, Role::Gate, user));
        if is_gate.await.map_err(io::Error::other)?? {
            Ok(Ok(Handover(stream)))
        } else {
            Ok(Err(NotTheGate { user }))
        }
    }
}

/// Another user's process that connected.
#[derive(Clone, Copy, Debug)]
pub struct NotTheGate {
    /// The user.
    pub user: u32,
}

/// What the gate hands over.
#[derive(Debug)]
pub struct Offer {
    /// Descriptors of which nothing is known.
    pub descriptors: Vec<OwnedFd>,
    /// Which address it shows the web server.
    pub client_address: ClientAddress,
}

/// The gate, connected.
pub struct Handover(UnixStream);

impl Handover {
    /// What it hands over.
    ///
    /// # Errors
    ///
    /// Returns the operating system's error, or that nothing comes in time.
    pub async fn receive(&self) -> io::Result<Offer> {
        let receiving = self.0.async_io(Interest::READABLE, || receive(&self.0));
        timeout(PATIENCE, receiving).await?
    }

    /// Answers, and returns when the gate has gone.
    ///
    /// # Errors
    ///
    /// Returns the operating system's error.
    pub async fn answer(mut self, answer: &Result<(), String>) -> io::Result<()> {
        let text = match answer {
            Ok(()) => DONE,
            Err(problem) => problem,
        };
        timeout(PATIENCE, self.0.write_all(format!("{text}\n").as_bytes())).await??;
        if answer.is_ok() {
            ended(&mut self.0).await;
        }
        Ok(())
    }
}

/// What was handed over, for as long as it counts.
pub struct HandedOver(UnixStream);

impl HandedOver {
    /// Returns when it counts no more: the filter has ended, or steers by other settings.
    pub async fn ended(mut self) {
        ended(&mut self.0).await;
    }
}

/// Hands listening sockets over to the filter.
///
/// # Errors
///
/// Returns why it does not take them.
pub async fn hand_over(
    paths: &Paths,
    sockets: &[TcpListener],
    client_address: ClientAddress,
) -> io::Result<HandedOver> {
    let path = paths.handover_socket();
    let message = match client_address {
        ClientAddress::Loopback => FROM_LOOPBACK,
        ClientAddress::Transparent => AS_CLIENTS,
    };
    let handing = async {
        let mut stream = UnixStream::connect(&path).await?;
        let user = stream.peer_cred()?.uid();
        let checked = paths.clone();
        let is_filter = spawn_blocking(move || peer::is_user_of(&checked, Role::Filter, user));
        if !is_filter.await.map_err(io::Error::other)?? {
            let text = format!("user {user} answers there, and is not the filter's");
            return Err(io::Error::other(text));
        }
        stream
            .async_io(Interest::WRITABLE, || {
                socket::send_with(&stream, &[message], sockets)
            })
            .await?;
        let mut answer = String::new();
        let mut byte = [0];
        while answer.len() < ANSWER_MAX && stream.read(&mut byte).await? == 1 && byte != *b"\n" {
            answer.push(char::from(byte[0]));
        }
        match answer.as_str() {
            DONE => Ok(HandedOver(stream)),
            "" => Err(ErrorKind::UnexpectedEof.into()),
            problem => Err(io::Error::other(problem.escape_debug().to_string())),
        }
    };
    timeout(PATIENCE, handing).await?
}

/// Returns at the end of a connection on which nothing more is said.
async fn ended(stream: &mut UnixStream) {
    // Whatever comes instead is its end as well.
    match stream.read(&mut [0]).await {
        Ok(_) | Err(_) => {}
    }
}

/// The kernel drops descriptors for which there is no room.
fn receive(stream: &UnixStream) -> io::Result<Offer> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut byte)],
        &mut ancillary,
        flags,
    )?;
    if received.bytes == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    let mut sockets = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            sockets.extend(descriptors);
        }
    }
    Ok(Offer {
        descriptors: sockets,
        client_address: match byte {
            [AS_CLIENTS] => ClientAddress::Transparent,
            _ => ClientAddress::Loopback,
        },
    })
}

/// The byte of a gate that connects to the web server from loopback.
const FROM_LOOPBACK: u8 = 0;
/// That of one which does so in its clients' names.
const AS_CLIENTS: u8 = 1;
/// The answer to what was taken.
const DONE: &str = "ok";
/// Bytes of an answer.
const ANSWER_MAX: usize = 512;
/// For either side to do what is its turn.
const PATIENCE: Duration = Duration::from_secs(5);
