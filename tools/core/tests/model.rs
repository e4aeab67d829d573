// SPDX-License-Identifier: GPL-2.0

//! The readers' protocol under a model checker: many schedules of one writer and two
//! readers, on memory that is as weak as the core's contract with its hosts lets it be.
//!
//! Shuttle chooses which thread makes the next access, and here is chosen what it sees:
//! any value that a C11 memory would let it see, where loads acquire, stores release,
//! bytes are copied word by word with relaxed accesses, `fence` is one of each kind and
//! `load_fence` an acquire fence. As only one thread writes, what a reader must have
//! seen is a prefix of the writes in their order, and for each word what it saw last.
//!
//! `PMSKB_SCHEDULES=N` asks for more than the usual number of them.

mod common;
use common::params;
use pmskb_core::host::{HostFrames, Memory};
use pmskb_core::*;
use shuttle::rand::{thread_rng, Rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{thread, Config, MaxSteps, Runner};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

const LEN: u64 = 8 << 20;
const READERS: usize = 2;
/// So many keys that follow each other are read and written in a schedule.
const NEAR: u64 = 6;
/// Recovery puts so many entries into a leaf, which has room for so many more. Keys of
/// these numbers, behind all others, fill it.
const LOADED: u64 = 53;
const MORE: std::ops::Range<u64> = 2000..2007;
/// The first key of the second half of that leaf.
const SPLIT: u64 = 30;
/// In place of the number of a key.
const KEYLESS: u64 = u64::MAX;
/// Keys that are only changed together.
const PAIR: [u64; 2] = [u64::MAX - 2, u64::MAX - 1];
/// The batch areas, and the most words of a batch here.
const AREAS: [u64; 2] = [8192, 28672];
const BATCH: u64 = 8;

/// What was looked at, over all schedules: loads that saw an old value, records that
/// were read, those of them that were gone when looked at again, and times that a
/// reader gave up; both of a pair that were read, and records that were moved.
static STALE: AtomicU64 = AtomicU64::new(0);
static READS: AtomicU64 = AtomicU64::new(0);
static GONE: AtomicU64 = AtomicU64::new(0);
static BUSY: AtomicU64 = AtomicU64::new(0);
static PAIRS: AtomicU64 = AtomicU64::new(0);
static MOVED: AtomicU64 = AtomicU64::new(0);

/// A value that a word had.
#[derive(Clone, Copy)]
struct Write {
    /// Which of all writes it was, from 1 on; 0 is what was there before.
    number: u64,
    value: u64,
    /// Whoever acquires it has seen all writes up to this one.
    carries: u64,
}

/// A promise of the hosts' that can be taken away, to see that it is noticed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Without {
    Nothing,
    /// `load_fence` does nothing.
    LoadFence,
    /// `load` does not acquire.
    Acquire,
    /// `store` does not release.
    Release,
}

/// What a reader must have seen.
#[derive(Default)]
struct View {
    /// All writes up to this one.
    all: u64,
    /// What an acquire fence would add, from relaxed loads.
    pending: u64,
    /// For each word the number of the write that it saw.
    words: HashMap<u64, u64>,
    /// Accesses since the writer got on.
    spins: (u64, u64),
}

/// What was acknowledged, and may be known to readers by other ways than the memory.
#[derive(Clone, Default)]
struct Told {
    /// Number of the last write before it was.
    number: u64,
    /// Sequence number of each key's record.
    keys: BTreeMap<u64, u64>,
    /// Those of records without a key.
    log: BTreeSet<u64>,
    /// What was truncated; and what is about to be.
    truncated: u64,
    truncating: u64,
    /// Nothing follows.
    over: bool,
}

struct State {
    /// What was there before the threads began.
    base: Arc<Vec<u64>>,
    words: HashMap<u64, Vec<Write>>,
    views: Vec<View>,
    /// Number of the last write, and of the last before the last `fence`.
    last: u64,
    fenced: u64,
    /// Threads go on: not in the set-up.
    concurrent: bool,
    without: Without,
    told: Told,
}

