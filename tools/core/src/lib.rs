// SPDX-License-Identifier: GPL-2.0

//! pmskb's storage core on a host.
//!
//! `rust/core` is compiled here as it is compiled into the kernel module; the
//! modules below add what only a host has.

#![cfg_attr(not(feature = "std"), no_std)]

#[path = "../../../rust/core/mod.rs"]
mod imp;
pub use imp::*;

#[cfg(feature = "std")]
pub mod host;
#[cfg(feature = "std")]
pub mod sim;
