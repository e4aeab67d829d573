// SPDX-License-Identifier: GPL-2.0

//! Superblocks and geometry; format and probe.

use super::pmem::{get, get_u32, get_u64, put};
use super::{batch, live, Error, Extent, Frame, Pmem, Result, FRAME_SIZE, LINE_SIZE};

/// Version of the format that this code writes and reads. 1 had no batch areas,
/// and was never released.
pub const FORMAT_VERSION: u32 = 2;
/// Smallest region, bytes.
pub const MIN_REGION: u64 = 8 << 20;
/// Largest region, bytes.
pub const MAX_REGION: u64 = 1 << 44;
/// First offset of the data area is a multiple of this, for huge pages.
const DATA_ALIGN: u64 = 2 << 20;
/// Offset of the frame map.
const MAP_OFF: u64 = batch::END;
/// Bytes of a superblock that are written and covered by its checksum.
const SB_BYTES: usize = 512;
const MAGIC: u64 = u64::from_le_bytes(*b"pmskb\0SB");

/// Features that this code knows. None exist yet.
const KNOWN_RO_COMPAT: u64 = 0;
const KNOWN_INCOMPAT: u64 = 0;

/// Where the areas of a region are. All in bytes, all multiples of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Length of the region.
    pub region_len: u64,
    /// Start of the frame map: one bit for each frame of the region.
    pub map_off: u64,
    /// Length of the frame map.
    pub map_len: u64,
    /// Start of the head area.
    pub head_off: u64,
    /// Length of the head area; 0 if heads are in DRAM.
    pub head_len: u64,
    /// Start of the data area, a multiple of 2 MiB.
    pub data_off: u64,
    /// Length of the data area. The last superblock follows.
    pub data_len: u64,
}

impl Geometry {
    /// Lays out a region of `len` bytes.
    pub fn new(len: u64, heads: HeadArea) -> Result<Geometry> {
        let region_len = len / FRAME_SIZE * FRAME_SIZE;
        if region_len < MIN_REGION {
            return Err(Error::TooSmall);
        }
        if region_len > MAX_REGION {
            return Err(Error::TooBig);
        }
        let map_len = (region_len / FRAME_SIZE)
            .div_ceil(8)
            .next_multiple_of(FRAME_SIZE);
        let head_off = MAP_OFF + map_len;
        let wanted = match heads {
            HeadArea::Default => (region_len / 16).clamp(1 << 20, 256 << 20),
            HeadArea::Bytes(bytes) => bytes,
            HeadArea::Dram => 0,
        };
        if wanted > region_len {
            return Err(Error::TooSmall);
        }
        let data_off = (head_off + wanted).next_multiple_of(DATA_ALIGN);
        let last = region_len - FRAME_SIZE;
        if data_off.saturating_add(DATA_ALIGN) > last {
            return Err(Error::TooSmall);
        }
        Ok(Geometry {
            region_len,
            map_off: MAP_OFF,
            map_len,
            head_off,
            // What alignment leaves over belongs to the heads, if there are any.
            head_len: if wanted == 0 { 0 } else { data_off - head_off },
            data_off,
            data_len: last - data_off,
        })
    }

    /// Whether a geometry read from the media can be that of a region of `len`
    /// bytes. The layout rules are the format, so each field has one right value
    /// but for the head area's size.
    fn check(&self, len: u64) -> Result<()> {
        if self.region_len > len || self.region_len % FRAME_SIZE != 0 {
            return Err(Error::Damaged);
        }
        let heads = match self.head_len {
            0 => HeadArea::Dram,
            bytes => HeadArea::Bytes(bytes),
        };
        match Geometry::new(self.region_len, heads) {
            Ok(right) if right == *self => Ok(()),
            _ => Err(Error::Damaged),
        }
    }

    /// Offset of the byte after the data area: the last superblock.
    pub fn data_end(&self) -> u64 {
        self.data_off + self.data_len
    }

    /// First frame of the data area.
    pub fn first_frame(&self) -> Frame {
        Frame((self.data_off / FRAME_SIZE) as u32)
    }

