//! Verifies the gate: who is let in, who is refused and why, in front of nginx and of Apache.

use tests::net::Host;
use tests::pki::SHOP;
use tests::web::Software;
use tests::{Lab, Plan, assert_matched, scenarios};

#[test]
fn the_edge_with_its_certificate_is_served_by_nginx() {
    let lab = Lab::start(&Plan::default());

    assert_matched(&scenarios::edge_is_served(&lab, "nginx"));
}

#[test]
fn the_edge_with_its_certificate_is_served_by_apache() {
    if !tests::web::is_installed(Software::Apache) {
        return tests::skip(
            "the_edge_with_its_certificate_is_served_by_apache",
            "no apache2",
        );
    }
    let lab = Lab::start(&Plan {
        web: Software::Apache,
        ..Plan::default()
    });

    assert_matched(&scenarios::edge_is_served(&lab, "apache"));
}

#[test]
fn the_edge_is_served_through_a_unix_socket() {
    let lab = Lab::start(&Plan {
        upstream: "unix:@DIR@/web/web.sock",
        ..Plan::default()
    });

    assert_matched(&scenarios::edge_is_served(&lab, "nginx"));
}

#[test]
fn every_defect_of_a_certificate_is_refused_for_its_own_reason() {
    let lab = Lab::start(&Plan::default());

    assert_matched(&scenarios::certificates_are_judged(&lab));
}

#[test]
fn certificates_and_sessions_of_one_host_are_worth_nothing_at_another() {
    let lab = Lab::start(&Plan::default());

    assert_matched(&scenarios::sessions_stay_at_home(&lab));
}

#[test]
fn what_is_no_greeting_for_a_host_of_ours_is_refused() {
    let mut lab = Lab::start(&Plan::default());

    assert_matched(&scenarios::defective_greetings_are_refused(&lab));
    assert!(lab.gate.as_mut().unwrap().is_running());
}

#[test]
fn the_gate_checks_its_peers_addresses_where_there_is_no_filter() {
    let mut lab = Lab::start(&Plan::default());

    assert_matched(&scenarios::unload_leaves_the_gate(&mut lab));
}

#[test]
fn a_refusal_tells_the_operator_what_to_look_at() {
    let lab = Lab::start(&Plan::default());
    let [_, origin] = [Host::Edge.addresses()[0], Host::Origin.addresses()[0]];
    let client = tests::client::Client::new(&lab.pki, None);
    let mark = lab.gate().mark();

    let (reply, _) = client.get(&lab.network, Host::Edge, origin, SHOP);

    let event = lab.gate().event(mark, "the refusal is logged", |event| {
        event["id"] == "refused"
    });
    assert_eq!(reply.to_string(), "alert CertificateRequired");
    assert_eq!(event["reason"], "NoCertificate");
    assert_eq!(event["host"], SHOP);
    assert!(
        event["advice"]
            .as_str()
            .unwrap()
            .contains("is Authenticated Origin Pulls on")
    );
}

#[test]
fn an_upstream_that_is_down_is_named_in_the_refusal() {
    let lab = Lab::start(&Plan {
        upstream: "127.0.0.1:9",
        ..Plan::default()
    });
    let origin = Host::Origin.addresses()[0];

    let (reply, _) = lab.edge().get(&lab.network, Host::Edge, origin, SHOP);

    assert_eq!(reply.to_string(), "closed");
    lab.gate().event(0, "the refusal is logged", |event| {
        event["reason"] == "UpstreamUnreachable"
    });
    assert_eq!(lab.gate().outcomes("UpstreamUnreachable"), 1);
}
