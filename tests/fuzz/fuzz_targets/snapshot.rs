//! A snapshot that parses is written and parsed again the same, and nothing panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pullgate::fuzzing;

fuzz_target!(|bytes: &[u8]| fuzzing::snapshot(bytes));
