// SPDX-License-Identifier: GPL-2.0

//! Batch areas: words that are stored all or none.
//!
//! An area lists 8-byte words and where they belong. Once its first word is
//! durable, all of them count as stored: recovery stores them (again). So what
//! takes one word each, commits, kills, a frame's validity, is done together.
//!
//! ```text
//!  0 u32 crc    of bytes 4.. and the pairs, seeded with the salt
//!  4 u32 magic  8 u64 number of the batch  16 u32 count of pairs  20 zero
//! 64 pairs: u64 offset, u64 word
//! ```
//!
//! There are two areas, used in turn: one is filled while the other may still be
//! needed. A batch is dead, durably, before the second fence of the next commit,
//! so nothing that comes later can be undone by it.

use super::pmem::{get_u32, get_u64, put};
use super::superblock::Superblock;
use super::{Error, Pmem, Result, FRAME_SIZE, LINE_SIZE, MAX_STAGED};

/// Frames of one area.
const FRAMES: u64 = 5;
/// Offset of the first area; the second follows.
pub(super) const OFF: u64 = 2 * FRAME_SIZE;
/// Offset of what follows the areas.
pub(super) const END: u64 = OFF + 2 * FRAMES * FRAME_SIZE;
/// Words of one batch, at most.
pub(super) const MAX_WORDS: usize = ((FRAMES * FRAME_SIZE - LINE_SIZE) / 16) as usize;
const MAGIC: u32 = u32::from_le_bytes(*b"PKba");

// A batch of staged operations fits; each is one word.
const _: () = assert!(MAX_WORDS >= MAX_STAGED);

/// One of the areas, being filled or in force.
pub(super) struct Batch {
    off: u64,
    number: u64,
    count: u32,
    crc_pairs: u32,
}

/// The seed of an area's checksum: areas of an earlier store do not count.
fn seed<P: Pmem>(pm: &P, sb: &Superblock) -> u32 {
    pm.crc32c(0, &sb.salt.to_le_bytes())
}

/// Bytes 4.. of a header; the first 4 are 0.
fn header(number: u64, count: u32) -> Result<[u8; LINE_SIZE as usize]> {
    let mut raw = [0u8; LINE_SIZE as usize];
    put(&mut raw, 4, &MAGIC.to_le_bytes())?;
    put(&mut raw, 8, &number.to_le_bytes())?;
    put(&mut raw, 16, &count.to_le_bytes())?;
    Ok(raw)
}

impl Batch {
    /// Begins to fill the area whose turn it is. It is dead, durably.
    pub(super) fn new(number: u64) -> Self {
        Batch {
            off: area_off(number),
            number,
            count: 0,
            crc_pairs: 0,
        }
    }

    /// Adds a word; nothing is flushed. [`Error::TooBig`] if the area is full.
    pub(super) fn push<P: Pmem>(&mut self, pm: &P, off: u64, word: u64) -> Result<()> {
        if self.count as usize >= MAX_WORDS {
            return Err(Error::TooBig);
        }
        let mut pair = [0u8; 16];
        put(&mut pair, 0, &off.to_le_bytes())?;
        put(&mut pair, 8, &word.to_le_bytes())?;
        pm.write(self.off + LINE_SIZE + u64::from(self.count) * 16, &pair)?;
        self.crc_pairs = pm.crc32c(self.crc_pairs, &pair);
        self.count += 1;
        Ok(())
    }

    /// Ends it: what is to be flushed before the first fence, and the word that
    /// then puts it in force when it is stored at [`off`](Self::off).
    pub(super) fn seal<P: Pmem>(&self, pm: &P, sb: &Superblock) -> Result<(u64, u64)> {
        let mut raw = header(self.number, self.count)?;
        let crc = crc_of(pm, sb, &raw, self.crc_pairs)?;
        put(&mut raw, 0, &crc.to_le_bytes())?;
        let word = get_u64(&raw, 0)?;
        // What is there must not be in force before that word is.
        pm.store(self.off, 0)?;
        pm.write(self.off + 8, raw.get(8..).ok_or(Error::Invalid)?)?;
        Ok((LINE_SIZE + u64::from(self.count) * 16, word))
    }

    /// Where the area starts.
    pub(super) fn off(&self) -> u64 {
        self.off
    }
}

/// A header's checksum: of its bytes 4.., then of the pairs' own.
fn crc_of<P: Pmem>(pm: &P, sb: &Superblock, raw: &[u8], pairs: u32) -> Result<u32> {
    let crc = pm.crc32c(seed(pm, sb), raw.get(4..).ok_or(Error::Invalid)?);
    Ok(pm.crc32c(crc, &pairs.to_le_bytes()))
}