    /// Frames of the data area: what a [`FrameTable`](super::FrameTable) covers.
    pub fn data_frames(&self) -> u32 {
        (self.data_len / FRAME_SIZE) as u32
    }

    /// Whether all bytes of an extent are in the data area, and there are any.
    pub fn check_extent(&self, extent: Extent) -> Result<()> {
        let end = extent
            .off
            .checked_add(u64::from(extent.len))
            .ok_or(Error::Invalid)?;
        if extent.len == 0 || extent.off < self.data_off || end > self.data_end() {
            return Err(Error::Invalid);
        }
        Ok(())
    }

    /// Whether a whole frame of the data area starts at `off`.
    pub(super) fn check_frame(&self, off: u64) -> Result<Frame> {
        if off % FRAME_SIZE != 0 || off < self.data_off || off >= self.data_end() {
            return Err(Error::Damaged);
        }
        Frame::of(off).ok_or(Error::Damaged)
    }

    /// Offset of the map's word that has a frame's bit, and the bit.
    pub(super) fn map_bit(&self, frame: Frame) -> (u64, u64) {
        let word = self.map_off + u64::from(frame.0) / 64 * 8;
        (word, 1 << (frame.0 % 64))
    }
}

/// Where packet heads go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadArea {
    /// In the region; 1/16 of it, at least 1 MiB, at most 256 MiB.
    Default,
    /// In the region; at least this many bytes.
    Bytes(u64),
    /// Not in the region.
    Dram,
}

/// What [`format`] needs to be told.
pub struct FormatParams<'a> {
    /// Name of the store for machines; random.
    pub uuid: [u8; 16],
    /// Name for people; at most 32 bytes.
    pub label: &'a [u8],
    /// Where packet heads go.
    pub heads: HeadArea,
    /// Random and secret from the network: payload bytes that look like a record
    /// cannot be right without it.
    pub salt: u64,
    /// Now, nanoseconds since the epoch.
    pub time: u64,
}

/// A store's superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Version of the format: [`FORMAT_VERSION`].
    pub version: u32,
    /// Features that older code may ignore.
    pub compat: u64,
    /// Features that older code may ignore if it only reads.
    pub ro_compat: u64,
    /// Features that must be known.
    pub incompat: u64,
    /// Name of the store for machines.
    pub uuid: [u8; 16],
    /// Name for people, NUL padded.
    pub label: [u8; 32],
    /// Where the areas are.
    pub geometry: Geometry,
    /// Counts writes of superblocks; of two valid ones the higher wins.
    pub update: u64,
    /// When the store was formatted, nanoseconds since the epoch.
    pub created: u64,
    /// See [`FormatParams::salt`].
    pub salt: u64,
    /// Records without a key that have this sequence number or a lower one are gone.
    pub trunc_seq: u64,
    /// How many times the store was attached for writing.
    pub attaches: u64,
    /// No record will get this sequence number or a lower one.
    pub seq_floor: u64,
}

impl Superblock {
    fn encode<P: Pmem>(&self, pm: &P, off: u64) -> Result<[u8; SB_BYTES]> {
        let mut out = [0u8; SB_BYTES];
        let geo = &self.geometry;
        put(&mut out, 0, &MAGIC.to_le_bytes())?;
        put(&mut out, 12, &self.version.to_le_bytes())?;
        put(&mut out, 40, &self.uuid)?;
        put(&mut out, 56, &self.label)?;
        put(&mut out, 96, &(FRAME_SIZE as u32).to_le_bytes())?;
        put(&mut out, 100, &(LINE_SIZE as u32).to_le_bytes())?;
        let words = [
            (16, self.compat),
            (24, self.ro_compat),
            (32, self.incompat),
            (88, geo.region_len),
            (104, geo.map_off),
            (112, geo.map_len),
            (120, geo.head_off),
            (128, geo.head_len),
            (136, geo.data_off),
            (144, geo.data_len),
            (152, self.update),
            (160, self.created),
            (168, self.salt),
            (176, self.trunc_seq),
            (184, self.attaches),
            (192, self.seq_floor),
            (200, off),
        ];
        for (at, value) in words {
            put(&mut out, at, &value.to_le_bytes())?;
        }
        let crc = pm.crc32c(0, out.get(12..).ok_or(Error::Invalid)?);
        put(&mut out, 8, &crc.to_le_bytes())?;
        Ok(out)
    }

