// SPDX-License-Identifier: GPL-2.0-only

//! Checks, and all that is known.

use std::{
    io::{self, BufWriter, Write},
    process::ExitCode,
};

use clap::Args;
use pmskb_uapi::{
    catalog::describe,
    core::{Error, Probe, Record, Report, Superblock, Verdict},
    Catalog,
};
use serde_json::{json, Value};

use crate::{progress::Progress, records, select::Select, source::Source, text};

/// Arguments of `verify`.
#[derive(Args)]
pub struct Verify {
    /// pmskbN; by default the only one
    #[arg(value_parser = text::parse_store, conflicts_with = "image")]
    store: Option<u32>,
    /// Only say what is wrong
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    select: Select,
    #[command(flatten)]
    source: Source,
}

/// Arguments of `dump`.
#[derive(Args)]
pub struct Dump {
    /// pmskbN; by default the only one
    #[arg(value_parser = text::parse_store, conflicts_with = "image")]
    store: Option<u32>,
    #[command(flatten)]
    select: Select,
    #[command(flatten)]
    source: Source,
}

/// What a check found.
#[derive(Default)]
struct Tally {
    records: u64,
    bytes: u64,
    intact: u64,
    unchecked: u64,
    replaced: u64,
    problems: u64,
}

/// Checks every record.
pub fn verify(a: &Verify, json: bool) -> anyhow::Result<ExitCode> {
    let catalog = a.source.open(a.store)?;
    let (_, live_bytes) = catalog.counts().unwrap_or_default();
    let mut progress = Progress::bytes(live_bytes);
    let mut tally = Tally::default();
    let mut part = vec![0; 1 << 20];
    let mut complain = |what: String, value: Value| {
        tally.problems += 1;
        progress.print(if json { value.to_string() } else { what });
    };

    for what in superblock_problems(catalog.probe()) {
        complain(what.clone(), json!({ "problem": what }));
    }
    if let Some(report) = catalog.report() {
        for (what, n) in report_problems(report) {
            complain(
                format!("{n} {what}"),
                json!({ "problem": what, "count": n }),
            );
        }
    }
    let mut failure = None;
    for record in a.select.records(&catalog) {
        let (record, key) = match record {
            Ok(found) => found,
            Err(e) => {
                // What comes after it cannot be reached.
                failure = Some(e);
                break;
            }
        };
        let verdict = record.verify(catalog.media(), catalog.geometry(), &mut part);
        if verdict != Ok(Verdict::Intact) && catalog.still(&record) == Ok(false) {
            tally.replaced += 1;
            continue;
        }
        tally.records += 1;
        tally.bytes += u64::from(record.len);
        progress.advance(record.len.into());
        let what = match verdict {
            Ok(Verdict::Intact) => {
                tally.intact += 1;
                continue;
            }
            Ok(Verdict::Unchecked) => {
                tally.unchecked += 1;
                continue;
            }
            Ok(Verdict::BadCsum) => "its bytes do not have its checksum",
            Ok(Verdict::BadCrc) => "its bytes do not have its CRC32C",
            Err(e) => describe(e),
        };
        let mut value = records::value(&record, key.as_deref());
        value["problem"] = what.into();
        let key = key.map_or("(no key)".into(), |k| text::key(&k));
        tally.problems += 1;
        progress.print(if json {
            value.to_string()
        } else {
            format!("record {} {key}: {what}", record.seq)
        });
    }
    drop(progress);
    if json {
        println!(
            "{}",
            json!({
                "records": tally.records,
                "bytes": tally.bytes,
                "intact": tally.intact,
                "without_checksum": tally.unchecked,
                "replaced_meanwhile": tally.replaced,
                "problems": tally.problems,
                "complete": failure.is_none(),
            })
        );
    } else if !a.quiet || tally.problems > 0 {
        println!(
            "{} records, {}: {} intact, {} without a checksum, {} problems",
            text::count(tally.records),
            text::size(tally.bytes),
            text::count(tally.intact),
            text::count(tally.unchecked),
            text::count(tally.problems),
        );
    }
    if let Some(e) = failure {
        let problem = matches!(e, Error::Damaged | Error::Io);
        eprintln!("pmskbctl: cannot read all records: {}", describe(e));
        return Ok(ExitCode::from(if problem { 1 } else { 2 }));
    }
    Ok(ExitCode::from(u8::from(tally.problems > 0)))
}

fn superblock_problems(probe: &Probe) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, error) in [("first", probe.first), ("last", probe.last)] {
        if let Some(e) = error {
            problems.push(format!(
                "the {name} superblock cannot be used: {}",
                superblock_error(e)
            ));
        }
    }
    problems
}

