// SPDX-License-Identifier: GPL-2.0

//! What the tests of the store share: a store on simulated memory, a model of
//! what it may hold after a crash, and the check of one against the other.
#![allow(dead_code)]

use pmskb_core::csum::Sum;
use pmskb_core::host::HostFrames;
use pmskb_core::sim::{Rng, SimPm};
use pmskb_core::*;
use std::collections::{BTreeMap, BTreeSet};

pub const LEN: u64 = 8 << 20;
pub type SimStore = Store<SimPm, HostFrames, Vec<u64>>;

pub fn params() -> FormatParams<'static> {
    FormatParams {
        uuid: *b"0123456789abcdef",
        label: b"test",
        heads: HeadArea::Default,
        salt: 0x5eed_5eed_1234_5678,
        time: 1_700_000_000_000_000_000,
    }
}

pub fn formatted() -> SimPm {
    let pm = SimPm::new(LEN);
    format(&pm, &params()).unwrap();
    pm
}

pub fn recover(pm: SimPm) -> Result<(SimStore, Report)> {
    let geo = probe(&pm)?.superblock.geometry;
    let frames = HostFrames::new(&geo)?;
    let work = vec![0; SimStore::WORK_WORDS];
    Store::recover(pm, frames, work, host::list, RecoverOptions::default())
}

/// Bytes that say which put they belong to.
pub fn bytes_of(tag: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng(tag);
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend(rng.next().to_le_bytes());
    }
    out.truncate(len);
    out
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Put {
        key: Vec<u8>,
        tag: u64,
        len: usize,
    },
    /// The key lies in the payload's first bytes' frame.
    PutKeyExtent {
        key: Vec<u8>,
        tag: u64,
        len: usize,
    },
    /// In so many pieces of one line, each in a frame of its own.
    PutPieces {
        key: Vec<u8>,
        tag: u64,
        pieces: usize,
    },
    Append {
        tag: u64,
        len: usize,
    },
    /// To the log; written back and fenced before.
    AppendDurable {
        tag: u64,
        len: usize,
    },
    Delete {
        key: Vec<u8>,
    },
    Commit,
    Sync,
    /// All or none of them, after a commit.
    Atomic(Vec<Op>),
    /// Staged and dropped again.
    Abort(Vec<Op>),
    /// Everything in the log that is committed.
    Truncate,
    /// All steps of a compaction.
    Compact,
    /// Attached again, as the caches left it.
    Recover,
}

/// What a store may hold: after a crash a key has one of these values.
#[derive(Debug, Clone, Default)]
pub struct Model {
    pub keys: BTreeMap<Vec<u8>, Vec<Option<(u64, usize)>>>,
    /// Records without key: acknowledged or not.
    pub log: BTreeMap<u64, (usize, bool)>,
    /// What it may hold instead, as a whole.
    pub instead: Option<Box<Model>>,
    /// The highest sequence number that somebody knows of.
    pub highest: u64,
}

impl Model {
    pub fn staged(&mut self, op: &Op) {
        match op {
            Op::Put { key, tag, len } | Op::PutKeyExtent { key, tag, len } => self
                .keys
                .entry(key.clone())
                .or_insert_with(|| vec![None])
                .push(Some((*tag, *len))),
            Op::PutPieces { key, tag, pieces } => self
                .keys
                .entry(key.clone())
                .or_insert_with(|| vec![None])
                .push(Some((*tag, *pieces * 64))),
            Op::Delete { key } => {
                if let Some(values) = self.keys.get_mut(key) {
                    values.push(None);
                }
            }
            Op::Append { tag, len } | Op::AppendDurable { tag, len } => {
                self.log.insert(*tag, (*len, false));
            }
            Op::Truncate => self.log.clear(),
            _ => (),
        }
    }

    /// What it will be when all of `ops` are done.
    pub fn after(&self, ops: &[Op]) -> Box<Model> {
        let mut after = self.clone();
        ops.iter().for_each(|op| after.staged(op));
        after.committed();
        Box::new(after)
    }

