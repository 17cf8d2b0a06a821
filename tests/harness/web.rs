//! The web servers behind the gate: real nginx and Apache, which read the client's address from the PROXY header.

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::eventually;
use crate::net::{Host, Network};
use crate::pairing::Pairing;
use crate::pki::{BLOG, SHOP};
use crate::proxies::with_children;

/// Which web server.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Software {
    /// nginx.
    Nginx,
    /// Apache httpd.
    Apache,
    /// HAProxy, with sites of its own.
    Haproxy,
    /// Caddy.
    Caddy,
}

/// A running web server; it stops when dropped.
pub struct Web {
    _server: Server,
    software: Software,
    /// How often the counters were asked for, which they count as well.
    asked: AtomicU64,
}

impl Web {
    /// Starts a server on the origin's loopback, and where it keeps the port at 443 on every address;
    /// it answers with what it saw.
    #[must_use]
    pub fn start(network: &Network, software: Software, pairing: Pairing) -> Self {
        let directory = network.path("web");
        fs::create_dir(&directory).unwrap();
        let (configuration, site) = match software {
            Software::Nginx => (NGINX, NGINX_SITE),
            Software::Apache => (APACHE, APACHE_SITE),
            Software::Haproxy | Software::Caddy => panic!("{software:?} is in no lab"),
        };
        let sites = match pairing {
            Pairing::Relayed => String::new(),
            Pairing::Steered => [SHOP, BLOG]
                .map(|name| site.replace("@NAME@", name))
                .concat(),
        };
        let configuration = configuration.replace("@SITES@", &sites);
        let server = if software == Software::Nginx {
            Server::start(network, "nginx", &[], &configuration)
        } else {
            fs::create_dir(directory.join("htdocs")).unwrap();
            fs::write(directory.join("htdocs/index.html"), APACHE_PAGE).unwrap();
            let words = ["-DFOREGROUND", "-f"];
            Server::start(network, "apache2", &words, &configuration)
        };
        Self {
            _server: server,
            software,
            asked: AtomicU64::new(0),
        }
    }

    /// Connections that the server has accepted so far (nginx only).
    ///
    /// Each that carries no byte counts too, so that "nothing reached it" can be shown.
    #[must_use]
    pub fn accepted(&self, network: &Network) -> u64 {
        assert_eq!(self.software, Software::Nginx, "only nginx counts");
        accepted(network) - (self.asked.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// Connections that nginx has accepted so far, those to ask for them among them.
#[must_use]
pub(crate) fn accepted(network: &Network) -> u64 {
    let url = format!("http://{STATUS_ADDRESS}/");
    let output = network.output(Host::Origin, &["curl", "--silent", "--max-time", "5", &url]);
    let text = String::from_utf8(output.stdout).unwrap();
    // "server accepts handled requests", then the three numbers.
    let numbers = text.lines().nth(2).unwrap();
    numbers.split_whitespace().next().unwrap().parse().unwrap()
}

/// Starts a plain nginx for benchmarks: a small page, and a big one of so many bytes at `/big`.
#[must_use]
pub fn plain(network: &Network, big: usize) -> Server {
    write_pages(network, big);
    Server::start(network, "nginx", &[], PLAIN)
}

fn write_pages(network: &Network, big: usize) {
    let directory = network.path("web");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("big"), vec![b'x'; big]).unwrap();
    fs::write(directory.join("index.html"), "x".repeat(1024)).unwrap();
}

/// The same page in three ways: in clear text on loopback, in TLS at [`PORT_IN_TLS`], and in TLS at
/// [`PORT_THAT_DEMANDS`] for clients whose certificate this nginx verifies itself.
#[must_use]
pub fn paired(network: &Network, big: usize) -> Server {
    write_pages(network, big);
    let site = |port: u16, demands: &str| {
        format!(
            "server {{ listen {port} ssl backlog=4096; root @DIR@/web; {demands}
             ssl_certificate @DIR@/pki/{SHOP}.pem; ssl_certificate_key @DIR@/pki/{SHOP}.key; }}\n"
        )
    };
    let demands = "ssl_client_certificate @DIR@/pki/rsa-ca.pem; ssl_verify_client on;";
    let sites = site(PORT_IN_TLS, "") + &site(PORT_THAT_DEMANDS, demands);
    let sites =
        format!("ssl_session_cache shared:tls:4m; ssl_protocols TLSv1.2 TLSv1.3;\n{sites}@NGINX@");
    Server::start(network, "nginx", &[], &PLAIN.replace("@NGINX@", &sites))
}

