//! See [`tokenway::fuzzing::openai_responses`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::openai_responses(data));
