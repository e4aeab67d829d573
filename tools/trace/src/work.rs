// SPDX-License-Identifier: GPL-2.0-only
//! Names and contents of what the guest's programs store: both follow from numbers, so that a mark
//! needs to tell no more than those.

/// Small and seeded: splitmix64.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// One for a place of a whole: different ones are independent of each other.
    pub fn of(seed: u64, place: &[u64]) -> Self {
        let mut rng = Rng(seed);
        for number in place {
            rng.0 = rng.number() ^ number;
        }
        rng.0 = rng.number();
        rng
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end.max(1)
    }

    /// Whether something of `one` in `of` cases is so.
    pub fn chance(&mut self, one: u64, of: u64) -> bool {
        self.below(of) < one
    }
}

/// The bytes of key `number`: a name that begins with it, of a length that follows from it.
pub fn key_of(number: u64) -> Vec<u8> {
    let mut key = format!("{:x}.{:x}-", number >> 32, number & 0xffff_ffff).into_bytes();
    let long = match number % 11 {
        3 => 48,
        7 => 200,
        _ => 0,
    };
    while key.len() < long {
        key.push(b'a' + (key.len() % 26) as u8);
    }
    key
}

/// The bytes of the object that operation `op` makes.
pub fn bytes_of(op: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng::of(0x7061_636b_6574, &[op]);
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend(rng.number().to_le_bytes());
    }
    out.truncate(len);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn keys_and_contents_differ() {
        let keys: HashSet<_> = (0..4u64)
            .flat_map(|w| (0..500).map(move |n| key_of((w << 32) | n)))
            .collect();
        assert_eq!(keys.len(), 2000);
        assert!(keys.iter().any(|k| k.len() == 200) && keys.iter().any(|k| k.len() < 10));
        let all: HashSet<_> = (0..1000).map(|op| bytes_of(op, 9)).collect();
        assert_eq!(all.len(), 1000);
        assert_eq!(bytes_of(1, 100)[..50], bytes_of(1, 50));
        assert_eq!(key_of(5), b"0.5-");
    }
}
