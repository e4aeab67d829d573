// SPDX-License-Identifier: GPL-2.0

//! The core beside other ordered maps: the same keys and values, the same questions
//! in the same order, and the answers must be the same.

use crate::filler::{attach, core, format, key, BenchKey, Filler};
use crate::map::Region;
use crate::timing::{median, per_op};
use anyhow::{bail, Context, Result};
use heed::types::Bytes;
use heed::{Database, Env, EnvFlags, EnvOpenOptions, PutFlags, WithoutTls};
use pmskb_core::sim::Rng;
use pmskb_core::{Direction, Extent, Key, Pmem, Reader, Record};
use rocksdb::{BlockBasedOptions, Cache, DBCompressionType, WriteBatch, WriteOptions, DB};
use rustix::mount::{mount, unmount, MountFlags, UnmountFlags};
use serde_json::{json, Value as Json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const VALUE: usize = 1024;
const SCAN: usize = 100;
/// Of a load into a store that takes them so.
const BATCH: usize = 1000;

type Value = [u8; VALUE];

/// Value number `n` says so in its first 8 bytes.
fn value(n: u64) -> Value {
    let mut value = [n as u8; VALUE];
    value[..8].copy_from_slice(&n.to_le_bytes());
    value
}

/// What each store is asked to look at of a value, so that it must be there.
fn head(value: &[u8]) -> Result<u64> {
    let head = value.first_chunk().context("a value is too short")?;
    Ok(u64::from_le_bytes(*head))
}

/// One of the stores that are compared.
trait Engine {
    /// Puts keys of these numbers, in this order, as fast as it can.
    fn load(&mut self, numbers: &[u64]) -> Result<()>;
    /// Looks a key up and at its value.
    fn get(&self, key: &BenchKey) -> Result<u64>;
    /// Looks at up to 100 values from a key on, in key order.
    fn scan(&self, key: &BenchKey) -> Result<u64>;
    /// Puts one and returns when it is as durable as this store is.
    fn insert(&mut self, n: u64) -> Result<()>;
}

struct Pmskb<'a> {
    map: &'a Region,
    filler: Filler<'a>,
    reader: Reader<&'a Region>,
}

impl<'a> Pmskb<'a> {
    fn new(map: &'a Region) -> Result<Self> {
        format(map)?;
        let filler = Filler::new(attach(map)?.0);
        let reader = core(Reader::open(map))?;
        Ok(Pmskb {
            map,
            filler,
            reader,
        })
    }

    fn put(&mut self, n: u64) -> Result<()> {
        let extent = self.filler.room(VALUE as u32)?;
        core(self.map.write(extent.off, &value(n)))?;
        self.filler.put(Key::Bytes(&key(n)), extent)
    }

    fn head(&self, record: &Record) -> Result<u64> {
        let geo = &self.reader.superblock().geometry;
        let mut extents = record.extents(&self.map, geo);
        let extent: Extent = core(extents.next().context("an object without bytes")?)?;
        let bytes = core(self.map.load(extent.off))?;
        Ok(bytes)
    }
}

impl Engine for Pmskb<'_> {
    fn load(&mut self, numbers: &[u64]) -> Result<()> {
        for batch in numbers.chunks(BATCH) {
            for n in batch {
                self.put(*n)?;
            }
            core(self.filler.store.commit())?;
        }
        Ok(())
    }

    fn get(&self, key: &BenchKey) -> Result<u64> {
        let record = core(self.reader.get(key))?.context("a key is lost")?;
        self.head(&record)
    }

    fn scan(&self, key: &BenchKey) -> Result<u64> {
        let mut cursor = self.reader.cursor(Some(key), true, Direction::Forward);
        let mut sum = 0u64;
        for _ in 0..SCAN {
            let Some(record) = core(cursor.next())? else {
                break;
            };
            sum = sum.wrapping_add(self.head(&record)?);
        }
        Ok(sum)
    }

    fn insert(&mut self, n: u64) -> Result<()> {
        self.put(n)?;
        core(self.filler.store.commit())
    }
}

/// The index alone, without a look at the record or its bytes.
struct PmskbIndex<'a>(Pmskb<'a>);

impl PmskbIndex<'_> {
    fn get(&self, key: &BenchKey) -> Result<u64> {
        let found = core(self.0.filler.store.lookup(key))?;
        Ok(found.context("a key is lost")?.0)
    }
}

struct Map(BTreeMap<BenchKey, Box<Value>>);

