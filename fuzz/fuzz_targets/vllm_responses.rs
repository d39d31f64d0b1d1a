//! See [`tokenway::fuzzing::vllm_responses`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::vllm_responses(data));
