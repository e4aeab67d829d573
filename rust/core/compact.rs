// SPDX-License-Identifier: GPL-2.0

//! Compaction: what is alive moves out of frames that have little in them.
//!
//! A step takes a run of record frames that follow each other in the log and
//! writes their live records, with their sequence numbers, into one new record
//! frame. Payload that lies in frames of which records use at most half moves with
//! them, into frames that are filled with nothing else. The header of the new
//! frame becomes valid and those of the old ones invalid in one batch, so that at
//! each instant every record is there once. Its checksum is verified before a
//! record's payload is moved; what is damaged stays where it is.

use super::batch::Batch;
use super::frame::{hold_all, unhold_all, Frames, Need};
use super::node::Kind;
use super::record::{
    key_of, kill_word, read_dead, Draft, FrameHeader, KeySrc, Locator, Record, Verdict,
    INLINE_LINES, LINES,
};
use super::tree::{find, Goal};
use super::{live, Buf, Error, Extent, Frame, Packer, Pmem, Result, Store, FRAME_SIZE, LINE_SIZE};

/// Record frames that one step looks at, at most.
const LOOK_AT: u32 = 64;
/// Record frames that one step moves, at most.
const MAX_GROUP: usize = 16;
/// Payload bytes that one step moves, about: bounds how long a step takes.
const MAX_MOVE: u64 = 256 << 10;
/// Objects above this stay where they are: their frames are full but for two.
const MAX_MOVED_OBJECT: u32 = 64 << 10;
/// A frame is sparse if records use no more of it.
const SPARSE: u32 = (FRAME_SIZE / 2) as u32;

/// What one step of [`Store::compact`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Compacted {
    /// Where the next step goes on, or none if this was the end of the log.
    pub next: Option<u64>,
    /// Records rewritten.
    pub records: u32,
    /// Payload bytes copied.
    pub bytes: u64,
}

/// Frames that were filled while one record was copied: two extents fill more than one,
/// so there are no more of them.
struct Full {
    frames: [Option<Frame>; 2 * (MAX_MOVED_OBJECT / FRAME_SIZE as u32) as usize + 2],
    count: usize,
}

impl Default for Full {
    fn default() -> Self {
        let frames = [None; 2 * (MAX_MOVED_OBJECT / FRAME_SIZE as u32) as usize + 2];
        Full { frames, count: 0 }
    }
}

/// What a record frame has in it.
#[derive(Clone, Copy)]
struct Gauge {
    header: FrameHeader,
    /// Lines of its live records, at most, wherever they move.
    lines: u64,
    /// Payload bytes that would be moved.
    bytes: u64,
}

impl<P: Pmem, F: Frames, B: Buf> Store<P, F, B> {
    /// One step of compaction, over records from sequence number `from` on: moves
    /// at most 63 records and about 256 KiB. Commits what is staged first. Frames
    /// come back with the next step, commit or [`sync_pending`](Self::sync_pending).
    ///
    /// `scratch` is memory for the extents of one record; frames with records that
    /// have more stay as they are. [`Error::NoSpace`] if there is no frame to move
    /// to; nothing has changed then.
    pub fn compact(&mut self, from: u64, scratch: &mut [Extent]) -> Result<Compacted> {
        self.writable()?;
        self.commit()?;
        self.sync_pending()?;
        if self.drain(256)? {
            let next = Some(from);
            return Ok(Compacted {
                next,
                ..Compacted::default()
            });
        }
        let mut at = from;
        let mut before: Option<Gauge> = None;
        for _ in 0..LOOK_AT {
            let header = match self.frame_from(at) {
                Ok(Some(header)) => header,
                Ok(None) => return Ok(Compacted::default()),
                Err(Error::Io) => {
                    // It stays, and nothing moves across it: the log has an order.
                    at = self.unreadable_from(at)?.saturating_add(1);
                    before = None;
                    continue;
                }
                Err(error) => return Err(error),
            };
            at = header.base_seq.saturating_add(1);
            let gauge = self.gauge(&header, scratch.len())?;
            let worth = match (&before, &gauge) {
                // Two that fit one frame, or one with payload to move.
                (Some(one), Some(two)) if one.lines + two.lines < LINES => Some(*one),
                (_, Some(two)) if two.bytes > 0 => Some(*two),
                _ => None,
            };
            if let Some(first) = worth {
                return self.compact_from(first, scratch);
            }
            before = gauge;
        }
        Ok(Compacted {
            // The last one may fit with the one after it.
            next: Some(before.map_or(at, |gauge| gauge.header.base_seq)),
            ..Compacted::default()
        })
    }

