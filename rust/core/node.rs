// SPDX-License-Identifier: GPL-2.0

//! Index nodes: their layout, the search in one, and the pool they come from.
//!
//! A node is 1 KiB, four in a frame; volatile. 8-byte words:
//!
//! ```text
//!   0 version, odd while the node is being written
//!   8 count (16 bits), level (8, 0 = leaf), 8 zero, skip (16), magic (16)
//!  16, 24, 32  of a frame's first node: the pool's links, mask of free nodes
//!  64 entries: prefix, locator; in inner nodes also child
//! ```
//!
//! All keys of a node have their first `skip` bytes in common; `prefix` is the
//! 8 bytes after them, big-endian, zero padded. Where prefixes tie, the keys
//! themselves decide. An inner node's entry 0 has no key; the locator of each
//! other entry is that of the smallest record below its child.
//!
//! All stores into nodes are 8-byte release stores, so that lock-free readers
//! (`find`) see an odd or a new version if they see anything new. A version
//! is never used twice.

use super::frame::{Frames, Need};
use super::record::{key_of, KeySrc};
use super::{Error, Frame, Pmem, Result, FRAME_SIZE};
use core::cmp::Ordering;

pub(super) const NODE_SIZE: u64 = 1024;
const ENTRIES: u64 = 64;
const MAGIC: u64 = 0x6e70;
pub(super) const LEAF_MAX: usize = 60;
pub(super) const INNER_MAX: usize = 40;

/// Which of the two trees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Records by key.
    Keys,
    /// Record frames by base sequence number; prefixes are the whole keys.
    Log,
}

/// A node's second word.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head {
    pub(super) count: usize,
    pub(super) level: u8,
    pub(super) skip: usize,
}

impl Head {
    pub(super) fn read<P: Pmem>(pm: &P, node: u64) -> Result<Head> {
        let word = pm.load(node.saturating_add(8))?;
        let head = Head {
            count: (word & 0xffff) as usize,
            level: (word >> 16) as u8,
            skip: ((word >> 32) & 0xffff) as usize,
        };
        if word >> 48 != MAGIC || head.count > head.max() {
            return Err(Error::Damaged);
        }
        Ok(head)
    }

    pub(super) fn write<P: Pmem>(&self, pm: &P, node: u64) -> Result<()> {
        let word = self.count as u64
            | (u64::from(self.level) << 16)
            | ((self.skip as u64) << 32)
            | (MAGIC << 48);
        pm.store(node + 8, word)
    }

    pub(super) fn max(&self) -> usize {
        if self.level == 0 {
            LEAF_MAX
        } else {
            INNER_MAX
        }
    }

    /// The first entry that has a key.
    pub(super) fn low(&self) -> usize {
        usize::from(self.level != 0)
    }

    /// Words of an entry.
    fn words(&self) -> usize {
        if self.level == 0 {
            2
        } else {
            3
        }
    }

    fn at(&self, node: u64, index: usize) -> u64 {
        node.saturating_add(ENTRIES + (8 * self.words() * index) as u64)
    }

    pub(super) fn prefix<P: Pmem>(&self, pm: &P, node: u64, index: usize) -> Result<u64> {
        pm.load(self.at(node, index))
    }

    pub(super) fn loc<P: Pmem>(&self, pm: &P, node: u64, index: usize) -> Result<u64> {
        pm.load(self.at(node, index).saturating_add(8))
    }

    pub(super) fn child<P: Pmem>(&self, pm: &P, node: u64, index: usize) -> Result<u64> {
        pm.load(self.at(node, index).saturating_add(16))
    }

    pub(super) fn entry<P: Pmem>(&self, pm: &P, node: u64, index: usize) -> Result<Entry> {
        Ok(Entry {
            prefix: self.prefix(pm, node, index)?,
            loc: self.loc(pm, node, index)?,
            child: if self.level == 0 {
                0
            } else {
                self.child(pm, node, index)?
            },
        })
    }

    pub(super) fn set<P: Pmem>(&self, pm: &P, node: u64, index: usize, entry: Entry) -> Result<()> {
        if index >= self.max() {
            return Err(Error::Damaged);
        }
        let at = self.at(node, index);
        pm.store(at, entry.prefix)?;
        pm.store(at + 8, entry.loc)?;
        if self.level != 0 {
            pm.store(at + 16, entry.child)?;
        }
        Ok(())
    }

    /// An inner node's entry 0 has no key, wherever it was before.
    pub(super) fn first_without_key<P: Pmem>(&self, pm: &P, node: u64) -> Result<()> {
        if self.level == 0 {
            return Ok(());
        }
        let child = self.child(pm, node, 0)?;
        let entry = Entry {
            prefix: 0,
            loc: 0,
            child,
        };
        self.set(pm, node, 0, entry)
    }

