// SPDX-License-Identifier: GPL-2.0

//! The CRC32C of bytes that lie together, from those of their parts.
//!
//! A CRC is the remainder of a polynomial over GF(2): what comes before `n` more bytes counts as
//! multiplied by x^(8n). Bits are reflected, as in the CRC32C of RFC 3720: bit 31 of a word
//! is x^0.

/// The polynomial of Castagnoli, without its highest term.
const POLY: u32 = 0x82f6_3b78;
const ONE: u32 = 1 << 31;

/// The product of two polynomials, modulo [`POLY`].
const fn product(a: u32, mut b: u32) -> u32 {
    let mut out = 0;
    let mut bit = ONE;
    while bit != 0 {
        if a & bit != 0 {
            out ^= b;
        }
        b = (b >> 1) ^ (if b & 1 != 0 { POLY } else { 0 });
        bit >>= 1;
    }
    out
}

/// x to the power of 8 * 2^n, modulo [`POLY`].
const POWERS: [u32; 64] = {
    let mut powers = [0; 64];
    let mut power = ONE >> 8;
    let mut n = 0;
    while n < powers.len() {
        powers[n] = power;
        power = product(power, power);
        n += 1;
    }
    powers
};

/// The CRC32C of bytes whose first part has the CRC32C `first`, and whose last `len` bytes have
/// the CRC32C `last`. As many steps as `len` has bits that are set.
pub fn combine(first: u32, last: u32, len: u64) -> u32 {
    let mut shifted = first;
    for (n, power) in POWERS.iter().enumerate() {
        if (len >> n) & 1 != 0 {
            shifted = product(shifted, *power);
        }
    }
    shifted ^ last
}
