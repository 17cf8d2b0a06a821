//! Whatever the bytes, `decide` does not panic, and comes to the verdict of an oracle on etherparse.
#![no_main]

use std::net::IpAddr;
use std::sync::LazyLock;

use filter_ebpf::cases::Table;
use filter_ebpf::{Class, Ranges, decide};
use libfuzzer_sys::fuzz_target;

use crate::oracle::Oracle;

#[path = "../../harness/oracle.rs"]
mod oracle;

/// What the oracle reads its ranges from.
mod feed {
    pub(crate) const IPS_V4: &str = include_str!("../../../filter-user/baseline/ips-v4");
    pub(crate) const IPS_V6: &str = include_str!("../../../filter-user/baseline/ips-v6");
}

fuzz_target!(|frame: &[u8]| {
    let verdict = decide(frame, &Table::Default, &SourceRanges).verdict;

    assert_eq!(verdict, ORACLE.judge(frame));
});

/// The oracle's own knowledge of addresses.
struct SourceRanges;

impl Ranges for SourceRanges {
    fn class(&self, source: IpAddr) -> Class {
        ORACLE.class(source)
    }
}

static ORACLE: LazyLock<Oracle> = LazyLock::new(Oracle::new);
