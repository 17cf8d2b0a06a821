//! TLS proxies that do the gate's job: nginx, HAProxy, hitch and stunnel of Debian 12 and 13, each demanding a client
//! certificate, and pullgate itself.

use std::ffi::OsString;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::daemon::binary;
use crate::debian::target;
use crate::eventually;
use crate::net::{Host, INTERFACE, Network};
use crate::pki::{Pki, SHOP};
use crate::web::{PORT_IN_TLS, spawn, within};

/// Which proxy, and how it relays.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Peer {
    /// Ours.
    Pullgate,
    /// Ours, to which connections are steered past [`crate::web::PORT_IN_TLS`].
    Steered,
    /// Another's, of a Debian.
    Of(Release, Server),
}

/// A Debian.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Release {
    /// Debian 12, this host's own.
    Bookworm,
    /// Debian 13, whose programs run with its own libraries.
    Trixie,
}

/// What others use for the gate's job.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Server {
    /// nginx's stream module.
    NginxStream,
    /// nginx as an HTTP proxy.
    NginxHttp,
    /// HAProxy, relaying bytes.
    HaproxyTcp,
    /// HAProxy as an HTTP proxy.
    HaproxyHttp,
    /// hitch.
    Hitch,
    /// stunnel, the slowest: of one Debian.
    Stunnel,
}

impl Release {
    /// Where its files are.
    fn root(self) -> PathBuf {
        match self {
            Self::Bookworm => PathBuf::from("/"),
            Self::Trixie => target().join("debian-newer"),
        }
    }

    /// What starts one of its programs.
    fn command(self, program: &str) -> Vec<OsString> {
        let root = self.root();
        let path = |path: &str| root.join(path).into_os_string();
        match self {
            Self::Bookworm => vec![path(program)],
            Self::Trixie => vec![
                path(LOADER),
                "--library-path".into(),
                path("usr/lib/x86_64-linux-gnu"),
                path(program),
            ],
        }
    }
}

impl Server {
    fn program(self) -> &'static str {
        match self {
            Self::NginxStream | Self::NginxHttp => "usr/sbin/nginx",
            Self::HaproxyTcp | Self::HaproxyHttp => "usr/sbin/haproxy",
            Self::Hitch => "usr/sbin/hitch",
            Self::Stunnel => "usr/bin/stunnel4",
        }
    }
}

impl Peer {
    /// All that have the same work, ours first.
    pub const ALL: [Self; 12] = [
        Self::Pullgate,
        Self::Of(Release::Bookworm, Server::NginxStream),
        Self::Of(Release::Bookworm, Server::NginxHttp),
        Self::Of(Release::Bookworm, Server::HaproxyTcp),
        Self::Of(Release::Bookworm, Server::HaproxyHttp),
        Self::Of(Release::Bookworm, Server::Hitch),
        Self::Of(Release::Bookworm, Server::Stunnel),
        Self::Of(Release::Trixie, Server::NginxStream),
        Self::Of(Release::Trixie, Server::NginxHttp),
        Self::Of(Release::Trixie, Server::HaproxyTcp),
        Self::Of(Release::Trixie, Server::HaproxyHttp),
        Self::Of(Release::Trixie, Server::Hitch),
    ];

    /// The words for it.
    #[must_use]
    pub fn label(self) -> String {
        let (release, server) = match self {
            Self::Pullgate => return "pullgate".to_owned(),
            Self::Steered => return "steered".to_owned(),
            Self::Of(release, server) => (release, server),
        };
        let name = match server {
            Server::NginxStream => "nginx stream",
            Server::NginxHttp => "nginx http",
            Server::HaproxyTcp => "haproxy tcp",
            Server::HaproxyHttp => "haproxy http",
            Server::Hitch => "hitch",
            Server::Stunnel => "stunnel",
        };
        let of = match release {
            Release::Bookworm => "12",
            Release::Trixie => "13",
        };
        format!("{name}, {of}")
    }

