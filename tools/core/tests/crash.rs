// SPDX-License-Identifier: GPL-2.0

//! The promise: nothing acknowledged is lost, nothing half-written is seen.

mod common;
use common::*;
use pmskb_core::sim::{Rng, SimPm};
use pmskb_core::*;

/// Checks one image: recovers it, compares it with what is allowed, recovers it
/// again after a crash during the recovery, and uses it.
fn check_image(image: SimPm, model: &Model, rng: &mut Rng) -> std::result::Result<u64, String> {
    let mut states = 1;
    let again = image.clone();
    let (store, report) = recover(image).map_err(|error| format!("recovery: {error:?}"))?;
    check(&store, model)?;
    if report.damaged_frames + report.bad_extents > 0 {
        return Err(format!("a crash is taken for damage: {report:?}"));
    }
    if rng.below(4) == 0 {
        let events = store.pm().counts().events;
        again.stop_at(rng.below(events + 1));
        // The image is what matters; recovery may fail at the stop or succeed.
        let crashed = {
            let geo = probe(&again)
                .map_err(|error| format!("{error:?}"))?
                .superblock
                .geometry;
            let frames = host::HostFrames::new(&geo).unwrap();
            let work = vec![0; SimStore::WORK_WORDS];
            let _ = Store::recover(&again, frames, work, host::list, RecoverOptions::default());
            again.crash_torn(rng)
        };
        let (store, _) = recover(crashed).map_err(|error| format!("second: {error:?}"))?;
        check(&store, model).map_err(|error| format!("after a second crash: {error}"))?;
        states += 1;
    }
    if rng.below(8) == 0 {
        let mut driver = Driver::new(store);
        driver.model = model.clone();
        settle(&driver.store, &mut driver.model);
        let op = Op::Put {
            key: b"after".to_vec(),
            tag: 0xaf7e4,
            len: 100,
        };
        driver
            .run(&op)
            .map_err(|error| format!("put after: {error:?}"))?;
        driver
            .run(&Op::Commit)
            .map_err(|error| format!("commit after: {error:?}"))?;
        check(&driver.store, &driver.model).map_err(|error| format!("use after: {error}"))?;
    }
    Ok(states)
}

/// All crash points of `ops`, all subsets of up to `exhaustive` lines.
fn crash_everywhere(ops: &[Op], exhaustive: usize, sample: u64, seed: u64) -> u64 {
    crash_after(ops, 0, exhaustive, sample, seed)
}

/// The same for crashes after the first `before` operations.
fn crash_after(ops: &[Op], before: usize, exhaustive: usize, sample: u64, seed: u64) -> u64 {
    let (store, _) = recover(formatted()).unwrap();
    let mut first = Driver::new(store);
    for op in &ops[..before] {
        first.run(op).unwrap();
    }
    let (model, ops) = (first.model, &ops[before..]);
    let (done, base, _, _) = first.store.close();
    done.unwrap();
    let run = |stop: u64| -> Driver {
        let (store, _) = recover(base.clone()).unwrap();
        store.pm().reset_counts();
        store.pm().stop_at(stop);
        let mut driver = Driver::new(store);
        driver.model = model.clone();
        for op in ops {
            if driver.run(op).is_err() {
                break;
            }
        }
        driver
    };
    let events = run(u64::MAX).store.pm().counts().events;
    let mut states = 0;
    let mut rng = Rng(seed);
    for stop in 0..=events {
        let driver = run(stop);
        let pm = driver.store.pm();
        let lines = pm.unsafe_lines().len();
        let fail = |what: String, how: String| -> ! {
            panic!("{what}\n  {how}, stopped at event {stop} of {events}\n  {ops:?}")
        };
        let subsets = if lines <= exhaustive {
            1u64 << lines
        } else {
            0
        };
        for kept in 0..subsets {
            match check_image(pm.crash_subset(kept, &mut rng), &driver.model, &mut rng) {
                Ok(count) => states += count,
                Err(what) => fail(what, format!("subset {kept:#x} of {lines} lines")),
            }
        }
        let torn = if subsets == 0 { sample } else { sample / 4 };
        for _ in 0..torn {
            let seed = rng.0;
            match check_image(pm.crash_torn(&mut rng), &driver.model, &mut rng) {
                Ok(count) => states += count,
                Err(what) => fail(what, format!("torn, seed {seed:#x}")),
            }
        }
    }
    states
}

