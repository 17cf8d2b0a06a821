//! The lab: all parts together. An origin with nginx or Apache behind pullgate's three roles, a
//! feed, an edge and a stranger.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;

use aya::maps::{Map, MapData, PerCpuArray};
use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use aya_obj::programs::XdpAttachType;
use filter_ebpf::verdict::{Family, Judgement, Verdict};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::client::Client;
use crate::daemon::{self, Pullgate};
use crate::feed::{Answer, Feed, api_answer};
use crate::net::{DIRECT, Host, INTERFACE, Network};
use crate::pairing::Pairing;
use crate::pki::{BLOG, Pki, SHOP};
use crate::web::{self, Software, Web};

/// What a lab is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The web server.
    pub web: Software,
    /// Who has the port.
    pub pairing: Pairing,
    /// Lines for `[filter]` beyond the interfaces.
    pub filter: &'static str,
    /// Lines for `[ranges]` beyond the sources and the schedule.
    pub ranges: &'static str,
    /// `ranges.sources`; `@FEED@` and `@MIRROR@` are the URLs of the lab's servers, `@CA@` is the
    /// CA of both, `@DIR@` is the lab's directory.
    pub sources: &'static str,
    /// `ranges.removal_grace`.
    pub grace: &'static str,
    /// Whether the state is on a file system of its own, which has room for little.
    pub small_disk: bool,
    /// The upstream of both hosts; `@DIR@` is the lab's directory.
    pub upstream: &'static str,
    /// Whether stranger and origin are connected directly as well, and that is filtered too.
    pub direct: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            web: Software::Nginx,
            pairing: Pairing::of_this_run(),
            filter: "",
            ranges: "",
            sources: "[{ url = \"@FEED@/client/v4/ips\", ca_file = \"@CA@\", like = \"cloudflare\" }]",
            grace: "1s",
            small_disk: false,
            upstream: web::ADDRESS,
            direct: false,
        }
    }
}

/// A running lab; everything is gone when it is dropped.
pub struct Lab {
    /// The role that drops packets; none while it is dead.
    pub filter: Option<Pullgate>,
    /// The role that fetches ranges; none while it is dead.
    pub ranges: Option<Pullgate>,
    /// The role that demands certificates; none while it is dead.
    pub gate: Option<Pullgate>,
    /// The web server behind the gate.
    pub web: Web,
    /// Where the ranges come from.
    pub feed: Feed,
    /// Where else they could come from: another host, by its address.
    pub mirror: Feed,
    /// The certificates.
    pub pki: Pki,
    /// The configuration file.
    pub config: PathBuf,
    /// The namespaces.
    pub network: Arc<Network>,
    plan: Plan,
}

/// Where the roles of a lab are asked for their metrics, for [`Lab::restart_with`].
pub const METRICS: &str = "\n[metrics]\nfilter = \"127.0.0.1:9143\"\n\
    ranges = \"127.0.0.1:9144\"\ngate = \"127.0.0.1:9145\"\n";

impl Lab {
    /// Starts everything, and returns when the first list was fetched and published.
    #[must_use]
    pub fn start(plan: &Plan) -> Self {
        let network = Arc::new(Network::new());
        if plan.direct {
            network.connect_directly();
        }
        let pki = Pki::new(&network.path("pki"));
        let good = || Answer::Body(api_answer(&[], &[]));
        let feed = Feed::start(&network, &pki, "127.0.0.1", good());
        let mirror = Feed::start(&network, &pki, "127.0.0.2", good());
        let web = Web::start(&network, plan.web, plan.pairing);
        let config = network.path("pullgate.toml");
        if plan.small_disk {
            network.mount_small_disk("state");
        }

        let mut lab = Self {
            filter: None,
            ranges: None,
            gate: None,
            web,
            feed,
            mirror,
            pki,
            config,
            network,
            plan: plan.clone(),
        };
        lab.write_configuration();
        lab.start_filter();
        lab.start_gate();
        lab.start_ranges();
        lab.filter()
            .event(0, "the fetched list is taken over", |event| {
                event["id"] == "snapshot-unchanged"
            });
        lab.ranges().event(0, "the first refresh ends", |event| {
            event["id"] == "ranges-refreshed"
        });
        lab
    }

    /// Writes another configuration, with these lines for `[filter]`; no role reads it again.
    pub fn configure(&mut self, filter: &'static str) {
        self.plan.filter = filter;
        self.write_configuration();
    }

    /// Writes another configuration, with these sources; no role reads it again.
    pub fn configure_sources(&mut self, sources: &'static str) {
        self.plan.sources = sources;
        self.write_configuration();
    }

    fn write_configuration(&self) {
        fs::write(&self.config, configuration(self)).unwrap();
    }

    /// Lets the running filter read its configuration again, and waits for the outcome.
    pub fn reload(&self) -> Value {
        let filter = self.filter();
        let (mark, before) = (filter.mark(), filter.reloads());
        filter.signal(Signal::SIGHUP);
        let event = filter.event(mark, "the reload ends", |event| {
            [
                "filter-reloaded",
                "filter-not-reloaded",
                "configuration-not-reloaded",
            ]
            .iter()
            .any(|id| event["id"] == *id)
        });
        filter.wait_for_reload(before);
        event
    }

