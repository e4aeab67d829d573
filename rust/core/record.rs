// SPDX-License-Identifier: GPL-2.0

//! Records, the frames that they lie in, and lists of extents.
//!
//! A record frame is filled from line 1 on and never reused in parts. A record is
//! 1 to 63 of its lines:
//!
//! ```text
//!  0 u32 crc     of bytes 4.. of all its lines, seeded with the frame's nonce;
//!                then of the key, if that lies in the payload
//!  4 u8  type    5 u8 lines    6 u16 flags    8 u64 seq     16 u64 time
//! 24 u32 length 28 u16 csum   30 u16 key_len 32 u64 first   40 u32 nr_extents
//! 44 u32 tcp_seq 48 u16 remote port 50 u16 local port
//! 52 [u8; 4] remote v4 address  56 [u8; 4] local v4 address  60 u32 payload crc
//! 64 ...        v6 addresses; key extent or key bytes; extents 1..
//! ```
//!
//! The first 8 bytes are one word: storing it commits the record, storing
//! another kills it.

use super::csum::Sum;
use super::pmem::{get, get_u16, get_u32, get_u64, put};
use super::{
    Error, Extent, Frame, Geometry, Packer, Pmem, Result, Superblock, FRAME_SIZE, LINE_SIZE,
    MAX_EXTENTS, MAX_KEY, MAX_OBJECT,
};
use core::cmp::Ordering;

/// Lines of a frame; line 0 of a record frame is its header.
pub(super) const LINES: u64 = FRAME_SIZE / LINE_SIZE;
/// Most extents that a record holds itself; with more, all are in lists.
pub(super) const MAX_INLINE: u32 = 64;
/// Lines that so many extents add to a record, at most.
pub(super) const INLINE_LINES: u64 = (MAX_INLINE as u64 * 8).div_ceil(LINE_SIZE);
/// Extents in one list frame.
pub(super) const PER_LIST: u32 = ((FRAME_SIZE - LINE_SIZE) / 8) as u32;

/// Where in a record its first extent is.
pub(super) const FIRST_AT: u64 = 32;

const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"PKrf");
const LIST_MAGIC: u32 = u32::from_le_bytes(*b"PKel");

/// Record types.
const TYPE_PUT: u8 = 1;
const TYPE_KILLED: u8 = 0xdd;

const F_KEY_EXTENT: u16 = 1 << 6;
const F_EXT_LIST: u16 = 1 << 7;
const F_COPIED: u16 = 1 << 8;
const F_PAYLOAD_CRC: u16 = 1 << 9;
const F_UDP: u16 = 1 << 10;
pub(super) const F_KEYED: u16 = 1 << 12;
/// All flags that a put may have.
const F_KNOWN: u16 = 0x3f | F_KEY_EXTENT | F_EXT_LIST | F_COPIED | F_PAYLOAD_CRC | F_UDP | F_KEYED;

/// Where a record is: the offset of its first line in the region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Locator(pub u64);

impl Locator {
    /// Offset of the record frame.
    pub(super) fn frame_off(self) -> u64 {
        self.0 / FRAME_SIZE * FRAME_SIZE
    }

    /// Number of its first line in the frame.
    pub(super) fn line(self) -> u64 {
        self.0 % FRAME_SIZE / LINE_SIZE
    }
}

/// Where an Internet checksum comes from; the numbers are those of the uapi.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum CsumKind {
    /// There is none.
    #[default]
    None = 0,
    /// The sender's, from the packet's transport header.
    Derived = 1,
    /// From the sum that the device delivered.
    Hardware = 2,
    /// Computed by this host.
    Computed = 3,
}

/// Where a timestamp comes from; the numbers are those of the uapi.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum TimeSource {
    /// There is none.
    #[default]
    None = 0,
    /// The device's stamp.
    Hardware = 1,
    /// The stack's receive stamp.
    Software = 2,
    /// Taken at placement or persist.
    Placement = 3,
}

/// Addresses of a flow, as on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addrs {
    /// IPv4.
    V4 {
        /// The sender's.
        remote: [u8; 4],
        /// This host's.
        local: [u8; 4],
    },
    /// IPv6.
    V6 {
        /// The sender's.
        remote: [u8; 16],
        /// This host's.
        local: [u8; 16],
    },
}

/// The flow that a record's packets came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Both addresses.
    pub addrs: Addrs,
    /// The sender's port, as a number.
    pub remote_port: u16,
    /// This host's port, as a number.
    pub local_port: u16,
    /// UDP, else TCP.
    pub udp: bool,
}

/// What a record says about its object, besides key and extents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Meta {
    /// Nanoseconds since the epoch of the clock that `time_source` names.
    pub time: u64,
    /// Where `time` comes from.
    pub time_source: TimeSource,
    /// Internet checksum of the object's bytes.
    pub csum: Sum,
    /// Where `csum` comes from.
    pub csum_kind: CsumKind,
    /// Some bytes were copied into frames, not placed.
    pub copied: bool,
    /// Where the bytes came from.
    pub flow: Option<Flow>,
    /// TCP sequence number of the object's first byte.
    pub tcp_seq: u32,
    /// CRC32C of the object's bytes.
    pub payload_crc: Option<u32>,
}

/// The key of a put.
#[derive(Debug, Clone, Copy)]
pub enum Key<'a> {
    /// None: the record is in the log only.
    None,
    /// These bytes, which are copied into the record. At most [`MAX_KEY`].
    Bytes(&'a [u8]),
    /// These bytes of the data area, which the record refers to.
    Extent(Extent),
}

/// What a put does about a record with the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PutMode {
    /// Replaces it, if there is one.
    #[default]
    Upsert,
    /// Fails with [`Error::Exists`] if there is one.
    Create,
    /// Fails with [`Error::NotFound`] if there is none.
    Replace,
}