fn put(key: &str, tag: u64, len: usize) -> Op {
    Op::Put {
        key: key.into(),
        tag,
        len,
    }
}

fn delete(key: &str) -> Op {
    Op::Delete { key: key.into() }
}

#[test]
fn acknowledged_inserts_survive_every_crash() {
    let ops = [put("a", 1, 100), Op::Commit, put("b", 2, 200), Op::Commit];
    println!("{} states", crash_everywhere(&ops, 10, 40, 1));
}

#[test]
fn a_replaced_key_has_its_old_or_new_value_after_every_crash() {
    let ops = [
        put("a", 1, 100),
        Op::Commit,
        put("a", 2, 130),
        Op::Commit,
        put("a", 3, 70),
        Op::Commit,
        Op::Sync,
    ];
    println!("{} states", crash_everywhere(&ops, 10, 40, 2));
}

#[test]
fn a_deleted_key_stays_deleted_and_no_older_value_comes_back() {
    let ops = [
        put("a", 1, 64),
        Op::Commit,
        put("a", 2, 64),
        Op::Commit,
        delete("a"),
        Op::Commit,
        put("b", 3, 64),
        Op::Commit,
        Op::Sync,
    ];
    println!("{} states", crash_everywhere(&ops, 10, 40, 3));
}

#[test]
fn every_record_of_a_batch_is_whole_or_absent() {
    let ops = [
        put("a", 1, 60),
        Op::Append { tag: 2, len: 64 },
        Op::PutKeyExtent {
            key: b"in the packet".to_vec(),
            tag: 3,
            len: 90,
        },
        Op::Commit,
        put("a", 4, 60),
        delete("in the packet"),
        Op::Append { tag: 5, len: 0 },
        Op::Commit,
    ];
    println!("{} states", crash_everywhere(&ops, 8, 60, 4));
}

#[test]
fn an_atomic_batch_is_there_as_a_whole_or_not_at_all() {
    let ops = [
        put("a", 1, 60),
        Op::Append { tag: 2, len: 64 },
        Op::Commit,
        Op::Atomic(vec![put("a", 3, 64), delete("b"), put("c", 4, 64)]),
        Op::Atomic(vec![delete("a"), Op::Append { tag: 5, len: 64 }]),
        put("d", 6, 64),
        Op::Commit,
    ];
    println!("{} states", crash_everywhere(&ops, 8, 60, 8));
}

#[test]
fn an_atomic_batch_that_begins_a_frame_is_there_as_a_whole_or_not_at_all() {
    // After an attach what is put goes to a new frame; what is deleted is in another one.
    let both = Op::Atomic(vec![delete("x"), put("y", 2, 8)]);
    let ops = [put("x", 1, 8), Op::Commit, both];
    crash_after(&ops, 2, 10, 400, 20);
}

#[test]
fn numbers_that_were_told_are_never_given_out_again() {
    // Frames of 31 records, that are emptied while the next one has none yet, or none that stays.
    let many = |n: u64| (0..n).map(|n| put(&format!("{n}"), n, 8));
    let none = |n: u64| (0..n).map(|n| delete(&format!("{n}")));
    for (first, again) in [(31, 1), (30, 2), (31, 31), (31, 40)] {
        let mut ops: Vec<_> = many(first).chain([Op::Commit]).collect();
        ops.extend(none(first).chain([Op::Commit]));
        // Undone in the commit in which it was put.
        ops.extend(many(again).chain(none(again)).chain([Op::Commit, Op::Sync]));
        ops.extend(many(1).chain([Op::Commit, Op::Sync]));
        let before = first as usize;
        for at in [0, before + 1, 2 * before + 2] {
            crash_after(&ops[..], at, 4, 30, 21);
        }
    }
}

