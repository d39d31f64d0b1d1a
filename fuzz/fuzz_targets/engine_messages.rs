//! See [`tokenway::fuzzing::engine_messages`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::engine_messages(data));
