//! See [`tokenway::fuzzing::host`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::host(data));
