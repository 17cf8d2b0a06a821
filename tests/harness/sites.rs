//! Web servers as they stand before there is a pullgate: on every address at 443, with three sites each,
//! of which all that a client can come upon is in one place at most.
//!
//! | path | what a site does |
//! |---|---|
//! | `/` | says its name, whom it saw, the scheme, and the `Host` |
//! | `/moved` | redirects to `/there`, in whichever way is usual |
//! | `/secure` | redirects to https unless it is asked so; else 204 |
//! | `/app` | passes on to [`APPLICATION`], WebSockets as well |
//! | `/test.Echo/` | passes gRPC on to [`CALLS`] |

use std::fs;

use crate::net::Network;
use crate::pki::{BLOG, SHOP, WIKI};
use crate::web::{Server, Software};

/// The sites, and the CA whose clients each trusts.
pub const SITES: [(&str, &str); 3] = [(SHOP, "ours"), (BLOG, "other"), (WIKI, "ours")];
/// Where an application listens for HTTP/1.1.
pub const APPLICATION: &str = "127.0.0.1:9000";
/// Where one listens for gRPC in clear text.
pub const CALLS: &str = "127.0.0.1:9001";

/// Starts a server that serves the sites.
#[must_use]
pub fn start(network: &Network, software: Software) -> Server {
    let directory = network.path("web");
    if !directory.exists() {
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("index.html"), APACHE_PAGE).unwrap();
    }
    let (program, words, main, site): (_, &[&str], _, _) = match software {
        Software::Nginx => ("nginx", &[], NGINX, NGINX_SITE),
        Software::Apache => ("apache2", &["-DFOREGROUND", "-f"], APACHE, APACHE_SITE),
        Software::Haproxy => {
            combine_files(network);
            ("haproxy", &["-W", "-db", "-f"], HAPROXY, "")
        }
        Software::Caddy => {
            let words: &[_] = &["run", "--adapter", "caddyfile", "--config"];
            ("caddy", words, CADDY, CADDY_SITE)
        }
    };
    let sites = SITES.map(|(name, _)| site.replace("@NAME@", name));
    let text = main.replace("@SITES@", &sites.concat());
    Server::start_at(network, program, words, &text, "127.0.0.1:443")
}

/// HAProxy wants a certificate and its key in one file.
fn combine_files(network: &Network) {
    let combined = network.path("haproxy");
    if !combined.exists() {
        fs::create_dir(&combined).unwrap();
    }
    for (name, _) in SITES {
        let file = |kind: &str| fs::read_to_string(network.path(format!("pki/{name}.{kind}")));
        let text = file("pem").unwrap() + &file("key").unwrap();
        fs::write(combined.join(format!("{name}.pem")), text).unwrap();
    }
}

const NGINX: &str = r"
daemon off;
worker_processes 1;
pid @DIR@/nginx.pid;
error_log @DIR@/error.log warn;
events { worker_connections 1024; }
http {
    access_log @DIR@/access.log;
    @NGINX@
    @SITES@
    server {
        listen 127.0.0.1:8081;
        location / { stub_status; }
    }
}
";

