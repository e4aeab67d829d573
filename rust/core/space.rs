// SPDX-License-Identifier: GPL-2.0

//! Giving space back: of replaced, deleted and truncated records.
//!
//! What a dead record held is given back once a fence has made its death durable.
//! A record frame is given back when the last of its records is dead: its header
//! and its bit in the map are cleared, then fenced.

use super::frame::{unhold_all, Frames};
use super::record::{
    kill_word, parse, read_dead, FrameHeader, KeySrc, Line, Locator, Record, LINES,
};
use super::store::MAX_EMPTY;
use super::{live, Buf, Error, Frame, Geometry, Pmem, Result, Store, FRAME_SIZE};

impl<P: Pmem, F: Frames, B: Buf> Store<P, F, B> {
    /// Kills what waits for it; durable after the next fence.
    pub(super) fn store_kills(&mut self) -> Result<()> {
        for index in 0..self.pending {
            let loc = self.pending_at(index);
            let word = kill_word(&self.pm, loc)?;
            self.pm.store(loc.0, word)?;
            if !broken!("kill_flush") {
                self.flush(loc.0, 8)?;
            }
        }
        Ok(())
    }

    /// Gives back what killed records held; their kills are durable.
    pub(super) fn release_pending(&mut self) -> Result<()> {
        self.stats.pending_bytes = 0;
        for index in 0..core::mem::take(&mut self.pending) {
            self.release_dead(self.pending_at(index))?;
        }
        Ok(())
    }

    /// Gives back what a dead record held, and its place in its frame.
    pub(super) fn release_dead(&mut self, loc: Locator) -> Result<()> {
        let record = read_dead(&self.pm, loc)?;
        self.release(&record)
    }

    /// The same for a record that was never alive, or is not at this place any
    /// more.
    pub(super) fn release(&mut self, record: &Record) -> Result<()> {
        self.release_bytes(record)?;
        let frame = Frame::of(record.loc.frame_off()).ok_or(Error::Damaged)?;
        self.drop_record_frame(frame)
    }

    /// Gives back what a record held, but for its place in its frame.
    pub(super) fn release_bytes(&mut self, record: &Record) -> Result<()> {
        let (pm, geo) = (&self.pm, &self.geo);
        // What a damaged list leads to stays held until the next recovery.
        unhold_all(&self.frames, record.extents(pm, geo).map_while(Result::ok));
        unhold_all(&self.frames, record.key_extent(pm)?.into_iter());
        let mut lists = 0;
        for frame in record.lists(pm, geo).map_while(Result::ok) {
            let _ = self.frames.unhold(frame, 0);
            lists += 1;
        }
        self.stats.list_frames = self.stats.list_frames.saturating_sub(lists);
        Ok(())
    }

    /// One record less in a frame; the frame goes when it was the last.
    pub(super) fn drop_record_frame(&mut self, frame: Frame) -> Result<()> {
        let left = self.frames.unhold(frame, 0)?;
        let open = self.open.is_some_and(|open| open.header.off == frame.off());
        if left != 1 || open || self.empty >= MAX_EMPTY {
            return Ok(());
        }
        let base = match self.pm.load(frame.off() + 16) {
            // Nobody knows its place in the log. It goes at the next recovery.
            Err(Error::Io) => return Ok(()),
            base => base?.to_be_bytes(),
        };
        let (pm, frames) = (&self.pm, &self.frames);
        let key = KeySrc::Bytes(&base);
        self.log.remove(pm, frames, &mut self.pool, &key)?;
        self.push_empty(frame)
    }

    /// A frame has no records any more, and nothing leads to it.
    pub(super) fn push_empty(&mut self, frame: Frame) -> Result<()> {
        if self.empty >= MAX_EMPTY {
            return Err(Error::Damaged);
        }
        self.set_empty(self.empty, frame.off());
        self.empty += 1;
        Ok(())
    }

    /// Makes empty record frames invalid; how many there are now that may be
    /// given back after the next fence. The frames opened since are durable, so that
    /// the highest sequence number is never forgotten.
    pub(super) fn close_empty(&mut self) -> Result<usize> {
        for index in 0..self.empty {
            let off = self.empty_at(index);
            match self.clear_header(off) {
                // One that has gone bad is not given out again, and its records are dead:
                // that it loses its bit is enough.
                Err(Error::Io) => (),
                done => done?,
            }
            self.set_map(Frame::of(off).ok_or(Error::Damaged)?, false)?;
        }
        Ok(self.empty)
    }

    fn clear_header(&mut self, off: u64) -> Result<()> {
        if self.pm.load(off)? == 0 {
            return Ok(());
        }
        self.pm.store(off, 0)?;
        self.flush(off, 8)
    }

    /// Gives the first `count` empty frames back.
    pub(super) fn give_back(&mut self, count: usize) -> Result<()> {
        for index in 0..count {
            let frame = Frame::of(self.empty_at(index)).ok_or(Error::Damaged)?;
            self.frames.unhold(frame, 0)?;
            self.stats.record_frames = self.stats.record_frames.saturating_sub(1);
        }
        for index in count..self.empty {
            let off = self.empty_at(index);
            self.set_empty(index - count, off);
        }
        self.empty = self.empty.saturating_sub(count);
        Ok(())
    }

