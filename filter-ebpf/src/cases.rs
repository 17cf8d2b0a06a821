//! The verdict table as frames: one table, asked of `decide` on the host and of the loaded program.

mod packet;

use core::net::IpAddr;
use std::string::{String, ToString as _};
use std::vec::Vec;
use std::{format, vec};

pub use self::packet::{Packet, ethernet, gre, session};
use crate::verdict::Reason::{
    Allowed, ChainTooLong, Denied, Fragment, Listed, Malformed, NotIp, NotListed, NotTcp,
    OtherDestination, OtherPort, TooManyTags,
};
use crate::verdict::Settings;
use crate::verdict::Verdict::{self, Drop, Pass};

/// A row: what it is, the frame, and what is to become of it.
#[derive(Clone, Debug)]
pub struct Case {
    /// What the frame is, in words.
    pub description: String,
    /// The frame.
    pub frame: Vec<u8>,
    /// The verdict.
    pub verdict: Verdict,
}

/// Which addresses and settings a table of cases is about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Table {
    /// Port 443 over TCP is protected, on all addresses; later fragments are dropped.
    Default,
    /// UDP 443 is protected too, on [`DESTINATIONS`] only, and later fragments pass.
    Special,
}

impl Settings for Table {
    fn protects_tcp(&self, port: u16) -> bool {
        port == 443
    }
    fn protects_udp(&self, port: u16) -> bool {
        *self == Self::Special && port == 443
    }
    fn protects_some_udp(&self) -> bool {
        *self == Self::Special
    }
    fn protects_destination(&self, address: IpAddr) -> bool {
        *self == Self::Default || DESTINATIONS.contains(&address.to_string().as_str())
    }
    fn fragments_pass(&self) -> bool {
        *self == Self::Special
    }
}

/// The addresses that [`Table::Special`] protects.
pub const DESTINATIONS: [&str; 2] = ["203.0.113.10", "2001:db8:10::10"];
/// What the operator's `allow` holds, in both tables.
pub const ALLOW: [&str; 2] = ["198.51.100.200/32", "2001:db8::200/128"];
/// What the operator's `deny` holds, in both tables.
pub const DENY: [&str; 2] = ["173.245.63.0/24", "2400:cb00:bad::/48"];

/// All rows of one table. The ranges are the embedded baseline.
#[must_use]
pub fn cases(table: Table) -> Vec<Case> {
    let mut cases = Vec::new();
    for family in FAMILIES {
        match table {
            Table::Default => default_cases(&family, &mut cases),
            Table::Special => special_cases(&family, &mut cases),
        }
    }
    cases
}

/// A stranger, a listed, an allowed and a denied source, and two destinations of one family.
struct Family {
    name: &'static str,
    stranger: &'static str,
    listed: &'static str,
    allowed: &'static str,
    denied: &'static str,
    origin: &'static str,
    elsewhere: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family {
        name: "IPv4",
        stranger: "198.51.100.7",
        listed: "173.245.48.5",
        allowed: "198.51.100.200",
        denied: "173.245.63.1",
        origin: "203.0.113.10",
        elsewhere: "203.0.113.99",
    },
    Family {
        name: "IPv6",
        stranger: "2001:db8::7",
        listed: "2400:cb00::5",
        allowed: "2001:db8::200",
        denied: "2400:cb00:bad::1",
        origin: "2001:db8:10::10",
        elsewhere: "2001:db8:10::99",
    },
];

/// Collects rows of one family.
struct Rows<'a> {
    family: &'a Family,
    cases: &'a mut Vec<Case>,
}

impl Rows<'_> {
    /// One row for a stranger, one for a listed source.
    fn both(
        &mut self,
        what: &str,
        make: impl Fn(IpAddr, IpAddr) -> Packet,
        stranger: Verdict,
        listed: Verdict,
    ) {
        let Family {
            stranger: s,
            listed: l,
            ..
        } = *self.family;
        self.one(&format!("{what}, stranger"), s, &make, stranger);
        self.one(&format!("{what}, listed"), l, &make, listed);
    }

    fn one(
        &mut self,
        what: &str,
        source: &str,
        make: impl Fn(IpAddr, IpAddr) -> Packet,
        verdict: Verdict,
    ) {
        let packet = make(address(source), address(self.family.origin));
        self.cases.push(Case {
            description: format!("{} {what}", self.family.name),
            frame: packet.build(),
            verdict,
        });
    }
}

