// SPDX-License-Identifier: GPL-2.0-only

//! A region's bytes by read and write calls, for the core to check and mend.
//!
//! Slower than a mapping, but bytes that the media refuses to read are an error here
//! and no signal.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Seek},
    os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pmskb_core::{Error, Pmem};

use crate::media::Part;

/// A region in a file or device, or a part that may be one. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Direct {
    inner: Arc<Inner>,
    offset: u64,
    len: u64,
}

#[derive(Debug)]
struct Inner {
    file: File,
    /// What was written and stays in this process: words by their offsets. None: it
    /// goes to the file.
    overlay: Option<Mutex<BTreeMap<u64, [u8; 8]>>>,
}

impl Direct {
    /// A file, a device whose store is not attached, or an attached store. Nothing
    /// is written to it unless it is `writable`: then every word is, at once.
    pub fn open(path: &Path, writable: bool) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(writable);
        if std::fs::metadata(path)?.file_type().is_block_device() {
            // Fails when a store or a file system on it is in use.
            options.custom_flags(libc::O_EXCL);
        }
        let mut file = options.open(path)?;
        // The length of a device is not in its metadata.
        let len = file.seek(io::SeekFrom::End(0))?;
        if len == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the file is empty",
            ));
        }
        let overlay = (!writable).then(Mutex::default);
        Ok(Self {
            inner: Arc::new(Inner { file, overlay }),
            offset: 0,
            len,
        })
    }

    /// Offset in the file, if `len` bytes from `off` are in the region.
    fn at(&self, off: u64, len: usize) -> Result<u64, Error> {
        match off.checked_add(len as u64) {
            Some(end) if end <= self.len => Ok(self.offset + off),
            _ => Err(Error::Invalid),
        }
    }

    fn overlay(&self) -> Option<MutexGuard<'_, BTreeMap<u64, [u8; 8]>>> {
        let overlay = self.inner.overlay.as_ref()?;
        Some(overlay.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Part for Direct {
    fn part(&self, offset: u64, len: u64) -> Option<Self> {
        let end = offset.checked_add(len)?;
        (end <= self.len).then(|| Self {
            inner: self.inner.clone(),
            offset: self.offset + offset,
            len,
        })
    }
}

impl Pmem for Direct {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, off: u64, to: &mut [u8]) -> Result<(), Error> {
        let at = self.at(off, to.len())?;
        let read = self.inner.file.read_exact_at(to, at);
        read.map_err(|_| Error::Io)?;
        let Some(words) = self.overlay() else {
            return Ok(());
        };
        let end = at + to.len() as u64;
        for (word, bytes) in words.range(at.saturating_sub(7)..end) {
            for (place, byte) in (*word..).zip(bytes) {
                if (at..end).contains(&place) {
                    to[(place - at) as usize] = *byte;
                }
            }
        }
        Ok(())
    }

    fn load(&self, off: u64) -> Result<u64, Error> {
        if off % 8 != 0 {
            return Err(Error::Invalid);
        }
        let mut word = [0; 8];
        self.read(off, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    fn write(&self, off: u64, from: &[u8]) -> Result<(), Error> {
        let at = self.at(off, from.len())?;
        if self.inner.overlay.is_none() {
            let written = self.inner.file.write_all_at(from, at);
            return written.map_err(|_| Error::Io);
        }
        // Whole words, so that no two of the overlay have a byte in common.
        let start = off / 8 * 8;
        let end = (off + from.len() as u64).next_multiple_of(8);
        let mut bytes = vec![0; (end - start) as usize];
        self.read(start, &mut bytes)?;
        let skip = (off - start) as usize;
        bytes[skip..skip + from.len()].copy_from_slice(from);
        if let Some(mut words) = self.overlay() {
            for (word, bytes) in (self.offset + start..).step_by(8).zip(bytes.chunks(8)) {
                let mut whole = [0; 8];
                whole[..bytes.len()].copy_from_slice(bytes);
                words.insert(word, whole);
            }
        }
        Ok(())
    }

    fn store(&self, off: u64, value: u64) -> Result<(), Error> {
        if off % 8 != 0 {
            return Err(Error::Invalid);
        }
        self.write(off, &value.to_le_bytes())
    }

    fn flush(&self, off: u64, len: u64) -> Result<(), Error> {
        let len = usize::try_from(len).map_err(|_| Error::Invalid)?;
        self.at(off, len).map(|_| ())
    }

    /// What cannot be made durable here cannot later either: `sync` tells.
    fn fence(&self) {
        if self.inner.overlay.is_none() {
            let _ = self.inner.file.sync_data();
        }
    }

    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        crc32c::crc32c_append(crc, data)
    }
}

impl Direct {
    /// Makes all that was written durable.
    pub fn sync(&self) -> io::Result<()> {
        self.inner.file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn writes_stay_in_the_process_unless_they_are_wanted() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..=255).collect();
        file.write_all(&bytes).unwrap();
        let private = Direct::open(file.path(), false).unwrap();
        let part = private.part(8, 240).unwrap();
        part.write(5, b"abcdef").unwrap();
        part.store(32, u64::MAX).unwrap();
        let mut right = bytes.clone();
        right[13..19].copy_from_slice(b"abcdef");
        right[40..48].fill(255);
        for from in 0..60 {
            let mut to = [0; 9];
            private.read(from as u64, &mut to).unwrap();
            assert_eq!(to, right[from..from + 9], "{from}");
        }
        assert_eq!(std::fs::read(file.path()).unwrap(), bytes);
        assert_eq!(part.read(236, &mut [0; 5]), Err(Error::Invalid));
        assert_eq!(part.write(236, &[0; 5]), Err(Error::Invalid));
        assert_eq!(part.load(4), Err(Error::Invalid));
        assert!(part.part(0, 241).is_none());

        let shared = Direct::open(file.path(), true).unwrap();
        shared.write(13, b"abcdef").unwrap();
        shared.store(40, u64::MAX).unwrap();
        shared.sync().unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), right);
    }
}
