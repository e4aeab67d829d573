// SPDX-License-Identifier: GPL-2.0

//! A store: put, delete, commit.
//!
//! A commit costs two fences:
//!
//! 1. put: payload, key and extent lists are written back; the record is
//!    written, its first word 0. Before the first fence also the kills of records
//!    that the commit before replaced, headers and map words of frames opened.
//! 2. *fence*
//! 3. The first word of each record is stored, those of deleted records are
//!    overwritten; their lines are written back. So are headers and map words of
//!    frames that are empty.
//! 4. *fence*: all is durable. What the kills of 1 held, and the empty frames, are
//!    given back; the index is changed.
//!
//! A record that is replaced is killed one commit later, so that there is no
//! instant at which a crash would leave neither. A record is never killed before
//! the kills of older ones with its key are fenced: they could come back.
//!
//! If nothing was written back before the first fence (bytes that were durable
//! already, [`Store::put_durable`]; objects of no bytes; deletes), it is left out.
//!
//! Atomic: the words of 3 go into a batch area (`batch.rs`) before the first
//! fence, and one word there is what 3 stores. They are stored in their places
//! after the second.

use super::batch::{self, Batch};
use super::frame::{hold_all, unhold_all, Need};
use super::node::{Kind, Pool};
use super::pmem::lines_of;
use super::reader::{current, log_next, view, Direction, View};
use super::record::{
    is_put, key_by, key_of, kill_word, kill_word_by, parse, read_staged, write, write_lists, Draft,
    FrameHeader, Key, KeySrc, Line, Locator, Meta, PutMode, Record, LINES, NEAR,
};
use super::superblock::Superblock;
use super::tree::{find, Goal, Tree};
use super::{
    live, Buf, Error, Extent, Frame, Frames, Geometry, Packer, Pmem, Result, LINE_SIZE, MAX_STAGED,
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
    /// Only if the key's record has this sequence number; 0: only if it has none.
    pub if_seq: Option<u64>,
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

/// What [`Store::log_pass`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passed {
    /// The next record that can be read; nothing before it is lost.
    Record(Record),
    /// A record may have been there that cannot be read, or more than one: the lowest
    /// number, and where the log goes on, if it does.
    Lost {
        /// That number.
        seq: u64,
        /// Where to go on.
        next: Option<u64>,
    },
    /// No more in this frame, and where the log goes on.
    Nothing {
        /// Where to go on.
        next: Option<u64>,
    },
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
    /// Lines of live records.
    pub record_lines: u64,
    /// Highest sequence number known durable.
    pub durable_seq: u64,
    /// Records without a key up to this one are gone.
    pub trunc_seq: u64,
    /// Frames that hold records.
    pub record_frames: u64,
    /// Frames that hold extent lists.
    pub list_frames: u64,
    /// Frames that hold the index.
    pub index_frames: u64,
    /// Replaced records whose space comes back with the next commit.
    pub pending: u64,
    /// Payload bytes of those.
    pub pending_bytes: u64,
    /// Of `record_frames`, those that are empty and come back with the next commit.
    pub empty_frames: u64,
    /// Truncated records whose space [`Store::drain`] has yet to give back.
    pub draining: bool,
    /// Records moved by compaction since recovery.
    pub moved_records: u64,
    /// Payload bytes moved by compaction since recovery.
    pub moved_bytes: u64,
    /// Cache lines written back since recovery.
    pub lines_flushed: u64,
    /// Fences since recovery.
    pub fences: u64,
}

/// Records that are replaced and not yet killed, at most: of one commit, and what
/// recovery finds between two fences.
const MAX_PENDING: usize = MAX_STAGED;
/// Record frames that are empty and not yet given back, at most: of one commit's
/// kills, deletes and cancelled puts, and as many that wait for their fence.
pub(super) const MAX_EMPTY: usize = 4 * MAX_STAGED;
const HASH_SLOTS: usize = 2 * MAX_STAGED;

// The parts of the working memory, in words.
const STAGED_AT: usize = 0;
const STAGED_WORDS: usize = 3;
const HASH_AT: usize = STAGED_AT + STAGED_WORDS * MAX_STAGED;
const PENDING_AT: usize = HASH_AT + HASH_SLOTS;
const EMPTY_AT: usize = PENDING_AT + MAX_PENDING;
const WORK_WORDS: usize = EMPTY_AT + MAX_EMPTY;

/// What waits for a commit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    Put,
    Delete,
    /// Nothing any more: a later operation on its key undid it.
    Gone,
}

/// An operation that waits for its commit.
#[derive(Clone, Copy)]
struct Staged {
    kept: Kept,
    /// The new record, or the one to delete.
    loc: u64,
    /// What to store in its first word.
    word: u64,
    /// Hash of its key.
    hash: Option<u32>,
}

