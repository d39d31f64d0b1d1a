//! See [`tokenway::fuzzing::tokenize_body`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::tokenize_body(data));