impl Engine for Map {
    fn load(&mut self, numbers: &[u64]) -> Result<()> {
        for n in numbers {
            self.insert(*n)?;
        }
        Ok(())
    }
    fn get(&self, key: &BenchKey) -> Result<u64> {
        head(&self.0.get(key).context("a key is lost")?[..])
    }
    fn scan(&self, key: &BenchKey) -> Result<u64> {
        let values = self.0.range(*key..).take(SCAN);
        let mut sum = 0u64;
        for (_, value) in values {
            sum = sum.wrapping_add(head(&value[..])?);
        }
        Ok(sum)
    }
    fn insert(&mut self, n: u64) -> Result<()> {
        self.0.insert(key(n), Box::new(value(n)));
        Ok(())
    }
}

struct Lmdb {
    env: Env<WithoutTls>,
    db: Database<Bytes, Bytes>,
}

impl Lmdb {
    fn new(dir: &Path, sync: bool) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let mut options = EnvOpenOptions::new().read_txn_without_tls();
        options.map_size(4 << 30);
        let flags = if sync {
            EnvFlags::empty()
        } else {
            EnvFlags::NO_SYNC
        };
        // SAFETY: the directory is this process's own and new, so that nobody else
        // changes what is mapped; NO_SYNC only costs data when the machine stops.
        let env = unsafe { options.flags(flags).open(dir) }?;
        let mut txn = env.write_txn()?;
        let db = env.create_database(&mut txn, None)?;
        txn.commit()?;
        Ok(Lmdb { env, db })
    }
}

impl Engine for Lmdb {
    fn load(&mut self, numbers: &[u64]) -> Result<()> {
        for batch in numbers.chunks(BATCH) {
            let mut txn = self.env.write_txn()?;
            for n in batch {
                self.db
                    .put_with_flags(&mut txn, PutFlags::empty(), &key(*n), &value(*n))?;
            }
            txn.commit()?;
        }
        Ok(())
    }
    fn get(&self, key: &BenchKey) -> Result<u64> {
        let txn = self.env.read_txn()?;
        head(self.db.get(&txn, key)?.context("a key is lost")?)
    }
    fn scan(&self, key: &BenchKey) -> Result<u64> {
        let txn = self.env.read_txn()?;
        let from = (
            std::ops::Bound::Included(&key[..]),
            std::ops::Bound::Unbounded,
        );
        let mut sum = 0u64;
        for found in self.db.range(&txn, &from)?.take(SCAN) {
            sum = sum.wrapping_add(head(found?.1)?);
        }
        Ok(sum)
    }
    fn insert(&mut self, n: u64) -> Result<()> {
        let mut txn = self.env.write_txn()?;
        self.db.put(&mut txn, &key(n), &value(n))?;
        txn.commit()?;
        Ok(())
    }
}

struct Rocks {
    db: DB,
    sync: bool,
}

impl Rocks {
    fn new(dir: &Path, sync: bool) -> Result<Self> {
        let mut blocks = BlockBasedOptions::default();
        blocks.set_block_cache(&Cache::new_lru_cache(3 << 30));
        blocks.set_bloom_filter(10.0, false);
        let mut options = rocksdb::Options::default();
        options.create_if_missing(true);
        options.set_compression_type(DBCompressionType::None);
        options.set_block_based_table_factory(&blocks);
        options.set_write_buffer_size(128 << 20);
        options.increase_parallelism(2);
        Ok(Rocks {
            db: DB::open(&options, dir)?,
            sync,
        })
    }
}

impl Engine for Rocks {
    fn load(&mut self, numbers: &[u64]) -> Result<()> {
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        for part in numbers.chunks(BATCH) {
            let mut batch = WriteBatch::default();
            for n in part {
                batch.put(key(*n), value(*n));
            }
            self.db.write_opt(batch, &options)?;
        }
        self.db.flush()?;
        // The best case for its readers: one sorted run.
        self.db.compact_range::<&[u8], &[u8]>(None, None);
        // And its cache has it all.
        let mut at = self.db.raw_iterator();
        at.seek_to_first();
        while at.valid() {
            at.next();
        }
        at.status()?;
        Ok(())
    }
    fn get(&self, key: &BenchKey) -> Result<u64> {
        head(&self.db.get_pinned(key)?.context("a key is lost")?)
    }
    fn scan(&self, key: &BenchKey) -> Result<u64> {
        let mut at = self.db.raw_iterator();
        at.seek(key);
        let mut sum = 0u64;
        for _ in 0..SCAN {
            let Some(value) = at.value() else {
                break;
            };
            sum = sum.wrapping_add(head(value)?);
            at.next();
        }
        at.status()?;
        Ok(sum)
    }
    fn insert(&mut self, n: u64) -> Result<()> {
        let mut options = WriteOptions::default();
        options.set_sync(self.sync);
        Ok(self.db.put_opt(key(n), value(n), &options)?)
    }
}

