//! A PROXY header that is read is written and read again the same, and nothing panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pullgate::fuzzing;

fuzz_target!(|bytes: &[u8]| fuzzing::proxy_header(bytes));
