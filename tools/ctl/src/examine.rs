// SPDX-License-Identifier: GPL-2.0-only

//! What is on the media, piece by piece, and what is wrong with it.
//!
//! Two passes over the record frames. The first lists every record; from the list it
//! follows which of them count: of several with one key the last. The second looks
//! at what those use: extent lists, extents, bytes. At the end all places that are
//! used are sorted, to find some that are used twice.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher, RandomState},
};

use pmskb_uapi::core::{
    AreaState, Error, Extent, Frame, FrameFound, Inspector, LineFound, Pmem, Probe, Record,
    RecordFrame, Result, Verdict, FRAME_SIZE, LINE_SIZE,
};

use crate::{check::superblock_error, progress::Progress, select::Filter};

/// Most operations of one commit: so many records a crash may have torn.
const MAX_TORN: u64 = 1024 + 63;

/// Something that is not as it should be.
pub struct Finding {
    /// What it is, for programs.
    pub kind: &'static str,
    /// What it means, for people.
    pub meaning: String,
    /// Not only what a crash leaves behind, and the next attach clears.
    pub problem: bool,
    /// Where it is in the region.
    pub offset: u64,
    /// Of the record that it is about.
    pub seq: Option<u64>,
    /// Its key, if it has one and it can be read.
    pub key: Option<Vec<u8>>,
    /// What mends it.
    pub fix: Fix,
}

/// What mends something.
#[derive(Clone, Copy)]
pub enum Fix {
    /// Nothing.
    None,
    /// Writing the superblocks anew.
    Superblocks,
    /// Doing what the batch areas say, and ending them.
    Batches,
    /// Clearing the frame's bit in the map. Whether records are lost by it.
    Unmap(Frame, bool),
    /// Setting it.
    Map(Frame),
    /// Killing the record at this line: it is lost.
    Kill(RecordFrame, u64),
}

/// What was found.
#[derive(Default)]
pub struct Examined {
    pub findings: Vec<Finding>,
    pub frames: u64,
    pub records: u64,
    pub keys: u64,
    pub live_bytes: u64,
    pub superseded: u64,
    pub truncated: u64,
    pub killed: u64,
    pub torn: u64,
    pub checked: u64,
    pub checked_bytes: u64,
    pub shared_bytes: u64,
    /// Records that a later one replaced, and that are still there.
    pub replaced: Vec<(RecordFrame, u64)>,
}

/// What is looked at.
pub struct What<'a> {
    /// Of which records the bytes are checked.
    pub filter: &'a Filter,
    /// A writer changes it meanwhile.
    pub changing: bool,
    /// It is attached: the batch areas are nothing to be found out about.
    pub attached: bool,
}

/// A record, in the first pass.
struct Entry {
    /// Of the key; without one the number itself.
    hash: u64,
    seq: u64,
    loc: u64,
}

/// Who uses a place.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Payload,
    List,
    Records,
}

struct Interval {
    start: u64,
    end: u64,
    seq: u64,
    by: Use,
    line: (RecordFrame, u64),
}

fn finding(kind: &'static str, meaning: impl Into<String>, offset: u64, fix: Fix) -> Finding {
    Finding {
        kind,
        meaning: meaning.into(),
        problem: true,
        offset,
        seq: None,
        key: None,
        fix,
    }
}

impl Finding {
    fn note(mut self) -> Self {
        self.problem = false;
        self
    }

    fn of<P: Pmem>(mut self, pm: &P, record: &Record) -> Self {
        self.seq = Some(record.seq);
        self.key = key(pm, record);
        self
    }
}

fn key<P: Pmem>(pm: &P, record: &Record) -> Option<Vec<u8>> {
    let mut key = vec![0; record.key_len?.into()];
    let n = record.read_key(pm, 0, &mut key).ok()?;
    key.truncate(n);
    Some(key)
}

/// Looks at everything.
pub fn examine<P: Pmem>(media: P, what: &What<'_>) -> Result<Examined> {
    let (inspector, probe) = Inspector::new(media)?;
    let mut work = Work {
        pm: &inspector,
        what,
        out: Examined::default(),
        frames: Vec::new(),
        newest: HashMap::new(),
        entries: Vec::new(),
        torn: Vec::new(),
        hasher: RandomState::new(),
    };
    work.superblocks(&probe);
    if !what.attached {
        work.batches()?;
    }
    work.list()?;
    work.unmapped()?;
    work.torn();
    let gone = work.gone()?;
    work.records(&gone)?;
    Ok(work.out)
}