    pub fn committed(&mut self) {
        for values in self.keys.values_mut() {
            values.drain(..values.len() - 1);
        }
        for (_, acknowledged) in self.log.values_mut() {
            *acknowledged = true;
        }
    }
}

/// A driver that does what a host does: fills frames, puts, commits, lets go.
pub struct Driver {
    pub store: SimStore,
    pub model: Model,
    /// The memory to look at, while it is not the store's.
    pub crashed: Option<SimPm>,
    held: Vec<Frame>,
}

impl Driver {
    pub fn new(store: SimStore) -> Self {
        Driver {
            store,
            model: Model::default(),
            crashed: None,
            held: Vec::new(),
        }
    }

    /// Frames filled with `bytes`, in pieces of one frame, not always adjacent.
    pub fn fill(&mut self, bytes: &[u8]) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        for part in bytes.chunks(4096) {
            let frame = self
                .store
                .frames()
                .alloc(None, Need::New)
                .ok_or(Error::NoSpace)?;
            self.held.push(frame);
            self.store.pm().write(frame.off(), part)?;
            extents.push(Extent::new(frame.off(), part.len() as u32));
        }
        Ok(extents)
    }

    pub fn let_go(&mut self) {
        for frame in self.held.drain(..) {
            let _ = self.store.frames().unhold(frame, 0);
        }
    }

    pub fn run(&mut self, op: &Op) -> Result<()> {
        if !matches!(op, Op::Truncate) {
            self.model.staged(op);
        }
        match op {
            Op::Put { key, tag, len } => {
                let bytes = bytes_of(*tag, *len);
                let extents = self.fill(&bytes)?;
                self.put(Key::Bytes(key), &extents, &bytes)
            }
            Op::PutKeyExtent { key, tag, len } => {
                let bytes = bytes_of(*tag, *len);
                let at = self.fill(key)?;
                let extents = self.fill(&bytes)?;
                self.put(Key::Extent(at[0]), &extents, &bytes)
            }
            Op::PutPieces { key, tag, pieces } => {
                let bytes = bytes_of(*tag, *pieces * 64);
                let mut extents = Vec::new();
                for part in bytes.chunks(64) {
                    extents.extend(self.fill(part)?);
                    // So that they are not merged.
                    self.fill(&[])?;
                }
                self.put(Key::Bytes(key), &extents, &bytes)
            }
            Op::Append { tag, len } => {
                let bytes = bytes_of(*tag, *len);
                let extents = self.fill(&bytes)?;
                self.put(Key::None, &extents, &bytes)
            }
            Op::AppendDurable { tag, len } => {
                let bytes = bytes_of(*tag, *len);
                let extents = self.fill(&bytes)?;
                for extent in &extents {
                    self.store.pm().flush(extent.off, u64::from(extent.len))?;
                }
                self.store.pm().fence();
                let args = put_args(Key::None, &extents, &bytes);
                self.store.put_durable(&args).map(|_| ())
            }
            Op::Delete { key } => match self.store.delete(key, None) {
                Err(Error::NotFound) => Ok(()),
                other => other.map(|_| ()),
            },
            Op::Commit => {
                self.store.commit()?;
                self.model.committed();
                self.model.highest = self.store.stats().durable_seq;
                self.let_go();
                Ok(())
            }
            Op::Sync => self.store.sync_pending(),
            Op::Atomic(ops) => {
                self.run(&Op::Commit)?;
                self.store.begin_atomic()?;
                self.model.instead = Some(self.model.after(ops));
                self.stage_all(ops)?;
                self.store.commit()?;
                self.settle_instead();
                self.model.highest = self.store.stats().durable_seq;
                Ok(())
            }
            Op::Abort(ops) => {
                self.run(&Op::Commit)?;
                self.store.begin_atomic()?;
                self.stage_all(ops)?;
                self.store.abort();
                self.let_go();
                Ok(())
            }
            Op::Truncate => {
                self.run(&Op::Commit)?;
                self.model.instead = Some(self.model.after(&[Op::Truncate]));
                self.store.truncate(u64::MAX)?;
                self.settle_instead();
                while self.store.drain(2)? {}
                Ok(())
            }
            Op::Compact => {
                self.run(&Op::Commit)?;
                let mut from = Some(0);
                let mut scratch = [Extent::new(0, 0); 600];
                while let Some(at) = from {
                    from = self.store.compact(at, &mut scratch)?.next;
                }
                Ok(())
            }
            Op::Recover => {
                self.run(&Op::Commit)?;
                self.store = recover(self.store.pm().clone())?.0;
                Ok(())
            }
        }
    }

    fn stage_all(&mut self, ops: &[Op]) -> Result<()> {
        let model = self.model.clone();
        let done = ops.iter().try_for_each(|op| self.run(op));
        self.model = model;
        done
    }

    /// What may be instead has come true.
    pub fn settle_instead(&mut self) {
        if let Some(after) = self.model.instead.take() {
            self.model = *after;
        }
        self.let_go();
    }

    fn put(&mut self, key: Key<'_>, extents: &[Extent], bytes: &[u8]) -> Result<()> {
        let args = put_args(key, extents, bytes);
        self.store.put(&args).map(|_| ())
    }
}

