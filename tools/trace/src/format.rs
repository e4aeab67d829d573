// SPDX-License-Identifier: GPL-2.0-only
//! The trace: events, in a file.
//!
//! A file is a header, blocks, and a block of no bytes at its end; all numbers are little-endian.
//!
//! ```text
//! header: "pmskbTRC", u32 version, u32 zero, u64 base, u64 size
//! block:  u32 bytes, u32 bytes when compressed, u32 CRC32C of those; they follow, by LZ4
//! ```
//!
//! An event is a byte, its tag in the lower 4 bits and the vCPU in the upper 4, and numbers as
//! LEB128. Offsets are differences, zigzag, from the end of the store, or line, before.

use crate::mark::{Data, Mark};
use anyhow::{Context, bail};
use std::io::{Read, Write};

const MAGIC: &[u8; 8] = b"pmskbTRC";
const VERSION: u32 = 1;
/// Bytes of a block, about.
const BLOCK: usize = 1 << 20;
/// The most bytes of one store: one line's.
const LINE: usize = pmskb_tcg::model::LINE;

/// The most vCPUs.
pub const CPUS: usize = 16;

/// Something that happened to the persistent memory, or a mark. Offsets count from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes were there, durable, before the guest began. At most a line's, and within one.
    Image {
        /// Where.
        off: u64,
        /// How many of `bytes`.
        len: u8,
        /// Which.
        bytes: [u8; LINE],
    },
    /// Bytes were stored; at most a line's, and within one. Stores of one vCPU that follow each
    /// other upwards are one event, if nothing came between: the bytes of a copy.
    Store {
        /// By whom.
        cpu: u8,
        /// Past the cache: durable with the next fence.
        direct: bool,
        /// Where.
        off: u64,
        /// How many of `bytes`.
        len: u8,
        /// Which.
        bytes: [u8; LINE],
    },
    /// A line was written back; at once, if `ordered` (`clflush`).
    Flush {
        /// By whom.
        cpu: u8,
        /// `clflush`.
        ordered: bool,
        /// Which, as a number.
        line: u64,
    },
    /// `sfence` or `mfence`, of a vCPU that has stored or flushed something since the last.
    Fence {
        /// Whose.
        cpu: u8,
    },
    /// A mark.
    Mark {
        /// Of which vCPU.
        cpu: u8,
        /// What it says.
        mark: Mark,
    },
    /// The end.
    End {
        /// CRC32C of the whole memory, as it was found then.
        crc: u32,
        /// What could not be told: see the plugin.
        unresolved: u64,
    },
}

const IMAGE: u8 = 1;
const STORE: u8 = 2;
const DIRECT: u8 = 3;
const FLUSH: u8 = 4;
const ORDERED: u8 = 5;
const FENCE: u8 = 6;
const MARK: u8 = 7;
const END: u8 = 8;

/// Where the memory that is traced lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its first guest-physical address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

/// A store that the next may continue.
struct OpenStore {
    cpu: u8,
    direct: bool,
    off: u64,
    len: u8,
    bytes: [u8; LINE],
}

/// Writes a trace.
pub struct Writer<W: Write> {
    out: W,
    block: Vec<u8>,
    at: u64,
    line: u64,
    /// A store that the next may continue.
    open: Option<OpenStore>,
    /// Events written.
    pub events: u64,
}

impl<W: Write> Writer<W> {
    /// Writes the header.
    pub fn new(mut out: W, header: Header) -> std::io::Result<Self> {
        let mut head = MAGIC.to_vec();
        head.extend(VERSION.to_le_bytes());
        head.extend(0u32.to_le_bytes());
        head.extend(header.base.to_le_bytes());
        head.extend(header.size.to_le_bytes());
        out.write_all(&head)?;
        Ok(Self {
            out,
            block: Vec::with_capacity(BLOCK + 256),
            at: 0,
            line: 0,
            open: None,
            events: 0,
        })
    }

    /// Writes what the memory holds before anything happens; zeros need not be told.
    pub fn image(&mut self, image: &[u8]) -> std::io::Result<()> {
        for (line, bytes) in image.chunks(LINE).enumerate() {
            if bytes.iter().any(|b| *b != 0) {
                let mut all = [0; LINE];
                all[..bytes.len()].copy_from_slice(bytes);
                self.bytes(IMAGE, 0, (line * LINE) as u64, bytes.len() as u8, &all)?;
            }
        }
        Ok(())
    }

