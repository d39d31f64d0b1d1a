//! See [`tokenway::fuzzing::model_file`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::model_file(data));
