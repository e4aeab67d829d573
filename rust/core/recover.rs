// SPDX-License-Identifier: GPL-2.0

//! From the records on the media to a store.
//!
//! Two passes over the record frames, which the frame map names. The first claims
//! every frame that a live record uses, and changes nothing; then a superblock is
//! written. The second inserts the records into the index, in frames that nobody
//! claimed; kills what a later record replaced; and gives empty record frames
//! back. A crash at any point of it is a crash before it.

use super::frame::hold_all;
use super::record::{key_of, parse, FrameHeader, KeySrc, Line, Locator, Record, LINES};
use super::superblock::probe;
use super::{live, Buf, Error, Frame, Frames, Pmem, Result, Store};

/// How to recover.
#[derive(Debug, Clone, Copy, Default)]
pub struct RecoverOptions {
    /// Change nothing durable, and refuse changes later. The index is still
    /// built, in free frames.
    pub read_only: bool,
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
    /// Records at or below the truncation point; gone now.
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
    /// Frames marked in the map whose header is none of this store's: damaged,
    /// or never used because of a crash. Given back.
    pub damaged_frames: u64,
    /// Records left alone because their extents cannot be right.
    pub bad_extents: u64,
    /// Record frames that the media refused to read in part.
    pub unreadable: u64,
    /// A superblock was written anew from the other.
    pub superblock_repaired: bool,
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
    /// words, and is kept. Takes time proportional to the number of records, plus
    /// 1 bit for each frame of the region.
    ///
    /// Errors are those of [`probe`]; [`Error::ReadOnly`] if the store has
    /// features that only allow reading and `options` does not; [`Error::NoSpace`]
    /// if no frames are left for the index.
    pub fn recover(pm: P, frames: F, work: B, options: RecoverOptions) -> Result<(Self, Report)> {
        let found = probe(&pm)?;
        if found.read_only && !options.read_only {
            return Err(Error::ReadOnly);
        }
        live::clear(&pm)?;
        let mut report = Report::default();
        let mut store = Store::empty(pm, frames, work, found.superblock)?;
        store.claim_all(&mut report)?;
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
        live::begin(&store.pm, &store.sb, store.stats.durable_seq)?;
        store.read_only = options.read_only;
        store.index_all(&mut report)?;
        if !options.read_only {
            store.sync_pending()?;
        }
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
                damaged: self.pm.load(frame.off())? != 0,
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
            match parse(&self.pm, &self.geo, header, line) {
                Ok(Line::Put(record)) => {
                    report.last_seq = report.last_seq.max(record.seq);
                    line += u64::from(record.lines);
                    if record.seq <= self.sb.trunc_seq {
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

    /// Pass 1: claims all frames that live records use.
    fn claim_all(&mut self, report: &mut Report) -> Result<()> {
        report.last_seq = self.sb.seq_floor.max(self.sb.trunc_seq);
        let mut from = self.geo.first_frame();
        while let Some(frame) = self.geo.next_mapped(&self.pm, from)? {
            from = Frame(frame.0 + 1);
            let header = match self.mapped(frame)? {
                Mapped::Records(header) => header,
                Mapped::Other { damaged } => {
                    report.damaged_frames += u64::from(damaged);
                    continue;
                }
                Mapped::Unreadable => {
                    report.unreadable += 1;
                    self.frames.claim(frame)?;
                    continue;
                }
            };
            if let Some(last) = header.base_seq.checked_sub(1) {
                report.last_seq = report.last_seq.max(last);
            }
            let mut used = false;
            let readable = self.walk(&header, report, |store, report, record| {
                used = true;
                match store.claim_record(&record) {
                    Err(Error::Damaged | Error::Invalid | Error::Io) => {
                        report.bad_extents += 1;
                        Ok(())
                    }
                    other => other,
                }
            })?;
            if !readable {
                report.unreadable += 1;
            }
            if used || !readable {
                // The hold that goes when the frame is given back.
                self.frames.claim(frame)?;
                self.stats.record_frames += 1;
            } else {
                report.empty_frames += 1;
            }
        }
        Ok(())
    }

    /// Whether a record's extents can be right.
    fn check_record(&self, record: &Record) -> Result<()> {
        let mut len = 0u64;
        for extent in record.extents(&self.pm, &self.geo) {
            len = len.saturating_add(u64::from(extent?.len));
        }
        if len == u64::from(record.len) {
            Ok(())
        } else {
            Err(Error::Damaged)
        }
    }

    /// Claims what one record uses; nothing if it cannot be right.
    fn claim_record(&mut self, record: &Record) -> Result<()> {
        self.check_record(record)?;
        let (pm, geo) = (&self.pm, &self.geo);
        for extent in record.extents(pm, geo) {
            hold_all(&self.frames, core::iter::once(extent?), F::claim)?;
        }
        if let Some(extent) = record.key_extent(pm)? {
            hold_all(&self.frames, core::iter::once(extent), F::claim)?;
        }
        for frame in record.lists(pm, geo) {
            self.frames.claim(frame?)?;
            self.stats.list_frames += 1;
        }
        let frame = Frame::of(record.loc.frame_off()).ok_or(Error::Damaged)?;
        self.frames.claim(frame)
    }

    /// Pass 2: builds the index of what pass 1 claimed; gives back the rest.
    fn index_all(&mut self, report: &mut Report) -> Result<()> {
        let mut from = self.geo.first_frame();
        // The lines were counted in pass 1.
        let (before, mut ignored) = (*report, *report);
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
            let readable = self.walk(&header, &mut ignored, |_, _, _| {
                used = true;
                Ok(())
            })?;
            if !used && readable {
                self.unmap(frame)?;
                continue;
            }
            self.reserve_for_recovery()?;
            let key = header.base_seq.to_be_bytes();
            let key = KeySrc::Bytes(&key);
            // Two frames with one number cannot be; the log then shows one.
            self.log
                .insert(&self.pm, &mut self.pool, &key, header.off)?;
            self.walk(&header, report, |store, report, record| {
                store.index_found(report, &record)
            })?;
        }
        report.killed = before.killed;
        report.torn = before.torn;
        report.truncated = before.truncated;
        Ok(())
    }

    fn unmap(&mut self, frame: Frame) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.set_map(frame, false)
    }

    /// Inserts one record that was found.
    fn index_found(&mut self, report: &mut Report, record: &Record) -> Result<()> {
        if self.check_record(record).is_err() {
            return Ok(());
        }
        self.reserve_for_recovery()?;
        if record.keyed() {
            let key = key_of(&self.pm, record.loc.0)?;
            if let Some(other) = self.find_key(&key)? {
                report.superseded += 1;
                let other_seq = self.pm.load(other.saturating_add(8))?;
                if other_seq > record.seq {
                    self.count(record.loc)?;
                    return self.retire_found(record.loc);
                }
            }
        }
        self.make_room_pending()?;
        self.index_put(record.loc)
    }

    /// Kills a record that was found to be replaced.
    fn retire_found(&mut self, loc: Locator) -> Result<()> {
        self.make_room_pending()?;
        self.retire(loc)
    }
}