const NGINX_SITE: &str = r#"
    server {
        listen 443 ssl http2;
        listen [::]:443 ssl http2;
        server_name @NAME@;
        ssl_certificate @DIR@/pki/@NAME@.pem;
        ssl_certificate_key @DIR@/pki/@NAME@.key;
        default_type text/plain;
        root @DIR@/web;
        location / { return 200 "@NAME@ saw $remote_addr, $scheme, host=$host, sni=$ssl_server_name, reused=$ssl_session_reused\n"; }
        location /moved { return 301 /there; }
        location /secure { if ($scheme != https) { return 301 https://$host$request_uri; } return 204; }
        location /app {
            client_max_body_size 0;
            proxy_pass http://127.0.0.1:9000;
            proxy_http_version 1.1;
            proxy_request_buffering off;
            proxy_buffering off;
            proxy_set_header Host $host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $http_connection;
        }
        location /test.Echo/ { grpc_pass grpc://127.0.0.1:9001; }
    }
"#;

const APACHE: &str = r"
ServerRoot @DIR@
ServerName origin.example
PidFile @DIR@/apache.pid
ErrorLog @DIR@/error.log
Mutex file:@DIR@
@APACHE@
LoadModule alias_module /usr/lib/apache2/modules/mod_alias.so
LoadModule rewrite_module /usr/lib/apache2/modules/mod_rewrite.so
LoadModule http2_module /usr/lib/apache2/modules/mod_http2.so
LoadModule proxy_module /usr/lib/apache2/modules/mod_proxy.so
LoadModule proxy_http_module /usr/lib/apache2/modules/mod_proxy_http.so
LoadModule proxy_http2_module /usr/lib/apache2/modules/mod_proxy_http2.so
Listen 443
Protocols h2 http/1.1
SSLSessionCache none
DirectoryIndex index.html
<Directory @DIR@/web>
    Require all granted
    Options +Includes
    SetOutputFilter INCLUDES
</Directory>
@SITES@
";

const APACHE_SITE: &str = r"
<VirtualHost *:443>
    ServerName @NAME@
    DocumentRoot @DIR@/web
    SSLEngine on
    SSLCertificateFile @DIR@/pki/@NAME@.pem
    SSLCertificateKeyFile @DIR@/pki/@NAME@.key
    Redirect permanent /moved /there
    RewriteEngine on
    RewriteCond %{HTTPS} !=on
    RewriteRule ^/secure https://%{HTTP_HOST}%{REQUEST_URI} [R=301,L]
    RewriteRule ^/secure - [R=204,L]
    ProxyPass /app http://127.0.0.1:9000/app upgrade=websocket
    ProxyPass /test.Echo/ h2c://127.0.0.1:9001/test.Echo/
</VirtualHost>
";

const APACHE_PAGE: &str = "<!--#echo var=\"SERVER_NAME\" --> saw <!--#echo var=\"REMOTE_ADDR\" -->, \
    <!--#echo var=\"REQUEST_SCHEME\" -->, host=<!--#echo var=\"HTTP_HOST\" -->\n";

const HAPROXY: &str = r#"
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout tunnel 60s
frontend web
    bind :443 ssl crt @DIR@/haproxy alpn h2,http/1.1
    bind [::]:443 v6only ssl crt @DIR@/haproxy alpn h2,http/1.1
    acl application path_beg /app
    acl call path_beg /test.Echo/
    http-request redirect location /there code 301 if { path /moved }
    http-request redirect scheme https code 301 if { path /secure } !{ ssl_fc }
    http-request return status 204 if { path /secure }
    http-request return status 200 content-type text/plain lf-string "%[ssl_fc_sni] saw %[src], https, host=%[req.hdr(host)]\n" if !application !call
    use_backend calls if call
    default_backend applications
backend applications
    server one 127.0.0.1:9000
backend calls
    server one 127.0.0.1:9001 proto h2
"#;

const CADDY: &str = r"
{
    admin 127.0.0.1:2019
    auto_https disable_redirects
    storage file_system @DIR@/caddy
}
@SITES@
";

const CADDY_SITE: &str = r#"
@NAME@ {
    tls @DIR@/pki/@NAME@.pem @DIR@/pki/@NAME@.key
    @insecure {
        path /secure
        protocol http
    }
    redir /moved /there 301
    redir @insecure https://{host}{uri} 301
    handle /secure {
        respond 204
    }
    handle /app* {
        reverse_proxy 127.0.0.1:9000
    }
    handle /test.Echo/* {
        reverse_proxy h2c://127.0.0.1:9001
    }
    handle {
        respond "@NAME@ saw {remote_host}, {scheme}, host={host}
"
    }
}
"#;
