//! See [`tokenway::fuzzing::seams`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::seams(data));
