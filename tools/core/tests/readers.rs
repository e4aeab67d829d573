// SPDX-License-Identifier: GPL-2.0

//! Lock-free readers beside a writer.

mod common;
use common::{bytes_of, params};
use pmskb_core::host::{HostFrames, Memory};
use pmskb_core::sim::Rng;
use pmskb_core::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Keys 0..STABLE are always there; the others come and go.
const STABLE: u64 = 300;
const KEYS: u64 = 1500;

fn key(n: u64) -> Vec<u8> {
    format!("some/common/prefix/{:05}", n * 7919 % 100_000).into_bytes()
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
    let stop = AtomicBool::new(false);
    let (reads, stale) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (memory, stop, reads, stale) = (&memory, &stop, &reads, &stale);
            scope.spawn(move || reader(memory, thread, stop, reads, stale));
        }
        let end = Instant::now() + Duration::from_secs(seconds);
        let mut writes = 0u64;
        let _guard = Stop(&stop);
        while Instant::now() < end {
            for _ in 0..rng.below(20) {
                let n = rng.below(KEYS);
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
    let (reads, stale) = (reads.into_inner(), stale.into_inner());
    println!("{reads} reads, {stale} of them of records that were gone when looked at again");
    assert!(reads > 1000);
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

fn reader(memory: &Memory, thread: u64, stop: &AtomicBool, reads: &AtomicU64, stale: &AtomicU64) {
    let reader = Reader::open(memory).unwrap();
    let geo = reader.superblock().geometry;
    let mut rng = Rng(100 + thread);
    let mut at: Option<Vec<u8>> = None;
    let mut log = 0;
    while !stop.load(Ordering::Relaxed) {
        let n = rng.below(KEYS);
        let wanted = key(n);
        let which = rng.below(3);
        let record = match which {
            0 => reader.get(&wanted),
            1 => reader.seek(at.as_deref(), false, Direction::Forward),
            _ => reader.log_from(log),
        };
        let record = match record {
            // The writer lost the CPU in the middle of a node.
            Err(Error::Busy) => {
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
                1 => at = None,
                _ => log = 0,
            }
            continue;
        };
        if which == 2 {
            log = record.seq + 1;
        }
        let mut found = vec![0; usize::from(record.key_len.unwrap())];
        record.read_key(memory, 0, &mut found).unwrap_or(0);
        let mut bytes = vec![0; record.len as usize];
        let read = record.read(memory, &geo, 0, &mut bytes);
        reads.fetch_add(1, Ordering::Relaxed);
        if !reader.still(&record).unwrap() {
            stale.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        assert!(
            record.seq <= reader.live().unwrap().durable_seq,
            "not durable"
        );
        assert_eq!(read, Ok(bytes.len()));
        let whose = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let tag = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
        assert_eq!(found, key(whose), "a record with another's key");
        assert_eq!(bytes[16..], bytes_of(tag, bytes.len() - 16), "torn bytes");
        if at.as_ref().is_none_or(|at| *at < found) {
            at = Some(found);
        }
    }
}
