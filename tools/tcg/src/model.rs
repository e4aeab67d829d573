// SPDX-License-Identifier: GPL-2.0-only
//! What is durable: the shadow, and what is on its way to it.
//!
//! The model is stricter than hardware on purpose (no eviction ever makes a line
//! durable under [`Lose::All`], and only fences drain), so that a flush or a fence
//! that is missing in the code under test shows.

use std::collections::HashMap;

/// Bytes in a cache line.
pub const LINE: usize = 64;

/// The contents of one cache line.
pub type Line = [u8; LINE];

/// Every byte of a line, as a mask with one bit for each.
const WHOLE: u64 = u64::MAX;

/// Whose fence a version waits for that nobody wrote back: an eviction.
const NOBODY: usize = usize::MAX;

/// Versions of a line that are kept for evictions; the oldest are forgotten.
const EVICTIONS: usize = 12;

/// What the guest's loads see now, which is what its stores left.
pub trait Memory {
    /// The present contents of line `index`.
    fn line(&self, index: usize) -> Line;
}

/// What happens at the cut to stores that were not made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lose {
    /// Every one is lost: only the shadow remains.
    All,
    /// None is lost, as if every line had been evicted just in time.
    None,
    /// Each line is lost, kept or torn by a choice drawn from the seed.
    Random,
}

/// What a flush found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// The line differs from what is durable, or something is pending for it.
    Dirty,
    /// The same vCPU flushed the same contents since its last fence.
    Repeated,
    /// The line equals the shadow and nothing is pending: wasted work.
    Clean,
}

/// A line, or some bytes of it, that waits for the fence of one vCPU.
#[derive(Clone, Debug)]
struct Pending {
    cpu: usize,
    mask: u64,
    data: Line,
}

/// The shadow of a region and the snapshots that wait for fences.
///
/// A line's snapshots are kept in the order in which they were taken, over all
/// vCPUs, because memory never goes back: a fence that commits a snapshot also
/// outdates what older snapshots hold of the same bytes.
#[derive(Debug)]
pub struct Model<M> {
    now: M,
    durable: Vec<u8>,
    pending: HashMap<usize, Vec<Pending>>,
    queued: Vec<Vec<usize>>,
}

impl<M: Memory> Model<M> {
    /// A model in which `durable` is what a cut would leave, for `cpus` vCPUs.
    ///
    /// The length of `durable` must be a multiple of [`LINE`].
    pub fn new(now: M, durable: Vec<u8>, cpus: usize) -> Self {
        assert_eq!(durable.len() % LINE, 0, "the region ends inside a line");
        Self {
            now,
            durable,
            pending: HashMap::new(),
            queued: vec![Vec::new(); cpus],
        }
    }

    /// The number of lines in the region.
    pub fn lines(&self) -> usize {
        self.durable.len() / LINE
    }

    /// The number of lines for which something waits for a fence.
    pub fn pending_lines(&self) -> usize {
        self.pending.len()
    }

    /// What the guest sees of `line`.
    pub fn now(&self, line: usize) -> Line {
        self.now.line(line)
    }

    /// The memory that the model shadows.
    pub fn memory(&self) -> &M {
        &self.now
    }

    /// What is durable of `line`.
    pub fn durable(&self, line: usize) -> Line {
        let at = line * LINE;
        let mut out = [0; LINE];
        out.copy_from_slice(&self.durable[at..at + LINE]);
        out
    }

    /// Whether something waits for a fence of `cpu`.
    pub fn waits(&self, cpu: usize) -> bool {
        self.queued.get(cpu).is_some_and(|q| !q.is_empty())
    }

    /// A store is about to change `line`: what is there now may have been evicted in time.
    /// Who sees each store says so before it, and a cut then draws from such versions, too;
    /// without it, the model knows of those that were flushed, and of the present one.
    pub fn changing(&mut self, line: usize) {
        let data = self.now.line(line);
        if data == self.durable(line) && !self.pending.contains_key(&line) {
            return;
        }
        let waiting = self.pending.entry(line).or_default();
        match waiting.last() {
            Some(last) if last.mask == WHOLE && last.data == data => return,
            _ => {}
        }
        let mine = |p: &Pending| p.cpu == NOBODY;
        if waiting.iter().filter(|p| mine(p)).count() >= EVICTIONS {
            let oldest = waiting.iter().position(mine);
            waiting.remove(oldest.expect("they were counted"));
        }
        waiting.push(Pending {
            cpu: NOBODY,
            mask: WHOLE,
            data,
        });
    }