/// Memory as one thread sees it. Thread 0 writes.
#[derive(Clone)]
struct Weak {
    state: Arc<Mutex<State>>,
    /// What the scheduler sees of an access.
    tick: Arc<shuttle::sync::atomic::AtomicUsize>,
    thread: usize,
}

impl Weak {
    fn new(base: &Base, readers: usize, without: Without) -> Self {
        let mut views = Vec::new();
        views.resize_with(readers + 1, View::default);
        Weak {
            state: Arc::new(Mutex::new(State {
                base: base.words.clone(),
                words: HashMap::new(),
                views,
                last: 0,
                fenced: 0,
                concurrent: false,
                without,
                told: base.told.clone(),
            })),
            tick: Arc::default(),
            thread: 0,
        }
    }

    fn of_thread(&self, thread: usize) -> Self {
        Weak {
            thread,
            ..self.clone()
        }
    }

    fn begin(&self) {
        self.state.lock().unwrap().concurrent = true;
    }

    /// The writer tells what it did.
    fn tell(&self, tell: impl FnOnce(&mut Told)) {
        let mut state = self.state.lock().unwrap();
        state.told.number = state.last;
        tell(&mut state.told);
    }

    /// A reader hears what was done; so it was done before all that it sees from here on.
    fn hear(&self) -> Told {
        let mut state = self.state.lock().unwrap();
        let told = state.told.clone();
        let view = &mut state.views[self.thread];
        view.all = view.all.max(told.number);
        told
    }

    fn over(&self) -> bool {
        self.state.lock().unwrap().told.over
    }

    /// Records without a key up to here may be gone.
    fn truncating(&self) -> u64 {
        self.state.lock().unwrap().told.truncating
    }

    /// Lets another thread go on, if the scheduler wants it; and one that waits for
    /// the writer wants it to.
    fn step(&self) {
        let waits = {
            let mut state = self.state.lock().unwrap();
            if !state.concurrent {
                return;
            }
            let last = state.last;
            let spins = &mut state.views[self.thread].spins;
            *spins = (last, if spins.0 == last { spins.1 + 1 } else { 0 });
            self.thread != 0 && spins.1 % 2000 == 1999
        };
        // The lock is not held here: another thread may run.
        if waits {
            thread::yield_now();
        } else {
            self.tick.load(Ordering::SeqCst);
        }
    }

    fn get(&self, word: u64, acquire: bool) -> Result<u64> {
        if word >= LEN / 8 {
            return Err(Error::Invalid);
        }
        self.step();
        let mut guard = self.state.lock().unwrap();
        let state = &mut *guard;
        let Some(history) = state.words.get(&word) else {
            return Ok(state.base[word as usize]);
        };
        if self.thread == 0 {
            return Ok(history[history.len() - 1].value);
        }
        let view = &mut state.views[self.thread];
        let least = view.all.max(view.words.get(&word).copied().unwrap_or(0));
        // The newest that it must have seen, or anything after that.
        let first = history.partition_point(|write| write.number <= least) - 1;
        let newest = history.len() - 1;
        let at = if first == newest || thread_rng().gen_range(0..3) == 0 {
            newest
        } else {
            thread_rng().gen_range(first..=newest)
        };
        let write = history[at];
        STALE.fetch_add(u64::from(at != newest), Ordering::Relaxed);
        view.words.insert(word, write.number);
        if acquire && state.without != Without::Acquire {
            view.all = view.all.max(write.carries);
        } else {
            view.pending = view.pending.max(write.carries);
        }
        Ok(write.value)
    }

    fn put(&self, word: u64, value: u64, release: bool) -> Result<()> {
        if word >= LEN / 8 {
            return Err(Error::Invalid);
        }
        assert_eq!(self.thread, 0, "a reader writes");
        self.step();
        let mut guard = self.state.lock().unwrap();
        let state = &mut *guard;
        let before = state.base[word as usize];
        let history = state.words.entry(word).or_insert_with(|| {
            vec![Write {
                number: 0,
                value: before,
                carries: 0,
            }]
        });
        if !state.concurrent {
            history[0].value = value;
            return Ok(());
        }
        state.last += 1;
        history.push(Write {
            number: state.last,
            value,
            carries: if release && state.without != Without::Release {
                state.last
            } else {
                state.fenced
            },
        });
        Ok(())
    }

