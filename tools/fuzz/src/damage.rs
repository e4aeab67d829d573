// SPDX-License-Identifier: GPL-2.0

//! Damage that knows the format: it hits what matters, and on demand makes the
//! checksums right again, so that what lies behind them is reached.

use crate::scratch::Scratch;
use crate::seed::{BATCHES, SALT};
use arbitrary::{Result, Unstructured};
use pmskb_core::{Extent, Geometry, Pmem, FRAME_SIZE, LINE_SIZE};
use std::collections::BTreeSet;

const LINES: u64 = FRAME_SIZE / LINE_SIZE;
const TYPE_PUT: u8 = 1;
const TYPE_KILLED: u8 = 0xdd;
const KEY_EXTENT: u16 = 1 << 6;
/// Bytes of a batch area.
const BATCH: u64 = 20480;

/// Where the parts of an undamaged image are.
pub struct Anatomy {
    geo: Geometry,
    /// Frames by what is in them, as offsets.
    records: Vec<u64>,
    /// With the nonce that their checksums are seeded with.
    lists: Vec<(u64, u32)>,
    nodes: Vec<u64>,
    /// The first lines of records.
    firsts: Vec<u64>,
}

/// How an image was damaged.
#[derive(Clone, Copy)]
pub struct Done {
    /// The store is to be used read only.
    pub read_only: bool,
    /// Checksums were made right again.
    pub forged: bool,
}

fn u32_at(mem: &Scratch, off: u64) -> u32 {
    let mut bytes = [0; 4];
    mem.read(off, &mut bytes)
        .map_or(0, |()| u32::from_le_bytes(bytes))
}

fn u64_at(mem: &Scratch, off: u64) -> u64 {
    mem.load(off / 8 * 8).unwrap_or(0)
}

fn line_at(mem: &Scratch, off: u64) -> [u8; LINE_SIZE as usize] {
    let mut line = [0; LINE_SIZE as usize];
    let _ = mem.read(off, &mut line);
    line
}

impl Anatomy {
    pub fn of(mem: &Scratch) -> Self {
        let geo = pmskb_core::probe(mem).unwrap().superblock.geometry;
        let mut anatomy = Anatomy {
            geo,
            records: Vec::new(),
            lists: Vec::new(),
            nodes: Vec::new(),
            firsts: Vec::new(),
        };
        for frame in (geo.data_off..geo.data_end()).step_by(FRAME_SIZE as usize) {
            match u32_at(mem, frame + 4).to_le_bytes() {
                [b'P', b'K', b'r', b'f'] => anatomy.records.push(frame),
                [b'P', b'K', b'e', b'l'] => anatomy.lists.push((frame, 0)),
                _ if u64_at(mem, frame + 8) >> 48 == 0x6e70 => anatomy.nodes.push(frame),
                _ => (),
            }
        }
        for frame in anatomy.records.clone() {
            for (off, kind) in records_of(mem, frame) {
                anatomy.firsts.push(off);
                if kind != TYPE_PUT {
                    continue;
                }
                let nonce = u32_at(mem, frame + 48);
                let mut list = u64_at(mem, off + 32);
                while let Some(known) = anatomy.lists.iter_mut().find(|known| known.0 == list) {
                    known.1 = nonce;
                    list = u64_at(mem, list + 24);
                }
            }
        }
        assert!(!anatomy.records.is_empty() && !anatomy.firsts.is_empty());
        assert!(anatomy.lists.iter().all(|list| list.1 != 0) && anatomy.lists.len() == 4);
        anatomy
    }

    /// Damages the image. What the caller is to do, and may expect.
    pub fn damage(&self, mem: &Scratch, input: &mut Unstructured<'_>) -> Result<Done> {
        let read_only = input.ratio(1, 8)?;
        let mut touched = BTreeSet::new();
        for _ in 0..input.int_in_range(1..=12)? {
            self.edit(mem, input, &mut touched)?;
        }
        let forged = input.ratio(3, 4)?;
        if forged {
            for frame in touched {
                self.repair(mem, frame);
            }
        }
        Ok(Done { read_only, forged })
    }

    /// Sequence numbers of what looks like records, alive or not.
    pub fn numbers(&self, mem: &Scratch) -> BTreeSet<u64> {
        self.firsts.iter().map(|off| u64_at(mem, off + 8)).collect()
    }

