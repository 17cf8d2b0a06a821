//! A client does what a script says to its session, and nothing panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pullgate::fuzzing;

fuzz_target!(|script: &[u8]| fuzzing::session(script));