#[test]
fn a_batch_number_that_somebody_made_up_stops_no_later_batch() {
    let (store, _) = recover(formatted()).unwrap();
    let salt = store.superblock().salt;
    let mut driver = Driver::new(store);
    let atomic = |n: u64| Op::Atomic(vec![put("a", n, 100), put("b", 100 + n, 100)]);
    driver.run(&atomic(0)).unwrap();
    let mut rng = Rng(17);
    let image = driver.store.pm().crash_subset(0, &mut rng);
    // It is in force in one of the areas, which are two and five frames long.
    let areas = [0, 1].map(|area| (area, (2 + 5 * area) * FRAME_SIZE));
    let (area, off) = areas
        .into_iter()
        .find(|(_, off)| image.load(*off) != Ok(0))
        .unwrap();
    let mut raw = [0; 64];
    image.read(off, &mut raw).unwrap();
    let mut pairs = vec![0; 16 * raw[16] as usize];
    image.read(off + 64, &mut pairs).unwrap();
    let sum = |raw: &[u8; 64]| {
        let crc = crc32c_software(crc32c_software(0, &salt.to_le_bytes()), &raw[4..]);
        crc32c_software(crc, &crc32c_software(0, &pairs).to_le_bytes()).to_le_bytes()
    };
    assert_eq!(raw[..4], sum(&raw));
    raw[8..16].copy_from_slice(&((1u64 << 63) - 2 + area).to_le_bytes());
    let crc = sum(&raw);
    raw[..4].copy_from_slice(&crc);
    image.damage(off, &raw);

    let (store, report) = recover(image).unwrap();
    assert_eq!(report.replayed, 2);
    check(&store, &driver.model).unwrap();
    let mut later = Driver::new(store);
    later.model = driver.model.clone();
    settle(&later.store, &mut later.model);
    for n in 1..6 {
        later.run(&atomic(n)).unwrap();
        for _ in 0..50 {
            let image = later.store.pm().crash_torn(&mut rng);
            check_image(image, &later.model, &mut rng).unwrap();
        }
    }
}

#[test]
fn a_crash_in_recovery_after_a_compaction_is_no_damage() {
    let mut rng = Rng(19);
    for fence in 0.. {
        let (store, _) = recover(formatted()).unwrap();
        let mut driver = Driver::new(store);
        for n in 0..120 {
            driver.run(&put(&format!("{n}"), n, 8)).unwrap();
        }
        driver.run(&Op::Commit).unwrap();
        for n in (0..120).filter(|n| n % 9 != 0) {
            driver.run(&delete(&format!("{n}"))).unwrap();
        }
        driver.run(&Op::Commit).unwrap();
        driver.store.pm().reset_counts();
        driver.store.pm().stop_at_fence(fence);
        let done = driver.run(&Op::Compact).is_ok();
        // What was moved is not killed where it was; its frame is out of use by its header, and
        // recovery may put the index there.
        let base = driver.store.pm().crash_subset(!0, &mut rng);
        let events = recover(base.clone()).unwrap().0.pm().counts().events;
        for stop in 0..=events {
            let image = base.clone();
            image.stop_at(stop);
            let geo = probe(&image).unwrap().superblock.geometry;
            let frames = host::HostFrames::new(&geo).unwrap();
            let work = vec![0; SimStore::WORK_WORDS];
            let _ = Store::recover(&image, frames, work, host::list, RecoverOptions::default());
            for _ in 0..20 {
                let crashed = image.crash_torn(&mut rng);
                check_image(crashed, &driver.model, &mut rng).unwrap();
            }
        }
        if done {
            assert!(driver.store.stats().moved_records > 0 && fence > 2);
            break;
        }
    }
}

