// SPDX-License-Identifier: GPL-2.0

//! The live page: what readers of a mapping need to start from.
//!
//! It lies in frame 1, is never flushed and means nothing after a crash; attach
//! writes it anew.

use super::{Error, Pmem, Result, Superblock, FRAME_SIZE};

/// Offset of the live page.
pub const LIVE_OFF: u64 = FRAME_SIZE;
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"pmskb\0LV");

pub(super) const EPOCH: u64 = LIVE_OFF + 8;
pub(super) const DURABLE_SEQ: u64 = LIVE_OFF + 16;
pub(super) const KEY_ROOT: u64 = LIVE_OFF + 24;
pub(super) const LOG_ROOT: u64 = LIVE_OFF + 32;
pub(super) const RECORDS: u64 = LIVE_OFF + 40;
pub(super) const KEYS: u64 = LIVE_OFF + 48;
pub(super) const LIVE_BYTES: u64 = LIVE_OFF + 56;
pub(super) const UUID: u64 = LIVE_OFF + 64;
pub(super) const TRUNC_SEQ: u64 = LIVE_OFF + 80;
/// Odd while the records of an atomic batch come into view.
pub(super) const SNAPSHOT: u64 = LIVE_OFF + 88;

/// Records up to this number are in the index, if they are to be.
pub(super) const INDEXED_SEQ: u64 = LIVE_OFF + 96;

/// The counters of the live page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Live {
    /// Of the attach that wrote it: a store's attach count.
    pub epoch: u64,
    /// Highest sequence number known durable.
    pub durable_seq: u64,
    /// Live records.
    pub records: u64,
    /// Live records with a key.
    pub keys: u64,
    /// Payload bytes of live records.
    pub live_bytes: u64,
    /// Records without a key up to this one are gone.
    pub trunc_seq: u64,
    /// Of the store.
    pub uuid: [u8; 16],
}

impl Live {
    /// Reads the live page. [`Error::NotFormatted`] if the store is not attached.
    pub fn read<P: Pmem>(pm: &P) -> Result<Live> {
        if pm.load(LIVE_OFF)? != MAGIC {
            return Err(Error::NotFormatted);
        }
        let mut uuid = [0; 16];
        pm.read(UUID, &mut uuid)?;
        Ok(Live {
            epoch: pm.load(EPOCH)?,
            durable_seq: pm.load(DURABLE_SEQ)?,
            records: pm.load(RECORDS)?,
            keys: pm.load(KEYS)?,
            live_bytes: pm.load(LIVE_BYTES)?,
            trunc_seq: pm.load(TRUNC_SEQ)?,
            uuid,
        })
    }
}

/// Makes the page invalid, for as long as no store is attached.
pub(super) fn clear<P: Pmem>(pm: &P) -> Result<()> {
    pm.store(LIVE_OFF, 0)
}

/// Fills the page in, but for the magic and what the store publishes itself.
pub(super) fn begin<P: Pmem>(pm: &P, sb: &Superblock, durable_seq: u64) -> Result<()> {
    pm.write(UUID, &sb.uuid)?;
    pm.store(EPOCH, sb.attaches)?;
    pm.store(TRUNC_SEQ, sb.trunc_seq)?;
    pm.store(SNAPSHOT, 0)?;
    pm.store(INDEXED_SEQ, durable_seq)?;
    pm.store(DURABLE_SEQ, durable_seq)
}

/// Makes the page valid: the store is attached.
pub(super) fn announce<P: Pmem>(pm: &P) -> Result<()> {
    pm.store(LIVE_OFF, MAGIC)
}
