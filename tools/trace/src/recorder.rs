// SPDX-License-Identifier: GPL-2.0-only
//! A trace of the core on this host, without a guest: what an operation of its stores, flushes
//! and fences, as one vCPU would.

use crate::format::{Header, Writer};
use crate::mark::Mark;
use pmskb_core::host::Memory;
use pmskb_core::{LINE_SIZE, Pmem, Result};
use std::cell::RefCell;
use std::io::Write;

/// Memory, and who writes down what happens to it.
pub struct Recorder<W: Write> {
    memory: Memory,
    out: RefCell<Writer<W>>,
}

impl<W: Write> Recorder<W> {
    /// So many zeros.
    pub fn new(len: u64, out: W) -> std::io::Result<Self> {
        let header = Header {
            base: 1 << 32,
            size: len,
        };
        Ok(Self {
            memory: Memory::new(len),
            out: RefCell::new(Writer::new(out, header)?),
        })
    }

    /// Makes a mark.
    pub fn mark(&self, mark: Mark) {
        let done = self.out.borrow_mut().mark(0, mark);
        done.expect("the trace cannot be written");
    }

    /// Ends the trace.
    pub fn finish(self) -> std::io::Result<W> {
        let mut crc = 0;
        let mut part = vec![0; 1 << 16];
        let mut at = 0;
        while at < self.memory.len() {
            let now = part.len().min((self.memory.len() - at) as usize);
            let read = self.memory.read(at, &mut part[..now]);
            read.map_err(|e| std::io::Error::other(format!("{e:?}")))?;
            crc = crc32c::crc32c_append(crc, &part[..now]);
            at += now as u64;
        }
        self.out.into_inner().finish(crc, 0)
    }

    fn write_down(&self, event: impl FnOnce(&mut Writer<W>) -> std::io::Result<()>) {
        let done = event(&mut self.out.borrow_mut());
        done.expect("the trace cannot be written");
    }
}

impl<W: Write> Pmem for Recorder<W> {
    fn len(&self) -> u64 {
        self.memory.len()
    }
    fn read(&self, off: u64, to: &mut [u8]) -> Result<()> {
        self.memory.read(off, to)
    }
    fn load(&self, off: u64) -> Result<u64> {
        self.memory.load(off)
    }
    fn write(&self, off: u64, from: &[u8]) -> Result<()> {
        self.memory.write(off, from)?;
        self.write_down(|out| out.store(0, false, off, from));
        Ok(())
    }
    fn store(&self, off: u64, value: u64) -> Result<()> {
        self.memory.store(off, value)?;
        self.write_down(|out| out.store(0, false, off, &value.to_le_bytes()));
        Ok(())
    }
    fn flush(&self, off: u64, len: u64) -> Result<()> {
        self.memory.flush(off, len)?;
        if len > 0 {
            for line in off / LINE_SIZE..=(off + len - 1) / LINE_SIZE {
                self.write_down(|out| out.flush(0, false, line));
            }
        }
        Ok(())
    }
    fn fence(&self) {
        self.memory.fence();
        self.write_down(|out| out.fence(0));
    }
    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        self.memory.crc32c(crc, data)
    }
}
