// SPDX-License-Identifier: GPL-2.0

//! A host's frame allocator, and memory to keep a store in.

use crate::{Error, Frame, FrameTable, Frames, Geometry, IndexEntry, Need, Pmem, Result};
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

/// A frame allocator for one thread. All frames are idle as soon as nobody holds
/// them.
pub struct HostFrames(pub RefCell<FrameTable<Vec<u64>>>);

impl HostFrames {
    /// All data frames of a region, free.
    pub fn new(geo: &Geometry) -> Result<Self> {
        let count = geo.data_frames();
        let buf = vec![0; FrameTable::<Vec<u64>>::words(count)];
        let table = FrameTable::new(buf, geo.first_frame(), count)?;
        Ok(HostFrames(RefCell::new(table)))
    }
}

impl Frames for HostFrames {
    fn alloc(&self, near: Option<Frame>, need: Need) -> Option<Frame> {
        self.0.borrow_mut().alloc(near, need, |_| true)
    }
    fn hold(&self, frame: Frame, bytes: u32) -> Result<()> {
        self.0.borrow_mut().hold(frame, bytes)
    }
    fn unhold(&self, frame: Frame, bytes: u32) -> Result<u32> {
        self.0.borrow_mut().unhold(frame, bytes)
    }
    fn claim(&self, frame: Frame, bytes: u32) -> Result<()> {
        self.0.borrow_mut().claim(frame, bytes)
    }
    fn used(&self, frame: Frame) -> u32 {
        self.0.borrow().used(frame)
    }
    fn holds(&self, frame: Frame) -> u32 {
        self.0.borrow().state(frame).map_or(0, |(_, holds)| holds)
    }
}

/// Whether this run is to do without something: `PMSKB_BREAK=NAME`, in a build for that.
#[cfg(pmskb_break = "by_name")]
pub fn broken(name: &str) -> bool {
    static NAME: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let wanted = NAME.get_or_init(|| std::env::var("PMSKB_BREAK").ok());
    wanted.as_deref() == Some(name)
}

/// Allocates the list that [`Store::recover`](crate::Store::recover) asks for.
pub fn list(count: usize) -> Option<Vec<IndexEntry>> {
    Some(vec![IndexEntry::default(); count])
}

/// Ordinary memory that several threads may read while one writes.
pub struct Memory(Vec<AtomicU64>);

impl Memory {
    /// `len` zero bytes, rounded down to a multiple of 8.
    pub fn new(len: u64) -> Self {
        let mut words = Vec::new();
        words.resize_with((len / 8) as usize, || AtomicU64::new(0));
        Memory(words)
    }

    /// A copy of an image.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let words = bytes.chunks_exact(8);
        Memory(
            words
                .map(|word| AtomicU64::new(u64::from_le_bytes(word.try_into().unwrap_or_default())))
                .collect(),
        )
    }

    fn word(&self, off: u64) -> Result<&AtomicU64> {
        let index = usize::try_from(off / 8).map_err(|_| Error::Invalid)?;
        self.0.get(index).ok_or(Error::Invalid)
    }

    fn check(&self, off: u64, len: usize) -> Result<()> {
        match off.checked_add(len as u64) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(Error::Invalid),
        }
    }
}

impl Pmem for Memory {
    fn len(&self) -> u64 {
        self.0.len() as u64 * 8
    }

    fn read(&self, off: u64, to: &mut [u8]) -> Result<()> {
        self.check(off, to.len())?;
        let mut at = off;
        let mut rest = to;
        while !rest.is_empty() {
            let skip = (at % 8) as usize;
            let now = rest.len().min(8 - skip);
            let word = self.word(at)?.load(Ordering::Relaxed).to_le_bytes();
            let (part, tail) = rest.split_at_mut(now);
            part.copy_from_slice(&word[skip..skip + now]);
            rest = tail;
            at += now as u64;
        }
        Ok(())
    }

    fn load(&self, off: u64) -> Result<u64> {
        if off % 8 != 0 {
            return Err(Error::Invalid);
        }
        Ok(self.word(off)?.load(Ordering::Acquire))
    }

    fn write(&self, off: u64, from: &[u8]) -> Result<()> {
        self.check(off, from.len())?;
        let mut at = off;
        let mut rest = from;
        while !rest.is_empty() {
            let skip = (at % 8) as usize;
            let now = rest.len().min(8 - skip);
            let word = self.word(at)?;
            let mut bytes = word.load(Ordering::Relaxed).to_le_bytes();
            let (part, tail) = rest.split_at(now);
            bytes[skip..skip + now].copy_from_slice(part);
            word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
            rest = tail;
            at += now as u64;
        }
        Ok(())
    }

    fn store(&self, off: u64, value: u64) -> Result<()> {
        if off % 8 != 0 {
            return Err(Error::Invalid);
        }
        self.word(off)?.store(value, Ordering::Release);
        Ok(())
    }

    fn flush(&self, off: u64, len: u64) -> Result<()> {
        self.check(off, usize::try_from(len).map_err(|_| Error::Invalid)?)
    }

    fn fence(&self) {
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        crc32c::crc32c_append(crc, data)
    }
}
