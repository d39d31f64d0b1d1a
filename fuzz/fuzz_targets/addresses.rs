//! See [`tokenway::fuzzing::addresses`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::addresses(data));
