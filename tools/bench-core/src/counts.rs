// SPDX-License-Identifier: GPL-2.0

//! What an operation does to persistent memory, on simulated memory.

use crate::filler::core;
use anyhow::{anyhow, Result};
use pmskb_core::host::HostFrames;
use pmskb_core::sim::{SimCounts, SimPm};
use pmskb_core::*;
use serde_json::{json, Value};
use std::cell::Cell;

/// Simulated memory that remembers what had been stored at the last fence: what
/// came later is the index and the counters, which nobody writes back.
struct Fenced {
    sim: SimPm,
    at_fence: Cell<u64>,
}

impl Pmem for Fenced {
    fn len(&self) -> u64 {
        self.sim.len()
    }
    fn read(&self, off: u64, to: &mut [u8]) -> pmskb_core::Result<()> {
        self.sim.read(off, to)
    }
    fn load(&self, off: u64) -> pmskb_core::Result<u64> {
        self.sim.load(off)
    }
    fn write(&self, off: u64, from: &[u8]) -> pmskb_core::Result<()> {
        self.sim.write(off, from)
    }
    fn store(&self, off: u64, value: u64) -> pmskb_core::Result<()> {
        self.sim.store(off, value)
    }
    fn flush(&self, off: u64, len: u64) -> pmskb_core::Result<()> {
        self.sim.flush(off, len)
    }
    fn fence(&self) {
        self.sim.fence();
        self.at_fence.set(self.sim.counts().bytes);
    }
    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        self.sim.crc32c(crc, data)
    }
}

type SimStore = Store<Fenced, HostFrames, Vec<u64>>;

fn put(store: &mut SimStore, key: Key<'_>, frame: Frame) -> Result<()> {
    let extents = [Extent::new(frame.off(), 1024)];
    core(store.put(&args(key, &extents))).map(|_| ())
}

/// Appends what is written back and fenced already, uncounted.
fn append_durable(store: &mut SimStore, frames: &[Frame]) -> Result<()> {
    for frame in frames {
        core(store.pm().flush(frame.off(), 1024))?;
    }
    store.pm().fence();
    store.pm().sim.reset_counts();
    for frame in frames {
        let extents = [Extent::new(frame.off(), 1024)];
        core(store.put_durable(&args(Key::None, &extents)))?;
    }
    Ok(())
}

fn args<'a>(key: Key<'a>, extents: &'a [Extent]) -> PutArgs<'a> {
    PutArgs {
        key,
        extents,
        meta: Meta::default(),
        mode: PutMode::Upsert,
        if_seq: None,
    }
}

/// A store with a few records in it, so that it has an open record frame and index
/// nodes, and frames with 1 KiB each of which nothing was written back.
fn prepared() -> Result<(SimStore, Vec<Frame>)> {
    let sim = SimPm::new(32 << 20);
    let params = FormatParams {
        uuid: *b"pmskb-bench-core",
        label: b"",
        heads: HeadArea::Default,
        salt: 1,
        time: 0,
    };
    core(format(&sim, &params))?;
    let geo = core(probe(&sim))?.superblock.geometry;
    let pm = Fenced {
        sim,
        at_fence: Cell::new(0),
    };
    let work = vec![0; SimStore::WORK_WORDS];
    let frames = core(HostFrames::new(&geo))?;
    let (mut store, _) = core(Store::recover(
        pm,
        frames,
        work,
        host::list,
        RecoverOptions::default(),
    ))?;
    let mut frames = Vec::new();
    for _ in 0..110 {
        let frame = store.frames().alloc(None, Need::New);
        let frame = frame.ok_or_else(|| anyhow!("no frame"))?;
        core(store.pm().write(frame.off(), &[0x5a; 1024]))?;
        frames.push(frame);
    }
    for n in 0..8 {
        let frame = frames.pop().ok_or_else(|| anyhow!("no frame"))?;
        let key = [b"the first record", b"another record.."][usize::from(n > 0)];
        put(&mut store, Key::Bytes(key), frame)?;
        core(store.commit())?;
    }
    core(store.sync_pending())?;
    Ok((store, frames))
}

struct Row {
    what: &'static str,
    operations: u64,
    payload: u64,
    counts: SimCounts,
    durable: u64,
}

fn measure(
    what: &'static str,
    operations: u64,
    payload: u64,
    run: impl FnOnce(&mut SimStore, &[Frame]) -> Result<()>,
) -> Result<Row> {
    let (mut store, frames) = prepared()?;
    store.pm().sim.reset_counts();
    run(&mut store, &frames)?;
    core(store.commit())?;
    Ok(Row {
        what,
        operations,
        payload,
        counts: store.pm().sim.counts(),
        durable: store.pm().at_fence.get(),
    })
}

/// The table of counts, and the same for programs.
pub fn run() -> Result<(String, Value)> {
    let rows = [
        measure("put of 1 KiB, key of 16 bytes", 1, 16, |store, frames| {
            put(store, Key::Bytes(b"0123456789abcdef"), frames[0])
        })?,
        measure("append of 1 KiB to the log", 1, 16, |store, frames| {
            put(store, Key::None, frames[0])
        })?,
        measure(
            "append of 1 KiB that is durable already",
            1,
            0,
            |store, frames| append_durable(store, &frames[..1]),
        )?,
        measure("100 such appends in one array", 100, 0, |store, frames| {
            append_durable(store, &frames[..100])
        })?,
        measure("100 puts in one array", 100, 1600, |store, frames| {
            for (n, frame) in frames.iter().take(100).enumerate() {
                let key = format!("0123456789abc{n:03}");
                put(store, Key::Bytes(key.as_bytes()), *frame)?;
            }
            Ok(())
        })?,
        measure("replace by 1 KiB", 1, 16, |store, frames| {
            put(store, Key::Bytes(b"the first record"), frames[0])
        })?,
        measure("the commit after a replace", 1, 16, |store, frames| {
            put(store, Key::Bytes(b"the first record"), frames[0])?;
            core(store.commit())?;
            store.pm().sim.reset_counts();
            put(store, Key::Bytes(b"0123456789abcdef"), frames[1])
        })?,
        measure("delete", 1, 0, |store, _| {
            core(store.delete(b"the first record", None)).map(|_| ())
        })?,
    ];
    let mut text = String::from(
        "| operation, then commit | payload lines | other lines | fences | bytes stored besides payload, durable | then, in the index |\n\
         | --- | --: | --: | --: | --: | --: |\n",
    );
    let mut out = Vec::new();
    for row in rows {
        let counts = row.counts;
        let index = counts.bytes - row.durable;
        let lines = counts.lines.saturating_sub(row.payload);
        text += &format!(
            "| {} | {} | {lines} | {} | {} | {index} |\n",
            row.what, row.payload, counts.fences, row.durable
        );
        out.push(json!({
            "what": row.what, "operations": row.operations, "payload_lines": row.payload,
            "other_lines": lines, "clean_lines": counts.clean, "fences": counts.fences,
            "durable_bytes": row.durable, "index_bytes": index,
        }));
    }
    Ok((text, out.into()))
}
