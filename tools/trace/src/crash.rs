// SPDX-License-Identifier: GPL-2.0-only
//! The images: points of a trace, and what a crash there could have left.
//!
//! A point is just before a fence that commits something: then most is at stake, and what a crash
//! since the last point could have left, one there could leave, too. Of the lines that are at
//! risk there, those count that recovery reads, of the image that has lost all of them or of the
//! one that has none; a few are enough to try every subset. Else some are drawn: all but a few
//! lost, few lost, any; and torn ones. What a line may be is what the cache model says. What
//! was looked at before, with the same things acknowledged, is not looked at again.
//!
//! Image `nr` of point `point` follows from the seed and these two numbers, and can be made again.

use crate::check::{Scratch, check, check_cut};
use crate::format::{CPUS, Event, Reader};
use crate::kind::Kind;
use crate::ledger::Ledger;
use crate::mark::{Mark, name_of};
use crate::media::{Media, hash_of};
use crate::replay::Replay;
use crate::work::Rng;
use anyhow::{Context, bail};
use indicatif::ProgressBar;
use pmskb_core::host::Memory;
use pmskb_core::{FRAME_SIZE, Geometry, LIVE_OFF, probe};
use pmskb_tcg::model::{LINE, Line};
use serde::Serialize;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::BufReader;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many images a point has at least: the one that lost all, and the one that lost nothing.
const BOTH: u64 = 2;

/// A run in a trace.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its name.
    pub name: String,
    /// Points in it, numbered through the whole trace.
    pub points: Range<u64>,
    /// Operations that were acknowledged.
    pub acknowledged: u64,
    /// Where in the memory the store is.
    pub offset: usize,
    /// Where in the store what is.
    pub geo: Geometry,
    /// What operations were answered.
    pub results: HashMap<u64, i64>,
}

impl Run {
    /// The lines of the memory that are the store's.
    pub fn lines(&self) -> Range<usize> {
        let first = self.offset / LINE;
        first..first + self.geo.region_len as usize / LINE
    }

    /// Those of it that nobody reads after a crash.
    pub fn volatile(&self) -> Range<usize> {
        let first = (self.offset + self.geo.head_off as usize) / LINE;
        first..first + self.geo.head_len as usize / LINE
    }
}

/// A trace, and the runs in it.
pub struct Trace {
    path: PathBuf,
    /// Bytes of the memory.
    pub size: usize,
    /// The runs.
    pub runs: Vec<Run>,
    /// Events.
    pub events: u64,
}

impl Trace {
    /// Reads a trace through, and sees to it that it tells all that happened: memory was, at the
    /// end, what its stores make of it.
    pub fn open(path: &Path, bar: &ProgressBar) -> anyhow::Result<Self> {
        let mut trace = Self {
            path: path.to_owned(),
            size: 0,
            runs: Vec::new(),
            events: 0,
        };
        let mut reader = trace.reader()?;
        trace.size = reader.header.size as usize;
        let mut replay = Replay::new(trace.size, CPUS);
        let (mut points, mut within) = (0, false);
        while let Some(event) = reader.event()? {
            trace.events += 1;
            if trace.events % 65536 == 0 {
                bar.set_position(trace.events);
            }
            let run = trace.runs.last_mut().filter(|_| within);
            match (&event, run) {
                (Event::Mark { mark, .. }, run) => match (mark, run) {
                    (Mark::Start(name), _) => {
                        let (offset, geo) = find(&replay.bytes(0..trace.size))
                            .context("a run begins, and there is no store")?;
                        within = true;
                        let run = Run {
                            name: name_of(name),
                            points: points..points,
                            acknowledged: 0,
                            offset,
                            geo,
                            results: HashMap::new(),
                        };
                        replay.set_volatile(run.volatile());
                        trace.runs.push(run);
                    }
                    (Mark::Ack { op, result }, Some(run)) => {
                        run.results.insert(*op, *result);
                        run.acknowledged += 1;
                    }
                    (Mark::End, Some(run)) => {
                        points += 1;
                        run.points.end = points;
                        within = false;
                    }
                    _ => {}
                },
                (Event::Fence { cpu }, Some(run)) if replay.waits(*cpu) => {
                    points += 1;
                    run.points.end = points;
                }
                (Event::End { crc, unresolved }, _) => {
                    if *unresolved > 0 {
                        bail!("the plugin could not tell where {unresolved} accesses went");
                    }
                    if *crc != replay.crc() {
                        bail!(
                            "memory was not, at the end, what the trace makes of it: stores are missing"
                        );
                    }
                }
                _ => {}
            }
            replay.apply(&event);
            // Nobody asks.
            replay.take_settled();
        }
        Ok(trace)
    }

