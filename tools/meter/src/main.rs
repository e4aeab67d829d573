// SPDX-License-Identifier: GPL-2.0-only
//! Adds a window of the plugin up by symbol.

#![forbid(unsafe_code)]

use anyhow::{Context, Result};
use clap::Parser;
use pmskb_meter::symbols::Symbols;
use pmskb_meter::tally::Tally;
use pmskb_meter::window::Window;
use std::fs;
use std::io::Write;
use std::path::PathBuf;

/// Adds a window of the meter up by symbol: a table, or JSON.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// What the plugin wrote
    window: PathBuf,
    /// The guest's /proc/kallsyms
    #[arg(long, value_name = "FILE")]
    kallsyms: PathBuf,
    /// The /proc/PID/maps of the process that was watched
    #[arg(long, value_name = "FILE")]
    maps: Option<PathBuf>,
    /// Where the files are that it names; may be repeated
    #[arg(
        long,
        value_name = "DIRECTORY",
        default_value = "/usr/lib/x86_64-linux-gnu"
    )]
    files: Vec<PathBuf>,
    /// Everything, as JSON
    #[arg(long)]
    json: bool,
    /// Functions in the table
    #[arg(long, value_name = "N", default_value_t = 40)]
    top: usize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let read = |path: &PathBuf| {
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let window: Window = serde_json::from_str(&read(&args.window)?)
        .with_context(|| format!("{} is not a window", args.window.display()))?;
    let maps = args.maps.as_ref().map(read).transpose()?;
    let symbols = Symbols::new(
        &read(&args.kallsyms)?,
        &maps.unwrap_or_default(),
        &args.files,
    )?;
    let tally = Tally::new(&window, &symbols);
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &tally)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(out, "{} instructions", tally.instructions)?;
    writeln!(out, "{:#?}", tally.memory)?;
    writeln!(
        out,
        "{:>12} {:>10} {:>10} {:>10} {:>10} {:>9} {:>9}  function",
        "instructions", "calls", "PM", "stored", "loaded", "missed", "missed PM"
    )?;
    for row in tally.functions.iter().take(args.top) {
        writeln!(
            out,
            "{:>12} {:>10} {:>10} {:>10} {:>10} {:>9} {:>9}  {} {}",
            row.instructions,
            row.calls,
            row.pm,
            row.stored,
            row.loaded,
            row.misses_dram,
            row.misses_pm,
            row.place,
            row.name
        )?;
    }
    Ok(())
}
