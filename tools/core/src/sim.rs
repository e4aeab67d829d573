// SPDX-License-Identifier: GPL-2.0

//! Persistent memory with a cache that can be lost.
//!
//! A [`SimPm`] remembers for each cache line what is on the media and what was
//! stored, flushed and fenced since. At any event it can be stopped, and every
//! image that a power cut would then leave can be asked for.

use crate::{Error, Pmem, Result, FRAME_SIZE, LINE_SIZE};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

const LINE: usize = LINE_SIZE as usize;
type Line = [u8; LINE];
type Page = [u8; FRAME_SIZE as usize];

/// A line whose content is not all on the media.
#[derive(Clone)]
struct Cached {
    now: Line,
    /// Contents that it had since it was last durable, without the current one.
    past: Vec<Line>,
    /// Content at the last flush that no fence followed.
    flushed: Option<Line>,
}

/// What was counted since [`SimPm::reset_counts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SimCounts {
    /// Stores, flushes and fences: the points where a crash can come between.
    pub events: u64,
    /// Lines flushed.
    pub lines: u64,
    /// Of them, lines with nothing to write back.
    pub clean: u64,
    /// Fences.
    pub fences: u64,
    /// Of them, fences with no flush before them.
    pub idle_fences: u64,
    /// Bytes stored.
    pub bytes: u64,
}

#[derive(Clone)]
struct State {
    /// The media; frames that are not here are zero.
    media: BTreeMap<u64, Rc<Page>>,
    cache: BTreeMap<u64, Cached>,
    counts: SimCounts,
    /// Everything fails from this event on.
    stop: u64,
    /// And from this fence on.
    stop_fence: u64,
    flushed_any: bool,
    /// Questions whether to go on that are answered with yes.
    patience: u64,
}

/// Simulated persistent memory.
#[derive(Clone)]
pub struct SimPm {
    len: u64,
    state: RefCell<State>,
}

/// What [`SimPm::media_hash`] remembers.
#[derive(Default)]
pub struct PageHashes(HashMap<*const Page, (Rc<Page>, u64)>);

/// Of the words of a page; 0 if they are.
fn hash_page(page: &Page) -> u64 {
    let mut hash = 0u64;
    for (at, word) in page.chunks_exact(8).enumerate() {
        let word = word.try_into().map_or(0, u64::from_le_bytes);
        if word != 0 {
            hash = hash.wrapping_add(Rng(Rng(at as u64).next() ^ word).next());
        }
    }
    hash
}

/// Small and seeded: splitmix64.
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    /// The next number.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

impl State {
    fn media_line(&self, line: u64) -> Line {
        let mut out = [0; LINE];
        if let Some(page) = self.media.get(&(line * LINE_SIZE / FRAME_SIZE)) {
            let at = (line * LINE_SIZE % FRAME_SIZE) as usize;
            out.copy_from_slice(&page[at..at + LINE]);
        }
        out
    }

    fn set_media(&mut self, line: u64, content: &Line) {
        let page = self
            .media
            .entry(line * LINE_SIZE / FRAME_SIZE)
            .or_insert_with(|| Rc::new([0; FRAME_SIZE as usize]));
        let at = (line * LINE_SIZE % FRAME_SIZE) as usize;
        Rc::make_mut(page)[at..at + LINE].copy_from_slice(content);
    }

    fn line(&self, line: u64) -> Line {
        match self.cache.get(&line) {
            Some(cached) => cached.now,
            None => self.media_line(line),
        }
    }

    fn event(&mut self) -> Result<()> {
        if self.counts.events >= self.stop {
            return Err(Error::Io);
        }
        self.counts.events += 1;
        Ok(())
    }

    fn store(&mut self, off: u64, from: &[u8]) {
        let mut at = off;
        let mut rest = from;
        self.counts.bytes += from.len() as u64;
        while !rest.is_empty() {
            let (line, skip) = (at / LINE_SIZE, (at % LINE_SIZE) as usize);
            let now = rest.len().min(LINE - skip);
            let before = self.line(line);
            let cached = self.cache.entry(line).or_insert_with(|| Cached {
                now: before,
                past: Vec::new(),
                flushed: None,
            });
            cached.past.push(before);
            cached.now[skip..skip + now].copy_from_slice(&rest[..now]);
            rest = &rest[now..];
            at += now as u64;
        }
    }
}

impl SimPm {
    /// `len` zero bytes, durable.
    pub fn new(len: u64) -> Self {
        SimPm {
            len,
            state: RefCell::new(State {
                media: BTreeMap::new(),
                cache: BTreeMap::new(),
                counts: SimCounts::default(),
                stop: u64::MAX,
                stop_fence: u64::MAX,
                flushed_any: false,
                patience: u64::MAX,
            }),
        }
    }