    /// From its first event on.
    pub fn reader(&self) -> anyhow::Result<Reader<BufReader<File>>> {
        let name = || self.path.display().to_string();
        let file = File::open(&self.path).with_context(|| format!("cannot open {}", name()))?;
        Reader::new(BufReader::with_capacity(1 << 20, file)).with_context(name)
    }
}

/// Where in a memory a store is.
pub fn find(bytes: &[u8]) -> Option<(usize, Geometry)> {
    let frame = FRAME_SIZE as usize;
    (0..bytes.len() / frame)
        .map(|n| n * frame)
        .find_map(|offset| {
            if bytes[offset..][..8] != *b"pmskb\0SB" {
                return None;
            }
            let found = probe(&Memory::from_bytes(&bytes[offset..])).ok()?;
            // The last one has no other at its end.
            (found.first.is_none()).then_some((offset, found.superblock.geometry))
        })
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Options {
    /// Images to check, about, over all points of the runs.
    pub images: u64,
    /// What is drawn depends on it.
    pub seed: u64,
    /// Threads.
    pub jobs: usize,
    /// Only runs for which this is how their name begins.
    pub run: Option<String>,
    /// Only this point, and image.
    pub only: Option<(u64, u64)>,
    /// That one is written to a file.
    pub write: Option<PathBuf>,
    /// Violations after which no more is looked for in a run.
    pub enough: u64,
    /// Some images are written to a directory, for others to look at: how many.
    pub export: Option<(PathBuf, u64)>,
}

/// A broken promise.
#[derive(Clone, Debug, Serialize)]
pub struct Violation {
    /// In which run.
    pub run: String,
    /// At which point.
    pub point: u64,
    /// Of which image.
    pub nr: u64,
    /// Events up to there.
    pub event: u64,
    /// What is wrong.
    pub what: String,
    /// Which lines were kept, and how.
    pub image: String,
}

/// What was done.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Points of the runs.
    pub points: u64,
    /// Images that were checked, no two alike.
    pub images: u64,
    /// Of these, those with torn lines.
    pub torn: u64,
    /// Images that were like others.
    pub alike: u64,
    /// States that recovery can tell apart.
    pub states: u64,
    /// Images that were recovered twice.
    pub again: u64,
    /// Recoveries that were cut short.
    pub cut: u64,
    /// Operations acknowledged in the runs.
    pub acknowledged: u64,
    /// Most lines that were at risk and that recovery reads, at a point.
    pub most_lines: usize,
    /// Images that were written.
    pub exported: u64,
    /// What was wrong.
    pub violations: Vec<Violation>,
}

impl Outcome {
    fn add(&mut self, other: Outcome) {
        self.images += other.images;
        self.torn += other.torn;
        self.alike += other.alike;
        self.again += other.again;
        self.cut += other.cut;
        self.exported += other.exported;
        self.most_lines = self.most_lines.max(other.most_lines);
        self.violations.extend(other.violations);
    }
}

struct Shared<'a> {
    trace: &'a Trace,
    options: &'a Options,
    /// Images that were looked at.
    looked: Mutex<HashSet<u64>>,
    /// States that recovery saw.
    seen: Mutex<HashSet<u64>>,
    /// Violations of each run.
    wrong: Vec<AtomicU64>,
    points: u64,
    bar: &'a ProgressBar,
}

