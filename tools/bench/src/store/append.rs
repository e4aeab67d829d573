// SPDX-License-Identifier: GPL-2.0-only
//! Appends to a file: key and body, with their lengths, by a gathering write each, without a
//! copy of its own, and one fdatasync a turn.
//! The file is allocated beforehand and written over, so that a sync has no metadata to write;
//! when it is full it begins anew.

use super::Store;
use anyhow::{Context, Result, bail, ensure};
use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::unix::fs::FileExt;
use std::path::Path;

pub struct Append {
    file: File,
    size: u64,
    at: u64,
}

impl Append {
    pub fn new(directory: &Path, size: u64) -> Result<Self> {
        let path = directory.join("log");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        let zeros = vec![0; 1 << 20];
        for at in (0..size).step_by(zeros.len()) {
            file.write_all_at(&zeros[..zeros.len().min((size - at) as usize)], at)?;
        }
        file.sync_all()?;
        Ok(Self { file, size, at: 0 })
    }
}

impl Store for Append {
    fn put(&mut self, key: &[u8], body: &[u8]) -> Result<()> {
        let mut lengths = [0; 8];
        lengths[..4].copy_from_slice(&(key.len() as u32).to_le_bytes());
        lengths[4..].copy_from_slice(&(body.len() as u32).to_le_bytes());
        let len = (lengths.len() + key.len() + body.len()) as u64;
        if self.at + len > self.size {
            self.at = 0;
        }
        let parts = [&lengths[..], key, body].map(IoSlice::new);
        let written = rustix::io::pwritev(&self.file, &parts, self.at)?;
        ensure!(
            written as u64 == len,
            "the log took {written} bytes of {len}"
        );
        self.at += len;
        Ok(())
    }

    fn commit(&mut self) -> Result<()> {
        Ok(self.file.sync_data()?)
    }

    fn get(&mut self, _: &[u8]) -> Result<Option<Vec<u8>>> {
        bail!("a log is not searched")
    }
}
