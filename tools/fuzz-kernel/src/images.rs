// SPDX-License-Identifier: GPL-2.0-only

//! Damaged images, attached by the module: refused as the core on the host refuses them, or they
//! work.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{bail, ensure, Context};
use arbitrary::Unstructured;
use clap::Args;
use pmskb_fuzz::{
    damage::{Anatomy, Done},
    scratch::Scratch,
    seed::{self, Left},
};
use pmskb_uapi::{
    core::{
        host::{self, HostFrames},
        probe,
        sim::Rng,
        Direction, RecoverOptions,
    },
    sys as uapi, Catalog, Store,
};

use crate::{
    run::{one_in, pick, random, Options, Run},
    store::{self, Control},
    sys::{self, bytes_of, Arena, Res},
    syscall,
};

/// Options of `images`.
#[derive(Args)]
pub struct Images {
    /// The device that the images are written to; a partition of it, which is made for that
    #[arg(long, default_value = "/dev/pmem1")]
    device: PathBuf,
    #[command(flatten)]
    options: Options,
}

/// A device writes directly from what is aligned to that.
const ALIGN: usize = 4096;
const START: u64 = 2 << 20;

/// An image, in memory that a device reads directly.
struct Page {
    bytes: Vec<u8>,
    skip: usize,
}

impl Page {
    fn new() -> Self {
        let bytes = vec![0; seed::LEN as usize + ALIGN];
        let skip = bytes.as_ptr().align_offset(ALIGN);
        Page { bytes, skip }
    }

    fn all(&mut self) -> &mut [u8] {
        &mut self.bytes[self.skip..self.skip + seed::LEN as usize]
    }
}

struct Base {
    mem: Scratch,
    anatomy: Anatomy,
}

#[derive(Default)]
struct Tally {
    attached: u64,
    /// Frames of which are counted twice, as the records say that they are.
    twice: u64,
    read_only: u64,
    refused: BTreeMap<i32, u64>,
    records: u64,
    puts: u64,
    kept: u64,
    compared: u64,
}

struct Fuzzer {
    control: Control,
    arena: Arena,
    device: i32,
    page: Page,
    bases: Vec<Base>,
    tally: Tally,
}

/// Runs it; whether nothing was wrong.
pub fn images(a: &Images) -> anyhow::Result<bool> {
    let arena = Arena::new()?;
    let device = store::partition(&arena, &a.device, 7, START, seed::LEN)?;
    let bases = Left::ALL.map(|left| {
        let mem = Scratch::new(seed::image(left));
        let anatomy = Anatomy::of(&mem);
        Base { mem, anatomy }
    });
    let mut fuzzer = Fuzzer {
        control: Control::open()?,
        arena,
        device,
        page: Page::new(),
        bases: bases.into(),
        tally: Tally::default(),
    };
    let mut run = Run::new("images", &a.options)?;
    while let Some((_, mut rng)) = run.round() {
        if let Err(e) = fuzzer.image(&mut rng, &run) {
            run.failed(&e);
            println!("not ok - images");
            return Ok(false);
        }
    }
    let t = &fuzzer.tally;
    let refused: Vec<String> = t
        .refused
        .iter()
        .map(|(e, n)| format!("{} {n}", sys::name(*e)))
        .collect();
    println!(
        "ok - images # {} damaged images: {} attached, {} of them to be read; refused: {}; {} records \
         read, {} puts, {} of them found after another attach, of {} images; {} times a frame was \
         counted twice",
        run.rounds(),
        t.attached,
        t.read_only,
        refused.join(", "),
        t.records,
        t.puts,
        t.kept,
        t.compared,
        t.twice
    );
    Ok(true)
}

/// What the core on the host says of an image: its records and keys, or the errno.
fn expected(mem: &Scratch, read_only: bool) -> Result<(u64, u64), i32> {
    use pmskb_uapi::core::Error;
    let errno = |e| match e {
        Error::NotFormatted => libc::EMEDIUMTYPE,
        Error::Damaged => libc::EUCLEAN,
        Error::Version => libc::EOPNOTSUPP,
        Error::NoSpace => libc::ENOSPC,
        Error::Io => libc::EIO,
        _ => libc::EINVAL,
    };
    let probed = probe(mem).map_err(errno)?;
    let geo = probed.superblock.geometry;
    let frames = HostFrames::new(&geo).map_err(errno)?;
    let work = vec![0; pmskb_uapi::core::Store::<&Scratch, HostFrames, Vec<u64>>::WORK_WORDS];
    let read_only = read_only || probed.read_only;
    let options = RecoverOptions { read_only };
    let (_, report) =
        pmskb_uapi::core::Store::recover(mem, frames, work, host::list, options).map_err(errno)?;
    Ok((report.records, report.keys))
}

