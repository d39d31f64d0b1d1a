//! See [`tokenway::fuzzing::text`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::text(data));