/// Key bytes, wherever they are.
#[derive(Debug, Clone, Copy)]
pub(super) enum KeySrc<'a> {
    Bytes(&'a [u8]),
    Pm { off: u64, len: usize },
}

/// Key bytes that are not read anew each time that they are looked at, at most.
pub(super) const NEAR: usize = 64;

impl<'a> KeySrc<'a> {
    /// The same key, read once, unless it is longer than `to`: for a search, which looks at it
    /// in each node.
    pub(super) fn near<'b, P: Pmem>(self, pm: &P, to: &'b mut [u8; NEAR]) -> Result<KeySrc<'b>>
    where
        'a: 'b,
    {
        if matches!(self, KeySrc::Bytes(_)) || self.len() > NEAR {
            return Ok(self);
        }
        let len = self.read(pm, 0, to)?;
        Ok(KeySrc::Bytes(to.get(..len).ok_or(Error::Invalid)?))
    }

    pub(super) fn len(&self) -> usize {
        match self {
            KeySrc::Bytes(bytes) => bytes.len(),
            KeySrc::Pm { len, .. } => *len,
        }
    }

    /// Copies key bytes from `at` on; how many there were.
    pub(super) fn read<P: Pmem>(&self, pm: &P, at: usize, to: &mut [u8]) -> Result<usize> {
        let now = self.len().saturating_sub(at).min(to.len());
        let to = to.get_mut(..now).ok_or(Error::Invalid)?;
        if now == 0 {
            return Ok(0);
        }
        match self {
            KeySrc::Bytes(bytes) => {
                let from = bytes.get(at..at + now).ok_or(Error::Invalid)?;
                to.copy_from_slice(from);
            }
            KeySrc::Pm { off, .. } => pm.read(off.saturating_add(at as u64), to)?,
        }
        Ok(now)
    }

    /// The 8 bytes from `skip` on, zero padded, as a number that sorts like them.
    pub(super) fn prefix<P: Pmem>(&self, pm: &P, skip: usize) -> Result<u64> {
        if let KeySrc::Bytes(bytes) = self {
            if let Some(word) = bytes.get(skip..).and_then(|rest| rest.first_chunk()) {
                return Ok(u64::from_be_bytes(*word));
            }
        }
        let mut word = [0u8; 8];
        self.read(pm, skip, &mut word)?;
        Ok(u64::from_be_bytes(word))
    }

    /// Compares two keys; and how many bytes they have in common, if that is
    /// less than `limit`, where the comparison ends as equal.
    pub(super) fn compare<P: Pmem>(
        &self,
        pm: &P,
        other: &KeySrc<'_>,
        limit: usize,
    ) -> Result<(Ordering, usize)> {
        let mut at = 0;
        while at < limit {
            let (mut a, mut b) = ([0u8; 64], [0u8; 64]);
            let now = (limit - at).min(64);
            let n = self.read(pm, at, a.get_mut(..now).ok_or(Error::Invalid)?)?;
            let m = other.read(pm, at, b.get_mut(..now).ok_or(Error::Invalid)?)?;
            let same = a.iter().zip(&b).take(n.min(m)).take_while(|(a, b)| a == b);
            let same = same.count();
            if same < n.min(m) {
                return Ok((a.get(same).cmp(&b.get(same)), at + same));
            }
            if n != m || n == 0 {
                return Ok((n.cmp(&m), at + same));
            }
            at += now;
        }
        Ok((Ordering::Equal, limit))
    }

    /// A hash of the key, to find operations of one batch that may meet.
    pub(super) fn hash<P: Pmem>(&self, pm: &P) -> Result<u32> {
        crc_of(pm, 0, self)
    }
}

/// CRC32C over a key's bytes.
fn crc_of<P: Pmem>(pm: &P, mut crc: u32, key: &KeySrc<'_>) -> Result<u32> {
    let mut at = 0;
    loop {
        let mut part = [0u8; 64];
        let now = key.read(pm, at, &mut part)?;
        if now == 0 {
            return Ok(crc);
        }
        crc = pm.crc32c(crc, part.get(..now).ok_or(Error::Invalid)?);
        at += now;
    }
}

/// The key of the record at `loc`, which is known to be a valid one.
pub(super) fn key_of<P: Pmem>(pm: &P, loc: u64) -> Result<KeySrc<'static>> {
    key_by(pm, loc, pm.load(loc)?)
}

/// The same for one whose first word is `word` and may not be stored yet.
pub(super) fn key_by<P: Pmem>(pm: &P, loc: u64, word: u64) -> Result<KeySrc<'static>> {
    let flags = (word >> 48) as u16;
    let len = usize::from((pm.load(loc.saturating_add(24))? >> 48) as u16);
    let at = loc.saturating_add(key_at(flags));
    if len > MAX_KEY {
        return Err(Error::Damaged);
    }
    let off = if flags & F_KEY_EXTENT != 0 {
        Extent::unpack(pm.load(at)?).off
    } else {
        at
    };
    Ok(KeySrc::Pm { off, len })
}

/// Where in a record its key or key extent starts.
fn key_at(flags: u16) -> u64 {
    LINE_SIZE + if (flags >> 4) & 3 == 2 { 32 } else { 0 }
}

/// Header of a record frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct FrameHeader {
    /// Offset of the frame.
    pub(super) off: u64,
    /// No record in the frame has a lower sequence number.
    pub(super) base_seq: u64,
    /// Seeds the checksums of its records.
    pub(super) nonce: u32,
}