fn put_args<'a>(key: Key<'a>, extents: &'a [Extent], bytes: &[u8]) -> PutArgs<'a> {
    let meta = Meta {
        csum: Sum::of(bytes),
        csum_kind: CsumKind::Computed,
        payload_crc: Some(crc32c_software(0, bytes)),
        ..Meta::default()
    };
    PutArgs {
        key,
        extents,
        meta,
        mode: PutMode::Upsert,
        if_seq: None,
    }
}

/// Lines that live records or the areas before the data area consist of, and
/// that a crash now could lose.
pub fn unflushed(store: &SimStore) -> Vec<u64> {
    let mut needed = BTreeSet::new();
    let mut add = |off: u64, len: u64| {
        needed.extend(off / LINE_SIZE..(off + len).div_ceil(LINE_SIZE));
    };
    for record in log_of(store) {
        add(record.loc.0, u64::from(record.lines) * LINE_SIZE);
        add(record.loc.0 / FRAME_SIZE * FRAME_SIZE, LINE_SIZE);
        let extents = record.extents(store.pm(), store.geometry());
        let key = record.key_extent(store.pm()).unwrap();
        for extent in extents.map(Result::unwrap).chain(key) {
            add(extent.off, u64::from(extent.len));
        }
    }
    let data = store.geometry().data_off / LINE_SIZE;
    let lines = store.pm().unsafe_lines().into_iter();
    lines
        .filter(|line| *line < data || needed.contains(line))
        .collect()
}

pub fn log_of(store: &SimStore) -> Vec<Record> {
    let mut out: Vec<Record> = Vec::new();
    let mut next = store.log_from(0).unwrap();
    while let Some(record) = next {
        next = store.log_after(&record).unwrap();
        out.push(record);
    }
    out
}

pub fn key_of(store: &SimStore, record: &Record) -> Vec<u8> {
    let mut key = vec![0; usize::from(record.key_len.unwrap_or(0))];
    record.read_key(store.pm(), 0, &mut key).unwrap();
    key
}

pub fn object_of(store: &SimStore, record: &Record) -> Vec<u8> {
    let mut bytes = vec![0; record.len as usize];
    let read = record.read(store.pm(), store.geometry(), 0, &mut bytes);
    assert_eq!(read, Ok(record.len as usize));
    bytes
}

/// Whether the store holds what the model allows, in order, with every byte.
pub fn check(store: &SimStore, model: &Model) -> std::result::Result<(), String> {
    match (check_one(store, model), &model.instead) {
        (Err(one), Some(instead)) => {
            check_one(store, instead).map_err(|other| format!("{one}, or {other}"))
        }
        (done, _) => done,
    }
}