    /// Whether it can be started.
    #[must_use]
    pub fn is_installed(self) -> bool {
        let Self::Of(release, server) = self else {
            return true;
        };
        let module = (server == Server::NginxStream).then_some(NGINX_STREAM_MODULE);
        let loader = (release == Release::Trixie).then_some(LOADER);
        let mut needed = module.into_iter().chain(loader).chain([server.program()]);
        needed.all(|path| release.root().join(path).exists())
    }

    /// What it says of its version.
    #[must_use]
    pub fn version(self) -> String {
        let argument = match self {
            Self::Pullgate | Self::Steered | Self::Of(_, Server::Hitch) => "--version",
            Self::Of(_, Server::NginxStream | Server::NginxHttp) => "-V",
            Self::Of(_, Server::HaproxyTcp | Server::HaproxyHttp) => "-v",
            Self::Of(_, Server::Stunnel) => "-version",
        };
        let command = self.command();
        let mut asked = Command::new(&command[0]);
        let output = asked.args(&command[1..]).arg(argument).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        // The library for TLS is on a line of its own, where it is said at all.
        let lines = said.lines().enumerate();
        let lines = lines.filter(|(at, line)| *at == 0 || line.contains("OpenSSL"));
        let lines: Vec<_> = lines.map(|(_, line)| line.trim()).collect();
        lines.join("; ")
    }

    fn port(self) -> u16 {
        if self == Self::Steered {
            return PORT_IN_TLS;
        }
        let at = Self::ALL.iter().position(|peer| *peer == self).unwrap();
        4430 + u16::try_from(at).unwrap()
    }

    fn command(self) -> Vec<OsString> {
        match self {
            Self::Pullgate | Self::Steered => vec![binary().into()],
            Self::Of(release, server) => release.command(server.program()),
        }
    }

    fn words(self) -> &'static [&'static str] {
        match self {
            Self::Pullgate => &["--config", "@FILE@", "run", "--only", "gate"],
            Self::Steered => &["--config", "@FILE@", "run"],
            Self::Of(_, Server::NginxStream | Server::NginxHttp) => &["-c", "@FILE@"],
            Self::Of(_, Server::HaproxyTcp | Server::HaproxyHttp) => &["-db", "-f", "@FILE@"],
            Self::Of(_, Server::Hitch) => &["--config=@FILE@"],
            Self::Of(_, Server::Stunnel) => &["@FILE@"],
        }
    }

    fn configuration(self) -> String {
        let Self::Of(release, server) = self else {
            let text = if self == Self::Steered {
                STEERED
            } else {
                PULLGATE
            };
            return text.replace("@HOST@", PULLGATE_HOST);
        };
        let text = match server {
            Server::NginxStream => NGINX_STREAM,
            Server::NginxHttp => NGINX_HTTP,
            Server::HaproxyTcp => HAPROXY_TCP,
            Server::HaproxyHttp => HAPROXY_HTTP,
            Server::Hitch => HITCH,
            Server::Stunnel => STUNNEL,
        };
        let module = release.root().join(NGINX_STREAM_MODULE);
        text.replace("@MODULE@", &module.display().to_string())
    }
}

/// A running proxy in the origin; it stops when dropped.
pub struct Proxy {
    child: Child,
    peer: Peer,
}

impl Proxy {
    /// Starts a proxy in front of the web server at [`crate::web::ADDRESS`].
    #[must_use]
    pub fn start(network: &Network, pki: &Pki, peer: Peer) -> Self {
        Self::start_at(network, pki, peer, "127.0.0.1")
    }

    /// The same for clients on the edge.
    #[must_use]
    pub fn start_for_edge(network: &Network, pki: &Pki, peer: Peer) -> Self {
        Self::start_at(network, pki, peer, "0.0.0.0")
    }