impl FrameHeader {
    /// A header whose nonce nobody can know who does not know the salt, and that
    /// no other frame had: `epoch` is never used twice in a store.
    pub(super) fn new<P: Pmem>(pm: &P, salt: u64, off: u64, base_seq: u64, epoch: u64) -> Self {
        let mut nonce = pm.crc32c(0, &salt.to_le_bytes());
        for word in [off, base_seq, epoch] {
            nonce = pm.crc32c(nonce, &word.to_le_bytes());
        }
        // 0 would make a line of zeros its own checksum.
        let nonce = nonce.max(1);
        FrameHeader {
            off,
            base_seq,
            nonce,
        }
    }

    /// Writes the header and starts its write-back, but for its first word if it
    /// is not to be valid `now`. Returns that word.
    pub(super) fn write<P: Pmem>(
        &self,
        pm: &P,
        uuid: &[u8; 16],
        epoch: u64,
        now: bool,
    ) -> Result<u64> {
        let mut raw = [0u8; LINE_SIZE as usize];
        put(&mut raw, 4, &FRAME_MAGIC.to_le_bytes())?;
        put(&mut raw, 8, &self.off.to_le_bytes())?;
        put(&mut raw, 16, &self.base_seq.to_le_bytes())?;
        put(&mut raw, 24, uuid)?;
        put(&mut raw, 40, &epoch.to_le_bytes())?;
        put(&mut raw, 48, &self.nonce.to_le_bytes())?;
        let crc = pm.crc32c(0, raw.get(4..).ok_or(Error::Invalid)?);
        put(&mut raw, 0, &crc.to_le_bytes())?;
        let word = get_u64(&raw, 0)?;
        if !now {
            put(&mut raw, 0, &[0; 8])?;
        }
        pm.write(self.off, &raw)?;
        if !broken!("header_flush") {
            pm.flush(self.off, LINE_SIZE)?;
        }
        Ok(word)
    }

    /// Reads the header of the record frame at `off`; [`Error::Damaged`] if it
    /// is none of the store `uuid`.
    pub(super) fn read<P: Pmem>(pm: &P, off: u64, uuid: &[u8; 16]) -> Result<Self> {
        let mut raw = [0u8; LINE_SIZE as usize];
        pm.read(off, &mut raw)?;
        let crc = pm.crc32c(0, raw.get(4..).ok_or(Error::Invalid)?);
        let header = FrameHeader {
            off: get_u64(&raw, 8)?,
            base_seq: get_u64(&raw, 16)?,
            nonce: get_u32(&raw, 48)?,
        };
        let right = get_u32(&raw, 0)? == crc
            && get_u32(&raw, 4)? == FRAME_MAGIC
            && header.off == off
            && get::<16>(&raw, 24)? == *uuid;
        if right {
            Ok(header)
        } else {
            Err(Error::Damaged)
        }
    }

    /// Whether what is at `off` and is no header was one, as far as can be told: its
    /// magic is right, and one of the two things that name store and place.
    pub(super) fn resembles<P: Pmem>(pm: &P, off: u64, uuid: &[u8; 16]) -> Result<bool> {
        let mut raw = [0u8; LINE_SIZE as usize];
        pm.read(off, &mut raw)?;
        let (place, store) = (get_u64(&raw, 8)? == off, get::<16>(&raw, 24)? == *uuid);
        let magic = get_u32(&raw, 4)? == FRAME_MAGIC;
        Ok((magic && (place || store)) || (place && store))
    }

