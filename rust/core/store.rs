// SPDX-License-Identifier: GPL-2.0

//! A store: put, delete, commit.
//!
//! A batch costs two fences:
//!
//! 1. put: payload, key and extent lists are written back; the record is
//!    written, its first word 0. Before the first fence also the kills of records
//!    that the batch before replaced, and the map words of frames opened.
//! 2. *fence*: the kills are durable, and what they held is given back.
//! 3. The first word of each record is stored, those of deleted records are
//!    overwritten; their lines are written back.
//! 4. *fence*: all is durable. Then the index is changed.
//!
//! A record that is replaced is killed one batch later, so that there is no
//! instant at which a crash would leave neither. A record is never killed before
//! the kills of older ones with its key are fenced: they could come back.

use super::frame::hold_all;
use super::node::{Kind, Pool};
use super::pmem::lines_of;
use super::reader::{log_next, view, Direction, View};
use super::record::{
    key_of, kill_word, parse, read_dead, write, write_lists, Draft, FrameHeader, Key, KeySrc, Line,
    Locator, Meta, PutMode, Record, LINES,
};
use super::superblock::Superblock;
use super::tree::{find, Goal, Tree};
use super::{
    live, Buf, Error, Extent, Frame, Frames, Geometry, Packer, Pmem, Result, FRAME_SIZE, LINE_SIZE,
    MAX_STAGED,
};

/// One object to persist; see [`Store::put`].
pub struct PutArgs<'a> {
    /// The key.
    pub key: Key<'a>,
    /// The object's bytes, in order. None for an empty object.
    pub extents: &'a [Extent],
    /// What the record says about it.
    pub meta: Meta,
    /// What to do about a record with the same key.
    pub mode: PutMode,
}

/// What [`Store::put`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PutOutcome {
    /// The record's sequence number.
    pub seq: u64,
    /// Where the record is.
    pub loc: Locator,
    /// The key had a record, which this one replaces.
    pub replaced: bool,
}

/// Numbers about a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Live records.
    pub records: u64,
    /// Live records with a key.
    pub keys: u64,
    /// Payload bytes of live records.
    pub live_bytes: u64,
    /// Highest sequence number known durable.
    pub durable_seq: u64,
    /// Frames that hold records.
    pub record_frames: u64,
    /// Frames that hold extent lists.
    pub list_frames: u64,
    /// Frames that hold the index.
    pub index_frames: u64,
    /// Replaced records whose space comes back with the next commit.
    pub pending: u64,
    /// Cache lines written back since recovery.
    pub lines_flushed: u64,
    /// Fences since recovery.
    pub fences: u64,
}

/// Records that are replaced and not yet killed, at most.
const MAX_PENDING: usize = 1024;
/// Record frames that are empty and not yet given back, at most: of one batch's
/// puts, kills and deletes.
const MAX_EMPTY: usize = 3 * MAX_STAGED;
const HASH_SLOTS: usize = 2 * MAX_STAGED;

// The parts of the working memory, in words.
const STAGED_AT: usize = 0;
const STAGED_WORDS: usize = 3;
const HASH_AT: usize = STAGED_AT + STAGED_WORDS * MAX_STAGED;
const PENDING_AT: usize = HASH_AT + HASH_SLOTS;
const EMPTY_AT: usize = PENDING_AT + MAX_PENDING;
const WORK_WORDS: usize = EMPTY_AT + MAX_EMPTY;

/// An operation that waits for its commit.
#[derive(Clone, Copy)]
struct Staged {
    /// The new record, or the one to delete.
    loc: u64,
    delete: bool,
    /// What to store in its first word.
    word: u64,
    /// Hash of its key.
    hash: Option<u32>,
}

/// The frame that records are appended to.
#[derive(Clone, Copy)]
struct Open {
    header: FrameHeader,
    /// The next unused line.
    line: u64,
}

