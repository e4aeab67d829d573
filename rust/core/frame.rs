// SPDX-License-Identifier: GPL-2.0

//! The allocator's bookkeeping of data frames, in DRAM.
//!
//! A frame is Free, Owned (given out by `alloc`), Limbo (nobody holds it here,
//! but the network stack may still look at its page), Held (found in use at
//! recovery, or again after limbo), or Bad (a media error; never given out).
//!
//! Holds count who needs the frame: the socket that fills it, tokens, records.
//! When the last hold goes, the frame enters limbo, a FIFO; `reclaim` takes from
//! its head what the host finds idle. Everything is O(1), or O(levels of the
//! bitmap), or bounded by a budget, so that it may run in softirq context under
//! the host's lock.

use super::{Buf, Error, Extent, Frame, Result, FRAME_SIZE};

/// What a frame is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameState {
    /// May be given out.
    Free,
    /// Given out by [`FrameTable::alloc`].
    Owned,
    /// No holds; free as soon as the host finds it idle.
    Limbo,
    /// In use: found at recovery, or held again while in limbo.
    Held,
    /// Never given out.
    Bad,
}

/// Frames by state; `total` is the sum of the others, `bad_held` aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// All data frames.
    pub total: u32,
    /// See [`FrameState::Free`].
    pub free: u32,
    /// See [`FrameState::Owned`].
    pub owned: u32,
    /// See [`FrameState::Limbo`].
    pub limbo: u32,
    /// See [`FrameState::Held`].
    pub held: u32,
    /// See [`FrameState::Bad`].
    pub bad: u32,
    /// Of those, the ones that somebody still holds.
    pub bad_held: u32,
    /// Frames with bytes that records use.
    pub payload: u32,
    /// Bytes of those frames that no record uses. Bytes that several records use
    /// count once for each, as far as that fits the frame.
    pub slack: u64,
}

/// The commit side's view of the allocator. The host wraps a [`FrameTable`] in
/// its lock and adds how to tell that a frame's page is idle.
pub trait Frames {
    /// A frame with one hold, after `near` if that is free; none when the store is
    /// full but for its reserve, or with [`Need::Reserve`] when it is full.
    fn alloc(&self, near: Option<Frame>, need: Need) -> Option<Frame>;

    /// One more hold, by which a record uses `bytes` of the frame (0: it is not
    /// payload). [`Error::Invalid`] if the frame is free or not a data frame.
    fn hold(&self, frame: Frame, bytes: u32) -> Result<()>;

    /// One hold less, which was for `bytes`; how many are left. With the last, the
    /// frame enters limbo.
    fn unhold(&self, frame: Frame, bytes: u32) -> Result<u32>;

    /// At recovery: a frame is found in use. As [`hold`](Self::hold), even if it
    /// was free.
    fn claim(&self, frame: Frame, bytes: u32) -> Result<()>;

    /// Bytes of the frame that records use.
    fn used(&self, frame: Frame) -> u32;

    /// How many holds there are on the frame.
    fn holds(&self, frame: Frame) -> u32;
}

/// How badly a frame is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// For something new: the reserve stays.
    New,
    /// To recover, or to give more back than is taken.
    Reserve,
}

impl<F: Frames + ?Sized> Frames for &F {
    fn alloc(&self, near: Option<Frame>, need: Need) -> Option<Frame> {
        (**self).alloc(near, need)
    }
    fn hold(&self, frame: Frame, bytes: u32) -> Result<()> {
        (**self).hold(frame, bytes)
    }
    fn unhold(&self, frame: Frame, bytes: u32) -> Result<u32> {
        (**self).unhold(frame, bytes)
    }
    fn claim(&self, frame: Frame, bytes: u32) -> Result<()> {
        (**self).claim(frame, bytes)
    }
    fn used(&self, frame: Frame) -> u32 {
        (**self).used(frame)
    }
    fn holds(&self, frame: Frame) -> u32 {
        (**self).holds(frame)
    }
}