    /// Whether a record with this number was at this place before the last `fence`:
    /// what an acknowledgement stands for, whatever the store says of it.
    fn acknowledged(&self, loc: Locator, seq: u64) -> bool {
        let state = self.state.lock().unwrap();
        let values = |word: u64| {
            let before = [Write {
                number: 0,
                value: state.base[word as usize],
                carries: 0,
            }];
            let history = state.words.get(&word).cloned();
            history.unwrap_or(before.to_vec()).into_iter()
        };
        let numbered = values(loc.0 / 8 + 1).find(|write| write.value == seq);
        // Or a batch that commits it was put in force.
        let batched = AREAS.iter().any(|area| {
            let pair = |n: u64| area / 8 + 8 + n * 2;
            let mut pairs = (0..BATCH).flat_map(|n| values(pair(n)));
            pairs.any(|write| {
                write.value == loc.0
                    && values(area / 8).any(|first| {
                        first.value != 0
                            && first.number > write.number
                            && first.number <= state.fenced
                    })
            })
        });
        numbered.is_some_and(|numbered| {
            if batched && numbered.number <= state.fenced {
                return true;
            }
            values(loc.0 / 8).any(|write| {
                // Type 1, a put, stored with or after the number.
                (write.value >> 32) as u8 == 1
                    && (numbered.number..=state.fenced.max(numbered.number)).contains(&write.number)
                    && write.number <= state.fenced
            })
        })
    }

    /// The parts of words that a range consists of: word, first byte, bytes.
    fn words(off: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize)> {
        let end = off + len as u64;
        (off / 8..end.div_ceil(8)).map(move |word| {
            let from = off.max(word * 8);
            let to = end.min(word * 8 + 8);
            (word, (from % 8) as usize, (to - from) as usize)
        })
    }
}

impl Pmem for Weak {
    fn len(&self) -> u64 {
        LEN
    }

    fn read(&self, off: u64, to: &mut [u8]) -> Result<()> {
        if off.checked_add(to.len() as u64).is_none_or(|end| end > LEN) {
            return Err(Error::Invalid);
        }
        let mut done = 0;
        for (word, from, len) in Self::words(off, to.len()) {
            let value = self.get(word, false)?.to_le_bytes();
            to[done..done + len].copy_from_slice(&value[from..from + len]);
            done += len;
        }
        Ok(())
    }

    fn load(&self, off: u64) -> Result<u64> {
        if off % 8 != 0 {
            return Err(Error::Invalid);
        }
        self.get(off / 8, true)
    }

    fn write(&self, off: u64, from: &[u8]) -> Result<()> {
        if off
            .checked_add(from.len() as u64)
            .is_none_or(|end| end > LEN)
        {
            return Err(Error::Invalid);
        }
        let mut done = 0;
        for (word, at, len) in Self::words(off, from.len()) {
            let mut value = [0; 8];
            if len < 8 {
                value = self.get(word, false)?.to_le_bytes();
            }
            value[at..at + len].copy_from_slice(&from[done..done + len]);
            self.put(word, u64::from_le_bytes(value), false)?;
            done += len;
        }
        Ok(())
    }

    fn store(&self, off: u64, value: u64) -> Result<()> {
        if off % 8 != 0 {
            return Err(Error::Invalid);
        }
        self.put(off / 8, value, true)
    }

    fn flush(&self, _off: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn fence(&self) {
        // It takes its time: what is stored is visible long before it is durable.
        if self.state.lock().unwrap().concurrent {
            for _ in 0..random(200) {
                self.step();
            }
        }
        let mut state = self.state.lock().unwrap();
        state.fenced = state.last;
    }

    fn load_fence(&self) {
        if self.thread != 0 {
            let mut state = self.state.lock().unwrap();
            if state.without != Without::LoadFence {
                let view = &mut state.views[self.thread];
                view.all = view.all.max(view.pending);
            }
        }
    }

    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        crc32c::crc32c_append(crc, data)
    }
}

/// Of three keys the first is left alone, the second is there at all times, the third
/// comes and goes.
fn key(n: u64) -> Vec<u8> {
    format!("prefix/{n:04}").into_bytes()
}

