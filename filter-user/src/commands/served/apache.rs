//! Apache, by `apache2ctl -t -D DUMP_VHOSTS`: which virtual hosts there are, and where each is configured.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::site::{Listen, ServedSite};

/// The sites that speak TLS, from what the dump prints and the files that it names.
///
/// # Errors
///
/// Returns the file that cannot be read.
pub(super) fn sites(dump: &str) -> Result<Vec<ServedSite>, String> {
    let mut sites = Vec::new();
    let root = server_root(dump);
    for (listen, path, line) in virtual_hosts(dump) {
        let text = read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        if let Some(site) = site(listen, (&path, line), &text, &root) {
            sites.push(site);
        }
    }
    Ok(sites)
}

/// What relative paths are below.
fn server_root(dump: &str) -> PathBuf {
    let mut lines = dump.lines();
    let root = lines.find_map(|line| line.strip_prefix("ServerRoot: \""));
    let root = root.and_then(|root| root.strip_suffix('"'));
    PathBuf::from(root.unwrap_or("/etc/apache2"))
}

/// Of each virtual host: where it listens, its file and its line.
fn virtual_hosts(dump: &str) -> Vec<(Listen, PathBuf, usize)> {
    let mut hosts = Vec::new();
    let mut listen = None;
    for line in dump.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        // `*:443  is a NameVirtualHost`, or `*:443  name (file:line)` where there is only one.
        if !line.starts_with(' ') && !line.starts_with('\t') {
            listen = Listen::parse(first);
        }
        let place = line
            .rsplit_once('(')
            .and_then(|(_, rest)| rest.strip_suffix(')'));
        let place = place.and_then(|place| place.rsplit_once(':'));
        let is_default = first == "default";
        if let (Some(listen), Some((file, number)), false) = (listen, place, is_default)
            && let Ok(number) = number.parse()
        {
            hosts.push((listen, PathBuf::from(file), number));
        }
    }
    hosts
}

/// The virtual host that begins in a line of a file; none, if it speaks no TLS.
fn site(
    listen: Listen,
    (file, begins): (&Path, usize),
    text: &str,
    root: &Path,
) -> Option<ServedSite> {
    let mut site = ServedSite {
        place: format!("Apache, {}:{begins}", file.display()),
        listens: vec![listen],
        ..ServedSite::default()
    };
    let mut is_tls = false;
    // Sections within it, which are of parts of the site.
    let mut depth = 0_u32;
    // Whether the outermost of them is the whole site all the same.
    let mut is_all = true;
    let (mut certificates, mut keys) = (Vec::new(), Vec::new());
    for line in lines(text, begins, root) {
        let words = words(&line);
        let (Some(name), arguments) = (words.first(), words.get(1..).unwrap_or_default()) else {
            continue;
        };
        let argument = || arguments.first().cloned().unwrap_or_default();
        let path = || root.join(argument());
        match name.to_ascii_lowercase().as_str() {
            "require" if arguments.join(" ").eq_ignore_ascii_case("all denied") => {
                site.refuses_all |= depth == 0 || depth == 1 && is_all;
            }
            end if end.starts_with("</") => depth = depth.saturating_sub(1),
            section if section.starts_with('<') => {
                if depth == 0 {
                    let part = argument();
                    is_all = section == "<location" && part.trim_matches(['"', '>']) == "/";
                }
                depth += 1;
            }
            _ if depth > 0 => {}
            name if name.starts_with("ssl") && argument().contains('$') => {
                let problem = format!("`{}` is set by a variable, and was not looked at", words[0]);
                site.notes.push(problem);
            }
            "servername" => {
                // `https://name:443` is allowed.
                let url = argument();
                let host = url.rsplit("//").next().unwrap_or_default();
                site.name(host.split(':').next().map(str::to_owned));
            }
            "serveralias" => site.name(arguments.iter().cloned()),
            "sslengine" => is_tls = argument().eq_ignore_ascii_case("on"),
            "sslcertificatefile" => certificates.push(path()),
            "sslcertificatekeyfile" => keys.push(path()),
            "sslcacertificatefile" => site.authority = Some(path()),
            "sslverifyclient" => site.verifies = argument().eq_ignore_ascii_case("require"),
            "include" | "includeoptional" => site.notes.push(format!(
                "What `{}` includes there was not looked at.",
                argument()
            )),
            _ => {}
        }
    }
    if !is_tls {
        return None;
    }
    if keys.is_empty() {
        // The key may be in the certificate's file.
        keys.clone_from(&certificates);
    }
    site.certificates = certificates.into_iter().zip(keys).collect();
    if site.verifies {
        site.notes.push(
            "Take `SSLVerifyClient require` out there: the gate demands the certificate in its place, and \
             has none to show."
                .to_owned(),
        );
    }
    Some(site)
}

