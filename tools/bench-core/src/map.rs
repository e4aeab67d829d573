// SPDX-License-Identifier: GPL-2.0

//! A region that is ordinary memory.

use anyhow::Context;
use memmap2::{Advice, MmapOptions, MmapRaw};
use pmskb_core::{Error, Pmem, Result, LINE_SIZE};
use std::arch::asm;
use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// Ordinary memory that is written back as persistent memory is: `clwb` for each
/// line (`clflush` on a CPU without), `sfence`. Pages that were never written take no memory.
pub struct Region {
    map: MmapRaw,
    len: u64,
    clwb: bool,
    /// Off while a store is filled, whose cost nobody asks for. The cell also keeps
    /// the region to one thread.
    write_back: Cell<bool>,
}

/// Whether the CPU has `clwb`. Valgrind's has not: `clflush` stands for it there, and is
/// as many instructions.
pub fn has_clwb() -> bool {
    // SAFETY: every x86-64 CPU has CPUID, and answers about leaves that it lacks.
    let features = unsafe { std::arch::x86_64::__cpuid_count(7, 0) }.ebx;
    features & (1 << 24) != 0
}

/// Whether memory that asks for huge pages may have them.
pub fn has_huge_pages() -> bool {
    let mode = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    mode.is_ok_and(|mode| !mode.contains("[never]"))
}

impl Region {
    /// `len` zero bytes, a multiple of a line.
    pub fn sparse(len: u64) -> anyhow::Result<Self> {
        let map = MmapOptions::new()
            .len(usize::try_from(len)?)
            .no_reserve_swap()
            .map_anon()
            .context("cannot map memory of the region's size")?;
        Ok(Region {
            map: map.into(),
            len: len / LINE_SIZE * LINE_SIZE,
            clwb: has_clwb(),
            write_back: Cell::new(true),
        })
    }

    /// The same in huge pages, if the machine gives any, as a kernel maps persistent
    /// memory: for what is measured beside other stores, or beside a smaller one.
    pub fn huge(len: u64) -> anyhow::Result<Self> {
        let region = Self::sparse(len)?;
        // A kernel without them has no such advice, either.
        let _ = region.map.advise(Advice::HugePage);
        Ok(region)
    }

    /// Whether flushes and fences are executed.
    pub fn set_write_back(&self, on: bool) {
        self.write_back.set(on);
    }

    /// Where `len` bytes from `off` on are mapped.
    fn at(&self, off: u64, len: u64) -> Result<*mut u8> {
        match off.checked_add(len) {
            // SAFETY: the mapping has at least `self.len` bytes, and the sum is not
            // above that.
            Some(end) if end <= self.len => Ok(unsafe { self.map.as_mut_ptr().add(off as usize) }),
            _ => Err(Error::Invalid),
        }
    }

    fn word(&self, off: u64) -> Result<&AtomicU64> {
        if off % 8 != 0 {
            return Err(Error::Invalid);
        }
        let at = self.at(off, 8)?.cast::<u64>();
        // SAFETY: inside the mapping, which lives as long as `self`; aligned, as the
        // mapping starts at a page; and the only thread that has this region makes no
        // reference to its bytes but this kind.
        Ok(unsafe { AtomicU64::from_ptr(at) })
    }
}

impl Pmem for Region {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, off: u64, to: &mut [u8]) -> Result<()> {
        let from = self.at(off, to.len() as u64)?;
        // SAFETY: `from` has that many bytes in the mapping; `to` is not in it, as no
        // reference to its bytes exists; no other thread writes it.
        unsafe { from.copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn load(&self, off: u64) -> Result<u64> {
        Ok(u64::from_le(self.word(off)?.load(Ordering::Acquire)))
    }

    fn write(&self, off: u64, from: &[u8]) -> Result<()> {
        let to = self.at(off, from.len() as u64)?;
        // SAFETY: as for `read`, the other way round.
        unsafe { to.copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    fn store(&self, off: u64, value: u64) -> Result<()> {
        self.word(off)?.store(value.to_le(), Ordering::Release);
        Ok(())
    }

    fn flush(&self, off: u64, len: u64) -> Result<()> {
        self.at(off, len)?;
        if !self.write_back.get() {
            return Ok(());
        }
        let mut line = off / LINE_SIZE * LINE_SIZE;
        while line < off + len {
            let at = self.at(line, 1)?;
            if self.clwb {
                // SAFETY: the CPU has the instruction; the address is mapped, and
                // nothing changes that the program can see.
                unsafe { asm!("clwb [{}]", in(reg) at, options(nostack, preserves_flags)) };
            } else {
                // SAFETY: likewise, and every x86-64 CPU has this one.
                unsafe { std::arch::x86_64::_mm_clflush(at) };
            }
            line += LINE_SIZE;
        }
        Ok(())
    }

    fn fence(&self) {
        if self.write_back.get() {
            // SAFETY: every x86-64 CPU has it.
            unsafe { std::arch::x86_64::_mm_sfence() };
        }
    }

    fn prefetch(&self, off: u64, len: u64) {
        if let Ok(at) = self.at(off, len) {
            for line in (0..len).step_by(LINE_SIZE as usize) {
                // SAFETY: every x86-64 CPU has it, and it does nothing that the program can see;
                // the line is in the mapping.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(at.add(line as usize).cast()) };
            }
        }
    }

    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        crc32c::crc32c_append(crc, data)
    }
}
