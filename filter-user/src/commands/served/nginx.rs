//! nginx, by `nginx -T`: its configuration as it reads it, whole, with the name of each file before it.

use std::path::{Path, PathBuf};

use super::site::{Listen, ServedSite};

/// The sites that speak TLS, from what `nginx -T` prints.
///
/// # Errors
///
/// Returns what cannot be read.
pub(super) fn sites(dump: &str) -> Result<Vec<ServedSite>, String> {
    let mut reader = Reader::new(dump);
    let files = reader.files();
    let main = files.first().ok_or("`nginx -T` names no file")?;
    let mut sites = Vec::new();
    let tree = reader.block(main, &files, 0)?;
    for http in tree.iter().filter(|it| it.name() == "http") {
        let directory = main.name.parent().unwrap_or_else(|| Path::new("/"));
        for server in http.block.iter().filter(|it| it.name() == "server") {
            sites.extend(site(server, &http.block, directory));
        }
    }
    Ok(sites)
}

/// A server block as a site; none, if it speaks no TLS.
fn site(server: &Directive, http: &[Directive], directory: &Path) -> Option<ServedSite> {
    let all = |name: &str| -> Vec<&Directive> {
        let own: Vec<_> = server.block.iter().filter(|it| it.name() == name).collect();
        if own.is_empty() {
            // What is said above holds where nothing else is said.
            return http.iter().filter(|it| it.name() == name).collect();
        }
        own
    };
    let one = |name: &str| {
        let found = all(name);
        found.last().and_then(|it| it.words.get(1).cloned())
    };
    let path = |text: &str| directory.join(text);
    let is_on = one("ssl").as_deref() == Some("on");
    let own = server.block.iter().filter(|it| it.name() == "listen");
    let listens: Vec<_> = own
        .filter(|listen| is_on || listen.words.iter().any(|word| word == "ssl"))
        .filter_map(|listen| parse_listen(listen.words.get(1)?))
        .collect();
    if listens.is_empty() {
        return None;
    }
    let mut site = ServedSite {
        place: format!("nginx, {}:{}", server.file.display(), server.line),
        listens,
        ..ServedSite::default()
    };
    for names in all("server_name") {
        site.name(
            names
                .words
                .iter()
                .skip(1)
                .flat_map(|name| spelled_out(name)),
        );
    }
    let shown = all("ssl_certificate");
    let keys = all("ssl_certificate_key");
    let files = |directives: &[&Directive]| -> Vec<String> {
        let words = directives.iter().filter_map(|it| it.words.get(1).cloned());
        words.collect()
    };
    let pairs = files(&shown).into_iter().zip(files(&keys));
    for (certificate, key) in pairs {
        if certificate.contains('$') || key.contains('$') || certificate.starts_with("data:") {
            site.notes.push(format!(
                "left out: `{certificate}` is no file until a client has come"
            ));
            continue;
        }
        site.certificates.push((path(&certificate), path(&key)));
    }
    site.is_whole = true;
    site.refuses_all = one("ssl_reject_handshake").as_deref() == Some("on");
    // ngx_http_ssl_module: tickets are on, and the cache is `none`, where nothing is said.
    let has_tickets = one("ssl_session_tickets").is_none_or(|word| word != "off");
    let cache = one("ssl_session_cache");
    let has_cache = cache.is_some_and(|word| word != "none" && word != "off");
    site.resumes_sessions = Some(has_tickets || has_cache);
    let verifies = one("ssl_verify_client");
    site.verifies = verifies.as_deref() == Some("on");
    if let Some("on" | "optional") = verifies.as_deref() {
        let authority = one("ssl_client_certificate").or_else(|| one("ssl_trusted_certificate"));
        site.authority = authority.map(|file| path(&file));
    }
    site.notes.extend(notes(server, verifies.as_deref()));
    Some(site)
}

