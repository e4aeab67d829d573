// SPDX-License-Identifier: GPL-2.0-only
//! Every store, write-back and fence of a guest to its NVDIMM; and, of the crashes that could have
//! come between any two of them, many.
//!
//! | file | noun |
//! | --- | --- |
//! | `mark.rs` | what the guest says of itself: what it tries, and what it was told is durable |
//! | `format.rs` | the trace: events, in a file |
//! | `args.rs`, `plugin.rs` | the plugin that QEMU loads, which writes a trace |
//! | `recorder.rs` | a trace of the core on this host, without a guest |
//! | `synth.rs` | a run of the core on this host, with marks |
//! | `replay.rs` | memory and caches as they were at each event |
//! | `media.rs` | a crash's image, for recovery to read and change |
//! | `kind.rs` | what a line of a store is for |
//! | `ledger.rs` | what a store must hold after a crash, and may |
//! | `check.rs` | recovers an image, and compares |
//! | `crash.rs` | the images: points of the trace, and what was lost at each |
//! | `table.rs` | what operations did to persistent memory |
//! | `work.rs` | names and contents of what the guest's programs store |

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
#![warn(missing_docs)]

pub mod args;
pub mod check;
pub mod crash;
pub mod format;
pub mod kind;
pub mod ledger;
pub mod mark;
pub mod media;
pub mod plugin;
pub mod recorder;
pub mod replay;
pub mod synth;
pub mod table;
pub mod work;
