// SPDX-License-Identifier: GPL-2.0-only

//! Compaction and scrubbing of attached stores.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Args;
use pmskb_uapi::{Catalog, Store, StoreInfo};
use serde_json::json;

use crate::{
    admin::the_store,
    progress::{Progress, Stop, STOPPED},
    text,
};

/// Arguments of `compact`.
#[derive(Args)]
pub struct Compact {
    /// pmskbN; by default the only one
    #[arg(value_parser = text::parse_store)]
    store: Option<u32>,
}

/// Arguments of `scrub`.
#[derive(Args)]
pub struct Scrub {
    /// pmskbN; by default the only one
    #[arg(value_parser = text::parse_store)]
    store: Option<u32>,
    /// At most so many bytes a second, or with K, M, G
    #[arg(long, value_name = "BYTES", value_parser = text::parse_rate)]
    rate: Option<u64>,
    /// Begin with this sequence number
    #[arg(long, value_name = "SEQ", default_value_t = 0)]
    from: u64,
}

/// Steps of one call: each keeps writers waiting for about a millisecond, and a
/// signal is looked at after each call.
const STEPS: u32 = 16;

/// Bytes of the data frames that are free.
fn free(info: &StoreInfo) -> u64 {
    info.raw.frames_free * pmskb_uapi::FRAME_SIZE
}

/// Moves live records together.
pub fn compact(a: &Compact, json: bool) -> anyhow::Result<ExitCode> {
    let minor = the_store(a.store)?;
    let store = Store::open_minor(minor)?;
    let before = store.info()?;
    let stop = Stop::on_signals()?;
    let mut progress = Progress::of(before.raw.durable_seq, "sequence numbers");
    let (mut records, mut bytes) = (0, 0);
    let mut from = Some(0);
    while let Some(at) = from {
        if stop.wanted() {
            break;
        }
        match store.compact(at, STEPS) {
            Ok(done) => {
                records += done.records;
                bytes += done.bytes;
                from = done.next;
                progress.at(from.unwrap_or(before.raw.durable_seq));
            }
            // The signal is seen above.
            Err(e) if e.errno() == libc::EINTR => {}
            Err(e) => return Err(e.into()),
        }
    }
    drop(progress);
    let after = store.info()?;
    let stopped = from.is_some();
    // Others use the store meanwhile: what they free or take is in it.
    let freed = i128::from(free(&after)) - i128::from(free(&before));
    let fragmented = (before.raw.fragmented_bytes, after.raw.fragmented_bytes);
    if json {
        println!(
            "{}",
            json!({
                "store": format!("/dev/pmskb{minor}"),
                "records_moved": records,
                "bytes_moved": bytes,
                "bytes_freed": i64::try_from(freed).unwrap_or(0),
                "fragmented_before": fragmented.0,
                "fragmented_after": fragmented.1,
                "complete": !stopped,
            })
        );
    } else {
        println!(
            "pmskb{minor}: {} records moved, {}; {} freed; {} fragmented, {} before",
            text::count(records),
            text::size(bytes),
            text::signed_size(freed),
            text::size(fragmented.1),
            text::size(fragmented.0),
        );
    }
    if stopped {
        eprintln!(
            "pmskbctl: stopped; the store is consistent, and what was moved stays moved\n  \
             `pmskbctl compact` begins anew, and has less to do"
        );
        return Ok(ExitCode::from(STOPPED));
    }
    Ok(ExitCode::SUCCESS)
}

/// What is wrong with a record.
fn meaning(errno: i32) -> (&'static str, &'static str) {
    match errno {
        libc::EBADMSG => ("checksum", "its bytes do not have its checksum"),
        libc::EIO => ("unreadable", "the media cannot be read there"),
        _ => ("extents", "its extents are damaged"),
    }
}

/// Checks every record, in the kernel.
pub fn scrub(a: &Scrub, json: bool) -> anyhow::Result<ExitCode> {
    let minor = the_store(a.store)?;
    let store = Store::open_minor(minor)?;
    let catalog = Catalog::of_store(&store)?;
    let stop = Stop::on_signals()?;
    let mut progress = Progress::bytes(store.info()?.raw.live_bytes);
    let started = Instant::now();
    // Ten calls a second, so that the rate is even; a call reads one record at least.
    let chunk = a.rate.map_or(4 << 20, |rate| (rate / 10).clamp(1, 4 << 20));
    let (mut records, mut bytes, mut bad) = (0, 0, 0u64);
    let mut from = Some(a.from);
    while let Some(at) = from {
        if stop.wanted() {
            break;
        }
        let done = match store.scrub(at, chunk) {
            Ok(done) => done,
            Err(e) if e.errno() == libc::EINTR => continue,
            Err(e) => return Err(e.into()),
        };
        records += done.records;
        bytes += done.bytes;
        from = done.next;
        progress.advance(done.bytes);
        for &(seq, errno) in &done.bad {
            bad += 1;
            // Gone by now, or its key cannot be read: it has a number anyway.
            let record = catalog.log_from(seq).ok().flatten();
            let record = record.filter(|r| r.seq == seq && r.keyed());
            let key = record.and_then(|r| catalog.key(&r).ok().flatten());
            let (kind, meaning) = meaning(errno);
            progress.print(if json {
                json!({
                    "seq": seq,
                    "key": key.as_deref().map(text::key),
                    "key_hex": key.as_deref().map(text::hex),
                    "problem": kind,
                    "meaning": meaning,
                })
                .to_string()
            } else {
                let key = key.map_or("(no key)".into(), |k| text::key(&k));
                format!("record {seq} {key}: {meaning}")
            });
        }
        if let (Some(rate), Some(_)) = (a.rate, from) {
            let due = Duration::from_secs_f64(bytes as f64 / rate as f64);
            stop.sleep(due.saturating_sub(started.elapsed()));
        }
    }
    drop(progress);
    if json {
        println!(
            "{}",
            json!({
                "store": format!("/dev/pmskb{minor}"),
                "records": records,
                "bytes": bytes,
                "seconds": started.elapsed().as_secs_f64(),
                "bad": bad,
                "complete": from.is_none(),
                "next": from,
            })
        );
    } else {
        println!(
            "pmskb{minor}: {} records checked, {} in {:.1} s: {} bad",
            text::count(records),
            text::size(bytes),
            started.elapsed().as_secs_f64(),
            text::count(bad),
        );
    }
    if bad > 0 && !json {
        eprintln!(
            "pmskbctl: `pmskbctl get --seq N` writes what can be read of a record; put or delete its \
             key to be rid of it"
        );
    }
    if let Some(next) = from {
        eprintln!("pmskbctl: stopped; `pmskbctl scrub pmskb{minor} --from {next}` goes on");
        return Ok(ExitCode::from(STOPPED));
    }
    Ok(ExitCode::from(u8::from(bad > 0)))
}