/// What the operator has to change in a server block, or look at.
fn notes(server: &Directive, verifies: Option<&str>) -> Vec<String> {
    let mut notes = Vec::new();
    if verifies == Some("on") {
        notes.push(
            "Take `ssl_verify_client on` out there: the gate demands the certificate in its place, and \
             has none to show."
                .to_owned(),
        );
    }
    if matches!(verifies, Some("optional" | "optional_no_ca")) {
        notes.push(
            "It asks clients for a certificate and serves those without: behind the gate none has one there, so \
             `$ssl_client_verify` is NONE, and what depends on it changes."
                .to_owned(),
        );
    }
    let listens = || server.block.iter().filter(|it| it.name() == "listen");
    let is_said = |option: &str| listens().any(|it| it.words.iter().any(|word| word == option));
    if is_said("default_server") {
        notes.push(
            "It answers to every other name as well today (`default_server`); the gate refuses names that \
             no [[gate.host]] has."
                .to_owned(),
        );
    }
    let mut names = server.block.iter().filter(|it| it.name() == "server_name");
    if names.any(|it| it.words.iter().any(|name| name.starts_with(['*', '.']))) {
        notes.push(
            "Its `*` stands for one label at the gate, and for any number of them in nginx: add the names \
             that have more."
                .to_owned(),
        );
    }
    if is_said("quic") {
        notes.push(
            "It answers HTTP/3 (`listen … quic`), which Cloudflare does not speak to origins: strangers \
             alone use it. Take it out, or protect the port: `filter.udp_ports`."
                .to_owned(),
        );
    }
    notes
}

/// `.example.com` stands for itself and all names below it.
fn spelled_out(name: &str) -> Vec<String> {
    match name.strip_prefix('.') {
        Some(parent) => vec![parent.to_owned(), format!("*.{parent}")],
        None => vec![name.to_owned()],
    }
}

/// Where `listen` says; none of UNIX sockets.
fn parse_listen(text: &str) -> Option<Listen> {
    if text.starts_with("unix:") {
        return None;
    }
    if let Ok(port) = text.parse() {
        return Some(Listen::Every(port));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
        _ => (text, HTTP),
    };
    Listen::on(host, port)
}

/// A line of the configuration, or a block.
#[derive(Debug, Default)]
struct Directive {
    words: Vec<String>,
    block: Vec<Self>,
    file: PathBuf,
    line: usize,
}

impl Directive {
    fn name(&self) -> &str {
        self.words.first().map_or("", String::as_str)
    }
}

/// A file of the dump.
struct DumpedFile<'a> {
    name: PathBuf,
    text: &'a str,
}

struct Reader<'a> {
    dump: &'a str,
    /// How many directives there may still be.
    left: usize,
}

impl<'a> Reader<'a> {
    fn new(dump: &'a str) -> Self {
        Self {
            dump,
            left: DIRECTIVES_MAX,
        }
    }

