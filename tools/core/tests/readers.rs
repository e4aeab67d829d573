// SPDX-License-Identifier: GPL-2.0

//! Lock-free readers beside a writer.

mod common;
use common::{bytes_of, params};
use pmskb_core::host::{HostFrames, Memory};
use pmskb_core::sim::Rng;
use pmskb_core::*;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Keys 0..STABLE are always there; the others come and go.
const STABLE: u64 = 300;
const KEYS: u64 = 1500;
const READERS: u64 = 8;

/// What all readers did.
#[derive(Default)]
struct Counts {
    /// Records read with key and bytes.
    reads: AtomicU64,
    /// Of them, those that were gone when looked at again.
    stale: AtomicU64,
    /// Of the others, those whose key or bytes were not what had been put.
    torn: AtomicU64,
    /// Reads given up because too much changed.
    busy: AtomicU64,
}

/// A region whose readers look after each store of the writer's.
struct Watched {
    memory: Memory,
    on: AtomicBool,
    looks: AtomicU64,
}

impl Pmem for Watched {
    fn len(&self) -> u64 {
        self.memory.len()
    }
    fn read(&self, off: u64, to: &mut [u8]) -> Result<()> {
        self.memory.read(off, to)
    }
    fn load(&self, off: u64) -> Result<u64> {
        self.memory.load(off)
    }
    fn write(&self, off: u64, from: &[u8]) -> Result<()> {
        self.memory.write(off, from)
    }
    fn store(&self, off: u64, value: u64) -> Result<()> {
        self.memory.store(off, value)?;
        if self.on.load(Ordering::Relaxed) {
            neighbours(&self.memory, &self.looks);
        }
        Ok(())
    }
    fn flush(&self, off: u64, len: u64) -> Result<()> {
        self.memory.flush(off, len)
    }
    fn fence(&self) {}
}

/// Every third key stays; each reader's next one is no further than that.
fn neighbours(memory: &Memory, looks: &AtomicU64) {
    let name = |n: u64| format!("{n:04}").into_bytes();
    let reader = Reader::open(memory).unwrap();
    for n in 0..WATCHED {
        for direction in [Direction::Forward, Direction::Backward] {
            let up = direction == Direction::Forward;
            let mut cursor = reader.cursor(Some(&name(n)), false, direction);
            let found = match cursor.next() {
                // A node is being written.
                Err(Error::Busy) => return,
                other => other.unwrap(),
            };
            looks.fetch_add(1, Ordering::Relaxed);
            let stays = |m: &u64| m % 3 == 0;
            let most = if up {
                (n + 1..WATCHED).find(stays)
            } else {
                (0..n).rfind(stays)
            };
            let Some(_) = found else {
                assert_eq!(most, None, "nothing is next to {n}");
                continue;
            };
            let (at, most) = (cursor.key(), most.map(name));
            let beyond = if up {
                at > &name(n)[..]
            } else {
                at < &name(n)[..]
            };
            let near = most.is_none_or(|most| if up { at <= &most[..] } else { at >= &most[..] });
            assert!(
                beyond && near,
                "{} is next to {n}",
                String::from_utf8_lossy(at)
            );
        }
    }
}

/// Keys of the test below: more than a leaf has.
const WATCHED: u64 = 90;

#[test]
fn at_each_instant_of_a_split_and_of_a_removal_the_next_key_is_the_right_one() {
    let region = Watched {
        memory: Memory::new(16 << 20),
        on: AtomicBool::new(false),
        looks: AtomicU64::new(0),
    };
    format(&region, &params()).unwrap();
    let geo = probe(&region).unwrap().superblock.geometry;
    let frames = HostFrames::new(&geo).unwrap();
    let work = vec![0; Store::<&Watched, HostFrames, Vec<u64>>::WORK_WORDS];
    let options = RecoverOptions::default();
    let (mut store, _) = Store::recover(&region, frames, work, host::list, options).unwrap();
    let put = |store: &mut Store<_, _, _>, n: u64| {
        let key = format!("{n:04}").into_bytes();
        let args = PutArgs {
            key: Key::Bytes(&key),
            extents: &[],
            meta: Meta::default(),
            mode: PutMode::Upsert,
            if_seq: None,
        };
        store.put(&args).unwrap();
    };
    for n in (0..WATCHED).filter(|n| n % 3 != 1) {
        put(&mut store, n);
    }
    store.commit().unwrap();
    region.on.store(true, Ordering::Relaxed);
    // The leaf is full, and is halved.
    put(&mut store, 1);
    store.commit().unwrap();
    // And in here first entries go.
    for n in (40..50).filter(|n| n % 3 == 2) {
        store.delete(format!("{n:04}").as_bytes(), None).unwrap();
        store.commit().unwrap();
    }
    assert!(region.looks.into_inner() > 1000);
}

fn key(n: u64) -> Vec<u8> {
    format!("some/common/prefix/{:05}", n * 7919 % 100_000).into_bytes()
}

/// Any key, or one of a few that all are after.
fn some(rng: &mut Rng) -> u64 {
    if rng.below(2) == 0 {
        rng.below(8)
    } else {
        rng.below(KEYS)
    }
}

