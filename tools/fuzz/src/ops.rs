// SPDX-License-Identifier: GPL-2.0

//! Operations, clean restarts and power cuts, against the model of the core's tests.

use crate::common::{bytes_of, check, formatted, key_of, log_of, object_of, recover};
use crate::common::{Driver, Model, Op, SimStore};
use arbitrary::{Result, Unstructured};
use pmskb_core::host::{self, HostFrames};
use pmskb_core::sim::{Rng, SimPm};
use pmskb_core::{probe, Error, Key, Meta, PutArgs, PutMode, RecoverOptions, Store};

/// More of them would only make it slow.
const MAX_OPS: usize = 100;
/// Of an atomic batch.
const MAX_BATCH: u64 = 5;
/// What one power cut may leave: so many of the images are looked at.
const IMAGES: usize = 4;

thread_local! {
    static BASE: SimPm = formatted();
}

pub fn run(data: &[u8]) {
    let base = BASE.with(SimPm::clone);
    let (store, _) = recover(base).unwrap();
    let mut driver = Driver::new(store);
    let mut input = Unstructured::new(data);
    for tag in 1..=MAX_OPS as u64 {
        if input.is_empty() {
            break;
        }
        match step(driver, &mut input, tag) {
            Some(next) => driver = next,
            None => return,
        }
    }
    if let Err(stopped) = settle(driver) {
        power_cut(stopped, 0);
    }
}

/// Commits, gives all space back that can be, and compares with the model.
fn settle(mut driver: Driver) -> std::result::Result<Driver, Driver> {
    driver = act(driver, &Op::Commit)?;
    loop {
        match driver.store.drain(100) {
            Ok(true) => (),
            Ok(false) => break,
            Err(Error::Io) => return Err(driver),
            Err(error) => panic!("drain: {error:?}"),
        }
    }
    driver = act(driver, &Op::Sync)?;
    verify(&driver.store, &driver.model, "after a commit");
    Ok(driver)
}

fn verify(store: &SimStore, model: &Model, when: &str) {
    if let Err(what) = check(store, model) {
        panic!("{what}, {when}");
    }
}

/// Runs one operation; a full store refuses it, and nothing else does. The driver comes
/// back as an error if the power fails in the middle.
fn act(mut driver: Driver, op: &Op) -> std::result::Result<Driver, Driver> {
    let mut before = driver.model.clone();
    match driver.run(op) {
        Ok(()) => Ok(driver),
        // What fails then is the simulated memory.
        Err(Error::Io) => Err(driver),
        Err(Error::NoSpace) if !matches!(op, Op::Commit | Op::Sync | Op::Truncate) => {
            if matches!(op, Op::Atomic(_) | Op::Abort(_) | Op::Compact) {
                // What was staged before it is committed.
                driver.store.abort();
                driver.let_go();
                before.committed();
            }
            driver.model = before;
            Ok(driver)
        }
        Err(error) => panic!("{op:?}: {error:?}"),
    }
}

/// Few, so that operations meet: but of all kinds.
fn key(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let n = input.arbitrary::<u8>()?;
    Ok(match n % 16 {
        0 => vec![],
        1 => [&[7; 900][..], &[n]].concat(),
        2 => vec![0; usize::from(n / 16)],
        3 => format!("key {}", n / 16).into_bytes(),
        n => vec![b'a' + n % 4],
    })
}

fn len(input: &mut Unstructured<'_>) -> Result<usize> {
    let lens = [8, 64, 100, 100, 1000, 4096, 5000, 60_000];
    Ok(*input.choose(&lens)?)
}

/// Something to stage.
fn change(input: &mut Unstructured<'_>, tag: u64) -> Result<Op> {
    Ok(match input.int_in_range(0..=15u8)? {
        0..=5 => Op::Put {
            key: key(input)?,
            tag,
            len: len(input)?,
        },
        6 => match key(input)? {
            key if key.is_empty() => Op::Delete { key },
            key => Op::PutKeyExtent {
                key,
                tag,
                len: len(input)?,
            },
        },
        7 => Op::PutPieces {
            key: key(input)?,
            tag,
            pieces: *input.choose(&[2, 64, 70])?,
        },
        8..=10 => Op::Append {
            tag,
            len: len(input)?,
        },
        _ => Op::Delete { key: key(input)? },
    })
}

fn batch(input: &mut Unstructured<'_>, tag: u64) -> Result<Vec<Op>> {
    // One alone is as good as not atomic: a change, committed.
    let count = *input.choose(&[1, 1, 2, 2, 3, MAX_BATCH])?;
    (0..count).map(|n| change(input, tag + n)).collect()
}

