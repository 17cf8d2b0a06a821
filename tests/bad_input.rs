//! Verifies that bad input gets one sentence with file, line, field and remedy, the right exit
//! code, and leaves the host as it was; from `check` and from `run` alike.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::cell::Cell;
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;
use tests::net::{Host, Network};
use tests::pki::{Pki, SHOP};
use tests::{daemon, eventually};

#[test]
fn a_good_configuration_is_in_order() {
    let bench = Bench::new();

    let output = bench.pullgate(&bench.text(), &["check"]);

    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    for line in [
        "shop.example.pem: 2 certificates\n",
        "shop.example.key: 1 key\n",
        "ours-ca.pem: 1 CA\n",
    ] {
        assert!(text.contains(line), "{text}");
    }
    assert!(text.ends_with(": OK\n"), "{text}");
}

#[test]
fn a_check_is_json_for_programs_and_takes_the_file_as_an_argument() {
    let bench = Bench::new();
    let path = bench.write(&bench.text()).display().to_string();
    let check = || {
        let elsewhere = bench.network.path("nowhere.toml");
        let output = daemon::output(&bench.network, &elsewhere, &["check", &path, "--json"]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), report)
    };

    let (code, report) = check();
    assert_eq!((code, &report["ok"]), (Some(0), &Value::Bool(true)));
    let files = report["files"].as_array().unwrap();
    assert!(files.iter().any(|file| file["what"] == "CA"), "{report}");
    assert_eq!(report["findings"][0]["severity"], "warning");

    fs::remove_file(bench.pki.path("ours-ca.pem")).unwrap();
    let (code, report) = check();
    assert_eq!((code, &report["ok"]), (Some(78), &Value::Bool(false)));
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("`gate.host.trust`: "), "{error}");
}