#[test]
fn a_recovery_that_is_given_up_is_as_good_as_none() {
    let (store, _) = recover(formatted()).unwrap();
    let mut driver = Driver::new(store);
    for n in 0..40 {
        driver.run(&put(&format!("{}", n % 25), n, 30)).unwrap();
        driver
            .run(&Op::Append {
                tag: 100 + n,
                len: 8,
            })
            .unwrap();
        driver.run(&Op::Commit).unwrap();
        if n == 20 {
            driver.run(&Op::Truncate).unwrap();
        }
    }
    let both = Op::Atomic(vec![put("3", 200, 9), put("new", 201, 9)]);
    driver.run(&both).unwrap();
    let mut rng = Rng(18);
    for _ in 0..5 {
        let base = driver.store.pm().crash_torn(&mut rng);
        let mut given_up = 0;
        loop {
            let image = base.clone();
            image.give_up_after(given_up);
            let geo = probe(&image).unwrap().superblock.geometry;
            let frames = host::HostFrames::new(&geo).unwrap();
            let work = vec![0; SimStore::WORK_WORDS];
            let tried = Store::recover(&image, frames, work, host::list, RecoverOptions::default());
            match tried {
                Err(Error::Interrupted) => (),
                other => break drop(other.unwrap()),
            }
            image.give_up_after(u64::MAX);
            let crashed = image.crash_torn(&mut rng);
            check_image(crashed, &driver.model, &mut rng).unwrap();
            let (store, _) = recover(image).unwrap();
            check(&store, &driver.model).unwrap();
            given_up += 7;
        }
        assert!(given_up > 100, "{given_up}");
    }
}

#[test]
fn an_aborted_batch_leaves_nothing() {
    let ops = [
        put("a", 1, 60),
        Op::Abort(vec![put("a", 2, 64), put("b", 3, 64)]),
        Op::Atomic(vec![put("a", 4, 64), put("b", 5, 64)]),
        Op::Sync,
    ];
    println!("{} states", crash_everywhere(&ops, 8, 40, 9));
}

#[test]
fn bytes_that_were_durable_need_no_first_fence() {
    let ops = [
        Op::AppendDurable { tag: 1, len: 640 },
        Op::Commit,
        Op::AppendDurable { tag: 2, len: 64 },
        Op::AppendDurable { tag: 3, len: 5000 },
        Op::Commit,
        put("a", 4, 64),
        Op::AppendDurable { tag: 5, len: 64 },
        Op::Commit,
        put("a", 6, 64),
        Op::Commit,
        Op::AppendDurable { tag: 7, len: 64 },
        Op::Commit,
    ];
    println!("{} states", crash_everywhere(&ops, 8, 40, 13));
}

#[test]
fn a_truncated_log_stays_truncated_and_keys_stay() {
    let ops = [
        put("a", 1, 60),
        Op::Append { tag: 2, len: 64 },
        Op::Append { tag: 3, len: 64 },
        Op::Commit,
        Op::Truncate,
        Op::Append { tag: 4, len: 64 },
        Op::Commit,
        Op::Recover,
        Op::Truncate,
        Op::Sync,
    ];
    println!("{} states", crash_everywhere(&ops, 8, 40, 10));
}

#[test]
fn compaction_loses_and_doubles_nothing_at_any_crash() {
    let mut ops = Vec::new();
    // Three record frames, of which little stays alive.
    for n in 0..70 {
        ops.push(put(&format!("k{n}"), n, 40));
    }
    ops.push(Op::Append { tag: 100, len: 30 });
    ops.push(Op::Commit);
    ops.extend(
        (0..70)
            .filter(|n| n % 16 != 3)
            .map(|n| delete(&format!("k{n}"))),
    );
    ops.extend([Op::Commit, Op::Sync]);
    let before = ops.len();
    ops.extend([Op::Compact, put("z", 200, 50), Op::Commit, Op::Sync]);
    println!("{} states", crash_after(&ops, before, 8, 40, 11));
}

