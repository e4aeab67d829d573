// SPDX-License-Identifier: GPL-2.0

//! What a store does for itself: space comes back, records are checked.
//!
//! Compaction and the draining of truncated records run as work on an unbound workqueue, in steps
//! that each hold the store's lock for as long as one submit of a few hundred operations does. A
//! submit queues the work when there is enough to gain. Detach and removal wait for it: it goes
//! inside ([`Store::enter`]) for each step, and detach flushes it before the last reference goes.

use crate::{
    bindings as ext, host,
    pm::{self, Passed, Verdict, FRAME_SIZE, LINE_SIZE},
    store::{Core, Store},
};
use kernel::{
    prelude::*,
    sync::{atomic::Relaxed, Arc},
    workqueue::{self, WorkItem},
};

/// Extents that a record may have to be moved.
const MAX_EXTENTS: usize = 4096;
/// Less is not worth a pass: bytes.
const MIN_GAIN: u64 = 4 << 20;
/// Steps of one `PMSKB_IOC_COMPACT`, unless told otherwise; and at most.
const STEPS: u32 = 16;
const MAX_STEPS: u32 = 4096;
/// Truncated records given back at a time.
const DRAIN: u32 = 1024;
/// How many times so many, unless all of them.
const DRAIN_STEPS: u32 = 64;
/// Payload bytes of one `PMSKB_IOC_SCRUB`, unless told otherwise.
const SCRUB_BYTES: u64 = 4 << 20;
/// Bad records that one `PMSKB_IOC_SCRUB` reports, at most.
const MAX_BAD: u32 = 4096;

/// What `PMSKB_IOC_SCRUB` found.
pub(crate) type BadList = KVVec<crate::uapi::Plain<ext::pmskb_scrub_bad>>;

/// Memory for the extents of one record.
fn scratch() -> Result<KVVec<pm::Extent>> {
    Ok(KVVec::from_elem(
        pm::Extent::new(0, 0),
        MAX_EXTENTS,
        GFP_KERNEL,
    )?)
}

fn push_bad(bad: &mut BadList, seq: u64, error: u32) -> Result {
    let found = ext::pmskb_scrub_bad {
        seq,
        error: error as i32,
        reserved: 0,
    };
    Ok(bad.push(crate::uapi::Plain(found), GFP_KERNEL)?)
}

/// Bytes that compaction may bring back: of payload frames, and of record frames beyond twice what
/// the records need.
fn to_gain(stats: &pm::Stats, counts: &pm::Counts) -> u64 {
    let frames = stats.record_frames.saturating_sub(stats.empty_frames);
    let records = frames.saturating_mul(FRAME_SIZE);
    records.saturating_sub(stats.record_lines.saturating_mul(2 * LINE_SIZE)) + counts.slack
}

impl Store {
    /// Queues what there is to do. Cheap; process context.
    pub(crate) fn upkeep(self: &Arc<Self>) {
        let Ok(stats) = self.core().and_then(|mut core| Ok(core.get()?.stats())) else {
            return;
        };
        if self.read_only() {
            return;
        }
        let counts = self.frames().counts();
        let total = u64::from(counts.total) * FRAME_SIZE;
        let gain = to_gain(&stats, &counts);
        // Only when space is getting short; then the sooner the more there is to gain since the
        // last pass, which may have left what it could not move.
        let short = u64::from(counts.free) * FRAME_SIZE < total / 2;
        let least = (total / 32).clamp(MIN_GAIN, 1 << 30);
        let compact = short && gain >= self.left_over.load(Relaxed).saturating_add(least);
        // Inside, so that a detach that begins now sees it.
        let Ok(_inside) = self.enter() else {
            return;
        };
        if stats.draining || compact {
            // Already queued is as good.
            let _ = workqueue::system_unbound().enqueue::<Arc<Store>, 0>(self.clone());
        }
    }

    /// `PMSKB_IOC_COMPACT`. `EINTR` if a signal came before anything was done.
    pub(crate) fn compact(&self, args: &mut ext::pmskb_compact) -> Result {
        if args.reserved.iter().any(|word| *word != 0) || args.steps > MAX_STEPS {
            return Err(EINVAL);
        }
        let steps = if args.steps == 0 { STEPS } else { args.steps };
        (args.records, args.bytes, args.done) = (0, 0, 0);
        let mut scratch = scratch()?;
        for step in 0..steps {
            if host::signal_pending() {
                return if step == 0 { Err(EINTR) } else { Ok(()) };
            }
            match self.step(args.from, &mut scratch)? {
                (moved, Some(next)) => {
                    args.from = next;
                    args.records += u64::from(moved.records);
                    args.bytes += moved.bytes;
                }
                (moved, None) => {
                    args.records += u64::from(moved.records);
                    args.bytes += moved.bytes;
                    args.done = 1;
                    // What the last step left comes back now.
                    self.core()?.get()?.sync_pending().map_err(crate::errno)?;
                    break;
                }
            }
        }
        Ok(())
    }

