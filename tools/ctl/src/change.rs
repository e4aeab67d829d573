// SPDX-License-Identifier: GPL-2.0-only

//! Deletes and truncations.

use std::process::ExitCode;

use anyhow::{bail, Context};
use clap::Args;
use pmskb_uapi::{Batch, Catalog, Store, MAX_OPS};
use serde_json::json;

use crate::{
    admin::the_store,
    records::failed,
    select::{Filter, Key},
    text,
};

/// Arguments of `del`.
#[derive(Args)]
pub struct Del {
    /// Keys; escapes as `ls` prints them
    #[arg(value_name = "KEY", value_parser = text::parse_key)]
    keys: Vec<Key>,
    /// Only if the key's record has this sequence number
    #[arg(long, value_name = "N")]
    if_seq: Option<u64>,
    /// Only say what would be deleted
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// pmskbN; by default the only one
    #[arg(long, value_name = "STORE", value_parser = text::parse_store)]
    store: Option<u32>,
    #[command(flatten)]
    filter: Filter,
}

/// Arguments of `truncate`.
#[derive(Args)]
pub struct Truncate {
    /// The last sequence number that goes
    #[arg(value_name = "SEQ", required_unless_present = "all")]
    seq: Option<u64>,
    /// All records without a key that are there now
    #[arg(long, conflicts_with = "seq")]
    all: bool,
    /// pmskbN; by default the only one
    #[arg(long, value_name = "STORE", value_parser = text::parse_store)]
    store: Option<u32>,
}

#[derive(Default)]
struct Tally {
    deleted: u64,
    missing: u64,
    kept: u64,
}

/// Deletes records by their keys.
pub fn del(a: &Del, json: bool) -> anyhow::Result<ExitCode> {
    if a.keys.is_empty() == a.filter.is_empty() {
        bail!("say what to delete: keys, or filters (--prefix TEXT; --prefix '' is every key)");
    }
    if a.if_seq.is_some() && a.keys.len() != 1 {
        bail!("--if-seq goes with exactly one key");
    }
    let store = Store::open_minor(the_store(a.store)?)?;
    let mut tally = Tally::default();
    if a.keys.is_empty() {
        let catalog = Catalog::of_store(&store)?;
        let mut some = Vec::new();
        for found in a.filter.by_key(&catalog) {
            let (key, record) = found.map_err(|e| failed("cannot read the records", e))?;
            // A record that takes its place meanwhile was not meant.
            some.push((key, Some(record.seq)));
            if some.len() == MAX_OPS {
                submit(a, &store, &mut some, &mut tally, json)?;
            }
        }
        submit(a, &store, &mut some, &mut tally, json)?;
    } else {
        for keys in a.keys.chunks(MAX_OPS) {
            let mut some = keys.iter().map(|k| (k.0.clone(), a.if_seq)).collect();
            submit(a, &store, &mut some, &mut tally, json)?;
        }
    }
    if json {
        println!(
            "{}",
            json!({
                "deleted": tally.deleted, "missing": tally.missing, "kept": tally.kept,
                "dry_run": a.dry_run,
            })
        );
    } else if !a.filter.is_empty() {
        let would = if a.dry_run { "would be " } else { "" };
        println!("{} records {would}deleted", text::count(tally.deleted));
        if tally.kept > 0 {
            println!(
                "{} were replaced meanwhile, and stay",
                text::count(tally.kept)
            );
        }
    }
    // By filters, what is gone already is as good.
    let all = a.keys.is_empty() || (tally.missing == 0 && tally.kept == 0);
    Ok(ExitCode::from(u8::from(!all)))
}

/// Deletes some keys together, and says so of each.
fn submit(
    a: &Del,
    store: &Store,
    some: &mut Vec<(Vec<u8>, Option<u64>)>,
    tally: &mut Tally,
    json: bool,
) -> anyhow::Result<()> {
    if some.is_empty() {
        return Ok(());
    }
    let mut batch = Batch::new();
    for (key, seq) in some.iter() {
        let op = batch.delete(key);
        if let Some(seq) = seq {
            batch.if_seq(op, *seq);
        }
    }
    if a.dry_run {
        let outcome = |seq: &Option<u64>| pmskb_uapi::Outcome {
            seq: seq.unwrap_or(0),
            replaced: false,
            copied: false,
            csum: 0,
            csum_kind: 0,
        };
        batch.set_outcomes(some.iter().map(|(_, seq)| Ok(outcome(seq))));
    } else {
        store.submit(&mut batch)?;
    }
    for (op, (key, _)) in some.drain(..).enumerate() {
        let name = text::key(&key);
        let what = format!("cannot delete {name}");
        let error = match batch.outcome_of(op, what) {
            Ok(done) => {
                tally.deleted += 1;
                if json {
                    println!(
                        "{}",
                        json!({ "key": name, "key_hex": text::hex(&key), "seq": done.seq, "deleted": !a.dry_run })
                    );
                } else if a.filter.is_empty() {
                    println!("{name}: record {} deleted", done.seq);
                } else if a.dry_run {
                    println!("{name}: record {}", done.seq);
                }
                continue;
            }
            Err(e) => e,
        };
        match error.errno() {
            libc::ENOENT => tally.missing += 1,
            libc::ESTALE => tally.kept += 1,
            _ => return Err(error.into()),
        }
        if json {
            println!(
                "{}",
                json!({ "key": name, "key_hex": text::hex(&key), "deleted": false, "error": error.cause.to_string() })
            );
        } else if a.filter.is_empty() {
            eprintln!("pmskbctl: {error}");
        }
    }
    Ok(())
}

/// Removes the log's beginning.
pub fn truncate(a: &Truncate, json: bool) -> anyhow::Result<ExitCode> {
    let minor = the_store(a.store)?;
    let store = Store::open_minor(minor)?;
    let before = store.info()?.raw;
    let seq = match a.seq {
        Some(seq) => seq,
        None => before.durable_seq,
    };
    if seq > before.durable_seq {
        bail!(
            "no record has the sequence number {seq} yet\n  the highest is {}; --all removes all that \
             are there now",
            before.durable_seq
        );
    }
    let mut batch = Batch::new();
    let op = batch.truncate(seq);
    store.submit(&mut batch)?;
    let done = batch
        .outcome_of(op, format!("cannot truncate pmskb{minor}"))
        .context("nothing was removed")?;
    if json {
        println!(
            "{}",
            json!({
                "store": format!("/dev/pmskb{minor}"),
                "trunc_seq": done.seq,
                "trunc_seq_before": before.trunc_seq,
            })
        );
    } else {
        println!(
            "pmskb{minor}: no record without a key is left up to {}; {} before",
            done.seq, before.trunc_seq
        );
    }
    Ok(ExitCode::SUCCESS)
}
