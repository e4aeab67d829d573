// SPDX-License-Identifier: GPL-2.0

//! The two B+trees: records by key, record frames by base sequence number.
//!
//! One writer; any number of lock-free readers. A node is split by making the
//! right half, linking it into the parent, then shortening the left half: at each
//! instant every key is found. Full nodes on the way are split from the top.
//! A node that becomes empty is unlinked and freed; half-empty ones stay.

use super::frame::Frames;
use super::node::{
    any_key, prefix_of, search, Entry, Head, Kind, Pool, INNER_MAX, LEAF_MAX, NODE_SIZE,
};
use super::record::{key_of, KeySrc};
use super::{Error, IndexEntry, Pmem, Result};

/// A tree cannot become higher: each level multiplies by 20 or more.
pub(super) const MAX_HEIGHT: usize = 12;
/// Entries of a node that is loaded: most of them, so that an insertion does not
/// split it at once.
const LEAF_FILL: usize = LEAF_MAX - LEAF_MAX / 8;
const INNER_FILL: usize = INNER_MAX - INNER_MAX / 8;
/// How often a reader begins anew before it gives up.
const TRIES: u32 = 100_000;

/// The word in the live page that says where a tree starts: root / 1024 in the
/// low 34 bits, height in 6, a counter in the upper 24.
fn root_word(root: u64, height: usize, tick: u64) -> u64 {
    (root >> 10) | ((height as u64) << 34) | (tick << 40)
}

/// Nodes that [`Tree::load`] needs for so many entries.
pub(super) fn nodes_for(entries: usize) -> u64 {
    let mut nodes = entries.div_ceil(LEAF_FILL);
    let mut total = nodes;
    for _ in 0..MAX_HEIGHT {
        nodes = nodes.div_ceil(INNER_FILL);
        total = total.saturating_add(nodes);
    }
    total as u64
}

/// The writer's side of a tree.
pub(super) struct Tree {
    kind: Kind,
    /// Where the root word is.
    at: u64,
    root: u64,
    pub(super) height: usize,
    tick: u64,
}

/// The way from the root to a leaf: nodes and the index taken in each.
struct Descent {
    path: [(u64, usize); MAX_HEIGHT],
    /// Level of the path where the key is a separator.
    separator: Option<usize>,
    /// The leaf's entry at the path's last index has the key.
    exact: bool,
}

impl Tree {
    /// An empty tree.
    pub(super) fn new<P: Pmem>(pm: &P, kind: Kind, at: u64) -> Result<Tree> {
        let mut tree = Tree {
            kind,
            at,
            root: 0,
            height: 0,
            tick: 0,
        };
        tree.publish(pm)?;
        Ok(tree)
    }

    /// Free nodes that `inserts` insertions need at most.
    pub(super) fn reserve(&self, inserts: u64) -> u64 {
        inserts + inserts / 4 + 2 * (self.height as u64 + 2)
    }

    fn publish<P: Pmem>(&mut self, pm: &P) -> Result<()> {
        self.tick = self.tick.wrapping_add(1) & 0xff_ffff;
        pm.store(self.at, root_word(self.root, self.height, self.tick))
    }

    fn descend<P: Pmem>(&self, pm: &P, key: &KeySrc<'_>) -> Result<Descent> {
        let mut way = Descent {
            path: [(0, 0); MAX_HEIGHT],
            separator: None,
            exact: false,
        };
        let mut node = self.root;
        for (depth, step) in way.path.iter_mut().take(self.height).enumerate() {
            let head = Head::read(pm, node)?;
            if usize::from(head.level) + depth + 1 != self.height {
                return Err(Error::Damaged);
            }
            let place = search(pm, self.kind, node, &head, key)?;
            if head.level == 0 {
                *step = (node, place.at);
                way.exact = place.exact;
                break;
            }
            if place.exact {
                way.separator = Some(depth);
            }
            let index = if place.exact {
                place.at
            } else {
                place.at.saturating_sub(1)
            };
            *step = (node, index);
            node = head.child(pm, node, index)?;
            pm.prefetch(node, NODE_SIZE);
        }
        Ok(way)
    }