/// A store that is attached.
///
/// One thread at a time may change it; the host holds a mutex. No method sleeps
/// or loops without a bound, but those that go over all records say so.
pub struct Store<P, F, B> {
    pub(super) pm: P,
    pub(super) frames: F,
    work: B,
    pub(super) geo: Geometry,
    pub(super) sb: Superblock,
    pub(super) keys: Tree,
    pub(super) log: Tree,
    pub(super) pool: Pool,
    pub(super) stats: Stats,
    pub(super) next_seq: u64,
    open: Option<Open>,
    staged: usize,
    /// Of them, puts with a key, and those that replace a record.
    staged_keys: u64,
    staged_replaces: usize,
    pending: usize,
    empty: usize,
    /// Something was flushed since the last fence.
    unfenced: bool,
    pub(super) read_only: bool,
    /// Index or media can no longer be trusted to be in step.
    failed: bool,
}

impl<P: Pmem, F: Frames, B: Buf> Store<P, F, B> {
    /// 64-bit words of working memory that [`recover`](Self::recover) takes.
    pub const WORK_WORDS: usize = WORK_WORDS;

    /// A store with nothing in it, for recovery to fill.
    pub(super) fn empty(pm: P, frames: F, mut work: B, sb: Superblock) -> Result<Self> {
        if work.len() < WORK_WORDS {
            return Err(Error::Invalid);
        }
        work.fill(0);
        Ok(Store {
            keys: Tree::new(&pm, Kind::Keys, live::KEY_ROOT)?,
            log: Tree::new(&pm, Kind::Log, live::LOG_ROOT)?,
            // Readers that outlive an attach must not mistake a node.
            pool: Pool::new((sb.attaches << 40) ^ (sb.salt << 52)),
            pm,
            frames,
            work,
            geo: sb.geometry,
            sb,
            stats: Stats::default(),
            next_seq: 1,
            open: None,
            staged: 0,
            staged_keys: 0,
            staged_replaces: 0,
            pending: 0,
            empty: 0,
            unfenced: false,
            read_only: false,
            failed: false,
        })
    }

    fn writable(&self) -> Result<()> {
        if self.failed {
            return Err(Error::Io);
        }
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        Ok(())
    }

    fn word(&self, at: usize) -> u64 {
        self.work.get(at).copied().unwrap_or(0)
    }

    fn set_word(&mut self, at: usize, value: u64) {
        if let Some(word) = self.work.get_mut(at) {
            *word = value;
        }
    }

    pub(super) fn flush(&mut self, off: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.pm.flush(off, len)?;
        self.note_flush(off, len);
        Ok(())
    }

    /// Counts a flush that somebody else did.
    fn note_flush(&mut self, off: u64, len: u64) {
        self.unfenced = true;
        self.stats.lines_flushed += lines_of(off, len);
    }

    /// Flushes the lines from `start` to `end`, but for those in `not`.
    fn flush_but(&mut self, start: u64, end: u64, not: &[(u64, u64)]) -> Result<()> {
        let Some(((from, to), not)) = not.split_first() else {
            return self.flush(start, end.saturating_sub(start));
        };
        if *to <= start || end <= *from {
            return self.flush_but(start, end, not);
        }
        if start < *from {
            self.flush_but(start, *from, not)?;
        }
        if *to < end {
            self.flush_but(*to, end, not)?;
        }
        Ok(())
    }

    /// Fences, if anything was flushed since the last time.
    fn fence(&mut self) {
        if self.unfenced {
            self.pm.fence();
            self.stats.fences += 1;
            self.unfenced = false;
        }
    }

    // ---- staging ----