    /// Bytes that were stored; any number, anywhere.
    pub fn store(&mut self, cpu: u8, direct: bool, off: u64, bytes: &[u8]) -> std::io::Result<()> {
        let mut at = off;
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = LINE - (at % LINE as u64) as usize;
            let (now, later) = rest.split_at(rest.len().min(room));
            self.store_in_line(cpu, direct, at, now)?;
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    fn store_in_line(
        &mut self,
        cpu: u8,
        direct: bool,
        off: u64,
        bytes: &[u8],
    ) -> std::io::Result<()> {
        if let Some(open) = &mut self.open {
            let same = (open.cpu, open.direct) == (cpu, direct);
            if same && open.off + u64::from(open.len) == off && off % LINE as u64 != 0 {
                open.bytes[usize::from(open.len)..][..bytes.len()].copy_from_slice(bytes);
                open.len += bytes.len() as u8;
                return Ok(());
            }
        }
        self.close()?;
        let mut all = [0; LINE];
        all[..bytes.len()].copy_from_slice(bytes);
        self.open = Some(OpenStore {
            cpu,
            direct,
            off,
            len: bytes.len() as u8,
            bytes: all,
        });
        Ok(())
    }

    /// A line was written back.
    pub fn flush(&mut self, cpu: u8, ordered: bool, line: u64) -> std::io::Result<()> {
        self.close()?;
        self.tag(if ordered { ORDERED } else { FLUSH }, cpu);
        self.signed(line as i64 - self.line as i64);
        self.line = line + 1;
        self.done()
    }

    /// A fence.
    pub fn fence(&mut self, cpu: u8) -> std::io::Result<()> {
        self.close()?;
        self.tag(FENCE, cpu);
        self.done()
    }

    /// A mark.
    pub fn mark(&mut self, cpu: u8, mark: Mark) -> std::io::Result<()> {
        self.close()?;
        let (rax, data) = mark.encode();
        self.tag(MARK, cpu);
        self.number(rax);
        for word in data {
            self.number(word);
        }
        self.done()
    }

    /// Ends the trace.
    pub fn finish(mut self, crc: u32, unresolved: u64) -> std::io::Result<W> {
        self.close()?;
        self.tag(END, 0);
        self.number(crc.into());
        self.number(unresolved);
        self.done()?;
        self.block_done()?;
        self.out.write_all(&[0; 12])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn close(&mut self) -> std::io::Result<()> {
        match self.open.take() {
            Some(open) => {
                let tag = if open.direct { DIRECT } else { STORE };
                self.bytes(tag, open.cpu, open.off, open.len, &open.bytes)
            }
            None => Ok(()),
        }
    }

    fn bytes(
        &mut self,
        tag: u8,
        cpu: u8,
        off: u64,
        len: u8,
        all: &[u8; LINE],
    ) -> std::io::Result<()> {
        self.tag(tag, cpu);
        self.signed(off as i64 - self.at as i64);
        self.block.push(len);
        self.block.extend_from_slice(&all[..usize::from(len)]);
        self.at = off + u64::from(len);
        self.done()
    }

    fn tag(&mut self, tag: u8, cpu: u8) {
        self.block.push(tag | (cpu << 4));
    }

    fn number(&mut self, mut n: u64) {
        while n >= 0x80 {
            self.block.push(n as u8 | 0x80);
            n >>= 7;
        }
        self.block.push(n as u8);
    }

    fn signed(&mut self, n: i64) {
        self.number(((n << 1) ^ (n >> 63)) as u64);
    }

    fn done(&mut self) -> std::io::Result<()> {
        self.events += 1;
        if self.block.len() >= BLOCK {
            self.block_done()?;
        }
        Ok(())
    }

    fn block_done(&mut self) -> std::io::Result<()> {
        if self.block.is_empty() {
            return Ok(());
        }
        let small = lz4_flex::block::compress(&self.block);
        let mut head = [0; 12];
        head[..4].copy_from_slice(&(self.block.len() as u32).to_le_bytes());
        head[4..8].copy_from_slice(&(small.len() as u32).to_le_bytes());
        head[8..].copy_from_slice(&crc32c::crc32c(&small).to_le_bytes());
        self.out.write_all(&head)?;
        self.out.write_all(&small)?;
        self.block.clear();
        Ok(())
    }
}

/// Reads a trace.
pub struct Reader<R: Read> {
    from: R,
    /// Where the memory lies.
    pub header: Header,
    block: Vec<u8>,
    next: usize,
    at: u64,
    line: u64,
    ended: bool,
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    pub fn new(mut from: R) -> anyhow::Result<Self> {
        let mut head = [0; 32];
        from.read_exact(&mut head)
            .context("it is too short for a trace")?;
        let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight"));
        if &head[..8] != MAGIC {
            bail!("it is not a trace");
        }
        if word(8) != u64::from(VERSION) {
            bail!("it is a trace of version {}, not {VERSION}", word(8) as u32);
        }
        let header = Header {
            base: word(16),
            size: word(24),
        };
        if header.size % LINE as u64 != 0 || header.size > 1 << 40 {
            bail!("the memory cannot have {} bytes", header.size);
        }
        Ok(Self {
            from,
            header,
            block: Vec::new(),
            next: 0,
            at: 0,
            line: 0,
            ended: false,
        })
    }

    /// The next event; the last is [`Event::End`], and a trace without one is an error.
    pub fn event(&mut self) -> anyhow::Result<Option<Event>> {
        if self.ended {
            return Ok(None);
        }
        if self.next == self.block.len() && !self.fill()? {
            bail!("the trace has no end: whoever wrote it was stopped");
        }
        let tag = self.byte()?;
        let cpu = tag >> 4;
        let event = match tag & 15 {
            IMAGE => {
                let (off, len, bytes) = self.bytes()?;
                Event::Image { off, len, bytes }
            }
            kind @ (STORE | DIRECT) => {
                let (off, len, bytes) = self.bytes()?;
                Event::Store {
                    cpu,
                    direct: kind == DIRECT,
                    off,
                    len,
                    bytes,
                }
            }
            kind @ (FLUSH | ORDERED) => {
                let line = self.line.wrapping_add_signed(self.signed()?);
                if line >= self.header.size / LINE as u64 {
                    bail!("line {line} is outside of the memory");
                }
                self.line = line + 1;
                Event::Flush {
                    cpu,
                    ordered: kind == ORDERED,
                    line,
                }
            }
            FENCE => Event::Fence { cpu },
            MARK => {
                let rax = self.number()?;
                let mut data = Data::default();
                for word in &mut data {
                    *word = self.number()?;
                }
                Event::Mark {
                    cpu,
                    mark: Mark::decode(rax, data),
                }
            }
            END => {
                self.ended = true;
                Event::End {
                    crc: self.number()? as u32,
                    unresolved: self.number()?,
                }
            }
            other => bail!("there is no event {other}"),
        };
        Ok(Some(event))
    }

    fn fill(&mut self) -> anyhow::Result<bool> {
        let mut head = [0; 12];
        self.from
            .read_exact(&mut head)
            .context("the trace ends within a block")?;
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four"));
        let (len, small) = (word(0) as usize, word(4) as usize);
        if len == 0 {
            return Ok(false);
        }
        if len > 2 * BLOCK || small > 2 * BLOCK {
            bail!("a block of the trace is too long");
        }
        let mut bytes = vec![0; small];
        self.from
            .read_exact(&mut bytes)
            .context("the trace ends within a block")?;
        if crc32c::crc32c(&bytes) != word(8) {
            bail!("a block of the trace is damaged");
        }
        self.block = lz4_flex::block::decompress(&bytes, len)?;
        self.next = 0;
        Ok(true)
    }

    fn byte(&mut self) -> anyhow::Result<u8> {
        let byte = self.block.get(self.next).context("an event is cut short")?;
        self.next += 1;
        Ok(*byte)
    }

    fn number(&mut self) -> anyhow::Result<u64> {
        let mut n = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            n |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(n);
            }
        }
        bail!("a number has no end")
    }