impl Fuzzer {
    fn write(&mut self) -> anyhow::Result<()> {
        let fd = self.device;
        let all = self.page.all();
        let n = sys::pwrite(fd, all, 0);
        ensure!(
            n == Ok(all.len() as i64),
            "writing the image: {}",
            sys::shown(n)
        );
        Ok(())
    }

    fn image(&mut self, rng: &mut Rng, run: &Run) -> anyhow::Result<()> {
        let base = rng.below(self.bases.len() as u64) as usize;
        let bytes = random(rng, 1024);
        let mut input = Unstructured::new(&bytes);
        let Base { mem, anatomy } = &self.bases[base];
        mem.reset();
        mem.allow(u64::MAX);
        let done = anatomy.damage(mem, &mut input)?;
        self.page.all().copy_from_slice(&mem.image());
        let right = expected(mem, done.read_only);
        run.log.note(&format!("{:?} {right:?}", Left::ALL[base]));
        self.write()?;
        let flags = if done.read_only {
            uapi::PMSKB_ATTACH_READ_ONLY
        } else {
            0
        };
        let attached = self.control.attach(&self.arena, self.device, flags);
        run.log.tick();
        let minor = match (attached, right) {
            (Ok(minor), Ok(_)) => minor,
            (Err(e), Err(want)) if e == want => {
                *self.tally.refused.entry(e).or_default() += 1;
                return Ok(());
            }
            (got, want) => bail!(
                "attach: {}, and the core says {want:?}",
                sys::shown(got.map(i64::from))
            ),
        };
        self.tally.attached += 1;
        let used = self.used(minor, right.unwrap_or_default(), done, base, rng, run);
        // Even if something was wrong: the next one is to find the device free.
        let gone = self.control.detach(&self.arena, minor, 5000);
        let kept = used?;
        ensure!(gone == Ok(0), "detach: {}", sys::shown(gone));
        run.log.note("again");
        match self.control.attach(&self.arena, self.device, flags) {
            Ok(minor) => {
                let found = self.found(minor, &kept, done);
                let gone = self.control.detach(&self.arena, minor, 5000);
                found.context("after another attach")?;
                ensure!(gone == Ok(0), "detach again: {}", sys::shown(gone));
            }
            Err(e) => ensure!(
                kept.is_none() && [libc::EUCLEAN, libc::EMEDIUMTYPE, libc::ENOSPC].contains(&e),
                "it was attached once, but not again: {}",
                sys::name(e)
            ),
        }
        Ok(())
    }

    /// Uses a store that was attached. What it must still have when it is attached again, if
    /// that can be said.
    fn used(
        &mut self,
        minor: u32,
        (records, keys): (u64, u64),
        done: Done,
        base: usize,
        rng: &mut Rng,
        run: &Run,
    ) -> anyhow::Result<Option<BTreeMap<u64, Vec<u8>>>> {
        let node = store::node(minor, libc::O_RDWR)?;
        let closed = Closed(node);
        let info = store::info(&self.arena, node)
            .map_err(|e| anyhow::anyhow!("INFO: {}", sys::name(e)))?;
        self.adds_up(&info, done)?;
        ensure!(
            (info.records, info.keys) == (records, keys),
            "{} records, {} keys; the core says {records}, {keys}",
            info.records,
            info.keys
        );
        let read_only = info.flags & uapi::PMSKB_STORE_READ_ONLY != 0;
        ensure!(read_only || !done.read_only, "read-only was asked for");
        self.tally.read_only += u64::from(read_only);
        run.log.note("walk");
        let (seqs, names) = self.walk(minor, run)?;
        run.log.note("open");
        for key in names.iter().filter(|_| one_in(rng, 3)) {
            self.look(node, key, 0)?;
            run.log.tick();
        }
        let others = [0, 1, u64::MAX, rng.next()];
        for seq in seqs.iter().filter(|_| one_in(rng, 3)).chain(&others) {
            self.look(node, &[], *seq)?;
            run.log.tick();
        }
        run.log.note("scrub");
        self.scrub(node, run)?;
        let keys: Vec<Vec<u8>> = names.into_iter().collect();
        run.log.note("change");
        let mut right = BTreeMap::new();
        let mut failed = false;
        for n in 0..rng.below(14) {
            failed |= self.change(node, rng, &keys, &seqs, n, read_only, &mut right, run)?;
        }
        for (seq, bytes) in &right {
            let got = store::get(&self.arena, node, &[], *seq);
            let got = got.map_err(|e| anyhow::anyhow!("put {seq}: {}", sys::name(e)))?;
            got.is(bytes)?;
        }
        let info = store::info(&self.arena, node)
            .map_err(|e| anyhow::anyhow!("INFO: {}", sys::name(e)))?;
        self.adds_up(&info, done)?;
        // What can be said of the next attach depends on what is damaged; see the core's.
        let says = !failed && !read_only && self.in_order(node, base)?;
        drop(closed);
        Ok(says.then_some(right))
    }

