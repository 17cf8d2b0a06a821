//! The gate alone: a role with hosts of a test's own, clients on the edge, and whatever upstream.

use std::fs;
use std::path::PathBuf;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::client::{Client, Reply};
use crate::daemon::{self, Pullgate};
use crate::net::{Host, Network};
use crate::pairing::Pairing;
use crate::pki::{BLOG, Pki, SHOP};
use crate::web;

/// A gate and what belongs to it; everything is gone when it is dropped.
pub struct Rig {
    /// The gate, once it is started.
    pub gate: Option<Pullgate>,
    /// What steers to it, in that pairing.
    filter: Option<Pullgate>,
    /// The certificates.
    pub pki: Pki,
    /// The configuration file.
    pub config: PathBuf,
    /// The namespaces.
    pub network: Arc<Network>,
}

impl Rig {
    /// Everything but the gate.
    #[must_use]
    pub fn new() -> Self {
        let network = Arc::new(Network::new());
        let mut rig = Self {
            gate: None,
            filter: None,
            pki: Pki::new(&network.path("pki")),
            config: network.path("pullgate.toml"),
            network,
        };
        if Pairing::of_this_run().steers() {
            rig.configure("", &[&shop("")]);
            rig.filter = Some(Pullgate::start(&rig.network, &rig.config, "filter"));
        }
        rig
    }

    /// A gate with the usual two hosts, and these lines for [`SHOP`].
    #[must_use]
    pub fn with_shop(lines: &str) -> Self {
        let mut rig = Self::new();
        rig.start("", &[&shop(lines), &blog("")]);
        rig
    }

    /// Writes a configuration: lines for `[gate]`, and hosts. `@DIR@` is the rig's directory,
    /// `@PKI@` that of the certificates.
    pub fn configure(&self, gate: &str, hosts: &[&str]) {
        let pairing = Pairing::of_this_run();
        let text = format!(
            "[paths]\nstate = \"state\"\nrun = \"run\"\nbpf = \"bpf/pullgate\"\n\
             {}[ranges]\nunsafe_documentation_ranges = true\nallow = [\"203.0.113.10/32\"]\n\
             [gate]\ndrain_timeout = \"5s\"\n{}{}{gate}\n{}",
            pairing.filter_that_only_steers(),
            pairing.gate_line(),
            if gate.contains("handshake_timeout") {
                ""
            } else {
                "handshake_timeout = \"2s\"\n"
            },
            hosts.join("\n")
        );
        let directory = self.network.path("");
        let directory = directory.display().to_string();
        let text = text.replace("@PKI@", "@DIR@/pki");
        let text = text.replace("@DIR@/", &directory);
        fs::write(&self.config, text).unwrap();
    }

    /// Adds lines at the end of the configuration.
    pub fn append(&self, lines: &str) {
        let text = fs::read_to_string(&self.config).unwrap();
        fs::write(&self.config, text + lines).unwrap();
    }

    /// Writes a configuration, and starts the gate with it.
    pub fn start(&mut self, gate: &str, hosts: &[&str]) {
        self.configure(gate, hosts);
        self.gate = Some(Pullgate::start(&self.network, &self.config, "gate"));
    }

    /// The running gate.
    #[must_use]
    pub fn gate(&self) -> &Pullgate {
        self.gate.as_ref().unwrap()
    }

    /// Lets the gate read its configuration again; whether it is active.
    #[must_use]
    pub fn reload(&self) -> bool {
        let gate = self.gate();
        let (mark, before) = (gate.mark(), gate.reloads());
        gate.signal(Signal::SIGHUP);
        let event = gate.event(mark, "the reload ends", |event| {
            ["configuration-reloaded", "configuration-not-reloaded"]
                .iter()
                .any(|id| event["id"] == *id)
        });
        gate.wait_for_reload(before);
        event["id"] == "configuration-reloaded"
    }

    /// Writes a configuration, and lets the gate read it.
    #[must_use]
    pub fn reconfigure(&self, gate: &str, hosts: &[&str]) -> bool {
        self.configure(gate, hosts);
        self.reload()
    }

    /// Asks for the page of a host; what the client saw, and how the gate calls it.
    #[must_use]
    pub fn ask(&self, client: &Client, name: &str) -> (Reply, String) {
        let mark = self.gate().mark();
        let (reply, _) = client.get(&self.network, Host::Edge, origin(), name);
        (reply, self.outcome(mark))
    }

    /// The same in one line: the reply without its body, and the gate's word.
    #[must_use]
    pub fn tell(&self, client: &Client, name: &str) -> String {
        let (reply, outcome) = self.ask(client, name);
        format!("{}, {outcome}", reply.brief())
    }

    /// How the first connection behind the mark has ended.
    #[must_use]
    pub fn outcome(&self, mark: usize) -> String {
        let event = self.gate().event(mark, "the connection ends", |event| {
            event["id"] == "connection-closed"
        });
        event["outcome"].as_str().unwrap().to_owned()
    }

    /// What an upstream of [`crate::upstream::Manner::Answer`] has received.
    #[must_use]
    pub fn received(&self, client: &Client, name: &str) -> Value {
        let (reply, outcome) = self.ask(client, name);
        let Reply::Response(200, body) = reply else {
            panic!("{reply}, {outcome}");
        };
        serde_json::from_str(&body).unwrap()
    }

