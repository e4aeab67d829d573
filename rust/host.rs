// SPDX-License-Identifier: GPL-2.0

//! Calls of the kernel that have no requirements but their context.

use crate::bindings as ext;
use kernel::bindings;

/// Nanoseconds of `CLOCK_REALTIME`. Any context.
#[inline]
pub(crate) fn now() -> u64 {
    // SAFETY: No requirements.
    unsafe { ext::pmskb_now() }
}

/// Sleeps. Process context.
pub(crate) fn sleep_ms(ms: u32) {
    // SAFETY: Called where it may sleep.
    unsafe { bindings::msleep(ms) };
}

/// Lets others run, in a loop that may be long. Process context.
pub(crate) fn resched() {
    // SAFETY: Called where it may sleep.
    unsafe { ext::pmskb_resched() };
}

/// Ticks of the kernel's clock. Any context.
pub(crate) fn jiffies() -> usize {
    // SAFETY: No requirements.
    unsafe { ext::pmskb_jiffies() as usize }
}

/// So many milliseconds in ticks, at least. Any context.
pub(crate) fn ticks(ms: u32) -> usize {
    // SAFETY: No requirements.
    unsafe { ext::pmskb_ms(ms) as usize }
}

/// Whether the task has a signal to handle. Process context.
pub(crate) fn signal_pending() -> bool {
    // SAFETY: No requirements.
    unsafe { ext::pmskb_signal_pending() }
}

/// Fills `to` with random bytes. Any context; early at boot they may not be random yet.
pub(crate) fn random(to: &mut [u8]) {
    // SAFETY: `to` is valid for writes of its length.
    unsafe { bindings::get_random_bytes(to.as_mut_ptr().cast(), to.len()) };
}

/// Lets others run; whether the task is to be killed. Process context.
pub(crate) fn killed() -> bool {
    // SAFETY: In process context, says the caller.
    unsafe { ext::pmskb_killed() }
}

/// Whether the core is to do without something now: the parameter `broken` names it. Only in
/// builds for tests (`make ... PMSKB_BREAK=1`). Any context.
#[cfg(pmskb_break = "by_name")]
pub(crate) fn broken(name: &str) -> bool {
    // SAFETY: `name` is valid for reads of its length.
    unsafe { ext::pmskb_is_broken(name.as_ptr(), name.len()) }
}