/// What was measured of one store.
struct Row {
    name: &'static str,
    load: f64,
    get: f64,
    scan: Option<f64>,
}

/// The questions: the same for all.
struct Questions {
    load: Vec<u64>,
    gets: Vec<BenchKey>,
    scans: Vec<BenchKey>,
}

const GETS: u64 = 100_000;
const SCANS: u64 = 2_000;
/// Parts of the questions that are timed by themselves, for the median.
const PARTS: usize = 20;

impl Questions {
    fn new(records: u64) -> Self {
        let mut rng = Rng(records);
        let mut load: Vec<u64> = (0..records).collect();
        for at in (1..load.len()).rev() {
            load.swap(at, rng.below(at as u64 + 1) as usize);
        }
        let mut some = |count| (0..count).map(|_| key(rng.below(records))).collect();
        Questions {
            load,
            gets: some(GETS),
            scans: some(SCANS),
        }
    }
}

/// Asks in parts; nanoseconds of a question, and the sum of the answers.
fn ask(keys: &[BenchKey], one: impl Fn(&BenchKey) -> Result<u64>) -> Result<(f64, u64)> {
    let (mut times, mut sum) = (Vec::new(), 0u64);
    // A round for the caches.
    for key in keys.iter().take(keys.len() / PARTS) {
        one(key)?;
    }
    for part in keys.chunks(keys.len().div_ceil(PARTS)) {
        let (ns, answer) = per_op(part.len() as u64, || {
            part.iter().try_fold(0u64, |sum, key| {
                Ok::<_, anyhow::Error>(sum.wrapping_add(one(key)?))
            })
        });
        times.push(ns);
        sum = sum.wrapping_add(answer?);
    }
    Ok((median(times).mid, sum))
}

fn measure(
    name: &'static str,
    engine: &mut dyn Engine,
    questions: &Questions,
    right: &mut Option<(u64, u64)>,
) -> Result<Row> {
    eprintln!("side by side: {} records, {name}", questions.load.len());
    let (load, done) = per_op(questions.load.len() as u64, || engine.load(&questions.load));
    done?;
    let (get, gets) = ask(&questions.gets, |key| engine.get(key))?;
    let (scan, scans) = ask(&questions.scans, |key| engine.scan(key))?;
    if *right.get_or_insert((gets, scans)) != (gets, scans) {
        bail!("{name} does not answer like the others");
    }
    Ok(Row {
        name,
        load,
        get,
        scan: Some(scan),
    })
}

/// A directory that goes when it is not needed any more.
struct Scratch {
    dir: PathBuf,
    mounted: bool,
}

impl Scratch {
    fn new(parent: &Path, name: &str) -> Result<Self> {
        let dir = parent.join(format!("pmskb-bench-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Scratch {
            dir,
            mounted: false,
        })
    }