#[test]
fn what_an_earlier_record_frame_left_in_a_frame_does_not_count() {
    let (store, _) = recover(formatted()).unwrap();
    let mut driver = Driver::new(store);
    let run = |driver: &mut Driver, op: Op| driver.run(&op).unwrap();
    for n in 0..63 {
        run(&mut driver, put(&format!("{n}"), n, 8));
    }
    run(&mut driver, put("next", 100, 8));
    run(&mut driver, Op::Commit);
    let first = log_of(&driver.store)[0].loc.0 / FRAME_SIZE;
    // Sparse (31 records of two lines fill a frame): its last record moves, and then the
    // only free frame is the one it left.
    let keep = |n: &u64| n % 31 == 30;
    for n in (0..63).filter(|n| !keep(n)) {
        run(&mut driver, delete(&format!("{n}")));
    }
    run(&mut driver, Op::Commit);
    run(&mut driver, put("more", 101, 8));
    for n in 0..70 {
        run(&mut driver, put(&format!("other {n}"), 200 + n, 8));
    }
    run(&mut driver, Op::Commit);
    for n in 0..70 {
        run(&mut driver, delete(&format!("other {n}")));
    }
    for round in 0..2 {
        run(&mut driver, Op::Commit);
        run(&mut driver, Op::Compact);
        run(&mut driver, Op::Sync);
        let at = log_of(&driver.store)[0].loc.0 / FRAME_SIZE;
        assert_eq!(at == first, round == 1, "moved to {at}");
        if round == 0 {
            for n in 0..70 {
                run(&mut driver, put(&format!("third {n}"), 300 + n, 8));
            }
            run(&mut driver, Op::Commit);
            for n in 1..70 {
                run(&mut driver, delete(&format!("third {n}")));
            }
            run(&mut driver, Op::Commit);
            run(&mut driver, Op::Sync);
            // All frames are taken but that one; and what moved is sparse again.
            let frames = driver.store.frames();
            let mut all = Vec::new();
            while let Some(frame) = frames.alloc(None, Need::Reserve) {
                all.push(frame);
            }
            let free = all
                .iter()
                .position(|frame| u64::from(frame.0) == first)
                .unwrap();
            frames.unhold(all.swap_remove(free), 0).unwrap();
            run(&mut driver, delete("30"));
        }
    }
    let mut rng = Rng(12);
    for _ in 0..200 {
        let image = driver.store.pm().crash_torn(&mut rng);
        check_image(image, &driver.model, &mut rng).unwrap();
    }
}

#[test]
fn the_same_key_twice_in_a_batch_is_as_good_as_one_by_one() {
    let ops = [
        put("a", 1, 64),
        put("a", 2, 64),
        delete("a"),
        put("a", 3, 64),
        Op::Commit,
    ];
    println!("{} states", crash_everywhere(&ops, 8, 40, 5));
}

#[test]
fn objects_with_extent_lists_are_whole_or_absent() {
    // Every second frame, so that nothing is merged: more than fit in a record.
    let base = formatted();
    let run = |stop: u64| {
        let (store, _) = recover(base.clone()).unwrap();
        store.pm().reset_counts();
        store.pm().stop_at(stop);
        let mut driver = Driver::new(store);
        let _ = list_put(&mut driver, 7, 70);
        let _ = list_put(&mut driver, 8, 66);
        driver
    };
    let events = run(u64::MAX).store.pm().counts().events;
    let mut rng = Rng(6);
    let mut states = 0;
    for stop in (0..=events).filter(|stop| stop % 7 == 0 || events - stop < 40) {
        let driver = run(stop);
        for _ in 0..6 {
            let image = driver.store.pm().crash_torn(&mut rng);
            states += check_image(image, &driver.model, &mut rng).unwrap();
        }
    }
    println!("{states} states");
}

fn list_put(driver: &mut Driver, tag: u64, pieces: usize) -> Result<()> {
    let bytes = bytes_of(tag, pieces * 16);
    let op = Op::Put {
        key: b"list".to_vec(),
        tag,
        len: bytes.len(),
    };
    driver.model.staged(&op);
    let mut extents = Vec::new();
    for part in bytes.chunks(16) {
        let at = driver.fill(part)?;
        driver.fill(&[0; 8])?;
        extents.push(at[0]);
    }
    let args = PutArgs {
        key: Key::Bytes(b"list"),
        extents: &extents,
        meta: Meta {
            payload_crc: Some(crc32c_software(0, &bytes)),
            ..Meta::default()
        },
        mode: PutMode::Upsert,
        if_seq: None,
    };
    driver.store.put(&args)?;
    driver.run(&Op::Commit)
}

