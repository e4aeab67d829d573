// SPDX-License-Identifier: GPL-2.0-only
//! What a server does with a body: the contenders.
//!
//! | file | contender |
//! | --- | --- |
//! | `discard.rs` | nothing |
//! | `copy.rs` | copies it into a mapped file of persistent memory |
//! | `manage.rs` | that, with a checksum, a record and a skip list (`skiplist.rs`) |
//! | `append.rs` | appends it to a file |
//! | `tables.rs` | LevelDB and RocksDB |
//! | `lmdb.rs` | LMDB |
//!
//! `pm.rs` is a mapped file, `library.rs` a library that is there only when the program runs.

mod append;
mod copy;
mod discard;
mod library;
mod lmdb;
mod manage;
mod pm;
mod skiplist;
mod tables;

use anyhow::Result;
use std::path::Path;

/// Keeps bodies. All that is put in one turn of the server's loop becomes durable together, as
/// pmskb does it: whoever has a cheaper way for several has it here.
pub trait Store {
    /// Takes a body in. It need not be durable yet.
    fn put(&mut self, key: &[u8], body: &[u8]) -> Result<()>;
    /// Makes what was put durable.
    fn commit(&mut self) -> Result<()>;
    /// The body that was put last under a key; an error if this store has no keys.
    fn get(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>>;
}

/// Which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Receives, parses, replies
    Discard,
    /// Copies into persistent memory
    Copy,
    /// Copies, with a checksum, a record and a skip list
    CopyManage,
    /// Appends to a log, with fdatasync
    Append,
    /// LevelDB, synced writes
    Leveldb,
    /// RocksDB, synced writes
    Rocksdb,
    /// LMDB, a transaction each turn
    Lmdb,
}

/// Makes a store in a directory; of persistent memory it takes so many bytes.
pub fn open(kind: Kind, directory: &Path, size: u64) -> Result<Box<dyn Store>> {
    Ok(match kind {
        Kind::Discard => Box::new(discard::Discard),
        Kind::Copy => Box::new(copy::Copy::new(pm::File::create(directory, size)?)),
        Kind::CopyManage => Box::new(manage::Manage::new(pm::File::create(directory, size)?)?),
        Kind::Append => Box::new(append::Append::new(directory, size)?),
        Kind::Leveldb => Box::new(tables::Tables::leveldb(directory)?),
        Kind::Rocksdb => Box::new(tables::Tables::rocksdb(directory)?),
        Kind::Lmdb => Box::new(lmdb::Lmdb::new(directory, size)?),
    })
}