    fn step(&self, way: &Descent, depth: usize) -> Result<(u64, usize)> {
        way.path.get(depth).copied().ok_or(Error::Damaged)
    }

    /// Skips what all keys of a node that is being written have in common, if half of
    /// their prefixes is such: then these tell too little. Less is not worth it, as each
    /// record that has to be looked at for its key is a cache miss or two.
    fn tighten<P: Pmem>(&self, pm: &P, node: u64, head: &mut Head) -> Result<()> {
        if self.kind == Kind::Log || head.count < head.low() + 2 {
            return Ok(());
        }
        let (first, last) = (head.low(), head.count - 1);
        let differ = head.prefix(pm, node, first)? ^ head.prefix(pm, node, last)?;
        if differ >> 32 != 0 {
            return Ok(());
        }
        let (first, last) = (head.loc(pm, node, first)?, head.loc(pm, node, last)?);
        let common = key_of(pm, first)
            .and_then(|first| Ok(first.compare(pm, &key_of(pm, last)?, first.len())?.1));
        let best = match common {
            // One that cannot be read tells nothing.
            Err(Error::Io) => return Ok(()),
            best => best?,
        };
        if best <= head.skip {
            return Ok(());
        }
        for index in head.low()..head.count {
            if prefix_of(pm, self.kind, head.loc(pm, node, index)?, best) == Err(Error::Io) {
                return Ok(());
            }
        }
        self.skip(pm, node, head, best)
    }

    /// Makes a node skip so many bytes.
    fn skip<P: Pmem>(&self, pm: &P, node: u64, head: &mut Head, skip: usize) -> Result<()> {
        for index in head.low()..head.count {
            let mut entry = head.entry(pm, node, index)?;
            entry.prefix = self.prefix_at(pm, node, head, index, skip)?;
            head.set(pm, node, index, entry)?;
        }
        head.skip = skip;
        Ok(())
    }

    /// An entry's prefix if so many bytes are skipped. If these are fewer than the node
    /// skips, its record need not be read, and perhaps cannot be.
    fn prefix_at<P: Pmem>(
        &self,
        pm: &P,
        node: u64,
        head: &Head,
        index: usize,
        skip: usize,
    ) -> Result<u64> {
        let prefix = head.prefix(pm, node, index)?;
        if self.kind == Kind::Log || skip == head.skip {
            return Ok(prefix);
        }
        let Some(more) = head.skip.checked_sub(skip) else {
            return prefix_of(pm, self.kind, head.loc(pm, node, index)?, skip);
        };
        let common = any_key(pm, node, head, |key| key.prefix(pm, skip))?;
        if more >= 8 {
            return Ok(common);
        }
        let own = !0 >> (8 * more);
        Ok((common & !own) | (prefix >> (8 * more)))
    }

