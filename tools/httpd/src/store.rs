// SPDX-License-Identifier: GPL-2.0-only

//! What the server needs of a store.

use std::{
    fs::File,
    io,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use pmskb_uapi::{core::Error, sys, Batch, Catalog, Mapping};

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
}

/// A store, as the server uses it.
pub trait Store: Memory {
    /// The record with a key.
    fn find(&self, key: &[u8]) -> io::Result<Option<Found>>;
    /// The same, with a file of its bytes, which stay what they are.
    fn open(&self, key: &[u8]) -> io::Result<Option<(Found, File)>>;
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

/// When a record was received, by this host's clock.
fn modified(time: u64, source: u32) -> Option<SystemTime> {
    match source {
        sys::PMSKB_TIME_SOFTWARE | sys::PMSKB_TIME_PLACEMENT => {
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(time))
        }
        // The device's clock may show any time.
        _ => None,
    }
}

impl Store for Device {
    fn find(&self, key: &[u8]) -> io::Result<Option<Found>> {
        let record = self.catalog.get(key).map_err(error)?;
        Ok(record.map(|r| Found {
            seq: r.seq,
            len: r.len.into(),
            modified: modified(r.meta.time, r.meta.time_source as u32),
        }))
    }

    fn open(&self, key: &[u8]) -> io::Result<Option<(Found, File)>> {
        let object = self.store.open_key(key).map_err(|e| e.cause)?;
        Ok(object.map(|o| {
            let found = Found {
                seq: o.seq(),
                len: o.len(),
                modified: modified(o.time(), o.time_source().into()),
            };
            (found, o.into_file())
        }))
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
