//! Verifies that what is written is what is meant, and that mistakes are named with their place.

use std::path::Path;
use std::time::Duration;

use super::*;
use crate::ranges::Limits;

#[test]
fn the_smallest_configuration_has_strict_defaults() {
    let config = parse_text(MINIMAL).unwrap();

    let filter = config.filter.unwrap();
    let gate = config.gate.unwrap();
    assert_eq!(filter.ports, [443]);
    assert_eq!(filter.mode, Mode::Enforce);
    assert_eq!(filter.fragments, Fragments::Drop);
    assert_eq!(config.ranges.limits, Limits::default());
    assert_eq!(gate.hosts[0].resumption, Resumption::Verified);
    assert_eq!(gate.hosts[0].key.value, Path::new("/etc/pullgate/key.pem"));
    assert!(gate.idle_timeout > Duration::from_secs(900));
}

#[test]
fn the_shipped_configuration_parses_and_shows_the_defaults() {
    let shipped = parse_text(include_str!("../../dist/pullgate.toml")).unwrap();
    let smallest = parse_text(MINIMAL).unwrap();

    let (shipped_filter, filter) = (shipped.filter.unwrap(), smallest.filter.unwrap());
    let (shipped_gate, gate) = (shipped.gate.unwrap(), smallest.gate.unwrap());
    // Installing must not cut an origin off; everything else is the default.
    assert_eq!(shipped_filter.mode, Mode::Monitor);
    assert_eq!(shipped_filter.ports, filter.ports);
    assert_eq!(
        format!("{:?}", shipped.paths),
        format!("{:?}", smallest.paths)
    );
    assert_eq!(
        format!("{:?}", shipped.ranges),
        format!("{:?}", smallest.ranges)
    );
    assert_eq!(shipped_gate.listen, gate.listen);
    assert_eq!(shipped_gate.idle_timeout, gate.idle_timeout);
    assert_eq!(shipped_gate.handshake_timeout, gate.handshake_timeout);
    assert_eq!(shipped_gate.drain_timeout, gate.drain_timeout);
    assert_eq!(shipped_gate.max_connections, gate.max_connections);
    assert_eq!(shipped_gate.max_handshakes, gate.max_handshakes);
}

#[test]
fn a_misspelt_field_of_a_source_is_refused() {
    let source = |source: &str| format!("[ranges]\nsources = [{source}]");

    for bad in [
        "{ url = \"https://a.example/\", cafile = \"x\" }",
        "{ file = \"x\", ca_file = \"y\" }",
        "{ file = \"x\", url = \"https://a.example/\" }",
        "{}",
    ] {
        assert!(
            error(&source(bad)).contains(":2: `ranges.sources[0]`: expected"),
            "{bad}"
        );
    }
}

#[test]
fn an_unknown_field_is_named_with_its_line() {
    assert_eq!(
        error(&MINIMAL.replace("[gate]", "[gate]\nlisten_on = 1")),
        "/etc/pullgate/pullgate.toml:4: `gate.listen_on`: unknown field `listen_on`, expected \
         one of `listen`, `handshake_timeout`, `connect_timeout`, `idle_timeout`, \
         `drain_timeout`, `max_connections`, `max_handshakes`, `host`"
    );
}

#[test]
fn a_bad_range_is_named_with_its_line_and_field() {
    assert_eq!(
        error("[ranges]\n\nallow = [\"192.0.2.0/24\", \"192.0.2.0/33\"]"),
        "/etc/pullgate/pullgate.toml:3: `ranges.allow[1]`: invalid IP address syntax"
    );
    assert_eq!(
        error("[ranges]\ndeny = [\"192.0.2.1/24\"]"),
        "/etc/pullgate/pullgate.toml:2: `ranges.deny`: `192.0.2.1/24` has host bits set; did \
         you mean `192.0.2.0/24`?"
    );
    assert!(error("[ranges]\nallow = [\"::/0\"]").contains("is everybody"));
}

#[test]
fn two_hosts_with_one_name_are_refused() {
    let second = HOST.replace("a.example", "A.Example");

    assert_eq!(
        error(&format!("{MINIMAL}{second}")),
        "/etc/pullgate/pullgate.toml:11: `gate.host.names`: `a.example` already has a policy, \
         at line 5; give each name to one host"
    );
}

#[test]
fn an_upstream_beyond_loopback_must_be_asked_for() {
    let far = MINIMAL.replace("127.0.0.1:8080", "192.0.2.1:8080");

    assert!(error(&far).contains(":9: `gate.host.upstream`: `192.0.2.1:8080` is not loopback"));
    assert!(parse_text(&format!("{far}unsafe_upstream = true\n")).is_ok());
}

#[test]
fn ssh_can_not_be_a_protected_port() {
    assert!(error("[filter]\ninterfaces = [\"eth0\"]\nports = [443, 22]").contains("lock you out"));
}

#[test]
fn a_feed_in_clear_text_is_refused_unless_it_is_local() {
    let url = |url: &str| format!("[ranges]\nsources = [{{ url = \"{url}\" }}]");

    assert!(error(&url("http://ranges.example/")).contains("neither https nor http to loopback"));
    assert!(parse_text(&url("http://127.0.0.1:8000/")).is_ok());
    assert!(parse_text(&url("https://ranges.example/")).is_ok());
}

#[test]
fn what_is_missing_or_misspelt_is_named() {
    assert!(error("[filter]").contains("missing field `interfaces`"));
    assert!(error("[filter").contains("pullgate.toml:1: "));
    assert!(error("[ranges]\ninterval = \"6 parsecs\"").contains(":2: `ranges.interval`: "));
    assert!(error("[ranges]\nsources = [\"cloudfare\"]").contains("expected \"cloudflare\""));
    assert!(error(&MINIMAL.replace("a.example", "*.a b")).contains("is not a host name"));
}

fn parse_text(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new("/etc/pullgate/pullgate.toml"), text)
}

fn error(text: &str) -> String {
    parse_text(text).unwrap_err().to_string()
}

const MINIMAL: &str = "[filter]\ninterfaces = [\"eth0\"]\n[gate]\n[[gate.host]]\n\
    names = [\"a.example\"]\ncertificate = \"cert.pem\"\nkey = \"key.pem\"\n\
    trust = [\"cloudflare\"]\nupstream = \"127.0.0.1:8080\"\n";
const HOST: &str = "[[gate.host]]\nnames = [\"a.example\"]\ncertificate = \"cert.pem\"\n\
    key = \"key.pem\"\ntrust = [\"cloudflare\"]\nupstream = \"127.0.0.1:8080\"\n";
