// SPDX-License-Identifier: GPL-2.0-only

//! What all fuzzers share: which number comes next and for how long, a log of what is done, and
//! somebody who notices when nothing is done any more.

use std::{
    fs::{self, File},
    io::Write as _,
    path::PathBuf,
    sync::{
        atomic::{AtomicU64, Ordering},
        Arc, Mutex, PoisonError,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::Args;
use pmskb_uapi::core::sim::Rng;

use crate::{
    store,
    sys::{self, Arena},
};

/// Options of every fuzzer.
#[derive(Args, Clone)]
pub struct Options {
    /// What everything follows from; the same again does the same again
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// First round; a round does not depend on those before it
    #[arg(long, default_value_t = 0)]
    pub from: u64,
    /// So many rounds; without it, and without --seconds, one
    #[arg(long)]
    pub rounds: Option<u64>,
    /// No new round after so many seconds
    #[arg(long)]
    pub seconds: Option<u64>,
    /// What is done is written here before it is done. A block device is best: its last 4 MiB
    /// are on the host after a crash, as lines of text that begin with @ and a number, and a line
    /// costs little. Else a file, such as below /out
    #[arg(long)]
    pub log: Option<PathBuf>,
    /// A round that takes longer hangs
    #[arg(long, default_value_t = 60)]
    pub limit: u64,
}

/// Bytes of a log on a device; it goes round.
const RING: u64 = 4 << 20;
const BLOCK: usize = 4096;

/// Where notes are written.
enum Sink {
    File(File),
    Device {
        fd: i32,
        block: Vec<u8>,
        skip: usize,
        used: usize,
        at: u64,
    },
}

impl Sink {
    fn open(path: &std::path::Path) -> anyhow::Result<Self> {
        use std::os::unix::fs::FileTypeExt as _;
        let cannot = || format!("cannot write a log to {}", path.display());
        let is_device = fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
        if !is_device {
            let file = File::options().create(true).append(true).open(path);
            return Ok(Sink::File(file.with_context(cannot)?));
        }
        let mut size = File::open(path).with_context(cannot)?;
        let size =
            std::io::Seek::seek(&mut size, std::io::SeekFrom::End(0)).with_context(cannot)?;
        let start = size.checked_sub(RING).with_context(cannot)? & !(RING - 1);
        let fd = store::partition(&Arena::new()?, path, 9, start, RING)?;
        let block = vec![0; 2 * BLOCK];
        let skip = block.as_ptr().align_offset(BLOCK);
        let mut sink = Sink::Device {
            fd,
            block,
            skip,
            used: 0,
            at: 0,
        };
        // Nothing of an older one.
        for _ in 0..RING / BLOCK as u64 {
            sink.next();
        }
        Ok(sink)
    }

    fn next(&mut self) {
        if let Sink::Device {
            fd,
            block,
            skip,
            used,
            at,
        } = self
        {
            let block = &mut block[*skip..*skip + BLOCK];
            block.fill(0);
            *used = 0;
            let _ = sys::pwrite(*fd, block, *at);
            *at = (*at + BLOCK as u64) % RING;
        }
    }

    fn write(&mut self, line: &str) {
        let full = match self {
            Sink::File(file) => {
                let _ = file.write_all(line.as_bytes());
                return;
            }
            Sink::Device { used, .. } => *used + line.len() > BLOCK,
        };
        if full {
            // The block stays as it is.
            if let Sink::Device {
                block, used, at, ..
            } = self
            {
                *used = 0;
                block.fill(0);
                *at = (*at + BLOCK as u64) % RING;
            }
        }
        if let Sink::Device {
            fd,
            block,
            skip,
            used,
            at,
        } = self
        {
            let block = &mut block[*skip..*skip + BLOCK];
            let line = &line.as_bytes()[..line.len().min(BLOCK)];
            block[*used..*used + line.len()].copy_from_slice(line);
            *used += line.len();
            let _ = sys::pwrite(*fd, block, *at);
        }
    }
}

/// A log, and a count of what was done, which says that the fuzzer is alive.
pub struct Log {
    sink: Option<Mutex<Sink>>,
    done: AtomicU64,
    round: AtomicU64,
}

impl Log {
    /// What is about to be done. One write, so that the host has it when it begins.
    pub fn note(&self, what: &str) {
        let nr = self.done.fetch_add(1, Ordering::Relaxed);
        if let Some(sink) = &self.sink {
            let mut sink = sink.lock().unwrap_or_else(PoisonError::into_inner);
            sink.write(&format!("@{nr} {what}\n"));
        }
    }

    /// Whether notes are read by anybody.
    pub fn wanted(&self) -> bool {
        self.sink.is_some()
    }

    /// Something was done that is not worth a line.
    pub fn tick(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// How much was done.
    pub fn count(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }
}

/// Where a round is, and what for.
pub struct Run {
    options: Options,
    what: &'static str,
    /// What is done.
    pub log: Arc<Log>,
    started: Instant,
    next: u64,
    said: Instant,
}

impl Run {
    /// Starts the watch.
    pub fn new(what: &'static str, options: &Options) -> anyhow::Result<Self> {
        let sink = options
            .log
            .as_deref()
            .map(Sink::open)
            .transpose()?
            .map(Mutex::new);
        let log = Arc::new(Log {
            sink,
            done: AtomicU64::new(0),
            round: AtomicU64::new(options.from),
        });
        let limit = Duration::from_secs(options.limit);
        let (watched, seed) = (log.clone(), options.seed);
        thread::spawn(move || watch(what, seed, &watched, limit));
        println!(
            "# {what}: seed {}, from round {}",
            options.seed, options.from
        );
        Ok(Run {
            options: options.clone(),
            what,
            log,
            started: Instant::now(),
            next: options.from,
            said: Instant::now(),
        })
    }

    /// The next round and its numbers, if there is to be one.
    pub fn round(&mut self) -> Option<(u64, Rng)> {
        let nr = self.next - self.options.from;
        let seconds = self.options.seconds.map(Duration::from_secs);
        let enough = match (self.options.rounds, seconds) {
            (None, None) => nr >= 1,
            (rounds, seconds) => {
                rounds.is_some_and(|rounds| nr >= rounds)
                    || seconds.is_some_and(|most| self.started.elapsed() >= most)
            }
        };
        if enough {
            return None;
        }
        if self.said.elapsed() > Duration::from_secs(5) {
            self.said = Instant::now();
            let s = self.started.elapsed().as_secs();
            println!(
                "# {}: {nr} rounds, {} steps, {s} s",
                self.what,
                self.log.count()
            );
        }
        let round = self.next;
        self.next += 1;
        self.log.round.store(round, Ordering::Relaxed);
        self.log.note(&format!("round {round}"));
        // Neighbours have nothing in common.
        let mut mix = Rng(self.options.seed);
        let mut rng = Rng(mix.next() ^ round.wrapping_mul(0xd134_2543_de82_ef95));
        rng.next();
        Some((round, rng))
    }

    /// Rounds begun.
    pub fn rounds(&self) -> u64 {
        self.next - self.options.from
    }

    /// What went wrong, with what to say to see it again.
    pub fn failed(&self, e: &anyhow::Error) {
        let round = self.next - 1;
        println!("# round {round}: {e:#}");
        println!(
            "# again: pmskb-fuzz-kernel {} --seed {} --from {round}",
            self.what, self.options.seed
        );
        self.log.note(&format!("failed: {e:#}"));
    }
}

/// Ends the program, with what its threads wait for, when nothing has been done for too long.
fn watch(what: &str, seed: u64, log: &Log, limit: Duration) {
    let (mut count, mut since) = (log.count(), Instant::now());
    loop {
        thread::sleep(Duration::from_millis(500));
        if log.count() != count {
            (count, since) = (log.count(), Instant::now());
        } else if since.elapsed() > limit {
            let round = log.round.load(Ordering::Relaxed);
            println!("# nothing was done for {} s; threads:", limit.as_secs());
            for task in fs::read_dir("/proc/self/task")
                .into_iter()
                .flatten()
                .flatten()
            {
                let stack = fs::read_to_string(task.path().join("stack")).unwrap_or_default();
                for line in stack.lines() {
                    println!("#   {} {line}", task.file_name().to_string_lossy());
                }
            }
            println!("not ok - {what} # hangs in round {round} of seed {seed}");
            std::process::exit(1);
        }
    }
}

/// One of some things.
pub fn pick<'a, T>(rng: &mut Rng, from: &'a [T]) -> &'a T {
    &from[rng.below(from.len() as u64) as usize]
}

/// True once in `n` times.
pub fn one_in(rng: &mut Rng, n: u64) -> bool {
    rng.below(n) == 0
}

/// So many random bytes.
pub fn random(rng: &mut Rng, len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend(rng.next().to_le_bytes());
    }
    out.truncate(len);
    out
}
