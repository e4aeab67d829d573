// SPDX-License-Identifier: GPL-2.0-only

//! Records and objects.

use std::{
    fs::File,
    io::{self, BufWriter, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{bail, Context};
use clap::Args;
use pmskb_uapi::{catalog::describe, core::Record, Catalog};
use serde_json::{json, Value};

use crate::{
    flow::{self, Ends},
    select::{Key, Select},
    source::Source,
    text,
};

/// Arguments of `ls`.
#[derive(Args)]
pub struct Ls {
    /// pmskbN; by default the only one
    #[arg(value_parser = text::parse_store, conflicts_with = "image")]
    store: Option<u32>,
    /// Print keys in hexadecimal digits
    #[arg(long)]
    key_hex: bool,
    /// Only say how many there are, and how many bytes they have
    #[arg(long)]
    count: bool,
    #[command(flatten)]
    select: Select,
    #[command(flatten)]
    source: Source,
}

/// Arguments of `get`.
#[derive(Args)]
pub struct Get {
    /// The key; escapes as `ls` prints them
    #[arg(required_unless_present_any = ["seq", "key_hex", "flow"], value_parser = text::parse_key)]
    key: Option<Key>,
    /// The key, in hexadecimal digits
    #[arg(long, value_name = "DIGITS", conflicts_with = "key", value_parser = text::parse_hex_key)]
    key_hex: Option<Key>,
    /// The record with this sequence number
    #[arg(long, value_name = "N", conflicts_with_all = ["key", "key_hex"])]
    seq: Option<u64>,
    /// All that came over a TCP connection with auto-persist: PEER:PORT,LOCAL:PORT; with "udp "
    /// before it, in datagrams
    #[arg(long, value_name = "ENDS", conflicts_with_all = ["key", "key_hex", "seq"])]
    flow: Option<Ends>,
    /// Of several streams with these ends, or with a gap between: this one; of datagrams only
    /// this one
    #[arg(long, value_name = "N", requires = "flow")]
    part: Option<usize>,
    /// Write to this file; by default to the standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// pmskbN; by default the only one
    #[arg(long, value_name = "STORE", value_parser = text::parse_store, conflicts_with = "image")]
    store: Option<u32>,
    #[command(flatten)]
    source: Source,
}

/// The error of a read, as people read it.
pub fn failed(what: &str, e: pmskb_uapi::core::Error) -> anyhow::Error {
    anyhow::anyhow!("{what}: {}", describe(e))
}

/// A record as JSON.
pub fn value(record: &Record, key: Option<&[u8]>) -> Value {
    let m = &record.meta;
    let flow = m.flow.as_ref().map(|f| {
        let (remote, local) = text::ends(f);
        json!({
            "protocol": if f.udp { "udp" } else { "tcp" },
            "remote": remote.to_string(),
            "local": local.to_string(),
        })
    });
    json!({
        "seq": record.seq,
        "key": key.map(text::key),
        "key_hex": key.map(text::hex),
        "length": record.len,
        "time_ns": m.time,
        "time": text::time(m.time),
        "time_source": text::time_source(m.time_source),
        "csum": format!("{:04x}", m.csum.get()),
        "csum_kind": text::csum_kind(m.csum_kind),
        "payload_crc32c": m.payload_crc.map(|c| format!("{c:08x}")),
        "copied": m.copied,
        "flow": flow,
        "tcp_seq": m.tcp_seq,
        "extents": record.nr_extents,
    })
}

/// Shows records.
pub fn ls(a: &Ls, json: bool) -> anyhow::Result<ExitCode> {
    let catalog = a.source.open(a.store)?;
    if a.count {
        return count(a, &catalog, json);
    }
    let mut out = BufWriter::new(io::stdout().lock());
    if !json {
        writeln!(
            out,
            "{:>8} {:>9}  {:<26} {:<9}  {:<4} {:<8}  {:<42}  KEY",
            "SEQ", "LENGTH", "TIME (UTC)", "SOURCE", "CSUM", "KIND", "FLOW"
        )?;
    }
    for record in a.select.records(&catalog) {
        let (record, key) = record.map_err(|e| failed("cannot read the records", e))?;
        if json {
            writeln!(out, "{}", value(&record, key.as_deref()))?;
            continue;
        }
        let m = &record.meta;
        let key = match &key {
            None => "(none)".into(),
            Some(key) if a.key_hex => text::hex(key),
            Some(key) => text::key(key),
        };
        writeln!(
            out,
            "{:>8} {:>9}  {:<26} {:<9}  {:04x} {:<8}  {:<42}  {key}",
            record.seq,
            record.len,
            text::short_time(m.time),
            text::time_source(m.time_source),
            m.csum.get(),
            text::csum_kind(m.csum_kind),
            text::flow(&m.flow),
        )?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// How many records are meant.
fn count(a: &Ls, catalog: &Catalog, json: bool) -> anyhow::Result<ExitCode> {
    let fail = |e| failed("cannot read the records", e);
    let (records, bytes) = if a.select.is_all() {
        catalog.counts().map_err(fail)?
    } else {
        let (mut records, mut bytes) = (0, 0);
        for found in a.select.records(catalog) {
            records += 1;
            bytes += u64::from(found.map_err(fail)?.0.len);
        }
        (records, bytes)
    };
    if json {
        println!("{}", json!({ "records": records, "bytes": bytes }));
    } else {
        println!("{} records, {}", text::count(records), text::size(bytes));
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes an object's bytes.
pub fn get(a: &Get, json: bool) -> anyhow::Result<ExitCode> {
    let catalog = a.source.open(a.store)?;
    if let Some(ends) = a.flow {
        return flow::get(&catalog, ends, a.part, a.output.as_deref(), json);
    }
    // One that is replaced while it is read is read again.
    for _ in 0..100 {
        let record = find(a, &catalog)?;
        let mut bytes = Vec::with_capacity(record.len as usize);
        let whole = catalog
            .read(&record, |part| bytes.extend_from_slice(part))
            .map_err(|e| failed("cannot read the object", e))?;
        if !whole {
            continue;
        }
        let key = catalog
            .key(&record)
            .map_err(|e| failed("cannot read the key", e))?;
        match &a.output {
            Some(path) => {
                let written = File::create(path).and_then(|mut f| f.write_all(&bytes));
                written.with_context(|| format!("cannot write {}", path.display()))?;
            }
            None if json => {}
            None => {
                if io::stdout().is_terminal() && !text::is_plain(&bytes) {
                    bail!("the object is not text\n  give a file with -o, or a pipe");
                }
                io::stdout().write_all(&bytes)?;
            }
        }
        if json {
            let key = key.filter(|_| record.keyed());
            println!("{}", value(&record, key.as_deref()));
        }
        return Ok(ExitCode::SUCCESS);
    }
    bail!("the record is replaced again and again; try later")
}

fn find(a: &Get, catalog: &Catalog) -> anyhow::Result<Record> {
    let fail = |e| failed("cannot look the record up", e);
    if let Some(seq) = a.seq {
        let found = catalog
            .log_from(seq)
            .map_err(fail)?
            .filter(|r| r.seq == seq);
        return found.with_context(|| {
            format!("there is no record {seq}\n  it was replaced, deleted, or never there; `pmskbctl ls` shows those that are")
        });
    }
    let key = a
        .key
        .as_ref()
        .or(a.key_hex.as_ref())
        .map(|k| k.0.as_slice())
        .unwrap_or_default();
    catalog.get(key).map_err(fail)?.with_context(|| {
        format!(
            "there is no record with the key {}\n  `pmskbctl ls` shows those that are",
            text::key(key)
        )
    })
}