    /// Whether sequence numbers are where the format has them: each within reach of
    /// its frame's base, and all of a frame before the base of the next. Where not, the
    /// log is short of records, and has nowhere to go on.
    pub fn in_order(&self, mem: &Scratch) -> bool {
        let mut ranges = Vec::new();
        for frame in (self.geo.data_off..self.geo.data_end()).step_by(FRAME_SIZE as usize) {
            if u32_at(mem, frame + 4).to_le_bytes() != *b"PKrf" {
                continue;
            }
            let base = u64_at(mem, frame + 16);
            let mut last = base;
            for (off, _) in records_of(mem, frame) {
                let seq = u64_at(mem, off + 8);
                if seq < last || seq - base >= LINES {
                    return false;
                }
                last = seq.saturating_add(1);
            }
            ranges.push((base, last));
        }
        ranges.sort_unstable();
        ranges
            .windows(2)
            .all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].0)
    }

    /// Whether no two frames that look like record frames have one base. Where two do, recovery
    /// may give one of them back, and then there is one only.
    pub fn bases_differ(&self, mem: &Scratch) -> bool {
        let mut bases = BTreeSet::new();
        (self.geo.data_off..self.geo.data_end())
            .step_by(FRAME_SIZE as usize)
            .filter(|frame| u32_at(mem, frame + 4).to_le_bytes() == *b"PKrf")
            .all(|frame| bases.insert(u64_at(mem, frame + 16)))
    }

    fn edit(
        &self,
        mem: &Scratch,
        input: &mut Unstructured<'_>,
        touched: &mut BTreeSet<u64>,
    ) -> Result<()> {
        let last = self.geo.data_end();
        let word =
            |input: &mut Unstructured<'_>, len: u64| Ok(input.int_in_range(0..=len / 8 - 1)? * 8);
        let off = match input.int_in_range(0..=10u8)? {
            0 => *input.choose(&[0, last])? + word(input, 512)?,
            1 => self.geo.map_off + word(input, self.geo.region_len / FRAME_SIZE / 8)?,
            2 => pmskb_core::LIVE_OFF + word(input, 80)?,
            3 => *input.choose(&self.records)? + word(input, LINE_SIZE)?,
            4 => input.choose(&self.lists)?.0 + word(input, 1024)?,
            5 if !self.nodes.is_empty() => *input.choose(&self.nodes)? + word(input, FRAME_SIZE)?,
            6 => return self.copy(mem, input, touched),
            7 => input.int_in_range(0..=self.geo.region_len - 8)?,
            // Few of its words are in use.
            8 => *input.choose(&[BATCHES, BATCHES + BATCH])? + word(input, 3 * LINE_SIZE)?,
            // A record's own fields.
            _ => *input.choose(&self.firsts)? + word(input, 4 * LINE_SIZE)?,
        };
        let old = u64_at(mem, off);
        let bits = input.int_in_range(0..=8u8)?;
        let new = match bits {
            // One of its parts, small or large.
            0 => old & !0xff | input.arbitrary::<u8>()? as u64,
            1 => old & !(0xffff << 32) | (u64::from(input.arbitrary::<u16>()?) << 32),
            2 => old & !(0xffff << 48) | (u64::from(input.arbitrary::<u16>()?) << 48),
            3 => old.wrapping_add(input.arbitrary::<i8>()? as u64),
            4 => old ^ (1 << input.int_in_range(0..=63u32)?),
            5 => {
                let at = self.place(input)?;
                let extent = Extent::new(at, input.int_in_range(1..=8192u32)?);
                extent.pack().unwrap_or(0)
            }
            6 => self.place(input)?,
            // As a batch has it: the first word of something.
            7 => u64_at(mem, self.place(input)?),
            _ => input.arbitrary()?,
        };
        let _ = mem.write(off, &new.to_le_bytes());
        touched.insert(off / FRAME_SIZE * FRAME_SIZE);
        Ok(())
    }

    /// An offset that something of interest is at, or near.
    fn place(&self, input: &mut Unstructured<'_>) -> Result<u64> {
        let off = match input.int_in_range(0..=6u8)? {
            0 => *input.choose(&self.records)?,
            1 => *input.choose(&self.firsts)?,
            2 => input.choose(&self.lists)?.0,
            3 if !self.nodes.is_empty() => *input.choose(&self.nodes)?,
            4 => self.geo.data_end(),
            5 => self.geo.data_off,
            _ => input.int_in_range(0..=self.geo.region_len / FRAME_SIZE)? * FRAME_SIZE,
        };
        let near = *input.choose(&[0i64, 0, 0, 1, 8, 64, -1, -8, 1024, 2048, 4096])?;
        Ok(off.saturating_add_signed(near))
    }

    /// Copies some lines from one place to another.
    fn copy(
        &self,
        mem: &Scratch,
        input: &mut Unstructured<'_>,
        touched: &mut BTreeSet<u64>,
    ) -> Result<()> {
        let from = self.place(input)? / LINE_SIZE * LINE_SIZE;
        let to = self.place(input)? / LINE_SIZE * LINE_SIZE;
        let mut bytes = vec![0; input.int_in_range(1..=64usize)? * LINE_SIZE as usize];
        if mem.read(from, &mut bytes).is_ok() && mem.write(to, &bytes).is_ok() {
            let end = to + bytes.len() as u64;
            touched.extend((to / FRAME_SIZE..=(end - 1) / FRAME_SIZE).map(|n| n * FRAME_SIZE));
        }
        Ok(())
    }

    /// Makes the checksums in a frame right, whatever it now says.
    fn repair(&self, mem: &Scratch, frame: u64) {
        if frame == 0 || frame == self.geo.data_end() {
            let mut bytes = [0; 512];
            let _ = mem.read(frame, &mut bytes);
            let crc = mem.crc32c(0, &bytes[12..]);
            let _ = mem.write(frame + 8, &crc.to_le_bytes());
        } else if (BATCHES..self.geo.map_off).contains(&frame) {
            self.repair_batch(mem, BATCHES + (frame - BATCHES) / BATCH * BATCH);
        } else if let Some((_, nonce)) = self.lists.iter().find(|list| list.0 == frame) {
            let head = line_at(mem, frame);
            let count = u64::from(u32_at(mem, frame + 32)).min(8 * (LINES - 1));
            let mut crc = mem.crc32c(*nonce, &head[4..]);
            for line in 1..=count.div_ceil(8) {
                crc = mem.crc32c(crc, &line_at(mem, frame + line * LINE_SIZE));
            }
            let _ = mem.write(frame, &crc.to_le_bytes());
        } else if u32_at(mem, frame + 4).to_le_bytes() == *b"PKrf" {
            self.repair_records(mem, frame);
        }
    }

    /// Puts a batch in force, if it looks like one.
    fn repair_batch(&self, mem: &Scratch, area: u64) {
        let head = line_at(mem, area);
        let most = (BATCH - LINE_SIZE) / 16;
        let mut pairs = vec![0; u64::from(u32_at(mem, area + 16)).min(most) as usize * 16];
        let _ = mem.read(area + LINE_SIZE, &mut pairs);
        let pairs = mem.crc32c(0, &pairs);
        let crc = mem.crc32c(mem.crc32c(0, &SALT.to_le_bytes()), &head[4..]);
        let crc = mem.crc32c(crc, &pairs.to_le_bytes());
        let _ = mem.write(area, &crc.to_le_bytes());
    }

    fn repair_records(&self, mem: &Scratch, frame: u64) {
        let mut nonce = mem.crc32c(0, &SALT.to_le_bytes());
        for word in [frame, u64_at(mem, frame + 16), u64_at(mem, frame + 40)] {
            nonce = mem.crc32c(nonce, &word.to_le_bytes());
        }
        let nonce = nonce.max(1);
        let _ = mem.write(frame + 8, &frame.to_le_bytes());
        let _ = mem.write(frame + 48, &nonce.to_le_bytes());
        let crc = mem.crc32c(0, &line_at(mem, frame)[4..]);
        let _ = mem.write(frame, &crc.to_le_bytes());
        for (off, kind) in records_of(mem, frame) {
            let head = line_at(mem, off);
            let crc = if kind == TYPE_PUT {
                record_crc(mem, nonce, off, &head)
            } else {
                let line = (off % FRAME_SIZE / LINE_SIZE) as u8;
                let crc = mem.crc32c(nonce, &[head[4], head[5], head[6], head[7], line]);
                mem.crc32c(crc, &head[8..16])
            };
            let _ = mem.write(off, &crc.to_le_bytes());
        }
    }
}