    /// The first record frame with a base sequence number of `from` or more.
    /// [`Error::Io`] if it cannot be read, see [`unreadable_from`](Self::unreadable_from).
    pub(super) fn frame_from(&self, from: u64) -> Result<Option<FrameHeader>> {
        match self.loc_from(from)? {
            Some(loc) => FrameHeader::read(&self.pm, loc, &self.sb.uuid).map(Some),
            None => Ok(None),
        }
    }

    fn loc_from(&self, from: u64) -> Result<Option<u64>> {
        let key = from.to_be_bytes();
        let goal = Goal::Above { inclusive: true };
        let key = KeySrc::Bytes(&key);
        let found = find(&self.pm, Kind::Log, live::LOG_ROOT, &key, goal)?;
        Ok(found.map(|found| found.loc))
    }

    /// The base sequence number of the frame that [`frame_from`](Self::frame_from) could
    /// not read. The index knows it: it is the highest one from which on that frame is
    /// the first.
    pub(super) fn unreadable_from(&self, from: u64) -> Result<u64> {
        let loc = self.loc_from(from)?;
        if loc.is_none() {
            return Err(Error::Io);
        }
        let (mut low, mut high) = (from, self.next_seq.max(from));
        while low < high {
            let mid = low + (high - low).div_ceil(2);
            if self.loc_from(mid)? == loc {
                low = mid;
            } else {
                high = mid - 1;
            }
        }
        Ok(low)
    }

    /// Whether an extent is to be moved: it fits one frame, and lies in one of which
    /// records use little, or across the border of such a one.
    fn sparse(&self, extent: Extent) -> bool {
        let filling = self.fill.map(|(frame, _)| frame);
        u64::from(extent.len) <= FRAME_SIZE
            && extent.frames().any(|frame| {
                Some(frame) != filling && (1..=SPARSE).contains(&self.frames.used(frame))
            })
    }

    /// What is in a frame; none if it must stay as it is.
    fn gauge(&mut self, header: &FrameHeader, max_extents: usize) -> Result<Option<Gauge>> {
        if self.open.is_some_and(|open| open.header.off == header.off) {
            return Ok(None);
        }
        let (mut lines, mut bytes, mut movable) = (0, 0, true);
        let mut records = 0;
        self.each_record(header, |store, record| {
            records += 1;
            lines += u64::from(record.lines);
            if record.listed() {
                // Side by side, its extents may be too few for a list.
                lines += INLINE_LINES;
            }
            // What cannot be right holds nothing, and no key leads to it.
            if record.nr_extents as usize > max_extents || store.check_record(record).is_err() {
                movable = false;
                return Ok(());
            }
            let (pm, geo) = (&store.pm, &store.geo);
            let mut sparse = 0;
            for extent in record
                .extents(pm, geo)
                .chain(record.key_extent(pm)?.map(Ok))
            {
                match extent {
                    Ok(extent) if store.sparse(extent) => sparse += u64::from(extent.len),
                    Ok(_) => (),
                    Err(_) => movable = false,
                }
            }
            if sparse > 0 && movable && record.len <= MAX_MOVED_OBJECT {
                let mut part = [0u8; 256];
                match record.verify(pm, geo, &mut part) {
                    Ok(Verdict::Intact | Verdict::Unchecked) => bytes += sparse,
                    _ => movable = false,
                }
            }
            Ok(())
        })?;
        // What is damaged or cannot be read, and held something, stays where it is.
        movable &= self.holds_only(header, records)?;
        let header = *header;
        Ok((movable && lines < LINES).then_some(Gauge {
            header,
            lines,
            bytes,
        }))
    }

