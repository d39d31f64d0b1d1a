//! See [`tokenway::fuzzing::hub_responses`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::hub_responses(data));