fn always(n: u64) -> bool {
    n % 3 != 2
}

fn mix(n: u64, tag: u64) -> u64 {
    (n ^ tag.rotate_left(17)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Stages a put of a few words that say whose they are and which; its number, unless
/// there is no space.
fn put<P: Pmem>(
    store: &mut Store<P, HostFrames, Vec<u64>>,
    n: u64,
    tag: u64,
    extent: bool,
) -> Option<u64> {
    let frame = store.frames().alloc(None, Need::New)?;
    let key = key(n);
    let mut bytes = Vec::new();
    for word in [n, tag, mix(n, tag)] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(&key);
    store.pm().write(frame.off(), &bytes).unwrap();
    let args = PutArgs {
        key: if n == KEYLESS {
            Key::None
        } else if extent {
            Key::Extent(Extent::new(frame.off() + 24, key.len() as u32))
        } else {
            Key::Bytes(&key)
        },
        extents: &[Extent::new(frame.off(), 24)],
        meta: Meta::default(),
        mode: PutMode::Upsert,
        if_seq: None,
    };
    let done = match store.put(&args) {
        Ok(done) => Some(done.seq),
        Err(Error::NoSpace) => None,
        Err(error) => panic!("{error:?}"),
    };
    store.frames().unhold(frame, 0).unwrap();
    done
}

/// A store with so many keys, to begin with.
struct Base {
    words: Arc<Vec<u64>>,
    keys: u64,
    told: Told,
    /// Sequence number of each key that is left alone.
    untouched: BTreeMap<u64, u64>,
}

impl Base {
    /// In as many record frames as `attaches`, or more. Some frames end with a record that
    /// is dead, some begin with one without a key.
    fn new(keys: u64, attaches: u64) -> Arc<Self> {
        let memory = Memory::new(LEN);
        format(&memory, &params()).unwrap();
        let mut told = Told::default();
        for attach in 0..attaches {
            let mut store = recovered(&memory);
            let first = keys * attach / attaches;
            if attach > 0 {
                told.log.extend(put(&mut store, KEYLESS, attach, false));
                if attach % 2 == 0 && !always(first - 1) {
                    store.delete(&key(first - 1), None).unwrap();
                    told.keys.remove(&(first - 1));
                }
            }
            for n in first..keys * (attach + 1) / attaches {
                told.keys
                    .insert(n, put(&mut store, n, n, n % 4 == 1).unwrap());
            }
            store.commit().unwrap();
        }
        let untouched = told.keys.iter().filter(|(n, _)| *n % 3 == 0);
        let untouched = untouched.map(|(n, seq)| (*n, *seq)).collect();
        let words = (0..LEN / 8).map(|word| memory.load(word * 8).unwrap());
        Arc::new(Base {
            words: Arc::new(words.collect()),
            keys,
            told,
            untouched,
        })
    }
}

fn recovered<P: Pmem>(pm: P) -> Store<P, HostFrames, Vec<u64>> {
    let geo = probe(&pm).unwrap().superblock.geometry;
    let frames = HostFrames::new(&geo).unwrap();
    let work = vec![0; Store::<P, HostFrames, Vec<u64>>::WORK_WORDS];
    Store::recover(pm, frames, work, host::list, RecoverOptions::default())
        .unwrap()
        .0
}

fn random(below: u64) -> u64 {
    thread_rng().gen_range(0..below)
}

/// One schedule: a writer and readers around the same few keys.
fn schedule(base: &Arc<Base>, without: Without) {
    let weak = Weak::new(base, READERS, without);
    let mut store = recovered(weak.of_thread(0));
    let mut near = random(base.keys - NEAR / 2);
    if base.keys == LOADED {
        for n in MORE {
            put(&mut store, n, n, false).unwrap();
        }
        store.commit().unwrap();
        // Where it is going to be split.
        near = SPLIT - random(NEAR);
    }
    // Hardly any room: what is given back is used again at once.
    let all: Vec<_> = std::iter::from_fn(|| store.frames().alloc(None, Need::New)).collect();
    for frame in &all[..3 + random(4) as usize] {
        store.frames().unhold(*frame, 0).unwrap();
    }
    let readers: Vec<_> = (1..=READERS)
        .map(|thread| (Reader::open(weak.of_thread(thread)).unwrap(), base.clone()))
        .collect();
    weak.begin();
    let readers: Vec<_> = readers
        .into_iter()
        .map(|(reader, base)| {
            thread::spawn(move || {
                // As long as there is a writer; but it may be the last to go on.
                let mut left = 30;
                while left > 26 || (left > 0 && !reader.pm().over()) {
                    read(&reader, &base, near);
                    left -= 1;
                }
            })
        })
        .collect();
    for tag in 1..=5 {
        change(&weak, &mut store, base, near, tag);
    }
    MOVED.fetch_add(store.stats().moved_records, Ordering::Relaxed);
    weak.tell(|told| told.over = true);
    for reader in readers {
        reader.join().unwrap();
    }
}

type Written = Store<Weak, HostFrames, Vec<u64>>;

/// What the writer does at a time; it says what is done.
fn change(weak: &Weak, store: &mut Written, base: &Base, near: u64, tag: u64) {
    let mut done: Vec<(u64, Option<u64>)> = Vec::new();
    for _ in 0..1 + random(3) {
        let n = near + random(NEAR);
        let tag = (tag << 32) | random(1 << 20);
        match random(4) {
            3 => done.extend(put(store, KEYLESS, tag, false).map(|seq| (KEYLESS, Some(seq)))),
            _ if n % 3 == 0 => (),
            0 if !always(n) => {
                if store.delete(&key(n), None).is_ok() {
                    done.push((n, None));
                }
            }
            1 if n > base.keys && always(n) => (),
            _ => done.extend(put(store, n, tag, random(2) == 0).map(|seq| (n, Some(seq)))),
        }
    }
    store.commit().unwrap();
    weak.tell(|told| {
        for (n, seq) in done {
            match (n, seq) {
                (KEYLESS, Some(seq)) => drop(told.log.insert(seq)),
                (_, Some(seq)) => drop(told.keys.insert(n, seq)),
                (_, None) => drop(told.keys.remove(&n)),
            }
        }
    });
    match random(6) {
        0 | 1 => store.sync_pending().unwrap(),
        2 => {
            let mut scratch = [Extent::new(0, 0); 4];
            match store.compact(random(2) * random(base.keys), &mut scratch) {
                Ok(_) | Err(Error::NoSpace) => (),
                Err(error) => panic!("{error:?}"),
            }
            if random(2) == 0 {
                store.sync_pending().unwrap();
            }
        }
        3 => {
            let seq = random(store.stats().durable_seq) + 1;
            weak.tell(|told| told.truncating = told.truncating.max(seq));
            store.truncate(seq).unwrap();
            weak.tell(|told| told.truncated = told.truncated.max(seq));
            if random(2) == 0 {
                store.drain(1 + random(40) as u32).unwrap();
            }
        }
        _ => pair(store, (tag << 32) | random(1 << 20)),
    }
}

/// Puts or deletes both of the pair, or neither.
fn pair(store: &mut Written, tag: u64) {
    store.begin_atomic().unwrap();
    if random(4) == 0 {
        for n in PAIR {
            let _ = store.delete(&key(n), None);
        }
    } else {
        let both = PAIR.map(|n| put(store, n, tag, random(2) == 0));
        if both.contains(&None) {
            return store.abort();
        }
    }
    store.commit().unwrap();
}

/// One call of a reader, and whether what it says can be.
fn read(reader: &Reader<Weak>, base: &Base, near: u64) {
    let n = near + random(NEAR);
    let there = |n: &u64| always(*n) && *n < base.keys;
    let told = match random(3) {
        0 => base.told.clone(),
        _ => reader.pm().hear(),
    };
    match random(8) {
        // One that is moved meanwhile is found again.
        0 | 1 => loop {
            let Some(record) = tried(reader.get(&key(n))) else {
                return;
            };
            assert!(record.is_some() || !there(&n), "key {n} is there");
            let Some(record) = record else {
                return;
            };
            if let Some(seq) = told.keys.get(&n) {
                assert!(record.seq >= *seq, "key {n} has a record of before");
            }
            if let Some(found) = look(reader, base, &record) {
                return assert_eq!(found, n);
            }
            if !base.untouched.contains_key(&n) {
                return;
            }
        },
        2 | 3 => walk(reader, base, near, &told),
        4 | 5 => {
            let both = reader.snapshot(|reader| Ok([one(reader, base, 0)?, one(reader, base, 1)?]));
            let Some([Some(one), Some(other)]) = tried(both) else {
                return;
            };
            PAIRS.fetch_add(u64::from(one.is_some()), Ordering::Relaxed);
            assert_eq!(one, other, "half of a batch");
        }
        _ => scan(reader, base, &told),
    }
}

/// Goes over a few keys, up or down.
fn walk(reader: &Reader<Weak>, base: &Base, near: u64, told: &Told) {
    let up = random(2) == 0;
    let direction = if up {
        Direction::Forward
    } else {
        Direction::Backward
    };
    let there = |n: &u64| always(*n) && *n < base.keys;
    let mut at = match random(2) {
        0 if base.keys == LOADED => SPLIT,
        _ => near + random(NEAR),
    };
    let mut cursor = reader.cursor(Some(&key(at)), false, direction);
    for _ in 0..[2, 8][random(2) as usize] {
        let Some(record) = tried(cursor.next()) else {
            continue;
        };
        let mut next = if up { at + 1..base.keys } else { 0..at };
        let next = if up {
            next.find(there)
        } else {
            next.rfind(there)
        };
        let Some(record) = record else {
            return assert_eq!(next, None, "there is a key next to {at}");
        };
        let text = std::str::from_utf8(cursor.key()).unwrap();
        let n = text.strip_prefix("prefix/").unwrap().parse().unwrap();
        let onward = if up {
            key(n) > key(at)
        } else {
            key(n) < key(at)
        };
        assert!(onward, "{n} comes after {at}");
        let passed = next.is_some_and(|next| if up { next < n } else { next > n });
        assert!(!passed, "{next:?} is there, {n} was found from {at}");
        if let Some(seq) = told.keys.get(&n) {
            assert!(record.seq >= *seq, "key {n} has a record of before");
        }
        if let Some(found) = look(reader, base, &record) {
            assert_eq!(found, n);
        }
        at = n;
    }
}

/// The tag that one of the pair has now, if it is there; nothing if it was gone when it
/// was looked at again.
fn one(reader: &Reader<Weak>, base: &Base, which: usize) -> Result<Option<Option<u64>>> {
    let Some(record) = reader.get(&key(PAIR[which]))? else {
        return Ok(Some(None));
    };
    let mut bytes = [0; 8];
    record.read(reader.pm(), &reader.superblock().geometry, 8, &mut bytes)?;
    let tag = u64::from_le_bytes(bytes);
    Ok(look(reader, base, &record).map(|_| Some(tag)))
}

/// Goes over a part of the log.
fn scan(reader: &Reader<Weak>, base: &Base, told: &Told) {
    // Anywhere, or where the new ones are.
    let mut from = match random(2) {
        0 => random(base.keys + 4),
        _ => base.keys + random(6),
    };
    let mut log = reader.log(from);
    for _ in 0..[3, 12][random(2) as usize] {
        let Some(record) = tried(log.next()) else {
            continue;
        };
        let end = record.map_or(u64::MAX, |record| record.seq);
        assert!(end >= from, "the log goes back");
        let passed = base
            .untouched
            .values()
            .find(|seq| (from..end).contains(seq));
        assert_eq!(passed, None, "the log leaves a record out");
        let passed = told.log.range(from..end).next_back();
        assert!(
            passed.is_none_or(|seq| *seq <= reader.pm().truncating()),
            "the log leaves {passed:?} out"
        );
        let Some(here) = record else {
            return;
        };
        assert!(
            here.keyed() || here.seq > told.truncated,
            "the log has {}, up to {} is truncated",
            here.seq,
            told.truncated
        );
        if let Some(seq) = look(reader, base, &here).and_then(|n| told.keys.get(&n)) {
            assert!(here.seq >= *seq, "the log has a replaced record");
        }
        from = end + 1;
    }
}

/// A reader may give up; it may not take for damage what was being changed.
fn tried<T>(result: Result<T>) -> Option<T> {
    match result {
        Err(Error::Busy) => {
            BUSY.fetch_add(1, Ordering::Relaxed);
            None
        }
        other => Some(other.unwrap()),
    }
}

/// Reads a record's key and bytes; the number of its key, unless it was gone then.
fn look(reader: &Reader<Weak>, base: &Base, record: &Record) -> Option<u64> {
    let pm = reader.pm();
    assert!(pm.acknowledged(record.loc, record.seq), "not durable");
    // At times the writer gets far meanwhile.
    if random(3) == 0 {
        for _ in 0..random(300) {
            pm.step();
        }
    }
    let mut found = vec![0; usize::from(record.key_len.unwrap_or(0))];
    let key_read = record.read_key(pm, 0, &mut found);
    let mut bytes = [0; 24];
    let read = record.read(pm, &reader.superblock().geometry, 0, &mut bytes);
    READS.fetch_add(1, Ordering::Relaxed);
    if !reader.still(record).unwrap() {
        GONE.fetch_add(1, Ordering::Relaxed);
        return None;
    }
    assert_eq!(read, Ok(24));
    let word = |at: usize| u64::from_le_bytes(bytes[at * 8..][..8].try_into().unwrap());
    let n = word(0);
    assert_eq!(word(2), mix(n, word(1)), "torn bytes");
    if record.keyed() {
        assert_eq!(key_read, Ok(found.len()));
        assert_eq!(found, key(n), "another's key");
    } else {
        assert_eq!(n, KEYLESS, "another's bytes");
    }
    if let Some(seq) = base.untouched.get(&n) {
        assert_eq!(record.seq, *seq, "a record that nobody put");
    }
    Some(n)
}

/// How many schedules of each kind, if nobody asks for more.
fn schedules(usual: usize) -> usize {
    std::env::var("PMSKB_SCHEDULES").map_or(usual, |n| n.parse().unwrap())
}

fn run(scheduler: impl Scheduler + 'static, size: (u64, u64), without: Without) -> usize {
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    config.max_steps = MaxSteps::ContinueAfter(400_000);
    config.silence_warnings = true;
    let base = Base::new(size.0, size.1);
    Runner::new(scheduler, config).run(move || schedule(&base, without))
}

/// Few keys; a leaf about to be split; two leaves, the second about to go; many record
/// frames with little in them. Keys, and attaches that put them.
const SIZES: [(u64, u64); 4] = [(6, 1), (LOADED, 1), (LOADED + 1, 1), (24, 8)];

#[test]
fn readers_are_never_told_what_was_not() {
    let (mut ran, count) = (0, schedules(12));
    for size in SIZES {
        ran += run(
            RandomScheduler::new_from_seed(size.0, count),
            size,
            Without::Nothing,
        );
        for depth in [2, 4, 8] {
            let pct = PctScheduler::new_from_seed(size.0, depth, count);
            ran += run(pct, size, Without::Nothing);
        }
    }
    let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let (stale, reads, gone, busy) = (of(&STALE), of(&READS), of(&GONE), of(&BUSY));
    let (pairs, moved) = (of(&PAIRS), of(&MOVED));
    println!(
        "{ran} schedules, {stale} loads of old values, {reads} records read, \
         {gone} of them gone when looked at again, {pairs} pairs, {moved} records moved, \
         given up {busy} times"
    );
    assert!(stale > 1000 && reads > 1000 && gone > 10 && busy * 10 < reads);
    assert!(pairs > 100 && moved > 100);
}

/// The model tells when a host does not keep what the core relies on.
#[test]
fn a_weaker_memory_is_noticed() {
    for without in [Without::LoadFence, Without::Acquire, Without::Release] {
        let noticed = std::thread::spawn(move || {
            for size in SIZES {
                run(RandomScheduler::new_from_seed(size.0, 2000), size, without);
                run(PctScheduler::new_from_seed(size.0, 4, 2000), size, without);
            }
        });
        assert!(
            noticed.join().is_err(),
            "without {without:?} nothing is wrong"
        );
    }
}
