// SPDX-License-Identifier: GPL-2.0-only
//! What a guest's CPU executes between two marks, by symbol, and what that does to persistent
//! memory.
//!
//! In QEMU, this is a plugin: [`plugin`] counts how often each translated block ran, and the
//! stores, write-backs and fences that reach the NVDIMM; [`args`] are its arguments; [`lines`]
//! are the NVDIMM's cache lines, [`cache`] a model of a cache; [`window`] is what it writes. Elsewhere, [`symbols`] tells what
//! code lies at an address, and [`tally`] adds a window up by symbol.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
#![warn(missing_docs)]

pub mod args;
pub mod cache;
pub mod lines;
pub mod mark;
pub mod plugin;
pub mod symbols;
pub mod tally;
pub mod window;