    /// The files, in the order in which nginx has read them.
    fn files(&self) -> Vec<DumpedFile<'a>> {
        let mut files = Vec::new();
        for part in self.dump.split(FILE_MARK).skip(1) {
            if let Some((name, text)) = part.split_once(":\n") {
                files.push(DumpedFile {
                    name: PathBuf::from(name),
                    text,
                });
            }
        }
        files
    }

    /// The directives of a file, with those that it includes in their places.
    fn block(
        &mut self,
        file: &DumpedFile<'a>,
        files: &[DumpedFile<'a>],
        depth: u32,
    ) -> Result<Vec<Directive>, String> {
        let blame = |line: usize, text: &str| format!("{}:{line}: {text}", file.name.display());
        if depth > DEPTH_MAX {
            return Err(blame(1, "files include each other too deeply"));
        }
        let mut open: Vec<Directive> = vec![Directive::default()];
        let mut words: Vec<String> = Vec::new();
        let mut begun = 1;
        for (line, token) in tokens(file.text) {
            if words.is_empty() {
                begun = line;
            }
            let mut directive = match token {
                Token::Word(word) => {
                    words.push(word);
                    continue;
                }
                Token::Open | Token::End => Directive {
                    words: std::mem::take(&mut words),
                    file: file.name.clone(),
                    line: begun,
                    block: Vec::new(),
                },
                Token::Close => match open.pop() {
                    Some(closed) if !open.is_empty() => closed,
                    _ => return Err(blame(line, "a `}` too many")),
                },
            };
            self.left = self
                .left
                .checked_sub(1)
                .ok_or("the configuration is too long")?;
            if matches!(token, Token::Open) {
                open.push(directive);
                continue;
            }
            let above = open.last_mut().ok_or("no block is open")?;
            if directive.name() == "include" {
                let pattern = directive.words.pop().unwrap_or_default();
                let own = |section: &&DumpedFile<'_>| is_named(&section.name, &pattern);
                for included in files.iter().filter(own) {
                    let more = self.block(included, files, depth + 1)?;
                    above.block.extend(more);
                }
            } else {
                above.block.push(directive);
            }
        }
        match open.len() {
            1 => Ok(open.pop().map(|root| root.block).unwrap_or_default()),
            _ => Err(blame(1, "a block is not closed")),
        }
    }
}

/// Whether the name of a file is that of an `include`, in which `*` stands for any part of a name; a relative
/// one is below the main file's directory.
fn is_named(name: &Path, pattern: &str) -> bool {
    let name = name.display().to_string();
    let Some((directory, last)) = pattern.rsplit_once('/') else {
        return name.rsplit('/').next() == Some(pattern);
    };
    let Some((above, file)) = name.rsplit_once('/') else {
        return false;
    };
    let is_there = above == directory || above.ends_with(&format!("/{directory}"));
    let is_meant = match last.split_once('*') {
        None => file == last,
        Some((start, end)) => {
            file.len() >= start.len() + end.len() && file.starts_with(start) && file.ends_with(end)
        }
    };
    is_there && is_meant
}

#[derive(Debug, PartialEq)]
enum Token {
    Word(String),
    Open,
    Close,
    End,
}

/// The words and signs of a file, with the lines that they are in: quoted or not, without comments.
fn tokens(text: &str) -> Vec<(usize, Token)> {
    let mut tokens = Vec::new();
    let mut line = 1;
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '\n' => line += 1,
            letter if letter.is_whitespace() => {}
            '#' => while letters.next_if(|next| *next != '\n').is_some() {},
            '{' => tokens.push((line, Token::Open)),
            '}' => tokens.push((line, Token::Close)),
            ';' => tokens.push((line, Token::End)),
            quote @ ('"' | '\'') => {
                let mut word = String::new();
                let at = line;
                while let Some(next) = letters.next() {
                    match next {
                        next if next == quote => break,
                        '\\' => word.extend(letters.next()),
                        next => {
                            line += usize::from(next == '\n');
                            word.push(next);
                        }
                    }
                }
                tokens.push((at, Token::Word(word)));
            }
            first => {
                let mut word = String::from(first);
                // `${…}` is part of a word.
                let is_part = |next: &char| !next.is_whitespace() && !";{}".contains(*next);
                loop {
                    if word.ends_with('$') && letters.next_if_eq(&'{').is_some() {
                        word.push('{');
                        while let Some(next) = letters.next_if(|next| *next != '}' && *next != '\n')
                        {
                            word.push(next);
                        }
                        word.extend(letters.next_if_eq(&'}'));
                    }
                    match letters.next_if(is_part) {
                        Some('\\') => word.extend(letters.next()),
                        Some(next) => word.push(next),
                        None => break,
                    }
                }
                tokens.push((line, Token::Word(word)));
            }
        }
    }
    tokens
}

