// SPDX-License-Identifier: GPL-2.0

//! Media errors while a store is attached: they take records with them, and not the store.

mod common;
use common::params;
use pmskb_core::host::{list, HostFrames, Memory};
use pmskb_core::*;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

/// Memory in which the lines that are named cannot be touched any more.
struct Bad {
    pm: Memory,
    lines: RefCell<BTreeSet<u64>>,
    /// The frame of the next record that is the first in its frame goes bad before it is there.
    trap: Cell<bool>,
    /// After so many accesses the frame there goes bad.
    soon: Cell<Option<(u64, u64)>>,
    /// After so many reads one fails, and what it wanted can be read the next time.
    once: Cell<Option<u64>>,
}

impl Bad {
    fn check(&self, off: u64, len: u64) -> Result<()> {
        match self.soon.get() {
            Some((0, frame)) => {
                self.soon.set(None);
                self.lose_frame(frame);
            }
            Some((left, frame)) => self.soon.set(Some((left - 1, frame))),
            None => (),
        }
        let lines = off / 64..(off + len).div_ceil(64);
        match self.lines.borrow().range(lines).next() {
            Some(_) => Err(Error::Io),
            None => Ok(()),
        }
    }

    /// As an attach finds it.
    fn lose_line(&self, off: u64) {
        self.lines.borrow_mut().insert(off / 64);
    }

    /// As the module does it when it hears of an error: the whole page.
    fn lose_frame(&self, off: u64) {
        let first = off / 4096 * 64;
        self.lines.borrow_mut().extend(first..first + 64);
    }
}

impl Pmem for Bad {
    fn len(&self) -> u64 {
        self.pm.len()
    }
    fn read(&self, off: u64, to: &mut [u8]) -> Result<()> {
        self.check(off, to.len() as u64)?;
        match self.once.get() {
            Some(0) => {
                self.once.set(None);
                return Err(Error::Io);
            }
            left => self.once.set(left.map(|left| left - 1)),
        }
        self.pm.read(off, to)
    }
    fn load(&self, off: u64) -> Result<u64> {
        self.check(off, 8)?;
        self.pm.load(off)
    }
    fn write(&self, off: u64, from: &[u8]) -> Result<()> {
        if off % 4096 == 64 && self.trap.take() {
            self.lose_frame(off);
        }
        self.check(off, from.len() as u64)?;
        self.pm.write(off, from)
    }
    fn store(&self, off: u64, value: u64) -> Result<()> {
        self.check(off, 8)?;
        self.pm.store(off, value)
    }
    fn flush(&self, off: u64, len: u64) -> Result<()> {
        self.check(off, len)?;
        self.pm.flush(off, len)
    }
    fn fence(&self) {
        self.pm.fence();
    }
    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        self.pm.crc32c(crc, data)
    }
}

type BadStore = Store<Bad, HostFrames, Vec<u64>>;

fn open() -> BadStore {
    let pm = Memory::new(32 << 20);
    format(&pm, &params()).unwrap();
    let pm = Bad {
        pm,
        lines: RefCell::default(),
        trap: Cell::new(false),
        soon: Cell::new(None),
        once: Cell::new(None),
    };
    attach(pm)
}

fn attach(pm: Bad) -> BadStore {
    let geo = probe(&pm).unwrap().superblock.geometry;
    let frames = HostFrames::new(&geo).unwrap();
    let work = vec![0; BadStore::WORK_WORDS];
    let (store, _) = Store::recover(pm, frames, work, list, RecoverOptions::default()).unwrap();
    store
}

/// Stages an object without bytes.
fn put(store: &mut BadStore, key: &str) -> Result<PutOutcome> {
    store.put(&PutArgs {
        key: if key.is_empty() {
            Key::None
        } else {
            Key::Bytes(key.as_bytes())
        },
        extents: &[],
        meta: Meta::default(),
        mode: PutMode::Upsert,
        if_seq: None,
    })
}

fn put_now(store: &mut BadStore, key: &str) -> Result<PutOutcome> {
    let put = put(store, key)?;
    store.commit().map(|()| put)
}

