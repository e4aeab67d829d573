// SPDX-License-Identifier: GPL-2.0

//! Lock-free readers of a mapping of an attached store.
//!
//! How a reader knows that what it read was true: an index entry is changed
//! before the record that it names is given back, and the node's version with
//! it. So a record that was read between two equal loads of the version was a
//! record throughout. The version of each node on the way is checked again after
//! the next one's was loaded, the root word's likewise (`tree::find`).
//!
//! For bytes: a record is killed, which changes its first word, before its frames
//! are given back. So bytes that were read before a look at an unchanged first
//! word were the record's.

use super::node::Kind;
use super::record::{key_of, parse, FrameHeader, KeySrc, Line, Locator, Record, LINES};
use super::superblock::{probe, Geometry, Superblock};
use super::tree::{find, Found, Goal};
use super::{live, Error, Live, Pmem, Result, MAX_STAGED};

/// How often a reader begins anew before it gives up with [`Error::Busy`].
const TRIES: u32 = 1_000;

/// Which way to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To higher keys.
    Forward,
    /// To lower keys.
    Backward,
}

/// Turns the arguments of a seek into what the tree understands.
pub(super) fn view(
    key: Option<&[u8]>,
    inclusive: bool,
    direction: Direction,
) -> (KeySrc<'_>, Goal) {
    let goal = match (key, direction) {
        (None, Direction::Forward) => Goal::Above { inclusive: true },
        (None, Direction::Backward) => Goal::Last,
        (_, Direction::Forward) => Goal::Above { inclusive },
        (_, Direction::Backward) => Goal::Below { inclusive },
    };
    (KeySrc::Bytes(key.unwrap_or(&[])), goal)
}

/// What it takes to read records.
pub(super) struct View<'a, P> {
    pub(super) pm: &'a P,
    pub(super) geo: &'a Geometry,
    pub(super) uuid: &'a [u8; 16],
}

/// The first live record of the log with a sequence number of `from` or more.
/// `after` is the record before it, if known.
pub(super) fn log_next<P: Pmem>(
    view: &View<'_, P>,
    from: u64,
    after: Option<&Record>,
) -> Result<Option<Record>> {
    let pm = view.pm;
    let first = after.map_or(1, |record| record.loc.line() + u64::from(record.lines));
    let mut start = first;
    let mut goal = Goal::Below { inclusive: true };
    let mut at = from;
    let mut before: Option<Found> = None;
    let mut tries = 0;
    loop {
        let bytes = at.to_be_bytes();
        let found = find(pm, Kind::Log, live::LOG_ROOT, &KeySrc::Bytes(&bytes), goal)?;
        // Compaction may have put what follows a frame into the one that took its place:
        // what is next to it counts only if it is in its place still.
        let passed = match &before {
            Some(before) if !broken!("reader_passed") => !before.still(pm)?,
            _ => false,
        };
        if passed {
            tries += 1;
            if tries > TRIES {
                return Err(Error::Busy);
            }
            (goal, at, start, before) = (Goal::Below { inclusive: true }, from, first, None);
            continue;
        }
        let Some(found) = found else {
            if matches!(goal, Goal::Below { .. }) {
                // Nothing so old is left.
                (goal, start) = (Goal::Above { inclusive: true }, 1);
                continue;
            }
            return Ok(None);
        };
        let durable = if broken!("reader_durable") {
            u64::MAX
        } else {
            pm.load(live::DURABLE_SEQ)?
        };
        let step = log_frame(view, found.loc, from, durable, after, start);
        if !found.still(pm)? {
            tries += 1;
            if tries > TRIES {
                return Err(Error::Busy);
            }
            continue;
        }
        match step? {
            Step::Record(record) => return Ok(Some(record)),
            Step::Next(base) => {
                // Each turn goes to a higher frame, so this ends.
                let higher = match goal {
                    Goal::Above { inclusive: true } => base >= at,
                    Goal::Above { inclusive: false } => base > at,
                    _ => true,
                };
                if !higher {
                    return Err(Error::Damaged);
                }
                (goal, at, start) = (Goal::Above { inclusive: false }, base, 1);
                before = Some(found);
            }
        }
    }
}

enum Step {
    Record(Record),
    /// Nothing in the frame with this base sequence number.
    Next(u64),
}

