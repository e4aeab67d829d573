// SPDX-License-Identifier: GPL-2.0

//! A store's mappings in user space.
//!
//! All of them hang on one `address_space`, whichever node of the store was opened, so that one
//! call reaches all. It is that of an anonymous inode, kept by a file of our own.

use crate::{bindings as ext, region::PAGE_SHIFT};
use core::ptr::{self, NonNull};
use kernel::{bindings, c_str, error::from_err_ptr, ffi::c_ulong, prelude::*};

/// Operations of the file that keeps the inode: none, but it keeps the module.
static FOPS: Operations<bindings::file_operations> = Operations(bindings::file_operations {
    owner: crate::this_module(),
    ..pin_init::zeroed()
});

/// A table of operations, shared with C.
pub(crate) struct Operations<T>(pub(crate) T);

// SAFETY: Never written to.
unsafe impl<T> Sync for Operations<T> {}

/// The `address_space` of all mappings of a store.
pub(crate) struct Mappings(NonNull<bindings::file>);

// SAFETY: A reference to a file may be used and put by any thread.
unsafe impl Send for Mappings {}
// SAFETY: As above.
unsafe impl Sync for Mappings {}

impl Mappings {
    /// An `address_space` without mappings. Process context.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: Name and operations are static; a file without private data.
        let file = from_err_ptr(unsafe {
            ext::anon_inode_create_getfile(
                c_str!("[pmskb]").as_char_ptr(),
                &FOPS.0,
                ptr::null_mut(),
                bindings::O_RDWR as i32,
                ptr::null(),
            )
        })?;
        Ok(Self(NonNull::new(file).ok_or(ENOMEM)?))
    }

    /// Makes mappings of `file` hang here.
    ///
    /// # Safety
    ///
    /// `file` is being opened, and will not outlive `self`.
    pub(crate) unsafe fn adopt(&self, file: *mut bindings::file) {
        // SAFETY: Our file is open; nobody else has seen `file` yet.
        unsafe { (*file).f_mapping = (*self.0.as_ptr()).f_mapping };
    }

    /// Removes the page table entries of `count` pages from page `first` of the store, in all
    /// mappings. What is touched next faults. May sleep.
    pub(crate) fn zap(&self, first: u64, count: u64) {
        let (first, count) = (first << PAGE_SHIFT, count << PAGE_SHIFT);
        // SAFETY: Our file is open, so its mapping exists.
        unsafe {
            let mapping = (*self.0.as_ptr()).f_mapping;
            bindings::unmap_mapping_range(mapping, first as i64, count as i64, 1);
        }
    }

    /// As [`Self::zap`], of all pages.
    pub(crate) fn zap_all(&self) {
        // A length of 0 is to the end.
        self.zap(0, 0);
    }
}

impl Drop for Mappings {
    fn drop(&mut self) {
        // SAFETY: Our reference, put once.
        unsafe { bindings::fput(self.0.as_ptr()) };
    }
}

/// Makes a new mapping one of bare page frames, which can never become writable or executable.
/// `EPERM` if it is writable now.
///
/// # Safety
///
/// `vma` is being set up by `mmap()`.
pub(crate) unsafe fn make_readonly(vma: *mut bindings::vm_area_struct) -> Result {
    // SAFETY: Nobody else sees `vma` yet.
    if unsafe { ext::pmskb_vma_make_readonly(vma) } {
        Ok(())
    } else {
        Err(EPERM)
    }
}

/// Maps one page frame where a fault happened.
///
/// # Safety
///
/// `vmf` is a fault of a mapping that [`make_readonly`] made; the page stays there until
/// [`Mappings::zap_all`].
pub(crate) unsafe fn insert(vmf: *mut bindings::vm_fault, pfn: usize) -> bindings::vm_fault_t {
    // SAFETY: The caller's.
    unsafe {
        let at = (*vmf).__bindgen_anon_1;
        bindings::vmf_insert_pfn(at.vma, at.address, pfn as c_ulong)
    }
}

/// As [`insert`], 2 MiB at once: `pfn` and the address are multiples of that.
///
/// # Safety
///
/// As [`insert`].
pub(crate) unsafe fn insert_huge(vmf: *mut bindings::vm_fault, pfn: usize) -> bindings::vm_fault_t {
    // SAFETY: The caller's.
    unsafe { ext::vmf_insert_pfn_pmd(vmf, pfn as c_ulong, false) }
}
