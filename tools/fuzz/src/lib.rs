// SPDX-License-Identifier: GPL-2.0

//! What `make fuzz` feeds with bytes.
//!
//! | target | the bytes are |
//! | --- | --- |
//! | `image` | damage to an image, which is then recovered, read, used, recovered again |
//! | `reader` | damage to the memory of an attached store, under a reader |
//! | `ops` | operations, clean restarts and power cuts, compared with a model |
//!
//! A target fails by a panic: of the core, of a check, or of [`scratch::Scratch`] when
//! the core goes round in circles.

pub mod damage;
pub mod image;
pub mod ops;
pub mod reader;
pub mod scratch;
pub mod seed;

#[path = "../../core/tests/common/mod.rs"]
mod common;