    /// Stages one object: its bytes are written back, its frames held, its record
    /// written. Durable and visible only after [`commit`](Self::commit).
    ///
    /// The caller keeps the frames of the extents from being reused until this
    /// returns; from then on the store holds them itself.
    ///
    /// A failed put leaves nothing behind. Operations on one key in one batch
    /// behave as if they were committed one by one; so staging may commit what
    /// was staged before it, also when space is short.
    ///
    /// [`Error::NoSpace`], [`Error::Exists`] and [`Error::NotFound`] by
    /// `args.mode`, [`Error::TooLong`] for the key, [`Error::TooBig`],
    /// [`Error::Invalid`] for extents that are not in use or outside the data
    /// area, [`Error::ReadOnly`], [`Error::Io`].
    pub fn put(&mut self, args: &PutArgs<'_>) -> Result<PutOutcome> {
        self.writable()?;
        let draft = Draft::new(&self.geo, args.key, args.extents, &args.meta)?;
        if self.next_seq >= u64::MAX / 2 {
            return Err(Error::TooBig);
        }
        let key = draft.key_src();
        let hash = self.make_way(key.as_ref())?;
        let replaced = match &key {
            Some(key) => self.find_key(key)?.is_some(),
            None => false,
        };
        match args.mode {
            PutMode::Create if replaced => return Err(Error::Exists),
            PutMode::Replace if !replaced => return Err(Error::NotFound),
            _ => (),
        }
        if replaced && self.pending + self.staged_replaces >= MAX_PENDING {
            self.commit()?;
            self.sync_pending()?;
        }
        let (loc, word, seq) = match self.stage(&draft) {
            Err(Error::NoSpace) if self.staged + self.pending + self.empty > 0 => {
                self.commit()?;
                self.sync_pending()?;
                self.stage(&draft)?
            }
            other => other?,
        };
        self.push_staged(Staged {
            loc: loc.0,
            delete: false,
            word,
            hash,
        });
        self.staged_keys += u64::from(key.is_some());
        self.staged_replaces += usize::from(replaced);
        Ok(PutOutcome { seq, loc, replaced })
    }

    /// Stages the removal of the record with `key`; returns the sequence number
    /// of that record. Needs no space. [`Error::NotFound`] if there is none.
    pub fn delete(&mut self, key: &[u8]) -> Result<u64> {
        self.writable()?;
        let key = KeySrc::Bytes(key);
        let hash = self.make_way(Some(&key))?;
        let Some(loc) = self.find_key(&key)? else {
            return Err(Error::NotFound);
        };
        let seq = self.pm.load(loc + 8)?;
        let word = kill_word(&self.pm, Locator(loc))?;
        self.push_staged(Staged {
            loc,
            delete: true,
            word,
            hash,
        });
        Ok(seq)
    }

    /// Operations staged and not yet committed.
    pub fn staged(&self) -> usize {
        self.staged
    }

    /// Sees to it that there is room for one more staged operation, and that none
    /// with the same key is staged. Returns the key's hash.
    fn make_way(&mut self, key: Option<&KeySrc<'_>>) -> Result<Option<u32>> {
        if self.staged >= MAX_STAGED {
            self.commit()?;
        }
        let Some(key) = key else {
            return Ok(None);
        };
        let hash = key.hash(&self.pm)?;
        if self.word(self.hash_slot(hash)) != 0 {
            self.commit()?;
        }
        Ok(Some(hash))
    }

    /// Where in the working memory the hash is, or would be.
    fn hash_slot(&self, hash: u32) -> usize {
        let wanted = u64::from(hash) | (1 << 32);
        let start = hash as usize % HASH_SLOTS;
        // At most half of the slots are in use.
        (0..HASH_SLOTS)
            .map(|step| HASH_AT + (start + step) % HASH_SLOTS)
            .find(|slot| matches!(self.word(*slot), word if word == 0 || word == wanted))
            .unwrap_or(HASH_AT)
    }

    /// Clears the slots from a hash's first on. All hashes go at a time, so no
    /// chain is broken for one that stays.
    fn clear_hashes(&mut self, hash: u32) {
        let start = hash as usize % HASH_SLOTS;
        for step in 0..HASH_SLOTS {
            let slot = HASH_AT + (start + step) % HASH_SLOTS;
            if self.word(slot) == 0 {
                break;
            }
            self.set_word(slot, 0);
        }
    }

