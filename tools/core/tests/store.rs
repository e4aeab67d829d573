// SPDX-License-Identifier: GPL-2.0

//! The store in one piece: what it costs, what it refuses, what it survives.

mod common;
use common::*;
use pmskb_core::host::{HostFrames, Memory};
use pmskb_core::sim::{Rng, SimPm};
use pmskb_core::*;
use std::collections::BTreeMap;

fn driver() -> Driver {
    let mut driver = Driver::new(recover(formatted()).unwrap().0);
    // The batch that opens a record frame costs more; it is not counted.
    driver.run(&Op::Append { tag: 1, len: 64 }).unwrap();
    driver.run(&Op::Commit).unwrap();
    driver.store.pm().reset_counts();
    driver
}

fn put(key: &str, tag: u64, len: usize) -> Op {
    Op::Put {
        key: key.into(),
        tag,
        len,
    }
}

#[test]
fn a_keyless_record_costs_its_payload_one_line_and_two_fences() {
    let mut driver = driver();
    driver.run(&Op::Append { tag: 2, len: 1024 }).unwrap();
    driver.run(&Op::Commit).unwrap();
    let counts = driver.store.pm().counts();
    assert_eq!((counts.lines, counts.fences, counts.clean), (16 + 1, 2, 0));
    assert_eq!(unflushed(&driver.store), []);
}

#[test]
fn a_keyless_record_of_durable_bytes_costs_one_line_and_one_fence() {
    let mut driver = driver();
    for tag in 2..12 {
        driver.run(&Op::AppendDurable { tag, len: 1024 }).unwrap();
    }
    // The bytes, each record's by somebody else.
    let before = driver.store.pm().counts();
    assert_eq!((before.lines, before.fences), (10 * 16, 10));
    driver.run(&Op::Commit).unwrap();
    let counts = driver.store.pm().counts();
    assert_eq!((counts.lines, counts.fences), (10 * 17, 11));
    assert_eq!((counts.clean, counts.idle_fences), (0, 0));
    assert_eq!(unflushed(&driver.store), []);
}

#[test]
fn a_record_with_a_16_byte_key_costs_its_payload_two_lines_and_two_fences() {
    let mut driver = driver();
    driver.run(&put("0123456789abcdef", 2, 1024)).unwrap();
    driver.run(&Op::Commit).unwrap();
    let counts = driver.store.pm().counts();
    assert_eq!((counts.lines, counts.fences, counts.clean), (16 + 2, 2, 0));
    assert_eq!(unflushed(&driver.store), []);
}

#[test]
fn a_batch_costs_two_fences_however_long() {
    let mut driver = driver();
    for n in 0..500 {
        driver.run(&put(&format!("key {n}"), n, 64)).unwrap();
    }
    driver.run(&Op::Commit).unwrap();
    let counts = driver.store.pm().counts();
    assert_eq!((counts.fences, counts.clean, counts.idle_fences), (2, 0, 0));
    assert_eq!(unflushed(&driver.store), []);
}

#[test]
fn nothing_staged_costs_nothing() {
    let mut driver = driver();
    driver.run(&Op::Commit).unwrap();
    driver.run(&Op::Sync).unwrap();
    assert_eq!(driver.store.pm().counts().events, 0);
}

#[test]
fn nothing_is_left_unflushed_and_nothing_flushed_twice() {
    let mut rng = Rng(5);
    let mut driver = driver();
    for _ in 0..3000 {
        let key = format!("{}", rng.below(100)).into_bytes();
        let op = match rng.below(8) {
            0..4 => Op::Put {
                key,
                tag: rng.next(),
                len: rng.below(9000) as usize + 16,
            },
            4 => Op::PutKeyExtent {
                key,
                tag: rng.next(),
                len: 100,
            },
            5 => Op::Delete { key },
            _ => Op::Commit,
        };
        driver.run(&op).unwrap();
        if op == Op::Commit {
            assert_eq!(unflushed(&driver.store), []);
        }
    }
    let counts = driver.store.pm().counts();
    assert_eq!((counts.clean, counts.idle_fences), (0, 0));
    driver.run(&Op::Commit).unwrap();
    driver.run(&Op::Sync).unwrap();
    check(&driver.store, &driver.model).unwrap();
}

