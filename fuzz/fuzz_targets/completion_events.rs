//! See [`tokenway::fuzzing::completion_events`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::completion_events(data));
