//! The benchmark of the pairings: CPU time of the gate and the web server together, for the same page.
//!
//! A gate that relays to loopback, a gate that connections are steered to past a web server in TLS, and
//! that web server alone, which verifies its clients itself. One nginx serves all three, and clients come
//! from the edge; round by round, so that what disturbs one disturbs all.

use std::net::SocketAddr;
use std::path::Path;

use serde_json::json;
use tests::gate::origin;
use tests::net::{Host, Network};
use tests::pki::Pki;
use tests::proxies::{Peer, Proxy};
use tests::web::{self, PORT_IN_TLS, PORT_THAT_DEMANDS, Server};

use crate::cpu;
use crate::load::{BODY, CONNECTIONS, DOWNLOADS, HANDSHAKES, Load, MEGABYTES, REQUESTS};
use crate::report::{self, median, spread};

/// A pairing, and microseconds of CPU time.
struct Pairing {
    label: &'static str,
    port: u16,
    gate: Option<Proxy>,
    costs: [Vec<f64>; MEASURES.len()],
}

impl Pairing {
    fn new(label: &'static str, port: u16, gate: Option<Proxy>) -> Self {
        Self {
            label,
            port,
            gate,
            costs: Default::default(),
        }
    }

    /// All that works for it.
    fn cpu(&self, web: &Server) -> f64 {
        let gate = self.gate.iter().flat_map(Proxy::processes);
        cpu::of_processes(gate.chain(web.processes()))
    }

    fn measure(&mut self, web: &Server, load: &Load) {
        let to = SocketAddr::new(origin(), self.port);
        let mut costs = [0.0; MEASURES.len()];
        let before = self.cpu(web);
        load.full_handshakes(to, HANDSHAKES);
        costs[0] = (self.cpu(web) - before) / f64::from(HANDSHAKES);

        let before = self.cpu(web);
        load.resumed_handshakes(to, HANDSHAKES);
        costs[1] = (self.cpu(web) - before) / f64::from(HANDSHAKES);

        let connections = load.open(to, CONNECTIONS).unwrap();
        let before = self.cpu(web);
        let (mut connections, _) = load.requests(connections, REQUESTS);
        costs[2] = (self.cpu(web) - before) / f64::from(CONNECTIONS * REQUESTS);

        let one = connections.remove(0);
        let before = self.cpu(web);
        let one = load.bulk(one, DOWNLOADS);
        costs[3] = (self.cpu(web) - before) / f64::from(DOWNLOADS * MEGABYTES);
        connections.push(one);
        load.close(connections);
        for (all, cost) in self.costs.iter_mut().zip(costs) {
            all.push(cost);
        }
    }
}

pub(crate) fn run(json: Option<&Path>) {
    let network = Network::new();
    let pki = Pki::new(&network.path("pki"));
    let identity = pki.write_rsa_authority("rsa-ca.pem");
    let web = web::paired(&network, BODY);
    let gate = |peer| Some(Proxy::start_for_edge(&network, &pki, peer));
    let relayed = gate(Peer::Pullgate);
    let port = relayed.as_ref().map_or(0, |it| it.address().port());
    let mut pairings = [
        Pairing::new("gate, loopback", port, relayed),
        Pairing::new("gate, steered", PORT_IN_TLS, gate(Peer::Steered)),
        Pairing::new("nginx alone", PORT_THAT_DEMANDS, None),
    ];
    let load = Load::new(&pki, &identity);
    network.on(Host::Edge, || {
        load.wait_for(SocketAddr::new(origin(), PORT_IN_TLS));
        for _ in 0..ROUNDS {
            for pairing in &mut pairings {
                pairing.measure(&web, &load);
            }
        }
    });

    println!(
        "\n{:<16}{}",
        "µs CPU per",
        MEASURES.map(|it| format!("{it:>12}")).concat()
    );
    for pairing in &pairings {
        let cells = pairing
            .costs
            .iter()
            .map(|it| format!("{:>12.1}", median(it)));
        println!("{:<16}{}", pairing.label, cells.collect::<String>());
    }
    let [relayed, steered, alone] = &pairings;
    for (words, one, other) in [
        ("steered / loopback", steered, relayed),
        ("steered / nginx alone", steered, alone),
    ] {
        let ratios = one.costs.iter().zip(&other.costs);
        let ratios = ratios.map(|(one, other)| format!("{:>12.2}", median(one) / median(other)));
        println!("{words:<22}{}", ratios.collect::<String>().trim_start());
    }
    let measured = pairings.iter().map(|pairing| {
        let costs = MEASURES.iter().zip(&pairing.costs);
        let costs =
            costs.map(|(name, it)| (*name, json!({"us": median(it), "spread": spread(it)})));
        json!({"name": pairing.label, "costs": costs.collect::<std::collections::BTreeMap<_, _>>()})
    });
    let report = json!({
        "machine": report::machine(),"pairings": measured.collect::<Vec<_>>()});
    report::write("pairings", &report, &[], json);
}

const MEASURES: [&str; 4] = ["full", "resumed", "request", "MB"];
const ROUNDS: u32 = 5;