    /// `clwb` or `clflushopt`: snapshots the line; durable at `cpu`'s next fence.
    pub fn flush(&mut self, cpu: usize, line: usize) -> Flush {
        let data = self.now.line(line);
        match self.pending.get(&line).and_then(|p| p.last()) {
            None if data == self.durable(line) => return Flush::Clean,
            Some(last) if last.cpu == cpu && last.mask == WHOLE && last.data == data => {
                return Flush::Repeated;
            }
            _ => {}
        }
        self.push(cpu, line, WHOLE, data);
        Flush::Dirty
    }

    /// `clflush`: durable at once, for it is ordered with every other store.
    ///
    /// It drains nothing else: what other lines wait for stays waiting.
    pub fn flush_ordered(&mut self, line: usize) -> Flush {
        let data = self.now.line(line);
        let waited = self.pending.remove(&line).is_some();
        if !waited && data == self.durable(line) {
            return Flush::Clean;
        }
        self.commit(line, WHOLE, &data);
        Flush::Dirty
    }

    /// A non-temporal store that has just happened; its bytes alone become
    /// durable at `cpu`'s next fence, without a flush.
    ///
    /// The rest of the line does not: whether a processor writes it back on the
    /// way differs between processors.
    pub fn store_nt(&mut self, cpu: usize, offset: usize, len: usize) {
        let end = (offset + len).min(self.durable.len());
        let mut at = offset;
        while at < end {
            let line = at / LINE;
            let stop = end.min((line + 1) * LINE);
            let mask = mask(at % LINE, stop - at);
            let data = self.now.line(line);
            match self.pending.get_mut(&line).and_then(|p| p.last_mut()) {
                // The usual case, a line filled word by word, stays one snapshot.
                Some(last) if last.cpu == cpu && last.mask & mask == 0 => {
                    overlay(&mut last.data, mask, &data);
                    last.mask |= mask;
                }
                _ => self.push(cpu, line, mask, data),
            }
            at = stop;
        }
    }

    /// `sfence` or `mfence`: commits what waits for `cpu`; says how many lines.
    pub fn fence(&mut self, cpu: usize) -> usize {
        let Some(queue) = self.queued.get_mut(cpu) else {
            return 0;
        };
        let mut committed = 0;
        for line in std::mem::take(queue) {
            let Some(mut waiting) = self.pending.remove(&line) else {
                continue; // a clflush was quicker
            };
            // Newest first, so that each byte is written once, with its newest
            // committed contents, and older snapshots lose their claim to it.
            let mut taken = 0;
            let mut mine = false;
            for p in waiting.iter_mut().rev() {
                p.mask &= !taken;
                if p.cpu == cpu {
                    taken |= p.mask;
                    mine = true;
                    self.commit(line, p.mask, &p.data);
                }
            }
            committed += usize::from(mine);
            waiting.retain(|p| p.cpu != cpu && p.mask != 0);
            if !waiting.is_empty() {
                self.pending.insert(line, waiting);
            }
        }
        committed
    }

    /// Whether a cut could leave something other than the present contents.
    pub fn at_risk(&self, line: usize) -> bool {
        self.pending.contains_key(&line) || self.now(line) != self.durable(line)
    }

    /// What a cut leaves of `line`; for a given history it depends on `seed` and
    /// on the line's number only.
    pub fn after_cut(&self, line: usize, lose: Lose, seed: u64) -> Line {
        match lose {
            Lose::All => self.durable(line),
            Lose::None => self.now(line),
            Lose::Random => self.drawn(line, seed),
        }
    }