fn check_one(store: &SimStore, model: &Model) -> std::result::Result<(), String> {
    let last = store.stats().durable_seq;
    if last < model.highest {
        return Err(format!(
            "{} may be given out again: {last} is the last one",
            model.highest
        ));
    }
    let mut buf = [0; 512];
    let mut keys = BTreeSet::new();
    let mut log = BTreeSet::new();
    let mut seq = 0;
    for record in log_of(store) {
        if record.seq <= seq {
            return Err(format!("log out of order at {}", record.seq));
        }
        seq = record.seq;
        let verdict = record.verify(store.pm(), store.geometry(), &mut buf);
        if verdict != Ok(Verdict::Intact) {
            return Err(format!("record {seq}: {verdict:?}"));
        }
        let bytes = object_of(store, &record);
        if record.keyed() {
            let key = key_of(store, &record);
            let allowed = model.keys.get(&key).cloned().unwrap_or_default();
            let right = |(tag, len): &(u64, usize)| bytes_of(*tag, *len) == bytes;
            if !allowed.iter().flatten().any(right) {
                return Err(format!("key {key:?} has a value never given to it"));
            }
            if store.lookup(&key) != Ok(Some(record.loc)) || !keys.insert(key) {
                return Err("a key is not found, or twice".into());
            }
        } else {
            let tag = model
                .log
                .iter()
                .find(|(tag, (len, _))| bytes_of(**tag, *len) == bytes);
            match tag {
                Some((tag, _)) if log.insert(*tag) => (),
                _ => return Err(format!("log record {seq} unknown or twice")),
            }
        }
    }
    for (key, allowed) in &model.keys {
        if !keys.contains(key) && !allowed.contains(&None) {
            return Err(format!("key {key:?} is lost"));
        }
    }
    for (tag, (_, acknowledged)) in &model.log {
        if *acknowledged && !log.contains(tag) {
            return Err(format!("log record {tag} is lost"));
        }
    }
    let mut at = None;
    let mut ordered = Vec::new();
    while let Some(loc) = store
        .seek(at.as_deref(), false, Direction::Forward)
        .map_err(|error| format!("{error:?}"))?
    {
        let key = key_of(
            store,
            &store.record(loc).map_err(|error| format!("{error:?}"))?,
        );
        ordered.push(key.clone());
        at = Some(key);
    }
    if !ordered.iter().eq(keys.iter()) {
        return Err(format!("index {ordered:?} is not {keys:?}"));
    }
    check_space(store)
}

/// Whether each frame is free or has a reason not to be.
pub fn check_space(store: &SimStore) -> std::result::Result<(), String> {
    let mut used = BTreeSet::new();
    let (mut bytes, mut keys) = (0, 0);
    let records = log_of(store);
    for record in &records {
        used.insert(record.loc.0 / FRAME_SIZE);
        for extent in record.extents(store.pm(), store.geometry()) {
            used.extend(extent.unwrap().frames().map(|frame| u64::from(frame.0)));
        }
        if let Some(extent) = record.key_extent(store.pm()).unwrap() {
            used.extend(extent.frames().map(|frame| u64::from(frame.0)));
            keys += u64::from(extent.len);
        }
        bytes += u64::from(record.len);
    }
    let stats = store.stats();
    let counts = store.frames().0.borrow().counts();
    let sum = counts.free + counts.limbo + counts.owned + counts.held + counts.bad;
    if sum != counts.total {
        return Err(format!("frames do not add up: {counts:?}"));
    }
    if (stats.records, stats.live_bytes) != (records.len() as u64, bytes) {
        return Err(format!(
            "{stats:?} but {} records, {bytes} bytes",
            records.len()
        ));
    }
    // No two records share bytes here.
    let payload = u64::from(counts.payload) * FRAME_SIZE;
    // (Of a store that is only read, what was replaced holds frames still.)
    if !store.read_only() && payload != bytes + keys + counts.slack {
        return Err(format!(
            "{payload} bytes in payload frames: {bytes} of records, {keys} of keys, {}",
            counts.slack
        ));
    }
    let busy = u64::from(counts.owned + counts.held);
    let right = used.len() as u64 + stats.list_frames + stats.index_frames;
    // The open record frame may have no record, empty ones may wait for a fence, and
    // the frame that compaction fills may have nothing that is alive.
    let waiting = 1 + stats.empty_frames + u64::from(stats.moved_bytes > 0);
    if busy < right || busy > right + waiting {
        return Err(format!(
            "{busy} frames in use, {right} have a reason: {stats:?}"
        ));
    }
    Ok(())
}