/// Keys that hurt: prefixes of one another, long common prefixes, zeros, empty.
fn key(rng: &mut Rng) -> Vec<u8> {
    let n = rng.below(400);
    match rng.below(6) {
        0 => n.to_string().into_bytes(),
        1 => format!("a/very/long/prefix/that/all/of/them/share/{n:06}").into_bytes(),
        2 => vec![b'x'; n as usize],
        3 => vec![0; n as usize % 40],
        4 => n.to_be_bytes().to_vec(),
        _ => {
            let mut key = vec![7; 900];
            key.extend(n.to_le_bytes());
            key
        }
    }
}

#[test]
fn the_index_is_an_ordered_map() {
    for seed in 0..4 {
        let mut rng = Rng(seed);
        let mut map: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
        let mut store = recover(formatted()).unwrap().0;
        for round in 0..6000 {
            let key = key(&mut rng);
            // Grows, then shrinks to nothing.
            if rng.below(10) < if round < 3000 { 7 } else { 3 } {
                let args = PutArgs {
                    key: Key::Bytes(&key),
                    extents: &[],
                    meta: Meta::default(),
                    mode: PutMode::Upsert,
                    if_seq: None,
                };
                let done = store.put(&args).unwrap();
                assert_eq!(map.insert(key, done.seq).is_some(), done.replaced);
            } else {
                let seq = store.delete(&key, None);
                assert_eq!(seq.ok(), map.remove(&key));
            }
            if rng.below(20) == 0 {
                store.commit().unwrap();
            }
            if round % 500 == 499 {
                store.commit().unwrap();
                compare(&store, &map, &mut rng);
            }
        }
        for (key, seq) in std::mem::take(&mut map) {
            assert_eq!(store.delete(&key, None), Ok(seq));
        }
        store.commit().unwrap();
        store.sync_pending().unwrap();
        compare(&store, &map, &mut rng);
        let stats = store.stats();
        assert_eq!((stats.records, stats.keys, stats.live_bytes), (0, 0, 0));
        assert!(
            stats.record_frames <= 1 && stats.index_frames <= 8,
            "{stats:?}"
        );
    }
}

fn compare(store: &SimStore, map: &BTreeMap<Vec<u8>, u64>, rng: &mut Rng) {
    let seq = |loc: Option<Locator>| loc.map(|loc| store.record(loc).unwrap().seq);
    for direction in [Direction::Forward, Direction::Backward] {
        let mut at: Option<Vec<u8>> = None;
        let mut seen = Vec::new();
        while let Some(loc) = store.seek(at.as_deref(), false, direction).unwrap() {
            let record = store.record(loc).unwrap();
            seen.push(record.seq);
            at = Some(key_of(store, &record));
        }
        let mut right: Vec<_> = map.values().copied().collect();
        if direction == Direction::Backward {
            right.reverse();
        }
        assert_eq!(seen, right);
    }
    for _ in 0..200 {
        let key = key(rng);
        use std::ops::Bound::{Excluded, Included, Unbounded};
        assert_eq!(seq(store.lookup(&key).unwrap()), map.get(&key).copied());
        for inclusive in [false, true] {
            let bound = |k| if inclusive { Included(k) } else { Excluded(k) };
            let above = map.range((bound(key.clone()), Unbounded)).next();
            let found = store
                .seek(Some(&key), inclusive, Direction::Forward)
                .unwrap();
            assert_eq!(seq(found), above.map(|(_, seq)| *seq));
            let below = map.range((Unbounded, bound(key.clone()))).next_back();
            let found = store
                .seek(Some(&key), inclusive, Direction::Backward)
                .unwrap();
            assert_eq!(seq(found), below.map(|(_, seq)| *seq));
        }
    }
    let mut seqs: Vec<_> = map.values().copied().collect();
    seqs.sort_unstable();
    assert_eq!(
        log_of(store).iter().map(|r| r.seq).collect::<Vec<_>>(),
        seqs
    );
    if let Some(mid) = seqs.get(seqs.len() / 2) {
        assert_eq!(store.log_from(*mid).unwrap().map(|r| r.seq), Some(*mid));
    }
}

