//! TLS proxies that do the gate's job: Debian's nginx, HAProxy, hitch and stunnel, each demanding a
//! client certificate, and pullgate itself.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::daemon::binary;
use crate::eventually;
use crate::net::{Host, INTERFACE, Network};
use crate::pki::{Pki, SHOP};
use crate::web::{PORT_IN_TLS, spawn, within};

/// Which proxy, and how it relays.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Peer {
    /// Ours.
    Pullgate,
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
    /// stunnel.
    Stunnel,
    /// Ours, to which connections are steered past [`crate::web::PORT_IN_TLS`].
    Steered,
}

impl Peer {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Pullgate,
        Self::NginxStream,
        Self::NginxHttp,
        Self::HaproxyTcp,
        Self::HaproxyHttp,
        Self::Hitch,
        Self::Stunnel,
    ];

    /// The word for it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Pullgate => "pullgate",
            Self::NginxStream => "nginx stream",
            Self::NginxHttp => "nginx http",
            Self::HaproxyTcp => "haproxy tcp",
            Self::HaproxyHttp => "haproxy http",
            Self::Hitch => "hitch",
            Self::Stunnel => "stunnel",
            Self::Steered => "steered",
        }
    }

    /// The program, where Debian puts it.
    #[must_use]
    pub fn is_installed(self) -> bool {
        let path = match self {
            Self::Pullgate | Self::Steered => return true,
            Self::NginxStream => "/usr/lib/nginx/modules/ngx_stream_module.so",
            Self::NginxHttp => "/usr/sbin/nginx",
            Self::HaproxyTcp | Self::HaproxyHttp => "/usr/sbin/haproxy",
            Self::Hitch => "/usr/sbin/hitch",
            Self::Stunnel => "/usr/bin/stunnel4",
        };
        Path::new(path).exists()
    }

    /// What it says of its version.
    #[must_use]
    pub fn version(self) -> String {
        let argument = match self {
            Self::Pullgate | Self::Steered | Self::Hitch => "--version",
            Self::NginxStream | Self::NginxHttp => "-V",
            Self::HaproxyTcp | Self::HaproxyHttp => "-v",
            Self::Stunnel => "-version",
        };
        let output = Command::new(self.program()).arg(argument).output().unwrap();
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
        4430 + self as u16
    }

    fn words(self) -> &'static [&'static str] {
        match self {
            Self::Pullgate => &["--config", "@FILE@", "run", "--only", "gate"],
            Self::Steered => &["--config", "@FILE@", "run"],
            Self::NginxStream | Self::NginxHttp => &["-c", "@FILE@"],
            Self::HaproxyTcp | Self::HaproxyHttp => &["-db", "-f", "@FILE@"],
            Self::Hitch => &["--config=@FILE@"],
            Self::Stunnel => &["@FILE@"],
        }
    }

    fn program(self) -> std::path::PathBuf {
        match self {
            Self::Pullgate | Self::Steered => binary(),
            Self::NginxStream | Self::NginxHttp => "/usr/sbin/nginx".into(),
            Self::HaproxyTcp | Self::HaproxyHttp => "/usr/sbin/haproxy".into(),
            Self::Hitch => "/usr/sbin/hitch".into(),
            Self::Stunnel => "/usr/bin/stunnel4".into(),
        }
    }

    fn configuration(self) -> &'static str {
        match self {
            Self::Pullgate => PULLGATE,
            Self::Steered => STEERED,
            Self::NginxStream => NGINX_STREAM,
            Self::NginxHttp => NGINX_HTTP,
            Self::HaproxyTcp => HAPROXY_TCP,
            Self::HaproxyHttp => HAPROXY_HTTP,
            Self::Hitch => HITCH,
            Self::Stunnel => STUNNEL,
        }
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
        let directory = network.path(peer.label().replace(' ', "-"));
        fs::create_dir(&directory).unwrap();
        let pem = |name: &str| fs::read_to_string(pki.path(name)).unwrap();
        let both = format!("{}.pem", SHOP);
        let both = format!("{}{}", pem(&both), pem(&format!("{SHOP}.key")));
        pki.write("both.pem", &both);
        let file = directory.join("proxy.conf");
        let text = peer.configuration().replace("@HOST@", PULLGATE_HOST);
        let text = within(&text, &directory.display().to_string())
            .replace("@PKI@", &pki.path("").display().to_string())
            .replace("@PORT@", &peer.port().to_string())
            .replace("@NAME@", SHOP)
            .replace("@INTERFACE@", INTERFACE)
            .replace("@BPF@", &network.path("bpf/pullgate").display().to_string())
            .replace("@IP@", address);
        fs::write(&file, text).unwrap();
        let words = peer.words().iter();
        let mut command = network.command(Host::Origin, peer.program());
        command
            .args(words.map(|word| word.replace("@FILE@", &file.display().to_string())))
            .env("PULLGATE_LOG", "warn");
        let child = spawn(&mut command, &directory.join("output.log"));
        let proxy = Self { child, peer };
        eventually(peer.label(), || {
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
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
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
