// SPDX-License-Identifier: GPL-2.0-only
//! A skip list in persistent memory, as an expert would write one by hand.
//!
//! A node is a record: header, tower, key and body, one after the other, from a line's beginning
//! on. Keys are in order, and of the same key the newest comes first, as in LevelDB's tables: a
//! replacement is an insertion.
//!
//! Only the lowest level is durable. A turn's nodes are written back with their pointers at that
//! level already set, the nodes that go between the same two neighbours chained to each other;
//! after a fence, one store of 8 bytes into each left neighbour makes them reachable; after a
//! second fence they are there for good. The levels above are hints, stored in the nodes'
//! towers but never written back, and made anew by [`SkipList::recover`].
//!
//! | offset | size | |
//! | --: | --: | --- |
//! | 0 | 4 | CRC32C of the body, then of bytes 4..8, 16..40 and of the key |
//! | 4 | 4 | length of the body |
//! | 8 | 8 | the next node, 0 at the end |
//! | 16 | 8 | time, ns |
//! | 24 | 8 | sequence number |
//! | 32 | 2 | length of the key |
//! | 34 | 2 | levels |
//! | 36 | 4 | 0 |
//! | 40 | 8 each | the next node at level 1, 2, ... |
//! | | | key, body |

use pmskb_core::{Error, LINE_SIZE, Pmem, Result};
use std::cmp::Ordering;

/// Levels at most: right for 4^12 nodes.
const LEVELS: usize = 12;
const HEADER: u64 = 40;
const NEXT: u64 = 8;
/// Where the first node is: one that has all levels and no key. (The core's simulator takes
/// the second page for volatile.)
const HEAD: u64 = 0x2000;
/// Longest key.
const MAX_KEY: usize = 1024;

/// What a node says about itself.
#[derive(Clone, Copy, Debug)]
struct Header {
    crc: u32,
    body: u32,
    time: u64,
    seq: u64,
    key: u16,
    levels: u16,
}

impl Header {
    fn bytes(&self, next: u64) -> [u8; HEADER as usize] {
        let mut out = [0; HEADER as usize];
        out[0..4].copy_from_slice(&self.crc.to_le_bytes());
        out[4..8].copy_from_slice(&self.body.to_le_bytes());
        out[8..16].copy_from_slice(&next.to_le_bytes());
        out[16..24].copy_from_slice(&self.time.to_le_bytes());
        out[24..32].copy_from_slice(&self.seq.to_le_bytes());
        out[32..34].copy_from_slice(&self.key.to_le_bytes());
        out[34..36].copy_from_slice(&self.levels.to_le_bytes());
        out
    }

    fn read(pm: &impl Pmem, node: u64) -> Result<Self> {
        let mut bytes = [0; HEADER as usize];
        pm.read(node, &mut bytes)?;
        let word = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 8]));
        Ok(Self {
            crc: word(0) as u32,
            body: (word(0) >> 32) as u32,
            time: word(16),
            seq: word(24),
            key: word(32) as u16,
            levels: (word(32) >> 16) as u16,
        })
    }

    fn key_at(&self) -> u64 {
        HEADER + 8 * (u64::from(self.levels) - 1)
    }

    fn body_at(&self) -> u64 {
        self.key_at() + u64::from(self.key)
    }

    fn len(&self) -> u64 {
        self.body_at() + u64::from(self.body)
    }

    /// The checksum of a node whose body has this one.
    fn checksum(&self, pm: &impl Pmem, of_body: u32, key: &[u8]) -> u32 {
        let bytes = self.bytes(0);
        let crc = pm.crc32c(of_body, &bytes[4..8]);
        let crc = pm.crc32c(crc, &bytes[16..]);
        pm.crc32c(crc, key)
    }
}

/// A node that was written and cannot be reached yet.
struct Pending {
    key: Vec<u8>,
    seq: u64,
    node: u64,
    levels: usize,
    /// Its neighbours on the left, of each level, before the turn.
    left: [u64; LEVELS],
}

/// The list.
pub struct SkipList<P> {
    pm: P,
    /// Where the next node is written.
    end: u64,
    seq: u64,
    random: u64,
    pending: Vec<Pending>,
    scratch: Vec<u8>,
}

impl<P: Pmem> SkipList<P> {
    /// An empty one.
    pub fn format(pm: P) -> Result<Self> {
        let head = Header {
            crc: 0,
            body: 0,
            time: 0,
            seq: 0,
            key: 0,
            levels: LEVELS as u16,
        };
        pm.write(HEAD, &head.bytes(0))?;
        pm.write(HEAD + HEADER, &[0; 8 * (LEVELS - 1)])?;
        pm.flush(HEAD, head.len())?;
        pm.fence();
        Ok(Self::at(pm, HEAD + head.len()))
    }

