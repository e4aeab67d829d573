// SPDX-License-Identifier: GPL-2.0

//! A damaged image is recovered, read, used, closed and recovered again.

use crate::common::bytes_of;
use crate::damage::{Anatomy, Done};
use crate::scratch::Scratch;
use crate::seed::{self, Left};
use arbitrary::Unstructured;
use pmskb_core::host::HostFrames;
use pmskb_core::*;
use std::collections::{BTreeMap, BTreeSet};

/// Far more than it takes to recover the image and read it all, twice.
const BUDGET: u64 = 30_000_000;

/// Frames, with an eye on who asks for what.
struct Watched {
    frames: HostFrames,
    geo: Geometry,
}

impl Watched {
    fn inside(&self, frame: Frame) {
        let range = self.geo.data_off..self.geo.data_end();
        assert!(
            range.contains(&frame.off()),
            "{frame:?} is outside of the data area"
        );
    }
}

impl Frames for Watched {
    fn alloc(&self, near: Option<Frame>, need: Need) -> Option<Frame> {
        self.frames.alloc(near, need)
    }
    fn hold(&self, frame: Frame, bytes: u32) -> Result<()> {
        self.frames.hold(frame, bytes)
    }
    fn unhold(&self, frame: Frame, bytes: u32) -> Result<u32> {
        self.inside(frame);
        let left = self.frames.unhold(frame, bytes);
        assert!(
            left.is_ok(),
            "{frame:?} is given back once more than it was taken"
        );
        left
    }
    fn claim(&self, frame: Frame, bytes: u32) -> Result<()> {
        self.inside(frame);
        self.frames.claim(frame, bytes)
    }
    fn used(&self, frame: Frame) -> u32 {
        self.frames.used(frame)
    }
    fn holds(&self, frame: Frame) -> u32 {
        self.frames.holds(frame)
    }
}

type DamagedStore<'a> = Store<&'a Scratch, Watched, Vec<u64>>;

/// An image, and what is in it.
struct Base {
    mem: Scratch,
    anatomy: Anatomy,
    numbers: BTreeSet<u64>,
    seen: Seen,
}

thread_local! {
    static BASES: [Base; 4] = Left::ALL.map(|left| {
        let mem = Scratch::new(seed::image(left));
        let anatomy = Anatomy::of(&mem);
        assert!(anatomy.bases_differ(&mem), "or checks that depend on it never run");
        let numbers = anatomy.numbers(&mem);
        let seen = scan(&recover(&mem, true).expect("an undamaged image").0);
        Base { mem, anatomy, numbers, seen }
    });
}

pub fn run(data: &[u8]) {
    BASES.with(|bases| {
        let mut input = Unstructured::new(data);
        let Ok(base) = input.choose(bases) else {
            return;
        };
        base.mem.reset();
        base.mem.allow(u64::MAX);
        let Ok(done) = base.anatomy.damage(&base.mem, &mut input) else {
            return;
        };
        base.mem.allow(BUDGET);
        use_it(base, done, &mut input);
    });
}

fn recover(mem: &Scratch, read_only: bool) -> Result<(DamagedStore<'_>, Report)> {
    let geo = probe(mem)?.superblock.geometry;
    let frames = Watched {
        frames: HostFrames::new(&geo)?,
        geo,
    };
    let work = vec![0; DamagedStore::WORK_WORDS];
    Store::recover(mem, frames, work, host::list, RecoverOptions { read_only })
}

/// A record by its number: key, and whether its bytes are right.
type Seen = BTreeMap<u64, (Option<Vec<u8>>, Result<Verdict>)>;

fn key_of(store: &DamagedStore<'_>, record: &Record) -> Vec<u8> {
    let mut key = vec![0; usize::from(record.key_len.unwrap_or(0))];
    let read = record.read_key(store.pm(), 0, &mut key);
    assert_eq!(read, Ok(key.len()), "a key that cannot be read");
    key
}