    /// Whether records were lost with the header at `off`, which is none, as far as can be
    /// told. A crash before a frame's first commit leaves any mixture of a header and of
    /// what was there, a payload for instance, but no record that belongs to it.
    pub(super) fn lost<P: Pmem>(pm: &P, geo: &Geometry, sb: &Superblock, off: u64) -> Result<bool> {
        let mut raw = [0u8; LINE_SIZE as usize];
        pm.read(off, &mut raw)?;
        let (base_seq, epoch) = (get_u64(&raw, 16)?, get_u64(&raw, 40)?);
        let made = FrameHeader::new(pm, sb.salt, off, base_seq, epoch);
        let stored = FrameHeader {
            nonce: get_u32(&raw, 48)?,
            ..made
        };
        let resembles = Self::resembles(pm, off, &sb.uuid)?;
        // A nonce that this store would not have made for what else the header says is one that
        // it made only if the header is its own: an earlier store's records have theirs. (A header
        // of each, torn, may have the one's nonce and the other's name: then a crash at the first
        // use of the frame is taken for damage, though nothing is lost.)
        let own = get::<16>(&raw, 24)? == sb.uuid;
        for line in 1..LINES {
            let at = off.saturating_add(line * LINE_SIZE);
            match pm.read(at, &mut raw) {
                Err(Error::Io) => continue,
                read => read?,
            }
            let put = |header| match parse(pm, geo, header, line) {
                Ok(Line::Put(record)) => Ok(record.keyed() || record.seq > sb.trunc_seq),
                Ok(_) | Err(Error::Io) => Ok(false),
                Err(error) => Err(error),
            };
            let found = if resembles {
                (own && put(&stored)?) || put(&made)?
            } else {
                // Nothing is left that the sums of records could be checked with.
                let word = get_u64(&raw, 0)?;
                let lines = (word >> 40) & 0xff;
                lines > 0 && line + lines <= LINES && is_put(word) && is_sane(&raw)?
            };
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether the nonce is the one that this store would have made.
    pub(super) fn check_nonce<P: Pmem>(&self, pm: &P, salt: u64) -> Result<()> {
        let epoch = pm.load(self.off.saturating_add(40))?;
        let right = FrameHeader::new(pm, salt, self.off, self.base_seq, epoch);
        if right.nonce == self.nonce {
            Ok(())
        } else {
            Err(Error::Damaged)
        }
    }
}

/// The check value of a killed record: its line count can be trusted, and its
/// sequence number.
fn kill_check<P: Pmem>(pm: &P, nonce: u32, line: u64, word: u64, seq: u64) -> u32 {
    // Type, lines and flags as they are in the word, then which line it is.
    let [_, _, _, _, kind, lines, low, high] = word.to_le_bytes();
    let crc = pm.crc32c(nonce, &[kind, lines, low, high, line as u8]);
    pm.crc32c(crc, &seq.to_le_bytes())
}

/// The word that kills the record at `loc` when it is stored there. It keeps
/// lines and flags, so that the key is still found.
pub(super) fn kill_word<P: Pmem>(pm: &P, loc: Locator) -> Result<u64> {
    kill_word_by(pm, loc, pm.load(loc.0)?)
}

/// Whether a record's first word is that of a put.
pub(super) fn is_put(word: u64) -> bool {
    (word >> 32) as u8 == TYPE_PUT
}

/// The same for a record whose first word is `word` and was not stored.
pub(super) fn kill_word_by<P: Pmem>(pm: &P, loc: Locator, word: u64) -> Result<u64> {
    let nonce = pm.load(loc.frame_off().saturating_add(48))? as u32;
    let seq = pm.load(loc.0.saturating_add(8))?;
    let word = (word >> 40 << 40) | (u64::from(TYPE_KILLED) << 32);
    Ok(word | u64::from(kill_check(pm, nonce, loc.line(), word, seq)))
}

/// A record as it is on the media, checked against its checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Where it is.
    pub loc: Locator,
    /// How many lines it has.
    pub lines: u8,
    /// Its sequence number in the store.
    pub seq: u64,
    /// Bytes of the object.
    pub len: u32,
    /// Bytes of the key, if it has one.
    pub key_len: Option<u16>,
    /// Extents of the object, after adjacent ones were merged.
    pub nr_extents: u32,
    /// What it says about the object.
    pub meta: Meta,
    pub(super) flags: u16,
    /// The first word of the record: it changes when the record dies.
    pub(super) word: u64,
    /// Extent 0, or the offset of the first list frame.
    pub(super) first: u64,
    pub(super) nonce: u32,
}

/// What is at a line of a record frame.
pub(super) enum Line {
    /// A live record.
    Put(Record),
    /// A killed record of so many lines.
    Killed { lines: u64, seq: u64 },
    /// Looks like a record, but its checksum is wrong.
    Torn,
    /// Nothing, or the rest of something.
    Blank,
}

/// Looks at one line of a record frame.
pub(super) fn parse<P: Pmem>(
    pm: &P,
    geo: &Geometry,
    header: &FrameHeader,
    line: u64,
) -> Result<Line> {
    let loc = Locator(header.off.saturating_add(line * LINE_SIZE));
    // Before the load, which need not survive what the media refuses.
    let mut raw = [0u8; LINE_SIZE as usize];
    pm.read(loc.0, &mut raw)?;
    let word = pm.load(loc.0)?;
    let (kind, lines) = ((word >> 32) as u8, (word >> 40) as u8);
    if lines == 0 || line == 0 || line + u64::from(lines) > LINES {
        return Ok(Line::Blank);
    }
    match kind {
        TYPE_KILLED => {
            let seq = pm.load(loc.0.saturating_add(8))?;
            if kill_check(pm, header.nonce, line, word, seq) != word as u32 {
                return Ok(Line::Blank);
            }
            Ok(Line::Killed {
                lines: u64::from(lines),
                seq,
            })
        }
        TYPE_PUT => parse_put(pm, geo, header, loc, word, &raw),
        _ => Ok(Line::Blank),
    }
}

fn parse_put<P: Pmem>(
    pm: &P,
    geo: &Geometry,
    header: &FrameHeader,
    loc: Locator,
    word: u64,
    raw: &[u8; LINE_SIZE as usize],
) -> Result<Line> {
    let seq = get_u64(raw, 8)?;
    // Compaction leaves large gaps, but no random number is that close.
    let plausible = seq >= header.base_seq && seq - header.base_seq < 1 << 32;
    let wrong = if plausible { Line::Torn } else { Line::Blank };
    let (lines, flags) = ((word >> 40) as u8, (word >> 48) as u16);
    let mut crc = pm.crc32c(header.nonce, raw.get(4..).ok_or(Error::Invalid)?);
    let mut next = [0u8; LINE_SIZE as usize];
    for line in 1..u64::from(lines) {
        pm.read(loc.0.saturating_add(line * LINE_SIZE), &mut next)?;
        crc = pm.crc32c(crc, &next);
    }
    if !is_sane(raw)? {
        return Ok(wrong);
    }
    let key_len = get_u16(raw, 30)?;
    if flags & F_KEY_EXTENT != 0 {
        let at = loc.0.saturating_add(key_at(flags));
        let extent = Extent::unpack(pm.load(at)?);
        if geo.check_extent(extent).is_err() || extent.len != u32::from(key_len) {
            return Ok(wrong);
        }
        let key = KeySrc::Pm {
            off: extent.off,
            len: usize::from(key_len),
        };
        crc = crc_of(pm, crc, &key)?;
    }
    let crc_right = crc == word as u32 || broken!("record_crc");
    if !crc_right || get_u64(raw, 0)? != word {
        return Ok(wrong);
    }
    decode(pm, loc, raw, header.nonce).map(Line::Put)
}

/// Whether a record's parts go together.
fn is_sane(raw: &[u8; LINE_SIZE as usize]) -> Result<bool> {
    let word = get_u64(raw, 0)?;
    let (lines, flags) = ((word >> 40) as u8, (word >> 48) as u16);
    let key_len = get_u16(raw, 30)?;
    let nr_extents = get_u32(raw, 40)?;
    Ok(usize::from(key_len) <= MAX_KEY
        && nr_extents <= MAX_EXTENTS
        && flags & !F_KNOWN == 0
        && (flags >> 4) & 3 != 3
        && (flags & F_KEYED != 0 || key_len == 0)
        && (flags & F_KEY_EXTENT == 0 || key_len != 0)
        && u64::from(lines) == lines_for(flags, key_len, nr_extents))
}

/// What a record says, whether or not it is right.
fn decode<P: Pmem>(pm: &P, loc: Locator, raw: &[u8], nonce: u32) -> Result<Record> {
    let word = get_u64(raw, 0)?;
    let (lines, flags) = ((word >> 40) as u8, (word >> 48) as u16);
    let key_len = get_u16(raw, 30)?;
    let flow = decode_flow(pm, loc, flags, raw)?;
    Ok(Record {
        loc,
        lines,
        seq: get_u64(raw, 8)?,
        len: get_u32(raw, 24)?,
        key_len: (flags & F_KEYED != 0).then_some(key_len),
        nr_extents: get_u32(raw, 40)?.min(MAX_EXTENTS),
        meta: Meta {
            time: get_u64(raw, 16)?,
            time_source: match (flags >> 2) & 3 {
                0 => TimeSource::None,
                1 => TimeSource::Hardware,
                2 => TimeSource::Software,
                _ => TimeSource::Placement,
            },
            csum: Sum::new(get_u16(raw, 28)?),
            csum_kind: match flags & 3 {
                0 => CsumKind::None,
                1 => CsumKind::Derived,
                2 => CsumKind::Hardware,
                _ => CsumKind::Computed,
            },
            copied: flags & F_COPIED != 0,
            flow,
            tcp_seq: get_u32(raw, 44)?,
            payload_crc: if flags & F_PAYLOAD_CRC != 0 {
                Some(get_u32(raw, 60)?)
            } else {
                None
            },
        },
        flags,
        word,
        first: get_u64(raw, 32)?,
        nonce,
    })
}

/// Reads a record without checking it: one that was valid, and is dead now.
pub(super) fn read_dead<P: Pmem>(pm: &P, loc: Locator) -> Result<Record> {
    read_staged(pm, loc, pm.load(loc.0)?)
}

/// The same for one whose first word is `word` and was not stored.
pub(super) fn read_staged<P: Pmem>(pm: &P, loc: Locator, word: u64) -> Result<Record> {
    let mut raw = [0u8; LINE_SIZE as usize];
    pm.read(loc.0, &mut raw)?;
    put(&mut raw, 0, &word.to_le_bytes())?;
    let nonce = pm.load(loc.frame_off().saturating_add(48))? as u32;
    decode(pm, loc, &raw, nonce)
}

fn decode_flow<P: Pmem>(pm: &P, loc: Locator, flags: u16, raw: &[u8]) -> Result<Option<Flow>> {
    let addrs = match (flags >> 4) & 3 {
        1 => Addrs::V4 {
            remote: get(raw, 52)?,
            local: get(raw, 56)?,
        },
        2 => {
            let (mut remote, mut local) = ([0; 16], [0; 16]);
            pm.read(loc.0.saturating_add(LINE_SIZE), &mut remote)?;
            pm.read(loc.0.saturating_add(LINE_SIZE + 16), &mut local)?;
            Addrs::V6 { remote, local }
        }
        _ => return Ok(None),
    };
    Ok(Some(Flow {
        addrs,
        remote_port: get_u16(raw, 48)?,
        local_port: get_u16(raw, 50)?,
        udp: flags & F_UDP != 0,
    }))
}

/// Lines of a record with these properties.
fn lines_for(flags: u16, key_len: u16, nr_extents: u32) -> u64 {
    let key = if flags & F_KEY_EXTENT != 0 {
        8
    } else {
        u64::from(key_len).next_multiple_of(8)
    };
    let extents = if flags & F_EXT_LIST != 0 {
        0
    } else {
        u64::from(nr_extents.saturating_sub(1)) * 8
    };
    (key_at(flags) + key + extents).div_ceil(LINE_SIZE)
}

/// What [`write`] needs to be told of a record.
pub(super) struct Draft<'a> {
    pub(super) key: Option<KeySrc<'a>>,
    /// Where the key lies, if the record shall refer to it.
    pub(super) key_extent: Option<Extent>,
    pub(super) extents: &'a [Extent],
    pub(super) meta: &'a Meta,
    pub(super) len: u32,
    pub(super) nr_extents: u32,
    flags: u16,
    key_len: u16,
    pub(super) lines: u8,
}