    /// Puts an entry into a node that has room.
    fn insert_entry<P: Pmem>(
        &self,
        pm: &P,
        pool: &mut Pool,
        node: u64,
        at: usize,
        (key, loc): (&KeySrc<'_>, u64),
        child: u64,
    ) -> Result<()> {
        let mut head = Head::read(pm, node)?;
        if head.count >= head.max() || at > head.count {
            return Err(Error::Damaged);
        }
        let mut fewer = head.skip;
        if head.count <= head.low() {
            fewer = 0;
        } else if head.skip > 0 {
            fewer = any_key(pm, node, &head, |one| {
                Ok(key.compare(pm, one, head.skip)?.1)
            })?;
        }
        let prefix = key.prefix(pm, fewer)?;
        pool.begin(pm, node)?;
        if fewer < head.skip {
            self.skip(pm, node, &mut head, fewer)?;
        }
        head.shift(pm, node, at, (node, at + 1), head.count - at)?;
        head.set(pm, node, at, Entry { prefix, loc, child })?;
        head.count += 1;
        // Now and then, see whether the keys have more in common by now.
        if matches!(head.count, 4 | 16 | 32) {
            self.tighten(pm, node, &mut head)?;
        }
        head.write(pm, node)?;
        pool.end(pm, node)
    }

    /// Where to split a node: there, or at the next entry whose key can be read, as it
    /// becomes a separator.
    fn readable<P: Pmem>(&self, pm: &P, node: u64, head: &Head, mid: usize) -> Result<usize> {
        for at in (1..=mid).rev().chain(mid + 1..head.count) {
            let loc = head.loc(pm, node, at)?;
            if self.kind == Kind::Log || key_of(pm, loc).and_then(|key| key.hash(pm)).is_ok() {
                return Ok(at);
            }
        }
        Err(Error::Io)
    }

    /// Splits the node at `depth` of the path; its parent has room.
    fn split<P: Pmem>(
        &mut self,
        pm: &P,
        pool: &mut Pool,
        way: &Descent,
        depth: usize,
    ) -> Result<()> {
        let (node, index) = self.step(way, depth)?;
        let mut head = Head::read(pm, node)?;
        if head.count < 2 || depth == 0 && self.height >= MAX_HEIGHT {
            return Err(Error::Damaged);
        }
        // What comes in order fills nodes; what does not, halves them.
        let last = index + usize::from(head.level != 0) >= head.count;
        let mid = if last { head.count - 1 } else { head.count / 2 };
        let mid = self.readable(pm, node, &head, mid)?;
        let right = pool.alloc(pm)?;
        let mut right_head = Head {
            count: head.count - mid,
            level: head.level,
            skip: head.skip,
        };
        let separator = head.loc(pm, node, mid)?;
        let base = head.prefix(pm, node, mid)?.to_be_bytes();
        let key = match self.kind {
            Kind::Keys => key_of(pm, separator)?,
            Kind::Log => KeySrc::Bytes(&base),
        };
        pool.begin(pm, right)?;
        head.shift(pm, node, mid, (right, 0), right_head.count)?;
        right_head.first_without_key(pm, right)?;
        self.tighten(pm, right, &mut right_head)?;
        right_head.write(pm, right)?;
        pool.end(pm, right)?;

        if let Some(above) = depth.checked_sub(1) {
            let (parent, at) = self.step(way, above)?;
            self.insert_entry(pm, pool, parent, at + 1, (&key, separator), right)?;
        } else {
            let root = pool.alloc(pm)?;
            let root_head = Head {
                count: 2,
                level: head.level + 1,
                skip: 0,
            };
            pool.begin(pm, root)?;
            let entry = Entry {
                prefix: 0,
                loc: 0,
                child: node,
            };
            root_head.set(pm, root, 0, entry)?;
            let entry = Entry {
                prefix: key.prefix(pm, 0)?,
                loc: separator,
                child: right,
            };
            root_head.set(pm, root, 1, entry)?;
            root_head.write(pm, root)?;
            pool.end(pm, root)?;
            (self.root, self.height) = (root, self.height + 1);
            self.publish(pm)?;
        }

        pool.begin(pm, node)?;
        head.count = mid;
        self.tighten(pm, node, &mut head)?;
        head.write(pm, node)?;
        pool.end(pm, node)
    }

    /// Inserts a record; returns the one that had its key before. The pool has
    /// the nodes that [`reserve`](Self::reserve) asks for, so it cannot run out.
    pub(super) fn insert<P: Pmem>(
        &mut self,
        pm: &P,
        pool: &mut Pool,
        key: &KeySrc<'_>,
        loc: u64,
    ) -> Result<Option<u64>> {
        if self.height == 0 {
            let root = pool.alloc(pm)?;
            let head = Head {
                count: 0,
                level: 0,
                skip: 0,
            };
            head.write(pm, root)?;
            self.insert_entry(pm, pool, root, 0, (key, loc), 0)?;
            (self.root, self.height) = (root, 1);
            self.publish(pm)?;
            return Ok(None);
        }
        // Each turn but the last splits one node of the path.
        for _ in 0..=MAX_HEIGHT {
            let way = self.descend(pm, key)?;
            let leaf = self.height - 1;
            let (node, at) = self.step(&way, leaf)?;
            if way.exact {
                let old = Head::read(pm, node)?.loc(pm, node, at)?;
                self.set_loc(pm, pool, node, at, loc)?;
                if let Some(depth) = way.separator {
                    let (node, at) = self.step(&way, depth)?;
                    self.set_loc(pm, pool, node, at, loc)?;
                }
                return Ok(Some(old));
            }
            let mut full = None;
            for depth in (0..=leaf).rev() {
                let head = Head::read(pm, self.step(&way, depth)?.0)?;
                if head.count < head.max() {
                    break;
                }
                full = Some(depth);
            }
            match full {
                Some(depth) => self.split(pm, pool, &way, depth)?,
                None => {
                    self.insert_entry(pm, pool, node, at, (key, loc), 0)?;
                    return Ok(None);
                }
            }
        }
        Err(Error::Damaged)
    }

    /// Loads an empty tree with entries in order, whose prefixes are what follows
    /// the first `skip` bytes of their keys, which all have in common. The pool has
    /// the nodes that [`nodes_for`] says.
    pub(super) fn load<P: Pmem>(
        &mut self,
        pm: &P,
        pool: &mut Pool,
        entries: &[IndexEntry],
        skip: usize,
    ) -> Result<()> {
        // On each level the node that is being filled, and how far it is.
        let mut rising: [Option<(u64, Head)>; MAX_HEIGHT] = [None; MAX_HEIGHT];
        let mut last_leaf = None;
        for part in entries.chunks(LEAF_FILL) {
            let node = pool.alloc(pm)?;
            let mut head = Head {
                count: part.len(),
                level: 0,
                skip,
            };
            pool.begin(pm, node)?;
            let mut ties = false;
            let mut last = None;
            for (index, entry) in part.iter().enumerate() {
                let (prefix, loc) = (entry.prefix, entry.loc);
                ties |= last == Some(prefix);
                last = Some(prefix);
                head.set(
                    pm,
                    node,
                    index,
                    Entry {
                        prefix,
                        loc,
                        child: 0,
                    },
                )?;
            }
            if ties {
                self.tighten(pm, node, &mut head)?;
            }
            head.write(pm, node)?;
            pool.end(pm, node)?;
            match last_leaf.replace(node) {
                // It may be all there is.
                None => (self.root, self.height) = (node, 1),
                Some(left) => {
                    let first = part.first().ok_or(Error::Damaged)?.loc;
                    self.raise(pm, pool, &mut rising, left, first, node)?;
                }
            }
        }
        for (node, head) in rising.into_iter().flatten() {
            self.settle(pm, pool, node, head)?;
            // The highest one stays.
            (self.root, self.height) = (node, usize::from(head.level) + 1);
        }
        self.publish(pm)
    }

    /// Ends the filling of an inner node.
    fn settle<P: Pmem>(&self, pm: &P, pool: &mut Pool, node: u64, mut head: Head) -> Result<()> {
        self.tighten(pm, node, &mut head)?;
        head.write(pm, node)?;
        pool.end(pm, node)
    }

    /// Links the newest node of a level, right of `left`, into the levels above.
    fn raise<P: Pmem>(
        &mut self,
        pm: &P,
        pool: &mut Pool,
        rising: &mut [Option<(u64, Head)>; MAX_HEIGHT],
        mut left: u64,
        first: u64,
        mut child: u64,
    ) -> Result<()> {
        let none = Entry {
            prefix: 0,
            loc: 0,
            child,
        };
        for (level, slot) in (1u8..).zip(rising.iter_mut()) {
            let entry = Entry {
                prefix: prefix_of(pm, self.kind, first, 0)?,
                loc: first,
                child,
            };
            let mut head = Head {
                count: 0,
                level,
                skip: 0,
            };
            match slot {
                Some((node, head)) if head.count < INNER_FILL => {
                    head.set(pm, *node, head.count, entry)?;
                    head.count += 1;
                    return Ok(());
                }
                Some((full, full_head)) => {
                    let node = pool.alloc(pm)?;
                    pool.begin(pm, node)?;
                    head.set(pm, node, 0, Entry { child, ..none })?;
                    head.count = 1;
                    self.settle(pm, pool, *full, *full_head)?;
                    (left, child) = (*full, node);
                    *slot = Some((node, head));
                }
                None => {
                    let node = pool.alloc(pm)?;
                    pool.begin(pm, node)?;
                    head.set(
                        pm,
                        node,
                        0,
                        Entry {
                            child: left,
                            ..none
                        },
                    )?;
                    head.set(pm, node, 1, entry)?;
                    head.count = 2;
                    *slot = Some((node, head));
                    return Ok(());
                }
            }
        }
        Err(Error::TooBig)
    }

    /// Another record with the same key takes an entry over.
    fn set_loc<P: Pmem>(
        &self,
        pm: &P,
        pool: &mut Pool,
        node: u64,
        at: usize,
        loc: u64,
    ) -> Result<()> {
        let head = Head::read(pm, node)?;
        let mut entry = head.entry(pm, node, at)?;
        entry.loc = loc;
        pool.begin(pm, node)?;
        head.set(pm, node, at, entry)?;
        pool.end(pm, node)
    }

    /// Another key takes over as separator: that of entry 1 of a node below.
    fn set_separator<P: Pmem>(
        &self,
        pm: &P,
        pool: &mut Pool,
        (node, at): (u64, usize),
        (below, below_head): (u64, &Head),
    ) -> Result<()> {
        let mut head = Head::read(pm, node)?;
        let loc = below_head.loc(pm, below, 1)?;
        let mut skip = 0;
        if head.skip > 0 && head.count > 2 {
            let other = head.loc(pm, node, if at == 1 { 2 } else { 1 })?;
            let common = key_of(pm, loc)
                .and_then(|key| Ok(key.compare(pm, &key_of(pm, other)?, head.skip)?.1));
            skip = match common {
                // What the index knows of it will do.
                Err(Error::Io) => 0,
                common => common?,
            };
        }
        let prefix = self.prefix_at(pm, below, below_head, 1, skip)?;
        pool.begin(pm, node)?;
        if skip != head.skip {
            self.skip(pm, node, &mut head, skip)?;
        }
        let mut entry = head.entry(pm, node, at)?;
        (entry.loc, entry.prefix) = (loc, prefix);
        head.set(pm, node, at, entry)?;
        head.write(pm, node)?;
        pool.end(pm, node)
    }

    fn remove_entry<P: Pmem>(&self, pm: &P, pool: &mut Pool, node: u64, at: usize) -> Result<()> {
        let mut head = Head::read(pm, node)?;
        pool.begin(pm, node)?;
        head.count = head.count.saturating_sub(1);
        head.shift(pm, node, at + 1, (node, at), head.count.saturating_sub(at))?;
        if at == 0 {
            head.first_without_key(pm, node)?;
        }
        head.write(pm, node)?;
        pool.end(pm, node)
    }

    /// Removes a key; returns its record.
    pub(super) fn remove<P: Pmem, F: Frames>(
        &mut self,
        pm: &P,
        frames: &F,
        pool: &mut Pool,
        key: &KeySrc<'_>,
    ) -> Result<Option<u64>> {
        if self.height == 0 {
            return Ok(None);
        }
        let way = self.descend(pm, key)?;
        if !way.exact {
            return Ok(None);
        }
        let leaf = self.height - 1;
        let (node, at) = self.step(&way, leaf)?;
        let head = Head::read(pm, node)?;
        let old = head.loc(pm, node, at)?;
        // The lowest node of the path that keeps an entry.
        let mut keep = leaf;
        while Head::read(pm, self.step(&way, keep)?.0)?.count <= 1 {
            let Some(above) = keep.checked_sub(1) else {
                let height = core::mem::take(&mut self.height);
                self.root = 0;
                self.publish(pm)?;
                for depth in 0..height {
                    pool.free(pm, frames, self.step(&way, depth)?.0)?;
                }
                return Ok(Some(old));
            };
            keep = above;
        }
        let (node, at) = self.step(&way, keep)?;
        let head = Head::read(pm, node)?;
        if at == 0 {
            // The record was the smallest below here: its successor takes over
            // as separator, wherever it served as one.
            if let Some(depth) = way.separator {
                let above = self.step(&way, depth)?;
                self.set_separator(pm, pool, above, (node, &head))?;
            }
        }
        self.remove_entry(pm, pool, node, at)?;
        for depth in keep + 1..=leaf {
            pool.free(pm, frames, self.step(&way, depth)?.0)?;
        }
        // A root with one child is none.
        while self.height > 1 {
            let head = Head::read(pm, self.root)?;
            if head.count > 1 {
                break;
            }
            let old_root = self.root;
            self.root = head.child(pm, old_root, 0)?;
            self.height -= 1;
            self.publish(pm)?;
            pool.free(pm, frames, old_root)?;
        }
        Ok(Some(old))
    }
}

/// What to look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// The key itself.
    Exact,
    /// The lowest key above it, or it itself.
    Above { inclusive: bool },
    /// The highest key below it, or it itself.
    Below { inclusive: bool },
    /// The highest key of all.
    Last,
}

