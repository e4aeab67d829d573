// SPDX-License-Identifier: GPL-2.0-only
//! What operations did to persistent memory: of a run in which one thread made one call after the
//! other, on one vCPU.
//!
//! What that vCPU does from a call's first mark to its first answer is the call's. When it was
//! answered, lines that it stored to and that are at risk were never flushed; those that count
//! after a crash must not be among them.

use crate::crash::Trace;
use crate::format::{CPUS, Event};
use crate::kind::Kind;
use crate::mark::{self, Begin, Mark};
use crate::replay::Replay;
use anyhow::Context;
use pmskb_core::{Extent, Frame, FrameFound, Inspector, LINE_SIZE, LineFound};
use pmskb_tcg::model::{Flush, LINE};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// What calls of one kind did, added up.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    /// Calls.
    pub calls: u64,
    /// Operations of these.
    pub operations: u64,
    /// Bytes of their objects.
    pub object_bytes: u64,
    /// Bytes stored to persistent memory, by what they are for.
    pub stored: BTreeMap<Kind, u64>,
    /// Write-backs of lines.
    pub flushes: u64,
    /// Of these, of lines that were durable already.
    pub flushes_clean: u64,
    /// Of these, of lines with the same contents again, before a fence.
    pub flushes_repeated: u64,
    /// Fences that had something to wait for.
    pub fences: u64,
    /// Lines that were stored to, and not flushed when the call had returned, by what they are
    /// for. Of payload, those that are no record's.
    pub never_flushed: BTreeMap<Kind, u64>,
    /// Of lines that records consist of, or the areas before the data: there must be none.
    pub forgotten: u64,
}

/// The table.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Table {
    /// By what was called, in the order in which it first was.
    pub rows: Vec<(String, Row)>,
}

/// A call that is going on.
struct Call {
    name: String,
    cpu: u8,
    row: Row,
    /// Lines that were stored to since they were flushed.
    lines: BTreeSet<usize>,
    bytes: BTreeMap<usize, u64>,
}

/// Makes the table of a run.
pub fn table(trace: &Trace, name: &str) -> anyhow::Result<Table> {
    let run = trace
        .runs
        .iter()
        .position(|run| run.name == name)
        .with_context(|| format!("there is no run {name}"))?;
    let mut reader = trace.reader()?;
    let mut replay = Replay::new(trace.size, CPUS);
    let mut table = Table::default();
    let (mut at, mut within) = (0, false);
    let mut call: Option<Call> = None;
    // Keys that have an object.
    let mut there = HashSet::new();
    let lines = trace.runs[run].lines();
    while let Some(event) = reader.event()? {
        if let Event::Mark { cpu, mark } = &event {
            match mark {
                Mark::Start(_) => {
                    replay.set_volatile(0..0);
                    within = at == run;
                    at += 1;
                }
                Mark::End => within = false,
                Mark::Begin(begin) if within => {
                    let call = call.get_or_insert_with(|| Call {
                        name: String::new(),
                        cpu: *cpu,
                        row: Row::default(),
                        lines: BTreeSet::new(),
                        bytes: BTreeMap::new(),
                    });
                    call.begin(begin, &there);
                    match begin.kind {
                        mark::Kind::Put => drop(there.insert(begin.key)),
                        mark::Kind::Delete => drop(there.remove(&begin.key)),
                        _ => {}
                    }
                }
                Mark::Ack { .. } if within => {
                    // The other answers of an array tell nothing new.
                    if let Some(call) = call.take() {
                        call.finish(&replay, &trace.runs[run], &mut table)?;
                    }
                }
                _ => {}
            }
        }
        let waits = matches!(event, Event::Fence { cpu } if replay.waits(cpu));
        let found = replay.apply(&event);
        replay.take_settled();
        let Some(call) = &mut call else { continue };
        match event {
            Event::Store { cpu, off, len, .. } if cpu == call.cpu => {
                let line = off as usize / LINE;
                if lines.contains(&line) {
                    *call.bytes.entry(line - lines.start).or_default() += u64::from(len);
                    call.lines.insert(line);
                }
            }
            Event::Flush { cpu, line, .. } if cpu == call.cpu => {
                call.lines.remove(&(line as usize));
                call.row.flushes += 1;
                call.row.flushes_clean += u64::from(found == Some(Flush::Clean));
                call.row.flushes_repeated += u64::from(found == Some(Flush::Repeated));
            }
            Event::Fence { cpu } if cpu == call.cpu => call.row.fences += u64::from(waits),
            _ => {}
        }
    }
    Ok(table)
}

impl Call {
    fn begin(&mut self, begin: &Begin, there: &HashSet<u64>) {
        self.row.operations += 1;
        self.row.object_bytes += u64::from(begin.len);
        let name = match begin.kind {
            mark::Kind::Put if there.contains(&begin.key) => "replace",
            kind => kind.name(),
        };
        self.name = match (self.row.operations, begin.group) {
            (1, _) => name.to_owned(),
            (n, 0) => format!("array of {n}"),
            (n, _) => format!("atomic array of {n}"),
        };
    }