#[test]
fn every_field_of_a_record_comes_back() {
    let mut driver = driver();
    let flows = [
        None,
        Some(Addrs::V4 {
            remote: [1, 2, 3, 4],
            local: [5, 6, 7, 8],
        }),
        Some(Addrs::V6 {
            remote: [9; 16],
            local: [10; 16],
        }),
    ];
    for (n, addrs) in flows.into_iter().enumerate() {
        for key_len in [0, 1, 8, 63, 1024] {
            let meta = Meta {
                time: 123_456_789,
                time_source: TimeSource::Hardware,
                csum: csum::Sum::new(0x1234),
                csum_kind: CsumKind::Derived,
                copied: n == 1,
                flow: addrs.map(|addrs| Flow {
                    addrs,
                    remote_port: 80,
                    local_port: 4711,
                    udp: n == 2,
                }),
                tcp_seq: 0xdead_beef,
                payload_crc: (n == 2).then_some(7),
            };
            let extents: Vec<_> = (0..key_len as u64 % 65)
                .flat_map(|_| driver.fill(&[1, 2, 3]).unwrap())
                .collect();
            let key = vec![n as u8 + 65; key_len];
            let args = PutArgs {
                key: Key::Bytes(&key),
                extents: &extents,
                meta,
                mode: PutMode::Create,
                if_seq: None,
            };
            let args = if key_len == 0 {
                PutArgs {
                    key: Key::None,
                    ..args
                }
            } else {
                args
            };
            let loc = driver.store.put(&args).unwrap().loc;
            driver.store.commit().unwrap();
            let record = driver.store.record(loc).unwrap();
            assert_eq!(record.meta, meta);
            assert_eq!(record.len, 3 * extents.len() as u32);
            let found = record.extents(driver.store.pm(), driver.store.geometry());
            assert_eq!(found.map(Result::unwrap).collect::<Vec<_>>(), extents);
            assert_eq!(key_of(&driver.store, &record), key);
        }
    }
}

#[test]
fn a_full_store_refuses_and_goes_on() {
    let mut driver = driver();
    let mut n = 0u64;
    let error = loop {
        match driver.run(&put(&format!("{n}"), n, 4000)) {
            Ok(()) => n += 1,
            Err(error) => break error,
        }
        if n % 16 == 0 {
            driver.run(&Op::Commit).unwrap();
        }
    };
    assert_eq!(error, Error::NoSpace);
    driver.model.keys.remove(n.to_string().as_bytes());
    driver.run(&Op::Commit).unwrap();
    check(&driver.store, &driver.model).unwrap();
    for m in 0..n / 2 {
        driver
            .run(&Op::Delete {
                key: m.to_string().into_bytes(),
            })
            .unwrap();
    }
    driver.run(&Op::Commit).unwrap();
    driver.run(&put("again", 1, 4000)).unwrap();
    driver.run(&Op::Commit).unwrap();
    driver.run(&Op::Sync).unwrap();
    check(&driver.store, &driver.model).unwrap();
    let image = driver.store.pm().crash_subset(0, &mut Rng(0));
    check(&recover(image).unwrap().0, &driver.model).unwrap();
}

