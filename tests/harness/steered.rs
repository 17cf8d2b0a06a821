//! A web server that stands as it ever stood, on every address at 443, with three sites; and pullgate in
//! front of it, to whose gate the kernel steers connections.

use std::fs;
use std::path::PathBuf;
use std::process::Output;
use std::sync::Arc;

use nix::sys::signal::Signal;

use crate::client::{Client, Reply};
use crate::daemon::{self, Pullgate};
use crate::gate::origin;
use crate::net::{Host, INTERFACE, Network};
use crate::pki::Pki;
use crate::sites::{self, SITES};
use crate::web::{Server, Software, accepted};

/// The rig; everything is gone when it is dropped.
pub struct Steered {
    /// The role that steers; none while it is not started.
    pub filter: Option<Pullgate>,
    /// The role that connections are steered to; none while it is not started.
    pub gate: Option<Pullgate>,
    /// The web server, of which no line is pullgate's.
    pub web: Server,
    /// The certificates.
    pub pki: Pki,
    /// The configuration file.
    pub config: PathBuf,
    /// The namespaces.
    pub network: Arc<Network>,
}

impl Steered {
    /// The web server alone, and a configuration with these lines for `[filter]` and `[gate]`.
    #[must_use]
    pub fn new(software: Software, filter: &str, gate: &str) -> Self {
        let network = Arc::new(Network::new());
        let pki = Pki::new(&network.path("pki"));
        let web = sites::start(&network, software);
        let steered = Self {
            filter: None,
            gate: None,
            web,
            pki,
            config: network.path("pullgate.toml"),
            network,
        };
        steered.configure(filter, gate);
        steered
    }

    /// The same with both roles, the filter first.
    #[must_use]
    pub fn start(software: Software, filter: &str, gate: &str) -> Self {
        let mut steered = Self::new(software, filter, gate);
        steered.start_filter();
        steered.start_gate();
        steered
    }

    /// Writes a configuration with these lines for `[filter]` and `[gate]`.
    pub fn configure(&self, filter: &str, gate: &str) {
        let hosts = SITES.map(|(name, authority)| {
            format!(
                "[[gate.host]]\nnames = [\"{name}\"]\ncertificate = \"pki/{name}.pem\"\n\
                 key = \"pki/{name}.key\"\ntrust = [\"pki/{authority}-ca.pem\"]\n"
            )
        });
        let text = format!(
            "[paths]\nstate = \"state\"\nrun = \"run\"\nbpf = \"bpf/pullgate\"\n\
             [filter]\ninterfaces = [\"{INTERFACE}\"]\ninterface_timeout = \"100ms\"\n{filter}\n\
             [ranges]\nunsafe_documentation_ranges = true\n\
             [gate]\nsteer = true\nhandshake_timeout = \"5s\"\ndrain_timeout = \"5s\"\n{gate}\n{}",
            hosts.concat()
        );
        fs::write(&self.config, text).unwrap();
    }

    /// Starts the filter role.
    pub fn start_filter(&mut self) {
        self.filter = Some(Pullgate::start(&self.network, &self.config, "filter"));
    }

    /// Starts the gate role.
    pub fn start_gate(&mut self) {
        self.gate = Some(Pullgate::start(&self.network, &self.config, "gate"));
    }

    /// The running filter.
    #[must_use]
    pub fn filter(&self) -> &Pullgate {
        self.filter.as_ref().unwrap()
    }

    /// The running gate.
    #[must_use]
    pub fn gate(&self) -> &Pullgate {
        self.gate.as_ref().unwrap()
    }

    /// Lets a role read its configuration again, and waits for its end.
    pub fn reload(role: &Pullgate) {
        let before = role.reloads();
        role.signal(Signal::SIGHUP);
        role.wait_for_reload(before);
    }

    /// The client that Cloudflare is, with the certificate of `shop.example` and `wiki.example`.
    #[must_use]
    pub fn edge(&self) -> Client {
        Client::new(&self.pki, Some(&self.pki.ours.client()))
    }

    /// Asks for the page of a host, in a word.
    #[must_use]
    pub fn tell(&self, client: &Client, from: Host, name: &str) -> String {
        let (reply, _) = client.get(&self.network, from, origin(), name);
        self.brief(reply)
    }

    /// A reply in a word: of a page, all of it.
    #[must_use]
    pub fn brief(&self, reply: Reply) -> String {
        if let Reply::Response(200, body) = reply {
            return body.trim_end().to_owned();
        }
        reply.brief()
    }

    /// Connections that nginx has accepted so far, this question's among them.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        accepted(&self.network)
    }

    /// The capabilities that the gate has.
    #[must_use]
    pub fn capabilities_of_gate(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.gate().pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
    }

    /// Runs a `pullgate` command in the origin.
    #[must_use]
    pub fn pullgate(&self, arguments: &[&str]) -> Output {
        daemon::output(&self.network, &self.config, arguments)
    }
}
