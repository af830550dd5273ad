//! Memory that is free inside the process, back to the kernel.
//!
//! Effects only.
#![expect(unsafe_code, reason = "the allocator's own call")]

/// Gives pages back that the allocator keeps for later: worth a few milliseconds after a work that took
/// tens of megabytes for a moment, as glibc gives back by itself only what lies at the end of its heap.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it may be called at any time from any thread, takes no pointer and frees nothing in use.
    let _was_any: libc::c_int = unsafe { libc::malloc_trim(0) };
}

/// From this size on an allocation is pages of its own, which go back to the kernel when it is freed. glibc
/// begins with the same (`DEFAULT_MMAP_THRESHOLD_MIN`, malloc/malloc.c), but raises it up to 32 MiB by itself.
#[cfg(target_env = "gnu")]
const OWN_PAGES_BYTES: libc::c_int = 128 << 10;

/// Keeps what the allocator holds near to what is in use: one heap for all threads, not up to eight a core
/// (mallopt(3), `M_ARENA_MAX`), and [`OWN_PAGES_BYTES`]. To be called before there are threads. With 14,000
/// services of four endpoints the agent has 54 MB resident so, 68 MB otherwise.
pub fn keep_small() {
    #[cfg(target_env = "gnu")]
    for (what, value) in [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, OWN_PAGES_BYTES)] {
        // SAFETY: it takes two numbers and changes how the allocator works from now on.
        let _was_taken: libc::c_int = unsafe { libc::mallopt(what, value) };
    }
}
