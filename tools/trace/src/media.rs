// SPDX-License-Identifier: GPL-2.0-only
//! A crash's image: recovery reads and changes it, and then it is put back as it was.
//!
//! It also tells what recovery saw, as a hash of the lines that it read before it wrote them, and
//! cuts recovery itself short. Most lines that an image may have lost nobody ever looks at: they
//! can be left open until somebody does.

use pmskb_core::{Error, Pmem, Result};
use pmskb_tcg::model::{LINE, Line};
use std::cell::RefCell;

/// What a line is that was left open, by its number; nothing if it is as it was settled.
pub type Open = Box<dyn Fn(usize) -> Option<Line>>;

/// A region, in memory.
pub struct Media(RefCell<Inner>);

struct Inner {
    bytes: Vec<u8>,
    /// Lines that were not set are left open.
    open: Option<Open>,
    /// Those that are not, or not any more.
    decided: Bits,
    decisions: Vec<u32>,
    /// What lines were before they were changed, in the order of that.
    undo: Vec<(u32, Line)>,
    /// Of these, entries that are no change of recovery's.
    decreed: Vec<u32>,
    /// Lines that are in `undo` since the last fence.
    saved: Bits,
    /// How long `undo` was at the last fence.
    fenced: usize,
    /// Lines that recovery has written to.
    written: Bits,
    /// Lines that recovery read before that, and which.
    read: Bits,
    reads: Vec<u32>,
    seen: u64,
    watching: bool,
    stores: u64,
    fences: u64,
    /// From this store on nothing is done any more.
    stop: u64,
    /// Nor from this fence on.
    stop_fence: u64,
}

struct Bits(Vec<u64>);

impl Bits {
    fn new(len: usize) -> Self {
        Bits(vec![0; len.div_ceil(64)])
    }
    fn has(&self, bit: usize) -> bool {
        (self.0[bit / 64] >> (bit % 64)) & 1 == 1
    }
    /// Sets it; whether it was not.
    fn add(&mut self, bit: usize) -> bool {
        let before = self.0[bit / 64];
        self.0[bit / 64] |= 1 << (bit % 64);
        before != self.0[bit / 64]
    }
    fn remove(&mut self, bit: usize) {
        self.0[bit / 64] &= !(1 << (bit % 64));
    }
}

