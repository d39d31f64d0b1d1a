//! See [`tokenway::fuzzing::worker_messages`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokenway::fuzzing::worker_messages(data));