/// Reads all that is there, by log and by key, forwards and backwards.
fn scan(store: &DamagedStore<'_>) -> Seen {
    let mut seen = Seen::new();
    let mut part = [0; 4096];
    let mut next = store.log_from(0).expect("the log cannot be read");
    let mut last = None;
    while let Some(record) = next {
        assert!(
            last.is_none_or(|last| last < record.seq),
            "the log goes back"
        );
        last = Some(record.seq);
        let verdict = record.verify(store.pm(), store.geometry(), &mut part);
        for extent in record.extents(store.pm(), store.geometry()).flatten() {
            store
                .geometry()
                .check_extent(extent)
                .expect("an extent is outside");
            for frame in extent.frames() {
                let state = store.frames().frames.0.borrow().state(frame);
                // One whose extents cannot be right has none; nobody can read it whole.
                let held = state.is_some_and(|(_, holds)| holds > 0);
                assert!(held || verdict.is_err(), "a record's frame is free");
            }
        }
        let key = record.keyed().then(|| key_of(store, &record));
        seen.insert(record.seq, (key, verdict));
        next = store.log_after(&record).expect("the log cannot be read on");
    }
    for direction in [Direction::Forward, Direction::Backward] {
        let mut at: Option<Vec<u8>> = None;
        while let Some(loc) = store
            .seek(at.as_deref(), false, direction)
            .expect("the index cannot be read")
        {
            let record = store.record(loc).expect("the index leads to no record");
            let key = key_of(store, &record);
            assert_eq!(store.lookup(&key), Ok(Some(loc)), "a key leads elsewhere");
            if let Some(at) = &at {
                let right = if direction == Direction::Forward {
                    *at < key
                } else {
                    *at > key
                };
                assert!(right, "keys are out of order");
            }
            at = Some(key);
        }
    }
    let counts = store.frames().frames.0.borrow().counts();
    let sum = counts.free + counts.limbo + counts.owned + counts.held + counts.bad;
    assert_eq!(sum, counts.total, "frames do not add up");
    seen
}

fn use_it(base: &Base, done: Done, input: &mut Unstructured<'_>) {
    let (mem, read_only) = (&base.mem, done.read_only);
    let bases_differ = base.anatomy.bases_differ(mem);
    let Ok((mut store, _)) = recover(mem, read_only) else {
        return;
    };
    // Of what batches in force have made of it.
    let in_order = bases_differ && base.anatomy.in_order(mem);
    let mut right = scan(&store);
    if !done.forged {
        base.had(&right);
    }
    let mut changed = Ok(());
    if !read_only {
        changed = change(&mut store, &mut right, input);
        let now = scan(&store);
        if in_order {
            assert_eq!(changed, Ok(()), "a change failed");
            compare(&right, &now, "after changes");
        }
    }
    let (closed, ..) = store.close();
    assert!(
        closed.is_ok() || changed.is_err(),
        "it cannot be closed: {closed:?}"
    );
    match recover(mem, read_only) {
        Ok((mut store, _)) => {
            let now = scan(&store);
            if in_order {
                compare(&right, &now, "after another recovery");
            }
            if !read_only {
                still_takes(&mut store);
            }
        }
        Err(error) => assert!(!in_order, "it was recovered once, but not again: {error:?}"),
    }
}

impl Base {
    /// Damage that no checksum hides takes records away, and makes none.
    fn had(&self, now: &Seen) {
        for (seq, (key, _)) in now {
            match self.seen.get(seq) {
                Some((before, _)) => assert_eq!(key, before, "record {seq} has another key"),
                // Replaced: it is back if what replaced it is lost.
                None => assert!(self.numbers.contains(seq), "record {seq} never was"),
            }
        }
    }
}

/// Whatever is wrong with what is there: a store that was recovered takes something new.
fn still_takes(store: &mut DamagedStore<'_>) {
    for n in 0..2 {
        let done = put(store, &mut Seen::new(), None, n).and_then(|()| store.commit());
        assert!(
            matches!(done, Ok(()) | Err(Error::NoSpace)),
            "it takes nothing new: {done:?}"
        );
    }
}

/// What was right must stay so; what was wrong may stay wrong.
fn compare(before: &Seen, now: &Seen, when: &str) {
    for (seq, (key, verdict)) in before {
        let found = now.get(seq);
        let Some((key_now, verdict_now)) = found else {
            panic!("record {seq}, {key:?}, is lost {when}");
        };
        assert_eq!(key, key_now, "record {seq} has another key {when}");
        if *verdict == Ok(Verdict::Intact) {
            assert_eq!(verdict_now, verdict, "record {seq} is damaged {when}");
        }
    }
    if let Some(seq) = now.keys().find(|seq| !before.contains_key(*seq)) {
        panic!("record {seq} came out of nothing {when}");
    }
}