/// How `nginx -T` begins a file.
const FILE_MARK: &str = "# configuration file ";
const HTTP: u16 = 80;
/// Files within files.
const DEPTH_MAX: u32 = 16;
/// What no configuration that people write has.
const DIRECTIVES_MAX: usize = 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    const DUMP: &str = r#"nginx: the configuration file /etc/nginx/nginx.conf syntax is ok
# configuration file /etc/nginx/nginx.conf:
user www-data;
events { worker_connections 768; }
http {
    log_format main '$remote_addr "$request" {';  # a { in quotes
    ssl_certificate /etc/ssl/all.pem;
    ssl_certificate_key ssl/all.key;
    include /etc/nginx/mime.types;
    include /etc/nginx/sites-enabled/*;
}
stream { server { listen 8443 ssl; } }

# configuration file /etc/nginx/mime.types:
types { text/html html; }

# configuration file /etc/nginx/sites-enabled/shop:
server {
    listen 80;
    server_name shop.example;
    return 301 https://$host$request_uri;
}
server {
    listen 443 ssl http2;
    listen [::]:443 ssl http2;
    listen 443 quic;
    server_name shop.example .shop.test "www.shop.example" ~^(?<x>.+)\.example$ _;
    ssl_certificate "/etc/ssl/shop.pem";
    ssl_certificate_key /etc/ssl/shop.key;
    ssl_verify_client on;
    ssl_client_certificate cloudflare.crt;
    location ~ \.php$ { fastcgi_param A ${b}; }
}

# configuration file /etc/nginx/sites-enabled/wiki:
server {
    listen 203.0.113.10:8443 ssl;
    server_name wiki.example;
}
server { listen unix:/run/x.sock ssl; server_name local.example; }
server { listen 443 ssl; server_name $hostname; ssl_certificate $ssl_server_name.pem; ssl_certificate_key x; }
"#;

    #[test]
    fn sites_are_what_nginx_says_of_itself() {
        let sites = sites(DUMP).unwrap();

        let [shop, wiki, other] = sites.as_slice() else {
            panic!("{sites:#?}");
        };
        assert_eq!(shop.place, "nginx, /etc/nginx/sites-enabled/shop:6");
        assert_eq!(
            shop.names,
            [
                "shop.example",
                "shop.test",
                "*.shop.test",
                "www.shop.example"
            ]
        );
        assert_eq!(shop.other_names.len(), 2);
        let pair = (
            PathBuf::from("/etc/ssl/shop.pem"),
            PathBuf::from("/etc/ssl/shop.key"),
        );
        assert_eq!(shop.certificates, [pair]);
        assert_eq!(
            shop.authority.as_deref(),
            Some(Path::new("/etc/nginx/cloudflare.crt"))
        );
        assert_eq!(shop.notes.len(), 3, "{:?}", shop.notes);
        assert_eq!(shop.only_address(), None);

        // What is said for all holds for it.
        let inherited = (
            PathBuf::from("/etc/ssl/all.pem"),
            PathBuf::from("/etc/nginx/ssl/all.key"),
        );
        assert_eq!(wiki.certificates, [inherited]);
        assert_eq!(
            wiki.only_address(),
            Some("203.0.113.10:8443".parse().unwrap())
        );
        assert!(wiki.host().contains("upstream = \"203.0.113.10:8443\""));

        assert_eq!(
            other.problem(),
            Some("it has no name that a client can send")
        );
        assert!(!other.host().contains("[[gate.host]]"));
    }

    #[test]
    fn what_is_no_configuration_is_no_site() {
        for (dump, expected) in [
            ("", "names no file"),
            ("# configuration file /a:\nhttp { server {", "is not closed"),
            ("# configuration file /a:\n}", "too many"),
            ("# configuration file /a:\ninclude /a;", "too deeply"),
        ] {
            let error = sites(dump).unwrap_err();
            assert!(error.contains(expected), "{dump}: {error}");
        }
    }
}
