//! Settings of the C library's allocator, which Rust and llama.cpp share.

/// Size from which each allocation is a memory mapping of its own, in bytes.
const MMAP_THRESHOLD: i32 = 1024 * 1024;

/// Number of free bytes at the end of a heap from which they are returned to the operating system. It is twice the
/// other threshold, the ratio that glibc keeps.
const TRIM_THRESHOLD: i32 = 2 * MMAP_THRESHOLD;

/// Makes glibc return freed allocations of at least 1 MiB to the operating system at once. Has no effect
/// with other C libraries.
///
/// By default, glibc raises this threshold up to 32 MiB, and then takes large allocations from heaps. The states of
/// stored sequences and large request bodies would leave holes there, whose memory is not returned
/// (`docs/decisions/011-allocator.md`). Call this before other threads start.
pub fn return_large_allocations() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [
        (libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD),
        (libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD),
    ] {
        #[expect(
            unsafe_code,
            reason = "no safe function sets parameters of the allocator"
        )]
        // SAFETY: `mallopt` takes two numbers, and locks the allocator while it changes its parameter.
        let is_set = unsafe { libc::mallopt(parameter, value) };
        assert_eq!(is_set, 1, "glibc accepts the parameter and the value");
    }
}