/// Makes and checks images.
pub fn crash(trace: &Trace, options: &Options, bar: &ProgressBar) -> anyhow::Result<Outcome> {
    let runs = || trace.runs.iter().filter(|run| is_meant(options, run));
    let mut outcome = Outcome {
        points: runs().map(|run| run.points.end - run.points.start).sum(),
        acknowledged: runs().map(|run| run.acknowledged).sum(),
        ..Outcome::default()
    };
    if outcome.points == 0 {
        bail!("there is nothing to look at: no run, or no fence in it");
    }
    let shared = Shared {
        trace,
        options,
        looked: Mutex::default(),
        seen: Mutex::default(),
        wrong: trace.runs.iter().map(|_| AtomicU64::new(0)).collect(),
        points: outcome.points,
        bar,
    };
    bar.set_length(options.images.max(BOTH * outcome.points));
    bar.set_position(0);
    let jobs = options.jobs.max(1);
    let done: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs)
            .map(|job| {
                scope.spawn({
                    let shared = &shared;
                    move || Worker::new(shared, job).run()
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().expect("a worker panicked"))
            .collect()
    });
    for part in done {
        outcome.add(part?);
    }
    outcome.violations.sort_by_key(|v| (v.point, v.nr));
    outcome.states = shared.seen.lock().expect("a worker panicked").len() as u64;
    Ok(outcome)
}

fn is_meant(options: &Options, run: &Run) -> bool {
    options
        .run
        .as_ref()
        .is_none_or(|name| run.name.starts_with(name.as_str()))
}

/// One thread: every so manieth point.
struct Worker<'a> {
    shared: &'a Shared<'a>,
    job: u64,
    replay: Rc<RefCell<Replay>>,
    ledger: Ledger,
    media: Media,
    scratch: Scratch,
    done: Outcome,
    /// Images that points before lacked.
    owed: u64,
    /// Points of the runs that are meant, so far.
    place: u64,
}

/// What is at stake at a point.
struct Stake {
    /// Lines at risk that recovery reads, those first that are not payload; numbers in the store.
    lines: Vec<usize>,
    /// How many of these are not payload.
    first: usize,
    /// Whether recovery reads a line.
    reads: HashSet<usize>,
    /// The hash of what it reads of the durable state.
    base: u64,
}

/// An image, as what differs from the durable state.
struct Image {
    changes: Vec<(usize, Line)>,
    others: Others,
    torn: bool,
    how: String,
}

