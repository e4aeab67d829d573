// SPDX-License-Identifier: GPL-2.0

//! A damaged image is recovered, read, used, closed and recovered again.

use crate::common::bytes_of;
use crate::damage::Anatomy;
use crate::scratch::Scratch;
use crate::seed::{self, Left};
use arbitrary::Unstructured;
use pmskb_core::host::HostFrames;
use pmskb_core::*;
use std::collections::BTreeMap;

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
    fn alloc(&self) -> Option<Frame> {
        self.frames.alloc()
    }
    fn hold(&self, frame: Frame) -> Result<()> {
        self.frames.hold(frame)
    }
    fn unhold(&self, frame: Frame) -> Result<u32> {
        self.inside(frame);
        let left = self.frames.unhold(frame, 0);
        assert!(
            left.is_ok(),
            "{frame:?} is given back once more than it was taken"
        );
        left
    }
    fn claim(&self, frame: Frame) -> Result<()> {
        self.inside(frame);
        self.frames.claim(frame)
    }
}

type DamagedStore<'a> = Store<&'a Scratch, Watched, Vec<u64>>;

thread_local! {
    static BASES: [(Scratch, Anatomy); 2] = [Left::Closed, Left::Attached].map(|left| {
        let mem = Scratch::new(seed::image(left));
        let anatomy = Anatomy::of(&mem);
        (mem, anatomy)
    });
}

pub fn run(data: &[u8]) {
    BASES.with(|bases| {
        let mut input = Unstructured::new(data);
        let which = usize::from(input.arbitrary::<bool>().unwrap_or(false));
        let (mem, anatomy) = &bases[which];
        mem.reset();
        mem.allow(u64::MAX);
        let Ok(read_only) = anatomy.damage(mem, &mut input) else {
            return;
        };
        let in_order = anatomy.in_order(mem);
        mem.allow(BUDGET);
        use_it(mem, read_only, in_order, &mut input);
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
    // Damage can truncate the log, which nothing else does yet.
    let first = store.superblock().trunc_seq.saturating_add(1);
    let mut next = store.log_from(first).expect("the log cannot be read");
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

fn use_it(mem: &Scratch, read_only: bool, in_order: bool, input: &mut Unstructured<'_>) {
    let Ok((mut store, _)) = recover(mem, read_only) else {
        return;
    };
    let mut right = scan(&store);
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
        Ok((store, _)) if in_order => compare(&right, &scan(&store), "after another recovery"),
        Ok((store, _)) => drop(scan(&store)),
        Err(error) => assert!(!in_order, "it was recovered once, but not again: {error:?}"),
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

/// Some puts and deletes. Keeps `right` what the store must hold.
fn change(
    store: &mut DamagedStore<'_>,
    right: &mut Seen,
    input: &mut Unstructured<'_>,
) -> Result<()> {
    let keys: Vec<Vec<u8>> = right.values().filter_map(|(key, _)| key.clone()).collect();
    for n in 0..input.int_in_range(0..=12u64).unwrap_or(0) {
        let choice = input.arbitrary::<u8>().unwrap_or(0);
        let old = input.choose(&keys).ok().cloned();
        let done = match (choice % 4, old) {
            (0, Some(key)) => delete(store, right, &key),
            (1, Some(key)) => put(store, right, Some(&key), n),
            (2, _) => put(store, right, None, n),
            _ => put(store, right, Some(&[choice, n as u8]), n),
        };
        match done {
            Ok(()) | Err(Error::NoSpace) => (),
            Err(error) => return Err(error),
        }
        if choice & 0x80 != 0 {
            store.commit()?;
        }
    }
    store.commit()
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
    let frame = store.frames().alloc(None, Need::New).ok_or(Error::NoSpace)?;
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