    fn push_staged(&mut self, staged: Staged) {
        if let Some(hash) = staged.hash {
            let slot = self.hash_slot(hash);
            self.set_word(slot, u64::from(hash) | (1 << 32));
        }
        let at = STAGED_AT + self.staged * STAGED_WORDS;
        self.set_word(at, staged.loc | u64::from(staged.delete));
        self.set_word(at + 1, staged.word);
        let hash = staged.hash.map_or(0, |hash| u64::from(hash) | (1 << 32));
        self.set_word(at + 2, hash);
        self.staged += 1;
    }

    fn staged_at(&self, index: usize) -> Staged {
        let at = STAGED_AT + index * STAGED_WORDS;
        let (loc, hash) = (self.word(at), self.word(at + 2));
        Staged {
            loc: loc & !1,
            delete: loc & 1 != 0,
            word: self.word(at + 1),
            hash: (hash != 0).then_some(hash as u32),
        }
    }

    /// Does what a put needs besides the index. On an error nothing has changed.
    fn stage(&mut self, draft: &Draft<'_>) -> Result<(Locator, u64, u64)> {
        self.reserve_nodes(self.staged_keys + 1)?;
        let payload = Packer::new(draft.extents);
        hold_all(&self.frames, payload.clone(), F::hold)?;
        let key = match draft.key {
            Key::Extent(extent) => Some(extent),
            _ => None,
        };
        let done = hold_all(&self.frames, key.iter().copied(), F::hold).and_then(|()| {
            let staged = self.stage_lists(draft);
            if staged.is_err() {
                self.unhold_all(key.iter().copied());
            }
            staged
        });
        if done.is_err() {
            self.unhold_all(payload);
        }
        done
    }

    fn unhold_all(&self, extents: impl Iterator<Item = Extent>) {
        for frame in extents.flat_map(Extent::frames) {
            let _ = self.frames.unhold(frame);
        }
    }

    /// Nodes for what may be inserted by this batch; and half as many as are in
    /// use, so that recovery finds room for a tree that is less well filled.
    fn reserve_nodes(&mut self, inserts: u64) -> Result<()> {
        self.set_keep(inserts);
        self.pool.reserve(&self.pm, &self.frames, self.pool.keep)
    }

    fn set_keep(&mut self, inserts: u64) {
        let need = self.keys.reserve(inserts) + self.log.reserve(1);
        let used = (self.pool.frames * 4).saturating_sub(self.pool.free);
        self.pool.keep = need + used / 2;
    }

    fn stage_lists(&mut self, draft: &Draft<'_>) -> Result<(Locator, u64, u64)> {
        let (first, count) = (self.alloc_lists(draft.list_frames())?, draft.list_frames());
        let staged = self.stage_record(draft, first);
        if staged.is_err() {
            self.free_lists(first, count);
        }
        staged
    }

    /// Allocates a chain of frames; each has the next one's offset at byte 24.
    fn alloc_lists(&mut self, count: u32) -> Result<u64> {
        let (mut first, mut last) = (0, 0);
        for done in 0..count {
            let Some(frame) = self.frames.alloc() else {
                self.free_lists(first, done);
                return Err(Error::NoSpace);
            };
            let linked = match done {
                0 => {
                    first = frame.off();
                    Ok(())
                }
                _ => self.pm.store(last + 24, frame.off()),
            };
            last = frame.off();
            self.stats.list_frames += 1;
            if linked.and_then(|()| self.pm.store(last + 24, 0)).is_err() {
                let _ = self.frames.unhold(frame);
                self.stats.list_frames -= 1;
                self.free_lists(first, done);
                return Err(Error::Io);
            }
        }
        Ok(first)
    }

    fn free_lists(&mut self, first: u64, count: u32) {
        let mut at = first;
        for _ in 0..count {
            let next = self.pm.load(at.saturating_add(24)).unwrap_or(0);
            self.free_list(at);
            at = next;
        }
    }

    fn free_list(&mut self, at: u64) {
        if let Some(frame) = Frame::of(at) {
            let _ = self.frames.unhold(frame);
            self.stats.list_frames = self.stats.list_frames.saturating_sub(1);
        }
    }

