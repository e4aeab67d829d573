// SPDX-License-Identifier: GPL-2.0-only

//! What came over a TCP connection, or in datagrams, put together again from the records of
//! auto-persist.

use std::{
    fs::File,
    io::{self, IsTerminal, Write},
    net::SocketAddr,
    path::Path,
    process::ExitCode,
};

use anyhow::{bail, Context};
use pmskb_uapi::{core::Record, Catalog};
use serde_json::json;

use crate::{records::failed, source::Log, text};

/// Both ends of a connection, as `ls` prints them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    udp: bool,
    remote: SocketAddr,
    local: SocketAddr,
}

impl std::str::FromStr for Ends {
    type Err = String;

    fn from_str(from: &str) -> Result<Self, String> {
        let from = from.trim();
        let udp = from.strip_prefix("udp");
        let ends = udp
            .or(from.strip_prefix("tcp"))
            .unwrap_or(from)
            .trim_start();
        let parsed = ends.split_once(['>', ',']).and_then(|(remote, local)| {
            let end = |text: &str| text.trim().parse().ok();
            Some(Self {
                udp: udp.is_some(),
                remote: end(remote)?,
                local: end(local)?,
            })
        });
        parsed.ok_or_else(|| {
            "this is not [udp ]ADDRESS:PORT,ADDRESS:PORT (the peer's first; of IPv6 [ADDRESS]:PORT)"
                .into()
        })
    }
}

/// A run of records that follow each other in the stream; or of datagrams one, or all.
struct Part {
    records: Vec<Record>,
    bytes: u64,
}

/// Bytes of a record that come after those of a part; `None` if some between are missing.
fn follows(part: &Part, record: &Record) -> Option<u32> {
    let last = part.records.last()?;
    let end = last.meta.tcp_seq.wrapping_add(last.len);
    // How far it goes back: a record of what a record has already is no gap.
    let back = end.wrapping_sub(record.meta.tcp_seq);
    (back <= record.len).then(|| record.len - back)
}

/// Records without a key of a connection, in the order of the log, which is that of the stream; of
/// datagrams each is a part if they are wanted `apart`.
fn parts(catalog: &Catalog, ends: Ends, apart: bool) -> anyhow::Result<Vec<Part>> {
    let mut parts: Vec<Part> = Vec::new();
    for record in Log::new(catalog, false, (0, u64::MAX)) {
        let record = record.map_err(|e| failed("cannot read the records", e))?;
        let meant = |flow| text::ends(flow) == (ends.remote, ends.local) && flow.udp == ends.udp;
        if record.keyed() || !record.meta.flow.as_ref().is_some_and(meant) {
            continue;
        }
        let more = |part: &Part| match ends.udp {
            true => (!apart).then_some(record.len),
            false => follows(part, &record),
        };
        match parts.last_mut().map(|part| (more(part), part)) {
            Some((Some(more), part)) => {
                part.bytes += u64::from(more);
                if more > 0 || ends.udp {
                    part.records.push(record);
                }
            }
            _ => parts.push(Part {
                bytes: u64::from(record.len),
                records: vec![record],
            }),
        }
    }
    Ok(parts)
}

/// Writes the bytes of a part; to a terminal nothing that it obeys.
fn write(
    catalog: &Catalog,
    udp: bool,
    part: &Part,
    out: &mut dyn Write,
    terminal: bool,
) -> anyhow::Result<()> {
    let mut next = part.records.first().map_or(0, |r| r.meta.tcp_seq);
    let mut bytes = Vec::new();
    for record in &part.records {
        bytes.clear();
        let whole = catalog
            .read(record, |some| bytes.extend_from_slice(some))
            .map_err(|e| failed("cannot read a record", e))?;
        if !whole {
            bail!("record {} was truncated meanwhile", record.seq);
        }
        let skip = match udp {
            true => 0,
            false => next.wrapping_sub(record.meta.tcp_seq) as usize,
        };
        let bytes = bytes.get(skip..).unwrap_or_default();
        if terminal && !text::is_plain(bytes) {
            bail!(
                "record {} is not text\n  give a file with -o, or a pipe",
                record.seq
            );
        }
        out.write_all(bytes)?;
        next = record.meta.tcp_seq.wrapping_add(record.len);
    }
    Ok(out.flush()?)
}

/// Writes what came over a connection. If there are gaps, or several connections with the same ends,
/// it is one of the parts that has to be chosen.
pub fn get(
    catalog: &Catalog,
    ends: Ends,
    part: Option<usize>,
    output: Option<&Path>,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let parts = parts(catalog, ends, part.is_some())?;
    let seqs = |part: &Part| {
        let seq = |record: Option<&Record>| record.map_or(0, |record| record.seq);
        (seq(part.records.first()), seq(part.records.last()))
    };
    let chosen = match (part, parts.as_slice()) {
        (_, []) => bail!("there are no records of this connection\n  `pmskbctl ls` shows the connections of those that are; of datagrams they begin with `udp`"),
        (None, [only]) => only,
        (Some(n), parts) => n.checked_sub(1).and_then(|n| parts.get(n)).with_context(|| {
            format!("there are {} parts, no part {n}", parts.len())
        })?,
        (None, parts) => {
            let list: Vec<String> = parts
                .iter()
                .enumerate()
                .map(|(n, part)| {
                    let (first, last) = seqs(part);
                    format!("\n  --part {}: records {first} to {last}, {} bytes", n + 1, part.bytes)
                })
                .collect();
            bail!("the records are of {} streams, or bytes between them are missing; choose one{}", parts.len(), list.concat())
        }
    };
    match output {
        Some(path) => {
            let mut file =
                File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
            write(catalog, ends.udp, chosen, &mut file, false)?;
        }
        None if json => {}
        None => {
            let terminal = io::stdout().is_terminal();
            write(
                catalog,
                ends.udp,
                chosen,
                &mut io::stdout().lock(),
                terminal,
            )?;
        }
    }
    if json {
        let (first, last) = seqs(chosen);
        println!(
            "{}",
            json!({
                "remote": ends.remote.to_string(),
                "local": ends.local.to_string(),
                "parts": parts.len(),
                "records": chosen.records.len(),
                "first_seq": first,
                "last_seq": last,
                "bytes": chosen.bytes,
            })
        );
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_read_as_ls_prints_them() {
        let v4 = "tcp 10.0.0.1:5 > 10.0.0.2:80".parse::<Ends>().unwrap();
        assert_eq!(v4, "10.0.0.1:5,10.0.0.2:80".parse().unwrap());
        assert_eq!(v4.remote.port(), 5);
        assert!("[::1]:5,[::2]:80".parse::<Ends>().is_ok());
        let udp = "udp 10.0.0.1:5 > 10.0.0.2:80".parse::<Ends>().unwrap();
        assert_eq!(udp, Ends { udp: true, ..v4 });
        for bad in [
            "",
            "10.0.0.1:5",
            "10.0.0.1,10.0.0.2",
            "sctp 1.2.3.4:5 > 1.2.3.4:5",
            "a:1,b:2",
        ] {
            assert!(bad.parse::<Ends>().is_err(), "{bad}");
        }
    }
}
