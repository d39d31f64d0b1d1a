//! See [`tokenway::fuzzing::first_bytes`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::first_bytes(data));
