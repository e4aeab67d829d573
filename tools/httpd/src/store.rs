// SPDX-License-Identifier: GPL-2.0-only

//! What the server needs of a store.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    time::SystemTime,
};

use anyhow::Context;
use pmskb_uapi::{
    core::{Error, Record, TimeSource},
    Batch, Catalog, Mapping,
};

use crate::view::Memory;

/// A record that was looked up.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its sequence number.
    pub seq: u64,
    /// Bytes of the object.
    pub len: u64,
    /// When it was received, by this host's clock.
    pub modified: Option<SystemTime>,
    /// Offset and length of its parts in the store.
    pub extents: Vec<(u64, u64)>,
    /// The record itself; there is none in tests.
    pub record: Option<Record>,
}

/// A store, as the server uses it.
pub trait Store: Memory {
    /// The record with a key.
    fn find(&self, key: &[u8]) -> io::Result<Option<Found>>;
    /// Whether a record is still alive: its bytes were not reused.
    fn still(&self, found: &Found) -> bool;
    /// Keys with a prefix, in order, after one of them.
    fn list(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> io::Result<Vec<Vec<u8>>>;
    /// Submits a batch; on return its outcomes are known, and what succeeded is
    /// durable.
    fn submit(&mut self, batch: &mut Batch) -> io::Result<()>;
}

/// A store of the module.
pub struct Device {
    store: pmskb_uapi::Store,
    mapping: Mapping,
    catalog: Catalog,
}

impl Device {
    /// Opens and maps a store.
    pub fn open(store: pmskb_uapi::Store) -> anyhow::Result<Self> {
        let mapping = store.map()?;
        let catalog = Catalog::of_store(&store)
            .with_context(|| format!("cannot read {}", store.path().display()))?;
        Ok(Self {
            store,
            mapping,
            catalog,
        })
    }

    /// The store itself.
    pub fn store(&self) -> &pmskb_uapi::Store {
        &self.store
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.store.as_fd()
    }
}

fn error(e: Error) -> io::Error {
    let kind = match e {
        Error::Busy => io::ErrorKind::ResourceBusy,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, pmskb_uapi::catalog::describe(e))
}

impl Memory for Device {
    fn bytes(&self, offset: u64, len: u64) -> Option<&[u8]> {
        self.mapping.range(offset, len)
    }
}

impl Store for Device {
    fn find(&self, key: &[u8]) -> io::Result<Option<Found>> {
        // A record that is replaced while its extents are read is looked up again.
        for _ in 0..100 {
            let Some(record) = self.catalog.get(key).map_err(error)? else {
                return Ok(None);
            };
            let extents = self.catalog.extents(&record);
            if !self.catalog.still(&record).map_err(error)? {
                continue;
            }
            let extents = extents.map_err(error)?;
            let modified = match record.meta.time_source {
                TimeSource::Software | TimeSource::Placement => SystemTime::UNIX_EPOCH
                    .checked_add(std::time::Duration::from_nanos(record.meta.time)),
                // The device's clock may show any time.
                TimeSource::Hardware | TimeSource::None => None,
            };
            return Ok(Some(Found {
                seq: record.seq,
                len: record.len.into(),
                modified,
                extents: extents.iter().map(|e| (e.off, e.len.into())).collect(),
                record: Some(record),
            }));
        }
        Err(error(Error::Busy))
    }

    fn still(&self, found: &Found) -> bool {
        found
            .record
            .is_none_or(|r| self.catalog.still(&r) == Ok(true))
    }

    fn list(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> io::Result<Vec<Vec<u8>>> {
        self.catalog
            .prefix(prefix, after)
            .take(limit)
            .map(|r| r.map(|(key, _)| key).map_err(error))
            .collect()
    }

    fn submit(&mut self, batch: &mut Batch) -> io::Result<()> {
        self.store.submit(batch).map_err(|e| e.cause)
    }
}