    /// Moves a frame's records, and those of frames after it that fit.
    fn compact_from(&mut self, first: Gauge, scratch: &mut [Extent]) -> Result<Compacted> {
        let mut group = [first.header; MAX_GROUP];
        let (mut count, mut lines) = (1, first.lines);
        let mut at = first.header.base_seq.saturating_add(1);
        let mut next = None;
        loop {
            let header = match self.frame_from(at) {
                Ok(Some(header)) => header,
                Ok(None) => break,
                Err(Error::Io) => {
                    next = Some(at);
                    break;
                }
                Err(error) => return Err(error),
            };
            let gauge = self.gauge(&header, scratch.len())?;
            match (gauge, group.get_mut(count)) {
                (Some(gauge), Some(slot)) if lines + gauge.lines < LINES => *slot = header,
                _ => {
                    next = Some(header.base_seq);
                    break;
                }
            }
            lines += gauge.map_or(0, |gauge| gauge.lines);
            at = header.base_seq.saturating_add(1);
            count += 1;
        }
        let group = group.get(..count).ok_or(Error::Invalid)?;
        let mut done = Compacted {
            next,
            ..Compacted::default()
        };
        let to = self.frames.alloc(None, Need::Reserve);
        let to = to.ok_or(Error::NoSpace)?;
        let filled = self.fill_frame(group, to, scratch, &mut done);
        let (header, word, batch) = match filled {
            Ok(Some(filled)) => filled,
            // No space, or a record that could be read a moment ago.
            Err(Error::NoSpace) | Ok(None) => {
                let undone = self.unfill(to);
                self.failed = undone.is_err();
                let error = filled.err().unwrap_or(Error::Io);
                return undone.and(Err(error));
            }
            Err(error) => {
                self.failed = true;
                return Err(error);
            }
        };
        let moved = self.commit_move(group, &header, word, &batch);
        self.failed = moved.is_err();
        self.stats.moved_records += u64::from(done.records);
        self.stats.moved_bytes += done.bytes;
        moved.map(|()| done)
    }

    /// Writes the live records of `group` into the frame `to`, which does not
    /// count yet. None if one of them cannot be read any more.
    fn fill_frame(
        &mut self,
        group: &[FrameHeader],
        to: Frame,
        scratch: &mut [Extent],
        done: &mut Compacted,
    ) -> Result<Option<(FrameHeader, u64, Batch)>> {
        let base_seq = group.first().ok_or(Error::Invalid)?.base_seq;
        self.blank(to)?;
        let (header, word) = self.write_header(to, base_seq, false)?;
        // So that `unfill` sees where the records end.
        for line in 1..LINES {
            self.pm.store(to.off() + line * LINE_SIZE, 0)?;
        }
        let mut line = 1;
        let mut batch = Batch::new(self.batch_number);
        batch.push(&self.pm, to.off(), word)?;
        for from in group {
            let mut records = 0;
            self.each_record(from, |store, record| {
                let loc = Locator(to.off() + line * LINE_SIZE);
                line += store.copy_record(record, loc, header.nonce, scratch, done)?;
                records += 1;
                Ok(())
            })?;
            if !broken!("compact_unread") && !self.holds_only(from, records)? {
                return Ok(None);
            }
            batch.push(&self.pm, from.off, 0)?;
        }
        Ok(Some((header, word, batch)))
    }

