// SPDX-License-Identifier: GPL-2.0

//! A store's mappings in user space.
//!
//! All of them hang on one `address_space`, whichever node of the store was opened, so that one
//! call reaches all. It is that of an anonymous inode, kept by a file of our own. Buffers have one
//! each: their pages are others than those of the store at the same offset.

use crate::{bindings as ext, region::PAGE_SHIFT};
use core::ptr::{self, NonNull};
use kernel::{
    bindings, c_str,
    error::{from_err_ptr, to_result},
    ffi::c_ulong,
    fs::LocalFile,
    new_mutex,
    prelude::*,
    rbtree::{RBTree, RBTreeNode},
    sync::Mutex,
};

/// Operations of the file that keeps the inode: none, but it keeps the module.
static FOPS: Operations<bindings::file_operations> = Operations(bindings::file_operations {
    owner: crate::this_module(),
    ..pin_init::zeroed()
});

/// A table of operations, shared with C.
pub(crate) struct Operations<T>(pub(crate) T);

// SAFETY: Never written to.
unsafe impl<T> Sync for Operations<T> {}

/// The `address_space` of all mappings of a store, and those of its buffers.
pub(crate) struct Mappings {
    file: NonNull<bindings::file>,
    /// Addresses of files with an `address_space` of their own, which are open as long as they
    /// are in here. Never under `mmap_lock`.
    others: Pin<KBox<Mutex<RBTree<usize, ()>>>>,
}

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
        let file = NonNull::new(file).ok_or(ENOMEM)?;
        let others = new_mutex!(RBTree::new(), "pmskb_mappings");
        let others = KBox::pin_init(others, GFP_KERNEL).inspect_err(|_| {
            // SAFETY: Our reference, put once.
            unsafe { bindings::fput(file.as_ptr()) };
        })?;
        Ok(Self { file, others })
    }

    /// Makes mappings of `file` hang here.
    ///
    /// # Safety
    ///
    /// `file` is being opened, and will not outlive `self`.
    pub(crate) unsafe fn adopt(&self, file: *mut bindings::file) {
        // SAFETY: Our file is open; nobody else has seen `file` yet.
        unsafe { (*file).f_mapping = (*self.file.as_ptr()).f_mapping };
    }

    /// Makes [`Self::zap`] reach the mappings of a file that does not hang here: all of them,
    /// whatever is zapped. Process context. `ENOMEM`.
    pub(crate) fn add(&self, file: &LocalFile) -> Result {
        let node = RBTreeNode::new(file.as_ptr() as usize, (), GFP_KERNEL_ACCOUNT)?;
        self.others.lock().insert(node);
        Ok(())
    }

    /// The opposite of [`Self::add`], for the release of the file. Process context.
    pub(crate) fn remove(&self, file: *mut bindings::file) {
        self.others.lock().remove(&(file as usize));
    }

    /// Removes the page table entries of `count` pages from page `first` of the store, in all
    /// mappings. What is touched next faults. May sleep.
    pub(crate) fn zap(&self, first: u64, count: u64) {
        // SAFETY: Our file is open; the others are not closed while they are in the list.
        unsafe {
            zap(self.file.as_ptr(), first, count);
            for file in self.others.lock().keys() {
                // A length of 0 is to the end.
                zap(*file as *mut bindings::file, 0, 0);
            }
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
        unsafe { bindings::fput(self.file.as_ptr()) };
    }
}

/// Removes the page table entries of pages of a file, in all its mappings.
///
/// # Safety
///
/// `file` is open.
unsafe fn zap(file: *mut bindings::file, first: u64, count: u64) {
    let (first, count) = (first << PAGE_SHIFT, count << PAGE_SHIFT);
    // SAFETY: The file is open, so its mapping exists.
    unsafe {
        bindings::unmap_mapping_range((*file).f_mapping, first as i64, count as i64, 1);
    }
}

/// Removes the page table entries of `count` pages, at least 1, from page `first` of a file, in
/// all its mappings. On return no CPU has them. May sleep; also in a fault.
pub(crate) fn zap_file(file: &LocalFile, first: u32, count: u32) {
    // SAFETY: By the reference it is open.
    unsafe { zap(file.as_ptr(), first.into(), count.into()) };
}

/// Makes a new mapping of a file of `pages` pages one of bare page frames, shared, which can
/// never become executable. `EPERM` if it is now, `EINVAL` if it is private or goes beyond the
/// end.
///
/// # Safety
///
/// `vma` is being set up by `mmap()`.
pub(crate) unsafe fn make_shared(vma: *mut bindings::vm_area_struct, pages: u32) -> Result {
    // SAFETY: Nobody else sees `vma` yet.
    to_result(unsafe { ext::pmskb_vma_make_shared(vma, pages as c_ulong) })
}

/// Maps one page frame where a fault happened: writable if it may be and the mapping is.
///
/// # Safety
///
/// `vmf` is a fault of a mapping that [`make_shared`] made; the page stays there until it is
/// zapped.
pub(crate) unsafe fn insert_shared(
    vmf: *mut bindings::vm_fault,
    pfn: usize,
    write: bool,
) -> bindings::vm_fault_t {
    // SAFETY: The caller's.
    unsafe { ext::pmskb_insert_shared(vmf, pfn as c_ulong, write) }
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