/// One step; `None` when there is no more input.
fn step(driver: Driver, input: &mut Unstructured<'_>, nr: u64) -> Option<Driver> {
    let tag = nr * (MAX_BATCH + 3);
    let done = match input.int_in_range(0..=31u8).ok()? {
        0..=8 => act(driver, &change(input, tag).ok()?),
        9..=12 => act(driver, &Op::Commit),
        13..=16 => act(driver, &Op::Atomic(batch(input, tag).ok()?)),
        17 => act(driver, &Op::Abort(batch(input, tag).ok()?)),
        18 => with_seq(driver, &key(input).ok()?, tag),
        19 => act(driver, &Op::Sync),
        20 => settle(driver),
        21 => act(driver, &Op::Recover),
        22 => Ok(restart(driver)),
        23 => truncate(driver, input.arbitrary().ok()?),
        24 => drain(driver, input.arbitrary().ok()?),
        25 | 26 => act(driver, &Op::Compact),
        27 | 28 => Err(driver),
        29 => {
            // So many stores, flushes and fences from here.
            let pm = driver.store.pm();
            pm.stop_at(pm.counts().events + u64::from(input.arbitrary::<u8>().ok()?));
            Ok(driver)
        }
        30 => cut_in(
            driver,
            &Op::Atomic(batch(input, tag).ok()?),
            input.arbitrary().ok()?,
        ),
        _ => {
            let fences = input.int_in_range(0..=7u8).ok()?;
            Ok(arm(driver, fences))
        }
    };
    Some(match done {
        Ok(driver) => driver,
        Err(stopped) => power_cut(stopped, input.arbitrary().ok()?),
    })
}

/// The power fails instead of one of the next fences.
fn arm(driver: Driver, fences: u8) -> Driver {
    let pm = driver.store.pm();
    pm.stop_at_fence(pm.counts().fences + u64::from(fences));
    driver
}

/// As [`act`], and at a fence of it the power fails.
fn cut_in(driver: Driver, op: &Op, which: u8) -> std::result::Result<Driver, Driver> {
    let driver = act(driver, &Op::Commit)?;
    act(arm(driver, which % 3), op)
}

/// Changes of one key that depend on the number of its record: the wrong ones are
/// refused, whether what they go by is committed or staged.
fn with_seq(mut driver: Driver, key: &[u8], tag: u64) -> std::result::Result<Driver, Driver> {
    let mut now = match driver.store.lookup(key) {
        Ok(Some(loc)) if driver.store.staged() == 0 => {
            driver.store.record(loc).map_or(0, |record| record.seq)
        }
        Ok(None) if driver.store.staged() == 0 => 0,
        // The first put says it.
        _ => u64::MAX,
    };
    for n in 0..3 {
        let before = driver.model.clone();
        let op = Op::Put {
            key: key.to_vec(),
            tag: tag + n,
            len: 64,
        };
        driver.model.staged(&op);
        let done = put_if(&mut driver, key, tag + n, now);
        now = match done {
            Ok(seq) => seq,
            Err(Error::Io) => return Err(driver),
            Err(Error::NoSpace) => {
                driver.model = before;
                return Ok(driver);
            }
            Err(error) => panic!("a put if {now}: {error:?}"),
        };
    }
    assert_eq!(
        driver.store.delete(key, Some(now + 1)),
        Err(Error::Stale),
        "a delete of another record"
    );
    driver.model.staged(&Op::Delete { key: key.to_vec() });
    match driver.store.delete(key, Some(now)) {
        Err(Error::Io) => Err(driver),
        done => {
            assert_eq!(done, Ok(now), "a delete of the right record");
            Ok(driver)
        }
    }
}

/// Puts if the key's record is `now` (`u64::MAX`: whatever it is), after it was refused
/// with another number.
fn put_if(driver: &mut Driver, key: &[u8], tag: u64, now: u64) -> pmskb_core::Result<u64> {
    let bytes = bytes_of(tag, 64);
    let extents = driver.fill(&bytes)?;
    let args = |if_seq| PutArgs {
        key: Key::Bytes(key),
        extents: &extents,
        meta: Meta {
            payload_crc: Some(pmskb_core::crc32c_software(0, &bytes)),
            ..Meta::default()
        },
        mode: PutMode::Upsert,
        if_seq,
    };
    if now == u64::MAX {
        return driver.store.put(&args(None)).map(|done| done.seq);
    }
    for wrong in [now + 1, now.saturating_sub(1), 0] {
        if wrong == now {
            continue;
        }
        match driver.store.put(&args(Some(wrong))) {
            Err(Error::Io) => return Err(Error::Io),
            done => assert_eq!(done, Err(Error::Stale), "a put if {wrong}, but it is {now}"),
        }
    }
    driver.store.put(&args(Some(now))).map(|done| done.seq)
}