fn address(text: &str) -> IpAddr {
    // The addresses of a test table; a wrong one fails every test.
    text.parse()
        .unwrap_or(IpAddr::V4(core::net::Ipv4Addr::UNSPECIFIED))
}

fn default_cases(family: &Family, cases: &mut Vec<Case>) {
    let is_v4 = family.name == "IPv4";
    let mut rows = Rows { family, cases };
    let syn = |s, d| Packet::tcp(s, d, 443);
    let no = Drop(NotListed);
    let yes = Pass(Listed);

    rows.both("SYN", syn, no, yes);
    rows.one("SYN, allowed", family.allowed, syn, Pass(Allowed));
    rows.one("SYN, denied", family.denied, syn, Drop(Denied));
    rows.both(
        "SYN to 80",
        |s, d| Packet::tcp(s, d, 80),
        Pass(OtherPort),
        Pass(OtherPort),
    );
    rows.both(
        "SYN to 22",
        |s, d| Packet::tcp(s, d, 22),
        Pass(OtherPort),
        Pass(OtherPort),
    );
    rows.both(
        "SYN to 442",
        |s, d| Packet::tcp(s, d, 442),
        Pass(OtherPort),
        Pass(OtherPort),
    );
    rows.both(
        "UDP to 443",
        |s, d| Packet::udp(s, d, 443),
        Pass(NotTcp),
        Pass(NotTcp),
    );
    let echo = |s, d| Packet::carrying(s, d, if is_v4 { 1 } else { 58 }, vec![8; 8]);
    rows.both("ping", echo, Pass(NotTcp), Pass(NotTcp));

    for tpid in [0x8100, 0x88a8, 0x9100] {
        let tagged = |s, d| syn(s, d).tagged(tpid, 7);
        rows.both(&format!("SYN, one tag {tpid:#x}"), tagged, no, yes);
    }
    for count in [2, 8] {
        let tagged = |s, d| (0..count).fold(syn(s, d), |packet, _| packet.tagged(0x8100, 0));
        rows.both(&format!("SYN, {count} tags"), tagged, no, yes);
    }
    let nine = |s, d| (0..9).fold(syn(s, d), |packet, _| packet.tagged(0x8100, 0));
    rows.both("SYN, nine tags", nine, Drop(TooManyTags), Drop(TooManyTags));

    let wrong_version = |s, d| syn(s, d).version_ihl(if is_v4 { 0x65 } else { 0x45 });
    rows.both(
        "wrong version",
        wrong_version,
        Drop(Malformed),
        Drop(Malformed),
    );
    for length in [0, 3] {
        let short = |s, d| syn(s, d).cut(length);
        let what = format!("cut after {length} bytes of TCP");
        rows.both(&what, short, Drop(Malformed), Pass(Malformed));
    }
    rows.both("cut after the ports", |s, d| syn(s, d).cut(4), no, yes);
    let behind = |s, d| Packet::tcp(s, d, 80).cut(0).trailer(&[0, 1, 0, 80]);
    rows.both(
        "ports behind the packet",
        behind,
        Drop(Malformed),
        Pass(Malformed),
    );

    let first = |s, d| syn(s, d).cut(8).fragment(0, true);
    rows.both("first fragment", first, no, yes);
    let later = |s, d| syn(s, d).fragment(1, false);
    rows.both("later fragment", later, Drop(Fragment), Pass(Fragment));
    let udp = |s, d| Packet::udp(s, d, 443).fragment(1, false);
    rows.both("later fragment of UDP", udp, Pass(NotTcp), Pass(NotTcp));

    for inner in &FAMILIES {
        nested_cases(&mut rows, inner);
    }
    if is_v4 {
        v4_cases(&mut rows);
    } else {
        v6_cases(&mut rows);
    }
}

