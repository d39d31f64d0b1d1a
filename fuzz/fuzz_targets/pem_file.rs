//! See [`tokenway::fuzzing::pem_file`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::pem_file(data));
