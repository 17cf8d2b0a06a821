//! Verifies that the loaded program comes to the verdicts of the table, by test runs in the
//! kernel. The same table is asked of `decide` on the host, in `filter-ebpf`'s own tests.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use aya_obj::programs::XdpAttachType;
use filter_ebpf::cases::{Table, cases};
use filter_ebpf::verdict::{Reason, Verdict};
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

fn agrees(table: Table, settings: &'static str) {
    let lab = Lab::start(&Plan {
        filter: settings,
        ranges: "allow = [\"198.51.100.200/32\", \"2001:db8::200/128\"]\n\
            deny = [\"173.245.63.0/24\", \"2400:cb00:bad::/48\"]",
        ..Plan::default()
    });
    let program = Xdp::from_pin(lab.pin("program"), XdpAttachType::Interface).unwrap();

    let cases = cases(table);
    // The kernel takes no test frame that is shorter than an Ethernet header.
    for case in cases.iter().filter(|case| case.frame.len() >= 14) {
        let before = lab.frames(case.verdict);
        let options = TestRunOptions {
            data_in: Some(&case.frame),
            ..TestRunOptions::new()
        };
        let result = program.test_run(options).unwrap();
        let counted = lab.frames(case.verdict) - before;

        let action = match case.verdict {
            Verdict::Drop(_) => XDP_DROP,
            Verdict::Pass(_) => XDP_PASS,
        };
        assert_eq!(
            result.return_value, action,
            "{table:?}: {}",
            case.description
        );
        // Neighbours and routers talk as they like meanwhile.
        let is_noisy = matches!(case.verdict.reason(), Reason::NotTcp | Reason::NotIp);
        assert!(
            counted == 1 || is_noisy && counted > 1,
            "{table:?}: {}",
            case.description
        );
    }
}

/// `enum xdp_action`, include/uapi/linux/bpf.h.
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