    /// Reads and checks the superblock at `off`.
    fn decode<P: Pmem>(pm: &P, off: u64) -> Result<Superblock> {
        let mut raw = [0u8; SB_BYTES];
        pm.read(off, &mut raw)?;
        if get_u64(&raw, 0)? != MAGIC {
            return Err(Error::NotFormatted);
        }
        let crc = pm.crc32c(0, raw.get(12..).ok_or(Error::Invalid)?);
        if get_u32(&raw, 8)? != crc || get_u64(&raw, 200)? != off {
            return Err(Error::Damaged);
        }
        let sb = Superblock {
            version: get_u32(&raw, 12)?,
            compat: get_u64(&raw, 16)?,
            ro_compat: get_u64(&raw, 24)?,
            incompat: get_u64(&raw, 32)?,
            uuid: get(&raw, 40)?,
            label: get(&raw, 56)?,
            geometry: Geometry {
                region_len: get_u64(&raw, 88)?,
                map_off: get_u64(&raw, 104)?,
                map_len: get_u64(&raw, 112)?,
                head_off: get_u64(&raw, 120)?,
                head_len: get_u64(&raw, 128)?,
                data_off: get_u64(&raw, 136)?,
                data_len: get_u64(&raw, 144)?,
            },
            update: get_u64(&raw, 152)?,
            created: get_u64(&raw, 160)?,
            salt: get_u64(&raw, 168)?,
            trunc_seq: get_u64(&raw, 176)?,
            attaches: get_u64(&raw, 184)?,
            seq_floor: get_u64(&raw, 192)?,
        };
        // Another version may have other rules for what follows.
        if sb.version == FORMAT_VERSION && sb.incompat & !KNOWN_INCOMPAT == 0 {
            let sizes = (get_u32(&raw, 96)?, get_u32(&raw, 100)?);
            if sizes != (FRAME_SIZE as u32, LINE_SIZE as u32) {
                return Err(Error::Damaged);
            }
            sb.geometry.check(pm.len())?;
            if off != 0 && off != sb.geometry.data_end() {
                return Err(Error::Damaged);
            }
        }
        Ok(sb)
    }

    fn write_at<P: Pmem>(&self, pm: &P, off: u64) -> Result<()> {
        let bytes = self.encode(pm, off)?;
        pm.write(off, &bytes)?;
        pm.flush(off, SB_BYTES as u64)?;
        pm.fence();
        Ok(())
    }

    /// Makes this the store's superblock: durable on return. The copies are
    /// written one after the other, the one that is to go by now last, so that one
    /// is whole at every instant.
    pub(super) fn write<P: Pmem>(&mut self, pm: &P) -> Result<()> {
        let first = matches!(Superblock::decode(pm, 0), Ok(sb) if sb.update == self.update);
        self.update = self.update.checked_add(1).ok_or(Error::Damaged)?;
        let (mut one, mut other) = (0, self.geometry.data_end());
        if first && !broken!("superblock_order") {
            core::mem::swap(&mut one, &mut other);
        }
        self.write_at(pm, one)?;
        self.write_at(pm, other)
    }
}

/// What [`probe`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The superblock to go by: the newer valid one.
    pub superblock: Superblock,
    /// Why the first superblock cannot be used, if so.
    pub first: Option<Error>,
    /// Why the last superblock cannot be used, if so.
    pub last: Option<Error>,
    /// Both are valid but not the same: an update was cut short.
    pub stale: bool,
    /// It has features that this code does not know: it may only be read.
    pub read_only: bool,
}