impl<'a> Draft<'a> {
    /// Checks and measures a record to be.
    pub(super) fn new(
        geo: &Geometry,
        key: Key<'a>,
        extents: &'a [Extent],
        meta: &'a Meta,
    ) -> Result<Self> {
        let (key, key_extent) = match key {
            Key::None => (None, None),
            Key::Bytes(bytes) => (Some(KeySrc::Bytes(bytes)), None),
            Key::Extent(extent) => {
                geo.check_extent(extent)?;
                let (off, len) = (extent.off, extent.len as usize);
                (Some(KeySrc::Pm { off, len }), Some(extent))
            }
        };
        Self::measure(geo, key, key_extent, extents, meta)
    }

    /// The same for a record that there is already, with its bytes elsewhere.
    pub(super) fn again<P: Pmem>(
        pm: &P,
        geo: &Geometry,
        record: &'a Record,
        key_extent: Option<Extent>,
        extents: &'a [Extent],
    ) -> Result<Self> {
        let key = match record.keyed() {
            true => Some(key_of(pm, record.loc.0)?),
            false => None,
        };
        Self::measure(geo, key, key_extent, extents, &record.meta)
    }

    fn measure(
        geo: &Geometry,
        key: Option<KeySrc<'a>>,
        key_extent: Option<Extent>,
        extents: &'a [Extent],
        meta: &'a Meta,
    ) -> Result<Self> {
        let mut len = 0u64;
        for extent in extents {
            geo.check_extent(*extent)?;
            len = len.saturating_add(u64::from(extent.len));
            if len > MAX_OBJECT {
                return Err(Error::TooBig);
            }
        }
        let nr_extents = u32::try_from(Packer::new(extents).count()).unwrap_or(u32::MAX);
        if nr_extents > MAX_EXTENTS {
            return Err(Error::TooBig);
        }
        let mut flags = meta.csum_kind as u16 | ((meta.time_source as u16) << 2);
        flags |= match meta.flow.map(|flow| flow.addrs) {
            None => 0,
            Some(Addrs::V4 { .. }) => 1 << 4,
            Some(Addrs::V6 { .. }) => 2 << 4,
        };
        let key_len = key.map_or(0, |key| key.len());
        if key_len > MAX_KEY {
            return Err(Error::TooLong);
        }
        for (flag, set) in [
            (F_KEYED, key.is_some()),
            (F_KEY_EXTENT, key_extent.is_some()),
            (F_EXT_LIST, nr_extents > MAX_INLINE),
            (F_COPIED, meta.copied),
            (F_PAYLOAD_CRC, meta.payload_crc.is_some()),
            (F_UDP, meta.flow.is_some_and(|flow| flow.udp)),
        ] {
            flags |= if set { flag } else { 0 };
        }
        Ok(Draft {
            key,
            key_extent,
            extents,
            meta,
            len: len as u32,
            nr_extents,
            flags,
            key_len: key_len as u16,
            lines: lines_for(flags, key_len as u16, nr_extents) as u8,
        })
    }

