// SPDX-License-Identifier: GPL-2.0-only

//! pmskb from user space: the interface of `include/uapi/linux/pmskb.h`, safe.
//!
//! | module | noun |
//! | --- | --- |
//! | [`control`] | `/dev/pmskb`: format, attach, detach |
//! | [`store`] | `/dev/pmskbN`: counters, mapping, submit |
//! | [`buffer`] | frames for data that is made here |
//! | [`object`] | a record, open as a file |
//! | [`socket`] | an attached socket: mode, packet descriptors, counters |
//! | [`batch`] | an array of operations and their results |
//! | [`ring`] | an io_uring for servers on a store |
//! | [`map`] | the read-only mapping of a store |
//! | [`media`] | a region's bytes, live or from an image, for the core to read |
//! | [`direct`] | the same by read and write calls, to be checked and mended |
//! | [`catalog`] | the records of a store or an image |
//! | [`error`] | what went wrong, and what to do next |
//! | [`sys`] | the header itself, by bindgen |
//!
//! The format on the media is read by `pmskb-core`, the code that the module
//! itself uses, and by nothing else.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
#![warn(missing_docs)]

pub mod batch;
pub mod buffer;
pub mod catalog;
pub mod control;
pub mod direct;
pub mod error;
pub mod map;
pub mod media;
pub mod object;
pub mod ring;
pub mod socket;
pub mod store;
pub mod sys;

pub use batch::{Batch, Ext, Key, Mode, OpView, Outcome};
pub use buffer::Buffer;
pub use catalog::Catalog;
pub use control::{Control, FormatOptions};
pub use direct::Direct;
pub use error::{Error, Result};
pub use map::{explain_bus_errors, Mapping};
pub use media::Media;
pub use object::Object;
pub use pmskb_core as core;
pub use ring::{Done, Ring};
pub use socket::{Desc, RecvBuffer, RxMode};
pub use store::{Compacted, Counters, Scrubbed, Store, StoreInfo};

/// Size of a frame, bytes.
pub const FRAME_SIZE: u64 = sys::PMSKB_FRAME_SIZE as u64;
/// Longest key, bytes.
pub const MAX_KEY: usize = sys::PMSKB_MAX_KEY as usize;
/// Most operations in one submission.
pub const MAX_OPS: usize = sys::PMSKB_MAX_OPS as usize;