fn frame_of(put: &PutOutcome) -> u64 {
    put.loc.0 / 4096 * 4096
}

fn lose(store: &BadStore, off: u64) {
    store.pm().lose_frame(off);
    store
        .frames()
        .0
        .borrow_mut()
        .mark_bad(Frame((off / 4096) as u32))
        .unwrap();
}

/// A record frame goes bad. Keys are put beside its own, which fills and splits the nodes, and
/// taken out again: no commit fails for it.
#[test]
fn keys_can_be_put_beside_one_that_cannot_be_read() {
    for victim in [0, 1, 40, 150, 399] {
        let mut store = open();
        // Hexadecimal, in an order that scatters the neighbours over many frames.
        let name = |nr: u32| format!("a-common-beginning/{:08x}", nr.wrapping_mul(0x9e37_79b1));
        let mut puts = Vec::new();
        for nr in 0..400 {
            puts.push(put_now(&mut store, &name(nr)).unwrap());
        }
        let lost = frame_of(&puts[victim]);
        lose(&store, lost);
        // Others begin with other bytes.
        let other = (0..100).flat_map(|nr| [format!("a-common/{nr}"), format!("b{nr}")]);
        for key in (400..4000).map(name).chain(other) {
            match put(&mut store, &key) {
                // It lies beside one that looks the same.
                Err(Error::Io) => continue,
                done => done.unwrap(),
            };
            let done = store.commit();
            done.unwrap_or_else(|error| panic!("victim {victim}, {key}: {error:?}"));
        }
        let mut failed = 0;
        for (nr, put) in (0..).zip(&puts) {
            let found = store.lookup(name(nr).as_bytes());
            if frame_of(put) != lost {
                // Or on the way there a separator looks the same.
                failed += u32::from(found == Err(Error::Io));
                assert!(
                    matches!(found, Err(Error::Io) | Ok(Some(_))),
                    "victim {victim}, {nr}"
                );
            }
        }
        assert!(failed < 10, "victim {victim}: {failed}");
        for nr in 0..400 {
            if frame_of(&puts[nr as usize]) != lost {
                match store.delete(name(nr).as_bytes(), None) {
                    Err(Error::Io) => continue,
                    done => done.unwrap(),
                };
                let done = store.commit();
                done.unwrap_or_else(|error| panic!("victim {victim}, -{nr}: {error:?}"));
            }
        }
    }
}

/// Whenever the record frame that is filled goes bad, the next put goes to another one.
#[test]
fn the_log_goes_on_after_any_frame_that_cannot_be_read() {
    // So that each of a leaf's 60 entries is it once.
    for nr in 1..130 {
        let mut store = open();
        let mut last = put_now(&mut store, "").unwrap();
        for _ in 0..nr {
            let frame = frame_of(&last);
            while frame_of(&last) == frame {
                last = put_now(&mut store, "").unwrap();
            }
        }
        lose(&store, frame_of(&last));
        let next = put_now(&mut store, "").unwrap_or_else(|error| panic!("frame {nr}: {error:?}"));
        assert_eq!(
            store
                .log_from(next.seq)
                .map(|found| found.map(|found| found.seq)),
            Ok(Some(next.seq))
        );
    }
}

/// A record frame goes bad after it was begun, and before a record is in it.
#[test]
fn a_record_frame_that_goes_bad_when_it_is_new_is_left() {
    let mut store = open();
    store.pm().trap.set(true);
    let first = put_now(&mut store, "a").unwrap();
    assert!(!store.pm().trap.get());
    let second = put_now(&mut store, "b").unwrap();
    assert_eq!(frame_of(&first), frame_of(&second));
    assert_eq!(
        store.log_from(first.seq).unwrap().map(|found| found.seq),
        Some(first.seq)
    );
}

