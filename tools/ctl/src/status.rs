// SPDX-License-Identifier: GPL-2.0-only

//! Lists of stores, and their counters.

use std::{io::IsTerminal, process::ExitCode, time::Duration};

use clap::Args;
use pmskb_uapi::{store, store::UNPLACED, Store, StoreInfo};
use serde_json::{json, Value};

use crate::{admin::the_store, text};

/// Arguments of `info`.
#[derive(Args)]
pub struct Info {
    /// pmskbN; by default the only one
    #[arg(value_parser = text::parse_store)]
    store: Option<u32>,
    /// Go on every so many seconds, with what changed each second
    #[arg(long, value_name = "SECONDS")]
    watch: Option<f64>,
}

/// The block or DAX device below a store, from sysfs.
pub fn device_of(minor: u32) -> Option<String> {
    let class = format!("/sys/class/pmskb/pmskb{minor}");
    let name = std::fs::read_to_string(format!("{class}/backing"))
        .ok()
        .or_else(|| {
            let link = std::fs::read_link(format!("{class}/device")).ok()?;
            Some(link.file_name()?.to_str()?.to_owned())
        })?;
    Some(name.trim().to_owned()).filter(|n| !n.is_empty())
}

/// Shows all stores.
pub fn list(json: bool) -> anyhow::Result<ExitCode> {
    let mut rows = Vec::new();
    for minor in store::attached() {
        let info = Store::open_minor(minor)?.info()?;
        rows.push((minor, device_of(minor), info));
    }
    if json {
        let all: Vec<Value> = rows
            .iter()
            .map(|(minor, device, info)| {
                json!({
                    "store": format!("/dev/pmskb{minor}"),
                    "device": device,
                    "uuid": text::uuid(&info.raw.uuid),
                    "label": info.label(),
                    "region_bytes": info.raw.region_len,
                    "frames_total": info.raw.frames_total,
                    "frames_free": info.raw.frames_free,
                    "records": info.raw.records,
                    "live_bytes": info.raw.live_bytes,
                })
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(ExitCode::SUCCESS);
    }
    if rows.is_empty() {
        eprintln!("no store is attached; `pmskbctl attach DEVICE` attaches one");
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{:<14} {:<10} {:>10} {:>6} {:>12} {:>10}  {:<36}  LABEL",
        "STORE", "DEVICE", "SIZE", "FREE", "RECORDS", "BYTES", "UUID"
    );
    for (minor, device, info) in &rows {
        println!(
            "{:<14} {:<10} {:>10} {:>6} {:>12} {:>10}  {:<36}  {}",
            format!("/dev/pmskb{minor}"),
            device.as_deref().unwrap_or("-"),
            text::size(info.raw.region_len),
            percent(info.raw.frames_free, info.raw.frames_total),
            text::count(info.raw.records),
            text::size(info.raw.live_bytes),
            text::uuid(&info.raw.uuid),
            text::key(info.label().as_bytes()),
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".into();
    }
    format!("{:.0}%", part as f64 * 100.0 / whole as f64)
}

/// Shows a store's counters.
pub fn info(a: &Info, json: bool) -> anyhow::Result<ExitCode> {
    let store = Store::open_minor(the_store(a.store)?)?;
    let Some(seconds) = a.watch else {
        let info = store.info()?;
        if json {
            println!("{}", serde_json::to_string_pretty(&value(&info))?);
        } else {
            print!("{}", page(&info, None));
        }
        return Ok(ExitCode::SUCCESS);
    };
    let every = Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|d| *d >= Duration::from_millis(10))
        .ok_or_else(|| anyhow::anyhow!("--watch is a number of seconds, 0.01 or more"))?;
    let mut last: Option<StoreInfo> = None;
    loop {
        let info = store.info()?;
        if json {
            println!("{}", value(&info));
        } else {
            if std::io::stdout().is_terminal() {
                print!("\x1b[H\x1b[2J");
            }
            println!(
                "{}",
                page(&info, last.as_ref().map(|l| (l, every.as_secs_f64())))
            );
        }
        last = Some(info);
        std::thread::sleep(every);
    }
}

/// A counter: name, value.
type Row = (&'static str, u64);

fn traffic(info: &StoreInfo) -> Vec<Row> {
    let c = &info.raw.counters;
    let mut rows = vec![
        ("packets placed", c.placed),
        ("bytes placed", c.placed_bytes),
        ("packets unplaced", c.unplaced.iter().sum()),
        ("heads in DRAM, area full", c.heads_in_dram),
        ("bytes copied on receive", c.copied_bytes),
        ("checksums derived", c.derived),
        ("checksums of hardware", c.hardware),
        ("checksums computed", c.computed),
        ("bytes read for checksums", c.computed_bytes),
        ("checksum mismatches", c.mismatch),
        ("receives over quota", c.refused),
        ("bytes logged by auto-persist", c.logged_bytes),
        ("submissions", info.raw.submits),
        ("lines flushed", info.raw.lines_flushed),
        ("fences", info.raw.fences),
    ];
    let reasons = [
        "  no free frame",
        "  no kernel memory",
        "  shape not handled",
        "  too large",
        "  copy failed",
        "  socket's quota of frames",
        "  all sockets' quota",
    ];
    for (i, ((_, index), name)) in UNPLACED.iter().zip(reasons).enumerate() {
        rows.insert(3 + i, (name, c.unplaced[*index]));
    }
    rows
}

fn page(info: &StoreInfo, last: Option<(&StoreInfo, f64)>) -> String {
    let r = &info.raw;
    let mut out = String::new();
    let mut line = |name: &str, text: String| out.push_str(&format!("{name:<26} {text}\n"));
    line("store", format!("/dev/pmskb{}", r.minor));
    line("device", device_of(r.minor).unwrap_or_else(|| "-".into()));
    line("uuid", text::uuid(&r.uuid));
    line("label", text::key(info.label().as_bytes()));
    line(
        "region",
        format!("{} ({} bytes)", text::size(r.region_len), r.region_len),
    );
    line(
        "head area",
        format!("{} at {:#x}", text::size(r.head_len), r.head_off),
    );
    line(
        "heads free",
        format!(
            "{} of {} frames",
            text::count(r.heads_free),
            text::count(r.heads_total)
        ),
    );
    line(
        "data area",
        format!(
            "{} frames at {:#x}",
            text::count(r.frames_total),
            r.data_off
        ),
    );
    for (name, n) in [
        ("  free", r.frames_free),
        ("  payload of records", r.frames_payload),
        ("  records", r.frames_record),
        ("  extent lists", r.frames_list),
        ("  index", r.frames_index),
        ("  held by sockets", r.frames_held),
        ("  in limbo", r.frames_limbo),
        ("  bad", r.frames_bad),
    ] {
        line(
            name,
            format!("{:<12} {}", text::count(n), percent(n, r.frames_total)),
        );
    }
    line(
        "records",
        format!(
            "{}, {} with a key",
            text::count(r.records),
            text::count(r.keys)
        ),
    );
    line(
        "live bytes",
        format!(
            "{} ({})",
            text::count(r.live_bytes),
            text::size(r.live_bytes)
        ),
    );
    for (name, n) in [
        ("  in records", r.record_bytes),
        ("  fragmented", r.fragmented_bytes),
        ("  reclaimable", r.reclaimable_bytes),
    ] {
        line(name, format!("{} ({})", text::count(n), text::size(n)));
    }
    line("durable up to", r.durable_seq.to_string());
    line("sockets attached", text::count(r.sockets));
    line("tokens held", text::count(r.tokens));
    for (name, n) in [
        ("frames not persisted", r.frames_sockets),
        ("  quota", r.quota_store_frames),
        ("  of one socket", r.quota_socket_frames),
    ] {
        line(
            name,
            format!("{:<12} {}", text::count(n), percent(n, r.frames_total)),
        );
    }
    line("tokens of one socket", text::count(r.quota_socket_tokens));
    line("since attach", String::new());
    let before = last.map(|(l, s)| (traffic(l), s));
    for (i, (name, n)) in traffic(info).into_iter().enumerate() {
        let rate = before.as_ref().map(|(rows, seconds)| {
            format!("{:>16.0}/s", n.saturating_sub(rows[i].1) as f64 / seconds)
        });
        line(
            &format!("  {name}"),
            format!("{:<14}{}", text::count(n), rate.unwrap_or_default()),
        );
    }
    out
}

fn value(info: &StoreInfo) -> Value {
    let r = &info.raw;
    let c = &r.counters;
    let unplaced: serde_json::Map<String, Value> = UNPLACED
        .iter()
        .map(|(name, i)| (name.to_string(), c.unplaced[*i].into()))
        .collect();
    let mut out = json!({
        "store": format!("/dev/pmskb{}", r.minor),
        "device": device_of(r.minor),
        "uuid": text::uuid(&r.uuid),
        "label": info.label(),
        "region_len": r.region_len,
        "map_len": r.map_len,
        "head_off": r.head_off,
        "head_len": r.head_len,
        "data_off": r.data_off,
        "counters": {
            "placed": c.placed,
            "placed_bytes": c.placed_bytes,
            "unplaced": unplaced,
            "copied_bytes": c.copied_bytes,
            "derived": c.derived,
            "hardware": c.hardware,
            "computed": c.computed,
            "computed_bytes": c.computed_bytes,
            "mismatch": c.mismatch,
            "refused": c.refused,
            "logged_bytes": c.logged_bytes,
            "heads_in_dram": c.heads_in_dram,
        },
    });
    let numbers = json!({
        "frames_total": r.frames_total,
        "frames_free": r.frames_free,
        "read_only": r.flags & pmskb_uapi::sys::PMSKB_STORE_READ_ONLY != 0,
        "crc32c": r.flags & pmskb_uapi::sys::PMSKB_STORE_CRC32C != 0,
        "frames_payload": r.frames_payload,
        "frames_record": r.frames_record,
        "frames_list": r.frames_list,
        "frames_index": r.frames_index,
        "frames_held": r.frames_held,
        "frames_reserve": r.frames_reserve,
        "frames_limbo": r.frames_limbo,
        "frames_bad": r.frames_bad,
        "heads_total": r.heads_total,
        "heads_free": r.heads_free,
        "records": r.records,
        "keys": r.keys,
        "live_bytes": r.live_bytes,
        "record_bytes": r.record_bytes,
        "fragmented_bytes": r.fragmented_bytes,
        "reclaimable_bytes": r.reclaimable_bytes,
        "trunc_seq": r.trunc_seq,
        "moved_records": r.moved_records,
        "moved_bytes": r.moved_bytes,
        "durable_seq": r.durable_seq,
        "sockets": r.sockets,
        "tokens": r.tokens,
        "frames_sockets": r.frames_sockets,
        "quota_store_frames": r.quota_store_frames,
        "quota_socket_frames": r.quota_socket_frames,
        "quota_socket_tokens": r.quota_socket_tokens,
        "lines_flushed": r.lines_flushed,
        "fences": r.fences,
        "submits": r.submits,
    });
    if let (Value::Object(out), Value::Object(numbers)) = (&mut out, numbers) {
        out.extend(numbers);
    }
    out
}
