// SPDX-License-Identifier: GPL-2.0-only
//! What must be so in any run, as TAP: counts that depend on nothing but the code.

use crate::report::{Point, connections, read_counted};
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;

/// What `check` is told.
#[derive(clap::Args)]
pub struct Args {
    /// What a counted run left
    #[arg(long, value_name = "DIRECTORY")]
    counted: PathBuf,
    /// Where the libraries of the guest are here; may be repeated
    #[arg(long, value_name = "DIRECTORY")]
    files: Vec<PathBuf>,
}

/// A promise: its name, what was measured, and between which bounds that must lie.
struct Promise {
    name: String,
    measured: f64,
    from: f64,
    to: f64,
}

impl Promise {
    fn kept(&self) -> bool {
        (self.from..=self.to).contains(&self.measured)
    }
}

/// What is promised of a contender's point. Copies store the end of what they copy twice, up to
/// 32 bytes, and a request or two lie over each end of the window: hence some room.
fn promises(p: &Point) -> Vec<Promise> {
    let name = &p.contender;
    let n = p.connections;
    let mut all = Vec::new();
    let mut add = |what: &str, measured: f64, from: f64, to: f64| {
        all.push(Promise {
            name: format!("{name}, {}: {what}", connections(n)),
            measured,
            from,
            to,
        });
    };
    let stored = p.times(p.memory.payload_stored);
    let summed = p.times(p.checksummed);
    let fences = p.per(p.memory.fences);
    let beside = p.per(p.memory.pm_bytes_durable) - p.body as f64;
    // In the window's first turn, and in its last, there are requests that are in it in part.
    let edge = 0.04 + 2.0 * n as f64 / p.requests as f64;
    match (name.as_str(), n) {
        ("discard", _) => {
            add(
                "the payload is copied once",
                stored,
                0.95 - edge,
                1.03 + edge,
            );
            add(
                "nothing is stored to persistent memory",
                p.per(p.memory.pm_bytes),
                0.0,
                0.0,
            );
            add("nothing is summed up", summed, 0.0, 0.0);
        }
        ("copy-manage", 1) => {
            add("the payload is copied twice", stored, 1.9, 2.1);
            add("the payload is summed up once", summed, 0.9, 1.05);
            add("two fences a request", fences, 1.96, 2.04);
        }
        ("pmskb", 1) => {
            add("the payload is copied once", stored, 0.95, 1.05);
            // But for the samples that are looked at.
            add("the payload is not summed up", summed, 0.0, 0.1);
            add("two fences a request", fences, 1.96, 2.04);
            add("durable bytes beside the payload", beside, 0.0, 256.0);
            let derived = p.placed.map_or(0.0, |[derived, hardware, computed]| {
                derived as f64 / (derived + hardware + computed).max(1) as f64
            });
            add("checksums are derived", derived, 0.99, 1.0);
        }
        ("pmskb", _) => {
            add(
                "the payload is copied once",
                stored,
                0.95 - edge,
                1.05 + edge,
            );
            add("few fences a request", fences, 0.0, 0.25);
        }
        ("pmskb-uring", n) if n > 1 => {
            add("few system calls a request", p.per(p.syscalls), 0.0, 0.25);
            add("few fences a request", fences, 0.0, 0.25);
        }
        _ => {}
    }
    all
}

pub fn run(args: &Args) -> Result<()> {
    let points = read_counted(&args.counted, &args.files)?;
    let all: Vec<Promise> = points.iter().flat_map(promises).collect();
    ensure!(
        !all.is_empty(),
        "nothing was counted that anything is promised of"
    );
    println!("TAP version 13\n1..{}", all.len());
    let mut broken = 0;
    for (at, promise) in all.iter().enumerate() {
        let not = if promise.kept() { "" } else { "not " };
        broken += usize::from(!promise.kept());
        println!("{not}ok {} - {}", at + 1, promise.name);
        println!(
            "# {:.3}, must be {:.3} to {:.3}",
            promise.measured, promise.from, promise.to
        );
    }
    (broken == 0)
        .then_some(())
        .with_context(|| format!("{broken} promises were broken"))
}
