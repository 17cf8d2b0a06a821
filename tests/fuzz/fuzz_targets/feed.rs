//! A list of ranges parses whole or not at all, in every format, and nothing panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pullgate::fuzzing;

fuzz_target!(|bytes: &[u8]| fuzzing::feed(bytes));
