//! See [`tokenway::fuzzing::accept`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::accept(data));
