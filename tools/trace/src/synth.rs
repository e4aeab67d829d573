// SPDX-License-Identifier: GPL-2.0-only
//! A run of the core on this host, with the marks that a guest's program would make: random
//! operations, of one thread.

use crate::mark::{Begin, Kind, Mark};
use crate::recorder::Recorder;
use crate::work::{Rng, bytes_of, key_of};
use pmskb_core::host::{self, HostFrames};
use pmskb_core::{
    CsumKind, Error, Extent, FormatParams, Frame, Frames, HeadArea, Key, Meta, Need, Pmem, PutArgs,
    PutMode, RecoverOptions, Result, Store, csum::Sum, format, probe,
};
use std::io::Write;

/// Bytes of the region.
const LEN: u64 = 8 << 20;
/// Keys that are used.
const KEYS: u64 = 40;

type Recorded<'a, W> = Store<&'a Recorder<W>, HostFrames, Vec<u64>>;

struct Driver<'a, W: Write> {
    pm: &'a Recorder<W>,
    store: Option<Recorded<'a, W>>,
    rng: Rng,
    next: u64,
    held: Vec<Frame>,
    /// Keys that have an object.
    there: Vec<bool>,
    last_append: u64,
}

/// What was begun: number, and key if it changes whether it is there.
type Begun = (u64, Option<(u64, bool)>);

/// Writes a trace of so many steps.
pub fn run<W: Write>(name: &str, steps: u64, seed: u64, out: W) -> anyhow::Result<W> {
    let pm = Recorder::new(LEN, out)?;
    let fail = |error| anyhow::anyhow!("the core: {error:?}");
    let params = FormatParams {
        uuid: *b"synthetic traces",
        label: b"synth",
        heads: HeadArea::Default,
        salt: 0x5eed_0000_5eed_0000 ^ seed,
        time: 0,
    };
    format(&pm, &params).map_err(fail)?;
    let mut driver = Driver {
        store: Some(recover(&pm).map_err(fail)?),
        pm: &pm,
        rng: Rng::of(seed, &[0]),
        next: 1,
        held: Vec::new(),
        there: vec![false; KEYS as usize],
        last_append: 0,
    };
    pm.mark(Mark::start(name));
    for _ in 0..steps {
        driver.step().map_err(fail)?;
    }
    pm.mark(Mark::End);
    drop(driver);
    Ok(pm.finish()?)
}

fn recover<W: Write>(pm: &Recorder<W>) -> Result<Recorded<'_, W>> {
    let geo = probe(pm)?.superblock.geometry;
    let work = vec![0; Recorded::<W>::WORK_WORDS];
    let frames = HostFrames::new(&geo)?;
    Ok(Store::recover(pm, frames, work, host::list, RecoverOptions::default())?.0)
}