fn record_crc(mem: &Scratch, nonce: u32, off: u64, head: &[u8; 64]) -> u32 {
    let mut crc = mem.crc32c(nonce, &head[4..]);
    for line in 1..u64::from(head[5]) {
        crc = mem.crc32c(crc, &line_at(mem, off + line * LINE_SIZE));
    }
    let flags = u16::from_le_bytes([head[6], head[7]]);
    if flags & KEY_EXTENT != 0 {
        let addrs = if (flags >> 4) & 3 == 2 { 32 } else { 0 };
        let extent = Extent::unpack(u64_at(mem, off + LINE_SIZE + addrs));
        let len = u16::from_le_bytes([head[30], head[31]]);
        let mut key = vec![0; usize::from(len)];
        if mem.read(extent.off, &mut key).is_ok() {
            crc = mem.crc32c(crc, &key);
        }
    }
    crc
}

/// What looks like records in a frame: where they start, and their types.
fn records_of(mem: &Scratch, frame: u64) -> Vec<(u64, u8)> {
    let mut out = Vec::new();
    let mut line = 1;
    while line < LINES {
        let off = frame + line * LINE_SIZE;
        let head = line_at(mem, off);
        let (kind, lines) = (head[4], u64::from(head[5]));
        let whole = lines > 0 && line + lines <= LINES;
        if whole && (kind == TYPE_PUT || kind == TYPE_KILLED) {
            out.push((off, kind));
            line += lines;
        } else {
            line += 1;
        }
    }
    out
}