/// A record frame goes bad while it is empty and waits for the next commit to be given back.
#[test]
fn an_empty_record_frame_that_goes_bad_holds_nothing_up() {
    let mut store = open();
    let first = put_now(&mut store, "first").unwrap();
    let mut last = first;
    while frame_of(&last) == frame_of(&first) {
        last = put_now(&mut store, "first").unwrap();
    }
    while store.stats().empty_frames == 0 {
        last = put_now(&mut store, "first").unwrap();
    }
    lose(&store, frame_of(&first));
    for _ in 0..10 {
        last = put_now(&mut store, "first").unwrap();
    }
    assert_eq!(store.lookup(b"first"), Ok(Some(last.loc)));
    let stats = store.stats();
    assert_eq!((stats.record_frames, stats.empty_frames), (1, 0));
}

/// Goes over the log as a scrub does: numbers of what can be read, and of what cannot.
fn walk(store: &BadStore) -> (Vec<u64>, Vec<u64>) {
    let (mut good, mut lost) = (Vec::new(), Vec::new());
    let mut from = Some(0);
    while let Some(at) = from {
        let found = match store.log_from(at) {
            Err(Error::Io) => store.log_pass(at).unwrap(),
            found => match found.unwrap() {
                Some(record) => Passed::Record(record),
                None => Passed::Nothing { next: None },
            },
        };
        from = match found {
            Passed::Record(record) => {
                good.push(record.seq);
                Some(record.seq + 1)
            }
            Passed::Lost { seq, next } => {
                lost.push(seq);
                next
            }
            Passed::Nothing { next } => next,
        };
        assert!(from.is_none_or(|from| from > at));
    }
    (good, lost)
}

#[test]
fn a_line_that_cannot_be_read_loses_its_record_only() {
    // In the first frame, the second, and the last, at its beginning, inside, at its end.
    for victims in [
        &[0][..],
        &[3],
        &[62],
        &[63],
        &[100, 101],
        &[125],
        &[149],
        &[5, 70, 140],
    ] {
        let mut store = open();
        let puts: Vec<_> = (0..150).map(|_| put_now(&mut store, "").unwrap()).collect();
        for victim in victims {
            store.pm().lose_line(puts[*victim].loc.0);
        }
        let (good, lost) = walk(&store);
        let (mut all, mut gone) = (Vec::new(), Vec::new());
        for (nr, put) in puts.iter().enumerate() {
            match victims.contains(&nr) {
                // What is side by side counts as one.
                true if nr > 0 && victims.contains(&(nr - 1)) => (),
                true => gone.push(put.seq),
                false => all.push(put.seq),
            }
        }
        assert_eq!((good, lost), (all, gone), "{victims:?}");
    }
}

/// One that is replaced, or gone, is not lost.
#[test]
fn what_cannot_be_read_is_not_what_was_replaced() {
    let mut store = open();
    let old = put_now(&mut store, "key").unwrap();
    let lost = put_now(&mut store, "").unwrap();
    let deleted = put_now(&mut store, "gone").unwrap();
    store.delete(b"gone", None).unwrap();
    store.commit().unwrap();
    let last = put_now(&mut store, "key").unwrap();
    store.pm().lose_line(lost.loc.0);
    assert!(old.seq < lost.seq && lost.seq < deleted.seq);
    assert_eq!(walk(&store), (vec![last.seq], vec![lost.seq]));
}

#[test]
fn a_record_frame_that_cannot_be_read_is_passed_over() {
    for victim in [0, 70, 149] {
        let mut store = open();
        let puts: Vec<_> = (0..150).map(|_| put_now(&mut store, "").unwrap()).collect();
        let bad = frame_of(&puts[victim]);
        lose(&store, bad);
        let of = |gone| {
            puts.iter()
                .filter(move |put| (frame_of(put) == bad) == gone)
        };
        let good = of(false).map(|put| put.seq).collect();
        let first = of(true).map(|put| put.seq).next().unwrap();
        assert_eq!(walk(&store), (good, vec![first]));
    }
}

