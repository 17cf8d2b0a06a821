//! Confines itself as a role does, and tells what it can still do: `attempt <role> <configuration>
//! <port>`; as `stranger`, not at all. For the test of the same that is in `confined.rs`.
#![deny(unsafe_code)]
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "it tells a test, which it fails"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixStream};
use std::path::Path;
use std::process::Command;

use aya::maps::{MapData, MapError};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::kill;
use nix::sys::socket::sockopt::TcpUlp;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
};
use nix::unistd::Pid;
use pullgate::config::Config;
use pullgate::host::sandbox;
use pullgate::role::Role;
use pullgate::roles::access::reach;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};
use socket2::{Domain, Protocol, Socket, Type};

fn main() {
    let mut words = std::env::args().skip(1);
    let role = words.next().unwrap();
    let file = words.next().unwrap();
    let port: u16 = words.next().unwrap().parse().unwrap();
    let file = Path::new(&file);
    let config = Config::parse(file, &fs::read_to_string(file).unwrap()).unwrap();
    for name in ["stranger", "filter", "ranges", "gate", "another"] {
        fs::create_dir_all(config.boot.paths.run.join(name)).unwrap();
    }
    // What was open before stays open, so nothing may be.
    if role != "stranger" {
        let mut all = Role::ALL.into_iter();
        let role = all.find(|it| it.label() == role).unwrap();
        let confined = sandbox::enter(reach(file, &config, &[role])).unwrap();
        confined.refuse_listening().unwrap();
    }

    // Another thread: one that is started later must not be any freer.
    std::thread::scope(|scope| {
        scope.spawn(|| attempt(&role, file, &config, port));
    });
}

fn attempt(role: &str, file: &Path, config: &Config, port: u16) {
    let free = SocketAddr::from(([127, 0, 0, 1], 0));
    let errno = |outcome: nix::Result<()>| outcome.map_err(io::Error::from);
    tell("read the configuration", fs::read(file).map(drop));
    tell("write a status socket's directory", {
        let path = config.boot.paths.run.join(role).join("attempt");
        fs::write(&path, "").and_then(|()| fs::remove_file(&path))
    });
    tell("type for a terminal", type_a_letter(nix::libc::TIOCSTI));
    tell("type for a console", type_a_letter(nix::libc::TIOCLINUX));
    tell("pin beside its own pins", {
        let path = config.boot.paths.bpf.with_file_name("attempt");
        fs::create_dir(&path).and_then(|()| fs::remove_dir(&path))
    });
    tell("write another role's directory", {
        let path = config.boot.paths.run.join("another/attempt");
        fs::write(&path, "").and_then(|()| fs::remove_file(&path))
    });
    tell(
        "write the state",
        fs::write(config.boot.paths.state.join("attempt"), ""),
    );
    tell(
        "read another file",
        fs::read("/var/lib/dpkg/status").map(drop),
    );
    tell(
        "read other processes",
        fs::read(format!("/proc/{}/environ", Pid::parent())).map(drop),
    );
    tell("write another file", {
        let path = std::env::temp_dir().join("pullgate-attempt");
        fs::write(&path, "").and_then(|()| fs::remove_file(&path))
    });
    tell(
        "start a program",
        Command::new("/bin/true").status().map(drop),
    );
    tell("use BPF", use_bpf());
    tell("listen elsewhere", TcpListener::bind(free).map(drop));
    tell("listen where the kernel likes", {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None);
        socket.and_then(|socket| socket.listen(1))
    });
    tell(
        "connect elsewhere",
        TcpStream::connect(("127.0.0.1", port)).map(drop),
    );
    tell("connect by another protocol", {
        let kind = Some(Protocol::from(MPTCP));
        Socket::new(Domain::IPV4, Type::STREAM, kind)
            .and_then(|socket| socket.connect(&SocketAddr::from(([127, 0, 0, 1], port)).into()))
    });
    tell("connect by sending", connect_by_sending(port));
    tell("send datagrams", UdpSocket::bind(free).map(drop));
    tell("open a raw socket", {
        let kind = (AddressFamily::Inet, SockType::Raw, SockFlag::empty());
        errno(socket(kind.0, kind.1, kind.2, SockProtocol::Icmp).map(drop))
    });
    tell("ask the kernel for more than its network", {
        let kind = (AddressFamily::Netlink, SockType::Raw, SockFlag::empty());
        errno(socket(kind.0, kind.1, kind.2, SockProtocol::NetlinkGeneric).map(drop))
    });
    tell("connect to a socket without a file", {
        let name = UnixAddr::from_abstract_name(format!("pullgate-attempt-{port}"));
        name.and_then(|name| UnixStream::connect_addr(&name))
            .map(drop)
    });
    tell("put another protocol over a connection", {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP));
        socket.and_then(|socket| {
            let put = setsockopt(&socket, TcpUlp::default(), b"tls");
            // It was let through, and the kernel looked for it.
            let is_asked = |error: &Errno| matches!(error, Errno::ENOENT | Errno::ENOTCONN);
            put.or_else(|error| {
                if is_asked(&error) {
                    Ok(())
                } else {
                    Err(error.into())
                }
            })
        })
    });
    tell("make a namespace", errno(unshare(CloneFlags::CLONE_NEWUTS)));
    tell("touch a link", touch_a_link());
    tell("put on another filter", put_on_a_filter());
    tell("signal another process", errno(kill(Pid::parent(), None)));
    tell(
        "become another user",
        errno(nix::unistd::setuid(65534.into())),
    );
}