/// Packets of one family inside of packets of the other or the same: the innermost is judged, and
/// nothing of what is around it.
fn nested_cases(rows: &mut Rows<'_>, inner: &Family) {
    let (protocol, ethertype) = match inner.name {
        "IPv4" => (4, 0x0800),
        _ => (41, 0x86dd),
    };
    let (no, yes) = (Drop(NotListed), Pass(Listed));
    let destination = address(inner.origin);
    let syn = |source: &str| Packet::tcp(address(source), destination, 443);
    let name = inner.name;
    let mut both = |what: &str, payload: (u8, Vec<u8>), verdict| {
        let (protocol, payload) = payload;
        let outer = |s, d| Packet::carrying(s, d, protocol, payload.clone());
        rows.both(&format!("{what} ({name} inside)"), outer, verdict, verdict);
    };

    for (who, source, verdict) in [
        ("a stranger's", inner.stranger, no),
        ("a listed", inner.listed, yes),
        ("an allowed", inner.allowed, Pass(Allowed)),
        ("a denied", inner.denied, Drop(Denied)),
    ] {
        let bare = syn(source).bare();
        both(&format!("{who} SYN"), (protocol, bare.clone()), verdict);
        for flags in [0, 0x2000, 0xb000] {
            let what = format!("{who} SYN in GRE {flags:#x}");
            both(&what, (47, gre(flags, ethertype, &bare)), verdict);
        }
        let twice = Packet::carrying(address(source), destination, protocol, bare);
        both(
            &format!("{who} SYN twice"),
            (protocol, twice.bare()),
            verdict,
        );
    }
    let stranger = syn(inner.stranger);
    let elsewhere = Packet::tcp(address(inner.stranger), destination, 80).bare();
    both("SYN to 80", (protocol, elsewhere), Pass(OtherPort));
    let udp = Packet::udp(address(inner.stranger), destination, 443).bare();
    both("UDP", (protocol, udp), Pass(NotTcp));
    for (flags, ethertype) in [(1, 0x880b), (0x4000, ethertype), (0, 0x6558)] {
        let what = format!("GRE {flags:#x} of {ethertype:#x}");
        let payload = gre(flags, ethertype, &stranger.bare());
        both(&what, (47, payload), Pass(NotTcp));
    }
    if inner.name == "IPv4" {
        let redirected = [&[0; 4], stranger.bare().as_slice()].concat();
        both("SYN in WCCP", (47, gre(0, 0x883e, &stranger.bare())), no);
        both(
            "SYN in WCCP of version 2",
            (47, gre(0, 0x883e, &redirected)),
            no,
        );
    }
    let mut options = stranger.clone();
    options = match inner.name {
        "IPv4" => options.options(&[1; 4]),
        _ => options.extension(60, &[0, 1, 4, 0, 0, 0, 0]),
    };
    both("SYN behind options", (protocol, options.bare()), no);
    let later = stranger.clone().fragment(1, false).bare();
    both("later fragment", (protocol, later), Drop(Fragment));
    let tcp = stranger.clone().cut(3).bare();
    both("cut inside the ports", (protocol, tcp), Drop(Malformed));
    both("nothing", (protocol, Vec::new()), Drop(Malformed));
    both(
        "GRE of nothing",
        (47, gre(0, ethertype, &[])),
        Drop(Malformed),
    );
    both("GRE of three bytes", (47, vec![0; 3]), Drop(Malformed));

    // No header around it names the source of a packet that is not parsed: sources there are free to
    // forge, and addresses to choose.
    for source in [inner.stranger, inner.listed, inner.allowed] {
        let mut packet = stranger.clone();
        for _ in 0..2 {
            packet = Packet::carrying(address(source), destination, protocol, packet.bare());
        }
        both(
            &format!("SYN thrice, from {source}"),
            (protocol, packet.bare()),
            Drop(ChainTooLong),
        );
    }
    if inner.name == "IPv6" {
        let options = |packet: Packet, count| {
            (0..count).fold(packet, |packet, _| {
                packet.extension(60, &[0, 1, 4, 0, 0, 0, 0])
            })
        };
        let listed = Packet::carrying(address(inner.listed), destination, 41, stranger.bare());
        let long = options(listed.clone(), 9).bare();
        both("SYN behind nine headers", (41, long), Drop(ChainTooLong));
        let mut cut = options(listed, 1).bare();
        cut.truncate(44);
        both("cut inside a header", (41, cut), Drop(Malformed));
    }

    // The packet ends with what holds it, though the frame goes on.
    let bare = stranger.bare();
    let behind = |s, d| {
        let packet = Packet::carrying(s, d, protocol, bare[..bare.len() - 18].to_vec());
        packet.trailer(&bare[bare.len() - 18..])
    };
    let what = format!("ports behind the packet ({name} inside)");
    rows.both(&what, behind, Drop(Malformed), Drop(Malformed));
    let first = |s, d| Packet::carrying(s, d, protocol, bare.clone()).fragment(0, true);
    rows.both(&format!("first fragment ({name} inside)"), first, no, no);
}