    /// Whether a record frame is held by so many records, and nothing else: then none was passed
    /// over because it could not be read.
    fn holds_only(&self, header: &FrameHeader, records: u32) -> Result<bool> {
        let frame = Frame::of(header.off).ok_or(Error::Damaged)?;
        Ok(self.frames.holds(frame) == 1 + records)
    }

    /// Copies one record to `loc`; how many lines it has there.
    fn copy_record(
        &mut self,
        record: &Record,
        loc: Locator,
        nonce: u32,
        scratch: &mut [Extent],
        done: &mut Compacted,
    ) -> Result<u64> {
        let mut count = 0;
        for extent in record.extents(&self.pm, &self.geo) {
            *scratch.get_mut(count).ok_or(Error::Damaged)? = extent?;
            count += 1;
        }
        let extents = scratch.get_mut(..count).ok_or(Error::Invalid)?;
        let mut key = record.key_extent(&self.pm)?;
        let mut full = Full::default();
        // What became sparse only now was not looked at by `gauge`.
        let mut part = [0u8; 256];
        let movable = record.len <= MAX_MOVED_OBJECT
            && matches!(
                record.verify(&self.pm, &self.geo, &mut part),
                Ok(Verdict::Intact | Verdict::Unchecked)
            );
        if movable {
            for extent in extents.iter_mut().chain(key.iter_mut()) {
                if self.sparse(*extent) && done.bytes < MAX_MOVE {
                    self.move_extent(extent, &mut full, done)?;
                }
            }
        }
        let copied = self.write_copy(record, key, extents, loc, nonce);
        // Only now: until the record holds them, nothing else did.
        for frame in full.frames.into_iter().flatten() {
            self.frames.unhold(frame, 0)?;
        }
        let lines = copied?;
        done.records += 1;
        Ok(lines)
    }

    /// Writes one record, complete, to `loc`, and takes its holds; how many lines it
    /// has there.
    fn write_copy(
        &mut self,
        record: &Record,
        key: Option<Extent>,
        extents: &[Extent],
        loc: Locator,
        nonce: u32,
    ) -> Result<u64> {
        let draft = Draft::again(&self.pm, &self.geo, record, key, extents)?;
        if loc.line() + u64::from(draft.lines) > LINES {
            return Err(Error::Damaged);
        }
        let payload = Packer::new(draft.extents).chain(draft.key_extent);
        hold_all(&self.frames, payload.clone(), F::hold)?;
        let lists = draft.list_frames();
        let first = match self.alloc_lists(lists, Need::Reserve) {
            Ok(first) => first,
            Err(error) => {
                unhold_all(&self.frames, payload);
                return Err(error);
            }
        };
        let word = self.write_record(&draft, loc, nonce, record.seq, first)?;
        self.pm.store(loc.0, word)?;
        self.flush(loc.0, u64::from(draft.lines) * LINE_SIZE)?;
        self.frames
            .hold(Frame::of(loc.frame_off()).ok_or(Error::Damaged)?, 0)?;
        Ok(draft.lines.into())
    }

    /// Copies an extent into a frame that is being filled, durable with the next
    /// fence. It stays where it is if there is no frame.
    fn move_extent(
        &mut self,
        extent: &mut Extent,
        full: &mut Full,
        done: &mut Compacted,
    ) -> Result<()> {
        let len = u64::from(extent.len);
        // One that has gone bad is left.
        let fits = |(frame, used): &(Frame, u64)| {
            FRAME_SIZE - used >= len && self.pm.load(frame.off()).is_ok()
        };
        let room = self.fill.filter(fits);
        let (frame, used) = match room {
            Some(fill) => fill,
            None => {
                let near = self.fill.map(|(frame, _)| frame);
                let Some(left) = full.frames.get_mut(full.count) else {
                    return Ok(());
                };
                let Some(frame) = self.frames.alloc(near, Need::Reserve) else {
                    return Ok(());
                };
                *left = near;
                full.count += 1;
                self.fill = Some((frame, 0));
                (frame, 0)
            }
        };
        let to = frame.off() + used;
        let mut at = 0;
        while at < len {
            let mut part = [0u8; 256];
            let now = (len - at).min(part.len() as u64);
            let part = part.get_mut(..now as usize).ok_or(Error::Invalid)?;
            self.pm.read(extent.off.saturating_add(at), part)?;
            self.pm.write(to + at, part)?;
            at += now;
        }
        if !broken!("compact_flush") {
            self.flush(to, len)?;
        }
        self.fill = Some((frame, used + len));
        extent.off = to;
        done.bytes += len;
        Ok(())
    }

