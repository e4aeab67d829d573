// SPDX-License-Identifier: GPL-2.0

//! From the records on the media to a store.
//!
//! Batches in force are stored first. Then two passes over the record frames,
//! which the frame map names. The first claims every frame that a live record
//! uses, and changes nothing; then a superblock is written. The second lists the
//! records, by key, and loads the index from the sorted list, in frames that nobody
//! claimed; kills what a later record replaced; and gives empty record frames back.
//! A crash at any point of it is a crash before it.
//!
//! It takes time proportional to the number of records (their list is sorted by
//! digits; only keys that do not differ in 8 bytes after what all have in common
//! are compared), plus 1 bit for each frame of the region; and 16 bytes of memory
//! for each record with a key, 16 for each record frame, and 16 for each of those
//! that are more, until it ends.

use super::frame::{hold_all, Need};
use super::record::{key_of, parse, FrameHeader, Line, Locator, Record, LINES};
use super::superblock::probe;
use super::{batch, live, Buf, Error, Frame, Frames, Pmem, Result, Store, MAX_OBJECT};
use core::cmp::Ordering;
use core::ops::DerefMut;

/// How to recover.
#[derive(Debug, Clone, Copy, Default)]
pub struct RecoverOptions {
    /// Change nothing durable, and refuse changes later. The index is still
    /// built, in free frames. (A batch in force is stored, as a journal is.)
    pub read_only: bool,
}

/// What is loaded into a tree: 8 bytes of a key, and where the record is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IndexEntry {
    /// Bytes of the key, as a number that sorts like them.
    pub prefix: u64,
    /// Offset of the record, or of a record frame.
    pub loc: u64,
}

/// What recovery found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Report {
    /// Live records.
    pub records: u64,
    /// Live records with a key.
    pub keys: u64,
    /// Payload bytes of live records.
    pub live_bytes: u64,
    /// Records that a later one with the same key replaced; gone now.
    pub superseded: u64,
    /// Records without a key at or below the truncation point; gone now.
    pub truncated: u64,
    /// Killed records passed over.
    pub killed: u64,
    /// Lines that look like a record but have a wrong checksum: damaged, or
    /// never acknowledged and cut short.
    pub torn: u64,
    /// Record frames with live records.
    pub record_frames: u64,
    /// Record frames without, given back.
    pub empty_frames: u64,
    /// Frames marked in the map whose header is damaged, and with it lost the records
    /// that seem to be there. Given back.
    pub damaged_frames: u64,
    /// Records left alone because their extents cannot be right.
    pub bad_extents: u64,
    /// Record frames, and batch areas, that the media refused to read in part.
    pub unreadable: u64,
    /// A superblock was written anew from the other.
    pub superblock_repaired: bool,
    /// Words of atomic batches and compactions that had yet to be stored.
    pub replayed: u32,
    /// Highest sequence number found.
    pub last_seq: u64,
}

/// What a frame that the map names turned out to be.
enum Mapped {
    Records(FrameHeader),
    /// No record frame, or none any more.
    Other {
        damaged: bool,
    },
    Unreadable,
}