#[test]
fn a_crash_while_formatting_leaves_the_old_store_none_or_the_new_one() {
    let (store, _) = recover(formatted()).unwrap();
    let mut driver = Driver::new(store);
    driver.run(&put("old", 1, 100)).unwrap();
    driver.run(&Op::Commit).unwrap();
    let (old_model, old) = (
        driver.model.clone(),
        driver.store.pm().crash_subset(0, &mut Rng(0)),
    );
    let new = FormatParams {
        uuid: [9; 16],
        salt: 77,
        ..params()
    };
    let count = old.clone();
    count.reset_counts();
    format(&count, &new).unwrap();
    let (mut states, mut rng) = (0, Rng(7));
    for stop in 0..=count.counts().events {
        let pm = old.clone();
        pm.reset_counts();
        pm.stop_at(stop);
        let _ = format(&pm, &new);
        let lines = pm.unsafe_lines().len();
        let subsets = if lines <= 10 { 1u64 << lines } else { 0 };
        let images = (0..subsets).map(|kept| pm.crash_subset(kept, &mut Rng(kept)));
        let images: Vec<_> = images
            .chain((0..20).map(|_| pm.crash_torn(&mut rng)))
            .collect();
        for image in images {
            states += 1;
            match probe(&image) {
                Err(Error::NotFormatted | Error::Damaged) => continue,
                Err(error) => panic!("{error:?} at {stop}"),
                Ok(found) if found.superblock.uuid == new.uuid => {
                    let (store, report) = recover(image).unwrap();
                    assert_eq!(report.records, 0);
                    check(&store, &Model::default()).unwrap();
                }
                Ok(_) => {
                    let (store, _) = recover(image).unwrap();
                    check(&store, &old_model).unwrap();
                }
            }
        }
    }
    println!("{states} states");
}

#[test]
fn what_an_earlier_store_left_in_a_frame_is_no_damage() {
    // A frame with records, and one with truncated ones that was given back.
    let records = [put("a", 1, 100), put("b", 2, 100), Op::Commit];
    earlier_store(&records, &[]);
    let mut log: Vec<_> = (1..80).map(|tag| Op::Append { tag, len: 8 }).collect();
    log.push(Op::Commit);
    let last = Op::Append { tag: 99, len: 8 };
    let gone = [Op::Truncate, last, Op::Commit, Op::Sync];
    earlier_store(&log, &gone);
}

/// A store is used, formatted again, and uses the frame that had its first records for records. Of
/// whole lines only: see `FrameHeader::lost` for headers that are torn.
fn earlier_store(before: &[Op], then: &[Op]) {
    let (store, _) = recover(formatted()).unwrap();
    let mut driver = Driver::new(store);
    for op in before {
        driver.run(op).unwrap();
    }
    let first = log_of(&driver.store)[0].loc.0 / FRAME_SIZE;
    for op in then {
        driver.run(op).unwrap();
    }
    let old = driver.store.pm().crash_subset(0, &mut Rng(0));
    assert_eq!(old.load(first * FRAME_SIZE) == Ok(0), !then.is_empty());
    let new = FormatParams {
        uuid: [9; 16],
        salt: 77,
        ..params()
    };
    format(&old, &new).unwrap();
    let base = old.crash_subset(0, &mut Rng(0));
    let run = |stop: u64, taken: usize| {
        let (store, _) = recover(base.clone()).unwrap();
        store.pm().reset_counts();
        store.pm().stop_at(stop);
        let mut driver = Driver::new(store);
        for _ in 0..taken {
            driver.store.frames().alloc(None, Need::New).unwrap();
        }
        let ops = [Op::Append { tag: 3, len: 0 }, Op::Commit];
        let _ = ops.iter().try_for_each(|op| driver.run(op));
        driver
    };
    // The record frame goes where one was.
    let at = |taken| log_of(&run(u64::MAX, taken).store)[0].loc.0 / FRAME_SIZE;
    let taken = (0..20).find(|taken| at(*taken) == first).unwrap();
    let whole = run(u64::MAX, taken);
    let events = whole.store.pm().counts().events;
    let mut states = 0;
    for stop in 0..=events {
        let driver = run(stop, taken);
        let pm = driver.store.pm();
        let lines = pm.unsafe_lines().len().min(10);
        for image in (0..1 << lines).map(|kept| pm.crash_subset(kept, &mut Rng(kept))) {
            states += 1;
            let (store, report) = recover(image).unwrap();
            check(&store, &driver.model).unwrap();
            assert_eq!(report.damaged_frames, 0, "stopped at {stop}: {report:?}");
        }
    }
    println!("{states} states");
}