    fn at(pm: P, end: u64) -> Self {
        Self {
            pm,
            end: end.next_multiple_of(LINE_SIZE),
            seq: 0,
            random: 0x9e37_79b9_7f4a_7c15,
            pending: Vec::new(),
            scratch: Vec::new(),
        }
    }

    /// Goes on with what is there after a crash: checks the lowest level and makes the others.
    #[cfg(test)]
    pub fn recover(pm: P) -> Result<Self> {
        let mut list = Self::at(pm, HEAD + HEADER + 8 * (LEVELS as u64 - 1));
        let mut last = [HEAD; LEVELS];
        for level in 1..LEVELS {
            list.set_next(HEAD, level, 0)?;
        }
        let mut node = list.next(HEAD, 0)?;
        while node != 0 {
            let header = Header::read(&list.pm, node)?;
            if header.levels == 0 || usize::from(header.levels) > LEVELS {
                return Err(Error::Damaged);
            }
            let mut key = vec![0; header.key.into()];
            list.pm.read(node + header.key_at(), &mut key)?;
            let mut body = vec![0; header.body as usize];
            list.pm.read(node + header.body_at(), &mut body)?;
            let of_body = list.pm.crc32c(0, &body);
            if header.checksum(&list.pm, of_body, &key) != header.crc {
                return Err(Error::Damaged);
            }
            let above = last.iter_mut().enumerate().skip(1);
            for (level, last) in above.take(usize::from(header.levels) - 1) {
                list.set_next(*last, level, node)?;
                list.set_next(node, level, 0)?;
                *last = node;
            }
            list.seq = list.seq.max(header.seq);
            let end = (node + header.len()).next_multiple_of(LINE_SIZE);
            list.end = list.end.max(end);
            node = list.next(node, 0)?;
        }
        Ok(list)
    }

    /// Writes a node, and starts its write-back but for its first line, which lacks a pointer.
    pub fn put(&mut self, key: &[u8], body: &[u8], time: u64) -> Result<()> {
        if key.len() > MAX_KEY {
            return Err(Error::Invalid);
        }
        self.seq += 1;
        let levels = self.choose_levels();
        let mut header = Header {
            crc: 0,
            body: body.len().try_into().map_err(|_| Error::Invalid)?,
            time,
            seq: self.seq,
            key: key.len() as u16,
            levels: levels as u16,
        };
        let node = self.end;
        if node + header.len() > self.pm.len() {
            return Err(Error::NoSpace);
        }
        let of_body = self.checksum_body(body);
        header.crc = header.checksum(&self.pm, of_body, key);
        self.pm.write(node, &header.bytes(0))?;
        self.pm.write(node + header.key_at(), key)?;
        self.copy_body(node + header.body_at(), body)?;
        if header.len() > LINE_SIZE {
            self.pm.flush(node + LINE_SIZE, header.len() - LINE_SIZE)?;
        }
        self.end = (node + header.len()).next_multiple_of(LINE_SIZE);
        let left = self.search(key, self.seq)?;
        self.pending.push(Pending {
            key: key.to_vec(),
            seq: self.seq,
            node,
            levels,
            left,
        });
        Ok(())
    }

    /// Makes what was put durable, all of it: on return it is found, now and after a crash.
    #[inline(never)]
    pub fn commit(&mut self) -> Result<()> {
        let mut pending = std::mem::take(&mut self.pending);
        if pending.is_empty() {
            return Ok(());
        }
        pending.sort_by(|a, b| a.key.cmp(&b.key).then(b.seq.cmp(&a.seq)));
        // Neighbours of the turn that have the same left neighbour are a chain.
        for (at, new) in pending.iter().enumerate() {
            let next = match pending.get(at + 1) {
                Some(after) if after.left[0] == new.left[0] => after.node,
                _ => self.next(new.left[0], 0)?,
            };
            self.set_next(new.node, 0, next)?;
            self.pm.flush(new.node, 1)?;
        }
        self.pm.fence();
        let mut before = None;
        for new in &pending {
            if before != Some(new.left[0]) {
                self.set_next(new.left[0], 0, new.node)?;
                self.pm.flush(new.left[0] + NEXT, 8)?;
            }
            before = Some(new.left[0]);
        }
        self.pm.fence();
        self.raise(&pending)?;
        pending.clear();
        self.pending = pending;
        Ok(())
    }

