// SPDX-License-Identifier: GPL-2.0-only

//! `include/uapi/linux/pmskb.h` as bindgen sees it; `IOC_*` are the ioctl
//! request numbers.

#![allow(
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]

include!(concat!(env!("OUT_DIR"), "/sys.rs"));