    /// Every version that a cut may leave of `line`, oldest first: what is durable, what it
    /// was since, what it is. A torn line has words of several.
    pub fn versions(&self, line: usize) -> Vec<Line> {
        let mut versions = vec![self.durable(line)];
        for p in self.pending.get(&line).into_iter().flatten() {
            let mut next = versions[versions.len() - 1];
            overlay(&mut next, p.mask, &p.data);
            versions.push(next);
        }
        versions.push(self.now(line));
        versions
    }

    /// Draws one of the states in which a cut may leave `line`.
    fn drawn(&self, line: usize, seed: u64) -> Line {
        let versions = self.versions(line);
        let mut rng = Rng::new(seed, line as u64);
        if rng.below(2) == 0 {
            return versions[0];
        }
        let newest = 1 + rng.below(versions.len() - 1);
        let mut out = versions[newest];
        if rng.below(2) == 0 {
            for word in 0..LINE / 8 {
                let from = &versions[rng.below(newest + 1)];
                out[word * 8..][..8].copy_from_slice(&from[word * 8..][..8]);
            }
        }
        out
    }

    fn push(&mut self, cpu: usize, line: usize, mask: u64, data: Line) {
        let waiting = self.pending.entry(line).or_default();
        // (Never of NOBODY, who has no fence.)
        if waiting.iter().all(|p| p.cpu != cpu) {
            if self.queued.len() <= cpu {
                self.queued.resize_with(cpu + 1, Vec::new);
            }
            self.queued[cpu].push(line);
        }
        waiting.push(Pending { cpu, mask, data });
    }

    fn commit(&mut self, line: usize, mask: u64, data: &Line) {
        let mut shadow = self.durable(line);
        overlay(&mut shadow, mask, data);
        self.durable[line * LINE..][..LINE].copy_from_slice(&shadow);
    }
}

/// The mask of `len` bytes from `first` on, all in one line.
fn mask(first: usize, len: usize) -> u64 {
    debug_assert!(len > 0 && first + len <= LINE);
    (WHOLE >> (LINE - len)) << first
}

/// Copies the bytes of `from` that `mask` names to `to`.
fn overlay(to: &mut Line, mask: u64, from: &Line) {
    if mask == WHOLE {
        *to = *from;
        return;
    }
    for (i, (t, f)) in to.iter_mut().zip(from).enumerate() {
        if (mask >> i) & 1 == 1 {
            *t = *f;
        }
    }
}

/// SplitMix64: small, and its sequence is fixed by its definition, so that a seed
/// names the same cut on every machine and with every toolchain.
struct Rng(u64);