    /// Frames that its extent lists take.
    pub(super) fn list_frames(&self) -> u32 {
        if self.flags & F_EXT_LIST != 0 {
            self.nr_extents.div_ceil(PER_LIST)
        } else {
            0
        }
    }
}

/// Writes bytes line by line and sums them up.
struct LineWriter<'a, P> {
    pm: &'a P,
    at: u64,
    line: [u8; LINE_SIZE as usize],
    used: usize,
    crc: u32,
}

impl<P: Pmem> LineWriter<'_, P> {
    fn bytes(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let now = bytes.len().min(self.line.len() - self.used);
            let (head, rest) = bytes.split_at_checked(now).ok_or(Error::Invalid)?;
            put(&mut self.line, self.used, head)?;
            self.used += now;
            bytes = rest;
            if self.used == self.line.len() {
                self.end_line()?;
            }
        }
        Ok(())
    }

    /// A key, padded to a multiple of 8.
    fn key(&mut self, key: &KeySrc<'_>) -> Result<()> {
        let mut at = 0;
        while at < key.len() {
            let mut part = [0u8; LINE_SIZE as usize];
            let now = key.read(self.pm, at, &mut part)?;
            let padded = now.next_multiple_of(8);
            self.bytes(part.get(..padded).ok_or(Error::Invalid)?)?;
            at += now;
        }
        Ok(())
    }

    fn end_line(&mut self) -> Result<()> {
        if self.used != 0 {
            self.pm.write(self.at, &self.line)?;
            self.crc = self.pm.crc32c(self.crc, &self.line);
            self.at += LINE_SIZE;
            self.line = [0; LINE_SIZE as usize];
            self.used = 0;
        }
        Ok(())
    }
}

/// Writes a record's lines, but with 0 in place of its first word; returns that
/// word, which commits it. Nothing is flushed. `first_list` is the offset of the
/// first list frame, if it has any.
pub(super) fn write<P: Pmem>(
    pm: &P,
    draft: &Draft<'_>,
    loc: Locator,
    nonce: u32,
    seq: u64,
    first_list: u64,
) -> Result<u64> {
    let meta = draft.meta;
    let mut raw = [0u8; LINE_SIZE as usize];
    put(&mut raw, 4, &[TYPE_PUT, draft.lines])?;
    put(&mut raw, 6, &draft.flags.to_le_bytes())?;
    put(&mut raw, 8, &seq.to_le_bytes())?;
    put(&mut raw, 16, &meta.time.to_le_bytes())?;
    put(&mut raw, 24, &draft.len.to_le_bytes())?;
    put(&mut raw, 28, &meta.csum.get().to_le_bytes())?;
    put(&mut raw, 30, &draft.key_len.to_le_bytes())?;
    let listed = draft.flags & F_EXT_LIST != 0;
    let first = match Packer::new(draft.extents).next() {
        _ if listed => first_list,
        Some(extent) => extent.pack()?,
        None => 0,
    };
    put(&mut raw, 32, &first.to_le_bytes())?;
    put(&mut raw, 40, &draft.nr_extents.to_le_bytes())?;
    put(&mut raw, 44, &meta.tcp_seq.to_le_bytes())?;
    put(&mut raw, 60, &meta.payload_crc.unwrap_or(0).to_le_bytes())?;
    if let Some(flow) = &meta.flow {
        put(&mut raw, 48, &flow.remote_port.to_le_bytes())?;
        put(&mut raw, 50, &flow.local_port.to_le_bytes())?;
        if let Addrs::V4 { remote, local } = &flow.addrs {
            put(&mut raw, 52, remote)?;
            put(&mut raw, 56, local)?;
        }
    }
    let mut out = LineWriter {
        pm,
        at: loc.0 + LINE_SIZE,
        line: [0; LINE_SIZE as usize],
        used: 0,
        crc: pm.crc32c(nonce, raw.get(4..).ok_or(Error::Invalid)?),
    };
    if let Some(Addrs::V6 { remote, local }) = meta.flow.as_ref().map(|flow| &flow.addrs) {
        out.bytes(remote)?;
        out.bytes(local)?;
    }
    match (draft.key_extent, &draft.key) {
        (Some(extent), _) => out.bytes(&extent.pack()?.to_le_bytes())?,
        (None, Some(key)) => out.key(key)?,
        (None, None) => (),
    }
    if !listed {
        for extent in Packer::new(draft.extents).skip(1) {
            out.bytes(&extent.pack()?.to_le_bytes())?;
        }
    }
    out.end_line()?;
    let mut crc = out.crc;
    if let (Some(_), Some(key)) = (draft.key_extent, &draft.key) {
        crc = crc_of(pm, crc, key)?;
    }
    put(&mut raw, 0, &crc.to_le_bytes())?;
    let word = get_u64(&raw, 0)?;
    put(&mut raw, 0, &[0; 8])?;
    pm.write(loc.0, &raw)?;
    Ok(word)
}