/// Some changes. Keeps `right` what the store must hold.
fn change(
    store: &mut DamagedStore<'_>,
    right: &mut Seen,
    input: &mut Unstructured<'_>,
) -> std::result::Result<(), String> {
    let keys: Vec<Vec<u8>> = right.values().filter_map(|(key, _)| key.clone()).collect();
    let failed = |what: &str, error: Error| format!("{what}: {error:?}");
    for n in 0..input.int_in_range(0..=12u64).unwrap_or(0) {
        let choice = input.arbitrary::<u8>().unwrap_or(0);
        let old = input.choose(&keys).ok().cloned();
        let (what, done) = match (choice % 8, old) {
            (0 | 1, Some(key)) => ("delete", delete(store, right, &key)),
            (2, Some(key)) => ("replace", put(store, right, Some(&key), n)),
            (3, _) => ("append", put(store, right, None, n)),
            (4, Some(key)) => ("batch", both(store, right, &key, n, choice & 0x40 != 0)),
            (5, _) => {
                let seqs: Vec<u64> = right.keys().copied().collect();
                let seq = input.choose(&seqs).copied().unwrap_or(0);
                ("truncate", truncate(store, right, seq))
            }
            (6, _) => ("compact", compact(store)),
            _ => ("put", put(store, right, Some(&[choice, n as u8]), n)),
        };
        match done {
            Ok(()) | Err(Error::NoSpace) => (),
            Err(error) => return Err(failed(what, error)),
        }
        if choice & 0x80 != 0 {
            store.commit().map_err(|error| failed("commit", error))?;
        }
    }
    store.commit().map_err(|error| failed("commit", error))
}

/// A replace and an append that belong together; or neither.
fn both(
    store: &mut DamagedStore<'_>,
    right: &mut Seen,
    key: &[u8],
    n: u64,
    drop: bool,
) -> Result<()> {
    store.begin_atomic()?;
    let mut after = right.clone();
    let staged =
        put(store, &mut after, Some(key), n).and_then(|()| put(store, &mut after, None, n));
    if staged.is_err() || drop {
        store.abort();
        return staged;
    }
    store.commit()?;
    *right = after;
    Ok(())
}

fn truncate(store: &mut DamagedStore<'_>, right: &mut Seen, seq: u64) -> Result<()> {
    store.truncate(seq)?;
    right.retain(|other, (key, _)| key.is_some() || *other > seq);
    while store.drain(16)? {}
    Ok(())
}

/// All steps, as long as there is room.
fn compact(store: &mut DamagedStore<'_>) -> Result<()> {
    let mut from = Some(0);
    let mut extents = [Extent::new(0, 0); 600];
    while let Some(at) = from {
        from = store.compact(at, &mut extents)?.next;
    }
    Ok(())
}

fn forget(right: &mut Seen, key: &[u8]) {
    right.retain(|_, (other, _)| other.as_deref() != Some(key));
}

fn delete(store: &mut DamagedStore<'_>, right: &mut Seen, key: &[u8]) -> Result<()> {
    match store.delete(key, None) {
        Ok(_) | Err(Error::NotFound) => forget(right, key),
        Err(error) => return Err(error),
    }
    Ok(())
}

fn put(store: &mut DamagedStore<'_>, right: &mut Seen, key: Option<&[u8]>, n: u64) -> Result<()> {
    let bytes = bytes_of(n, 200);
    let frame = store
        .frames()
        .alloc(None, Need::New)
        .ok_or(Error::NoSpace)?;
    store.pm().write(frame.off(), &bytes)?;
    let args = PutArgs {
        key: key.map_or(Key::None, Key::Bytes),
        extents: &[Extent::new(frame.off(), bytes.len() as u32)],
        meta: Meta {
            payload_crc: Some(crc32c_software(0, &bytes)),
            ..Meta::default()
        },
        mode: PutMode::Upsert,
        if_seq: None,
    };
    let done = store.put(&args);
    store.frames().unhold(frame, 0)?;
    let seq = done?.seq;
    if let Some(key) = key {
        forget(right, key);
    }
    right.insert(seq, (key.map(<[u8]>::to_vec), Ok(Verdict::Intact)));
    Ok(())
}
