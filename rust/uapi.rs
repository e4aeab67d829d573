// SPDX-License-Identifier: GPL-2.0

//! Structures of `include/uapi/linux/pmskb.h`, as they cross the border.

use crate::bindings as ext;
use kernel::transmute::{AsBytes, FromBytes};

/// A structure of the interface: integers, and no padding between them.
#[repr(transparent)]
#[derive(Default)]
pub(crate) struct Plain<T>(pub(crate) T);

/// Bytes of the numbers that a structure consists of must be all of its bytes.
macro_rules! plain {
    ($($name:ident: $bytes:expr,)*) => {
        $(
            const _: () = assert!(core::mem::size_of::<ext::$name>() == $bytes);
            // SAFETY: Integers; every bit pattern is a value.
            unsafe impl FromBytes for Plain<ext::$name> {}
            // SAFETY: Integers, and by the assertion no padding.
            unsafe impl AsBytes for Plain<ext::$name> {}
        )*
    };
}

plain! {
    pmskb_token_range: 2 * 4,
    pmskb_ext: 4 * 4,
    pmskb_send: 2 * 4 + 2 * 8,
    pmskb_op: 2 * 2 + 4 + 8 + 2 * 4 + 8 + 4 * 8,
    pmskb_result: 8 + 4 + 2 + 2,
    pmskb_submit: 2 * 8 + 2 * 4 + 8,
    pmskb_desc: 8 + 4 * 4 + 8 + 3 * 4 + 2 + 2,
    pmskb_quota: 2 * 4 + 8,
    pmskb_counters: 18 * 8,
    pmskb_sock_info: 6 * 4 + 18 * 8,
    pmskb_format: 2 * 4 + 16 + 32 + 8 + 4 * 8,
    pmskb_attach: 4 * 4 + 16,
    pmskb_detach: 2 * 4 + 8,
    pmskb_open: 8 + 2 * 4 + 8 + 4 + 2 + 1 + 1 + 2 * 8 + 2 * 8,
    pmskb_alloc: 8 + 2 * 4 + 2 * 8,
    pmskb_store_info: 16 + 32 + 2 * 4 + 36 * 8 + 18 * 8,
    pmskb_compact: 8 + 2 * 4 + 4 * 8,
    pmskb_scrub_bad: 8 + 2 * 4,
    pmskb_scrub: 3 * 8 + 2 * 4 + 4 * 8,
}
