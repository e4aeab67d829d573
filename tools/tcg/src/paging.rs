// SPDX-License-Identifier: GPL-2.0-only
//! From linear to guest-physical addresses.
//!
//! The plugin API has no translation for an address that no memory access was
//! made to, and a write-back makes none. So the guest's page tables are walked,
//! which works for any mapping: direct map, `memremap`, a process's DAX mapping.

/// Where Linux maps all physical memory when booted with `nokaslr`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectMap {
    /// The linear address of physical address 0.
    pub base: u64,
    /// The length of the window.
    pub size: u64,
}

impl DirectMap {
    /// The kernel's layout for five or four levels of page tables; `base`
    /// overrides the start, for a kernel that moved it.
    pub fn new(five_levels: bool, base: Option<u64>) -> Self {
        let (start, size) = if five_levels {
            (0xff11_0000_0000_0000, 1 << 55)
        } else {
            (0xffff_8880_0000_0000, 1 << 46)
        };
        Self {
            base: base.unwrap_or(start),
            size,
        }
    }

    /// The physical address behind `linear`, if it lies in the window.
    pub fn physical(&self, linear: u64) -> Option<u64> {
        let offset = linear.checked_sub(self.base)?;
        (offset < self.size).then_some(offset)
    }
}

/// The outcome of a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    /// Maps to this physical address.
    Mapped(u64),
    /// Is not mapped.
    Absent,
    /// A page table could not be read.
    Unreadable,
}

/// The bits of a page-table entry that hold an address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;

/// Walks the page tables at `cr3` for `linear`; `read` reads eight bytes of
/// physical memory.
pub fn walk(
    cr3: u64,
    five_levels: bool,
    linear: u64,
    mut read: impl FnMut(u64) -> Option<u64>,
) -> Walk {
    let mut table = cr3 & ADDRESS;
    for level in (0..if five_levels { 5 } else { 4 }).rev() {
        let shift = 12 + 9 * level;
        let Some(entry) = read(table + ((linear >> shift) & 0x1ff) * 8) else {
            return Walk::Unreadable;
        };
        if entry & PRESENT == 0 {
            return Walk::Absent;
        }
        if level == 0 || (level <= 2 && entry & LARGE != 0) {
            // Bit 12 of a large page's entry is PAT, not address: masked off here.
            let within = (1u64 << shift) - 1;
            return Walk::Mapped((entry & ADDRESS & !within) | (linear & within));
        }
        table = entry & ADDRESS;
    }
    unreachable!("the last level returns")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// Page tables that map one page, of a size given by the level of its entry.
    fn tables(five: bool, linear: u64, physical: u64, leaf: u32) -> HashMap<u64, u64> {
        let mut memory = HashMap::new();
        let mut table = 0x1000;
        for level in (leaf..if five { 5 } else { 4 }).rev() {
            let slot = table + ((linear >> (12 + 9 * level)) & 0x1ff) * 8;
            table += 0x1000;
            let entry = if level > leaf {
                table | 0x8000_0000_0000_0063
            } else {
                let frame = physical & !((1 << (12 + 9 * leaf)) - 1);
                frame | 0x8000_0000_0000_0063 | if leaf > 0 { LARGE | (1 << 12) } else { 0 }
            };
            memory.insert(slot, entry);
        }
        memory
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn finds_what_is_mapped(
            linear: u64, physical in 0u64..1 << 51, leaf in 0u32..3, five: bool,
        ) {
            let within = (1u64 << (12 + 9 * leaf)) - 1;
            let memory = tables(five, linear, physical, leaf);
            let read = |at| Some(memory.get(&at).copied().unwrap_or(0));
            prop_assert_eq!(
                walk(0x1000 | 0xfff, five, linear, read),
                Walk::Mapped((physical & !within) | (linear & within))
            );
            prop_assert_eq!(walk(0x1000, five, linear ^ (1 << 38), read), Walk::Absent);
            prop_assert_eq!(walk(0x1000, five, linear, |_| None), Walk::Unreadable);
        }
    }

    #[test]
    fn direct_map() {
        let four = DirectMap::new(false, None);
        assert_eq!(four.physical(0xffff_8881_0400_0040), Some(0x1_0400_0040));
        assert_eq!(four.physical(0xffff_c880_0000_0000), None);
        assert_eq!(four.physical(0x7fff_0000_0000), None);
        let five = DirectMap::new(true, None);
        assert_eq!(five.physical(0xff11_0001_0000_0000), Some(0x1_0000_0000));
        assert_eq!(five.physical(0xffff_8881_0000_0000), None);
        let moved = DirectMap::new(true, Some(0xff20_0000_0000_0000));
        assert_eq!(moved.physical(0xff20_0000_0000_1000), Some(0x1000));
    }
}
