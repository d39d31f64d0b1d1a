//! See [`tokenway::fuzzing::request_headers`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::request_headers(data));
