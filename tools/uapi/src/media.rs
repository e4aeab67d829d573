// SPDX-License-Identifier: GPL-2.0-only

//! A region's bytes, for the core to read: of an attached store, or of an image.

use std::{
    fs::File,
    io::{self, Seek},
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
    ptr::NonNull,
    sync::{
        atomic::{AtomicU64, AtomicU8, Ordering},
        Arc,
    },
};

use memmap2::{MmapOptions, MmapRaw};
use pmskb_core::{Error, Pmem, LINE_SIZE};

use crate::Mapping;

/// What regions are looked for in.
pub trait Part: Pmem + Sized {
    /// A part of it, as a region of its own.
    fn part(&self, offset: u64, len: u64) -> Option<Self>;
}

/// A region, or a part of an image that may be one. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Media {
    bytes: Arc<Bytes>,
    /// Of the region in the mapping.
    offset: u64,
    len: u64,
    /// What must not be touched: the head area of an attached store.
    hole: Range<u64>,
    /// Bytes are read from it and not from the mapping.
    calls: Option<Arc<File>>,
}

#[derive(Debug)]
enum Bytes {
    /// An attached store: others write to it.
    Live(Mapping),
    /// An image, mapped privately: what is written to it stays in this process.
    Image(MmapRaw),
}

// SAFETY: the mapping is only accessed by the atomic loads and stores below.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

impl Media {
    /// An attached store. `hole` is the head area.
    pub fn live(mapping: Mapping, hole: Range<u64>) -> Self {
        let len = mapping.len() as u64;
        Self {
            bytes: Arc::new(Bytes::Live(mapping)),
            offset: 0,
            len,
            hole,
            calls: None,
        }
    }

    /// The same, of an attached store, but bytes are read by system calls: those that
    /// have a media error are [`Error::Io`] then, and no signal.
    pub fn by_calls(&self, store: File) -> Self {
        Self {
            calls: Some(Arc::new(store)),
            ..self.clone()
        }
    }

    /// A file or device; nothing is ever written to it.
    pub fn image(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        // The length of a device is not in its metadata.
        let len = file.seek(io::SeekFrom::End(0))?;
        if len == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the file is empty",
            ));
        }
        let mut map = MmapOptions::new();
        map.len(usize::try_from(len).map_err(io::Error::other)?)
            .no_reserve_swap();
        // SAFETY: the file may change while it is mapped; all accesses are atomic
        // and none is a reference to bytes, so that does no more harm than an
        // image with other contents, which the core expects.
        let map = MmapRaw::from(unsafe { map.map_copy(&file)? });
        Ok(Self {
            bytes: Arc::new(Bytes::Image(map)),
            offset: 0,
            len,
            hole: 0..0,
            calls: None,
        })
    }

    /// Address of byte `off`, if `len` bytes from there may be touched.
    fn at(&self, off: u64, len: u64) -> Result<NonNull<u8>, Error> {
        let end = off.checked_add(len).ok_or(Error::Invalid)?;
        if end > self.len {
            return Err(Error::Invalid);
        }
        if off < self.hole.end && end > self.hole.start {
            return Err(Error::Io);
        }
        let base = match &*self.bytes {
            Bytes::Live(mapping) => mapping.base(),
            Bytes::Image(map) => NonNull::new(map.as_mut_ptr()).ok_or(Error::Io)?,
        };
        // SAFETY: `off` is less than `len`, which is that of (a part of) the
        // mapping, so the sum is within it or just behind it.
        Ok(unsafe { base.add((self.offset + off) as usize) })
    }

    fn word(&self, off: u64) -> Result<&AtomicU64, Error> {
        let at = self.at(off, 8)?;
        if at.as_ptr() as usize % 8 != 0 {
            return Err(Error::Invalid);
        }
        // SAFETY: 8 aligned bytes within a mapping that lives as long as `self`.
        Ok(unsafe { AtomicU64::from_ptr(at.as_ptr().cast()) })
    }

    /// # Safety
    ///
    /// `at` must be of [`Self::at`].
    unsafe fn byte(&self, at: NonNull<u8>, index: usize) -> &AtomicU8 {
        // SAFETY: as promised by the caller, within the mapping.
        unsafe { AtomicU8::from_ptr(at.add(index).as_ptr()) }
    }
}

impl Part for Media {
    fn part(&self, offset: u64, len: u64) -> Option<Self> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then(|| Self {
            bytes: self.bytes.clone(),
            offset: self.offset + offset,
            len,
            hole: 0..0,
            calls: None,
        })
    }
}

