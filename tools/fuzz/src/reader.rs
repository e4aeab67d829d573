// SPDX-License-Identifier: GPL-2.0

//! A reader of an attached store's memory, which is damaged: whatever it says, it
//! comes back and says it.

use crate::damage::Anatomy;
use crate::scratch::Scratch;
use crate::seed::{self, Left};
use arbitrary::Unstructured;
use pmskb_core::{Direction, Reader, Record};
use std::collections::BTreeSet;

/// Of one call: it begins anew a thousand times, and then says that it is busy.
const BUDGET: u64 = 30_000_000;

thread_local! {
    static BASE: (Scratch, Anatomy, BTreeSet<u64>) = {
        let mem = Scratch::new(seed::image(Left::Attached));
        let anatomy = Anatomy::of(&mem);
        let numbers = anatomy.numbers(&mem);
        (mem, anatomy, numbers)
    };
}

pub fn run(data: &[u8]) {
    BASE.with(|(mem, anatomy, numbers)| {
        let mut input = Unstructured::new(data);
        mem.reset();
        mem.allow(u64::MAX);
        let Ok(done) = anatomy.damage(mem, &mut input) else {
            return;
        };
        // Damage that no checksum hides makes no records.
        let known = |record: &Record| done.forged || numbers.contains(&record.seq);
        mem.allow(BUDGET);
        let Ok(reader) = Reader::open(mem) else {
            return;
        };
        let _ = reader.live();
        walk(mem, &reader, Direction::Forward);
        walk(mem, &reader, Direction::Backward);
        log(mem, &reader, &known);
        for n in (0..90).step_by(3) {
            mem.allow(BUDGET);
            let get = |reader: &Reader<_>| reader.get(format!("key {n}").as_bytes());
            if let Ok(Some(record)) = reader.snapshot(get) {
                assert!(known(&record), "record {} never was", record.seq);
                look(mem, &reader, &record);
            }
        }
    });
}

/// Reads a record's key and bytes.
fn look(mem: &Scratch, reader: &Reader<&Scratch>, record: &Record) {
    let geo = &reader.superblock().geometry;
    let mut key = vec![0; usize::from(record.key_len.unwrap_or(0))];
    let _ = record.read_key(mem, 0, &mut key);
    for extent in record.extents(mem, geo).flatten() {
        geo.check_extent(extent).expect("an extent is outside");
    }
    let mut part = [0; 512];
    let _ = record.verify(mem, geo, &mut part);
    let _ = record.read(mem, geo, 5, &mut part);
    let _ = reader.still(record);
}

fn walk(mem: &Scratch, reader: &Reader<&Scratch>, direction: Direction) {
    let mut cursor = reader.cursor(None, true, direction);
    let mut last: Option<Vec<u8>> = None;
    // Each key is beyond the one before, so this ends.
    loop {
        mem.allow(BUDGET);
        let Ok(Some(record)) = cursor.next() else {
            return;
        };
        let key = cursor.key();
        let onward = last.is_none_or(|last| match direction {
            Direction::Forward => last.as_slice() < key,
            Direction::Backward => last.as_slice() > key,
        });
        assert!(onward, "the keys go back");
        last = Some(key.to_vec());
        look(mem, reader, &record);
    }
}

fn log(mem: &Scratch, reader: &Reader<&Scratch>, known: &dyn Fn(&Record) -> bool) {
    mem.allow(BUDGET);
    let mut log = reader.log(0);
    let mut last = None;
    while let Ok(Some(record)) = log.next() {
        assert!(
            last.is_none_or(|last| last < record.seq),
            "the log goes back"
        );
        last = Some(record.seq);
        assert!(known(&record), "record {} never was", record.seq);
        look(mem, reader, &record);
        mem.allow(BUDGET);
    }
}
