// SPDX-License-Identifier: GPL-2.0-only

//! The read-only mapping of a store.

use std::{
    fs::File,
    ptr::NonNull,
    sync::atomic::{AtomicI32, Ordering},
};

use memmap2::{MmapOptions, MmapRaw};

use crate::socket::Desc;

/// From now on SIGBUS ends the process with `status` and a line that says why, for
/// programs with nothing to lose. It comes from mappings of a store whose index, records
/// or live page have a media error, and of one that was taken away.
pub fn explain_bus_errors(status: i32) {
    STATUS.store(status, Ordering::Relaxed);
    let handler: extern "C" fn(libc::c_int) = explain;
    // SAFETY: a struct of integers and pointers, which may be 0.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    // SAFETY: `action` is one, and its handler does only what a handler may.
    unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) };
}

static STATUS: AtomicI32 = AtomicI32::new(2);

extern "C" fn explain(_: libc::c_int) {
    const WHY: &str = "the store's index or a record cannot be read: a media error, or its \
        device was taken away\n  see the kernel's log; detach the store and attach it again: \
        the index is made anew\n";
    // SAFETY: both may be called by a handler; the bytes are there.
    unsafe {
        libc::write(2, WHY.as_ptr().cast(), WHY.len());
        libc::_exit(STATUS.load(Ordering::Relaxed));
    }
}

/// A store's mapping. Others write to the same memory: whoever reads records
/// does it through the core's reader, which checks what it read.
///
/// A store that is taken away (its device unbound) takes the mapping's pages with
/// it: reading them then raises SIGBUS.
#[derive(Debug)]
pub struct Mapping(MmapRaw);

impl Mapping {
    pub(crate) fn new(file: &File, len: u64) -> std::io::Result<Self> {
        let len = usize::try_from(len).map_err(std::io::Error::other)?;
        MmapOptions::new()
            .len(len)
            .map_raw_read_only(file)
            .map(Self)
    }

    /// Its first byte.
    pub fn base(&self) -> NonNull<u8> {
        NonNull::new(self.0.as_mut_ptr()).expect("a mapping is not at address 0")
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes that a packet descriptor names. `None` if they are not within
    /// the mapping (which is of another store, then).
    ///
    /// The caller must still hold the token: bytes that are held do not change.
    pub fn held(&self, desc: &Desc) -> Option<&[u8]> {
        self.range(desc.offset(), desc.len().into())
    }

    /// Bytes of packets whose tokens the caller holds, by their place.
    pub fn range(&self, offset: u64, len: u64) -> Option<&[u8]> {
        let end = offset.checked_add(len)?;
        if end > self.len() as u64 {
            return None;
        }
        // SAFETY: within the mapping, which lives as long as the result. Bytes of
        // frames that a token holds are written by nobody: the module places
        // other packets elsewhere. Who has let go of the token breaks a rule that
        // is his to keep, and reads bytes of another packet, never beyond the
        // mapping.
        Some(unsafe {
            std::slice::from_raw_parts(self.base().as_ptr().add(offset as usize), len as usize)
        })
    }
}
