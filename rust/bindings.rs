// SPDX-License-Identifier: GPL-2.0

//! C items that `kernel::bindings` lacks, made by the kernel's own bindgen rule
//! from `bindings_extra.h`. Types that both have are the same type.

#![allow(
    clippy::all,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    improper_ctypes,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    unused_imports
)]

use kernel::bindings::*;
use kernel::ffi;
use pin_init::MaybeZeroable;

include!(env!("PMSKB_BINDINGS"));
