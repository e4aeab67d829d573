// SPDX-License-Identifier: GPL-2.0-only
//! The mark: a no-op by which the guest speaks to the plugin. `%rax` says what it means.

/// What a mark means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// The window with this number begins.
    Begin(u64),
    /// The window that has begun ends, and is written.
    End,
    /// Windows will come: from now on there are callbacks.
    Watch,
    /// None will come for now: the guest runs faster.
    Rest,
}

impl Mark {
    /// As a number in `%rax`.
    pub fn code(self) -> u64 {
        match self {
            Mark::Begin(number) => 1 | (number << 8),
            Mark::End => 2,
            Mark::Watch => 3,
            Mark::Rest => 4,
        }
    }

    /// From a number in `%rax`; `None` for what is no mark of this plugin's.
    pub fn from_code(code: u64) -> Option<Self> {
        match (code & 0xff, code >> 8) {
            (1, number) => Some(Mark::Begin(number)),
            (2, 0) => Some(Mark::End),
            (3, 0) => Some(Mark::Watch),
            (4, 0) => Some(Mark::Rest),
            _ => None,
        }
    }

    /// Makes the mark. On a machine without the plugin nothing happens.
    #[cfg(target_arch = "x86_64")]
    pub fn make(self) {
        // SAFETY: a no-op with a memory operand that is never accessed.
        unsafe {
            std::arch::asm!("nopl {mark}(%rax)", mark = const pmskb_tcg::decode::MARK,
                in("rax") self.code(), options(att_syntax, nostack, preserves_flags));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_means_what_it_said() {
        for mark in [
            Mark::Begin(0),
            Mark::Begin(77),
            Mark::End,
            Mark::Watch,
            Mark::Rest,
        ] {
            assert_eq!(Mark::from_code(mark.code()), Some(mark));
        }
        for code in [0, 5, 0x102, 0xffff_8880_0000_0000] {
            assert_eq!(Mark::from_code(code), None, "{code:#x}");
        }
    }

    #[test]
    fn it_is_the_instruction_that_the_plugin_looks_for() {
        // nopl disp32(%rax), as an assembler writes it.
        let mut code = vec![0x0f, 0x1f, 0x80];
        code.extend(pmskb_tcg::decode::MARK.to_le_bytes());
        let found = pmskb_tcg::decode::decode(&code);
        assert_eq!(found, Some(pmskb_tcg::decode::Op::Mark));
        // And it does nothing here.
        Mark::Begin(0).make();
    }
}