    /// After so many questions whether to go on, the answer is no.
    pub fn give_up_after(&self, questions: u64) {
        self.state.borrow_mut().patience = questions;
    }

    /// Counts from 0 again.
    pub fn reset_counts(&self) {
        self.state.borrow_mut().counts = SimCounts::default();
    }

    /// What was counted.
    pub fn counts(&self) -> SimCounts {
        self.state.borrow().counts
    }

    /// From event number `event` on, every change fails: the crash comes there.
    pub fn stop_at(&self, event: u64) {
        self.state.borrow_mut().stop = event;
    }

    /// The crash comes instead of fence number `fence`, when most is at stake.
    pub fn stop_at_fence(&self, fence: u64) {
        self.state.borrow_mut().stop_fence = fence;
    }

    /// Lines that a crash now could lose, without those of the live page and of
    /// index frames, which mean nothing after a crash.
    pub fn unsafe_lines(&self) -> Vec<u64> {
        let state = self.state.borrow();
        let durable = |line: &u64| !volatile(&state, *line);
        let differs = |line: &u64| {
            let cached = &state.cache[line];
            let media = state.media_line(*line);
            cached.now != media || cached.past.iter().any(|past| *past != media)
        };
        let lines = state.cache.keys().copied();
        lines.filter(durable).filter(differs).collect()
    }

    /// Of `unsafe_lines`, those that were stored to since they were last flushed.
    pub fn dirty_lines(&self) -> Vec<u64> {
        let lines = self.unsafe_lines();
        let state = self.state.borrow();
        let dirty = |line: &u64| {
            let cached = &state.cache[line];
            cached.flushed != Some(cached.now) && cached.now != state.media_line(*line)
        };
        lines.into_iter().filter(dirty).collect()
    }

    /// A hash of what is on the media, but for what is volatile. Pages that other
    /// images share are hashed once.
    pub fn media_hash(&self, known: &mut PageHashes) -> u64 {
        let state = self.state.borrow();
        let mut hash = 0u64;
        for (frame, page) in &state.media {
            if volatile(&state, frame * (FRAME_SIZE / LINE_SIZE)) {
                continue;
            }
            let of_page = match known.0.get(&Rc::as_ptr(page)) {
                Some((_, of_page)) => *of_page,
                None => {
                    let of_page = hash_page(page);
                    if Rc::strong_count(page) > 1 {
                        // Held, so that nothing else gets its address.
                        let held = (page.clone(), of_page);
                        known.0.insert(Rc::as_ptr(page), held);
                    }
                    of_page
                }
            };
            if of_page != 0 {
                hash = hash.wrapping_add(Rng(frame ^ of_page).next());
            }
        }
        hash
    }

    /// What a crash leaves if of `unsafe_lines` those whose bit is set in `kept`
    /// were written back, the others not. Volatile lines by chance.
    pub fn crash_subset(&self, kept: u64, rng: &mut Rng) -> SimPm {
        let lines = self.unsafe_lines();
        self.crash(|line, cached, media| match lines.binary_search(&line) {
            Ok(bit) if bit < 64 && (kept >> bit) & 1 == 1 => cached.now,
            Ok(_) => media,
            Err(_) if rng.next() & 1 == 0 => cached.now,
            Err(_) => media,
        })
    }

    /// What a crash leaves by chance: each line as it was at some time since it
    /// was last durable, or torn between two such times at 8 bytes.
    pub fn crash_torn(&self, rng: &mut Rng) -> SimPm {
        self.crash(|_, cached, media| {
            let pick = |rng: &mut Rng| match rng.below(cached.past.len() as u64 + 2) {
                0 => media,
                1 => cached.now,
                n => cached.past[n as usize - 2],
            };
            let mut out = pick(rng);
            if rng.below(3) == 0 {
                for word in 0..LINE / 8 {
                    let other = pick(rng);
                    out[word * 8..][..8].copy_from_slice(&other[word * 8..][..8]);
                }
            }
            out
        })
    }

    fn crash(&self, mut choose: impl FnMut(u64, &Cached, Line) -> Line) -> SimPm {
        let state = self.state.borrow();
        let out = SimPm::new(self.len);
        {
            let mut left = out.state.borrow_mut();
            left.media = state.media.clone();
            for (line, cached) in &state.cache {
                let content = choose(*line, cached, state.media_line(*line));
                left.set_media(*line, &content);
            }
        }
        out
    }