impl Pmem for Media {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, off: u64, to: &mut [u8]) -> Result<(), Error> {
        let at = self.at(off, to.len() as u64)?;
        if let Some(file) = &self.calls {
            return file.read_exact_at(to, off).map_err(|_| Error::Io);
        }
        let head = at.as_ptr().align_offset(8).min(to.len());
        let (first, rest) = to.split_at_mut(head);
        let mut words = rest.chunks_exact_mut(8);
        for (i, byte) in first.iter_mut().enumerate() {
            // SAFETY: `at` was checked for the length of `to`.
            *byte = unsafe { self.byte(at, i) }.load(Ordering::Relaxed);
        }
        let mut done = head;
        for word in &mut words {
            // SAFETY: within the checked range, and aligned from `head` on.
            let value = unsafe { AtomicU64::from_ptr(at.add(done).as_ptr().cast()) };
            word.copy_from_slice(&value.load(Ordering::Relaxed).to_ne_bytes());
            done += 8;
        }
        for byte in words.into_remainder() {
            // SAFETY: as for the first bytes.
            *byte = unsafe { self.byte(at, done) }.load(Ordering::Relaxed);
            done += 1;
        }
        Ok(())
    }

    fn load(&self, off: u64) -> Result<u64, Error> {
        Ok(u64::from_le(self.word(off)?.load(Ordering::Acquire)))
    }

    fn write(&self, off: u64, from: &[u8]) -> Result<(), Error> {
        if matches!(*self.bytes, Bytes::Live(_)) {
            return Err(Error::ReadOnly);
        }
        let at = self.at(off, from.len() as u64)?;
        for (i, &byte) in from.iter().enumerate() {
            // SAFETY: `at` was checked for the length of `from`, and the mapping
            // of an image is private and writable.
            unsafe { self.byte(at, i) }.store(byte, Ordering::Relaxed);
        }
        Ok(())
    }

    fn store(&self, off: u64, value: u64) -> Result<(), Error> {
        if matches!(*self.bytes, Bytes::Live(_)) {
            return Err(Error::ReadOnly);
        }
        self.word(off)?.store(value.to_le(), Ordering::Release);
        Ok(())
    }

    fn flush(&self, off: u64, len: u64) -> Result<(), Error> {
        self.at(off, len).map(|_| ())
    }

    fn fence(&self) {}

    fn prefetch(&self, off: u64, len: u64) {
        #[cfg(target_arch = "x86_64")]
        if let Ok(at) = self.at(off, len) {
            use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
            for line in (0..len).step_by(LINE_SIZE as usize) {
                // SAFETY: every x86-64 CPU has it, and it changes nothing that a program sees;
                // the line is in the mapping.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(at.as_ptr().add(line as usize).cast()) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (off, len);
    }

    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        crc32c::crc32c_append(crc, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn image(bytes: &[u8]) -> (tempfile::NamedTempFile, Media) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let media = Media::image(file.path()).unwrap();
        (file, media)
    }

    #[test]
    fn reads_are_right_at_any_alignment() {
        let bytes: Vec<u8> = (0..=255).collect();
        let (_file, media) = image(&bytes);
        for from in 0..20 {
            for len in 0..40 {
                let mut to = vec![0; len];
                media.read(from as u64, &mut to).unwrap();
                assert_eq!(to, bytes[from..from + len]);
            }
        }
        assert_eq!(
            media.load(8).unwrap(),
            u64::from_le_bytes(bytes[8..16].try_into().unwrap())
        );
        assert_eq!(media.load(4), Err(Error::Invalid));
        assert_eq!(media.read(250, &mut [0; 7]), Err(Error::Invalid));
        assert_eq!(media.read(u64::MAX, &mut [0; 2]), Err(Error::Invalid));
        assert_eq!(media.read(256, &mut []), Ok(()));
    }

    #[test]
    fn writes_stay_in_the_process() {
        let (file, media) = image(&[0; 8192]);
        let part = media.part(4096, 4096).unwrap();
        part.write(1, b"abc").unwrap();
        part.store(8, 7).unwrap();
        let mut to = [0; 3];
        media.read(4097, &mut to).unwrap();
        assert_eq!(&to, b"abc");
        assert_eq!(media.load(4104).unwrap(), 7);
        assert_eq!(std::fs::read(file.path()).unwrap(), [0; 8192]);
        assert!(media.part(4096, 4097).is_none());
    }
}
