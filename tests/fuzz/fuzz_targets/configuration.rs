//! A configuration is refused in one line, and nothing panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pullgate::fuzzing;

fuzz_target!(|bytes: &[u8]| fuzzing::configuration(bytes));