    /// Copies so many entries from `from` on to `to` of a node, this one or another of its level.
    pub(super) fn shift<P: Pmem>(
        &self,
        pm: &P,
        node: u64,
        from: usize,
        (to_node, to): (u64, usize),
        count: usize,
    ) -> Result<()> {
        if from.max(to).saturating_add(count) > self.max() {
            return Err(Error::Damaged);
        }
        let (from, to) = (self.at(node, from), self.at(to_node, to));
        pm.shift(from, to, count * self.words())
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) prefix: u64,
    pub(super) loc: u64,
    pub(super) child: u64,
}

/// The key of an entry, for trees whose prefixes are not the whole keys.
pub(super) fn prefix_of<P: Pmem>(pm: &P, kind: Kind, loc: u64, skip: usize) -> Result<u64> {
    match kind {
        Kind::Keys => key_of(pm, loc)?.prefix(pm, skip),
        Kind::Log => pm.load(loc.saturating_add(16)),
    }
}

/// Looks at a key of a node: as all of them begin with the same bytes, any will do that
/// can be read.
pub(super) fn any_key<P: Pmem, T>(
    pm: &P,
    node: u64,
    head: &Head,
    look: impl Fn(&KeySrc<'_>) -> Result<T>,
) -> Result<T> {
    for index in head.low()..head.count {
        match key_of(pm, head.loc(pm, node, index)?).and_then(|key| look(&key)) {
            Err(Error::Io) => (),
            seen => return seen,
        }
    }
    Err(Error::Io)
}

/// Where a key is, or would be, in a node.
pub(super) struct Place {
    /// Index of the first entry that is not below the key.
    pub(super) at: usize,
    /// That entry has the key.
    pub(super) exact: bool,
}

/// Finds a key in a node. Entries without a key count as below it.
pub(super) fn search<P: Pmem>(
    pm: &P,
    kind: Kind,
    node: u64,
    head: &Head,
    key: &KeySrc<'_>,
) -> Result<Place> {
    let (mut low, mut high) = (head.low(), head.count);
    if low >= high {
        return Ok(Place {
            at: high,
            exact: false,
        });
    }
    if head.skip > 0 {
        let order = any_key(pm, node, head, |one| Ok(key.compare(pm, one, head.skip)?.0))?;
        let at = match order {
            Ordering::Less => Some(low),
            Ordering::Greater => Some(high),
            Ordering::Equal => None,
        };
        if let Some(at) = at {
            return Ok(Place { at, exact: false });
        }
    }
    let prefix = key.prefix(pm, head.skip)?;
    let below = |prefix| {
        let first = head.at(node, head.low());
        let count = head.count - head.low();
        Ok(head.low() + pm.lower_bound(first, head.words(), count, prefix)?)
    };
    low = below(prefix)?;
    let same = low < high && head.prefix(pm, node, low)? == prefix;
    if !same || kind != Kind::Keys {
        return Ok(Place {
            at: low,
            exact: same,
        });
    }
    // Where prefixes tie, the keys themselves decide.
    if let Some(next) = prefix.checked_add(1) {
        high = below(next)?;
    }
    let order_at = |index| {
        let other = key_of(pm, head.loc(pm, node, index)?)?;
        Ok(other.compare(pm, key, usize::MAX)?.0)
    };
    while low < high {
        let mut mid = low + (high - low) / 2;
        let mut order = order_at(mid);
        if order == Err(Error::Io) {
            // Another one may tell as much: all but those between which the key lies.
            for other in (low..mid).rev().chain(mid + 1..high) {
                match order_at(other) {
                    Ok(Ordering::Less) if other < mid => (),
                    Ok(Ordering::Greater) if other > mid => break,
                    Err(Error::Io) => (),
                    told => {
                        (mid, order) = (other, told);
                        break;
                    }
                }
            }
        }
        let order = order?;
        match order {
            Ordering::Less => low = mid + 1,
            Ordering::Greater => high = mid,
            Ordering::Equal => {
                return Ok(Place {
                    at: mid,
                    exact: true,
                })
            }
        }
    }
    Ok(Place {
        at: low,
        exact: false,
    })
}

/// Free nodes.
///
/// Frames of which some nodes are free are in a doubly linked list through their
/// first node's words, those of which all are in another. The latter go back to
/// the allocator, but for what is needed for what is staged.
pub(super) struct Pool {
    /// Offset of the first frame with nodes in use and free ones, or 0.
    head: u64,
    /// Offset of the first frame whose nodes are all free, or 0.
    spare: u64,
    /// Free nodes.
    pub(super) free: u64,
    /// Frames of nodes, free or not.
    pub(super) frames: u64,
    /// So many free nodes are kept.
    pub(super) keep: u64,
    version: u64,
}

impl Pool {
    pub(super) fn new(version: u64) -> Self {
        Pool {
            head: 0,
            spare: 0,
            free: 0,
            frames: 0,
            keep: 0,
            version: version & !1,
        }
    }

    /// A version that no node had before; even.
    pub(super) fn version(&mut self) -> u64 {
        self.version = self.version.wrapping_add(2);
        self.version
    }

    /// Readers: whoever looks at the node from here on, look again.
    pub(super) fn begin<P: Pmem>(&mut self, pm: &P, node: u64) -> Result<()> {
        let version = self.version() | 1;
        pm.store(node, version)
    }

    /// Readers: the node is as it should be.
    pub(super) fn end<P: Pmem>(&mut self, pm: &P, node: u64) -> Result<()> {
        let version = self.version();
        pm.store(node, version)
    }

    fn push<P: Pmem>(&mut self, pm: &P, frame: u64) -> Result<()> {
        if self.head != 0 {
            pm.store(self.head + 24, frame)?;
        }
        pm.store(frame + 16, self.head)?;
        pm.store(frame + 24, 0)?;
        self.head = frame;
        Ok(())
    }

    fn unlink<P: Pmem>(&mut self, pm: &P, frame: u64) -> Result<()> {
        let (next, prev) = (pm.load(frame + 16)?, pm.load(frame + 24)?);
        if next != 0 {
            pm.store(next.saturating_add(24), prev)?;
        }
        if prev != 0 {
            pm.store(prev.saturating_add(16), next)?;
        } else {
            self.head = next;
        }
        Ok(())
    }

    fn push_spare<P: Pmem>(&mut self, pm: &P, frame: u64) -> Result<()> {
        pm.store(frame + 16, self.spare)?;
        self.spare = frame;
        Ok(())
    }

    fn pop_spare<P: Pmem>(&mut self, pm: &P) -> Result<Option<u64>> {
        if self.spare == 0 {
            return Ok(None);
        }
        let frame = self.spare;
        self.spare = pm.load(frame + 16)?;
        Ok(Some(frame))
    }

    /// Sees to it that there are `want` free nodes.
    pub(super) fn reserve<P: Pmem, F: Frames>(
        &mut self,
        pm: &P,
        frames: &F,
        want: u64,
        need: Need,
    ) -> Result<()> {
        while self.free < want {
            let frame = frames.alloc(None, need).ok_or(Error::NoSpace)?.off();
            let empty = Head {
                count: 0,
                level: 0,
                skip: 0,
            };
            for node in (0..4).map(|node| frame + node * NODE_SIZE) {
                empty.write(pm, node)?;
                self.end(pm, node)?;
            }
            pm.store(frame + 32, 0xf)?;
            self.push_spare(pm, frame)?;
            self.free += 4;
            self.frames += 1;
        }
        Ok(())
    }

    /// Takes a free node; there is one by `reserve`.
    pub(super) fn alloc<P: Pmem>(&mut self, pm: &P) -> Result<u64> {
        if self.head == 0 {
            let frame = self.pop_spare(pm)?.ok_or(Error::NoSpace)?;
            self.push(pm, frame)?;
        }
        let frame = self.head;
        let mask = pm.load(frame + 32)? & 0xf;
        if mask == 0 {
            return Err(Error::Damaged);
        }
        let index = u64::from(mask.trailing_zeros());
        let left = mask & (mask - 1);
        pm.store(frame + 32, left)?;
        if left == 0 {
            self.unlink(pm, frame)?;
        }
        self.free = self.free.saturating_sub(1);
        Ok(frame + index * NODE_SIZE)
    }

    /// Gives a node back.
    pub(super) fn free<P: Pmem, F: Frames>(&mut self, pm: &P, frames: &F, node: u64) -> Result<()> {
        let frame = node / FRAME_SIZE * FRAME_SIZE;
        self.end(pm, node)?;
        let mask = pm.load(frame + 32)? & 0xf;
        let now = mask | (1 << (node % FRAME_SIZE / NODE_SIZE));
        pm.store(frame + 32, now)?;
        if mask == 0 {
            self.push(pm, frame)?;
        }
        self.free += 1;
        if now == 0xf {
            self.unlink(pm, frame)?;
            self.push_spare(pm, frame)?;
            self.trim(pm, frames)?;
        }
        Ok(())
    }

    /// Gives frames back until no more than `keep` nodes, or none that can go,
    /// are free.
    pub(super) fn trim<P: Pmem, F: Frames>(&mut self, pm: &P, frames: &F) -> Result<()> {
        while self.free >= self.keep.saturating_add(4) {
            let Some(frame) = self.pop_spare(pm)? else {
                break;
            };
            for node in (0..4).map(|node| frame + node * NODE_SIZE) {
                // No node any more, whatever becomes of the frame.
                self.end(pm, node)?;
                pm.store(node + 8, 0)?;
            }
            self.free -= 4;
            self.frames = self.frames.saturating_sub(1);
            frames.unhold(Frame::of(frame).ok_or(Error::Damaged)?, 0)?;
        }
        Ok(())
    }
}