/// Reads and checks the superblocks. Writes nothing.
///
/// [`Error::NotFormatted`] if there is none, [`Error::Damaged`] if both are
/// damaged (or one is and the other is missing), [`Error::Version`] if the store
/// needs newer code.
pub fn probe<P: Pmem>(pm: &P) -> Result<Probe> {
    let first = Superblock::decode(pm, 0);
    let last_off = match &first {
        Ok(sb) => sb.geometry.region_len,
        Err(_) => pm.len() / FRAME_SIZE * FRAME_SIZE,
    };
    let last = match last_off.checked_sub(FRAME_SIZE) {
        Some(off) if off > 0 => Superblock::decode(pm, off),
        _ => Err(Error::NotFormatted),
    };
    let (errors, stale) = (
        (first.as_ref().err().copied(), last.as_ref().err().copied()),
        matches!((&first, &last), (Ok(first), Ok(last)) if first != last),
    );
    let superblock = match (first, last) {
        (Ok(first), Ok(last)) if last.update > first.update => last,
        (Ok(first), _) => first,
        (_, Ok(last)) => last,
        (Err(Error::NotFormatted), Err(Error::NotFormatted)) => return Err(Error::NotFormatted),
        (Err(Error::Io), _) | (_, Err(Error::Io)) => return Err(Error::Io),
        _ => return Err(Error::Damaged),
    };
    if superblock.version != FORMAT_VERSION || superblock.incompat & !KNOWN_INCOMPAT != 0 {
        return Err(Error::Version);
    }
    Ok(Probe {
        read_only: superblock.ro_compat & !KNOWN_RO_COMPAT != 0,
        superblock,
        first: errors.0,
        last: errors.1,
        stale,
    })
}

/// Whether a region is blank: no file system, partition table or store.
/// Looks at the first 128 KiB and the last 64 KiB.
pub fn looks_blank<P: Pmem>(pm: &P) -> Result<bool> {
    let (head, tail) = ((128 << 10).min(pm.len()), (64 << 10).min(pm.len()));
    Ok(is_zero(pm, 0, head)? && is_zero(pm, pm.len() - tail, tail)?)
}

fn is_zero<P: Pmem>(pm: &P, off: u64, len: u64) -> Result<bool> {
    let mut at = 0;
    while at < len {
        let mut part = [0u8; 256];
        let now = (len - at).min(part.len() as u64);
        let part = part.get_mut(..now as usize).ok_or(Error::Invalid)?;
        pm.read(off.saturating_add(at), part)?;
        if part.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        at += now;
    }
    Ok(true)
}

/// Zeroes a range and starts its write-back; lines that are zero are left alone.
fn zero<P: Pmem>(pm: &P, off: u64, len: u64) -> Result<()> {
    let mut at = off;
    while at < off.saturating_add(len) {
        if !is_zero(pm, at, LINE_SIZE)? {
            pm.write(at, &[0; LINE_SIZE as usize])?;
            pm.flush(at, LINE_SIZE)?;
        }
        at += LINE_SIZE;
    }
    Ok(())
}

/// Makes an empty store of the region, whatever it held; durable on return.
///
/// A crash on the way leaves what was there before, or no store
/// ([`Error::NotFormatted`]), or the new one; never a mixture.
pub fn format<P: Pmem>(pm: &P, params: &FormatParams<'_>) -> Result<Superblock> {
    let geometry = Geometry::new(pm.len(), params.heads)?;
    let mut label = [0u8; 32];
    match label.get_mut(..params.label.len()) {
        Some(part) => part.copy_from_slice(params.label),
        None => return Err(Error::TooLong),
    }
    let mut sb = Superblock {
        version: FORMAT_VERSION,
        compat: 0,
        ro_compat: 0,
        incompat: 0,
        uuid: params.uuid,
        label,
        geometry,
        update: 0,
        created: params.time,
        salt: params.salt,
        trunc_seq: 0,
        attaches: 0,
        seq_floor: 0,
    };
    // The old store goes first: nothing of it is valid when its map is cleared.
    zero(pm, 0, FRAME_SIZE)?;
    zero(pm, geometry.data_end(), FRAME_SIZE)?;
    pm.fence();
    zero(pm, batch::OFF, geometry.map_off - batch::OFF)?;
    zero(pm, geometry.map_off, geometry.map_len)?;
    pm.fence();
    live::clear(pm)?;
    sb.write(pm)?;
    Ok(sb)
}
