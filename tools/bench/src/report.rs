// SPDX-License-Identifier: GPL-2.0-only
//! From windows of the meter, and times of the client, to tables, JSON and pictures.

use crate::categories::{self, Category};
use crate::plot;
use anyhow::{Context, Result, bail, ensure};
use pmskb_meter::symbols::Symbols;
use pmskb_meter::tally::Tally;
use pmskb_meter::window::{Memory, Window};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// What `report` is told.
#[derive(clap::Args)]
pub struct Args {
    /// What counted runs left: directories with windows, maps and kallsyms
    #[arg(long, value_name = "DIRECTORY", required = true)]
    counted: Vec<PathBuf>,
    /// What timed runs left
    #[arg(long, value_name = "DIRECTORY")]
    timed: Vec<PathBuf>,
    /// Where the libraries of the guest are here; may be repeated
    #[arg(long, value_name = "DIRECTORY")]
    files: Vec<PathBuf>,
    /// A line about the machine and what ran on it
    #[arg(long, value_name = "TEXT", default_value = "")]
    title: String,
    /// Where report.md, report.json and the pictures are written
    #[arg(long, value_name = "DIRECTORY")]
    out: PathBuf,
}

/// Who else is measured, against whom pmskb is.
const FLOOR: &str = "discard";
const RIVAL: &str = "copy-manage";

/// What the modelled cache's misses cost, ns, and a cycle: those of the 2021 paper's machine.
const DRAM_NS: f64 = 70.0;
const PM_NS: f64 = 346.0;
const CYCLES_PER_NS: f64 = 2.1;

/// One contender under one load, counted.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Point {
    pub contender: String,
    pub connections: u64,
    pub body: u64,
    pub requests: u64,
    /// Instructions of the server's CPU, by what they are for, in [`Category::ALL`]'s order.
    instructions: Vec<u64>,
    /// What was done to persistent memory and payload.
    pub memory: Memory,
    /// Payload bytes that functions read which sum them up.
    pub checksummed: u64,
    /// System calls.
    pub syscalls: u64,
    /// Instructions of each function, by place and name; the server is just "server".
    #[serde(skip)]
    functions: HashMap<String, u64>,
    /// The module's own count of placed packets: derived, hardware, computed.
    pub placed: Option<[u64; 3]>,
}

impl Point {
    fn new(words: &Words, tally: &Tally, placed: Option<[u64; 3]>) -> Self {
        let mut instructions = vec![0; Category::ALL.len()];
        let (mut checksummed, mut functions) = (0, HashMap::new());
        for row in &tally.functions {
            let category = categories::of(row);
            let at = Category::ALL.iter().position(|c| *c == category);
            instructions[at.unwrap_or(0)] += row.instructions;
            // A library may keep its functions' names to itself.
            let nameless = row.name == "?" && row.place != "another process";
            if categories::sums(row) {
                checksummed += row.loaded;
            } else if nameless {
                checksummed += row.loaded.saturating_sub(row.stored);
            }
            // Both programs have much of their code from the same library.
            let place = match row.place.as_str() {
                "pmskb-bench" | "pmskb-httpd" => "server",
                other => other,
            };
            *functions
                .entry(format!("{place} {}", row.name))
                .or_default() += row.instructions;
        }
        Self {
            contender: words.contender.clone(),
            connections: words.connections,
            body: words.body,
            requests: words.requests,
            instructions,
            memory: tally.memory,
            checksummed,
            syscalls: tally.kernel_calls("entry_SYSCALL_64"),
            functions,
            placed,
        }
    }

    /// For a request.
    pub fn per(&self, count: u64) -> f64 {
        count as f64 / self.requests as f64
    }

    fn total(&self) -> f64 {
        self.per(self.instructions.iter().sum())
    }

    fn of(&self, category: Category) -> f64 {
        let at = Category::ALL.iter().position(|c| *c == category);
        self.per(self.instructions[at.unwrap_or(0)])
    }

    /// Instructions beyond those of a floor, without write-backs and fences.
    fn management(&self, floor: &Point) -> f64 {
        self.total() - self.of(Category::Flush) - (floor.total() - floor.of(Category::Flush))
    }