    /// Changes the media itself.
    pub fn damage(&self, off: u64, bytes: &[u8]) {
        let mut state = self.state.borrow_mut();
        for (at, byte) in (off..).zip(bytes) {
            let line = at / LINE_SIZE;
            let mut content = state.media_line(line);
            content[(at % LINE_SIZE) as usize] = *byte;
            state.set_media(line, &content);
            state.cache.remove(&line);
        }
    }

    /// Frames of the media that are not all zero or were written.
    pub fn used_frames(&self) -> Vec<u64> {
        self.state.borrow().media.keys().copied().collect()
    }
}

/// Whether a line is in the live page or in an index frame.
fn volatile(state: &State, line: u64) -> bool {
    let frame = line * LINE_SIZE / FRAME_SIZE;
    frame == 1
        || (0..4).any(|node| {
            let first = state.line(frame * 64 + node * 16);
            first[14..16] == [0x70, 0x6e]
        })
}

impl Pmem for SimPm {
    fn len(&self) -> u64 {
        self.len
    }

    fn go_on(&self) -> Result<()> {
        let mut state = self.state.borrow_mut();
        state.patience = state.patience.checked_sub(1).ok_or(Error::Interrupted)?;
        Ok(())
    }

    fn read(&self, off: u64, to: &mut [u8]) -> Result<()> {
        if off
            .checked_add(to.len() as u64)
            .is_none_or(|end| end > self.len)
        {
            return Err(Error::Invalid);
        }
        let state = self.state.borrow();
        let mut at = off;
        let mut rest = to;
        while !rest.is_empty() {
            let (line, skip) = (at / LINE_SIZE, (at % LINE_SIZE) as usize);
            let now = rest.len().min(LINE - skip);
            let (part, tail) = rest.split_at_mut(now);
            part.copy_from_slice(&state.line(line)[skip..skip + now]);
            rest = tail;
            at += now as u64;
        }
        Ok(())
    }

    fn load(&self, off: u64) -> Result<u64> {
        if off % 8 != 0 {
            return Err(Error::Invalid);
        }
        let mut word = [0; 8];
        self.read(off, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    fn write(&self, off: u64, from: &[u8]) -> Result<()> {
        if off
            .checked_add(from.len() as u64)
            .is_none_or(|end| end > self.len)
        {
            return Err(Error::Invalid);
        }
        let mut state = self.state.borrow_mut();
        state.event()?;
        state.store(off, from);
        Ok(())
    }

    fn store(&self, off: u64, value: u64) -> Result<()> {
        if off % 8 != 0 || off.checked_add(8).is_none_or(|end| end > self.len) {
            return Err(Error::Invalid);
        }
        let mut state = self.state.borrow_mut();
        // What is volatile makes no new crash state.
        if !volatile(&state, off / LINE_SIZE) {
            state.event()?;
        } else if state.counts.events >= state.stop {
            return Err(Error::Io);
        }
        state.store(off, &value.to_le_bytes());
        Ok(())
    }

    fn flush(&self, off: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        if off.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Error::Invalid);
        }
        for line in off / LINE_SIZE..=(off + len - 1) / LINE_SIZE {
            let mut state = self.state.borrow_mut();
            state.event()?;
            state.counts.lines += 1;
            state.flushed_any = true;
            let clean = match state.cache.get_mut(&line) {
                Some(cached) => {
                    let clean = cached.flushed == Some(cached.now);
                    cached.flushed = Some(cached.now);
                    clean
                }
                None => true,
            };
            state.counts.clean += u64::from(clean);
        }
        Ok(())
    }

    fn fence(&self) {
        let mut state = self.state.borrow_mut();
        if state.counts.fences >= state.stop_fence {
            state.stop = state.stop.min(state.counts.events);
        }
        if state.event().is_err() {
            return;
        }
        state.counts.fences += 1;
        state.counts.idle_fences += u64::from(!state.flushed_any);
        state.flushed_any = false;
        let mut done = Vec::new();
        for (line, cached) in &mut state.cache {
            if let Some(content) = cached.flushed.take() {
                // What it was before the flush cannot come back.
                let at = cached.past.iter().rposition(|past| *past == content);
                cached
                    .past
                    .drain(..at.map_or(cached.past.len(), |at| at + 1));
                done.push((*line, content, cached.now == content));
            }
        }
        for (line, content, clean) in done {
            state.set_media(line, &content);
            if clean {
                state.cache.remove(&line);
            }
        }
    }

    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        crc32c::crc32c_append(crc, data)
    }
}
