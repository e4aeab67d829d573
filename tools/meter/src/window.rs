// SPDX-License-Identifier: GPL-2.0-only
//! What was counted between two marks.

use serde::{Deserialize, Serialize};

/// A window.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// The form of this; 1.
    pub format: u32,
    /// Its number.
    pub number: u64,
    /// What was done to persistent memory, and to payload.
    pub memory: Memory,
    /// Blocks of instructions that ran.
    pub blocks: Vec<Block>,
}

/// Sums of what one vCPU did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Stores to persistent memory.
    pub pm_stores: u64,
    /// Their bytes.
    pub pm_bytes: u64,
    /// Of these, bytes of lines that were written back in the window.
    pub pm_bytes_durable: u64,
    /// Bytes of lines that were not.
    pub pm_bytes_volatile: u64,
    /// Of the bytes, those stored past the cache.
    pub pm_bytes_nt: u64,
    /// Flush instructions that hit persistent memory.
    pub flushes: u64,
    /// Lines of it that were flushed or stored past the cache, each counted once.
    pub lines: u64,
    /// Fences that had something to wait for.
    pub fences: u64,
    /// Fences that had not: of device drivers, mostly.
    pub fences_empty: u64,
    /// Payload bytes that were stored, anywhere.
    pub payload_stored: u64,
    /// Of these, to persistent memory.
    pub payload_stored_pm: u64,
    /// Payload bytes that were loaded, from anywhere.
    pub payload_loaded: u64,
    /// Flushes whose address could not be found out.
    pub unresolved: u64,
    /// Lines that the modelled cache had to fetch from DRAM.
    #[serde(default)]
    pub misses_dram: u64,
    /// Those from persistent memory.
    #[serde(default)]
    pub misses_pm: u64,
}

/// Instructions that run one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// The linear address of the first.
    pub at: u64,
    /// How many they are.
    pub insns: u64,
    /// How often they ran.
    pub runs: u64,
    /// Bytes that they stored to persistent memory.
    pub pm: u64,
    /// Payload bytes that they stored.
    pub stored: u64,
    /// Payload bytes that they loaded.
    pub loaded: u64,
    /// Lines that the modelled cache fetched for them from DRAM.
    #[serde(default)]
    pub misses_dram: u64,
    /// Those from persistent memory.
    #[serde(default)]
    pub misses_pm: u64,
}
