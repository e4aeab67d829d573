// SPDX-License-Identifier: GPL-2.0

//! Lock-free readers of a mapping of an attached store.
//!
//! How a reader knows that what it read was true: an index entry is changed
//! before the record that it names is given back, and the node's version with
//! it. So a record that was read between two equal loads of the version was a
//! record throughout. The version of each node on the way is checked again after
//! the next one's was loaded, the root word's likewise (`tree::find`).
//! For the same reason a cursor may stay in its leaf as long as the version is the same.
//!
//! For bytes: a record is killed, which changes its first word, before its frames
//! are given back. So bytes that were read before a look at an unchanged first
//! word were the record's.

use super::node::Kind;
use super::record::{key_of, parse, FrameHeader, KeySrc, Line, Locator, Record, FIRST_AT, LINES};
use super::superblock::{probe, Geometry, Superblock};
use super::tree::{find, Found, Goal};
use super::{live, Error, Extent, Live, Pmem, Result, LINE_SIZE, MAX_KEY, MAX_STAGED};
use core::cmp::Ordering;

/// How often a reader begins anew before it gives up with [`Error::Busy`].
const TRIES: u32 = 1_000;

/// So many records are fetched before they are looked at.
const AHEAD: usize = 8;
/// Of these, so many have come: where their bytes begin is known, and fetched.
const BYTES_AHEAD: usize = 4;

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
/// `after` is the record before it, if known, and `spot` the entry of that one's frame;
/// then of the one returned.
pub(super) fn log_next<P: Pmem>(
    view: &View<'_, P>,
    from: u64,
    after: Option<&Record>,
    spot: &mut Option<Found>,
) -> Result<Option<Record>> {
    let pm = view.pm;
    let first = after.map_or(1, |record| record.loc.line() + u64::from(record.lines));
    let mut start = first;
    let mut goal = Goal::Below { inclusive: true };
    let mut at = from;
    let mut before: Option<Found> = None;
    let mut tries = 0;
    loop {
        let unchecked = spot.is_some() && broken!("reader_log_cursor");
        let found = match spot.take() {
            None => {
                let bytes = at.to_be_bytes();
                find(pm, Kind::Log, live::LOG_ROOT, &KeySrc::Bytes(&bytes), goal)?
            }
            spot => spot,
        };
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
        if !unchecked && !found.still(pm)? {
            tries += 1;
            if tries > TRIES {
                return Err(Error::Busy);
            }
            continue;
        }
        match step? {
            Step::Record(record) => {
                *spot = Some(found);
                return Ok(Some(record));
            }
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
pub(super) fn current<P: Pmem>(view: &View<'_, P>, record: &Record) -> Result<bool> {
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
    fn prefetch(&self, off: u64, len: u64) {
        self.pm.prefetch(off, len);
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
        let (pm, key) = (&self.pm, KeySrc::Bytes(key));
        for _ in 0..TRIES {
            let Some(found) = find(pm, Kind::Keys, live::KEY_ROOT, &key, Goal::Exact)? else {
                return Ok(None);
            };
            let line = self.line(Locator(found.loc));
            if found.still(pm)? {
                return match line? {
                    Line::Put(record) => Ok(Some(record)),
                    Line::Killed { .. } => Ok(None),
                    _ => Err(Error::Damaged),
                };
            }
        }
        Err(Error::Busy)
    }

    /// The record with the next key in a direction: above (below) `key`, or with
    /// it if `inclusive`. From that end of the index if `key` is `None`. For more than
    /// one of them a [`cursor`](Self::cursor) is faster.
    pub fn seek(
        &self,
        key: Option<&[u8]>,
        inclusive: bool,
        direction: Direction,
    ) -> Result<Option<Record>> {
        self.cursor(key, inclusive, direction).next()
    }

    /// The records from [`seek`](Self::seek)'s on, in the order of their keys or the
    /// opposite one.
    pub fn cursor(
        &self,
        key: Option<&[u8]>,
        inclusive: bool,
        direction: Direction,
    ) -> Cursor<'_, P> {
        Cursor::new(self, key, inclusive, direction)
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
        self.log(seq).next()
    }

    /// The live records with a sequence number of `seq` or more, in that order.
    pub fn log(&self, seq: u64) -> LogCursor<'_, P> {
        LogCursor {
            reader: self,
            from: seq,
            last: None,
            spot: None,
        }
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

/// Goes over a reader's records by key; see [`Reader::cursor`].
///
/// It stays in its leaf of the index, and looks the last key up anew only when the
/// leaf ends or has changed. Keys come in their order, none of them twice; what is there
/// all the time is not passed over; what comes and goes meanwhile may be seen or not.
pub struct Cursor<'a, P> {
    reader: &'a Reader<P>,
    forward: bool,
    /// What to look up anew: the key before, of which so many bytes count, and where
    /// to go from it.
    key: [u8; MAX_KEY],
    len: usize,
    goal: Goal,
    /// The next one, until it is certain.
    fresh: [u8; MAX_KEY],
    /// The key's entry, as long as its leaf does not change.
    spot: Option<Found>,
    /// So many entries behind that one are fetched.
    ahead: usize,
}

impl<'a, P: Pmem> Cursor<'a, P> {
    fn new(
        reader: &'a Reader<P>,
        key: Option<&[u8]>,
        inclusive: bool,
        direction: Direction,
    ) -> Self {
        let mut cursor = Cursor {
            reader,
            forward: direction == Direction::Forward,
            key: [0; MAX_KEY],
            fresh: [0; MAX_KEY],
            len: 0,
            goal: view(key, inclusive, direction).1,
            spot: None,
            ahead: 0,
        };
        let key = key.unwrap_or(&[]);
        for (to, from) in cursor.key.iter_mut().zip(key) {
            *to = *from;
        }
        cursor.len = key.len().min(MAX_KEY);
        if key.len() > MAX_KEY {
            // No key lies between its beginning and itself.
            cursor.goal = cursor.beyond(!cursor.forward);
        }
        cursor
    }

    fn beyond(&self, inclusive: bool) -> Goal {
        if self.forward {
            Goal::Above { inclusive }
        } else {
            Goal::Below { inclusive }
        }
    }

    /// Fetches the records of the entries behind one, so that they come while those before
    /// them are looked at.
    fn fetch(&mut self, found: &Found) {
        let pm = &self.reader.pm;
        if let Some(next) = found.onward(pm, self.forward, BYTES_AHEAD) {
            // Whatever it is, it is but a hint.
            if let Ok(first) = pm.load(next.loc.saturating_add(FIRST_AT)) {
                pm.prefetch(Extent::unpack(first).off, LINE_SIZE);
            }
        }
        while self.ahead < AHEAD {
            self.ahead += 1;
            let Some(next) = found.onward(pm, self.forward, self.ahead) else {
                return;
            };
            pm.prefetch(Locator(next.loc).frame_off(), LINE_SIZE);
            pm.prefetch(next.loc, 2 * LINE_SIZE);
        }
    }

    /// The key of the record that [`next`](Self::next) has returned: read with it, so
    /// that nobody has to ask whether it is still alive.
    pub fn key(&self) -> &[u8] {
        self.key.get(..self.len).unwrap_or(&[])
    }

    /// The next record. At the end `None`, unless one has come meanwhile. After an error
    /// it goes on from the same place.
    #[allow(clippy::should_implement_trait)] // An iterator's end is for good.
    pub fn next(&mut self) -> Result<Option<Record>> {
        let reader = self.reader;
        let pm = &reader.pm;
        // Records that are being deleted, and about to leave the index, are passed over;
        // a batch has no more of them than this.
        for _ in 0..TRIES + MAX_STAGED as u32 {
            let beside = self.spot.and_then(|spot| spot.onward(pm, self.forward, 1));
            let found = match beside {
                Some(found) => found,
                None => {
                    let key = KeySrc::Bytes(self.key());
                    match find(pm, Kind::Keys, live::KEY_ROOT, &key, self.goal)? {
                        Some(found) => found,
                        None => return Ok(None),
                    }
                }
            };
            match beside {
                Some(_) => self.ahead = self.ahead.saturating_sub(1),
                None => self.ahead = 0,
            }
            if self.spot.is_some() {
                // More than one was asked for.
                self.fetch(&found);
            }
            let line = reader.line(Locator(found.loc));
            let read = key_of(pm, found.loc).and_then(|key| key.read(pm, 0, &mut self.fresh));
            // While the entry is there, so are the record and its key.
            let unchecked = beside.is_some() && broken!("reader_cursor");
            if !unchecked && !found.still(pm)? {
                self.spot = None;
                continue;
            }
            let key = self.fresh.get(..read?).ok_or(Error::Damaged)?;
            let onward = match (key.cmp(self.key()), self.goal) {
                (_, Goal::Last) => true,
                (Ordering::Equal, goal) => goal == self.beyond(true),
                (order, _) => (order == Ordering::Greater) == self.forward,
            };
            let line = line?;
            // With keys in order there is an end to them, whatever the index says.
            if !onward || !matches!(line, Line::Put(_) | Line::Killed { .. }) {
                return Err(Error::Damaged);
            }
            if let Some(to) = self.key.get_mut(..key.len()) {
                to.copy_from_slice(key);
            }
            self.len = key.len();
            self.goal = self.beyond(false);
            self.spot = Some(found);
            if let Line::Put(record) = line {
                return Ok(Some(record));
            }
        }
        Err(Error::Busy)
    }
}

/// Goes over a reader's records by number; see [`Reader::log`].
pub struct LogCursor<'a, P> {
    reader: &'a Reader<P>,
    from: u64,
    last: Option<Record>,
    /// The entry of the last one's frame, as long as its leaf does not change.
    spot: Option<Found>,
}

impl<P: Pmem> LogCursor<'_, P> {
    /// The next record. At the end `None`, unless one has come meanwhile. After an error
    /// it goes on from the same place.
    #[allow(clippy::should_implement_trait)] // An iterator's end is for good.
    pub fn next(&mut self) -> Result<Option<Record>> {
        let last = self.last.as_ref();
        let next = log_next(&self.reader.view(), self.from, last, &mut self.spot)?;
        if let Some(record) = next {
            self.from = record.seq.saturating_add(1);
            self.last = next;
        }
        Ok(next)
    }
}