#[test]
fn bad_arguments_are_refused_and_leave_nothing() {
    let mut driver = driver();
    let geo = *driver.store.geometry();
    let frame = driver.store.frames().alloc(None, Need::New).unwrap();
    let good = Extent::new(frame.off(), 10);
    // Frames in use, without those kept for the index.
    let numbers = |driver: &Driver| {
        let counts = driver.store.frames().0.borrow().counts();
        let stats = driver.store.stats();
        let busy = u64::from(counts.owned + counts.held) - stats.index_frames;
        (busy, stats.records, stats.record_frames, stats.list_frames)
    };
    let before = numbers(&driver);
    let long = [0; 1025];
    let cases: [(Key<'_>, Vec<Extent>, PutMode, Error); 8] = [
        (
            Key::Bytes(&long),
            vec![good],
            PutMode::Upsert,
            Error::TooLong,
        ),
        (
            Key::Extent(Extent::new(frame.off(), 1025)),
            vec![],
            PutMode::Upsert,
            Error::TooLong,
        ),
        (
            Key::None,
            vec![good, Extent::new(0, 10)],
            PutMode::Upsert,
            Error::Invalid,
        ),
        (
            Key::None,
            vec![Extent::new(geo.data_end() - 5, 10)],
            PutMode::Upsert,
            Error::Invalid,
        ),
        (
            Key::None,
            vec![Extent::new(u64::MAX - 5, 10)],
            PutMode::Upsert,
            Error::Invalid,
        ),
        (
            Key::None,
            vec![good, Extent::new(frame.off() + 9 * 4096, 1)],
            PutMode::Upsert,
            Error::Invalid,
        ),
        (
            Key::Bytes(b"no"),
            vec![good],
            PutMode::Replace,
            Error::NotFound,
        ),
        (
            Key::None,
            vec![Extent::new(frame.off(), 0)],
            PutMode::Upsert,
            Error::Invalid,
        ),
    ];
    for (key, extents, mode, error) in cases {
        let args = PutArgs {
            key,
            extents: &extents,
            meta: Meta::default(),
            mode,
            if_seq: None,
        };
        assert_eq!(driver.store.put(&args), Err(error), "{extents:?}");
        assert_eq!(driver.store.staged(), 0);
        assert_eq!(numbers(&driver), before);
    }
    assert_eq!(driver.store.delete(b"no", None), Err(Error::NotFound));
}

#[test]
fn one_damaged_superblock_is_repaired_two_are_refused() {
    for damaged in [0, LEN - 4096] {
        let pm = formatted();
        pm.damage(damaged + 40, b"damaged");
        let found = probe(&pm).unwrap();
        assert!(found.first.is_some() != found.last.is_some());
        let (store, report) = recover(pm).unwrap();
        assert!(report.superblock_repaired);
        let after = probe(store.pm()).unwrap();
        assert_eq!((after.first, after.last, after.stale), (None, None, false));
    }
    let pm = formatted();
    pm.damage(40, b"damaged");
    pm.damage(LEN - 4096 + 40, b"damaged");
    assert_eq!(probe(&pm).err(), Some(Error::Damaged));
    assert_eq!(probe(&SimPm::new(LEN)).err(), Some(Error::NotFormatted));
    assert_eq!(
        format(&SimPm::new(1 << 20), &params()),
        Err(Error::TooSmall)
    );
    assert!(looks_blank(&SimPm::new(LEN)).unwrap() && !looks_blank(&formatted()).unwrap());
}

#[test]
fn a_damaged_record_loses_only_itself() {
    let mut driver = driver();
    for n in 0..20 {
        driver.run(&put(&format!("{n:02}"), n, 64)).unwrap();
    }
    driver.run(&Op::Commit).unwrap();
    let loc = driver.store.lookup(b"07").unwrap().unwrap();
    let image = driver.store.pm().crash_subset(0, &mut Rng(0));
    image.damage(loc.0 + 20, &[0x55]);
    let (store, report) = recover(image).unwrap();
    assert_eq!((report.keys, report.torn), (19, 1));
    assert_eq!(store.lookup(b"07"), Ok(None));
    driver.model.keys.remove(&b"07"[..]);
    check(&store, &driver.model).unwrap();
}

#[test]
fn hostile_images_never_panic_or_loop() {
    let mut rng = Rng(9);
    let mut driver = driver();
    for n in 0..60 {
        let op = match n % 3 {
            0 => Op::PutKeyExtent {
                key: vec![n as u8; 9],
                tag: n,
                len: 5000,
            },
            _ => put(&format!("{}", n % 40), n, 300),
        };
        driver.run(&op).unwrap();
        if n % 7 == 0 {
            driver.run(&Op::Commit).unwrap();
        }
    }
    driver.run(&Op::Commit).unwrap();
    let image = driver.store.pm().crash_subset(0, &mut rng);
    let frames = image.used_frames();
    let (mut attached, mut refused) = (0, 0);
    for _ in 0..3000 {
        let pm = image.clone();
        for _ in 0..=rng.below(8) {
            let frame = frames[rng.below(frames.len() as u64) as usize];
            // Most damage where the structures are.
            let at = if rng.below(2) == 0 {
                rng.below(512)
            } else {
                rng.below(4096)
            };
            let bytes = rng.next().to_le_bytes();
            let len = rng.below(8) as usize + 1;
            let off = (frame * 4096 + at).min(LEN - 8);
            pm.damage(off, &bytes[..len]);
        }
        match recover(pm) {
            Ok((mut store, _)) => {
                attached += 1;
                let mut buf = [0; 256];
                for record in log_of(&store) {
                    let _ = record.verify(store.pm(), store.geometry(), &mut buf);
                }
                let _ = store.delete(b"3", None);
                let _ = store.commit();
            }
            Err(_) => refused += 1,
        }
    }
    println!("{attached} attached, {refused} refused");
}

/// A line that looks like a record of `seq` in a frame with that nonce: `like` with another extent.
fn forged(like: &[u8; 64], nonce: u32, seq: u64, old: Extent, extent: Extent) -> [u8; 64] {
    let mut raw = *like;
    let (old, new) = (old.pack().unwrap(), extent.pack().unwrap());
    let at = (0..64)
        .step_by(8)
        .find(|at| raw[*at..at + 8] == old.to_le_bytes())
        .unwrap();
    raw[at..at + 8].copy_from_slice(&new.to_le_bytes());
    raw[8..16].copy_from_slice(&seq.to_le_bytes());
    let crc = crc32c_software(nonce, &raw[4..]);
    raw[..4].copy_from_slice(&crc.to_le_bytes());
    raw
}

/// The only extent of a record.
fn extent_of(store: &SimStore, record: &Record) -> Extent {
    let mut extents = record.extents(store.pm(), store.geometry());
    extents.next().unwrap().unwrap()
}

#[test]
fn what_was_in_a_frame_before_is_no_record_of_it() {
    let mut driver = Driver::new(recover(formatted()).unwrap().0);
    // Up to the frame's last line, so that the next one opens another frame.
    for tag in 1..=63 {
        driver.run(&Op::Append { tag, len: 64 }).unwrap();
        driver.run(&Op::Commit).unwrap();
    }
    let log = log_of(&driver.store);
    let last = log.last().unwrap();
    let (mut raw, mut header, mut salt) = ([0; 64], [0; 64], [0; 8]);
    let pm = driver.store.pm();
    pm.read(last.loc.0, &mut raw).unwrap();
    pm.read(last.loc.0 / 4096 * 4096, &mut header).unwrap();
    // As somebody would who can read the mapping: superblock, and the last frame's header.
    pm.read(168, &mut salt).unwrap();
    let epoch = u64::from_le_bytes(header[40..48].try_into().unwrap()) + (1 << 32);
    let mine = extent_of(&driver.store, last);
    // The record frame itself has a hold of each of its records, as an index frame has one.
    let target = Extent::new(last.loc.0 / 4096 * 4096, 64);
    let victim = target.frames().next().unwrap();
    let holds = driver.store.frames().holds(victim);
    let seq = last.seq + 1;
    let mut free = Vec::new();
    while let Some(frame) = driver.store.frames().alloc(None, Need::Reserve) {
        let mut nonce = crc32c_software(0, &salt);
        for word in [frame.off(), seq, epoch] {
            nonce = crc32c_software(nonce, &word.to_le_bytes());
        }
        let line = forged(&raw, nonce.max(1), seq, mine, target);
        let pm = driver.store.pm();
        for at in [5, 62, 63] {
            pm.write(frame.off() + at * 64, &line).unwrap();
        }
        free.push(frame);
    }
    for frame in free {
        driver.store.frames().unhold(frame, 0).unwrap();
    }
    driver.run(&Op::Append { tag: 64, len: 64 }).unwrap();
    driver.run(&Op::Commit).unwrap();
    let log = log_of(&driver.store);
    assert_eq!(log.len(), 64, "{:?}", log.last());
    driver.store.truncate(seq).unwrap();
    while driver.store.drain(1000).unwrap() {}
    driver.store.commit().unwrap();
    assert!(log_of(&driver.store).is_empty());
    assert!(driver.store.frames().holds(victim) <= holds);
    check_space(&driver.store).unwrap();
}

#[test]
fn a_record_whose_list_another_one_has_as_payload_gives_back_what_it_took() {
    let mut driver = Driver::new(recover(formatted()).unwrap().0);
    driver.run(&Op::Append { tag: 1, len: 64 }).unwrap();
    // So many pieces that they are in a list.
    let mut extents = Vec::new();
    for tag in 0..300 {
        extents.extend(driver.fill(&bytes_of(tag, 64)).unwrap());
        driver.fill(&[]).unwrap();
    }
    let args = PutArgs {
        key: Key::None,
        extents: &extents,
        meta: Meta::default(),
        mode: PutMode::Upsert,
        if_seq: None,
    };
    driver.store.put(&args).unwrap();
    driver.store.commit().unwrap();
    assert_eq!(driver.store.stats().list_frames, 1);
    let log = log_of(&driver.store);
    let first = extent_of(&driver.store, &log[0]);
    let image = driver.store.pm().crash_subset(0, &mut Rng(1));
    // Somebody writes to the image: what comes first in the log has the other one's list as payload.
    let listed = extents[200].pack().unwrap().to_le_bytes();
    let mut frame = [0; 4096];
    let mut frames = image.used_frames().into_iter().filter(|at| {
        image.read(at * 4096, &mut frame).unwrap();
        *at != log[0].loc.0 / 4096 && frame.chunks(8).any(|word| word == listed)
    });
    let list = Extent::new(frames.next().unwrap() * 4096, 64);
    let (mut raw, mut header) = ([0; 64], [0; 64]);
    image.read(log[0].loc.0, &mut raw).unwrap();
    image.read(log[0].loc.0 / 4096 * 4096, &mut header).unwrap();
    let nonce = u32::from_le_bytes(header[48..52].try_into().unwrap());
    image.damage(log[0].loc.0, &forged(&raw, nonce, log[0].seq, first, list));

    for read_only in [true, false] {
        let pm = image.clone();
        let frames = HostFrames::new(&probe(&pm).unwrap().superblock.geometry).unwrap();
        let options = RecoverOptions { read_only };
        let work = vec![0; SimStore::WORK_WORDS];
        let (mut store, report) = Store::recover(pm, frames, work, host::list, options).unwrap();
        assert_eq!(report.bad_extents, 0);
        let log = log_of(&store);
        assert_eq!(log.len(), 2);
        assert_eq!(extent_of(&store, &log[0]), list);
        assert_eq!(object_of(&store, &log[1]).len(), 300 * 64);
        if read_only {
            continue;
        }
        // First one, then the other.
        for seq in [log[0].seq, log[1].seq] {
            store.truncate(seq).unwrap();
            while store.drain(1000).unwrap() {}
            store.commit().unwrap();
        }
        check_space(&store).unwrap();
        assert_eq!(store.frames().0.borrow().counts().payload, 0);
        assert_eq!(store.stats().list_frames, 0);
    }
}

#[test]
fn what_is_in_the_key_of_an_undone_put_is_no_record() {
    for how in 0..3 {
        let mut driver = driver();
        let log = log_of(&driver.store);
        let last = *log.last().unwrap();
        let (mut raw, mut header) = ([0; 64], [0; 64]);
        let pm = driver.store.pm();
        pm.read(last.loc.0, &mut raw).unwrap();
        pm.read(last.loc.0 / 4096 * 4096, &mut header).unwrap();
        let nonce = u32::from_le_bytes(header[48..52].try_into().unwrap());
        let mine = extent_of(&driver.store, &last);
        let target = Extent::new(last.loc.0 / 4096 * 4096, 64);
        let line = forged(&raw, nonce, last.seq, mine, target);
        let key = line.repeat(16);
        let args = PutArgs {
            key: Key::Bytes(&key),
            extents: &[],
            meta: Meta::default(),
            mode: PutMode::Upsert,
            if_seq: None,
        };
        let store = &mut driver.store;
        let mut want = log.len();
        match how {
            0 => {
                store.put(&args).unwrap();
                store.put(&args).unwrap();
                want += 1;
            }
            1 => {
                store.put(&args).unwrap();
                store.delete(&key, None).unwrap();
            }
            _ => {
                store.begin_atomic().unwrap();
                store.put(&args).unwrap();
                store.abort();
            }
        }
        store.commit().unwrap();
        assert_eq!(log_of(store).len(), want, "{how}");
        check_space(store).unwrap();
        store.truncate(u64::MAX >> 2).unwrap();
        while store.drain(1000).unwrap() {}
        store.commit().unwrap();
        check_space(store).unwrap();
    }
}

#[test]
fn a_read_only_attach_changes_nothing_durable() {
    let mut driver = driver();
    driver.run(&put("a", 1, 64)).unwrap();
    driver.run(&Op::Commit).unwrap();
    driver.run(&put("a", 2, 64)).unwrap();
    driver.run(&Op::Commit).unwrap();
    let image = driver.store.pm().crash_subset(0, &mut Rng(0));
    let geo = *driver.store.geometry();
    image.reset_counts();
    let frames = host::HostFrames::new(&geo).unwrap();
    let options = RecoverOptions { read_only: true };
    let work = vec![0; SimStore::WORK_WORDS];
    let (mut store, report) = Store::recover(image, frames, work, host::list, options).unwrap();
    assert_eq!((report.keys, report.superseded), (1, 1));
    assert_eq!(store.pm().counts().lines, 0);
    assert_eq!(store.delete(b"a", None), Err(Error::ReadOnly));
    check(&store, &driver.model).unwrap();
}

#[test]
fn compaction_has_room_for_extents_that_no_list_takes_any_more() {
    let mut driver = driver();
    // As many as fit a record frame while their extents are in lists; then pieces
    // come to lie side by side.
    for n in 0..31u64 {
        let bytes = bytes_of(n + 10, 69 * 8 + 4096);
        let mut pieces = [0; 4096];
        for (at, piece) in bytes[..69 * 8].chunks(8).enumerate() {
            pieces[at * 16..][..8].copy_from_slice(piece);
        }
        let off = driver.fill(&pieces).unwrap()[0].off;
        let mut extents: Vec<_> = (0..69).map(|at| Extent::new(off + at * 16, 8)).collect();
        extents.extend(driver.fill(&bytes[69 * 8..]).unwrap());
        let key = format!("{n:064}").into_bytes();
        let (tag, len) = (n + 10, bytes.len());
        driver.model.staged(&Op::Put {
            key: key.clone(),
            tag,
            len,
        });
        let args = PutArgs {
            key: Key::Bytes(&key),
            extents: &extents,
            meta: Meta {
                payload_crc: Some(crc32c_software(0, &bytes)),
                ..Meta::default()
            },
            mode: PutMode::Upsert,
            if_seq: None,
        };
        driver.store.put(&args).unwrap();
    }
    driver.run(&Op::Commit).unwrap();
    driver.run(&Op::Recover).unwrap();
    for op in [Op::Compact, Op::Sync, put("a", 9, 64), Op::Commit] {
        driver.run(&op).unwrap();
    }
    check(&driver.store, &driver.model).unwrap();
}

#[test]
fn a_number_that_was_told_is_never_given_again() {
    for atomic in [false, true] {
        let mut driver = Driver::new(recover(formatted()).unwrap().0);
        driver.run(&put("a", 1, 64)).unwrap();
        driver.run(&Op::Commit).unwrap();
        if atomic {
            driver.store.begin_atomic().unwrap();
            driver.run(&put("c", 4, 64)).unwrap();
            driver.run(&put("d", 5, 64)).unwrap();
        }
        driver.run(&put("b", 2, 64)).unwrap();
        let told = driver.store.delete(b"b", None).unwrap();
        driver.store.commit().unwrap();
        assert_eq!(driver.store.stats().durable_seq, told);
        let image = driver.store.pm().crash_subset(0, &mut Rng(0));
        let mut again = Driver::new(recover(image).unwrap().0);
        again.run(&put("c", 3, 64)).unwrap();
        again.run(&Op::Commit).unwrap();
        let log = log_of(&again.store);
        assert!(log.last().unwrap().seq > told, "{told} again: {log:?}");
    }
}

#[test]
fn an_object_has_up_to_1_gib_in_up_to_2_to_18_extents() {
    type MemoryStore = Store<Memory, HostFrames, Vec<u64>>;
    let open = |pm: Memory| -> MemoryStore {
        let geo = probe(&pm).unwrap().superblock.geometry;
        let frames = HostFrames::new(&geo).unwrap();
        let work = vec![0; MemoryStore::WORK_WORDS];
        let options = RecoverOptions::default();
        let (store, report) = Store::recover(pm, frames, work, host::list, options).unwrap();
        assert_eq!((report.torn, report.bad_extents), (0, 0));
        store
    };
    let pm = Memory::new((2 << 30) + (256 << 20));
    format(&pm, &params()).unwrap();
    let mut store = open(pm);
    // Every second frame, so that no two extents are one.
    let mut frames = Vec::new();
    let mut extents = Vec::new();
    for nr in 0..=2 * (1u64 << 18) {
        let frame = store.frames().alloc(None, Need::New).unwrap();
        if nr % 2 == 0 {
            store.pm().store(frame.off() + 8, nr).unwrap();
            extents.push(Extent::new(frame.off(), 4096));
        }
        frames.push(frame);
    }
    fn args(extents: &[Extent]) -> PutArgs<'_> {
        PutArgs {
            key: Key::Bytes(b"large"),
            extents,
            meta: Meta::default(),
            mode: PutMode::Upsert,
            if_seq: None,
        }
    }
    assert_eq!(store.put(&args(&extents)), Err(Error::TooBig));
    // As many bytes, in one extent too many.
    let last = extents.len() - 2;
    let mut split = extents.clone();
    split[last] = Extent::new(extents[last].off, 4095);
    split[last + 1] = Extent::new(extents[last + 1].off, 1);
    assert_eq!(store.put(&args(&split)), Err(Error::TooBig));
    extents.pop();
    store.put(&args(&extents)).unwrap();
    store.commit().unwrap();
    for frame in frames {
        store.frames().unhold(frame, 0).unwrap();
    }
    let (closed, pm, _, _) = store.close();
    closed.unwrap();

    let mut store = open(pm);
    let record = store.record(store.lookup(b"large").unwrap().unwrap());
    let record = record.unwrap();
    assert_eq!((record.len, record.nr_extents), (1 << 30, 1 << 18));
    let mut word = [0; 8];
    for nr in [0, 1, 1000, 100_001, (1 << 18) - 1] {
        let read = record.read(store.pm(), store.geometry(), nr * 4096 + 8, &mut word);
        assert_eq!((read, u64::from_le_bytes(word)), (Ok(8), 2 * u64::from(nr)));
    }
    let counts = store.frames().0.borrow().counts();
    assert_eq!((counts.payload, counts.slack), (1 << 18, 0));
    store.delete(b"large", None).unwrap();
    store.commit().unwrap();
    assert_eq!(store.stats().live_bytes, 0);
    assert_eq!(store.stats().list_frames, 0);
}
