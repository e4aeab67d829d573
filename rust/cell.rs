// SPDX-License-Identifier: GPL-2.0

//! Statics that C code wants pointers to.

use core::{cell::UnsafeCell, mem::MaybeUninit};

/// A static that C code wants a pointer to.
pub(crate) struct Static<T>(UnsafeCell<MaybeUninit<T>>);

// SAFETY: Written at module init only, before C learns the address; then C's own rules hold.
unsafe impl<T> Sync for Static<T> {}

impl<T> Static<T> {
    /// Without a value.
    pub(crate) const fn new() -> Self {
        Self(UnsafeCell::new(MaybeUninit::uninit()))
    }

    /// Where it is.
    pub(crate) const fn get(&self) -> *mut T {
        self.0.get().cast()
    }
}