    /// Enters nodes at the levels above the lowest.
    fn raise(&self, pending: &[Pending]) -> Result<()> {
        // The last of this turn's nodes at each level, and its left neighbour.
        let mut last = [(0, 0); LEVELS];
        for new in pending {
            let above = last.iter_mut().enumerate().skip(1);
            for (level, last) in above.take(new.levels - 1) {
                let (old_left, node) = *last;
                let left = match old_left == new.left[level] && node != 0 {
                    true => node,
                    false => new.left[level],
                };
                let next = self.next(left, level)?;
                self.set_next(new.node, level, next)?;
                self.set_next(left, level, new.node)?;
                *last = (new.left[level], new.node);
            }
        }
        Ok(())
    }

    /// The newest body under a key.
    pub fn get(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let left = self.search(key, u64::MAX)?;
        let node = self.next(left[0], 0)?;
        if node == 0 || self.compare(node, key, u64::MAX)?.0 != Ordering::Equal {
            return Ok(None);
        }
        let header = Header::read(&self.pm, node)?;
        let mut body = vec![0; header.body as usize];
        self.pm.read(node + header.body_at(), &mut body)?;
        Ok(Some(body))
    }

    /// The left neighbours of a key with a sequence number, at each level.
    #[inline(never)]
    fn search(&mut self, key: &[u8], seq: u64) -> Result<[u64; LEVELS]> {
        let mut left = [HEAD; LEVELS];
        let mut node = HEAD;
        // What the level above came to is known to be on the right.
        let mut known = 0;
        for level in (0..LEVELS).rev() {
            loop {
                let next = self.next(node, level)?;
                if next == 0 || next == known {
                    known = next;
                    break;
                }
                let (of_key, of_seq) = self.compare(next, key, seq)?;
                if of_key.then(of_seq) != Ordering::Less {
                    known = next;
                    break;
                }
                node = next;
            }
            left[level] = node;
        }
        Ok(left)
    }

    /// Where a node is from a place in the order: by key, and then by age, the newest first.
    fn compare(&mut self, node: u64, key: &[u8], seq: u64) -> Result<(Ordering, Ordering)> {
        let header = Header::read(&self.pm, node)?;
        if usize::from(header.key) > MAX_KEY || header.levels == 0 {
            return Err(Error::Damaged);
        }
        self.scratch.resize(header.key.into(), 0);
        let mut scratch = std::mem::take(&mut self.scratch);
        self.pm.read(node + header.key_at(), &mut scratch)?;
        let of_key = scratch[..].cmp(key);
        self.scratch = scratch;
        Ok((of_key, seq.cmp(&header.seq)))
    }

    fn next_at(node: u64, level: usize) -> u64 {
        match level {
            0 => node + NEXT,
            above => node + HEADER + 8 * (above as u64 - 1),
        }
    }

    fn next(&self, node: u64, level: usize) -> Result<u64> {
        self.pm.load(Self::next_at(node, level))
    }

    fn set_next(&self, node: u64, level: usize, to: u64) -> Result<()> {
        self.pm.store(Self::next_at(node, level), to)
    }