    fn step(&self, from: u64, scratch: &mut [pm::Extent]) -> Result<(pm::Compacted, Option<u64>)> {
        host::resched();
        let mut core = self.core()?;
        let moved = core.get()?.compact(from, scratch).map_err(crate::errno)?;
        Ok((moved, moved.next))
    }

    /// Gives back the space of truncated records, until none are left or a signal comes.
    pub(crate) fn drain(&self, all: bool) -> Result {
        let mut steps = 0u32;
        while self.core()?.get()?.drain(DRAIN).map_err(crate::errno)? {
            steps = steps.saturating_add(1);
            if host::signal_pending() || (!all && steps >= DRAIN_STEPS) {
                break;
            }
            host::resched();
        }
        Ok(())
    }

    /// All that is queued: truncated records, then one pass of compaction.
    fn work(&self) -> Result {
        self.drain(true)?;
        let mut scratch = scratch()?;
        let mut from = Some(0);
        while let Some(at) = from {
            from = self.step(at, &mut scratch)?.1;
        }
        let mut core = self.core()?;
        let core: &mut Core = core.get()?;
        core.sync_pending().map_err(crate::errno)?;
        let gain = to_gain(&core.stats(), &self.frames().counts());
        self.left_over.store(gain, Relaxed);
        Ok(())
    }

    /// `PMSKB_IOC_SCRUB`: checks records against their checksums. Holds no lock while it reads, so
    /// a record that was replaced meanwhile is left out. `EINTR` if a signal came before anything
    /// was done.
    pub(crate) fn scrub(&self, args: &mut ext::pmskb_scrub, bad: &mut BadList) -> Result {
        if args.reserved.iter().any(|word| *word != 0) {
            return Err(EINVAL);
        }
        let room = args.nr_bad.min(MAX_BAD) as usize;
        let limit = if args.max_bytes == 0 {
            SCRUB_BYTES
        } else {
            args.max_bytes
        };
        bad.reserve(room, GFP_KERNEL)?;
        (args.records, args.bytes, args.done) = (0, 0, 0);
        while args.bytes < limit {
            if host::signal_pending() {
                if args.records == 0 {
                    return Err(EINTR);
                }
                break;
            }
            host::resched();
            let entered = self.enter()?;
            let from = args.from;
            let found = {
                let mut core = self.core()?;
                let core: &mut Core = core.get()?;
                match core.log_from(from) {
                    Ok(Some(record)) => Ok(Passed::Record(record)),
                    Ok(None) => Ok(Passed::Nothing { next: None }),
                    // What cannot be read is reported, and passed over.
                    Err(pm::Error::Io) => core.log_pass(from),
                    Err(error) => Err(error),
                }
            };
            let record = match found.map_err(crate::errno)? {
                Passed::Record(record) => record,
                Passed::Lost { .. } if bad.len() >= room => break,
                passed @ (Passed::Lost { next, .. } | Passed::Nothing { next }) => {
                    if let Passed::Lost { seq, .. } = passed {
                        push_bad(bad, seq, kernel::bindings::EIO)?;
                    }
                    let Some(next) = next else {
                        args.done = 1;
                        break;
                    };
                    args.from = next;
                    continue;
                }
            };
            let mut part = [0u8; 512];
            let verdict = record.verify(self.region().as_ref(), self.geometry(), &mut part);
            drop(entered);
            let error = match verdict {
                Ok(Verdict::Intact | Verdict::Unchecked) => 0,
                Ok(Verdict::BadCsum | Verdict::BadCrc) => kernel::bindings::EBADMSG,
                Err(pm::Error::Io) => kernel::bindings::EIO,
                Err(_) => kernel::bindings::EUCLEAN,
            };
            if error != 0 && self.core()?.get()?.record(record.loc) == Ok(record) {
                if bad.len() >= room {
                    break;
                }
                push_bad(bad, record.seq, error)?;
            }
            args.from = record.seq.saturating_add(1);
            args.records += 1;
            args.bytes = args
                .bytes
                .saturating_add(u64::from(record.len).max(LINE_SIZE));
        }
        args.nr_bad = bad.len() as u32;
        Ok(())
    }
}

impl WorkItem for Store {
    type Pointer = Arc<Store>;

    fn run(this: Arc<Store>) {
        // Gone or full, it is tried again with a later submit.
        if let Err(error) = this.work() {
            if error != EIO && error != ENOSPC {
                pr_warn!("pmskb{}: upkeep: {error:?}\n", this.minor());
            }
            this.left_over.store(0, Relaxed);
        }
    }
}