fn log_frame<P: Pmem>(
    view: &View<'_, P>,
    off: u64,
    from: u64,
    durable: u64,
    after: Option<&Record>,
    start: u64,
) -> Result<Step> {
    view.geo.check_frame(off)?;
    let header = FrameHeader::read(view.pm, off, view.uuid)?;
    let same =
        after.is_some_and(|record| record.loc.frame_off() == off && record.nonce == header.nonce);
    let mut line = if same { start } else { 1 };
    while line < LINES {
        match parse(view.pm, view.geo, &header, line)? {
            Line::Put(record) => {
                line += u64::from(record.lines);
                if record.seq >= from && record.seq <= durable && current(view, &record)? {
                    return Ok(Step::Record(record));
                }
            }
            Line::Killed { lines, .. } => line += lines,
            _ => line += 1,
        }
    }
    Ok(Step::Next(header.base_seq))
}

/// Whether a record is its key's, and not one that is replaced but not yet
/// killed; or, without a key, not truncated.
fn current<P: Pmem>(view: &View<'_, P>, record: &Record) -> Result<bool> {
    let pm = view.pm;
    if !record.keyed() {
        if broken!("reader_truncated") {
            return Ok(true);
        }
        return Ok(record.seq > pm.load(live::TRUNC_SEQ)?);
    }
    for _ in 0..TRIES {
        let indexed = pm.load(live::INDEXED_SEQ)?;
        let key = key_of(pm, record.loc.0)?;
        let found = find(pm, Kind::Keys, live::KEY_ROOT, &key, Goal::Exact)?;
        if let Some(found) = &found {
            // By number: compaction may have moved one of the two.
            let seq = pm.load(found.loc.saturating_add(8))?;
            if !found.still(pm)? {
                continue;
            }
            if seq == record.seq {
                return Ok(true);
            }
            if seq > record.seq && !broken!("reader_replaced") {
                return Ok(false);
            }
        }
        if record.seq <= indexed && !broken!("reader_replaced") {
            return Ok(false);
        }
        // Durable, and not in the index yet; a deleted one is killed before it leaves
        // the index.
        pm.load_fence();
        return Ok(pm.load(record.loc.0)? == record.word);
    }
    Err(Error::Busy)
}

/// Keeps a reader out of what is not mapped.
struct Mapped<P> {
    pm: P,
    geo: Geometry,
}

impl<P> Mapped<P> {
    fn check(&self, off: u64, len: u64) -> Result<()> {
        let end = off.checked_add(len).ok_or(Error::Invalid)?;
        if end <= self.geo.head_off || off >= self.geo.data_off {
            Ok(())
        } else {
            Err(Error::Invalid)
        }
    }
}

impl<P: Pmem> Pmem for Mapped<P> {
    fn len(&self) -> u64 {
        self.pm.len()
    }
    fn read(&self, off: u64, to: &mut [u8]) -> Result<()> {
        self.check(off, to.len() as u64)?;
        self.pm.read(off, to)
    }
    fn load(&self, off: u64) -> Result<u64> {
        self.check(off, 8)?;
        self.pm.load(off)
    }
    fn write(&self, _off: u64, _from: &[u8]) -> Result<()> {
        Err(Error::ReadOnly)
    }
    fn store(&self, _off: u64, _value: u64) -> Result<()> {
        Err(Error::ReadOnly)
    }
    fn flush(&self, _off: u64, _len: u64) -> Result<()> {
        Err(Error::ReadOnly)
    }
    fn fence(&self) {}
    fn load_fence(&self) {
        self.pm.load_fence();
    }
    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        self.pm.crc32c(crc, data)
    }
}

/// A reader of an attached store. It needs no lock and writes nothing; the
/// writer may go on meanwhile. Any number of them may exist.
///
/// A record that it returns was durable, and the key's, at some instant during
/// the call. The *bytes* that a record points to may be reused as soon as it is
/// replaced or deleted: read them, then ask [`still`](Self::still).
///
/// The head area is never touched: it need not be mapped.
pub struct Reader<P> {
    pm: Mapped<P>,
    sb: Superblock,
    epoch: u64,
}

impl<P: Pmem> Reader<P> {
    /// Opens a mapping. [`Error::NotFormatted`] if no store is attached there.
    pub fn open(pm: P) -> Result<Self> {
        let sb = probe(&pm)?.superblock;
        let live = Live::read(&pm)?;
        if live.uuid != sb.uuid {
            return Err(Error::NotFormatted);
        }
        Ok(Reader {
            pm: Mapped {
                pm,
                geo: sb.geometry,
            },
            sb,
            epoch: live.epoch,
        })
    }