/// What becomes of lines that are at risk and that it says nothing of.
#[derive(Clone, Copy)]
enum Others {
    /// They are as they were.
    Lost,
    /// They are what memory was.
    Kept,
    /// Each the one or the other.
    Any(u64),
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared<'a>, job: usize) -> Self {
        Self {
            replay: Rc::new(RefCell::new(Replay::new(shared.trace.size, CPUS))),
            shared,
            job: job as u64,
            ledger: Ledger::default(),
            media: Media::new(0),
            scratch: Scratch::default(),
            done: Outcome::default(),
            owed: 0,
            place: 0,
        }
    }

    fn run(mut self) -> anyhow::Result<Outcome> {
        let trace = self.shared.trace;
        let mut reader = trace.reader()?;
        let mut runs = trace.runs.iter().enumerate();
        let mut run: Option<(usize, &Run)> = None;
        let (mut point, mut events) = (0, 0);
        while let Some(event) = reader.event()? {
            events += 1;
            match (&event, run) {
                (Event::Mark { mark, .. }, run_now) => match (mark, run_now) {
                    (Mark::Start(_), _) => {
                        run = runs.next();
                        let (_, found) = run.context("the trace has changed")?;
                        self.begin(found);
                    }
                    (Mark::Begin(begin), Some((_, run))) => {
                        self.ledger
                            .begin(begin, run.results.get(&begin.op).copied());
                    }
                    (Mark::Ack { op, result }, Some((_, run))) => {
                        // Of other kinds nothing is kept.
                        let known = self.ledger.ack(*op, *result);
                        debug_assert!(known || run.results.contains_key(op));
                    }
                    (Mark::End, Some(at)) => {
                        self.point(at, point, events)?;
                        point += 1;
                        run = None;
                    }
                    _ => {}
                },
                (Event::Fence { cpu }, Some(at)) if self.replay.borrow().waits(*cpu) => {
                    self.point(at, point, events)?;
                    point += 1;
                }
                _ => {}
            }
            self.replay.borrow_mut().apply(&event);
            if run.is_none() {
                self.replay.borrow_mut().take_settled();
            }
        }
        Ok(self.done)
    }

    /// A run begins: with what is durable then.
    fn begin(&mut self, run: &Run) {
        self.ledger = Ledger::default();
        let mut replay = self.replay.borrow_mut();
        replay.set_volatile(run.volatile());
        replay.take_settled();
        self.media = Media::new(run.geo.region_len as usize);
        let first = run.lines().start;
        for line in run.lines() {
            let bytes = replay.model().durable(line);
            if bytes != [0; LINE] {
                self.media.settle(line - first, &bytes);
            }
        }
    }

    /// One point, if it is this worker's.
    fn point(&mut self, (index, run): (usize, &Run), point: u64, event: u64) -> anyhow::Result<()> {
        let options = self.shared.options;
        if !is_meant(options, run) {
            return Ok(());
        }
        self.place += 1;
        let mine = match options.only {
            Some((only, _)) => only == point && self.job == 0,
            None => point % options.jobs.max(1) as u64 == self.job,
        };
        if !mine || self.shared.wrong[index].load(Ordering::Relaxed) >= options.enough {
            return Ok(());
        }
        let first = run.lines().start;
        let mut replay = self.replay.borrow_mut();
        for line in replay.take_settled() {
            if run.lines().contains(&line) {
                self.media
                    .settle(line - first, &replay.model().durable(line));
            }
        }
        drop(replay);
        let mut at = At {
            run,
            index,
            point,
            event,
        };
        self.images(&mut at)
    }

    fn images(&mut self, at: &mut At<'_>) -> anyhow::Result<()> {
        let (options, run) = (self.shared.options, at.run);
        if options.export.is_some() && self.export_nr().is_none() {
            return Ok(());
        }
        let exported = self.done.exported;
        // What recovery reads of the image that lost all, and of the one that lost nothing.
        let both = ["all lost", "nothing lost"].map(|how| Image {
            changes: Vec::new(),
            others: if how == "all lost" {
                Others::Lost
            } else {
                Others::Kept
            },
            torn: false,
            how: how.into(),
        });
        let mut reads = HashSet::new();
        for (nr, image) in both.iter().enumerate() {
            reads.extend(self.one(at, nr as u64, image, None)?);
        }
        let stake = self.stake(run, reads);
        self.done.most_lines = self.done.most_lines.max(stake.lines.len());
        let share = options.images.div_ceil(self.shared.points);
        let subsets = match stake.lines.len() {
            n if n < 20 && 1 << n <= share.max(16) => 1 << n,
            _ => 0,
        };
        let want = match options.export {
            Some(_) => 8,
            None => share.saturating_sub(BOTH) + self.owed,
        };
        let (mut made, mut nr) = (0, BOTH);
        let mut most = BOTH + 3 * want + subsets;
        if let Some((_, only)) = options.only {
            (nr, most) = (only.max(BOTH), only + 1);
        }
        let wrong = &self.shared.wrong[at.index];
        while made < want
            && nr < most
            && !stake.lines.is_empty()
            && wrong.load(Ordering::Relaxed) < options.enough
        {
            let image = self.draw(run, &stake, subsets, at.point, nr);
            let key = self.key(&stake, &image);
            let mut looked = self.shared.looked.lock().expect("a worker panicked");
            let fresh = looked.insert(key);
            drop(looked);
            if fresh {
                self.one(at, nr, &image, Some((key, &stake)))?;
                made += 1;
            } else {
                self.done.alike += 1;
            }
            nr += 1;
        }
        if self.export_nr().is_some() && self.done.exported == exported {
            // There is no such image: then the one that lost nothing.
            self.apply(&both[1], None, run);
            self.export(at)?;
            self.media.reset();
        }
        // Points at which little is at risk leave theirs to others, within bounds.
        self.owed = (want - made.min(want)).min(64 * share);
        Ok(())
    }

    fn stake(&self, run: &Run, reads: HashSet<usize>) -> Stake {
        let first = run.lines().start;
        let replay = self.replay.borrow();
        let model = replay.model();
        let payload = |line: &usize| {
            let kind = Kind::of(&run.geo, *line as u64, |l| model.now(l as usize + first));
            kind == Kind::Data
        };
        let live = LIVE_OFF as usize / LINE..(LIVE_OFF + FRAME_SIZE) as usize / LINE;
        let mut lines: Vec<usize> = reads
            .iter()
            .copied()
            .filter(|line| !live.contains(line) && replay.at_risk(line + first))
            .collect();
        lines.sort_by_cached_key(|line| (payload(line), *line));
        let base = reads.iter().fold(0u64, |sum, line| {
            sum.wrapping_add(hash_of(*line, &self.media.line(*line)))
        });
        Stake {
            first: lines.iter().take_while(|line| !payload(line)).count(),
            lines,
            reads,
            base,
        }
    }

    /// Draws image `nr` of a point.
    fn draw(&self, run: &Run, stake: &Stake, subsets: u64, point: u64, nr: u64) -> Image {
        let mut rng = Rng::of(self.shared.options.seed, &[point, nr]);
        let first = run.lines().start;
        let replay = self.replay.borrow();
        let model = replay.model();
        let count = stake.lines.len();
        let mut kept = vec![false; count];
        let how;
        match (nr - BOTH, rng.below(4)) {
            (subset, _) if subset < subsets => {
                for (bit, kept) in kept.iter_mut().enumerate() {
                    *kept = (subset >> bit) & 1 == 1;
                }
                how = format!("subset {subset:#x} of {count} lines");
            }
            (_, mode @ (0 | 1)) => {
                kept.fill(mode == 1);
                let few = 1 + rng.below(3);
                for _ in 0..few {
                    // Recovery decides by what is not payload.
                    let among = if stake.first > 0 && rng.chance(2, 3) {
                        stake.first
                    } else {
                        count
                    };
                    kept[rng.below(among as u64) as usize] = mode == 0;
                }
                how = ["few lines kept", "few lines lost"][mode as usize].to_string();
            }
            (_, 2) => {
                kept.iter_mut().for_each(|kept| *kept = rng.chance(1, 2));
                how = "any lines lost".to_string();
            }
            _ => return self.draw_torn(first, stake, &mut rng),
        }
        let lines = stake.lines.iter().zip(&kept).filter(|(_, kept)| **kept);
        Image {
            changes: lines
                .map(|(line, _)| (*line, model.now(line + first)))
                .collect(),
            others: Others::Lost,
            torn: false,
            how,
        }
    }

    /// Every line is what it was at some time since it was durable, or words of several times.
    fn draw_torn(&self, first: usize, stake: &Stake, rng: &mut Rng) -> Image {
        let replay = self.replay.borrow();
        let model = replay.model();
        let mut changes = Vec::new();
        for line in &stake.lines {
            let versions = model.versions(line + first);
            let mut pick = || versions[rng.below(versions.len() as u64) as usize];
            let mut bytes = pick();
            let words = (pick(), pick());
            if rng.chance(1, 2) {
                for word in 0..LINE / 8 {
                    let other = match rng.below(3) {
                        0 => words.0,
                        1 => words.1,
                        _ => continue,
                    };
                    bytes[word * 8..][..8].copy_from_slice(&other[word * 8..][..8]);
                }
            }
            changes.push((*line, bytes));
        }
        Image {
            changes,
            others: Others::Any(rng.number()),
            torn: true,
            how: "torn".to_string(),
        }
    }

    /// What two images that are alike have in common.
    fn key(&self, stake: &Stake, image: &Image) -> u64 {
        let mut hash = stake.base;
        for (line, bytes) in &image.changes {
            if stake.reads.contains(line) {
                hash = hash
                    .wrapping_sub(hash_of(*line, &self.media.line(*line)))
                    .wrapping_add(hash_of(*line, bytes));
            }
        }
        self.with_ledger(hash)
    }

    /// The same image is another one when more was acknowledged.
    fn with_ledger(&self, hash: u64) -> u64 {
        Rng(hash ^ self.ledger.changes.wrapping_mul(0x9e37_79b9_7f4a_7c15)).number()
    }

    /// Checks an image; which lines recovery read. If nothing is `known` of its point it cannot
    /// be said before whether it is like another.
    fn one(
        &mut self,
        at: &At<'_>,
        nr: u64,
        image: &Image,
        known: Option<(u64, &Stake)>,
    ) -> anyhow::Result<Vec<usize>> {
        let stake = known.map(|(_, stake)| stake);
        let mut rng = Rng::of(self.shared.options.seed, &[at.point, nr, 1]);
        self.apply(image, stake, at.run);
        let only = self.shared.options.only == Some((at.point, nr));
        if let Some(path) = self.shared.options.write.as_ref().filter(|_| only) {
            self.write(path)?;
        }
        if self.export_nr() == Some(nr) {
            self.export(at)?;
        }
        let closes = rng.chance(1, 16);
        let result = catch_unwind(AssertUnwindSafe(|| {
            check(&self.media, &self.ledger, closes, &mut self.scratch)
        }));
        let mut result = result.unwrap_or_else(|_| Err("the core panicked".into()));
        let (reads, seen) = (self.media.reads(), self.media.seen());
        let counts = self.media.counts();
        self.media.reset();
        let fresh = match known {
            Some(_) => true,
            None => {
                let key = self.with_ledger(seen);
                self.shared
                    .looked
                    .lock()
                    .expect("a worker panicked")
                    .insert(key)
            }
        };
        if fresh {
            self.done.images += 1;
            self.done.torn += u64::from(image.torn);
            self.shared.bar.inc(1);
            self.shared
                .seen
                .lock()
                .expect("a worker panicked")
                .insert(seen);
        } else {
            self.done.alike += 1;
        }
        self.done.again += u64::from(closes);
        if result.is_ok() && rng.chance(1, 16) {
            self.done.cut += 1;
            self.apply(image, stake, at.run);
            let cut = catch_unwind(AssertUnwindSafe(|| {
                check_cut(
                    &self.media,
                    &self.ledger,
                    counts,
                    &mut rng,
                    &mut self.scratch,
                )
            }));
            result = cut.unwrap_or_else(|_| Err("the core panicked".into()));
            self.media.reset();
        }
        if let Err(what) = result {
            self.shared.wrong[at.index].fetch_add(1, Ordering::Relaxed);
            self.done.violations.push(Violation {
                run: at.run.name.clone(),
                point: at.point,
                nr,
                event: at.event,
                what,
                image: format!("{}, {} lines", image.how, image.changes.len()),
            });
        }
        Ok(reads)
    }

    fn apply(&self, image: &Image, stake: Option<&Stake>, run: &Run) {
        let first = run.lines().start;
        let coin = match image.others {
            Others::Lost => None,
            Others::Kept => Some(None),
            Others::Any(seed) => Some(Some(seed)),
        };
        if let Some(coin) = coin {
            let replay = self.replay.clone();
            self.media.leave_open(Box::new(move |line| {
                let replay = replay.borrow();
                let kept = coin.is_none_or(|seed| Rng::of(seed, &[line as u64]).chance(1, 2));
                let risk = kept && replay.at_risk(line + first);
                risk.then(|| replay.model().now(line + first))
            }));
        }
        // What is at stake is what the image says.
        for line in stake.iter().flat_map(|stake| &stake.lines) {
            self.media.keep(*line);
        }
        for (line, bytes) in &image.changes {
            self.media.set(*line, bytes);
        }
    }

    /// If this point is one of which an image is written: which. Another each time.
    fn export_nr(&self) -> Option<u64> {
        let (_, count) = self.shared.options.export.as_ref()?;
        let every = (self.shared.points / count).max(1);
        (self.place % every == 0).then_some(self.place / every % 8)
    }

    /// Writes an image and what it may hold.
    fn export(&mut self, at: &At<'_>) -> anyhow::Result<()> {
        let Some((directory, _)) = &self.shared.options.export else {
            return Ok(());
        };
        let name = directory.join(format!("{:05}", at.point));
        self.write(&name.with_extension("img"))?;
        let ledger = name.with_extension("ledger");
        std::fs::write(&ledger, serde_json::to_vec(&self.ledger)?)
            .with_context(|| format!("cannot write {}", ledger.display()))?;
        self.done.exported += 1;
        Ok(())
    }

    /// Writes an image; what is zero is a hole.
    fn write(&self, path: &Path) -> anyhow::Result<()> {
        use std::os::unix::fs::FileExt;
        let fail = || format!("cannot write {}", path.display());
        let file = File::create(path).with_context(fail)?;
        let bytes = self.media.bytes();
        file.set_len(bytes.len() as u64).with_context(fail)?;
        for (frame, part) in bytes.chunks(FRAME_SIZE as usize).enumerate() {
            if part.iter().any(|byte| *byte != 0) {
                file.write_all_at(part, frame as u64 * FRAME_SIZE)
                    .with_context(fail)?;
            }
        }
        Ok(())
    }
}

/// Where in the trace.
struct At<'a> {
    run: &'a Run,
    index: usize,
    point: u64,
    event: u64,
}