pub fn superblock_error(e: Error) -> &'static str {
    match e {
        Error::NotFormatted => "it is not there",
        Error::Damaged => "its checksum or contents are wrong",
        e => describe(e),
    }
}

/// What recovery found that a healthy store does not have. Torn records are not
/// among it: a put that a power cut ended leaves one, and was not acknowledged.
fn report_problems(report: &Report) -> impl Iterator<Item = (&'static str, u64)> {
    [
        ("damaged record frames", report.damaged_frames),
        ("records with impossible extents", report.bad_extents),
        ("frames or records that cannot be read", report.unreadable),
    ]
    .into_iter()
    .filter(|(_, n)| *n > 0)
}

/// Shows everything.
pub fn dump(a: &Dump, json: bool) -> anyhow::Result<ExitCode> {
    let catalog = a.source.open(a.store)?;
    let mut out = BufWriter::new(io::stdout().lock());
    let probe = catalog.probe();
    if json {
        let superblock = superblock_value(&probe.superblock);
        let problems = superblock_problems(probe);
        let report = catalog.report().map(report_value);
        let value = json!({
            "superblock": superblock, "problems": problems, "stale_copy": probe.stale,
            "recovery": report,
        });
        writeln!(out, "{value}")?;
    } else {
        write_pairs(&mut out, "superblock", &superblock_value(&probe.superblock))?;
        for problem in superblock_problems(probe) {
            writeln!(out, "  {problem}")?;
        }
        if probe.stale {
            writeln!(out, "  the two superblocks differ: an update was cut short")?;
        }
        if let Some(report) = catalog.report() {
            write_pairs(&mut out, "recovery", &report_value(report))?;
        }
    }
    for record in a.select.records(&catalog) {
        let (record, key) = record.map_err(|e| records::failed("cannot read the records", e))?;
        let mut value = records::value(&record, key.as_deref());
        detail(&catalog, &record, &mut value);
        if json {
            writeln!(out, "{value}")?;
        } else {
            write_pairs(&mut out, &format!("record {}", record.seq), &value)?;
        }
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// Adds where a record and its bytes are.
fn detail(catalog: &Catalog, record: &Record, value: &mut Value) {
    value["offset"] = record.loc.0.into();
    value["lines"] = record.lines.into();
    if let Ok(Some(extent)) = record.key_extent(catalog.media()) {
        value["key_at"] = json!([extent.off, extent.len]);
    }
    value["extents"] = match catalog.extents(record) {
        Ok(extents) => extents.iter().map(|e| json!([e.off, e.len])).collect(),
        Err(e) => describe(e).into(),
    };
}

fn superblock_value(sb: &Superblock) -> Value {
    let g = &sb.geometry;
    json!({
        "version": sb.version,
        "compat": sb.compat,
        "ro_compat": sb.ro_compat,
        "incompat": sb.incompat,
        "uuid": text::uuid(&sb.uuid),
        "label": pmskb_uapi::store::text(&sb.label),
        "created": text::time(sb.created),
        "update": sb.update,
        "attaches": sb.attaches,
        "trunc_seq": sb.trunc_seq,
        "seq_floor": sb.seq_floor,
        "region_len": g.region_len,
        "map_off": g.map_off,
        "map_len": g.map_len,
        "head_off": g.head_off,
        "head_len": g.head_len,
        "data_off": g.data_off,
        "data_len": g.data_len,
    })
}

fn report_value(r: &Report) -> Value {
    json!({
        "records": r.records,
        "keys": r.keys,
        "live_bytes": r.live_bytes,
        "superseded": r.superseded,
        "truncated": r.truncated,
        "killed": r.killed,
        "torn": r.torn,
        "record_frames": r.record_frames,
        "empty_frames": r.empty_frames,
        "damaged_frames": r.damaged_frames,
        "bad_extents": r.bad_extents,
        "unreadable": r.unreadable,
        "superblock_repaired": r.superblock_repaired,
        "replayed": r.replayed,
        "last_seq": r.last_seq,
    })
}

fn write_pairs(out: &mut impl Write, title: &str, value: &Value) -> io::Result<()> {
    writeln!(out, "{title}")?;
    let Value::Object(pairs) = value else {
        return Ok(());
    };
    for (name, value) in pairs {
        match value {
            Value::Null => {}
            // The label is whatever is on the media.
            Value::String(s) => writeln!(out, "  {name:<20} {}", text::key(s.as_bytes()))?,
            other => writeln!(out, "  {name:<20} {other}")?,
        }
    }
    Ok(())
}