    fn stage_record(&mut self, draft: &Draft<'_>, first_list: u64) -> Result<(Locator, u64, u64)> {
        let lines = u64::from(draft.lines);
        let open = match self.open {
            Some(open) if open.line + lines <= LINES => open,
            _ => self.open_frame()?,
        };
        let seq = self.next_seq;
        let loc = Locator(open.header.off + open.line * LINE_SIZE);
        let nonce = open.header.nonce;
        if !cfg!(pmskb_break = "payload_flush") {
            self.flush_payload(draft)?;
        }
        let word = write(&self.pm, draft, loc, nonce, seq, first_list)?;
        if draft.list_frames() > 0 {
            write_lists(&self.pm, draft, nonce, seq, first_list, |off, len| {
                self.unfenced = true;
                self.stats.lines_flushed += lines_of(off, len);
            })?;
        }
        let frame = Frame::of(open.header.off).ok_or(Error::Damaged)?;
        self.frames.hold(frame)?;
        self.open = Some(Open {
            line: open.line + lines,
            ..open
        });
        self.next_seq += 1;
        Ok((loc, word, seq))
    }

    /// Writes back the object's and the key's lines, each once.
    fn flush_payload(&mut self, draft: &Draft<'_>) -> Result<()> {
        let lines = |extent: Extent| {
            let end = extent.end().next_multiple_of(LINE_SIZE);
            (extent.off / LINE_SIZE * LINE_SIZE, end)
        };
        let mut done = [(0, 0); 2];
        if let Key::Extent(extent) = draft.key {
            let (start, end) = lines(extent);
            self.flush(start, end - start)?;
            done = [(start, end), (0, 0)];
        }
        let [key, _] = done;
        let mut last = (0, 0);
        for extent in Packer::new(draft.extents) {
            let (start, end) = lines(extent);
            self.flush_but(start, end, &[key, last])?;
            last = (start, end);
        }
        Ok(())
    }

    /// Begins a new record frame.
    fn open_frame(&mut self) -> Result<Open> {
        let frame = self.frames.alloc().ok_or(Error::NoSpace)?;
        let opened = self.init_frame(frame);
        match opened {
            Ok(open) => {
                let before = self.open.replace(open);
                if let Some(before) = before.and_then(|open| Frame::of(open.header.off)) {
                    // It may have become empty while it was open.
                    self.frames.hold(before)?;
                    self.drop_record_frame(before)?;
                }
            }
            Err(_) => {
                let _ = self.frames.unhold(frame);
            }
        }
        opened
    }

    fn init_frame(&mut self, frame: Frame) -> Result<Open> {
        let epoch = self.sb.attaches;
        let header = FrameHeader::new(&self.pm, self.sb.salt, frame.off(), self.next_seq, epoch);
        header.write(&self.pm, &self.sb.uuid, epoch)?;
        self.note_flush(frame.off(), LINE_SIZE);
        self.set_map(frame, true)?;
        let key = header.base_seq.to_be_bytes();
        let key = KeySrc::Bytes(&key);
        let old = self
            .log
            .insert(&self.pm, &mut self.pool, &key, header.off)?;
        if old.is_some() {
            return Err(Error::Damaged);
        }
        self.stats.record_frames += 1;
        Ok(Open { header, line: 1 })
    }

    /// Sets or clears a frame's bit in the map and starts the write-back.
    pub(super) fn set_map(&mut self, frame: Frame, used: bool) -> Result<()> {
        let (at, bit) = self.geo.map_bit(frame);
        let word = self.pm.load(at)?;
        let word = if used { word | bit } else { word & !bit };
        self.pm.store(at, word)?;
        if cfg!(pmskb_break = "map_flush") {
            return Ok(());
        }
        self.flush(at, 8)
    }

    /// The same for recovery, which inserts records one by one.
    pub(super) fn reserve_for_recovery(&mut self) -> Result<()> {
        let need = self.keys.reserve(1) + self.log.reserve(1);
        self.pool.keep = need;
        self.pool.reserve(&self.pm, &self.frames, need)
    }