impl<P: Pmem, F: Frames, B: Buf> Store<P, F, B> {
    /// Attaches the store in a region: checks the superblocks, finds all records,
    /// claims their frames, builds the index in free frames.
    ///
    /// `frames` covers the data area (see [`Geometry`](super::Geometry)) and has
    /// all its frames free or bad. `work` has [`WORK_WORDS`](Self::WORK_WORDS)
    /// words, and is kept. `list` allocates that many entries, of any content,
    /// which are dropped before this returns.
    ///
    /// Errors are those of [`probe`]; [`Error::ReadOnly`] if the store has
    /// features that only allow reading and `options` does not; [`Error::NoSpace`]
    /// if no frames are left for the index; [`Error::NoMemory`] if `list` fails;
    /// [`Error::Interrupted`] if [`Pmem::go_on`] says so, and then it is as after a crash.
    pub fn recover<L: DerefMut<Target = [IndexEntry]>>(
        pm: P,
        frames: F,
        work: B,
        list: impl FnOnce(usize) -> Option<L>,
        options: RecoverOptions,
    ) -> Result<(Self, Report)> {
        let found = probe(&pm)?;
        if found.read_only && !options.read_only {
            return Err(Error::ReadOnly);
        }
        live::clear(&pm)?;
        let mut report = Report::default();
        let replayed = batch::replay(&pm, &found.superblock)?;
        (report.replayed, report.unreadable) = (replayed.words, replayed.unreadable);
        if !options.read_only {
            batch::restore(&pm, &found.superblock)?;
        }
        let mut store = Store::empty(pm, frames, work, found.superblock)?;
        store.read_only = options.read_only;
        let mut keyed = 0;
        store.claim_all(&mut report, &mut keyed)?;
        if report.last_seq >= u64::MAX / 2 {
            return Err(Error::Damaged);
        }
        store.next_seq = report.last_seq + 1;
        store.stats.durable_seq = report.last_seq;
        if !options.read_only {
            store.sb.seq_floor = report.last_seq;
            store.sb.attaches = store.sb.attaches.checked_add(1).ok_or(Error::Damaged)?;
            store.sb.write(&store.pm)?;
            report.superblock_repaired =
                found.first.is_some() || found.last.is_some() || found.stale;
        }
        store.dead_seq = store.sb.trunc_seq;
        live::begin(&store.pm, &store.sb, store.stats.durable_seq)?;
        let frames = store.stats.record_frames as usize;
        let mut list = list(keyed + frames + keyed.max(frames)).ok_or(Error::NoMemory)?;
        let (keyed, rest) = list.split_at_mut_checked(keyed).ok_or(Error::NoMemory)?;
        let (frames, spare) = rest.split_at_mut_checked(frames).ok_or(Error::NoMemory)?;
        store.index_all(&mut report, keyed, frames, spare)?;
        if !options.read_only {
            store.sync_pending()?;
        }
        store.set_keep(0);
        store.fence();
        store.publish()?;
        let stats = store.stats();
        (report.records, report.keys) = (stats.records, stats.keys);
        (report.live_bytes, report.record_frames) = (stats.live_bytes, stats.record_frames);
        live::announce(&store.pm)?;
        Ok((store, report))
    }

    fn mapped(&self, frame: Frame) -> Result<Mapped> {
        let header = FrameHeader::read(&self.pm, frame.off(), &self.sb.uuid);
        let checked = header.and_then(|header| {
            header.check_nonce(&self.pm, self.sb.salt)?;
            Ok(header)
        });
        match checked {
            Ok(header) => Ok(Mapped::Records(header)),
            Err(Error::Io) => Ok(Mapped::Unreadable),
            Err(Error::Damaged) => Ok(Mapped::Other {
                // A frame that was given back has no magic any more.
                damaged: self.pm.load(frame.off())? != 0
                    && FrameHeader::lost(&self.pm, &self.geo, &self.sb, frame.off())?,
            }),
            Err(error) => Err(error),
        }
    }