#[test]
fn a_missing_configuration_is_named() {
    let bench = Bench::new();
    let missing = bench.network.path("nowhere.toml");

    let output = daemon::output(&bench.network, &missing, &["check"]);

    assert_eq!(output.status.code(), Some(78));
    assert!(
        stderr(&output).contains("nowhere.toml cannot be read"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_missing_file_is_named() {
    let bench = Bench::new();
    bench.refuses(
        &bench.text().replace("shop.example.pem", "gone.pem"),
        "gate.host.certificate",
    );
}

#[test]
fn a_key_that_others_may_read_is_refused() {
    let bench = Bench::new();
    let key = bench.pki.path(&format!("{SHOP}.key"));
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();

    bench.refuses(&bench.text(), "gate.host.key");
}

#[test]
fn a_chain_in_the_wrong_order_is_refused_for_that() {
    let bench = Bench::new();
    let path = bench.pki.path("shop.example.pem");
    let chain = fs::read_to_string(&path).unwrap();
    let (leaf, issuer) = chain.split_at(chain.rfind("-----BEGIN").unwrap());
    fs::write(&path, format!("{issuer}{leaf}")).unwrap();

    bench.refuses(&bench.text(), "gate.host.key");
}

#[test]
fn the_key_of_a_certificate_belongs_to_it_whatever_else_is_in_there() {
    let bench = Bench::new();
    let script = "cd @PKI@ && set -e
        printf 'certificatePolicies=critical,2.5.29.32.0\\nsubjectAltName=DNS:shop.example\\n' > ext
        openssl req -new -key shop.example.key -subj /CN=shop.example -out csr
        openssl x509 -req -in csr -signkey shop.example.key -days 9 -out version1.pem
        openssl x509 -req -in csr -signkey shop.example.key -days 9 -extfile ext -out policies.pem";
    let directory = bench.pki.path("");
    let script = script.replace("@PKI@", &directory.display().to_string());
    let made = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert!(made.status.success(), "{}", stderr(&made));

    for name in ["version1.pem", "policies.pem"] {
        let text = bench.text().replace("shop.example.pem", name);
        let output = bench.pullgate(&text, &["check"]);
        assert_eq!(output.status.code(), Some(0), "{name}: {}", stderr(&output));
    }
}

#[test]
fn a_certificate_without_its_issuers_is_named() {
    let bench = Bench::new();
    let path = bench.pki.path("shop.example.pem");
    let chain = fs::read_to_string(&path).unwrap();
    let words = "does not contain the certificate of its issuer `CN=Web CA`";
    let check = || stderr(&bench.pullgate(&bench.text(), &["check"]));
    assert!(!check().contains(words));

    fs::write(&path, &chain[..chain.rfind("-----BEGIN").unwrap()]).unwrap();
    let error = check();
    assert!(error.contains(words), "{error}");
    assert!(error.contains("fullchain.pem"), "{error}");
}

#[test]
fn a_ca_that_may_not_sign_is_refused() {
    let bench = Bench::new();
    let ca = bench.pki.ours.intermediate("no signer", |params| {
        params.key_usages = vec![rcgen::KeyUsagePurpose::CrlSign];
    });
    bench.pki.write("ours-ca.pem", ca.pem());

    bench.refuses(&bench.text(), "gate.host.trust");
}

#[test]
fn what_others_may_change_is_refused() {
    let bench = Bench::new();
    let allow = |name: &str, mode| {
        let path = bench.pki.path(name);
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    for (name, field) in [
        ("shop.example.pem", "gate.host.certificate"),
        ("ours-ca.pem", "gate.host.trust"),
    ] {
        allow(name, 0o666);
        bench.refuses(&bench.text(), field);
        allow(name, 0o644);
    }
    allow("", 0o777);
    bench.refuses(&bench.text(), "gate.host.certificate");
    allow("", 0o755);

    // Who renews certificates may be anybody; who says which clients are trusted may not.
    let own = |name: &str, user| chown(bench.pki.path(name), Some(user), None).unwrap();
    own("shop.example.pem", 1);
    assert!(bench.pullgate(&bench.text(), &["check"]).status.success());
    own("ours-ca.pem", 1);
    bench.refuses(&bench.text(), "gate.host.trust");
    own("ours-ca.pem", 0);

    bench.pki.write("list.txt", "173.245.48.0/20");
    allow("list.txt", 0o644);
    own("list.txt", 1);
    let list = bench.pki.path("list.txt");
    let sources = format!("sources = [{{ file = \"{}\" }}]", list.display());
    let text = bench.text() + &format!("[ranges]\n{sources}\n");
    let checked = bench.pullgate(&text, &["check"]);
    assert_eq!(checked.status.code(), Some(78));
    let error = stderr(&checked);
    assert!(error.contains("`ranges.sources"), "{error}");
    assert!(error.contains("by the user 1"), "{error}");

    // Root could read what the confined role could not.
    allow("list.txt", 0o600);
    let error = stderr(&bench.pullgate(&text, &["check"]));
    assert!(error.contains("list.txt cannot be read"), "{error}");
}

#[test]
fn a_key_that_can_not_be_read_is_named() {
    let bench = Bench::new();
    let path = bench.write(&bench.text());
    bench.let_others_in();
    for name in ["shop.example.pem", "ours-ca.pem"] {
        let mode = fs::Permissions::from_mode(0o644);
        fs::set_permissions(bench.pki.path(name), mode).unwrap();
    }

    // Root reads everything, unless the capabilities that let it are gone.
    for words in [&["check"] as &[_], &["run", "--only", "gate"]] {
        let output = bench
            .without("-dac_override,-dac_read_search", Some("1"))
            .arg("--config")
            .arg(&path)
            .args(words)
            .output()
            .unwrap();

        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(77), "{words:?}: {text}");
        let named = "shop.example.key cannot be read";
        assert!(text.contains(named), "{words:?}: {text}");
    }
}

#[test]
fn a_key_that_does_not_match_the_certificate_is_refused() {
    let bench = Bench::new();
    bench.refuses(
        &bench.text().replace("shop.example.key", "blog.example.key"),
        "gate.host.key",
    );
}

#[test]
fn a_key_that_is_none_is_refused() {
    let bench = Bench::new();
    bench.pki.write("none.key", "<html>");
    bench.refuses(
        &bench.text().replace("shop.example.key", "none.key"),
        "gate.host.key",
    );
}

#[test]
fn text_that_looks_like_a_section_and_is_not_read_is_refused_by_its_line() {
    let bench = Bench::new();
    let (ours, other) = (bench.pki.ours.pem(), bench.pki.other.pem());
    let next_year = time::OffsetDateTime::now_utc() + std::time::Duration::from_secs(365 * 86_400);
    let lists = [&bench.pki.ours, &bench.pki.other].map(|ca| ca.crl(&[2], next_year));
    let glued = |first: &str, second: &str| format!("{}{second}", first.trim_end());
    let lines = ours.trim_end().lines().count();
    let trust = bench.text();

    bench.pki.write("glued.pem", &glued(ours, other));
    bench.refuses_line(
        &trust.replace("ours-ca.pem", "glued.pem"),
        "gate.host.trust",
        lines,
    );
    bench.pki.write("mark.pem", &format!("\u{feff}{ours}"));
    bench.refuses(&trust.replace("ours-ca.pem", "mark.pem"), "gate.host.trust");
    bench.pki.write("mixed.pem", &format!("{ours}{}", lists[0]));
    bench.refuses_line(
        &trust.replace("ours-ca.pem", "mixed.pem"),
        "gate.host.trust",
        lines + 1,
    );
    bench.pki.write("lists.pem", &glued(&lists[0], &lists[1]));
    let crl = format!(
        "crl = [\"{}\"]\nupstream",
        bench.pki.path("lists.pem").display()
    );
    let lines = lists[0].trim_end().lines().count();
    bench.refuses_line(&trust.replacen("upstream", &crl, 1), "gate.host.crl", lines);
    bench.pki.write(
        "both.pem",
        &format!("{}{}", lists[0].trim_end(), format_args!("\n{}", lists[1])),
    );
    let output = bench.pullgate(
        &trust.replacen("upstream", &crl.replace("lists.pem", "both.pem"), 1),
        &["check"],
    );
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("both.pem: 2 revocation lists\n"), "{text}");
}

#[test]
fn a_file_of_two_keys_is_refused() {
    let bench = Bench::new();
    let keys = [SHOP, "blog.example"].map(|name| {
        let path = bench.pki.path(&format!("{name}.key"));
        fs::read_to_string(path).unwrap()
    });
    bench.pki.write("two.key", &keys.concat());
    bench.refuses(
        &bench.text().replace("shop.example.key", "two.key"),
        "gate.host.key",
    );
}

#[test]
fn an_expired_certificate_is_warned_of() {
    let bench = Bench::new();
    bench
        .pki
        .write_identity("old", &bench.pki.web.expired_server(SHOP));
    let text = bench.text();
    let text = text.replace("shop.example.pem", "old.pem");
    let text = text.replace("shop.example.key", "old.key");

    // Other hosts, and revocations, must not wait for it.
    let output = bench.pullgate(&text, &["check"]);

    assert!(output.status.success(), "{}", stderr(&output));
    let warning = "`gate.host.certificate`: the certificate of shop.example expired 60 min ago";
    assert!(stderr(&output).contains(warning), "{}", stderr(&output));
}

#[test]
fn a_ca_file_without_a_ca_is_refused() {
    let bench = Bench::new();
    bench.pki.write_identity("leaf", &bench.pki.ours.client());
    bench.refuses(
        &bench.text().replace("ours-ca.pem", "leaf.pem"),
        "gate.host.trust",
    );
    bench.pki.write("empty.pem", "");
    bench.refuses(
        &bench.text().replace("ours-ca.pem", "empty.pem"),
        "gate.host.trust",
    );
}

#[test]
fn an_unknown_field_is_refused() {
    let bench = Bench::new();
    bench.refuses(
        &bench.text().replace("[gate]", "[gate]\nlitsen = []"),
        "gate.litsen",
    );
}

#[test]
fn a_bad_range_is_refused() {
    let bench = Bench::new();
    bench.refuses(
        &bench
            .text()
            .replace("[gate]", "[ranges]\nallow = [\"192.0.2.0/240\"]\n[gate]"),
        "ranges.allow[0]",
    );
}

#[test]
fn what_cannot_be_an_interfaces_name_is_refused() {
    let bench = Bench::new();
    for name in ["a/b", "", "wan0:1", "sixteen-letters-"] {
        bench.refuses(&bench.text().replace("wan0", name), "filter.interfaces");
    }
}

#[test]
fn an_interface_that_does_not_exist_is_a_typo_to_check_and_waited_for_by_run() {
    let bench = Bench::new();
    let text = bench.text().replace("wan0", "wan9");

    let output = bench.pullgate(&text, &["check"]);

    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(78), "{error}");
    for word in [
        "`filter.interfaces`: ",
        "interface `wan9` does not exist",
        "`ip link` lists",
    ] {
        assert!(error.contains(word), "{word}: {error}");
    }
    // An operator who puts it on trial waits for the answer.
    let trial = ["run", "--only", "filter", "--confirm", "10s"];
    let output = bench.pullgate(&text, &trial);
    assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
    assert!(stderr(&output).contains("interface `wan9` does not exist"));
}

#[test]
fn two_hosts_with_one_name_are_refused() {
    let bench = Bench::new();
    let text = bench.text();
    let host = &text[text.find("[[gate.host]]").unwrap()..];
    bench.refuses(&format!("{text}{host}"), "gate.host.names");
}

#[test]
fn an_upstream_beyond_this_host_is_refused() {
    let bench = Bench::new();
    bench.refuses(
        &bench.text().replace("127.0.0.1:8080", "192.0.2.1:8080"),
        "gate.host.upstream",
    );
}

#[test]
fn a_missing_capability_is_named() {
    let bench = Bench::new();
    let path = bench.write(&bench.text());
    for (role, without, capability) in [
        ("filter", "-bpf", "CAP_BPF"),
        ("filter", "-perfmon", "CAP_PERFMON"),
        ("filter", "-net_admin", "CAP_NET_ADMIN"),
        ("gate", "-net_bind_service", "CAP_NET_BIND_SERVICE"),
    ] {
        let output = bench
            .without(without, None)
            .arg("--config")
            .arg(&path)
            .args(["run", "--only", role])
            .output()
            .unwrap();

        assert_eq!(output.status.code(), Some(77), "{}", stderr(&output));
        let missing = format!("{capability} is missing");
        assert!(stderr(&output).contains(&missing), "{}", stderr(&output));
        bench.is_untouched();
    }
}

#[test]
fn what_the_filter_does_not_cover_is_warned_of() {
    let bench = Bench::new();
    let text = bench.text().replace(
        "[gate]\n",
        "ports = [443, 80, 81, 82]\nudp_ports = [81]\n\
         destinations = [\"203.0.113.10\", \"203.0.113.11\"]\n[gate]\nlisten = [\"0.0.0.0:8443\"]\n",
    );

    let bind = |address: &str| {
        let address: SocketAddr = address.parse().unwrap();
        bench
            .network
            .on(Host::Origin, || UdpSocket::bind(address).unwrap())
    };
    let _sockets = [
        "[::]:443",
        "127.0.0.1:80",
        "0.0.0.0:81",
        "[2001:db8:10::10]:82",
    ]
    .map(bind);

    let output = bench.pullgate(&text, &["check"]);

    assert!(output.status.success(), "{}", stderr(&output));
    let warnings = stderr(&output);
    assert!(warnings.contains("answers UDP on port 443"), "{warnings}");
    assert!(!warnings.contains("UDP on port 8"), "{warnings}");
    assert!(
        warnings.contains("port 8443, which is not in `filter.ports`"),
        "{warnings}"
    );
    assert!(
        warnings.contains("203.0.113.11 in `filter.destinations`"),
        "{warnings}"
    );
    assert!(!warnings.contains("203.0.113.10 in"), "{warnings}");
}

#[test]
fn a_socket_that_may_not_be_asked_is_left_where_it_is() {
    let bench = Bench::new();
    bench.let_others_in();
    for name in ["state", "run"] {
        fs::create_dir(bench.network.path(name)).unwrap();
        chown(bench.network.path(name), Some(1), None).unwrap();
    }
    let home = bench.network.path("run/ranges");
    fs::create_dir(&home).unwrap();
    chown(&home, Some(1), None).unwrap();
    let path = home.join("status.sock");
    let running = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let text = "[paths]\nstate = \"state\"\nrun = \"run\"\n[ranges]\n";

    let output = bench
        .without("-all", Some("1"))
        .arg("--config")
        .arg(bench.write(text))
        .args(["run", "--only", "ranges"])
        .output()
        .unwrap();

    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(77), "{error}");
    assert!(error.contains("status.sock is another user's"), "{error}");
    let connected = UnixStream::connect(&path);
    assert!(connected.is_ok() && running.accept().is_ok());
}

