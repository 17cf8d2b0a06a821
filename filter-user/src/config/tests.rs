//! Verifies that what is written is what is meant, and that mistakes are named with their place.

use std::path::Path;
use std::time::Duration;

use super::*;
use crate::ranges::{Families, Format, GuardLimits};

#[test]
fn the_smallest_configuration_has_strict_defaults() {
    let config = parse_text(MINIMAL).unwrap();

    let filter = config.live.filter.unwrap();
    let gate = config.live.gate.unwrap();
    assert_eq!(filter.ports, [443]);
    assert_eq!(filter.mode, Mode::Enforce);
    assert_eq!(filter.fragments, Fragments::Drop);
    assert_eq!(config.live.ranges.limits, GuardLimits::of_cloudflare());
    assert_eq!(gate.hosts[0].resumption, Resumption::Verified);
    let KeyPair { key, .. } = &gate.hosts[0].certificates[0];
    assert_eq!(key.value, Path::new("/etc/pullgate/key.pem"));
    assert!(gate.idle_timeout > Duration::from_secs(900));
}

#[test]
fn the_shipped_configuration_parses_and_shows_the_defaults() {
    let shipped = parse_text(include_str!("../../dist/reference.toml")).unwrap();
    let smallest = parse_text(MINIMAL).unwrap();

    let (shipped_filter, filter) = (shipped.live.filter.unwrap(), smallest.live.filter.unwrap());
    let (shipped_gate, gate) = (shipped.live.gate.unwrap(), smallest.live.gate.unwrap());
    assert_eq!(shipped_filter.mode, filter.mode);
    assert_eq!(shipped_filter.ports, filter.ports);
    assert_eq!(
        format!("{:?}", shipped.boot.paths),
        format!("{:?}", smallest.boot.paths)
    );
    let values = |ranges: &RangesSettings| {
        let sources = ranges.sources.iter().map(|source| source.value.clone());
        sources.collect::<Vec<_>>()
    };
    assert_eq!(values(&shipped.live.ranges), values(&smallest.live.ranges));
    assert_eq!(shipped.live.ranges.interval, smallest.live.ranges.interval);
    assert_eq!(
        shipped.live.ranges.removal_grace,
        smallest.live.ranges.removal_grace
    );
    assert_eq!(shipped.live.ranges.limits, smallest.live.ranges.limits);
    assert_eq!(shipped.boot.listen, smallest.boot.listen);
    assert_eq!(shipped_gate.idle_timeout, gate.idle_timeout);
    assert_eq!(shipped_gate.handshake_timeout, gate.handshake_timeout);
    assert_eq!(shipped_gate.drain_timeout, gate.drain_timeout);
    assert_eq!(shipped.boot.max_connections, smallest.boot.max_connections);
    assert_eq!(shipped_gate.max_handshakes, gate.max_handshakes);
    assert_eq!(shipped_gate.per_source, gate.per_source);
    assert_eq!(shipped_gate.per_network, gate.per_network);
    let settings = |host: &HostSettings| {
        let HostSettings {
            names: _,
            is_default,
            certificates: _,
            trust: _,
            client_auth,
            crls,
            crl_expired,
            min_tls,
            max_depth,
            require_client_eku,
            resumption,
            on_trust_change,
            alpn,
            has_alpn: _,
            upstream: _,
            proxy_protocol,
            proxy_tlvs,
            max_connections,
        } = host;
        format!(
            "{is_default} {client_auth:?} {crls:?} {crl_expired:?} {min_tls:?} {max_depth} \
             {require_client_eku} {resumption:?} {on_trust_change:?} {alpn:?} \
             {proxy_protocol:?} {proxy_tlvs} {max_connections:?}"
        )
    };
    assert_eq!(settings(&shipped_gate.hosts[0]), settings(&gate.hosts[0]));
}

#[test]
fn a_value_of_a_wrong_kind_is_called_as_toml_calls_it() {
    let host = "[[gate.host]]\nnames = [\"a.example\"]\ncertificate = \"c\"\nkey = \"k\"\n\
                trust = [\"cloudflare\"]\nupstream = \"127.0.0.1:80\"\n";
    for (text, words) in [
        (
            "[gate]\nmax_connections = \"7\"\n",
            "expected a whole number",
        ),
        ("[gate]\nlisten = \"0.0.0.0:443\"\n", "expected a list"),
        (
            "[gate]\nlisten = [\"443\"]\n",
            "is not an address with a port",
        ),
        ("[gate]\nper_source = 7\n", "expected a section, or a table"),
        ("[gate.host]\nnames = []\n", "type: table, expected a list"),
        ("[filter]\nudp_ports = [70000]\n", "expected a whole number"),
    ] {
        let host = if text.contains("host]") { "" } else { host };
        let error = error(&format!("{text}{host}"));
        assert!(error.contains(words), "{error}");
        for word in ["i64", "u16", "sequence", "struct", "map"] {
            assert!(!error.contains(word), "{error}");
        }
    }
    let error = error(&format!("{host}upstream_tls = 7\n"));
    assert!(error.contains(":7: `gate.host"), "{error}");
    assert!(error.contains("expected a section, or a table"), "{error}");
}

