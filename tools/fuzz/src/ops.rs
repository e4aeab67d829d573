// SPDX-License-Identifier: GPL-2.0

//! Operations, clean restarts and power cuts, against the model of the core's tests.

use crate::common::{bytes_of, check, formatted, key_of, log_of, object_of, recover};
use crate::common::{Driver, Model, Op, SimStore};
use arbitrary::{Result, Unstructured};
use pmskb_core::sim::{Rng, SimPm};
use pmskb_core::Error;

/// More of them would only make it slow.
const MAX_OPS: usize = 150;

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
    for op in [Op::Commit, Op::Sync] {
        match act(driver, &op) {
            Ok(next) => driver = next,
            Err(stopped) => return drop(power_cut(stopped, 0)),
        }
    }
    verify(&driver.store, &driver.model, "at the end");
}

fn verify(store: &SimStore, model: &Model, when: &str) {
    if let Err(what) = check(store, model) {
        panic!("{what}, {when}");
    }
}

/// Runs one operation; a full store refuses it, and nothing else does. The driver comes
/// back as an error if the power fails in the middle.
fn act(mut driver: Driver, op: &Op) -> std::result::Result<Driver, Driver> {
    let before = driver.model.clone();
    match driver.run(op) {
        Ok(()) => Ok(driver),
        // What fails then is the simulated memory.
        Err(Error::Io) => Err(driver),
        Err(Error::NoSpace) if *op != Op::Commit && *op != Op::Sync => {
            driver.model = before;
            Ok(driver)
        }
        Err(error) => panic!("{op:?}: {error:?}"),
    }
}

fn key(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let n = input.arbitrary::<u8>()?;
    Ok(match n % 8 {
        0 => vec![n; usize::from(n)],
        1 => vec![],
        2 => [&[7; 900][..], &[n]].concat(),
        3 => vec![0; usize::from(n / 8)],
        _ => format!("key {}", n / 8).into_bytes(),
    })
}

fn len(input: &mut Unstructured<'_>, least: usize) -> Result<usize> {
    let lens = [8, 64, 100, 1000, 4096, 5000, 20_000, 200_000];
    Ok((*input.choose(&lens)?).max(least))
}

/// One step; `None` when there is no more input.
fn step(driver: Driver, input: &mut Unstructured<'_>, tag: u64) -> Option<Driver> {
    let op = match input.int_in_range(0..=19u8).ok()? {
        0..=6 => Op::Put {
            key: key(input).ok()?,
            tag,
            len: len(input, 8).ok()?,
        },
        7 => Op::PutKeyExtent {
            key: key(input).ok().filter(|key| !key.is_empty())?,
            tag,
            len: len(input, 8).ok()?,
        },
        8 | 9 => Op::Append {
            tag,
            len: len(input, 8).ok()?,
        },
        10..=12 => Op::Delete {
            key: key(input).ok()?,
        },
        13..=15 => Op::Commit,
        16 => Op::Sync,
        17 => return Some(restart(driver)),
        18 => return Some(power_cut(driver, input.arbitrary().ok()?)),
        _ => {
            // So many stores, flushes and fences from here.
            let pm = driver.store.pm();
            pm.stop_at(pm.counts().events + u64::from(input.arbitrary::<u8>().ok()?));
            return Some(driver);
        }
    };
    let done = act(driver, &op).and_then(|driver| {
        if op != Op::Commit {
            return Ok(driver);
        }
        // Space adds up when nothing that was replaced waits for the next batch.
        let driver = act(driver, &Op::Sync)?;
        verify(&driver.store, &driver.model, "after a commit");
        Ok(driver)
    });
    match done {
        Ok(driver) => Some(driver),
        Err(stopped) => Some(power_cut(stopped, input.arbitrary().ok()?)),
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
    let (store, report) = recover(pm).expect("a closed store is recovered");
    assert_eq!(
        (report.torn, report.superseded, report.bad_extents),
        (0, 0, 0),
        "{report:?}"
    );
    verify(&store, &model, "after a restart");
    let mut driver = Driver::new(store);
    driver.model = model;
    driver
}

fn power_cut(driver: Driver, seed: u16) -> Driver {
    let mut rng = Rng(u64::from(seed));
    powered_up(driver.store.pm().crash_torn(&mut rng), &driver.model)
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
