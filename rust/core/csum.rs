// SPDX-License-Identifier: GPL-2.0

//! Internet checksum arithmetic (RFC 1071, RFC 1624).
//!
//! A [`Sum`] is the ones' complement sum of a block's 16-bit words, *not*
//! complemented. Words are read in network order (the first byte is the high
//! one) and an odd last byte is a high byte; so the value is a plain number that
//! is the same on every CPU, and its big-endian form is what the wire carries
//! (`.get().to_be_bytes()`). 0xffff and 0x0000 mean the same in this arithmetic;
//! a `Sum` is always in the canonical form, 0x0000.

use core::ops::{Add, Sub};

/// The ones' complement sum of a block of bytes.
///
/// ```ignore
/// let whole = Sum::of(b"abcde");
/// assert_eq!(Sum::of(b"abc").then(3, Sum::of(b"de")), whole);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Sum(u16);

impl Sum {
    /// The sum of no bytes.
    pub const ZERO: Sum = Sum(0);

    /// From a 16-bit sum in network order, in either form of zero.
    pub const fn new(value: u16) -> Sum {
        if value == 0xffff {
            Sum(0)
        } else {
            Sum(value)
        }
    }

    /// The value, never 0xffff.
    pub const fn get(self) -> u16 {
        self.0
    }

    /// Folds a sum of 16-bit network-order words to 16 bits.
    pub const fn fold(mut sum: u64) -> Sum {
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        Sum::new(sum as u16)
    }

    /// From a Linux `__wsum`: a 32-bit partial sum in the CPU's byte order.
    pub const fn from_wsum(wsum: u32) -> Sum {
        let mut sum = wsum as u64;
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        Sum::new(u16::from_be(sum as u16))
    }

    /// Reads the bytes and sums them.
    pub fn of(bytes: &[u8]) -> Sum {
        let mut sum = 0u64;
        let mut words = bytes.chunks_exact(2);
        for word in &mut words {
            if let [high, low] = word {
                // 2^47 words fit before this could overflow.
                sum += u64::from(u16::from_be_bytes([*high, *low]));
            }
        }
        if let [last] = words.remainder() {
            sum += u64::from(*last) << 8;
        }
        Sum::fold(sum)
    }

    /// The sum as it counts when the block starts `at` bytes into another:
    /// at an odd offset the bytes of all words change places.
    pub const fn shifted(self, at: u64) -> Sum {
        if at & 1 == 1 {
            Sum::new(self.0.swap_bytes())
        } else {
            self
        }
    }

    /// The sum of a block of `len` bytes with this sum, followed by `next`.
    pub fn then(self, len: u64, next: Sum) -> Sum {
        self + next.shifted(len)
    }

    /// The sum of a block without a part of it that starts at `at` and has the
    /// sum `part`, as if the part's bytes were zero.
    pub fn without(self, at: u64, part: Sum) -> Sum {
        self - part.shifted(at)
    }

    /// The sum of what remains when the first `cut` bytes, with the sum `head`,
    /// are taken off the front.
    pub fn after(self, cut: u64, head: Sum) -> Sum {
        // What is left lies at an offset of `cut`; move it back to 0.
        (self - head).shifted(cut)
    }

    /// What a header's checksum field holds: the complement, in network order.
    pub const fn field(self) -> u16 {
        !self.0
    }
}

impl Add for Sum {
    type Output = Sum;

    fn add(self, other: Sum) -> Sum {
        Sum::fold(u64::from(self.0) + u64::from(other.0))
    }
}

impl Sub for Sum {
    type Output = Sum;

    fn sub(self, other: Sum) -> Sum {
        Sum::fold(u64::from(self.0) + u64::from(!other.0))
    }
}

/// The pseudo header of TCP or UDP over IPv4. Addresses as on the wire;
/// `len` is that of transport header and payload.
pub fn pseudo_v4(src: [u8; 4], dst: [u8; 4], protocol: u8, len: u32) -> Sum {
    let len = Sum::fold(u64::from(len));
    Sum::of(&src) + Sum::of(&dst) + Sum::new(u16::from(protocol)) + len
}

/// The pseudo header of TCP or UDP over IPv6.
pub fn pseudo_v6(src: &[u8; 16], dst: &[u8; 16], next_header: u8, len: u32) -> Sum {
    let len = Sum::fold(u64::from(len));
    Sum::of(src) + Sum::of(dst) + Sum::new(u16::from(next_header)) + len
}

/// The payload's sum, from a segment whose transport checksum is right, without
/// reading the payload: pseudo header, transport header (its checksum field
/// included) and payload add up to zero.
///
/// `header` is the transport header as it arrived, options included; its
/// length is even. The caller has excluded a UDP field of 0, which means that
/// there is no checksum.
pub fn payload_of(pseudo: Sum, header: &[u8]) -> Sum {
    Sum::ZERO - (pseudo + Sum::of(header))
}