/// What is known of a key before an operation on it.
#[derive(Default)]
struct Now {
    /// The key's hash, and its slot of the hash table.
    hash: Option<(u32, usize)>,
    /// The last staged operation on the key.
    staged: Option<usize>,
    /// Its committed record.
    committed: Option<u64>,
    /// Sequence number of the record that it has, all that is staged being done;
    /// 0 if none.
    seq: u64,
}

/// The frame that records are appended to.
#[derive(Clone, Copy)]
pub(super) struct Open {
    pub(super) header: FrameHeader,
    /// The next unused line.
    pub(super) line: u64,
}

/// A store that is attached.
///
/// One thread at a time may change it; the host holds a mutex. No method sleeps
/// or loops without a bound, but those that go over all records say so.
pub struct Store<P, F, B> {
    pub(super) pm: P,
    pub(super) frames: F,
    pub(super) work: B,
    pub(super) geo: Geometry,
    pub(super) sb: Superblock,
    pub(super) keys: Tree,
    pub(super) log: Tree,
    pub(super) pool: Pool,
    pub(super) stats: Stats,
    pub(super) next_seq: u64,
    pub(super) open: Option<Open>,
    /// Record frames begun since recovery.
    opened: u64,
    staged: usize,
    /// Of them, those that are not gone.
    staged_kept: usize,
    /// Of them, puts with a key.
    staged_keys: u64,
    /// What is staged is committed together or not at all.
    atomic: bool,
    /// The number of the next batch.
    pub(super) batch_number: u64,
    /// Where a batch is in force, whose words are stored and not yet fenced.
    pub(super) batch: Option<u64>,
    pub(super) pending: usize,
    pub(super) empty: usize,
    /// Records without a key up to this one were dead at recovery: they hold nothing.
    pub(super) dead_seq: u64,
    /// Where to go on giving back what was truncated: a base sequence number.
    pub(super) drain_from: u64,
    /// The frame that compaction copies payload into, and how much is used of it.
    pub(super) fill: Option<(Frame, u64)>,
    /// Something was flushed since the last fence.
    pub(super) unfenced: bool,
    pub(super) read_only: bool,
    /// Index or media can no longer be trusted to be in step.
    pub(super) failed: bool,
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
            opened: 0,
            staged: 0,
            staged_kept: 0,
            staged_keys: 0,
            atomic: false,
            batch_number: 0,
            batch: None,
            pending: 0,
            empty: 0,
            dead_seq: 0,
            drain_from: 0,
            fill: None,
            unfenced: false,
            read_only: false,
            failed: false,
        })
    }

    pub(super) fn writable(&self) -> Result<()> {
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

    pub(super) fn pending_at(&self, index: usize) -> Locator {
        Locator(self.word(PENDING_AT + index))
    }

    pub(super) fn set_pending(&mut self, index: usize, loc: Locator) {
        self.set_word(PENDING_AT + index, loc.0);
    }

    /// Offset of an empty record frame.
    pub(super) fn empty_at(&self, index: usize) -> u64 {
        self.word(EMPTY_AT + index)
    }

    pub(super) fn set_empty(&mut self, index: usize, off: u64) {
        self.set_word(EMPTY_AT + index, off);
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
    pub(super) fn note_flush(&mut self, off: u64, len: u64) {
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
    pub(super) fn fence(&mut self) {
        if self.unfenced {
            self.pm.fence();
            self.stats.fences += 1;
            self.unfenced = false;
        }
    }

    /// Fences what was written back since the last fence: the words of a batch that is
    /// in force, a record frame that an aborted put has opened. The next commit's
    /// first fence does it otherwise; this is for hosts where that may be another
    /// CPU's: a fence covers what its own CPU has written back.
    pub fn settle(&mut self) {
        self.fence();
    }

    // ---- staging ----

    /// Commits what is staged, and makes what is staged from here to the next
    /// [`commit`](Self::commit) all or nothing: across a crash, and for readers
    /// that use [`Reader::snapshot`](super::Reader::snapshot). After an error of
    /// one operation the caller decides: [`abort`](Self::abort), or go on without
    /// it. At most [`MAX_STAGED`] operations, else [`Error::TooBig`].
    pub fn begin_atomic(&mut self) -> Result<()> {
        self.commit()?;
        self.atomic = true;
        Ok(())
    }

    /// Drops all that is staged, as if it had never been.
    pub fn abort(&mut self) {
        for index in 0..self.staged {
            // What cannot be given back stays held until the next recovery.
            let _ = self.cancel(index);
        }
        self.forget_staged();
    }

    /// Stages one object: its bytes are written back, its frames held, its record
    /// written. Durable and visible only after [`commit`](Self::commit).
    ///
    /// The caller keeps the frames of the extents from being reused until this
    /// returns; from then on the store holds them itself.
    ///
    /// A failed put leaves nothing behind. Operations on one key behave as if they
    /// were committed one by one. If they are not to be atomic, staging may commit
    /// what was staged before: the operation after [`MAX_STAGED`], and when space
    /// is short.
    ///
    /// [`Error::NoSpace`], [`Error::Exists`] and [`Error::NotFound`] by
    /// `args.mode`, [`Error::Stale`] by `args.if_seq`, [`Error::TooLong`] for the
    /// key, [`Error::TooBig`], [`Error::Invalid`] for extents that are not in use
    /// or outside the data area, [`Error::ReadOnly`], [`Error::Io`].
    pub fn put(&mut self, args: &PutArgs<'_>) -> Result<PutOutcome> {
        self.put_bytes(args, !broken!("payload_flush"))
    }

    /// A [`put`](Self::put) of bytes, and of a key extent, that somebody has written
    /// back *and fenced* before, many at a time perhaps. They are not written back
    /// again, and the commit costs one fence if nothing else needs the first: no put of
    /// another kind, no record frame to begin, no extent list, no replaced record.
    pub fn put_durable(&mut self, args: &PutArgs<'_>) -> Result<PutOutcome> {
        self.put_bytes(args, false)
    }

    fn put_bytes(&mut self, args: &PutArgs<'_>, flush: bool) -> Result<PutOutcome> {
        self.writable()?;
        let draft = Draft::new(&self.geo, args.key, args.extents, &args.meta)?;
        if self.next_seq >= u64::MAX / 2 {
            return Err(Error::TooBig);
        }
        let mut near = [0; NEAR];
        let key = match draft.key {
            Some(key) => Some(key.near(&self.pm, &mut near)?),
            None => None,
        };
        let mut now = self.look(key.as_ref())?;
        let replaced = now.seq != 0;
        match args.mode {
            PutMode::Create if replaced => return Err(Error::Exists),
            PutMode::Replace if !replaced => return Err(Error::NotFound),
            _ => (),
        }
        if args.if_seq.is_some_and(|seq| seq != now.seq) {
            return Err(Error::Stale);
        }
        let (loc, word, seq) = match self.stage(&draft, flush) {
            Err(Error::NoSpace) => {
                if !self.atomic {
                    self.commit()?;
                    // What was staged is committed now.
                    now = self.look(key.as_ref())?;
                }
                self.sync_pending()?;
                self.stage(&draft, flush)?
            }
            other => other?,
        };
        self.supersede(&now)?;
        self.push_staged(Kept::Put, loc.0, word, &now);
        self.staged_keys += u64::from(draft.key.is_some());
        Ok(PutOutcome { seq, loc, replaced })
    }

    /// Stages the removal of the record with `key`; returns the sequence number
    /// of that record. Needs no space. [`Error::NotFound`] if there is none,
    /// [`Error::Stale`] if it is not `if_seq`.
    pub fn delete(&mut self, key: &[u8], if_seq: Option<u64>) -> Result<u64> {
        self.writable()?;
        let now = self.look(Some(&KeySrc::Bytes(key)))?;
        if now.seq == 0 {
            return Err(Error::NotFound);
        }
        if if_seq.is_some_and(|seq| seq != now.seq) {
            return Err(Error::Stale);
        }
        let word = match now.committed {
            Some(loc) => kill_word(&self.pm, Locator(loc))?,
            None => 0,
        };
        self.supersede(&now)?;
        if let Some(loc) = now.committed {
            self.push_staged(Kept::Delete, loc, word, &now);
        }
        Ok(now.seq)
    }

    /// Operations staged and not yet committed.
    pub fn staged(&self) -> usize {
        self.staged
    }

    /// Sees to it that there is room for one more staged operation, and looks at
    /// what is known of its key.
    fn look(&mut self, key: Option<&KeySrc<'_>>) -> Result<Now> {
        if self.staged >= MAX_STAGED {
            if self.atomic {
                return Err(Error::TooBig);
            }
            self.commit()?;
        }
        let Some(key) = key else {
            return Ok(Now::default());
        };
        let hash = key.hash(&self.pm)?;
        let (slot, staged) = self.find_slot(key, hash)?;
        let committed = self.find_key(key)?;
        let of = match staged.map(|index| self.staged_at(index)) {
            Some(staged) if staged.kept == Kept::Put => Some(staged.loc),
            Some(_) => None,
            None => committed,
        };
        Ok(Now {
            hash: Some((hash, slot)),
            staged,
            committed,
            seq: match of {
                Some(loc) => self.pm.load(loc + 8)?,
                None => 0,
            },
        })
    }

    /// A key's slot in the hash table of what is staged: the one that names its
    /// last operation, or the one where that would be put.
    fn find_slot(&self, key: &KeySrc<'_>, hash: u32) -> Result<(usize, Option<usize>)> {
        let start = hash as usize % HASH_SLOTS;
        // At most half of the slots are in use.
        for slot in (0..HASH_SLOTS).map(|step| HASH_AT + (start + step) % HASH_SLOTS) {
            let Some(index) = self.word(slot).checked_sub(1) else {
                return Ok((slot, None));
            };
            let staged = self.staged_at(index as usize);
            // One that is gone is the last of its key only if there is no record.
            if staged.hash == Some(hash) && staged.kept != Kept::Gone {
                let other = key_by(&self.pm, staged.loc, staged.word)?;
                if other.compare(&self.pm, key, usize::MAX)?.0.is_eq() {
                    return Ok((slot, Some(index as usize)));
                }
            }
        }
        Err(Error::Damaged)
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

    fn push_staged(&mut self, kept: Kept, loc: u64, word: u64, now: &Now) {
        let index = self.staged;
        if let Some((_, slot)) = now.hash {
            self.set_word(slot, index as u64 + 1);
        }
        self.set_staged(
            index,
            Staged {
                kept,
                loc,
                word,
                hash: now.hash.map(|(hash, _)| hash),
            },
        );
        self.staged += 1;
        self.staged_kept += 1;
    }

    fn set_staged(&mut self, index: usize, staged: Staged) {
        let at = STAGED_AT + index * STAGED_WORDS;
        // A record is at a multiple of 64.
        let kept = match staged.kept {
            Kept::Put => 0,
            Kept::Delete => 1,
            Kept::Gone => 2,
        };
        self.set_word(at, staged.loc | kept);
        self.set_word(at + 1, staged.word);
        let hash = staged.hash.map_or(0, |hash| u64::from(hash) | (1 << 32));
        self.set_word(at + 2, hash);
    }

    fn staged_at(&self, index: usize) -> Staged {
        let at = STAGED_AT + index * STAGED_WORDS;
        let (loc, hash) = (self.word(at), self.word(at + 2));
        Staged {
            kept: match loc & 3 {
                0 => Kept::Put,
                1 => Kept::Delete,
                _ => Kept::Gone,
            },
            loc: loc & !3,
            word: self.word(at + 1),
            hash: (hash != 0).then_some(hash as u32),
        }
    }

    /// Undoes a staged operation. Its key's slot goes on naming it.
    fn cancel(&mut self, index: usize) -> Result<()> {
        let staged = self.staged_at(index);
        if staged.kept == Kept::Gone {
            return Ok(());
        }
        self.staged_kept -= 1;
        let kept = Kept::Gone;
        self.set_staged(index, Staged { kept, ..staged });
        if staged.kept == Kept::Put {
            let record = read_staged(&self.pm, Locator(staged.loc), staged.word)?;
            // Whoever looks for records goes on after it, and not in it: its key may be anything.
            // It leaves its sequence number behind, too, which was told to somebody.
            if !broken!("undone_records") {
                let word = kill_word_by(&self.pm, Locator(staged.loc), staged.word)?;
                self.pm.store(staged.loc, word)?;
                self.flush(staged.loc, LINE_SIZE)?;
            }
            self.release(&record)?;
        }
        Ok(())
    }

    /// Undoes what is staged for a key, as what follows takes its place.
    fn supersede(&mut self, now: &Now) -> Result<()> {
        let Some(index) = now.staged else {
            return Ok(());
        };
        let done = self.cancel(index);
        // Its caller was told that it is staged: if nothing takes its place, no commit may
        // tell that it is durable.
        self.failed |= done.is_err();
        done
    }

    /// Nothing is staged any more.
    fn forget_staged(&mut self) {
        for index in 0..core::mem::take(&mut self.staged) {
            if let Some(hash) = self.staged_at(index).hash {
                self.clear_hashes(hash);
            }
        }
        (self.staged_kept, self.staged_keys, self.atomic) = (0, 0, false);
    }

    /// Does what a put needs besides the index. On an error nothing has changed.
    fn stage(&mut self, draft: &Draft<'_>, flush: bool) -> Result<(Locator, u64, u64)> {
        self.reserve_nodes(self.staged_keys + 1)?;
        let payload = Packer::new(draft.extents);
        hold_all(&self.frames, payload.clone(), F::hold)?;
        let done = hold_all(&self.frames, draft.key_extent.into_iter(), F::hold).and_then(|()| {
            let staged = self.stage_lists(draft, flush);
            if staged.is_err() {
                unhold_all(&self.frames, draft.key_extent.into_iter());
            }
            staged
        });
        if done.is_err() {
            unhold_all(&self.frames, payload);
        }
        done
    }

    /// Nodes for what may be inserted by this commit; and half as many as are in
    /// use, so that recovery finds room for a tree that is less well filled.
    fn reserve_nodes(&mut self, inserts: u64) -> Result<()> {
        self.set_keep(inserts);
        let keep = self.pool.keep;
        self.pool.reserve(&self.pm, &self.frames, keep, Need::New)
    }

    pub(super) fn set_keep(&mut self, inserts: u64) {
        let need = self.keys.reserve(inserts) + self.log.reserve(1);
        let used = (self.pool.frames * 4).saturating_sub(self.pool.free);
        self.pool.keep = need + used / 2;
    }

    fn stage_lists(&mut self, draft: &Draft<'_>, flush: bool) -> Result<(Locator, u64, u64)> {
        let count = draft.list_frames();
        let first = self.alloc_lists(count, Need::New)?;
        let staged = self.stage_record(draft, first, flush);
        if staged.is_err() {
            self.free_lists(first, count);
        }
        staged
    }

    /// Allocates a chain of frames; each has the next one's offset at byte 24.
    pub(super) fn alloc_lists(&mut self, count: u32, need: Need) -> Result<u64> {
        let (mut first, mut last) = (0, 0);
        for done in 0..count {
            let Some(frame) = self.frames.alloc(None, need) else {
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
                let _ = self.frames.unhold(frame, 0);
                self.stats.list_frames -= 1;
                self.free_lists(first, done);
                return Err(Error::Io);
            }
        }
        Ok(first)
    }

    pub(super) fn free_lists(&mut self, first: u64, count: u32) {
        let mut at = first;
        for _ in 0..count {
            let next = self.pm.load(at.saturating_add(24)).unwrap_or(0);
            if let Some(frame) = Frame::of(at) {
                let _ = self.frames.unhold(frame, 0);
                self.stats.list_frames = self.stats.list_frames.saturating_sub(1);
            }
            at = next;
        }
    }

    fn stage_record(
        &mut self,
        draft: &Draft<'_>,
        first_list: u64,
        flush: bool,
    ) -> Result<(Locator, u64, u64)> {
        if flush {
            self.flush_payload(draft)?;
        }
        let done = self.append(draft, first_list);
        if done != Err(Error::Io) {
            return done;
        }
        // It may as well be a list, or the index.
        let bad = |open: &Open| self.pm.load(open.header.off) == Err(Error::Io);
        let Some(open) = self.open.filter(bad) else {
            return done;
        };
        // The frame has gone bad, and what is in it stays. Now in another one.
        self.open = None;
        if open.header.base_seq == self.next_seq {
            // The log has that number already.
            self.next_seq += 1;
        }
        self.append(draft, first_list)
    }

    /// Appends a record to the frame that is open.
    fn append(&mut self, draft: &Draft<'_>, first_list: u64) -> Result<(Locator, u64, u64)> {
        let lines = u64::from(draft.lines);
        let open = match self.open {
            Some(open) if open.line + lines <= LINES => open,
            _ => self.open_frame()?,
        };
        let seq = self.next_seq;
        let loc = Locator(open.header.off + open.line * LINE_SIZE);
        let frame = Frame::of(open.header.off).ok_or(Error::Damaged)?;
        let written = self.write_record(draft, loc, open.header.nonce, seq, first_list);
        let held = written.and_then(|word| self.frames.hold(frame, 0).map(|()| word));
        if held.is_err() {
            // Nothing of it stays, whatever it looks like.
            for line in 0..lines {
                let _ = self.pm.store(loc.0 + line * LINE_SIZE, 0);
            }
        }
        let word = held?;
        self.open = Some(Open {
            line: open.line + lines,
            ..open
        });
        self.next_seq += 1;
        Ok((loc, word, seq))
    }

    /// Writes a record, but for its first word, which is returned, and its lists,
    /// whose write-back starts.
    pub(super) fn write_record(
        &mut self,
        draft: &Draft<'_>,
        loc: Locator,
        nonce: u32,
        seq: u64,
        first_list: u64,
    ) -> Result<u64> {
        let word = write(&self.pm, draft, loc, nonce, seq, first_list)?;
        if draft.list_frames() > 0 {
            write_lists(&self.pm, draft, nonce, seq, first_list, |off, len| {
                self.unfenced = true;
                self.stats.lines_flushed += lines_of(off, len);
            })?;
        }
        Ok(word)
    }

    /// Writes back the object's and the key's lines, each once.
    fn flush_payload(&mut self, draft: &Draft<'_>) -> Result<()> {
        let lines = |extent: Extent| {
            let end = extent.end().next_multiple_of(LINE_SIZE);
            (extent.off / LINE_SIZE * LINE_SIZE, end)
        };
        let mut key = (0, 0);
        if let Some(extent) = draft.key_extent {
            key = lines(extent);
            self.flush(key.0, key.1 - key.0)?;
        }
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
        let frame = self.frames.alloc(None, Need::New).ok_or(Error::NoSpace)?;
        let opened = self.init_frame(frame);
        match opened {
            Ok(open) => {
                let before = self.open.replace(open);
                if let Some(before) = before.and_then(|open| Frame::of(open.header.off)) {
                    // It may have become empty while it was open.
                    self.frames.hold(before, 0)?;
                    self.drop_record_frame(before)?;
                }
            }
            Err(_) => {
                // It may be a record frame by now, so it goes as one.
                self.stats.record_frames += 1;
                let _ = self.push_empty(frame);
            }
        }
        opened
    }

    fn init_frame(&mut self, frame: Frame) -> Result<Open> {
        self.blank(frame)?;
        let (header, _) = self.write_header(frame, self.next_seq, true)?;
        let key = header.base_seq.to_be_bytes();
        let key = KeySrc::Bytes(&key);
        let old = self.log.insert(&self.pm, &mut self.pool, &key, header.off);
        // Its nodes may be half written.
        self.failed |= old.is_err();
        if old?.is_some() {
            return Err(Error::Damaged);
        }
        self.stats.record_frames += 1;
        Ok(Open { header, line: 1 })
    }

    /// Whoever had the frame before may have known the salt, and guessed the rest of a nonce: what
    /// looks like a record in a frame that has none yet is made to look like nothing, durably with
    /// the next fence. It has no holds to give back. (If the power goes before that fence it may
    /// count at recovery, and then has holds.)
    pub(super) fn blank(&mut self, frame: Frame) -> Result<()> {
        for line in 1..LINES {
            let off = frame.off() + line * LINE_SIZE;
            let mut word = [0; 8];
            // What cannot be read now may be later.
            let read = self.pm.read(off, &mut word);
            let looks = read.is_err() || is_put(u64::from_le_bytes(word));
            if looks && !broken!("forged_records") {
                self.pm.store(off, 0)?;
                self.flush(off, 8)?;
            }
        }
        Ok(())
    }

    /// Makes a record frame of a frame: valid `now`, or when the word that is
    /// returned is stored at its start.
    pub(super) fn write_header(
        &mut self,
        frame: Frame,
        base_seq: u64,
        now: bool,
    ) -> Result<(FrameHeader, u64)> {
        // What an earlier record frame left in this one must not count. (Compaction's
        // kills see to that, too: the breakage is to do without both.)
        if !broken!("stale_records") {
            self.opened += 1;
        }
        let epoch = (self.opened << 32) | (self.sb.attaches & 0xffff_ffff);
        let header = FrameHeader::new(&self.pm, self.sb.salt, frame.off(), base_seq, epoch);
        let word = header.write(&self.pm, &self.sb.uuid, epoch, now)?;
        self.note_flush(frame.off(), LINE_SIZE);
        if !now && !broken!("header_fence") {
            // Records come whole before that word does: with anything else in its place, a
            // crash would leave what looks like records that were lost with their header.
            self.fence();
        }
        self.set_map(frame, true)?;
        Ok((header, word))
    }

    /// Sets or clears a frame's bit in the map and starts the write-back.
    pub(super) fn set_map(&mut self, frame: Frame, used: bool) -> Result<()> {
        let (at, bit) = self.geo.map_bit(frame);
        let word = self.pm.load(at)?;
        let word = if used { word | bit } else { word & !bit };
        self.pm.store(at, word)?;
        if broken!("map_flush") {
            return Ok(());
        }
        self.flush(at, 8)
    }

    // ---- commit ----

    /// Makes all that is staged durable, then visible to readers. Two fences
    /// however much it is, none if nothing is staged.
    ///
    /// After an error the store refuses changes: what was staged may be there or
    /// not after the next recovery.
    pub fn commit(&mut self) -> Result<()> {
        if self.staged == 0 {
            self.atomic = false;
            return Ok(());
        }
        self.writable()?;
        let done = self.commit_staged();
        self.failed = done.is_err();
        done
    }

    fn commit_staged(&mut self) -> Result<()> {
        let batch = (self.atomic && self.staged_kept > 1).then_some(self.batch_number);
        self.store_kills()?;
        let sealed = match batch {
            Some(number) => Some(self.fill_batch(number)?),
            None => None,
        };
        if broken!("batch_order") {
            if let Some((off, word)) = sealed {
                self.pm.store(off, word)?;
            }
        }
        if broken!("fence1") {
            self.unfenced = false;
        }
        self.fence();

        self.end_batch()?;
        let closed = self.close_empty()?;
        match sealed {
            Some((off, word)) => {
                self.pm.store(off, word)?;
                self.flush(off, 8)?;
            }
            None => self.store_words(!broken!("record_flush"))?,
        }
        let newest = self.newest_put();
        if broken!("fence2") {
            self.unfenced = false;
        }
        self.fence();

        // Durable from here on; so it may be seen.
        if let Some((off, _)) = sealed {
            self.batch = Some(off);
            self.batch_number += 1;
            self.tick_snapshot()?;
            self.store_words(true)?;
        }
        if let Some(newest) = newest {
            let seq = self.pm.load(newest.loc + 8)?;
            self.stats.durable_seq = self.stats.durable_seq.max(seq);
        }
        self.pm.store(live::DURABLE_SEQ, self.stats.durable_seq)?;
        self.give_back(closed)?;
        self.release_pending()?;
        for index in 0..self.staged {
            let staged = self.staged_at(index);
            match staged.kept {
                Kept::Put => self.index_put(Locator(staged.loc))?,
                Kept::Delete => self.index_delete(Locator(staged.loc))?,
                Kept::Gone => (),
            }
        }
        self.pm.store(live::INDEXED_SEQ, self.stats.durable_seq)?;
        if sealed.is_some() {
            self.tick_snapshot()?;
        }
        // The next commit may be like this one.
        self.set_keep(self.staged_keys.min(64));
        self.forget_staged();
        self.pool.trim(&self.pm, &self.frames)?;
        self.publish()
    }

    /// The last put that was staged and not aborted, though perhaps undone since.
    fn newest_put(&self) -> Option<Staged> {
        let staged = (0..self.staged).rev().map(|index| self.staged_at(index));
        staged.into_iter().find(|staged| is_put(staged.word))
    }

    /// Stores the first words of new records, and the kills of deleted ones, and
    /// writes their lines back: all of them, unless that was done before.
    fn store_words(&mut self, flush: bool) -> Result<()> {
        let written_back = self.atomic && self.staged_kept > 1;
        for index in 0..self.staged {
            let staged = self.staged_at(index);
            let lines = match staged.kept {
                Kept::Put if !written_back => (staged.word >> 40) & 0xff,
                Kept::Put | Kept::Delete => 1,
                Kept::Gone => continue,
            };
            self.pm.store(staged.loc, staged.word)?;
            if flush {
                self.flush(staged.loc, lines * LINE_SIZE)?;
            }
        }
        Ok(())
    }

    /// Writes back the records of a batch, without their first words, and those
    /// words in a batch area: its offset, and the word that puts it in force.
    fn fill_batch(&mut self, number: u64) -> Result<(u64, u64)> {
        let mut batch = Batch::new(number);
        for index in 0..self.staged {
            let staged = self.staged_at(index);
            match staged.kept {
                Kept::Put if !broken!("batch_records") => {
                    self.flush(staged.loc, ((staged.word >> 40) & 0xff) * LINE_SIZE)?;
                }
                Kept::Gone => continue,
                _ => (),
            }
            batch.push(&self.pm, staged.loc, staged.word)?;
        }
        self.seal_batch(&batch)
    }

    /// Ends the filling of a batch area and starts its write-back.
    pub(super) fn seal_batch(&mut self, batch: &Batch) -> Result<(u64, u64)> {
        let (len, word) = batch.seal(&self.pm, &self.sb)?;
        if !broken!("batch_flush") {
            self.flush(batch.off(), len)?;
        }
        Ok((batch.off(), word))
    }

    /// Ends the batch that was in force: its words are durable in their places.
    pub(super) fn end_batch(&mut self) -> Result<()> {
        let Some(off) = self.batch.take() else {
            return Ok(());
        };
        if broken!("batch_kill") {
            return Ok(());
        }
        batch::kill(&self.pm, off)?;
        self.note_flush(off, 8);
        Ok(())
    }

    /// Readers of several records are told that a batch begins to be visible, or
    /// has ended.
    fn tick_snapshot(&mut self) -> Result<()> {
        let tick = self.pm.load(live::SNAPSHOT)?;
        self.pm.store(live::SNAPSHOT, tick.wrapping_add(1))
    }

    /// Adds a record to the numbers.
    pub(super) fn count(&mut self, loc: Locator) -> Result<()> {
        self.stats.records += 1;
        self.stats.record_lines += (self.pm.load(loc.0)? >> 40) & 0xff;
        self.stats.live_bytes += self.pm.load(loc.0 + 24)? & 0xffff_ffff;
        Ok(())
    }

    /// Adds a durable record to the index and the numbers.
    fn index_put(&mut self, loc: Locator) -> Result<()> {
        self.count(loc)?;
        if (self.pm.load(loc.0)? >> 48) & u64::from(super::record::F_KEYED) == 0 {
            return Ok(());
        }
        let mut near = [0; NEAR];
        let key = key_of(&self.pm, loc.0)?.near(&self.pm, &mut near)?;
        match self.keys.insert(&self.pm, &mut self.pool, &key, loc.0)? {
            Some(old) => self.retire(Locator(old)),
            None => {
                self.stats.keys += 1;
                Ok(())
            }
        }
    }

    /// A record lost its key to a later one: it is killed with the next commit.
    pub(super) fn retire(&mut self, loc: Locator) -> Result<()> {
        self.uncount(loc)?;
        if self.pending >= MAX_PENDING {
            return Err(Error::Damaged);
        }
        self.stats.pending_bytes += self.pm.load(loc.0 + 24)? & 0xffff_ffff;
        self.set_pending(self.pending, loc);
        self.pending += 1;
        Ok(())
    }

    /// Whether no more records can be retired before the next commit.
    pub(super) fn pending_full(&self) -> bool {
        self.pending >= MAX_PENDING
    }

    pub(super) fn uncount(&mut self, loc: Locator) -> Result<()> {
        let len = self.pm.load(loc.0 + 24)? & 0xffff_ffff;
        let lines = (self.pm.load(loc.0)? >> 40) & 0xff;
        self.stats.records = self.stats.records.saturating_sub(1);
        self.stats.record_lines = self.stats.record_lines.saturating_sub(lines);
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
        self.release_dead(loc)
    }

    /// Writes the live page's counters.
    pub(super) fn publish(&mut self) -> Result<()> {
        self.pm.store(live::RECORDS, self.stats.records)?;
        self.pm.store(live::KEYS, self.stats.keys)?;
        self.pm.store(live::LIVE_BYTES, self.stats.live_bytes)
    }

    /// Ends the store's life: commits, gives back what is pending, makes the live
    /// page invalid. Returns what it was made of.
    pub fn close(mut self) -> (Result<()>, P, F, B) {
        let mut done = self.commit();
        if !self.read_only {
            done = done.and_then(|()| self.sync_pending());
        }
        if let Some((frame, _)) = self.fill.take() {
            let _ = self.frames.unhold(frame, 0);
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
        log_next(&self.view(), seq, None, &mut None)
    }

    /// The live record that follows in the log. Faster than
    /// `log_from(record.seq + 1)`.
    pub fn log_after(&self, record: &Record) -> Result<Option<Record>> {
        log_next(
            &self.view(),
            record.seq.saturating_add(1),
            Some(record),
            &mut None,
        )
    }

    /// After [`Error::Io`] from [`log_from`](Self::log_from)`(seq)`: what there is in spite of it.
    pub fn log_pass(&self, seq: u64) -> Result<Passed> {
        let key = seq.to_be_bytes();
        let key = KeySrc::Bytes(&key);
        let goal = Goal::Below { inclusive: true };
        let mut hole = None;
        if let Some(found) = find(&self.pm, Kind::Log, live::LOG_ROOT, &key, goal)? {
            match FrameHeader::read(&self.pm, found.loc, &self.sb.uuid) {
                Ok(header) => {
                    if let Some(passed) = self.pass_in(&header, seq, &mut hole)? {
                        return Ok(passed);
                    }
                }
                Err(Error::Io) => hole = Some(seq),
                Err(error) => return Err(error),
            }
        }
        let above = seq.saturating_add(1);
        let next = match self.frame_from(above) {
            Ok(header) => header.map(|header| header.base_seq),
            Err(Error::Io) => Some(self.unreadable_from(above)?),
            Err(error) => return Err(error),
        };
        let end = next.unwrap_or(self.stats.durable_seq.saturating_add(1));
        Ok(match hole.filter(|hole| *hole < end) {
            Some(seq) => Passed::Lost { seq, next },
            None => Passed::Nothing { next },
        })
    }

    /// What there is in a frame with a number of `seq` or more; the number that is not there
    /// at its end, if it may be in what cannot be read.
    fn pass_in(
        &self,
        header: &FrameHeader,
        seq: u64,
        hole: &mut Option<u64>,
    ) -> Result<Option<Passed>> {
        let (mut line, mut least) = (1, seq);
        while line < LINES {
            let (here, record) = match parse(&self.pm, &self.geo, header, line) {
                Ok(Line::Put(record)) => {
                    line += u64::from(record.lines);
                    (record.seq, Some(record))
                }
                Ok(Line::Killed { lines, seq }) => {
                    line += lines;
                    (seq, None)
                }
                Ok(_) => {
                    line += 1;
                    continue;
                }
                Err(Error::Io) => {
                    hole.get_or_insert(least);
                    line += 1;
                    continue;
                }
                Err(error) => return Err(error),
            };
            // Numbers rise: what could not be read has one before this.
            let lost = hole.take().filter(|lost| *lost < here);
            if here < seq {
                continue;
            }
            if let Some(seq) = lost {
                let next = Some(here);
                return Ok(Some(Passed::Lost { seq, next }));
            }
            least = here.saturating_add(1);
            let Some(record) = record.filter(|_| here <= self.stats.durable_seq) else {
                continue;
            };
            match current(&self.view(), &record) {
                Ok(true) => return Ok(Some(Passed::Record(record))),
                Ok(false) => (),
                Err(Error::Io) => {
                    let next = Some(least);
                    return Ok(Some(Passed::Lost { seq: here, next }));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
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
            empty_frames: self.empty as u64,
            trunc_seq: self.sb.trunc_seq,
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