fn v4_cases(rows: &mut Rows<'_>) {
    let syn = |s, d| Packet::tcp(s, d, 443);
    let (no, yes) = (Drop(NotListed), Pass(Listed));
    rows.both(
        "SYN, options of NOPs",
        |s, d| syn(s, d).options(&[1; 4]),
        no,
        yes,
    );
    rows.both(
        "SYN, 40 bytes of options",
        |s, d| syn(s, d).options(&[1; 40]),
        no,
        yes,
    );
    rows.both(
        "SYN, router alert",
        |s, d| syn(s, d).options(&[148, 4, 0, 0]),
        no,
        yes,
    );
    let first = |s, d| syn(s, d).options(&[1; 40]).cut(8).fragment(0, true);
    rows.both("first fragment, 40 bytes of options", first, no, yes);
    let ihl = |s, d| syn(s, d).version_ihl(0x44);
    rows.both("IHL of four words", ihl, Drop(Malformed), Drop(Malformed));
    let cut = |s, d| syn(s, d).version_ihl(0x4f).cut(8);
    rows.both(
        "ends inside its options",
        cut,
        Drop(Malformed),
        Drop(Malformed),
    );

    for family in &FAMILIES {
        session_cases(rows.cases, family);
    }
    for (what, frame, verdict) in [
        ("ARP", ethernet(0x0806, &[0; 28]), Pass(NotIp)),
        ("LLDP", ethernet(0x88cc, &[0; 28]), Pass(NotIp)),
        ("802.3 length", ethernet(0x0026, &[0; 38]), Pass(NotIp)),
        ("IPv4 of nothing", ethernet(0x0800, &[]), Drop(Malformed)),
        (
            "IPv4 of 19 bytes",
            ethernet(0x0800, &[0x45; 19]),
            Drop(Malformed),
        ),
        (
            "IPv6 of 39 bytes",
            ethernet(0x86dd, &[0x60; 39]),
            Drop(Malformed),
        ),
        (
            "a tag and nothing",
            ethernet(0x8100, &[0, 0]),
            Drop(Malformed),
        ),
    ] {
        rows.cases.push(Case {
            description: what.into(),
            frame,
            verdict,
        });
    }
}

/// Frames of a PPPoE session.
fn session_cases(cases: &mut Vec<Case>, family: &Family) {
    let protocol = match family.name {
        "IPv4" => 0x21,
        _ => 0x57,
    };
    let destination = address(family.origin);
    let syn = |source| Packet::tcp(address(source), destination, 443);
    let stranger = syn(family.stranger);
    let (inner, outer) = (stranger.bare(), address(family.listed));
    let tunnel = Packet::carrying(
        outer,
        destination,
        if protocol == 0x21 { 4 } else { 41 },
        inner,
    );
    let mut short = session(&[0, protocol], &stranger.bare());
    // The session's length ends the packet in front of its ports.
    short[19] = u8::try_from(stranger.bare().len() - 18).unwrap_or(0);
    for (what, frame, verdict) in [
        (
            "SYN",
            session(&[0, protocol], &stranger.bare()),
            Drop(NotListed),
        ),
        (
            "SYN, short protocol",
            session(&[protocol], &stranger.bare()),
            Drop(NotListed),
        ),
        (
            "SYN, listed",
            session(&[0, protocol], &syn(family.listed).bare()),
            Pass(Listed),
        ),
        (
            "SYN in a tunnel",
            session(&[0, protocol], &tunnel.bare()),
            Drop(NotListed),
        ),
        ("SYN, cut by the session", short, Drop(Malformed)),
        ("LCP", session(&[0xc0, 0x21], &[0; 8]), Pass(NotIp)),
        (
            "nothing",
            ethernet(0x8864, &[0x11, 0, 0, 1]),
            Drop(Malformed),
        ),
    ] {
        cases.push(Case {
            description: format!("PPPoE, {} {what}", family.name),
            frame,
            verdict,
        });
    }
}