    /// Sees to it that one more record can be retired.
    pub(super) fn make_room_pending(&mut self) -> Result<()> {
        if self.pending < MAX_PENDING {
            return Ok(());
        }
        if self.read_only {
            // Nothing is killed; the list is only to know what is not live.
            self.pending = 0;
            return Ok(());
        }
        self.sync_pending()
    }

    // ---- commit ----

    /// Makes all that is staged durable, then visible to readers. Two fences
    /// however much it is, none if nothing is staged.
    ///
    /// After an error the store refuses changes: what was staged may be there or
    /// not after the next recovery.
    pub fn commit(&mut self) -> Result<()> {
        if self.staged == 0 {
            return Ok(());
        }
        self.writable()?;
        let done = self.commit_staged();
        self.failed = done.is_err();
        done
    }

    fn commit_staged(&mut self) -> Result<()> {
        self.store_kills()?;
        let closed = self.close_empty()?;
        if cfg!(pmskb_break = "fence1") {
            self.unfenced = false;
        }
        self.fence();
        self.give_back(closed)?;
        self.release_pending()?;

        let closed = self.close_empty()?;
        for index in 0..self.staged {
            let staged = self.staged_at(index);
            let lines = if staged.delete {
                1
            } else {
                (staged.word >> 40) & 0xff
            };
            self.pm.store(staged.loc, staged.word)?;
            if !cfg!(pmskb_break = "record_flush") {
                self.flush(staged.loc, lines * LINE_SIZE)?;
            }
        }
        if cfg!(pmskb_break = "fence2") {
            self.unfenced = false;
        }
        self.fence();
        self.give_back(closed)?;

        // Durable from here on; so it may be seen.
        self.stats.durable_seq = self.next_seq - 1;
        self.pm.store(live::DURABLE_SEQ, self.stats.durable_seq)?;
        let count = core::mem::take(&mut self.staged);
        for index in 0..count {
            let staged = self.staged_at(index);
            if let Some(hash) = staged.hash {
                self.clear_hashes(hash);
            }
            if staged.delete {
                self.index_delete(Locator(staged.loc))?;
            } else {
                self.index_put(Locator(staged.loc))?;
            }
        }
        // The next batch may be like this one.
        self.set_keep(self.staged_keys.min(64));
        (self.staged_keys, self.staged_replaces) = (0, 0);
        self.pool.trim(&self.pm, &self.frames)?;
        self.publish()
    }

    /// Adds a record to the numbers.
    pub(super) fn count(&mut self, loc: Locator) -> Result<()> {
        self.stats.records += 1;
        self.stats.live_bytes += self.pm.load(loc.0 + 24)? & 0xffff_ffff;
        Ok(())
    }

    /// Adds a durable record to the index and the numbers.
    pub(super) fn index_put(&mut self, loc: Locator) -> Result<()> {
        self.count(loc)?;
        if (self.pm.load(loc.0)? >> 48) & u64::from(super::record::F_KEYED) == 0 {
            return Ok(());
        }
        let key = key_of(&self.pm, loc.0)?;
        match self.keys.insert(&self.pm, &mut self.pool, &key, loc.0)? {
            Some(old) => self.retire(Locator(old)),
            None => {
                self.stats.keys += 1;
                Ok(())
            }
        }
    }

    /// A record lost its key to a later one: it is killed with the next batch.
    pub(super) fn retire(&mut self, loc: Locator) -> Result<()> {
        self.uncount(loc)?;
        if self.pending >= MAX_PENDING {
            return Err(Error::Damaged);
        }
        self.set_word(PENDING_AT + self.pending, loc.0);
        self.pending += 1;
        Ok(())
    }

    fn uncount(&mut self, loc: Locator) -> Result<()> {
        let len = self.pm.load(loc.0 + 24)? & 0xffff_ffff;
        self.stats.records = self.stats.records.saturating_sub(1);
        self.stats.live_bytes = self.stats.live_bytes.saturating_sub(len);
        Ok(())
    }