    /// Gives the space of replaced and deleted records back at once, which
    /// otherwise the next commits do. Commits nothing. At most two fences.
    pub fn sync_pending(&mut self) -> Result<()> {
        if self.pending == 0 && self.empty == 0 && self.batch.is_none() {
            return Ok(());
        }
        self.writable()?;
        let done = self.sync_all();
        self.failed = done.is_err();
        done
    }

    fn sync_all(&mut self) -> Result<()> {
        self.store_kills()?;
        self.fence();
        self.end_batch()?;
        self.release_pending()?;
        let closed = self.close_empty()?;
        self.fence();
        self.give_back(closed)
    }

    // ---- truncation ----

    /// Removes all records without a key that have this sequence number or a lower
    /// one: durable on return, and gone for readers. Commits what is staged first.
    /// [`drain`](Self::drain) gives their space back.
    ///
    /// A number that is not in use yet counts as the highest that is. Costs a
    /// write of both superblocks, so it is for checkpoints.
    pub fn truncate(&mut self, seq: u64) -> Result<()> {
        self.writable()?;
        self.commit()?;
        let seq = seq.min(self.stats.durable_seq);
        if seq <= self.sb.trunc_seq {
            return Ok(());
        }
        self.sb.trunc_seq = seq;
        if broken!("truncate_early") {
            self.stats.draining = true;
            self.drain_some(u32::MAX)?;
            self.sync_all()?;
        }
        let done = self.sb.write(&self.pm).and_then(|()| {
            self.unfenced = false;
            self.pm.store(live::TRUNC_SEQ, seq)
        });
        self.failed = done.is_err();
        self.stats.draining = true;
        self.drain_from = 0;
        done
    }

    /// Gives the space of about `budget` truncated records back. False when
    /// there are none left.
    pub fn drain(&mut self, budget: u32) -> Result<bool> {
        if !self.stats.draining || self.read_only {
            return Ok(false);
        }
        self.writable()?;
        let done = self.drain_some(budget);
        self.failed = done.is_err();
        done
    }

    fn drain_some(&mut self, budget: u32) -> Result<bool> {
        let mut done = 0;
        while done < budget {
            let header = match self.frame_from(self.drain_from) {
                Ok(Some(header)) => header,
                Ok(None) => break,
                Err(Error::Io) => {
                    // It goes at the next recovery.
                    let base = self.unreadable_from(self.drain_from)?;
                    if base > self.sb.trunc_seq {
                        break;
                    }
                    self.drain_from = base.saturating_add(1);
                    done += 1;
                    continue;
                }
                Err(error) => return Err(error),
            };
            if header.base_seq > self.sb.trunc_seq {
                break;
            }
            self.drain_from = header.base_seq + 1;
            done += 1 + self.drain_frame(&header)?;
            if self.empty >= MAX_EMPTY / 4 {
                self.sync_all()?;
            }
        }
        if done < budget {
            self.stats.draining = false;
        }
        self.publish()?;
        Ok(self.stats.draining)
    }

    /// Gives back the truncated records of one frame; how many there were.
    fn drain_frame(&mut self, header: &FrameHeader) -> Result<u32> {
        let trunc = self.sb.trunc_seq;
        // What holds nothing, because it is damaged, gives nothing back.
        let gone = |store: &Self, record: &Record| {
            !record.keyed() && record.seq <= trunc && store.check_record(record).is_ok()
        };
        let mut stays = self.open.is_some_and(|open| open.header.off == header.off);
        self.each_record(header, |store, record| {
            stays |= !gone(store, record);
            Ok(())
        })?;
        let mut count = 0;
        self.each_record(header, |store, record| {
            if !gone(store, record) {
                return Ok(());
            }
            // For readers; a crash leaves it to the truncation. Of a frame that
            // goes, nothing needs to be written back but its header.
            let word = kill_word(&store.pm, record.loc)?;
            store.pm.store(record.loc.0, word)?;
            if stays {
                store.flush(record.loc.0, 8)?;
            }
            store.uncount(record.loc)?;
            count += 1;
            store.release(record)
        })?;
        Ok(count)
    }

    /// Calls `each` with the live records of a frame.
    pub(super) fn each_record(
        &mut self,
        header: &FrameHeader,
        mut each: impl FnMut(&mut Self, &Record) -> Result<()>,
    ) -> Result<()> {
        let mut line = 1;
        while line < LINES {
            match parse(&self.pm, &self.geo, header, line) {
                Ok(Line::Put(record)) => {
                    line += u64::from(record.lines);
                    if record.keyed() || record.seq > self.dead_seq {
                        each(self, &record)?;
                    }
                }
                Ok(Line::Killed { lines, .. }) => line += lines,
                // What the media refuses to read stays as it is.
                Ok(_) | Err(Error::Io) => line += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Geometry {
    /// The data frames that the map says hold records, from `from` on.
    pub(super) fn next_mapped<P: Pmem>(&self, pm: &P, from: Frame) -> Result<Option<Frame>> {
        let end = self.data_end() / FRAME_SIZE;
        let mut at = u64::from(from.0);
        while at < end {
            let word = pm.load(self.map_off + at / 64 * 8)? & (!0 << (at % 64));
            if word != 0 {
                let frame = at / 64 * 64 + u64::from(word.trailing_zeros());
                return Ok((frame < end).then_some(Frame(frame as u32)));
            }
            at = (at / 64 + 1) * 64;
        }
        Ok(None)
    }
}