    /// One level more with a chance of a quarter: xorshift.
    fn choose_levels(&mut self) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let zeros = self.random.trailing_zeros() as usize / 2;
        (1 + zeros).min(LEVELS)
    }

    #[inline(never)]
    fn checksum_body(&self, body: &[u8]) -> u32 {
        self.pm.crc32c(0, body)
    }

    #[inline(never)]
    fn copy_body(&self, at: u64, body: &[u8]) -> Result<()> {
        self.pm.write(at, body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pmskb_core::sim::{Rng, SimPm};
    use std::collections::BTreeMap;

    const SIZE: u64 = 1 << 20;

    type Model = BTreeMap<Vec<u8>, Vec<u8>>;

    fn key(n: u64) -> Vec<u8> {
        format!("key{n:03}").into_bytes()
    }

    fn body(n: u64) -> Vec<u8> {
        vec![n as u8; 1 + (n as usize * 37) % 200]
    }

    fn agrees(list: &mut SkipList<SimPm>, model: &Model, keys: u64) -> bool {
        (0..keys).all(|n| list.get(&key(n)).unwrap().as_ref() == model.get(&key(n)))
    }

    /// Turns of some puts each, of few keys, so that they replace each other and are neighbours.
    fn turns(rng: &mut Rng, count: u64, keys: u64) -> Vec<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut number = 0;
        let mut put = |rng: &mut Rng| {
            number += 1;
            (key(rng.below(keys)), body(number))
        };
        let turn = |rng: &mut Rng| (0..1 + rng.below(4)).map(|_| put(rng)).collect();
        let mut turn = turn;
        (0..count).map(|_| turn(rng)).collect()
    }

    #[test]
    fn it_agrees_with_a_map() {
        let mut rng = Rng(1);
        let mut list = SkipList::format(SimPm::new(SIZE)).unwrap();
        let mut model = Model::new();
        for turn in turns(&mut rng, 300, 200) {
            for (key, body) in &turn {
                list.put(key, body, 7).unwrap();
                model.insert(key.clone(), body.clone());
            }
            list.commit().unwrap();
        }
        assert!(agrees(&mut list, &model, 200));
        // All levels are in order and lead to the end.
        for level in 0..LEVELS {
            let (mut node, mut seen) = (list.next(HEAD, level).unwrap(), 0);
            let mut last = (Vec::new(), 0);
            while node != 0 {
                let header = Header::read(&list.pm, node).unwrap();
                let mut key = vec![0; header.key.into()];
                list.pm.read(node + header.key_at(), &mut key).unwrap();
                let place = (key, u64::MAX - header.seq);
                assert!(place > last, "level {level}: {place:?} after {last:?}");
                last = place;
                node = list.next(node, level).unwrap();
                seen += 1;
            }
            assert!(seen > 0 || level > 3, "level {level}: {seen} nodes");
        }
    }

    #[test]
    fn a_turn_has_two_fences_and_writes_each_line_back_once() {
        let mut list = SkipList::format(SimPm::new(SIZE)).unwrap();
        list.pm.reset_counts();
        list.put(b"sixteen bytes...", &[1; 1024], 7).unwrap();
        list.commit().unwrap();
        let counts = list.pm.counts();
        assert_eq!((counts.fences, counts.idle_fences, counts.clean), (2, 0, 0));
        // 1024 + 40 + 16 bytes and a tower are 17 lines, and one is the neighbour's.
        assert_eq!(counts.lines, 18);
        list.pm.reset_counts();
        for n in 0..20 {
            list.put(&key(n), &[1; 1024], 7).unwrap();
        }
        list.commit().unwrap();
        assert_eq!(list.pm.counts().fences, 2);
        list.pm.reset_counts();
        list.commit().unwrap();
        assert_eq!(list.pm.counts().events, 0);
    }

    /// At every event of a history the power goes, in several ways: what was committed is there,
    /// and of the turn that was under way each body is there as a whole or not at all.
    #[test]
    fn after_a_crash_what_was_committed_is_there_and_nothing_half_written() {
        const KEYS: u64 = 6;
        for seed in 0..6 {
            let history = turns(&mut Rng(seed), 5, KEYS);
            let mut event = 0;
            loop {
                let mut list = SkipList::format(SimPm::new(SIZE)).unwrap();
                list.pm.reset_counts();
                list.pm.stop_at(event);
                let mut committed = Model::new();
                let mut under_way = Vec::new();
                let mut ended = true;
                for turn in &history {
                    under_way.clone_from(turn);
                    let puts = turn.iter().try_for_each(|(k, b)| list.put(k, b, 7));
                    if puts.and_then(|()| list.commit()).is_err() {
                        ended = false;
                        break;
                    }
                    // A fence cannot say that it did not happen.
                    if list.pm.counts().events >= event {
                        ended = false;
                        break;
                    }
                    committed.extend(turn.iter().cloned());
                    under_way.clear();
                }
                let mut rng = Rng((seed << 32) | event);
                for way in 0..6 {
                    let image = match way {
                        0 => list.pm.crash_subset(0, &mut rng),
                        1 => list.pm.crash_subset(u64::MAX, &mut rng),
                        2 | 3 => list.pm.crash_subset(rng.next(), &mut rng),
                        _ => list.pm.crash_torn(&mut rng),
                    };
                    let mut after = SkipList::recover(image).expect("what is reachable is whole");
                    for n in 0..KEYS {
                        let found = after.get(&key(n)).unwrap();
                        let new = under_way.iter().filter(|(k, _)| *k == key(n));
                        let fine = found.as_ref() == committed.get(&key(n))
                            || new.into_iter().any(|(_, b)| Some(b) == found.as_ref());
                        assert!(fine, "seed {seed}, event {event}, way {way}, key {n}");
                    }
                }
                if ended {
                    break;
                }
                event += 1;
            }
            assert!(event > 50, "{event} events are no history");
        }
    }
}
