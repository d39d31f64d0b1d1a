//! The C library's allocator, which Rust and llama.cpp share: its settings, its use of memory, and the return of free
//! memory. This module must not know who allocates what.

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

/// Returns the number of allocated bytes, including large allocations. Always 0 with C libraries other than glibc.
#[must_use]
pub(crate) fn used_bytes() -> usize {
    #[cfg(target_env = "gnu")]
    {
        #[expect(unsafe_code, reason = "no safe function asks the allocator")]
        // SAFETY: `mallinfo2` takes no arguments, and locks each heap while it reads the heap's counters.
        let info = unsafe { libc::mallinfo2() };
        info.uordblks.saturating_add(info.hblkhd)
    }
    #[cfg(not(target_env = "gnu"))]
    0
}

/// Returns free memory of all heaps to the operating system. Has no effect with C libraries other than glibc.
///
/// Threads that allocate from a heap wait while that heap is trimmed.
pub(crate) fn return_free_memory() {
    #[cfg(target_env = "gnu")]
    {
        #[expect(unsafe_code, reason = "no safe function trims the heaps")]
        // SAFETY: `malloc_trim` accepts every number, and locks each heap while it changes that heap.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}
