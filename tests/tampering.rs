//! Verifies that what another process changes in the kernel is seen, reported and put right: the ranges,
//! the program behind our link, and who judges first.

use aya::EbpfLoader;
use aya::maps::{Array, Map, MapData};
use aya::programs::links::{FdLink, LinkOrder, PinnedLink};
use aya::programs::tc::TcAttachOptions;
use aya::programs::xdp::XdpLink;
use aya::programs::{SchedClassifier, TcAttachType, Xdp, XdpMode};
use filter_ebpf::abi::{self, CHUNK, chunk_index};
use filter_ebpf::table::{Chunk, Class};
use pullgate::xdp::uninterrupted;
use tests::net::{Host, INTERFACE};
use tests::traffic::Objects;
use tests::{Lab, Plan, assert_matched, eventually, scenarios};

#[test]
fn ranges_that_another_process_changes_are_published_again() {
    let lab = Lab::start(&Plan::default());
    let mark = lab.filter().mark();

    // 198.51.0.0/16 is Cloudflare's, whatever the list says.
    let pin = lab.network.pin("ranges_v4");
    let map = Map::Array(MapData::from_pin(&pin).unwrap());
    let mut ranges = Array::<_, Chunk>::try_from(map).unwrap();
    for generation in 0..abi::GENERATIONS {
        let index = chunk_index(198, generation);
        let mut chunk = ranges.get(&index, 0).unwrap();
        chunk[usize::from(198 % CHUNK) << 8 | 51] = Class::Listed as u16;
        ranges.set(index, chunk, 0).unwrap();
    }

    lab.filter().event(mark, "it is seen", |event| {
        event["id"] == "kernel-ranges-tampered"
    });
    lab.filter().event(mark, "it is put right", |event| {
        event["id"] == "ranges-republished"
    });
    let warnings = lab.filter().status()["findings"].to_string();
    assert!(warnings.contains("kernel-ranges-tampered"), "{warnings}");
    assert_matched(&scenarios::strangers_are_dropped(&lab));
}

#[test]
fn pins_that_another_process_removes_are_reported_until_a_restart() {
    let mut lab = Lab::start(&Plan::default());
    let mark = lab.filter().mark();

    let counters = lab.network.pin(&format!("counters-{INTERFACE}"));
    for pin in [&lab.network.pin("ranges_v4"), &counters] {
        std::fs::remove_file(pin).unwrap();
    }

    lab.filter().event(mark, "it is logged", |event| {
        event["id"] == "pin-removed" && event["pin"].to_string().contains("counters")
    });
    let warnings = lab.filter().status()["findings"].to_string();
    for words in ["ranges_v4", "counters-wan0"] {
        assert!(warnings.contains(words), "{words}: {warnings}");
    }

    lab.restart_with("");
    let warnings = lab.filter().status()["findings"].to_string();
    assert!(!warnings.contains("pin-removed"), "{warnings}");
    // What was explained before is not taken from drops that are counted from zero.
    let explained = lab.pullgate(&["explain", "198.51.100.7"]);
    assert!(explained.status.success());
    assert_matched(&scenarios::strangers_are_dropped(&lab));
}

#[test]
fn a_program_and_a_twin_of_two_minds_are_reported() {
    let lab = Lab::start(&Plan::default());
    let pin = lab.network.pin(&format!("slot-{INTERFACE}"));
    std::fs::remove_file(&pin).unwrap();
    let mut objects = Objects::load();
    let foreign: &mut Xdp = objects.program("bare_drop");
    foreign.pin(&pin).unwrap();

    // Whatever its answer stands for, it cannot be right of both.
    let texts = ["198.51.100.7", "173.245.48.5"].map(|source| {
        let explained = lab.pullgate(&["explain", source]);
        String::from_utf8(explained.stdout).unwrap()
    });

    let is_reported = |text: &&String| text.contains("its twin counts it as");
    assert!(texts.iter().any(|text| is_reported(&text)), "{texts:?}");
}

#[test]
fn a_link_that_is_given_to_another_program_is_taken_back() {
    let lab = Lab::start(&Plan::default());
    let mark = lab.filter().mark();

    let mut objects = Objects::load();
    let foreign: &mut Xdp = objects.program("bare_pass");
    let pinned = PinnedLink::from_pin(lab.network.pin(&format!("native-{INTERFACE}"))).unwrap();
    let link = XdpLink::try_from(FdLink::from(pinned)).unwrap();
    let id = lab
        .network
        .on(Host::Origin, || foreign.attach_to_link(link).unwrap());
    // It is the pin's.
    drop(foreign.take_link(id).unwrap());

    lab.filter().event(mark, "it is taken back", |event| {
        event["id"] == "interface-reattached"
    });
    assert_matched(&scenarios::strangers_are_dropped(&lab));
}

#[test]
fn a_program_that_comes_before_ours_is_reported_as_long_as_it_does() {
    let mut lab = Lab::start(&Plan::default());
    lab.unload();
    let mut objects = Objects::load();
    let occupant: &mut Xdp = objects.program("bare_pass");
    lab.network.on(Host::Origin, || {
        occupant.attach(INTERFACE, XdpMode::Driver).unwrap()
    });
    lab.configure("coexist = \"tcx\"");
    lab.start_filter();
    let protected = || lab.filter().status()["filter"]["interfaces"].to_string();
    assert!(protected().contains("tcx"), "{}", protected());
    let mark = lab.filter().mark();

    // Our own classifier, without settings, protects nothing: whatever it is asked passes.
    let object = std::env::var_os("PULLGATE_XDP_OBJECT").unwrap();
    let mut ebpf = EbpfLoader::new().load_file(object).unwrap();
    let first = ebpf.program_mut(abi::PROGRAM_TCX).unwrap();
    let first: &mut SchedClassifier = first.try_into().unwrap();
    uninterrupted(|| first.load()).unwrap();
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = lab.network.on(Host::Origin, || {
        first
            .attach_with_options(INTERFACE, TcAttachType::Ingress, options)
            .unwrap()
    });

    lab.filter().event(mark, "it is logged", |event| {
        event["id"] == "tcx-program-before"
    });
    let status = lab.filter().status();
    let warnings = status["findings"].to_string();
    assert!(warnings.contains("tcx-program-before"), "{warnings}");
    assert_eq!(status["enforcing"], false, "{status}");
    assert_eq!(lab.pullgate(&["status"]).status.code(), Some(1));

    drop(first.take_link(id).unwrap());
    eventually("it is gone", || {
        let warnings = lab.filter().status()["findings"].to_string();
        (!warnings.contains("tcx-program-before")).then_some(())
    });
}