/// A server on the origin's loopback; it stops when dropped.
pub struct Server(Child);

impl Server {
    /// Starts `program` with these arguments and the path of a configuration behind them (behind
    /// `-c` for nginx), and waits until something listens at [`ADDRESS`]. In the configuration,
    /// `@DIR@` is the network's directory, `@NGINX@` and `@APACHE@` what every one of these needs
    /// besides.
    #[must_use]
    pub fn start(network: &Network, program: &str, words: &[&str], configuration: &str) -> Self {
        Self::start_at(network, program, words, configuration, ADDRESS)
    }

    /// The same for a server that listens elsewhere.
    #[must_use]
    pub fn start_at(
        network: &Network,
        program: &str,
        words: &[&str],
        configuration: &str,
        address: &str,
    ) -> Self {
        Self::start_on(
            network,
            Host::Origin,
            (program, words),
            configuration,
            address,
        )
    }

    /// The same on any host, for what else a network has.
    #[must_use]
    pub fn start_on(
        network: &Network,
        host: Host,
        (program, words): (&str, &[&str]),
        configuration: &str,
        address: &str,
    ) -> Self {
        let (_, port) = address.rsplit_once(':').unwrap();
        let config = network.path(format!("{program}-{port}.conf"));
        let directory = network.path("").display().to_string();
        let text = within(configuration, directory.trim_end_matches('/'));
        fs::write(&config, text).unwrap();
        let mut command = network.command(host, program);
        command.args(words);
        if program == "nginx" {
            command.arg("-c");
        }
        command.arg(&config);
        let child = spawn(&mut command, &network.path(format!("{program}.out")));
        let server = Self(child);
        eventually(program, || {
            network.on(host, || TcpStream::connect(address).ok())
        });
        server
    }
}

impl Server {
    /// Its processes: itself, and those that it has started.
    #[must_use]
    pub fn processes(&self) -> Vec<i32> {
        with_children(&self.0)
    }

    /// Lets it read its files again.
    pub fn reload(&self) {
        self.signal(Signal::SIGHUP);
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        kill(pid, signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Workers follow a master that is asked to go; it may have been killed with its namespace.
        let pid = Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        match kill(pid, Signal::SIGTERM) {
            Ok(_) | Err(_) => {}
        }
        drop(self.0.wait());
    }
}

/// A configuration with its placeholders filled in.
pub(crate) fn within(configuration: &str, directory: &str) -> String {
    let text = configuration.replace("@NGINX@", NGINX_PATHS);
    let text = text.replace("@APACHE@", APACHE_MODULES);
    text.replace("@DIR@", directory)
}

/// Starts a server whose words go to a file.
pub(crate) fn spawn(command: &mut Command, log: &Path) -> Child {
    let log = fs::File::create(log).unwrap();
    let command = command
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap());
    command.stderr(log).spawn().unwrap()
}

/// Whether the server is installed.
#[must_use]
pub fn is_installed(software: Software) -> bool {
    let path = match software {
        Software::Nginx => "/usr/sbin/nginx",
        Software::Apache => "/usr/sbin/apache2",
        Software::Haproxy => "/usr/sbin/haproxy",
        Software::Caddy => "/usr/bin/caddy",
    };
    Path::new(path).exists()
}

/// Where the web server listens, for the gate.
pub const ADDRESS: &str = "127.0.0.1:8080";
/// Where [`paired`] listens in TLS, and connections are steered to the gate if there is one.
pub const PORT_IN_TLS: u16 = 443;
/// Where it demands a client certificate itself.
pub const PORT_THAT_DEMANDS: u16 = 4440;
const STATUS_ADDRESS: &str = "127.0.0.1:8081";