    /// Frames by use are all frames; with forged records, one that is a list of two counts twice.
    fn adds_up(&mut self, info: &uapi::pmskb_store_info, done: Done) -> anyhow::Result<()> {
        let sum = store::adds_up(info);
        if !done.forged {
            return sum;
        }
        self.tally.twice += u64::from(sum.is_err());
        let free = info.frames_free + info.frames_limbo + info.frames_bad;
        ensure!(free <= info.frames_total, "too many free frames: {info:?}");
        Ok(())
    }

    /// Whether sequence numbers are where the format has them, on the media as it is now.
    fn in_order(&mut self, node: i32, base: usize) -> anyhow::Result<bool> {
        let all = self.page.all();
        let mut at = 0;
        while at < all.len() {
            match sys::pread(node, &mut all[at..], at as u64) {
                Ok(n) if n > 0 => at += n as usize,
                other => bail!("reading the store at {at}: {}", sys::shown(other)),
            }
        }
        let mem = Scratch::new(all.to_vec());
        let anatomy = &self.bases[base].anatomy;
        Ok(anatomy.bases_differ(&mem) && anatomy.in_order(&mem))
    }

    /// Reads all that is there by the mapping, by log and index: numbers and keys.
    fn walk(&mut self, minor: u32, run: &Run) -> anyhow::Result<(Vec<u64>, Vec<Vec<u8>>)> {
        let catalog = match Store::open_minor(minor).map(|store| Catalog::of_store(&store)) {
            Ok(Ok(catalog)) => catalog,
            Ok(Err(e)) => bail!("the mapping: {e}"),
            Err(e) => bail!("{e}"),
        };
        let (mut seqs, mut keys): (Vec<u64>, Vec<Vec<u8>>) = Default::default();
        let mut part = [0; 1024];
        // What the media says may be wrong, but it ends: numbers and keys only go one way.
        for record in catalog.log(0) {
            let Ok(record) = record else { break };
            let last = seqs.last();
            ensure!(
                last.is_none_or(|last| *last < record.seq),
                "the log goes back"
            );
            let _ = record.verify(catalog.media(), catalog.geometry(), &mut part);
            seqs.push(record.seq);
            self.tally.records += 1;
            run.log.tick();
        }
        let mut at: Option<Vec<u8>> = None;
        while let Ok(Some(record)) = catalog.seek(at.as_deref(), false, Direction::Forward) {
            let Ok(Some(key)) = catalog.key(&record) else {
                break;
            };
            ensure!(at.is_none_or(|at| at < key), "keys go back");
            keys.push(key.clone());
            at = Some(key);
            run.log.tick();
        }
        Ok((seqs, keys))
    }

    /// By the module.
    fn look(&mut self, node: i32, key: &[u8], seq: u64) -> anyhow::Result<()> {
        match store::get(&self.arena, node, key, seq) {
            // The sum may be wrong: that is for who reads.
            Ok(got) => ensure!(
                got.bytes.is_ok() || got.bytes == Err(libc::EIO),
                "a record's bytes: {:?}",
                got.bytes.map(|_| ()).map_err(sys::name)
            ),
            Err(libc::ENOENT | libc::EUCLEAN | libc::EIO) => (),
            Err(e) => bail!("opening a record, {seq}, {key:x?}: {}", sys::name(e)),
        }
        Ok(())
    }

    fn scrub(&mut self, node: i32, run: &Run) -> anyhow::Result<()> {
        let bad = self.arena.room(64 * 16);
        let mut from = 0;
        for _ in 0..4096 {
            let arg = uapi::pmskb_scrub {
                from,
                max_bytes: 65536,
                bad,
                nr_bad: 64,
                ..Default::default()
            };
            let at = self.arena.place(&bytes_of(&arg));
            match syscall!(SYS_ioctl, node, uapi::IOC_SCRUB, at) {
                Ok(_) => (),
                Err(libc::EIO) => return Ok(()),
                Err(e) => bail!("SCRUB: {}", sys::name(e)),
            }
            let said: uapi::pmskb_scrub = self.arena.get_as(at);
            run.log.tick();
            if said.done == 1 {
                return Ok(());
            }
            ensure!(
                said.from > from,
                "SCRUB goes on from {from} with {}",
                said.from
            );
            from = said.from;
        }
        bail!("SCRUB makes no end")
    }