    fn start_at(network: &Network, pki: &Pki, peer: Peer, address: &str) -> Self {
        let directory = network.path(peer.label().replace([' ', ','], "-"));
        fs::create_dir(&directory).unwrap();
        let pem = |name: &str| fs::read_to_string(pki.path(name)).unwrap();
        let both = format!("{}.pem", SHOP);
        let both = format!("{}{}", pem(&both), pem(&format!("{SHOP}.key")));
        pki.write("both.pem", &both);
        let file = directory.join("proxy.conf");
        let text = within(&peer.configuration(), &directory.display().to_string())
            .replace("@PKI@", &pki.path("").display().to_string())
            .replace("@PORT@", &peer.port().to_string())
            .replace("@NAME@", SHOP)
            .replace("@INTERFACE@", INTERFACE)
            .replace("@BPF@", &network.path("bpf/pullgate").display().to_string())
            .replace("@IP@", address);
        fs::write(&file, text).unwrap();
        let words = peer.words().iter();
        let program = peer.command();
        let mut command = network.command(Host::Origin, &program[0]);
        command
            .args(&program[1..])
            .args(words.map(|word| word.replace("@FILE@", &file.display().to_string())))
            .env("PULLGATE_LOG", "warn");
        let child = spawn(&mut command, &directory.join("output.log"));
        let proxy = Self { child, peer };
        eventually(&peer.label(), || {
            network.on(Host::Origin, || TcpStream::connect(proxy.address()).ok())
        });
        proxy
    }

    /// Which one it is.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.peer.port()))
    }

    /// Its processes: itself, and those that it has started.
    #[must_use]
    pub fn processes(&self) -> Vec<i32> {
        with_children(&self.child)
    }
}

/// A process, and those that it has started.
pub(crate) fn with_children(child: &Child) -> Vec<i32> {
    let first = i32::try_from(child.id()).unwrap();
    let mut found = vec![first];
    let all = fs::read_dir("/proc").unwrap();
    for entry in all.filter_map(Result::ok) {
        let pid = entry.file_name().to_string_lossy().parse::<i32>();
        // It may have ended meanwhile.
        let stat = fs::read_to_string(entry.path().join("stat"));
        if let (Ok(pid), Ok(stat)) = (pid, stat) {
            let behind_name = stat.rsplit(')').next().unwrap_or_default();
            let parent = behind_name.split_whitespace().nth(1);
            if parent.and_then(|parent| parent.parse().ok()) == Some(first) {
                found.push(pid);
            }
        }
    }
    found
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Children first: hitch's do not follow a parent that is killed.
        for pid in self.processes().into_iter().rev() {
            match kill(Pid::from_raw(pid), Signal::SIGKILL) {
                Ok(_) | Err(_) => {}
            }
        }
        drop(self.child.wait());
    }
}

/// What starts programs with other libraries than this host's (ld.so(8)), on x86-64.
const LOADER: &str = "lib64/ld-linux-x86-64.so.2";
/// Where Debian puts it.
const NGINX_STREAM_MODULE: &str = "usr/lib/nginx/modules/ngx_stream_module.so";

const PULLGATE: &str = r#"
[paths]
state = "@DIR@/state"
run = "@DIR@/run"
bpf = "@DIR@/bpf"
[ranges]
allow = ["127.0.0.1/32"]
unsafe_documentation_ranges = true
[gate]
listen = ["@IP@:@PORT@"]
@HOST@
upstream = "127.0.0.1:8080"
proxy_protocol = "none"
"#;

/// Limits that one source of load does not reach, and the host.
const PULLGATE_HOST: &str = r#"max_connections = 9960
max_handshakes = 20000
[gate.per_source]
connections = 20000
handshakes = 20000
handshakes_per_second = 100000
[gate.per_network]
connections = 20000
handshakes = 20000
handshakes_per_second = 100000
[[gate.host]]
names = ["@NAME@"]
certificate = "@PKI@/@NAME@.pem"
key = "@PKI@/@NAME@.key"
trust = ["@PKI@/rsa-ca.pem"]
"#;