/// The lines of the virtual host that begins there, with those of the files that it includes by their whole name, as
/// far as they can be read; and without the ends of `<IfModule ssl_module>`, which holds where a site speaks TLS.
fn lines(text: &str, begins: usize, root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut waiting: VecDeque<_> = text.lines().skip(begins).map(str::to_owned).collect();
    // Whether the end of each `<IfModule>` that is open stays.
    let mut open = Vec::new();
    let mut included = 0;
    while let Some(line) = waiting.pop_front() {
        let read_words = words(&line);
        let name = read_words.first().map(|name| name.to_ascii_lowercase());
        let argument = read_words.get(1).cloned().unwrap_or_default();
        let is_kept = match name.as_deref() {
            Some("</virtualhost>") => break,
            Some("<ifmodule") => {
                let module = argument.trim_end_matches('>');
                let is_kept = !["ssl_module", "mod_ssl.c"].contains(&module);
                open.push(is_kept);
                is_kept
            }
            Some("</ifmodule>") => open.pop().unwrap_or(true),
            Some("include" | "includeoptional") if included < INCLUDED_MAX => {
                let inner = read(&root.join(argument)).ok();
                included += 1;
                for within in inner.iter().flat_map(|inner| inner.lines().rev()) {
                    waiting.push_front(within.to_owned());
                }
                inner.is_none()
            }
            _ => true,
        };
        if is_kept {
            lines.push(line);
        }
    }
    lines
}

/// The words of a line, quoted or not; none of a comment.
fn words(line: &str) -> Vec<String> {
    let line = line.trim();
    if line.starts_with('#') {
        return Vec::new();
    }
    let mut words = Vec::new();
    let mut rest = line;
    while !rest.is_empty() {
        let quote = rest.chars().next().filter(|first| "\"'".contains(*first));
        let (word, after) = match quote {
            Some(quote) => {
                let inner = rest.get(1..).unwrap_or_default();
                inner.split_once(quote).unwrap_or((inner, ""))
            }
            None => rest.split_once(char::is_whitespace).unwrap_or((rest, "")),
        };
        words.push(word.to_owned());
        rest = after.trim_start();
    }
    words
}

/// A file, unless it is longer than any that people write.
fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(FILE_MAX).read_to_string(&mut text)?;
    Ok(text)
}

