//! See [`tokenway::fuzzing::completion_request`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::completion_request(data));
