// SPDX-License-Identifier: GPL-2.0

//! What fails on purpose, in builds for tests only (`make ... PMSKB_INJECT=1`).
//!
//! Distribution kernels have no fault injection. In such a build the module's calls that allocate,
//! copy from or to user memory, or read the media go through `failing.c`, and what is none of the
//! kernel's, frames and heads, asks here. With the parameter `inject=N` every Nth fails; after a
//! write of N to `inject_nth` the Nth that the writer's thread does fails, once.

/// Whether there is to be no frame or head this time. Any context.
#[cfg(pmskb_inject)]
pub(crate) fn no_frame() -> bool {
    // SAFETY: No requirements.
    unsafe {
        crate::bindings::pmskb_inject_fails(crate::bindings::pmskb_inject_kind_PMSKB_INJECT_FRAMES)
    }
}

/// Never: nothing of this is in a build that is used.
#[cfg(not(pmskb_inject))]
#[inline(always)]
pub(crate) const fn no_frame() -> bool {
    false
}