    /// Stops the filter role and detaches its program.
    pub fn unload(&mut self) {
        if let Some(filter) = self.filter.take() {
            assert_eq!(filter.stop(), Some(0));
        }
        assert!(self.pullgate(&["unload"]).status.success());
    }

    /// Starts the filter role.
    pub fn start_filter(&mut self) {
        self.filter = Some(Pullgate::start(&self.network, &self.config, "filter"));
    }

    /// Starts the ranges role.
    pub fn start_ranges(&mut self) {
        self.ranges = Some(Pullgate::start(&self.network, &self.config, "ranges"));
    }

    /// Starts the gate role.
    pub fn start_gate(&mut self) {
        self.gate = Some(Pullgate::start(&self.network, &self.config, "gate"));
    }

    /// Starts all roles again, with these lines at the end of the configuration.
    pub fn restart_with(&mut self, lines: &str) {
        let text = fs::read_to_string(&self.config).unwrap();
        fs::write(&self.config, text + lines).unwrap();
        for role in [self.filter.take(), self.ranges.take(), self.gate.take()] {
            assert!(role.is_none_or(|role| role.stop() == Some(0)));
        }
        self.start_filter();
        self.start_ranges();
        self.start_gate();
    }

    /// The running filter.
    #[must_use]
    pub fn filter(&self) -> &Pullgate {
        self.filter.as_ref().unwrap()
    }

    /// The running ranges role.
    #[must_use]
    pub fn ranges(&self) -> &Pullgate {
        self.ranges.as_ref().unwrap()
    }

    /// The running gate.
    #[must_use]
    pub fn gate(&self) -> &Pullgate {
        self.gate.as_ref().unwrap()
    }

    /// Who has the port.
    #[must_use]
    pub fn pairing(&self) -> Pairing {
        self.plan.pairing
    }

    /// The client that Cloudflare is, with the certificate the operator uploaded for [`SHOP`].
    #[must_use]
    pub fn edge(&self) -> Client {
        Client::new(&self.pki, Some(&self.pki.ours.client()))
    }

    /// Lets the feed answer this, and waits until a refresh has met it.
    pub fn refresh(&self, answer: Answer) -> Value {
        self.feed.answer(answer);
        self.refresh_as_it_is()
    }

    /// Lets the ranges role ask its sources, and waits for the outcome of the first.
    pub fn refresh_as_it_is(&self) -> Value {
        let mark = self.ranges().mark();
        self.ranges().post("/refresh");
        self.ranges().event(mark, "a refresh ends", |event| {
            event["id"] == "ranges-refreshed" || event["id"] == "refresh-failed"
        })
    }

    /// How often the kernel has come to this verdict.
    #[must_use]
    pub fn frames(&self, verdict: Verdict) -> u64 {
        self.counters().count(verdict)
    }

    /// The kernel's counters, whether the filter role runs or not.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters_of(INTERFACE)
    }

    /// The kernel's counters of another interface.
    #[must_use]
    pub fn counters_of(&self, interface: &str) -> Counters {
        Counters {
            pin: self.network.pin(&format!("counters-{interface}")),
            monitors: self.plan.filter.contains("monitor"),
        }
    }

    /// The loaded program.
    #[must_use]
    pub fn program(&self) -> Xdp {
        Xdp::from_pin(
            self.network.pin(&format!("program-{INTERFACE}")),
            XdpAttachType::Interface,
        )
        .unwrap()
    }

    /// Whether anything is pinned.
    #[must_use]
    pub fn has_pins(&self) -> bool {
        let pins = fs::read_dir(self.network.path("bpf/pullgate"));
        pins.is_ok_and(|mut pins| pins.next().is_some())
    }

    /// Runs a `pullgate` command in the origin.
    #[must_use]
    pub fn pullgate(&self, arguments: &[&str]) -> Output {
        daemon::output(&self.network, &self.config, arguments)
    }

    /// Commands to copy.
    #[must_use]
    pub fn hints(&self) -> String {
        let identity = self.pki.ours.client();
        self.pki.write_identity("edge", &identity);
        let mut hints = String::new();
        let pki = |name: &str| self.pki.path(name).display().to_string();
        let [origin, _] = Host::Origin.addresses();
        let curl = format!(
            "curl --cacert {} --resolve {SHOP}:443:{origin} https://{SHOP}/",
            pki("web-ca.pem")
        );
        let certificate = format!("--cert {} --key {}", pki("edge.pem"), pki("edge.key"));
        for (host, what, command) in [
            (
                Host::Edge,
                "the edge with its certificate",
                format!("{curl} {certificate}"),
            ),
            (Host::Edge, "the edge without", curl.clone()),
            (
                Host::Stranger,
                "the stranger",
                format!("{curl} --max-time 3 {certificate}"),
            ),
            (
                Host::Origin,
                "the status",
                format!(
                    "{} --config {} status",
                    daemon::binary().display(),
                    self.config.display()
                ),
            ),
        ] {
            let namespace = self.network.namespace(host);
            writeln!(hints, "# {what}\nip netns exec {namespace} {command}").unwrap();
        }
        hints
    }
}

