//! Web servers that run what `pullgate snippet` prints.

use std::fs;

use crate::gate::Rig;
use crate::pki::{BLOG, SHOP};
use crate::web::Server;

/// What is printed for a server.
#[must_use]
pub fn print(rig: &Rig, server: &str, pairing: &str) -> String {
    let output = rig.pullgate(&["snippet", server, pairing]);
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

/// Starts a server with what is printed for it, and what it needs besides.
#[must_use]
pub fn start(rig: &Rig, server: &str, pairing: &str) -> Server {
    let text = print(rig, server, pairing);
    // Where HAProxy looks for a key that is not in the certificate's file.
    for name in [SHOP, BLOG] {
        let path = |ending: &str| rig.pki.path(&format!("{name}.{ending}"));
        fs::copy(path("key"), path("pem.key")).unwrap();
    }
    let htdocs = rig.network.path("htdocs");
    fs::create_dir(&htdocs).unwrap();
    fs::write(htdocs.join("index.html"), APACHE_PAGE).unwrap();
    fs::create_dir(htdocs.join("blog")).unwrap();
    fs::write(htdocs.join("blog/index.html"), "posts\n").unwrap();
    // Each site has pages of its own.
    let (shop, blog) = text.split_at(text.find(BLOG).unwrap_or(text.len()));
    let htdocs = htdocs.display().to_string();
    let text = shop.replace("/var/www/html", &htdocs)
        + &blog.replace("/var/www/html", &format!("{htdocs}/blog"));
    // nginx and HAProxy can say whom they serve.
    let text = text.replace(
        "    root /",
        "    location = / { return 200 \"$remote_addr $document_root\\n\"; }\n    root /",
    );
    let text = match server {
        "caddy" => text.replace(
            "location = / { return 200 \"$remote_addr $document_root\\n\"; }\n    ",
            "",
        ),
        _ => text,
    };
    let (program, words): (_, &[&str]) = match server {
        "apache" => ("apache2", &["-DFOREGROUND", "-f"]),
        "haproxy" => ("haproxy", &["-db", "-f"]),
        "caddy" => ("caddy", &["run", "--adapter", "caddyfile", "--config"]),
        _ => ("nginx", &[]),
    };
    let text = match server {
        "nginx" => format!(
            "daemon off; user root; pid @DIR@/nginx.pid; error_log @DIR@/nginx.log; events {{}}\n\
             http {{ access_log off; @NGINX@\n{text}\n}}"
        ),
        "apache" => APACHE
            .replace(
                "@LISTEN@",
                if pairing == "--own-mtls" {
                    "Listen 443"
                } else {
                    ""
                },
            )
            .replace("@SNIPPET@", &text),
        "haproxy" => format!("{HAPROXY}{text}{HAPROXY_APPLICATION}"),
        _ if pairing == "--own-mtls" => text.replacen(
            "auto_https",
            "admin off\n    storage file_system @DIR@/caddy\n    auto_https",
            1,
        ),
        _ => {
            format!("{{\n admin off\n auto_https off\n storage file_system @DIR@/caddy\n}}\n{text}")
        }
    };
    match pairing {
        "--own-mtls" => Server::start_at(&rig.network, program, words, &text, "127.0.0.1:443"),
        _ => Server::start(&rig.network, program, words, &text),
    }
}

/// A page that says whom Apache serves.
pub const APACHE_PAGE: &str = "page <!--#echo var=\"REMOTE_ADDR\" -->\n";
/// Apache's configuration, but for what listens and what is printed.
pub const APACHE: &str = "ServerRoot @DIR@\nServerName origin.example\nPidFile @DIR@/apache.pid\n\
    ErrorLog @DIR@/apache.log\nMutex file:@DIR@\n\
    @APACHE@\n\
    @LISTEN@\nDirectoryIndex index.html\n\
    <Directory @DIR@/htdocs>\nRequire all granted\nOptions +Includes\n\
    SetOutputFilter INCLUDES\n</Directory>\n@SNIPPET@\n";
/// What HAProxy needs in front of what is printed.
pub const HAPROXY: &str = "defaults\n    mode http\n    timeout connect 5s\n    timeout client 5s\n    \
    timeout server 5s\n";
/// And behind it.
pub const HAPROXY_APPLICATION: &str = "backend application\n    http-request return status 200 \
    content-type text/plain lf-string \"%[src]\\n\"\n";
