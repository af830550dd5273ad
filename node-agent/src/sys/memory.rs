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
