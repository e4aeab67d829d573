// SPDX-License-Identifier: GPL-2.0-only

//! A record, open as a file.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
};

use crate::sys;

/// A record's object: a file with its bytes, which stay what they are for as long
/// as it is open, whether or not the record is replaced or deleted.
#[derive(Debug)]
pub struct Object {
    file: File,
    raw: sys::pmskb_open,
}

impl Object {
    /// # Safety
    ///
    /// `raw` was filled by the ioctl, once.
    pub(crate) unsafe fn new(raw: sys::pmskb_open) -> Self {
        // SAFETY: the descriptor was made for the caller, who knows no other
        // owner of it.
        let file = unsafe { OwnedFd::from_raw_fd(raw.fd) }.into();
        Self { file, raw }
    }

    /// The record's sequence number.
    pub fn seq(&self) -> u64 {
        self.raw.seq
    }

    /// Bytes of the object.
    pub fn len(&self) -> u64 {
        self.raw.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.raw.len == 0
    }

    /// Nanoseconds since the epoch of the clock that [`time_source`](Self::time_source)
    /// names.
    pub fn time(&self) -> u64 {
        self.raw.time
    }

    /// `PMSKB_TIME_*`.
    pub fn time_source(&self) -> u8 {
        self.raw.time_source
    }

    /// The object's Internet checksum as a big-endian number.
    pub fn csum(&self) -> u16 {
        u16::from_be(self.raw.csum)
    }

    /// `PMSKB_CSUM_*`.
    pub fn csum_kind(&self) -> u8 {
        self.raw.csum_kind
    }

    /// The file, to read from or to send.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The file alone.
    pub fn into_file(self) -> File {
        self.file
    }
}

impl AsFd for Object {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