    /// Takes a record whose kill is durable out of the index.
    fn index_delete(&mut self, loc: Locator) -> Result<()> {
        self.uncount(loc)?;
        self.stats.keys = self.stats.keys.saturating_sub(1);
        let key = key_of(&self.pm, loc.0)?;
        let (pm, frames) = (&self.pm, &self.frames);
        self.keys.remove(pm, frames, &mut self.pool, &key)?;
        self.release(loc)
    }

    /// Writes the live page's counters.
    pub(super) fn publish(&mut self) -> Result<()> {
        self.pm.store(live::RECORDS, self.stats.records)?;
        self.pm.store(live::KEYS, self.stats.keys)?;
        self.pm.store(live::LIVE_BYTES, self.stats.live_bytes)
    }

    // ---- giving space back ----

    /// Kills what waits for it; durable after the next fence.
    fn store_kills(&mut self) -> Result<()> {
        for index in 0..self.pending {
            let loc = self.word(PENDING_AT + index);
            let word = kill_word(&self.pm, Locator(loc))?;
            self.pm.store(loc, word)?;
            if !cfg!(pmskb_break = "kill_flush") {
                self.flush(loc, 8)?;
            }
        }
        Ok(())
    }

    /// Gives back what killed records held; their kills are durable.
    fn release_pending(&mut self) -> Result<()> {
        for index in 0..core::mem::take(&mut self.pending) {
            self.release(Locator(self.word(PENDING_AT + index)))?;
        }
        Ok(())
    }

    /// Gives back what a dead record held, and its place in its frame.
    fn release(&mut self, loc: Locator) -> Result<()> {
        let record = read_dead(&self.pm, loc)?;
        let (pm, geo) = (&self.pm, &self.geo);
        // What a damaged list leads to stays held until the next recovery.
        for extent in record.extents(pm, geo).map_while(Result::ok) {
            self.unhold_all(core::iter::once(extent));
        }
        self.unhold_all(record.key_extent(pm)?.into_iter());
        let mut lists = 0;
        for frame in record.lists(pm, geo).map_while(Result::ok) {
            let _ = self.frames.unhold(frame);
            lists += 1;
        }
        self.stats.list_frames = self.stats.list_frames.saturating_sub(lists);
        let frame = Frame::of(loc.frame_off()).ok_or(Error::Damaged)?;
        self.drop_record_frame(frame)
    }

    /// One record less in a frame; the frame goes when it was the last.
    fn drop_record_frame(&mut self, frame: Frame) -> Result<()> {
        let left = self.frames.unhold(frame)?;
        let open = self.open.is_some_and(|open| open.header.off == frame.off());
        if left != 1 || open || self.empty >= MAX_EMPTY {
            return Ok(());
        }
        let base = self.pm.load(frame.off() + 16)?.to_be_bytes();
        let (pm, frames) = (&self.pm, &self.frames);
        let key = KeySrc::Bytes(&base);
        self.log.remove(pm, frames, &mut self.pool, &key)?;
        self.set_word(EMPTY_AT + self.empty, frame.off());
        self.empty += 1;
        Ok(())
    }

    /// Makes empty record frames invalid; how many there are now that may be
    /// given back after the next fence.
    fn close_empty(&mut self) -> Result<usize> {
        for index in 0..self.empty {
            let off = self.word(EMPTY_AT + index);
            self.pm.store(off, 0)?;
            self.flush(off, 8)?;
            self.set_map(Frame::of(off).ok_or(Error::Damaged)?, false)?;
        }
        Ok(self.empty)
    }

    /// Gives the first `count` empty frames back.
    fn give_back(&mut self, count: usize) -> Result<()> {
        for index in 0..count {
            let frame = Frame::of(self.word(EMPTY_AT + index)).ok_or(Error::Damaged)?;
            self.frames.unhold(frame)?;
            self.stats.record_frames = self.stats.record_frames.saturating_sub(1);
        }
        for index in count..self.empty {
            let word = self.word(EMPTY_AT + index);
            self.set_word(EMPTY_AT + index - count, word);
        }
        self.empty = self.empty.saturating_sub(count);
        Ok(())
    }

