// SPDX-License-Identifier: GPL-2.0-only
//! What a plugin is told on QEMU's command line: `KEY=VALUE`, each a string of its own.

use libc::{c_char, c_int};
use std::ffi::CStr;

/// The strings that QEMU gives to `qemu_plugin_install`.
///
/// # Safety
///
/// `argv` points to `argc` terminated strings that outlive the answer.
pub unsafe fn strings<'a>(argc: c_int, argv: *const *const c_char) -> Result<Vec<&'a str>, String> {
    let count = usize::try_from(argc).unwrap_or(0);
    (0..count)
        .map(|i| {
            // SAFETY: `i` is one of the `argc` strings that the caller promises.
            let string = unsafe { CStr::from_ptr(*argv.add(i)) };
            string.to_str().map_err(|e| e.to_string())
        })
        .collect()
}

/// Keys and values of arguments, each key once.
pub fn pairs<'a>(
    args: impl IntoIterator<Item = &'a str>,
) -> Result<Vec<(&'a str, &'a str)>, String> {
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    for arg in args {
        let (key, value) = arg
            .split_once('=')
            .ok_or_else(|| format!("{arg}: not of the form key=value"))?;
        if pairs.iter().any(|(other, _)| *other == key) {
            return Err(format!("{key}= is given twice"));
        }
        pairs.push((key, value));
    }
    Ok(pairs)
}

/// A number, decimal or with 0x, and with K, M or G.
#[must_use]
pub fn number(value: &str) -> Option<u64> {
    let (digits, shift) = match value.as_bytes().last()? {
        b'K' => (&value[..value.len() - 1], 10),
        b'M' => (&value[..value.len() - 1], 20),
        b'G' => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    let n = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    n.ok()?.checked_mul(1 << shift)
}
