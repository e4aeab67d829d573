// SPDX-License-Identifier: GPL-2.0

//! Frames and extents: names of places in a region.

use super::{Error, Result, FRAME_SIZE};

/// Longest extent as it is stored, bytes. Longer ones are split.
pub const MAX_EXTENT: u64 = 1 << 20;

/// A frame, by its number in the region: byte offset / 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frame(pub u32);

impl Frame {
    /// The frame that holds the byte at `off`, if a region can be that large.
    pub fn of(off: u64) -> Option<Frame> {
        u32::try_from(off / FRAME_SIZE).ok().map(Frame)
    }

    /// Byte offset of the frame in the region.
    pub fn off(self) -> u64 {
        u64::from(self.0) * FRAME_SIZE
    }
}

/// Bytes in a region: inside one frame, or in a run of adjacent frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Offset of the first byte in the region.
    pub off: u64,
    /// Bytes; at least 1.
    pub len: u32,
}

impl Extent {
    /// An extent of `len` bytes at `off`.
    pub fn new(off: u64, len: u32) -> Self {
        Extent { off, len }
    }

    /// Offset of the byte after the last.
    pub fn end(self) -> u64 {
        self.off.saturating_add(u64::from(self.len))
    }

    /// The form on the media: 44 bits of offset, 20 bits of length - 1.
    pub fn pack(self) -> Result<u64> {
        if self.len == 0 || u64::from(self.len) > MAX_EXTENT || self.off >> 44 != 0 {
            return Err(Error::Invalid);
        }
        Ok((self.off << 20) | u64::from(self.len - 1))
    }

    /// The opposite of [`pack`](Self::pack); every number is some extent.
    pub fn unpack(word: u64) -> Self {
        Extent {
            off: word >> 20,
            len: (word & (MAX_EXTENT - 1)) as u32 + 1,
        }
    }

    /// The frames that it touches, in order.
    pub fn frames(self) -> impl Iterator<Item = Frame> {
        let first = self.off / FRAME_SIZE;
        let end = if self.len == 0 {
            first
        } else {
            self.end().saturating_sub(1) / FRAME_SIZE + 1
        };
        (first..end).map_while(|number| u32::try_from(number).ok().map(Frame))
    }

    /// As [`frames`](Self::frames), with how many of its bytes are in each.
    pub fn parts(self) -> impl Iterator<Item = (Frame, u32)> {
        self.frames().map(move |frame| {
            let from = self.off.max(frame.off());
            let to = self.end().min(frame.off().saturating_add(FRAME_SIZE));
            (frame, to.saturating_sub(from) as u32)
        })
    }
}

/// Extents as they are stored: adjacent ones merged, none above [`MAX_EXTENT`].
///
/// ```ignore
/// let two = [Extent::new(4096, 100), Extent::new(4196, 28)];
/// assert!(Packer::new(&two).eq([Extent::new(4096, 128)]));
/// ```
#[derive(Clone)]
pub struct Packer<'a> {
    rest: core::slice::Iter<'a, Extent>,
    /// What was merged so far and is not yet given out.
    off: u64,
    len: u64,
}

impl<'a> Packer<'a> {
    /// Packs `extents` in their order.
    pub fn new(extents: &'a [Extent]) -> Self {
        Packer {
            rest: extents.iter(),
            off: 0,
            len: 0,
        }
    }
}

impl Iterator for Packer<'_> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        while self.len < MAX_EXTENT {
            let Some(next) = self.rest.as_slice().first() else {
                break;
            };
            if self.len != 0 && self.off.checked_add(self.len) != Some(next.off) {
                break;
            }
            if self.len == 0 {
                self.off = next.off;
            }
            self.len += u64::from(next.len);
            self.rest.next();
        }
        if self.len == 0 {
            return None;
        }
        let len = self.len.min(MAX_EXTENT);
        let out = Extent::new(self.off, len as u32);
        self.off = self.off.saturating_add(len);
        self.len -= len;
        Some(out)
    }
}
