// SPDX-License-Identifier: GPL-2.0

//! A store and somebody who puts into it, as the module's receive path does.

use crate::map::Region;
use anyhow::{anyhow, Result};
use pmskb_core::host::HostFrames;
use pmskb_core::sim::Rng;
use pmskb_core::*;

pub type MapStore<'a> = Store<&'a Region, HostFrames, Vec<u64>>;
/// What all stores of the comparison have as keys.
pub type BenchKey = [u8; 16];

/// Operations of a batch when a store is filled.
const BATCH: u64 = 1000;

/// The core's errors, as those of a program.
pub fn core<T>(result: pmskb_core::Result<T>) -> Result<T> {
    result.map_err(|error| anyhow!("the core says {error:?}"))
}

/// Key number `n`: no two are the same, and they are in no order.
pub fn key(n: u64) -> BenchKey {
    let mut rng = Rng(n);
    let mut key = [0; 16];
    key[..8].copy_from_slice(&rng.next().to_be_bytes());
    key[8..].copy_from_slice(&n.to_be_bytes());
    key
}

/// Formats a region.
pub fn format(map: &Region) -> Result<()> {
    let params = FormatParams {
        uuid: *b"pmskb-bench-core",
        label: b"bench",
        heads: HeadArea::Default,
        salt: 0x0123_4567_89ab_cdef,
        time: 0,
    };
    core(pmskb_core::format(&map, &params)).map(|_| ())
}

/// The frame table and the working memory that a recovery needs.
pub fn host(map: &Region) -> Result<(HostFrames, Vec<u64>)> {
    let geo = core(probe(&map))?.superblock.geometry;
    Ok((core(HostFrames::new(&geo))?, vec![0; MapStore::WORK_WORDS]))
}

/// Attaches a region's store.
pub fn attach(map: &Region) -> Result<(MapStore<'_>, Report)> {
    let (frames, work) = host(map)?;
    core(Store::recover(
        map,
        frames,
        work,
        host::list,
        RecoverOptions::default(),
    ))
}

/// Puts objects that lie one after the other in frames.
pub struct Filler<'a> {
    pub store: MapStore<'a>,
    /// The frame being filled, held.
    frame: Option<Frame>,
    used: u32,
}

impl<'a> Filler<'a> {
    pub fn new(store: MapStore<'a>) -> Self {
        Filler {
            store,
            frame: None,
            used: 0,
        }
    }

    /// Room for `len` bytes, at most a frame, which stays held until the next call
    /// that needs another frame.
    pub fn room(&mut self, len: u32) -> Result<Extent> {
        let frame = match self.frame {
            Some(frame) if u64::from(self.used + len) <= FRAME_SIZE => frame,
            full => {
                if let Some(full) = full {
                    core(self.store.frames().unhold(full, 0))?;
                }
                self.used = 0;
                let frame = self.store.frames().alloc(None, Need::New);
                let frame = frame.ok_or_else(|| anyhow!("the region is too small"))?;
                *self.frame.insert(frame)
            }
        };
        let extent = Extent::new(frame.off() + u64::from(self.used), len);
        self.used += len;
        Ok(extent)
    }

    /// Stages one object.
    pub fn put(&mut self, key: Key<'_>, extent: Extent) -> Result<()> {
        let args = PutArgs {
            key,
            extents: &[extent],
            meta: Meta::default(),
            mode: PutMode::Upsert,
            if_seq: None,
        };
        core(self.store.put(&args)).map(|_| ())
    }

    /// Puts records `range` of `len` bytes, in batches. The bytes are not written.
    pub fn fill(&mut self, range: std::ops::Range<u64>, len: u32, keyed: bool) -> Result<()> {
        let map = *self.store.pm();
        map.set_write_back(false);
        for n in range {
            let extent = self.room(len)?;
            let bytes = key(n);
            let key = if keyed { Key::Bytes(&bytes) } else { Key::None };
            self.put(key, extent)?;
            if n % BATCH == BATCH - 1 {
                core(self.store.commit())?;
            }
        }
        core(self.store.commit())?;
        map.set_write_back(true);
        Ok(())
    }

    /// Lets go of the frame being filled.
    pub fn finish(mut self) -> Result<MapStore<'a>> {
        if let Some(frame) = self.frame.take() {
            core(self.store.frames().unhold(frame, 0))?;
        }
        Ok(self.store)
    }
}
