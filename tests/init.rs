//! Verifies `pullgate init` with what Debian's own nginx and Apache say of themselves.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use pullgate::config::{ClientAuth, Config, Mode, Trust, UpstreamTarget};
use tests::daemon::binary;
use tests::net::{Host, Network};
use tests::pki::{BLOG, Pki, SHOP, WIKI};
use tests::web::Server;

#[test]
fn the_sites_of_nginx_become_hosts() {
    let network = Network::new();
    let pki = Pki::new(&network.path("pki"));
    let sites = network.path("nginx/sites-enabled");
    fs::create_dir_all(&sites).unwrap();
    let pki = pki.path("").display().to_string();
    let main = format!(
        "pid {0}/nginx.pid; error_log {0}/error.log;\nevents {{}}\nhttp {{\n  access_log off;\n  include \
         /etc/nginx/sites-enabled/*;\n}}\n",
        network.path("").display()
    );
    fs::write(network.path("nginx/nginx.conf"), main).unwrap();
    for (name, more) in [
        (SHOP, "server_name .shop.example;"),
        (
            BLOG,
            "server_name blog.example; ssl_verify_client on; ssl_client_certificate @PKI@/other-ca.pem;",
        ),
        (WIKI, "server_name wiki.example blog.example;"),
    ] {
        let site = format!(
            "server {{ listen 80; return 301 https://$host$request_uri; }}\nserver {{\n  listen 443 ssl;\n  \
             listen [::]:443 ssl;\n  {more}\n  ssl_certificate @PKI@/{name}.pem;\n  \
             ssl_certificate_key @PKI@/{name}.key;\n}}\n"
        );
        fs::write(sites.join(name), site.replace("@PKI@/", &pki)).unwrap();
    }

    let output = init(&network, &network.path("nginx"), "/etc/nginx", &[]);
    let text = text(&output.stdout);
    let config = Config::parse(Path::new("/pullgate.toml"), &text).unwrap();

    let filter = config.live.filter.unwrap();
    assert_eq!(
        (filter.mode, filter.ports),
        (Mode::Monitor, vec![443]),
        "{text}"
    );
    assert!(config.boot.steer);
    let gate = config.live.gate.unwrap();
    let names: Vec<Vec<String>> = gate
        .hosts
        .iter()
        .map(|host| {
            host.names
                .iter()
                .map(|name| name.value.to_string())
                .collect()
        })
        .collect();
    // In the order of the files' names, as nginx reads them.
    assert_eq!(
        names,
        [vec![BLOG], vec![SHOP, "*.shop.example"], vec![WIKI]],
        "{text}"
    );
    // What refuses today goes on doing so.
    let demands: Vec<_> = gate.hosts.iter().map(|host| host.client_auth).collect();
    assert_eq!(
        demands,
        [ClientAuth::Enforce, ClientAuth::Log, ClientAuth::Log]
    );
    for host in &gate.hosts {
        assert_eq!(host.upstream.value.target, UpstreamTarget::SamePort);
        assert!(host.certificates[0].key.value.is_file());
    }
    let authority = Trust::CaFile(format!("{pki}other-ca.pem").into());
    assert_eq!(gate.hosts[0].trust[0].value, authority);
    assert!(text.contains("Take `ssl_verify_client on` out"), "{text}");
    assert!(
        text.contains("`blog.example` is another site's already"),
        "{text}"
    );
}

#[test]
fn the_virtual_hosts_of_apache_become_hosts() {
    let network = Network::new();
    let pki = Pki::new(&network.path("pki"));
    let directory = network.path("apache2");
    let copied = Command::new("cp")
        .args(["--archive", "/etc/apache2"])
        .arg(&directory)
        .status();
    assert!(copied.unwrap().success());
    for module in ["ssl.load", "ssl.conf", "socache_shmcb.load"] {
        let link = directory.join("mods-enabled").join(module);
        if !link.exists() {
            std::os::unix::fs::symlink(format!("../mods-available/{module}"), link).unwrap();
        }
    }
    let pki = pki.path("").display().to_string();
    let sites = [(SHOP, "ServerAlias www.shop.example"), (WIKI, "")].map(|(name, more)| {
        format!(
            "<VirtualHost *:443>\n  ServerName {name}\n  {more}\n  SSLEngine on\n  SSLCertificateFile \
             {pki}{name}.pem\n  SSLCertificateKeyFile {pki}{name}.key\n</VirtualHost>\n"
        )
    });
    fs::write(directory.join("sites-enabled/sites.conf"), sites.concat()).unwrap();

    let output = init(&network, &directory, "/etc/apache2", &[]);
    let text = text(&output.stdout);
    let config = Config::parse(Path::new("/pullgate.toml"), &text).unwrap();

    let gate = config.live.gate.unwrap();
    let names = gate.hosts.iter().flat_map(|host| &host.names);
    let names: Vec<_> = names.map(|name| name.value.to_string()).collect();
    assert_eq!(names, [SHOP, "www.shop.example", WIKI], "{text}");
    let key = &gate.hosts[1].certificates[0].key.value;
    assert_eq!(key.display().to_string(), format!("{pki}{WIKI}.key"));
}

