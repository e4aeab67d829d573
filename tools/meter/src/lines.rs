// SPDX-License-Identifier: GPL-2.0-only
//! The cache lines of the persistent memory: how many bytes were stored to each, and which of
//! them were written back.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

/// The length of a cache line.
pub const LINE: u64 = 64;

/// What happened to each line since the window began.
pub struct Lines {
    stored: Vec<AtomicU32>,
    written_back: Vec<AtomicU8>,
}

/// A sum over all lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Bytes stored to lines that were written back.
    pub durable: u64,
    /// Bytes stored to lines that were not: of no use after a power cut, and not meant to be.
    pub volatile: u64,
    /// Lines that were written back at least once.
    pub lines: u64,
}

impl Lines {
    /// The lines of so many bytes.
    pub fn new(size: u64) -> Self {
        let lines = (size / LINE) as usize;
        Self {
            stored: (0..lines).map(|_| AtomicU32::new(0)).collect(),
            written_back: (0..lines).map(|_| AtomicU8::new(0)).collect(),
        }
    }

    /// Forgets everything.
    pub fn clear(&self) {
        for line in &self.stored {
            line.store(0, Ordering::Relaxed);
        }
        for line in &self.written_back {
            line.store(0, Ordering::Relaxed);
        }
    }

    /// Bytes were stored at an offset.
    pub fn store(&self, offset: u64, len: u64) {
        let mut at = offset;
        while at < offset + len {
            let end = (at / LINE + 1) * LINE;
            let part = end.min(offset + len) - at;
            if let Some(line) = self.stored.get((at / LINE) as usize) {
                line.fetch_add(part as u32, Ordering::Relaxed);
            }
            at = end;
        }
    }

    /// The line at an offset was written back, or bytes stored there past the cache.
    pub fn write_back(&self, offset: u64) {
        if let Some(line) = self.written_back.get((offset / LINE) as usize) {
            line.store(1, Ordering::Relaxed);
        }
    }

    /// The sums.
    pub fn sums(&self) -> Sums {
        let mut sums = Sums::default();
        for (stored, back) in self.stored.iter().zip(&self.written_back) {
            let bytes = u64::from(stored.load(Ordering::Relaxed));
            if back.load(Ordering::Relaxed) != 0 {
                sums.lines += 1;
                sums.durable += bytes;
            } else {
                sums.volatile += bytes;
            }
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_durable_if_their_line_was_written_back() {
        let lines = Lines::new(4096);
        // Over the border of two lines.
        lines.store(60, 8);
        lines.store(128, 8);
        lines.write_back(70);
        let sums = |durable, volatile, lines| Sums {
            durable,
            volatile,
            lines,
        };
        assert_eq!(lines.sums(), sums(4, 12, 1));
        // The order does not matter, nor how often.
        lines.write_back(129);
        lines.write_back(130);
        lines.store(136, 64);
        assert_eq!(lines.sums(), sums(4 + 64, 12, 2));
        // What lies outside is nobody's.
        lines.store(4090, 100);
        lines.write_back(1 << 40);
        assert_eq!(lines.sums(), sums(68, 18, 2));
        lines.clear();
        assert_eq!(lines.sums(), sums(0, 0, 0));
    }
}
