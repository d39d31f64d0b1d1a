//! See [`tokenway::fuzzing::worker_step`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::worker_step(data));
