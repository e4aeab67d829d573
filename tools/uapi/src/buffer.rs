// SPDX-License-Identifier: GPL-2.0-only

//! Frames for data that is made here.

use std::{
    fs::File,
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use memmap2::{MmapMut, MmapOptions};

use crate::{sys, Ext};

/// Frames of a store that a program fills and puts: [`Batch::put`](crate::Batch::put)
/// with [`fd`](Self::fd) and [`ext`](Self::ext). Zeros at first. What is not put
/// comes back to the store when this is dropped.
///
/// A put takes whole frames, of 4 KiB. They are gone from memory then, or with
/// `keep` can be read only: touching them otherwise raises SIGBUS.
#[derive(Debug)]
pub struct Buffer {
    file: File,
    map: MmapMut,
}

impl Buffer {
    /// # Safety
    ///
    /// `raw` was filled by the ioctl, once.
    pub(crate) unsafe fn new(raw: &sys::pmskb_alloc) -> io::Result<Self> {
        // SAFETY: the descriptor was made for the caller, who knows no other
        // owner of it.
        let file: File = unsafe { OwnedFd::from_raw_fd(raw.fd) }.into();
        let len = usize::try_from(raw.len).map_err(io::Error::other)?;
        // SAFETY: the frames are nobody else's, and cannot be truncated; while a
        // put reads them they are not mapped for writing.
        let map = unsafe { MmapOptions::new().len(len).map_mut(&file) }?;
        Ok(Self { file, map })
    }

    /// Bytes of it: what was asked for, rounded up to frames.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether it has none: never.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Its bytes, to fill.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }

    /// What a put knows it by.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Some bytes of it, for a put. A range that is not within the buffer is for
    /// the put to refuse.
    pub fn ext(&self, range: Range<u32>) -> Ext {
        Ext {
            token: 0,
            offset: range.start,
            len: range.end.saturating_sub(range.start),
        }
    }
}

impl AsFd for Buffer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