struct Work<'a, P> {
    pm: &'a Inspector<P>,
    what: &'a What<'a>,
    out: Examined,
    frames: Vec<RecordFrame>,
    /// Highest number of a record in the frames of each attach.
    newest: HashMap<u64, u64>,
    entries: Vec<Entry>,
    torn: Vec<(RecordFrame, u64, Option<Record>)>,
    hasher: RandomState,
}

/// Offset of a line.
fn at(frame: &RecordFrame, line: u64) -> u64 {
    frame.off() + line * LINE_SIZE
}

impl<P: Pmem> Work<'_, P> {
    fn superblocks(&mut self, probe: &Probe) {
        let last = self.pm.geometry().data_end();
        for (name, error, off) in [("first", probe.first, 0), ("last", probe.last, last)] {
            if let Some(e) = error {
                let meaning = format!(
                    "the {name} superblock cannot be used: {}",
                    superblock_error(e)
                );
                let found = finding("superblock", meaning, off, Fix::Superblocks);
                self.out.findings.push(found);
            }
        }
        if probe.stale {
            let meaning = "the two superblocks differ: an update was cut short";
            let found = finding("superblock_stale", meaning, last, Fix::Superblocks);
            self.out.findings.push(found.note());
        }
    }

    /// Also does what they say, where it is looked at.
    fn batches(&mut self) -> Result<()> {
        for (index, state) in self.pm.areas()?.into_iter().enumerate() {
            let found = match state {
                AreaState::Ended | AreaState::InForce(0) => continue,
                AreaState::InForce(n) => finding(
                    "batch_pending",
                    format!("an atomic batch is in force, and {n} of its words are not stored yet"),
                    0,
                    Fix::Batches,
                )
                .note(),
                AreaState::Damaged => finding(
                    "batch_damaged",
                    "a batch area is damaged: if its words had not been stored, the batch is lost",
                    0,
                    Fix::Batches,
                ),
                AreaState::Unreadable => finding(
                    "batch_unreadable",
                    "a batch area cannot be read: if it was in force, the batch may be lost",
                    0,
                    Fix::None,
                ),
            };
            self.out.findings.push(Finding {
                offset: Inspector::<P>::area_off(index as u64),
                ..found
            });
        }
        self.pm.end_batches()
    }

    /// Goes over the frames that the map names.
    fn list(&mut self) -> Result<()> {
        let mut from = self.pm.geometry().first_frame();
        while let Some(frame) = self.pm.next_mapped(from)? {
            from = Frame(frame.0 + 1);
            let found = match self.pm.frame(frame)? {
                FrameFound::Records(found) => {
                    self.list_frame(&found)?;
                    self.frames.push(found);
                    continue;
                }
                FrameFound::Blank => finding(
                    "frame_blank",
                    "the map names a frame that holds no records: a crash left the bit",
                    frame.off(),
                    Fix::Unmap(frame, false),
                )
                .note(),
                FrameFound::Other => finding(
                    "frame_other",
                    "the map names a frame that has no header and no records: a crash left the bit",
                    frame.off(),
                    Fix::Unmap(frame, false),
                )
                .note(),
                FrameFound::Damaged => finding(
                    "frame_damaged",
                    "the header of a record frame is damaged: its records cannot be read",
                    frame.off(),
                    Fix::Unmap(frame, true),
                ),
                FrameFound::Unreadable => finding(
                    "frame_unreadable",
                    "the header of a record frame cannot be read: nor can its records",
                    frame.off(),
                    Fix::None,
                ),
            };
            self.out.findings.push(found);
        }
        self.out.frames = self.frames.len() as u64;
        Ok(())
    }

    fn list_frame(&mut self, frame: &RecordFrame) -> Result<()> {
        let mut newest = 0;
        let (pm, out) = (self.pm, &mut self.out);
        pm.lines(frame, |line, found| {
            match found {
                LineFound::Put(record) => {
                    newest = newest.max(record.seq);
                    if pm.truncated(&record) {
                        out.truncated += 1;
                        return true;
                    }
                    let hash = match key(pm.pm(), &record) {
                        Some(key) => self.hasher.hash_one(key),
                        None => self.hasher.hash_one(record.seq),
                    };
                    self.entries.push(Entry {
                        hash,
                        seq: record.seq,
                        loc: record.loc.0,
                    });
                }
                LineFound::Killed { seq } => {
                    newest = newest.max(seq);
                    out.killed += 1;
                }
                LineFound::Torn(guess) => self.torn.push((*frame, line, guess)),
                LineFound::Unreadable => out.findings.push(finding(
                    "line_unreadable",
                    "a line of a record frame cannot be read: if a record was there, it is lost",
                    at(frame, line),
                    Fix::None,
                )),
                LineFound::Blank => {}
            }
            true
        })?;
        let of_epoch = self.newest.entry(attach_of(frame.epoch)).or_default();
        *of_epoch = newest.max(*of_epoch);
        Ok(())
    }

    /// Looks for record frames that the map does not name.
    fn unmapped(&mut self) -> Result<()> {
        let geo = *self.pm.geometry();
        let first = geo.first_frame().0;
        for number in first..first.saturating_add(geo.data_frames()) {
            let frame = Frame(number);
            // What cannot be read here is of no record, as far as is known.
            let Ok(FrameFound::Records(found)) = self.pm.frame(frame) else {
                continue;
            };
            if self.pm.mapped(frame)? {
                continue;
            }
            let mut alive = 0;
            self.pm.lines(&found, |_, line| {
                let counts = matches!(line, LineFound::Put(r) if !self.pm.truncated(&r));
                alive += u32::from(counts);
                true
            })?;
            if alive > 0 {
                self.out.findings.push(finding(
                    "frame_unmapped",
                    format!(
                        "the map does not name a frame with {alive} records: nobody finds them"
                    ),
                    frame.off(),
                    Fix::Map(frame),
                ));
            }
        }
        Ok(())
    }

    /// What has a wrong checksum is damaged, if later commits succeeded.
    fn torn(&mut self) {
        for (frame, line, guess) in std::mem::take(&mut self.torn) {
            self.out.torn += 1;
            let newest = self
                .newest
                .get(&attach_of(frame.epoch))
                .copied()
                .unwrap_or(0);
            let acknowledged = newest > frame.base_seq().saturating_add(MAX_TORN);
            let found = if acknowledged {
                finding(
                    "line_damaged",
                    "a record is damaged: its checksum is wrong, and it was acknowledged",
                    at(&frame, line),
                    Fix::Kill(frame, line),
                )
            } else {
                finding(
                    "line_torn",
                    "what looks like a record has a wrong checksum: a power cut tore it before it \
                     was acknowledged, or it is damaged",
                    at(&frame, line),
                    Fix::None,
                )
                .note()
            };
            let found = match guess {
                Some(record) => found.of(self.pm.pm(), &record),
                None => found,
            };
            self.out.findings.push(found);
        }
    }

    /// Places of records that later ones with their keys replaced.
    fn gone(&mut self) -> Result<HashSet<u64>> {
        let mut gone = HashSet::new();
        self.entries.sort_unstable_by_key(|e| (e.hash, e.seq));
        for same in self.entries.chunk_by(|a, b| a.hash == b.hash) {
            if same.len() < 2 {
                continue;
            }
            // Different keys may have one hash.
            let mut best: HashMap<Option<Vec<u8>>, &Entry> = HashMap::new();
            for entry in same {
                let Some(key) = self.key_at(entry.loc)? else {
                    continue;
                };
                if let Some(older) = best.insert(key, entry) {
                    gone.insert(older.loc);
                    self.out.superseded += 1;
                    if older.seq == entry.seq && !self.what.changing {
                        let mut found = finding(
                            "duplicate",
                            "two records have one sequence number and one key",
                            older.loc,
                            Fix::None,
                        );
                        found.seq = Some(entry.seq);
                        self.out.findings.push(found);
                    }
                }
            }
        }
        self.entries = Vec::new();
        Ok(gone)
    }

    /// The key of the record at a place; `None` if there is none any more.
    fn key_at(&self, loc: u64) -> Result<Option<Option<Vec<u8>>>> {
        let Some(frame) = Frame::of(loc) else {
            return Ok(None);
        };
        let FrameFound::Records(found) = self.pm.frame(frame)? else {
            return Ok(None);
        };
        let mut result = None;
        self.pm.lines(&found, |_, line| match line {
            LineFound::Put(record) if record.loc.0 == loc => {
                result = Some(key(self.pm.pm(), &record));
                false
            }
            _ => true,
        })?;
        Ok(result)
    }

    /// Goes over the records that count.
    fn records(&mut self, gone: &HashSet<u64>) -> Result<()> {
        let mut progress = Progress::of(self.frames.len() as u64, "record frames");
        let mut used = Vec::new();
        let mut part = vec![0; 1 << 20];
        for frame in std::mem::take(&mut self.frames) {
            progress.advance(1);
            let mut some = Vec::new();
            self.pm.lines(&frame, |line, found| {
                if let LineFound::Put(record) = found {
                    some.push((line, record));
                }
                true
            })?;
            let mut any = false;
            for (line, record) in some {
                if self.pm.truncated(&record) {
                    continue;
                }
                if gone.contains(&record.loc.0) {
                    self.out.replaced.push((frame, line));
                    continue;
                }
                any = true;
                self.out.records += 1;
                self.out.keys += u64::from(record.keyed());
                self.out.live_bytes += u64::from(record.len);
                if let Some((kind, meaning)) =
                    self.record(&record, (frame, line), &mut used, &mut part)
                {
                    let found = finding(kind, meaning, record.loc.0, Fix::Kill(frame, line));
                    self.out.findings.push(found.of(self.pm.pm(), &record));
                }
            }
            if any {
                used.push(Interval {
                    start: frame.off(),
                    end: frame.off() + FRAME_SIZE,
                    seq: frame.base_seq(),
                    by: Use::Records,
                    line: (frame, 0),
                });
            }
        }
        drop(progress);
        if !self.what.changing {
            self.overlaps(used);
        }
        Ok(())
    }

    /// Looks at one record; what is wrong with it.
    fn record(
        &mut self,
        record: &Record,
        line: (RecordFrame, u64),
        used: &mut Vec<Interval>,
        part: &mut [u8],
    ) -> Option<(&'static str, &'static str)> {
        const EXTENTS: (&str, &str) = ("extents", "the record's extents are damaged");
        const UNREADABLE: (&str, &str) = ("unreadable", "the record's bytes cannot be read");
        let (pm, geo) = (self.pm.pm(), self.pm.geometry());
        let before = used.len();
        let mut add = |extent: Extent, by| {
            used.push(Interval {
                start: extent.off,
                end: extent.end(),
                seq: record.seq,
                by,
                line,
            });
        };
        let mut all = || -> Result<()> {
            let mut len = 0;
            for extent in record.extents(pm, geo) {
                let extent = extent?;
                len += u64::from(extent.len);
                add(extent, Use::Payload);
            }
            for frame in self.pm.list_frames(record) {
                add(Extent::new(frame?.off(), FRAME_SIZE as u32), Use::List);
            }
            if let Some(extent) = record.key_extent(pm)? {
                add(extent, Use::Payload);
            }
            match len == u64::from(record.len) {
                true => Ok(()),
                false => Err(Error::Damaged),
            }
        };
        if let Err(e) = all() {
            used.truncate(before);
            return Some(if e == Error::Io { UNREADABLE } else { EXTENTS });
        }
        if !self.what.filter.is_empty()
            && !self.what.filter.meant(record, key(pm, record).as_deref())
        {
            return None;
        }
        self.out.checked += 1;
        self.out.checked_bytes += u64::from(record.len);
        match record.verify(pm, geo, part) {
            Ok(Verdict::Intact | Verdict::Unchecked) => None,
            Ok(Verdict::BadCsum) => {
                Some(("checksum", "the record's bytes do not have its checksum"))
            }
            Ok(Verdict::BadCrc) => Some(("crc", "the record's bytes do not have its CRC32C")),
            Err(Error::Io) => Some(UNREADABLE),
            Err(_) => Some(EXTENTS),
        }
    }

    /// Looks for places that are used twice. Objects may share bytes, but not with
    /// records or extent lists.
    fn overlaps(&mut self, mut used: Vec<Interval>) {
        used.sort_unstable_by_key(|i| (i.start, i.end));
        // Those that reach farthest, of all before: of objects, and of the others.
        let (mut payload, mut other): (Option<&Interval>, Option<&Interval>) = (None, None);
        for now in &used {
            let meets = |i: &&Interval| i.end > now.start;
            let clash = match now.by {
                Use::Payload => other.filter(meets).map(|i| (now, i)),
                _ => payload
                    .filter(meets)
                    .or(other.filter(meets))
                    .map(|i| (i, now)),
            };
            if let Some((object, by)) = clash {
                let whose = match by.by {
                    Use::Records => "a record frame",
                    _ => "an extent list",
                };
                let fix = match object.by {
                    Use::Payload => Fix::Kill(object.line.0, object.line.1),
                    _ => Fix::None,
                };
                let mut found = finding(
                    "overlap",
                    format!("the record's bytes are those of {whose}, too"),
                    now.start,
                    fix,
                );
                found.seq = Some(object.seq);
                self.out.findings.push(found);
            }
            let farthest = match now.by {
                Use::Payload => {
                    if let Some(i) = payload.filter(|i| i.end > now.start) {
                        self.out.shared_bytes += i.end.min(now.end) - now.start;
                    }
                    &mut payload
                }
                _ => &mut other,
            };
            if farthest.is_none_or(|i| i.end < now.end) {
                *farthest = Some(now);
            }
        }
    }
}

/// The attach that opened a record frame: the upper half of its epoch counts its frames.
fn attach_of(epoch: u64) -> u64 {
    epoch & 0xffff_ffff
}
