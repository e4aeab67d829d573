// SPDX-License-Identifier: GPL-2.0

//! Allocations that fail on purpose, in builds for tests only (`make ... PMSKB_INJECT=1`).
//!
//! Distribution kernels have no fault injection. What the module allocates for sockets and packets
//! asks here first; with the parameter `inject=N`, every Nth asks in vain.

/// Whether this allocation is to fail. Any context.
#[cfg(pmskb_inject)]
pub(crate) fn fails() -> bool {
    // SAFETY: No requirements.
    unsafe { crate::bindings::pmskb_inject_fails() }
}

/// Never: nothing of this is in a build that is used.
#[cfg(not(pmskb_inject))]
#[inline(always)]
pub(crate) const fn fails() -> bool {
    false
}
