//! See [`tokenway::fuzzing::chat_body`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::chat_body(data));