#[test]
fn a_file_that_others_may_write_does_not_say_where_root_looks() {
    let bench = Bench::new();
    fs::create_dir_all(bench.network.path("run/ranges")).unwrap();
    let decoy = UnixListener::bind(bench.network.path("run/ranges/status.sock")).unwrap();
    decoy.set_nonblocking(true).unwrap();
    let file = bench.write("[paths]\nrun = \"run\"\n[ranges]\n");
    let asked = || {
        let output = daemon::output(&bench.network, &file, &["status"]);
        assert!(!output.status.success());
        decoy.accept().is_ok()
    };

    // A typo is no reason not to look there, and it does not take long: no server answers.
    fs::write(&file, "[paths]\nrun = \"run\"\n[ranges]\ntypo = 1\n").unwrap();
    assert!(asked());
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
    assert!(!asked());
}

#[test]
fn nobody_answers_in_the_place_of_the_filter() {
    let bench = Bench::new();
    bench.let_others_in();
    for (name, mode) in [("state", 0o777), ("run", 0o1777)] {
        let path = bench.network.path(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    // A role that was taken over may write where the sockets are.
    let mut rogue = bench.without("-all", Some("1"));
    rogue.arg("--config").arg(bench.write(&bench.text()));
    let mut rogue = rogue.args(["run", "--only", "ranges"]).spawn().unwrap();
    let [ranges, filter] =
        ["ranges", "filter"].map(|role| bench.network.path(format!("run/{role}")));
    // The files are there before the role listens, and it ends if it finds no place for one.
    for socket in ["status.sock", "control.sock"] {
        let socket = ranges.join(socket);
        eventually("the role answers", || UnixStream::connect(&socket).ok());
    }
    fs::rename(&ranges, &filter).unwrap();

    let status = bench.pullgate(&bench.text(), &["status"]);

    rogue.kill().unwrap();
    rogue.wait().unwrap();
    assert_eq!(status.status.code(), Some(1));
    let text = String::from_utf8(status.stdout).unwrap();
    assert!(text.starts_with("NOT PROTECTED"), "{text}");
    let refused = "user 1 answers there, who has no business to";
    assert!(text.contains(refused), "{text}");
}

#[test]
fn a_wrong_command_line_is_explained() {
    let bench = Bench::new();

    let output = bench.pullgate(&bench.text(), &["run", "--only", "everything"]);

    assert_eq!(output.status.code(), Some(64));
    assert!(stderr(&output).contains("[possible values: filter, ranges, gate]"));
}

/// A host with nothing running on it, and a configuration to spoil.
struct Bench {
    pki: Pki,
    network: Network,
    /// How many texts were compared with a snapshot.
    pinned: Cell<u32>,
}

impl Bench {
    fn new() -> Self {
        let network = Network::new();
        let pki = Pki::new(&network.path("pki"));
        Self {
            pki,
            network,
            pinned: Cell::new(0),
        }
    }

    fn text(&self) -> String {
        let directory = self.network.path("");
        let directory = directory.display();
        format!(
            "[paths]\nstate = \"state\"\nrun = \"run\"\nbpf = \"bpf/pullgate\"\n\
             [filter]\ninterfaces = [\"wan0\"]\n[gate]\n[[gate.host]]\n\
             names = [\"{SHOP}\"]\ncertificate = \"{directory}pki/{SHOP}.pem\"\n\
             key = \"{directory}pki/{SHOP}.key\"\ntrust = [\"{directory}pki/ours-ca.pem\"]\n\
             upstream = \"127.0.0.1:8080\"\n"
        )
    }

    fn write(&self, text: &str) -> PathBuf {
        let path = self.network.path("pullgate.toml");
        fs::write(&path, text).unwrap();
        path
    }

    fn pullgate(&self, text: &str, arguments: &[&str]) -> Output {
        daemon::output(&self.network, &self.write(text), arguments)
    }

    /// A `pullgate` in the origin without certain capabilities, perhaps as another user.
    fn without(&self, capabilities: &str, user: Option<&str>) -> Command {
        let mut command = self.network.command(Host::Origin, "setpriv");
        command.args(["--bounding-set", capabilities, "--inh-caps", "-all"]);
        if let Some(user) = user {
            command.args(["--reuid", user, "--clear-groups"]);
        }
        command.arg(daemon::binary());
        command
    }

    /// Asserts that `check` and `run` both refuse the text at this field, and with the sentence of the
    /// snapshot that has the test's name.
    fn refuses(&self, text: &str, field: &str) {
        self.pin_text(&self.refusal(text, field));
    }

    /// The same, of a sentence that names this line of another file.
    fn refuses_line(&self, text: &str, field: &str, line: usize) {
        let error = self.refusal(text, field);
        let line = format!("line {line}");
        assert!(error.contains(&line), "{line}: {error}");
        self.pin_text(&error.replace(&line, "line [N]"));
    }

    fn refusal(&self, text: &str, field: &str) -> String {
        let mut checked = String::new();
        for arguments in [["check"].as_slice(), &["run"]] {
            let output = self.pullgate(text, arguments);
            let error = stderr(&output);

            assert_eq!(output.status.code(), Some(78), "{arguments:?}: {error}");
            assert_eq!(error.lines().count(), 1, "one sentence: {error}");
            let file = self.network.path("pullgate.toml");
            let place = format!("pullgate: {}:", file.display());
            let rest = error.strip_prefix(&place);
            let line = rest
                .and_then(|rest| rest.split_once(':'))
                .map(|(line, _)| line);
            let number: usize = line.unwrap_or(&error).parse().unwrap();
            assert!((1..=text.lines().count()).contains(&number), "{error}");
            assert!(error.contains(&format!("`{field}`: ")), "{error}");
            self.is_untouched();
            if arguments == ["check"] {
                checked = error;
            }
        }
        checked
    }

    /// Compares a text with the snapshot of this test and this number.
    fn pin_text(&self, text: &str) {
        let number = self.pinned.get() + 1;
        self.pinned.set(number);
        let test = std::thread::current().name().unwrap().to_owned();
        let text = text.replace(&self.network.path("").display().to_string(), "[DIR]/");
        insta::assert_snapshot!(format!("{test}-{number}"), text);
    }

    /// Lets other users find the configuration and the PKI.
    fn let_others_in(&self) {
        let path = self.network.path("");
        fs::set_permissions(path, fs::Permissions::from_mode(0o711)).unwrap();
    }

    fn is_untouched(&self) {
        for made in ["state", "run", "bpf/pullgate"] {
            assert!(!self.network.path(made).exists(), "{made} was made");
        }
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}