/// What was found, and what must not have changed for it to be true.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    pub(super) loc: u64,
    /// The leaf, which of its entries, and the version that it must keep.
    node: u64,
    index: usize,
    version: u64,
}

impl Found {
    /// Whether the entry is still the tree's: what was read of its record before
    /// this call was then a record's.
    pub(super) fn still<P: Pmem>(&self, pm: &P) -> Result<bool> {
        if broken!("reader_entry") {
            return Ok(true);
        }
        pm.load_fence();
        Ok(pm.load(self.node)? == self.version)
    }

    /// The entry so many places further on in the leaf, if that has so many. What it
    /// says is true only if it is [`still`](Self::still) there afterwards.
    pub(super) fn onward<P: Pmem>(&self, pm: &P, forward: bool, by: usize) -> Option<Found> {
        let index = if forward {
            self.index.checked_add(by)
        } else {
            self.index.checked_sub(by)
        }?;
        let head = Head::read(pm, self.node).ok()?;
        if head.level != 0 || index >= head.count {
            return None;
        }
        let loc = head.loc(pm, self.node, index).ok()?;
        Some(Found {
            loc,
            index,
            ..*self
        })
    }
}

/// A node and the version that it must keep.
#[derive(Clone, Copy)]
struct Seen {
    node: u64,
    version: u64,
}