    fn view(&self) -> View<'_, Mapped<P>> {
        View {
            pm: &self.pm,
            geo: &self.sb.geometry,
            uuid: &self.sb.uuid,
        }
    }

    /// Calls `look` until nothing of an atomic batch came into view meanwhile: what
    /// it read then, of any number of records, was there at one instant, as far as
    /// batches go. [`Error::Busy`] if batches come too often.
    pub fn snapshot<T>(&self, mut look: impl FnMut(&Self) -> Result<T>) -> Result<T> {
        for _ in 0..TRIES {
            let tick = self.pm.load(live::SNAPSHOT)?;
            if tick & 1 == 0 {
                let seen = look(self);
                self.pm.load_fence();
                if self.pm.load(live::SNAPSHOT)? == tick || broken!("reader_snapshot") {
                    return seen;
                }
            }
            core::hint::spin_loop();
        }
        Err(Error::Busy)
    }

    /// The record with `key`.
    pub fn get(&self, key: &[u8]) -> Result<Option<Record>> {
        self.find(KeySrc::Bytes(key), Goal::Exact)
    }

    /// The record with the next key in a direction: above (below) `key`, or with
    /// it if `inclusive`. From that end of the index if `key` is `None`.
    pub fn seek(
        &self,
        key: Option<&[u8]>,
        inclusive: bool,
        direction: Direction,
    ) -> Result<Option<Record>> {
        let (key, goal) = view(key, inclusive, direction);
        self.find(key, goal)
    }

    fn find(&self, key: KeySrc<'_>, goal: Goal) -> Result<Option<Record>> {
        let pm = &self.pm;
        let lookup = |key: &KeySrc<'_>, goal| find(pm, Kind::Keys, live::KEY_ROOT, key, goal);
        'anew: for _ in 0..TRIES {
            let Some(mut found) = lookup(&key, goal)? else {
                return Ok(None);
            };
            // Records that are being deleted, and about to leave the index, are
            // passed over; a batch has no more of them than this.
            for _ in 0..=MAX_STAGED {
                let line = self.line(Locator(found.loc));
                if !found.still(pm)? {
                    continue 'anew;
                }
                match (line?, goal) {
                    (Line::Put(record), _) => return Ok(Some(record)),
                    (Line::Killed { .. }, Goal::Exact) => return Ok(None),
                    (Line::Killed { .. }, _) => (),
                    _ => return Err(Error::Damaged),
                }
                let onward = match goal {
                    Goal::Below { .. } | Goal::Last => Goal::Below { inclusive: false },
                    _ => Goal::Above { inclusive: false },
                };
                let next = key_of(pm, found.loc).and_then(|key| lookup(&key, onward));
                // While the entry is there, so is the record's key.
                if !found.still(pm)? {
                    continue 'anew;
                }
                match next? {
                    Some(next) => found = next,
                    None => return Ok(None),
                }
            }
        }
        Err(Error::Busy)
    }

    fn line(&self, loc: Locator) -> Result<Line> {
        self.sb.geometry.check_frame(loc.frame_off())?;
        let header = FrameHeader::read(&self.pm, loc.frame_off(), &self.sb.uuid)?;
        for _ in 0..TRIES {
            let word = self.pm.load(loc.0)?;
            let line = parse(&self.pm, &self.sb.geometry, &header, loc.line());
            // Killed while it was read, a record looks damaged: it is not.
            self.pm.load_fence();
            if self.pm.load(loc.0)? == word {
                return line;
            }
        }
        Err(Error::Busy)
    }

    /// The live record with the lowest sequence number that is `seq` or more.
    pub fn log_from(&self, seq: u64) -> Result<Option<Record>> {
        log_next(&self.view(), seq, None)
    }

    /// The live record that follows in the log. Faster than
    /// `log_from(record.seq + 1)`.
    pub fn log_after(&self, record: &Record) -> Result<Option<Record>> {
        log_next(&self.view(), record.seq.saturating_add(1), Some(record))
    }

    /// Whether a record is still alive, so that what was read of its key and
    /// bytes before this call is what it said.
    pub fn still(&self, record: &Record) -> Result<bool> {
        if broken!("reader_still") {
            return Ok(true);
        }
        self.pm.load_fence();
        let word = self.pm.load(record.loc.0)?;
        Ok(word == record.word && self.pm.load(record.loc.0 + 8)? == record.seq)
    }

    /// The counters of the live page; [`Error::NotFormatted`] after a detach.
    pub fn live(&self) -> Result<Live> {
        let live = Live::read(&self.pm)?;
        if live.epoch != self.epoch || live.uuid != self.sb.uuid {
            return Err(Error::NotFormatted);
        }
        Ok(live)
    }

    /// The superblock.
    pub fn superblock(&self) -> &Superblock {
        &self.sb
    }

    /// The mapping.
    pub fn pm(&self) -> &P {
        &self.pm.pm
    }
}
