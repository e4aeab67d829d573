// SPDX-License-Identifier: GPL-2.0

//! Every crash state of every short history.
//!
//! All sequences of up to three steps, each acknowledged before the next; a crash
//! between any two stores, flushes and fences of the last one (those of the others
//! are the last one of a shorter sequence); every subset of the lines that a crash
//! could lose, or a sample if they are many, and a sample torn at 8 bytes. Each must
//! recover to what was before the step or to what is after it, and nothing between.
//! Of a part of them, recovery itself is cut short, and must succeed the next time.
//!
//! PMSKB_CRASH=full does all of it (`make crash`); otherwise the longest sequences
//! are thinned.

mod common;
use common::*;
use pmskb_core::sim::{PageHashes, Rng, SimPm};
use pmskb_core::*;
use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::{Duration, Instant};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    PutSmall,
    PutMultiFrame,
    Replace,
    Delete,
    Truncate,
    Atomic,
    Compact,
    Format,
    Recover,
}

const STEPS: [Step; 9] = [
    Step::PutSmall,
    Step::PutMultiFrame,
    Step::Replace,
    Step::Delete,
    Step::Truncate,
    Step::Atomic,
    Step::Compact,
    Step::Format,
    Step::Recover,
];

/// What a history starts from: a store with something in it, so that each step has
/// something to do as the first one, too.
fn beginning() -> (SimPm, Model) {
    let (store, _) = recover(formatted()).unwrap();
    let mut driver = Driver::new(store);
    // Two record frames of which little is alive, in payload frames of which the same
    // is true.
    let mut ops: Vec<Op> = (0..63).map(|n| put(&format!("{n}"), n, 8)).collect();
    ops.extend([
        put("a", 100, 60),
        Op::Append { tag: 101, len: 20 },
        Op::Commit,
    ]);
    ops.extend(
        (0..63)
            .filter(|n| n % 31 != 0)
            .map(|n| delete(&format!("{n}"))),
    );
    ops.extend([Op::Commit, Op::Sync]);
    for op in &ops {
        driver.run(op).unwrap();
    }
    let (closed, pm, _, _) = driver.store.close();
    closed.unwrap();
    (pm.crash_subset(0, &mut Rng(0)), driver.model)
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

/// One step, acknowledged. Until then the model has what it was, and `instead` what it
/// will be.
fn step(driver: &mut Driver, what: Step, at: u64) -> Result<()> {
    let tag = 1000 + at;
    let ops = match what {
        Step::PutSmall => vec![put(&format!("small{at}"), tag, 60)],
        Step::PutMultiFrame => vec![Op::PutPieces {
            key: b"pieces".to_vec(),
            tag,
            pieces: 3,
        }],
        Step::Replace => vec![put("a", tag, 40)],
        Step::Delete => vec![delete("a")],
        Step::Atomic => {
            let ops = vec![
                put("a", tag, 30),
                Op::Append {
                    tag: tag + 500,
                    len: 16,
                },
                delete("0"),
            ];
            return driver.run(&Op::Atomic(ops));
        }
        Step::Truncate => return driver.run(&Op::Truncate),
        Step::Compact => return driver.run(&Op::Compact),
        Step::Recover => return driver.run(&Op::Recover),
        Step::Format => {
            driver.model.instead = Some(Box::default());
            let pm = driver.store.pm().clone();
            let done = format(
                &pm,
                &FormatParams {
                    uuid: [at as u8 + 1; 16],
                    salt: 77 + at,
                    ..params()
                },
            );
            // What it left is what there is, whether or not it came to its end.
            driver.crashed = Some(pm.clone());
            done?;
            driver.store = recover(pm)?.0;
            driver.crashed = None;
            driver.model = Model::default();
            return Ok(());
        }
    };
    // One operation and its commit: all or nothing, like a batch.
    driver.model.instead = Some(driver.model.after(&ops));
    let before = driver.model.clone();
    for op in &ops {
        driver.run(op)?;
    }
    driver.model = before;
    driver.store.commit()?;
    driver.settle_instead();
    Ok(())
}

/// Checks one image; how many states that were.
fn check_state(
    image: SimPm,
    model: &Model,
    formatting: bool,
    rng: &mut Rng,
) -> std::result::Result<u64, String> {
    let again = (rng.below(8) == 0).then(|| image.clone());
    let store = match recover(image) {
        Ok((store, _)) => store,
        Err(Error::NotFormatted | Error::Damaged) if formatting => return Ok(1),
        Err(error) => return Err(format!("recovery: {error:?}")),
    };
    check(&store, model)?;
    let Some(again) = again else {
        return Ok(1);
    };
    // Recovery cut short, somewhere and somehow, twice in a row.
    let events = store.pm().counts().events;
    let mut crashed = again;
    for _ in 0..2 {
        crashed.reset_counts();
        crashed.stop_at(rng.below(events + 1));
        let geo = *store.geometry();
        let frames = host::HostFrames::new(&geo).unwrap();
        let work = vec![0; SimStore::WORK_WORDS];
        let _ = Store::recover(
            &crashed,
            frames,
            work,
            host::list,
            RecoverOptions::default(),
        );
        crashed = crashed.crash_torn(rng);
    }
    let (store, _) = recover(crashed).map_err(|error| format!("after crashes: {error:?}"))?;
    check(&store, model).map_err(|error| format!("after crashes in recovery: {error}"))?;
    Ok(2)
}

/// Everything about the last step of a sequence.
fn sequence(base: &(SimPm, Model), steps: &[Step], thin: u64, seed: u64) -> u64 {
    let (last, before) = steps.split_last().unwrap();
    let run = |stop: u64| -> Driver {
        let (store, _) = recover(base.0.clone()).unwrap();
        let mut driver = Driver::new(store);
        driver.model = base.1.clone();
        for (at, what) in before.iter().enumerate() {
            step(&mut driver, *what, at as u64).unwrap();
        }
        driver.store.pm().reset_counts();
        driver.store.pm().stop_at(stop);
        let done = step(&mut driver, *last, before.len() as u64);
        assert!(done.is_ok() || stop != u64::MAX, "{steps:?}: {done:?}");
        driver
    };
    let whole = run(u64::MAX);
    lint(&whole, steps);
    let events = whole.store.pm().counts().events;
    let mut seen = HashSet::new();
    let mut known = PageHashes::default();
    let mut rng = Rng(seed);
    let mut states = 0;
    for stop in (0..=events).filter(|stop| thin == 1 || (stop + seed) % thin == 0) {
        let driver = run(stop);
        let formatting = driver.crashed.is_some();
        let pm = driver.crashed.as_ref().unwrap_or_else(|| driver.store.pm());
        let lines = pm.unsafe_lines().len();
        let all = if lines <= 12 { 1u64 << lines } else { 4096 };
        let (all, torn) = if thin == 1 {
            (all, 256)
        } else {
            (all.min(48), 8)
        };
        for nr in 0..all + torn {
            let image = match nr {
                nr if nr >= all => pm.crash_torn(&mut rng),
                nr if all == 1 << lines => pm.crash_subset(nr, &mut rng),
                _ => pm.crash_subset(rng.next(), &mut rng),
            };
            if !seen.insert(image.media_hash(&mut known)) {
                continue;
            }
            match check_state(image, &driver.model, formatting, &mut rng) {
                Ok(count) => states += count,
                Err(what) => panic!(
                    "{what}\n  {steps:?}, stopped at event {stop} of {events}, \
                     state {nr} of {lines} lines, seed {seed}"
                ),
            }
        }
    }
    states
}

/// At an acknowledgement, no line that counts is left to be flushed, and none was
/// flushed for nothing.
fn lint(driver: &Driver, steps: &[Step]) {
    let needed = unflushed(&driver.store);
    let dirty = driver.store.pm().dirty_lines();
    let left: Vec<_> = dirty.iter().filter(|line| needed.contains(line)).collect();
    assert!(left.is_empty(), "{steps:?}: {left:?} never flushed");
    let counts = driver.store.pm().counts();
    assert_eq!(counts.clean, 0, "{steps:?}: clean lines were flushed");
    IDLE_FENCES.fetch_add(counts.idle_fences, Ordering::Relaxed);
}

static IDLE_FENCES: AtomicU64 = AtomicU64::new(0);

#[test]
fn every_crash_state_of_every_short_history_recovers() {
    let full = std::env::var("PMSKB_CRASH").is_ok_and(|form| form == "full");
    let seed = std::env::var("PMSKB_SEED").map_or(1, |n| n.parse().unwrap());
    let mut sequences: Vec<Vec<Step>> = vec![Vec::new()];
    let mut from = 0;
    for _ in 0..3 {
        let until = sequences.len();
        for at in from..until {
            for step in STEPS {
                let mut longer = sequences[at].clone();
                longer.push(step);
                sequences.push(longer);
            }
        }
        from = until;
    }
    sequences.remove(0);
    assert_eq!(sequences.len(), 9 + 81 + 729);
    let next = AtomicUsize::new(0);
    let said = Mutex::new(Instant::now());
    let states = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                let base = beginning();
                while let Some(steps) = sequences.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let thin = match steps.len() {
                        _ if full => 1,
                        1 => 2,
                        2 => 7,
                        _ => 29,
                    };
                    let more = sequence(&base, steps, thin, seed + steps.len() as u64);
                    let states = states.fetch_add(more, Ordering::Relaxed) + more;
                    let mut said = said.lock().unwrap();
                    if full && said.elapsed() > Duration::from_secs(10) {
                        *said = Instant::now();
                        let at = next.load(Ordering::Relaxed);
                        println!("{states} states; at {at} of {}", sequences.len());
                    }
                }
            });
        }
    });
    println!(
        "{} states of {} sequences, {} fences without work",
        states.into_inner(),
        sequences.len(),
        IDLE_FENCES.load(Ordering::Relaxed)
    );
}