impl Rng {
    fn new(seed: u64, stream: u64) -> Self {
        let mut rng = Self(seed);
        rng.0 = rng.next() ^ stream;
        rng.0 = rng.next();
        rng
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`; the bias of the remainder is of no account here.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    /// Guest memory that a test stores to while the model looks at it.
    #[derive(Clone, Debug)]
    struct Ram(Rc<RefCell<Vec<u8>>>);

    impl Ram {
        fn new(lines: usize) -> Self {
            Self(Rc::new(RefCell::new(vec![0; lines * LINE])))
        }
        fn store(&self, at: usize, byte: u8, len: usize) {
            self.0.borrow_mut()[at..at + len].fill(byte);
        }
    }

    impl Memory for Ram {
        fn line(&self, index: usize) -> Line {
            self.0.borrow()[index * LINE..][..LINE].try_into().unwrap()
        }
    }

    fn model(lines: usize) -> (Ram, Model<Ram>) {
        let ram = Ram::new(lines);
        (ram.clone(), Model::new(ram, vec![0; lines * LINE], 2))
    }

    #[test]
    fn a_store_alone_is_lost() {
        let (ram, m) = model(2);
        ram.store(0, 1, 64);
        assert_eq!(m.after_cut(0, Lose::All, 0), [0; 64]);
        assert_eq!(m.after_cut(0, Lose::None, 0), [1; 64]);
        assert!(m.at_risk(0) && !m.at_risk(1));
    }

    #[test]
    fn flush_and_fence_keep_the_contents_at_the_flush() {
        let (ram, mut m) = model(1);
        ram.store(0, 1, 64);
        assert_eq!(m.flush(0, 0), Flush::Dirty);
        assert_eq!(m.durable(0), [0; 64]);
        ram.store(0, 2, 8);
        assert_eq!(m.fence(0), 1);
        assert_eq!(m.durable(0), [1; 64]);
        assert!(m.at_risk(0));
        assert_eq!(m.fence(0), 0);
    }

    #[test]
    fn a_fence_of_another_vcpu_does_nothing() {
        let (ram, mut m) = model(1);
        ram.store(0, 1, 64);
        m.flush(0, 0);
        assert!(m.waits(0) && !m.waits(1));
        assert_eq!(m.fence(1), 0);
        assert_eq!(m.durable(0), [0; 64]);
        assert_eq!(m.pending_lines(), 1);
        assert_eq!(m.fence(0), 1);
        assert_eq!(m.pending_lines(), 0);
    }

    #[test]
    fn a_late_fence_does_not_bring_back_older_contents() {
        let (ram, mut m) = model(1);
        ram.store(0, 1, 64);
        m.flush(0, 0);
        ram.store(0, 2, 64);
        m.flush(1, 0);
        m.fence(1);
        assert_eq!(m.durable(0), [2; 64]);
        m.fence(0);
        assert_eq!(m.durable(0), [2; 64]);
    }

    #[test]
    fn a_newer_part_leaves_the_rest_of_an_older_snapshot_to_its_fence() {
        let (ram, mut m) = model(1);
        ram.store(0, 1, 64);
        m.flush(0, 0);
        ram.store(8, 2, 8);
        m.store_nt(1, 8, 8);
        m.fence(1);
        m.fence(0);
        let mut want = [1; 64];
        want[8..16].fill(2);
        assert_eq!(m.durable(0), want);
    }

    #[test]
    fn clean_and_repeated_flushes_are_told_apart() {
        let (ram, mut m) = model(1);
        assert_eq!(m.flush(0, 0), Flush::Clean);
        ram.store(0, 1, 1);
        assert_eq!(m.flush(0, 0), Flush::Dirty);
        assert_eq!(m.flush(0, 0), Flush::Repeated);
        // Another vCPU's own fence must cover the line as well.
        assert_eq!(m.flush(1, 0), Flush::Dirty);
        m.fence(1);
        assert_eq!(m.flush(1, 0), Flush::Clean);
    }

    #[test]
    fn clflush_needs_no_fence_and_outdates_what_waits() {
        let (ram, mut m) = model(2);
        ram.store(0, 1, 128);
        m.flush(0, 0);
        m.flush(0, 1);
        ram.store(0, 2, 64);
        assert_eq!(m.flush_ordered(0), Flush::Dirty);
        assert_eq!(m.durable(0), [2; 64]);
        assert_eq!(m.durable(1), [0; 64]);
        assert_eq!(m.fence(0), 1);
        assert_eq!(m.durable(0), [2; 64]);
        assert_eq!(m.flush_ordered(0), Flush::Clean);
    }

    #[test]
    fn a_non_temporal_store_carries_its_own_bytes_only() {
        let (ram, mut m) = model(2);
        ram.store(0, 1, 128);
        ram.store(60, 2, 8);
        m.store_nt(0, 60, 8);
        assert_eq!(m.durable(0), [0; 64]);
        assert_eq!(m.fence(0), 2);
        assert_eq!(m.durable(0)[59..], [0, 2, 2, 2, 2]);
        assert_eq!(m.durable(1)[..5], [2, 2, 2, 2, 0]);
    }

    #[test]
    fn words_of_a_line_stored_non_temporally_are_one_snapshot() {
        let (ram, mut m) = model(1);
        for word in 0..8 {
            ram.store(word * 8, 3, 8);
            m.store_nt(0, word * 8, 8);
        }
        assert_eq!(m.pending[&0].len(), 1);
        m.fence(0);
        assert_eq!(m.durable(0), [3; 64]);
    }

    #[test]
    fn a_non_temporal_store_over_the_end_is_cut_off() {
        let (ram, mut m) = model(1);
        ram.store(56, 3, 8);
        m.store_nt(0, 56, 16);
        assert_eq!(m.fence(0), 1);
    }

    #[test]
    fn a_version_between_two_stores_may_have_been_evicted() {
        let (ram, mut m) = model(1);
        for byte in 1..4 {
            m.changing(0);
            ram.store(0, byte, 64);
        }
        let bytes = |m: &Model<Ram>| m.versions(0).iter().map(|v| v[0]).collect::<Vec<_>>();
        assert_eq!(bytes(&m), [0, 1, 2, 3]);
        // What was flushed outdates those before it, once it is fenced, and not what came after.
        m.flush(0, 0);
        m.changing(0);
        ram.store(0, 4, 64);
        m.changing(0);
        ram.store(0, 5, 64);
        m.fence(0);
        assert_eq!(bytes(&m), [3, 4, 5]);
        // A version that is back is there, but the one between may be what is durable.
        m.flush(0, 0);
        m.fence(0);
        assert!(!m.at_risk(0));
        m.changing(0);
        ram.store(0, 6, 64);
        m.changing(0);
        ram.store(0, 5, 64);
        assert!(m.at_risk(0));
    }

    #[test]
    fn versions_for_evictions_are_bounded() {
        let (ram, mut m) = model(1);
        for byte in 1..100 {
            m.changing(0);
            ram.store(0, byte, 64);
        }
        let all = m.versions(0);
        assert_eq!(all.len(), EVICTIONS + 2);
        assert_eq!(
            (all[0][0], all[EVICTIONS][0], all[EVICTIONS + 1][0]),
            (0, 98, 99)
        );
    }

    #[test]
    fn seeds_differ_and_each_outcome_occurs() {
        let (ram, m) = model(1);
        ram.store(0, 1, 64);
        let (mut lost, mut kept, mut torn) = (0, 0, 0);
        for seed in 0..1000 {
            let line = m.after_cut(0, Lose::Random, seed);
            assert_eq!(line, m.after_cut(0, Lose::Random, seed));
            match line.iter().map(|&b| u32::from(b)).sum() {
                0 => lost += 1,
                64 => kept += 1,
                _ => torn += 1,
            }
        }
        assert!(
            lost > 400 && kept > 200 && torn > 200,
            "{lost} {kept} {torn}"
        );
    }

    #[test]
    fn the_generator_is_splitmix64() {
        // First outputs for seed 1234567, from the reference implementation.
        let mut rng = Rng(1_234_567);
        assert_eq!(rng.next(), 6_457_827_717_110_365_317);
        assert_eq!(rng.next(), 3_203_168_211_198_807_973);
    }

    /// One guest event.
    #[derive(Clone, Debug)]
    enum Event {
        Store(usize, u8, usize),
        StoreNt(usize, usize, u8, usize),
        Flush(usize, usize),
        FlushOrdered(usize),
        Fence(usize),
    }

    const LINES: usize = 4;

    fn event() -> impl Strategy<Value = Event> {
        let at = 0..LINES * LINE - 16;
        let cpu = 0..2usize;
        prop_oneof![
            (at.clone(), 1u8.., 1..17usize).prop_map(|(a, b, n)| Event::Store(a, b, n)),
            (cpu.clone(), at, 1u8.., 1..17usize)
                .prop_map(|(c, a, b, n)| Event::StoreNt(c, a, b, n)),
            (cpu.clone(), 0..LINES).prop_map(|(c, l)| Event::Flush(c, l)),
            (0..LINES).prop_map(Event::FlushOrdered),
            cpu.prop_map(Event::Fence),
        ]
    }

    /// The same rules told byte by byte: a byte's history is a list of versions
    /// with, for each, the vCPUs whose fence makes it durable.
    struct Bytes {
        now: Vec<u8>,
        durable: Vec<(usize, u8)>,
        waiting: Vec<Vec<(usize, usize, u8)>>,
    }

    impl Bytes {
        fn new() -> Self {
            let n = LINES * LINE;
            Self {
                now: vec![0; n],
                durable: vec![(0, 0); n],
                waiting: vec![Vec::new(); n],
            }
        }
        fn apply(&mut self, time: usize, e: &Event) {
            match *e {
                Event::Store(a, b, n) => self.now[a..a + n].fill(b),
                Event::StoreNt(c, a, b, n) => {
                    self.now[a..a + n].fill(b);
                    for w in &mut self.waiting[a..a + n] {
                        w.push((time, c, b));
                    }
                }
                Event::Flush(c, l) => {
                    for i in l * LINE..(l + 1) * LINE {
                        self.waiting[i].push((time, c, self.now[i]));
                    }
                }
                Event::FlushOrdered(l) => {
                    for i in l * LINE..(l + 1) * LINE {
                        self.durable[i] = (time, self.now[i]);
                    }
                }
                Event::Fence(c) => {
                    for (d, w) in self.durable.iter_mut().zip(&mut self.waiting) {
                        for &(t, _, v) in w.iter().filter(|x| x.1 == c) {
                            if t >= d.0 {
                                *d = (t, v);
                            }
                        }
                        w.retain(|x| x.1 != c);
                    }
                }
            }
        }
    }

    /// If stores are seen, says that one comes.
    fn tell(m: &mut Model<Ram>, seen: bool, at: usize, len: usize) {
        for line in (at / LINE..=(at + len - 1) / LINE).filter(|_| seen) {
            m.changing(line);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn agrees_with_the_rules_told_byte_by_byte(
            events in prop::collection::vec(event(), 0..60), seen: bool,
        ) {
            let (ram, mut m) = model(LINES);
            let mut want = Bytes::new();
            for (i, e) in events.iter().enumerate() {
                want.apply(i + 1, e);
                match *e {
                    Event::Store(a, b, n) => {
                        tell(&mut m, seen, a, n);
                        ram.store(a, b, n);
                    }
                    Event::StoreNt(c, a, b, n) => {
                        tell(&mut m, seen, a, n);
                        ram.store(a, b, n);
                        m.store_nt(c, a, n);
                    }
                    Event::Flush(c, l) => { m.flush(c, l); }
                    Event::FlushOrdered(l) => { m.flush_ordered(l); }
                    Event::Fence(c) => { m.fence(c); }
                }
                for l in 0..LINES {
                    let bytes = &want.durable[l * LINE..][..LINE];
                    let line: Vec<u8> = bytes.iter().map(|d| d.1).collect();
                    prop_assert_eq!(&m.durable(l)[..], &line[..]);
                }
            }
        }

        #[test]
        fn a_drawn_word_is_one_that_the_word_has_held(
            events in prop::collection::vec(event(), 0..40), seed: u64, seen: bool,
        ) {
            let (ram, mut m) = model(LINES);
            let mut held: Vec<Vec<[u8; 8]>> = vec![vec![[0; 8]]; LINES * LINE / 8];
            for e in &events {
                match *e {
                    // Whole words only, so that every version of a word is seen.
                    Event::Store(a, b, _) => {
                        tell(&mut m, seen, a / 8 * 8, 8);
                        ram.store(a / 8 * 8, b, 8);
                    }
                    Event::StoreNt(c, a, b, _) => {
                        tell(&mut m, seen, a / 8 * 8, 8);
                        ram.store(a / 8 * 8, b, 8);
                        m.store_nt(c, a / 8 * 8, 8);
                    }
                    Event::Flush(c, l) => { m.flush(c, l); }
                    Event::FlushOrdered(l) => { m.flush_ordered(l); }
                    Event::Fence(c) => { m.fence(c); }
                }
                for (i, h) in held.iter_mut().enumerate() {
                    h.push(ram.0.borrow()[i * 8..][..8].try_into().unwrap());
                }
            }
            for l in 0..LINES {
                let out = m.after_cut(l, Lose::Random, seed);
                for (w, word) in out.chunks(8).enumerate() {
                    prop_assert!(held[l * 8 + w].iter().any(|h| h == word));
                }
                if !m.at_risk(l) {
                    prop_assert_eq!(out, m.now(l));
                }
            }
        }
    }
}