    /// One in memory, with files in huge pages as the region is, if that is allowed.
    fn in_memory(name: &str) -> Result<Self> {
        let mut scratch = Self::new(Path::new("/dev/shm"), name)?;
        let options = Some(c"huge=always");
        let done = mount(
            "pmskb-bench",
            &scratch.dir,
            "tmpfs",
            MountFlags::NOATIME,
            options,
        );
        scratch.mounted = done.is_ok();
        if !scratch.mounted {
            eprintln!("{name} gets no huge pages: they take root, and a kernel that has them");
        }
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.mounted {
            let _ = unmount(&self.dir, UnmountFlags::DETACH);
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn compare(records: u64) -> Result<Vec<Row>> {
    let questions = Questions::new(records);
    let mut right = None;
    let mut rows = Vec::new();
    {
        let mut map = Map(BTreeMap::new());
        rows.push(measure("BTreeMap", &mut map, &questions, &mut right)?);
    }
    {
        let map = Region::huge(8 << 30)?;
        let mut pmskb = Pmskb::new(&map)?;
        let row = measure("pmskb", &mut pmskb, &questions, &mut right)?;
        let index = PmskbIndex(pmskb);
        let (get, _) = ask(&questions.gets, |key| index.get(key))?;
        rows.push(Row {
            name: "pmskb, index only",
            load: row.load,
            get,
            scan: None,
        });
        rows.push(row);
    }
    {
        let dir = Scratch::in_memory("lmdb")?;
        let mut lmdb = Lmdb::new(&dir.dir, false)?;
        rows.push(measure("LMDB", &mut lmdb, &questions, &mut right)?);
    }
    {
        let dir = Scratch::in_memory("rocksdb")?;
        let mut rocks = Rocks::new(&dir.dir, false)?;
        rows.push(measure("RocksDB", &mut rocks, &questions, &mut right)?);
    }
    Ok(rows)
}

/// One insert after the other, each durable by itself, into a store of `records`.
fn durable(records: u64, budget: Duration, disk: &Path) -> Result<Vec<(&'static str, f64)>> {
    let numbers: Vec<u64> = (0..records).collect();
    let mut out = Vec::new();
    let mut one = |name, engine: &mut dyn Engine| -> Result<()> {
        eprintln!("inserts one at a time: {name}");
        engine.load(&numbers)?;
        let mut times = Vec::new();
        let end = Instant::now() + budget;
        let mut n = records;
        while Instant::now() < end && times.len() < 20_000 {
            let (ns, done) = per_op(1, || engine.insert(n));
            done?;
            times.push(ns);
            n += 1;
        }
        out.push((name, median(times).mid));
        Ok(())
    };
    one("BTreeMap, not durable", &mut Map(BTreeMap::new()))?;
    {
        let map = Region::huge(8 << 30)?;
        one("pmskb, clwb + sfence into DRAM", &mut Pmskb::new(&map)?)?;
    }
    {
        let dir = Scratch::in_memory("lmdb")?;
        one("LMDB in memory, NOSYNC", &mut Lmdb::new(&dir.dir, false)?)?;
    }
    {
        let dir = Scratch::in_memory("rocksdb")?;
        one(
            "RocksDB in memory, log not synced",
            &mut Rocks::new(&dir.dir, false)?,
        )?;
    }
    {
        let dir = Scratch::new(disk, "lmdb")?;
        one("LMDB on disk, synced", &mut Lmdb::new(&dir.dir, true)?)?;
    }
    {
        let dir = Scratch::new(disk, "rocksdb")?;
        one(
            "RocksDB on disk, log synced",
            &mut Rocks::new(&dir.dir, true)?,
        )?;
    }
    Ok(out)
}

pub fn run(quick: bool, disk: &Path) -> Result<(String, Json)> {
    let sizes: &[u64] = if quick {
        &[100_000]
    } else {
        &[100_000, 1_000_000]
    };
    let mut text = String::from(
        "| records | store | load, ns/record | lookup, ns | : BTreeMap | scan of 100, us | : BTreeMap |\n\
         | --: | --- | --: | --: | --: | --: | --: |\n",
    );
    let mut lookups = Vec::new();
    for records in sizes {
        let rows = compare(*records)?;
        let base = rows.first().context("nothing was measured")?;
        let (base_get, base_scan) = (base.get, base.scan.unwrap_or(f64::NAN));
        for row in &rows {
            let scan = row.scan.map_or(("".into(), "".into()), |scan| {
                (
                    format!("{:.1}", scan / 1e3),
                    format!("{:.1}", scan / base_scan),
                )
            });
            text += &format!(
                "| {records} | {} | {:.0} | {:.0} | {:.1} | {} | {} |\n",
                row.name,
                row.load,
                row.get,
                row.get / base_get,
                scan.0,
                scan.1
            );
            lookups.push(json!({
                "records": records, "store": row.name, "load_ns": row.load,
                "lookup_ns": row.get, "scan_ns": row.scan,
            }));
        }
    }
    let budget = Duration::from_millis(if quick { 500 } else { 2000 });
    let records = if quick { 10_000 } else { 100_000 };
    let inserts = durable(records, budget, disk)?;
    text += &format!("\n| one insert at a time, {records} records there | us |\n| --- | --: |\n");
    for (name, ns) in &inserts {
        text += &format!("| {name} | {:.2} |\n", ns / 1e3);
    }
    let inserts: Vec<Json> = inserts
        .iter()
        .map(|(name, ns)| json!({ "store": name, "ns": ns }))
        .collect();
    Ok((text, json!({ "lookups": lookups, "inserts": inserts })))
}
