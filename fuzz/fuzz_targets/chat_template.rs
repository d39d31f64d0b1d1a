//! See [`tokenway::fuzzing::chat_template`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::chat_template(data));