/// TCP Fast Open, RFC 7413: data with the first packet.
fn connect_by_sending(port: u16) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    let there = SocketAddr::from(([127, 0, 0, 1], port)).into();
    socket
        .send_to_with_flags(b"x", &there, MSG_FASTOPEN)
        .map(drop)
}

/// Asks for a pin that is not there, which is answered only to a role that may ask.
fn use_bpf() -> io::Result<()> {
    match MapData::from_pin("/sys/fs/bpf/pullgate-attempt") {
        Err(MapError::SyscallError(error)) if error.io_error.kind() == ErrorKind::NotFound => {
            Ok(())
        }
        Err(error) => Err(io::Error::other(error)),
        Ok(_) => Ok(()),
    }
}

/// One that lets everything through.
fn put_on_a_filter() -> io::Result<()> {
    let action = SeccompAction::Log;
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(io::Error::other)?;
    let filter = SeccompFilter::new(BTreeMap::new(), action, SeccompAction::Allow, arch);
    let program: Result<BpfProgram, _> = filter.and_then(TryInto::try_into);
    let program = program.map_err(io::Error::other)?;
    apply_filter(&program).map_err(io::Error::other)
}

/// Asks for no change of the loopback interface, which is answered by who may ask for one:
/// rtnetlink(7).
fn touch_a_link() -> io::Result<()> {
    let kind = (AddressFamily::Netlink, SockType::Raw, SockFlag::empty());
    let route = socket(kind.0, kind.1, kind.2, SockProtocol::NetlinkRoute)?;
    let mut message = Vec::new();
    message.extend(32_u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message.extend([0; 8]);
    // struct ifinfomsg: of no family, no type, index 1, no flags.
    message.extend([0; 4]);
    message.extend(1_i32.to_ne_bytes());
    message.extend([0; 8]);
    send(route.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut answer = [0; 128];
    recv(route.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // struct nlmsgerr: after the header, a negative errno or zero.
    match i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]) {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(-errno)),
    }
}

/// Types a letter into a terminal: a role that may gets the error that there is none.
#[expect(unsafe_code, reason = "no library makes this call")]
fn type_a_letter(request: nix::libc::Ioctl) -> io::Result<()> {
    let letter = b'x';
    let nowhere = fs::File::open("/proc/self/status")?;
    // SAFETY: both requests read one byte, which outlives the call.
    let outcome = unsafe { nix::libc::ioctl(nowhere.as_raw_fd(), request, &raw const letter) };
    let error = io::Error::last_os_error();
    match outcome {
        0.. => Ok(()),
        _ if error.raw_os_error() == Some(nix::libc::ENOTTY) => Ok(()),
        _ => Err(error),
    }
}

fn tell(what: &str, outcome: io::Result<()>) {
    match outcome {
        Ok(()) => println!("{what}: yes"),
        Err(error) => println!("{what}: no ({error})"),
    }
}

/// include/uapi/linux/netlink.h.
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
/// include/uapi/linux/rtnetlink.h.
const RTM_NEWLINK: u16 = 16;
/// include/linux/socket.h.
const MSG_FASTOPEN: i32 = 0x2000_0000;
/// RFC 8684: streams that are not TCP's.
const MPTCP: i32 = 262;