/// Truncates the log at one of its records. Nothing is drained yet.
fn truncate(driver: Driver, which: u8) -> std::result::Result<Driver, Driver> {
    let mut driver = act(driver, &Op::Commit)?;
    let records = log_of(&driver.store);
    let log: Vec<_> = records.iter().filter(|record| !record.keyed()).collect();
    if log.is_empty() {
        return Ok(driver);
    }
    let to = log[usize::from(which) % log.len()].seq;
    let mut after = driver.model.clone();
    for record in log.iter().filter(|record| record.seq <= to) {
        let bytes = object_of(&driver.store, record);
        after
            .log
            .retain(|tag, (len, _)| bytes_of(*tag, *len) != bytes);
    }
    driver.model.instead = Some(Box::new(after));
    match driver.store.truncate(to) {
        Ok(()) => {
            driver.settle_instead();
            Ok(driver)
        }
        Err(Error::Io) => Err(driver),
        Err(error) => panic!("truncate to {to}: {error:?}"),
    }
}

fn drain(mut driver: Driver, budget: u8) -> std::result::Result<Driver, Driver> {
    match driver.store.drain(u32::from(budget % 8) + 1) {
        Ok(_) => Ok(driver),
        Err(Error::Io) => Err(driver),
        Err(error) => panic!("drain: {error:?}"),
    }
}

fn restart(driver: Driver) -> Driver {
    let mut driver = match act(driver, &Op::Commit) {
        Ok(driver) => driver,
        Err(stopped) => return power_cut(stopped, 1),
    };
    driver.let_go();
    let model = driver.model;
    let (closed, pm, ..) = driver.store.close();
    if closed == Err(Error::Io) {
        return powered_up(pm.crash_torn(&mut Rng(2)), &model);
    }
    assert_eq!(closed, Ok(()));
    pm.stop_at(u64::MAX);
    pm.stop_at_fence(u64::MAX);
    let (store, report) = recover(pm).expect("a closed store is recovered");
    assert_eq!(
        (report.superseded, report.bad_extents),
        (0, 0),
        "{report:?}"
    );
    verify(&store, &model, "after a restart");
    let mut driver = Driver::new(store);
    driver.model = model;
    driver
}

/// Looks at some of the images that it may leave, and goes on with the last.
fn power_cut(driver: Driver, seed: u16) -> Driver {
    let mut rng = Rng(u64::from(seed));
    let image = |rng: &mut Rng| driver.store.pm().crash_torn(rng);
    for _ in 1..IMAGES {
        powered_up(image(&mut rng), &driver.model);
    }
    let mut last = image(&mut rng);
    if seed % 4 == 0 {
        last = cut_again(&last, &mut rng);
    }
    powered_up(last, &driver.model)
}

/// The power fails once more, before a fence of the recovery.
fn cut_again(image: &SimPm, rng: &mut Rng) -> SimPm {
    let again = image.clone();
    again.stop_at_fence(rng.below(6));
    let geo = probe(&again).expect("a superblock is there").superblock;
    let frames = HostFrames::new(&geo.geometry).expect("a frame table");
    let work = vec![0; SimStore::WORK_WORDS];
    // What becomes of it does not matter, but what it leaves.
    let _ = Store::recover(&again, frames, work, host::list, RecoverOptions::default());
    again.crash_torn(rng)
}

fn powered_up(image: SimPm, model: &Model) -> Driver {
    let (store, _) = recover(image).expect("a store is recovered after a power cut");
    verify(&store, model, "after a power cut");
    let model = what_is_left(&store, model);
    let mut driver = Driver::new(store);
    driver.model = model;
    driver
}

/// The model of what a power cut has left: all of it is durable.
fn what_is_left(store: &SimStore, before: &Model) -> Model {
    let one = Model {
        instead: None,
        ..before.clone()
    };
    let before = match &before.instead {
        Some(instead) if check(store, &one).is_err() => instead,
        _ => &one,
    };
    let mut model = Model::default();
    for record in log_of(store) {
        let bytes = object_of(store, &record);
        let is = |(tag, len): &(u64, usize)| bytes_of(*tag, *len) == bytes;
        if record.keyed() {
            let key = key_of(store, &record);
            let values = before.keys.get(&key).into_iter().flatten().flatten();
            let value = values.copied().find(is).expect("the check has found it");
            model.keys.insert(key, vec![Some(value)]);
        } else {
            let mut all = before.log.iter().map(|(tag, (len, _))| (*tag, *len));
            let (tag, len) = all.find(is).expect("the check has found it");
            model.log.insert(tag, (len, true));
        }
    }
    model
}