    fn signed(&mut self) -> anyhow::Result<i64> {
        let n = self.number()?;
        Ok((n >> 1) as i64 ^ -((n & 1) as i64))
    }

    fn bytes(&mut self) -> anyhow::Result<(u64, u8, [u8; LINE])> {
        let off = self.at.wrapping_add_signed(self.signed()?);
        let len = self.byte()?;
        let end = off.checked_add(len.into());
        if end.is_none_or(|end| end > self.header.size)
            || len == 0
            || off % LINE as u64 + u64::from(len) > LINE as u64
        {
            bail!("a store of {len} bytes at {off:#x} cannot be");
        }
        let mut bytes = [0; LINE];
        let from = self.block.get(self.next..self.next + usize::from(len));
        bytes[..usize::from(len)].copy_from_slice(from.context("an event is cut short")?);
        self.next += usize::from(len);
        self.at = off + u64::from(len);
        Ok((off, len, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header {
        base: 1 << 32,
        size: 1 << 20,
    };

    fn read(file: &[u8]) -> anyhow::Result<Vec<Event>> {
        let mut reader = Reader::new(file)?;
        assert_eq!(reader.header, HEADER);
        let mut all = Vec::new();
        while let Some(event) = reader.event()? {
            all.push(event);
        }
        Ok(all)
    }

    fn store(cpu: u8, direct: bool, off: u64, stored: &[u8]) -> Event {
        let mut bytes = [0; LINE];
        bytes[..stored.len()].copy_from_slice(stored);
        let len = stored.len() as u8;
        Event::Store {
            cpu,
            direct,
            off,
            len,
            bytes,
        }
    }

    #[test]
    fn events_come_back() {
        let mut w = Writer::new(Vec::new(), HEADER).unwrap();
        let mut image = vec![0; 4096];
        image[130] = 9;
        w.image(&image).unwrap();
        w.store(1, false, 4000, &[1; 200]).unwrap();
        w.flush(1, false, 63).unwrap();
        w.flush(0, true, 2).unwrap();
        w.fence(1).unwrap();
        w.store(0, true, 64, &[7; 8]).unwrap();
        w.mark(0, Mark::Ack { op: 3, result: -5 }).unwrap();
        let file = w.finish(77, 1).unwrap();
        let mut line = [0; LINE];
        line[2] = 9;
        let want = [
            Event::Image {
                off: 128,
                len: 64,
                bytes: line,
            },
            store(1, false, 4000, &[1; 32]),
            store(1, false, 4032, &[1; 64]),
            store(1, false, 4096, &[1; 64]),
            store(1, false, 4160, &[1; 40]),
            Event::Flush {
                cpu: 1,
                ordered: false,
                line: 63,
            },
            Event::Flush {
                cpu: 0,
                ordered: true,
                line: 2,
            },
            Event::Fence { cpu: 1 },
            store(0, true, 64, &[7; 8]),
            Event::Mark {
                cpu: 0,
                mark: Mark::Ack { op: 3, result: -5 },
            },
            Event::End {
                crc: 77,
                unresolved: 1,
            },
        ];
        assert_eq!(read(&file).unwrap(), want);
    }

    #[test]
    fn a_copy_is_one_store_a_line_unless_something_comes_between() {
        let mut w = Writer::new(Vec::new(), HEADER).unwrap();
        for at in 0..80 {
            w.store(0, false, at, &[at as u8]).unwrap();
        }
        w.store(1, false, 80, &[80]).unwrap();
        w.fence(1).unwrap();
        w.store(1, false, 81, &[81]).unwrap();
        w.store(1, false, 83, &[83]).unwrap();
        let file = w.finish(0, 0).unwrap();
        let lens: Vec<_> = read(&file)
            .unwrap()
            .into_iter()
            .filter_map(|e| match e {
                Event::Store { off, len, .. } => Some((off, len)),
                _ => None,
            })
            .collect();
        assert_eq!(lens, [(0, 64), (64, 16), (80, 1), (81, 1), (83, 1)]);
    }

    #[test]
    fn what_is_cut_short_or_changed_is_noticed() {
        let mut w = Writer::new(Vec::new(), HEADER).unwrap();
        for n in 0..1000u64 {
            w.store(0, false, n * 72, &n.to_le_bytes()).unwrap();
        }
        let file = w.finish(0, 0).unwrap();
        assert_eq!(read(&file).unwrap().len(), 1001 + 1000 / 9 - 111);
        for len in [10, 40, file.len() - 30, file.len() - 13] {
            assert!(read(&file[..len]).is_err(), "{len}");
        }
        let mut other = file.clone();
        other[100] ^= 1;
        let error = read(&other).unwrap_err().to_string();
        assert!(error.contains("damaged"), "{error}");
        assert!(Reader::new(&b"something else, and long enough to be it"[..]).is_err());
    }

    #[test]
    fn many_blocks_are_one_trace() {
        let mut w = Writer::new(Vec::new(), HEADER).unwrap();
        let events = 3 * BLOCK as u64 / 11;
        for n in 0..events {
            w.store(0, false, n * 72 % (1 << 20) / 8 * 8, &n.to_le_bytes())
                .unwrap();
        }
        let file = w.finish(0, 0).unwrap();
        assert_eq!(read(&file).unwrap().len() as u64, events + 1);
        assert!(file.len() < 3 * BLOCK);
    }
}