    fn compact(&mut self, node: i32, run: &Run) -> Res {
        let mut from = 0;
        for _ in 0..4096 {
            let arg = uapi::pmskb_compact {
                from,
                steps: 64,
                ..Default::default()
            };
            let at = self.arena.place(&bytes_of(&arg));
            syscall!(SYS_ioctl, node, uapi::IOC_COMPACT, at)?;
            let said: uapi::pmskb_compact = self.arena.get_as(at);
            run.log.tick();
            if said.done == 1 {
                return Ok(0);
            }
            from = said.from;
        }
        Err(libc::ETIME)
    }

    /// One change; whether it failed, as it may on damaged media.
    #[allow(clippy::too_many_arguments)]
    fn change(
        &mut self,
        node: i32,
        rng: &mut Rng,
        keys: &[Vec<u8>],
        seqs: &[u64],
        n: u64,
        read_only: bool,
        right: &mut BTreeMap<u64, Vec<u8>>,
        run: &Run,
    ) -> anyhow::Result<bool> {
        let old = if keys.is_empty() || one_in(rng, 3) {
            format!("new {}", rng.below(6)).into_bytes()
        } else {
            pick(rng, keys).clone()
        };
        let len = *pick(rng, &[1, 64, 4095, 4096, 4097, 20000]);
        let bytes = random(rng, len);
        let flags = if one_in(rng, 4) {
            uapi::PMSKB_OP_CRC32C
        } else {
            0
        };
        let arena = &self.arena;
        // A key's older put of ours is gone, whichever it was.
        let drop_key = |right: &mut BTreeMap<u64, Vec<u8>>, keyed: &[u8]| {
            if let Ok(got) = store::get(arena, node, keyed, 0) {
                right.remove(&got.said.seq);
            }
        };
        let (what, res) = match rng.below(8) {
            0 | 1 => {
                drop_key(right, &old);
                (
                    "delete",
                    store::plain(arena, node, uapi::PMSKB_OP_DELETE, &old, 0),
                )
            }
            2 => {
                let seq = if seqs.is_empty() || one_in(rng, 4) {
                    *pick(rng, &[0, 1, u64::MAX])
                } else {
                    *pick(rng, seqs)
                };
                let res = store::plain(arena, node, uapi::PMSKB_OP_TRUNCATE, &[], seq);
                if let Ok(upto) = res {
                    right.retain(|seq, bytes| *seq > upto as u64 || bytes[0] & 1 == 1);
                }
                ("truncate", res)
            }
            3 => ("compact", self.compact(node, run)),
            kind => {
                let keyed = kind != 4;
                let mut bytes = bytes;
                // Says for truncations whether it has a key.
                bytes[0] = bytes[0] & !1 | u8::from(keyed);
                let key = if keyed { old.as_slice() } else { &[] };
                if keyed {
                    drop_key(right, key);
                }
                let res = store::put(arena, node, key, &bytes, flags);
                if let Ok(seq) = res {
                    right.insert(seq as u64, bytes);
                    self.tally.puts += 1;
                }
                ("put", res)
            }
        };
        run.log.note(&format!("{n} {what} {}", sys::shown(res)));
        let Err(e) = res else { return Ok(false) };
        let may = match what {
            _ if read_only => e == libc::EROFS,
            "delete" => [libc::ENOENT, libc::EIO, libc::ENOSPC].contains(&e),
            // A damaged region may have little room.
            _ => [libc::ENOSPC, libc::EIO].contains(&e),
        };
        ensure!(may, "{what}: {}", sys::name(e));
        Ok(e == libc::EIO)
    }

    fn found(
        &mut self,
        minor: u32,
        kept: &Option<BTreeMap<u64, Vec<u8>>>,
        done: Done,
    ) -> anyhow::Result<()> {
        let closed = Closed(store::node(minor, libc::O_RDWR)?);
        let info = store::info(&self.arena, closed.0)
            .map_err(|e| anyhow::anyhow!("INFO: {}", sys::name(e)))?;
        self.adds_up(&info, done)?;
        self.tally.compared += u64::from(kept.is_some());
        for (seq, bytes) in kept.iter().flatten() {
            let got = store::get(&self.arena, closed.0, &[], *seq);
            let got = got.map_err(|e| anyhow::anyhow!("put {seq}: {}", sys::name(e)))?;
            got.is(bytes)?;
            self.tally.kept += 1;
        }
        Ok(())
    }
}

/// A descriptor that is closed whatever happens.
struct Closed(i32);

impl Drop for Closed {
    fn drop(&mut self) {
        let _ = sys::close(self.0);
    }
}
