// SPDX-License-Identifier: GPL-2.0

//! How the cost of one insert and one lookup grows with the store.

use crate::filler::{attach, core, format, key, Filler};
use crate::map::Region;
use crate::timing::{median, per_op, Median};
use crate::valgrind;
use anyhow::{bail, Context, Result};
use pmskb_core::sim::Rng;
use pmskb_core::{Extent, Frames, Key, Pmem};
use serde_json::{json, Value};
use std::path::Path;
use std::process::{Command, Stdio};

const LEN: u32 = 1024;
const REGION: u64 = 8 << 30;
/// Inserts of a round: few, beside the 1,000 records of the smallest store.
const INSERTS: u64 = 100;
const LOOKUPS: u64 = 5000;

/// New keys and the places of their objects: held, and their bytes are written.
fn fresh(filler: &mut Filler<'_>, from: u64) -> Result<Vec<(u64, Extent)>> {
    (from..from + INSERTS)
        .map(|n| {
            let extent = filler.room(LEN)?;
            for frame in extent.frames() {
                core(filler.store.frames().hold(frame, 0))?;
            }
            core(
                filler
                    .store
                    .pm()
                    .write(extent.off, &[n as u8; LEN as usize]),
            )?;
            Ok((n, extent))
        })
        .collect()
}

/// Each committed by itself.
#[inline(never)]
fn insert_all(filler: &mut Filler<'_>, what: &[(u64, Extent)]) -> Result<()> {
    for (n, extent) in what {
        filler.put(Key::Bytes(&key(*n)), *extent)?;
        core(filler.store.commit())?;
    }
    Ok(())
}

#[inline(never)]
fn lookup_all(filler: &Filler<'_>, keys: &[[u8; 16]]) -> Result<()> {
    for key in keys {
        if core(filler.store.lookup(key))?.is_none() {
            bail!("a key is lost");
        }
    }
    Ok(())
}

fn some_keys(records: u64, count: u64, rng: &mut Rng) -> Vec<[u8; 16]> {
    (0..count).map(|_| key(rng.below(records))).collect()
}

/// Nanoseconds of an insert and of a lookup.
fn time(records: u64, rounds: u64) -> Result<(Median, Median)> {
    let map = Region::huge(REGION)?;
    format(&map)?;
    let mut filler = Filler::new(attach(&map)?.0);
    filler.fill(0..records, LEN, true)?;
    let (mut inserts, mut lookups) = (Vec::new(), Vec::new());
    let mut rng = Rng(records);
    for round in 0..rounds {
        let new = fresh(&mut filler, records + round * INSERTS)?;
        let (ns, done) = per_op(INSERTS, || insert_all(&mut filler, &new));
        done?;
        inserts.push(ns);
        // As many records as before for the next round.
        for (n, extent) in &new {
            for frame in extent.frames() {
                core(filler.store.frames().unhold(frame, 0))?;
            }
            core(filler.store.delete(&key(*n), None))?;
        }
        core(filler.store.commit())?;
        core(filler.store.sync_pending())?;
        let keys = some_keys(records, LOOKUPS, &mut rng);
        let (ns, done) = per_op(LOOKUPS, || lookup_all(&filler, &keys));
        done?;
        lookups.push(ns);
    }
    // The first rounds find cold caches.
    inserts.drain(..rounds.min(3) as usize);
    lookups.drain(..rounds.min(3) as usize);
    Ok((median(inserts), median(lookups)))
}

/// What callgrind is to count: runs in a process of its own, under it.
pub fn counted(records: u64) -> Result<()> {
    let map = Region::huge(REGION)?;
    format(&map)?;
    let mut filler = Filler::new(attach(&map)?.0);
    filler.fill(0..records, LEN, true)?;
    let new = fresh(&mut filler, records)?;
    valgrind::start();
    insert_all(&mut filler, &new)?;
    valgrind::stop();
    let keys = some_keys(records, LOOKUPS, &mut Rng(records));
    valgrind::start();
    lookup_all(&filler, &keys)?;
    valgrind::stop();
    Ok(())
}

/// Instructions of an insert and of a lookup.
fn instructions(records: u64, scratch: &Path) -> Result<(f64, f64)> {
    let out = scratch.join(format!("callgrind.{records}"));
    let status = Command::new("valgrind")
        .args(["-q", "--tool=callgrind", "--instr-atstart=no"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(std::env::current_exe()?)
        .args(["counted", &records.to_string()])
        .stdout(Stdio::null())
        .status()
        .context("cannot run valgrind: make bench-core installs it")?;
    if !status.success() {
        bail!("the run under valgrind failed: {status}");
    }
    let part = |number: u32| -> Result<f64> {
        let path = format!("{}.{number}", out.display());
        let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let totals = text.lines().filter_map(|line| {
            let rest = line.strip_prefix("totals:")?;
            rest.trim().parse::<f64>().ok()
        });
        totals
            .last()
            .with_context(|| format!("no totals in {path}"))
    };
    Ok((part(1)? / INSERTS as f64, part(2)? / LOOKUPS as f64))
}

pub fn run(quick: bool, scratch: &Path) -> Result<(String, Value)> {
    let sizes: &[u64] = if quick {
        &[1_000, 100_000]
    } else {
        &[1_000, 10_000, 100_000, 1_000_000]
    };
    let rounds = if quick { 23 } else { 103 };
    let mut rows = Vec::new();
    let mut text = String::from(
        "| records | insert, instructions | insert, ns (quarters) | lookup, instructions | lookup, ns (quarters) |\n\
         | --: | --: | --: | --: | --: |\n",
    );
    for records in sizes {
        eprintln!("growth: {records} records");
        let (insert, lookup) = time(*records, rounds)?;
        let (insert_instr, lookup_instr) = instructions(*records, scratch)?;
        text += &format!(
            "| {records} | {insert_instr:.0} | {:.0} ({:.0} .. {:.0}) | {lookup_instr:.0} | {:.0} ({:.0} .. {:.0}) |\n",
            insert.mid, insert.low, insert.high, lookup.mid, lookup.low, lookup.high,
        );
        rows.push((insert_instr, insert.mid, lookup_instr, lookup.mid, *records));
    }
    let ratio = |get: fn(&(f64, f64, f64, f64, u64)) -> f64| match (rows.first(), rows.last()) {
        (Some(first), Some(last)) => get(last) / get(first),
        _ => f64::NAN,
    };
    let ratios = [
        ratio(|row| row.0),
        ratio(|row| row.1),
        ratio(|row| row.2),
        ratio(|row| row.3),
    ];
    text += &format!(
        "| last : first | {:.2} | {:.2} | {:.2} | {:.2} |\n",
        ratios[0], ratios[1], ratios[2], ratios[3]
    );
    let target = if ratios[0] <= 2.0 { "met" } else { "MISSED" };
    text += &format!(
        "\nInserts may grow by 2.00: {target} in instructions ({:.2}), {} in time ({:.2}).\n",
        ratios[0],
        if ratios[1] <= 2.0 { "met" } else { "MISSED" },
        ratios[1]
    );
    let json = json!({
        "sizes": rows.iter().map(|row| json!({
            "records": row.4, "insert_instructions": row.0, "insert_ns": row.1,
            "lookup_instructions": row.2, "lookup_ns": row.3,
        })).collect::<Vec<_>>(),
        "ratio": {
            "insert_instructions": ratios[0], "insert_ns": ratios[1],
            "lookup_instructions": ratios[2], "lookup_ns": ratios[3],
        },
    });
    Ok((text, json))
}
