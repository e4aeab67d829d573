// SPDX-License-Identifier: GPL-2.0-only
//! What a store for persistent memory does today: copies the body, checks it with CRC32C, keeps
//! it in a record with a time, under its key in a skip list.

use super::Store;
use super::pm::File;
use super::skiplist::SkipList;
use anyhow::{Result, anyhow};
use rustix::time::{ClockId, clock_gettime};

pub struct Manage(SkipList<File>);

impl Manage {
    pub fn new(pm: File) -> Result<Self> {
        let list = SkipList::format(pm).map_err(|e| anyhow!("cannot make a skip list: {e:?}"))?;
        Ok(Self(list))
    }
}

impl Store for Manage {
    fn put(&mut self, key: &[u8], body: &[u8]) -> Result<()> {
        // The clock that costs no system call anywhere; pmskb's records have the packet's time.
        let now = clock_gettime(ClockId::RealtimeCoarse);
        let time = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        self.0
            .put(key, body, time)
            .map_err(|e| anyhow!("cannot put {} bytes: {e:?}", body.len()))
    }

    fn commit(&mut self) -> Result<()> {
        self.0.commit().map_err(|e| anyhow!("cannot commit: {e:?}"))
    }

    fn get(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.0.get(key).map_err(|e| anyhow!("cannot get: {e:?}"))
    }
}
