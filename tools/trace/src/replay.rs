// SPDX-License-Identifier: GPL-2.0-only
//! Memory and caches as they were at each event of a trace.

use crate::format::Event;
use pmskb_tcg::model::{Flush, LINE, Line, Memory, Model};
use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::Range;

/// What the guest's loads would see.
#[derive(Debug)]
pub struct Ram(RefCell<Vec<u8>>);

impl Memory for Ram {
    fn line(&self, index: usize) -> Line {
        let mut out = [0; LINE];
        out.copy_from_slice(&self.0.borrow()[index * LINE..][..LINE]);
        out
    }
}

/// A trace, up to some event.
pub struct Replay {
    model: Model<Ram>,
    /// Lines that are at risk, and perhaps some that are not any more.
    dirty: HashSet<usize>,
    /// Lines for which each vCPU has something to fence.
    queued: Vec<Vec<usize>>,
    /// Lines of which something was committed, see [`take_settled`](Self::take_settled).
    settled: Vec<usize>,
    /// Lines that nobody reads after a crash, so that their past is not kept.
    volatile: Range<usize>,
}

impl Replay {
    /// Of zeros, for images to be loaded into.
    pub fn new(size: usize, cpus: usize) -> Self {
        Self {
            model: Model::new(Ram(RefCell::new(vec![0; size])), vec![0; size], cpus),
            dirty: HashSet::new(),
            queued: vec![Vec::new(); cpus],
            settled: Vec::new(),
            volatile: 0..0,
        }
    }

    /// Nobody reads these lines after a crash.
    pub fn set_volatile(&mut self, lines: Range<usize>) {
        self.volatile = lines;
    }

    /// What happens next. Of a flush, what it found.
    pub fn apply(&mut self, event: &Event) -> Option<Flush> {
        match *event {
            Event::Image { off, len, bytes } => {
                let line = off as usize / LINE;
                self.write(off as usize, &bytes[..usize::from(len)]);
                self.model.flush_ordered(line);
                self.settled.push(line);
                None
            }
            Event::Store {
                cpu,
                direct,
                off,
                len,
                bytes,
            } => {
                let (off, line) = (off as usize, off as usize / LINE);
                let kept = !self.volatile.contains(&line);
                if kept {
                    self.model.changing(line);
                    self.dirty.insert(line);
                }
                self.write(off, &bytes[..usize::from(len)]);
                if direct {
                    self.model.store_nt(cpu.into(), off, len.into());
                    self.queued[usize::from(cpu)].push(line);
                }
                None
            }
            Event::Flush { cpu, ordered, line } => {
                let line = line as usize;
                Some(if ordered {
                    self.settled.push(line);
                    self.model.flush_ordered(line)
                } else {
                    let found = self.model.flush(cpu.into(), line);
                    if found == Flush::Dirty {
                        self.queued[usize::from(cpu)].push(line);
                    }
                    found
                })
            }
            Event::Fence { cpu } => {
                self.model.fence(cpu.into());
                for line in self.queued[usize::from(cpu)].drain(..) {
                    if !self.model.at_risk(line) {
                        self.dirty.remove(&line);
                    }
                    self.settled.push(line);
                }
                None
            }
            Event::Mark { .. } | Event::End { .. } => None,
        }
    }

    fn write(&mut self, off: usize, bytes: &[u8]) {
        let mut ram = self.model.memory().0.borrow_mut();
        ram[off..off + bytes.len()].copy_from_slice(bytes);
    }

    /// Whether a vCPU's fence would commit something.
    pub fn waits(&self, cpu: u8) -> bool {
        self.model.waits(cpu.into())
    }

    /// Whether a cut now could lose a line, or leave it in an older state.
    pub fn at_risk(&self, line: usize) -> bool {
        self.dirty.contains(&line) && self.model.at_risk(line)
    }

    /// Lines of which something became durable since this was asked last.
    pub fn take_settled(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.settled)
    }

    /// Memory and what is durable of it.
    pub fn model(&self) -> &Model<Ram> {
        &self.model
    }

    /// Bytes as the guest sees them.
    pub fn bytes(&self, range: Range<usize>) -> Vec<u8> {
        self.model.memory().0.borrow()[range].to_vec()
    }

    /// CRC32C of the whole memory, as the guest sees it.
    pub fn crc(&self) -> u32 {
        crc32c::crc32c(&self.model.memory().0.borrow())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(off: u64, byte: u8) -> Event {
        Event::Store {
            cpu: 0,
            direct: false,
            off,
            len: 8,
            bytes: [byte; LINE],
        }
    }

    fn flush(line: u64) -> Event {
        Event::Flush {
            cpu: 0,
            ordered: false,
            line,
        }
    }

    fn risk(r: &Replay) -> Vec<usize> {
        (0..64).filter(|line| r.at_risk(*line)).collect()
    }

    #[test]
    fn what_is_fenced_is_settled_and_no_longer_at_risk() {
        let mut r = Replay::new(4096, 2);
        r.apply(&store(64, 1));
        r.apply(&store(64, 2));
        r.apply(&store(128, 3));
        assert_eq!(risk(&r), [1, 2]);
        assert_eq!(r.model().versions(1).len(), 3);
        assert_eq!(r.apply(&flush(1)), Some(Flush::Dirty));
        assert_eq!(r.apply(&flush(1)), Some(Flush::Repeated));
        assert!(r.waits(0) && !r.waits(1));
        r.apply(&Event::Fence { cpu: 1 });
        assert_eq!(risk(&r), [1, 2]);
        r.apply(&Event::Fence { cpu: 0 });
        assert_eq!(r.take_settled(), [1]);
        assert_eq!(risk(&r), [2]);
        assert_eq!(r.apply(&flush(1)), Some(Flush::Clean));
    }

    #[test]
    fn an_image_is_durable_and_volatile_lines_are_at_no_risk() {
        let mut r = Replay::new(4096, 1);
        r.apply(&Event::Image {
            off: 0,
            len: 64,
            bytes: [9; LINE],
        });
        r.set_volatile(8..16);
        r.apply(&store(8 * 64, 1));
        assert!(risk(&r).is_empty());
        assert_eq!(r.model().durable(0), [9; LINE]);
        assert_eq!(r.bytes(512..520), [1; 8]);
    }
}