/// Where nginx would else write as its own user.
const NGINX_PATHS: &str = "client_body_temp_path @DIR@/body; proxy_temp_path @DIR@/proxy; \
    fastcgi_temp_path @DIR@/fastcgi; uwsgi_temp_path @DIR@/uwsgi; scgi_temp_path @DIR@/scgi;";

/// What is built into other builds of it.
const APACHE_MODULES: &str = "\
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule remoteip_module /usr/lib/apache2/modules/mod_remoteip.so
LoadModule filter_module /usr/lib/apache2/modules/mod_filter.so
LoadModule include_module /usr/lib/apache2/modules/mod_include.so
LoadModule mime_module /usr/lib/apache2/modules/mod_mime.so
LoadModule dir_module /usr/lib/apache2/modules/mod_dir.so
LoadModule env_module /usr/lib/apache2/modules/mod_env.so
LoadModule setenvif_module /usr/lib/apache2/modules/mod_setenvif.so
LoadModule ssl_module /usr/lib/apache2/modules/mod_ssl.so
TypesConfig /dev/null";

const NGINX: &str = r#"
daemon off;
worker_processes 1;
pid @DIR@/nginx.pid;
error_log @DIR@/error.log warn;
events { worker_connections 512; }
http {
    access_log @DIR@/access.log;
    @NGINX@
    server {
        listen 127.0.0.1:8080 proxy_protocol;
        listen unix:@DIR@/web/web.sock proxy_protocol;
        set_real_ip_from 127.0.0.1;
        set_real_ip_from unix:;
        real_ip_header proxy_protocol;
        default_type text/plain;
        return 200 "nginx saw client=$remote_addr cf=$http_cf_connecting_ip host=$host\n";
    }
    @SITES@
    server {
        listen 127.0.0.1:8081;
        location / { stub_status; }
    }
}
"#;

/// A site as it was before there was a gate.
const NGINX_SITE: &str = r#"
    server {
        listen 443 ssl;
        listen [::]:443 ssl;
        server_name @NAME@;
        ssl_certificate @DIR@/pki/@NAME@.pem;
        ssl_certificate_key @DIR@/pki/@NAME@.key;
        default_type text/plain;
        return 200 "nginx saw client=$remote_addr cf=$http_cf_connecting_ip host=$host\n";
    }
"#;

/// The same of Apache.
const APACHE_SITE: &str = r"
<IfDefine !Listens443>
    Listen 443
    Define Listens443
</IfDefine>
<VirtualHost *:443>
    ServerName @NAME@
    SSLEngine on
    SSLCertificateFile @DIR@/pki/@NAME@.pem
    SSLCertificateKeyFile @DIR@/pki/@NAME@.key
</VirtualHost>
";

const PLAIN: &str = r#"
daemon off;
user root;
worker_processes 2;
pid @DIR@/nginx.pid;
error_log @DIR@/error.log crit;
events { worker_connections 19900; }
http {
    access_log off;
    sendfile on;
    keepalive_timeout 1000s;
    keepalive_requests 10000000;
    @NGINX@
    server {
        listen 127.0.0.1:8080 backlog=16384;
        root @DIR@/web;
    }
}
"#;

const APACHE: &str = r#"
ServerRoot @DIR@
ServerName origin.example
PidFile @DIR@/apache.pid
ErrorLog @DIR@/error.log
Mutex file:@DIR@
@APACHE@
Listen 127.0.0.1:8080
<VirtualHost 127.0.0.1:8080>
    RemoteIPProxyProtocol On
</VirtualHost>
@SITES@
DocumentRoot @DIR@/web/htdocs
DirectoryIndex index.html
<Directory @DIR@/web/htdocs>
    Require all granted
    Options +Includes
    SetOutputFilter INCLUDES
</Directory>
"#;

const APACHE_PAGE: &str = "apache saw client=<!--#echo var=\"REMOTE_ADDR\" --> \
    cf=<!--#echo var=\"HTTP_CF_CONNECTING_IP\" --> host=<!--#echo var=\"HTTP_HOST\" -->\n";