impl Seen {
    /// Steps to a child: reads its version, then makes sure that it was still a
    /// child.
    fn child<P: Pmem>(&self, pm: &P, node: u64) -> Result<Option<Seen>> {
        if !self.holds(pm)? {
            return Ok(None);
        }
        let version = pm.load(node)?;
        Ok((version & 1 == 0 && self.holds(pm)?).then_some(Seen { node, version }))
    }

    fn holds<P: Pmem>(&self, pm: &P) -> Result<bool> {
        if broken!("reader_version") {
            return Ok(true);
        }
        pm.load_fence();
        Ok(pm.load(self.node)? == self.version)
    }
}

/// One attempt of [`find`]; `None` if something changed meanwhile.
fn attempt<P: Pmem>(
    pm: &P,
    kind: Kind,
    at: u64,
    key: &KeySrc<'_>,
    goal: Goal,
) -> Result<Option<Option<Found>>> {
    let word = pm.load(at)?;
    let height = ((word >> 34) & 63) as usize;
    if height == 0 {
        return Ok(Some(None));
    }
    if height > MAX_HEIGHT {
        return Err(Error::Damaged);
    }
    let node = (word & ((1 << 34) - 1)) << 10;
    let version = pm.load(node)?;
    if version & 1 != 0 || pm.load(at)? != word {
        return Ok(None);
    }
    let mut seen = Seen { node, version };
    let mut level = height - 1;
    let forward = matches!(goal, Goal::Above { .. });
    // The subtree beside the way taken, if any: in a node, a child of it, its level.
    let mut beside: Option<(Seen, u64, usize)> = None;
    let mut turned = false;
    loop {
        let node = seen.node;
        let head = Head::read(pm, node)?;
        if usize::from(head.level) != level {
            return Ok(None);
        }
        let (place_at, exact) = if goal == Goal::Last {
            (head.count, false)
        } else {
            let place = search(pm, kind, node, &head, key)?;
            (place.at, place.exact)
        };
        if level > 0 {
            level -= 1;
            let index = if exact {
                place_at
            } else {
                place_at.saturating_sub(1)
            };
            let other = if forward {
                Some(index + 1).filter(|other| *other < head.count)
            } else {
                index.checked_sub(1)
            };
            if let (Some(other), false) = (other, turned) {
                beside = Some((seen, head.child(pm, node, other)?, level));
            }
            let child = head.child(pm, node, index)?;
            // A search waits for one line after the other, as each tells which is the next; all
            // of a node's together take hardly longer than one.
            pm.prefetch(child, NODE_SIZE);
            match seen.child(pm, child)? {
                Some(child) => seen = child,
                None => return Ok(None),
            }
            continue;
        }
        let index = match goal {
            Goal::Exact => exact.then_some(place_at),
            Goal::Above { inclusive } => Some(place_at + usize::from(exact && !inclusive)),
            Goal::Below { inclusive } => {
                (place_at + usize::from(exact && inclusive)).checked_sub(1)
            }
            Goal::Last => head.count.checked_sub(1),
        };
        let found = match index {
            Some(index) if index < head.count => Some(Found {
                loc: head.loc(pm, node, index)?,
                node,
                index,
                version: seen.version,
            }),
            _ => None,
        };
        if !seen.holds(pm)? {
            return Ok(None);
        }
        match beside {
            Some((parent, child, below)) if found.is_none() && goal != Goal::Exact => {
                // The nearest one is there, but need not be at its end: one that is being
                // split still has what the next one has, too, and one whose first entry
                // goes has it still when the separator is another one.
                if turned {
                    return Ok(None);
                }
                turned = true;
                level = below;
                match parent.child(pm, child)? {
                    Some(child) => seen = child,
                    None => return Ok(None),
                }
            }
            _ => return Ok(Some(found)),
        }
    }
}

/// Finds a key, or the next one to it, in the tree whose root word is at `at`.
///
/// Needs no lock. Begins anew when the writer was in the way, [`Error::Busy`]
/// if that happens too often.
pub(super) fn find<P: Pmem>(
    pm: &P,
    kind: Kind,
    at: u64,
    key: &KeySrc<'_>,
    goal: Goal,
) -> Result<Option<Found>> {
    for _ in 0..TRIES {
        // What makes no sense was being rewritten.
        match attempt(pm, kind, at, key, goal) {
            Ok(Some(found)) => return Ok(found),
            Err(Error::Io) => return Err(Error::Io),
            Ok(None) | Err(_) => core::hint::spin_loop(),
        }
    }
    Err(Error::Busy)
}
