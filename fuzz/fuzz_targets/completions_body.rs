//! See [`tokenway::fuzzing::completions_body`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::completions_body(data));