#[test]
fn readers_find_whole_records_while_a_writer_goes_on() {
    let seconds = std::env::var("PMSKB_SECONDS").map_or(3, |n| n.parse().unwrap());
    let memory = Memory::new(16 << 20);
    format(&memory, &params()).unwrap();
    let geo = probe(&memory).unwrap().superblock.geometry;
    let frames = HostFrames::new(&geo).unwrap();
    let work = vec![0; Store::<&Memory, HostFrames, Vec<u64>>::WORK_WORDS];
    let options = RecoverOptions::default();
    let (mut store, _) = Store::recover(&memory, frames, work, host::list, options).unwrap();
    let mut rng = Rng(1);
    for n in 0..STABLE {
        put(&mut store, n, &mut rng);
    }
    store.commit().unwrap();
    // Not much room: what is given back is soon used again.
    let all: Vec<_> = std::iter::from_fn(|| store.frames().alloc(None, Need::New)).collect();
    for frame in &all[..all.len() / 2] {
        store.frames().unhold(*frame, 0).unwrap();
    }
    let stop = AtomicBool::new(false);
    let counts = Counts::default();
    std::thread::scope(|scope| {
        for thread in 0..READERS {
            let (memory, stop, counts) = (&memory, &stop, &counts);
            scope.spawn(move || reader(memory, thread, stop, counts));
        }
        let end = Instant::now() + Duration::from_secs(seconds);
        let mut writes = 0u64;
        let _guard = Stop(&stop);
        while Instant::now() < end {
            for _ in 0..rng.below(20) {
                let n = some(&mut rng);
                if n < STABLE || rng.below(2) == 0 {
                    put(&mut store, n, &mut rng);
                } else {
                    let _ = store.delete(&key(n), None);
                }
                writes += 1;
            }
            store.commit().unwrap();
        }
        println!("{writes} writes");
    });
    let (reads, stale) = (counts.reads.into_inner(), counts.stale.into_inner());
    let (torn, busy) = (counts.torn.into_inner(), counts.busy.into_inner());
    println!(
        "{reads} reads, {torn} torn, {stale} of records that were gone when looked at again, \
         {busy} given up"
    );
    assert_eq!(torn, 0, "of {reads} reads");
    assert!(reads > 1000 && busy * 10 < reads);
}

struct Stop<'a>(&'a AtomicBool);
impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The payload says which key it belongs to, and its own tag.
fn put(store: &mut Store<&Memory, HostFrames, Vec<u64>>, n: u64, rng: &mut Rng) {
    let frame = store.frames().alloc(None, Need::New).unwrap();
    let tag = rng.next();
    let mut bytes = n.to_le_bytes().to_vec();
    bytes.extend(tag.to_le_bytes());
    bytes.extend(bytes_of(tag, rng.below(500) as usize));
    store.pm().write(frame.off(), &bytes).unwrap();
    let key = key(n);
    let args = PutArgs {
        key: Key::Bytes(&key),
        extents: &[Extent::new(frame.off(), bytes.len() as u32)],
        meta: Meta::default(),
        mode: PutMode::Upsert,
        if_seq: None,
    };
    store.put(&args).unwrap();
    store.frames().unhold(frame, 0).unwrap();
}

fn reader(memory: &Memory, thread: u64, stop: &AtomicBool, counts: &Counts) {
    let reader = Reader::open(memory).unwrap();
    let geo = reader.superblock().geometry;
    let stable: BTreeSet<_> = (0..STABLE).map(key).collect();
    let mut rng = Rng(100 + thread);
    let directions = [Direction::Forward, Direction::Backward];
    let mut up = true;
    let mut cursor = reader.cursor(None, true, Direction::Forward);
    let mut at: Option<Vec<u8>> = None;
    let mut log = reader.log(0);
    while !stop.load(Ordering::Relaxed) {
        let n = some(&mut rng);
        let wanted = key(n);
        let which = rng.below(3);
        let record = match which {
            0 => reader.get(&wanted),
            1 => cursor.next(),
            _ => log.next(),
        };
        let record = match record {
            // The writer lost the CPU in the middle of a node.
            Err(Error::Busy) => {
                counts.busy.fetch_add(1, Ordering::Relaxed);
                std::thread::yield_now();
                continue;
            }
            other => other.unwrap(),
        };
        assert!(
            which != 0 || record.is_some() || n >= STABLE,
            "key {n} is always there"
        );
        let Some(record) = record else {
            match which {
                1 => {
                    up = !up;
                    cursor = reader.cursor(None, true, directions[usize::from(!up)]);
                    at = None;
                }
                _ => log = reader.log(0),
            }
            continue;
        };
        let cursor_key = (which == 1).then(|| cursor.key().to_vec());
        if let Some(now) = &cursor_key {
            let onward = at.as_ref().is_none_or(|at| (at < now) == up && at != now);
            assert!(onward, "the keys go back");
            let skipped = stable.iter().find(|key| {
                let behind = at.as_ref().is_none_or(|at| (at < key) == up && at != *key);
                behind && (*key < now) == up && *key != now
            });
            assert_eq!(skipped, None, "it is always there");
            at = cursor_key.clone();
        }
        // Longer than it takes to read, at times: the record may go meanwhile.
        if rng.below(4) == 0 {
            std::thread::yield_now();
        }
        let mut found = vec![0; usize::from(record.key_len.unwrap())];
        record.read_key(memory, 0, &mut found).unwrap_or(0);
        let mut bytes = vec![0; record.len as usize];
        let read = record.read(memory, &geo, 0, &mut bytes);
        counts.reads.fetch_add(1, Ordering::Relaxed);
        if !reader.still(&record).unwrap() {
            counts.stale.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        assert!(
            record.seq <= reader.live().unwrap().durable_seq,
            "not durable"
        );
        assert_eq!(read, Ok(bytes.len()));
        let same = cursor_key.is_none_or(|key| key == found);
        if !same || !whole(&found, &bytes) {
            counts.torn.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Whether bytes are one put's, and their key with them.
fn whole(found: &[u8], bytes: &[u8]) -> bool {
    let Some((head, rest)) = bytes.split_at_checked(16) else {
        return false;
    };
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().unwrap());
    found == key(word(0)) && rest == bytes_of(word(8), rest.len())
}
