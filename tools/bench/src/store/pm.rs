// SPDX-License-Identifier: GPL-2.0-only
//! A file of persistent memory, mapped.

use anyhow::{Context, Result, ensure};
use pmskb_core::{Error, LINE_SIZE, Pmem};
use std::arch::asm;
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

/// A file on a DAX file system. It is allocated and mapped when it is made, so that no page
/// fault is part of what is measured.
pub struct File {
    map: NonNull<u8>,
    len: u64,
}

impl File {
    /// Makes a file of `len` bytes, all zero.
    pub fn create(directory: &Path, len: u64) -> Result<Self> {
        // SAFETY: every x86-64 CPU has CPUID, and answers about leaves that it lacks.
        let features = unsafe { std::arch::x86_64::__cpuid_count(7, 0) }.ebx;
        ensure!(features & (1 << 24) != 0, "this CPU has no clwb");
        let path = directory.join("pm");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, len)?;
        let size = usize::try_from(len)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours;
        // the result is checked. MAP_SYNC: the file's blocks are durable before a store to them
        // can be.
        let map = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC,
                file.as_raw_fd(),
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).with_context(|| {
                format!(
                    "{} is not on a file system mounted with dax",
                    path.display()
                )
            });
        }
        // SAFETY: the mapping is that long.
        let done = unsafe { libc::madvise(map, size, libc::MADV_POPULATE_WRITE) };
        ensure!(
            done == 0,
            "cannot map all of it: {}",
            std::io::Error::last_os_error()
        );
        Ok(Self {
            map: NonNull::new(map.cast()).context("mapped at 0")?,
            len,
        })
    }

    /// Where `len` bytes from `off` on are mapped.
    fn at(&self, off: u64, len: u64) -> pmskb_core::Result<*mut u8> {
        match off.checked_add(len) {
            // SAFETY: inside the mapping, by the comparison.
            Some(end) if end <= self.len => Ok(unsafe { self.map.as_ptr().add(off as usize) }),
            _ => Err(Error::Invalid),
        }
    }

    fn word(&self, off: u64) -> pmskb_core::Result<&AtomicU64> {
        if off % 8 != 0 {
            return Err(Error::Invalid);
        }
        let at = self.at(off, 8)?.cast::<u64>();
        // SAFETY: inside the mapping, which lives as long as the value; aligned, as it begins at
        // a page; and no other kind of reference to its bytes is ever made.
        Ok(unsafe { AtomicU64::from_ptr(at) })
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what create() mapped; no reference to it is left.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.len as usize) };
    }
}

impl Pmem for File {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, off: u64, to: &mut [u8]) -> pmskb_core::Result<()> {
        let from = self.at(off, to.len() as u64)?;
        // SAFETY: `from` has that many bytes in the mapping, to which `to` cannot belong; one
        // thread has this file.
        unsafe { from.copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn load(&self, off: u64) -> pmskb_core::Result<u64> {
        Ok(u64::from_le(self.word(off)?.load(Ordering::Acquire)))
    }

    fn write(&self, off: u64, from: &[u8]) -> pmskb_core::Result<()> {
        let to = self.at(off, from.len() as u64)?;
        // SAFETY: as for `read`, the other way round.
        unsafe { to.copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    fn store(&self, off: u64, value: u64) -> pmskb_core::Result<()> {
        self.word(off)?.store(value.to_le(), Ordering::Release);
        Ok(())
    }

    #[inline(never)]
    fn flush(&self, off: u64, len: u64) -> pmskb_core::Result<()> {
        let first = off / LINE_SIZE * LINE_SIZE;
        let start = self.at(first, off - first + len)?;
        for line in (0..off - first + len).step_by(LINE_SIZE as usize) {
            // SAFETY: create() saw that the CPU has the instruction; the line is mapped, and
            // nothing changes that the program can see.
            unsafe {
                asm!("clwb [{}]", in(reg) start.add(line as usize), options(nostack, preserves_flags));
            }
        }
        Ok(())
    }

    #[inline(never)]
    fn fence(&self) {
        // SAFETY: every x86-64 CPU has it.
        unsafe { std::arch::x86_64::_mm_sfence() };
    }

    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        crc32c::crc32c_append(crc, data)
    }
}