/// Takes one hold on each frame that `extents` touch: all, or on an error none.
pub(super) fn hold_all<F: Frames>(
    frames: &F,
    extents: impl Iterator<Item = Extent> + Clone,
    take: impl Fn(&F, Frame, u32) -> Result<()>,
) -> Result<()> {
    let all = || extents.clone().flat_map(Extent::parts);
    for (done, (frame, bytes)) in all().enumerate() {
        if let Err(error) = take(frames, frame, bytes) {
            for (frame, bytes) in all().take(done) {
                let _ = frames.unhold(frame, bytes);
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Gives back what [`hold_all`] took.
pub(super) fn unhold_all<F: Frames>(frames: &F, extents: impl Iterator<Item = Extent>) {
    for (frame, bytes) in extents.flat_map(Extent::parts) {
        let _ = frames.unhold(frame, bytes);
    }
}

/// A frame's entry: 29 bits of holds, 3 bits of state, 32 bits of limbo link
/// (index of the next + 1, or 0).
#[derive(Clone, Copy)]
struct Entry(u64);

const MAX_HOLDS: u32 = (1 << 29) - 1;

impl Entry {
    fn new(state: FrameState, holds: u32) -> Self {
        let state = match state {
            FrameState::Free => 0u64,
            FrameState::Owned => 1,
            FrameState::Limbo => 2,
            FrameState::Held => 3,
            FrameState::Bad => 4,
        };
        Entry(u64::from(holds & MAX_HOLDS) | (state << 29))
    }
    fn holds(self) -> u32 {
        self.0 as u32 & MAX_HOLDS
    }
    fn state(self) -> FrameState {
        match (self.0 >> 29) & 7 {
            0 => FrameState::Free,
            1 => FrameState::Owned,
            2 => FrameState::Limbo,
            3 => FrameState::Held,
            _ => FrameState::Bad,
        }
    }
    fn next(self) -> u32 {
        (self.0 >> 32) as u32
    }
    fn with_holds(self, holds: u32) -> Self {
        Entry(self.0 & !u64::from(MAX_HOLDS) | u64::from(holds & MAX_HOLDS))
    }
    fn with_state(self, state: FrameState) -> Self {
        Entry(Entry::new(state, self.holds()).0 | (self.0 >> 32 << 32))
    }
    fn with_next(self, next: u32) -> Self {
        Entry(self.0 & 0xffff_ffff | (u64::from(next) << 32))
    }
}

/// Levels of the bitmap of free frames; each is 1/64 of the one below.
const LEVELS: usize = 6;

/// States and holds of all data frames.
///
/// # Invariants
///
/// - A bit of level 0 is set exactly for the frames that are Free; a bit of a
///   higher level exactly where the word below is not 0.
/// - The limbo list links exactly the frames whose state is Limbo, plus those
///   that became Bad while in it.
/// - `counts` are the numbers of entries by state, `payload` of those with used
///   bytes, `slack` the sum of what those lack of a whole frame.
pub struct FrameTable<B> {
    buf: B,
    first: u32,
    count: u32,
    /// Where the search for a free frame goes on.
    cursor: u32,
    /// Index + 1 of the first and last frame in limbo, or 0.
    head: u32,
    tail: u32,
    /// Free frames that only [`Need::Reserve`] gets.
    reserve: u32,
    counts: Counts,
    /// Where the levels of the bitmap start in `buf`, and the numbers of used bytes.
    levels: [usize; LEVELS],
    used_at: usize,
}

/// Words of each level for `count` frames.
fn level_words(count: u32, level: usize) -> usize {
    (0..=level).fold(count as usize, |bits, _| bits.div_ceil(64))
}

impl<B: Buf> FrameTable<B> {
    /// 64-bit words that a table of `count` frames needs.
    pub fn words(count: u32) -> usize {
        Self::used_base(count).saturating_add((count as usize).div_ceil(2))
    }

    /// The word where the numbers of used bytes start, two in each.
    fn used_base(count: u32) -> usize {
        (0..LEVELS).fold(count as usize, |words, level| {
            words.saturating_add(level_words(count, level))
        })
    }

    /// A table of the `count` frames from `first` on, all free. `buf` has at
    /// least [`words`](Self::words) words; what is in it does not matter.
    pub fn new(buf: B, first: Frame, count: u32) -> Result<Self> {
        if buf.len() < Self::words(count) || first.0.checked_add(count).is_none() {
            return Err(Error::Invalid);
        }
        let mut table = FrameTable {
            buf,
            first: first.0,
            count,
            cursor: 0,
            head: 0,
            tail: 0,
            reserve: (count / 128).clamp(4, 512),
            counts: Counts {
                total: count,
                free: count,
                ..Counts::default()
            },
            levels: [0; LEVELS],
            used_at: Self::used_base(count),
        };
        let mut base = count as usize;
        for (level, at) in table.levels.iter_mut().enumerate() {
            *at = base;
            base += level_words(count, level);
        }
        table.buf.fill(0);
        let mut bits = count as usize;
        for level in 0..LEVELS {
            let base = table.level_base(level);
            for word in 0..bits.div_ceil(64) {
                let left = bits - word * 64;
                let value = if left >= 64 { !0 } else { (1 << left) - 1 };
                if let Some(slot) = table.buf.get_mut(base + word) {
                    *slot = value;
                }
            }
            bits = bits.div_ceil(64);
        }
        Ok(table)
    }

    fn level_base(&self, level: usize) -> usize {
        self.levels.get(level).copied().unwrap_or(self.used_at)
    }

    fn index(&self, frame: Frame) -> Result<u32> {
        match frame.0.checked_sub(self.first) {
            Some(index) if index < self.count => Ok(index),
            _ => Err(Error::Invalid),
        }
    }

    fn entry(&self, index: u32) -> Entry {
        Entry(self.buf.get(index as usize).copied().unwrap_or(0))
    }

    fn set(&mut self, index: u32, entry: Entry) {
        if let Some(slot) = self.buf.get_mut(index as usize) {
            *slot = entry.0;
        }
    }

    fn count_of(&mut self, state: FrameState) -> &mut u32 {
        match state {
            FrameState::Free => &mut self.counts.free,
            FrameState::Owned => &mut self.counts.owned,
            FrameState::Limbo => &mut self.counts.limbo,
            FrameState::Held => &mut self.counts.held,
            FrameState::Bad => &mut self.counts.bad,
        }
    }

    /// Changes a frame's state, with counters and bitmap.
    fn change(&mut self, index: u32, to: FrameState) {
        let entry = self.entry(index);
        let from = entry.state();
        self.set(index, entry.with_state(to));
        *self.count_of(from) = self.count_of(from).saturating_sub(1);
        *self.count_of(to) = self.count_of(to).saturating_add(1);
        if from == FrameState::Free && to != FrameState::Free {
            self.clear_bit(index);
        } else if from != FrameState::Free && to == FrameState::Free {
            self.set_bit(index);
        }
    }

    fn set_bit(&mut self, index: u32) {
        let mut at = index as usize;
        for level in 0..LEVELS {
            let base = self.level_base(level);
            let Some(word) = self.buf.get_mut(base + at / 64) else {
                return;
            };
            let before = *word;
            *word |= 1 << (at % 64);
            if before != 0 {
                return;
            }
            at /= 64;
        }
    }

    fn clear_bit(&mut self, index: u32) {
        let mut at = index as usize;
        for level in 0..LEVELS {
            let base = self.level_base(level);
            let Some(word) = self.buf.get_mut(base + at / 64) else {
                return;
            };
            *word &= !(1 << (at % 64));
            if *word != 0 {
                return;
            }
            at /= 64;
        }
    }

    /// The first free frame at or after `from`.
    fn find_from(&self, from: u32) -> Option<u32> {
        let mut at = from as usize;
        let mut level = 0;
        // Up until a word has a bit at or after `at` ...
        loop {
            if level == LEVELS {
                return None;
            }
            let words = level_words(self.count, level);
            if at / 64 >= words {
                return None;
            }
            let word = self.buf.get(self.level_base(level) + at / 64)?;
            let masked = word & (!0 << (at % 64));
            if masked != 0 {
                at = at / 64 * 64 + masked.trailing_zeros() as usize;
                break;
            }
            at = at / 64 + 1;
            level += 1;
        }
        // ... and down to the first bit below it.
        while level > 0 {
            level -= 1;
            let word = self.buf.get(self.level_base(level) + at)?;
            at = at * 64 + word.trailing_zeros() as usize;
        }
        u32::try_from(at).ok().filter(|at| *at < self.count)
    }

    /// Bytes of a frame that records use.
    pub fn used(&self, frame: Frame) -> u32 {
        self.index(frame).map_or(0, |index| {
            let word = self.buf.get(self.used_at + index as usize / 2);
            (word.copied().unwrap_or(0) >> (index % 2 * 32)) as u32
        })
    }

    /// A record uses so many bytes more, or less.
    fn change_used(&mut self, index: u32, more: u32, less: u32) {
        if more == less {
            return;
        }
        let before = self.used(Frame(self.first + index));
        let now = before.saturating_add(more).saturating_sub(less);
        let at = self.used_at + index as usize / 2;
        if let Some(word) = self.buf.get_mut(at) {
            let shift = index % 2 * 32;
            *word = *word & !(0xffff_ffff << shift) | (u64::from(now) << shift);
        }
        let slack = |used: u32| match used {
            0 => 0,
            used => FRAME_SIZE.saturating_sub(used.into()),
        };
        let counts = &mut self.counts;
        counts.slack = (counts.slack + slack(now)).saturating_sub(slack(before));
        counts.payload =
            (counts.payload + u32::from(now > 0)).saturating_sub(u32::from(before > 0));
    }

    /// Free frames that only [`Need::Reserve`] gets.
    pub fn reserve(&self) -> u32 {
        self.reserve
    }

    /// A free frame, now Owned with one hold: the one after `near` if that is
    /// free, else the next one. None if no more than the reserve is left and
    /// `need` is for something new. Reclaims from limbo, a bounded number; `idle`
    /// says whether nobody outside looks at a frame's page any more (in the
    /// kernel: `page_ref_freeze()` succeeds).
    pub fn alloc(
        &mut self,
        near: Option<Frame>,
        need: Need,
        mut idle: impl FnMut(Frame) -> bool,
    ) -> Option<Frame> {
        let spare = match need {
            Need::New => self.reserve,
            Need::Reserve => 0,
        };
        // A little each time, so that frames come back while their lines are still
        // in a cache; more when they are needed.
        let short = self.counts.free < self.counts.total / 64 + 1;
        self.reclaim(if short { 32 } else { 2 }, &mut idle);
        if self.counts.free <= spare {
            self.reclaim(256, &mut idle);
            if self.counts.free <= spare {
                return None;
            }
        }
        let near = near
            .and_then(|near| near.0.checked_add(1))
            .and_then(|next| self.index(Frame(next)).ok())
            .filter(|index| self.entry(*index).state() == FrameState::Free);
        let index = near
            .or_else(|| self.find_from(self.cursor))
            .or_else(|| self.find_from(0))?;
        self.change(index, FrameState::Owned);
        let entry = self.entry(index).with_holds(1);
        self.set(index, entry);
        self.cursor = index.saturating_add(1);
        Some(Frame(self.first + index))
    }

    /// One more hold, by which a record uses `bytes` of it. [`Error::Invalid`] if
    /// the frame is free or none of these.
    pub fn hold(&mut self, frame: Frame, bytes: u32) -> Result<()> {
        let index = self.index(frame)?;
        let entry = self.entry(index);
        if entry.state() == FrameState::Free {
            return Err(Error::Invalid);
        }
        // Sticks at the maximum: the frame is then never given out again.
        let holds = (entry.holds() + 1).min(MAX_HOLDS);
        self.set(index, entry.with_holds(holds));
        if holds == 1 && entry.state() == FrameState::Bad {
            self.counts.bad_held += 1;
        }
        self.change_used(index, bytes, 0);
        Ok(())
    }

    /// One hold less, which was for `bytes`; how many are left. With the last one
    /// the frame enters limbo. [`Error::Invalid`] if there was none.
    pub fn unhold(&mut self, frame: Frame, bytes: u32) -> Result<u32> {
        let index = self.index(frame)?;
        let entry = self.entry(index);
        let holds = match entry.holds() {
            0 => return Err(Error::Invalid),
            MAX_HOLDS => return Ok(MAX_HOLDS),
            holds => holds - 1,
        };
        self.change_used(index, 0, bytes);
        self.set(index, entry.with_holds(holds));
        if holds == 0 && entry.state() == FrameState::Bad {
            self.counts.bad_held = self.counts.bad_held.saturating_sub(1);
        }
        if holds == 0 && matches!(entry.state(), FrameState::Owned | FrameState::Held) {
            self.change(index, FrameState::Limbo);
            self.push_limbo(index);
        }
        Ok(holds)
    }

    /// The owner of a frame lets go of it: [`unhold`](Self::unhold), and the frame
    /// enters limbo even if others hold it, so that it is looked at once more.
    pub fn leave(&mut self, frame: Frame) -> Result<u32> {
        let holds = self.unhold(frame, 0)?;
        let index = self.index(frame)?;
        if self.entry(index).state() == FrameState::Owned {
            self.change(index, FrameState::Limbo);
            self.push_limbo(index);
        }
        Ok(holds)
    }

    /// At recovery: the frame is in use. One hold more, even if it was free.
    pub fn claim(&mut self, frame: Frame, bytes: u32) -> Result<()> {
        let index = self.index(frame)?;
        if self.entry(index).state() == FrameState::Free {
            self.change(index, FrameState::Held);
        }
        self.hold(frame, bytes)
    }

    /// Never gives the frame out again. Holds on it stay as they are.
    pub fn mark_bad(&mut self, frame: Frame) -> Result<()> {
        let index = self.index(frame)?;
        let entry = self.entry(index);
        if entry.holds() > 0 && entry.state() != FrameState::Bad {
            self.counts.bad_held += 1;
        }
        // A frame in limbo stays linked; reclaim drops it when it gets there.
        self.change(index, FrameState::Bad);
        Ok(())
    }

    fn push_limbo(&mut self, index: u32) {
        let entry = self.entry(index).with_next(0);
        self.set(index, entry);
        match self.tail.checked_sub(1) {
            Some(last) => {
                let entry = self.entry(last).with_next(index + 1);
                self.set(last, entry);
            }
            None => self.head = index + 1,
        }
        self.tail = index + 1;
    }

    fn pop_limbo(&mut self) -> Option<u32> {
        let index = self.head.checked_sub(1)?;
        let entry = self.entry(index);
        self.head = entry.next();
        if self.head == 0 {
            self.tail = 0;
        }
        self.set(index, entry.with_next(0));
        Some(index)
    }

    /// Looks at up to `budget` frames of limbo; how many of them are free now.
    pub fn reclaim(&mut self, budget: u32, mut idle: impl FnMut(Frame) -> bool) -> u32 {
        let mut freed = 0;
        let budget = budget.min(self.counts.limbo);
        for _ in 0..budget {
            let Some(index) = self.pop_limbo() else {
                break;
            };
            let entry = self.entry(index);
            if entry.state() != FrameState::Limbo {
                continue;
            }
            // Idle first: a frame leaves limbo only then, so that the host can let
            // go of what it knows about the frame's page, held again or not.
            if !idle(Frame(self.first + index)) {
                self.push_limbo(index);
            } else if entry.holds() > 0 {
                self.change(index, FrameState::Held);
            } else {
                self.change(index, FrameState::Free);
                freed += 1;
            }
        }
        freed
    }

    /// State and holds of a frame, or none if it is not one of these.
    pub fn state(&self, frame: Frame) -> Option<(FrameState, u32)> {
        let entry = self.entry(self.index(frame).ok()?);
        Some((entry.state(), entry.holds()))
    }

    /// Frames by state.
    pub fn counts(&self) -> Counts {
        self.counts
    }
}
