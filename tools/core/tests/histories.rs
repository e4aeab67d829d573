// SPDX-License-Identifier: GPL-2.0

//! Long random histories with power cuts, against a model; and many cycles of use.
//!
//! A history that fails is made as short as it can be, printed, and kept in
//! proptest-regressions/. PROPTEST_CASES says how many are tried (32).

mod common;
use common::*;
use pmskb_core::host::{HostFrames, Memory};
use pmskb_core::sim::Rng;
use pmskb_core::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn key() -> impl Strategy<Value = Vec<u8>> {
    // Few keys, so that they meet; one is empty, one long and binary.
    prop_oneof![
        8 => (0..9u8).prop_map(|n| vec![b'k', n]),
        1 => Just(Vec::new()),
        1 => Just(vec![0xff; 70]),
    ]
}

fn put() -> impl Strategy<Value = Op> {
    (key(), any::<u64>(), 0..6000usize).prop_map(|(key, tag, len)| {
        // Short ones mostly; two of one length must differ.
        let len = if tag % 8 == 0 { len } else { len % 200 } + 16;
        match tag % 5 {
            0 if !key.is_empty() => Op::PutKeyExtent { key, tag, len },
            1 => Op::PutPieces {
                key,
                tag,
                pieces: len % 90 + 1,
            },
            _ => Op::Put { key, tag, len },
        }
    })
}

fn staged() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => put(),
        2 => (any::<u64>(), 16..300usize).prop_map(|(tag, len)| Op::Append { tag, len }),
        1 => (any::<u64>(), 16..300usize).prop_map(|(tag, len)| Op::AppendDurable { tag, len }),
        2 => key().prop_map(|key| Op::Delete { key }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let some = || prop::collection::vec(staged(), 1..6);
    prop_oneof![
        20 => staged(),
        6 => Just(Op::Commit),
        2 => Just(Op::Sync),
        2 => some().prop_map(Op::Atomic),
        1 => some().prop_map(Op::Abort),
        1 => Just(Op::Truncate),
        2 => Just(Op::Compact),
        1 => Just(Op::Recover),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("PROPTEST_CASES").map_or(32, |n| n.parse().unwrap()),
        failure_persistence: Some(Box::new(
            proptest::test_runner::FileFailurePersistence::WithSource("proptest-regressions"),
        )),
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_histories_with_a_power_cut_hold_what_the_model_allows(
        ops in prop::collection::vec(op(), 1..300),
        stop in 0..20_000u64,
        seed in any::<u64>(),
    ) {
        let (store, _) = recover(formatted()).unwrap();
        store.pm().reset_counts();
        store.pm().stop_at(stop);
        let mut driver = Driver::new(store);
        for op in &ops {
            if driver.run(op).is_err() {
                break;
            }
        }
        if driver.store.pm().counts().events + 200 < stop {
            // It came to its end.
            driver.run(&Op::Commit).unwrap();
            driver.run(&Op::Sync).unwrap();
            check(&driver.store, &driver.model).map_err(TestCaseError::fail)?;
        }
        let mut rng = Rng(seed);
        for _ in 0..3 {
            let image = driver.store.pm().crash_torn(&mut rng);
            let (store, _) = recover(image)
                .map_err(|error| TestCaseError::fail(format!("recovery: {error:?}")))?;
            check(&store, &driver.model).map_err(TestCaseError::fail)?;
        }
    }
}

/// Puts an object of `len` bytes, in frames that are taken as a socket takes them.
fn put_bytes<P: Pmem>(
    store: &mut Store<P, HostFrames, Vec<u64>>,
    key: &[u8],
    len: usize,
) -> Result<()> {
    let mut extents = Vec::new();
    let mut near = None;
    let mut left = len;
    while left > 0 {
        let now = left.min(4096);
        let frame = store.frames().alloc(near, Need::New);
        let Some(frame) = frame else {
            break;
        };
        extents.push(Extent::new(frame.off(), now as u32));
        near = Some(frame);
        left -= now;
    }
    let done = if left > 0 {
        Err(Error::NoSpace)
    } else {
        let args = PutArgs {
            key: Key::Bytes(key),
            extents: &extents,
            meta: Meta::default(),
            mode: PutMode::Upsert,
            if_seq: None,
        };
        store.put(&args).map(|_| ())
    };
    for extent in extents {
        store
            .frames()
            .unhold(extent.frames().next().unwrap(), 0)
            .unwrap();
    }
    done
}

#[test]
fn an_emptied_store_is_as_empty_as_a_new_one_after_many_cycles() {
    let cycles = std::env::var("PMSKB_CYCLES").map_or(100_000, |n| n.parse().unwrap());
    let memory = Memory::new(256 << 20);
    format(&memory, &params()).unwrap();
    let geo = probe(&memory).unwrap().superblock.geometry;
    let frames = HostFrames::new(&geo).unwrap();
    let work = vec![0; Store::<&Memory, HostFrames, Vec<u64>>::WORK_WORDS];
    let (mut store, _) =
        Store::recover(&memory, frames, work, host::list, RecoverOptions::default()).unwrap();
    let mut rng = Rng(3);
    let mut there: BTreeMap<u64, usize> = BTreeMap::new();
    let mut full = 0;
    let mut scratch = vec![Extent::new(0, 0); 512];
    let mut from = 0;
    for cycle in 0..cycles {
        let n = rng.below(30_000);
        let key = format!("object/{n:07}").into_bytes();
        if rng.below(3) == 0 {
            let deleted = store.delete(&key, None);
            assert_eq!(deleted.is_ok(), there.remove(&n).is_some());
        } else {
            let len = match rng.below(20) {
                0 => rng.below(200_000),
                1..4 => rng.below(9000),
                _ => rng.below(1500),
            } as usize;
            match put_bytes(&mut store, &key, len) {
                Ok(()) => drop(there.insert(n, len)),
                Err(Error::NoSpace) => full += 1,
                Err(error) => panic!("{error:?}"),
            }
        }
        if rng.below(4) == 0 {
            store.commit().unwrap();
        }
        if cycle % 500 == 0 {
            from = store.compact(from, &mut scratch).unwrap().next.unwrap_or(0);
        }
    }
    store.commit().unwrap();
    store.sync_pending().unwrap();
    let stats = store.stats();
    assert_eq!(stats.keys, there.len() as u64);
    assert_eq!(stats.live_bytes, there.values().sum::<usize>() as u64);
    let counts = store.frames().0.borrow().counts();
    assert_eq!(
        u64::from(counts.payload) * FRAME_SIZE,
        stats.live_bytes + counts.slack
    );
    for n in there.keys() {
        store
            .delete(format!("object/{n:07}").as_bytes(), None)
            .unwrap();
    }
    store.commit().unwrap();
    store.sync_pending().unwrap();
    let stats = store.stats();
    assert_eq!(
        (stats.records, stats.live_bytes, stats.record_lines),
        (0, 0, 0)
    );
    // What is left: the open record frame, the frame that compaction fills, and the
    // nodes that are kept for the next commit.
    let counts = store.frames().0.borrow().counts();
    let kept = u64::from(counts.total - counts.free - counts.limbo);
    assert!(
        kept <= stats.index_frames + 2,
        "{kept} frames kept: {stats:?}"
    );
    assert!(stats.index_frames <= 32, "{stats:?}");
    assert_eq!((counts.payload, counts.slack, stats.list_frames), (0, 0, 0));
    println!("{cycles} cycles, full {full} times, {kept} frames kept");
}