/// Writes the extent lists into the chain of frames that starts at `first`, each
/// of which already has the offset of the next at byte 24, and starts their
/// write-back.
pub(super) fn write_lists<P: Pmem>(
    pm: &P,
    draft: &Draft<'_>,
    nonce: u32,
    seq: u64,
    first: u64,
    mut flushed: impl FnMut(u64, u64),
) -> Result<()> {
    let mut rest = Packer::new(draft.extents);
    let mut at = first;
    for index in 0..draft.list_frames() {
        let next = pm.load(at + 24)?;
        let count = (draft.nr_extents - index * PER_LIST).min(PER_LIST);
        let mut raw = [0u8; LINE_SIZE as usize];
        put(&mut raw, 4, &LIST_MAGIC.to_le_bytes())?;
        put(&mut raw, 8, &at.to_le_bytes())?;
        put(&mut raw, 16, &seq.to_le_bytes())?;
        put(&mut raw, 24, &next.to_le_bytes())?;
        put(&mut raw, 32, &count.to_le_bytes())?;
        put(&mut raw, 36, &index.to_le_bytes())?;
        let mut out = LineWriter {
            pm,
            at: at + LINE_SIZE,
            line: [0; LINE_SIZE as usize],
            used: 0,
            crc: pm.crc32c(nonce, raw.get(4..).ok_or(Error::Invalid)?),
        };
        for extent in rest.by_ref().take(count as usize) {
            out.bytes(&extent.pack()?.to_le_bytes())?;
        }
        out.end_line()?;
        put(&mut raw, 0, &out.crc.to_le_bytes())?;
        let end = out.at;
        pm.write(at, &raw)?;
        if !broken!("list_flush") {
            pm.flush(at, end - at)?;
        }
        flushed(at, end - at);
        at = next;
    }
    Ok(())
}

/// What [`Record::verify`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// All checksums that the record has are right.
    Intact,
    /// It has no checksum.
    Unchecked,
    /// The Internet checksum is wrong.
    BadCsum,
    /// The CRC32C is wrong.
    BadCrc,
}

impl Record {
    /// Whether its extents are in list frames.
    pub(super) fn listed(&self) -> bool {
        self.flags & F_EXT_LIST != 0
    }

    /// Whether it has a key.
    pub fn keyed(&self) -> bool {
        self.key_len.is_some()
    }

    /// Copies key bytes from `at` on; how many there were.
    pub fn read_key<P: Pmem>(&self, pm: &P, at: usize, to: &mut [u8]) -> Result<usize> {
        key_of(pm, self.loc.0)?.read(pm, at, to)
    }

    /// Where the key lies in the payload, if it does.
    pub fn key_extent<P: Pmem>(&self, pm: &P) -> Result<Option<Extent>> {
        if self.flags & F_KEY_EXTENT == 0 {
            return Ok(None);
        }
        let at = self.loc.0.saturating_add(key_at(self.flags));
        Ok(Some(Extent::unpack(pm.load(at)?)))
    }

    /// The object's extents, in its order. Each list frame is checked as it is
    /// reached, and each extent against the geometry.
    pub fn extents<'a, P: Pmem>(&self, pm: &'a P, geo: &'a Geometry) -> Extents<'a, P> {
        let listed = self.listed();
        Extents {
            pm,
            geo,
            left: self.nr_extents,
            in_list: 0,
            at: self.loc.0.saturating_add(lines_before_extents(self)),
            list: if listed { self.first } else { 0 },
            first: if listed { None } else { Some(self.first) },
            index: 0,
            seq: self.seq,
            nonce: self.nonce,
        }
    }

    /// Offsets of its list frames, in order.
    pub(super) fn lists<'a, P: Pmem>(&self, pm: &'a P, geo: &'a Geometry) -> Lists<'a, P> {
        let listed = self.listed();
        Lists {
            pm,
            geo,
            next: self.first,
            left: if listed {
                self.nr_extents.div_ceil(PER_LIST)
            } else {
                0
            },
        }
    }