    /// Nanoseconds that the model says: an instruction a cycle, misses one after the other.
    fn modelled(&self) -> f64 {
        let m = &self.memory;
        self.total() / CYCLES_PER_NS
            + self.per(m.misses_dram) * DRAM_NS
            + self.per(m.misses_pm) * PM_NS
    }

    /// Times the payload.
    pub fn times(&self, bytes: u64) -> f64 {
        self.per(bytes) / self.body as f64
    }

    fn load(&self) -> (u64, u64) {
        (self.connections, self.body)
    }
}

/// A line of the file `windows`.
struct Words {
    number: u64,
    contender: String,
    connections: u64,
    body: u64,
    requests: u64,
}

fn parse_words(line: &str) -> Result<Words> {
    let mut words = line.split_ascii_whitespace();
    let mut next = || words.next().context("a line of windows is too short");
    Ok(Words {
        number: next()?.parse()?,
        contender: next()?.into(),
        connections: next()?.parse()?,
        body: next()?.parse()?,
        requests: next()?.parse()?,
    })
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The module's counters: how it came to the checksums of what it placed.
fn placed(directory: &Path, number: u64) -> Result<Option<[u64; 3]>> {
    let counters = |when: &str| -> Result<Option<[u64; 3]>> {
        let path = directory.join(format!("info-{number}-{when}.json"));
        if !path.exists() {
            return Ok(None);
        }
        let info: serde_json::Value = serde_json::from_str(&read(&path)?)?;
        let count = |name: &str| {
            let count = info["counters"][name].as_u64();
            count.with_context(|| format!("{} has no {name}", path.display()))
        };
        Ok(Some([
            count("derived")?,
            count("hardware")?,
            count("computed")?,
        ]))
    };
    Ok(match (counters("before")?, counters("after")?) {
        (Some(before), Some(after)) => {
            Some([0, 1, 2].map(|at| after[at].saturating_sub(before[at])))
        }
        _ => None,
    })
}

/// What a counted run left.
pub fn read_counted(directory: &Path, files: &[PathBuf]) -> Result<Vec<Point>> {
    let kallsyms = read(&directory.join("kallsyms"))?;
    // The programs as they were when they were measured.
    let mut places = vec![directory.join("programs")];
    places.extend_from_slice(files);
    let mut symbols: HashMap<String, Symbols> = HashMap::new();
    let mut points = Vec::new();
    for line in read(&directory.join("windows"))?.lines() {
        let words = parse_words(line)?;
        let path = directory.join(format!("window-{}.json", words.number));
        let window: Window = serde_json::from_str(&read(&path)?)
            .with_context(|| format!("{} is not a window", path.display()))?;
        if !symbols.contains_key(&words.contender) {
            let maps = read(&directory.join(format!("maps-{}", words.contender)))?;
            let found = Symbols::new(&kallsyms, &maps, &places)?;
            symbols.insert(words.contender.clone(), found);
        }
        let tally = Tally::new(&window, &symbols[&words.contender]);
        ensure!(
            tally.memory.unresolved == 0,
            "{}: {} write-backs whose address is not known",
            path.display(),
            tally.memory.unresolved
        );
        let placed = placed(directory, words.number)?;
        points.push(Point::new(&words, &tally, placed));
    }
    Ok(points)
}

/// A contender's times under one load, in the rounds.
#[derive(Clone, Debug, Default, Serialize)]
struct Times {
    contender: String,
    connections: u64,
    body: u64,
    /// Requests a second, of each round.
    throughput: Vec<f64>,
    /// Microseconds, of each round: the mean, the median, the 99th percentile.
    mean: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
}

#[derive(Deserialize)]
struct Load {
    requests: u64,
    seconds: f64,
    mean_us: f64,
    p50_us: f64,
    p99_us: f64,
}

fn timed(directories: &[PathBuf]) -> Result<Vec<Times>> {
    let mut all: Vec<Times> = Vec::new();
    for directory in directories {
        for line in read(&directory.join("windows"))?.lines() {
            let words = parse_words(line)?;
            let path = directory.join(format!("load-{}.json", words.number));
            let load: Load = serde_json::from_str(&read(&path)?)?;
            let same = |t: &Times| {
                t.contender == words.contender
                    && (t.connections, t.body) == (words.connections, words.body)
            };
            let times = match all.iter().position(same) {
                Some(at) => &mut all[at],
                None => {
                    all.push(Times {
                        contender: words.contender,
                        connections: words.connections,
                        body: words.body,
                        ..Times::default()
                    });
                    all.last_mut().context("just pushed")?
                }
            };
            times.throughput.push(load.requests as f64 / load.seconds);
            times.mean.push(load.mean_us);
            times.p50.push(load.p50_us);
            times.p99.push(load.p99_us);
        }
    }
    Ok(all)
}

/// Median, least and most of the ratios of two rounds each.
fn ratios(of: &[f64], to: &[f64]) -> Option<(f64, f64, f64)> {
    let mut all: Vec<f64> = of.iter().zip(to).map(|(a, b)| a / b).collect();
    all.sort_by(f64::total_cmp);
    let median = match all.len() {
        0 => return None,
        n if n % 2 == 1 => all[n / 2],
        n => (all[n / 2 - 1] + all[n / 2]) / 2.0,
    };
    Some((median, all[0], all[all.len() - 1]))
}

/// So many connections, in words.
pub fn connections(n: u64) -> String {
    match n {
        1 => "1 connection".into(),
        n => format!("{n} connections"),
    }
}

/// A target of the project's, and what was measured.
#[derive(Debug, Serialize)]
struct Target {
    what: String,
    wanted: String,
    measured: f64,
    met: bool,
}

fn at_most(what: impl Into<String>, limit: f64, measured: f64) -> Target {
    Target {
        what: what.into(),
        wanted: format!("at most {limit}"),
        measured,
        met: measured <= limit,
    }
}

fn at_least(what: impl Into<String>, limit: f64, measured: f64) -> Target {
    Target {
        what: what.into(),
        wanted: format!("at least {limit}"),
        measured,
        met: measured >= limit,
    }
}

struct Results {
    points: Vec<Point>,
    times: Vec<Times>,
}

impl Results {
    fn point(&self, contender: &str, load: (u64, u64)) -> Option<&Point> {
        let fits = |p: &&Point| p.contender == contender && p.load() == load;
        self.points.iter().find(fits)
    }

    fn time(&self, contender: &str, load: (u64, u64)) -> Option<&Times> {
        let fits = |t: &&Times| t.contender == contender && (t.connections, t.body) == load;
        self.times.iter().find(fits)
    }

    /// Loads in the order in which they came.
    fn loads(&self) -> Vec<(u64, u64)> {
        let mut loads = Vec::new();
        for point in &self.points {
            if !loads.contains(&point.load()) {
                loads.push(point.load());
            }
        }
        loads
    }

    /// What was asked for, of bodies of 1 KiB.
    fn targets(&self) -> Vec<Target> {
        let mut out = Vec::new();
        let loads = self.loads().into_iter().filter(|l| l.1 == 1024);
        for load in loads.clone() {
            let n = load.0;
            let n = connections(n);
            let of = |name| self.point(name, load);
            let (Some(floor), Some(rival)) = (of(FLOOR), of(RIVAL)) else {
                continue;
            };
            for name in ["pmskb", "pmskb-uring"] {
                let Some(point) = of(name) else { continue };
                out.push(at_most(
                    format!("{name}, {n}: data management, of {RIVAL}'s"),
                    0.25,
                    point.management(floor) / rival.management(floor),
                ));
                out.push(at_most(
                    format!("{name}, {n}: instructions, of {RIVAL}'s"),
                    0.8,
                    point.total() / rival.total(),
                ));
            }
            let Some(point) = of("pmskb") else { continue };
            // Unaligned copies store their last bytes twice.
            out.push(at_most(
                format!("pmskb, {n}: payload stored by the CPU, times"),
                1.03,
                point.times(point.memory.payload_stored),
            ));
            out.push(at_most(
                format!("pmskb, {n}: durable bytes beside the payload"),
                256.0,
                point.per(point.memory.pm_bytes_durable) - load.1 as f64,
            ));
            if load.0 == 1 {
                out.push(at_most(
                    "pmskb, 1 connection: payload checksummed in software, times",
                    0.0,
                    point.times(point.checksummed),
                ));
                out.push(at_most(
                    "pmskb, 1 connection: fences a request",
                    2.0,
                    point.per(point.memory.fences),
                ));
                if let Some(auto) = of("pmskb-auto") {
                    // What it logs are the requests as they came, with their heads.
                    let request = load.1 as usize + crate::load::head_len(load.1);
                    out.push(at_most(
                        "pmskb-auto, 1 connection: durable bytes beside the request",
                        64.0,
                        auto.per(auto.memory.pm_bytes_durable) - request as f64,
                    ));
                }
            }
        }
        if let Some(load) = loads.clone().filter(|l| l.0 >= 20).max() {
            let n = load.0;
            if let Some(point) = self.point("pmskb", load) {
                out.push(at_most(
                    format!("pmskb, {n} connections: fences a request"),
                    0.1,
                    point.per(point.memory.fences),
                ));
            }
            if let Some(point) = self.point("pmskb-uring", load) {
                out.push(at_most(
                    format!("pmskb-uring, {n} connections: system calls a request"),
                    0.1,
                    point.per(point.syscalls),
                ));
            }
        }
        for time in self.times.iter().filter(|t| t.body == 1024) {
            let load = (time.connections, time.body);
            if !time.contender.starts_with("pmskb") || time.contender == "pmskb-auto" {
                continue;
            }
            let (name, n) = (&time.contender, load.0);
            if n == 100 {
                let floor = self.time(FLOOR, load);
                if let Some((median, ..)) =
                    floor.and_then(|f| ratios(&time.throughput, &f.throughput))
                {
                    out.push(at_least(
                        format!("{name}, {n} connections: throughput, of {FLOOR}'s"),
                        0.95,
                        median,
                    ));
                }
            }
            let others = self.times.iter().filter(|t| {
                (t.connections, t.body) == load
                    && t.contender != FLOOR
                    && !t.contender.starts_with("pmskb")
            });
            let worst = others
                .filter_map(|o| ratios(&time.throughput, &o.throughput))
                .map(|r| r.0)
                .min_by(f64::total_cmp);
            if let Some(worst) = worst {
                out.push(at_least(
                    format!("{name}, {n} connections: throughput, of the best other's"),
                    1.0,
                    worst,
                ));
            }
        }
        out
    }

    fn costs(&self, load: (u64, u64)) -> String {
        let mut out = String::from(
            "| contender | instructions | of discard's | network | preparation | checksum | copy | \
             insertion | flush | system calls | fences | lines | durable bytes | volatile bytes | \
             payload stored | summed |\n|---|",
        );
        out += &"--:|".repeat(15);
        out += "\n";
        let floor = self.point(FLOOR, load).map(Point::total);
        for p in self.points.iter().filter(|p| p.load() == load) {
            let of_floor = floor.map_or(String::new(), |f| format!("{:.2}", p.total() / f));
            let _ = write!(out, "| {} | {:.0} | {of_floor} |", p.contender, p.total());
            for category in Category::ALL {
                let _ = write!(out, " {:.0} |", p.of(category));
            }
            let _ = writeln!(
                out,
                " {:.2} | {:.2} | {:.1} | {:.0} | {:.0} | {:.2}x | {:.2}x |",
                p.per(p.syscalls),
                p.per(p.memory.fences),
                p.per(p.memory.lines),
                p.per(p.memory.pm_bytes_durable),
                p.per(p.memory.pm_bytes_volatile),
                p.times(p.memory.payload_stored),
                p.times(p.checksummed),
            );
        }
        out
    }

    /// What the modelled cache had to fetch, if there was one.
    fn misses(&self, load: (u64, u64)) -> Option<String> {
        let points = || self.points.iter().filter(|p| p.load() == load);
        if points().all(|p| p.memory.misses_dram == 0) {
            return None;
        }
        let floor = self.point(FLOOR, load).map(Point::modelled);
        let mut out = String::from(
            "| contender | lines from DRAM | lines from PM | modelled time, us | of discard's |\n\
             |---|--:|--:|--:|--:|\n",
        );
        for p in points() {
            let time = p.modelled();
            let _ = writeln!(
                out,
                "| {} | {:.1} | {:.1} | {:.2} | {} |",
                p.contender,
                p.per(p.memory.misses_dram),
                p.per(p.memory.misses_pm),
                time / 1000.0,
                floor.map_or(String::new(), |f| format!("{:.2}", time / f)),
            );
        }
        Some(out)
    }

    /// The functions in which one contender executes more than another.
    fn difference(&self, of: &str, to: &str, load: (u64, u64), most: usize) -> Option<String> {
        let (of, to) = (self.point(of, load)?, self.point(to, load)?);
        let mut all: Vec<(f64, &String)> = of
            .functions
            .iter()
            .map(|(name, count)| {
                let there = to.functions.get(name).copied().unwrap_or(0);
                (of.per(*count) - to.per(there), name)
            })
            .collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
        let mut out = String::from("| instructions a request more | function |\n|--:|---|\n");
        for (more, name) in all.iter().take(most).filter(|(more, _)| *more >= 1.0) {
            let _ = writeln!(out, "| {more:.0} | `{name}` |");
        }
        Some(out)
    }

    fn derivations(&self) -> String {
        let mut out = String::from(
            "| contender | connections | body | derived | by the device | computed |\n|---|--:|--:|--:|--:|--:|\n",
        );
        for p in &self.points {
            if let Some(placed) = p.placed {
                let all = placed.iter().sum::<u64>().max(1) as f64;
                let [derived, hardware, computed] = placed.map(|n| 100.0 * n as f64 / all);
                let _ = writeln!(
                    out,
                    "| {} | {} | {} | {derived:.1} % | {hardware:.1} % | {computed:.1} % |",
                    p.contender, p.connections, p.body
                );
            }
        }
        out
    }

    fn throughput(&self) -> String {
        let mut out = String::from(
            "| contender | connections | body | throughput, of discard's | least, most | mean latency | p50 | p99 |\n\
             |---|--:|--:|--:|--:|--:|--:|--:|\n",
        );
        for t in &self.times {
            let Some(floor) = self.time(FLOOR, (t.connections, t.body)) else {
                continue;
            };
            let ratio = |of: &[f64], to: &[f64]| ratios(of, to).map_or(0.0, |r| r.0);
            let Some((median, least, most)) = ratios(&t.throughput, &floor.throughput) else {
                continue;
            };
            let _ = writeln!(
                out,
                "| {} | {} | {} | {median:.2} | {least:.2} .. {most:.2} | {:.2} | {:.2} | {:.2} |",
                t.contender,
                t.connections,
                t.body,
                ratio(&t.mean, &floor.mean),
                ratio(&t.p50, &floor.p50),
                ratio(&t.p99, &floor.p99),
            );
        }
        out
    }
}

/// A table of targets, for Markdown or a terminal.
fn target_table(targets: &[Target]) -> String {
    let mut out = String::from("| target | wanted | measured | |\n|---|---|--:|---|\n");
    for t in targets {
        let met = if t.met { "met" } else { "missed" };
        let _ = writeln!(
            out,
            "| {} | {} | {:.2} | {met} |",
            t.what, t.wanted, t.measured
        );
    }
    out
}

/// Rules a Markdown table into columns, for people.
fn columns(table: &str) -> String {
    let rows: Vec<Vec<&str>> = table
        .lines()
        .filter(|l| !l.starts_with("|--"))
        .map(|l| {
            let inside = l.strip_prefix('|').and_then(|l| l.strip_suffix('|'));
            inside.unwrap_or(l).split('|').map(str::trim).collect()
        })
        .collect();
    let mut widths = Vec::new();
    for row in &rows {
        for (at, cell) in row.iter().enumerate() {
            if widths.len() <= at {
                widths.push(0);
            }
            widths[at] = widths[at].max(cell.len());
        }
    }
    let mut out = String::new();
    for row in rows {
        for (at, cell) in row.iter().enumerate() {
            let width = widths[at];
            let _ = match at {
                0 => write!(out, "{cell:width$}"),
                _ => write!(out, "  {cell:>width$}"),
            };
        }
        out.truncate(out.trim_end().len());
        out += "\n";
    }
    out
}

pub fn run(args: &Args) -> Result<()> {
    let mut results = Results {
        points: Vec::new(),
        times: timed(&args.timed)?,
    };
    for directory in &args.counted {
        results.points.extend(read_counted(directory, &args.files)?);
    }
    if results.points.is_empty() {
        bail!("nothing was counted");
    }
    fs::create_dir_all(&args.out)?;
    let targets = results.targets();
    let mut text = format!(
        "# What persisting received data costs\n\n{}\n\n",
        args.title
    );
    let _ = write!(text, "## Targets\n\n{}\n", target_table(&targets));
    for load in results.loads() {
        let (n, body) = load;
        let connections = connections(n);
        let _ = write!(
            text,
            "## {body} bytes, {connections}, for a request\n\n{}\n{}",
            results.costs(load),
            results.misses(load).map_or(String::new(), |table| format!(
                "By a model of one cache (data only; nothing that devices store is seen), with {DRAM_NS} ns \
                 for a line from DRAM, {PM_NS} ns from persistent memory, {CYCLES_PER_NS} instructions a \
                 nanosecond, and nothing at the same time:\n\n{table}\n"
            ))
        );
        let bars: Vec<(String, Vec<f64>)> = results
            .points
            .iter()
            .filter(|p| p.load() == load)
            .map(|p| {
                let parts = Category::ALL.iter().map(|c| p.of(*c)).collect();
                (p.contender.clone(), parts)
            })
            .collect();
        let titles = Category::ALL.map(Category::title);
        let title = format!("Instructions a request: {body} bytes, {connections}");
        let name = format!("breakdown-{body}-{n}.svg");
        fs::write(args.out.join(&name), plot::stacked(&title, &titles, &bars))?;
        let _ = write!(text, "![{title}]({name})\n\n");
        for (of, to) in [("pmskb", FLOOR), (RIVAL, FLOOR)] {
            if let Some(table) = results.difference(of, to, load, 25) {
                let _ = write!(text, "Where {of} executes more than {to}:\n\n{table}\n");
            }
        }
    }
    let _ = write!(
        text,
        "## Checksums of packets\n\n{}\n",
        results.derivations()
    );

    let mut series: BTreeMap<u64, Vec<plot::Line>> = BTreeMap::new();
    for p in &results.points {
        let lines = series.entry(p.body).or_default();
        let at = (p.connections as f64, p.total());
        match lines.iter_mut().find(|l| l.0 == p.contender) {
            Some(line) => line.1.push(at),
            None => lines.push((p.contender.clone(), vec![at])),
        }
    }
    for (body, lines) in &series {
        let title = format!("Instructions a request, {body} bytes");
        let name = format!("instructions-{body}.svg");
        fs::write(
            args.out.join(&name),
            plot::lines(&title, "connections", lines),
        )?;
        let _ = write!(text, "![{title}]({name})\n\n");
    }
    if !results.times.is_empty() {
        let table = results.throughput();
        let _ = write!(text, "## Throughput and latency, of discard's\n\n{table}\n");
        for (what, name) in [
            ("throughput", "throughput.svg"),
            ("p99 latency", "latency.svg"),
        ] {
            let mut lines: Vec<plot::Line> = Vec::new();
            for t in results.times.iter().filter(|t| t.body == 1024) {
                let Some(floor) = results.time(FLOOR, (t.connections, t.body)) else {
                    continue;
                };
                let ratio = match what {
                    "throughput" => ratios(&t.throughput, &floor.throughput),
                    _ => ratios(&t.p99, &floor.p99),
                };
                let at = (t.connections as f64, ratio.map_or(0.0, |r| r.0));
                match lines.iter_mut().find(|l| l.0 == t.contender) {
                    Some(line) => line.1.push(at),
                    None => lines.push((t.contender.clone(), vec![at])),
                }
            }
            let title = format!("1 KiB: {what}, of discard's");
            fs::write(
                args.out.join(name),
                plot::lines(&title, "connections", &lines),
            )?;
            let _ = write!(text, "![{title}]({name})\n\n");
        }
    }
    fs::write(args.out.join("report.md"), &text)?;
    let json = serde_json::json!({
        "format": 1,
        "title": args.title,
        "categories": Category::ALL,
        "targets": targets,
        "counted": results.points,
        "timed": results.times,
    });
    let json = serde_json::to_string_pretty(&json)? + "\n";
    fs::write(args.out.join("report.json"), json)?;

    let first = results.loads()[0];
    println!(
        "\n{} bytes, {} connections, for a request:\n",
        first.1, first.0
    );
    print!("{}", columns(&results.costs(first)));
    println!("\nTargets:\n");
    print!("{}", columns(&target_table(&targets)));
    let missed = targets.iter().filter(|t| !t.met).count();
    println!("\n{} met, {missed} missed", targets.len() - missed);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(contender: &str, connections: u64, instructions: [u64; 6]) -> Point {
        Point {
            contender: contender.into(),
            connections,
            body: 1024,
            requests: 100,
            instructions: instructions.to_vec(),
            memory: Memory {
                fences: 200,
                payload_stored: 102_400,
                pm_bytes_durable: 102_400 + 20_000,
                ..Memory::default()
            },
            checksummed: 0,
            syscalls: 5,
            functions: HashMap::from([(format!("{contender} f"), instructions[0])]),
            placed: None,
        }
    }

    fn results() -> Results {
        Results {
            points: vec![
                point(FLOOR, 1, [1000, 0, 0, 0, 0, 0]),
                point(RIVAL, 1, [1000, 100, 100, 100, 100, 50]),
                point("pmskb", 1, [1000, 40, 0, 0, 50, 60]),
            ],
            times: Vec::new(),
        }
    }

    #[test]
    fn data_management_is_what_lies_beyond_the_floor_without_flushes() {
        let r = results();
        let floor = r.point(FLOOR, (1, 1024)).unwrap();
        let rival = r.point(RIVAL, (1, 1024)).unwrap();
        assert_eq!(rival.management(floor), 4.0);
        assert_eq!(rival.total(), 14.5);
        assert_eq!(floor.management(floor), 0.0);
    }

    #[test]
    fn a_miss_costs_what_the_memory_costs() {
        let mut r = results();
        assert!(r.misses((1, 1024)).is_none());
        r.points[2].memory.misses_dram = 300;
        r.points[2].memory.misses_pm = 200;
        // 11.5 instructions a request, 3 lines of DRAM, 2 of persistent memory.
        let modelled = r.points[2].modelled();
        assert!((modelled - (11.5 / 2.1 + 210.0 + 692.0)).abs() < 1e-9);
        let table = r.misses((1, 1024)).unwrap();
        assert!(table.contains("| pmskb | 3.0 | 2.0 | 0.91 |"), "{table}");
    }

    #[test]
    fn targets_are_met_or_missed_by_what_was_measured() {
        let targets = results().targets();
        let find = |part: &str| targets.iter().find(|t| t.what.contains(part)).unwrap();
        let management = find("data management");
        assert!((management.measured - 0.225).abs() < 1e-9 && management.met);
        // 11.5 of 14.5.
        assert!(find("instructions, of").met);
        assert!(find("durable bytes").met && find("durable bytes").measured == 200.0);
        assert!(find("fences").met);
        let mut worse = results();
        worse.points[2].memory.fences += 1;
        worse.points[2].instructions[4] = 500;
        let targets = worse.targets();
        let find = |part: &str| targets.iter().find(|t| t.what.contains(part)).unwrap();
        assert!(!find("fences").met && !find("data management").met);
    }

    #[test]
    fn ratios_are_of_rounds_and_their_median() {
        assert_eq!(
            ratios(&[2.0, 9.0, 4.0], &[1.0, 3.0, 1.0]),
            Some((3.0, 2.0, 4.0))
        );
        assert_eq!(ratios(&[2.0, 4.0], &[1.0, 1.0]), Some((3.0, 2.0, 4.0)));
        assert_eq!(ratios(&[], &[]), None);
    }

    #[test]
    fn lines_of_windows_are_read_or_refused() {
        let words = parse_words("3 copy-manage 10 1024 500").unwrap();
        assert_eq!(
            (words.number, words.connections, words.requests),
            (3, 10, 500)
        );
        assert!(parse_words("3 copy-manage 10").is_err());
        assert!(parse_words("x copy 1 1 1").is_err());
    }

    #[test]
    fn a_table_for_people_has_no_rules() {
        let text = columns("| a | b |\n|---|--:|\n| long | 1 |\n");
        assert_eq!(text, "a     b\nlong  1\n");
    }
}