    /// The client that Cloudflare is, with the certificate the operator uploaded for [`SHOP`].
    #[must_use]
    pub fn edge(&self) -> Client {
        Client::new(&self.pki, Some(&self.pki.ours.client()))
    }

    /// Requests without pause from two clients, while something happens; how many were served. Each
    /// must be.
    #[must_use]
    pub fn under_load(&self, work: impl FnOnce()) -> u32 {
        let (stop, served) = (AtomicBool::new(false), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let client = self.edge();
                        let (reply, _) = client.get(&self.network, Host::Edge, origin(), SHOP);
                        assert_eq!(reply.brief(), "200");
                        served.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            crate::eventually("the load has begun", || {
                (served.load(Ordering::Relaxed) > 2).then_some(())
            });
            let stop_at_the_end = StopAtTheEnd(&stop);
            work();
            drop(stop_at_the_end);
        });
        served.into_inner()
    }

    /// Runs a `pullgate` command in the origin.
    #[must_use]
    pub fn pullgate(&self, arguments: &[&str]) -> Output {
        daemon::output(&self.network, &self.config, arguments)
    }

    /// The pin of a certificate, as `trust` takes it.
    #[must_use]
    pub fn pin(&self, file: &str) -> String {
        let path = self.pki.path(file).display().to_string();
        let output = self.pullgate(&["pin", &path]);
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// What the gate makes of a client certificate that curl presents at [`SHOP`].
    #[must_use]
    pub fn curl(&self, identity: &str, version: &str) -> String {
        let mark = self.gate().mark();
        let target = format!("{SHOP}:443:{}", origin());
        let (certificate, key) = (
            format!("@PKI@/{identity}.pem"),
            format!("@PKI@/{identity}.key"),
        );
        let url = format!("https://{SHOP}/");
        let mut words = vec![
            "curl",
            "--silent",
            "--max-time",
            "10",
            "--resolve",
            &target,
            "--cacert",
            "@PKI@/web-ca.pem",
            "--cert",
            &certificate,
            "--key",
            &key,
            &url,
        ];
        words.extend(version.split(' '));
        let _answer = self.on_edge(&words);
        self.outcome(mark)
    }

    /// Runs a command on the edge, with `@PKI@` as in configurations; its whole output.
    #[must_use]
    pub fn on_edge(&self, words: &[&str]) -> String {
        let pki = self.pki.path("").display().to_string();
        let words: Vec<_> = words
            .iter()
            .map(|word| word.replace("@PKI@/", &pki))
            .collect();
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        let output = self.network.output(Host::Edge, &words);
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        text
    }
}

impl Default for Rig {
    fn default() -> Self {
        Self::new()
    }
}

/// Ends the load also if the work fails.
pub struct StopAtTheEnd<'a>(pub &'a AtomicBool);

impl Drop for StopAtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Limits of `[gate]` for more handshakes from one address than any edge needs.
pub const PLENTY: &str = "[gate.per_source]\nhandshakes_per_second = 100000\n\
    [gate.per_network]\nhandshakes_per_second = 100000";

/// The origin's IPv4 address.
#[must_use]
pub fn origin() -> std::net::IpAddr {
    Host::Origin.addresses()[0]
}

/// A host with these lines besides the names, the certificate and the upstream.
#[must_use]
pub fn host(names: &[&str], file: &str, lines: &str) -> String {
    let names: Vec<_> = names.iter().map(|name| format!("\"{name}\"")).collect();
    let mut text = format!("[[gate.host]]\nnames = [{}]\n", names.join(", "));
    let says = |key: &str| {
        let mut lines = lines.lines();
        lines.any(|line| line.starts_with(&format!("{key} =")))
    };
    // What is said about the way to a web server is about one that is elsewhere.
    let by_default = Pairing::of_this_run().steers() && !ELSEWHERE.into_iter().any(says);
    for (key, value) in [
        ("certificate", format!("\"@PKI@/{file}.pem\"")),
        ("key", format!("\"@PKI@/{file}.key\"")),
        ("upstream", format!("\"{}\"", web::ADDRESS)),
    ] {
        let is_left_out = key == "upstream" && by_default;
        if !says(key) && !is_left_out {
            text.push_str(&format!("{key} = {value}\n"));
        }
    }
    format!("{text}{lines}\n")
}

/// The keys of `[[gate.host]]` that are about the way to the web server.
const ELSEWHERE: [&str; 3] = ["upstream", "proxy_protocol", "upstream_tls"];

/// A web server behind a PROXY header, in either pairing.
pub const ON_LOOPBACK: &str = "upstream = \"127.0.0.1:8080\"";

/// [`SHOP`], which trusts our CA unless the lines say otherwise.
#[must_use]
pub fn shop(lines: &str) -> String {
    trusting(SHOP, "ours", lines)
}

/// [`BLOG`], which trusts another CA unless the lines say otherwise.
#[must_use]
pub fn blog(lines: &str) -> String {
    trusting(BLOG, "other", lines)
}

fn trusting(name: &str, authority: &str, lines: &str) -> String {
    let has_trust = lines.lines().any(|line| line.starts_with("trust ="));
    let trust = format!("trust = [\"@PKI@/{authority}-ca.pem\"]\n");
    let trust = if has_trust { "" } else { &trust };
    host(&[name], name, &format!("{trust}{lines}"))
}