fn v6_cases(rows: &mut Rows<'_>) {
    let syn = |s, d| Packet::tcp(s, d, 443);
    let (no, yes) = (Drop(NotListed), Pass(Listed));
    // PadN over the rest of an eight-byte header, RFC 8200 §4.2.
    let pad = [0, 1, 4, 0, 0, 0, 0];
    for (name, kind) in [("hop-by-hop", 0), ("destination options", 60)] {
        let one = |s, d| syn(s, d).extension(kind, &pad);
        rows.both(&format!("SYN, {name}"), one, no, yes);
    }
    let mut long = vec![1, 1, 12];
    long.resize(15, 0);
    rows.both(
        "SYN, options of 16 bytes",
        |s, d| syn(s, d).extension(60, &long),
        no,
        yes,
    );
    let mut longest = vec![255, 1, 255];
    longest.resize(2047, 0);
    rows.both(
        "SYN, options of 2,048 bytes",
        |s, d| syn(s, d).extension(60, &longest),
        no,
        yes,
    );
    let routing = |s, d| syn(s, d).extension(43, &[0, 0, 0, 0, 0, 0, 0]);
    rows.both("SYN, routing header", routing, no, yes);
    // SRv6: the last segment's address is in the destination, and a packet may be behind.
    let segments = |s, d| {
        let inner = Packet::tcp(
            address(FAMILIES[0].stranger),
            address(FAMILIES[0].origin),
            443,
        );
        let mut header = vec![2, 4, 0, 0, 0, 0, 0];
        header.resize(23, 0);
        Packet::carrying(s, d, 4, inner.bare()).extension(43, &header)
    };
    rows.both("SYN behind an SRv6 header", segments, no, no);
    let authentication = [
        4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    rows.both(
        "SYN, authentication",
        |s, d| syn(s, d).extension(51, &authentication),
        no,
        yes,
    );
    rows.both(
        "SYN, atomic fragment",
        |s, d| syn(s, d).fragment(0, false),
        no,
        yes,
    );
    for count in [8, 9] {
        let chain = |s, d| (0..count).fold(syn(s, d), |packet, _| packet.extension(60, &pad));
        let (stranger, listed) = match count {
            8 => (no, yes),
            _ => (Drop(ChainTooLong), Drop(ChainTooLong)),
        };
        rows.both(
            &format!("SYN, {count} extension headers"),
            chain,
            stranger,
            listed,
        );
    }

    // A chain that goes on in the next fragment, and something harmless behind the packet's end.
    let split = |s, d| {
        let options = vec![60, 0, 1, 4, 0, 0, 0, 0];
        let packet = Packet::carrying(s, d, 60, options).fragment(0, true);
        packet.trailer(&[58, 0, 1, 4, 0, 0, 0, 0])
    };
    rows.both(
        "chain split over fragments, ICMPv6 behind the packet",
        split,
        Drop(Malformed),
        Drop(Malformed),
    );
    let short = |s, d| Packet::udp(s, d, 443).cut(2).fragment(0, true);
    rows.both("UDP cut before its port", short, Pass(NotTcp), Pass(NotTcp));
    // A later fragment whose next header lies joins a first one that is judged by itself.
    let liar = |s, d| Packet::carrying(s, d, 17, vec![0; 12]).fragment(1, false);
    rows.both(
        "later fragment that says UDP",
        liar,
        Pass(NotTcp),
        Pass(NotTcp),
    );
    let hidden = |s, d| Packet::carrying(s, d, 60, vec![0; 12]).fragment(1, false);
    rows.both(
        "later fragment of hidden transport",
        hidden,
        Drop(Fragment),
        Pass(Fragment),
    );
    let cut = |s, d| Packet::carrying(s, d, 60, vec![6]);
    rows.both(
        "ends inside an extension header",
        cut,
        Drop(Malformed),
        Drop(Malformed),
    );
    let none = |s, d| Packet::carrying(s, d, 59, vec![0; 8]);
    rows.both("no next header", none, Pass(NotTcp), Pass(NotTcp));
    // Mobility is no header that the stack walks: what looks like ports in it are none.
    let mobility = |s, d| Packet::carrying(s, d, 135, vec![6, 0, 0x01, 0xbb, 0, 0, 0, 0]);
    rows.both("mobility header", mobility, Pass(NotTcp), Pass(NotTcp));
    let mapped = |_, d| syn(address("::ffff:173.245.48.5"), d);
    rows.both("IPv4-mapped source", mapped, no, no);
}

fn special_cases(family: &Family, cases: &mut Vec<Case>) {
    let is_v4 = family.name == "IPv4";
    let mut rows = Rows { family, cases };
    let (no, yes) = (Drop(NotListed), Pass(Listed));
    let other = address(family.elsewhere);

    rows.both("SYN", |s, d| Packet::tcp(s, d, 443), no, yes);
    rows.both("UDP to 443", |s, d| Packet::udp(s, d, 443), no, yes);
    rows.both(
        "UDP to 53",
        |s, d| Packet::udp(s, d, 53),
        Pass(NotTcp),
        Pass(NotTcp),
    );
    // The rest of it, with the port, may come in a fragment that lies.
    let short = |s, d| Packet::udp(s, d, 443).cut(2).fragment(0, true);
    rows.both(
        "UDP cut before its port",
        short,
        Drop(Malformed),
        Pass(Malformed),
    );
    let elsewhere = |s, _| Packet::tcp(s, other, 443);
    let pass = Pass(OtherDestination);
    rows.both("SYN elsewhere", elsewhere, pass, pass);
    let later = |s, d| Packet::tcp(s, d, 443).fragment(1, false);
    rows.both("later fragment", later, Pass(Fragment), Pass(Fragment));
    let short = |s, d| Packet::tcp(s, d, 443).cut(3);
    rows.both(
        "cut inside the ports",
        short,
        Drop(Malformed),
        Pass(Malformed),
    );

    // Where the packet goes in the end is not proven by the address it carries.
    if is_v4 {
        let source_route =
            |s, _| Packet::tcp(s, other, 443).options(&[131, 7, 4, 203, 0, 113, 10, 0]);
        rows.both("SYN elsewhere, source route", source_route, no, yes);
    } else {
        let segments = |s, _| Packet::tcp(s, other, 443).extension(43, &[0, 0, 1, 0, 0, 0, 0]);
        rows.both("SYN elsewhere, segments left", segments, no, yes);
        let none_left = |s, _| Packet::tcp(s, other, 443).extension(43, &[0, 0, 0, 0, 0, 0, 0]);
        rows.both("SYN elsewhere, no segments left", none_left, pass, pass);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Class, Ranges, decide};
    use core::net::Ipv6Addr;

    #[test]
    fn decide_agrees_with_the_verdict_table() {
        for table in [Table::Default, Table::Special] {
            for case in cases(table) {
                let verdict = decide(case.frame.as_slice(), &table, &Sample).verdict;

                assert_eq!(verdict, case.verdict, "{table:?}: {}", case.description);
            }
        }
    }

    #[test]
    fn every_frame_cut_anywhere_gets_a_verdict_and_strangers_never_enter() {
        for case in cases(Table::Default) {
            for length in 0..case.frame.len() {
                let verdict = decide(&case.frame[..length], &Table::Default, &AllAbsent).verdict;

                assert!(
                    !matches!(verdict, Pass(Listed | Allowed | Malformed | ChainTooLong)),
                    "{} cut at {length}: {verdict:?}",
                    case.description
                );
            }
        }
    }

    #[test]
    fn every_reason_has_a_row() {
        let rows: Vec<_> = [Table::Default, Table::Special]
            .into_iter()
            .flat_map(cases)
            .map(|case| case.verdict.reason())
            .collect();

        // Of these two the kernel's sockets say whether they are.
        let of_sockets = [crate::Reason::NoConnection, crate::Reason::SynCookie];
        let of_frames = |reason: &crate::Reason| !of_sockets.contains(reason);
        for reason in crate::Reason::ALL.into_iter().filter(of_frames) {
            assert!(rows.contains(&reason), "{}", reason.label());
        }
    }

    /// The few addresses that the table is about.
    struct Sample;

    impl Ranges for Sample {
        fn class(&self, source: IpAddr) -> Class {
            let bits = |address: Ipv6Addr| address.to_bits();
            match source {
                IpAddr::V4(source) => match source.octets() {
                    [198, 51, 100, 200] => Class::Allowed,
                    [173, 245, 63, _] => Class::Denied,
                    [173, 245, 48..=63, _] => Class::Listed,
                    _ => Class::Absent,
                },
                IpAddr::V6(source) => match source.segments() {
                    [0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x200] => Class::Allowed,
                    [0x2400, 0xcb00, 0xbad, ..] => Class::Denied,
                    _ if bits(source) >> 96 == 0x2400_cb00 => Class::Listed,
                    _ => Class::Absent,
                },
            }
        }
    }

    /// Everybody is a stranger.
    struct AllAbsent;

    impl Ranges for AllAbsent {
        fn class(&self, _: IpAddr) -> Class {
            Class::Absent
        }
    }
}