    /// Gives back all that a frame took which will not count.
    fn unfill(&mut self, to: Frame) -> Result<()> {
        let mut line = 1;
        while line < LINES {
            let loc = Locator(to.off() + line * LINE_SIZE);
            let lines = (self.pm.load(loc.0)? >> 40) & 0xff;
            if lines == 0 {
                break;
            }
            let record = read_dead(&self.pm, loc)?;
            self.release_bytes(&record)?;
            self.frames.unhold(to, 0)?;
            line += lines;
        }
        self.stats.record_frames += 1;
        self.push_empty(to)
    }

    /// The new frame counts instead of the old ones, durably; then for readers.
    fn commit_move(
        &mut self,
        group: &[FrameHeader],
        to: &FrameHeader,
        word: u64,
        batch: &Batch,
    ) -> Result<()> {
        let (off, in_force) = self.seal_batch(batch)?;
        if !broken!("compact_fence") {
            self.fence();
        }
        self.end_batch()?;
        self.pm.store(off, in_force)?;
        self.flush(off, 8)?;
        self.fence();
        self.batch = Some(off);
        self.batch_number += 1;

        self.pm.store(to.off, word)?;
        self.flush(to.off, 8)?;
        self.stats.record_frames += 1;
        // Readers find a record in its old place, or in its new one, or in both.
        let base = to.base_seq.to_be_bytes();
        let (log, base) = (&mut self.log, KeySrc::Bytes(&base));
        if log.insert(&self.pm, &mut self.pool, &base, to.off)? != group.first().map(|f| f.off) {
            return Err(Error::Damaged);
        }
        let mut records = 0;
        self.each_record(to, |store, record| {
            records += 1;
            if !record.keyed() {
                return Ok(());
            }
            let key = key_of(&store.pm, record.loc.0)?;
            let keys = &mut store.keys;
            match keys.insert(&store.pm, &mut store.pool, &key, record.loc.0)? {
                Some(_) => Ok(()),
                None => Err(Error::Damaged),
            }
        })?;
        // The index of one that was passed over leads to its old place, which stays.
        if !broken!("compact_unread") && !self.holds_only(to, records)? {
            return Err(Error::Io);
        }
        for (index, from) in group.iter().enumerate() {
            if index > 0 {
                let base = from.base_seq.to_be_bytes();
                let base = KeySrc::Bytes(&base);
                self.log
                    .remove(&self.pm, &self.frames, &mut self.pool, &base)?;
            }
            let frame = Frame::of(from.off).ok_or(Error::Damaged)?;
            self.each_record(from, |store, record| {
                // For readers that look at the old place still. Written back, so that what
                // is left in the frame is not taken for records that were lost with a
                // header when a crash cuts the next one short.
                let word = kill_word(&store.pm, record.loc)?;
                store.pm.store(record.loc.0, word)?;
                if !broken!("stale_records") {
                    store.flush(record.loc.0, 8)?;
                }
                store.release_bytes(record)?;
                store.frames.unhold(frame, 0)?;
                Ok(())
            })?;
            if !self.holds_only(from, 0)? {
                return Err(Error::Io);
            }
            self.pm.store(from.off, 0)?;
            self.flush(from.off, 8)?;
            self.push_empty(frame)?;
        }
        self.publish()
    }
}