#[test]
fn the_sites_of_caddy_become_hosts() {
    let network = Network::new();
    let pki = Pki::new(&network.path("pki"));
    let directory = network.path("caddy");
    fs::create_dir(&directory).unwrap();
    let pki = pki.path("").display().to_string();
    let caddyfile = format!(
        "{SHOP}, www.shop.example {{\n  tls {pki}{SHOP}.pem {pki}{SHOP}.key\n  respond shop\n}}\n\
         {BLOG} {{\n  respond blog\n}}\n\
         {WIKI}:8443 {{\n  bind 203.0.113.10\n  tls {pki}{WIKI}.pem {pki}{WIKI}.key\n  respond wiki\n}}\n"
    );
    fs::write(directory.join("Caddyfile"), caddyfile).unwrap();

    let output = init(&network, &directory, "/etc/caddy", &[]);
    let text = text(&output.stdout);
    let config = Config::parse(Path::new("/pullgate.toml"), &text).unwrap();

    let gate = config.live.gate.unwrap();
    let names = gate.hosts.iter().flat_map(|host| &host.names);
    let names: BTreeSet<_> = names.map(|name| name.value.to_string()).collect();
    let expected = [SHOP, "www.shop.example", WIKI].map(str::to_owned);
    assert_eq!(names, BTreeSet::from(expected), "{text}");
    // Its certificate is fetched by Caddy, from nowhere that is known here.
    assert!(
        text.contains("Caddy fetches these certificates by itself"),
        "{text}"
    );
    let ports = &config.live.filter.unwrap().ports;
    assert_eq!(ports, &[443, 8443]);
}

#[test]
fn it_is_written_where_no_operators_is() {
    let network = Network::new();
    let target = network.path("pullgate.toml");
    let empty = network.path("nginx");
    fs::create_dir(&empty).unwrap();
    fs::write(empty.join("nginx.conf"), "events {\n").unwrap();
    let at = target.display().to_string();

    // A web server whose configuration is broken is a comment.
    let output = init(
        &network,
        &empty,
        "/etc/nginx",
        &["--config", &at, "--write"],
    );
    assert_eq!(text(&output.stdout).trim(), format!("{at}: written"));
    let written = fs::read_to_string(&target).unwrap();
    assert!(
        written.contains("# What /usr/sbin/nginx serves cannot be read"),
        "{written}"
    );
    assert!(!written.contains("\n[gate]"), "{written}");
    assert_eq!(
        fs::metadata(&target).unwrap().permissions().mode() & 0o777,
        0o640
    );

    // By now it is the operator's.
    let output = init(
        &network,
        &empty,
        "/etc/nginx",
        &["--config", &at, "--write"],
    );
    assert_eq!(output.status.code(), Some(78));
    let error = text(&output.stderr);
    assert!(
        error.contains("is not the one that the package has brought"),
        "{error}"
    );
    assert_eq!(fs::read_to_string(&target).unwrap(), written);

    // The package's is not.
    fs::write(&target, include_str!("../filter-user/dist/pullgate.toml")).unwrap();
    let output = init(
        &network,
        &empty,
        "/etc/nginx",
        &["--config", &at, "--write"],
    );
    assert!(output.status.success());
    assert_eq!(fs::read_to_string(&target).unwrap(), written);
}

#[test]
fn a_stopped_web_servers_sites_are_left_out_while_another_listens() {
    let network = Network::new();
    let pki = Pki::new(&network.path("pki"));
    let [nginx, caddy] = ["nginx", "caddy"].map(|name| network.path(name));
    for directory in [&nginx, &caddy] {
        fs::create_dir(directory).unwrap();
    }
    let pki = pki.path("").display().to_string();
    let [certificate, key] = ["pem", "key"].map(|ending| format!("{pki}{SHOP}.{ending}"));
    fs::write(
        nginx.join("nginx.conf"),
        format!(
            "pid {0}/nginx.pid; error_log {0}/error.log; events {{}}\nhttp {{ access_log off; server {{ listen 443 \
             ssl; server_name {SHOP}; ssl_certificate {certificate}; ssl_certificate_key {key}; }} }}\n",
            network.path("").display()
        ),
    )
    .unwrap();
    let caddyfile = format!(
        "{{\n  admin off\n  storage file_system {0}/storage\n  auto_https disable_redirects\n}}\n{SHOP} {{\n  tls \
         {certificate} {key}\n  respond shop\n}}\n",
        network.path("").display()
    );
    fs::write(caddy.join("Caddyfile"), &caddyfile).unwrap();
    let mounted = format!("/etc/nginx && mount --bind {} /etc/caddy", caddy.display());
    let look = || text(&init(&network, &nginx, &mounted, &[]).stdout);

    let of_both = look();
    assert!(
        of_both.contains("left out: its names are another site's already"),
        "{of_both}"
    );
    assert!(of_both.contains("# nginx, "), "{of_both}");

    let words = ["run", "--adapter", "caddyfile", "--config"];
    let _caddy = Server::start_at(&network, "caddy", &words, &caddyfile, "127.0.0.1:443");
    let of_one = look();
    assert!(
        of_one.contains("nginx is installed and does not listen: its sites are left out."),
        "{of_one}"
    );
    let config = Config::parse(Path::new("/pullgate.toml"), &of_one).unwrap();
    let gate = config.live.gate.unwrap();
    assert_eq!(gate.hosts.len(), 1, "{of_one}");
    assert!(!of_one.contains("# nginx, "), "{of_one}");
}

/// Runs `pullgate init` where the configuration of a web server is another one.
fn init(network: &Network, directory: &Path, mounted: &str, arguments: &[&str]) -> Output {
    let script = format!(
        "mount --bind {} {mounted} && exec {} {} init {}",
        directory.display(),
        binary().display(),
        arguments
            .iter()
            .take(2)
            .copied()
            .collect::<Vec<_>>()
            .join(" "),
        arguments
            .iter()
            .skip(2)
            .copied()
            .collect::<Vec<_>>()
            .join(" "),
    );
    let words = ["unshare", "--mount", "--", "sh", "-c", &script];
    let output = network.output(Host::Origin, &words);
    let error = text(&output.stderr);
    assert!(
        !output.stdout.is_empty() || output.status.code() == Some(78),
        "{error}"
    );
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
