// SPDX-License-Identifier: GPL-2.0-only
//! A model of one cache: so many ways, least recently used first out, written back, a line
//! fetched when it is stored to. There is no pipeline, no prefetcher and no other level.

/// Bytes of a line.
const LINE: u64 = 64;
/// No two ranges of an access lie in different pages.
const PAGE: u64 = 4096;

/// A cache, by physical address.
#[derive(Debug)]
pub struct Cache {
    ways: usize,
    sets: u64,
    /// For each set its lines' numbers plus one, the last used one first; 0 is none.
    lines: Vec<u64>,
}

impl Cache {
    /// An empty cache of `size` bytes; `None` if that is not so many ways of whole lines.
    pub fn new(size: u64, ways: usize) -> Option<Self> {
        let way = LINE.checked_mul(u64::try_from(ways).ok()?)?;
        if way == 0 || size == 0 || size % way != 0 {
            return None;
        }
        let lines = usize::try_from(size / LINE).ok()?;
        Some(Self {
            ways,
            sets: size / way,
            lines: vec![0; lines],
        })
    }

    /// Looks at a line, which is there from then on: whether it was not.
    fn misses(&mut self, line: u64) -> bool {
        let at = (line % self.sets) as usize * self.ways;
        let set = &mut self.lines[at..at + self.ways];
        let found = set.iter().position(|&have| have == line + 1);
        let from = found.unwrap_or(self.ways - 1);
        set[..=from].rotate_right(1);
        set[0] = line + 1;
        found.is_none()
    }

    /// Bytes from a physical address are loaded or stored to: how many lines had to be fetched. Of
    /// an access over the end of a page only what is before it counts: where the rest is, is not
    /// known.
    pub fn touch(&mut self, physical: u64, len: u64) -> u64 {
        let end = physical + len.clamp(1, PAGE - physical % PAGE);
        (physical / LINE..end.div_ceil(LINE)).fold(0, |n, line| n + u64::from(self.misses(line)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_touched_is_there() {
        let mut cache = Cache::new(4096, 4).unwrap();
        assert_eq!(cache.touch(100, 8), 1);
        assert_eq!(cache.touch(64, 64), 0);
        assert_eq!(cache.touch(120, 16), 1);
        assert_eq!(cache.touch(128, 1), 0);
        // The end of a page.
        assert_eq!(cache.touch(8190, 16), 1);
        assert_eq!(cache.touch(8192, 8), 1);
    }

    #[test]
    fn the_one_that_was_not_used_for_longest_goes() {
        // 16 sets of 4: lines 0, 16, 32, ... share one.
        let mut cache = Cache::new(4096, 4).unwrap();
        let at = |n: u64| n * 16 * LINE;
        assert_eq!((0..4).map(|n| cache.touch(at(n), 8)).sum::<u64>(), 4);
        assert_eq!(cache.touch(at(0), 8), 0);
        assert_eq!(cache.touch(at(4), 8), 1);
        assert_eq!(cache.touch(at(0), 8), 0);
        assert_eq!(cache.touch(at(1), 8), 1);
        // Another set is another matter.
        assert_eq!(cache.touch(at(0) + LINE, 8), 1);
        assert_eq!(cache.touch(at(3), 8), 0);
    }

    #[test]
    fn all_of_it_fits_and_no_more() {
        let mut cache = Cache::new(64 << 10, 16).unwrap();
        let mut round = |bytes: u64| {
            (0..bytes / LINE)
                .map(|n| cache.touch(n * LINE, 8))
                .sum::<u64>()
        };
        assert_eq!(round(64 << 10), 1024);
        assert_eq!(round(64 << 10), 0);
        // One line too many in each set, in turn: then none is there when it is needed.
        assert_eq!(round(68 << 10), 64);
        assert_eq!(round(68 << 10), 64 + 1024);
    }

    #[test]
    fn sizes_that_make_no_cache() {
        assert!(Cache::new(0, 4).is_none());
        assert!(Cache::new(4096, 0).is_none());
        assert!(Cache::new(4000, 4).is_none());
    }
}