    fn finish(
        mut self,
        replay: &Replay,
        run: &crate::crash::Run,
        table: &mut Table,
    ) -> anyhow::Result<()> {
        let first = run.lines().start;
        let model = replay.model();
        let kind = |line: usize| {
            Kind::of(&run.geo, line as u64, |l| {
                pmskb_tcg::model::Memory::line(model.memory(), l as usize + first)
            })
        };
        self.row.calls = 1;
        for (line, bytes) in &self.bytes {
            *self.row.stored.entry(kind(*line)).or_default() += bytes;
        }
        let used = used(replay, run)?;
        for line in &self.lines {
            if model.now(*line) == model.durable(*line) {
                continue;
            }
            let line = line - first;
            let kind = kind(line);
            if kind != Kind::Data || used.contains_key(&line) {
                *self.row.never_flushed.entry(kind).or_default() += 1;
            }
            let counts = match kind {
                Kind::Superblock | Kind::Batch | Kind::Map | Kind::Header | Kind::List => true,
                // Bytes beside a record's, in its line, are of no account.
                Kind::Record | Kind::Data => used.get(&line).is_some_and(|mask| {
                    let (now, durable) = (model.now(line + first), model.durable(line + first));
                    (0..LINE).any(|at| (mask >> at) & 1 == 1 && now[at] != durable[at])
                }),
                Kind::Live | Kind::Heads | Kind::Node => false,
            };
            self.row.forgotten += u64::from(counts);
        }
        let place = table.rows.iter().position(|(name, _)| *name == self.name);
        let place = place.unwrap_or_else(|| {
            table.rows.push((self.name.clone(), Row::default()));
            table.rows.len() - 1
        });
        table.rows[place].1.add(self.row);
        Ok(())
    }
}

impl Row {
    fn add(&mut self, other: Row) {
        self.calls += other.calls;
        self.operations += other.operations;
        self.object_bytes += other.object_bytes;
        self.flushes += other.flushes;
        self.flushes_clean += other.flushes_clean;
        self.flushes_repeated += other.flushes_repeated;
        self.fences += other.fences;
        self.forgotten += other.forgotten;
        for (kind, bytes) in other.stored {
            *self.stored.entry(kind).or_default() += bytes;
        }
        for (kind, lines) in other.never_flushed {
            *self.never_flushed.entry(kind).or_default() += lines;
        }
    }

    /// A number for each call.
    pub fn each(&self, number: u64) -> f64 {
        number as f64 / self.calls.max(1) as f64
    }

    /// Bytes stored that count after a crash.
    pub fn kept(&self) -> u64 {
        let kept = self.stored.iter().filter(|(kind, _)| !kind.volatile());
        kept.map(|(_, bytes)| bytes).sum()
    }
}

/// The lines, in the store, that its live records consist of, as memory is, and which of their
/// bytes.
fn used(replay: &Replay, run: &crate::crash::Run) -> anyhow::Result<HashMap<usize, u64>> {
    let fail = |error| anyhow::anyhow!("looking at the store: {error:?}");
    let start = run.offset;
    let bytes = replay.bytes(start..start + run.geo.region_len as usize);
    let memory = pmskb_core::host::Memory::from_bytes(&bytes);
    let (inspector, _) = Inspector::new(&memory).map_err(fail)?;
    let mut used: HashMap<usize, u64> = HashMap::new();
    let mut add = |off: u64, len: u64| {
        for at in off..off + len {
            *used.entry((at / LINE_SIZE) as usize).or_default() |= 1 << (at % LINE_SIZE);
        }
    };
    let mut from = run.geo.first_frame();
    while let Some(frame) = inspector.next_mapped(from).map_err(fail)? {
        from = Frame(frame.0 + 1);
        let FrameFound::Records(found) = inspector.frame(frame).map_err(fail)? else {
            continue;
        };
        let mut records = Vec::new();
        let each = |_, line| {
            if let LineFound::Put(record) = line {
                records.push(record);
            }
            true
        };
        inspector.lines(&found, each).map_err(fail)?;
        for record in records.into_iter().filter(|r| !inspector.truncated(r)) {
            add(record.loc.0, u64::from(record.lines) * LINE_SIZE);
            let extents = record.extents(&memory, &run.geo);
            let all: Result<Vec<Extent>, _> = extents.collect();
            let key = record.key_extent(&memory).map_err(fail)?;
            for extent in all.map_err(fail)?.into_iter().chain(key) {
                add(extent.off, u64::from(extent.len));
            }
        }
    }
    Ok(used)
}

/// As text, a line for each kind of call; numbers are those of one call.
pub fn text(table: &Table) -> String {
    let mut out = String::new();
    let head = [
        "call",
        "calls",
        "bytes",
        "kept",
        "index",
        "live",
        "flushes",
        "clean",
        "again",
        "fences",
        "left",
        "forgotten",
    ];
    let line = |words: &[String]| {
        let mut line = format!("{:<20}", words[0]);
        for word in &words[1..] {
            line += &format!("{word:>10}");
        }
        line + "\n"
    };
    out += &line(&head.map(String::from));
    for (name, row) in &table.rows {
        let each = |number: u64| format!("{:.1}", row.each(number));
        let of = |kind: Kind| row.stored.get(&kind).copied().unwrap_or(0);
        out += &line(&[
            name.clone(),
            row.calls.to_string(),
            each(row.object_bytes),
            each(row.kept()),
            each(of(Kind::Node)),
            each(of(Kind::Live)),
            each(row.flushes),
            each(row.flushes_clean),
            each(row.flushes_repeated),
            each(row.fences),
            each(row.never_flushed.values().sum()),
            row.forgotten.to_string(),
        ]);
    }
    out
}
