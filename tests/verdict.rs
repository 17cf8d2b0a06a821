//! Verifies that the loaded program comes to the verdicts of the table, by test runs in the
//! kernel. The same table is asked of `decide` on the host, in `filter-ebpf`'s own tests.

use aya::EbpfLoader;
use aya::programs::{ProgramInfo, SchedClassifier, Xdp};
use filter_ebpf::abi;
use filter_ebpf::cases::{Table, cases};
use filter_ebpf::verdict::{Reason, Verdict};
use pullgate::xdp::uninterrupted;
use tests::lab::{CASE_RULES, XDP_DROP, XDP_PASS, judge};
use tests::{Lab, Plan};

#[test]
fn the_loaded_program_agrees_with_the_verdict_table() {
    agrees(Table::Default, "");
}

#[test]
fn the_loaded_program_agrees_with_the_table_of_special_settings() {
    let settings = "udp_ports = [443]\nfragments = \"pass\"\n\
        destinations = [\"203.0.113.10\", \"2001:db8:10::10\"]";

    agrees(Table::Special, settings);
}

#[test]
fn every_variant_passes_the_verifier() {
    // As `cargo xtask` names it; a virtual machine has it elsewhere.
    let object = std::env::var_os("PULLGATE_XDP_OBJECT").unwrap();
    let mut ebpf = EbpfLoader::new().load_file(object).unwrap();

    // On this kernel the daemon loads the first, and the others only if it has to.
    for name in [abi::PROGRAM, abi::PROGRAM_LINEAR] {
        let program: &mut Xdp = ebpf.program_mut(name).unwrap().try_into().unwrap();
        if name == abi::PROGRAM && !pullgate::host::kernel::is_at_least((5, 18)) {
            assert!(
                uninterrupted(|| program.load()).is_err(),
                "{name}: an unknown flag"
            );
            continue;
        }
        uninterrupted(|| program.load()).unwrap();
        leaves_room(&program.info().unwrap());
        assert_eq!(judge(program, &[0; 64]), XDP_PASS, "{name}: not IP");
        assert_eq!(judge(program, &[8; 14]), XDP_PASS, "{name}: not IP");
    }
    let name = abi::PROGRAM_TCX;
    let program: &mut SchedClassifier = ebpf.program_mut(name).unwrap().try_into().unwrap();
    uninterrupted(|| program.load()).unwrap();
    leaves_room(&program.info().unwrap());
}

/// The verifier gives up after a million instructions, and others walk more of them than this one.
fn leaves_room(program: &ProgramInfo) {
    // Linux counts them since 5.16.
    if let Some(walked) = program.verified_instruction_count() {
        assert!(walked < 500_000, "{walked} instructions");
    }
}

fn agrees(table: Table, settings: &'static str) {
    let lab = Lab::start(&Plan {
        filter: settings,
        ranges: CASE_RULES,
        ..Plan::default()
    });
    let program = lab.program();

    let cases = cases(table);
    // The kernel takes no test frame that is shorter than an Ethernet header.
    for case in cases.iter().filter(|case| case.frame.len() >= 14) {
        let before = lab.frames(case.verdict);
        let returned = judge(&program, &case.frame);
        let counted = lab.frames(case.verdict) - before;

        let action = match case.verdict {
            Verdict::Drop(_) => XDP_DROP,
            Verdict::Pass(_) => XDP_PASS,
        };
        assert_eq!(returned, action, "{table:?}: {}", case.description);
        // Neighbours and routers talk as they like meanwhile.
        let is_noisy = matches!(case.verdict.reason(), Reason::NotTcp | Reason::NotIp);
        assert!(
            counted == 1 || is_noisy && counted > 1,
            "{table:?}: {}",
            case.description
        );
    }
}
