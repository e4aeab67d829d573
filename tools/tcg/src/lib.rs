// SPDX-License-Identifier: GPL-2.0-only
//! What this project's TCG plugins share.
//!
//! | file | noun |
//! | --- | --- |
//! | `args.rs` | what a plugin is told on QEMU's command line |
//! | `qemu.rs` | QEMU's plugin API; the only module that talks to it |
//! | `decode.rs` | the instructions that matter for persistence |
//! | `model.rs` | what is durable: caches, and what a power cut leaves of them |
//! | `region.rs` | the NVDIMM's backing file, as the guest's stores leave it |
//! | `paging.rs` | the guest's page tables |
//! | `vcpu.rs` | a virtual CPU's registers, and where its write-backs lead |

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
#![warn(missing_docs)]

pub mod args;
pub mod decode;
pub mod model;
pub mod paging;
pub mod qemu;
pub mod region;
pub mod vcpu;
