// SPDX-License-Identifier: GPL-2.0

//! How many records a second an attach recovers.

use crate::filler::{attach, core, format, host, key, Filler};
use crate::map::Region;
use crate::timing::{median, per_op};
use crate::valgrind;
use anyhow::{bail, Context, Result};
use pmskb_core::host::list;
use pmskb_core::sim::Rng;
use pmskb_core::{RecoverOptions, Store, FRAME_SIZE};
use serde_json::{json, Value};

const REGION: u64 = 64 << 30;
/// Valgrind maps no more.
const COUNTED_REGION: u64 = 8 << 30;
const LEN: u32 = 1024;
/// Bytes of memory for each record, generously: two lines and the index.
const PER_RECORD: u64 = 300;

struct Row {
    records: u64,
    keyed: bool,
    per_second: f64,
    seconds: f64,
    table_ms: f64,
    index_bytes: f64,
    record_bytes: f64,
}

fn measure(records: u64, keyed: bool, runs: u64) -> Result<Row> {
    let map = Region::sparse(REGION)?;
    format(&map)?;
    let mut filler = Filler::new(attach(&map)?.0);
    filler.fill(0..records, LEN, keyed)?;
    let (closed, ..) = filler.finish()?.close();
    core(closed)?;
    let (mut times, mut tables) = (Vec::new(), Vec::new());
    let mut stats = None;
    for _ in 0..runs {
        let (ns, ready) = per_op(1_000_000, || host(&map));
        let (frames, work) = ready?;
        tables.push(ns);
        let options = RecoverOptions::default();
        let (ns, done) = per_op(1_000_000_000, || {
            Store::recover(&map, frames, work, list, options)
        });
        times.push(ns);
        let (store, report) = core(done)?;
        if report.records != records || report.keys != if keyed { records } else { 0 } {
            bail!("{records} records were put, recovery says {report:?}");
        }
        let mut rng = Rng(records);
        for _ in 0..if keyed { 1000 } else { 0 } {
            if core(store.lookup(&key(rng.below(records))))?.is_none() {
                bail!("a key is lost");
            }
        }
        stats = Some(store.stats());
        core(store.close().0)?;
    }
    let stats = stats.context("no run")?;
    let seconds = median(times).mid;
    let each = |frames: u64| (frames * FRAME_SIZE) as f64 / records as f64;
    Ok(Row {
        records,
        keyed,
        per_second: records as f64 / seconds,
        seconds,
        table_ms: median(tables).mid,
        index_bytes: each(stats.index_frames),
        record_bytes: each(stats.record_frames),
    })
}

/// What callgrind is to count: runs under it.
pub fn counted(records: u64) -> Result<()> {
    let map = Region::sparse(COUNTED_REGION)?;
    format(&map)?;
    let mut filler = Filler::new(attach(&map)?.0);
    filler.fill(0..records, LEN, true)?;
    core(filler.finish()?.close().0)?;
    let (frames, work) = host(&map)?;
    let options = RecoverOptions::default();
    valgrind::start();
    let done = Store::recover(&map, frames, work, list, options);
    valgrind::stop();
    core(done).map(|_| ())
}

/// The largest store up to 10 million records that memory has room for.
fn largest() -> Result<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    let kb = info.lines().find_map(|line| {
        let rest = line.strip_prefix("MemAvailable:")?;
        rest.split_whitespace().next()?.parse::<u64>().ok()
    });
    let free = kb.context("no MemAvailable")? * 1024;
    let room = free.saturating_sub(1 << 30) / PER_RECORD;
    Ok(room.min(10_000_000) / 100_000 * 100_000)
}

pub fn run(quick: bool) -> Result<(String, Value)> {
    let mut sizes = vec![100_000];
    if !quick {
        sizes.push(1_000_000);
        sizes.push(largest()?);
        sizes.dedup();
    }
    let mut rows = Vec::new();
    for keyed in [true, false] {
        for records in &sizes {
            eprintln!(
                "recovery: {records} records, {}",
                if keyed { "with keys" } else { "without" }
            );
            let runs = if *records > 1_000_000 { 1 } else { 5 };
            rows.push(measure(*records, keyed, runs)?);
        }
    }
    let mut text = String::from(
        "| records | keys | seconds | million records/s | index, bytes/record | records, bytes/record |\n\
         | --: | --- | --: | --: | --: | --: |\n",
    );
    let mut json = Vec::new();
    for row in &rows {
        text += &format!(
            "| {} | {} | {:.3} | {:.2} | {:.1} | {:.1} |\n",
            row.records,
            if row.keyed { "16 bytes" } else { "none" },
            row.seconds,
            row.per_second / 1e6,
            row.index_bytes,
            row.record_bytes,
        );
        json.push(json!({
            "records": row.records, "keyed": row.keyed, "seconds": row.seconds,
            "records_per_second": row.per_second, "frame_table_ms": row.table_ms,
            "index_bytes_per_record": row.index_bytes, "record_bytes_per_record": row.record_bytes,
        }));
    }
    let slowest = rows
        .iter()
        .map(|row| row.per_second)
        .fold(f64::INFINITY, f64::min);
    let table = rows.last().map_or(0.0, |row| row.table_ms);
    text += &format!(
        "\nAt least 2 million records/s are wanted: {} (slowest {:.2}). Before that, the table of all\n\
         frames of the region took {table:.0} ms, 8 bytes for each frame (2 MiB for each GiB).\n",
        if slowest >= 2e6 { "met" } else { "MISSED" },
        slowest / 1e6,
    );
    Ok((text, json.into()))
}
