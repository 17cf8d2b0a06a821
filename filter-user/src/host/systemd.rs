//! The service manager's protocol: how we are, and the sockets that it keeps for our successor.
//! sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::path::Path;
use std::time::Duration;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use socket2::SockRef;
use tracing::warn;

use super::socket;

/// Tells that all roles are up.
pub fn ready() {
    tell(b"READY=1", &[]);
}

/// Tells that a new configuration is being read; [`ready`] ends it.
pub fn reloading() {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let microseconds = now.tv_sec * 1_000_000 + now.tv_nsec / 1_000;
    tell(
        format!("RELOADING=1\nMONOTONIC_USEC={microseconds}").as_bytes(),
        &[],
    );
}

/// Tells that the end has begun, and how long it may take: who waits less would kill.
pub fn stopping(within: Duration) {
    let microseconds = within.as_micros();
    tell(
        format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={microseconds}").as_bytes(),
        &[],
    );
}

/// Asks for more time to become ready.
pub fn extend(within: Duration) {
    let microseconds = within.as_micros();
    tell(
        format!("EXTEND_TIMEOUT_USEC={microseconds}").as_bytes(),
        &[],
    );
}

/// Tells that all is well.
pub fn alive() {
    tell(b"WATCHDOG=1", &[]);
}

/// How often the service manager expects a message, if it does: half of what it waits for.
/// sd_watchdog_enabled(3).
pub fn watchdog() -> Option<Duration> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let microseconds = number("WATCHDOG_USEC").filter(|time| *time > 0)?;
    let ours = u64::from(std::process::id());
    let is_for_us = number("WATCHDOG_PID").is_none_or(|pid| pid == ours);
    is_for_us.then(|| Duration::from_micros(microseconds / 2))
}

/// Hands listening sockets over for safekeeping (`FileDescriptorStoreMax=`): what waits in them
/// when we end is there for who starts next.
pub fn store(sockets: &[TcpListener]) {
    if !sockets.is_empty() {
        tell(format!("FDSTORE=1\nFDNAME={STORED}").as_bytes(), sockets);
    }
}

/// Whether the service manager listens at a socket without a file (sd_notify(3)).
pub fn is_abstract() -> bool {
    let address = std::env::var_os("NOTIFY_SOCKET");
    address.is_some_and(|address| address.as_bytes().starts_with(b"@"))
}

fn tell(message: &[u8], sockets: &[TcpListener]) {
    let Some(address) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let address = match address.as_bytes() {
        [b'@', name @ ..] => UnixAddr::from_abstract_name(name),
        path => UnixAddr::from_pathname(Path::new(std::ffi::OsStr::from_bytes(path))),
    };
    if let Err(error) = address.and_then(|address| send(&address, message, sockets)) {
        warn!(
            id = "service-manager-unreachable",
            %error,
            "the service manager cannot be notified"
        );
    }
}

fn send(address: &UnixAddr, message: &[u8], sockets: &[TcpListener]) -> io::Result<()> {
    let unbound = UnixDatagram::unbound()?;
    unbound.connect_addr(address)?;
    socket::send_with(&unbound, message, sockets)
}

/// A listening socket that was handed to us.
pub struct Inherited {
    /// The socket.
    pub socket: TcpListener,
    /// Where it listens.
    pub address: SocketAddr,
    /// Whether it was kept for us alone: named by the command line, or stored by one of us. A socket
    /// unit has its own use for it.
    pub is_ours: bool,
}

/// How many listening sockets the service manager announces.
pub fn announced() -> RawFd {
    let number = |name: &str| std::env::var(name).ok()?.parse::<RawFd>().ok();
    // The announcement may be meant for the process that started us.
    let is_for_us = number("LISTEN_PID") == Some(getpid().as_raw_pid());
    number("LISTEN_FDS").filter(|_| is_for_us).unwrap_or(0)
}

/// The listening sockets that were handed to us: those that the command line names, and those that
/// the service manager announces.
///
/// # Errors
///
/// Returns the number of the one that cannot be used, and why not.
pub fn inherited(named: &[RawFd]) -> Result<Vec<Inherited>, (RawFd, io::Error)> {
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let announced = (0..announced()).map(|n| (FIRST_DESCRIPTOR + n, names.next() == Some(STORED)));
    let descriptors = named.iter().map(|descriptor| (*descriptor, true));
    descriptors
        .chain(announced)
        .map(|(descriptor, is_ours)| {
            let taken = take(descriptor);
            let (socket, address) = taken.map_err(|source| (descriptor, source))?;
            Ok(Inherited {
                socket,
                address,
                is_ours,
            })
        })
        .collect()
}

/// A duplicate of a descriptor, of which nothing but its number is known.
fn take(descriptor: RawFd) -> io::Result<(TcpListener, SocketAddr)> {
    let ourselves = pidfd_open(getpid(), PidfdFlags::empty())?;
    let socket: OwnedFd = pidfd_getfd(ourselves, descriptor, PidfdGetfdFlags::empty())?;
    let address = socket::listening_address(&socket)?;
    SockRef::from(&socket).set_nonblocking(true)?;
    Ok((TcpListener::from(socket), address))
}

/// The name of the sockets that we have stored; a socket unit's have the unit's.
const STORED: &str = "gate";
/// SD_LISTEN_FDS_START.
const FIRST_DESCRIPTOR: RawFd = 3;
