// SPDX-License-Identifier: GPL-2.0

//! `make bench-core`: what the storage core costs on this machine.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `map.rs` | a region that is ordinary memory |
//! | `filler.rs` | a store on it, and who puts into it |
//! | `counts.rs` | lines, fences and bytes of an operation |
//! | `growth.rs` | an insert and a lookup, from 10^3 to 10^6 records |
//! | `recovery.rs` | records that an attach recovers in a second |
//! | `others.rs` | the same questions to BTreeMap, LMDB and RocksDB |
//! | `timing.rs` | the clock, the median |
//! | `valgrind.rs` | when callgrind shall count |

mod counts;
mod filler;
mod growth;
mod map;
#[cfg(feature = "others")]
mod others;
mod recovery;
mod timing;
mod valgrind;

use anyhow::{bail, Context, Result};
use serde_json::{json, Value};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const USAGE: &str = "usage: bench-core [--quick] [--only counts|growth|recovery|others] DIRECTORY
Measures the core and writes report.md and report.json there.";

/// Asks for huge pages for what is allocated, too: DRAM is not to be at a disadvantage
/// beside the region. The C library reads that once, so the program begins anew.
fn with_huge_allocations() -> Result<()> {
    const TUNABLES: &str = "GLIBC_TUNABLES";
    if std::env::var_os(TUNABLES).is_some() {
        return Ok(());
    }
    let error = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(TUNABLES, "glibc.malloc.hugetlb=1")
        .exec();
    Err(error).context("cannot run this program again")
}

fn main() -> Result<()> {
    with_huge_allocations()?;
    let mut quick = false;
    let mut only = None;
    let mut out = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => quick = true,
            "--only" => only = Some(args.next().context(USAGE)?),
            // Under callgrind: of this program itself, and for who wants a profile.
            "counted-recovery" => return recovery::counted(args.next().context(USAGE)?.parse()?),
            "counted" => return growth::counted(args.next().context(USAGE)?.parse()?),
            _ if out.is_none() && !arg.starts_with('-') => out = Some(PathBuf::from(arg)),
            _ => bail!("{USAGE}"),
        }
    }
    run(quick, only.as_deref(), &out.context(USAGE)?)
}

/// The machine, in a line.
fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("unknown CPU", |line| {
        line.trim_start_matches([' ', '\t', ':'])
    });
    let cores = std::thread::available_parallelism().map_or(1, |count| count.get());
    let flush = if map::has_clwb() { "clwb" } else { "clflush" };
    let pages = if map::has_huge_pages() { "" } else { "no " };
    format!(
        "{model}, {cores} cores, {flush}, {pages}huge pages, memory in place of persistent memory"
    )
}

fn run(quick: bool, only: Option<&str>, out: &Path) -> Result<()> {
    std::fs::create_dir_all(out)?;
    let start = Instant::now();
    let mut text = format!("# The core on the host\n\n{}\n", machine());
    let mut json = serde_json::Map::new();
    json.insert("machine".into(), machine().into());
    json.insert("quick".into(), quick.into());
    let mut part =
        |name: &str, title: &str, run: &dyn Fn() -> Result<(String, Value)>| -> Result<()> {
            if only.is_some_and(|only| only != name) {
                return Ok(());
            }
            let (table, value) = run().with_context(|| format!("{name} could not be measured"))?;
            let section = format!("\n## {title}\n\n{table}");
            println!("{section}");
            text += &section;
            json.insert(name.into(), value);
            Ok(())
        };
    part("counts", "Counts", &counts::run)?;
    part("growth", "Growth", &|| growth::run(quick, out))?;
    part("recovery", "Recovery", &|| recovery::run(quick))?;
    #[cfg(feature = "others")]
    part("others", "Side by side", &|| others::run(quick, out))?;
    let seconds = start.elapsed().as_secs();
    text += &format!("\n{seconds} s in all.\n");
    json.insert("seconds".into(), json!(seconds));
    std::fs::write(out.join("report.md"), text)?;
    std::fs::write(
        out.join("report.json"),
        serde_json::to_string_pretty(&Value::from(json))? + "\n",
    )?;
    println!(
        "{} and report.json beside it; {seconds} s",
        out.join("report.md").display()
    );
    Ok(())
}
