// SPDX-License-Identifier: GPL-2.0-only
//! A power cut for QEMU's NVDIMM.
//!
//! Killing a virtual machine loses no store that the guest executed, so it
//! proves little about persistence. This TCG plugin watches cache-line
//! write-backs, fences and non-temporal stores and, at the cut, writes the image
//! that the persistent memory would hold had it kept only what was made durable.
//!
//! [`args`] and [`stats`] are pure and are tested on the host; [`image`] writes the file that the
//! cut leaves; [`plugin`] is what QEMU calls. What is durable ([`model`]), and what decodes
//! instructions, walks page tables and talks to QEMU is in `pmskb-tcg`.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
#![warn(missing_docs)]

pub mod args;
pub mod image;
pub mod plugin;
pub mod stats;

pub use pmskb_tcg::{model, region};