    /// Gives the space of replaced and deleted records back at once, which
    /// otherwise the next commit does. Commits nothing. At most two fences.
    pub fn sync_pending(&mut self) -> Result<()> {
        if self.pending == 0 && self.empty == 0 {
            return Ok(());
        }
        self.writable()?;
        let done = self.sync_all();
        self.failed = done.is_err();
        done
    }

    fn sync_all(&mut self) -> Result<()> {
        // What is empty now is closed with the frames that the kills empty.
        if self.pending > 0 {
            self.store_kills()?;
            self.fence();
            self.release_pending()?;
        }
        let closed = self.close_empty()?;
        self.fence();
        self.give_back(closed)
    }

    /// Ends the store's life: commits, gives back what is pending, makes the live
    /// page invalid. Returns what it was made of.
    pub fn close(mut self) -> (Result<()>, P, F, B) {
        let mut done = self.commit();
        if !self.read_only {
            done = done.and_then(|()| self.sync_pending());
        }
        let cleared = live::clear(&self.pm);
        (done.and(cleared), self.pm, self.frames, self.work)
    }

    // ---- reading ----

    pub(super) fn find_key(&self, key: &KeySrc<'_>) -> Result<Option<u64>> {
        let found = find(&self.pm, Kind::Keys, live::KEY_ROOT, key, Goal::Exact)?;
        Ok(found.map(|found| found.loc))
    }

    /// Where the record with `key` is; committed ones only.
    pub fn lookup(&self, key: &[u8]) -> Result<Option<Locator>> {
        Ok(self.find_key(&KeySrc::Bytes(key))?.map(Locator))
    }

    /// Reads and checks the record at `loc`. [`Error::NotFound`] if it was
    /// deleted or replaced meanwhile, [`Error::Damaged`] if there is none.
    pub fn record(&self, loc: Locator) -> Result<Record> {
        self.geo.check_frame(loc.frame_off())?;
        let header = FrameHeader::read(&self.pm, loc.frame_off(), &self.sb.uuid)?;
        match parse(&self.pm, &self.geo, &header, loc.line())? {
            Line::Put(record) => Ok(record),
            Line::Killed { .. } => Err(Error::NotFound),
            _ => Err(Error::Damaged),
        }
    }

    /// The record with the next key in a direction: above (below) `key`, or with
    /// it if `inclusive`. From that end of the index if `key` is `None`.
    pub fn seek(
        &self,
        key: Option<&[u8]>,
        inclusive: bool,
        direction: Direction,
    ) -> Result<Option<Locator>> {
        let (key, goal) = view(key, inclusive, direction);
        let found = find(&self.pm, Kind::Keys, live::KEY_ROOT, &key, goal)?;
        Ok(found.map(|found| Locator(found.loc)))
    }

    /// The live record with the lowest sequence number that is `seq` or more;
    /// committed ones only.
    pub fn log_from(&self, seq: u64) -> Result<Option<Record>> {
        log_next(&self.view(), seq, None)
    }

    /// The live record that follows in the log. Faster than
    /// `log_from(record.seq + 1)`.
    pub fn log_after(&self, record: &Record) -> Result<Option<Record>> {
        log_next(&self.view(), record.seq.saturating_add(1), Some(record))
    }

    fn view(&self) -> View<'_, P> {
        View {
            pm: &self.pm,
            geo: &self.geo,
            uuid: &self.sb.uuid,
        }
    }

    /// Numbers about the store.
    pub fn stats(&self) -> Stats {
        Stats {
            index_frames: self.pool.frames,
            pending: self.pending as u64,
            ..self.stats
        }
    }

    /// Where the areas are.
    pub fn geometry(&self) -> &Geometry {
        &self.geo
    }

    /// The superblock as of attach.
    pub fn superblock(&self) -> &Superblock {
        &self.sb
    }

    /// Whether changes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only || self.failed
    }

    /// The region.
    pub fn pm(&self) -> &P {
        &self.pm
    }

    /// The allocator.
    pub fn frames(&self) -> &F {
        &self.frames
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