const FILE_MAX: u64 = 1 << 20;
/// Files that a virtual host may include, those among them that include each other.
const INCLUDED_MAX: usize = 32;

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn virtual_hosts_are_what_apache_says_of_itself() {
        let dump = "VirtualHost configuration:\n\
            *:443                  is a NameVirtualHost\n\
            \x20        default server shop.example (/etc/apache2/sites-enabled/shop.conf:1)\n\
            \x20        port 443 namevhost shop.example (/etc/apache2/sites-enabled/shop.conf:1)\n\
            \x20                alias www.shop.example\n\
            \x20        port 443 namevhost wiki.example (/etc/apache2/sites-enabled/wiki.conf:4)\n\
            203.0.113.10:8443      blog.example (/etc/apache2/sites-enabled/blog.conf:2)\n\
            ServerRoot: \"/etc/apache2\"\n\
            Mutex default: dir=\"/var/run/apache2/\" mechanism=default\n";

        let hosts = virtual_hosts(dump);

        let path = |name: &str| PathBuf::from(format!("/etc/apache2/sites-enabled/{name}.conf"));
        assert_eq!(
            hosts,
            [
                (Listen::Every(443), path("shop"), 1),
                (Listen::Every(443), path("wiki"), 4),
                (
                    Listen::One("203.0.113.10:8443".parse().unwrap()),
                    path("blog"),
                    2
                ),
            ]
        );
    }

    #[test]
    fn a_site_that_refuses_all_is_one_that_denies_all_of_it() {
        let refuses = |section: &str| {
            let text = format!(
                "<VirtualHost *:443>\nServerName a.example\nSSLEngine on\n{section}\nRequire all denied\n\
                 </Section>\n</VirtualHost>\n"
            );
            let (path, root) = (Path::new("/etc/apache2/a.conf"), Path::new("/etc/apache2"));
            let found = site(Listen::Every(443), (path, 1), &text, root);
            found.unwrap().refuses_all
        };

        assert!(refuses("<Location \"/\">"));
        assert!(refuses("<Location />"));
        assert!(!refuses("<Location \"/admin\">"));
        assert!(!refuses("<Directory \"/\">"));
        assert!(!refuses("<Files \".ht*\">"));
    }

    #[test]
    fn what_a_virtual_host_includes_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("demand.conf"), "SSLVerifyClient require\n").unwrap();
        // One that includes itself comes to an end.
        fs::write(
            path("outer.conf"),
            "Include demand.conf\nInclude outer.conf\n",
        )
        .unwrap();
        let verifies = |lines: &str| {
            let text = format!(
                "<VirtualHost *:443>\nSSLEngine on\n{lines}\n</VirtualHost>\nSSLVerifyClient require\n"
            );
            let found = site(
                Listen::Every(443),
                (&path("a.conf"), 1),
                &text,
                directory.path(),
            );
            let found = found.unwrap();
            (found.verifies, found.notes.len())
        };

        assert_eq!(verifies(""), (false, 0));
        assert_eq!(verifies("Include demand.conf"), (true, 1));
        assert!(verifies("Include outer.conf").0);
        assert_eq!(verifies("IncludeOptional gone.conf"), (false, 1));
        assert_eq!(
            verifies("<IfModule ssl_module>\nInclude demand.conf\n</IfModule>"),
            (true, 1)
        );
        assert_eq!(
            verifies("<IfModule !ssl_module>\nSSLVerifyClient require\n</IfModule>"),
            (false, 0)
        );
        assert_eq!(
            verifies("<IfModule gone_module>\nSSLVerifyClient require\n</IfModule>"),
            (false, 0)
        );
        // Behind the handshake, and not of what a deeper section says.
        assert_eq!(
            verifies("<Location />\nSSLVerifyClient require\n</Location>"),
            (false, 0)
        );
        assert_eq!(
            verifies("<Location /x>\nSSLVerifyClient require\n</Location>"),
            (false, 0)
        );
    }

    #[test]
    fn a_virtual_host_is_read_from_its_line_to_its_end() {
        let text = "<VirtualHost *:80>\nServerName other.example\n</VirtualHost>\n<VirtualHost *:443>\n\
            \x20 ServerName https://shop.example:443\n  ServerAlias www.shop.example \"*.shop.test\"\n\
            # ServerAlias no.example\n  SSLEngine on\n  SSLCertificateFile '/etc/ssl/a b.pem'\n\
            \x20 SSLCertificateKeyFile /etc/ssl/a.key\n  SSLVerifyClient require\n\
            \x20 SSLCACertificateFile ssl/cf.pem\n  <Location /x>\n  SSLVerifyClient none\n  </Location>\n\
            </VirtualHost>\nSSLEngine off\n";
        let path = Path::new("/etc/apache2/a.conf");

        let root = Path::new("/etc/apache2");
        let found = site(Listen::Every(443), (path, 4), text, root).unwrap();

        assert_eq!(
            found.names,
            ["shop.example", "www.shop.example", "*.shop.test"]
        );
        let pair = (
            PathBuf::from("/etc/ssl/a b.pem"),
            PathBuf::from("/etc/ssl/a.key"),
        );
        assert_eq!(found.certificates, [pair]);
        let authority = Some(Path::new("/etc/apache2/ssl/cf.pem"));
        assert_eq!(
            (found.verifies, found.authority.as_deref()),
            (true, authority)
        );
        assert!(!found.refuses_all);
        assert_eq!(site(Listen::Every(80), (path, 1), text, root), None);
    }
}
