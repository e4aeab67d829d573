// SPDX-License-Identifier: GPL-2.0

//! Memory that is put back as it was in no time, and notices who goes round in
//! circles.

use pmskb_core::{Error, Pmem, Result, FRAME_SIZE};
use std::cell::{Cell, RefCell};

const FRAME: usize = FRAME_SIZE as usize;

/// A region that starts as a copy of an image.
pub struct Scratch {
    base: Vec<u8>,
    now: RefCell<Vec<u8>>,
    /// Frames that differ from `base`, perhaps.
    dirty: RefCell<Vec<usize>>,
    is_dirty: RefCell<Vec<bool>>,
    /// Accesses that are left.
    budget: Cell<u64>,
}

impl Scratch {
    pub fn new(base: Vec<u8>) -> Self {
        let frames = base.len() / FRAME;
        Scratch {
            now: RefCell::new(base.clone()),
            base,
            dirty: RefCell::default(),
            is_dirty: RefCell::new(vec![false; frames]),
            budget: Cell::new(u64::MAX),
        }
    }

    /// Makes it the image again.
    pub fn reset(&self) {
        let (mut now, mut is_dirty) = (self.now.borrow_mut(), self.is_dirty.borrow_mut());
        for frame in self.dirty.borrow_mut().drain(..) {
            let bytes = frame * FRAME..(frame + 1) * FRAME;
            now[bytes.clone()].copy_from_slice(&self.base[bytes]);
            is_dirty[frame] = false;
        }
    }

    /// From here on, more than so many accesses are a loop without an end.
    pub fn allow(&self, accesses: u64) {
        self.budget.set(accesses);
    }

    /// All bytes, as they are.
    pub fn image(&self) -> Vec<u8> {
        self.now.borrow().clone()
    }

    fn spend(&self, accesses: u64) {
        match self.budget.get().checked_sub(accesses) {
            Some(left) => self.budget.set(left),
            None => panic!("the core makes no end of reading and writing"),
        }
    }

    fn range(&self, off: u64, len: usize) -> Result<std::ops::Range<usize>> {
        self.spend(1 + len as u64 / 64);
        let start = usize::try_from(off).map_err(|_| Error::Invalid)?;
        match start.checked_add(len) {
            Some(end) if end <= self.base.len() => Ok(start..end),
            _ => Err(Error::Invalid),
        }
    }
}

impl Pmem for Scratch {
    fn len(&self) -> u64 {
        self.base.len() as u64
    }

    fn read(&self, off: u64, to: &mut [u8]) -> Result<()> {
        let range = self.range(off, to.len())?;
        to.copy_from_slice(&self.now.borrow()[range]);
        Ok(())
    }

    fn load(&self, off: u64) -> Result<u64> {
        if off % 8 != 0 {
            return Err(Error::Invalid);
        }
        let mut word = [0; 8];
        self.read(off, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    fn write(&self, off: u64, from: &[u8]) -> Result<()> {
        let range = self.range(off, from.len())?;
        if from.is_empty() {
            return Ok(());
        }
        let mut is_dirty = self.is_dirty.borrow_mut();
        for frame in range.start / FRAME..=(range.end - 1) / FRAME {
            if !std::mem::replace(&mut is_dirty[frame], true) {
                self.dirty.borrow_mut().push(frame);
            }
        }
        self.now.borrow_mut()[range].copy_from_slice(from);
        Ok(())
    }

    fn store(&self, off: u64, value: u64) -> Result<()> {
        if off % 8 != 0 {
            return Err(Error::Invalid);
        }
        self.write(off, &value.to_le_bytes())
    }

    fn flush(&self, off: u64, len: u64) -> Result<()> {
        let len = usize::try_from(len).map_err(|_| Error::Invalid)?;
        self.range(off, len).map(|_| ())
    }

    fn fence(&self) {
        self.spend(1);
    }

    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        crc32c::crc32c_append(crc, data)
    }
}
