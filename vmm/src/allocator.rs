//! Settings of the C library's allocator.

#![expect(unsafe_code, reason = "mallopt is a C function")]

/// Gives all threads one arena.
///
/// Threads allocate next to nothing once the guest runs, so an arena each would only cost memory. It also keeps the allocator
/// from counting the host's processors when the ninth arena is made: it reads a file for that, which the jail forbids.
pub fn use_one_arena() {
    // SAFETY: changes a limit of the allocator; no other thread runs yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