const STEERED: &str = r#"
[paths]
state = "@DIR@/state"
run = "@DIR@/run"
bpf = "@BPF@"
[filter]
interfaces = ["@INTERFACE@"]
[ranges]
unsafe_documentation_ranges = true
[gate]
steer = true
listen = ["127.0.0.1:44300"]
@HOST@
"#;

const NGINX_STREAM: &str = r#"
load_module @MODULE@;
daemon off;
user root;
worker_processes 2;
pid @DIR@/nginx.pid;
error_log @DIR@/error.log crit;
events { worker_connections 19900; }
stream {
    ssl_session_cache shared:tls:4m;
    server {
        listen @IP@:@PORT@ ssl backlog=4096;
        ssl_certificate @PKI@/@NAME@.pem;
        ssl_certificate_key @PKI@/@NAME@.key;
        ssl_client_certificate @PKI@/rsa-ca.pem;
        ssl_verify_client on;
        ssl_protocols TLSv1.2 TLSv1.3;
        proxy_pass 127.0.0.1:8080;
        proxy_timeout 1000s;
        tcp_nodelay on;
    }
}
"#;

const NGINX_HTTP: &str = r#"
daemon off;
user root;
worker_processes 2;
pid @DIR@/nginx.pid;
error_log @DIR@/error.log crit;
events { worker_connections 19900; }
http {
    access_log off;
    @NGINX@
    ssl_session_cache shared:tls:4m;
    keepalive_timeout 1000s;
    keepalive_requests 10000000;
    upstream web {
        server 127.0.0.1:8080;
        keepalive 64;
        keepalive_requests 10000000;
        keepalive_timeout 1000s;
    }
    server {
        listen @IP@:@PORT@ ssl backlog=4096;
        ssl_certificate @PKI@/@NAME@.pem;
        ssl_certificate_key @PKI@/@NAME@.key;
        ssl_client_certificate @PKI@/rsa-ca.pem;
        ssl_verify_client on;
        ssl_protocols TLSv1.2 TLSv1.3;
        location / {
            proxy_pass http://web;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_max_temp_file_size 0;
        }
    }
}
"#;

const HAPROXY_TCP: &str = r#"
global
    maxconn 9950
    nbthread 2
    tune.ssl.default-dh-param 2048
defaults
    mode tcp
    timeout connect 5s
    timeout client 1000s
    timeout server 1000s
    timeout client-fin 5s
    timeout tunnel 1000s
listen gate
    bind @IP@:@PORT@ ssl crt @PKI@/both.pem ca-file @PKI@/rsa-ca.pem verify required backlog 4096
    server web 127.0.0.1:8080
"#;

const HAPROXY_HTTP: &str = r#"
global
    maxconn 9950
    nbthread 2
    tune.ssl.default-dh-param 2048
defaults
    mode http
    timeout connect 5s
    timeout client 1000s
    timeout server 1000s
    timeout http-keep-alive 1000s
listen gate
    bind @IP@:@PORT@ ssl crt @PKI@/both.pem ca-file @PKI@/rsa-ca.pem verify required backlog 4096
    http-reuse always
    server web 127.0.0.1:8080
"#;

const HITCH: &str = r#"
frontend = {
    host = "@IP@"
    port = "@PORT@"
}
backend = "[127.0.0.1]:8080"
pem-file = "@PKI@/both.pem"
client-verify = required
client-verify-ca = "@PKI@/rsa-ca.pem"
tls-protos = TLSv1.2 TLSv1.3
workers = 2
backlog = 4096
keepalive = 3600
write-proxy-v2 = off
daemon = off
user = "nobody"
group = "nogroup"
quiet = on
"#;

const STUNNEL: &str = r#"
foreground = yes
pid =
debug = 3
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
[gate]
accept = @IP@:@PORT@
connect = 127.0.0.1:8080
cert = @PKI@/both.pem
CAfile = @PKI@/rsa-ca.pem
verifyChain = yes
TIMEOUTidle = 1000
TIMEOUTclose = 0
"#;
