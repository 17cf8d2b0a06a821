//! Of a PEM file nothing is missed that another reader finds, and nothing panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pullgate::fuzzing;

fuzz_target!(|bytes: &[u8]| fuzzing::pem(bytes));