    /// Reads object bytes from `at` on; how many there were.
    pub fn read<P: Pmem>(&self, pm: &P, geo: &Geometry, at: u32, to: &mut [u8]) -> Result<usize> {
        let (mut start, mut done) = (0u64, 0usize);
        let mut from = u64::from(at);
        for extent in self.extents(pm, geo) {
            let extent = extent?;
            let end = start + u64::from(extent.len);
            if from < end && done < to.len() {
                let rest = to.get_mut(done..).ok_or(Error::Invalid)?;
                let now = (end - from).min(rest.len() as u64);
                let part = rest.get_mut(..now as usize).ok_or(Error::Invalid)?;
                pm.read(extent.off.saturating_add(from - start), part)?;
                done += now as usize;
                from += now;
            }
            if done == to.len() {
                break;
            }
            start = end;
        }
        Ok(done)
    }

    /// Reads the whole object and checks it against its checksums. `part` is
    /// memory to read into, of any even size above 0.
    pub fn verify<P: Pmem>(&self, pm: &P, geo: &Geometry, part: &mut [u8]) -> Result<Verdict> {
        if part.is_empty() {
            return Err(Error::Invalid);
        }
        let (mut sum, mut crc, mut len) = (Sum::ZERO, 0u32, 0u64);
        for extent in self.extents(pm, geo) {
            let extent = extent?;
            let mut at = 0u64;
            while at < u64::from(extent.len) {
                let now = (u64::from(extent.len) - at).min(part.len() as u64);
                let part = part.get_mut(..now as usize).ok_or(Error::Invalid)?;
                pm.read(extent.off.saturating_add(at), part)?;
                sum = sum.then(len, Sum::of(part));
                if self.meta.payload_crc.is_some() {
                    crc = pm.crc32c(crc, part);
                }
                at += now;
                len += now;
            }
        }
        if len != u64::from(self.len) {
            return Err(Error::Damaged);
        }
        let has_sum = self.meta.csum_kind != CsumKind::None;
        Ok(match self.meta.payload_crc {
            Some(right) if right != crc => Verdict::BadCrc,
            _ if has_sum && self.meta.csum != sum => Verdict::BadCsum,
            None if !has_sum => Verdict::Unchecked,
            _ => Verdict::Intact,
        })
    }
}

/// Where in a record extent 1 would be.
fn lines_before_extents(record: &Record) -> u64 {
    let key = if record.flags & F_KEY_EXTENT != 0 {
        8
    } else {
        u64::from(record.key_len.unwrap_or(0)).next_multiple_of(8)
    };
    key_at(record.flags) + key
}

/// Iterator over a record's extents; see [`Record::extents`]. Ends after an error.
pub struct Extents<'a, P> {
    pm: &'a P,
    geo: &'a Geometry,
    /// Extents not yet returned.
    left: u32,
    /// Of them, in the list at hand.
    in_list: u32,
    /// Where the next one is.
    at: u64,
    /// The next list, or 0.
    list: u64,
    /// Extent 0, if it is in the record itself.
    first: Option<u64>,
    /// Number of the next list.
    index: u32,
    seq: u64,
    nonce: u32,
}

impl<P: Pmem> Extents<'_, P> {
    fn step(&mut self) -> Result<Extent> {
        let word = if let Some(first) = self.first.take() {
            first
        } else {
            if self.list != 0 && self.in_list == 0 {
                self.open_list()?;
            }
            let word = self.pm.load(self.at)?;
            self.at = self.at.saturating_add(8);
            self.in_list = self.in_list.saturating_sub(1);
            word
        };
        let extent = Extent::unpack(word);
        self.geo.check_extent(extent).map_err(|_| Error::Damaged)?;
        Ok(extent)
    }

    /// Checks the next list and goes to its first extent.
    fn open_list(&mut self) -> Result<()> {
        let at = self.list;
        self.geo.check_frame(at)?;
        let mut raw = [0u8; LINE_SIZE as usize];
        self.pm.read(at, &mut raw)?;
        let count = get_u32(&raw, 32)?;
        let right = get_u32(&raw, 4)? == LIST_MAGIC
            && get_u64(&raw, 8)? == at
            && get_u64(&raw, 16)? == self.seq
            && count == self.left.min(PER_LIST)
            && get_u32(&raw, 36)? == self.index;
        if !right {
            return Err(Error::Damaged);
        }
        let crc_is = get_u32(&raw, 0)?;
        let next = get_u64(&raw, 24)?;
        let mut crc = self
            .pm
            .crc32c(self.nonce, raw.get(4..).ok_or(Error::Invalid)?);
        for line in 1..=u64::from(count).div_ceil(8) {
            self.pm.read(at + line * LINE_SIZE, &mut raw)?;
            crc = self.pm.crc32c(crc, &raw);
        }
        if crc != crc_is {
            return Err(Error::Damaged);
        }
        self.at = at + LINE_SIZE;
        self.in_list = count;
        self.list = next;
        self.index += 1;
        // A chain that ends too early must not turn into reading on.
        if self.left > count {
            self.geo.check_frame(next)?;
        }
        Ok(())
    }
}

impl<P: Pmem> Iterator for Extents<'_, P> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Result<Extent>> {
        if self.left == 0 {
            return None;
        }
        let extent = self.step();
        self.left = if extent.is_ok() { self.left - 1 } else { 0 };
        Some(extent)
    }
}

/// Iterator over a record's list frames, unchecked but for their place.
pub(super) struct Lists<'a, P> {
    pm: &'a P,
    geo: &'a Geometry,
    next: u64,
    left: u32,
}

impl<P: Pmem> Iterator for Lists<'_, P> {
    type Item = Result<Frame>;

    fn next(&mut self) -> Option<Result<Frame>> {
        self.left = self.left.checked_sub(1)?;
        let frame = self.geo.check_frame(self.next);
        let next = frame.and_then(|frame| {
            self.next = self.pm.load(frame.off() + 24)?;
            Ok(frame)
        });
        if next.is_err() {
            self.left = 0;
        }
        Some(next)
    }
}