    /// Goes over a frame's lines; `each` is told of every record. False if the
    /// media refused to read some of it.
    fn walk(
        &mut self,
        header: &FrameHeader,
        report: &mut Report,
        mut each: impl FnMut(&mut Self, &mut Report, Record) -> Result<()>,
    ) -> Result<bool> {
        let mut line = 1;
        let mut readable = true;
        while line < LINES {
            self.pm.go_on()?;
            match parse(&self.pm, &self.geo, header, line) {
                Ok(Line::Put(record)) => {
                    report.last_seq = report.last_seq.max(record.seq);
                    line += u64::from(record.lines);
                    if record.seq <= self.sb.trunc_seq && !record.keyed() {
                        report.truncated += 1;
                    } else {
                        each(self, report, record)?;
                    }
                }
                Ok(Line::Killed { lines, seq }) => {
                    report.last_seq = report.last_seq.max(seq);
                    report.killed += 1;
                    line += lines;
                }
                Ok(Line::Torn) => {
                    report.torn += 1;
                    line += 1;
                }
                Ok(Line::Blank) => line += 1,
                Err(Error::Io) => {
                    readable = false;
                    line += 1;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(readable)
    }

    /// Pass 1: claims all frames that live records use; counts those with a key.
    fn claim_all(&mut self, report: &mut Report, keyed: &mut usize) -> Result<()> {
        report.last_seq = self.sb.seq_floor.max(self.sb.trunc_seq);
        let mut from = self.geo.first_frame();
        while let Some(frame) = self.geo.next_mapped(&self.pm, from)? {
            from = Frame(frame.0 + 1);
            let header = match self.mapped(frame)? {
                Mapped::Records(header) => header,
                Mapped::Other { damaged } => {
                    report.damaged_frames += u64::from(damaged);
                    self.set_aside(frame)?;
                    continue;
                }
                Mapped::Unreadable => {
                    report.unreadable += 1;
                    self.frames.claim(frame, 0)?;
                    continue;
                }
            };
            // No frame with this number shall be opened again.
            report.last_seq = report.last_seq.max(header.base_seq);
            let mut used = false;
            let readable = self.walk(&header, report, |store, report, record| {
                used = true;
                if store.check_record(&record).is_err() {
                    report.bad_extents += 1;
                    return Ok(());
                }
                // What is counted later has to be claimed now.
                store.claim_record(&record)?;
                *keyed += usize::from(record.keyed());
                Ok(())
            })?;
            if !readable {
                report.unreadable += 1;
                // One that does not go: nobody knows what is there.
                self.frames.claim(frame, 0)?;
            }
            if used || !readable {
                // The hold that goes when the frame is given back.
                self.frames.claim(frame, 0)?;
                self.stats.record_frames += 1;
            } else {
                report.empty_frames += 1;
                self.set_aside(frame)?;
            }
        }
        Ok(())
    }

    /// A frame that the map names holds no records. The index must not go there before it is out of
    /// the map, durably, or what is left of it would be taken for damage after a crash: that comes
    /// first in pass 2, if it comes.
    fn set_aside(&mut self, frame: Frame) -> Result<()> {
        if self.read_only {
            return self.frames.claim(frame, 0);
        }
        Ok(())
    }

    /// Whether a record's extents can be right.
    pub(super) fn check_record(&self, record: &Record) -> Result<()> {
        let mut len = 0u64;
        for extent in record.extents(&self.pm, &self.geo) {
            len = len.saturating_add(u64::from(extent?.len));
        }
        if len == u64::from(record.len) && len <= MAX_OBJECT {
            Ok(())
        } else {
            Err(Error::Damaged)
        }
    }

    /// Claims what one record uses.
    fn claim_record(&mut self, record: &Record) -> Result<()> {
        let (pm, geo) = (&self.pm, &self.geo);
        for extent in record.extents(pm, geo) {
            hold_all(&self.frames, core::iter::once(extent?), F::claim)?;
        }
        if let Some(extent) = record.key_extent(pm)? {
            hold_all(&self.frames, core::iter::once(extent), F::claim)?;
        }
        // A list is one record's only, but its frame may be what a forged one says that it has: then
        // each has a hold, and gives that back.
        for frame in record.lists(pm, geo) {
            self.frames.claim(frame?, 0)?;
            self.stats.list_frames += 1;
        }
        let frame = Frame::of(record.loc.frame_off()).ok_or(Error::Damaged)?;
        self.frames.claim(frame, 0)
    }

    /// Pass 2: loads the index with what pass 1 claimed; gives back the rest.
    fn index_all(
        &mut self,
        report: &mut Report,
        keyed: &mut [IndexEntry],
        frames: &mut [IndexEntry],
        spare: &mut [IndexEntry],
    ) -> Result<()> {
        let (keys, count) = self.list(keyed, frames)?;
        // See set_aside().
        if !broken!("unmap_fence") {
            self.fence();
        }
        let keyed = keyed.get_mut(..keys).ok_or(Error::Damaged)?;
        let frames = frames.get_mut(..count).ok_or(Error::Damaged)?;
        sort_by_prefix(&mut self.work, frames, spare)?;
        // Two frames with one number cannot be; the log then shows one.
        let unique = dedup(frames, |one, other| Ok(one.prefix == other.prefix))?;
        let frames = frames.get(..unique).ok_or(Error::Damaged)?;
        self.reserve_nodes_for(frames.len())?;
        self.log.load(&self.pm, &mut self.pool, frames, 0)?;

        let skip = self.common_prefix(keyed)?;
        for entry in keyed.iter_mut() {
            entry.prefix = key_of(&self.pm, entry.loc)?.prefix(&self.pm, skip)?;
        }
        sort_by_prefix(&mut self.work, keyed, spare)?;
        self.work.fill(0);
        self.sort_ties(keyed)?;
        let unique = {
            let pm = &self.pm;
            let same = |one: &IndexEntry, other: &IndexEntry| {
                if one.prefix != other.prefix {
                    return Ok(false);
                }
                Ok(compare(pm, one.loc, other.loc)?.is_eq())
            };
            dedup(keyed, same)?
        };
        let (unique, replaced) = keyed.split_at_checked(unique).ok_or(Error::Damaged)?;
        self.reserve_nodes_for(unique.len())?;
        self.keys.load(&self.pm, &mut self.pool, unique, skip)?;
        self.stats.keys = unique.len() as u64;
        report.superseded = replaced.len() as u64;
        for entry in replaced {
            self.retire_found(Locator(entry.loc))?;
        }
        Ok(())
    }

    /// Nodes to load so many entries; what pass 1 claimed stays out of reach.
    fn reserve_nodes_for(&mut self, entries: usize) -> Result<()> {
        let want = self.pool.free + super::tree::nodes_for(entries);
        self.pool.keep = want;
        self.pool
            .reserve(&self.pm, &self.frames, want, Need::Reserve)
    }

    /// Counts all live records, lists those with a key, and the record frames that have
    /// any; gives the other ones back. How many are in each list.
    fn list(
        &mut self,
        keyed: &mut [IndexEntry],
        frames: &mut [IndexEntry],
    ) -> Result<(usize, usize)> {
        let (mut from, mut keys, mut count) = (self.geo.first_frame(), 0, 0);
        // The lines were counted in pass 1.
        let mut ignored = Report::default();
        while let Some(frame) = self.geo.next_mapped(&self.pm, from)? {
            from = Frame(frame.0 + 1);
            let header = match self.mapped(frame)? {
                Mapped::Records(header) => header,
                Mapped::Other { .. } => {
                    self.unmap(frame)?;
                    continue;
                }
                Mapped::Unreadable => continue,
            };
            let mut used = false;
            let readable = self.walk(&header, &mut ignored, |store, _, record| {
                used = true;
                if store.check_record(&record).is_err() {
                    return Ok(());
                }
                store.count(record.loc)?;
                if record.keyed() {
                    // More than before: the media changed its mind.
                    keyed.get_mut(keys).ok_or(Error::Io)?.loc = record.loc.0;
                    keys += 1;
                }
                Ok(())
            })?;
            if used || !readable {
                let slot = frames.get_mut(count).ok_or(Error::Io)?;
                (slot.prefix, slot.loc) = (header.base_seq, header.off);
                count += 1;
            } else {
                self.unmap(frame)?;
            }
        }
        Ok((keys, count))
    }

    fn unmap(&mut self, frame: Frame) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.set_map(frame, false)
    }

    /// How many bytes the keys of all entries have in common.
    fn common_prefix(&self, list: &[IndexEntry]) -> Result<usize> {
        let Some(first) = list.first() else {
            return Ok(0);
        };
        let first = key_of(&self.pm, first.loc)?;
        let mut common = first.len();
        for entry in list {
            if common == 0 {
                break;
            }
            self.pm.go_on()?;
            let key = key_of(&self.pm, entry.loc)?;
            common = key.compare(&self.pm, &first, common)?.1;
        }
        Ok(common)
    }

    /// Puts entries with the same prefix in the order of their keys, and of equal
    /// keys the highest sequence number first.
    fn sort_ties(&self, mut list: &mut [IndexEntry]) -> Result<()> {
        while let Some(first) = list.first().copied() {
            let same = list.iter().take_while(|entry| entry.prefix == first.prefix);
            let same = same.count();
            let (ties, rest) = list.split_at_mut_checked(same).ok_or(Error::Damaged)?;
            heap_sort(ties, |one, other| {
                self.pm.go_on()?;
                let order = compare(&self.pm, one.loc, other.loc)?;
                let seq = |entry: &IndexEntry| self.pm.load(entry.loc.saturating_add(8));
                Ok(match order {
                    Ordering::Equal => seq(other)?.cmp(&seq(one)?),
                    order => order,
                })
            })?;
            list = rest;
        }
        Ok(())
    }

    /// Kills a record that was found to be replaced.
    fn retire_found(&mut self, loc: Locator) -> Result<()> {
        if self.read_only {
            // Nothing is killed; it only does not count.
            return self.uncount(loc);
        }
        if self.pending_full() {
            self.sync_pending()?;
        }
        self.retire(loc)
    }
}

/// Compares the keys of two records.
fn compare<P: Pmem>(pm: &P, one: u64, other: u64) -> Result<Ordering> {
    let (one, other) = (key_of(pm, one)?, key_of(pm, other)?);
    Ok(one.compare(pm, &other, usize::MAX)?.0)
}

/// Sorts by prefix, stably, digit by digit. `spare` is as long as `list`, or
/// longer; `counts` are at least 256 words of memory.
fn sort_by_prefix(
    counts: &mut [u64],
    list: &mut [IndexEntry],
    spare: &mut [IndexEntry],
) -> Result<()> {
    let spare = spare.get_mut(..list.len()).ok_or(Error::Invalid)?;
    let counts = counts.get_mut(..256).ok_or(Error::Invalid)?;
    for digit in 0..8 {
        let of = |entry: &IndexEntry| (entry.prefix >> (8 * digit)) as usize & 0xff;
        counts.fill(0);
        for entry in list.iter() {
            *counts.get_mut(of(entry)).ok_or(Error::Invalid)? += 1;
        }
        if counts.iter().any(|count| *count == list.len() as u64) {
            // All have the same.
            continue;
        }
        let mut start = 0;
        for count in counts.iter_mut() {
            start += core::mem::replace(count, start);
        }
        for entry in list.iter() {
            let at = counts.get_mut(of(entry)).ok_or(Error::Invalid)?;
            *spare.get_mut(*at as usize).ok_or(Error::Invalid)? = *entry;
            *at += 1;
        }
        list.copy_from_slice(spare);
    }
    Ok(())
}

/// Sorts in place. The order may fail, and need not even be one: then the result
/// is some permutation. (The standard sorts may panic.)
fn heap_sort(
    list: &mut [IndexEntry],
    mut order: impl FnMut(&IndexEntry, &IndexEntry) -> Result<Ordering>,
) -> Result<()> {
    let mut sift = |list: &mut [IndexEntry], mut at: usize| loop {
        let mut child = 2 * at + 1;
        let Some(left) = list.get(child) else {
            return Ok(());
        };
        if let Some(right) = list.get(child + 1) {
            if order(left, right)?.is_lt() {
                child += 1;
            }
        }
        match (list.get(at), list.get(child)) {
            (Some(parent), Some(other)) if order(parent, other)?.is_lt() => (),
            _ => return Ok(()),
        }
        list.swap(at, child);
        at = child;
    };
    for at in (0..list.len() / 2).rev() {
        sift(list, at)?;
    }
    for end in (1..list.len()).rev() {
        list.swap(0, end);
        sift(list.get_mut(..end).ok_or(Error::Invalid)?, 0)?;
    }
    Ok(())
}

/// Moves the first of each run of entries that are the `same` to the front, the
/// others behind them; how many runs there are.
fn dedup(
    list: &mut [IndexEntry],
    mut same: impl FnMut(&IndexEntry, &IndexEntry) -> Result<bool>,
) -> Result<usize> {
    let mut unique = 0;
    for at in 0..list.len() {
        let (Some(last), Some(entry)) = (list.get(unique.max(1) - 1), list.get(at)) else {
            break;
        };
        if unique == 0 || !same(last, entry)? {
            list.swap(unique, at);
            unique += 1;
        }
    }
    Ok(unique)
}
