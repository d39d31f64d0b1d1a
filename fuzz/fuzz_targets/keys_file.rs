//! See [`tokenway::fuzzing::keys_file`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::keys_file(data));
