// SPDX-License-Identifier: GPL-2.0

//! A spinlock that softirqs may take too.
//!
//! Placement runs in softirq and takes the same locks as system calls do, so those must keep
//! bottom halves off while they hold one. The kernel crate's `SpinLock` does not.

use crate::bindings as ext;
use core::marker::PhantomData;
use kernel::{
    bindings,
    ffi::c_char,
    prelude::*,
    sync::{
        lock::{Backend, Lock},
        LockClassKey,
    },
};

/// `spin_lock_bh()` and `spin_unlock_bh()`. Not for hard interrupts.
pub(crate) struct Bh;

/// Data behind a spinlock that is held with bottom halves disabled.
pub(crate) type SpinLockBh<T> = Lock<T, Bh>;

/// As `SpinLock::new`; `key` from `static_lock_class!()`.
pub(crate) fn new<T>(
    data: T,
    name: &'static CStr,
    key: Pin<&'static LockClassKey>,
) -> impl PinInit<SpinLockBh<T>> {
    Lock::new(data, name, key)
}

// SAFETY: `spin_lock_bh()` gives exclusive access between `lock` and `unlock`; `relock` is the
// default, which is `lock`.
unsafe impl Backend for Bh {
    type State = bindings::spinlock_t;
    type GuardState = ();

    unsafe fn init(ptr: *mut Self::State, name: *const c_char, key: *mut bindings::lock_class_key) {
        // SAFETY: `ptr` is valid for writes, `name` and `key` for ever, says the caller.
        unsafe { bindings::__spin_lock_init(ptr, name, key) }
    }

    unsafe fn lock(ptr: *mut Self::State) {
        // SAFETY: Initialised, says the caller.
        unsafe { ext::pmskb_spin_lock_bh(ptr) }
    }

    unsafe fn try_lock(ptr: *mut Self::State) -> Option<()> {
        // SAFETY: Initialised, says the caller.
        (unsafe { ext::pmskb_spin_trylock_bh(ptr) } != 0).then_some(())
    }

    unsafe fn unlock(ptr: *mut Self::State, (): &()) {
        // SAFETY: Held by the caller.
        unsafe { ext::pmskb_spin_unlock_bh(ptr) }
    }

    unsafe fn assert_is_held(ptr: *mut Self::State) {
        // SAFETY: Initialised, says the caller.
        unsafe { bindings::spin_assert_is_held(ptr) }
    }
}

/// While it lives, the task stays on its CPU (it may be preempted, and sleep).
///
/// A fence waits for the write-backs that its own CPU has started: flushes and the fence after
/// them must not be on two CPUs.
pub(crate) struct SameCpu(PhantomData<*const ()>);

impl SameCpu {
    /// Process context.
    pub(crate) fn new() -> Self {
        // SAFETY: In process context; undone when it is dropped, by the same task: the type is not
        // `Send`.
        unsafe { ext::pmskb_migrate_disable() };
        Self(PhantomData)
    }
}

impl Drop for SameCpu {
    fn drop(&mut self) {
        // SAFETY: Done in `new`, by this task.
        unsafe { ext::pmskb_migrate_enable() };
    }
}