/// A hash of what a line holds. Those of all lines of an image, added up, are the image's.
pub fn hash_of(line: usize, bytes: &Line) -> u64 {
    let mut hash = (line as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for word in bytes.chunks_exact(8) {
        let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
        hash = (hash ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash ^= hash >> 32;
    }
    hash.wrapping_mul(0xc4ce_b9fe_1a85_ec53)
}

impl Media {
    /// So many zeros.
    pub fn new(len: usize) -> Self {
        let lines = len / LINE;
        Media(RefCell::new(Inner {
            bytes: vec![0; lines * LINE],
            open: None,
            decided: Bits::new(lines),
            decisions: Vec::new(),
            undo: Vec::new(),
            decreed: Vec::new(),
            saved: Bits::new(lines),
            fenced: 0,
            written: Bits::new(lines),
            read: Bits::new(lines),
            reads: Vec::new(),
            seen: 0,
            watching: false,
            stores: 0,
            fences: 0,
            stop: u64::MAX,
            stop_fence: u64::MAX,
        }))
    }

    /// Sets a line for good: what images begin with.
    pub fn settle(&self, line: usize, bytes: &Line) {
        let mut inner = self.0.borrow_mut();
        debug_assert!(inner.undo.is_empty());
        inner.bytes[line * LINE..][..LINE].copy_from_slice(bytes);
    }

    /// Sets a line of this image.
    pub fn set(&self, line: usize, bytes: &Line) {
        let mut inner = self.0.borrow_mut();
        inner.decide_as(line, Some(*bytes));
    }

    /// Leaves lines of this image open that are not set.
    pub fn leave_open(&self, open: Open) {
        self.0.borrow_mut().open = Some(open);
    }

    /// A line of this image stays as it was settled.
    pub fn keep(&self, line: usize) {
        self.0.borrow_mut().decide_as(line, None);
    }

    /// Recovery begins: what it reads is watched.
    pub fn watch(&self) {
        let mut inner = self.0.borrow_mut();
        inner.forget_saved();
        inner.watching = true;
        inner.stores = 0;
        inner.fences = 0;
        inner.fenced = inner.undo.len();
    }

    /// What was read since [`watch`](Self::watch), and not written before: a hash.
    pub fn seen(&self) -> u64 {
        self.0.borrow().seen
    }

    /// The lines of that.
    pub fn reads(&self) -> Vec<usize> {
        let inner = self.0.borrow();
        inner.reads.iter().map(|line| *line as usize).collect()
    }

    /// Nobody cares any more for what is read.
    pub fn look_away(&self) {
        self.0.borrow_mut().watching = false;
    }

    /// Stores and fences since [`watch`](Self::watch).
    pub fn counts(&self) -> (u64, u64) {
        let inner = self.0.borrow();
        (inner.stores, inner.fences)
    }

    /// After so many stores more, nothing is done any more.
    pub fn stop_after(&self, stores: u64) {
        let mut inner = self.0.borrow_mut();
        inner.stop = inner.stores.saturating_add(stores);
    }

    /// The same, and the fence after so many more is the first thing that is not done.
    pub fn stop_after_fences(&self, fences: u64) {
        let mut inner = self.0.borrow_mut();
        inner.stop_fence = inner.fences.saturating_add(fences);
    }

    /// The power is gone. Of the lines that were stored to since the last fence, those are lost
    /// for which `lost` says so. It is there again.
    pub fn crash(&self, mut lost: impl FnMut() -> bool) {
        let mut inner = self.0.borrow_mut();
        for at in (inner.fenced..inner.undo.len()).rev() {
            if inner.decreed.binary_search(&(at as u32)).is_ok() {
                continue;
            }
            if lost() {
                let (line, before) = inner.undo[at];
                // So that what was before it is put back at the end, too.
                inner.bytes[line as usize * LINE..][..LINE].copy_from_slice(&before);
            }
        }
        (inner.stop, inner.stop_fence) = (u64::MAX, u64::MAX);
        inner.forget_saved();
        inner.fenced = inner.undo.len();
    }

    /// Puts all back that was not settled.
    pub fn reset(&self) {
        let mut inner = self.0.borrow_mut();
        inner.forget_saved();
        while let Some((line, before)) = inner.undo.pop() {
            let line = line as usize;
            inner.bytes[line * LINE..][..LINE].copy_from_slice(&before);
            inner.written.remove(line);
        }
        while let Some(line) = inner.reads.pop() {
            inner.read.remove(line as usize);
        }
        while let Some(line) = inner.decisions.pop() {
            inner.decided.remove(line as usize);
        }
        inner.open = None;
        inner.decreed.clear();
        inner.fenced = 0;
        inner.seen = 0;
        inner.watching = false;
        (inner.stop, inner.stop_fence) = (u64::MAX, u64::MAX);
    }

    /// What a line holds.
    pub fn line(&self, line: usize) -> Line {
        let mut inner = self.0.borrow_mut();
        inner.decide(line * LINE, LINE);
        let mut out = [0; LINE];
        out.copy_from_slice(&inner.bytes[line * LINE..][..LINE]);
        out
    }

    /// All bytes; nothing is open any more.
    pub fn bytes(&self) -> Vec<u8> {
        let mut inner = self.0.borrow_mut();
        let len = inner.bytes.len();
        inner.decide(0, len);
        inner.bytes.clone()
    }
}

impl Inner {
    fn decide_as(&mut self, line: usize, bytes: Option<Line>) {
        if self.decided.add(line) {
            self.decisions.push(line as u32);
        }
        if let Some(bytes) = bytes {
            self.decreed.push(self.undo.len() as u32);
            self.save(line);
            self.bytes[line * LINE..][..LINE].copy_from_slice(&bytes);
        }
    }

    /// Somebody looks at these bytes, or changes them.
    fn decide(&mut self, start: usize, len: usize) {
        if self.open.is_none() || len == 0 {
            return;
        }
        for line in start / LINE..=(start + len - 1) / LINE {
            if !self.decided.has(line) {
                let bytes = self.open.as_ref().and_then(|open| open(line));
                // What it was before is not what a crash of recovery may bring back.
                let saved = self.saved.has(line);
                self.decide_as(line, bytes);
                if bytes.is_some() && !saved {
                    self.saved.remove(line);
                }
            }
        }
    }

    fn save(&mut self, line: usize) {
        if self.saved.add(line) {
            let mut before = [0; LINE];
            before.copy_from_slice(&self.bytes[line * LINE..][..LINE]);
            self.undo.push((line as u32, before));
        }
    }

    fn forget_saved(&mut self) {
        for (line, _) in &self.undo[self.fenced..] {
            self.saved.remove(*line as usize);
        }
    }

    fn range(&self, off: u64, len: usize) -> Result<std::ops::Range<usize>> {
        let start = usize::try_from(off).map_err(|_| Error::Invalid)?;
        match start.checked_add(len) {
            Some(end) if end <= self.bytes.len() => Ok(start..end),
            _ => Err(Error::Invalid),
        }
    }

    fn see(&mut self, start: usize, len: usize) {
        if !self.watching || len == 0 {
            return;
        }
        for line in start / LINE..=(start + len - 1) / LINE {
            if !self.written.has(line) && self.read.add(line) {
                self.reads.push(line as u32);
                let bytes = self.bytes[line * LINE..][..LINE]
                    .try_into()
                    .expect("a line");
                self.seen = self.seen.wrapping_add(hash_of(line, bytes));
            }
        }
    }

    fn write(&mut self, off: u64, from: &[u8]) -> Result<()> {
        let range = self.range(off, from.len())?;
        if from.is_empty() {
            return Ok(());
        }
        if self.stores >= self.stop {
            return Err(Error::Io);
        }
        self.stores += 1;
        self.decide(range.start, from.len());
        for line in range.start / LINE..=(range.end - 1) / LINE {
            self.save(line);
            self.written.add(line);
        }
        self.bytes[range].copy_from_slice(from);
        Ok(())
    }
}

impl Pmem for Media {
    fn len(&self) -> u64 {
        self.0.borrow().bytes.len() as u64
    }

    fn read(&self, off: u64, to: &mut [u8]) -> Result<()> {
        let mut inner = self.0.borrow_mut();
        let range = inner.range(off, to.len())?;
        inner.decide(range.start, to.len());
        inner.see(range.start, to.len());
        to.copy_from_slice(&inner.bytes[range]);
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
        self.0.borrow_mut().write(off, from)
    }

    fn store(&self, off: u64, value: u64) -> Result<()> {
        if off % 8 != 0 {
            return Err(Error::Invalid);
        }
        self.write(off, &value.to_le_bytes())
    }

    fn flush(&self, off: u64, len: u64) -> Result<()> {
        let len = usize::try_from(len).map_err(|_| Error::Invalid)?;
        self.0.borrow().range(off, len).map(|_| ())
    }

    fn fence(&self) {
        let mut inner = self.0.borrow_mut();
        if inner.fences >= inner.stop_fence {
            inner.stop = 0;
        }
        inner.fences += 1;
        if inner.stores < inner.stop {
            inner.forget_saved();
            inner.fenced = inner.undo.len();
        }
    }

    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        crc32c::crc32c_append(crc, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_put_back() {
        let m = Media::new(4096);
        m.settle(1, &[1; LINE]);
        let before = m.bytes();
        for round in 0..3 {
            m.set(1, &[2; LINE]);
            m.set(2, &[3; LINE]);
            m.watch();
            m.store(64, 9).unwrap();
            m.fence();
            m.store(72, 9).unwrap();
            m.write(100, &[round; 300]).unwrap();
            m.crash(|| round == 1);
            m.store(64, 10).unwrap();
            m.reset();
            assert_eq!(m.bytes(), before, "{round}");
        }
    }

    #[test]
    fn what_is_open_is_decided_when_somebody_looks() {
        let m = Media::new(4096);
        m.settle(5, &[5; LINE]);
        for _ in 0..2 {
            m.set(1, &[1; LINE]);
            m.keep(2);
            m.leave_open(Box::new(|line| (line < 5).then_some([9; LINE])));
            m.watch();
            let nine = u64::from_le_bytes([9; 8]);
            assert_eq!(
                (m.load(64), m.load(128)),
                (Ok(u64::from_le_bytes([1; 8])), Ok(0))
            );
            assert_eq!(
                (m.load(192), m.load(320)),
                (Ok(nine), Ok(u64::from_le_bytes([5; 8])))
            );
            m.store(264, 7).unwrap();
            assert_eq!((m.load(256), m.load(264)), (Ok(nine), Ok(7)));
            // Of what recovery stored, nothing is left; it did not make the line what it was.
            m.crash(|| true);
            assert_eq!((m.load(256), m.load(264)), (Ok(nine), Ok(nine)));
            m.reset();
            assert_eq!(
                (m.load(64), m.load(192), m.load(256)),
                (Ok(0), Ok(0), Ok(0))
            );
        }
    }

    #[test]
    fn what_is_read_first_is_seen() {
        let m = Media::new(4096);
        m.set(1, &[1; LINE]);
        m.watch();
        m.load(0).unwrap();
        m.load(64).unwrap();
        m.load(72).unwrap();
        m.store(128, 1).unwrap();
        m.load(128).unwrap();
        assert_eq!(m.reads(), [0, 1]);
        let want = hash_of(0, &[0; LINE]).wrapping_add(hash_of(1, &[1; LINE]));
        assert_eq!(m.seen(), want);
        m.reset();
        m.watch();
        m.load(64).unwrap();
        assert_eq!(m.seen(), hash_of(1, &[0; LINE]));
        assert_ne!(hash_of(1, &[0; LINE]), hash_of(2, &[0; LINE]));
    }

    #[test]
    fn a_recovery_that_is_cut_short_loses_what_it_had_not_fenced() {
        let m = Media::new(4096);
        m.watch();
        m.store(0, 1).unwrap();
        m.fence();
        m.store(0, 2).unwrap();
        m.store(64, 2).unwrap();
        m.stop_after(0);
        assert_eq!(m.store(128, 2), Err(Error::Io));
        m.fence();
        m.crash(|| true);
        assert_eq!((m.load(0), m.load(64), m.load(128)), (Ok(1), Ok(0), Ok(0)));
        m.store(128, 2).unwrap();
        m.reset();
        assert_eq!(m.bytes(), vec![0; 4096]);
    }
}