#[test]
fn metrics_are_told_where_nothing_else_of_ours_is() {
    let gate = "[gate]\nlisten = [\"0.0.0.0:8443\"]\n[[gate.host]]\nnames = [\"a.example\"]\n\
                certificate = \"c\"\nkey = \"k\"\ntrust = [\"cloudflare\"]\n\
                upstream = \"127.0.0.1:80\"\n[metrics]\n";
    for (metrics, words) in [
        (
            "filter = \"127.0.0.1:9143\"\ngate = \"127.0.0.1:9143\"",
            "is where the role filter serves its metrics",
        ),
        ("gate = \"127.0.0.1:8443\"", "is taken by pullgate itself"),
        (
            "ranges = \"unix:/run/pullgate/gate/status.sock\"",
            "is taken by pullgate itself",
        ),
    ] {
        let error = error(&format!("{gate}{metrics}\n"));
        assert!(error.contains(words), "{error}");
    }
    let apart = "filter = \"127.0.0.1:9143\"\ngate = \"[::1]:9143\"\n";
    assert!(parse_text(&format!("{gate}{apart}")).is_ok());
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn a_misspelt_source_is_refused() {
    for (bad, words) in [
        (
            "\"cloudfare\"",
            "`cloudfare` is no known source; write one of \"cloudflare\", \"cloudflare-api\"",
        ),
        ("7", "expected a name such as \"cloudflare\""),
        (
            "{ url = \"https://a.example/\", cafile = \"x\" }",
            "unknown field `cafile`; did you mean `ca_file`?",
        ),
        ("{ file = \"x\", max_bytes = \"64k\" }", "max_bytes"),
        (
            "{ file = \"x\", families = [\"ipv5\"] }",
            "unknown variant `ipv5`",
        ),
        ("{ file = \"x\", name = \"a b\" }", "`name` is to be a word"),
        ("{ file = \"x\", name = \"static\" }", "is the name of"),
        (
            "{ url = \"nowhere\" }",
            "not a URL (relative URL without a base)",
        ),
        (
            "{ url = \"http://127.0.0.1/\", ca_file = \"x\" }",
            "which is not https",
        ),
        (
            "{ url = \"https://a.example/?a\" }, { url = \"https://a.example/?b\" }",
            "give each a `name`",
        ),
        (
            "{ url = \"https://a.example/\", like = \"cloudflare-text\" }",
            "needs two URLs",
        ),
        (
            "{ file = \"x\", pointers = [\"/a~2\"] }",
            "is not a JSON pointer",
        ),
        (
            "{ file = \"x\", ca_file = \"y\" }",
            "without `url` and `ca_file`",
        ),
        (
            "{ file = \"x\", url = \"https://a.example/\" }",
            "without `url` and `ca_file`",
        ),
        ("{}", "needs a `url` or a `file`"),
        (
            "{ file = \"x\", like = \"fastli\" }",
            "write one of \"cloudflare\", \"cloudflare-api\"",
        ),
        (
            "{ file = \"x\", like = \"fastly\", pointers = [\"/a\"] }",
            "remove one of them",
        ),
        (
            "{ file = \"x\", pointers = [\"a\"] }",
            "is not a JSON pointer",
        ),
        ("{ file = \"x\", pointers = [] }", "name at least one"),
        ("{ file = \"x\", families = [] }", "\"ipv4\" or \"ipv6\""),
        (
            "{ file = \"x\", max_bytes = 7 }",
            "write a number from 64 to",
        ),
        ("{ url = [] }", "name at least one"),
        ("[]", "name at least one"),
        ("\"fastly\", \"fastly\"", "leave one out"),
    ] {
        let error = error(&format!("[ranges]\nsources = [{bad}]"));
        assert!(error.contains(":2: `ranges.sources"), "{error}");
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn sources_are_what_they_are_said_to_be() {
    let ranges = |lines: &str| {
        parse_text(&format!("{MINIMAL}[ranges]\n{lines}"))
            .unwrap()
            .live
            .ranges
    };
    let sources = |text: &str| {
        let sources = ranges(&format!("sources = [{text}]")).sources;
        sources
            .into_iter()
            .map(|source| source.value)
            .collect::<Vec<_>>()
    };

    let cloudflare = &sources("\"cloudflare\"")[0];
    assert_eq!(cloudflare.name, "cloudflare");
    assert_eq!(cloudflare.ways.len(), 2);
    assert_eq!(cloudflare.fallback, Fallback::Baseline);

    let two = sources("\"cloudflare-jdcloud\", { file = \"x\", like = \"cloudfront\" }");
    assert_eq!(two[0].fallback, Fallback::Nothing);
    assert_eq!(two[1].name, "/etc/pullgate/x");
    assert_eq!(two[1].ways[0].format, Format::CloudFront);
    assert_eq!(two[1].ways[0].families, Families::V4);
    assert_eq!(two[1].fallback, Fallback::Nothing);

    let mirrors = "[{ url = \"https://a.example/?key=s3cret\" }, { file = \"x\" }]";
    let mirror = &sources(mirrors)[0];
    assert_eq!(mirror.name, "https://a.example/");
    assert_eq!(mirror.ways.len(), 2);
    assert_eq!(mirror.fallback, Fallback::Nothing);
    let named = &sources("{ file = \"x\", like = \"cloudflare\", name = \"mirror\" }")[0];
    assert_eq!(named.fallback, Fallback::Baseline);
    assert_eq!(named.name, "mirror");

    let own = ranges("static = [\"64.0.0.0/24\"]\nonly = true");
    assert!(own.sources.is_empty());
    assert_eq!(own.static_.len(), 1);
}

#[test]
fn ranges_in_the_configuration_stand_by_the_guards_rules() {
    let ranges = |lines: &str| error(&format!("[ranges]\n{lines}"));

    assert!(
        ranges("static = [\"10.0.0.0/8\"]").contains(":2: `ranges.static`: `10.0.0.0/8` is in")
    );
    assert!(ranges("only = true").contains(":2: `ranges.only`: only the ranges in"));
    let both = "static = [\"64.0.0.0/24\"]\nonly = true\nsources = [\"fastly\"]";
    assert!(ranges(both).contains(":3: `ranges.only`: `ranges.static` alone"));
    assert!(ranges("sources = []").contains(":2: `ranges.sources`: is empty"));
}

#[test]
fn a_proxy_is_only_used_if_it_is_named_and_its_password_is_not_shown() {
    let proxy = |value: &str| {
        let text = format!("{MINIMAL}[ranges]\nproxy = \"{value}\"");
        parse_text(&text).map(|config| format!("{:?}", config.live.ranges.proxy))
    };

    assert_eq!(proxy("none").unwrap(), "none");
    assert_eq!(proxy("env").unwrap(), "env");
    assert_eq!(
        proxy("http://user:pw@proxy:3128").unwrap(),
        "http://proxy:3128/"
    );
    let error = proxy("socks5://user:pw@proxy").unwrap_err().to_string();
    assert!(error.contains("neither \"none\" nor \"env\""), "{error}");
    assert!(!error.contains("pw"), "{error}");
    assert_eq!(parse_text(MINIMAL).unwrap().live.ranges.proxy, Proxy::None);
}

#[test]
fn an_unknown_field_is_named_with_its_line() {
    assert_eq!(
        error(&MINIMAL.replace("[gate]", "[gate]\nlisten_on = 1")),
        "/etc/pullgate/pullgate.toml:4: `gate.listen_on`: unknown field `listen_on`, expected \
         one of `listen`, `steer`, `client_address`, `route_table`, `rule_priority`, \
         `proxy_from`, `cloudflare_ca_file`, `handshake_timeout`, \
         `connect_timeout`, `idle_timeout`, `drain_timeout`, `max_connections`, \
         `max_handshakes`, `per_source`, `per_network`, `host`"
    );
    let slip = error(&MINIMAL.replace("[gate]", "[gate]\nlitsen = 1"));
    assert!(
        slip.contains("unknown field `litsen`; did you mean `listen`? Expected"),
        "{slip}"
    );
    // What is like another word, and means something else.
    for word in ["client_ca", "client_cert", "proxy", "upstream_ca"] {
        let guess = error(&MINIMAL.replace("trust =", &format!("{word} = 1\ntrust =")));
        assert!(guess.contains("unknown field"), "{guess}");
        assert!(!guess.contains("did you mean"), "{guess}");
    }
}

#[test]
fn a_range_that_others_read_differently_is_refused() {
    for (text, meant) in [
        ("064.0.0.0/24", "64.0.0.0/24"),
        ("64.0.0.0/08", "64.0.0.0/8"),
        ("::ffff:64.0.0.0/120", "64.0.0.0/24"),
        ("2001:db8::/032", "2001:db8::/32"),
    ] {
        for field in ["allow", "deny", "static"] {
            let error = error(&format!("[ranges]\n{field} = [\"{text}\"]\n"));
            let words = format!("did you mean `{meant}`?");
            assert!(error.contains(&words), "{field}: {error}");
        }
    }
}

#[test]
fn a_bad_range_is_named_with_its_line_and_field() {
    assert_eq!(
        error("[ranges]\n\nallow = [\"192.0.2.0/24\", \"192.0.2.0/33\"]"),
        "/etc/pullgate/pullgate.toml:3: `ranges.allow[1]`: `192.0.2.0/33` is not a range or an \
         address; write it as 192.0.2.0/24 or 192.0.2.1"
    );
    assert_eq!(
        error("[ranges]\ndeny = [\"192.0.2.1/24\"]"),
        "/etc/pullgate/pullgate.toml:2: `ranges.deny`: `192.0.2.1/24` has host bits set; did \
         you mean `192.0.2.0/24`?"
    );
    assert!(error("[ranges]\nallow = [\"::/0\"]").contains("is every address"));
    assert_eq!(
        error("[ranges]\ndeny = [\"0.0.0.0/1\",\n\"192.0.0.0/2\",\n\"128.0.0.0/2\"]"),
        "/etc/pullgate/pullgate.toml:4: `ranges.deny`: with those before it is `0.0.0.0/0`, \
         which is every address; name the ranges that you mean"
    );
}

#[test]
fn more_rules_than_fit_are_refused_in_the_longer_list() {
    let subnets = |count: u32| {
        let prefixes = (0..count).map(|number| format!("\"2001:{number:x}::/48\",\n"));
        prefixes.collect::<String>()
    };
    let rules = |allow, deny| {
        let (allow, deny) = (subnets(allow), subnets(deny));
        error(&format!("[ranges]\nallow = [{allow}]\ndeny = [{deny}]"))
    };

    let of_allow = rules(33_000, 1);
    assert!(
        of_allow.contains(":2: `ranges.allow`: the ranges and rules of IPv6 need more than"),
        "{of_allow}"
    );
    let of_deny = rules(1, 33_000);
    assert!(
        of_deny.contains(":4: `ranges.deny`: the ranges and rules of IPv6 need more than"),
        "{of_deny}"
    );
}

#[test]
fn a_value_of_another_type_and_a_key_that_is_there_twice_are_named() {
    let begun = "/etc/pullgate/pullgate.toml:2: ";
    for (text, expected) in [
        (
            "[filter]\nsyn_cookies = true",
            "`filter.syn_cookies`: expected one of its words, in quotes: \"…\"",
        ),
        (
            "[filter]\nports = \"443\"",
            "`filter.ports`: invalid type: string \"443\", expected a list: […, …], or [[…]] before each of several \
             sections",
        ),
        (
            "[gate]\nhandshake_timeout = 10",
            "`gate.handshake_timeout`: invalid type: integer `10`, expected text in quotes: \"…\"",
        ),
    ] {
        assert_eq!(error(text), format!("{begun}{expected}"));
    }
    let twice = error("[filter]\nports = [443]\nports = [8443]");
    assert_eq!(
        twice,
        "/etc/pullgate/pullgate.toml:3: `ports` is there twice; leave one out"
    );
    let section = error("[gate.host]\nnames = []\n[gate.host]\nnames = []");
    assert_eq!(
        section,
        "/etc/pullgate/pullgate.toml:3: the section `host` is there before; make one of the two, or write [[…]] before \
         each, if there may be several"
    );
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
    let url = |url: &str| format!("{MINIMAL}[ranges]\nsources = [{{ url = \"{url}\" }}]");

    assert!(error(&url("http://ranges.example/")).contains("neither https nor http to loopback"));
    assert!(parse_text(&url("http://127.0.0.1:8000/")).is_ok());
    assert!(parse_text(&url("https://ranges.example/")).is_ok());
}

#[test]
fn values_out_of_bounds_are_refused_with_their_place() {
    let gate = |line: &str| error(&MINIMAL.replace("[gate]", &format!("[gate]\n{line}")));
    for (line, words) in [
        ("max_connections = 0", "write a number from 1 to"),
        (
            "max_handshakes = 9000000000000000000",
            "write a number from 1 to",
        ),
        ("max_connections = -1", "write a number from 1 to"),
        ("handshake_timeout = \"0s\"", "write a duration between"),
        ("idle_timeout = \"1000years\"", "write a duration between"),
        ("listen = []", "write each address with its port once"),
        (
            "listen = [\"0.0.0.0:0\"]",
            "write each address with its port once",
        ),
        (
            "listen = [\"[::]:443\", \"[::]:443\"]",
            "write each address with its port once",
        ),
    ] {
        let field = line.split_once(' ').unwrap().0;
        let error = gate(line);
        assert!(
            error.contains(&format!(".toml:4: `gate.{field}`: ")),
            "{error}"
        );
        assert!(error.contains(words), "{error}");
    }
    let filter = |line: &str| error(&MINIMAL.replace("[filter]", &format!("[filter]\n{line}")));
    assert!(filter("ports = [0]").contains("port 0 does not exist"));
    assert!(filter("udp_ports = [0]").contains("`filter.udp_ports`: port 0 does not exist"));
    assert!(filter("ports = []").contains("nothing would be protected"));
    let v4 = error(&format!("{MINIMAL}[ranges]\nmax_addresses_v4 = 7"));
    assert!(v4.contains("`ranges.max_addresses_v4`: 7 is out of bounds"));
    let entries = |n: usize| error(&format!("{MINIMAL}[ranges]\nmax_entries = {n}"));
    assert!(entries(3).contains("write a number from 64 to 4096"));
    assert!(entries(4097).contains("write a number from 64 to 4096"));
    assert!(error("").contains("nothing would be protected"));
    let upstream = |upstream: &str| error(&MINIMAL.replace("127.0.0.1:8080", upstream));
    assert!(upstream("127.0.0.1:0").contains("neither an address with a port"));
    assert!(upstream("unix:").contains("neither an address with a port"));
    assert!(upstream("127.0.0.1:443").contains("is the gate itself"));
}

#[test]
fn the_roots_dot_is_no_part_of_a_name() {
    let config = parse_text(&MINIMAL.replace("a.example", "A.Example.")).unwrap();

    assert_eq!(config.live.gate.unwrap().hosts[0].label(), "a.example");
}

#[test]
fn what_is_missing_or_misspelt_is_named() {
    assert!(parse_text("[ranges]").is_ok());
    assert!(error("[filter]").contains("missing field `interfaces`"));
    assert!(error("[filter").contains("pullgate.toml:1: "));
    assert!(error("[ranges]\ninterval = \"6 parsecs\"").contains(":2: `ranges.interval`: "));
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

#[test]
fn with_steering_the_web_server_is_the_upstream_by_itself() {
    let text = "[filter]\ninterfaces = \"auto\"\nports = [80, 443, 8443]\n[gate]\nsteer = true\n\
        [[gate.host]]\nnames = [\"a.example\"]\ncertificate = \"a.pem\"\nkey = \"a.key\"\n\
        trust = [\"cloudflare\"]\n";
    let config = parse_text(text).unwrap();
    let gate = config.live.gate.unwrap();
    let host = &gate.hosts[0];

    // HTTP without TLS is no business of the gate's.
    assert_eq!(gate.steered_ports, [443, 8443]);
    assert_eq!(config.live.filter.unwrap().steered_ports, [443, 8443]);
    let listen: Vec<_> = config.boot.listen.iter().map(ToString::to_string).collect();
    assert_eq!(listen, ["127.0.0.1:44300", "[::1]:44300"]);
    assert_eq!(host.upstream.value.target, UpstreamTarget::SamePort);
    assert_eq!(
        host.upstream.value.tls,
        Some(Reencryption {
            name: UpstreamName::Clients,
            trust: UpstreamTrust::Shown,
        })
    );
    assert_eq!(host.proxy_protocol, ProxyProtocol::None);
    assert_eq!(host.alpn, ["h2", "http/1.1"]);

    for (change, expected) in [
        (
            ("steer = true", "steer = false"),
            "`gate.host.upstream`: is missing",
        ),
        (
            (
                "[filter]\ninterfaces = \"auto\"\nports = [80, 443, 8443]\n",
                "",
            ),
            "`gate.steer`: needs a [filter] section",
        ),
        (
            ("80, 443, 8443", "80, 8080"),
            "`gate.steer`: has no port to steer",
        ),
    ] {
        let error = error(&text.replace(change.0, change.1));
        assert!(error.contains(expected), "{error}");
    }
}
