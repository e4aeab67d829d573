// SPDX-License-Identifier: GPL-2.0-only
//! Looks at a trace: makes images of crashes and checks them, tells what operations cost.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pmskb_trace::crash::{Options, Outcome, Trace, crash};
use pmskb_trace::table::Row;
use std::fs::File;
use std::io::{BufWriter, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Looks at a trace of a guest's persistent memory (of libpmskb_trace.so).
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say what is in a trace
    Show {
        /// The trace
        trace: PathBuf,
    },
    /// Make images of crashes, recover them, and compare with what was acknowledged
    ///
    /// Exit status: 0 all is well, 1 a promise is broken, 2 it could not be checked.
    Check {
        #[command(flatten)]
        what: What,
        /// Image of that point; as a violation names it: it alone is made again
        #[arg(long, requires = "point", value_name = "N")]
        image: Option<u64>,
        /// Only that point
        #[arg(long, requires = "image", value_name = "N")]
        point: Option<u64>,
        /// Write that image to a file, for `pmskbctl fsck --image`
        #[arg(long, requires = "image", value_name = "FILE")]
        write: Option<PathBuf>,
        /// Write the outcome, JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Write some images, and for each what it may hold, and check them
    Images {
        #[command(flatten)]
        what: What,
        /// Directory to write N.img and N.ledger to
        #[arg(long)]
        out: PathBuf,
        /// How many, about
        #[arg(long, default_value_t = 30)]
        count: u64,
    },
    /// Tell what calls did to persistent memory, of a run with one thread
    ///
    /// Exit status: 0; 1 if a line that counts was not flushed when a call had returned.
    Table {
        /// The trace
        trace: PathBuf,
        /// The run
        #[arg(long, default_value = "costs")]
        run: String,
        /// Write it, JSON
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Write a trace of the core on this host: random operations of one thread
    Synth {
        /// File to write
        out: PathBuf,
        /// Steps
        #[arg(long, default_value_t = 500)]
        steps: u64,
        /// What is drawn depends on it
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
}

#[derive(Args)]
struct What {
    /// The trace
    trace: PathBuf,
    /// Images, about
    #[arg(long, default_value_t = 100_000)]
    images: u64,
    /// What is drawn depends on it
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads
    #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, usize::from))]
    jobs: usize,
    /// Only runs whose names begin so
    #[arg(long, value_name = "NAME")]
    run: Option<String>,
    /// Violations after which no more is looked for in a run
    #[arg(long, default_value_t = 5, value_name = "N")]
    enough: u64,
}

impl What {
    fn options(&self) -> Options {
        Options {
            images: self.images,
            seed: self.seed,
            jobs: self.jobs,
            run: self.run.clone(),
            only: None,
            write: None,
            enough: self.enough.max(1),
            export: None,
        }
    }
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Show { trace } => show(&trace),
        Command::Check {
            what,
            image,
            point,
            write,
            json,
        } => {
            let mut options = what.options();
            options.only = point.zip(image);
            options.write = write;
            check(&what, &options, json.as_deref())
        }
        Command::Images { what, out, count } => {
            let mut options = what.options();
            options.export = Some((out.clone(), count.max(1)));
            std::fs::create_dir_all(&out)
                .with_context(|| format!("cannot make {}", out.display()))
                .and_then(|()| check(&what, &options, None))
        }
        Command::Table { trace, run, json } => table(&trace, &run, json.as_deref()),
        Command::Synth { out, steps, seed } => synth(&out, steps, seed),
    };
    done.unwrap_or_else(|e| {
        eprintln!("pmskb-trace: {e:#}");
        ExitCode::from(2)
    })
}

/// Says how far something is, to a terminal, or every few seconds to a file.
fn bar(unit: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    let template = format!("{{bar:40}} {{human_pos}}/{{human_len}} {unit} {{eta}}");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
        let unit = unit.to_owned();
        let weak = bar.downgrade();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_secs(10));
                let Some(bar) = weak.upgrade().filter(|bar| !bar.is_finished()) else {
                    return;
                };
                eprintln!("{} {unit} ...", bar.position());
            }
        });
    } else {
        bar.enable_steady_tick(Duration::from_millis(200));
    }
    bar
}

fn open(path: &Path) -> anyhow::Result<Trace> {
    let bar = bar("events");
    let trace = Trace::open(path, &bar);
    bar.finish_and_clear();
    trace.with_context(|| format!("{} cannot be used", path.display()))
}

fn show(path: &Path) -> anyhow::Result<ExitCode> {
    let trace = open(path)?;
    println!("{} events; memory is what they make of it", trace.events);
    for run in &trace.runs {
        println!(
            "run {}: points {} to {}, {} acknowledged, store of {} MiB at {:#x}",
            run.name,
            run.points.start,
            run.points.end,
            run.acknowledged,
            run.geo.region_len >> 20,
            run.offset
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn check(what: &What, options: &Options, json: Option<&Path>) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let trace = open(&what.trace)?;
    let bar = bar("images");
    let outcome = crash(&trace, options, &bar);
    bar.finish_and_clear();
    let outcome = outcome?;
    tell(what, &outcome, started.elapsed());
    if let Some(path) = json {
        write_json(path, &outcome)?;
    }
    if outcome.images == 0 {
        bail!("no image was made");
    }
    Ok(if outcome.violations.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn tell(what: &What, outcome: &Outcome, took: Duration) {
    println!(
        "{} images at {} points, {} of them torn, {} passed over as alike; {} states that recovery \
         can tell apart; {} recovered twice, {} recoveries cut short; {} operations acknowledged; \
         at most {} lines at stake; {:.1} s",
        outcome.images,
        outcome.points,
        outcome.torn,
        outcome.alike,
        outcome.states,
        outcome.again,
        outcome.cut,
        outcome.acknowledged,
        outcome.most_lines,
        took.as_secs_f64()
    );
    for v in &outcome.violations {
        println!("VIOLATION in run {}: {}", v.run, v.what);
        println!("  after {} events, {}; again:", v.event, v.image);
        println!(
            "  pmskb-trace check {} --run {} --images {} --seed {} --point {} --image {}",
            what.trace.display(),
            v.run,
            what.images,
            what.seed,
            v.point,
            v.nr
        );
    }
    println!("{} violations", outcome.violations.len());
}

fn table(path: &Path, run: &str, json: Option<&Path>) -> anyhow::Result<ExitCode> {
    let table = pmskb_trace::table::table(&open(path)?, run)?;
    print!("{}", pmskb_trace::table::text(&table));
    if let Some(path) = json {
        write_json(path, &table)?;
    }
    let bad = |(_, row): &(String, Row)| row.forgotten > 0;
    Ok(if table.rows.iter().any(bad) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn write_json(path: &Path, what: &impl serde::Serialize) -> anyhow::Result<()> {
    let fail = || format!("cannot write {}", path.display());
    let file = File::create(path).with_context(fail)?;
    serde_json::to_writer_pretty(file, what).with_context(fail)
}

fn synth(out: &Path, steps: u64, seed: u64) -> anyhow::Result<ExitCode> {
    let fail = || format!("cannot write {}", out.display());
    let file = BufWriter::new(File::create(out).with_context(fail)?);
    pmskb_trace::synth::run("synthetic", steps, seed, file).with_context(fail)?;
    Ok(ExitCode::SUCCESS)
}