/// At any access of an operation on a key that has one staged already, the frame of one of its
/// records goes bad. The operation may fail, and the commit; but what both say is true.
#[test]
fn what_is_told_of_a_key_is_true_wherever_an_error_comes() {
    for delete in [false, true] {
        for first in [false, true] {
            for accesses in 0.. {
                let mut store = open();
                let old = put_now(&mut store, "key").unwrap();
                // To another frame.
                while frame_of(&put_now(&mut store, "").unwrap()) == frame_of(&old) {}
                let staged = put(&mut store, "key").unwrap();
                let victim = frame_of(if first { &old } else { &staged });
                store.pm().soon.set(Some((accesses, victim)));
                let then = match delete {
                    true => store.delete(b"key", None).map(|_| None),
                    false => put(&mut store, "key").map(|put| Some(put.loc)),
                };
                let over = store.pm().soon.take().is_some();
                if store.commit().is_ok() {
                    // Nothing of it was lost, really.
                    store.pm().lines.borrow_mut().clear();
                    let now = store.lookup(b"key").unwrap();
                    let told = then.unwrap_or(Some(staged.loc));
                    assert_eq!(now, told, "{delete} {first} {accesses}");
                }
                if over {
                    break;
                }
            }
        }
    }
}

/// A node of the log's index goes bad: nothing is told that is not so, and no frame is used up.
#[test]
fn an_index_that_cannot_be_read_ends_the_store() {
    let mut store = open();
    while store.stats().record_frames < 2 {
        put_now(&mut store, "").unwrap();
    }
    let root = store.pm().load(LIVE_OFF + 32).unwrap() & ((1 << 34) - 1);
    lose(&store, root << 10);
    let mut left = 200;
    while put_now(&mut store, "").is_ok() {
        left -= 1;
    }
    let free = store.frames().0.borrow().counts().free;
    for _ in 0..200 {
        assert_eq!(put_now(&mut store, "").map(|_| ()), Err(Error::Io));
    }
    assert!(left > 0 && store.read_only());
    assert_eq!(store.frames().0.borrow().counts().free, free);
}

/// One read fails, anywhere in a compaction. Afterwards every record is where its key leads, in the
/// store that goes on and in the next one.
#[test]
fn a_read_that_fails_once_in_a_compaction_loses_nothing() {
    let (mut went_on, mut ended) = (0, 0);
    for reads in 0.. {
        let mut store = open();
        let mut kept = Vec::new();
        for nr in 0..200 {
            let put = put_now(&mut store, &format!("{nr:03}")).unwrap();
            if nr % 5 == 0 {
                kept.push((format!("{nr:03}"), put.seq));
            }
        }
        for nr in (0..200).filter(|nr| nr % 5 != 0) {
            store.delete(format!("{nr:03}").as_bytes(), None).unwrap();
        }
        store.commit().unwrap();
        let all_there = |store: &BadStore| {
            for (key, seq) in &kept {
                let loc = store.lookup(key.as_bytes()).unwrap();
                let loc = loc.unwrap_or_else(|| panic!("{key} is lost, {reads}"));
                assert_eq!(
                    store.record(loc).map(|record| record.seq),
                    Ok(*seq),
                    "{reads}"
                );
            }
        };
        store.pm().once.set(Some(reads));
        let mut scratch = [Extent::new(0, 0); 16];
        let mut compact = |store: &mut BadStore| -> Result<u32> {
            let (mut from, mut moved) = (0, 0);
            loop {
                let step = store.compact(from, &mut scratch)?;
                moved += step.records;
                match step.next {
                    Some(next) => from = next,
                    None => return Ok(moved),
                }
            }
        };
        let moved = compact(&mut store);
        let over = store.pm().once.take().is_some();
        all_there(&store);
        if store.read_only() {
            ended += 1;
        } else {
            went_on += 1;
            // What was left is done now.
            compact(&mut store).unwrap();
            store.sync_pending().unwrap();
            assert!(store.stats().record_frames <= 3, "{reads}");
            all_there(&store);
        }
        let (_, pm, _, _) = store.close();
        let store = attach(pm);
        all_there(&store);
        assert_eq!(store.stats().records, kept.len() as u64);
        if over {
            assert!(moved.unwrap() > 0);
            break;
        }
    }
    assert!(
        went_on > 10 && ended > 0,
        "{went_on} went on, {ended} ended"
    );
}