/// An area that is in force: number, offset, count.
fn probe<P: Pmem>(pm: &P, sb: &Superblock, off: u64) -> Result<Option<(u64, u64, u32)>> {
    let mut raw = [0u8; LINE_SIZE as usize];
    pm.read(off, &mut raw)?;
    let (number, count) = (get_u64(&raw, 8)?, get_u32(&raw, 16)?);
    // Numbers count the batches of an attach, so there is no end to them; and say which area it is.
    let possible = number < 1 << 63 && off == area_off(number);
    if get_u32(&raw, 4)? != MAGIC || count as usize > MAX_WORDS || !possible {
        return Ok(None);
    }
    let mut pairs = 0;
    for index in 0..u64::from(count) {
        let mut pair = [0u8; 16];
        pm.read(off + LINE_SIZE + index * 16, &mut pair)?;
        pairs = pm.crc32c(pairs, &pair);
    }
    let right = crc_of(pm, sb, &raw, pairs)? == get_u32(&raw, 0)?;
    Ok(right.then_some((number, off, count)))
}

/// What an area is, for a checker.
pub(super) enum Area {
    /// Nothing in it is to be done.
    Dead,
    /// So many of its words are not where they belong yet.
    InForce { pending: u32 },
    /// Its first word was stored, which is the last, and its checksum is wrong.
    Damaged,
}

/// Where the area of a batch with this number is.
pub(super) fn area_off(area: u64) -> u64 {
    OFF + area % 2 * FRAMES * FRAME_SIZE
}

/// Looks at one of the two areas.
pub(super) fn area<P: Pmem>(pm: &P, sb: &Superblock, area: u64) -> Result<Area> {
    let off = area_off(area);
    if pm.load(off)? == 0 {
        return Ok(Area::Dead);
    }
    let Some((_, _, count)) = probe(pm, sb, off)? else {
        return Ok(Area::Damaged);
    };
    let mut pending = 0;
    for index in 0..u64::from(count) {
        let at = off + LINE_SIZE + index * 16;
        let (to, word) = (pm.load(at)?, pm.load(at + 8)?);
        pending += u32::from(belongs(sb, to) && pm.load(to)? != word);
    }
    Ok(Area::InForce { pending })
}

/// Whether a word of a batch may be at an offset.
fn belongs(sb: &Superblock, to: u64) -> bool {
    to % 8 == 0 && to >= sb.geometry.data_off && to < sb.geometry.data_end()
}

/// What [`replay`] did.
#[derive(Default)]
pub(super) struct Replayed {
    /// Words that had yet to be stored.
    pub(super) words: u32,
    /// Areas that the media refused to read. If one was in force, and its words
    /// had not reached their places yet, they are lost.
    pub(super) unreadable: u64,
}

/// At recovery: does what batches in force say, durably, and ends them, so that numbers may begin
/// anew. A word that belongs nowhere is left out.
pub(super) fn replay<P: Pmem>(pm: &P, sb: &Superblock) -> Result<Replayed> {
    let mut done = Replayed::default();
    let mut look = |off| match probe(pm, sb, off) {
        Err(Error::Io) => {
            done.unreadable += 1;
            Ok(None)
        }
        other => other,
    };
    let (first, second) = (look(area_off(0))?, look(area_off(1))?);
    // The older one first.
    let mut found = [first, second];
    if let (Some(one), Some(other)) = (first, second) {
        if one.0 > other.0 {
            found = [second, first];
        }
    }
    for (_, off, count) in found.into_iter().flatten() {
        for index in 0..u64::from(count) {
            let at = off + LINE_SIZE + index * 16;
            let (to, word) = (pm.load(at)?, pm.load(at + 8)?);
            if !belongs(sb, to) {
                continue;
            }
            // Before the load, which need not survive what the media refuses.
            match pm.read(to / LINE_SIZE * LINE_SIZE, &mut [0; LINE_SIZE as usize]) {
                Err(Error::Io) => {
                    done.unreadable += 1;
                    continue;
                }
                other => other?,
            }
            if pm.load(to)? != word {
                pm.store(to, word)?;
                pm.flush(to, 8)?;
                done.words = done.words.saturating_add(1);
            }
        }
    }
    if found.iter().any(Option::is_some) {
        pm.fence();
        for (_, off, _) in found.into_iter().flatten() {
            kill(pm, off)?;
        }
        pm.fence();
    }
    Ok(done)
}

/// Makes areas that cannot be read usable again, durably: no batch may go where it
/// cannot be found, and none that is found later may be done. [`Error::Io`] if the
/// media goes on refusing.
pub(super) fn restore<P: Pmem>(pm: &P, sb: &Superblock) -> Result<()> {
    for off in [0, 1].map(area_off) {
        if probe(pm, sb, off) == Err(Error::Io) {
            for line in 0..FRAMES * FRAME_SIZE / LINE_SIZE {
                pm.write(off + line * LINE_SIZE, &[0; LINE_SIZE as usize])?;
            }
            pm.flush(off, FRAMES * FRAME_SIZE)?;
            pm.fence();
            probe(pm, sb, off)?;
        }
    }
    Ok(())
}

/// Ends a batch: durable after the next fence.
pub(super) fn kill<P: Pmem>(pm: &P, off: u64) -> Result<()> {
    pm.store(off, 0)?;
    pm.flush(off, 8)
}