/// Lets a loaded program judge a frame, and returns the action: `enum xdp_action`.
#[must_use]
pub fn judge(program: &Xdp, frame: &[u8]) -> u32 {
    let options = TestRunOptions {
        data_in: Some(frame),
        ..TestRunOptions::new()
    };
    program.test_run(options).unwrap().return_value
}

/// The `[ranges]` lines for `filter_ebpf::cases`: its `ALLOW` and `DENY`.
pub const CASE_RULES: &str = "allow = [\"198.51.100.200/32\", \"2001:db8::200/128\"]\n\
    deny = [\"173.245.63.0/24\", \"2400:cb00:bad::/48\"]";
/// `enum xdp_action`, include/uapi/linux/bpf.h.
pub const XDP_DROP: u32 = 1;
/// The other action that the filter knows.
pub const XDP_PASS: u32 = 2;

/// The kernel's counters, as they are pinned.
pub struct Counters {
    pin: PathBuf,
    monitors: bool,
}

impl Counters {
    /// How often the kernel has come to this verdict.
    #[must_use]
    pub fn count(&self, verdict: Verdict) -> u64 {
        let families = Family::ALL.map(|family| Judgement { verdict, family });
        families
            .iter()
            .map(|judgement| self.judged(*judgement))
            .sum()
    }

    /// How often the kernel has come to this verdict on this family.
    #[must_use]
    pub fn judged(&self, judgement: Judgement) -> u64 {
        let counters = Map::PerCpuArray(MapData::from_pin(&self.pin).unwrap());
        let counters = PerCpuArray::<_, u64>::try_from(counters).unwrap();
        let slot = if self.monitors {
            judgement.slot().monitored()
        } else {
            judgement.slot()
        };
        counters.get(&slot.0, 0).unwrap().iter().sum()
    }
}

/// The configuration of the lab's pullgate.
fn configuration(lab: &Lab) -> String {
    let Lab { network, plan, .. } = lab;
    let directory = network.path("");
    let at = |name: &str| path(&directory, name);
    // A web server that keeps the port needs not be named.
    let upstream = if plan.pairing.steers() && plan.upstream == web::ADDRESS {
        String::new()
    } else {
        let directory = directory.display().to_string();
        let upstream = plan.upstream.replace("@DIR@", &directory);
        format!("upstream = \"{upstream}\"\n")
    };
    // Either way the web server sees its clients' addresses.
    let steering = match plan.pairing {
        Pairing::Relayed => "",
        Pairing::Steered => "steer = true\nclient_address = \"transparent\"\n",
    };
    let host = |name: &str, ca: &str| {
        format!(
            "[[gate.host]]\nnames = [\"{name}\"]\ncertificate = {}\nkey = {}\ntrust = [{}]\n\
             {upstream}\n",
            at(&format!("pki/{name}.pem")),
            at(&format!("pki/{name}.key")),
            at(&format!("pki/{ca}-ca.pem")),
        )
    };
    let interfaces = if plan.direct {
        format!("[\"{INTERFACE}\", \"{DIRECT}\"]")
    } else {
        format!("[\"{INTERFACE}\"]")
    };
    // A plan may say it otherwise.
    let interfaces = if plan.filter.contains("interfaces =") {
        String::new()
    } else {
        format!("interfaces = {interfaces}\n")
    };
    let timeout = if plan.filter.contains("interface_timeout =") {
        ""
    } else {
        "interface_timeout = \"100ms\"\n"
    };
    format!(
        "[paths]\nstate = {}\nrun = {}\nbpf = {}\n\n\
         [filter]\n{interfaces}{timeout}{}\n\n\
         [ranges]\nsources = {}\ninterval = \"1h\"\nremoval_grace = \"{}\"\n# The lab's strangers live in documentation space.\n\
         unsafe_documentation_ranges = true\n{}\n\n\
         [gate]\nhandshake_timeout = \"2s\"\ndrain_timeout = \"2s\"\n{steering}\n{}{}",
        at("state"),
        at("run"),
        at("bpf/pullgate"),
        plan.filter,
        plan.sources
            .replace("@FEED@", &lab.feed.url(""))
            .replace("@MIRROR@", &lab.mirror.url(""))
            .replace(
                "@CA@",
                &network.path("pki/web-ca.pem").display().to_string()
            )
            .replace("@DIR@/", &directory.display().to_string()),
        plan.grace,
        plan.ranges,
        host(SHOP, "ours"),
        host(BLOG, "other"),
    )
}

fn path(directory: &Path, name: &str) -> String {
    format!("\"{}\"", directory.join(name).display())
}
