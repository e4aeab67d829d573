// SPDX-License-Identifier: GPL-2.0

//! The storage core: on-media format, frames, records, index, commit, recovery.
//!
//! The same files are compiled into the kernel module and, by cargo, into the
//! tools and tests. They know persistent memory only through [`Pmem`], and the
//! frame allocator only through [`Frames`]. `Documentation/format.rst` describes
//! what these files put on the media.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `pmem.rs` | the `Pmem` trait, CRC32C |
//! | `extent.rs` | frames and extents: names of places in a region |
//! | `csum.rs` | Internet checksum arithmetic |
//! | `compose.rs` | the checksums of an object, from those of its packets |
//! | `crc.rs` | the CRC32C of a whole, from those of its parts |
//! | `frame.rs` | the allocator's bookkeeping of data frames |
//! | `superblock.rs` | superblocks, geometry, format, probe |
//! | `live.rs` | the live page: roots and counts for readers |
//! | `record.rs` | records, record frames, extent lists |
//! | `node.rs` | index nodes: layout, search, the pool they come from |
//! | `tree.rs` | the two B+trees made of them |
//! | `batch.rs` | words that are stored all or none |
//! | `store.rs` | put, delete, commit |
//! | `space.rs` | giving space back; truncation |
//! | `compact.rs` | moving what is alive out of frames with little in them |
//! | `recover.rs` | from the records on the media to a store |
//! | `reader.rs` | lock-free readers of a mapping |
//! | `check.rs` | the media piece by piece, for a checker |
//!
//! Locking: none in here. A [`Store`] has one writer at a time (the host holds a
//! mutex); [`Reader`]s need no lock. [`FrameTable`] is wrapped in the host's lock.

/// Whether the build has a check, flush or fence taken out, to see whether tests notice:
/// `cfg(pmskb_break = "NAME")`; or, on a host, any of them by name when it runs.
#[cfg(not(pmskb_break = "by_name"))]
macro_rules! broken {
    ($name:literal) => {
        cfg!(pmskb_break = $name)
    };
}
#[cfg(pmskb_break = "by_name")]
macro_rules! broken {
    ($name:literal) => {
        crate::host::broken($name)
    };
}

mod batch;
mod check;
mod compact;
mod compose;
pub mod crc;
pub mod csum;
mod extent;
mod frame;
mod live;
mod node;
mod pmem;
mod reader;
mod record;
mod recover;
mod space;
mod store;
mod superblock;
mod tree;

pub use self::{
    check::{AreaState, FrameFound, Inspector, LineFound, ListFrames, RecordFrame},
    compact::Compacted,
    compose::{compose, Composed, Packet, Piece},
    extent::{Extent, Frame, Packer, MAX_EXTENT},
    frame::{Counts, FrameState, FrameTable, Frames, Need},
    live::{Live, LIVE_OFF},
    pmem::{crc32c_software, Buf, Pmem},
    reader::{Direction, Reader},
    record::{
        Addrs, CsumKind, Extents, Flow, Key, Locator, Meta, PutMode, Record, TimeSource, Verdict,
    },
    recover::{IndexEntry, RecoverOptions, Report},
    store::{Passed, PutArgs, PutOutcome, Stats, Store},
    superblock::{
        format, looks_blank, probe, FormatParams, Geometry, HeadArea, Probe, Superblock,
        FORMAT_VERSION, MAX_REGION, MIN_REGION,
    },
};

/// Bytes of a frame.
pub const FRAME_SIZE: u64 = 4096;
/// Bytes of a cache line: the unit of write-back.
pub const LINE_SIZE: u64 = 64;
/// Longest key, bytes.
pub const MAX_KEY: usize = 1024;
/// Largest object, bytes.
pub const MAX_OBJECT: u64 = 1 << 30;
/// Most extents of one object, after adjacent ones are merged.
pub const MAX_EXTENTS: u32 = 1 << 18;
/// Most operations staged at once; one more commits those before it, unless they
/// are to be atomic.
pub const MAX_STAGED: usize = 1024;

/// Why an operation failed. The kernel maps each to one errno.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// No free frame (ENOSPC). Nothing was changed.
    NoSpace,
    /// The key has a record already (EEXIST).
    Exists,
    /// There is no such record (ENOENT).
    NotFound,
    /// The key's record is another one (ESTALE).
    Stale,
    /// The key or label is too long (ENAMETOOLONG).
    TooLong,
    /// The object or region is too large, or has too many extents (EFBIG).
    TooBig,
    /// The region is too small to hold a store (EINVAL).
    TooSmall,
    /// A checksum or a structure on the media is wrong (EUCLEAN).
    Damaged,
    /// Written by a newer version, or with features unknown here (EOPNOTSUPP).
    Version,
    /// The region holds no store (EMEDIUMTYPE).
    NotFormatted,
    /// Too much changed under a reader; try again (EBUSY).
    Busy,
    /// The media failed (EIO).
    Io,
    /// An argument is out of range (EINVAL).
    Invalid,
    /// The store may only be read (EROFS).
    ReadOnly,
    /// The host has no memory for this (ENOMEM).
    NoMemory,
    /// Somebody does not want to wait (EINTR).
    Interrupted,
}

/// What operations of the core return.
pub type Result<T, E = Error> = core::result::Result<T, E>;