#[test]
fn random_histories_with_crashes_keep_the_promise() {
    let rounds = std::env::var("PMSKB_ROUNDS").map_or(60, |n| n.parse().unwrap());
    let seed = std::env::var("PMSKB_SEED").map_or(42, |n| n.parse().unwrap());
    let mut states = 0;
    for round in 0..rounds {
        let mut rng = Rng(seed + round);
        let mut pm = formatted();
        let mut model = Model::default();
        for _ in 0..4 {
            let (store, _) = recover(pm).unwrap();
            store.pm().reset_counts();
            store.pm().stop_at(rng.below(1500));
            let mut driver = Driver::new(store);
            driver.model = model;
            for _ in 0..80 {
                let key = format!("key-{}", rng.below(12)).into_bytes();
                let (tag, len) = (rng.next(), rng.below(300) as usize + 16);
                let op = match rng.below(13) {
                    10 => Op::Atomic(vec![
                        Op::Put {
                            key: key.clone(),
                            tag,
                            len,
                        },
                        Op::Append { tag: tag ^ 1, len },
                        Op::Delete {
                            key: format!("key-{}", rng.below(12)).into_bytes(),
                        },
                    ]),
                    11 => Op::Compact,
                    12 if rng.below(4) == 0 => Op::Truncate,
                    0..4 => Op::Put { key, tag, len },
                    4 => Op::PutKeyExtent {
                        key,
                        tag,
                        len: len * 30,
                    },
                    5 if tag % 2 == 0 => Op::AppendDurable { tag, len },
                    5 => Op::Append { tag, len },
                    6..8 => Op::Delete { key },
                    8 => Op::Commit,
                    _ => Op::Sync,
                };
                if driver.run(&op).is_err() {
                    break;
                }
            }
            for _ in 0..4 {
                let image = driver.store.pm().crash_torn(&mut rng);
                states += check_image(image, &driver.model, &mut rng)
                    .unwrap_or_else(|what| panic!("{what}\n  seed {}", seed + round));
            }
            // Goes on from one of them: what it holds is now the truth.
            pm = driver.store.pm().crash_torn(&mut rng);
            let (store, _) = recover(pm.clone()).unwrap();
            model = driver.model;
            check(&store, &model).unwrap();
            settle(&store, &mut model);
        }
    }
    println!("{states} states");
}

/// Narrows a model down to what the store holds.
fn settle(store: &SimStore, model: &mut Model) {
    let one = Model {
        instead: None,
        ..model.clone()
    };
    match model.instead.take() {
        Some(instead) if check(store, &one).is_err() => *model = *instead,
        _ => (),
    }
    let records = log_of(store);
    let bytes: Vec<_> = records
        .iter()
        .map(|record| {
            (
                record.keyed().then(|| key_of(store, record)),
                object_of(store, record),
            )
        })
        .collect();
    for (key, values) in &mut model.keys {
        let now = bytes.iter().find(|(k, _)| k.as_ref() == Some(key));
        let now = now.and_then(|(_, bytes)| {
            let same = |value: &&(u64, usize)| bytes_of(value.0, value.1) == *bytes;
            values.iter().flatten().find(same).copied()
        });
        *values = vec![now];
    }
    model.log.retain(|tag, (len, acknowledged)| {
        *acknowledged = true;
        bytes
            .iter()
            .any(|(key, bytes)| key.is_none() && bytes_of(*tag, *len) == *bytes)
    });
}