impl<'a, W: Write> Driver<'a, W> {
    fn store(&mut self) -> &mut Recorded<'a, W> {
        self.store
            .as_mut()
            .expect("it is only gone while it is attached again")
    }

    fn step(&mut self) -> Result<()> {
        match self.rng.below(100) {
            0..70 => {
                let count = if self.rng.chance(1, 3) {
                    1 + self.rng.below(6)
                } else {
                    1
                };
                self.batch(count, false)
            }
            70..86 => {
                let count = 2 + self.rng.below(6);
                self.batch(count, true)
            }
            86..90 => self.truncate(),
            90..94 => self.compact(),
            94..96 => self.forget_some(),
            96 => self.attach(),
            _ => self.store().sync_pending(),
        }
    }

    fn begin(&mut self, begin: Begin) -> u64 {
        let op = self.next;
        self.next += 1;
        self.pm.mark(Mark::Begin(Begin { op, ..begin }));
        op
    }

    /// Puts, appends and deletes, of different keys; then their commit.
    fn batch(&mut self, count: u64, atomic: bool) -> Result<()> {
        let group = if atomic { self.next } else { 0 };
        let first = self.rng.below(KEYS);
        let mut all: Vec<(Begin, Vec<u8>)> = Vec::new();
        for n in 0..count {
            let key = (first + n) % KEYS;
            let kind = match self.rng.below(10) {
                0..2 if self.there[key as usize] => Kind::Delete,
                2..5 => Kind::Append,
                _ => Kind::Put,
            };
            let len = match self.rng.below(8) {
                0 => 1 + self.rng.below(8000),
                1..4 => 64,
                _ => 1 + self.rng.below(600),
            };
            let mut begin = Begin {
                op: self.next,
                kind,
                key: if kind == Kind::Append { 0 } else { key },
                len: 0,
                crc: 0,
                group,
                seq: 0,
            };
            let mut bytes = Vec::new();
            if kind != Kind::Delete {
                bytes = bytes_of(begin.op, len as usize);
                begin.len = bytes.len() as u32;
                begin.crc = crc32c::crc32c(&bytes);
            }
            begin.op = self.begin(begin);
            all.push((begin, bytes));
        }
        if atomic {
            self.store().begin_atomic()?;
        }
        let mut answers: Vec<(Begun, u64)> = Vec::new();
        for (begin, bytes) in all {
            let key = key_of(begin.key);
            let (seq, now) = match begin.kind {
                Kind::Delete => (self.store().delete(&key, None)?, Some((begin.key, false))),
                Kind::Append => (self.put(Key::None, &bytes)?, None),
                _ => {
                    let lies = key.len() > 40;
                    let at = lies.then(|| self.fill(&key)).transpose()?;
                    let key = match &at {
                        Some(at) => Key::Extent(at[0]),
                        None => Key::Bytes(&key),
                    };
                    (self.put(key, &bytes)?, Some((begin.key, true)))
                }
            };
            answers.push(((begin.op, now), seq));
        }
        self.store().commit()?;
        for ((op, now), seq) in answers {
            self.pm.mark(Mark::Ack {
                op,
                result: seq as i64,
            });
            match now {
                Some((key, there)) => self.there[key as usize] = there,
                None => self.last_append = seq,
            }
        }
        for frame in std::mem::take(&mut self.held) {
            self.store().frames().unhold(frame, 0)?;
        }
        Ok(())
    }

    /// Frames filled with bytes; sometimes in so many pieces that the record needs a list.
    fn fill(&mut self, bytes: &[u8]) -> Result<Vec<Extent>> {
        let small = bytes.len() > 4096 && self.rng.chance(1, 2);
        let mut extents = Vec::new();
        for part in bytes.chunks(if small { 64 } else { 4096 }) {
            let frames = self.store().frames();
            let frame = frames.alloc(None, Need::New).ok_or(Error::NoSpace)?;
            self.held.push(frame);
            self.pm.write(frame.off(), part)?;
            extents.push(Extent::new(frame.off(), part.len() as u32));
            if small {
                // So that they are not merged.
                let frames = self.store().frames();
                let frame = frames.alloc(None, Need::New).ok_or(Error::NoSpace)?;
                self.held.push(frame);
            }
        }
        Ok(extents)
    }

    fn put(&mut self, key: Key<'_>, bytes: &[u8]) -> Result<u64> {
        let extents = self.fill(bytes)?;
        let args = PutArgs {
            key,
            extents: &extents,
            meta: Meta {
                csum: Sum::of(bytes),
                csum_kind: CsumKind::Computed,
                payload_crc: self.rng.chance(1, 2).then(|| crc32c::crc32c(bytes)),
                ..Meta::default()
            },
            mode: PutMode::Upsert,
            if_seq: None,
        };
        self.store().put(&args).map(|done| done.seq)
    }

    fn truncate(&mut self) -> Result<()> {
        let upto = self.last_append;
        let begin = Begin {
            op: 0,
            kind: Kind::Truncate,
            key: 0,
            len: 0,
            crc: 0,
            group: 0,
            seq: upto,
        };
        let op = self.begin(begin);
        self.store().truncate(upto)?;
        let result = self.store().stats().trunc_seq as i64;
        self.pm.mark(Mark::Ack { op, result });
        while self.store().drain(16)? {}
        Ok(())
    }

    fn compact(&mut self) -> Result<()> {
        let mut scratch = [Extent::new(0, 0); 600];
        let mut from = Some(0);
        while let Some(at) = from {
            from = self.store().compact(at, &mut scratch)?.next;
        }
        Ok(())
    }

    /// Deletes many, so that frames become empty, and sparse.
    fn forget_some(&mut self) -> Result<()> {
        for key in 0..KEYS {
            if self.there[key as usize] && self.rng.chance(2, 3) {
                let begin = Begin {
                    op: 0,
                    kind: Kind::Delete,
                    key,
                    len: 0,
                    crc: 0,
                    group: 0,
                    seq: 0,
                };
                let op = self.begin(begin);
                let result = self.store().delete(&key_of(key), None)? as i64;
                self.store().commit()?;
                self.pm.mark(Mark::Ack { op, result });
                self.there[key as usize] = false;
            }
        }
        Ok(())
    }

    fn attach(&mut self) -> Result<()> {
        if let Some(store) = self.store.take() {
            store.close().0?;
        }
        self.store = Some(recover(self.pm)?);
        Ok(())
    }
}
