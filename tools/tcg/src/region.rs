// SPDX-License-Identifier: GPL-2.0-only
//! The NVDIMM's backing file, as the guest's stores leave it.

use crate::model::{LINE, Line, Memory};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

/// A shared, read-only mapping of the backing file.
#[derive(Debug)]
pub struct Region {
    file: File,
    map: NonNull<AtomicU64>,
    size: usize,
    label: usize,
}

// SAFETY: the mapping lives as long as the value, and it is only ever read, with
// atomic loads, so any thread may hold and use it.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `path`; its last `label` bytes are the NVDIMM's label area, which the
    /// guest reaches through firmware calls and not by stores.
    pub fn open(path: &Path, label: u64) -> Result<Self, String> {
        let fail = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
        let file = File::open(path).map_err(|e| fail(&e))?;
        let meta = file.metadata().map_err(|e| fail(&e))?;
        if !meta.is_file() {
            return Err(fail(&"not a regular file"));
        }
        let total = usize::try_from(meta.len()).map_err(|e| fail(&e))?;
        let label = usize::try_from(label).map_err(|e| fail(&e))?;
        let size = total.checked_sub(label).filter(|&s| s > 0).ok_or_else(|| {
            fail(&format_args!(
                "{total} bytes leave no room beside {label} bytes of labels"
            ))
        })?;
        if size % LINE != 0 || label % LINE != 0 {
            return Err(fail(&"the size is not a multiple of 64"));
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches no
        // memory of ours; the result is checked.
        let map = unsafe {
            libc::mmap(
                ptr::null_mut(),
                total,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(fail(&io::Error::last_os_error()));
        }
        Ok(Self {
            file,
            map: NonNull::new(map.cast()).ok_or_else(|| fail(&"mapped at 0"))?,
            size,
            label,
        })
    }

    /// The length of the persistent memory, without the labels.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The length of the label area.
    pub fn label(&self) -> usize {
        self.label
    }

    /// The parts of the persistent memory that may hold something other than
    /// zeros: a sparse file's holes are not read, which would fill the page cache.
    pub fn extents(&self) -> Vec<Range<usize>> {
        let mut out = Vec::new();
        let mut at = 0;
        while at < self.size {
            let Some(start) = self.seek(at, libc::SEEK_DATA) else {
                // ENXIO: nothing but a hole up to the end. A file system without
                // SEEK_DATA calls the whole file data, so that is no case here.
                break;
            };
            let end = self.seek(start, libc::SEEK_HOLE).unwrap_or(self.size);
            if start < self.size {
                out.push(start..end.min(self.size));
            }
            at = end.max(start + 1);
        }
        out
    }

    fn seek(&self, at: usize, whence: libc::c_int) -> Option<usize> {
        let at = libc::off_t::try_from(at).ok()?;
        // SAFETY: lseek touches no memory, and the descriptor is open.
        let found = unsafe { libc::lseek(self.file.as_raw_fd(), at, whence) };
        usize::try_from(found).ok()
    }

    /// A copy of the persistent memory, holes left untouched.
    pub fn copy(&self) -> Vec<u8> {
        let mut out = vec![0; self.size];
        for extent in self.extents() {
            // An extent may begin inside a line where blocks are small.
            for line in extent.start / LINE..extent.end.div_ceil(LINE) {
                out[line * LINE..][..LINE].copy_from_slice(&self.line(line));
            }
        }
        out
    }

    /// The label area, as it is now.
    pub fn labels(&self) -> Vec<u8> {
        let first = self.size / LINE;
        let lines = first..first + self.label / LINE;
        lines.flat_map(|l| self.line(l)).collect()
    }
}

impl Memory for Region {
    fn line(&self, index: usize) -> Line {
        let mut out = [0; LINE];
        assert!(index < (self.size + self.label) / LINE);
        for (i, word) in out.chunks_exact_mut(8).enumerate() {
            // SAFETY: inside the mapping, by the assertion; aligned, for a mapping
            // begins at a page. QEMU's threads store to the same memory, hence an
            // atomic load: a word is never seen half-written, as on hardware.
            let value = unsafe { self.map.add(index * LINE / 8 + i).as_ref() };
            word.copy_from_slice(&value.load(Ordering::Relaxed).to_ne_bytes());
        }
        out
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what open() mapped, and nothing refers to it any
        // longer: line() hands out copies.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.size + self.label) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;

    /// A file name that no other test uses.
    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("tcg-{}-{name}", std::process::id()))
    }

    #[test]
    fn sees_stores_and_skips_holes() {
        let path = scratch("region");
        let file = File::create(&path).unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[1; 100], 4 << 20).unwrap();
        file.write_all_at(&[9; 64], (8 << 20) - 4096).unwrap();
        let region = Region::open(&path, 4096).unwrap();
        assert_eq!((region.size(), region.label()), ((8 << 20) - 4096, 4096));
        assert_eq!(region.line((4 << 20) / LINE), [1; 64]);
        file.write_all_at(&[2; 64], 4 << 20).unwrap();
        assert_eq!(region.line((4 << 20) / LINE), [2; 64]);
        assert_eq!(region.labels()[..64], [9; 64]);
        let copy = region.copy();
        assert_eq!(copy.iter().filter(|&&b| b != 0).count(), 100);
        let covered: usize = region.extents().iter().map(|e| e.len()).sum();
        assert!((100..=8 << 20).contains(&covered));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn says_what_is_wrong_with_a_file() {
        let path = scratch("bad-region");
        let error = Region::open(&path, 0).unwrap_err();
        assert!(error.contains("No such file"), "{error}");
        std::fs::write(&path, [0; 4096]).unwrap();
        let error = Region::open(&path, 4096).unwrap_err();
        assert!(error.contains("no room"), "{error}");
        let error = Region::open(&path, 100).unwrap_err();
        assert!(error.contains("multiple of 64"), "{error}");
        let error = Region::open(Path::new("/"), 0).unwrap_err();
        assert!(error.contains("not a regular file"), "{error}");
        std::fs::remove_file(&path).unwrap();
    }
}
